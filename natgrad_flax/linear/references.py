"""The solutions that the descents of linear models converge to, by convex solvers in float64.

Linear programs go to SciPy's HiGHS, quadratic ones to its active-set solver of non-negative least
squares. Every result is checked before it is returned: feasibility, or the gap to the dual.

Example:
  >>> import numpy as np
  >>> from natgrad_flax.linear import references
  >>> x, y = np.array([[2.0, 0.0, 1.0], [0.0, 1.0, 1.0]]), np.array([1.0, -1.0])
  >>> references.separation(x, y).separable
  True
  >>> # of least l_1 norm
  >>> print(references.max_margin(x, y, depth=2).coefficients)
  [ 0.5 -1.   0. ]
  >>> print(references.natural_gradient_limit(x, y))  # of least l_2 norm
  [ 0.66666667 -0.66666667 -0.33333333]
"""

from __future__ import annotations

import math
from itertools import combinations
from typing import Any, NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog, nnls
from scipy.special import expit

from natgrad_flax.arguments.arrays import real_array
from natgrad_flax.arguments.scalars import check_integer, check_number, check_seed, check_steps
from natgrad_flax.linear.descent import check_memory
from natgrad_flax.linear.factorization_checks import check_observations
from natgrad_flax.linear.logistic import check_full_rank, signed_inputs

Vector = NDArray[np.float64]
SYSTEMS = 50_000  # of the exact search for p < 1
LARGE = 300_000  # entries of a constraint matrix


class Separation(NamedTuple):
    """Whether data are linearly separable, with a certificate either way.

    Attributes:
      margin: the largest min_n y_n x_n . b over |b|_inf <= 1; separable if positive.
      direction: b that attains it, shape (D,).
      multipliers: non-negative weights of sum 1, shape (N,), with |sum_n w_n y_n x_n|_1 = margin.
        At margin 0 they prove that no b separates: w-weighted margins of every b sum to 0.
      separable: margin above rounding.
    """

    margin: float
    direction: Vector
    multipliers: Vector
    separable: bool


class MaxMargin(NamedTuple):
    """A solution of min |b|_p subject to y_n x_n . b >= 1.

    Attributes:
      coefficients: b, shape (D,).
      objective: sum_j |b_j|^p.
      is_global: a global minimum. For p < 1 that is known only where all vertices were searched;
        otherwise the solution is a stationary point, the best of several starts.
    """

    coefficients: Vector
    objective: float
    is_global: bool


def _signed(x: Any, y: Any) -> Vector:
    x, y = np.asarray(x), np.asarray(y)
    if x.ndim == 2:
        check_memory(x.shape, np.float64, "the constraint matrix", "use fewer samples or features")
    signed_inputs(x, y)
    return x.astype(np.float64) * y[:, None]


def _solve_linear_program(cost: Vector, matrix: Vector, sides: Vector, bounds: Any) -> Any:
    """Least cost . v with matrix v <= sides: the interior point method is ahead at large sizes."""
    method = "highs-ipm" if matrix.size > LARGE else "highs"
    return linprog(cost, A_ub=matrix, b_ub=sides, bounds=bounds, method=method)


def _minimise(cost: Vector, z: Vector, matrix: Vector, bounds: Any) -> Vector:
    """Least cost . v with matrix v >= 1, which has a solution where the rows of z are separable."""
    result = _solve_linear_program(cost, -matrix, -np.ones(len(z)), bounds)
    if not result.success:
        _explain_failure(z, result.message)
    return result.x


def _explain_failure(z: Vector, message: str) -> NoReturn:
    check_separable(z, np.ones(len(z)))
    raise RuntimeError(f"the convex solver gave up on separable data: {message}")


