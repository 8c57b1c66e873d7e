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
from ntk_analysis.reproduce import MissingDataError, find_checks, load_checks
from ntk_analysis.reproduce.bernacchia import autoencoder, costs, teachers, training
from ntk_analysis.reproduce.drawings import DRAWINGS
from ntk_analysis.results import plain

load_checks()
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
        graphdef, params = nnx.split(
            teachers.student((3, 2), 0, teachers.NETWORKS[teachers.GAUSSIAN])
        )
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


def test_semi_orthogonal_weights():
    wide, narrow = teachers.semi_orthogonal((3, 5, 2), 0)
    np.testing.assert_allclose(wide @ wide.T, np.eye(3), atol=1e-12)
    np.testing.assert_allclose(narrow.T @ narrow, np.eye(2), atol=1e-12)
    signs = [np.linalg.det(teachers.semi_orthogonal((4, 4), seed)[0]) > 0 for seed in range(20)]
    assert 5 < sum(signs) < 15


@pytest.fixture
def small(monkeypatch):
    """Fig. 1A with two layers of four units."""
    setting = replace(LINEAR_TEACHER_SETTINGS["BE-Fig1A"], widths=(4, 4, 4), examples=40_000)
    monkeypatch.setattr(natgrad_datasets, "LINEAR_TEACHER_SETTINGS", {"BE-Fig1A": setting})
    monkeypatch.setattr(teachers, "SEEDS", (0,))
    monkeypatch.setattr(teachers, "RATES", {"BE-Fig1A": (50.0, 0.02)})


def named(outcome, words):
    return next(m for m in outcome.measurements if words in m.what)


def test_a_linear_network_recovers_another(small):
    (check,) = find_checks(["BE-Fig1A"])
    said: list[str] = []
    outcome = check.run(said.append)
    data = json.loads(json.dumps(plain(outcome.data), allow_nan=False))
    assert [panel["title"] for panel in data["panels"]] == list(teachers.NETWORKS)
    for kind, panel in zip(teachers.NETWORKS, data["panels"], strict=True):
        assert named(outcome, f"{kind}: natural gradient ends").passed
        (sgd,), (natural,) = (curve["runs"] for curve in panel["curves"])
        assert len(natural["errors"]) == len(sgd["examples"]) == 41
        assert natural["errors"][0] == sgd["errors"][0]
        assert natural["errors"][-1] == pytest.approx(-6, abs=0.05)
    # of the two rates one diverges
    assert data["panels"][0]["curves"][0]["name"] == "SGD, learning rate 0.02"
    assert "SGD at 0.02 ends at" in outcome.notes[0]
    assert any("natural gradient, Gaussian weights, teacher 0" in what for what in said)


def test_a_direction_that_is_not_the_natural_gradient_fails(small, monkeypatch):
    slow = lambda rate, **settings: online_natural_gradient_descent(0.02 * rate, **settings)  # noqa: E731
    monkeypatch.setattr(teachers, "online_natural_gradient_descent", slow)
    (check,) = find_checks(["BE-Fig1A"])
    outcome = check.run(silent)
    for words in ("natural gradient ends", "passes through the training set"):
        assert not named(outcome, words).passed


def test_sgd_that_diverges_is_not_called_converged(small, monkeypatch):
    setting = replace(natgrad_datasets.LINEAR_TEACHER_SETTINGS["BE-Fig1A"], sgd_learning_rate=50.0)
    monkeypatch.setitem(natgrad_datasets.LINEAR_TEACHER_SETTINGS, "BE-Fig1A", setting)
    (check,) = find_checks(["BE-Fig1A"])
    assert not named(check.run(silent), "converges at the paper's 50").passed


# ----- the autoencoder


def test_autoencoder_runs_start_equal_and_are_measured_by_pixel(monkeypatch):
    images = RNG.uniform(size=(40, 6)).astype(np.float32)
    monkeypatch.setattr(autoencoder, "NATURAL_BATCH", 10)
    monkeypatch.setattr(autoencoder, "SGD_BATCH", 5)
    natural, sgd = autoencoder.Experiment(images[:30], images[30:], (6, 4, 6), 40, 20).start(0)
    model = autoencoder.Autoencoder((6, 4, 6), 0)
    first, last = model.layers
    hidden = np.tanh(images[30:] @ np.asarray(first.kernel) + np.asarray(first.bias))
    outputs = hidden @ np.asarray(last.kernel) + np.asarray(last.bias)
    rmse = np.sqrt(((outputs - images[30:]) ** 2).mean())
    for run in (*natural.values(), *sgd.values()):
        np.testing.assert_allclose(run.errors[0], rmse, rtol=1e-5)
        run.advance()
        assert run.examples == [0, 20]
        assert run.errors[1] < run.errors[0]
    assert list(sgd) == [0.04, 0.02, 0.01]
    assert sgd[0.01].errors[1] > sgd[0.04].errors[1]
    assert len({run.errors[1] for run in natural.values()}) == 3


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
    """Of two seeds that do the same, with plain natural gradient as good as SGD at 0.01."""
    naturals = dict.fromkeys(autoencoder.VARIANTS, natural)
    naturals[autoencoder.PLAIN] = curve_of([0.3, 0.2, 0.16], [0, 1, 2])
    made = {rate: sgd.get(rate, curve_of([0.3, np.nan], [0, 1])) for rate in autoencoder.RATES}
    return autoencoder.outcome([autoencoder.SetUp(naturals, made)] * 2, silent)


