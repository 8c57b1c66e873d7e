"""Metrics, Gram matrices, generalised inverses and projections of parametrisations."""

# ruff: noqa: F722, F821, UP037 - shapes in signatures, which the tests hold examples to
from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

if TYPE_CHECKING:
    from jaxtyping import Float

Map = Callable[[Array], Array]
"""A differentiable map between vectors."""
Objective = Callable[[Array], Array]
"""A function of a point z (D,) with a scalar value."""
Metric = Callable[[Array], Array]
"""From a point z (D,) to the symmetric positive definite matrix of the metric there (D, D)."""
Representation = Callable[[Map, Array], Array]
"""From a parametrisation and parameters (d,) to a vector on the parameter space (d,)."""


def euclidean(point: Float[Array, "D"]) -> Float[Array, "D D"]:
    """The Euclidean metric: the identity (D, D), at every point (D,).

    Example:
      >>> import jax.numpy as jnp
      >>> from natgrad_flax import geometry
      >>> geometry.euclidean(jnp.array([3.0, 4.0])).tolist()
      [[1.0, 0.0], [0.0, 1.0]]
    """
    return jnp.eye(len(point), dtype=point.dtype)


def fisher_rao_gaussian(point: Float[Array, "D"]) -> Float[Array, "D D"]:
    """The Fisher-Rao metric of normal distributions.

    Args:
      point: the mean (n,) and after it the covariance (n, n), raveled.

    Returns:
      Sigma^{-1} for the mean, Sigma^{-1} (x) Sigma^{-1} / 2 for the covariance.

    Example:
      >>> import jax.numpy as jnp
      >>> from natgrad_flax import geometry
      >>> mean, variance = 0.0, 2.0
      >>> # 1 / v and 1 / (2 v^2)
      >>> print(geometry.fisher_rao_gaussian(jnp.array([mean, variance])))
      [[0.5   0.   ]
       [0.    0.125]]
    """
    mean_size, covariance = _gaussian(point)
    inverse = jnp.linalg.inv(covariance)
    return _block_diagonal(mean_size, inverse, jnp.kron(inverse, inverse) / 2)


def wasserstein_gaussian(point: Float[Array, "D"]) -> Float[Array, "D D"]:
    """The metric of the L2-Wasserstein distance between normal distributions.

    Half the inverse of X -> Sigma X + X Sigma for the covariance, the identity for the mean
    (Malago, Montrucchio & Pistone 2018).

    Args:
      point: as for ``fisher_rao_gaussian``.

    Example:
      >>> import jax.numpy as jnp
      >>> from natgrad_flax import geometry
      >>> mean, variance = 0.0, 2.0
      >>> # 1 and 1 / (4 v)
      >>> print(geometry.wasserstein_gaussian(jnp.array([mean, variance])))
      [[1.    0.   ]
       [0.    0.125]]
    """
    mean_size, covariance = _gaussian(point)
    eye = jnp.eye(mean_size, dtype=point.dtype)
    lyapunov = jnp.kron(covariance, eye) + jnp.kron(eye, covariance)
    return _block_diagonal(mean_size, eye, jnp.linalg.inv(lyapunov) / 2)


def _gaussian(point: Array) -> tuple[int, Array]:
    size = round((-1 + (1 + 4 * len(point)) ** 0.5) / 2)
    if size * (size + 1) != len(point):
        raise ValueError(
            f"a normal distribution in n dimensions is a point of n + n^2 numbers, got {len(point)}"
        )
    return size, point[size:].reshape(size, size)


def _block_diagonal(mean_size: int, mean: Array, covariance: Array) -> Array:
    size = mean_size + len(covariance)
    matrix = jnp.zeros((size, size), covariance.dtype)
    matrix = matrix.at[:mean_size, :mean_size].set(mean)
    return matrix.at[mean_size:, mean_size:].set(covariance)


def gram_matrix(phi: Map, xi: Float[Array, "d"], metric: Metric = euclidean) -> Float[Array, "d d"]:
    """G = J^T g J, shape (d, d).

    Args:
      phi: the parametrisation.
      xi: parameters (d,).
      metric: g.

    Raises:
      ValueError: xi or phi(xi) is no vector, or the metric is not symmetric positive definite.

    Example:
      >>> import jax.numpy as jnp
      >>> from natgrad_flax import geometry
      >>> polar = lambda xi: xi[0] * jnp.array([jnp.cos(xi[1]), jnp.sin(xi[1])])
      >>> r, angle = 2.0, 0.5
      >>> found = geometry.gram_matrix(polar, jnp.array([r, angle]))
      >>> bool(jnp.allclose(found, jnp.diag(jnp.array([1, r**2])), atol=1e-5))
      True
    """
    jacobian, matrix = _at(phi, xi, metric)
    return jacobian.T @ matrix @ jacobian


