"""How activations act on covariances: closed forms, and Hermite series where there is none.

Two pre-activations u, v are jointly normal with variances q, q' and covariance c; the moments of an
activation are E[phi(u) phi(v)] and E[phi'(u) phi'(v)].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from natgrad_flax.models.activations import ACTIVATIONS
from ntk_analysis.angle_kernels import bent
from ntk_analysis.empirical import Matrix

HERMITE_TERMS = 256
"""Terms of the Hermite series of an activation whose kernel has no closed form."""
_SPACING, _HALF_RANGE = 0.04, 13.0

_LEAKY_SLOPE = 0.01

Moments = Callable[[Array, Array, Array], tuple[Array, Array]]
"""From c, q and q', which broadcast, to E[phi phi] and E[phi' phi']."""


class ActivationKernel(NamedTuple):
    """How an activation acts on kernels.

    Attributes:
      moments: by formulas of this package.
      stax: the name of the layer in neural-tangents, and its arguments; "" where it has none, and
        the moments are brought along.
      negative_slope: phi(u) / u below 0 of an activation that is u above; None of others. With a
        kink, the closed form in cosines loses half of the digits between equal samples
        (science: section 4).
      series: whether the moments are a Hermite series.
    """

    moments: Moments
    stax: tuple[Any, ...]
    negative_slope: float | None = None
    series: bool = False

    @property
    def diagonal_derivative(self) -> float | None:
        """E[phi'(u)^2] where it is the same for every variance, None otherwise."""
        return None if self.negative_slope is None else (1 + self.negative_slope**2) / 2


def _linear_on_both_sides(
    covariance: Array, first: Array, second: Array, *, negative_slope: float
) -> tuple[Array, Array]:
    """Cho & Saul (2009), in the angle between u and v."""
    scale = jnp.sqrt(first * second)
    complement, slope = bent(1 - covariance / scale, negative_slope)
    return (1 + negative_slope**2) / 2 * scale * (1 - complement), slope


def _erf(covariance: Array, first: Array, second: Array) -> tuple[Array, Array]:
    """Williams (1997)."""
    product = (1 + 2 * first) * (1 + 2 * second)
    value = 2 / math.pi * jnp.arcsin(2 * covariance / jnp.sqrt(product))
    return value, 4 / math.pi / jnp.sqrt(product - 4 * covariance**2)


def _gelu(covariance: Array, first: Array, second: Array) -> tuple[Array, Array]:
    """Of u (1 + e(u)) / 2 with e(u) = erf(u / sqrt(2)), term by term through Stein's lemma.

    With A = E[e e'], S the expectation of the product of their derivatives, and odd terms zero:
    E[u v e e'] = q (q' - c^2 / (1 + q)) S + c A + c^2 S / (1 + q').
    """
    one, other = 1 + first, 1 + second
    determinant = one * other - covariance**2
    both = 2 / math.pi * jnp.arcsin(covariance / jnp.sqrt(one * other))
    slopes = 2 / math.pi / jnp.sqrt(determinant)
    squares = covariance**2 * slopes
    value = first * second * slopes - first / one * squares + covariance * both + squares / other
    crossed = covariance * slopes * (1 / one + 1 / other + 1 / determinant)
    return (covariance + value) / 4, (1 + both + crossed) / 4


def _hermite(
    covariance: Array, first: Array, second: Array, *, function: Callable[[Array], Array]
) -> tuple[Array, Array]:
    """E[phi(u) phi(v)] = sum_k a_k(q) a_k(q') r^k, r the correlation (Mehler's formula).

    a_k(q) = E[phi(sqrt(q) z) h_k(z)] with the normalised Hermite polynomials h_k. For the
    derivative, by Stein's lemma, a'_k = sqrt((k + 1) / q) a_{k+1}.
    """
    scale = jnp.sqrt(first * second)
    # the product of both stays inside the loop: all terms at once would be K kernels
    left, right = (_coefficients(variance, function) for variance in (first, second))
    correlation = covariance / scale

    def horner(index: Array, totals: tuple[Array, Array]) -> tuple[Array, Array]:
        k = HERMITE_TERMS - 1 - index
        term = left[k] * right[k]
        value, slope = totals
        # k r^(k-1): the derivative of Horner's scheme
        return value * correlation + term, slope * correlation + value

    zeros = jnp.zeros(jnp.broadcast_shapes(*map(jnp.shape, (covariance, first, second))))
    value, slope = jax.lax.fori_loop(0, HERMITE_TERMS, horner, (zeros, zeros))
    return value, slope / scale


def _coefficients(variance: Array, function: Callable[[Array], Array]) -> Array:
    """a_k of each variance, (K, ...)."""
    nodes, basis = _hermite_basis()
    values = function(jnp.sqrt(variance)[..., None] * nodes)
    return jnp.moveaxis(values @ basis, -1, 0)


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


def _bent(negative_slope: float) -> Moments:
    return partial(_linear_on_both_sides, negative_slope=negative_slope)


ACTIVATION_KERNELS: dict[str, ActivationKernel] = {
    "relu": ActivationKernel(_bent(0.0), ("Relu",), 0.0),
    "leaky_relu": ActivationKernel(_bent(_LEAKY_SLOPE), ("LeakyRelu", _LEAKY_SLOPE), _LEAKY_SLOPE),
    "erf": ActivationKernel(_erf, ("Erf",)),
    "gelu": ActivationKernel(_gelu, ("Gelu",)),
    "identity": ActivationKernel(_bent(1.0), ("Identity",), 1.0),
    "tanh": ActivationKernel(
        partial(_hermite, function=ACTIVATIONS["tanh"].function), (), series=True
    ),
}
