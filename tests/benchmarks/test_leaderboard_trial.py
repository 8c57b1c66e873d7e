"""A trial trains as its contestant says, stops where it should, and tells what happened."""

import itertools
import re
import shlex
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version

import numpy as np
import pytest
import toy_leaderboard as toy

import natgrad_flax as ng
from benchmarks.leaderboard import RULES, identity, trial
from benchmarks.leaderboard.contestant import Contestant, in_words
from benchmarks.leaderboard.program import OptaxProgram
from benchmarks.leaderboard.rates import TheoreticalRate
from benchmarks.leaderboard.trial import configuration, execute, next_evaluation
from benchmarks.leaderboard.workload import METRICS
from ntk_analysis import sources as sources_module
from ntk_analysis.names import find


@pytest.fixture(autouse=True)
def _toy(monkeypatch):
    toy.install(monkeypatch)
    yield
    trial._program.cache_clear()
    trial._rate.cache_clear()
    trial._evaluation.cache_clear()


def config(contestant="exact", target=1e-6, **changes):
    known = {"role": "evaluation", "seed": 0}
    arguments = {**known, **changes}
    where = arguments.pop("where", None) or toy.make_workload()
    return configuration(where, contestant, arguments.pop("seed"), target=target, **arguments)


def test_exact_reaches_the_target_in_one_step():
    found = execute(config())
    outcome = found["outcome"]
    # a linear model: one natural-gradient step at 1/alpha = 1 is the least-squares solution
    assert outcome["status"] == "reached"
    assert outcome["steps_to_target"] == outcome["steps"] == 1
    assert outcome["learning_rate"] == pytest.approx(1.0, abs=1e-5)
    assert outcome["rate_note"] == "1/lambda_max on the first batch"
    assert outcome["curve"]["steps"] == [0, 1]
    assert outcome["curve"]["seconds"][1] == outcome["seconds_to_target"] == outcome["seconds"]
    assert outcome["final"] == outcome["best"] == outcome["curve"]["held_out"][1] < 1e-6
    assert min(outcome["compile_seconds"], outcome["preparation_seconds"]) > 0
    parts = ("preparation_seconds", "seconds", "evaluation_seconds")
    total = sum(outcome[name] for name in parts) + outcome["harness_seconds"]
    assert outcome["wall_seconds"] == pytest.approx(total)
    facts = found["facts"]
    assert re.fullmatch(r"([0-9a-f]{12}.*)?", facts.pop("commit"))
    assert facts.pop("natgrad") == version("natgrad")
    assert facts == {
        "submitter": "",
        "title": "Exact",
        "family": "natural-gradient",
        "structure": "Exact",
        "fisher": "true",
        "damping": "none: pseudo-inverse",
        "rate_rule": "theoretical",
        "ruleset": "self-tuning",
        "expectation": "",
        "expected": "",
        "workload_title": "a line through eight points",
        "question": "Does anything work?",
        "metric": "held-out mean squared error",
        "why_target": "",
    }


def test_curve_is_gradient_descent():
    outcome = execute(config("sgd", 1e-12, learning_rate=0.3))["outcome"]
    assert outcome["status"] == "missed"
    assert outcome["reason"] == "60 steps are over"
    assert outcome["steps"] == 60
    assert outcome["steps_to_target"] is None
    data, weights = toy.data(), toy.as_array(toy.nnx.state(toy.model(0))).astype(np.float64)
    x, y = data.x_train.astype(np.float64), data.y_train.astype(np.float64)[:, 0]
    held_out = []
    for _ in range(61):
        held_out.append(toy.mean_squared_error(weights, data.x_held_out, data.y_held_out))
        weights -= 0.3 * x.T @ (x @ weights / np.sqrt(3) - y) / np.sqrt(3) / 8
    chosen = [held_out[step] for step in outcome["curve"]["steps"]]
    np.testing.assert_allclose(outcome["curve"]["held_out"], chosen, rtol=1e-3, atol=1e-7)
    # 1/(2N) sum |f - y|^2 at the start
    first = toy.mean_squared_error(toy.as_array(toy.nnx.state(toy.model(0))), *data[:2]) / 2
    assert outcome["curve"]["train"][0] == pytest.approx(first, rel=1e-5)