def separation(x: Any, y: Any) -> Separation:
    """Decides linear separability (through the origin) by a linear program.

    Args:
      x: inputs, shape (N, D); for a bias, append a column of ones.
      y: labels -1 or +1, shape (N,).

    Returns:
      The decision with its certificate.

    Raises:
      ValueError, TypeError: as ``logistic.signed_inputs``, or data beyond memory.
      RuntimeError: the linear program was not solved.
    """
    z = _signed(x, y)
    num, dim = z.shape
    result = _solve_linear_program(
        np.append(np.zeros(dim), -1.0),
        np.hstack([-z, np.ones((num, 1))]),
        np.zeros(num),
        [(-1, 1)] * dim + [(None, None)],
    )
    if not result.success:
        raise RuntimeError(f"separability was not decided: {result.message}")
    margin = float(result.x[-1])
    multipliers = np.maximum(-result.ineqlin.marginals, 0)
    # HiGHS meets constraints to 1e-7 in absolute terms
    separable = margin > 1e-7 * max(1.0, float(np.abs(z).max()))
    return Separation(margin, result.x[:-1], multipliers, separable)


def check_separable(x: Any, y: Any) -> None:
    """Raises ValueError with the certificate unless the data are linearly separable."""
    found = separation(x, y)
    if found.separable:
        return
    samples = np.flatnonzero(found.multipliers > 1e-9)
    shown = ", ".join(map(str, samples[:8])) + (", ..." if len(samples) > 8 else "")
    size = np.abs(found.multipliers @ _signed(x, y)).max()
    raise ValueError(
        f"the data are not linearly separable: non-negative weights of sum 1 on {len(samples)} "
        f"samples ({shown}) make sum_n w_n y_n x_n zero (largest entry {size:.1e}), so no "
        "coefficients give all of them a positive margin"
    )


def max_margin(x: Any, y: Any, *, depth: int = 1, seed: int = 0) -> MaxMargin:
    """The l_p max-margin coefficients, p = 2 / depth, where Euclidean descent can go.

    Depth 1: a quadratic program, through its dual of non-negative least squares. Depth 2: a linear
    program. From depth 3 on the objective is concave in every orthant and has local minima, at
    vertices only. If at most 50000 systems can be vertices they are all tried; otherwise
    reweighted linear programs (Candes, Wakin & Boyd 2008) descend from the l_1 solution and from 8
    random weightings, and ``is_global`` is False. Descent itself needs to reach only a stationary
    point of this problem (Gunasekar et al. 2018).

    Args:
      x: inputs, shape (N, D).
      y: labels -1 or +1, shape (N,).
      depth: L of the diagonal network.
      seed: of the random weightings.

    Raises:
      ValueError: bad data, a depth below 1, data that are not separable.
      RuntimeError: a solver gave no solution.
    """
    depth, seed = check_integer("depth", depth, 1), check_seed(seed)
    z = _signed(x, y)
    if depth == 1:
        b = _least_norm(z)
        return MaxMargin(b, float(b @ b), True)
    b = _weighted_l1(z, np.ones(z.shape[1]))
    if depth == 2:
        return MaxMargin(b, float(np.abs(b).sum()), True)
    power = 2 / depth
    if math.comb(sum(z.shape), z.shape[1]) <= SYSTEMS:
        return _best(_vertices(z), power, True)
    weightings = np.random.default_rng(seed).exponential(1.0, (8, z.shape[1]))
    starts = [b, *(_weighted_l1(z, weights) for weights in weightings)]
    return _best(np.array([_reweighted(z, start, power) for start in starts]), power, False)


def _best(candidates: Vector, power: float, is_global: bool) -> MaxMargin:
    objectives = np.sum(np.abs(candidates) ** power, axis=1)
    best = int(np.argmin(objectives))
    return MaxMargin(candidates[best], float(objectives[best]), is_global)


def _least_norm(z: Vector) -> Vector:
    """Least |b| with z b >= 1 (Lawson & Hanson 1974, ch. 23: least-distance programming)."""
    num, dim = z.shape
    # one minus the sum below is 1 / (1 + |b|^2), so the rows are scaled to a b of order 1
    scale = float(np.linalg.norm(np.linalg.lstsq(z, np.ones(num), rcond=None)[0])) or 1.0
    multipliers, _ = nnls(np.vstack([scale * z.T, np.ones(num)]), np.append(np.zeros(dim), 1.0))
    b = z.T @ multipliers
    smallest = float(np.min(z @ b))
    expected = (1 - multipliers.sum()) / scale**2
    if not smallest > 0 or abs(smallest - expected) > 1e-6 * smallest:
        _explain_failure(z, "the quadratic program's margins do not agree with its dual")
    return b / smallest


