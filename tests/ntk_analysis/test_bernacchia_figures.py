"""Figures 1A to 1D of Bernacchia et al. in pieces, at tiny sizes, and their drawings."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import natgrad_datasets
import numpy as np
import pytest
from flax import nnx
from natgrad_datasets.linear_teacher import LINEAR_TEACHER_SETTINGS

from natgrad_flax.linear import online_natural_gradient_descent
from ntk_analysis.report.papers.bernacchia import DRAWINGS
from ntk_analysis.reproduce import MissingDataError, find_checks
from ntk_analysis.reproduce.bernacchia import autoencoder, teachers, training
from ntk_analysis.results import plain

RNG = np.random.default_rng(0)


def silent(what: str) -> None:
    pass


# ----- runs


def test_every_pass_has_every_sample_once_and_methods_see_one_order():
    small = training.batches(10, 2, 4, 40, 3)
    large = training.batches(10, 4, 4, 40, 3)
    assert small.shape == (10, 2, 2)
    np.testing.assert_array_equal(small.ravel(), large.ravel())
    passes = small.reshape(4, 10)
    np.testing.assert_array_equal(np.sort(passes), np.tile(np.arange(10), (4, 1)))
    assert (passes[0] != passes[1]).any()
    assert training.batches(7, 2, 2, 10, 0).size == 10


@pytest.mark.parametrize("sizes", [(3, 4, 8), (2, 4, 10)])
def test_batches_that_do_not_divide(sizes):
    with pytest.raises(ValueError, match="cannot be cut into"):
        training.batches(10, *sizes, 0)


def counting(calls=None):
    """A program that adds up the numbers of its samples, and an error that is 1 / their sum."""

    def program(state, rows, x, y):
        if calls is not None:
            calls.append(rows.shape)
        return state[0] + rows.sum(), state[1]

    return program


def run_of(order, error=lambda total: 1 / (1 + float(total)), calls=None):
    return training.Run(counting(calls), error, (jnp.zeros(()), None), (None, None), order)


def test_a_run_keeps_examples_seconds_and_errors():
    calls: list = []
    run = run_of(training.batches(6, 2, 6, 12, 0), calls=calls)
    assert calls == [(3, 2)]  # the warm-up leaves no trace
    assert (run.examples, run.seconds, run.errors) == ([0], [0.0], [1.0])
    for _ in range(3):
        run.advance()
    assert run.examples == [0, 6, 12, 18]
    np.testing.assert_allclose(run.errors, [1, 1 / 16, 1 / 31, 1 / 46])
    assert (np.diff(run.seconds) > 0).all()
    middle = (run.seconds[1] + run.seconds[2]) / 2
    assert run.after(middle) == pytest.approx((1 / 16 + 1 / 31) / 2)
    assert json.loads(json.dumps(run.curve()))["examples"] == [0, 6, 12, 18]


def test_a_run_that_diverged_stands_still():
    run = run_of(training.batches(6, 2, 6, 12, 0), error=lambda total: np.nan if total else 1.0)
    run.advance()
    assert not run.finite
    run.advance()
    assert run.examples == [0, 6]
    assert run.curve()["errors"] == [1.0]


def test_programs_take_one_step_a_batch():
    with jax.enable_x64(True):
        graphdef, params = nnx.split(teachers.student((3, 2), 0))
        x, y = (jnp.asarray(RNG.standard_normal((6, n))) for n in (3, 2))
        rows = jnp.asarray([[0, 1, 2], [5, 4, 3]])
        program = training.compiled(training.gradient_step(graphdef))
        moved, rate = program((params, jnp.asarray(0.3)), rows, x, y)
        weight = natgrad_datasets.random_linear_network((3, 2), 0)[0]
        for chosen in np.asarray(rows):
            a, b = np.asarray(x)[chosen], np.asarray(y)[chosen]
            weight = weight - 0.3 * a.T @ (a @ weight - b) / 3
        np.testing.assert_allclose(jax.tree.leaves(moved)[0], weight, rtol=1e-12)
        assert rate == 0.3
        optimizer = online_natural_gradient_descent(1.0)
        state = params, optimizer.init(params)
        _, kept = training.compiled(training.natural_step(graphdef, optimizer))(state, rows, x, y)
        assert kept.steps == 2


# ----- linear networks


def test_what_is_measured_of_a_curve():
    line = [2 - 0.5 * k for k in range(20)]
    assert teachers.steps_to(line, -3.0) == 10
    assert teachers.steps_to(line, -100.0) == np.inf
    assert teachers.straightness([*line, *[line[-1]] * 50], line[-1]) == pytest.approx(1)
    bent = [*np.linspace(0, -5, 5), *np.linspace(-5, -6, 50)]
    assert teachers.straightness(bent, -100) < 0.5
    assert teachers.early_share(bent) > 0.8
    assert teachers.early_share(np.linspace(0, -6, 101)) == pytest.approx(0.2)
    assert teachers.settled([0.0] * 36 + [-4.0, -4.0, -4.0, -1.0]) == -4
    assert teachers.settled([1.0, -2.0]) == -2


@pytest.fixture
def small(monkeypatch):
    """Fig. 1A with two layers of four units."""
    setting = replace(LINEAR_TEACHER_SETTINGS["BE-Fig1A"], widths=(4, 4, 4), examples=40_000)
    monkeypatch.setattr(natgrad_datasets, "LINEAR_TEACHER_SETTINGS", {"BE-Fig1A": setting})
    monkeypatch.setattr(teachers, "SEEDS", (0,))
    monkeypatch.setattr(teachers, "RATES", {"BE-Fig1A": (0.08, 0.02)})


def named(outcome, words):
    return next(m for m in outcome.measurements if words in m.what)


def test_a_linear_network_recovers_another(small):
    (check,) = find_checks(["BE-Fig1A"])
    said: list[str] = []
    outcome = check.run(said.append)
    data = json.loads(json.dumps(plain(outcome.data), allow_nan=False))
    assert named(outcome, "natural gradient: final").passed
    assert len(data["natural"]["errors"]) == len(data["sgd"]["examples"]) == 41
    assert data["natural"]["errors"][0] == data["sgd"]["errors"][0]
    assert data["natural"]["errors"][-1] == pytest.approx(-6, abs=0.05)
    assert data["rates"][f"{data['rate']:g}"] == min(data["rates"].values())
    assert any("natural gradient, teacher 0" in what for what in said)


def test_a_direction_that_is_not_the_natural_gradient_fails(small, monkeypatch):
    slow = lambda rate, **settings: online_natural_gradient_descent(0.02 * rate, **settings)  # noqa: E731
    monkeypatch.setattr(teachers, "online_natural_gradient_descent", slow)
    (check,) = find_checks(["BE-Fig1A"])
    outcome = check.run(silent)
    assert not named(outcome, "natural gradient: final").passed
    assert not named(outcome, "steps of natural gradient").passed


def test_divergence_at_the_papers_rate_is_told(small, monkeypatch):
    setting = replace(natgrad_datasets.LINEAR_TEACHER_SETTINGS["BE-Fig1A"], sgd_learning_rate=50.0)
    monkeypatch.setitem(natgrad_datasets.LINEAR_TEACHER_SETTINGS, "BE-Fig1A", setting)
    monkeypatch.setattr(teachers, "RATES", {"BE-Fig1A": (50.0, 0.02)})
    (check,) = find_checks(["BE-Fig1A"])
    outcome = check.run(silent)
    assert outcome.data["rate"] == 0.02
    assert outcome.data["rates"]["50"] is None
    assert "learning rate 50 diverges" in outcome.notes[0]
    monkeypatch.setattr(teachers, "RATES", {"BE-Fig1A": (50.0,)})
    with pytest.raises(ArithmeticError, match="SGD diverged at every learning rate"):
        check.run(silent)


# ----- the autoencoder


def test_autoencoder_runs_start_equal_and_are_measured_by_pixel(monkeypatch):
    images = RNG.uniform(size=(40, 6)).astype(np.float32)
    monkeypatch.setattr(autoencoder, "NATURAL_BATCH", 10)
    monkeypatch.setattr(autoencoder, "SGD_BATCH", 5)
    natural, plain, sgd = autoencoder.start(images[:30], images[30:], (6, 4, 6), 40, 20)
    model = autoencoder.Autoencoder((6, 4, 6), 0)
    first, last = model.layers
    hidden = np.tanh(images[30:] @ np.asarray(first.kernel) + np.asarray(first.bias))
    outputs = hidden @ np.asarray(last.kernel) + np.asarray(last.bias)
    rmse = np.sqrt(((outputs - images[30:]) ** 2).mean())
    for run in (natural, plain, *sgd.values()):
        np.testing.assert_allclose(run.errors[0], rmse, rtol=1e-5)
        run.advance()
        assert run.examples == [0, 20]
        assert run.errors[1] < run.errors[0]
    assert list(sgd) == [0.04, 0.02, 0.01, 0.005]
    assert sgd[0.005].errors[1] > sgd[0.04].errors[1]
    assert natural.errors[1] != plain.errors[1]


def curve_of(errors, seconds):
    """A run with a given curve, that goes on with its last error at one second a point."""
    run = run_of(training.batches(6, 2, 6, 12, 0))
    run.errors, run.seconds = list(errors), list(seconds)
    run.examples = [6 * k for k in range(len(errors))]

    def advance():
        run.examples.append(run.examples[-1] + 6)
        run.seconds.append(run.seconds[-1] + 1)
        run.errors.append(run.errors[-1] / 2)

    run.advance = advance
    return run


def outcome_of(natural, sgd):
    return autoencoder.outcome((natural, curve_of([0.3, 0.25], [0, 1]), sgd), silent)


def sgd_of(curves):
    """SGD at the rates of the check; those without a curve diverged."""
    return {rate: curves.get(rate, curve_of([0.3, np.nan], [0, 1])) for rate in autoencoder.RATES}


def test_sgd_goes_on_until_the_seconds_are_equal():
    natural = curve_of([0.3, 0.2, 0.1], [0.0, 4.0, 8.0])
    sgd = sgd_of(
        {0.01: curve_of([0.3, 0.2, 0.16], [0, 3, 6]), 0.005: curve_of([0.3, 0.25, 0.2], [0, 1, 2])}
    )
    found = outcome_of(natural, sgd)
    assert found.data["rate"] == 0.01
    assert found.data["rates"] == {"0.04": None, "0.02": None, "0.01": 0.16, "0.005": 0.2}
    examples, seconds, *_ = found.measurements
    assert "SGD at 0.01, equal examples" in examples.what
    assert examples.measured == pytest.approx(0.1 / 0.16)
    assert examples.passed
    # the smaller learning rate has made six more points by then, the other one two
    assert "SGD at 0.005, equal seconds" in seconds.what
    assert seconds.measured == pytest.approx(0.1 / (0.2 / 2**6))
    assert not seconds.passed
    assert found.data["sgd"]["seconds"][-1] == 8
    # equal after one step, ahead after two
    assert "at 1 of 2 points" in found.notes[0]
    assert "0.2500 after 1 s" in found.notes[1]
    assert "0.04 diverges within 6 examples" in found.notes[2]


def test_slower_sgd_is_compared_at_the_clock_of_natural_gradient():
    natural = curve_of([0.3, 0.2, 0.1], [0.0, 1.0, 2.0])
    found = outcome_of(natural, sgd_of({0.04: curve_of([0.3, 0.2, 0.05], [0, 2, 4])}))
    assert [m.passed for m in found.measurements] == [False, True, True, True]
    assert found.measurements[1].measured == pytest.approx(0.5)
    assert len(found.notes) == 2


@pytest.mark.parametrize("broken", ["natural", "sgd"])
def test_divergence_of_the_autoencoder_is_an_error(broken):
    errors = {"natural": [0.3, 0.2], "sgd": [0.3, 0.2]} | {broken: [0.3, np.nan]}
    natural, sgd = (curve_of(errors[name], [0, 1]) for name in ("natural", "sgd"))
    with pytest.raises(ArithmeticError, match="diverged"):
        outcome_of(natural, sgd_of({0.01: sgd}))


def test_missing_mnist_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("NATGRAD_DATA", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(
        natgrad_datasets, "load", lambda *args, **kwargs: pytest.fail("something was loaded")
    )
    (check,) = find_checks(["BE-Fig1D"])
    with pytest.raises(MissingDataError, match="this check needs MNIST"):
        check.run(silent)


# ----- drawings


@pytest.mark.parametrize("identifier", ["BE-Fig1A", "BE-Fig1B", "BE-Fig1C", "BE-Fig1D"])
def test_drawings_show_the_curves(identifier):
    curve = {"examples": [0.0, 1000.0, 2000.0], "seconds": [0.0, 0.5, 1.5]}
    data = {
        "natural": {**curve, "errors": [1.0, 0.5, 0.2]},
        "sgd": {**curve, "errors": [1.0, 0.7, 0.6]},
        "rate": 0.04,
        "minimum": None if identifier == "BE-Fig1D" else -6.0,
    }
    if identifier == "BE-Fig1D":
        data["plain"] = {**curve, "errors": [1.0, 0.8, 0.3]}
    figure = DRAWINGS[identifier](json.loads(json.dumps(data)))
    assert len(figure.axes) == 2
    for axis, places in zip(figure.axes, ([0, 1, 2], [0, 0.5, 1.5]), strict=True):
        lines = {line.get_label().split(",")[0]: line for line in axis.get_lines()}
        assert ("min. achievable" in lines) == (identifier != "BE-Fig1D")
        for name, label in (("natural", "natural gradient"), ("sgd", "SGD")):
            np.testing.assert_allclose(lines[label].get_xdata(), places)
            np.testing.assert_allclose(lines[label].get_ydata(), data[name]["errors"])
        if "plain" in data:
            np.testing.assert_allclose(lines["the same"].get_ydata(), [1.0, 0.8, 0.3])
        assert "examples" in axis.get_xlabel() or "[s]" in axis.get_xlabel()
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert any("0.04" in label for label in labels)
