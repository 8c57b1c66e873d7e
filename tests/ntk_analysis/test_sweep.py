"""Sweeps: tidy tables, shared signals, failures that are recorded, settings that are refused."""

from __future__ import annotations

import numpy as np
import pytest

import natgrad_flax as ng
import ntk_analysis as na
from ntk_analysis import sweep as sweep_module
from ntk_analysis.isotropy import isotropy
from ntk_analysis.sweep import SweepSettings, isotropy_sweep

STRUCTURES = {"gd": na.GradientDescent(), "bd": ng.BlockDiagonal(), "unit": ng.UnitWise()}
COLUMNS = [
    "alpha",
    "theoretical_alpha",
    "condition_number",
    "deviation",
    "smallest_eigenvalue",
    "largest_eigenvalue",
    "learning_rate",
    "failed_conditions",
    "failure",
]


def small(variable, values, **changes) -> SweepSettings:
    base = {"seeds": (0,), "width": 8, "num_samples": 5, "num_inputs": 6, "activation": "tanh"}
    return SweepSettings(variable, values, **(base | changes))


def test_rows_are_isotropy_reports():
    settings = small("width", (8, 4), seeds=(3, 1))
    progress = []
    table = isotropy_sweep(
        STRUCTURES, settings, report=lambda what, done: progress.append((what, done))
    )
    assert list(table.columns) == ["structure", "width", "seed", *COLUMNS]
    keys = [(name, width, seed) for seed in (3, 1) for width in (8, 4) for name in STRUCTURES]
    assert list(zip(table["structure"], table["width"], table["seed"], strict=True)) == keys
    assert settings.num_points == 4
    assert sum(done for _, done in progress) == len(table)
    assert ("width 4, seed 1: unit", 1) in progress
    assert (table["failure"] == "").all()
    for row in (table.iloc[7], table.iloc[10]):
        here = settings.at(int(row["width"]))
        seed = int(row["seed"])
        found = isotropy(STRUCTURES[row["structure"]], here.model((6,), seed), here.inputs(seed))
        assert row["structure"] == "bd"
        for name in COLUMNS[:4]:
            np.testing.assert_allclose(row[name], getattr(found, name), rtol=1e-7, atol=1e-9)
        np.testing.assert_allclose(row["smallest_eigenvalue"], found.eigenvalues[0], rtol=1e-7)
        np.testing.assert_allclose(row["largest_eigenvalue"], found.eigenvalues[-1], rtol=1e-7)
        assert row["failed_conditions"] == "; ".join(found.failed_conditions)
    # 5 samples need 4 hidden units and the bias
    assert (table["failed_conditions"] == "").all()
    unit = table[table["structure"] == "unit"]
    np.testing.assert_allclose(unit["alpha"], 2 * unit["width"] + 1, rtol=1e-7)
    np.testing.assert_allclose(unit["alpha"], unit["theoretical_alpha"], rtol=1e-7)
    assert table[table["structure"] == "gd"]["theoretical_alpha"].isna().all()


def test_structures_that_do_not_suit_a_point_say_why():
    structures = {"sigma": ng.LayerWise(np.eye(3)), "bd": ng.BlockDiagonal()}
    table = isotropy_sweep(structures, small("depth", (2, 3))).set_index(["structure", "depth"])
    failed = table.loc[("sigma", 2)]
    assert "network has 2 layers" in failed["failure"]
    assert failed[COLUMNS[:7]].isna().all()
    np.testing.assert_allclose(table.loc[("sigma", 3)]["alpha"], 3, rtol=1e-8)
    assert table.loc[("sigma", 3)]["failure"] == ""
    np.testing.assert_allclose(table.loc["bd"]["alpha"], [2, 3], rtol=1e-8)
    assert table["condition_number"].dtype == np.float64


