"""Diagonal linear networks under the logistic loss (Kerekes et al. 2021, Appendix B.2).

The coefficients are a product of L weight vectors, beta = w_1 * ... * w_L entrywise. The natural
gradient solves F J dw = grad_beta L with J = d beta / d w; of its many solutions this is the
one of least norm over all layers jointly, J^T (J J^T)^{-1} times the change of beta. With
q_l = prod_{k != l} w_k, J is (diag(q_1), ..., diag(q_L)) and J J^T = diag(m), m = sum_l q_l^2.

For N < D the margins of the natural-gradient flow do not depend on the depth, but beta does:
F is singular, and J decides which of its solutions is taken.

Example:
  >>> import jax, jax.numpy as jnp
  >>> from natgrad_flax.linear import diagonal_network
  >>> x, y = jnp.array([[2.0, 0.0], [0.0, 1.0]]), jnp.array([1.0, -1.0])
  >>> # L = 3 layers
  >>> weights = diagonal_network.initial_weights(2, 3, 1.0, jax.random.key(0))
  >>> step = diagonal_network.natural_gradient(x, y, weights)
  >>> # of beta
  >>> moved = jnp.sum(diagonal_network.other_products(weights) * step, axis=0)
  >>> u = y * (x @ diagonal_network.coefficients(weights))
  >>> bool(jnp.allclose(y * (x @ moved), -(1 + jnp.exp(-u)), rtol=1e-4))
  True
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from natgrad_flax.arguments.arrays import is_concrete
from natgrad_flax.arguments.scalars import check_integer, check_number
from natgrad_flax.linalg.dense import solve_psd, symmetric_product
from natgrad_flax.linear import logistic
from natgrad_flax.linear.descent import as_floating


def coefficients(weights: Array) -> Array:
    """beta = w_1 * ... * w_L, shape (..., D), for weights of shape (..., L, D)."""
    return jnp.prod(weights, axis=-2)


def other_products(weights: Array) -> Array:
    """q_l = prod_{k != l} w_k, without a division; shape (L, D), as the weights."""
    ones = jnp.ones_like(weights[:1])
    before = jnp.cumprod(jnp.concatenate([ones, weights[:-1]]), axis=0)
    after = jnp.cumprod(jnp.concatenate([ones, weights[:0:-1]]), axis=0)[::-1]
    return before * after


@partial(jax.tree_util.register_dataclass, data_fields=["direct"], meta_fields=[])
@dataclass(frozen=True)
class EuclideanGradient:
    """q_l * grad_beta L for each layer of one network, or of several on the same data.

    A step reads the inputs twice, and there is little else to it: networks of several depths side
    by side cost hardly more than one.

    Attributes:
      direct: the gradient with respect to beta. If it is divided by the loss, the field is divided
        by max(1, max_j m_j) as well, network by network: from depth 3 on the weights would reach
        infinity in finite time otherwise. The path of the flow stays the same.
    """

    direct: logistic.EuclideanGradient

    def __call__(self, weights: Any) -> Any:
        """The field at weights of shape (L, D), or at a tuple of such arrays, of any depths."""
        if not isinstance(weights, tuple):
            return self._pull_back(weights, self.direct(coefficients(weights)))
        gradients = self.direct(jnp.stack([coefficients(w) for w in weights]))
        return tuple(self._pull_back(w, g) for w, g in zip(weights, gradients, strict=True))

    def _pull_back(self, weights: Array, gradient: Array) -> Array:
        others = other_products(weights)
        if self.direct.normalised:
            gradient = gradient / jnp.maximum(1, jnp.max(jnp.sum(others**2, axis=0)))
        return others * gradient


@partial(jax.tree_util.register_dataclass, data_fields=["signed"], meta_fields=[])
@dataclass(frozen=True)
class DualNaturalGradient:
    """The joint minimum-norm natural gradient for N <= D, without a D x D matrix.

    dw_l = -q_l * Z^T (Z diag(m) Z^T)^{-1} (1 + exp(-u)).

    Attributes:
      signed: Z = y * X, shape (N, D).
    """

    signed: Array

    def __call__(self, weights: Array) -> Array:
        """The field at weights of shape (L, D)."""
        others = other_products(weights)
        metric = jnp.sum(others**2, axis=0)
        # the scale of m says nothing about the rank: without this, small weights would underflow
        size = jnp.max(metric)
        gram = symmetric_product(self.signed * jnp.sqrt(metric / size))
        wanted = logistic.inverse_probability(self.signed @ coefficients(weights))
        return -(others / size) * (self.signed.T @ solve_psd(gram, wanted, shifted=False))


@partial(jax.tree_util.register_dataclass, data_fields=["direct"], meta_fields=[])
@dataclass(frozen=True)
class PrimalNaturalGradient:
    """The joint minimum-norm natural gradient where F is definite: dw_l = (q_l / m) * F^{-1} grad.

    Attributes:
      direct: the natural gradient with respect to beta, of either Fisher.
    """

    direct: logistic.TrainNaturalGradient | logistic.PopulationNaturalGradient

    def __call__(self, weights: Array) -> Array:
        """The field at weights of shape (L, D); entries with m = 0 do not move."""
        others = other_products(weights)
        metric = jnp.sum(others**2, axis=0)
        moves = metric > 0
        share = jnp.where(moves, others / jnp.where(moves, metric, 1), 0)
        return share * self.direct(coefficients(weights))


def gradient_field(x: Any, y: Any, *, normalised: bool = False) -> EuclideanGradient:
    """The Euclidean gradient with respect to all weights.

    Args:
      x: inputs, shape (N, D).
      y: labels -1 or +1, shape (N,).
      normalised: divide by the loss and by max(1, max_j m_j), for long runs on separable data.

    Raises:
      ValueError, TypeError: as ``logistic.signed_inputs``.
    """
    return EuclideanGradient(logistic.gradient_field(x, y, normalised=normalised))


def natural_gradient_field(
    x: Any, y: Any, *, data: logistic.FisherData = "train", normalised: bool = False
) -> DualNaturalGradient | PrimalNaturalGradient:
    """The joint minimum-norm natural gradient with respect to all weights.

    With the train Fisher and N <= D a step forms the N x N matrix Z diag(m) Z^T, N^2 D flops, and
    factorises it; with N > D it is the step of logistic regression.

    Args:
      x: inputs, shape (N, D).
      y: labels -1 or +1, shape (N,).
      data: whose Fisher: of the training inputs, or of x ~ N(0, I).
      normalised: with "population", divide by the loss.

    Raises:
      ValueError, TypeError: as ``logistic.natural_gradient_field``.
    """
    logistic.check_fisher_data(data, normalised)
    signed = logistic.signed_inputs(x, y)
    if data == "train" and signed.shape[0] <= signed.shape[1]:
        logistic.check_full_rank(signed)
        return DualNaturalGradient(signed)
    return PrimalNaturalGradient(
        logistic.natural_gradient_field(x, y, data=data, normalised=normalised)
    )


def check_weights(weights: Any, dim: int) -> Array:
    """Weights (L, D) of a network whose Jacobian has full row rank.

    Raises:
      ValueError: another shape, NaN or infinity, or a coefficient with two weights of zero, whose
        m is 0: nothing moves it.
      TypeError: not a floating array.
    """
    weights = as_floating(weights, "weights", (None, dim), f"(L, D) with D = {dim}")
    if is_concrete(weights):
        zeros = np.sum(np.asarray(weights) == 0, axis=0)
        stuck = np.flatnonzero(zeros > 1)
        if stuck.size:
            raise ValueError(
                f"{stuck.size} of {dim} coefficients have two weights of zero, the first is number "
                f"{stuck[0]}: the Jacobian is singular there; start from weights other than zero"
            )
    return weights


def natural_gradient(x: Any, y: Any, weights: Any, *, data: logistic.FisherData = "train") -> Array:
    """The joint minimum-norm natural gradient at one point.

    Args:
      x: inputs, shape (N, D).
      y: labels -1 or +1, shape (N,).
      weights: w_1 ... w_L, shape (L, D).
      data: whose Fisher, as in ``natural_gradient_field``.

    Returns:
      Shape (L, D).

    Raises:
      ValueError, TypeError: as ``natural_gradient_field`` and ``check_weights``.
    """
    field = natural_gradient_field(x, y, data=data)
    return field(check_weights(weights, np.shape(x)[1]))


def initial_weights(
    dim: int,
    depth: int,
    scale: float,
    key: Array,
    *,
    zero_product: bool = False,
    dtype: Any = jnp.float32,
) -> Array:
    """Weights from N(0, scale^2), of both signs, shape (L, D).

    Weights that are all positive would favour positive coefficients whatever the optimiser.

    Args:
      dim: D.
      depth: L.
      scale: standard deviation.
      key: randomness.
      zero_product: make the last layer zero, so that beta is zero and every margin starts at 0.
        Natural gradients want that: they ask a change 1 + exp(-u) of a margin u, which is stiff
        where random weights put margins far below 0.
      dtype: of the weights.

    Raises:
      ValueError: a size below 1 or a scale that is not positive.
    """
    dim, depth = check_integer("dim", dim, 1), check_integer("depth", depth, 1)
    scale = check_number("scale", scale, positive=True)
    weights = scale * jax.random.normal(key, (depth, dim), dtype)
    return weights.at[-1].set(0) if zero_product else weights
