"""Entries of others: their contract, and their rows beside all that stood there before."""

import itertools
import json
import re
from importlib import import_module
from pathlib import Path

import pytest
import toy_leaderboard as toy
from boards import command

from benchmarks.leaderboard import RULES, board, contestant, entry, trial
from benchmarks.leaderboard.contestant import enlist
from benchmarks.leaderboard.store import Store
from ntk_analysis import sources
from ntk_analysis.sources import import_digest

HEAD = """
import random
import jax
import jax.numpy as jnp
import optax
from benchmarks.leaderboard.contestant import Contestant


def gradient_descent(before, update=lambda state: state):
    def step(gradient, state, parameters=None, **batch):
        return jax.tree.map(lambda g: -0.1 * g * state["x"].sum() / state["x"].size, gradient), (
            update(state))
    return lambda workload, rate, seed: optax.GradientTransformation(lambda p: before(), step)


def entered(optimizer, name="mine", **more):
    return Contestant(**{
        "name": name, "title": "Mine", "family": "first-order", "rate_rule": "tuned",
        "optimizer": optimizer, "rates": (1e-2, 0.1, 0.3, 1.0, 3.0, 10.0), **more})

"""
GOOD = "entered(gradient_descent(lambda: {'x': jnp.ones(2)}))"
numbers = itertools.count()


@pytest.fixture(autouse=True)
def _toy(monkeypatch):
    plain = contestant.contestants
    toy.install(monkeypatch)
    own = {"sgd": toy.CONTESTANTS["sgd"], "lbfgs": toy.CONTESTANTS["lbfgs"]}
    monkeypatch.setattr(contestant, "_enlisted", {})
    monkeypatch.setattr(contestant, "_built_in", lambda: own)
    for module in (contestant, import_module("benchmarks.leaderboard.plan")):
        monkeypatch.setattr(module, "contestants", plain)
    monkeypatch.setattr(entry, "SMOKE", ("toy",))
    yield
    trial._program.cache_clear()
    trial._rate.cache_clear()
    trial._evaluation.cache_clear()


@pytest.fixture
def file(tmp_path):
    def written(*members, name=None):
        path = tmp_path / f"{name or f'entry_{next(numbers)}'}.py"
        path.write_text(f"{HEAD}CONTESTANTS = ({', '.join(members)},)\n")
        return path

    return written


def check(path):
    return [sentence for member in enlist(path) for sentence in entry.check_entry(member)]


def test_an_entry_that_keeps_the_rules(file):
    told = check(file(GOOD))
    assert len(told) == 3
    assert "equal, number by number" in told[1]


@pytest.mark.parametrize(
    ("member", "says"),
    [
        ("1", "CONTESTANTS of .* has 1, which is no Contestant"),
        ("entered(None)", "mine has neither optimizer= nor program="),
        ("entered(None, family='mine')", "family is one of first-order, .* got 'mine'"),
        ("entered(None, name='Mine!')", "lower case with hyphens, got 'Mine!'"),
        (GOOD[:-1] + ", name='sgd')", "two contestants are called 'sgd'"),
        ("entered(lambda w, rate, seed: 1 / 0)", "does not compile on toy, ZeroDivisionError"),
        ("entered(gradient_descent(lambda: {'x': jnp.asarray(random.random())}))",
         "mine is not deterministic: two runs of 10 steps from seed 0 differ"),
        ("entered(lambda w, rate, seed: optax.sgd(rate * random.random()))",
         "mine is not deterministic: two runs of 10 steps from seed 0 differ"),
        ("entered(lambda w, rate, seed: optax.sgd(rate), rates=(), rate_rule='theoretical')",
         "mine has no structure=, and theory no rate for it"),
        ("entered(gradient_descent(lambda: {'x': jnp.ones(2)}, "
         "lambda s: {'x': jnp.concatenate([s['x'], s['x']])}))",
         r"state\[1\]\['x'\] is float32\(4,\) after a step and float32\(2,\) before"),
        ("entered(gradient_descent(lambda: {'x': jnp.ones(2)}, "
         "lambda s: (jax.debug.print('x'), s)[1]))", "mine calls Python in its step"),
        ("entered(gradient_descent(lambda: {'x': jnp.asarray(jnp.nan)}))",
         "parameters that are not finite after 10 steps"),
        ("entered(lambda w, rate, seed: optax.sgd(rate * w.data().x_held_out[0, 0]))",
         "does not compile on toy"),
        ("entered(lambda w, rate, seed: optax.sgd(rate), unsuitable=lambda w: 'too small')",
         "mine takes part in no smoke workload; toy: too small"),
    ],
)  # fmt: skip
def test_an_entry_that_does_not_keep_them_is_refused(file, member, says):
    with pytest.raises(ValueError, match=says):
        check(file(member))


