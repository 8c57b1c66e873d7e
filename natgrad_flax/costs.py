"""What the formulas and structures hold and cost, from the shapes of signals.

Flops count a multiplication and an addition as two, n^3 / 3 for a Cholesky factorisation, 9 n^3 for
an eigendecomposition, 4 P R^2 - 4/3 R^3 for both factors of a QR of (P, R), and no savings by
symmetry.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from natgrad_flax.layer_signals import LayerSignals
from natgrad_flax.operators.base import in_parameters
from natgrad_flax.shared_signals import ExplicitSignals, SharedSignals
from natgrad_flax.signals import DenseSignals, Signals
from natgrad_flax.sizes_of_signals import sample_jacobian_entries
from natgrad_flax.structures import (
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


@dataclass(frozen=True)
class Approximation:
    """What a structure keeps of the Fisher block of one layer.

    Attributes:
      form: in words.
      held: bytes of the matrices that it builds, or None where they are not known.
      flops: to build and to solve with them, a multiplication and an addition counted as two.
    """

    form: str
    held: int | None
    flops: int | None


def gram_by(layer: LayerSignals) -> str:
    """What a Gram matrix K_l = J_l J_l^T is built from, in words."""
    if isinstance(layer, DenseSignals):
        return "inputs and units"
    pairs = isinstance(layer, SharedSignals) and layer.pairs_are_cheaper()
    return "pairs of positions" if pairs else "Jacobians"


def gram_flops(layer: LayerSignals) -> int:
    """To build K_l."""
    n, s = layer.num_samples, layer.num_seeds
    if isinstance(layer, DenseSignals):
        return 2 * n**2 * layer.fan_in + (n * s) ** 2 * (2 * layer.num_units + 1)
    if isinstance(layer, SharedSignals) and layer.pairs_are_cheaper():
        pairs, units = (n * layer.num_positions) ** 2, layer.num_units
        return 2 * pairs * (layer.num_groups * (layer.fan_in + s**2) + s**2 * units)
    return _jacobian_flops(layer) + 2 * (n * s) ** 2 * layer.num_params


def _jacobian_flops(layer: LayerSignals) -> int:
    """To build per-sample Jacobians of shared weights."""
    if not isinstance(layer, SharedSignals):
        return 0
    return 2 * layer.num_samples * layer.num_seeds * layer.num_positions * layer.num_params


def approximate(structure: Structure, signals: Signals, index: int) -> Approximation:
    """What a structure makes of the block of one layer, from the shapes of the signals."""
    layer = signals.layers[index]
    item = signals.outputs.dtype.itemsize
    n, s, k, m, p = (
        *(layer.num_samples, layer.num_seeds, layer.fan_in, layer.num_units),
        layer.num_params,
    )
    rows = n * s
    if isinstance(structure, (Exact, LayerWise)):
        form = "exact"
        if isinstance(structure, LayerWise):
            form = "exact block" if isinstance(structure, BlockDiagonal) else "exact, coupled"
        alone = isinstance(structure, BlockDiagonal)
        small = p < rows if structure.space == "auto" and alone else structure.space == "parameter"
        if structure.space == "auto" and not alone:
            small = structure.gram_size(signals) == signals.num_params
        solve = min(p, rows) ** 3 // 3 if alone else 0
        if small:
            built = _jacobian_flops(layer) + 2 * rows * p**2
            return Approximation(f"{form}, P x P", item * p**2, built + solve)
        extra = sample_jacobian_entries(structure, layer)
        held = item * (rows**2 + extra)
        return Approximation(f"{form}, by {gram_by(layer)}", held, gram_flops(layer) + solve)
    if isinstance(structure, (KFAC, EKFAC)) and not isinstance(layer, ExplicitSignals):
        sizes = _kronecker_sizes(structure, layer)
        if isinstance(structure, KFAC):
            return _kronecker(structure, sizes, item)
        return _eigenbasis(structure, layer, sizes, item)
    if isinstance(structure, (KFAC, EKFAC, UnitWise)):
        if isinstance(structure, UnitWise) and isinstance(layer, DenseSignals):
            rows = n
        side = min(k, rows)
        built = _jacobian_flops(layer) + m * (2 * rows * k * side + side**3 // 3)
        held = item * (m * side**2 + sample_jacobian_entries(structure, layer))
        return Approximation("exact block a unit", held, built)
    if isinstance(structure, (Diagonal, QuasiDiagonal)):
        kept = 1 if isinstance(structure, Diagonal) or len(_parameter_names(layer)) < 2 else 2
        form = "diagonal" if kept == 1 else "diagonal and row of the bias, a unit"
        squares = 2 * n * p if isinstance(layer, DenseSignals) else 2 * rows * p
        held = item * (kept * p + sample_jacobian_entries(structure, layer))
        return Approximation(form, held, _jacobian_flops(layer) + kept * squares)
    return Approximation(f"as {structure.name} says", None, None)


def _parameter_names(layer: LayerSignals) -> tuple[str, ...]:
    return ("kernel",) if layer.bias_scale is None else ("kernel", "bias")


class _KroneckerSizes(NamedTuple):
    """Of one affine layer: G, and rows and parameters of both factors of a group."""

    form: str
    groups: int
    inputs: tuple[int, int]
    units: tuple[int, int]


def _kronecker_sizes(structure: KFAC | EKFAC, layer: LayerSignals) -> _KroneckerSizes:
    form, groups, expand = "Kronecker", 1, 1
    if isinstance(layer, SharedSignals):
        form, groups = f"Kronecker, {structure.sharing}", layer.num_groups
        expand = layer.num_positions if structure.sharing == "expand" else 1
    rows = layer.num_samples * expand
    units = (rows * layer.num_seeds, layer.num_units // groups)
    return _KroneckerSizes(form, groups, (rows, layer.fan_in), units)


def _kronecker(structure: KFAC, sizes: _KroneckerSizes, item: int) -> Approximation:
    (_, k), (_, m) = sizes.inputs, sizes.units
    held, flops = 0, 2 * k * m * (k + m)
    for rows, params in (sizes.inputs, sizes.units):
        side = params if in_parameters(structure.space, rows, params) else rows
        held += side**2
        flops += 2 * rows * params * side + side**3 // 3
    return Approximation(sizes.form, item * sizes.groups * held, sizes.groups * flops)


def _eigenbasis(
    structure: EKFAC, layer: LayerSignals, sizes: _KroneckerSizes, item: int
) -> Approximation:
    """Eigenvectors of what the rows span, S* in them, and the gradient in them."""
    whole = isinstance(layer, SharedSignals) and structure.sharing == "reduce"
    held, flops, ranks = 0, 0, []
    for rows, params in (sizes.inputs, sizes.units):
        side = params if whole or params <= rows else rows
        if side == params:
            flops += 2 * rows * params**2 + 9 * params**3
        else:
            # QR of the rows, the square of its triangle, and back
            flops += 4 * params * rows**2 - 4 * rows**3 // 3 + 11 * rows**3 + 2 * params * rows**2
        held += side**2 + params * side
        ranks.append(side)
    (_, k), (_, m), (r, q) = sizes.inputs, sizes.units, ranks
    n, s = layer.num_samples, layer.num_seeds
    if isinstance(layer, SharedSignals):
        t = layer.num_positions
        turned_rows = t * k * r + s * t * (m * q + r * q)
        turned_jacobians = s * (t * k * m + r * k * m + r * m * q)
        flops += 2 * n * (min(turned_rows, turned_jacobians) + s * r * q)
        held += n * s * (r * q if turned_rows < turned_jacobians else k * m)
    else:
        # once for S*, once for what the gradient has a part in
        flops += 2 * n * (2 * (k * r + s * m * q) + r * q)
    held += r * q
    # the gradient in the basis, which is taken there where the rows are few
    many = isinstance(layer, SharedSignals) and r == k
    rows = sizes.inputs[0]
    if isinstance(layer, SharedSignals) and not many:
        flops += 2 * rows * k * r
    flops += 2 * k * r * m if many else 2 * rows * r * m
    flops += 4 * r * q * m + 2 * k * r * m
    form = f"{sizes.form} eigenbasis"
    return Approximation(form, item * sizes.groups * held, sizes.groups * flops)


def shared_system(structure: Structure, signals: Signals) -> Approximation | None:
    """What is solved for all layers together."""
    if not isinstance(structure, (Exact, LayerWise)) or isinstance(structure, BlockDiagonal):
        return None
    side, depth = structure.gram_size(signals), len(signals.layers)
    flops = side**3 // 3
    if isinstance(structure, BlockTriDiagonal) and side == depth * signals.size:
        # every other layer is inverted, the rest is solved by LU
        kept = depth // 2 * signals.size
        flops = (depth - depth // 2) * 2 * signals.size**3 + 2 * kept**3 // 3
    item = signals.outputs.dtype.itemsize
    return Approximation(f"one system of {side:,} x {side:,}", item * side**2, flops)
