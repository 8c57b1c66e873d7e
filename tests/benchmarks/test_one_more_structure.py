"""A new structure is one file and one line: a toy goes through everything that takes structures."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_leaderboard
from flax import nnx
from own_process import found_by
from scalar_structure import Scalar

import natgrad_flax as ng
import ntk_analysis as na
from benchmarks import problems
from benchmarks.leaderboard import figures, trial
from benchmarks.leaderboard.natural import averaged, variants
from natgrad_flax.structures import NAMED, STRUCTURES
from natgrad_flax.structures.style import style_of_class, styled
from ntk_analysis import methods
from ntk_analysis.palette import STYLES

RHO = 0.1
RATES = (1e-2, 0.1, 0.3, 1.0, 3.0, 10.0)
HELPERS = Path(__file__).parents[1] / "helpers"
LINE = ',\n)\n"""Every approximation'
"""The end of the list of structures, where the toy comes in."""


@pytest.fixture(scope="module")
def listed(tmp_path_factory):
    """What commands and tables show where the toy is a file and a line more of natgrad_flax."""
    folder = tmp_path_factory.mktemp("listed")
    package = folder / "source" / "natgrad_flax"
    shutil.copytree(Path(ng.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(HELPERS / "scalar_structure.py", package / "structures" / "scalar.py")
    registry = package / "structures" / "__init__.py"
    source = registry.read_text(encoding="utf-8")
    assert source.count(LINE) == 1
    source = source.replace(LINE, LINE.replace("\n", "\n    Scalar,\n", 1))
    imported = "from natgrad_flax.structures.scalar import Scalar\n\nSTRUCTURES:"
    registry.write_text(source.replace("STRUCTURES:", imported, 1), encoding="utf-8")
    script, folders = HELPERS / "scalar_run.py", (package.parent, HELPERS.parents[1])
    return found_by(script, folder, str(folder), folders=folders) | {"folder": folder}


def problem(samples=4):
    model = ng.MLP((3, 5, 2), bias_variance=0.1, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    return (
        model,
        jnp.asarray(rng.normal(size=(samples, 3))),
        jnp.asarray(rng.normal(size=(samples, 2))),
    )


def dense(model, x, y):
    """Jacobian (N C, P) a layer, mean diagonal of the Fisher a layer, and gradient a layer."""
    graphdef, state = nnx.split(model)
    outputs = nnx.merge(graphdef, state)(x)
    tree = jax.jacrev(lambda s: nnx.merge(graphdef, s)(x))(state)
    layers = nnx.to_pure_dict(tree)["layers"]
    parts = [
        np.concatenate([np.reshape(leaf, (outputs.size, -1)) for leaf in layers[i].values()], 1)
        for i in range(2)
    ]
    means = [np.sum(part**2) / len(x) / part.shape[1] for part in parts]
    residual = np.ravel(outputs - y) / len(x)
    return parts, means, [part.T @ residual for part in parts]


def vectors(tree):
    """A state as one vector a layer, as ``dense`` has it."""
    layers = nnx.to_pure_dict(tree)["layers"]
    return [np.concatenate([np.ravel(leaf) for leaf in layers[i].values()]) for i in range(2)]


def wanted(means, slopes):
    return [slope / (mean + RHO) for mean, slope in zip(means, slopes, strict=True)]


def assert_close(found, expected):
    for here, there in zip(found, expected, strict=True):
        np.testing.assert_allclose(here, there, rtol=1e-8, atol=1e-10)


def test_natural_gradient(x64):
    model, x, y = problem()
    _, means, slopes = dense(model, x, y)
    options = {"structure": Scalar(), "loss": ng.MeanSquaredError()}
    found = ng.natural_gradient(model, x, y, damping=RHO, **options)
    assert_close(vectors(found), wanted(means, slopes))
    relative = ng.natural_gradient(model, x, y, damping=ng.RelativeDamping(0.5), **options)
    halves = [slope / (1.5 * mean) for mean, slope in zip(means, slopes, strict=True)]
    assert_close(vectors(relative), halves)


def test_optimizer_with_and_without_averages(x64):
    model, x, y = problem()
    params = nnx.state(model, nnx.Param)
    batches = [(x, y), (2 * x, y)]
    means = [dense(model, *batch)[1] for batch in batches]
    slopes = dense(model, *batches[1])[2]
    # at a decay of 1/2 the second of two batches weighs twice as much as the first
    mean = [(a + 2 * b) / 3 for a, b in zip(*means, strict=True)]
    average = ng.MovingAverage(decay=0.5)
    for options, expected in (
        ({}, means[1]),
        ({"average": average, "example": (model, x)}, mean),
    ):
        tx = ng.natural_gradient_descent(
            0.5, structure=Scalar(), loss=ng.MeanSquaredError(), damping=RHO, **options
        )
        state = tx.init(params)
        for inputs, targets in batches:
            update, state = tx.update(params, state, params, module=model, x=inputs, y=targets)
        assert_close(vectors(update), [-0.5 * v for v in wanted(expected, slopes)])


def test_isotropy(x64):
    model, x, y = problem()
    parts, means, _ = dense(model, x, y)
    kernels = [part @ part.T / len(x) / mean for part, mean in zip(parts, means, strict=True)]
    found = na.isotropy(Scalar(), model, np.asarray(x))
    np.testing.assert_allclose(found.eigenvalues, np.linalg.eigvalsh(sum(kernels)), rtol=1e-8)
    assert found.theoretical_alpha is None
    with pytest.raises(ValueError, match="Scalar has no alpha that theory knows"):
        ng.optimal_learning_rate(Scalar(), model, 4)
    settings = na.SweepSettings("width", (4,), (0,), num_samples=3, num_inputs=3)
    table = na.isotropy_sweep({"toy": Scalar()}, settings)
    assert table["failure"].tolist() == [""]
    assert table["alpha"][0] > 0


def test_training_on_the_leaderboard(monkeypatch):
    entries = (*variants(Scalar(), rates=RATES), averaged(Scalar(), damping=0.1, rates=RATES))
    members = {entry.name: entry for entry in entries}
    toy_leaderboard.install(monkeypatch, members=members)
    caches = (trial._program, trial._rate, trial._evaluation)
    for cached in caches:
        cached.cache_clear()
    config = trial.configuration(
        toy_leaderboard.make_workload(), "scalar", 0, target=1e-2, role="evaluation"
    )
    found = trial.execute(config)
    for cached in caches:
        cached.cache_clear()
    assert found["outcome"]["status"] == "reached"
    assert found["facts"]["title"] == "Scalar metric"
    row = {"contestant": "scalar", "family": "natural-gradient", "structure": "Scalar"}
    look = figures.looks([row])["scalar"]
    assert (look.light, look.marker) == (Scalar.style.color, Scalar.style.marker)
    assert "scalar-average" in members


def test_a_structure_of_somebody_else_is_drawn_as_its_class_says():
    assert STYLES["Scalar"] == Scalar.style
    known = [STYLES[cls.__name__] for cls in STRUCTURES]
    assert Scalar.style.color not in {style.color for style in known}
    # a record of a class that is not there
    assert STYLES["SomeBlocks"] == style_of_class("SomeBlocks")
    assert STYLES["SomeBlocks"].label == "Some blocks"

    class Below(ng.KFAC):
        """Not K-FAC to a reader of a figure."""

    assert Below.style.label == "Below"
    assert Below.style.color != ng.KFAC.style.color


def needs_arguments(cls):
    parameters = inspect.signature(cls).parameters.values()
    return any(parameter.default is parameter.empty for parameter in parameters)


def test_styles_of_the_package_are_told_apart():
    styles = [methods.GradientDescent.style, *(cls.style for cls in STRUCTURES)]
    for attribute in ("label", "color", "marker"):
        assert len({getattr(style, attribute) for style in styles}) == len(styles)
    names = [name for s in styles if s.command for name in (s.command, *s.aliases)]
    assert len(set(names)) == len(names)
    assert styled("Toy A").command == "toy-a"
    unnamed = {cls for cls in STRUCTURES if cls not in NAMED}
    assert unnamed == {cls for cls in STRUCTURES if needs_arguments(cls)} > {ng.LayerWise}


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("gradient-descent", "gd"),
        ("K-FAC", "kfac"),
        ("k_fac", "kfac"),
        ("block-tridiagonal", "block-tri-diagonal"),
        ("tri-diag", "block-tri-diagonal"),
        ("block-diag", "block-diagonal"),
        ("quasi-diag", "quasi-diagonal"),
        ("Unit_Wise", "unit-wise"),
    ],
)
def test_every_spelling_is_found(given, name):
    assert methods.find_structure(given) == name


def test_tables_of_today():
    """Names, labels, colours and order as they are in results, figures and README.md."""
    assert list(methods.STRUCTURES) == [
        "gd", "exact", "block-diagonal", "block-tri-diagonal", "kfac", "ekfac", "unit-wise",
        "diagonal", "quasi-diagonal",
    ]  # fmt: skip
    assert list(problems.STRUCTURES) == [
        "exact", "block-diag", "tri-diag", "K-FAC", "EKFAC", "diagonal", "quasi-diag", "unit-wise",
    ]  # fmt: skip
    undamped = [name for name, entry in problems.STRUCTURES.items() if entry.undamped]
    assert undamped == ["exact", "block-diag", "tri-diag", "K-FAC"]
    assert {name: style[:3] for name, style in STYLES.items()} == {
        "GradientDescent": ("Gradient descent", "#4d4d4d", "o"),
        "Exact": ("Exact", "#0072B2", "s"),
        "BlockDiagonal": ("Block-diagonal", "#D55E00", "D"),
        "BlockTriDiagonal": ("Block tri-diagonal", "#009E73", "^"),
        "KFAC": ("K-FAC", "#CC79A7", "v"),
        "EKFAC": ("EKFAC", "#661100", "*"),
        "UnitWise": ("Unit-wise", "#E69F00", "P"),
        "Diagonal": ("Diagonal", "#56B4E9", "X"),
        "QuasiDiagonal": ("Quasi-diagonal", "#8C6D1F", "p"),
        "LayerWise": ("Layer-wise", "#6A3D9A", "h"),
        "Foof": ("FOOF", "#117A8B", "<"),
        "UnitBlocks": ("Unit blocks", "#C2185B", ">"),
        "Shampoo": ("Shampoo", "#7A9A01", "d"),
        "KFOC": ("KFOC", "#3B3BB3", "8"),
        "LowRankUnits": ("Low-rank units", "#FF8FA3", "H"),
        "Nystroem": ("Nystroem", "#B39DDB", "x"),
        "MiniBlock": ("Mini-block", "#00B8A9", "+"),
    }


def test_targets_belong_to_structures():
    with pytest.raises(ValueError, match=r"targets of block-diagonl, but structures are called"):
        problems.Line("t", (2, 1), 2, ng.MeanSquaredError(), "exact", True, {"block-diagonl": 1.0})


def test_names_of_a_structure_that_is_on_the_list(listed):
    commands, benchmarks, peers = listed["names"]
    assert commands[-1] == "scalar"
    assert benchmarks[-1] == "scal."
    assert "scalar" in peers
    assert listed["lookup"] == ["scalar"] * 3
    assert tuple(listed["style"][:3]) == Scalar.style[:3]
    assert listed["method"]["damping"] == {"ratio": 0.01}
    assert "ng.Scalar(), " in listed["refusal"]


def test_help_texts_of_a_structure_that_is_on_the_list(listed):
    texts = {name: " ".join(text.split()) for name, text in listed["help"].items()}
    for text in texts.values():
        assert "quasi-diagonal, scalar" in text
    assert "relative damping 0.01 for scalar" in texts["dynamics"]
    assert "diagonal, quasi-diagonal and scalar" in texts["dynamics"]


def test_commands_run_a_structure_that_is_on_the_list(listed):
    for name in ("isotropy", "dynamics", "predict"):
        assert "Scalar metric" in listed[name]
        document = json.loads((listed["folder"] / name / "results.json").read_text("utf-8"))
        assert "Scalar" in json.dumps(document)
    for figure in ("isotropy/condition_number", "dynamics/loss", "predict/accuracy"):
        assert (listed["folder"] / f"{figure}.png").stat().st_size > 1000


def test_a_mesh_and_a_benchmark_run_a_structure_that_is_on_the_list(listed):
    assert listed["devices"] < 1e-5
    assert listed["ratio"] > 0
    assert "no target for scal." in listed["usage"]
