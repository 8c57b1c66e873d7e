"""The runs behind Figure 4 of Kerekes et al. (2021): descents, their limit, and their logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jax import Array
from jax.tree_util import Partial
from numpy.typing import NDArray
from scipy.special import expit

from natgrad_flax.linear import descend, diagonal_network, logistic, references
from ntk_analysis.reproduce.kerekes.common import in_pieces
from ntk_analysis.reproduce.registry import Report

Vector = NDArray[np.float64]

DEPTHS = (1, 2, 3, 4)
EUCLIDEAN = {depth: f"EGD, L = {depth}" for depth in DEPTHS}
TRAIN = "NGD, train Fisher"
FULL_RANK = "NGD, full-rank solver"
POPULATION = "NGD, population Fisher"
LIMIT = "limit of NGD"

NATURAL_STEP = 0.25
_LOGITS_STEP = 0.1
POPULATION_STEP = 0.05
DIRECT_SCALE = 0.01
SCALE = 0.3


@dataclass(frozen=True)
class Setting:
    """One run of the figure.

    Attributes:
      dim: D.
      num_relevant: ones in the teacher, the other coefficients are zero.
      counts: numbers of samples, rising; coefficients are shown of the last.
      seeds: of samples and weights; accuracies are means over them.
      euclidean_step: step size of the loss-normalised descent.
      euclidean_steps: how many of them; a multiple of 20.
      natural_steps: steps of 0.25 with the train Fisher; a multiple of 4.
      population_steps: steps of length 0.05 with the population Fisher.
      tolerance: of an accuracy around theory.
    """

    dim: int
    num_relevant: int
    counts: tuple[int, ...]
    seeds: tuple[int, ...]
    euclidean_step: float
    euclidean_steps: int
    natural_steps: int
    population_steps: int
    tolerance: float


def unit_speed(field: logistic.PopulationNaturalGradient, coefficients: Array) -> Array:
    """The field at length one: the path of its flow stays the same.

    With |beta| the inverse of the population Fisher grows as |beta|^3, so that the flow reaches
    infinity in finite time where the gradient is divided by the loss.
    """
    direction = field(coefficients)
    return direction / jnp.linalg.norm(direction)


def euclidean(x: Vector, y: Vector, setting: Setting, seed: int, report: Report) -> dict[str, Any]:
    """Coefficients (D,) by name after loss-normalised descent, all depths side by side, float32."""
    keys = jax.random.split(jax.random.key(seed), len(DEPTHS))
    weights = tuple(
        diagonal_network.initial_weights(
            setting.dim,
            depth,
            DIRECT_SCALE if depth == 1 else SCALE,
            key,
            dtype=jnp.float64,
        ).astype(jnp.float32)
        for depth, key in zip(DEPTHS, keys, strict=True)
    )
    weights = in_pieces(
        diagonal_network.gradient_field(x.astype(np.float32), y, normalised=True),
        weights,
        step_size=setting.euclidean_step,
        steps=setting.euclidean_steps,
        pieces=20,
        report=report,
        what=f"N = {len(x)}, seed {seed}, Euclidean",
    )[-1]
    return {
        EUCLIDEAN[depth]: np.asarray(diagonal_network.coefficients(w), np.float64)
        for depth, w in zip(DEPTHS, weights, strict=True)
    }


def natural(x: Vector, y: Vector, setting: Setting, report: Report) -> Vector:
    """Coefficients (D,) after natural-gradient descent from zero with the train Fisher."""
    coefficients = in_pieces(
        logistic.natural_gradient_field(x, y),
        jnp.zeros(setting.dim),
        step_size=NATURAL_STEP,
        steps=setting.natural_steps,
        pieces=4,
        report=report,
        what=f"N = {len(x)}, natural gradient",
    )[-1]
    return np.asarray(coefficients)


def full_rank(x: Vector, y: Vector, setting: Setting) -> tuple[Vector, Vector]:
    """The same descent with F d = grad solved by LAPACK's gels, which assumes F of full rank.

    For N < D the solutions of this system differ by what no training margin sees. That of gels
    has whatever rounding makes of the zero pivots there.

    Returns:
      Coefficients (D,), and the margins (N,) that the steps have on paper, whatever the solution.
    """
    signed = x * y[:, None]
    coefficients, expected = np.zeros(x.shape[1]), np.zeros(len(x))
    for _ in range(setting.natural_steps):
        slopes = expit(-signed @ coefficients)
        # both sides over the largest slope, which vanishes late in the run
        weights = slopes * (1 - slopes) / slopes.max()
        gradient = signed.T @ (slopes / slopes.max())
        _, step, failed = scipy.linalg.lapack.dgels((signed.T * weights) @ signed, gradient)
        if failed:
            raise FloatingPointError("gels met a pivot that is exactly zero")
        coefficients = coefficients + NATURAL_STEP * step
        expected = expected + NATURAL_STEP * (1 + np.exp(-expected))
    return coefficients, expected


def population(x: Vector, y: Vector, setting: Setting) -> Vector:
    """Coefficients (D,) after natural-gradient descent from zero with the population Fisher."""
    field = logistic.natural_gradient_field(x, y, data="population", normalised=True)
    run = descend(
        Partial(unit_speed, field),
        jnp.zeros(setting.dim),
        step_size=POPULATION_STEP,
        steps=setting.population_steps,
    )
    return np.asarray(run.final)


def limit_accuracy(x: Vector, y: Vector, teacher: Vector) -> float:
    """Theory of the train Fisher: random matrices for N < D, chance at D, the program above."""
    num, dim = x.shape
    if num < dim:
        return references.interpolant_accuracy(num, dim)
    if num == dim:
        return 0.5
    return references.gaussian_accuracy(references.natural_gradient_limit(x, y), teacher)


class Logits(NamedTuple):
    """Logits along natural-gradient runs with fewer samples than inputs.

    Attributes:
      times: eta times steps, shape (T,).
      from_zero: y s of the descent from zero, shape (T, N).
      elsewhere: y s of the flow from a random start, shape (T, N), each at the time.
      expected: what the closed form says of that start, shape (T, N).
      labels: y, shape (N,).
    """

    times: Vector
    from_zero: Vector
    elsewhere: Vector
    expected: Vector
    labels: Vector


def logits(x: Vector, y: Vector, seed: int) -> Logits:
    """Descent with step 0.1 from zero, and the flow by Runge-Kutta from a random start."""
    field, signed = logistic.natural_gradient_field(x, y), x * y[:, None]
    steps, rows = 100, 20
    descent = descend(
        field,
        jnp.zeros(x.shape[1]),
        step_size=_LOGITS_STEP,
        steps=steps,
        record_every=steps // rows,
    )
    times = _LOGITS_STEP * descent.steps
    spread = np.random.default_rng(seed).standard_normal(x.shape[1]) / np.sqrt(2 * x.shape[1])
    flow = descend(
        field,
        spread,
        step_size=_LOGITS_STEP / 10,
        steps=10 * steps,
        record_every=10 * steps // rows,
        integrator="rk4",
    )
    elsewhere = np.asarray(flow.recorded) @ signed.T
    expected = np.asarray(logistic.train_margins(elsewhere[0], times[:, None]))
    return Logits(times, np.asarray(descent.recorded) @ signed.T, elsewhere, expected, y)
