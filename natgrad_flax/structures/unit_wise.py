"""Unit-wise Fisher: one block a unit."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from natgrad_flax.batched_solve import solve_scaled_gram
from natgrad_flax.damping import is_zero, per_layer
from natgrad_flax.layer_signals import LayerSignals, LayerUpdate, matrix_of
from natgrad_flax.linalg import add_diagonal, has_full_rank, pinv_solve, solve_psd
from natgrad_flax.signals import DenseSignals, Residual, Signals
from natgrad_flax.structures.base import (
    Geometry,
    Space,
    Structure,
    check_space,
    coefficient_by_columns,
    dense_layer,
    has_shared_layers,
    triangle,
)
from natgrad_flax.structures.diagonal import divide, sum_over_units
from natgrad_flax.structures.exact import mean_gram_diagonal
from natgrad_flax.structures.units import solve_block, solve_units


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
    infinite_width = "train"
    masks_units = True

    def __post_init__(self) -> None:
        check_space(self.space)

    def solve(
        self, signals: Signals, residual: Residual, damping: Array | float
    ) -> tuple[LayerUpdate, ...]:
        """G^{-1} J^T r / N; see ``Structure.solve``."""
        updates = []
        for index, (layer, rho) in enumerate(
            zip(signals.layers, per_layer(damping, len(signals.layers)), strict=True)
        ):
            direction = residual.direction(layer, index)
            if not isinstance(layer, DenseSignals):
                slope = matrix_of(layer.pull_back(direction / signals.num_samples))
                solved = solve_units(
                    layer.jacobian(),
                    slope,
                    rho,
                    coefficients=residual.coefficients,
                    space=self.space,
                )
                updates.append(layer.update(solved))
                continue
            # the solves in sample space run several times as fast as those in parameter space
            small = 2 * layer.fan_in < layer.num_samples if self.space == "auto" else False
            if small or self.space == "parameter":
                slope = matrix_of(layer.pull_back(direction / signals.num_samples))
                updates.append(_in_parameters(layer, slope, rho))
            elif is_zero(damping):
                updates.append(layer.pull_back(_undamped(layer, direction)))
            else:
                shift = signals.num_samples * rho
                inside = residual.coefficients is not None
                updates.append(layer.pull_back(_damped(layer, direction, shift, inside)))
        return tuple(updates)

    def precondition(
        self, signals: Signals, slope: tuple[LayerUpdate, ...], damping: Array | float
    ) -> tuple[LayerUpdate, ...]:
        """G^{-1} g; see ``Structure.precondition``."""
        updates = []
        for layer, g, rho in zip(
            signals.layers, slope, per_layer(damping, len(signals.layers)), strict=True
        ):
            if not isinstance(layer, DenseSignals):
                solved = solve_units(layer.jacobian(), matrix_of(g), rho, space=self.space)
                updates.append(layer.update(solved))
            elif is_zero(rho) or self.space == "parameter" or 2 * layer.fan_in < layer.num_samples:
                updates.append(_in_parameters(layer, matrix_of(g), rho))
            else:
                shift = signals.num_samples * rho
                root = jnp.sqrt(_weights(layer))
                image = root * layer.push_forward(g)
                dual = solve_units_of_gram(layer.input_gram(), root, shift, image)
                back = layer.pull_back(root * dual)
                updates.append(jax.tree.map(lambda a, b, rho=rho: (a - b) / rho, g, back))
        return tuple(updates)

    def coefficient(self, test: Signals, train: Signals, damping: Array | float) -> Array:
        """sum_i D'_i (a' (F_i + rho)^{-1} a^T) D_i^T / N, unit after unit."""
        if has_shared_layers(train):
            return coefficient_by_columns(self, test, train, damping)
        total = jnp.zeros((), train.outputs.dtype)
        for there, here, rho in zip(
            map(dense_layer, test.layers),
            map(dense_layer, train.layers),
            per_layer(damping, len(train.layers)),
            strict=True,
        ):
            gram, cross = here.input_gram(), there.input_gram(here)
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

            roots = jnp.sqrt(_weights(here)).T
            total = total + sum_over_units(there, here, (roots,), kernel)
        return total

    def to_dense(self, signals: Signals, damping: Array | float = 0.0) -> Array:
        """J^T J / N between parameters of the same unit, plus rho I."""
        jacobian = signals.to_dense()
        first, owner = 0, []
        for layer in signals.layers:
            owner.append(first + np.tile(np.arange(layer.num_units), layer.fan_in))
            first += layer.num_units
        unit = np.concatenate(owner)
        mask = jnp.asarray(unit[:, None] == unit[None, :], jacobian.dtype)
        rhos = jnp.concatenate(
            [
                jnp.full(layer.num_params, rho, jacobian.dtype)
                for layer, rho in zip(
                    signals.layers, per_layer(damping, len(signals.layers)), strict=True
                )
            ]
        )
        return mask * (jacobian.T @ jacobian) / signals.num_samples + jnp.diag(rhos)

    def damping_scale(self, signals: Signals) -> Array:
        """Mean over units of the mean diagonal of their Gram matrices, over N, shape (L,)."""
        units = [layer.num_units for layer in signals.layers]
        means = jnp.stack(mean_gram_diagonal(signals))
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


def _weights(layer: DenseSignals) -> Array:
    """sum_s D[n,s,i]^2, shape (N, M)."""
    return jnp.sum(layer.derivatives**2, axis=1)


def _damped(layer: DenseSignals, direction: Array, shift: Array | float, inside: bool) -> Array:
    """(S_i A + s)^{-1} delta_i for every unit, shape (N, M) (science: 3.5)."""
    gram, root = layer.input_gram(), jnp.sqrt(_weights(layer))
    if inside:
        return root * solve_units_of_gram(gram, root, shift, divide(direction, root))
    dual = solve_units_of_gram(gram, root, shift, root * (gram @ direction))
    return (direction - root * dual) / shift


def solve_units_of_gram(gram: Array, root: Array, shift: Array | float, rhs: Array) -> Array:
    """(diag(d_i) A diag(d_i) + s)^{-1} b_i for every unit, shape (N, M).

    By eigenvalues where s is too small for Cholesky in this precision, which is seen by solutions
    that are larger than 1 / s times their right-hand side.
    """
    found = solve_scaled_gram(gram, root, shift, rhs)

    def unit(columns: tuple[Array, Array]) -> Array:
        d, b = columns
        return pinv_solve(add_diagonal(d[:, None] * gram * d, shift), b)

    return jax.lax.cond(
        jnp.all(shift * jnp.sum(found**2, axis=0) ** 0.5 <= 2 * jnp.sum(rhs**2, axis=0) ** 0.5),
        lambda: found,
        lambda: jax.lax.map(unit, (root.T, rhs.T)).T,
    )


def _in_parameters(layer: DenseSignals, slope: Array, rho: Array | float) -> LayerUpdate:
    """(a^T S_i a / N + rho)^{-1} g_i, unit after unit, for g of shape (fan_in, M)."""
    inputs = layer.augmented_inputs()

    def unit(columns: tuple[Array, Array]) -> Array:
        root, target = columns
        return solve_block(root[:, None] * inputs, target, rho)

    roots = jnp.sqrt(_weights(layer) / layer.num_samples)
    solved = jax.lax.map(unit, (roots.T, slope.T))
    return layer.update(solved.T)


def _undamped(layer: DenseSignals, direction: Array) -> Array:
    """The pseudo-inverse limit of ``_damped`` at s = 0 (science: 3.5).

    Where the inputs have rank N this is A_SS^{-1} (delta / s) on the samples S on which the unit is
    active. Otherwise every unit gets an eigendecomposition of its own.
    """
    gram, weights = layer.input_gram(), _weights(layer)
    full_rank = has_full_rank(gram)
    active = weights > 0
    targets = divide(direction, weights)

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

        return jax.lax.map(unit, (jnp.sqrt(weights).T, direction.T)).T

    def regular() -> Array:
        return jax.lax.cond(jnp.all(active), shared, masked)

    return jax.lax.cond(full_rank, regular, deficient)
