"""Which condition behind isotropy a network on its data fails, at which layer, and what to do.

The sizes of a network bound the ranks that the theory asks for; only the data tell what they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import numpy as np
from numpy.typing import NDArray

from natgrad_flax import Signals, Structure
from natgrad_flax.signals.base import LayerSignals
from natgrad_flax.signals.dense import DenseSignals
from natgrad_flax.signals.shared import SharedSignals
from natgrad_flax.signals.tied import TiedSignals
from natgrad_flax.structures import Geometry
from natgrad_flax.structures.geometry import NeededRank, SharedGeometry
from ntk_analysis.empirical import Matrix

# a Forster transform leaves leverages that differ by its tolerance, 1e-3 by default
_EQUAL_LEVERAGES = 1e-2
_SAME = 64 * 2.0**-52


@dataclass(frozen=True)
class LayerRanks:
    """Numerical ranks of one layer, of whose weights T_l positions may share each.

    Attributes:
      inputs: of a_{l-1} with the bias column, one row a sample and position: N T_l at most. The
        least of all groups; None for parameters without inputs and units.
      derivatives: of D_l, one row a sample, output and position: N C T_l at most; or None.
      jacobian: of K_l = J_l J_l^T, N C at most.
    """

    inputs: int | None
    derivatives: int | None
    jacobian: int


@dataclass(frozen=True)
class NetworkRanks:
    """Numerical ranks of a network on a batch, and what explains them.

    Attributes:
      layers: in forward order.
      kernel: rank of K = sum_l K_l, N C at most.
      leverages: the smallest and the largest diagonal entry of the projector a_0 a_0^+ on the
        inputs of layer 1; both 1 where these have full row rank, or where there are none.
      twins: the numbers of two samples with the same inputs, or None.
      parallel: the numbers of two samples with proportional derivatives, or None.
    """

    layers: tuple[LayerRanks, ...]
    kernel: int
    leverages: tuple[float, float]
    twins: tuple[int, int] | None
    parallel: tuple[int, int] | None = None


def measured_ranks(signals: Signals) -> NetworkRanks:
    """Ranks from the eigenvalues of Gram matrices, in float64.

    Eigenvalues below n eps times the largest count as zero, n the longer side of the matrix whose
    rank it is (for J_l and J its N C rows); so singular values below about 1e-7 of the largest do.

    Args:
      signals: of the plain outputs, S = C.
    """
    with jax.enable_x64(True):
        layers = []
        kernel = np.zeros((signals.size, signals.size))
        for layer in signals.layers:
            gram = np.asarray(layer.gram(), np.float64)
            kernel += gram
            inputs, derivatives = (
                min(map(_rank, part)) if len(part) else None for part in _rows(layer)
            )
            layers.append(LayerRanks(inputs, derivatives, gram_rank(gram, len(gram))))
        first, _ = _rows(signals.layers[0])
    rank = gram_rank(kernel, len(kernel))
    alike = parallel(kernel[:: signals.num_directions, :: signals.num_directions])
    if not len(first):
        return NetworkRanks(tuple(layers), rank, (1.0, 1.0), None, alike)
    samples = np.moveaxis(first, 1, 0).reshape(signals.num_samples, -1)
    return NetworkRanks(tuple(layers), rank, leverages(first[0]), _twins(samples), alike)


def _rows(layer: LayerSignals) -> tuple[Matrix, Matrix]:
    """Inputs and derivatives, one row a sample, seed and position, for every group of units.

    Nothing for parameters that have none.
    """
    if isinstance(layer, SharedSignals) and not isinstance(layer, TiedSignals):
        inputs, derivatives = layer.rows("expand")
    elif isinstance(layer, DenseSignals):
        inputs, derivatives = layer.augmented_inputs()[None], layer.flat_derivatives()[None]
    else:
        return np.zeros((0, 0, 0)), np.zeros((0, 0, 0))
    return np.asarray(inputs, np.float64), np.asarray(derivatives, np.float64)


def failed_conditions(
    structure: Structure, geometry: Geometry, ranks: NetworkRanks
) -> tuple[str, ...]:
    """What fails of the assumptions behind alpha, from measured ranks; a sentence each.

    The assumptions are the ranks that the structure needs (``Structure.needed_ranks``): Exact: J
    of row rank N C. Layer-wise: every J_l of row rank N C (Karakida & Osawa 2020, Theorem 4.1).
    K-FAC: the inputs of every layer of rank N (of the first one: or equal leverages, as a Forster
    transform makes them) and the derivatives of every hidden layer of rank N C (Section 4.2).
    Unit-wise: the inputs of every layer of rank N (Theorem 5.1). All hold at zero damping. A rank
    that sizes rule out is named once, with the size as its cause. Other structures name what their
    own ``failed_conditions`` finds in the sizes. Where T_l positions share weights, K-FAC needs
    ranks N T_l and N C T_l, and a channel of the unit-wise Fisher N C inputs
    (``natgrad_flax.structures.weight_sharing``).

    Args:
      structure: the Fisher approximation, or ``GradientDescent()``.
      geometry: the sizes of the network and the batch.
      ranks: of the same network and batch.
    """
    needs = structure.needed_ranks(geometry)
    if needs is None:
        return tuple(structure.failed_conditions(geometry))
    sentences = structure.outside_theory(geometry)
    for need in needs:
        found = _found(need, geometry, ranks)
        if found is not None and found < need.rank:
            where = "" if need.what == "network" else f"{geometry.where(need.layer)}: "
            sentences.append(where + _what_fails(need, found, structure.name, geometry, ranks))
    return tuple(sentences)


def _found(need: NeededRank, geometry: Geometry, ranks: NetworkRanks) -> int | None:
    """The rank that there is, None where there is none to look at."""
    layer = ranks.layers[need.layer]
    if need.what == "network":
        return ranks.kernel
    if need.what == "jacobian":
        return layer.jacobian
    if need.what == "derivatives":
        return layer.derivatives
    if need.what == "equal leverages":
        low, high = ranks.leverages
        return layer.inputs if high - low > _EQUAL_LEVERAGES * high else None
    if need.what == "channel":
        alone = geometry.positions[need.layer] == 1 and layer.inputs is not None
        return layer.inputs if alone else need.size
    return layer.inputs


def _what_fails(
    need: NeededRank, found: int, name: str, geometry: Geometry, ranks: NetworkRanks
) -> str:
    """The sentence without the layer."""
    needed = f"of the {need.rank} that {name} needs"
    if need.what == "network":
        remedy = f"the network has {need.size} parameters; use a wider one, or fewer samples"
        if need.size >= need.rank:
            remedy = _twin_remedy(ranks) or "use a wider network, other inputs or fewer samples"
        return f"the Jacobian of the network has row rank {found} {needed}: {remedy}"
    if need.what == "jacobian" and need.layer < geometry.depth - 1:
        remedy = _jacobian_remedy(need, geometry, ranks)
        return f"its Jacobian has row rank {found} {needed}: {remedy}"
    if need.what == "channel":
        return (
            f"a channel has {found} independent inputs {needed}: use larger kernels, more channels "
            "in front of it, or fewer samples"
        )
    if need.what == "equal leverages":
        low, high = ranks.leverages
        return (
            f"its inputs have rank {found} for {need.rank} samples, and their leverages range from "
            f"{low:.3g} to {high:.3g} where {name} needs equal ones: apply a Forster transform to "
            "the inputs (natgrad_datasets.forster_transform), or use fewer samples"
        )
    if need.what == "jacobian":
        # D_L = I, so the rank of J_L is C times the rank of the layer's inputs
        return _inputs_sentence(need.layer, name, geometry, ranks)
    if isinstance(geometry, SharedGeometry):
        return (
            f"its {need.what} have rank {found} of the {need.rank} (N times "
            f"{geometry.positions[need.layer]} positions) that {name} needs, and it has "
            f"{need.size} {'inputs' if need.what == 'inputs' else 'channels'}"
        )
    if need.what == "inputs":
        return _inputs_sentence(need.layer, name, geometry, ranks)
    remedy = f"use at least {need.rank} units in this layer, or fewer samples"
    if need.size >= need.rank:
        remedy = _twin_remedy(ranks) or "use wider layers, another activation or fewer samples"
    return f"its derivatives have rank {found} {needed}: {remedy}"


def _jacobian_remedy(need: NeededRank, geometry: Geometry, ranks: NetworkRanks) -> str:
    if need.size < need.rank:
        return f"it has {need.size} parameters; use more units, or fewer samples"
    bottleneck = _bottleneck(geometry, need.layer)
    if bottleneck < geometry.num_outputs:
        return (
            f"{geometry.num_outputs} outputs reach it through {bottleneck} units; use at "
            f"least {geometry.num_outputs} in every hidden layer"
        )
    return _twin_remedy(ranks) or "use wider layers, other inputs or fewer samples"


def _bottleneck(geometry: Geometry, index: int) -> int:
    """The fewest numbers through which outputs reach a layer."""
    behind = zip(geometry.layers[index:], geometry.positions[index:], strict=True)
    return min(width * (count or 1) for (_, width), count in behind)


def _inputs_sentence(index: int, name: str, geometry: Geometry, ranks: NetworkRanks) -> str:
    n = geometry.num_samples
    if geometry.layers[index][0] < n:
        what = "inputs" if index == 0 else "hidden units in the layer before it"
        if isinstance(geometry, SharedGeometry):
            what = "features in front of it (all positions, not their mean, or channels)"
        remedy = f"use at least {n} {what}, or fewer samples"
    elif twins := _twin_remedy(ranks):
        remedy = twins
    elif index == 0:
        remedy = "the samples are linearly dependent; use other features, or fewer samples"
    else:
        remedy = (
            "the samples are linearly dependent there; use wider layers, another activation or "
            "fewer samples"
        )
    return (
        f"its inputs have rank {ranks.layers[index].inputs} of the {n} that {name} needs: {remedy}"
    )


def _twin_remedy(ranks: NetworkRanks) -> str:
    pair = ranks.twins or ranks.parallel
    if pair is None:
        return ""
    alike = "the same"
    if not ranks.twins:
        alike += " to the network (equal or, without biases, multiples of each other)"
    return f"samples {pair[0]} and {pair[1]} (counted from 0) are {alike}; drop one"


def _rank(matrix: Matrix) -> int:
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    return gram_rank(tall.T @ tall, len(tall))


def gram_rank(gram: Matrix, size: int) -> int:
    """The rank of what has this Gram matrix, ``size`` its longer side; see ``measured_ranks``."""
    values = np.linalg.eigvalsh(gram)
    return int(np.sum(values > _cutoff(values, size)))


def _cutoff(values: NDArray[np.floating], size: int) -> float:
    return float(size * np.finfo(np.float64).eps * np.max(np.abs(values)))


def leverages(inputs: Matrix) -> tuple[float, float]:
    """The smallest and the largest diagonal entry of the projector on the columns of inputs."""
    wide = inputs.shape[0] <= inputs.shape[1]
    values, vectors = np.linalg.eigh(inputs @ inputs.T if wide else inputs.T @ inputs)
    kept = values > _cutoff(values, max(inputs.shape))
    basis = vectors[:, kept] if wide else inputs @ (vectors[:, kept] / np.sqrt(values[kept]))
    diagonal = np.sum(basis**2, axis=1)
    return float(diagonal.min()), float(diagonal.max())


def _twins(inputs: Matrix) -> tuple[int, int] | None:
    seen: dict[bytes, int] = {}
    for number, row in enumerate(inputs):
        # adding 0 turns -0 into 0, which has other bytes
        other = seen.setdefault((row + 0.0).tobytes(), number)
        if other != number:
            return other, number
    return None


def parallel(kernel: Matrix) -> tuple[int, int] | None:
    """Two samples between which a kernel (N, N) has the cosine 1."""
    norms = np.sqrt(np.maximum(np.diagonal(kernel), 0))
    scale = np.outer(norms, norms)
    same = (kernel >= (1 - _SAME) * scale) & (scale > 0)
    pairs = np.argwhere(np.triu(same, 1))
    return (int(pairs[0, 0]), int(pairs[0, 1])) if len(pairs) else None