def test_the_program_of_a_contestant_serves_all_rates_and_seeds():
    first = execute(config("sgd", 1e-12, learning_rate=0.1, seed=0))["outcome"]
    other = execute(config("sgd", 1e-12, learning_rate=0.3, seed=0))["outcome"]
    seeded = execute(config("sgd", 1e-12, learning_rate=0.3, seed=1))["outcome"]
    assert first["compile_seconds"] == other["compile_seconds"] == seeded["compile_seconds"]
    starts = [entry["curve"]["held_out"][0] for entry in (first, other, seeded)]
    assert starts[0] == starts[1] != starts[2]
    assert first["final"] != other["final"]
    again = execute(config("sgd", 1e-12, learning_rate=0.1, seed=0))["outcome"]
    assert again["curve"]["held_out"] == first["curve"]["held_out"]


def test_what_a_structure_refuses_is_a_result(monkeypatch):
    def refused(workload, rate, seed):
        return ng.natural_gradient_descent(
            rate, structure=ng.LayerWise(((1.0, 0.5), (0.5, 1.0))), loss=workload.loss
        )

    entry = Contestant(
        "layers", "Two layers", "natural-gradient", "theoretical", refused,
        structure=ng.BlockDiagonal(), fisher="exact", damping=0.0,
    )  # fmt: skip
    toy.install(monkeypatch, members={"layers": entry})
    outcome = execute(config("layers"))["outcome"]
    assert outcome["status"] == "skipped"
    assert "2 x 2" in outcome["reason"] or "layer" in outcome["reason"]


def test_divergence_stops_a_trial():
    outcome = execute(config("sgd", learning_rate=30.0))["outcome"]
    assert outcome["status"] == "diverged"
    assert re.fullmatch(r"training loss .* after \d steps, 0.852 before", outcome["reason"])
    assert 1 < outcome["steps"] < 10
    assert outcome["seconds_to_target"] is None
    # what is not finite is null, as JSON has it
    outcome = execute(config("sgd", learning_rate=1e30))["outcome"]
    assert outcome["status"] == "diverged"
    assert outcome["curve"]["train"][-1] is None


def test_the_budget_in_seconds_ends_a_trial(monkeypatch):
    short = toy.install(monkeypatch, toy.make_workload(max_seconds=0.0))
    outcome = execute(config("sgd", 1e-12, learning_rate=0.1, where=short))["outcome"]
    assert outcome["status"] == "missed"
    assert outcome["reason"] == "0 s of training are over after 0 steps"


def test_mini_batches_are_epochs(monkeypatch):
    small = toy.install(monkeypatch, toy.make_workload(batch_size=3))
    batches = list(itertools.islice(trial.batches(small, 5), 6))
    for first in (0, 2, 4):
        rows = np.concatenate(batches[first : first + 2])
        assert len(set(rows)) == 6
    assert not np.array_equal(batches[0], batches[2])
    again = next(trial.batches(small, 5))
    np.testing.assert_array_equal(again, batches[0])
    program = OptaxProgram(toy.CONTESTANTS["sgd"], small)
    state = program.step(program.start(0, 0.5), batches[0])
    data = toy.data()
    x, y = data.x_train[batches[0]], data.y_train[batches[0]]
    start = toy.as_array(toy.nnx.state(toy.model(0)))
    slope = x.T @ (x @ start[:, None] / np.sqrt(3) - y) / np.sqrt(3) / 3
    moved = toy.as_array(program.parameters(state))
    np.testing.assert_allclose(moved, start - 0.5 * slope[:, 0], rtol=1e-5, atol=1e-6)
    skipped = execute(config("lbfgs", where=small))["outcome"]
    assert skipped == {"status": "skipped", "reason": "it wants the whole batch"}


def test_line_search_needs_no_rate():
    outcome = execute(config("lbfgs"))["outcome"]
    assert outcome["status"] == "reached"
    assert outcome["rate_note"] == "line search"
    assert outcome["steps"] < 30


