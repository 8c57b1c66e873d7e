"""Deep linear networks with a bottleneck: projections, flows, and the true natural gradient.

The notation is that of ``deep_linear``.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from natgrad_flax.arguments.arrays import is_concrete
from natgrad_flax.linear.deep_linear_forms import chain, whiten
from natgrad_flax.linear.deep_linear_moments import (
    Moments,
    Weights,
    check_positive_definite,
    check_weights,
    matrix_rank,
    optimum,
)


def bottleneck_natural_gradient(weights: Weights, data: Moments) -> list[Array]:
    """The true natural gradient of networks of any shape, bottlenecks included.

    The product moves by -(P V + V Q - P V Q), V = W* - W, with the projectors P onto the columns
    of A and Q onto the rows of B, where W = A B is cut at the narrowest layer. That is the
    projection of V onto the tangent space, so what any generalised inverse of the Fisher gives. The
    paper's Eq. 10 with pseudo-inverses gives something else as soon as a hidden layer is narrower
    than inputs or outputs, even where the projection is V itself. Layers share the move as
    evenly as their ranges allow; for a square network the result is Eq. 16.

    Args:
      weights: W_1..W_L, of shapes (n_{i-1}, n_i).
      data: the moments.

    Raises:
      ValueError: shapes that do not fit, or a product whose rank is below its narrowest layer
        (at which factor it drops): the tangent space is not a space there.
    """
    check_weights(weights, data)
    check_positive_definite(data.precision, "precision")
    _check_rank_of_product(weights)
    return _bottleneck(tuple(weights), data)


def _check_rank_of_product(weights: Weights) -> None:
    if not all(map(is_concrete, weights)):
        return
    product = np.eye(weights[0].shape[0])
    narrowest = weights[0].shape[0]
    for number, factor in enumerate(weights, 1):
        product = product @ np.asarray(factor, np.float64)
        narrowest = min(narrowest, factor.shape[1])
        rank = matrix_rank(product)
        if rank < narrowest:
            raise ValueError(
                f"the product W_1 ... W_{number} has rank {rank} where its widths allow "
                f"{narrowest}: W_{number} is deficient; use natural_gradient with a damping"
            )


@jax.jit
def _bottleneck(weights: Weights, data: Moments) -> list[Array]:
    widths = [weights[0].shape[0], *(w.shape[1] for w in weights)]
    cut, depth = int(np.argmin(widths)), len(weights)
    net = whiten(weights, data)
    head = net.before[cut] if cut < depth else net.before[-1] @ weights[-1]
    tail = net.after[cut - 1] if cut > 0 else weights[0] @ net.after[0]
    head_inverse, tail_inverse = jnp.linalg.pinv(head), jnp.linalg.pinv(tail)
    share = cut / depth
    # d(head) tail + head d(tail) = P V + V Q - P V Q, both halves with their share of the overlap
    right = net.residual @ tail_inverse
    left = head_inverse @ net.residual
    d_head = right - (1 - share) * head @ (head_inverse @ right)
    d_tail = left - share * (left @ tail_inverse) @ tail
    steps = _spread(net.before[:cut], weights[:cut], d_head)
    mirrored = _spread(
        [b.T for b in reversed(net.after[cut:])], [w.T for w in reversed(weights[cut:])], d_tail.T
    )
    steps += [step.T for step in reversed(mirrored)]
    return [-step for step in steps]


def _spread(before: Sequence[Array], weights: Weights, move: Array) -> list[Array]:
    """Steps of a head of layers W_1..W_b whose product then moves by ``move``, (n_0, n_b).

    The ranges of the products A_i are nested. What lies in the range of A_j but not of A_{j+1} is
    out of reach for layers beyond j, and the first j share it evenly.
    """
    if not weights:
        return []
    inverses = [jnp.linalg.pinv(a) for a in before]
    # P_i times the move; the identity for layer 1, whose A is the (white) root of Sigma
    reached = [a @ (inverse @ move) for a, inverse in zip(before, inverses, strict=True)]
    reached.append(jnp.zeros_like(move))
    shares: list[Array] = []
    total = jnp.zeros_like(move)
    for number in range(len(weights), 0, -1):
        total = total + (reached[number - 1] - reached[number]) / number
        shares.append(total)
    shares.reverse()
    steps: list[Array] = []
    rest = jnp.eye(weights[-1].shape[1], dtype=move.dtype)
    for index in range(len(weights) - 1, -1, -1):
        steps.append(inverses[index] @ shares[index] @ jnp.linalg.pinv(rest))
        rest = weights[index] @ rest
    return steps[::-1]


def projectors(weights: Weights, data: Moments) -> list[tuple[Array, Array]]:
    """The projectors (P_i, Q_i) of Eq. 19 for each layer: Eq. 10 moves W by -1/L sum P_i V Q_i.

    P_i = A_i (A_i^T Sigma A_i)^+ A_i^T Sigma, shape (n_0, n_0), projects onto the columns of A_i;
    Q_i = S^{-1} B_i^T (B_i S^{-1} B_i^T)^+ B_i, shape (n_L, n_L), onto the rows of B_i. Both are
    oblique, idempotent, and P_i W Q_i = W. (The paper's P^b is P_i^T and its P^a is Q_i^T.)

    Raises:
      ValueError: shapes that do not fit, or a precision that is not positive definite.
    """
    check_weights(weights, data)
    check_positive_definite(data.precision, "precision")
    return _projectors(tuple(weights), data)


@jax.jit
def _projectors(weights: Weights, data: Moments) -> list[tuple[Array, Array]]:
    before, after, _ = chain(weights)
    noise = jnp.linalg.cholesky(data.precision)
    net = whiten(weights, data)
    root = net.before[0]
    pairs = []
    for a, b, white_a, white_b in zip(before, after, net.before, net.after, strict=True):
        left = a @ jnp.linalg.pinv(white_a) @ root
        right = noise @ jnp.linalg.pinv(white_b) @ b
        pairs.append((left, right))
    return pairs


def flow_direction(weights: Weights, data: Moments) -> Array:
    """dW/dt under Eq. 10 with pseudo-inverses: -W + 1/L sum_i P_i W* Q_i (Eq. 19).

    Raises:
      ValueError: as ``projectors``.
    """
    return _flow_direction(tuple(weights), data, projectors(weights, data))


@jax.jit
def _flow_direction(weights: Weights, data: Moments, pairs: list[tuple[Array, Array]]) -> Array:
    target, product = optimum(data), chain(weights)[2]
    return sum((p @ target @ q for p, q in pairs), jnp.zeros_like(product)) / len(pairs) - product


def tangent_projection(weights: Weights, data: Moments) -> Array:
    """dW/dt under the true natural gradient: P V + V Q - P V Q with V = W* - W.

    P and Q are the projectors onto the columns and the rows of W itself, orthogonal in the metrics
    Sigma and S^{-1}. It differs from Eq. 19 where there is a bottleneck; both vanish together.

    Raises:
      ValueError: shapes that do not fit, or a product of deficient rank, as
        ``bottleneck_natural_gradient``.
    """
    steps = bottleneck_natural_gradient(weights, data)
    return _pushed(tuple(weights), [-step for step in steps])


@jax.jit
def _pushed(weights: Weights, steps: list[Array]) -> Array:
    before, after, product = chain(weights)
    moves = (a @ step @ b for a, step, b in zip(before, steps, after, strict=True))
    return sum(moves, jnp.zeros_like(product))
