"""Bernacchia et al. (2018): exact in deep linear networks, and the online algorithm in all."""

import optax

import natgrad_flax as ng
from benchmarks.leaderboard.contestant import Contestant
from benchmarks.leaderboard.natural import damping_on, is_dense
from benchmarks.leaderboard.workload import Workload
from natgrad_flax.linear import deep_linear_descent, online_natural_gradient_descent

ADAPTIVE = ng.LevenbergMarquardt()  # Eq. 21 as the paper has it
WORDS = "Levenberg-Marquardt from 1, its root added to both factors (Eq. 20)"


def _exact(
    workload: Workload, rate: optax.ScalarOrSchedule, seed: int
) -> optax.GradientTransformation:
    return deep_linear_descent(rate, damping=ADAPTIVE)


def _online(
    workload: Workload, rate: optax.ScalarOrSchedule, seed: int
) -> optax.GradientTransformation:
    damping = damping_on(workload, ADAPTIVE)
    assert isinstance(damping, ng.LevenbergMarquardt)
    return online_natural_gradient_descent(rate, loss=workload.loss, damping=damping, seed=seed)


def _not_linear(workload: Workload) -> str:
    model = workload.model(0)
    linear = isinstance(model, ng.MLP) and model.activation == "identity"
    if linear and isinstance(workload.loss, ng.MeanSquaredError):
        return ""
    return "it is for linear networks and squared error"


def _shared(workload: Workload) -> str:
    if is_dense(workload.model(0)):
        return ""
    return "its moments are those of fully connected layers"


CONTESTANTS = (
    Contestant(
        name="deep-linear",
        title="Exact, deep linear",
        family="natural-gradient",
        rate_rule="theoretical: 1",
        optimizer=_exact,
        fisher="exact",
        damping_words=WORDS,
        unsuitable=_not_linear,
    ),
    Contestant(
        name="online",
        title="Online natural gradient",
        family="natural-gradient",
        rate_rule="theoretical: 1",
        optimizer=_online,
        fisher="mc",
        damping_words=f"{WORDS}; under cross-entropy at least 0.01",
        unsuitable=_shared,
    ),
)
