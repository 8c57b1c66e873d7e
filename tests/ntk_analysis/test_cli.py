"""The command `natgrad`, run as a user runs it, on the embedded digits."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from natgrad_command import natgrad, one_sentence, read

import ntk_analysis.experiment
import ntk_analysis.figures
from ntk_analysis.settings import DynamicsSettings
from ntk_analysis.training import Trainer

SMALL = ["--dataset", "digits", "--num-train", "12", "--num-test", "10", "--widths", "64", "64"]
BIASED = ["--bias-variance", "0.1", "--steps", "4"]
PNG_START = b"\x89PNG"


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A finished run of the default methods, with biases."""
    out = tmp_path_factory.mktemp("run")
    result = natgrad("dynamics", *SMALL, *BIASED, "--out", out)
    assert result.exit_code == 0, result.output
    assert "Block-diagonal, c = 0.25" in result.stdout
    assert "Unit-wise, Diagonal, Quasi-diagonal: damping: relative 0.001" in result.stdout
    assert "wrote results.json" in result.stdout
    return out


def test_results_hold_what_a_reader_needs(finished):
    document = read(finished)
    assert document["command"] == "natgrad dynamics"
    assert document["settings"]["widths"] == [64, 64]
    assert document["data"]["name"] == "digits"
    assert {"jax", "flax", "natgrad", "device"} <= set(document["environment"])
    assert list(document["methods"]) == [
        "gd", "exact", "block-diagonal", "block-diagonal c=0.25", "block-diagonal c=0.5",
        "block-tri-diagonal", "kfac", "ekfac", "unit-wise", "diagonal", "quasi-diagonal",
    ]  # fmt: skip
    rates = {name: m["learning_rate"] for name, m in document["methods"].items()}
    assert rates["exact"] == 1
    assert rates["block-diagonal"] == pytest.approx(1 / 3)
    assert rates["gd"] == pytest.approx(1 / document["methods"]["gd"]["eigenvalues"]["max"])
    for method in document["methods"].values():
        for part in ("theory", "network"):
            for losses in method[part].values():
                assert len(losses) == 5
                assert np.isfinite(losses).all()
        assert method["seconds_per_step"] > 0


def test_network_follows_theory(finished):
    methods = read(finished)["methods"]
    for method in methods.values():
        theory, network = method["theory"], method["network"]
        assert network["train_loss"][0] == pytest.approx(theory["train_loss"][0], rel=1e-4)
        assert network["test_loss"][0] == pytest.approx(theory["test_loss"][0], rel=1e-4)
    descent = methods["gd"]
    assert descent["network"]["train_loss"][1] == pytest.approx(
        descent["theory"]["train_loss"][1], rel=0.1
    )
    for name in ("exact", "block-diagonal"):
        assert methods[name]["theory"]["train_loss"][1] < 1e-20
        assert methods[name]["network"]["train_loss"][-1] < 1e-3


def test_smaller_rates_and_biases(finished):
    methods = read(finished)["methods"]
    for c in (0.25, 0.5):
        slow = methods[f"block-diagonal c={c}"]
        expected = (1 - c) ** (2 * np.arange(5)) * slow["theory"]["train_loss"][0]
        np.testing.assert_allclose(slow["theory"]["train_loss"], expected, rtol=1e-8)
    quasi, diagonal = (methods[name]["theory"] for name in ("quasi-diagonal", "diagonal"))
    assert quasi["train_loss"] != diagonal["train_loss"]


@pytest.mark.parametrize("name", ["loss", "learning_rates"])
def test_figures(finished, name):
    image = (finished / f"{name}.png").read_bytes()
    assert image.startswith(PNG_START)
    assert len(image) > 20_000
    assert "<svg" in (finished / f"{name}.svg").read_text(encoding="utf-8")


@pytest.fixture
def no_figures(monkeypatch):
    """Drawing takes longer than these small runs."""
    monkeypatch.setattr(ntk_analysis.figures, "draw_dynamics", lambda *args: [])