def natural_parameter_gradient(
    phi: Map,
    objective: Objective,
    xi: Float[Array, "d"],
    metric: Metric = euclidean,
    generalised_inverse: Map | None = None,
) -> Float[Array, "d"]:
    """G^- grad_xi L, shape (d,) (van Oostrum et al. 2022, Eq. 5).

    Without ``generalised_inverse`` G^- is the Moore-Penrose inverse, taken from the singular values
    of g^{1/2} J so that the condition of J is not squared; those below max(D, d) eps times the
    largest count as zero.

    Args:
      phi: the parametrisation.
      objective: L, of points.
      xi: parameters (d,).
      metric: g.
      generalised_inverse: from G to any G^- with G G^- G = G.

    Raises:
      ValueError: see ``gram_matrix``.

    Example:
      >>> import jax.numpy as jnp
      >>> from natgrad_flax import geometry
      >>> doubled = lambda xi: xi[:1] + xi[1:]  # two parameters of one number
      >>> found = geometry.natural_parameter_gradient(
      ...     doubled, lambda z: 3 * z[0], jnp.zeros(2)
      ... )
      >>> bool(jnp.allclose(found, 1.5))  # together they move the number by 3
      True
    """
    jacobian, matrix = _at(phi, xi, metric)
    slope = jax.grad(objective)(phi(xi))
    if generalised_inverse is not None:
        return generalised_inverse(jacobian.T @ matrix @ jacobian) @ (jacobian.T @ slope)
    factor = jnp.linalg.cholesky(matrix)
    right = jax.scipy.linalg.solve_triangular(factor, slope, lower=True)
    return _pseudo_inverse(factor.T @ jacobian) @ right


def push_forward(phi: Map, xi: Float[Array, "d"], vector: Float[Array, "d"]) -> Float[Array, "D"]:
    """d phi (vector): what a vector on the parameter space (d,) does on the model, shape (D,).

    Example:
      >>> import jax.numpy as jnp
      >>> from natgrad_flax import geometry
      >>> polar = lambda xi: xi[0] * jnp.array([jnp.cos(xi[1]), jnp.sin(xi[1])])
      >>> turn = jnp.array([0.0, 1.0])  # of the angle, at radius 2
      >>> print(geometry.push_forward(polar, jnp.array([2.0, 0.0]), turn))
      [0. 2.]
    """
    moved: Array = jax.jvp(phi, (xi,), (vector,))[1]
    return moved


def span_projection(
    phi: Map, xi: Float[Array, "d"], metric: Metric = euclidean
) -> Float[Array, "D D"]:
    """Pi = J G^+ J^T g, the g-orthogonal projection on the coordinate vectors, shape (D, D).

    The push-forward of the natural parameter gradient is Pi applied to the gradient of the ambient
    space, for every generalised inverse (van Oostrum et al. 2022, Theorem 1).

    Args:
      phi: the parametrisation.
      xi: parameters (d,).
      metric: g.

    Raises:
      ValueError: see ``gram_matrix``.

    Example:
      >>> import jax.numpy as jnp
      >>> from natgrad_flax import geometry
      >>> line = lambda xi: xi[0] * jnp.array([1.0, 1.0])
      >>> print(geometry.span_projection(line, jnp.ones(1)).round(3))
      [[0.5 0.5]
       [0.5 0.5]]
    """
    jacobian, matrix = _at(phi, xi, metric)
    factor = jnp.linalg.cholesky(matrix)
    white = factor.T @ jacobian
    projected = white @ _pseudo_inverse(white) @ factor.T
    return jax.scipy.linalg.solve_triangular(factor.T, projected, lower=False)


def ambient_gradient(
    objective: Objective, point: Float[Array, "D"], metric: Metric = euclidean
) -> Float[Array, "D"]:
    """g^{-1} dL: the gradient of the ambient space at a point, shape (D,).

    Raises:
      ValueError: the metric is not symmetric positive definite.

    Example:
      >>> import jax.numpy as jnp
      >>> from natgrad_flax import geometry
      >>> objective = lambda z: jnp.sum(z**2) / 2
      >>> metric = lambda z: jnp.diag(jnp.array([1.0, 2.0]))
      >>> print(geometry.ambient_gradient(objective, jnp.array([1.0, 4.0]), metric))
      [1. 2.]
    """
    matrix = metric(point)
    _check_metric(matrix)
    return jnp.linalg.solve(matrix, jax.grad(objective)(point))