def test_structure_trial():
    found = execute(config(kind="structure", role="structure", target=None))
    outcome = found["outcome"]
    assert outcome["status"] == "measured"
    # 8 samples in 3 dimensions: Theta-bar is a projector of rank 3
    assert outcome["alpha"] == pytest.approx(3 / 8)
    assert outcome["condition_number"] is None
    assert outcome["flops"] > outcome["sgd_flops"] > 0
    assert outcome["nonzeros"] == 9
    nothing = execute(config("sgd", None, kind="structure", role="structure", learning_rate=0.1))
    assert nothing["outcome"]["status"] == "skipped"


def test_missing_data_is_a_result(monkeypatch):
    where = toy.install(monkeypatch, toy.make_workload(dataset="cifar10"))
    monkeypatch.setenv("NATGRAD_DATA", "/nonexistent")
    monkeypatch.setattr("natgrad_datasets.status", lambda: [])
    from benchmarks.leaderboard import workload

    workload._missing.cache_clear()
    found = execute(config(where=where))["outcome"]
    workload._missing.cache_clear()
    assert found["status"] == "skipped"
    assert "cifar10 is not on this machine; set NATGRAD_DATA" in found["reason"]


def test_configuration_holds_what_makes_a_trial():
    one = config()
    assert one["rules"] == RULES
    assert set(one["environment"]) >= {"jax", "optax", "device", "processor", "cores"}
    assert "natgrad" not in one["environment"]
    assert all(isinstance(value, str) for value in one["environment"].values())
    assert len(one["code"]) == 64
    words = shlex.split(execute(config("sgd", None, learning_rate=0.1, seed=3))["command"])
    assert words[3:] == [
        "trial", "toy", "sgd", "--seed", "3", "--learning-rate", "0.1", "--no-target"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("entry", "value", "message"),
    [
        ("rules", "0.9", "of other rules, 0.9"),
        ("code", "0" * 64, "of another harness, 000000000000"),
        ("sources", "0" * 64, "of other sources of its contestant, 000000000000"),
        ("workload_version", 7, "of another version of the workload, 7"),
        ("workload_digest", "f" * 64, "of other settings of the workload, ffffffffffff"),
        ("contestant", "exakt", "did you mean 'exact'"),
        ("workload", "toi", "did you mean 'toy'"),
    ],
)
def test_a_trial_of_something_else_is_refused(entry, value, message):
    with pytest.raises(ValueError, match=message):
        execute({**config(), entry: value})
    with pytest.raises(ValueError, match="is tuned: its trials need a learning rate"):
        execute(config("sgd"))


def test_contestants_are_not_given_what_they_are_judged_on():
    seen = []

    def optimizer(workload, rate, seed):
        seen.append(workload.data())
        return toy.optax.sgd(rate)

    entry = replace(toy.CONTESTANTS["sgd"], optimizer=optimizer)
    program = OptaxProgram(entry, toy.make_workload().training_only())
    assert program.compile_seconds > 0
    assert {data.x_train.shape for data in seen} == {(8, 3)}
    assert {(len(data.x_held_out), len(data.y_held_out)) for data in seen} == {(0, 0)}


def test_the_key_of_a_trial_follows_its_own_sources_alone(tmp_path, monkeypatch):
    """An entry and what stands beside it; no other contestant, and no word of a docstring."""
    file, beside, other = (tmp_path / f"{name}.py" for name in ("mine", "beside", "other"))
    beside.write_text("x = 1")
    other.write_text("x = 1")
    keys = []
    for text, rate in (
        ('"""One."""\nimport beside', 1), ('"""Two."""\nimport beside', 1),
        ("import beside\ny = 1", 1), ("import beside", 2),
    ):  # fmt: skip
        file.write_text(text)
        beside.write_text(f"x = {rate}")
        other.write_text(f"x = {len(keys)}")
        for cached in (sources_module._code, sources_module._tree, sources_module._bound,
                       sources_module._attributes, sources_module.import_digest,
                       sources_module.imported_modules, identity.sources):  # fmt: skip
            cached.cache_clear()
        keys.append(identity.sources(replace(toy.CONTESTANTS["sgd"], source=file)))
    assert keys[0] == keys[1]
    assert len(set(keys)) == 3


