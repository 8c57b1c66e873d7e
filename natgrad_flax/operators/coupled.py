"""Fisher blocks of layers that a matrix Sigma couples."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from natgrad_flax.damping import is_zero, per_layer
from natgrad_flax.linalg.dense import eigvalsh, lu_solve, pinv_solve
from natgrad_flax.operators.base import OfRows, add, noise
from natgrad_flax.operators.coupling import (
    coupled_gram,
    mix,
    solve_coupled,
    solve_in_ranges,
    solve_undamped,
)
from natgrad_flax.signals.base import LayerUpdate, dense_jacobian, ravel, unravel
from natgrad_flax.signals.dense import symmetric_gram
from natgrad_flax.signals.gradient import Gradient

Solver = Callable[..., list[Array]]
"""Of damped systems in sample space, with the arguments and results of ``solve_coupled``."""


@dataclass(frozen=True)
class Coupled(OfRows):
    """S^T (Sigma (x) I) S / N with S = blockdiag(J_1, ..., J_L) (Karakida & Osawa 2020, Eq. 15).

    It is as definite as Sigma is.

    Attributes:
      sigma: Sigma, shape (L, L).
      solver: of damped systems in sample space.
    """

    sigma: np.ndarray = dataclasses.field(kw_only=True)
    solver: Solver = solve_coupled

    @property
    def num_rows(self) -> int:
        """L N S."""
        return len(self.layers) * super().num_rows

    def solve(self, gradient: Gradient, damping: Array | float) -> tuple[LayerUpdate, ...]:
        """See ``Operator.solve``."""
        zero = is_zero(damping)
        if self.in_parameters:
            solve = pinv_solve if zero else lu_solve
            flat = solve(self.to_dense(damping), ravel(gradient.vector(self.layers)))
            return unravel(self.layers, flat)
        shift = self.num_samples * damping
        grams = [symmetric_gram([layer]) for layer in self.layers]
        targets = gradient.targets(self.layers)
        inside = gradient.coefficients is not None
        if zero:
            if inside:
                duals = solve_undamped(self.sigma, grams, targets[0])
            else:
                spans = [pinv_solve(k, b) for k, b in zip(grams, targets, strict=True)]
                duals = solve_in_ranges(self.sigma, grams, spans, 0.0)
        else:
            targets = targets if inside else mix(self.sigma, targets)
            duals = self.solver(self.sigma, grams, targets, shift, refine=not inside)
        return gradient.updates(self.layers, duals, shift)

    def solve_duals(self, vectors: Array, damping: Array | float) -> list[Array]:
        """U_l with J_l^T U_l the layers of (G + rho)^{-1} J^T V / N, for V (N S,) or (N S, k)."""
        grams = [symmetric_gram([layer]) for layer in self.layers]
        if is_zero(damping):
            return solve_undamped(self.sigma, grams, vectors)
        targets = [vectors] * len(grams)
        return self.solver(self.sigma, grams, targets, self.num_samples * damping, refine=False)

    def matvec(self, vector: tuple[LayerUpdate, ...]) -> tuple[LayerUpdate, ...]:
        """See ``Operator.matvec``."""
        pairs = zip(self.layers, vector, strict=True)
        images = mix(self.sigma, [layer.jvp(part) / self.num_samples for layer, part in pairs])
        return tuple(layer.vjp(image) for layer, image in zip(self.layers, images, strict=True))

    def diagonal(self) -> tuple[LayerUpdate, ...]:
        """See ``Operator.diagonal``."""
        return tuple(
            jax.tree.map(lambda entry, weight=weight: weight * entry, layer.squares())
            for weight, layer in zip(self._weights(), self.layers, strict=True)
        )

    def trace(self) -> Array:
        """See ``Operator.trace``."""
        pairs = zip(self._weights(), self.layers, strict=True)
        return jnp.sum(jnp.stack([w * jnp.sum(layer.gram_norms()) for w, layer in pairs]))

    def _weights(self) -> list[float]:
        """Sigma_ll / N."""
        weights: list[float] = (np.diagonal(self.sigma) / self.num_samples).tolist()
        return weights

    def eigenvalues(self) -> Array:
        """Of the smaller of G and a matrix over the ranges of the layers."""
        if self.num_params < self.num_rows:
            return eigvalsh(self.to_dense())
        grams = [symmetric_gram([layer]) for layer in self.layers]
        return eigvalsh(coupled_gram(self.sigma, grams)[0] / self.num_samples)

    def sample(self, key: Array, damping: Array | float) -> tuple[LayerUpdate, ...]:
        """As for ``LowRank``, with z of covariance Sigma between layers; NaN without such z."""
        keys, n, layers = jax.random.split(key), self.num_samples, self.layers
        shape, dtype = (n, layers[0].num_directions), jax.tree.leaves(layers)[0].dtype
        draw = jax.random.normal(keys[0], (len(layers), *shape), dtype) / float(n) ** 0.5
        values, vectors = np.linalg.eigh(self.sigma)
        negative = values < -1e-12 * np.abs(values).max()
        root = vectors * np.where(negative, np.nan, np.sqrt(np.maximum(values, 0)))
        mixed = mix(root, list(draw))
        seen = tuple(layer.vjp(part) for layer, part in zip(layers, mixed, strict=True))
        return add(seen, noise(keys[1], layers, damping))

    def to_dense(self, damping: Array | float = 0.0) -> Array:
        """The Hadamard product of J^T J / N with Sigma blown up to parameters, plus rho I."""
        jacobian = dense_jacobian(self.layers)
        owner = np.repeat(np.arange(len(self.layers)), [a.num_params for a in self.layers])
        # a constant of (P, P) numbers would lie in the program
        mask = jnp.asarray(self.sigma, jacobian.dtype)[owner][:, owner]
        dense = mask * (jacobian.T @ jacobian) / self.num_samples
        values = jnp.stack([jnp.asarray(v) for v in per_layer(damping, len(self.layers))])
        return dense + jnp.diag(values[owner].astype(dense.dtype))
