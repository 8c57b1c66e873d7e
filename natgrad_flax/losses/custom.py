"""A loss of one's own, from one function of the outputs of one sample."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from natgrad_flax.linalg.dense import eigh
from natgrad_flax.losses.base import IntegerTargets, Loss


@dataclass(frozen=True)
class GaussNewton(Loss):
    """The mean over samples of any function l(f, y) that is convex in f.

    H is the Hessian of l in the outputs at the targets of the data, so F is the generalised
    Gauss-Newton matrix (Schraudolph 2002). R is made of its eigenvectors, C of them. The residual
    need not lie in their span, so the damping must be positive, and fisher="exact" looks at y.
    Inside of ``jax.jit`` negative eigenvalues count as zero; otherwise they are refused.

    Args:
      function: l, from the outputs (C,) of a sample (or of a position of it) and its target, of any
        shape and dtype, to a scalar. Programs compile once for a function object.

    Raises:
      TypeError: what is given cannot be called.

    Example:
      >>> import jax, jax.numpy as jnp, natgrad_flax as ng
      >>> loss = ng.GaussNewton(lambda f, y: jnp.sum(jnp.log(jnp.cosh(f - y))))
      >>> float(loss(jnp.zeros((2, 3)), jnp.zeros((2, 3))))
      0.0
    """

    function: Callable[[Array, Any], Array]
    integer_targets: ClassVar[IntegerTargets] = "any"
    needs_targets: ClassVar[bool] = True
    in_span: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise TypeError(
                f"ng.{type(self).__name__} needs a function l(f, y) of the outputs (C,) of one "
                f"sample and its target, got {self.function!r}"
            )

    def _scalar(self, outputs: Array, target: Any) -> Array:
        """l of one sample.

        Raises:
          TypeError: the function returns no real scalar.
        """
        value = self.function(outputs, target)
        array = isinstance(value, Array)
        if not array or value.shape or not jnp.issubdtype(value.dtype, jnp.floating):
            what = f"a {type(value).__name__}"
            if array:
                what = f"{value.dtype} of shape {value.shape}"
            raise TypeError(
                f"the function of ng.{type(self).__name__} must return a floating scalar for the "
                f"outputs {outputs.shape} of one sample, it returns {what}: sum over its entries"
            )
        return value

    def values(self, outputs: Array, targets: Array) -> Array:
        """l of every sample, shape (N,)."""
        return jax.vmap(self._scalar)(outputs, targets)

    def residual(self, outputs: Array, targets: Array) -> Array:
        """dl/df, shape (N, C)."""
        return jax.vmap(jax.grad(self._scalar))(outputs, targets)

    def fisher(self, outputs: Array, targets: Array | None = None) -> Array:
        """The Hessian at the targets, shape (N, C, C)."""
        hessian = jax.vmap(jax.hessian(self._scalar))(outputs, targets)
        return (hessian + hessian.mT) / 2

    def factor(self, outputs: Array, targets: Array | None = None) -> Array:
        """R with H = R R^T, shape (N, C, C); columns of zeros where H lacks rank."""
        values, vectors = self._spectrum(outputs, targets)
        return vectors * jnp.sqrt(values)[:, None, :]

    def coefficients(self, outputs: Array, targets: Array) -> Array:
        """The w for which R w is nearest to r, shape (N, C)."""
        values, vectors = self._spectrum(outputs, targets)
        along = jnp.einsum("nck,nc->nk", vectors, self.residual(outputs, targets))
        return jnp.where(values > 0, along / jnp.sqrt(jnp.where(values > 0, values, 1)), 0)

    def _spectrum(self, outputs: Array, targets: Array | None) -> tuple[Array, Array]:
        """Eigenvalues of H, those of no more than rounding as zeros, and eigenvectors."""
        values, vectors = eigh(self.fisher(outputs, targets))
        return jnp.where(values > _rounding(values), values, 0), vectors

    def sample(self, key: Array, outputs: Array, num_samples: int) -> Array:
        """Raises ValueError: there is no distribution."""
        raise ValueError(
            f"{self!r} has no distribution that targets could be drawn from: use "
            'fisher="exact" or "empirical", or ng.Likelihood(function, sampler)'
        )

    def check_targets(self, targets: np.ndarray) -> None:
        """What targets may be decides the function."""

    def check_curvature(self, outputs: Array, targets: Array) -> None:
        """Raises ValueError where the Hessian of a sample is not positive semi-definite."""
        values = np.asarray(jnp.linalg.eigvalsh(self.fisher(outputs, targets)))
        bad = values[:, 0] < -100 * np.asarray(_rounding(values))[:, 0]
        if bad.any():
            first = int(np.argmax(bad))
            raise ValueError(
                f"the Hessian of the function of ng.{type(self).__name__} in the outputs is not "
                f"positive semi-definite: it has the eigenvalue {values[first, 0]:.3g} at row "
                f"{first} of the outputs, and such eigenvalues at {bad.sum()} of {len(bad)}; use "
                "only the convex part of the function"
            )


@dataclass(frozen=True)
class Likelihood(GaussNewton):
    """The mean over samples of a negative log-likelihood l(f, y) = -log p(y | f).

    As ``GaussNewton``: where f are natural parameters, as logits and logarithms of rates are, the
    Hessian does not depend on y and is the Fisher information. With a sampler fisher="mc" is
    unbiased for any parametrisation.

    Args:
      function: l, from the outputs (C,) of a sample (or of a position of it) and its target to a
        scalar.
      sampler: from a jax.random key and the outputs (C,) of a sample to a target drawn from
        p(y | f); None where fisher="mc" is not needed.

    Raises:
      TypeError: what is given cannot be called.

    Example:
      >>> import jax, jax.numpy as jnp, natgrad_flax as ng
      >>> def nll(f, y):  # of an exponential distribution whose rate is exp(f)
      ...     return jnp.sum(jnp.exp(f) * y - f)
      >>> def draw(key, f):
      ...     return jax.random.exponential(key, f.shape) / jnp.exp(f)
      >>> loss = ng.Likelihood(nll, draw)
      >>> float(loss(jnp.zeros((2, 1)), jnp.array([[1.0], [3.0]])))
      2.0
    """

    sampler: Callable[[Array, Array], Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sampler is not None and not callable(self.sampler):
            raise TypeError(
                "the sampler of ng.Likelihood must be a function of a key and the outputs (C,) of "
                f"one sample that returns a drawn target, got {self.sampler!r}"
            )

    def sample(self, key: Array, outputs: Array, num_samples: int) -> Array:
        """Residuals of drawn targets over sqrt(num_samples), shape (N, C, num_samples)."""
        if self.sampler is None:
            raise ValueError(
                'fisher="mc" draws targets: give ng.Likelihood a sampler(key, f) that draws one '
                "for the outputs (C,) of one sample"
            )
        sampler, slope = self.sampler, jax.grad(self._scalar)

        def one(key: Array, f: Array) -> Array:
            return slope(f, jax.lax.stop_gradient(sampler(key, f)))

        keys = jax.random.split(key, (len(outputs), num_samples))
        over_draws = jax.vmap(one, in_axes=(0, None), out_axes=1)
        return jax.vmap(over_draws)(keys, outputs) / num_samples**0.5


def _rounding(values: Array | np.ndarray) -> Array:
    """What eigenvalues (N, C) may be off by, (N, 1)."""
    eps = float(jnp.finfo(values.dtype).eps)
    return values.shape[1] * eps * jnp.max(jnp.abs(values), axis=1, keepdims=True)