def any_generalised_inverse(
    matrix: Float[Array, "n m"], free: Float[Array, "m n"]
) -> Float[Array, "m n"]:
    """A^+ + Z - A^+ A Z A A^+: with Z every A^- with A A^- A = A, symmetric or not.

    Args:
      matrix: A (n, m).
      free: Z (m, n).

    Raises:
      ValueError: the shapes do not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> from natgrad_flax import geometry
      >>> A = jnp.array([[1.0, 2.0], [2.0, 4.0]])
      >>> inverse = geometry.any_generalised_inverse(
      ...     A, jnp.array([[0.0, 1.0], [3.0, 0.0]])
      ... )
      >>> bool(jnp.allclose(A @ inverse @ A, A, atol=1e-4))
      True
    """
    if free.shape != matrix.T.shape:
        raise ValueError(
            f"free must have the transposed shape of the matrix, {matrix.T.shape}, got {free.shape}"
        )
    inverse = _pseudo_inverse(matrix)
    return inverse + free - inverse @ matrix @ free @ matrix @ inverse


def coordinate_rank(phi: Map, xi: Float[Array, "d"]) -> int:
    """The dimension of the span of the coordinate vectors at concrete parameters (d,).

    Example:
      >>> import jax.numpy as jnp
      >>> from natgrad_flax import geometry
      >>> square = lambda xi: jnp.array([xi[0] ** 2, 2 * xi[0] ** 2])
      >>> [geometry.coordinate_rank(square, xi) for xi in (jnp.ones(1), jnp.zeros(1))]
      [1, 0]
    """
    values = np.linalg.svd(np.asarray(jax.jacfwd(phi)(xi)), compute_uv=False)
    largest = values.max(initial=0.0)
    size = max(len(xi), len(phi(xi)))
    return int(np.sum(values > size * np.finfo(values.dtype).eps * largest)) if largest else 0


def is_proper(phi: Map, xi: Float[Array, "d"], dimension: int) -> bool:
    """Whether the coordinate vectors span the tangent space (van Oostrum et al. 2022, Sec. 2).

    There the push-forward of the natural parameter gradient is the natural gradient of the model,
    and no parametrisation can change it.

    Args:
      phi: the parametrisation.
      xi: parameters (d,).
      dimension: of the model at phi(xi).

    Raises:
      ValueError: the rank of the coordinate vectors is above the dimension.

    Example:
      >>> import jax.numpy as jnp
      >>> from natgrad_flax import geometry
      >>> cusp = lambda xi: xi**3  # covers the line, but its derivative is 0 at 0
      >>> [geometry.is_proper(cusp, xi, 1) for xi in (jnp.ones(1), jnp.zeros(1))]
      [True, False]
    """
    rank = coordinate_rank(phi, xi)
    if rank > dimension:
        raise ValueError(
            f"the coordinate vectors have rank {rank}: the model has at least that dimension, not "
            f"{dimension}"
        )
    return rank == dimension


def _at(phi: Map, xi: Array, metric: Metric) -> tuple[Array, Array]:
    """The Jacobian (D, d) and the metric (D, D)."""
    if jnp.ndim(xi) != 1:
        raise ValueError(f"parameters must be a vector, got shape {jnp.shape(xi)}")
    point = phi(xi)
    if jnp.ndim(point) != 1:
        raise ValueError(f"the parametrisation must return a vector, got shape {jnp.shape(point)}")
    matrix = metric(point)
    if matrix.shape != (len(point), len(point)):
        raise ValueError(
            f"the metric at a point of {len(point)} numbers must be {(len(point), len(point))}, "
            f"got {matrix.shape}"
        )
    _check_metric(matrix)
    return jax.jacfwd(phi)(xi), matrix


def _check_metric(matrix: Array) -> None:
    if isinstance(matrix, jax.core.Tracer):
        return
    values = np.asarray(matrix)
    skew = np.abs(values - values.T).max(initial=0.0)
    if not skew <= 1e-5 * np.abs(values).max(initial=0.0):
        raise ValueError(f"the metric is not symmetric: two entries differ by {skew:.3g}")
    smallest = np.linalg.eigvalsh(values).min()
    if not smallest > 0:
        raise ValueError(
            f"the metric is not positive definite: its smallest eigenvalue is {smallest:.3g}"
        )


def _pseudo_inverse(matrix: Array) -> Array:
    return jnp.linalg.pinv(matrix, rtol=max(matrix.shape) * float(jnp.finfo(matrix.dtype).eps))
