"""Figures 1A to 1C of Bernacchia et al. (2018): linear networks that recover a linear network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import natgrad_datasets
import numpy as np
from flax import nnx
from jax import Array
from natgrad_datasets.linear_teacher import LinearTeacherSetting

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
)

EVERY = 1_000
"""Examples between two points: one natural-gradient step, or 50 steps of SGD."""
MINIMUM = -6.0
"""log10 of the variance of the noise."""
REACHED = -5.8
SEEDS = (0, 1, 2)
"""Teachers with their data; the worst of them counts, the first is drawn."""
RATES = {
    "BE-Fig1A": (0.08, 0.04, 0.02, 0.01),
    "BE-Fig1B": (0.08, 0.04, 0.02, 0.01),
    "BE-Fig1C": (0.02, 0.01, 0.005, 0.0025, 0.00125),
}
"""Learning rates of SGD, from the paper's downwards; the best at the end of training is drawn."""

_CLAIM = (
    "SGD makes fast progress at first and slows down dramatically very soon; the test error of "
    "natural gradient decreases exponentially until it reaches the least achievable one, that of "
    "the noise, after a few passes through the training set (Section 5). "
)
_PRINTED = "SGD at the best of some learning rates from the paper's"
_SETTING = (
    "10^4 training and 10^3 test examples, eigenvalues e^{-5 i / n_0}, noise 1e-6; natural "
    "gradient alpha = 1, M = 1000, K = 1; SGD M = 20; ours: weights N(0, 1 / fan-in) for teacher "
    "and student, lambda_0 = 1, errors and the loss of SGD unweighted, float64; the error is the "
    f"mean square over samples and outputs; teachers of seeds {', '.join(map(str, SEEDS))}"
)


class Experiment:
    """The programs of one architecture, compiled once for all teachers and learning rates."""

    def __init__(self, setting: LinearTeacherSetting) -> None:
        self.setting = setting
        graphdef = nnx.graphdef(student(setting.widths, 0))
        optimizer = online_natural_gradient_descent(1.0)
        self._natural = compiled(natural_step(graphdef, optimizer))
        self._gradient = compiled(gradient_step(graphdef))

        @jax.jit
        def error(params: Any, x: Array, y: Array) -> Array:
            return jnp.log10(jnp.mean((nnx.merge(graphdef, params)(x) - y) ** 2))

        self._error = error

    def natural(self, seed: int) -> Run:
        """Natural gradient before its first step."""
        params = nnx.state(student(self.setting.widths, seed + 1), nnx.Param)
        kept = online_natural_gradient_descent(1.0, seed=seed).init(params)
        return self._run(self._natural, (params, kept), seed, self.setting.natural_gradient_batch)

    def gradient(self, seed: int, rate: float) -> Run:
        """SGD before its first step, from the same weights and with the examples in that order."""
        params = nnx.state(student(self.setting.widths, seed + 1), nnx.Param)
        state = params, jnp.asarray(rate)
        return self._run(self._gradient, state, seed, self.setting.sgd_batch)

    def _run(self, program: Any, state: Any, seed: int, batch: int) -> Run:
        chosen = self.setting
        data = natgrad_datasets.linear_teacher(
            chosen.widths, chosen.num_train, chosen.num_test, seed
        )
        x, y, *test = map(jnp.asarray, (data.x_train, data.y_train, data.x_test, data.y_test))
        order = batches(chosen.num_train, batch, EVERY, chosen.examples, seed)
        return Run(program, lambda params: float(self._error(params, *test)), state, (x, y), order)


def student(widths: Sequence[int], seed: int) -> nnx.Sequential:
    """A linear network without biases, float64, with the random weights of a seed."""
    return linear_module(map(jnp.asarray, natgrad_datasets.random_linear_network(widths, seed)))


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


