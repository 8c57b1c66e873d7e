"""One Fisher block a layer."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import Array

from natgrad_flax.damping import is_zero, per_layer
from natgrad_flax.layer_signals import LayerSignals, LayerUpdate
from natgrad_flax.linalg import add_diagonal, solve_psd
from natgrad_flax.signals import Residual, Signals
from natgrad_flax.structures.base import (
    Space,
    block_words,
    check_space,
    dual_direction,
    pull_back_solution,
    ravel,
    sample_targets,
    woodbury,
)
from natgrad_flax.structures.exact import mean_gram_diagonal
from natgrad_flax.structures.layer_wise import LayerWise
from natgrad_flax.structures.least_squares import least_squares, normal_solve


class BlockDiagonal(LayerWise):
    """Sigma = I: one Fisher block a layer (Karakida & Osawa 2020, Section 4.1); alpha = L.

    Each layer is solved in the smaller of sample and parameter space, and may have a damping of
    its own.

    Args:
      space: "sample", "parameter", or "auto".
    """

    couples_layers = False

    def __init__(self, space: Space = "auto") -> None:
        object.__setattr__(self, "sigma", ())
        check_space(space)
        object.__setattr__(self, "space", space)

    def coupling(self, depth: int) -> np.ndarray:
        """The identity, shape (L, L)."""
        return np.eye(depth)

    def solve(
        self, signals: Signals, residual: Residual, damping: Array | float
    ) -> tuple[LayerUpdate, ...]:
        """G^{-1} J^T r / N; see ``Structure.solve``."""
        shifted = not is_zero(damping)
        updates = []
        for index, (layer, rho) in enumerate(
            zip(signals.layers, per_layer(damping, len(signals.layers)), strict=True)
        ):
            if self._layer_in_parameters(layer):
                if not shifted and residual.coefficients is not None:
                    flat = least_squares(layer.to_dense(), residual.coefficients.reshape(-1))
                else:
                    slope = layer.pull_back(residual.direction(layer, index))
                    flat = _solve_block(layer, ravel((slope,)) / signals.num_samples, rho)
                updates.append(layer.unravel(flat))
                continue
            shift = signals.num_samples * rho
            gram = add_diagonal(layer.gram(), shift)
            dual = solve_psd(gram, sample_targets(layer, index, residual), shifted=shifted)
            updates.append(layer.pull_back(dual_direction(layer, index, residual, dual, shift)))
        return tuple(updates)

    def precondition(
        self, signals: Signals, slope: tuple[LayerUpdate, ...], damping: Array | float
    ) -> tuple[LayerUpdate, ...]:
        """G^{-1} g; see ``Structure.precondition``."""
        shifted = not is_zero(damping)
        updates = []
        for layer, g, rho in zip(
            signals.layers, slope, per_layer(damping, len(signals.layers)), strict=True
        ):
            if self._layer_in_parameters(layer):
                updates.append(layer.unravel(_solve_block(layer, ravel((g,)), rho)))
                continue
            shift = signals.num_samples * rho
            gram = add_diagonal(layer.gram(), shift)
            solution = solve_psd(gram, layer.jvp(g).reshape(-1), shifted=shifted)
            if shifted:
                updates.append(woodbury(layer, g, solution, shift))
            else:
                again = solve_psd(gram, solution, shifted=False)
                updates.append(pull_back_solution(layer, again))
        return tuple(updates)

    def _layer_in_parameters(self, layer: LayerSignals) -> bool:
        small = layer.num_params < layer.num_samples * layer.num_seeds
        return small if self.space == "auto" else self.space == "parameter"

    def _solve_grams(
        self,
        sigma: np.ndarray,
        grams: list[Array],
        targets: list[Array],
        shift: Array | float,
        *,
        zero: bool,
        inside: bool,
    ) -> list[Array]:
        return [
            solve_psd(add_diagonal(gram, s), target, shifted=not zero)
            for gram, target, s in zip(grams, targets, per_layer(shift, len(grams)), strict=True)
        ]

    def damping_scale(self, signals: Signals) -> Array:
        """Mean diagonal of K_l / N, one value a layer."""
        return jnp.stack(mean_gram_diagonal(signals))

    def gram_size(self, signals: Signals) -> int:
        """N S, or the largest P_l below it."""
        if self.space == "parameter":
            return max(layer.num_params for layer in signals.layers)
        return signals.size

    def block_form(self, layer: LayerSignals) -> str:
        """See ``Structure.block_form``."""
        return f"exact block, {block_words(layer, self._layer_in_parameters(layer))}"


def _solve_block(layer: LayerSignals, slope: Array, rho: Array | float) -> Array:
    """(J_l^T J_l / N + rho)^{-1} g, shape (P_l,)."""
    jacobian, n = layer.to_dense(), layer.num_samples
    if is_zero(rho):
        return normal_solve(jacobian, n * slope)
    return solve_psd(add_diagonal(jacobian.T @ jacobian / n, rho), slope, shifted=True)