@pytest.mark.usefixtures("no_figures")
def test_resume_runs_only_what_is_missing(finished, tmp_path, monkeypatch):
    ran = []
    original = ntk_analysis.experiment.Trainer

    def spy(model, structure, *rest):
        ran.append(structure.name)
        return original(model, structure, *rest)

    monkeypatch.setattr(ntk_analysis.experiment, "Trainer", spy)
    document = read(finished)
    before = document["methods"]["exact"]
    del document["methods"]["kfac"]
    (tmp_path / "results.json").write_text(json.dumps(document), encoding="utf-8")
    command = ["dynamics", *SMALL, *BIASED, "--out", tmp_path, "--structures", "exact", "kfac"]
    assert "1 methods were finished" in natgrad(*command).stdout
    assert ran == ["KFAC"]
    assert read(tmp_path)["methods"]["exact"] == before
    assert "unit-wise" in read(tmp_path)["methods"]
    assert natgrad(*command, "--fresh").exit_code == 0
    assert ran == ["KFAC", "Exact", "KFAC"]
    assert read(tmp_path)["methods"]["exact"]["network"] == before["network"]
    assert list(read(tmp_path)["methods"]) == ["exact", "kfac"]


@pytest.mark.usefixtures("no_figures")
def test_other_settings_start_afresh(tmp_path):
    command = ["dynamics", *SMALL, "--structures", "exact", "--out", tmp_path, "--steps"]
    assert natgrad(*command, 2).exit_code == 0
    assert "replaced" in natgrad(*command, 3).stdout
    assert len(read(tmp_path)["methods"]["exact"]["network"]["train_loss"]) == 4


