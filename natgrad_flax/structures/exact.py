"""The exact Fisher."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array

from natgrad_flax.damping import is_zero
from natgrad_flax.layer_signals import LayerSignals, LayerUpdate
from natgrad_flax.linalg import add_diagonal, solve_psd
from natgrad_flax.signals import Residual, Signals
from natgrad_flax.structures.base import (
    Geometry,
    Space,
    Structure,
    check_space,
    dual_direction,
    gradient,
    pull_back_solution,
    ravel,
    sample_targets,
    triangle,
    woodbury,
)
from natgrad_flax.structures.least_squares import least_squares, normal_solve


@dataclass(frozen=True)
class Exact(Structure):
    """The whole Fisher, F + rho I (Karakida & Osawa 2020, Eqs. 8 and 9); alpha = 1.

    In sample space one Cholesky factorisation of the N S x N S Gram matrix, in parameter space one
    of the P x P Fisher.

    Args:
      space: "sample", "parameter", or "auto" for the smaller of the two.
    """

    space: Space = "auto"
    infinite_width = "all"
    couples_layers = True

    def __post_init__(self) -> None:
        check_space(self.space)

    def _in_parameters(self, signals: Signals) -> bool:
        if self.space == "auto":
            return signals.num_params < signals.size
        return self.space == "parameter"

    def solve(
        self, signals: Signals, residual: Residual, damping: Array | float
    ) -> tuple[LayerUpdate, ...]:
        """G^{-1} J^T r / N; see ``Structure.solve``."""
        shifted = not is_zero(damping)
        if self._in_parameters(signals):
            if not shifted and residual.coefficients is not None:
                rows = signals.to_dense()
                return signals.unravel(least_squares(rows, residual.coefficients.reshape(-1)))
            return self.precondition(signals, gradient(signals, residual), damping)
        shift = signals.num_samples * damping
        targets = residual.coefficients
        if targets is None:
            parts = [sample_targets(a, i, residual) for i, a in enumerate(signals.layers)]
            targets = sum(parts[1:], start=parts[0])
        gram = add_diagonal(signals.gram(), shift)
        solution = solve_psd(gram, targets.reshape(-1), shifted=shifted)
        return tuple(
            layer.pull_back(dual_direction(layer, index, residual, solution, shift))
            for index, layer in enumerate(signals.layers)
        )

    def precondition(
        self, signals: Signals, slope: tuple[LayerUpdate, ...], damping: Array | float
    ) -> tuple[LayerUpdate, ...]:
        """G^{-1} g; see ``Structure.precondition``."""
        shifted = not is_zero(damping)
        if self._in_parameters(signals):
            if not shifted:
                solved = normal_solve(signals.to_dense(), signals.num_samples * ravel(slope))
                return signals.unravel(solved)
            dense = self.to_dense(signals, damping)
            return signals.unravel(solve_psd(dense, ravel(slope), shifted=True))
        shift = signals.num_samples * damping
        parts = [layer.jvp(g) for layer, g in zip(signals.layers, slope, strict=True)]
        image = sum(parts[1:], start=parts[0]).reshape(-1)
        gram = add_diagonal(signals.gram(), shift)
        solution = solve_psd(gram, image, shifted=shifted)
        if not shifted:
            solution = solve_psd(gram, solution, shifted=False)
            return tuple(pull_back_solution(layer, solution) for layer in signals.layers)
        return tuple(
            woodbury(layer, g, solution, shift)
            for layer, g in zip(signals.layers, slope, strict=True)
        )

    def coefficient(self, test: Signals, train: Signals, damping: Array | float) -> Array:
        """Theta(x', x) (Theta + rho)^{-1} (Karakida & Osawa 2020, Eq. 13)."""
        gram = add_diagonal(train.gram(), train.num_samples * damping)
        cross = train.gram(test)
        return solve_psd(gram, cross, shifted=not is_zero(damping)).T

    def coefficient_times(
        self, test: Signals, train: Signals, damping: Array | float, vectors: Array
    ) -> Array:
        """K(x', x) (K + N rho)^{-1} V: one factorisation, and k right-hand sides."""
        gram = add_diagonal(train.gram(), train.num_samples * damping)
        return test.gram(train) @ solve_psd(gram, vectors, shifted=not is_zero(damping))

    def undamped_diagonal(self, train: Signals) -> Array:
        """1 for every output."""
        return jnp.ones(train.size, train.outputs.dtype)

    def to_dense(self, signals: Signals, damping: Array | float = 0.0) -> Array:
        """J^T J / N + rho I."""
        jacobian = signals.to_dense()
        return add_diagonal(jacobian.T @ jacobian / signals.num_samples, damping)

    def damping_scale(self, signals: Signals) -> Array:
        """Mean diagonal of K / N."""
        return sum(mean_gram_diagonal(signals), start=jnp.zeros(()))

    def alpha(self, geometry: Geometry) -> float:
        """1."""
        return 1.0

    def failed_conditions(self, geometry: Geometry) -> list[str]:
        """N C must not exceed the number of parameters."""
        params = sum(fan_in * units for fan_in, units in geometry.layers)
        outputs = geometry.num_samples * geometry.num_outputs
        if outputs <= params:
            return []
        return [f"the network has {params} parameters for N C = {outputs} outputs"]

    def gram_size(self, signals: Signals) -> int:
        """N S or P."""
        return signals.num_params if self._in_parameters(signals) else signals.size

    def entries(self, geometry: Geometry) -> tuple[int, int]:
        """All, those in symmetric pairs stored once; see ``Structure.entries``."""
        params = sum(geometry.params)
        return params**2, triangle(params)

    def block_form(self, layer: LayerSignals) -> str:
        """See ``Structure.block_form``."""
        return "exact"


def mean_gram_diagonal(signals: Signals) -> list[Array]:
    """For each layer the mean diagonal of K_l, over N."""
    return [jnp.mean(layer.gram_norms()) / layer.num_samples for layer in signals.layers]


def mean_diagonal(signals: Signals) -> Array:
    """The mean of the diagonal of F, one value a layer, without the diagonal."""
    return jnp.stack(
        [
            jnp.sum(layer.gram_norms()) / float(layer.num_samples * layer.num_params)
            for layer in signals.layers
        ]
    )
