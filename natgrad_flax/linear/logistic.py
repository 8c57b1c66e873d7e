"""Logistic regression and its exact natural gradient (Kerekes et al. 2021, Appendix B.1).

Labels are y = +-1, u = y * (X beta), the loss and the Fisher are sums over the samples:
L = sum_n log(1 + exp(-u_n)), F = X^T diag(phi(s) phi(-s)) X with s = X beta. With a mean in place
of one of the sums, the time of every natural-gradient flow is multiplied or divided by N.

Example:
  >>> import jax.numpy as jnp
  >>> from natgrad_flax.linear import logistic
  >>> x, y = jnp.array([[2.0, 0.0], [0.0, 1.0]]), jnp.array([1.0, -1.0])
  >>> # moves each margin by 1 + exp(-u) = 2
  >>> print(logistic.natural_gradient(x, y, jnp.zeros(2)))
  [-1.  2.]
  >>> print(logistic.gradient_field(x, y)(jnp.zeros(2)))
  [-1.   0.5]
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import NDArray

from natgrad_flax.arguments.arrays import is_concrete
from natgrad_flax.linalg.dense import inverse_psd, solve_psd, symmetric_product
from natgrad_flax.linear.descent import as_floating, check_memory
from natgrad_flax.optimizer.checks import check_array

FisherData = Literal["train", "population"]


def signed_inputs(x: Any, y: Any) -> Array:
    """The rows y_n x_n, on which alone loss and Fisher depend.

    Args:
      x: inputs, shape (N, D).
      y: labels -1 or +1, shape (N,).

    Returns:
      Shape (N, D), in the dtype of x.

    Raises:
      ValueError: shapes that do not fit, labels other than -1 and +1, NaN or infinity.
      TypeError: x is not a floating array.
    """
    x = check_array(x)
    if x.ndim != 2:
        raise ValueError(f"x must have shape (N, D), got {x.shape}")
    y = jnp.asarray(y)
    if y.shape != x.shape[:1]:
        raise ValueError(f"y must have shape (N,) = {x.shape[:1]}, got {y.shape}")
    if is_concrete(y) and not np.isin(np.asarray(y), (-1, 1)).all():
        raise ValueError("labels must be -1 or +1; labels 0 and 1 become 2 * y - 1")
    return x * y[:, None].astype(x.dtype)


def check_full_rank(signed: Array | NDArray[np.float64]) -> None:
    """Refuses inputs whose smaller Gram matrix is singular in their precision.

    Args:
      signed: inputs, with or without their signs, shape (N, D).

    Raises:
      ValueError: rank below min(N, D), or a Gram matrix that does not fit into memory.
    """
    num, dim = signed.shape
    check_memory((min(num, dim),) * 2, signed.dtype, "the Gram matrix of the inputs", _ADVICE)
    if not is_concrete(signed):
        return
    rows = np.asarray(signed, np.float64)
    values = np.linalg.eigvalsh(rows @ rows.T if num < dim else rows.T @ rows)
    rank = int(np.sum(values > len(values) * np.finfo(signed.dtype).eps * values[-1]))
    if rank < min(num, dim):
        raise ValueError(
            f"the inputs have rank {rank} in {signed.dtype}, below min(N, D) = {min(num, dim)}: "
            "the theory needs full rank; leave out dependent samples or features, or use float64"
        )


_ADVICE = "use fewer samples or features"


def loss(x: Any, y: Any, coefficients: Array) -> Array:
    """Sum of log(1 + exp(-u_n)) for coefficients of shape (D,)."""
    return jnp.sum(jax.nn.softplus(-(signed_inputs(x, y) @ coefficients)))


def fisher(x: Any, coefficients: Array) -> Array:
    """F = X^T diag(phi(s) phi(-s)) X, a sum over samples, shape (D, D).

    Args:
      x: inputs, shape (N, D).
      coefficients: beta, shape (D,).

    Raises:
      ValueError: bad inputs, or a matrix beyond the memory of the device.
    """
    x = check_array(x)
    check_memory((x.shape[1],) * 2, x.dtype, "the Fisher", _ADVICE)
    scaled = x * jnp.exp(_log_variance(x @ coefficients) / 2)[:, None]
    return scaled.T @ scaled


def _log_variance(u: Array) -> Array:
    """log phi(u) phi(-u), without overflow for either sign."""
    return -jax.nn.softplus(u) - jax.nn.softplus(-u)


def _log_loss_terms(u: Array) -> Array:
    """log log(1 + exp(-u)), which is -u where exp(-u) is below the precision of 1."""
    far = -float(np.log(jnp.finfo(u.dtype).eps))
    return jnp.where(u > far, -u, jnp.log(jax.nn.softplus(-jnp.minimum(u, far))))


def inverse_probability(u: Array) -> Array:
    """1 / phi(u) = 1 + exp(-u): what the natural gradient asks of each margin."""
    return 1 + jnp.exp(-u)


@partial(jax.tree_util.register_dataclass, data_fields=["signed"], meta_fields=["normalised"])
@dataclass(frozen=True)
class EuclideanGradient:
    """The gradient of the loss, -Z^T phi(-Z beta) with Z = y * X, or that over the loss.

    Attributes:
      signed: Z, shape (N, D).
      normalised: divide by the loss. The path of the flow is the same, but its margins grow with
        the time rather than with its logarithm; neither underflows, however large the margins.
    """

    signed: Array
    normalised: bool

    def __call__(self, coefficients: Array) -> Array:
        """The field at coefficients of shape (..., D), each on its own."""
        u = coefficients @ self.signed.T
        if not self.normalised:
            return -(jnp.exp(-jax.nn.softplus(u)) @ self.signed)
        log_terms = _log_loss_terms(u)
        # phi(-u) is at most log(1 + exp(-u)), so this shift keeps both in range
        shift = jnp.max(log_terms, axis=-1, keepdims=True)
        total = jnp.sum(jnp.exp(log_terms - shift), axis=-1, keepdims=True)
        return -((jnp.exp(-jax.nn.softplus(u) - shift) / total) @ self.signed)


@partial(jax.tree_util.register_dataclass, data_fields=["signed", "gram_inverse"], meta_fields=[])
@dataclass(frozen=True)
class TrainNaturalGradient:
    """F^+ grad L with the Fisher of the training inputs.

    N <= D: -Z^T (Z Z^T)^{-1} (1 + exp(-u)): neither F nor a small number occurs. N > D: the
    weighted least-squares problem Z d = -(1 + exp(-u)) with weights phi(u) phi(-u), relative to
    the largest of them. Where all margins are positive that is a division of both sides by
    exp(-u_min); the exp(-u_max) printed there is for margins that differ little.

    Attributes:
      signed: Z, shape (N, D).
      gram_inverse: (Z Z^T)^{-1}, shape (N, N), for N <= D only.
    """

    signed: Array
    gram_inverse: Array | None

    def __call__(self, coefficients: Array) -> Array:
        """The field at coefficients of shape (D,)."""
        u = self.signed @ coefficients
        if self.gram_inverse is not None:
            return -(self.signed.T @ (self.gram_inverse @ inverse_probability(u)))
        log_weights = _log_variance(u)
        shift = jnp.max(log_weights)
        scaled = self.signed * jnp.exp((log_weights - shift) / 2)[:, None]
        gradient = self.signed.T @ jnp.exp(-jax.nn.softplus(u) - shift)
        return -solve_psd(scaled.T @ scaled, gradient, shifted=False)


@partial(jax.tree_util.register_dataclass, data_fields=["signed"], meta_fields=["normalised"])
@dataclass(frozen=True)
class PopulationNaturalGradient:
    """F^{-1} grad L with F of standard normal inputs, times N to be a sum as elsewhere.

    F / N = a I + (c - a) b b^T with b = beta / |beta|, a = E phi'(|beta| z) and
    c = E phi'(|beta| z) z^2, z ~ N(0, 1); its inverse costs O(D).

    Attributes:
      signed: Z, shape (N, D).
      normalised: divide by the loss, as in ``EuclideanGradient``.
    """

    signed: Array
    normalised: bool

    def __call__(self, coefficients: Array) -> Array:
        """The field at coefficients of shape (D,)."""
        gradient = EuclideanGradient(self.signed, self.normalised)(coefficients)
        return self.precondition(coefficients, gradient)

    def precondition(self, coefficients: Array, gradient: Array) -> Array:
        """F^{-1} times a vector of shape (D,)."""
        norm = jnp.linalg.norm(coefficients)
        unit = coefficients / jnp.maximum(norm, jnp.finfo(coefficients.dtype).tiny)
        across, along = population_moments(norm)
        parallel = unit * (unit @ gradient)
        return ((gradient - parallel) / across + parallel / along) / self.signed.shape[0]


def population_moments(norm: Array) -> tuple[Array, Array]:
    """E phi'(r z) and E phi'(r z) z^2 for z ~ N(0, 1) and r >= 0.

    The trapezoidal rule on a grid that shrinks with the integrand, whose width is about
    1 / sqrt(1 + r^2), is exact to rounding for every r.

    Args:
      norm: r, a scalar array.
    """
    spacing = 0.2 / jnp.sqrt(1 + norm**2)
    z = spacing * jnp.arange(-200, 201, dtype=norm.dtype)
    weights = jnp.exp(_log_variance(norm * z) - z**2 / 2) * spacing / np.sqrt(2 * np.pi)
    return jnp.sum(weights), jnp.sum(weights * z**2)


def gradient_field(x: Any, y: Any, *, normalised: bool = False) -> EuclideanGradient:
    """The Euclidean gradient as a function of the coefficients.

    Args:
      x: inputs, shape (N, D).
      y: labels -1 or +1, shape (N,).
      normalised: divide by the loss, for long runs on separable data.

    Raises:
      ValueError, TypeError: as ``signed_inputs``.
    """
    return EuclideanGradient(signed_inputs(x, y), bool(normalised))


def natural_gradient_field(
    x: Any, y: Any, *, data: FisherData = "train", normalised: bool = False
) -> TrainNaturalGradient | PopulationNaturalGradient:
    """The natural gradient as a function of the coefficients.

    Args:
      x: inputs, shape (N, D).
      y: labels -1 or +1, shape (N,).
      data: whose Fisher: of the training inputs, or of x ~ N(0, I).
      normalised: with "population", divide by the loss; the train Fisher scales with the loss
        anyway.

    Returns:
      A field for ``descend``. With "train" and N <= D its setting up costs one N x N inverse.

    Raises:
      ValueError: bad inputs, rank below min(N, D), sizes beyond memory, an unknown choice.
      TypeError: x is not a floating array.
    """
    signed = signed_inputs(x, y)
    check_fisher_data(data, normalised)
    if data == "population":
        return PopulationNaturalGradient(signed, bool(normalised))
    check_full_rank(signed)
    if signed.shape[0] > signed.shape[1]:
        return TrainNaturalGradient(signed, None)
    return TrainNaturalGradient(signed, inverse_psd(symmetric_product(signed), shifted=False))


def check_fisher_data(data: object, normalised: object) -> None:
    """Raises ValueError on an unknown choice, or on a normalised one with the train Fisher."""
    if data not in get_args(FisherData):
        raise ValueError(f'data must be "train" or "population", got {data!r}')
    if data == "train" and normalised:
        raise ValueError(
            "normalised=True is for the population Fisher: the train Fisher vanishes with the loss "
            "already, so its natural gradient needs no scaling"
        )


def natural_gradient(x: Any, y: Any, coefficients: Any, *, data: FisherData = "train") -> Array:
    """The natural gradient F^+ grad L at one point.

    Args:
      x: inputs, shape (N, D).
      y: labels -1 or +1, shape (N,).
      coefficients: beta, shape (D,).
      data: whose Fisher, as in ``natural_gradient_field``.

    Returns:
      Shape (D,).

    Raises:
      ValueError, TypeError: as ``natural_gradient_field``, and for coefficients of another shape.
    """
    field = natural_gradient_field(x, y, data=data)
    dim = field.signed.shape[1]
    return field(as_floating(coefficients, "coefficients", (dim,), f"(D,) = ({dim},)"))


def train_margins(initial: Any, time: Any) -> Array:
    """Margins u = y s of the natural-gradient flow at a time (Theorems 3 and 4).

    u(t) = log(e^t (1 + e^{u(0)}) - 1) wherever the Jacobian of the logits has full row rank, so for
    every model with N <= P and every parametrisation of it.

    Args:
      initial: u(0), any shape.
      time: t >= 0, of a shape that broadcasts with it.
    """
    time = jnp.asarray(time)
    return time + jnp.logaddexp(jnp.asarray(initial), jnp.log(-jnp.expm1(-time)))
