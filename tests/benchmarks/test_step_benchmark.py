"""The benchmark of a step runs, and measures what it says; nothing here looks at times."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import natgrad_flax as ng
from benchmarks import problems, step
from benchmarks.problems import LINES, STRUCTURES, Line, make_problem


def small(line: Line) -> Line:
    outputs = line.widths[-1]
    return dataclasses.replace(line, widths=(9, 8, 7, min(outputs, 3)), num_samples=6)


def leaves(state: nnx.State) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(state)])


def test_names_of_the_table() -> None:
    names = ["exact", "block-diag", "tri-diag", "K-FAC", "diagonal", "quasi-diag", "unit-wise"]
    assert step.Step.params == (list(LINES), names)
    assert [list(line.targets) for line in LINES.values()] == [names] * 3
    assert len({type(entry.structure) for entry in STRUCTURES.values()}) == 7


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("line", LINES)
def test_step_applies_the_natural_gradient(line: str, structure: str) -> None:
    where, entry = small(LINES[line]), STRUCTURES[structure]
    steps = step.prepare(where, entry)
    natural, sgd = step.alternate(steps, repeats=1)
    assert len(natural) == 1
    assert len(sgd) == step.SGD_PER_ROUND
    assert step.temporary_bytes(steps.natural_compiled) > 0
    assert step.flops(steps.natural_compiled) > 0

    problem = make_problem(where, entry)
    direction = ng.natural_gradient(
        problem.model,
        problem.x,
        problem.y,
        structure=entry.structure,
        loss=where.loss,
        damping=step.damping(where, entry),
        fisher=where.fisher,
        key=problem.key,
    )
    before = leaves(nnx.state(problem.model))
    expected = before - step.LEARNING_RATE * leaves(direction)
    scale = np.abs(expected - before).max()
    np.testing.assert_allclose(leaves(steps.natural()), expected, atol=1e-3 * scale, rtol=0)

    def loss(state: nnx.State) -> jax.Array:
        return where.loss(nnx.merge(nnx.graphdef(problem.model), state)(problem.x), problem.y)

    slope = leaves(jax.grad(loss)(nnx.state(problem.model)))
    moved = before - step.LEARNING_RATE * slope
    np.testing.assert_allclose(leaves(steps.sgd()), moved, atol=1e-6, rtol=1e-5)


def test_every_structure_takes_its_own_step() -> None:
    line = dataclasses.replace(small(LINES["mse-4096"]), undamped=False)
    # on one network, so that only the structure can make the difference
    ends = [
        leaves(step.prepare(line, dataclasses.replace(entry, bias_variance=0.1)).natural())
        for entry in STRUCTURES.values()
    ]
    for index, end in enumerate(ends):
        for other in ends[:index]:
            assert np.linalg.norm(end - other) > 1e-3


def test_line_decides_the_damping() -> None:
    at = {key: step.damping(LINES["mse-4096"], entry) for key, entry in STRUCTURES.items()}
    undamped = [key for key, value in at.items() if value == 0.0]
    assert undamped == ["exact", "block-diag", "tri-diag", "K-FAC"]
    for line in ("xent-1024", "xent-1024-mc"):
        assert all(step.damping(LINES[line], e) == step.DAMPING for e in STRUCTURES.values())


def test_problem_is_the_same_every_time_and_in_float32() -> None:
    for line in map(small, LINES.values()):
        first, second = (make_problem(line, STRUCTURES["exact"]) for _ in range(2))
        np.testing.assert_array_equal(first.x, second.x)
        np.testing.assert_array_equal(first.y, second.y)
        np.testing.assert_allclose(jnp.linalg.norm(first.x, axis=1), 1.0, rtol=1e-5)
        arrays = [first.x, first.y, *jax.tree.leaves(nnx.state(first.model))]
        assert {array.dtype for array in arrays} == {jnp.dtype(jnp.float32)}


def test_parameters_that_are_not_finite_fail_the_benchmark() -> None:
    steps = step.prepare(small(LINES["mse-4096"]), STRUCTURES["exact"])
    broken = jax.tree.map(lambda leaf: leaf.at[0].set(jnp.nan), steps.state)
    with pytest.raises(FloatingPointError, match="not finite"):
        step.alternate(dataclasses.replace(steps, natural=lambda: broken), repeats=1)


def test_no_helper_bears_a_name_that_asv_takes_for_a_benchmark() -> None:
    for module in (step, problems):
        assert not [name for name in vars(module) if re.match(r"(time|mem|peakmem|track)_", name)]


def test_asv_tracks_and_command_line(
    tmp_path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(LINES, "mse-4096", small(LINES["mse-4096"]))
    suite = step.Step()
    suite.setup("mse-4096", "exact")
    tracks = [name for name in dir(suite) if name.startswith("track_")]
    assert len(tracks) == 4
    for name in tracks:
        assert getattr(suite, name)("mse-4096", "exact") > 0
        assert getattr(suite, name).unit

    out = tmp_path / "step.json"
    where = ["--line", "mse-4096", "--structure", "exact", "diagonal", "--repeats", "2"]
    step.main([*where, "--markdown", "--out", str(out)])
    printed = capsys.readouterr().out
    assert "| 784-4096-4096-1 ReLU, N=100, MSE | diagonal |" in printed
    assert f"jax {jax.__version__}" in printed
    found = json.loads(out.read_text())
    assert [cell["structure"] for cell in found["measurements"]] == ["exact", "diagonal"]
    assert all(len(cell["natural_seconds"]) == 2 for cell in found["measurements"])
    step.main(where)
    assert "mse-4096" in capsys.readouterr().out
