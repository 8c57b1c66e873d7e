"""Plans: equal budgets, the best learning rate, targets that cannot be edited; and the command."""

import json
import re
from dataclasses import replace

import pytest
import toy_leaderboard as toy
from typer.testing import CliRunner

from benchmarks.leaderboard import RULES, cli, plan, targets, trial
from benchmarks.leaderboard.identity import code_version, environment
from benchmarks.leaderboard.store import Store
from benchmarks.leaderboard.studies import TRIALS, TUNING_SEED, rates, tuning_seed
from benchmarks.leaderboard.trial import configuration


@pytest.fixture
def frozen(monkeypatch, tmp_path):
    """The toy, with a target in a folder of the test."""
    where = toy.install(monkeypatch)
    folder = tmp_path / "targets"
    monkeypatch.setattr(targets.target_of, "__defaults__", (folder,))
    monkeypatch.setattr(targets.write_target, "__defaults__", (folder,))
    targets.write_target(where, [record("sgd", 0.3, final=final) for final in (2e-5, 1e-5, 4e-5)])
    yield folder
    trial._program.cache_clear()
    trial._rate.cache_clear()
    trial._evaluation.cache_clear()


def record(contestant, rate, *, role="tuning", target=None, study=0, **outcome):
    config = configuration(
        toy.make_workload(), contestant, tuning_seed(study),
        target=target, role=role, learning_rate=rate,
    )  # fmt: skip
    known = {"status": "missed", "steps": 60, "steps_to_target": None, "final": 1.0}
    facts = toy.CONTESTANTS[contestant].facts()
    return {"config": config, "outcome": {**known, **outcome}, "facts": facts, "command": "again"}


def test_target_says_how_it_was_set(frozen):
    found = targets.target_of(toy.make_workload())
    assert found["target"] == pytest.approx(1.05 * 2e-5)
    assert found["how"].startswith("1.05 times the median held-out mean squared error")
    assert "SGD, over 3 seeds" in found["how"]
    assert "its seeds ended from 1e-05 to 4e-05" in found["how"]
    assert found["baseline"]["learning_rate"] == 0.3
    assert found["baseline"]["values"] == [2e-5, 1e-5, 4e-5]


def test_edited_targets_are_refused(frozen):
    where, path = toy.make_workload(), frozen / "toy.json"
    good = path.read_text()
    document = json.loads(good)
    path.write_text(json.dumps({**document, "target": 1.0}))
    with pytest.raises(ValueError, match=re.escape("toy.json was edited and its version was not")):
        targets.target_of(where)
    path.write_text(good[:-20])
    with pytest.raises(ValueError, match="is no target file"):
        targets.target_of(where)
    path.write_text(good)
    with pytest.raises(ValueError, match="the workload toy was edited"):
        targets.target_of(toy.make_workload(max_steps=61))
    with pytest.raises(ValueError, match="of version 1, the workload has version 2"):
        targets.target_of(toy.make_workload(version=2))
    with pytest.raises(ValueError, match="has a target of version 1; raise the version"):
        targets.write_target(where, [record("sgd", 0.3)])
    path.unlink()
    with pytest.raises(ValueError, match="toy has no target; freeze it with"):
        targets.target_of(where)
    with pytest.raises(ValueError, match="no baseline came to the end"):
        targets.write_target(where, [])


def test_a_training_loss_has_a_floor(tmp_path):
    where = toy.make_workload(metric="train")
    curve = {"steps": [0, 60], "train": [2.0, 1e-9], "held_out": [2.0, 1e-9]}
    targets.write_target(where, [record("sgd", 0.3, final=1e-9, curve=curve)], tmp_path)
    found = targets.target_of(where, tmp_path)
    assert found["target"] == pytest.approx(2e-6)
    assert found["how"].startswith("1e-06 of the initial training loss, below which float32 ends")
    assert found["how"].endswith("and 1 of 1 passed the target, after 60 to 60 steps")
    other = toy.make_workload(metric="train", name="other")
    targets.write_target(other, [record("sgd", 0.3, final=1e-2, curve=curve)], tmp_path)
    assert targets.target_of(other, tmp_path)["target"] == pytest.approx(1.05e-2)


def test_every_tuned_contestant_has_the_same_budget(frozen):
    configs = list(plan.make_plan(seeds=4).tuning())
    assert [config["contestant"] for config in configs] == ["sgd"] * 15
    assert [(config["seed"], config["learning_rate"]) for config in configs] == [
        (1000 + study, rate) for study in range(3) for rate in rates(toy.RATES, study)
    ]
    # two seeds take the findings of two studies, so the third is not run
    fewer = [config["seed"] for config in plan.make_plan(seeds=2).tuning()]
    assert fewer == [1000] * 5 + [1001] * 5
    target = targets.target_of(toy.make_workload())["target"]
    assert {config["target"] for config in configs} == {target}