def test_what_is_no_entry_at_all(tmp_path, file):
    with pytest.raises(ValueError, match="is no Python file"):
        enlist(tmp_path)
    path = file("nowhere")
    with pytest.raises(ValueError, match="cannot be imported, NameError"):
        enlist(path)
    path.write_text("raise SystemExit(3)")
    with pytest.raises(ValueError, match=r"ends the program while it is imported \(exit code 3\)"):
        enlist(path)
    path.write_text("x = 1")
    with pytest.raises(ValueError, match="has no CONTESTANTS"):
        enlist(path)


def test_a_row_more_leaves_all_earlier_rows(tmp_path, file, monkeypatch):
    """Two baselines, then an entry, then another version of it: nothing vanishes or runs again."""
    monkeypatch.setattr("benchmarks.leaderboard.plan._target", lambda name: 0.05)
    out = tmp_path / "out"
    code, text = command("run", "--out", out, "--contestant", "sgd", "--contestant", "lbfgs")
    assert code == 0, text
    before = {record["key"] for record in Store.open(out, RULES).records()}
    path = file(GOOD, name="mine")
    code, text = command("add", path, "--out", out, "--submitter", "Someone")
    assert code == 0, text
    assert "10 trials run" in text  # five for each of the two seeds' studies
    assert "2 trials run" in text  # one for each seed
    records = Store.open(out, RULES).records()
    new = [record for record in records if record["key"] not in before]
    assert before < {record["key"] for record in records}
    assert {record["config"]["contestant"] for record in new} == {"mine"}
    assert {record["facts"]["submitter"] for record in new} == {"Someone"}
    assert all("--entry mine.py" in record["command"] for record in new)
    assert all(name in text for name in ("sgd", "lbfgs", "mine"))
    readme = (Path(__file__).parents[2] / "benchmarks" / "README.md").read_text()
    columns = readme[readme.index("| column |") : readme.index("A killed run")]
    for part in ("config", "outcome"):
        assert {f"`{name}`" for r in records for name in r[part]} <= set(
            re.findall("`.*?`", columns)
        )
    page = (out / "leaderboard.html").read_text()
    assert "Someone" in page

    for text, more in ((path.read_text(), 0), (path.read_text().replace("-0.1", "-0.2"), 12)):
        path.write_text(text)
        contestant._enlisted.clear()
        for function in (trial._program, import_digest, sources._code, sources._tree):
            function.cache_clear()
        code, text = command("add", path, "--out", out)
        assert code == 0, text
        assert len(Store.open(out, RULES).records()) == len(records) + more
    monkeypatch.chdir(tmp_path.parent)
    again = trial.command(records[-1]["config"] | {"contestant": "mine"})
    assert f"--entry {tmp_path.name}/mine.py" in again
    (device,) = board.build(Store.open(out, RULES).records())["devices"]
    rows = {row["contestant"]: row for row in device["rows"]}
    assert set(rows) == {"sgd", "lbfgs", "mine"}
    assert [version["submitter"] for version in rows["mine"]["earlier"]] == ["Someone"]


