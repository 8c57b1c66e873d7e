"""Figures 1A to 1C of Bernacchia et al. (2018): linear networks that recover a linear network."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import natgrad_datasets
import numpy as np
from flax import nnx
from jax import Array
from natgrad_datasets.linear_teacher import LinearTeacherSetting
from numpy.typing import NDArray

from natgrad_flax.linear import online_natural_gradient_descent
from ntk_analysis.reproduce.bernacchia.common import linear_module
from ntk_analysis.reproduce.bernacchia.training import (
    Run,
    batches,
    compiled,
    gradient_step,
    natural_step,
)
from ntk_analysis.reproduce.precision import in_float64
from ntk_analysis.reproduce.registry import (
    Measurement,
    Outcome,
    Report,
    above,
    below,
    between,
    check,
    close,
)

Network = Callable[[Sequence[int], int], list[NDArray[np.float64]]]
"""The weights of a random network, from its widths and a seed."""

EVERY = 1_000
"""Examples between two points: one natural-gradient step, or 50 steps of SGD."""
MINIMUM = -6.0
"""log10 of the variance of the noise."""
REACHED = -5.8
SEEDS = (0, 1, 2)
"""Teachers with their data and students; the worst of them counts, for both methods."""
RATES = {
    "BE-Fig1A": (0.08, 0.04, 0.02, 0.01),
    "BE-Fig1B": (0.08, 0.04, 0.02, 0.01),
    "BE-Fig1C": (0.02, 0.01, 0.005, 0.0025),
}
"""Learning rates of SGD from Gaussian weights, from the paper's downwards; each teacher's best."""
STALLED = {"BE-Fig1A": 3, "BE-Fig1B": 3, "BE-Fig1C": 1}
"""On how many teachers of Gaussian weights SGD ends a decade above natural gradient."""


def semi_orthogonal(widths: Sequence[int], seed: int) -> list[NDArray[np.float64]]:
    """Weights with orthonormal rows or columns, whichever are fewer, uniform over all such."""
    rng, weights = np.random.default_rng(seed), []
    for inputs, outputs in itertools.pairwise(widths):
        gaussian = rng.standard_normal((max(inputs, outputs), min(inputs, outputs)))
        axes, triangle = np.linalg.qr(gaussian)
        axes = axes * np.sign(np.diagonal(triangle))
        weights.append(axes if inputs >= outputs else axes.T)
    return weights


GAUSSIAN, ORTHOGONAL = "Gaussian weights", "semi-orthogonal weights"
NETWORKS: dict[str, Network] = {
    GAUSSIAN: natgrad_datasets.random_linear_network,
    ORTHOGONAL: semi_orthogonal,
}
"""Kinds of weights, of teacher and student alike."""

_CLAIM = (
    "SGD makes fast progress at first and slows down dramatically very soon; the test error of "
    "natural gradient decreases exponentially until it reaches the least achievable one, that of "
    "the noise, after a few passes through the training set (Section 5). "
)
_PRINTED = "SGD at the best of some learning rates from the paper's"
_SETTING = (
    "10^4 training and 10^3 test examples, eigenvalues e^{-5 i / n_0}, noise 1e-6; natural "
    "gradient alpha = 1, M = 1000, K = 1; SGD M = 20; ours: weights of teacher and student, both "
    "N(0, 1 / fan-in) or both semi-orthogonal, where SGD has the paper's rate alone, lambda_0 = 1, "
    "errors and the loss of SGD unweighted, float64; the error is the mean square over samples and "
    f"outputs; teachers of seeds {', '.join(map(str, SEEDS))}"
)
_DIFFERS = (
    "initial weights, lambda_0, the unweighted loss of SGD and its smaller learning rates are ours"
)
_REMARK = (
    "The paper does not state its weights, and what SGD does depends on them. From Gaussian "
    "weights its rate diverges on most teachers, and at the best smaller one SGD {gaussian}. From "
    "semi-orthogonal weights, teacher's and student's, the paper's rate converges, and SGD "
    "{orthogonal}. Natural gradient reaches the noise from both, and from each kind in nearly the "
    "same number of steps on every teacher."
)


class Experiment:
    """The programs of one architecture, compiled once for all weights and learning rates.

    Args:
      setting: widths, data and batches.
      settings: of natural gradient.
    """

    def __init__(self, setting: LinearTeacherSetting, **settings: Any) -> None:
        self.setting, self._settings = setting, settings
        graphdef = nnx.graphdef(student(setting.widths, 0, semi_orthogonal))
        optimizer = online_natural_gradient_descent(1.0, **settings)
        self._natural = compiled(natural_step(graphdef, optimizer))
        self._gradient = compiled(gradient_step(graphdef))

        @jax.jit
        def error(params: Any, x: Array, y: Array) -> Array:
            return jnp.log10(jnp.mean((nnx.merge(graphdef, params)(x) - y) ** 2))

        self._error = error

    def natural(self, network: Network, seed: int) -> Run:
        """Natural gradient before its first step."""
        params = nnx.state(student(self.setting.widths, seed + 1, network), nnx.Param)
        optimizer = online_natural_gradient_descent(1.0, seed=seed, **self._settings)
        kept = optimizer.init(params)
        batch = self.setting.natural_gradient_batch
        return self._run(self._natural, (params, kept), network, seed, batch)

    def gradient(self, network: Network, seed: int, rate: float) -> Run:
        """SGD before its first step, from the same weights and with the examples in that order."""
        params = nnx.state(student(self.setting.widths, seed + 1, network), nnx.Param)
        state = params, jnp.asarray(rate)
        return self._run(self._gradient, state, network, seed, self.setting.sgd_batch)

    def _run(self, program: Any, state: Any, network: Network, seed: int, batch: int) -> Run:
        chosen = self.setting
        data = natgrad_datasets.linear_teacher(
            chosen.widths, chosen.num_train, chosen.num_test, seed
        )
        # another teacher with the same inputs and noise; the same one for Gaussian weights
        change = np.linalg.multi_dot(network(chosen.widths, seed)) - data.weights
        x, x_test = jnp.asarray(data.x_train), jnp.asarray(data.x_test)
        y, y_test = data.y_train + x @ change, data.y_test + x_test @ change
        order = batches(chosen.num_train, batch, EVERY, chosen.examples, seed)

        def error(params: Any) -> float:
            return float(self._error(params, x_test, y_test))

        return Run(program, error, state, (x, y), order)


def student(widths: Sequence[int], seed: int, network: Network) -> nnx.Sequential:
    """A linear network without biases, float64, with the random weights of a seed."""
    return linear_module(map(jnp.asarray, network(widths, seed)))


def train(run: Run, examples: int, name: str, report: Report) -> Run:
    """A run after so many examples, or after its divergence."""
    while run.finite and run.examples[-1] < examples:
        if run.examples[-1] % 20_000 == 0:
            report(f"{name}: {run.examples[-1]} examples, log10 of the error {run.errors[-1]:.2f}")
        run.advance()
    return run


def steps_to(errors: Sequence[float], level: float) -> float:
    """The first step after which the error is at most a level; infinity without one."""
    reached = np.flatnonzero(np.asarray(errors) <= level)
    return float(reached[0]) if len(reached) else float("inf")


def straightness(errors: Sequence[float], level: float) -> float:
    """R^2 of the straight line through the log errors until they first reach a level."""
    end = steps_to(errors, level)
    fall = np.asarray(errors)[: int(end) + 1 if np.isfinite(end) else None]
    return float(np.corrcoef(np.arange(len(fall)), fall)[0, 1] ** 2)


def early_share(errors: Sequence[float], share: float = 0.2) -> float:
    """The part of the whole fall of the log error that the first share of the points makes."""
    place = round(share * (len(errors) - 1))
    return (errors[0] - min(errors[: place + 1])) / (errors[0] - min(errors))


def settled(errors: Sequence[float]) -> float:
    """The median of the last tenth of the points: single points of SGD can be far above it."""
    return float(np.median(errors[-max(1, len(errors) // 10) :]))


class Trained(NamedTuple):
    """Runs with one kind of weights, one a teacher.

    Attributes:
      natural: of natural gradient.
      sgd: of SGD at the best of its rates, or after its divergence at all of them.
      rates: those.
    """

    natural: list[Run]
    sgd: list[Run]
    rates: list[float]

    @property
    def gaps(self) -> NDArray[np.float64]:
        """log10 of the error of SGD at the end over that of natural gradient, by teacher."""
        ends = [settled(run.errors) if run.finite else np.inf for run in self.sgd]
        return np.array(ends) - [run.errors[-1] for run in self.natural]


def train_all(experiment: Experiment, kind: str, rates: Sequence[float], report: Report) -> Trained:
    """Both methods on all teachers with one kind of weights."""
    network, examples = NETWORKS[kind], experiment.setting.examples
    found = Trained([], [], [])
    for seed in SEEDS:
        name = f"{kind}, teacher {seed}"
        run = experiment.natural(network, seed)
        found.natural.append(train(run, examples, f"natural gradient, {name}", report))
        runs = {
            rate: train(
                experiment.gradient(network, seed, rate), examples, f"SGD {rate:g}, {name}", report
            )
            for rate in rates
        }
        best = min(rates, key=lambda rate: settled(runs[rate].errors) if runs[rate].finite else 99)
        found.sgd.append(runs[best])
        found.rates.append(best)
    return found


def compare(identifier: str, report: Report) -> Outcome:
    """Natural gradient and SGD on all teachers, of both kinds of weights."""
    experiment = Experiment(natgrad_datasets.LINEAR_TEACHER_SETTINGS[identifier])
    printed = experiment.setting.sgd_learning_rate
    found = {
        GAUSSIAN: train_all(experiment, GAUSSIAN, RATES[identifier], report),
        ORTHOGONAL: train_all(experiment, ORTHOGONAL, [printed], report),
    }
    measurements = [
        m for kind in found for m in _of_natural_gradient(kind, found[kind], experiment)
    ]
    gaussian, orthogonal = found.values()
    stalled = gaussian.gaps >= 1
    measurements += [
        above(
            f"{GAUSSIAN}: teachers on which SGD ends a decade above natural gradient",
            float(stalled.sum()),
            min(STALLED[identifier], len(SEEDS)),
        ),
        above(
            f"{GAUSSIAN}: part of its fall that SGD makes there in the first fifth",
            min(
                (early_share(r.errors) for r, s in zip(gaussian.sgd, stalled, strict=True) if s),
                default=0.0,
            ),
            0.5,
        ),
        close(
            f"{ORTHOGONAL}: teachers on which SGD converges at the paper's {printed:g}",
            float(sum(run.finite for run in orthogonal.sgd)),
            len(SEEDS),
            0,
        ),
    ]  # fmt: skip
    document = {
        "minimum": MINIMUM,
        "panels": [
            {
                "title": kind,
                "curves": [
                    {"name": name, "runs": [run.curve() for run in runs]}
                    for name, runs in (
                        (f"SGD, learning rate {_list(kept.rates)}", kept.sgd),
                        ("natural gradient", kept.natural),
                    )
                ],
            }
            for kind, kept in found.items()
        ],
    }
    notes = tuple(
        f"{kind}: SGD at {_list(kept.rates)} ends at "
        f"{', '.join(f'{MINIMUM + gap:.2f}' for gap in kept.gaps)}"
        for kind, kept in found.items()
    )
    return Outcome(tuple(measurements), document, notes)


def _list(rates: Sequence[float]) -> str:
    """Rates by teacher, once if there is one."""
    return ", ".join(f"{rate:g}" for rate in dict.fromkeys(rates))


def _of_natural_gradient(kind: str, found: Trained, experiment: Experiment) -> list[Measurement]:
    """Where it ends, and how soon, and how much alike on all teachers."""
    steps = [steps_to(run.errors, REACHED) for run in found.natural]
    passes = EVERY * max(steps) / experiment.setting.num_train
    return [
        between(
            f"{kind}: natural gradient ends at log10 of the test error, worst teacher (-6 is the "
            "noise)",
            max(run.errors[-1] for run in found.natural),
            MINIMUM - 0.05,
            REACHED,
        ),
        below(f"{kind}: passes through the training set to {REACHED:g}, worst teacher", passes, 10),
        below(f"{kind}: steps to {REACHED:g}, most over fewest", max(steps) / min(steps), 1.5),
        above(
            f"{kind}: R^2 of a straight line through the log error until -5.5, worst teacher",
            min(straightness(run.errors, -5.5) for run in found.natural),
            0.8,
        ),
    ]


@check(
    "BE-Fig1A",
    "Square linear network: natural gradient and SGD",
    claim=_CLAIM + "L = 16 layers of 20 units.",
    setting=f"L = 16, n_i = 20, 80 000 examples; {_PRINTED} 0.08 downwards; {_SETTING}",
    origin="paper, partly",
    differs=_DIFFERS,
    kind="depends on solver or setting",
    remark=_REMARK.format(
        gaussian="stays some two decades above the noise on every teacher",
        orthogonal="ends within a decade of the noise on two teachers, far above it on the third",
    ),
)
@in_float64
def figure_1a(report: Report) -> Outcome:
    """Equal widths."""
    return compare("BE-Fig1A", report)


@check(
    "BE-Fig1B",
    "Non-square linear network: natural gradient and SGD",
    claim=_CLAIM + "L = 16 layers of widths 20, 30, ..., 100, ..., 30, 20.",
    setting="L = 16, n_i = 20, 30, ..., 100, 90, ..., 20, 80 000 examples; "
    f"{_PRINTED} 0.08 downwards; {_SETTING}",
    origin="paper, partly",
    differs=_DIFFERS,
    kind="depends on solver or setting",
    remark=_REMARK.format(
        gaussian="stays more than a decade above the noise on every teacher",
        orthogonal="reaches the noise on every teacher",
    ),
)
@in_float64
def figure_1b(report: Report) -> Outcome:
    """Hidden layers wider than inputs and outputs."""
    return compare("BE-Fig1B", report)


@check(
    "BE-Fig1C",
    "Linear network with a bottleneck: natural gradient and SGD",
    claim=_CLAIM + "L = 12 layers with a bottleneck of 2 units.",
    setting="L = 12, n_i = 200, 80, 34, 20, 10, 5, 2, 5, ..., 200, 200 000 examples; "
    f"{_PRINTED} 0.02 downwards; {_SETTING}",
    origin="paper, partly",
    differs=_DIFFERS,
    kind="depends on solver or setting",
    remark=_REMARK.format(
        gaussian="all but stops on one teacher of three and reaches the noise on the others",
        orthogonal="ends half a decade above the noise",
    ),
)
@in_float64
def figure_1c(report: Report) -> Outcome:
    """A product of rank two."""
    return compare("BE-Fig1C", report)