def compare(identifier: str, report: Report) -> Outcome:
    """Natural gradient on all teachers, and SGD at every learning rate on the first of them."""
    experiment = Experiment(natgrad_datasets.LINEAR_TEACHER_SETTINGS[identifier])
    examples = experiment.setting.examples

    naturals = [
        train(experiment.natural(seed), examples, f"natural gradient, teacher {seed}", report)
        for seed in SEEDS
    ]
    found = {
        rate: train(experiment.gradient(SEEDS[0], rate), examples, f"SGD at {rate:g}", report)
        for rate in RATES[identifier]
    }
    converged = {rate: run for rate, run in found.items() if run.finite}
    if not converged:
        raise ArithmeticError(f"SGD diverged at every learning rate of {RATES[identifier]}")
    ends = {rate: settled(run.errors) for rate, run in converged.items()}
    best = min(ends, key=lambda rate: ends[rate])
    natural_run, sgd = naturals[0], converged[best]
    measurements = (
        between(
            "natural gradient: final log10 of the test error, worst teacher (-6 is the noise)",
            float(np.max([run.errors[-1] for run in naturals])),
            MINIMUM - 0.05,
            REACHED,
        ),
        below(
            f"steps of natural gradient to {REACHED:g}, worst teacher",
            max(steps_to(run.errors, REACHED) for run in naturals),
            examples // EVERY,
        ),
        above(
            "R^2 of a straight line through the log error until -5.5, worst teacher",
            min(straightness(run.errors, -5.5) for run in naturals),
            0.9,
        ),
        above(
            f"SGD at {best:g}: part of its fall that the first fifth of the examples makes",
            early_share(sgd.errors),
            0.5,
        ),
        above(
            f"SGD at {best:g}: log10 of the error at the end over that of natural gradient",
            ends[best] - natural_run.errors[-1],
            1.0,
        ),
        *_of_square_network(identifier, best, ends[best]),
    )
    document = {
        "natural": natural_run.curve(),
        "sgd": sgd.curve(),
        "rate": best,
        "minimum": MINIMUM,
        "rates": {f"{rate:g}": ends.get(rate) for rate in found},
        "steps": [steps_to(run.errors, REACHED) for run in naturals],
    }
    return Outcome(measurements, document, _notes(experiment.setting, found, best))


def _of_square_network(identifier: str, rate: float, end: float) -> tuple[Measurement, ...]:
    if identifier != "BE-Fig1A":
        return ()
    what = f"SGD at {rate:g}: log10 of the test error at the end, median of the last tenth"
    return (between(what, end, -4.5, -3.3),)


def _notes(setting: LinearTeacherSetting, found: dict[float, Run], best: float) -> tuple[str, ...]:
    """What became of the paper's learning rate."""
    printed = found[setting.sgd_learning_rate]
    if printed.finite:
        return ()
    return (
        f"SGD at the paper's learning rate {setting.sgd_learning_rate:g} diverges from Gaussian "
        f"weights, within {printed.examples[-1]} examples; shown is {best:g}, the best of "
        f"{', '.join(f'{rate:g}' for rate in found)}. "
        "The paper does not state its initial weights.",
    )


@check(
    "BE-Fig1A",
    "Square linear network: natural gradient and SGD",
    claim=_CLAIM + "L = 16 layers of 20 units.",
    setting=f"L = 16, n_i = 20, 80 000 examples; {_PRINTED} 0.08 downwards; {_SETTING}",
    origin="paper, partly",
    differs=(
        "initial weights, lambda_0, the unweighted loss of SGD and its smaller learning rates are"
        " ours"
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
    differs=(
        "initial weights, lambda_0, the unweighted loss of SGD and its smaller learning rates are"
        " ours"
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
    differs=(
        "initial weights, lambda_0, the unweighted loss of SGD and its smaller learning rates are"
        " ours"
    ),
)
@in_float64
def figure_1c(report: Report) -> Outcome:
    """A product of rank two."""
    return compare("BE-Fig1C", report)