def test_an_entry_runs_and_ranks_on_some_workloads_of_a_board(tmp_path, file, monkeypatch):
    both = {name: toy.make_workload(name=name) for name in ("toy", "other")}
    for module in ("workload", "plan"):
        monkeypatch.setattr(f"benchmarks.leaderboard.{module}.workloads", lambda: both)
    monkeypatch.setattr("benchmarks.leaderboard.plan._target", lambda name: 0.05)
    out = tmp_path / "out"
    assert command("run", "--contestant", "lbfgs", "--workload", "toy", "--workload", "other",
                   "--out", out)[0] == 0  # fmt: skip
    path = file(GOOD)
    code, text = command("add", path, "--out", out, "--workload", "Toy")
    assert code == 0, text
    found = [record["config"] for record in Store.open(out, RULES).records()]
    ran = {(config["contestant"], config["workload"]) for config in found}
    assert ran == {("lbfgs", "toy"), ("lbfgs", "other"), ("mine", "toy")}

    def on_page():
        text = (out / "leaderboard.html").read_text()
        data = json.loads(re.search(r'id="data">(.*?)</script>', text)[1])
        return [workload["name"] for workload in data["devices"][0]["workloads"]]

    assert on_page() == ["toy"]
    assert command("page", "--out", out)[0] == 0
    assert on_page() == ["other", "toy"]
    readme = tmp_path / "README.md"
    readme.write_text("<!-- leaderboard: begin -->\n<!-- leaderboard: end -->")
    chosen = ("--workload", "other")
    assert command("page", "--out", out, "--readme", readme, *chosen)[0] == 0
    for text in (readme.read_text(), command("score", "--out", out, *chosen)[1]):
        assert ("other" in text, "toy" in text, "mine" in text) == (True, False, False)
    code, text = command("score", "--out", out, "--workload", "toi")
    assert (code, "did you mean 'toy'" in text) == (2, True)


def test_a_row_of_an_entry_is_repeated_from_its_file(file, tmp_path):
    path, store = file(GOOD), Store.open(tmp_path / "board", RULES)
    enlist(path)
    toys = trial.find_workload("toy")
    config = trial.configuration(toys, "mine", 0, target=0.05, role="evaluation", learning_rate=0.3)
    key = store.write(config, trial.execute(config))["key"]
    contestant._enlisted.clear()  # as in a process of its own
    code, text = command("refute", key, "--rerun", "--out", store.folder)
    assert (code, "give its file by --entry" in text) == (2, True)
    other = file(GOOD[:-1] + ", name='other')")
    code, text = command("refute", key, "--rerun", "--entry", other, "--out", store.folder)
    assert (code, "has no contestant 'mine'" in text) == (2, True)
    code, text = command("refute", key, "--rerun", "--entry", path, "--out", store.folder)
    assert (code, "confirmed" in text) == (0, True), text


def test_the_commands_say_what_is_wrong(tmp_path, file):
    code, text = command("check-entry", tmp_path / "nowhere.py")
    assert (code, "is no Python file" in text) == (2, True)
    ended = file(GOOD)
    ended.write_text("raise SystemExit(3)")
    code, text = command("check-entry", ended)
    assert (code, "ends the program while it is imported (exit code 3)" in text) == (2, True)
    three = file("entered(None, name='one')", GOOD, "entered(None, name='two')")
    code, text = command("check-entry", three)
    assert code == 2
    for said in ("one has neither", "mine keeps the rules", "two has neither"):
        assert said in text
    contestant._enlisted.clear()
    code, text = command("check-entry", file(GOOD))
    assert (code, f"mine keeps the rules {RULES}" in text) == (0, True)
    code, text = command("export", tmp_path / "x.jsonl", "--out", tmp_path / "nowhere")
    assert (code, "holds no leaderboard" in text) == (2, True)
