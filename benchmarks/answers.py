"""Whether a timed step is the natural gradient: G u = g, with G applied by its definition.

The structures solve for u, in sample or parameter space, through Gram matrices. Here their metric G
is only applied to u, parameter by parameter, and g comes from ``jax.grad``. So what is checked is
the very result that was timed, at its own size, and not by the code that made it.
"""

from __future__ import annotations

from functools import partial, singledispatch
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

import natgrad_flax as ng
from benchmarks.problems import Entry, Line, Problem
from benchmarks.programs import LEARNING_RATE, check_finite, damping
from natgrad_flax.damping import per_layer
from natgrad_flax.optimizer.gradient import resolve_damping
from natgrad_flax.optimizer.trees import as_state, leaf_names
from natgrad_flax.signals.base import (
    LayerSignals,
    LayerUpdate,
    layer_updates,
    matrix_of,
    named_updates,
)
from natgrad_flax.signals.dense import DenseSignals, Signals
from natgrad_flax.signals.fisher import fisher_signals
from natgrad_flax.signals.shared import ExplicitSignals, SharedSignals

DEFECT = 0.1
"""Most of |G u - g| / |g|. Rounding is about eps N S over the ratio of a relative damping."""

SCALE = 0.02
"""Most of <G u, g> / <g, g> - 1, in which rounding averages out."""

Updates = tuple[LayerUpdate, ...]


def check_step(line: Line, entry: Entry, problem: Problem, after: nnx.State) -> tuple[float, float]:
    """Compares a natural-gradient step with the definition of its structure.

    Args:
      line: loss and kind of Fisher.
      entry: the structure.
      problem: model, batch and key of the step.
      after: the parameters after the step.

    Returns:
      |G u - g| / |g| and <G u, g> / <g, g>, with u the step that was taken, over the learning rate.

    Raises:
      FloatingPointError: parameters that are not finite.
      ArithmeticError: the step is not that of the structure.
    """
    check_finite(after)
    graphdef, state = nnx.split(problem.model)
    with jax.default_matmul_precision("highest"):
        found = _compare(state, after, problem, line=line, entry=entry, graphdef=graphdef)
    defect, scale = map(float, found)
    if not (defect <= DEFECT and abs(scale - 1) <= SCALE):
        raise ArithmeticError(
            f"the step u of {entry.structure.name} is wrong: with its metric G and the gradient g, "
            f"|G u - g| / |g| = {defect:.3g} (at most {DEFECT}) and <G u, g> / <g, g> = "
            f"{scale:.3g} (1 +- {SCALE})"
        )
    return defect, scale


def _compare(
    state: nnx.State, after: nnx.State, problem: Problem, *, line: Line, entry: Entry, graphdef: Any
) -> tuple[Array, Array]:
    @jax.jit
    def compare(
        state: nnx.State, after: nnx.State, x: Array, y: Array, key: Array
    ) -> tuple[Array, Array]:
        model = nnx.merge(graphdef, state)
        signals, _ = fisher_signals(
            model, x, y, loss=line.loss, fisher=line.fisher, key=key, num_samples=1
        )
        rho = resolve_damping(entry.structure, signals, damping(line, entry))
        flat = {
            leaf_names(path): leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(
                jax.tree.map(lambda old, new: (old - new) / LEARNING_RATE, state, after)
            )
        }
        taken = layer_updates(signals.layers, flat)
        applied = metric_times(entry.structure, signals, rho, taken)
        found = as_state(state, named_updates(signals.layers, applied))
        slope = jax.grad(lambda state: line.loss(nnx.merge(graphdef, state)(x), y))(state)
        rest = jax.tree.map(jnp.subtract, found, slope)
        square = _inner(slope, slope)
        return jnp.sqrt(_inner(rest, rest) / square), _inner(found, slope) / square

    return compare(state, after, problem.x, problem.y, problem.key)


def _inner(one: Any, other: Any) -> Any:
    return sum(jax.tree.leaves(jax.tree.map(lambda a, b: jnp.sum(a * b), one, other)))


@singledispatch
def metric_times(
    structure: ng.Structure, signals: Signals, damping: Array | float, update: Updates
) -> Updates:
    """G u, without G, by a rule for the structure or else by its own operator.

    Args:
      structure: what G is; ``Structure.to_dense`` is the same G in full.
      signals: of the output directions.
      damping: in the 1/N convention, as ``Structure.solve`` takes it.
      update: u, one entry a layer.
    """
    applied = structure.operator(signals).matvec(update)
    return tuple(
        _sum(there, part, rho)
        for there, (_, part, rho) in zip(applied, _rows(signals, update, damping), strict=True)
    )


