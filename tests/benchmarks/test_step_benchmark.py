"""The benchmark of a step runs, and measures what it says; nothing here looks at times."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import natgrad_flax as ng
from benchmarks import answers, networks, programs, step
from benchmarks.problems import (
    LINES,
    OPTIMIZERS,
    PERIOD,
    STRUCTURES,
    Case,
    Entry,
    Line,
    make_problem,
)
from natgrad_flax.optimizer.gradient import resolve_damping
from natgrad_flax.signals.base import LayerUpdate, ravel
from natgrad_flax.signals.dense import Signals
from natgrad_flax.signals.fisher import fisher_signals
from natgrad_flax.signals.gradient import Residual
from ntk_analysis.gradient_descent import GradientDescent


def small(line: Line) -> Line:
    if line.network:
        return networks.line_of(f"small {line.network}")
    outputs = line.widths[-1]
    return dataclasses.replace(line, widths=(9, 8, 7, min(outputs, 3)), num_samples=6)


def leaves(state: nnx.State) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(state)])


def test_names_of_the_table() -> None:
    names = ["exact", "block-diag", "tri-diag", "K-FAC", "EKFAC", "diagonal", "quasi-diag"]
    names.append("unit-wise")
    assert step.Step.params[0] == names
    assert [list(line.targets) for line in LINES.values()][:3] == [names] * 3
    assert all(set(line.targets) <= set(names) for line in LINES.values())
    assert len({type(entry.structure) for entry in STRUCTURES.values()}) == 8


@pytest.mark.parametrize(
    ("line", "structure"), [*((line, "exact") for line in LINES), ("xent-1024-mc", "quasi-diag")]
)
def test_step_applies_the_natural_gradient(line: str, structure: str) -> None:
    where, entry = small(LINES[line]), STRUCTURES[structure]
    steps = programs.prepare(where, entry)
    natural, sgd = programs.alternate(steps, repeats=1)
    assert len(natural) == 1
    assert len(sgd) == programs.SGD_PER_ROUND
    compiled = steps.natural_compiled
    held = 4 * 2 * len(leaves(steps.state))
    assert programs.planned_bytes(compiled) >= held + programs.temporary_bytes(compiled) > held
    assert programs.flops(compiled) > 0

    problem = make_problem(where, entry)
    graphdef, state = nnx.split(problem.model)

    # one program; op by op the transformer has hundreds
    @jax.jit
    def reference(state: nnx.State) -> tuple[nnx.State, nnx.State]:
        direction = ng.natural_gradient(
            nnx.merge(graphdef, state),
            problem.x,
            problem.y,
            structure=entry.structure,
            loss=where.loss,
            damping=programs.damping(where, entry),
            fisher=where.fisher,
            key=problem.key,
        )
        return direction, jax.grad(
            lambda state: where.loss(nnx.merge(graphdef, state)(problem.x), problem.y)
        )(state)

    direction, gradient = map(leaves, reference(state))
    before = leaves(state)
    expected = before - programs.LEARNING_RATE * direction
    scale = np.abs(expected - before).max()
    np.testing.assert_allclose(leaves(steps.natural()), expected, atol=1e-3 * scale, rtol=0)
    moved = before - programs.LEARNING_RATE * gradient
    np.testing.assert_allclose(leaves(steps.sgd()), moved, atol=1e-6, rtol=1e-5)


def test_an_optimizer_is_timed_over_the_steps_between_renewals() -> None:
    line = small(LINES["xent-1024"])
    problem, adam = make_problem(line), OPTIMIZERS["Adam"]
    graphdef, start = nnx.split(problem.model)

    @jax.jit
    def expected(params: nnx.State) -> nnx.State:
        def step(carry: tuple, _: None) -> tuple:
            params, kept = carry
            slope = jax.grad(lambda p: line.loss(nnx.merge(graphdef, p)(problem.x), problem.y))
            update, kept = adam.update(slope(params), kept, params)
            return (optax.apply_updates(params, update), kept), None

        return jax.lax.scan(step, (params, adam.init(params)), length=PERIOD)[0][0]

    found = programs.prepare_optimizer(line, "Adam").natural()
    np.testing.assert_allclose(leaves(found), leaves(expected(start)), rtol=1e-4, atol=1e-5)


def test_line_decides_the_damping() -> None:
    at = {key: programs.damping(LINES["mse-4096"], entry) for key, entry in STRUCTURES.items()}
    undamped = [key for key, value in at.items() if value == 0.0]
    assert undamped == ["exact", "block-diag", "tri-diag", "K-FAC"]
    for line in ("xent-1024", "xent-1024-mc"):
        assert all(
            programs.damping(LINES[line], e) == ng.RelativeDamping(e.damping or 1e-3)
            for e in STRUCTURES.values()
        )


def test_problem_is_the_same_every_time_and_in_float32() -> None:
    for line in map(small, LINES.values()):
        first, second = (make_problem(line, STRUCTURES["exact"]) for _ in range(2))
        np.testing.assert_array_equal(first.x, second.x)
        np.testing.assert_array_equal(first.y, second.y)
        if not line.network:
            np.testing.assert_allclose(jnp.linalg.norm(first.x, axis=1), 1.0, rtol=1e-5)
        arrays = [first.x, first.y, *jax.tree.leaves(nnx.state(first.model))]
        assert {array.dtype for array in arrays} == {jnp.dtype(jnp.float32)}


def test_parameters_that_are_not_finite_fail_the_benchmark() -> None:
    steps = programs.prepare(small(LINES["mse-4096"]), STRUCTURES["exact"])
    broken = jax.tree.map(lambda leaf: leaf.at[0].set(jnp.nan), steps.state)
    with pytest.raises(FloatingPointError, match="not finite"):
        programs.alternate(dataclasses.replace(steps, natural=lambda: broken), repeats=1)


def smallest(structure: str = "exact") -> tuple[Line, Entry]:
    return Case(8, 3, 6, 3).line(), STRUCTURES[structure]


@pytest.mark.parametrize("structure", STRUCTURES)
def test_reference_metric_is_the_dense_one(structure: str) -> None:
    line, entry = Case(5, 3, 4, 2).line(), STRUCTURES[structure]
    line = dataclasses.replace(line, widths=(6, 5, 5, 2))
    problem = make_problem(line, dataclasses.replace(entry, bias_variance=0.3))
    with jax.enable_x64(True):
        graphdef, state = nnx.split(problem.model)
        state = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), state)
        x, y = (jnp.asarray(np.asarray(array, np.float64)) for array in (problem.x, problem.y))
        size = sum(leaf.size for leaf in jax.tree.leaves(state))
        vector = jnp.asarray(np.random.default_rng(0).normal(size=size))

        @jax.jit
        def both(state: nnx.State) -> tuple[jax.Array, jax.Array]:
            signals, _ = fisher_signals(nnx.merge(graphdef, state), x, y, loss=line.loss)
            rho = resolve_damping(entry.structure, signals, ng.RelativeDamping(0.3))
            applied = answers.metric_times(entry.structure, signals, rho, signals.unravel(vector))
            return ravel(applied), entry.structure.to_dense(signals, rho) @ vector

        np.testing.assert_allclose(*both(state), rtol=1e-10, atol=1e-12)


class PlainGradient(ng.Exact):
    """Solves nothing."""

    def solve(
        self, signals: Signals, residual: Residual, damping: jax.Array | float
    ) -> tuple[LayerUpdate, ...]:
        return residual.vector(signals.layers)


class Scaled(ng.BlockDiagonal):
    """Five per cent too long."""

    def solve(
        self, signals: Signals, residual: Residual, damping: jax.Array | float
    ) -> tuple[LayerUpdate, ...]:
        right = super().solve(signals, residual, damping)
        return jax.tree.map(lambda leaf: 1.05 * leaf, right)


class Uncoupled(ng.Exact):
    """Solves each layer by itself."""

    def solve(
        self, signals: Signals, residual: Residual, damping: jax.Array | float
    ) -> tuple[LayerUpdate, ...]:
        return ng.BlockDiagonal().solve(signals, residual, damping)


@pytest.mark.parametrize("wrong", [PlainGradient(), Scaled(), Uncoupled()], ids=lambda w: w.name)
def test_a_wrong_step_fails_the_benchmark(wrong: ng.Structure) -> None:
    with pytest.raises(ArithmeticError, match=f"the step u of {wrong.name} is wrong"):
        step.measure(Case(8, 3, 6, 3).line(), Entry(wrong), repeats=1)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_right_step_passes_closely(structure: str) -> None:
    line, entry = smallest(structure)
    found = step.measure(dataclasses.replace(line, fisher="mc"), entry, repeats=1)
    assert found.defect < 1e-3
    assert found.scale == pytest.approx(1, abs=1e-4)


def test_the_metric_of_an_unknown_structure_is_its_operator() -> None:
    signals = ng.jacobian_signals(ng.MLP((2, 1), rngs=nnx.Rngs(0)), jnp.ones((3, 2)))
    update = signals.unravel(jnp.array([1.0, 2.0]))
    applied = answers.metric_times(GradientDescent(), signals, 0.0, update)
    np.testing.assert_array_equal(ravel(applied), [1.0, 2.0])
    damped = answers.metric_times(GradientDescent(), signals, 0.5, update)
    np.testing.assert_array_equal(ravel(damped), [1.5, 3.0])


def test_a_setting_without_a_rule_is_refused() -> None:
    with pytest.raises(TypeError, match="split='plain'"):
        answers.metric_times(ng.KFAC(split="pi"), None, 0.0, ())  # type: ignore[arg-type]


def test_asv_figures_are_those_of_one_measurement(
    tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    real = step.measure

    def counted(*case: object) -> step.Measurement:
        calls.append(case)
        return real(*case)  # type: ignore[arg-type]

    monkeypatch.setattr(step, "measure", counted)
    case = ("exact", 8, 3, 6, 3, "cross-entropy", "exact")
    values = {}
    for name in [name for name in dir(step.Step) if name.startswith("track_")]:
        suite = step.Step()
        suite.setup(str(tmp_path), *case)
        values[name] = getattr(suite, name)(str(tmp_path), *case)
    assert len(calls) == 1
    assert values["track_ratio_to_sgd"] == pytest.approx(
        values["track_step"] / values["track_sgd_step"]
    )
    assert 0 < values["track_temporary_memory"] < values["track_peak_memory"]
    assert values["track_flops"] > 0
    with pytest.raises(NotImplementedError, match="softmax of one output"):
        step.Step().setup(str(tmp_path), "exact", 8, 3, 6, 1, "cross-entropy", "exact")


def test_timing_compiles_once_and_checks_before_it_is_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    suite = step.StepTiming()
    case = ("exact", 8, 3, 6, 3, "cross-entropy", "exact")
    suite.setup(*case)
    prepared = suite.steps
    suite.setup(*case)
    assert suite.steps is prepared is not None
    suite.time_step(*case)
    suite.peakmem_step(*case)
    monkeypatch.setitem(STRUCTURES, "exact", Entry(PlainGradient()))
    with pytest.raises(ArithmeticError, match="is wrong"):
        step.StepTiming().setup(*case)


def test_command_line(
    tmp_path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(LINES, "mse-4096", small(LINES["mse-4096"]))
    out = tmp_path / "step.json"
    monkeypatch.setitem(LINES, "xent-1024", small(LINES["xent-1024"]))
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
    step.main(["--line", *LINES, "--structure", "SOAP", "--repeats", "1", "--out", str(out)])
    (cell,) = json.loads(out.read_text())["measurements"]
    assert (cell["line"], cell["structure"], cell["target"]) == ("xent-1024", "SOAP", 1.5)
    assert cell["defect"] is None
