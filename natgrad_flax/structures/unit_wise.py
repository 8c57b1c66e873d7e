"""Unit-wise Fisher: one block a unit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from natgrad_flax.damping import RelativeDamping, is_zero, per_layer
from natgrad_flax.linalg.dense import (
    add_diagonal,
    has_full_rank,
    pinv_solve,
    psd_eigenvalues,
    solve_psd,
)
from natgrad_flax.linalg.execution import by_columns, by_rows, many_devices
from natgrad_flax.operators.base import (
    Blocks,
    Space,
    add,
    check_space,
    mean_gram_diagonal,
    noise,
)
from natgrad_flax.operators.entries import divide
from natgrad_flax.operators.units import UnitBlocks, solve_block
from natgrad_flax.signals.base import LayerSignals, LayerUpdate, matrix_of
from natgrad_flax.signals.dense import DenseSignals, Signals
from natgrad_flax.signals.gradient import Gradient, Residual
from natgrad_flax.structures.base import (
    Structure,
    dense_layer,
    has_shared_layers,
    triangle,
)
from natgrad_flax.structures.diagonal import sum_over_units
from natgrad_flax.structures.geometry import Geometry, NeededRank, SharedGeometry
from natgrad_flax.structures.style import styled
from natgrad_flax.xla.batched_solve import ScaledGram, solve_scaled_gram, solve_scaled_grams

_NO_SHARED_LIMIT = (
    "UnitWise has no infinite-width kernel of a ConvNet: a channel of the first convolution keeps "
    "its few inputs at any width, and what the N C derivatives leave of their span is no function "
    'of the kernels of the layers; use kernels="empirical"'
)


@dataclass(frozen=True)
class UnitWise(Structure):
    """G = blockdiag over units of F + rho I (Karakida & Osawa 2020, Eq. 23).

    The block of unit i is a^T S_i a / N + rho I with S_i = diag_n(sum_s D[n,s,i]^2), so each unit
    costs one N x N solve (or one of its fan-in), whatever the width and the number of outputs.
    Units are handled in chunks.

    At zero damping and with inputs of rank N in every layer, Theta-bar is exactly diagonal for one
    output, with entries 1 + the number of units that are active on the sample; alpha is its mean,
    1 + gamma sum_{l<L} M_l / C (Theorem 5.1: gamma M (L - 1)). Training needs damping: the
    undamped update divides by D.

    Args:
      space: "sample" (N x N), "parameter" (fan-in x fan-in), or "auto": parameter space where the
        fan-in is below half of N.
    """

    space: Space = "auto"
    style = styled("Unit-wise", "#E69F00", "P")
    optimal_rate = "1/alpha (Theorem 5.1)"
    # an undamped unit divides by derivatives that can be arbitrarily small (science: KO-Thm5.1)
    default_damping = RelativeDamping(1e-3)
    infinite_width = "train"
    masks_units = True
    limit_kernels = ("inputs",)
    coefficient_arrays = (0.0, 8.0)

    def needed_ranks(self, geometry: Geometry) -> list[NeededRank]:
        """N of the inputs of a unit where nothing is shared, elsewhere N C."""
        n, c = geometry.num_samples, geometry.num_outputs
        shared = isinstance(geometry, SharedGeometry)
        return [
            NeededRank(index, "channel" if shared else "inputs", n if count == 1 else n * c, fan_in)
            for index, ((fan_in, _), count) in enumerate(
                zip(geometry.layers, geometry.positions, strict=True)
            )
        ]

    def shared_alpha(self, geometry: SharedGeometry) -> float:
        """1 + sum_{l<L} M_l, with gamma / C of those units that share nothing."""
        total = 1.0
        for (_, units), count in zip(geometry.layers[:-1], geometry.positions[:-1], strict=True):
            share = 1.0
            if count == 1:
                if geometry.active_fraction is None:
                    raise ValueError(
                        "alpha of UnitWise needs the fraction of active units of its dense layers"
                    )
                share = geometry.active_fraction / geometry.num_outputs
            total += share * units
        return total

    def no_limit(self, shared: bool) -> str:
        """Channels of shared weights keep a finite number of inputs."""
        return _NO_SHARED_LIMIT if shared else ""

    def __post_init__(self) -> None:
        check_space(self.space)

    def operator(self, signals: Signals) -> Blocks:
        """The Fisher blocks of all units, layer by layer."""
        return LayersOfUnits(
            tuple(
                DenseUnits(layer, self.space)
                if isinstance(layer, DenseSignals)
                else UnitBlocks(layer, self.space)
                for layer in signals.layers
            )
        )

    def coefficient(self, test: Signals, train: Signals, damping: Array | float) -> Array:
        """sum_i D'_i (a' (F_i + rho)^{-1} a^T) D_i^T / N, unit after unit."""
        if has_shared_layers(train):
            return super().coefficient(test, train, damping)
        total = jnp.zeros((), train.outputs.dtype)
        for test_layer, train_layer, rho in zip(
            map(dense_layer, test.layers),
            map(dense_layer, train.layers),
            per_layer(damping, len(train.layers)),
            strict=True,
        ):
            gram, cross = train_layer.input_gram(), test_layer.input_gram(train_layer)
            shift = train.num_samples * rho
            zero = is_zero(damping)

            def kernel(
                row: tuple[Array, ...],
                gram: Array = gram,
                cross: Array = cross,
                shift: Array | float = shift,
                zero: bool = zero,
            ) -> Array:
                # a' a^T sqrt(s) (sqrt(s) A sqrt(s) + N rho)^{-1} / sqrt(s), zero where s is
                (root,) = row
                matrix = root[:, None] * gram * root
                right = jnp.diag(divide(jnp.ones_like(root), root))
                if zero:
                    solved = pinv_solve(matrix, right)
                else:
                    eye = jnp.eye(len(root), dtype=root.dtype)
                    solved = solve_psd(matrix + shift * eye, right, shifted=True)
                return (cross * root) @ solved

            roots = jnp.sqrt(_weights(train_layer)).T
            total = total + sum_over_units(test_layer, train_layer, (roots,), kernel)
        return total

    def damping_scale(self, signals: Signals) -> Array:
        """Mean over units of the mean diagonal of their Gram matrices, over N, shape (L,)."""
        units = [layer.num_units for layer in signals.layers]
        means = jnp.stack(mean_gram_diagonal(signals.layers))
        return means / jnp.asarray(units, means.dtype)

    def alpha(self, geometry: Geometry) -> float:
        """1 + gamma sum_{l<L} M_l / C.

        Raises:
          ValueError: gamma is unknown, because the model names no activation.
        """
        if geometry.active_fraction is None:
            raise ValueError(
                "alpha of UnitWise needs the fraction of active units (1/2 for relu, 1 for smooth "
                "activations); a model without an `activation` name does not tell it: pass inputs "
                "as x= for 1 / lambda_max of the coefficient matrix"
            )
        hidden = sum(units for _, units in geometry.layers[:-1])
        return 1.0 + geometry.active_fraction * hidden / geometry.num_outputs

    def failed_conditions(self, geometry: Geometry) -> list[str]:
        """The inputs of every layer must be able to have rank N."""
        return [
            f"layer {index + 1} has {fan_in} inputs for {geometry.num_samples} samples"
            for index, (fan_in, _) in enumerate(geometry.layers)
            if fan_in < geometry.num_samples
        ]

    def gram_size(self, signals: Signals) -> int:
        """N: the units are solved in chunks of N x N systems."""
        return signals.num_samples

    def entries(self, geometry: Geometry) -> tuple[int, int]:
        """Those between parameters of the same unit; see ``Structure.entries``."""
        layers = geometry.layers
        return sum(m * k**2 for k, m in layers), sum(m * triangle(k) for k, m in layers)

    def block_form(self, layer: LayerSignals) -> str:
        """See ``Structure.block_form``."""
        return "exact block a unit"


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
class DenseUnits(UnitBlocks):
    """As ``UnitBlocks``, of inputs that all units of a layer share."""

    layer: DenseSignals

    def solve(self, gradient: Gradient, damping: Array | float) -> tuple[LayerUpdate, ...]:
        """See ``Operator.solve``."""
        layer, weights = self.layer, _weights(self.layer)
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
        gram, root = by_rows(layer.input_gram()), jnp.sqrt(_weights(layer))
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
        inside = jnp.sqrt(_weights(layer)) * by_rows(dual)
        if not isinstance(gradient, Residual):
            (g,) = gradient.vector((layer,))
            return jax.tree.map(lambda a, b: (a - b) / damping, g, layer.local_vjp(inside))
        if gradient.coefficients is not None:
            return layer.local_vjp(inside)
        outside = gradient.cotangent(layer, 0) - inside
        return layer.local_vjp(outside / (layer.num_samples * damping))

    def eigenvalues(self) -> Array:
        """Of all units, one after the other; of the smaller of block and Gram matrix."""
        layer, roots = self.layer, jnp.sqrt(_weights(self.layer) / self.layer.num_samples)
        by_gram = layer.fan_in >= layer.num_samples
        shared = layer.input_gram() if by_gram else layer.augmented_inputs()

        def unit(root: Array) -> Array:
            rows = root[:, None] * shared
            return psd_eigenvalues(rows * root if by_gram else rows.T @ rows)

        return jax.lax.map(unit, roots.T).reshape(-1)

    def sample(self, key: Array, damping: Array | float) -> tuple[LayerUpdate, ...]:
        """See ``Operator.sample``."""
        keys, roots = jax.random.split(key), jnp.sqrt(_weights(self.layer) / self.layer.num_samples)
        draw = roots * jax.random.normal(keys[0], roots.shape, roots.dtype)
        return add((self.layer.local_vjp(draw),), noise(keys[1], (self.layer,), damping))

    def matvec(self, vector: tuple[LayerUpdate, ...]) -> tuple[LayerUpdate, ...]:
        """See ``Operator.matvec``."""
        moved = self.layer.local_jvp(vector[0]) / self.layer.num_samples
        return (self.layer.local_vjp(_weights(self.layer) * moved),)


def _weights(layer: DenseSignals) -> Array:
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
