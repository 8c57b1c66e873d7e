"""Settings and batches of mini-batch methods that do not fit: one clear sentence each."""

import jax.numpy as jnp
import pytest
from flax import nnx

import natgrad_flax as ng

MSE = ng.MeanSquaredError()
MODEL = ng.MLP((3, 4, 2), rngs=nnx.Rngs(0))
X, Y = jnp.ones((4, 3)), jnp.ones((4, 2))


DESCENTS = {
    "an average of a structure without means": (
        {"average": ng.MovingAverage(), "example": (MODEL, X)},
        TypeError,
        "Exact solves each batch by itself",
    ),
    "an average without an example": (
        {"structure": ng.KFAC(), "average": ng.MovingAverage()},
        TypeError,
        r"pass example=\(model, x\)",
    ),
    "a number as average": ({"average": 0.9}, TypeError, "average must be an ng.MovingAverage"),
    "an example without an average": ({"example": (MODEL, X)}, ValueError, "example= is for"),
    "momentum of K-FAC": ({"structure": ng.KFAC(), "momentum": 0.9}, TypeError, "optax.trace"),
    "momentum without damping": ({"momentum": 0.9, "damping": 0.0}, ValueError, "positive damping"),
    "momentum of 1": ({"momentum": 1.0}, ValueError, "below 1"),
    "momentum with adaptive damping": (
        {"momentum": 0.9, "damping": ng.LevenbergMarquardt()},
        TypeError,
        "LevenbergMarquardt predicts",
    ),
    "SPRING of K-FAC": (
        {"structure": ng.KFAC(), "momentum": ng.SPRING(0.9)},
        TypeError,
        "optax.trace",
    ),
    "no parts": ({"microbatches": 0}, ValueError, "microbatches must be an integer"),
}


@pytest.mark.parametrize("case", DESCENTS)
def test_settings_that_do_not_fit(case):
    changes, error, message = DESCENTS[case]
    settings = {"structure": ng.Exact(), "loss": MSE, "damping": 0.1, **changes}
    with pytest.raises(error, match=message):
        ng.natural_gradient_descent(1.0, **settings)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"decay": 1.0}, ValueError, "decay must be below 1, got 1.0"),
        ({"decay": 0.0}, ValueError, "decay must be positive and finite, got 0.0"),
        ({"decay": "0.9"}, ValueError, "decay must be a number, got '0.9'"),
        ({"decay": 0.9, "max_norm": -1.0}, ValueError, "max_norm must be positive and finite"),
        ({"decay": 0.9, "bias_correction": 1}, TypeError, "bias_correction must be True or False"),
    ],
)
def test_settings_of_spring(settings, error, message):
    with pytest.raises(error, match=message):
        ng.SPRING(**settings)


BATCHES = {
    "parts that do not divide the batch": (
        {"microbatches": 3},
        "4 samples has no 3 equal parts; use microbatches=2",
    ),
    "parts that do not divide the Fisher's batch": (
        {"microbatches": 2, "fisher_x": X[:3]},
        "3 samples has no 2 equal parts",
    ),
    "other inputs for the Fisher": ({"fisher_x": X[:, :2]}, r"like x of \(4, 3\), got \(4, 2\)"),
    "targets without inputs": ({"fisher_y": Y}, "fisher_y belongs to a fisher_x"),
    "targets of an exact Fisher": ({"fisher_x": X, "fisher_y": Y}, "takes no targets"),
    "no targets of an empirical Fisher": (
        {"fisher_x": X, "fisher": "empirical"},
        "pass fisher_y with fisher_x",
    ),
    "too few targets": (
        {"fisher_x": X, "fisher_y": Y[:2], "fisher": "empirical"},
        r"fisher_y must have shape .* and N = 4, got \(2, 2\)",
    ),
}


@pytest.mark.parametrize("case", BATCHES)
def test_batches_that_do_not_fit(case):
    changes, message = BATCHES[case]
    settings = {"structure": ng.Exact(), "loss": MSE, "damping": 0.1, **changes}
    with pytest.raises(ValueError, match=message):
        ng.natural_gradient(MODEL, X, Y, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"decay": 1.0}, "below 1"),
        ({"decay": -0.1}, "0 or positive"),
        ({"every": 0}, "every must be an integer"),
        ({"every": 4, "inverse_every": 6}, "multiple of every, got 6 and 4"),
    ],
)
def test_intervals_that_do_not_fit(settings, message):
    with pytest.raises(ValueError, match=message):
        ng.MovingAverage(**settings)


def test_rows_are_kept_of_as_many_samples_as_the_example_has():
    settings = {"structure": ng.KFAC(), "loss": MSE, "damping": 0.05}
    average = ng.MovingAverage(decay=0.0)
    tx = ng.natural_gradient_descent(1.0, average=average, example=(MODEL, X[:2]), **settings)
    params = nnx.state(MODEL)
    with pytest.raises(ValueError, match="another number of samples than this batch, which has 4"):
        tx.update(params, tx.init(params), params, module=MODEL, x=X, y=Y)
