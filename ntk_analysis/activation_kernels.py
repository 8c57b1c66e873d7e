"""How activations act on covariances: neural-tangents, and Hermite series where it has no form."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from natgrad_flax.models.activations import ACTIVATIONS
from ntk_analysis._neural_tangents import stax
from ntk_analysis.empirical import Matrix

HERMITE_TERMS = 256
"""Terms of the Hermite series of an activation whose kernel has no closed form."""
_SPACING, _HALF_RANGE = 0.04, 13.0

_LEAKY_SLOPE = 0.01


class ActivationKernel(NamedTuple):
    """How an activation acts on kernels.

    Attributes:
      layer: makes the stax layer.
      negative_slope: phi(u) / u below 0 of an activation that is u above; None of others. With a
        kink, the closed form in cosines loses half of the digits between equal samples
        (science: section 4).
      series: the layer sums a Hermite series.
    """

    layer: Callable[[], Any]
    negative_slope: float | None = None
    series: bool = False

    @property
    def diagonal_derivative(self) -> float | None:
        """E[phi'(u)^2] where it is the same for every variance, None otherwise."""
        return None if self.negative_slope is None else (1 + self.negative_slope**2) / 2


ACTIVATION_KERNELS: dict[str, ActivationKernel] = {
    "relu": ActivationKernel(lambda: stax().Relu(), 0.0),
    "leaky_relu": ActivationKernel(lambda: stax().LeakyRelu(_LEAKY_SLOPE), _LEAKY_SLOPE),
    "erf": ActivationKernel(lambda: stax().Erf()),
    "gelu": ActivationKernel(lambda: stax().Gelu()),
    "identity": ActivationKernel(lambda: stax().Identity(), 1.0),
    "tanh": ActivationKernel(lambda: _hermite_layer("tanh"), series=True),
}


def _hermite_layer(name: str) -> Any:
    """A stax layer from E[phi(u) phi(v)] = sum_k a_k(q_u) a_k(q_v) c^k, c the correlation.

    a_k(q) = E[phi(sqrt(q) z) h_k(z)] with the normalised Hermite polynomials h_k (Mehler's
    formula). For the derivative, by Stein's lemma, a'_k = sqrt((k + 1) / q) a_{k+1}.
    """
    function = ACTIVATIONS[name].function

    def coefficients(variance: Array) -> Array:
        nodes, basis = _hermite_basis()
        return function(jnp.sqrt(variance) * nodes) @ basis

    def series(covariance: Array, first: Array, second: Array, slopes: bool) -> Array:
        scale = jnp.sqrt(first * second)
        factors = jnp.arange(HERMITE_TERMS) if slopes else jnp.ones(HERMITE_TERMS)
        # the product of both stays inside the loop: all terms at once would be K kernels
        left, right = coefficients(first) * factors, coefficients(second)
        correlation = covariance / scale

        def horner(index: Array, total: Array) -> Array:
            k = HERMITE_TERMS - 1 - index
            return total * correlation + left[k] * right[k]

        count = HERMITE_TERMS - slopes
        total = jax.lax.fori_loop(0, count, horner, jnp.zeros_like(covariance))
        return total / scale if slopes else total

    def kernel(covariance: Array, first: Array, second: Array) -> Array:
        return series(covariance, first, second, slopes=False)

    def slope_kernel(covariance: Array, first: Array, second: Array) -> Array:
        return series(covariance, first, second, slopes=True)

    return stax().Elementwise(function, kernel, slope_kernel)


@cache
def _hermite_basis() -> tuple[Matrix, Matrix]:
    """Nodes (Q,), and normalised Hermite polynomials there times the weights (Q, K).

    The trapezoidal rule: where the activation has poles beside the real line, its error vanishes
    exponentially in the number of nodes, that of Gauss-Hermite only in the root of it.
    """
    reach = round(_HALF_RANGE / _SPACING)
    nodes: np.ndarray = _SPACING * np.arange(-reach, reach + 1)
    rows: list[np.ndarray] = [np.ones_like(nodes), nodes]
    for k in range(2, HERMITE_TERMS):
        rows.append((nodes * rows[-1] - np.sqrt(k - 1) * rows[-2]) / np.sqrt(k))
    weights = _SPACING * np.exp(-(nodes**2) / 2) / np.sqrt(2 * np.pi)
    return nodes, np.stack(rows, axis=1) * weights[:, None]
