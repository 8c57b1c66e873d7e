"""The benchmark of training counts steps and seconds as it says; nothing here looks at times."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest

from benchmarks import training
from benchmarks.training import DIGITS, OPTIMIZERS, Curve

TINY = dataclasses.replace(
    DIGITS, num_train=40, batch=16, epochs=2, evaluate=2, evaluated=40, channels=(2,), strides=(2,)
)


def curve(losses, optimizer="momentum SGD", rate=0.1):
    steps = tuple(range(0, 10 * len(losses), 10))
    return Curve(optimizer, rate, steps, tuple(losses), tuple(s / 5 for s in steps))


def test_steps_and_seconds_to_a_loss_are_interpolated():
    found = curve([2.0, 1.0, 0.5])
    assert found.reaches(1.0) == (10.0, 2.0)
    assert found.reaches(0.75) == (15.0, 3.0)
    assert found.reaches(3.0) == (0.0, 0.0)
    assert found.reaches(0.4) == (math.inf, math.inf)
    assert curve([2.0, math.nan]).reaches(1.0) == (math.inf, math.inf)


def test_best_run_ends_lowest_and_the_soonest_is_there_first():
    runs = [
        curve([2.0, 1.0, 0.6], rate=1),
        curve([2.0, 0.7, 0.8], rate=2),
        curve([2.0, 0.1, math.nan], rate=3),
        curve([2.0, 0.0, 0.0], "K-FAC", 4),
    ]
    assert training.best(runs, "momentum SGD").learning_rate == 1
    assert training.soonest(runs, "momentum SGD", 0.9).learning_rate == 3
    assert training.soonest(runs, "momentum SGD", 0.05).learning_rate == 1


def test_batches_are_epochs_of_different_samples_the_same_every_time():
    found = np.asarray(training.batches(TINY))
    assert found.shape == (4, 16)
    for epoch in (found[:2], found[2:]):
        assert len(np.unique(epoch)) == 32
    assert not np.array_equal(found[:2], found[2:])
    np.testing.assert_array_equal(found, training.batches(TINY))


def test_every_optimizer_has_as_many_learning_rates():
    assert {len(rates) for _, rates in OPTIMIZERS.values()} == {5}


def test_training_follows_momentum_and_the_table_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(training, "DIGITS", TINY)
    chosen = {name: (make, rates[:1]) for name, (make, rates) in OPTIMIZERS.items()}
    monkeypatch.setattr(training, "OPTIMIZERS", chosen)
    out = tmp_path / "curves.json"
    training.main(["--data", "digits", "--optimizer", "momentum SGD", "--out", str(out)])
    assert "where the best momentum SGD ends" in " ".join(capsys.readouterr().out.split())
    (found,) = json.loads(out.read_text())["curves"]
    assert found["steps"] == [0, 2, 4]
    assert found["seconds"] == sorted(found["seconds"])
    # two steps by hand: v <- 0.9 v + g, theta <- theta - eta v
    x, y = training.load(TINY)
    model = training.ng.ConvNet((8, 8, 1), (2,), 10, strides=(2,), rngs=training.nnx.Rngs(0))
    graphdef, params = training.nnx.split(model)
    speed = jax.tree.map(np.zeros_like, params)

    def loss(params, x, y):
        return training.LOSS(training.nnx.merge(graphdef, params)(x), y)

    for indices in training.batches(TINY)[:2]:
        slope = jax.grad(loss)(params, x[indices], y[indices])
        speed = jax.tree.map(lambda v, g: 0.9 * v + g, speed, slope)
        params = jax.tree.map(lambda p, v: p - found["learning_rate"] * v, params, speed)
    assert found["losses"][1] == pytest.approx(float(loss(params, x, y)), rel=1e-4)