def test_best_rate_is_the_one_with_the_fewest_steps():
    tried = rates(toy.RATES, 1)

    def best(*trials, target=None):
        return plan.best_rate(toy.RATES, 1, trials, target)

    def at(place, **outcome):
        return record("sgd", tried[place], study=1, **outcome)

    slow, slower = at(0, final=0.1), at(1, final=0.2)
    assert best(slow, slower) == tried[0]
    reached = at(2, status="reached", steps_to_target=50, final=0.3)
    assert best(slow, reached, slower) == tried[2]
    sooner = at(3, status="reached", steps_to_target=49, final=0.3)
    assert best(slow, reached, sooner) == tried[3]
    # a diverged trial never wins, whatever it had on its way
    lost = at(4, status="diverged", final=1e-9)
    assert best(lost, slower) == tried[1]
    assert best(lost) == tried[0]
    for other in ({"code": "0" * 64}, {"seed": tuning_seed(0)}):
        apart = at(4, status="reached", steps_to_target=1)
        apart["config"].update(other)
        assert best(apart, slower) == tried[1]
    assert best(reached, slower, target=0.5) == tried[0]


def test_evaluation_seeds_take_the_rates_of_the_studies_in_turn(frozen):
    """Each study is fastest at another of its five rates; seed s has that of study s mod 3."""
    target = targets.target_of(toy.make_workload())["target"]
    found = [
        record("sgd", rates(toy.RATES, study)[place], study=study, target=target,
               status="reached", steps_to_target=9)
        for study, place in enumerate((3, 1, 2))
    ]  # fmt: skip
    first, second, third = (entry["config"]["learning_rate"] for entry in found)
    assert len({first, second, third}) == 3
    configs = list(plan.make_plan(seeds=5).evaluation(found))
    assert [c["learning_rate"] for c in configs if c["contestant"] == "sgd"] == [
        first, second, third, first, second
    ]  # fmt: skip
    assert [(c["contestant"], c["seed"]) for c in configs] == [
        (name, seed) for name in ("sgd", "lbfgs", "exact") for seed in range(5)
    ]
    assert {c["learning_rate"] for c in configs if c["contestant"] != "sgd"} == {None}
    assert {config["role"] for config in configs} == {"evaluation"}
    structures = list(plan.make_plan().structures())
    assert [(c["contestant"], c["kind"], c["target"]) for c in structures] == [
        ("exact", "structure", None)
    ]


def test_plans_by_name(frozen):
    chosen = plan.make_plan("default", ["TOY"], ["exact", "sgd", "exact"], 5)
    assert chosen == plan.Plan(("toy",), ("exact", "sgd"), 5)
    for arguments, message in (
        (("defualt",), "did you mean 'default'"),
        (("default", ["tyo"]), "did you mean 'toy'"),
        (("default", None, ["sdg"]), "did you mean 'sgd'"),
        (("default", None, None, 0), "seeds must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            plan.make_plan(*arguments)


def test_a_plan_of_one_ruleset(frozen):
    def members(ruleset):
        return plan.make_plan("default", ruleset=ruleset).contestants

    assert members("tuned") == ("sgd",)
    assert members("self-tuning") == ("lbfgs", "exact")
    with pytest.raises(ValueError, match="did you mean 'tuned'"):
        members("tune")


def test_variants_and_their_plain_names():
    assert plan.plain("kfac-mc-lm") == "kfac"
    assert plan.plain("block-tri-diagonal") == "block-tri-diagonal"
    assert plan.plain("exact-tuned") == "exact"
    assert plan.plain("ekfac-average") == "ekfac"
    assert plan.plain("exact-momentum") == "exact"


def test_networks_in_standard_parametrisation_have_their_own_space(monkeypatch, frozen):
    settings = {"samples": 8, "parametrisation": "standard"}
    where = toy.install(
        monkeypatch,
        toy.make_workload(name="stock", settings=settings),
        {
            "sgd": replace(toy.CONTESTANTS["sgd"], standard_rates=(6.0, 1.0)),
            "exact": toy.CONTESTANTS["exact"],
        },
    )
    targets.write_target(where, [record("sgd", 0.3, final=1e-5)])
    made = plan.make_plan()
    tried = [rates((1.0, 6.0), study) for study in range(2)]
    assert tuple(config["learning_rate"] for config in made.tuning()) == tried[0] + tried[1]
    # nothing was found yet: the smallest of each study
    evaluation = [c["learning_rate"] for c in made.evaluation([]) if c["contestant"] == "sgd"]
    assert evaluation == [tried[0][0], tried[1][0]]


def test_best_baseline(frozen):
    with pytest.raises(ValueError, match="no baseline came to the end"):
        plan.best_baseline("toy", [], plan.baselines())
    assert [entry.name for entry in plan.baselines()] == ["sgd", "lbfgs"]
    assert [entry.name for entry in plan.baselines(["SGD"])] == ["sgd"]
    with pytest.raises(ValueError, match="did you mean 'sgd'"):
        plan.baselines(["sdg"])


@pytest.fixture
def command(frozen):
    def call(*arguments):
        return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])

    return call


