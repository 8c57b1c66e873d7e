"""The exact natural gradient of deep linear networks (Bernacchia, Lengyel & Hennequin 2018).

Orientation, as in ``ng.Dense``: samples are rows and W_i has the shape (n_{i-1}, n_i), so the
network is f = x W_1 W_2 ... W_L = x W. The paper writes columns; its W_i is our W_i^T. With

  A_i = W_1 ... W_{i-1}  (n_0, n_{i-1})      B_i = W_{i+1} ... W_L  (n_i, n_L)

the layer inputs are x A_i and W = A_i W_i B_i. All expectations over inputs and targets enter
through three matrices, ``Moments``. The loss is L = 1/2 <(y - f) S^{-1} (y - f)^T> with the output
covariance S. As everywhere in natgrad, a gradient is an uphill direction: theta - eta * it is the
step, and eta = 1 is the unit of time of the flow.
"""

from __future__ import annotations

from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from natgrad_flax.arguments.arrays import is_concrete
from natgrad_flax.arguments.scalars import (
    check_integer,
    check_learning_rate,
    check_number,
    is_traced_number,
    shown,
)
from natgrad_flax.damping import LevenbergMarquardt, RelativeDamping, is_zero
from natgrad_flax.linalg.dense import full_products
from natgrad_flax.linear.deep_linear_bottleneck import bottleneck_natural_gradient
from natgrad_flax.linear.deep_linear_forms import chain, damped_form, inverse_form, whiten
from natgrad_flax.linear.deep_linear_moments import (
    Moments,
    Weights,
    check_invertible,
    check_positive_definite,
    check_weights,
    excess_loss,
    is_square,
    matrix_rank,
    moments,
    optimum,
)
from natgrad_flax.optimizer.checks import check_damping, check_normal

__all__ = [
    "Moments",
    "bottleneck_natural_gradient",
    "euler_product",
    "excess_loss",
    "flow_product",
    "gradient",
    "moments",
    "natural_gradient",
    "optimum",
]

Method = Literal["auto", "inverse", "pseudo-inverse"]


def gradient(weights: Weights, data: Moments) -> list[Array]:
    """The gradients dL/dW_i = -A_i^T <x^T (y - f)> S^{-1} B_i^T (Eqs. 7 and 8).

    Raises:
      ValueError: shapes that do not fit.
    """
    check_weights(weights, data)
    return _gradient(tuple(weights), data)


@jax.jit
@full_products()
def _gradient(weights: Weights, data: Moments) -> list[Array]:
    before, after, product = chain(weights)
    seen = (data.cross - data.inputs @ product) @ data.precision
    return [-(a.T @ seen @ b.T) for a, b in zip(before, after, strict=True)]


def natural_gradient(
    weights: Weights,
    data: Moments,
    *,
    damping: float | Array = 0.0,
    method: Method = "auto",
) -> list[Array]:
    """The natural gradient of every layer, the 1/L of the paper included.

    Undamped it is Eq. 16 for square networks, -(1/L) A_i^{-1} (W* - W) B_i^{-1}, and Eq. 10 with
    pseudo-inverses for others. The latter is exact where every hidden layer is at least as wide as
    both inputs and outputs; else see ``bottleneck_natural_gradient``. A positive damping gives Eq.
    20: (1/L) (Lambda_i + sqrt(damping) I)^{-1} dL/dW_i (Lambda~_i + sqrt(damping) I)^{-1} with the
    second moments of layer inputs and back-propagated errors under the model.

    Args:
      weights: W_1..W_L, of shapes (n_{i-1}, n_i).
      data: the moments.
      damping: lambda of Eq. 20; its root is added to second moments without any factor N.
      method: of the undamped form: "inverse" (square networks), "pseudo-inverse", or "auto".

    Returns:
      One array for each layer; W_i - eta times it is the step.

    Raises:
      ValueError: shapes that do not fit, an unknown method, a singular factor (which), inputs of
        deficient rank (which rank), a negative damping.
    """
    check_weights(weights, data)
    check_damping(damping)
    check_normal(damping, data.inputs.dtype)
    if isinstance(damping, (RelativeDamping, LevenbergMarquardt)) or np.ndim(damping):
        raise TypeError(f"damping must be one number here, got {shown(damping)}")
    check_positive_definite(data.precision, "precision")
    if method not in get_args(Method):
        raise ValueError(f"method must be one of {', '.join(get_args(Method))}, got {method!r}")
    if not is_zero(damping):
        return _damped(tuple(weights), data, damping)
    if method == "inverse" and not is_square(weights):
        raise ValueError(
            'method="inverse" needs layers of one width, got '
            f'{[weights[0].shape[0], *(w.shape[1] for w in weights)]}; use "pseudo-inverse"'
        )
    if method == "pseudo-inverse" or not is_square(weights):
        return _pseudo_inverse(tuple(weights), data)
    check_invertible(weights, data)
    return _inverse(tuple(weights), data)


@jax.jit
@full_products()
def _inverse(weights: Weights, data: Moments) -> list[Array]:
    product = chain(weights)[2]
    residual = data.cross - data.inputs @ product
    return list(-inverse_form(jnp.stack(weights), data.inputs, residual) / len(weights))


@jax.jit
@full_products()
def _pseudo_inverse(weights: Weights, data: Moments) -> list[Array]:
    net = whiten(weights, data)
    return [
        -jnp.linalg.pinv(a) @ net.residual @ jnp.linalg.pinv(b) / len(weights)
        for a, b in zip(net.before, net.after, strict=True)
    ]


@jax.jit
@full_products()
def _damped(weights: Weights, data: Moments, damping: Array) -> list[Array]:
    before, after, product = chain(weights)
    seen = (data.cross - data.inputs @ product) @ data.precision
    root = jnp.sqrt(damping)
    solved, _ = damped_form(before, after, data.inputs, seen, data.precision, root, root)
    return [-step / len(weights) for step in solved]


def euler_product(product: Array, target: Array, depth: int, learning_rate: float | Array) -> Array:
    """W after one step of a square network: (I + (eta/L) (W* W^{-1} - I))^L W.

    A step of all factors at once along Eq. 16. It is W* for depth 1 and eta = 1; for growing depth
    it tends to exp(eta (W* W^{-1} - I)) W. Not in the paper.

    Args:
      product: W, square and invertible, shape (n, n).
      target: W*, shape (n, n).
      depth: L.
      learning_rate: eta.

    Raises:
      ValueError: matrices that are not square, a singular product, a number out of range.
    """
    if product.ndim != 2 or product.shape[0] != product.shape[1] or product.shape != target.shape:
        raise ValueError(
            f"the law of a step needs square matrices, got {product.shape} and {target.shape}"
        )
    depth = check_integer("depth", depth, 1)
    if not is_traced_number(learning_rate):
        learning_rate = check_learning_rate(learning_rate)
    if is_concrete(product) and matrix_rank(product) < len(product):
        raise ValueError(
            f"the product has rank {matrix_rank(product)} of {len(product)}: it has no inverse"
        )
    eye = jnp.eye(len(product), dtype=product.dtype)
    ratio = jnp.linalg.solve(product.T, target.T).T
    return jnp.linalg.matrix_power(eye + learning_rate / depth * (ratio - eye), depth) @ product


def flow_product(product: Array, target: Array, time: float | Array) -> Array:
    """W(t) = W* + e^{-t} (W(0) - W*): the flow dW/dt = W* - W without a bottleneck (Eq. 18)."""
    if not is_traced_number(time):
        time = check_number("time", time, positive=False)
    return target + jnp.exp(-jnp.asarray(time, product.dtype)) * (product - target)
