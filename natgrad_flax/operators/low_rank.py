"""F = J^T J / N from the rows of J."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from natgrad_flax.damping import is_zero
from natgrad_flax.linalg.dense import add_diagonal, psd_eigenvalues, solve_psd
from natgrad_flax.operators.base import OfRows, add, noise
from natgrad_flax.operators.least_squares import least_squares, normal_solve
from natgrad_flax.signals.base import LayerUpdate, dense_jacobian, ravel, unravel
from natgrad_flax.signals.dense import symmetric_gram
from natgrad_flax.signals.gradient import Gradient


@dataclass(frozen=True)
class LowRank(OfRows):
    """J^T J / N of some layers together, solved with one matrix on the smaller side."""

    def gram(self) -> Array:
        """J J^T, shape (N S, N S); no 1/N."""
        return symmetric_gram(self.layers)

    def solve(self, gradient: Gradient, damping: Array | float) -> tuple[LayerUpdate, ...]:
        """See ``Operator.solve``."""
        if self.in_parameters:
            return unravel(self.layers, self._solve_in_parameters(gradient, damping))
        shift, shifted = self.num_samples * damping, not is_zero(damping)
        gram = add_diagonal(self.gram(), shift)
        dual = solve_psd(gram, gradient.target(self.layers), shifted=shifted)
        if not shifted and gradient.coefficients is None:
            dual = solve_psd(gram, dual, shifted=False)
        return gradient.updates(self.layers, [dual] * len(self.layers), shift)

    def _solve_in_parameters(self, gradient: Gradient, damping: Array | float) -> Array:
        n = self.num_samples
        if not is_zero(damping):
            flat = ravel(gradient.vector(self.layers))
            return solve_psd(self.to_dense(damping), flat, shifted=True)
        if gradient.coefficients is not None:
            return least_squares(dense_jacobian(self.layers), gradient.coefficients.reshape(-1))
        return normal_solve(dense_jacobian(self.layers), n * ravel(gradient.vector(self.layers)))

    def matvec(self, vector: tuple[LayerUpdate, ...]) -> tuple[LayerUpdate, ...]:
        """See ``Operator.matvec``."""
        parts = [layer.jvp(part) for layer, part in zip(self.layers, vector, strict=True)]
        image = sum(parts[1:], start=parts[0]) / self.num_samples
        return tuple(layer.vjp(image) for layer in self.layers)

    def diagonal(self) -> tuple[LayerUpdate, ...]:
        """See ``Operator.diagonal``."""
        n = self.num_samples
        return tuple(
            jax.tree.map(lambda entry: entry / n, layer.squares()) for layer in self.layers
        )

    def trace(self) -> Array:
        """See ``Operator.trace``."""
        norms = [jnp.sum(layer.gram_norms()) for layer in self.layers]
        return jnp.sum(jnp.stack(norms)) / self.num_samples

    def eigenvalues(self) -> Array:
        """Of the smaller of F and J J^T / N."""
        if self.num_params < self.num_rows:
            return psd_eigenvalues(self.to_dense())
        return psd_eigenvalues(self.gram() / self.num_samples)

    def sample(self, key: Array, damping: Array | float) -> tuple[LayerUpdate, ...]:
        """J^T z / N^(1/2) and noise of variance rho, with z standard normal."""
        keys, n = jax.random.split(key), self.num_samples
        shape, dtype = (n, self.layers[0].num_directions), jax.tree.leaves(self.layers)[0].dtype
        draw = jax.random.normal(keys[0], shape, dtype) / float(n) ** 0.5
        seen = tuple(layer.vjp(draw) for layer in self.layers)
        return add(seen, noise(keys[1], self.layers, damping))

    def to_dense(self, damping: Array | float = 0.0) -> Array:
        """J^T J / N + rho I."""
        jacobian = dense_jacobian(self.layers)
        return add_diagonal(jacobian.T @ jacobian / self.num_samples, damping)