@metric_times.register
def _(structure: ng.Exact, signals: Signals, damping: Array | float, update: Updates) -> Updates:
    depth = len(signals.layers)
    return _coupled(np.ones((depth, depth)), signals, damping, update)


@metric_times.register
def _(
    structure: ng.LayerWise, signals: Signals, damping: Array | float, update: Updates
) -> Updates:
    return _coupled(structure.coupling(len(signals.layers)), signals, damping, update)


def _coupled(sigma: Any, signals: Signals, damping: Array | float, update: Updates) -> Updates:
    """S^T (Sigma (x) I) S u / N + rho u, S = blockdiag(J_1, ..., J_L)."""
    moved = [layer.jvp(part) for layer, part in zip(signals.layers, update, strict=True)]
    mixed = [
        sum(weight * change for weight, change in zip(row, moved, strict=True)) for row in sigma
    ]
    return tuple(
        _sum(layer.vjp(change / signals.num_samples), part, rho)
        for change, (layer, part, rho) in zip(mixed, _rows(signals, update, damping), strict=True)
    )


@metric_times.register
def _(structure: ng.UnitWise, signals: Signals, damping: Array | float, update: Updates) -> Updates:
    return tuple(
        _sum(_times_blocks(layer, part), part, rho)
        for layer, part, rho in _rows(signals, update, damping)
    )


def _times_blocks(layer: LayerSignals, part: LayerUpdate) -> LayerUpdate:
    """The Fisher blocks of single units times u."""
    if isinstance(layer, DenseSignals):
        return layer.local_vjp(_squares(layer) * layer.local_jvp(part))
    jacobian = layer.jacobian()
    moved = jnp.einsum("nskm,km->nsm", jacobian, matrix_of(part))
    return layer.update(jnp.einsum("nskm,nsm->km", jacobian, moved) / layer.num_samples)


@metric_times.register
def _(structure: ng.Diagonal, signals: Signals, damping: Array | float, update: Updates) -> Updates:
    return tuple(
        _sum(jax.tree.map(jnp.multiply, _entries(layer), part), part, rho)
        for layer, part, rho in _rows(signals, update, damping)
    )


@metric_times.register
def _(
    structure: ng.QuasiDiagonal, signals: Signals, damping: Array | float, update: Updates
) -> Updates:
    found = []
    for layer, part, rho in _rows(signals, update, damping):
        entries = jax.tree.map(lambda entry, rho=rho: entry + rho, _entries(layer))
        if layer.bias_scale is None:
            found.append(jax.tree.map(jnp.multiply, entries, part))
            continue
        mixed = _bias_row(layer)
        # the weights as the bias sees them, and what each weight has beyond that
        shared = part["bias"] + jnp.sum(mixed * part["kernel"], axis=0) / entries["bias"]
        rest = entries["kernel"] - mixed**2 / entries["bias"]
        found.append(
            {"kernel": mixed * shared + rest * part["kernel"], "bias": entries["bias"] * shared}
        )
    return tuple(found)


@metric_times.register
def _(structure: ng.KFAC, signals: Signals, damping: Array | float, update: Updates) -> Updates:
    if structure.split != "plain" or structure.first_layer != "literal":
        raise TypeError("the metric of KFAC is known here for split='plain' and a literal layer 1")
    n = signals.num_samples
    last = [i for i, a in enumerate(signals.layers) if not isinstance(a, ExplicitSignals)][-1]
    found = []
    for index, (layer, part, rho) in enumerate(_rows(signals, update, damping)):
        rho_a, rho_b = jnp.broadcast_to(jnp.asarray(rho), (2,))
        scaled = index == last and structure.last_layer == "scaled"
        if isinstance(layer, ExplicitSignals):
            found.append(_sum(_times_blocks(layer, part), part, rho_a))
            continue
        if isinstance(layer, SharedSignals):
            found.append(_times_shared(layer, structure.sharing, part, rho_a, rho_b))
            continue
        flat = layer.flat_derivatives()
        left = _sum(layer.local_vjp(layer.local_jvp(part) / n), part, rho_a)
        over = n * n if scaled else n
        right = partial(_times_units, flat=flat, over=over)
        found.append(_sum(jax.tree.map(right, left), left, rho_b))
    return tuple(found)


