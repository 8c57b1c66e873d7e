"""Which condition behind isotropy a network on its data fails, at which layer, and what to do.

The sizes of a network bound the ranks that the theory asks for; only the data tell what they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import singledispatch

import jax
import numpy as np
from numpy.typing import NDArray

from natgrad_flax import KFAC, Exact, LayerWise, Signals, Structure, UnitWise
from natgrad_flax.layer_signals import LayerSignals
from natgrad_flax.shared_signals import SharedSignals
from natgrad_flax.signals import DenseSignals
from natgrad_flax.structures import Geometry
from natgrad_flax.weight_sharing import SharedGeometry, kfac_ranks, unit_wise_ranks
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
    alike = parallel(kernel[:: signals.num_seeds, :: signals.num_seeds])
    if not len(first):
        return NetworkRanks(tuple(layers), rank, (1.0, 1.0), None, alike)
    samples = np.moveaxis(first, 1, 0).reshape(signals.num_samples, -1)
    return NetworkRanks(tuple(layers), rank, leverages(first[0]), _twins(samples), alike)


def _rows(layer: LayerSignals) -> tuple[Matrix, Matrix]:
    """Inputs and derivatives, one row a sample, seed and position, for every group of units.

    Nothing for parameters that have none.
    """
    if isinstance(layer, SharedSignals):
        inputs, derivatives = layer.rows("expand")
    elif isinstance(layer, DenseSignals):
        inputs, derivatives = layer.augmented_inputs()[None], layer.flat_derivatives()[None]
    else:
        return np.zeros((0, 0, 0)), np.zeros((0, 0, 0))
    return np.asarray(inputs, np.float64), np.asarray(derivatives, np.float64)


@singledispatch
def failed_conditions(
    structure: Structure, geometry: Geometry, ranks: NetworkRanks
) -> tuple[str, ...]:
    """What fails of the assumptions behind alpha, from measured ranks; a sentence each.

    Exact: J of row rank N C. Layer-wise: every J_l of row rank N C (Karakida & Osawa 2020,
    Theorem 4.1). K-FAC: the inputs of every layer of rank N (of the first one: or equal leverages,
    as a Forster transform makes them) and the derivatives of every hidden layer of rank N C
    (Section 4.2). Unit-wise: the inputs of every layer of rank N (Theorem 5.1). All hold at zero
    damping. A rank that sizes rule out is named once, with the size as its cause. Other structures
    name what their own ``failed_conditions`` finds in the sizes. Where T_l positions share weights,
    K-FAC needs ranks N T_l and N C T_l, and a channel of the unit-wise Fisher N C inputs
    (``natgrad_flax.weight_sharing``).

    Args:
      structure: the Fisher approximation, or ``GradientDescent()``.
      geometry: the sizes of the network and the batch.
      ranks: of the same network and batch.
    """
    return tuple(structure.failed_conditions(geometry))


@failed_conditions.register
def _(structure: Exact, geometry: Geometry, ranks: NetworkRanks) -> tuple[str, ...]:
    wanted = geometry.num_samples * geometry.num_outputs
    if ranks.kernel == wanted:
        return ()
    params = sum(fan_in * units for fan_in, units in geometry.layers)
    if params < wanted:
        remedy = f"the network has {params} parameters; use a wider one, or fewer samples"
    else:
        remedy = _twin_remedy(ranks) or "use a wider network, other inputs or fewer samples"
    return (
        f"the Jacobian of the network has row rank {ranks.kernel} of the {wanted} that "
        f"{structure.name} needs: {remedy}",
    )


@failed_conditions.register
def _(structure: LayerWise, geometry: Geometry, ranks: NetworkRanks) -> tuple[str, ...]:
    sentences = []
    wanted = geometry.num_samples * geometry.num_outputs
    for index, layer in enumerate(ranks.layers):
        if layer.jacobian == wanted:
            continue
        if index == geometry.depth - 1:
            # D_L = I, so the rank of J_L is C times the rank of the layer's inputs
            sentences.append(_inputs_sentence(structure, index, geometry, ranks))
            continue
        fan_in, units = geometry.layers[index]
        bottleneck = _bottleneck(geometry, index)
        if fan_in * units < wanted:
            remedy = f"it has {fan_in * units} parameters; use more units, or fewer samples"
        elif bottleneck < geometry.num_outputs:
            remedy = (
                f"{geometry.num_outputs} outputs reach it through {bottleneck} units; use at "
                f"least {geometry.num_outputs} in every hidden layer"
            )
        else:
            remedy = _twin_remedy(ranks) or "use wider layers, other inputs or fewer samples"
        sentences.append(
            f"{_where(index, geometry)}: its Jacobian has row rank {layer.jacobian} of the "
            f"{wanted} that {structure.name} needs: {remedy}"
        )
    return tuple(sentences)


@failed_conditions.register
def _(structure: KFAC, geometry: Geometry, ranks: NetworkRanks) -> tuple[str, ...]:
    if isinstance(geometry, SharedGeometry):
        return _shared_kfac(structure, geometry, ranks)
    sentences = []
    n = geometry.num_samples
    wanted = n * geometry.num_outputs
    for index, layer in enumerate(ranks.layers):
        assert layer.inputs is not None
        assert layer.derivatives is not None
        if index == 0 and layer.inputs < n:
            low, high = ranks.leverages
            if high - low > _EQUAL_LEVERAGES * high:
                sentences.append(
                    f"{_where(0, geometry)}: its inputs have rank {layer.inputs} for {n} samples, "
                    f"and their leverages range from {low:.3g} to {high:.3g} where "
                    f"{structure.name} needs equal ones: apply a Forster transform to the inputs "
                    "(natgrad_datasets.forster_transform), or use fewer samples"
                )
        elif layer.inputs < n:
            sentences.append(_inputs_sentence(structure, index, geometry, ranks))
        if index < geometry.depth - 1 and layer.derivatives < wanted:
            units = geometry.layers[index][1]
            if units < wanted:
                remedy = f"use at least {wanted} units in this layer, or fewer samples"
            else:
                remedy = _twin_remedy(ranks) or (
                    "use wider layers, another activation or fewer samples"
                )
            sentences.append(
                f"{_where(index, geometry)}: its derivatives have rank {layer.derivatives} of the "
                f"{wanted} that {structure.name} needs: {remedy}"
            )
    return tuple(sentences)


@failed_conditions.register
def _(structure: UnitWise, geometry: Geometry, ranks: NetworkRanks) -> tuple[str, ...]:
    if isinstance(geometry, SharedGeometry):
        return _shared_unit_wise(structure, geometry, ranks)
    return tuple(
        _inputs_sentence(structure, index, geometry, ranks)
        for index, layer in enumerate(ranks.layers)
        if layer.inputs is not None and layer.inputs < geometry.num_samples
    )


def _shared_kfac(structure: KFAC, geometry: SharedGeometry, ranks: NetworkRanks) -> tuple[str, ...]:
    if structure.sharing == "reduce":
        return (
            'KFAC(sharing="reduce") takes means over positions, which span no Jacobian of them',
        )
    sentences = [
        f"{_where(index, geometry)} has no inputs and units"
        for index, count in enumerate(geometry.positions)
        if count is None
    ]
    for need in kfac_ranks(geometry):
        layer = ranks.layers[need.layer]
        found = layer.inputs if need.what == "inputs" else layer.derivatives
        if found is not None and found < need.rank:
            sentences.append(
                f"{_where(need.layer, geometry)}: its {need.what} have rank {found} of the "
                f"{need.rank} (N times {geometry.positions[need.layer]} positions) that "
                f"{structure.name} needs, and it has {need.size} "
                f"{'inputs' if need.what == 'inputs' else 'channels'}"
            )
    return tuple(sentences)


def _shared_unit_wise(
    structure: UnitWise, geometry: SharedGeometry, ranks: NetworkRanks
) -> tuple[str, ...]:
    sentences = []
    for need in unit_wise_ranks(geometry):
        inputs, count = ranks.layers[need.layer].inputs, geometry.positions[need.layer]
        found = inputs if count == 1 and inputs is not None else need.size
        if found < need.rank:
            sentences.append(
                f"{_where(need.layer, geometry)}: a channel has {found} independent inputs of the "
                f"{need.rank} that {structure.name} needs: use larger kernels, more channels in "
                "front of it, or fewer samples"
            )
    return tuple(sentences)


def _bottleneck(geometry: Geometry, index: int) -> int:
    """The fewest numbers through which outputs reach a layer."""
    if not isinstance(geometry, SharedGeometry):
        return min(width for _, width in geometry.layers[index:])
    behind = zip(geometry.layers[index:], geometry.positions[index:], strict=True)
    return min(width * (count or 1) for (_, width), count in behind)


def _where(index: int, geometry: Geometry) -> str:
    return f"layer {index + 1}" + (" (the last)" if index == geometry.depth - 1 else "")


def _inputs_sentence(
    structure: Structure, index: int, geometry: Geometry, ranks: NetworkRanks
) -> str:
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
        f"{_where(index, geometry)}: its inputs have rank {ranks.layers[index].inputs} of the {n} "
        f"that {structure.name} needs: {remedy}"
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