def test_sgd_goes_on_until_the_seconds_are_equal():
    natural = curve_of([0.3, 0.2, 0.1], [0.0, 4.0, 8.0])
    sgd = {0.02: curve_of([0.3, 0.2, 0.16], [0, 3, 6]), 0.01: curve_of([0.3, 0.25, 0.2], [0, 1, 2])}
    found = outcome_of(natural, sgd)
    curves = found.data["panels"][0]["curves"]
    assert curves[0]["name"] == "SGD, learning rate 0.02"
    assert [len(curve["runs"]) for curve in curves] == [2, 2, 2, 2]
    pi, seconds, *_, plain = found.measurements
    assert "pi-split damping, untuned: test error over that of SGD, equal examples" in pi.what
    assert pi.measured == pytest.approx(0.1 / 0.16)
    assert pi.passed
    # the smaller learning rate has made six more points by then, the other one two
    assert "equal seconds" in seconds.what
    assert seconds.measured == pytest.approx(0.1 / (0.2 / 2**6))
    assert not seconds.passed
    assert plain.measured == pytest.approx(1)
    assert "0.04 diverges with every seed" in found.notes[-1]


@pytest.mark.parametrize("broken", ["natural", "sgd"])
def test_divergence_of_the_autoencoder_is_an_error(broken):
    errors = {"natural": [0.3, 0.2], "sgd": [0.3, 0.2]} | {broken: [0.3, np.nan]}
    natural, sgd = (curve_of(errors[name], [0, 1]) for name in ("natural", "sgd"))
    with pytest.raises(ArithmeticError, match="diverged"):
        outcome_of(natural, {0.01: sgd})


def test_missing_mnist_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("NATGRAD_DATA", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(
        natgrad_datasets, "load", lambda *args, **kwargs: pytest.fail("something was loaded")
    )
    (check,) = find_checks(["BE-Fig1D"])
    with pytest.raises(MissingDataError, match="this check needs MNIST"):
        check.run(silent)


# ----- costs


def test_flops_of_the_variants_and_their_drawing():
    counted = costs.flops(32)
    assert counted[costs.EIGHT] > counted[costs.ONE] > counted[costs.LAGGING] > 1
    # two more backward passes, and no more than that, at widths far below the batch
    assert 1.5 < counted[costs.ONE] < 3
    run = {"examples": [0.0, 1000.0], "seconds": [0.0, 1.0], "errors": [0.0, -6.0]}
    curves = [{"name": name, "runs": [run]} for name in costs.VARIANTS]
    flops = {name: [2.0, value] for name, value in counted.items()}
    data = {"widths": [16, 32], "flops": flops, "curves": curves}
    left, right = DRAWINGS["BE-Cost"](data).axes
    assert [line.get_label() for line in left.get_lines()] == list(costs.VARIANTS)
    assert [line.get_ydata()[-1] for line in right.get_lines()] == [-6] * 5


# ----- drawings


@pytest.mark.parametrize("identifier", ["BE-Fig1A", "BE-Fig1B", "BE-Fig1C", "BE-Fig1D"])
def test_drawings_show_the_curves(identifier):
    run = {"examples": [0.0, 1000.0, 2000.0], "seconds": [0.0, 0.5, 1.5], "errors": [3.0, 2.0, 1.0]}
    longer = {**{key: [*values, 4.0] for key, values in run.items()}, "errors": [1.0, 1, 0, 0]}
    names = ["SGD, learning rate 0.04", "natural gradient"]
    curves = [{"name": name, "runs": [run, run, longer]} for name in names]
    data = {
        "minimum": None if identifier == "BE-Fig1D" else -6.0,
        "panels": [{"title": title, "curves": curves} for title in ("one", "two")],
    }
    figure = DRAWINGS[identifier](json.loads(json.dumps(data)))
    assert len(figure.axes) == 4
    for axis, places in zip(figure.axes[::2], ([0, 1, 2], [0, 0.5, 1.5]), strict=True):
        lines = {line.get_label(): line for line in axis.get_lines()}
        assert ("the noise" in lines) == (identifier != "BE-Fig1D")
        for name in names:
            np.testing.assert_allclose(lines[name].get_xdata(), places)
            np.testing.assert_allclose(lines[name].get_ydata(), [3, 2, 1])
        bands = [band.get_datalim(axis.transData).extents for band in axis.collections]
        np.testing.assert_allclose(np.array(bands)[:, [1, 3]], [[0, 3]] * 2)
        assert "examples" in axis.get_xlabel() or "[s]" in axis.get_xlabel()