def test_damping_sweeps_share_one_network(monkeypatch):
    calls = []
    original = sweep_module.initial_signals
    monkeypatch.setattr(sweep_module, "initial_signals", lambda *a: calls.append(a) or original(*a))
    settings = small("damping", (0.0, 1e-3, 1.0), relative_damping=True)
    table = isotropy_sweep(STRUCTURES, settings)
    assert len(calls) == 1
    assert table[table["structure"] == "gd"]["alpha"].nunique() == 1
    alphas = table[table["structure"] == "bd"]["alpha"].to_numpy()
    np.testing.assert_allclose(alphas[0], 3, rtol=1e-8)
    assert alphas[0] > alphas[1] > alphas[2]
    model, x = settings.model((6,), 0), settings.inputs(0)
    direct = isotropy(ng.BlockDiagonal(), model, x, ng.RelativeDamping(1.0))
    np.testing.assert_allclose(alphas[2], direct.alpha, rtol=1e-7)


def test_activations_and_data_with_a_size_of_their_own():
    settings = SweepSettings(
        "activation", ("relu", "tanh"), seeds=(0,), width=16, num_samples=6, dataset="digits"
    )
    table = isotropy_sweep({"unit": ng.UnitWise()}, settings).set_index("activation")
    assert table.loc["tanh", "theoretical_alpha"] == 33
    np.testing.assert_allclose(table.loc["tanh", "alpha"], 33, rtol=1e-6)
    assert table.loc["relu", "theoretical_alpha"] == 17
    assert settings.inputs(0).shape == (6, 64)


def test_samples_come_with_unit_norm_and_from_the_seed():
    settings = small("num_samples", (4, 7))
    first = settings.at(7).inputs(0)
    assert first.shape == (7, 6)
    np.testing.assert_allclose(np.linalg.norm(first, axis=1), 1, rtol=1e-12)
    assert not np.allclose(first, settings.at(7).inputs(1))
    table = isotropy_sweep({"gd": na.GradientDescent()}, settings)
    assert list(table["num_samples"]) == [4, 7]


def test_a_singular_coupling_does_not_warn():
    table = isotropy_sweep({"btd": ng.BlockTriDiagonal()}, small("depth", (5,)))
    np.testing.assert_allclose(table["alpha"], 2, rtol=1e-5)


def test_matrices_that_are_not_finite_are_failures(monkeypatch):
    class Broken(ng.BlockDiagonal):
        def coefficient(self, test, train, damping):
            return super().coefficient(test, train, damping) * np.nan

    table = isotropy_sweep({"broken": Broken()}, small("width", (8,)))
    assert "is not finite" in table.loc[0, "failure"]
    assert np.isnan(table.loc[0, "alpha"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variable": "seed"}, "variable must be one of width"),
        ({"values": ()}, "values must hold at least one"),
        ({"values": (8, 8)}, "must not repeat"),
        ({"values": "relu"}, "must be a sequence"),
        ({"values": 8}, "must be a sequence"),
        ({"values": (8, 0)}, "every width in values must be an integer of at least 1, got 0"),
        ({"values": (8.0,)}, "every width in values must be an integer"),
        ({"variable": "damping", "values": (-1.0,)}, "every damping in values"),
        ({"variable": "damping", "values": ("a",)}, "must be a number"),
        ({"variable": "damping", "values": (float("inf"),)}, "finite"),
        ({"variable": "activation", "values": ("rellu",)}, "Did you mean 'relu'"),
        ({"variable": "activation", "values": (3,)}, "name of an activation"),
        ({"seeds": ()}, "seeds must hold"),
        ({"seeds": (-1,)}, "every seed"),
        ({"depth": 0}, "depth must be"),
        ({"num_samples": True}, "num_samples must be"),
        ({"num_outputs": 0}, "num_outputs"),
        ({"weight_variance": 0.0}, "weight_variance must be positive"),
        ({"bias_variance": -1.0}, "bias_variance"),
        ({"damping": -1.0}, "damping"),
        ({"dataset": "nothing"}, "unknown data set"),
        ({"classes": (0, 1)}, "no classes"),
        ({"num_inputs": 0}, "num_inputs must be"),
        ({"dataset": "digits", "num_inputs": 64}, "size of their own"),
    ],
)
def test_settings_that_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        SweepSettings(**({"variable": "width", "values": (8,)} | changes))


def test_bad_structures():
    settings = small("width", (8,))
    with pytest.raises(TypeError, match="by name"):
        isotropy_sweep({}, settings)
    with pytest.raises(TypeError, match="by name"):
        isotropy_sweep([ng.Exact()], settings)
    with pytest.raises(TypeError, match="instance"):
        isotropy_sweep({"exact": ng.Exact}, settings)