def _times_shared(
    layer: SharedSignals, sharing: str, part: LayerUpdate, rho_a: Array, rho_b: Array
) -> LayerUpdate:
    """(A + rho_A) u (B + rho_B) of weights that positions share, without groups."""
    left, right = _sharing_rows(layer, sharing)
    matrix = matrix_of(part)
    half = left.T @ (left @ matrix) / len(left) + rho_a * matrix
    return layer.update((half @ right.T) @ right / layer.num_samples + rho_b * half)


@metric_times.register
def _(structure: ng.EKFAC, signals: Signals, damping: Array | float, update: Updates) -> Updates:
    found = []
    for layer, part, rho in _rows(signals, update, damping):
        if isinstance(layer, ExplicitSignals):
            found.append(_sum(_times_blocks(layer, part), part, rho))
            continue
        if isinstance(layer, SharedSignals):
            a, d = _sharing_rows(layer, structure.sharing)
            left, right = (_eigenvectors(rows, structure.sharing == "expand") for rows in (a, d))
            turned = left.T @ layer.jacobian() @ right
            squares = jnp.sum(turned**2, axis=(0, 1)) / layer.num_samples
        else:
            assert isinstance(layer, DenseSignals)
            a, d = layer.augmented_inputs(), layer.flat_derivatives()
            left, right = _eigenvectors(a), _eigenvectors(d)
            turned = ((d @ right) ** 2).reshape(layer.num_samples, layer.num_directions, -1)
            squares = ((a @ left) ** 2).T @ jnp.sum(turned, axis=1) / layer.num_samples
        inside = left.T @ matrix_of(part) @ right
        found.append(_sum(layer.update(left @ (squares * inside) @ right.T), part, rho))
    return tuple(found)


def _eigenvectors(rows: Array, span: bool = True) -> Array:
    """Eigenvectors of rows^T rows as columns, by the rows' Gram matrix where that is smaller.

    Then only those of its range, so the span of the rows must be all that counts.
    """
    if not span or len(rows) >= rows.shape[1]:
        return jnp.linalg.eigh(rows.T @ rows)[1]
    values, vectors = jnp.linalg.eigh(rows @ rows.T)
    large = values > len(rows) * jnp.finfo(rows.dtype).eps * values[-1]
    scaling = jnp.where(large, jax.lax.rsqrt(jnp.where(large, values, 1)), 0)
    return rows.T @ (vectors * scaling)


def _sharing_rows(layer: SharedSignals, sharing: str) -> tuple[Array, Array]:
    """Rows of both Kronecker factors of weights that positions share, without groups."""
    a, d = layer.augmented_inputs()[:, :, 0], layer.derivatives[:, :, :, 0]
    if sharing == "reduce":
        a, d = jnp.mean(a, axis=1), jnp.sum(d, axis=2)
    return a.reshape(-1, a.shape[-1]), d.reshape(-1, layer.num_units)


def _times_units(rows: Array, flat: Array, over: int) -> Array:
    """Rows (..., M) times D^T D / over."""
    return (rows @ flat.T) @ flat / over


def _rows(signals: Signals, update: Updates, damping: Array | float) -> Any:
    return zip(signals.layers, update, per_layer(damping, len(signals.layers)), strict=True)


def _sum(applied: LayerUpdate, part: LayerUpdate, rho: Array | float) -> LayerUpdate:
    return {key: entry + rho * part[key] for key, entry in applied.items()}


def _squares(layer: DenseSignals) -> Array:
    """sum_s D[n,s,i]^2 / N, shape (N, M)."""
    return jnp.sum(layer.derivatives**2, axis=1) / layer.num_samples


def _bias_row(layer: LayerSignals) -> Array:
    """F between the bias and the weights of a unit, shape (K, M)."""
    if isinstance(layer, DenseSignals):
        assert layer.bias_scale is not None
        return layer.bias_scale * layer.inputs.T @ _squares(layer)
    jacobian = layer.jacobian()
    products = jnp.einsum("nsm,nskm->km", jacobian[:, :, -1], jacobian[:, :, :-1])
    return products / layer.num_samples


def _entries(layer: LayerSignals) -> LayerUpdate:
    """The diagonal of F in the shape of the parameters."""
    if not isinstance(layer, DenseSignals):
        return layer.update(jnp.sum(layer.jacobian() ** 2, axis=(0, 1)) / layer.num_samples)
    square = _squares(layer)
    entries = {"kernel": (layer.inputs**2).T @ square}
    if layer.bias_scale is not None:
        entries["bias"] = layer.bias_scale**2 * jnp.sum(square, axis=0)
    return entries
