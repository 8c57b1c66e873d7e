"""Fisher blocks of single units of dense layers, which share the Gram matrix of their inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from natgrad_flax.damping import is_zero, per_layer
from natgrad_flax.linalg.dense import (
    add_diagonal,
    has_full_rank,
    inverse_psd,
    pinv_solve,
    psd_eigenvalues,
    solve_psd,
)
from natgrad_flax.linalg.execution import by_columns, by_rows, many_devices
from natgrad_flax.operators.base import (
    Blocks,
    add,
    noise,
)
from natgrad_flax.operators.entries import divide
from natgrad_flax.operators.units import WholeUnits, solve_block
from natgrad_flax.signals.base import LayerUpdate, matrix_of
from natgrad_flax.signals.dense import DenseSignals
from natgrad_flax.signals.gradient import Gradient, Residual
from natgrad_flax.xla.batched_solve import ScaledGram, solve_scaled_gram, solve_scaled_grams


@dataclass(frozen=True)
class LayersOfUnits(Blocks):
    """The blocks of the units of all layers, whose systems in sample space are solved together."""

    def solve(self, gradient: Gradient, damping: Array | float) -> tuple[LayerUpdate, ...]:
        """See ``Blocks.solve``; on a mesh each layer is split by its units."""
        if many_devices():
            return super().solve(gradient, damping)
        rhos = per_layer(damping, len(self.blocks))
        systems: dict[int, ScaledGram] = {}
        for index, (block, rho) in enumerate(zip(self.blocks, rhos, strict=True)):
            if isinstance(block, DenseUnits):
                system = block.system(gradient.of_layer(index), rho)
                systems |= {} if system is None else {index: system}
        found = solve_units_of_grams(list(systems.values())) if systems else []
        duals = dict(zip(systems, found, strict=True))
        updates: list[LayerUpdate] = []
        for index, (block, rho) in enumerate(zip(self.blocks, rhos, strict=True)):
            part = gradient.of_layer(index)
            if index in duals and isinstance(block, DenseUnits):
                updates.append(block.finish(part, rho, duals[index]))
            else:
                updates.extend(block.solve(part, rho))
        return tuple(updates)


@dataclass(frozen=True)
class DenseUnits(WholeUnits):
    """As ``WholeUnits``, of inputs that all units of a layer share."""

    layer: DenseSignals

    def solve(self, gradient: Gradient, damping: Array | float) -> tuple[LayerUpdate, ...]:
        """See ``Operator.solve``."""
        layer, weights = self.layer, unit_weights(self.layer)
        system = self.system(gradient, damping)
        if system is not None:
            gram, root, shift, rhs = system
            return (self.finish(gradient, damping, by_columns(_solve, (root, rhs), (gram, shift))),)
        if isinstance(gradient, Residual) and not self._small:
            columns = (weights, gradient.cotangent(layer, 0))
            dual = by_columns(_undamped, columns, (by_rows(layer.input_gram()),))
            return (layer.local_vjp(by_rows(dual)),)
        (g,) = gradient.vector((layer,))
        roots = jnp.sqrt(weights / layer.num_samples)
        in_parameters = partial(_in_parameters, rho=damping)
        columns = (roots, matrix_of(g))
        solved = by_columns(in_parameters, columns, (layer.augmented_inputs(),))
        return (layer.update(solved),)

    @property
    def _small(self) -> bool:
        """Whether systems are (fan_in, fan_in)."""
        # the solves in sample space run several times as fast as those in parameter space
        small = 2 * self.layer.fan_in < self.layer.num_samples
        return small if self.space == "auto" else self.space == "parameter"

    def system(self, gradient: Gradient, damping: Array | float) -> ScaledGram | None:
        """The damped systems of all units in sample space; None where others are solved.

        (sqrt(S_i) A sqrt(S_i) + s) v_i = b_i, whose solution is weighted by sqrt(S_i) once more
        (science: 3.5): b_i are the cotangents over sqrt(S_i) where the gradient lies in the span
        of the output directions, and its images where it does not.
        """
        layer = self.layer
        if is_zero(damping) or self._small:
            return None
        gram, root = by_rows(layer.input_gram()), jnp.sqrt(unit_weights(layer))
        if not isinstance(gradient, Residual):
            (g,) = gradient.vector((layer,))
            rhs = root * layer.local_jvp(g)
        elif gradient.coefficients is not None:
            rhs = divide(gradient.cotangent(layer, 0), root)
        else:
            rhs = root * (gram @ gradient.cotangent(layer, 0))
        return ScaledGram(gram, root, jnp.asarray(layer.num_samples * damping), rhs)

    def finish(self, gradient: Gradient, damping: Array | float, dual: Array) -> LayerUpdate:
        """The update of the layer from the solution of ``system``, (N, M)."""
        layer = self.layer
        inside = jnp.sqrt(unit_weights(layer)) * by_rows(dual)
        if not isinstance(gradient, Residual):
            (g,) = gradient.vector((layer,))
            return jax.tree.map(lambda a, b: (a - b) / damping, g, layer.local_vjp(inside))
        if gradient.coefficients is not None:
            return layer.local_vjp(inside)
        outside = gradient.cotangent(layer, 0) - inside
        return layer.local_vjp(outside / (layer.num_samples * damping))

    def eigenvalues(self) -> Array:
        """Of all units, one after the other; of the smaller of block and Gram matrix."""
        layer, roots = self.layer, jnp.sqrt(unit_weights(self.layer) / self.layer.num_samples)
        by_gram = layer.fan_in >= layer.num_samples
        shared = layer.input_gram() if by_gram else layer.augmented_inputs()

        def unit(root: Array) -> Array:
            rows = root[:, None] * shared
            return psd_eigenvalues(rows * root if by_gram else rows.T @ rows)

        return jax.lax.map(unit, roots.T).reshape(-1)

    def sample(self, key: Array, damping: Array | float) -> tuple[LayerUpdate, ...]:
        """See ``Operator.sample``."""
        keys, roots = (
            jax.random.split(key),
            jnp.sqrt(unit_weights(self.layer) / self.layer.num_samples),
        )
        draw = roots * jax.random.normal(keys[0], roots.shape, roots.dtype)
        return add((self.layer.local_vjp(draw),), noise(keys[1], (self.layer,), damping))

    def matvec(self, vector: tuple[LayerUpdate, ...]) -> tuple[LayerUpdate, ...]:
        """See ``Operator.matvec``."""
        moved = self.layer.local_jvp(vector[0]) / self.layer.num_samples
        return (self.layer.local_vjp(unit_weights(self.layer) * moved),)


def unit_weights(layer: DenseSignals) -> Array:
    """sum_s D[n,s,i]^2, shape (N, M)."""
    return jnp.sum(layer.derivatives**2, axis=1)


def _solve(root: Array, rhs: Array, gram: Array, shift: Array) -> Array:
    """``solve_units_of_grams`` of one layer."""
    return solve_units_of_grams([ScaledGram(gram, root, shift, rhs)])[0]


def solve_units_of_grams(systems: Sequence[ScaledGram]) -> list[Array]:
    """(diag(d_i) A diag(d_i) + s)^{-1} b_i for every unit of every layer, (N, M) each.

    By eigenvalues where s is too small for Cholesky in this precision, which is seen by solutions
    that are larger than 1 / s times their right-hand side. All layers are one loop, which is
    compiled once.
    """
    found = solve_scaled_grams(systems)
    good = jnp.stack(
        [
            jnp.all(
                system.shift * jnp.sum(dual**2, axis=0) ** 0.5
                <= 2 * jnp.sum(system.rhs**2, axis=0) ** 0.5
            )
            for system, dual in zip(systems, found, strict=True)
        ]
    )
    sizes = [system.rhs.shape[1] for system in systems]
    owner = np.repeat(np.arange(len(systems)), sizes)

    def by_eigenvalues() -> list[Array]:
        grams = jnp.stack([system.gram for system in systems])
        shifts = jnp.stack([system.shift for system in systems])

        def unit(columns: tuple[Array, Array, Array, Array]) -> Array:
            layer, d, b, v = columns
            matrix = add_diagonal(d[:, None] * grams[layer] * d, shifts[layer])
            return jax.lax.cond(good[layer], lambda: v, lambda: pinv_solve(matrix, b))

        columns = (
            jnp.concatenate(parts, axis=1).T
            for parts in (
                [system.scale for system in systems],
                [system.rhs for system in systems],
                found,
            )
        )
        solved = jax.lax.map(unit, (owner, *columns)).T
        return jnp.split(solved, np.cumsum(sizes)[:-1].tolist(), axis=1)

    return jax.lax.cond(jnp.all(good), lambda: found, by_eigenvalues)


def _in_parameters(roots: Array, gradient: Array, inputs: Array, *, rho: Array | float) -> Array:
    """(a^T S_i a / N + rho)^{-1} g_i, unit after unit, for g of shape (fan_in, M)."""

    def unit(columns: tuple[Array, Array]) -> Array:
        root, target = columns
        return solve_block(root[:, None] * inputs, target, rho)

    return jax.lax.map(unit, (roots.T, gradient.T)).T


def inverse_of_units(gram: Array, shift: Array | float) -> Callable[[Array], Array]:
    """From d (N,) of a unit to d (d A d + s)^{-1} / d, zero where d is; the limit at the number 0.

    Where the inputs have rank N that limit is A_SS^{-1} / d^2 on the samples S on which the unit is
    active: by Cholesky, as principal submatrices are no worse conditioned than A. Otherwise every
    unit gets an eigendecomposition of its own.
    """
    if not is_zero(shift):

        def damped(root: Array) -> Array:
            matrix = add_diagonal(root[:, None] * gram * root, shift)
            return root[:, None] * solve_psd(matrix, _over(root), shifted=True)

        return damped
    full_rank = has_full_rank(gram)

    def undamped(root: Array) -> Array:
        active = (root > 0).astype(gram.dtype)

        def masked() -> Array:
            matrix = active[:, None] * gram * active + jnp.diag(1 - active)
            return active[:, None] * divide(inverse_psd(matrix, shifted=True), root**2)

        def deficient() -> Array:
            return root[:, None] * pinv_solve(root[:, None] * gram * root, _over(root))

        return jax.lax.cond(full_rank, masked, deficient)

    return undamped


def _over(root: Array) -> Array:
    return jnp.diag(divide(jnp.ones_like(root), root))


def _undamped(weights: Array, cotangent: Array, gram: Array) -> Array:
    """The pseudo-inverse limit of ``_damped`` at s = 0 (science: 3.5).

    Where the inputs have rank N this is A_SS^{-1} (delta / s) on the samples S on which the unit is
    active. Otherwise every unit gets an eigendecomposition of its own.
    """
    full_rank = has_full_rank(gram)
    active = weights > 0
    targets = divide(cotangent, weights)

    def shared() -> Array:
        return solve_psd(gram, targets, shifted=False)

    def masked() -> Array:
        mask = active.astype(gram.dtype)
        # where both branches run (under vmap), no NaN of this one may reach a derivative
        regular = jnp.where(full_rank, gram, jnp.eye(len(gram), dtype=gram.dtype))
        return solve_scaled_gram(regular, mask, 1 - mask, targets)

    def deficient() -> Array:
        def unit(columns: tuple[Array, Array]) -> Array:
            root, target = columns
            return root * pinv_solve(root[:, None] * gram * root, divide(target, root))

        return jax.lax.map(unit, (jnp.sqrt(weights).T, cotangent.T)).T

    def regular() -> Array:
        return jax.lax.cond(jnp.all(active), shared, masked)

    return jax.lax.cond(full_rank, regular, deficient)
