"""Deep matrix factorisation of observed entries (Kerekes et al. 2021, Appendix B.4 and Fig. 5).

beta = W_1 W_2 ... W_L, loss = 1/2 sum over observed entries of (beta - target)^2, so the gradient
with respect to beta is G = mask * (beta - target) and the Fisher of beta with unit noise is I. With
A_l = W_1 ... W_{l-1} and B_l = W_{l+1} ... W_L, a change of the factors moves beta by
J dW = sum_l A_l dW_l B_l, and a natural gradient is a solution of J dW = G.

Example:
  >>> import jax.numpy as jnp
  >>> from natgrad_flax.linear import matrix_factorization
  >>> target = jnp.array([[2.0, 9.0], [9.0, 9.0]])
  >>> mask = jnp.array([[1, 0], [0, 0]])
  >>> upper = jnp.array([[1.0, 0.5], [0.0, 1.0]])
  >>> factors = (upper, upper.T)
  >>> step = matrix_factorization.natural_gradient(target, mask, factors)
  >>> # of beta, to first order
  >>> moved = matrix_factorization.push_forward(factors, step)
  >>> # 1.25 - 2 where it is observed
  >>> residual = mask * (factors[0] @ factors[1] - target)
  >>> bool(jnp.allclose(moved, residual, atol=1e-5))
  True
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.lax import Precision

from natgrad_flax.arguments.arrays import is_concrete
from natgrad_flax.arguments.scalars import as_number, check_number, shown
from natgrad_flax.linear.descent import check_memory
from natgrad_flax.linear.factorization_checks import (
    Factors,
    check_factors,
    check_observations,
    check_start,
)

Solution = Literal["joint", "split"]
Kind = Literal["euclidean", "joint", "split"]
MOST_ITERATIONS = 5000
"""Of the conjugate gradients in one ``joint_step``."""

_ADVICE = "factorise a smaller matrix"


def product(factors: Sequence[Array]) -> Array:
    """beta = W_1 ... W_L."""
    return reduce(_matmul, factors)


def _matmul(a: Array, b: Array) -> Array:
    # on GPUs the default precision of a float32 product would be too low for the solves
    return jnp.matmul(a, b, precision=Precision.HIGHEST)


def neighbours(factors: Sequence[Array]) -> tuple[list[Array | None], list[Array | None]]:
    """The products left and right of each factor, A_l and B_l; None stands for the identity."""
    left: list[Array | None] = [None]
    right: list[Array | None] = [None]
    for factor in factors[:-1]:
        left.append(_times(left[-1], factor))
    for factor in reversed(factors[1:]):
        right.append(_times(factor, right[-1]))
    return left, right[::-1]


def _times(*matrices: Array | None) -> Any:
    present = [matrix for matrix in matrices if matrix is not None]
    return product(present) if present else None


def _transpose(matrix: Array | None) -> Array | None:
    return None if matrix is None else matrix.T


def residual(factors: Sequence[Array], target: Array, mask: Array) -> Array:
    """G = mask * (beta - target), the gradient with respect to beta."""
    return mask * (product(factors) - target)


def euclidean_step(factors: Sequence[Array], gradient: Array) -> Factors:
    """J^T G: A_l^T G B_l^T for each factor."""
    left, right = neighbours(factors)
    return tuple(
        _times(_transpose(a), gradient, _transpose(b)) for a, b in zip(left, right, strict=True)
    )


def split_step(
    factors: Sequence[Array], gradient: Array, *, cutoff: float | None = None
) -> Factors:
    """The solution of B.4, A_l^+ G B_l^+ / L for each factor.

    Eq. 51 prints the order B^{T+} G A^+, a misprint: it is this one that solves Eq. 50. With
    invertible factors beta' = beta (I - (eta / L) beta^{-1} G)^L after a step eta, exactly. Along a
    trajectory the determinant of beta changes its sign in general, and there the inverses blow up:
    for long runs take ``joint_step``, or a cut-off.

    Args:
      factors: W_1 ... W_L.
      gradient: G, of the shape of their product.
      cutoff: singular values below this fraction of the largest count as zero in the inverses, so
        that J dW = G up to what they leave out; None means JAX's, a few units of rounding.
    """
    left, right = neighbours(factors)
    pinv = [None if a is None else jnp.linalg.pinv(a, rtol=cutoff) for a in left]
    pinv_right = [None if b is None else jnp.linalg.pinv(b, rtol=cutoff) for b in right]
    return tuple(
        _times(a, gradient, b) / len(factors) for a, b in zip(pinv, pinv_right, strict=True)
    )


def joint_step(
    factors: Sequence[Array], gradient: Array, *, tolerance: float | None = None
) -> Factors:
    """The Moore-Penrose solution J^T V with J J^T V = G: least norm over all factors jointly.

    J J^T V = sum_l P_l V Q_l with P_l = A_l A_l^T and Q_l = B_l^T B_l. Two factors: a Sylvester
    equation, solved by two eigendecompositions. More: conjugate gradients, preconditioned by the
    terms of the first and the last factor, which are again of Sylvester form.

    Args:
      factors: W_1 ... W_L.
      gradient: G, of the shape of their product.
      tolerance: relative residual of the conjugate gradients; None means 1e3 times the rounding
        unit. They end after ``MOST_ITERATIONS`` at the latest.
    """
    if len(factors) == 1:
        return (gradient,)
    left, right = neighbours(factors)
    p = [None if a is None else _matmul(a, a.T) for a in left]
    q = [None if b is None else _matmul(b.T, b) for b in right]
    solve = _sylvester(p[-1], q[0], singular=len(factors) == 2)
    if len(factors) == 2:
        dual = solve(gradient)
    else:
        eps = float(jnp.finfo(gradient.dtype).eps)
        dual, _ = jax.scipy.sparse.linalg.cg(
            lambda v: sum(_times(a, v, b) for a, b in zip(p, q, strict=True)),
            gradient,
            tol=1e3 * eps if tolerance is None else tolerance,
            # hundreds are usual; where rounding hides the tolerance, more would not help
            maxiter=min(10 * gradient.size, MOST_ITERATIONS),
            M=solve,
        )
    return tuple(
        _times(_transpose(a), dual, _transpose(b)) for a, b in zip(left, right, strict=True)
    )


def _sylvester(p: Any, q: Any, *, singular: bool) -> Any:
    """The map V -> X with p X + X q = V, for symmetric p and q that are not negative.

    Where a sum of eigenvalues is zero to rounding it is replaced: by infinity if singular, which
    gives the pseudo-inverse, else by the smallest sum that counts, which keeps the map definite.
    """
    p_values, p_vectors = jnp.linalg.eigh(p)
    q_values, q_vectors = jnp.linalg.eigh(q)
    sums = p_values[:, None] + q_values[None, :]
    cutoff = max(sums.shape) * jnp.finfo(sums.dtype).eps * jnp.max(sums)
    sums = jnp.where(sums > cutoff, sums, jnp.inf if singular else cutoff)

    def solve(v: Array) -> Array:
        rotated = _times(p_vectors.T, v, q_vectors)
        return _times(p_vectors, rotated / sums, q_vectors.T)

    return solve


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["target", "mask"],
    meta_fields=["kind", "cutoff"],
)
@dataclass(frozen=True)
class FactorGradient:
    """A gradient with respect to the factors, as a function of them.

    Attributes:
      target: matrix to approximate.
      mask: 1 at observed entries, 0 elsewhere.
      kind: "euclidean", or the solution of J dW = G: "joint" or "split".
      cutoff: of "split".
    """

    target: Array
    mask: Array
    kind: Kind
    cutoff: float | None = None

    def __call__(self, factors: Factors) -> Factors:
        """The field at a tuple of factors."""
        rule = _RULES[self.kind]
        if self.cutoff is not None:
            rule = partial(split_step, cutoff=self.cutoff)
        return rule(tuple(factors), residual(factors, self.target, self.mask))


_RULES: dict[str, Callable[[Factors, Array], Factors]] = {
    "euclidean": euclidean_step,
    "joint": joint_step,
    "split": split_step,
}


def gradient_field(target: Any, mask: Any) -> FactorGradient:
    """The Euclidean gradient of half the sum of squares; 2 / sum(mask) times it is the mean's.

    Args:
      target: matrix, shape (rows, columns); unobserved entries are not used.
      mask: boolean or 0/1, of the same shape.

    Raises:
      ValueError, TypeError: as ``check_observations``.
    """
    return FactorGradient(*check_observations(target, mask), "euclidean")


def natural_gradient_field(
    target: Any,
    mask: Any,
    factors: Sequence[Any],
    *,
    solution: Solution = "joint",
    cutoff: float | None = None,
) -> FactorGradient:
    """The natural gradient as a function of the factors, checked for a start.

    Args:
      target: matrix, shape (rows, columns); unobserved entries are not used.
      mask: boolean or 0/1, of the same shape.
      factors: where the run starts.
      solution: "joint", which is stable, or "split", that of B.4.
      cutoff: of the inverses of "split", as ``split_step`` has it: 1e-2 keeps long runs stable.

    Returns:
      A field for ``descend``. Observed residuals shrink by 1 - eta a step, up to O(eta^2).

    Raises:
      ValueError: bad observations or factors; a factor narrower than the product, which the
        solution cannot take ("split", and "joint" with three or more); a singular factor ("split":
        the message says which); a cut-off of "joint", or outside of (0, 1); matrices beyond memory.
      TypeError: not floating.
    """
    if solution not in get_args(Solution):
        raise ValueError(f'solution must be "joint" or "split", got {solution!r}')
    if cutoff is not None:
        cutoff = check_number("cutoff", cutoff, positive=True)
        if solution != "split" or cutoff >= 1:
            raise ValueError(
                'cutoff is a fraction below 1 of the largest singular value, for solution="split" '
                f"alone, got {cutoff} with {solution!r}"
            )
    target, mask = check_observations(target, mask)
    checked = check_start(factors, target)
    shape = target.shape
    check_memory((max(shape),) * 2, target.dtype, "a Gram matrix of the factors", _ADVICE)
    narrow = [n for n, w in enumerate(checked, start=1) if min(w.shape) < min(shape)]
    if narrow and (solution == "split" or len(checked) > 2):
        raise ValueError(
            f"factor {narrow[0]} of shape {checked[narrow[0] - 1].shape} is narrower than the "
            f"product {shape}, so J dW = G has no solution; take wider factors, or two and "
            'solution="joint" for the least-squares one'
        )
    if solution == "split":
        _check_invertible(checked)
    return FactorGradient(target, mask, solution, cutoff)


def _check_invertible(factors: Factors) -> None:
    for number, w in enumerate(factors, start=1):
        if not is_concrete(w):
            return
        values = np.linalg.svd(np.asarray(w, np.float64), compute_uv=False)
        if values[-1] <= max(w.shape) * np.finfo(w.dtype).eps * values[0]:
            raise ValueError(
                f"factor {number} is singular, so the 1/L split does not solve J dW = G; "
                'take solution="joint"'
            )


def natural_gradient(
    target: Any, mask: Any, factors: Sequence[Any], *, solution: Solution = "joint"
) -> Factors:
    """The natural gradient at one point; arguments and errors of ``natural_gradient_field``."""
    field = natural_gradient_field(target, mask, factors, solution=solution)
    return field(check_factors(factors))


def push_forward(factors: Sequence[Array], step: Sequence[Array]) -> Array:
    """J dW = sum_l A_l dW_l B_l: how beta moves, to first order, with a step of the factors."""
    left, right = neighbours(factors)
    terms = [_times(a, d, b) for a, d, b in zip(left, step, right, strict=True)]
    return reduce(jnp.add, terms)


def flow_kernel(factors: Sequence[Any], entry: tuple[int, int], *, kind: Kind) -> Array:
    """How the flow moves beta when one entry alone is observed, with residual 1 (Fig. 3).

    Euclidean: sum_l (A_l A_l^T) E (B_l^T B_l), the cross of row and column for two factors.
    Natural, either solution: E itself, where the factors are invertible.

    Args:
      factors: W_1 ... W_L.
      entry: row and column, from 0.
      kind: "euclidean", "joint" or "split".

    Returns:
      Matrix of the shape of beta.

    Raises:
      ValueError: bad factors, an entry outside of the matrix, an unknown kind.
    """
    factors, one = _one_entry(factors, entry, kind)
    return push_forward(factors, _RULES[kind](factors, one))


def step_kernel(
    factors: Sequence[Any],
    entry: tuple[int, int],
    *,
    kind: Kind,
    step_size: float,
    error: float,
) -> Array:
    """The change of beta in one finite step, divided by -step_size * error (Fig. 3).

    Args:
      factors: W_1 ... W_L.
      entry: row and column of the one observed entry, from 0.
      kind: "euclidean", "joint" or "split"; with "split" and invertible factors no other entry
        moves, whatever the step size.
      step_size: eta.
      error: beta - target at the entry, not 0.

    Returns:
      Matrix of the shape of beta.

    Raises:
      ValueError: as ``flow_kernel``; a step size or an error out of range.
    """
    step_size = check_number("step_size", step_size, positive=True)
    size = as_number(error)
    if size is None or not np.isfinite(size) or size == 0:
        raise ValueError(f"error must be finite and not 0, got {shown(error)}")
    factors, one = _one_entry(factors, entry, kind)
    step = _RULES[kind](factors, error * one)
    moved = tuple(w - step_size * d for w, d in zip(factors, step, strict=True))
    return (product(factors) - product(moved)) / (step_size * error)


def _one_entry(
    factors: Sequence[Any], entry: tuple[int, int], kind: object
) -> tuple[Factors, Array]:
    if kind not in get_args(Kind):
        raise ValueError(f"kind must be one of {', '.join(get_args(Kind))}, got {kind!r}")
    checked = check_factors(factors)
    shape = (checked[0].shape[0], checked[-1].shape[1])
    if not all(0 <= index < size for index, size in zip(entry, shape, strict=True)):
        raise ValueError(f"entry {entry} is outside of a matrix of shape {shape}")
    return checked, jnp.zeros(shape, checked[0].dtype).at[entry].set(1)