def _weighted_l1(z: Vector, weights: Vector) -> Vector:
    """Least sum_j weights_j |b_j| with z b >= 1."""
    dim = z.shape[1]
    parts = _minimise(np.concatenate([weights, weights]), z, np.hstack([z, -z]), (0, None))
    return parts[:dim] - parts[dim:]


def _reweighted(z: Vector, start: Vector, power: float) -> Vector:
    """A local minimum of sum |b_j|^power: linearise, solve, with a floor that falls to 1e-8."""
    b, floor = start, float(np.abs(start).max())
    while floor > 1e-8 * np.abs(start).max():
        floor /= 4
        weights = (np.abs(b) + floor) ** (power - 1)
        b = _weighted_l1(z, weights / weights.max())
    return b


def _vertices(z: Vector) -> Vector:
    """All b with z b >= 1 that solve D of the equations z_n . b = 1 and b_j = 0."""
    num, dim = z.shape
    rows = np.vstack([z, np.eye(dim)])
    sides = np.append(np.ones(num), np.zeros(dim))
    found = []
    for chosen in combinations(range(num + dim), dim):
        system = rows[list(chosen)]
        if np.linalg.cond(system) < 1e12:
            b = np.linalg.solve(system, sides[list(chosen)])
            if np.min(z @ b) > 1 - 1e-9:
                found.append(b)
    return np.array(found)


def least_squares(x: Any, y: Any) -> Vector:
    """X^+ y: ordinary least squares, of least norm for N < D.

    Args:
      x: inputs, shape (N, D), of full rank.
      y: labels -1 or +1, shape (N,).

    Raises:
      ValueError, TypeError: bad data, rank below min(N, D), data beyond memory.
    """
    z = _signed(x, y)
    check_full_rank(z)
    # the signs of rows and right-hand sides cancel: z b = 1 is x b = y
    solution, *_ = np.linalg.lstsq(z, np.ones(len(z)), rcond=None)
    return solution.astype(np.float64)


def natural_gradient_limit(x: Any, y: Any, start: Any = None) -> Vector:
    """The direction that natural-gradient flow of logistic regression converges to.

    N <= D: X b = y, of least norm. N > D: the flow is Newton's, grad L decays as e^{-t}, and the
    limit is argmin c . b subject to y_n x_n . b >= 1 with c = -grad L at the start. For N > D every
    parametrisation whose Jacobian has full row rank goes there.

    Args:
      x: inputs, shape (N, D), of full rank.
      y: labels -1 or +1, shape (N,).
      start: coefficients at time 0, shape (D,); None means 0.

    Returns:
      Shape (D,), with smallest margin 1.

    Raises:
      ValueError: bad data, rank below min(N, D), data that are not separable.
      RuntimeError: the linear program was not solved.
    """
    z = _signed(x, y)
    num, dim = z.shape
    start = np.zeros(dim) if start is None else real_array(start, "start")
    if start.shape != (dim,) or not np.isfinite(start).all():
        raise ValueError(f"start must be finite and have shape (D,) = ({dim},), got {start.shape}")
    if num <= dim:
        return least_squares(x, y)
    check_full_rank(z)
    return _minimise(z.T @ expit(-z @ start), z, z, (None, None))


def all_support_vectors(x: Any, y: Any) -> bool:
    """Whether the least-norm interpolant X^+ y is the l_2 max-margin solution (Hsu et al. 2021).

    It is so if and only if y_n ((X X^T)^{-1} y)_n > 0 for every n.

    Args:
      x: inputs, shape (N, D) with N <= D, of rank N.
      y: labels -1 or +1, shape (N,).

    Raises:
      ValueError, TypeError: bad data, N > D, or a rank below N.
    """
    z = _signed(x, y)
    if z.shape[0] > z.shape[1]:
        raise ValueError(f"interpolation needs N <= D, got N = {z.shape[0]}, D = {z.shape[1]}")
    check_full_rank(z)
    return bool(np.all(np.linalg.solve(z @ z.T, np.ones(len(z))) > 0))


