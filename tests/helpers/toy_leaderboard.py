"""A leaderboard of one small workload: a line through eight points, learned in milliseconds."""

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import natgrad_flax as ng
from benchmarks.leaderboard import contestant as contestant_module
from benchmarks.leaderboard import plan
from benchmarks.leaderboard import workload as workload_module
from benchmarks.leaderboard.contestant import Contestant
from benchmarks.leaderboard.workload import Data, Workload

WEIGHTS = np.array([[1.0], [-2.0], [0.5]], np.float32)
RATES = (1e-2, 30.0)


def data():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(12, 3)).astype(np.float32)
    y = x @ WEIGHTS
    return Data(x[:8], y[:8], x[8:], y[8:])


def model(seed):
    return ng.MLP((3, 1), weight_variance=1.0, rngs=nnx.Rngs(seed))


def make_workload(**changes):
    settings = {
        "name": "toy",
        "title": "a line through eight points",
        "version": 1,
        "question": "Does anything work?",
        "settings": {"samples": 8},
        "data": data,
        "model": model,
        "loss": ng.MeanSquaredError(),
        "batch_size": None,
        "metric": "mse",
        "max_steps": 60,
        "max_seconds": 30.0,
    }
    return Workload(**{**settings, **changes})


def exact(workload, rate, seed):
    return ng.natural_gradient_descent(rate, structure=ng.Exact(), loss=workload.loss, seed=seed)


CONTESTANTS = {
    "sgd": Contestant(
        "sgd", "SGD", "first-order", "tuned", lambda w, rate, seed: optax.sgd(rate), RATES
    ),
    "lbfgs": Contestant(
        "lbfgs", "L-BFGS", "quasi-Newton", "line search", lambda w, rate, seed: optax.lbfgs(rate),
        unsuitable=lambda w: "it wants the whole batch" if w.batch_size else "",
    ),
    "exact": Contestant(
        "exact", "Exact", "natural-gradient", "theoretical", exact,
        structure=ng.Exact(), fisher="exact", damping=0.0,
    ),
}  # fmt: skip


def install(monkeypatch, workload=None, members=CONTESTANTS):
    """Puts the toy in the place of the real workloads and contestants."""
    entry = workload or make_workload()
    for module in (workload_module, plan):
        monkeypatch.setattr(module, "workloads", lambda: {entry.name: entry})
    for module in (contestant_module, plan):
        monkeypatch.setattr(module, "contestants", lambda: members)
    profile = plan.Profile((entry.name,), ("",), 2, "a toy")
    monkeypatch.setattr(plan, "PROFILES", {"default": profile, "full": plan.PROFILES["full"]})
    return entry


def as_array(state):
    return np.concatenate(
        [np.ravel(leaf) for leaf in nnx.to_pure_dict(state)["layers"][0].values()]
    )


def mean_squared_error(parameters, x, y):
    return float(jnp.mean((x @ parameters.reshape(3, 1) / np.sqrt(3) - y) ** 2))