@pytest.mark.usefixtures("no_figures")
def test_interrupt_keeps_finished_methods(tmp_path, monkeypatch):
    original = ntk_analysis.experiment.Trainer

    def interrupted(model, structure, *rest):
        if structure.name == "BlockDiagonal":
            raise KeyboardInterrupt
        return original(model, structure, *rest)

    monkeypatch.setattr(ntk_analysis.experiment, "Trainer", interrupted)
    result = natgrad(
        "dynamics", *SMALL, "--steps", 2, "--out", tmp_path,
        "--structures", "exact", "block-diagonal",
    )  # fmt: skip
    assert result.exit_code == 130
    assert "goes on from there" in result.stderr
    assert list(read(tmp_path)["methods"]) == ["exact"]
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.usefixtures("no_figures")
def test_singular_coupling_is_a_note(tmp_path):
    result = natgrad(
        "dynamics", *SMALL[:-1], "--out", tmp_path, "--steps", 2,
        "--structures", "Block_Tri_Diagonal",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    (method,) = read(tmp_path)["methods"].values()
    assert "singular" in method["notes"][0]
    assert "singular" in result.stdout
    assert method["theory"]["train_loss"][1] < 1e-20


@pytest.mark.usefixtures("no_figures")
def test_scale_dtype_and_too_few_units(tmp_path):
    result = natgrad(
        "dynamics", *SMALL, "--widths", 8, "--scale", 0.5, "--dtype", "float64", "--steps", 2,
        "--relative-damping", 0.01, "--structures", "block-diagonal", "--out", tmp_path,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    (method,) = read(tmp_path)["methods"].values()
    assert method["factor"] == 0.5
    assert method["damping"] == "relative 0.01"


@pytest.mark.usefixtures("no_figures")
def test_divergence_that_theory_foresees_is_no_failure(tmp_path):
    result = natgrad(
        "dynamics", *SMALL, "--scale", 1e6, "--steps", 9, "--structures", "exact",
        "--out", tmp_path,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    losses = read(tmp_path)["methods"]["exact c=1e+06"]["network"]["train_loss"]
    assert losses[-1] is None


@pytest.mark.usefixtures("no_figures")
def test_divergence_against_theory_is_a_failure(tmp_path, monkeypatch):
    original = Trainer.run

    def broken(self, *args):
        run = original(self, *args)
        run.outputs_train[-1] = np.nan
        return run

    monkeypatch.setattr(Trainer, "run", broken)
    result = natgrad(
        "dynamics", *SMALL, "--structures", "exact", "--out", tmp_path, "--steps", 2,
    )  # fmt: skip
    assert result.exit_code == 1
    assert "not finite" in result.stderr
    assert "not finite" in result.stdout
    (method,) = read(tmp_path)["methods"].values()
    assert method["unexpected_divergence"]
    assert method["network"]["train_loss"][-1] is None


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--structures", "blok-diagonal"], "did you mean 'block-diagonal'"),
        (["--structures", "gd", "newton"], "unknown structure 'newton'"),
        (["--dataset", "mnits"], "unknown data set 'mnits'"),
        (["--activation", "rellu"], "Did you mean 'relu'"),
        (["--classes", "0", "12"], "classes"),
        (["--num-train", "5000"], "num_train=5000 is more than"),
        (["--widths", "0"], "every hidden width"),
        (["--steps", "0"], "steps must be an integer"),
        (["--damping", "-1"], "damping must be 0 or positive"),
        (["--damping", "0.1", "--relative-damping", "0.1"], "not both"),
        (["--scale", "nan"], "scale must be positive"),
        (["--weight-variance", "0"], "weight_variance must be positive"),
        (["--dtype", "float16"], "dtype must be"),
        (["--seed", "-1"], "seed"),
        (["--steps", "many"], "--steps"),
        (["--colour", "red"], "--colour"),
        (["--widths", "4", "4", "--structures", "block-tri-diagonal"], "full row rank"),
    ],
)
def test_bad_arguments(tmp_path, args, words):
    text = one_sentence(natgrad("dynamics", *SMALL, *args, "--out", tmp_path / "out"))
    assert words in text
    assert not (tmp_path / "out").exists()


def test_folder_of_other_results_is_left_alone(tmp_path):
    assert natgrad("datasets", "--out", tmp_path).exit_code == 0
    text = one_sentence(natgrad("dynamics", *SMALL, "--out", tmp_path))
    assert "results of natgrad datasets" in text
    (tmp_path / "results.json").write_text("{", encoding="utf-8")
    assert "choose another --out" in one_sentence(natgrad("dynamics", *SMALL, "--out", tmp_path))
    blocked = tmp_path / "file"
    blocked.touch()
    command = ["dynamics", *SMALL, "--structures", "exact", "--steps", 1, "--out", blocked]
    assert "cannot write" in one_sentence(natgrad(*command))


def test_datasets(tmp_path, monkeypatch):
    monkeypatch.delenv("NATGRAD_DATA", raising=False)
    result = natgrad("datasets", "--out", tmp_path)
    assert result.exit_code == 0
    for name in ("digits", "mnist", "fashion_mnist", "cifar10", "gaussian"):
        assert name in result.stdout
    document = read(tmp_path)
    assert document["command"] == "natgrad datasets"
    digits = next(row for row in document["datasets"] if row["name"] == "digits")
    assert digits["found"] == "embedded"
    assert {"licence", "checksum", "num_train", "size_bytes"} <= set(digits)


def test_help_says_everything():
    text = natgrad("dynamics", "--help").stdout
    for word in ("--widths", "--structures", "--fresh", "Exit code", "Karakida"):
        assert word in text
    assert "dynamics" in natgrad("--help").stdout


def test_every_data_set_has_defaults():
    gaussian = DynamicsSettings(dataset="gaussian", num_train=10, num_test=5).load_data()
    assert gaussian.x_train.shape == (10, 20)
    assert DynamicsSettings(dataset="digits").num_train == 40
    assert DynamicsSettings(dataset="cifar10").classes == (0, 7)
