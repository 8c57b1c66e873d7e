"""`natgrad predict` and `natgrad isotropy`, run as a user runs them, on tiny settings."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path

import natgrad_command
import natgrad_datasets
import numpy as np
import pytest
from flax import nnx
from natgrad_command import natgrad, read

import natgrad_flax as ng
import ntk_analysis as na
import ntk_analysis.figures_theory
import ntk_analysis.isotropy_run
import ntk_analysis.prediction_run
from natgrad_flax.optimizer.learning_rate import model_geometry
from ntk_analysis.cost import structure_cost
from ntk_analysis.methods import STRUCTURES
from ntk_analysis.prediction_run import PredictionSettings, kfac_data
from ntk_analysis.sweep import SweepSettings, isotropy_sweep

PREDICT = [
    "predict",
    "--dataset",
    "digits",
    "--num-train",
    90,
    "--num-test",
    40,
    "--widths",
    32,
    32,
]
LAW = [
    "--forster",
    "--initialisations",
    3,
    "--covariance",
    "variance",
    "--ridge",
    0.01,
    "--seed",
    2,
]
ISOTROPY = [
    "isotropy", "--vary", "width", "--values", 24, 32, "--seeds", 0, 1, "--num-samples", 10,
    "--num-inputs", 12,
]  # fmt: skip
TWO = ["--structures", "exact", "block-diagonal"]


one_sentence = partial(natgrad_command.one_sentence, longest=500)


def check_figures(folder: Path, *names: str) -> None:
    for name in names:
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (folder / f"{name}.svg").read_text(encoding="utf-8")


@pytest.fixture
def no_figures(monkeypatch):
    """Drawing takes longer than these small runs."""
    for name in ("draw_prediction", "draw_isotropy"):
        monkeypatch.setattr(ntk_analysis.figures_theory, name, lambda *args: [])


@pytest.fixture(scope="module")
def predicted(tmp_path_factory) -> Path:
    """A finished run of the default structures; 90 digits have more samples than rank."""
    out = tmp_path_factory.mktemp("predict")
    result = natgrad(*PREDICT, *LAW, "--out", out)
    assert result.exit_code == 0, result.output
    assert "Block tri-diagonal" in result.stdout
    assert "K-FAC: the inputs have rank" in result.stdout
    assert "wrote results.json, accuracy.png" in " ".join(result.stdout.split())
    return out


@pytest.mark.parametrize("name", ["exact", "block-diagonal", "kfac"])
def test_predictions_are_those_of_the_library(predicted, name):
    data = natgrad_datasets.load("digits", num_train=90, num_test=40, dtype="float64")
    structure = {"exact": ng.Exact(), "block-diagonal": ng.BlockDiagonal()}.get(name)
    if name == "kfac":
        structure = ng.KFAC(first_layer="scaled")
        data, _ = kfac_data(data)
        assert data.input_dim < 60
        np.testing.assert_allclose(
            data.x_train.T @ data.x_train, np.eye(data.input_dim) * 90 / data.input_dim, atol=5e-3
        )
    model = ng.MLP((data.input_dim, 32, 32, 10), rngs=nnx.Rngs(0))
    found = na.predict(
        structure, model, data.x_train, data.y_train, data.x_test,
        ridge=0.01, covariance="variance", initialisations=3, seed=2,
    )  # fmt: skip
    record = read(predicted)["methods"][name]
    assert record["accuracy"] == found.accuracy(data.y_test)
    assert record["accuracies"] == found.sampled_accuracies(data.y_test).tolist()
    assert record["expected_accuracy"] == pytest.approx(found.expected_accuracy(data.y_test))
    loss = np.sum((found.mean - data.y_test) ** 2) / 80
    assert record["test_loss"] == pytest.approx(loss)
    assert record["mean_deviation"] == pytest.approx(np.sqrt(found.variance).mean())
    assert record["input_dim"] == data.input_dim


def test_prediction_says_what_it_is(predicted):
    document = read(predicted)
    assert document["command"] == "natgrad predict"
    assert list(document["methods"]) == ["exact", "block-diagonal", "block-tri-diagonal", "kfac"]
    assert document["settings"]["initialisations"] == 3
    assert document["data"]["num_test"] == 40
    assert {"jax", "natgrad", "device"} <= set(document["environment"])
    check_figures(predicted, "accuracy")


@pytest.mark.usefixtures("no_figures")
def test_predict_resumes(predicted, tmp_path, monkeypatch):
    ran = []
    original = ntk_analysis.prediction_run._Laboratory.run

    def spy(self, method):
        ran.append(method.name)
        return original(self, method)

    monkeypatch.setattr(ntk_analysis.prediction_run._Laboratory, "run", spy)
    document = read(predicted)
    del document["methods"]["block-diagonal"]
    (tmp_path / "results.json").write_text(json.dumps(document), encoding="utf-8")
    command = [*PREDICT, *LAW, *TWO, "--out", tmp_path]
    assert "1 structures were finished" in natgrad(*command).stdout
    assert ran == ["block-diagonal"]
    again, before = (read(folder)["methods"] for folder in (tmp_path, predicted))
    assert again["exact"] == before["exact"]
    assert again["block-diagonal"] | {"date": ""} == before["block-diagonal"] | {"date": ""}
    assert "kfac" in again
    assert natgrad(*command, "--fresh").exit_code == 0
    assert ran == ["block-diagonal", "exact", "block-diagonal"]
    assert list(read(tmp_path)["methods"]) == ["exact", "block-diagonal"]
    assert "replaced" in natgrad(*command, "--ridge", 0.5).stdout


@pytest.mark.usefixtures("no_figures")
def test_interrupted_prediction_keeps_what_is_finished(tmp_path, monkeypatch):
    original = ntk_analysis.prediction_run._Laboratory.run

    def interrupted(self, method):
        if method.name == "block-diagonal":
            raise KeyboardInterrupt
        return original(self, method)

    monkeypatch.setattr(ntk_analysis.prediction_run._Laboratory, "run", interrupted)
    result = natgrad(*PREDICT, *TWO, "--initialisations", 0, "--out", tmp_path)
    assert result.exit_code == 130
    assert "goes on from there" in result.stderr
    assert list(read(tmp_path)["methods"]) == ["exact"]


@pytest.mark.usefixtures("no_figures")
def test_empirical_predictions(tmp_path):
    result = natgrad(
        "predict", "--dataset", "digits", "--classes", 3, 8, "--num-train", 12, "--num-test", 10,
        "--widths", 24, 24, "--bias-variance", 0.1, "--kernels", "empirical", "--seed", 4,
        "--structures", "exact", "diagonal", "--out", tmp_path,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "Diagonal: damping: relative 0.001" in result.stdout
    methods = read(tmp_path)["methods"]
    data = natgrad_datasets.load(
        "digits", classes=(3, 8), num_train=12, num_test=10, dtype="float64"
    )
    model = ng.MLP((64, 24, 24, 1), bias_variance=0.1, rngs=nnx.Rngs(4))
    for name, structure, damping in (
        ("exact", ng.Exact(), 0.0), ("diagonal", ng.Diagonal(), ng.RelativeDamping(1e-3)),
    ):  # fmt: skip
        found = na.predict(
            structure, model, data.x_train, data.y_train, data.x_test,
            damping=damping, kernels="empirical",
        )  # fmt: skip
        assert methods[name]["accuracy"] == found.accuracy(data.y_test)
        loss = np.sum((found.mean - data.y_test) ** 2) / 20
        assert methods[name]["test_loss"] == pytest.approx(loss)
        assert methods[name]["accuracies"] == []
        assert methods[name]["expected_accuracy"] is None


@pytest.mark.usefixtures("no_figures")
def test_predict_keeps_kernels(tmp_path):
    command = [*PREDICT, "--structures", "exact", "--initialisations", 0]
    store = tmp_path / "store"
    assert natgrad(*command, "--store", store, "--out", tmp_path / "a").exit_code == 0
    assert len(list(store.glob("kernels-*"))) == 2
    assert natgrad(*command, "--out", tmp_path / "b").exit_code == 0
    first, second = (read(tmp_path / x)["methods"]["exact"]["test_loss"] for x in "ab")
    assert first == pytest.approx(second, rel=1e-12)


def test_defaults_of_predict():
    digits = PredictionSettings(dataset="digits")
    assert (digits.num_train, digits.num_test, digits.initialisations) == (1437, 360, 10)
    assert PredictionSettings(dataset="cifar10").num_train == 1000
    assert PredictionSettings(dataset="digits", kernels="empirical").initialisations == 0
    wide = natgrad_datasets.load("gaussian", num_train=10, num_test=5, input_dim=20)
    assert kfac_data(wide) == (wide, "")


@pytest.fixture(scope="module")
def swept(tmp_path_factory) -> Path:
    """A finished sweep of every structure; N = 10 samples and M = 24 or 32 units."""
    out = tmp_path_factory.mktemp("isotropy")
    result = natgrad(*ISOTROPY, "--out", out)
    assert result.exit_code == 0, result.output
    for word in ("Quasi-diagonal", "32", "wrote results.json, condition_number.png"):
        assert word in " ".join(result.stdout.split())
    return out


def test_sweep_is_that_of_the_library(swept):
    settings = SweepSettings("width", (24, 32), seeds=(0, 1), num_samples=10, num_inputs=12)
    structures = {"exact": ng.Exact(), "kfac": ng.KFAC(), "quasi-diagonal": ng.QuasiDiagonal()}
    rows = read(swept)["methods"]
    assert len(rows) == len(STRUCTURES) * 2 * 2
    for expected in isotropy_sweep(structures, settings).to_dict("records"):
        row = rows[f"{expected['structure']}, width {expected['width']}, seed {expected['seed']}"]
        for name in ("alpha", "condition_number", "largest_eigenvalue"):
            assert row[name] == pytest.approx(expected[name], rel=1e-6)
        assert row["failed_conditions"] == expected["failed_conditions"]
        theory = expected["theoretical_alpha"]
        assert row["theoretical_alpha"] == (None if math.isnan(theory) else theory)


def test_spectra_and_costs_of_one_network(swept):
    rows = read(swept)["methods"]
    assert sum("eigenvalues" in row for row in rows.values()) == len(STRUCTURES)
    point = SweepSettings("width", (32,), width=32, num_samples=10, num_inputs=12)
    x = point.inputs(0)
    model = point.model((12,), 0)
    for name, structure in (("gd", na.GradientDescent()), ("unit-wise", ng.UnitWise())):
        row = rows[f"{name}, width 32, seed 0"]
        np.testing.assert_allclose(
            row["eigenvalues"], na.isotropy(structure, model, x).eigenvalues, rtol=1e-7
        )
        cost = structure_cost(structure, model_geometry(model, 10))
        assert row["cost"]["nonzeros"] == cost.nonzeros
        assert row["cost"]["step_flops"] == cost.step_flops
        assert row["cost"]["fraction_of_exact"] == cost.fraction_of_exact
    check_figures(swept, "condition_number", "spectra", "cost")


@pytest.mark.usefixtures("no_figures")
def test_sweep_resumes(swept, tmp_path, monkeypatch):
    ran = []
    original = ntk_analysis.isotropy_run.isotropy_sweep

    def spy(structures, settings, **options):
        ran.append((tuple(structures), settings.values, settings.seeds))
        return original(structures, settings, **options)

    monkeypatch.setattr(ntk_analysis.isotropy_run, "isotropy_sweep", spy)
    document = read(swept)
    del document["methods"]["exact, width 24, seed 1"]
    (tmp_path / "results.json").write_text(json.dumps(document), encoding="utf-8")
    command = [*ISOTROPY, *TWO, "--out", tmp_path]
    assert "7 rows were finished" in natgrad(*command).stdout
    assert ran == [(("exact",), (24,), (1,))]
    assert len(read(tmp_path)["methods"]) == len(STRUCTURES) * 2 * 2
    # another last value: rows there, with their spectra
    assert natgrad(*command, "--values", 28).exit_code == 0
    assert "eigenvalues" in read(tmp_path)["methods"]["exact, width 28, seed 0"]
    assert len(read(tmp_path)["methods"]) == len(STRUCTURES) * 2 * 2 + 4
    ran.clear()
    assert natgrad(*command, "--fresh").exit_code == 0
    assert len(ran) == 4
    assert len(read(tmp_path)["methods"]) == 8
    assert "replaced" in natgrad(*command, "--bias-variance", 0.1).stdout


@pytest.mark.usefixtures("no_figures")
def test_interrupted_sweep_keeps_what_is_finished(tmp_path, monkeypatch):
    original = ntk_analysis.isotropy_run.isotropy_sweep

    def interrupted(structures, settings, **options):
        if settings.values == (32,):
            raise KeyboardInterrupt
        return original(structures, settings, **options)

    monkeypatch.setattr(ntk_analysis.isotropy_run, "isotropy_sweep", interrupted)
    result = natgrad(*ISOTROPY, *TWO, "--out", tmp_path)
    assert result.exit_code == 130
    assert list(read(tmp_path)["methods"]) == [
        "exact, width 24, seed 0", "block-diagonal, width 24, seed 0",
    ]  # fmt: skip


def test_analytic_kernels_with_damping(tmp_path):
    result = natgrad(
        "isotropy", "--vary", "damping", "--values", 0, 1e-3, "--seeds", 3, "--num-samples", 8,
        "--structures", "gd", "block-diagonal", "diagonal", "--kernels", "analytic",
        "--out", tmp_path,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "no infinite-width kernel" in " ".join(result.stdout.split())
    rows = read(tmp_path)["methods"]
    assert rows["diagonal, damping 0.0, seed 3"]["alpha"] is None
    point = SweepSettings("damping", (0.001,), seeds=(3,), num_samples=8)
    x = point.inputs(3)
    found = na.isotropy(
        ng.BlockDiagonal(), point.model((100,), 3), x, damping=1e-3, kernels="analytic"
    )
    row = rows["block-diagonal, damping 0.001, seed 3"]
    assert row["condition_number"] == pytest.approx(found.condition_number)
    assert row["condition_number"] > 1.01
    assert rows["block-diagonal, damping 0.0, seed 3"]["condition_number"] == pytest.approx(1)
    assert {path.stem for path in tmp_path.glob("*.png")} == {"condition_number", "spectra"}


def test_networks_that_do_not_suit_are_notes(tmp_path):
    result = natgrad(
        "isotropy", "--vary", "activation", "--values", "relu", "tanh", "--seeds", 0,
        "--width", 8, "--num-samples", 12, "--num-inputs", 20, "--out", tmp_path,
        "--structures", "block-tri-diagonal", "block-diagonal", "quasi-diagonal",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    text = " ".join(result.stdout.split())
    assert "Block tri-diagonal: no result at activation relu, tanh" in text
    assert "Block-diagonal: conditions fail at activation relu, tanh" in text
    check_figures(tmp_path, "condition_number", "spectra", "cost")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--structures", "diagonal"], "no infinite-width kernel"),
        (["--structures", "newton"], "unknown structure 'newton'"),
        (["--dataset", "mnits"], "unknown data set 'mnits'"),
        (["--kernels", "finite"], "kernels must be analytic or empirical"),
        (["--kernels", "empirical", "--initialisations", "2"], "one initialisation"),
        (["--covariance", "full"], "covariance must be none or variance"),
        (["--ridge", "-1"], "ridge must be 0 or positive"),
        (["--damping", "nan"], "damping must be 0 or positive"),
        (["--num-train", "5000"], "num_train=5000 is more than"),
        (["--widths", "0"], "every hidden width"),
        (["--activation", "rellu"], "Did you mean 'relu'"),
        (["--seed", "-1"], "seed"),
        (["--rank-tolerance", "1"], "rank_tolerance must be below 1"),
        (["--colour", "red"], "--colour"),
    ],
)
def test_bad_arguments_of_predict(tmp_path, args, words):
    text = one_sentence(natgrad(*PREDICT, *args, "--out", tmp_path / "out"))
    assert words in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--vary", "colour"], "--vary must be one of width, depth"),
        (["--values", "24", "wide"], "must be integers"),
        (["--vary", "damping", "--values", "much"], "must be numbers"),
        (["--values", "0"], "every width in values"),
        (["--values", "24", "24"], "must not repeat"),
        (["--seeds", "-1"], "every seed"),
        (["--structures", "newton"], "unknown structure 'newton'"),
        (["--kernels", "analytic"], "vary something else"),
        (["--kernels", "finite"], "kernels must be empirical or analytic"),
        (["--damping", "-1"], "damping must be 0 or positive"),
        (["--dataset", "digits"], "num_inputs is for gaussian"),
    ],
)
def test_bad_arguments_of_isotropy(tmp_path, args, words):
    text = one_sentence(natgrad(*ISOTROPY, *args, "--out", tmp_path / "out"))
    assert words in text
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("no_figures")
def test_folders_of_other_results_are_left_alone(tmp_path):
    assert natgrad("datasets", "--out", tmp_path).exit_code == 0
    for command in (PREDICT, ISOTROPY):
        text = one_sentence(natgrad(*command, "--out", tmp_path))
        assert "results of natgrad datasets" in text


@pytest.mark.parametrize("command", ["predict", "isotropy"])
def test_help_says_everything(command):
    text = natgrad(command, "--help").stdout
    for word in ("--structures", "--kernels", "--fresh", "Exit code", "Karakida"):
        assert word in text
    assert command in natgrad("--help").stdout


@pytest.mark.usefixtures("no_figures")
def test_kfac_takes_the_inputs_as_they_are_by_default(tmp_path):
    result = natgrad(*PREDICT, "--structures", "kfac", "--initialisations", 0, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    data = natgrad_datasets.load("digits", num_train=90, num_test=40, dtype="float64")
    model = ng.MLP((64, 32, 32, 10), rngs=nnx.Rngs(0))
    found = na.predict(ng.KFAC(), model, data.x_train, data.y_train, data.x_test)
    record = read(tmp_path)["methods"]["kfac"]
    assert record["accuracy"] == found.accuracy(data.y_test)
    assert record["input_dim"] == 64
    assert record["notes"] == []
