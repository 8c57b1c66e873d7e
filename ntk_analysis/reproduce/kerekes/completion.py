"""Figure 5 of Kerekes et al. (2021): completion of low-rank matrices by deep factorisations."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from natgrad_datasets import low_rank_matrix, observed_mask
from numpy.typing import NDArray

from natgrad_flax.linear import matrix_factorization as mf
from natgrad_flax.linear import references
from natgrad_flax.linear.completion import complete, effective_rank, initial_factors
from natgrad_flax.linear.factorization_checks import Factors
from ntk_analysis.reproduce.kerekes.common import in_pieces
from ntk_analysis.reproduce.precision import in_float64
from ntk_analysis.reproduce.registry import (
    Measurement,
    Outcome,
    Report,
    above,
    below,
    check,
)

Matrix = NDArray[np.float64]

DEPTHS = (1, 2, 3, 4)
EUCLIDEAN = {depth: f"EGD, L = {depth}" for depth in DEPTHS}
NATURAL = "NGD, L = 2"
NUCLEAR = "least nuclear norm"

_SCALE = 1e-3
NATURAL_SCALE = 1.0
STEPS = {1: 0.02, 2: 0.02, 3: 0.005}
_TOLERANCE = 1e-6
_GAUSSIANS = (1, 2, 3)
PIECES = 10
_BOUND = 1e6


@dataclass(frozen=True)
class Setting:
    """One run of the figure.

    Attributes:
      size: n, rows and columns.
      rank: of the matrix to complete.
      counts: numbers of observed entries m.
      shown: the count of the bounds and of the right panel.
      learning_rate: of the Euclidean descent.
      max_steps: of the Euclidean descent.
      natural_time: of the natural gradient, its step size times its steps.
      seed: of matrix and observations; the factors' is one above.
      others: seeds with which the descents of two and three factors are run as well.
    """

    size: int
    rank: int
    counts: tuple[int, ...]
    shown: int
    learning_rate: float
    max_steps: int
    natural_time: float
    seed: int
    others: tuple[int, ...] = ()


PAPER = Setting(
    size=100,
    rank=5,
    counts=(1500, 2000, 3000, 5000),
    shown=2000,
    learning_rate=1e-3,
    max_steps=300_000,
    natural_time=6.0,
    seed=0,
    others=(1, 2),
)


class Problem(NamedTuple):
    """A matrix of which some entries are known.

    Attributes:
      target: shape (n, n), mean square 1.
      mask: True where observed.
    """

    target: Matrix
    mask: NDArray[np.bool_]

    def error(self, beta: Any) -> float:
        """Mean over all entries of the squared error."""
        return float(np.mean((np.asarray(beta) - self.target) ** 2))

    def observed_error(self, beta: Any) -> float:
        """Mean over the observed entries."""
        return float(np.mean((np.asarray(beta) - self.target)[self.mask] ** 2))

    def unobserved_error(self, beta: Any) -> float:
        """Mean over the entries that no method sees."""
        return float(np.mean((np.asarray(beta) - self.target)[~self.mask] ** 2))


def problem(setting: Setting, count: int) -> Problem:
    """The matrix with so many entries observed; fewer of them are among more of them."""
    size = setting.size
    return Problem(
        low_rank_matrix(size, setting.rank, setting.seed),
        observed_mask((size, size), count, setting.seed + 1),
    )


def draw_factors(setting: Setting, depth: int, scale: float, gaussians: int = 1) -> Factors:
    """Factors to start from, each a product of so many Gaussian matrices."""
    return initial_factors(
        setting.size,
        depth,
        scale,
        jax.random.key(setting.seed + 1),
        gaussians=gaussians,
        dtype=jnp.float64,
    )


class Completed(NamedTuple):
    """What a method makes of a problem.

    Attributes:
      error: mean squared error over all entries.
      rank: effective rank.
      norm: nuclear norm.
      loss: mean squared error over the observed entries.
    """

    error: float
    rank: float
    norm: float
    loss: float


def summary(case: Problem, beta: Any) -> Completed:
    """Errors, effective rank and nuclear norm of a completed matrix."""
    beta = np.asarray(beta, np.float64)
    return Completed(
        case.error(beta),
        effective_rank(beta),
        float(np.linalg.norm(beta, "nuc")),
        case.observed_error(beta),
    )


def euclidean(setting: Setting, case: Problem, depth: int, gaussians: int = 1) -> Completed:
    """Descent with one step size for all parameters until the observations are met, in float32."""
    factors = draw_factors(setting, depth, _SCALE, gaussians)
    found = complete(
        case.target.astype(np.float32),
        case.mask,
        tuple(factor.astype(np.float32) for factor in factors),
        learning_rate=setting.learning_rate,
        tolerance=_TOLERANCE,
        max_steps=setting.max_steps,
    )
    return summary(case, mf.product(found.factors))


class Path(NamedTuple):
    """A natural-gradient run, recorded at equal distances.

    Attributes:
      steps: at which it was recorded, shape (R,), to the last record before it blew up.
      betas: the matrix then, shape (R, n, n).
    """

    steps: Matrix
    betas: Matrix


def natural(
    setting: Setting,
    case: Problem,
    depth: int,
    *,
    step_size: float,
    report: Report,
    what: str,
    solution: mf.Solution = "joint",
    cutoff: float | None = None,
) -> Path:
    """Natural-gradient descent from Gaussian factors of scale 1, in ten pieces.

    An entry of a million ends the record: the matrix has entries of order one.
    """
    factors = draw_factors(setting, depth, NATURAL_SCALE)
    steps = round(setting.natural_time / step_size)
    states = in_pieces(
        mf.natural_gradient_field(
            case.target, case.mask, factors, solution=solution, cutoff=cutoff
        ),
        factors,
        step_size=step_size,
        steps=steps,
        pieces=PIECES,
        report=report,
        what=what,
    )
    betas = [np.asarray(mf.product(state)) for state in states]
    kept = next((i for i, b in enumerate(betas) if not np.abs(b).max() < _BOUND), len(betas))
    return Path(np.linspace(0, steps, PIECES + 1)[:kept], np.array(betas[:kept]))


@dataclass(frozen=True)
class Table:
    """What all methods made of all problems.

    Attributes:
      found: by name of the method, over the counts.
      drift: of the natural gradient, change of the mean squared error over the unobserved
        entries, over the counts.
      collapsed: by depth, over the number of Gaussian matrices in a factor, with the shown count.
      spread: errors by depth, of shape (seeds, counts), that of the other panels first.
    """

    found: dict[str, list[Completed]]
    drift: list[float]
    collapsed: dict[int, list[Completed]]
    spread: dict[int, Matrix]


def run_all(setting: Setting, report: Report) -> Table:
    """All three panels."""
    found: dict[str, list[Completed]] = {
        name: [] for name in (*EUCLIDEAN.values(), NATURAL, NUCLEAR)
    }
    drift = []
    for count in setting.counts:
        case = problem(setting, count)
        for depth, name in EUCLIDEAN.items():
            report(f"{count} observed, {name}")
            found[name].append(euclidean(setting, case, depth))
        path = natural(
            setting,
            case,
            2,
            step_size=STEPS[2],
            report=report,
            what=f"{count} observed, {NATURAL}",
        )
        found[NATURAL].append(summary(case, path.betas[-1]))
        drift.append(case.unobserved_error(path.betas[-1]) - case.unobserved_error(path.betas[0]))
        report(f"{count} observed, {NUCLEAR}")
        completed, _ = references.min_nuclear_norm(case.target, case.mask)
        found[NUCLEAR].append(summary(case, completed))
        shown = ", ".join(f"{name} {rows[-1].error:.2g}" for name, rows in found.items())
        report(f"{count} observed, errors: {shown}")
    case = problem(setting, setting.shown)
    collapsed: dict[int, list[Completed]] = {}
    for depth in (2, 3):
        # with one matrix a factor it is the run of the left panel
        rows = [found[EUCLIDEAN[depth]][setting.counts.index(setting.shown)]]
        for gaussians in _GAUSSIANS[1:]:
            report(f"L = {depth}, factors of {gaussians} Gaussian matrices")
            rows.append(euclidean(setting, case, depth, gaussians))
        collapsed[depth] = rows
    spread = {}
    for depth in (2, 3):
        errors = [[row.error for row in found[EUCLIDEAN[depth]]]]
        for seed in setting.others:
            report(f"L = {depth}, seed {seed}")
            other = replace(setting, seed=seed)
            cases = [problem(other, count) for count in setting.counts]
            errors.append([euclidean(other, case, depth).error for case in cases])
        spread[depth] = np.array(errors)
    return Table(found, drift, collapsed, spread)


def judge(setting: Setting, table: Table) -> list[Measurement]:
    """The order of the depths, of every seed the worst, and what theory says of one factor."""
    place, errors = setting.counts.index(setting.shown), table.spread
    one, two, three = (table.found[EUCLIDEAN[depth]] for depth in (1, 2, 3))
    nuclear = table.found[NUCLEAR]
    unseen = 1 - np.array(setting.counts) / setting.size**2
    flat = np.array([row.error for row in one])
    spans = {
        depth: float(np.ptp([row.error for row in rows])) for depth, rows in table.collapsed.items()
    }
    gap = min(r.error for r in table.collapsed[2]) - max(r.error for r in table.collapsed[3])
    observed = [row.loss for name in EUCLIDEAN.values() for row in table.found[name]]
    shares = {
        2: float(errors[2][:, place].max() / unseen[place]),
        3: float((errors[3] / errors[2])[:, place].max()),
    }
    few, many = f"m = {setting.shown}", f"m = {setting.counts[-1]}"
    return [
        below(f"{few}: error of L = 2 over the share of unobserved entries", shares[2], 0.5),
        below(f"{few}: error of L = 3 over that of L = 2", shares[3], 0.1),
        below(
            "L = 1: error from the share of unobserved entries",
            float(np.abs(flat - unseen).max()),
            0.01,
        ),
        below(f"{many}, L = 2 and 3: error", max(e[:, -1].max() for e in errors.values()), 1e-4),
        above(f"{few}: effective rank, L = 1 over 2", one[place].rank / two[place].rank, 1.0),
        above(f"{few}: effective rank, L = 2 over 3", two[place].rank / three[place].rank, 1.0),
        above(
            f"{few}: error, {NUCLEAR} over L = 3",
            nuclear[place].error / three[place].error,
            1.0,
        ),
        above(
            f"{few}: nuclear norm, L = 3 over the least",
            three[place].norm / nuclear[place].norm,
            1.0,
        ),
        # the descent stops by the loss in float32, a sum of as many squares as are observed
        below("observed error of EGD at the end: largest", max(observed), 1.001 * _TOLERANCE),
        below(
            f"{NATURAL}: change of the unobserved error, largest over m",
            max(abs(change) for change in table.drift),
            0.02,
        ),
        below(
            f"{NATURAL}: observed error at the end, largest over m",
            max(row.loss for row in table.found[NATURAL]),
            1e-5,
        ),
        below(f"{few}, L = 2: error over the initial products, range", spans[2], 0.03),
        below(f"{few}, L = 3: error over the initial products, range", spans[3], 0.03),
        above(f"{few}: smallest error of L = 2 less largest of L = 3", gap, 0.01),
    ]


def describe(setting: Setting, table: Table) -> dict[str, Any]:
    """The three panels as JSON has them."""
    rank = effective_rank(low_rank_matrix(setting.size, setting.rank, setting.seed))
    return {
        "size": setting.size,
        "shown": setting.shown,
        "counts": list(setting.counts),
        "curves": {
            name: {"error": [r.error for r in rows], "rank": [r.rank for r in rows]}
            for name, rows in table.found.items()
        },
        "spread": {EUCLIDEAN[depth]: errors for depth, errors in table.spread.items()},
        "target_rank": rank,
        "gaussians": list(_GAUSSIANS),
        "collapsed": {
            f"L = {depth}": [row.error for row in rows] for depth, rows in table.collapsed.items()
        },
    }


DATA = "n = 100, rank 5, mean square of an entry 1, m entries observed without replacement"


@check(
    "KE-Fig5",
    "Completion of a rank-5 matrix over depth and observations",
    claim=(
        "Euclidean descent on a product of two or more matrices completes a low-rank matrix from "
        "few observations, the better the deeper, and at a low effective rank; on the matrix "
        "itself it moves the observed entries only. The natural gradient generalises no better "
        "than that at any depth. How the factors are initialised hardly counts beside the depth "
        "during training."
    ),
    setting=(
        f"{DATA}, m = {', '.join(map(str, PAPER.counts))}, one seed, and with L = 2 and 3 two "
        "more; Euclidean as Arora et al. "
        f"(2019): one step size for all parameters, learning rate {PAPER.learning_rate:g}, "
        f"initial scale {_SCALE:g}, stop at loss {_TOLERANCE:g}; right panel: each factor a "
        f"product of 1 to 3 Gaussian matrices, m = {PAPER.shown}; natural gradient: L = 2, "
        f"steps of {STEPS[2]} up to a time of {PAPER.natural_time:g}, initial scale "
        f"{NATURAL_SCALE:g}; Euclidean in float32, natural in float64"
    ),
    origin="paper, partly",
    differs=("the grid of m, the seeds and the start of the natural gradient are ours"),
)
@in_float64
def figure_5(report: Report) -> Outcome:
    """Left, middle and right panel."""
    table = run_all(PAPER, report)
    return Outcome(tuple(judge(PAPER, table)), describe(PAPER, table), _NOTES)


_NOTES = (
    "Errors are means over all entries, as in Arora et al.; the grid of m is ours.",
    "The natural gradient starts at scale 1: from 1e-3 the product is nearly singular and the step "
    "size would have to be ten times smaller.",
)