def test_installing_the_package_of_a_peer_makes_another_trial(monkeypatch):
    where = toy.make_workload()
    peer = replace(toy.CONTESTANTS["sgd"], name="peer", packages=("kfac-jax",))
    toy.install(monkeypatch, members={**toy.CONTESTANTS, "peer": peer})
    monkeypatch.setattr(identity, "version", lambda name: "0.0.8")
    with_it = configuration(where, "peer", 0, target=None, role="evaluation")
    assert with_it["packages"] == {"kfac-jax": "0.0.8"}

    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(identity, "version", missing)
    without = configuration(where, "peer", 0, target=None, role="evaluation")
    assert without["packages"] == {"kfac-jax": None}
    assert "packages" not in configuration(where, "sgd", 0, target=None, role="evaluation")


def test_theory_has_rates_for_structures_only():
    where = toy.make_workload()
    sgd, exact = toy.CONTESTANTS["sgd"], toy.CONTESTANTS["exact"]
    with pytest.raises(ValueError, match="sgd has no Fisher structure"):
        TheoreticalRate(sgd, where, OptaxProgram(sgd, where))
    wide = toy.make_workload(model=lambda seed: ng.MLP((3, 64, 1), rngs=toy.nnx.Rngs(seed)))
    rule = TheoreticalRate(exact, wide, OptaxProgram(exact, wide))
    assert (rule(3), rule.note, rule.compile_seconds) == (1.0, "1/alpha", 0.0)
    entry = Contestant(
        "diagonal", "Diagonal", "natural-gradient", "theoretical",
        structure=ng.Diagonal(), fisher="exact", damping=0.1,
        optimizer=lambda workload, rate, seed: ng.natural_gradient_descent(
            rate, structure=ng.Diagonal(), loss=workload.loss, damping=0.1
        ),
    )  # fmt: skip
    rule = TheoreticalRate(entry, where, OptaxProgram(entry, where))
    model, x = toy.model(5), toy.data().x_train
    assert rule.note == "1/lambda_max on the first batch"
    expected = ng.optimal_learning_rate(ng.Diagonal(), model, x=x, damping=0.1)
    assert rule(5) == pytest.approx(expected, rel=1e-2)
    assert rule.compile_seconds > 0


def test_evaluations_become_rarer():
    steps = list(itertools.accumulate(range(80), lambda step, _: next_evaluation(step), initial=0))
    assert steps[:22] == list(range(22))
    assert max(b / a for a, b in itertools.pairwise(steps[21:])) < 1.1
    assert steps[-1] > 300


def test_the_training_loss_can_be_the_metric(monkeypatch):
    where = toy.install(monkeypatch, toy.make_workload(metric="train"))
    outcome = execute(config("sgd", 1e-12, learning_rate=0.3, where=where))["outcome"]
    assert outcome["curve"]["held_out"] == outcome["curve"]["train"]


def test_metrics():
    outputs = np.array([[0.2], [-0.1], [0.3]], np.float32)
    targets = np.array([[0.5], [0.5], [-0.5]], np.float32)
    assert METRICS["error"].function(outputs, targets) == pytest.approx(2 / 3)
    wanted = np.mean((outputs - targets) ** 2)
    assert METRICS["mse"].function(outputs, targets) == pytest.approx(wanted)
    assert METRICS["rmse"].function(outputs, targets) == pytest.approx(np.sqrt(wanted))
    classes = np.eye(3, dtype=np.float32)
    assert METRICS["error"].function(classes[[0, 1, 1]], classes) == pytest.approx(1 / 3)


def test_names():
    assert find("workload", " Digits_MSE ", ["digits-mse"]) == "digits-mse"
    with pytest.raises(ValueError, match="unknown workload 'zzz'; known are a, b"):
        find("workload", "zzz", ["a", "b"])


def test_dampings_in_words():
    assert in_words(ng.RelativeDamping(1e-3)) == "0.001 of the mean Gram diagonal"
    assert in_words(0.1).startswith("0.1, added to the Fisher (1/N); 30 times")
    assert in_words(ng.LevenbergMarquardt()).startswith("Levenberg-Marquardt from 1,")