def test_run_score_page_and_merge(command, tmp_path):
    out = tmp_path / "board"
    result = command("run", "--out", out)
    assert result.exit_code == 0, result.output
    records = Store.open(out, RULES).records()
    roles = [record["config"]["role"] for record in records]
    assert {role: roles.count(role) for role in set(roles)} == {
        "tuning": 2 * TRIALS, "evaluation": 6, "structure": 1
    }  # fmt: skip
    assert (out / "leaderboard.html").exists()
    again = command("run", "--out", out)
    assert "0 trials run" in again.stderr
    assert f"{2 * TRIALS} finished before" in again.stderr
    assert len(Store.open(out, RULES).records()) == len(records)
    assert "exact" in command("score", "--out", out).output
    readme = tmp_path / "README.md"
    readme.write_text("a\n<!-- leaderboard: begin -->\n<!-- leaderboard: end -->\nb\n")
    made = ("--readme", readme, "--command", "the command that made it")
    assert command("page", "--out", out, *made).exit_code == 0
    assert "Exact" in readme.read_text()
    assert "Measured by `the command that made it`" in readme.read_text()
    other = tmp_path / "other"
    merged = command("merge", out, "--out", other)
    assert f"{len(records)} records copied" in merged.output
    by_hand = command("trial", "toy", "exact", "--seed", 1)
    assert json.loads(by_hand.output)["status"] == "reached"
    shown = command("list").output
    assert "toy" in shown
    assert any(line.startswith("toy: ") for line in shown.splitlines())
    assert "SGD" in shown


def test_no_trial_runs_where_compiled_programs_are_kept(command, tmp_path, monkeypatch):
    monkeypatch.setenv(cli.CACHE, str(tmp_path / "compiled"))
    result = command("run", "--out", tmp_path / "board")
    assert result.exit_code == 2
    assert "so that all contestants compile anew" in " ".join(result.stderr.split())
    assert Store.open(tmp_path / "board", RULES).records() == []


def test_freeze_takes_the_best_baseline(command, frozen, tmp_path):
    path = frozen / "toy.json"
    path.unlink()
    result = command("freeze", "toy", "--seeds", 2, "--out", tmp_path / "freezing")
    assert result.exit_code == 0, result.output
    found = json.loads(path.read_text())
    baseline = found["baseline"]
    assert (baseline["contestant"], len(baseline["values"])) in {("sgd", 2), ("lbfgs", 2)}
    median = sum(baseline["values"]) / 2
    assert found["target"] == pytest.approx(1.05 * median, rel=1e-3)
    assert baseline["tried"] == ["sgd", "lbfgs"]
    seeds = [r["config"]["seed"] for r in Store.open(tmp_path / "freezing", RULES).records()]
    tuning = {seed: seeds.count(seed) for seed in sorted(set(seeds)) if seed >= TUNING_SEED}
    assert tuning == {1000: TRIALS + 1, 1001: TRIALS, 1002: TRIALS}
    # the median passes a target that lies 5 % above it
    assert min(filter(None, baseline["steps_to_target"])) <= 60
    assert baseline["code"] == code_version()
    assert baseline["environment"] == environment()
    assert command("freeze", "toy", "--out", tmp_path / "freezing").exit_code == 2


def test_bad_input_is_one_sentence(command, tmp_path):
    for arguments, sentence in (
        (("run", "--profile", "defualt", "--out", tmp_path / "a"), "did you mean 'default'"),
        (("run", "--workload", "toi", "--out", tmp_path / "a"), "did you mean 'toy'"),
        (("run", "--jobs", 0, "--out", tmp_path / "a"), "jobs must be an integer of at least 1"),
        (("score", "--out", tmp_path / "nothing"), "holds no leaderboard"),
        (("page", "--out", tmp_path / "nothing"), "holds no leaderboard"),
        (("merge", tmp_path / "nothing", "--out", tmp_path / "b"), "holds no leaderboard"),
        (("trial", "toy", "sgd"), "its trials need a learning rate"),
        (("trial", "toi", "sgd"), "did you mean 'toy'"),
        (("freeze", "toi"), "did you mean 'toy'"),
        (("freeze", "toy", "--contestant", "exact"), "unknown baseline 'exact'"),
        (("freeze", "toy", "--seeds", 0), "seeds must be at least 1"),
        (("torture", "--kills", 0), "kills must be"),
    ):
        result = command(*arguments)
        assert result.exit_code == 2, arguments
        assert sentence in " ".join(result.stderr.split()), (arguments, result.stderr)
    old = tmp_path / "old"
    Store.open(old, "0.1")
    result = command("run", "--out", old)
    assert result.exit_code == 2
    assert "holds trials of rules '0.1'" in " ".join(result.stderr.split())
