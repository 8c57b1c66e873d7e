"""What a Fisher approximation costs: entries of the Fisher, numbers stored, operations a step."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import singledispatch

import numpy as np

from natgrad_flax import (
    EKFAC,
    KFAC,
    BlockDiagonal,
    BlockTriDiagonal,
    Diagonal,
    Exact,
    LayerWise,
    QuasiDiagonal,
    Structure,
    UnitWise,
)
from natgrad_flax.checks import check_structure
from natgrad_flax.structures import Geometry
from ntk_analysis.gradient_descent import GradientDescent


@dataclass(frozen=True)
class StructureCost:
    """The cost of one Fisher approximation on a network.

    Attributes:
      structure: its name.
      num_params: P.
      nonzeros: entries of the P x P Fisher that the structure keeps; the Kronecker products of
        K-FAC and EKFAC fill the blocks of the block-diagonal structure. For the quasi-diagonal one
        these are the non-zeros of its inverse, since its own G is filled in unit by unit. An entry
        counts that can be non-zero: with several outputs and the mean squared error, those between
        different units of the last layer are zero all the same.
      stored: numbers that an implementation keeps which forms the Fisher itself: nonzeros, once
        where they come in symmetric pairs; the two factors of each layer for K-FAC; their
        eigenvectors and the scaling in that basis for EKFAC; none for gradient descent.
      inversion_flops: of one step, what the structure adds to the gradient: Gram matrices,
        factorisations and their solves.
      step_flops: of one step, all of it.
    """

    structure: str
    num_params: int
    nonzeros: int
    stored: int
    inversion_flops: float
    step_flops: float

    @property
    def fraction_of_exact(self) -> float:
        """nonzeros / P^2; about 1 / (M (L - 1)) for the unit-wise Fisher of a square network."""
        return self.nonzeros / self.num_params**2


def structure_cost(
    structure: Structure, geometry: Geometry, *, damped: bool = False
) -> StructureCost:
    """Counts entries, numbers and leading-order flops of one full-batch step.

    The flops are those of this project's solves in sample space: a forward pass, derivatives D of
    every output, N C x N C or N x N Gram matrices, and a product back to the parameters. An
    addition and a multiplication are two flops. K-FAC inverts each factor on its smaller side;
    EKFAC finds its eigenvectors there (9 n^3) and takes the gradient in their basis alone;
    the other structures too change to parameter space where that is smaller (``space="auto"``),
    which is not counted here.

    Args:
      structure: the Fisher approximation, or ``GradientDescent()``.
      geometry: sizes of the network and the batch. Layers that follow each other show whether they
        have biases, which ``QuasiDiagonal`` counts; layer 1 is taken to be like layer 2.
      damped: whether there is a damping; layer-wise and unit-wise structures then solve larger
        systems.

    Raises:
      TypeError: the structure is unknown here.
      ValueError: a layer-wise structure for another number of layers; ``QuasiDiagonal`` on a
        single layer.
    """
    check_structure(structure)
    nonzeros, stored = _entries(structure, geometry)
    inversion = _inversion(structure, geometry, damped)
    params = sum(_params(geometry))
    return StructureCost(
        structure.name, params, nonzeros, stored, inversion, gradient_flops(geometry) + inversion
    )


def gradient_flops(geometry: Geometry) -> float:
    """Flops of the gradient: forward pass, D of every output, and the product J^T r.

    2 N P + 2 N C (P - P_1) + 2 N C sum_l M_l + 2 N P with P_l parameters in layer l; for one output
    it is ordinary back-propagation.
    """
    n, c = geometry.num_samples, geometry.num_outputs
    params = _params(geometry)
    combine = 2.0 * n * c * sum(units for _, units in geometry.layers)
    return 4.0 * n * sum(params) + 2.0 * n * c * sum(params[1:]) + combine


@singledispatch
def _entries(structure: Structure, geometry: Geometry) -> tuple[int, int]:
    """Non-zeros and stored numbers."""
    raise TypeError(f"the cost of {structure.name} is not known")


@_entries.register
def _(structure: Exact, geometry: Geometry) -> tuple[int, int]:
    params = sum(_params(geometry))
    return params**2, _triangle(params)


@_entries.register
def _(structure: LayerWise, geometry: Geometry) -> tuple[int, int]:
    sigma = structure.coupling(geometry.depth)
    params = list(enumerate(_params(geometry)))
    nonzeros = sum(p * q for i, p in params for j, q in params if sigma[i, j] != 0)
    # blocks on the diagonal are symmetric, the others come in pairs
    diagonal = sum(p for i, p in params if sigma[i, i] != 0)
    return nonzeros, (nonzeros + diagonal) // 2


@_entries.register
def _(structure: KFAC, geometry: Geometry) -> tuple[int, int]:
    nonzeros = sum(p**2 for p in _params(geometry))
    return nonzeros, sum(_triangle(k) + _triangle(m) for k, m in geometry.layers)


@_entries.register
def _(structure: EKFAC, geometry: Geometry) -> tuple[int, int]:
    nonzeros = sum(p**2 for p in _params(geometry))
    return nonzeros, sum(k**2 + m**2 + k * m for k, m in geometry.layers)


@_entries.register
def _(structure: UnitWise, geometry: Geometry) -> tuple[int, int]:
    layers = geometry.layers
    return sum(m * k**2 for k, m in layers), sum(m * _triangle(k) for k, m in layers)


@_entries.register
def _(structure: Diagonal, geometry: Geometry) -> tuple[int, int]:
    params = sum(_params(geometry))
    return params, params


@_entries.register
def _(structure: QuasiDiagonal, geometry: Geometry) -> tuple[int, int]:
    params = sum(_params(geometry))
    mixed = _weights_beside_a_bias(geometry)
    return params + 2 * mixed, params + mixed


@_entries.register
def _(structure: GradientDescent, geometry: Geometry) -> tuple[int, int]:
    return sum(_params(geometry)), 0


@singledispatch
def _inversion(structure: Structure, geometry: Geometry, damped: bool) -> float:
    """Flops of Gram matrices, factorisations and solves."""
    raise TypeError(f"the cost of {structure.name} is not known")


@_inversion.register
def _(structure: Exact, geometry: Geometry, damped: bool) -> float:
    return _layer_grams(geometry, range(geometry.depth)) + _cholesky(_size(geometry))


@_inversion.register
def _(structure: LayerWise, geometry: Geometry, damped: bool) -> float:
    depth, size = geometry.depth, _size(geometry)
    sigma = structure.coupling(depth)
    if damped:
        coupled = depth * size
        definite = np.linalg.eigvalsh(sigma)[0] > 0
        return _layer_grams(geometry, range(depth)) + (
            _cholesky(coupled) if definite else _lu(coupled)
        )
    used = [index for index, w in enumerate(structure.weights(depth)) if abs(w) > 1e-12]
    return _layer_grams(geometry, used) + len(used) * _cholesky(size)


@_inversion.register
def _(structure: BlockDiagonal, geometry: Geometry, damped: bool) -> float:
    grams = _layer_grams(geometry, range(geometry.depth))
    return grams + geometry.depth * _cholesky(_size(geometry))


@_inversion.register
def _(structure: BlockTriDiagonal, geometry: Geometry, damped: bool) -> float:
    depth, size = geometry.depth, _size(geometry)
    if damped:
        # layers 1, 3, ... are inverted, each of the others takes one product of its own and one
        # with each of its neighbours but one, and what remains is solved by LU
        kept = depth // 2
        products = kept + 2 * max(kept - 1, 0)
        inverses = (depth - kept) * _inverse(size)
        grams = _layer_grams(geometry, range(depth))
        return grams + inverses + products * 2.0 * size**3 + _lu(kept * size)
    flops = _inversion.dispatch(LayerWise)(structure, geometry, False)
    if depth % 3 == 2:
        # the step of least norm inverts the layers of the null vector of Sigma
        flops += (2 * (depth + 1) // 3) * _inverse(size) + _cholesky(size)
    return float(flops)


@_inversion.register
def _(structure: KFAC, geometry: Geometry, damped: bool) -> float:
    n, size = geometry.num_samples, _size(geometry)
    total = 0.0
    for fan_in, units in geometry.layers:
        if fan_in < n:
            total += _gram(fan_in, n) + _cholesky(fan_in, units)
        else:
            total += _gram(n, fan_in) + _inverse(n) + 2.0 * n**2 * units
        if units < size:
            total += _gram(units, size) + _cholesky(units, n)
        else:
            total += _gram(size, units) + _inverse(size) + 2.0 * n * size * units
    return total


@_inversion.register
def _(structure: EKFAC, geometry: Geometry, damped: bool) -> float:
    n, size = geometry.num_samples, _size(geometry)
    total = 0.0
    for fan_in, units in geometry.layers:
        left, right = min(fan_in, n), min(units, size)
        total += _eigenbasis(n, fan_in) + _eigenbasis(size, units)
        # signals in the basis, and the means of their squares
        total += 2.0 * n * fan_in * left + 2.0 * size * units * right + 2.0 * n * left * right
        # the gradient in the basis; the way back is in place of its product with the inputs
        total += 2.0 * n * left * units + 4.0 * left * units * right
        total += 2.0 * fan_in * units * (left - n)
    return total


@_inversion.register
def _(structure: UnitWise, geometry: Geometry, damped: bool) -> float:
    n, c = geometry.num_samples, geometry.num_outputs
    total = 0.0
    for index, (fan_in, units) in enumerate(geometry.layers):
        total += _gram(n, fan_in) + 2.0 * n * c * units
        # undamped, units that are active on every sample share one factorisation
        shared = not damped and (geometry.active_fraction == 1 or index == geometry.depth - 1)
        total += _cholesky(n, units) if shared else units * _cholesky(n)
    return total


@_inversion.register
def _(structure: Diagonal, geometry: Geometry, damped: bool) -> float:
    n, c = geometry.num_samples, geometry.num_outputs
    return sum(2.0 * n * c * m + 2.0 * n * k * m for k, m in geometry.layers)


@_inversion.register
def _(structure: QuasiDiagonal, geometry: Geometry, damped: bool) -> float:
    mixed = 2.0 * geometry.num_samples * _weights_beside_a_bias(geometry)
    return float(_inversion.dispatch(Diagonal)(Diagonal(), geometry, damped)) + mixed


@_inversion.register
def _(structure: GradientDescent, geometry: Geometry, damped: bool) -> float:
    return 0.0


def _params(geometry: Geometry) -> list[int]:
    """P_l."""
    return [fan_in * units for fan_in, units in geometry.layers]


def _weights_beside_a_bias(geometry: Geometry) -> int:
    """How many weights belong to a unit with a bias: which layers have one shows in their sizes."""
    if geometry.depth == 1:
        raise ValueError(
            "the sizes of a single layer do not show whether it has a bias, on which the cost of "
            "QuasiDiagonal depends; take a network with a hidden layer"
        )
    pairs = itertools.pairwise(geometry.layers)
    biases = [fan_in > units for (_, units), (fan_in, _) in pairs]
    return sum(
        (fan_in - 1) * units
        for (fan_in, units), bias in zip(geometry.layers, [biases[0], *biases], strict=True)
        if bias
    )


def _size(geometry: Geometry) -> int:
    """N C."""
    return geometry.num_samples * geometry.num_outputs


def _triangle(side: int) -> int:
    return side * (side + 1) // 2


def _gram(side: int, other: int) -> float:
    """Flops of X X^T for X (side, other)."""
    return 2.0 * side**2 * other


def _layer_grams(geometry: Geometry, layers: range | list[int]) -> float:
    """Flops of K_l = (a a^T) . (D D^T) for some layers."""
    n, size = geometry.num_samples, _size(geometry)
    return sum(
        _gram(n, fan_in) + _gram(size, units)
        for fan_in, units in (geometry.layers[index] for index in layers)
    )


def _cholesky(side: int, columns: int = 1) -> float:
    """Flops of a Cholesky factorisation and of the solves of some right-hand sides."""
    return side**3 / 3 + 2.0 * side**2 * columns


def _eigenbasis(rows: int, params: int) -> float:
    """Flops of the eigenvectors of X^T X for X (rows, params), by a QR of X^T where it is tall."""
    if params <= rows:
        return _gram(params, rows) + 9.0 * params**3
    orthogonal = 4.0 * params * rows**2 - 4 * rows**3 / 3
    return orthogonal + 11.0 * rows**3 + 2.0 * params * rows**2


def _lu(side: int) -> float:
    return 2 * side**3 / 3 + 2.0 * side**2


def _inverse(side: int) -> float:
    """Flops of an explicit inverse of a positive definite matrix."""
    return float(side**3)
