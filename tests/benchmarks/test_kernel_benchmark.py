"""The benchmark of kernels runs, and compares equal things; nothing here looks at times."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import kernel_problems, kernels
from benchmarks.common import PROFILES
from benchmarks.kernel_problems import Sizes
from ntk_analysis.analytic import analytic_kernels

SMALL = Sizes(
    inputs=5,
    samples=12,
    depth_samples=8,
    depths=(2, 3, 4),
    widths=(5, 16, 16, 2),
    empirical_samples=4,
)


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_recursion_is_the_ntk(depth):
    x = kernels.make_inputs(6, 5)
    np.testing.assert_allclose(np.linalg.norm(x, axis=1), 1.0, rtol=1e-14)
    expected = analytic_kernels(kernel_problems.deep_model(depth, 5), x, parts=("ntk",)).ntk
    by_numpy = kernel_problems.recursion(x, depth, np)
    # half of the digits are lost on its diagonal
    np.testing.assert_allclose(by_numpy, expected, rtol=1e-6)
    off = ~np.eye(6, dtype=bool)
    np.testing.assert_allclose(by_numpy[off], expected[off], rtol=1e-12)
    with jax.enable_x64(True):
        by_jax = np.asarray(kernel_problems.recursion(jnp.asarray(x), depth, jnp))
    assert by_jax.dtype == np.float64
    np.testing.assert_allclose(by_jax[off], expected[off], rtol=1e-12)


def test_wrong_kernels_fail_the_benchmark(monkeypatch):
    works = kernels.analytic_works(SMALL)
    assert list(works) == ["ours", "jitted jnp", "NumPy"]
    assert works["jitted jnp"]().dtype == jnp.float64
    assert list(kernels.empirical_works(SMALL)) == ["ours", "neural-tangents"]
    recursion = kernel_problems.recursion
    monkeypatch.setattr(
        kernel_problems, "recursion", lambda x, depth, numerics: recursion(x, 2, numerics)
    )
    with pytest.raises(ArithmeticError, match="kernels of ours and jitted jnp differ"):
        kernels.analytic_works(SMALL)
    monkeypatch.setattr(kernel_problems, "empirical_layer_kernels", lambda model, x: [np.eye(8)])
    with pytest.raises(ArithmeticError, match="ours and neural-tangents differ"):
        kernels.empirical_works(SMALL)
    with pytest.raises(ArithmeticError, match="differ"):
        kernel_problems.check_equal({"a": np.ones(2), "b": np.array([1, np.nan])}, 1e-3)


def test_memory_of_the_contraction_holds_a_jacobian():
    memory = kernels.empirical_memory(SMALL)
    params = 5 * 16 + 16 * 16 + 16 * 2
    assert memory["neural-tangents"] >= 8 * 4 * 2 * params
    assert 0 < memory["ours"] < memory["neural-tangents"]


def test_medians_skip_the_first_call():
    calls = []
    found = kernels.medians({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3)
    assert calls == ["a", "b"] * 4
    assert all(value >= 0 for value in found.values())


SUITES = (
    (kernels.AnalyticNtk, (12,)),
    (kernels.AnalyticLayers, (8, 3)),
    (kernels.EmpiricalLayers, (16, 4)),
)


def test_suites_name_their_parameters_and_no_helper_has_a_name_of_asv():
    for suite, case in SUITES:
        assert len(suite.params) == len(suite.param_names) == len(case)
        tracks = [getattr(suite, name) for name in dir(suite) if name.startswith("track_")]
        assert tracks
        assert all(track.unit and track.__doc__ for track in tracks)
    for module in (kernels, kernel_problems):
        assert not [n for n in vars(module) if re.match(r"(time|mem|peakmem|track)_", n)]


def test_suites_run(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "HERE", SMALL)
    monkeypatch.setattr(kernels, "REPEATS", 1)
    for kind, case in SUITES:
        suite = kind()
        suite.setup(str(tmp_path), *case)
        for name in [name for name in dir(suite) if name.startswith("track_")]:
            assert getattr(suite, name)(str(tmp_path), *case) > 0
    assert 0 < suite.track_memory_ratio_to_contraction() < 1


def test_regular_profile_is_what_the_command_measures():
    assert kernel_problems.PROFILE_SIZES["regular"] is kernels.SIZES == Sizes()
    assert list(kernel_problems.PROFILE_SIZES) == list(PROFILES)


def test_layers_that_do_not_sum_to_the_kernel_fail():
    works = kernel_problems.layer_works(kernels.make_inputs(6, 5), 3)
    assert len(works["layers"]()) == 3
    kernel_problems.check_sum(works)
    layers = works["layers"]
    with pytest.raises(ArithmeticError, match="all layers and the whole network differ"):
        kernel_problems.check_sum(works | {"layers": lambda: layers()[1:]})


def test_command_line(tmp_path, capsys):
    out = tmp_path / "kernels.json"
    kernels.main(["--markdown", "--repeats", "1", "--out", str(out)], SMALL)
    printed = capsys.readouterr().out
    assert "| analytic NTK, L=3, N=12, M_0=5: ours / NumPy |" in printed
    assert "5-16-16-2, N=4, float64" in printed
    assert f"jax {jax.__version__}" in printed
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == 6
    assert all(row["floor"] and row["value"] > 0 for row in rows)
    assert list(rows[3]["seconds"]) == ["L=2", "L=3", "L=4"]
    kernels.main(["--only", "layers", "--repeats", "1"], SMALL)
    assert "all 3 layer kernels / their sum" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        kernels.main(["--repeats", "0"], SMALL)