def gaussian_accuracy(coefficients: Any, truth: Any) -> float:
    """Accuracy of sign(x . b) for labels sign(x . truth) and x ~ N(0, I): 1 - angle / pi.

    Raises:
      ValueError: vectors of different shapes, or of norm 0 or not finite.
    """
    b, truth = real_array(coefficients, "coefficients"), real_array(truth, "truth")
    norms = np.linalg.norm(b) * np.linalg.norm(truth)
    if b.ndim != 1 or b.shape != truth.shape or not (np.isfinite(norms) and norms > 0):
        raise ValueError("coefficients and truth must be two vectors of one size and norm above 0")
    return 1 - math.acos(float(np.clip(b @ truth / norms, -1, 1))) / math.pi


def interpolant_accuracy(num_samples: int, dim: int) -> float:
    """Accuracy of X^+ y for N < D, x ~ N(0, I), y the signs of a linear teacher (Fig. 4).

    The limit of large N and D at g = D / N: X^+ y is the teacher with gain sqrt(2 / pi) / g and
    noise (1 - 2 / pi) / (g - 1). It falls to chance at N = D only.

    Raises:
      ValueError: not integers with 1 <= N < D.
    """
    num_samples = check_integer("num_samples", num_samples, 1)
    dim = check_integer("dim", dim, num_samples + 1)
    ratio = dim / num_samples
    gain, noise = 2 / math.pi / ratio**2, (1 - 2 / math.pi) / (ratio - 1)
    # the teacher's projection on the span of the samples has squared length 1 / g, hence the ratio
    return 1 - math.acos(math.sqrt(gain / (gain * ratio + noise))) / math.pi


def min_nuclear_norm(
    target: Any, mask: Any, *, tolerance: float = 1e-4, max_steps: int = 20_000
) -> tuple[NDArray[np.float64], float]:
    """The matrix of least nuclear norm that agrees with the observed entries.

    Douglas-Rachford splitting between the singular-value threshold and the observations. The dual
    variable, scaled to be feasible, bounds the norm from below; the run ends when the relative
    gap is below the tolerance, so the result is certified whatever the path to it.

    Args:
      target: matrix, shape (rows, columns); unobserved entries are not used.
      mask: boolean or 0/1, of the same shape.
      tolerance: largest gap between nuclear norm and bound, relative to the norm.
      max_steps: SVDs at most.

    Returns:
      The matrix, which has the observed entries exactly, and its relative gap.

    Raises:
      ValueError: bad observations, or a matrix beyond memory.
      RuntimeError: the gap is still above the tolerance after max_steps.
    """
    tolerance = check_number("tolerance", tolerance, positive=True)
    max_steps = check_steps(max_steps, "max_steps", 1)
    target = np.asarray(target)
    check_memory(target.shape, np.float64, "the matrix", "complete a smaller one")
    check_observations(target, mask)
    observed = np.asarray(mask, bool)
    known = np.where(observed, target, 0).astype(np.float64)
    threshold = float(np.linalg.norm(known, 2)) / 2
    if threshold == 0:
        return known, 0.0
    state = known.copy()
    for step in range(1, max_steps + 1):
        completed = np.where(observed, known, state)
        left, values, right = np.linalg.svd(2 * completed - state, full_matrices=False)
        shrunk = (left * np.maximum(values - threshold, 0)) @ right
        if step % 25 == 0 or step == max_steps:
            dual = np.where(observed, 2 * completed - state - shrunk, 0)
            bound = np.sum(dual * known) / np.linalg.norm(dual, 2)
            norm = np.linalg.norm(completed, "nuc")
            gap = float((norm - bound) / norm)
            if gap <= tolerance:
                return completed, gap
        state += shrunk - completed
    raise RuntimeError(
        f"the nuclear norm is within {gap:.1e} of its minimum after {max_steps} steps, above the "
        f"tolerance {tolerance:g}; allow more steps"
    )
