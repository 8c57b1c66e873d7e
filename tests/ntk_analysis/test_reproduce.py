"""The checks of the papers themselves, the runner that keeps their results, and the command."""

from __future__ import annotations

import inspect
import json
import math
import multiprocessing
import os
import time
from dataclasses import replace
from pathlib import Path

import checks_in_processes
import jax.numpy as jnp
import numpy as np
import pytest
from planted_faults import FAULTS
from typer.testing import CliRunner

from ntk_analysis.cli import app
from ntk_analysis.report.comparison import newest_seconds
from ntk_analysis.reproduce import (
    PAPERS,
    find_checks,
    images,
    load_checks,
    processes,
    registry,
    runner,
)
from ntk_analysis.reproduce.bernacchia import autoencoder
from ntk_analysis.reproduce.drawings import figure_number
from ntk_analysis.reproduce.karakida_osawa import common
from ntk_analysis.reproduce.registry import Check, Measurement, MissingDataError, Outcome, below
from ntk_analysis.reproduce.runner import run_checks
from ntk_analysis.reproduce.tables import required_data

CHECKS = load_checks()
ORDER = tuple(place for paper in PAPERS.values() for place in paper.order)
FAST = [check for check in CHECKS if check.fast]


@pytest.mark.parametrize("check", FAST, ids=[check.identifier for check in FAST])
def test_fast_check(check, monkeypatch):
    said: list[str] = []
    outcome = check.run(said.append)
    assert [m for m in outcome.measurements if not m.passed] == []
    assert len(outcome.measurements) >= 2
    assert all(math.isfinite(m.measured) for m in outcome.measurements)
    assert said
    # programs of the run before serve the wrong one, too
    FAULTS[check.identifier].plant(monkeypatch)
    assert not check.run(said.append).passed


def test_catalogue_is_in_the_order_of_the_paper():
    places = [
        max((p for p in ORDER if c.identifier.startswith(p)), key=len, default=None) for c in CHECKS
    ]
    assert None not in places
    assert places == sorted(places, key=ORDER.index)
    assert {c.identifier for c in CHECKS} == {c.identifier for c in registry.registered()}
    for check in CHECKS:
        assert check.title
        assert check.claim
        assert check.setting
        assert bool(check.differs) == (check.origin == "paper, partly")
        assert bool(check.kind) == bool(check.remark)


@pytest.mark.parametrize(
    ("kind", "identifiers"),
    {
        "misprint": "KO-Eq20 BE-Eq21 KE-AppD KE-B1 KE-Eq51 VO-Ex2",
        "too general": "KO-Lem4.3 KO-Thm5.1 BE-Eq18 BE-bottleneck KE-B2",
        "depends on solver or setting": "KO-Fig1b-left KO-Fig1b-right KO-Fig2-left "
        "KO-Fig2-left-small KE-Fig4 KE-Fig4-quick KE-Fig5-NGD BE-Fig1A BE-Fig1B BE-Fig1C BE-Fig1D",
        "misread by us": "KO-Forster KE-Lem2",
    }.items(),
)
def test_remarks_on_claims(kind, identifiers):
    assert {c.identifier for c in CHECKS if c.kind == kind} == set(identifiers.split())


def test_the_earlier_name_of_a_remark_still_works():
    (check,) = find_checks(["ko-lem4.3"])
    with pytest.warns(DeprecationWarning, match="called Check.remark now"):
        assert check.erratum == check.remark


def test_dense_side_against_finite_differences():
    """The explicit Jacobian that the checks rest on."""
    case = common.problem((4, 5, 6, 2), 3, bias_variance=0.3)
    layers = case.model.layers
    for index, jacobian in enumerate(case.train.layers):
        for name, offset in (("kernel", 0), ("bias", layers[index].kernel[...].size)):
            leaf = getattr(layers[index], name)
            start = np.asarray(leaf[...])
            for place in range(0, start.size, 3):
                moved = [start.copy(), start.copy()]
                outputs = []
                for sign, values in zip((1, -1), moved, strict=True):
                    values.reshape(-1)[place] += sign * 1e-6
                    leaf.set_value(values)
                    outputs.append(common.dense(case.model, case.x).outputs)
                leaf.set_value(start)
                slope = (outputs[0] - outputs[1]).reshape(-1) / 2e-6
                np.testing.assert_allclose(jacobian[:, offset + place], slope, atol=1e-7)


# ----- the runner, with checks of our own


class Fakes:
    """Checks that count their calls and can be told to fail, skip, raise or be interrupted."""

    def __init__(self, **verdicts: str) -> None:
        self.calls: list[str] = []
        self.verdicts = verdicts

    def run(self, name: str, report) -> Outcome:
        self.calls.append(name)
        report("measuring")
        verdict = self.verdicts[name]
        if verdict == "skipped":
            raise MissingDataError("this check needs data that are not there")
        if verdict == "error":
            raise RuntimeError("the cable broke")
        if verdict == "interrupt":
            raise KeyboardInterrupt
        measured = np.float32(0.5) if verdict == "passed" else math.inf
        return Outcome(
            (below("a small number", measured, 1.0), Measurement("one", 1.0, "1", np.True_)),
            data={"curve": np.arange(3.0), "scalar": jnp.ones(()), "bad": [math.nan]},
            notes=("a note of " + name,),
        )

    def checks(self) -> list[Check]:
        return [
            Check(
                name,
                f"title of {name}",
                "claim",
                "setting",
                "ours",
                lambda report, name=name: self.run(name, report),
                kind="misprint" if name == "B" else "",
                remark="a sign" if name == "B" else "",
                fast=name == "A",
            )
            for name in self.verdicts
        ]


def read(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def test_records_hold_what_a_reader_needs(tmp_path):
    fakes = Fakes(A="passed", B="failed", C="skipped", D="error", E="passed")
    said: list[tuple[str, int]] = []
    result = run_checks(fakes.checks(), tmp_path, report=lambda *what: said.append(what))
    document = read(tmp_path)
    assert document["command"] == "natgrad reproduce"
    assert {"jax", "device"} <= set(document["environment"])
    checks = document["checks"]
    assert {k: v["verdict"] for k, v in checks.items()} == fakes.verdicts
    assert fakes.calls == list("ABCDE")
    assert checks["A"]["measurements"][0] == {
        "what": "a small number", "measured": 0.5, "expected": "≤ 1", "passed": True,
    }  # fmt: skip
    assert checks["A"]["data"] == {"curve": [0, 1, 2], "scalar": 1, "bad": [None]}
    assert checks["A"]["notes"] == ["a note of A"]
    assert checks["B"]["measurements"][0]["measured"] is None
    assert checks["B"]["remark"] == "a sign"
    assert "not there" in checks["C"]["reason"]
    assert checks["D"]["reason"] == "RuntimeError: the cable broke"
    assert checks["D"]["measurements"] == []
    for record in checks.values():
        assert {"title", "claim", "setting", "origin", "seconds", "date"} <= set(record)
        assert {"device", "natgrad"} <= set(record)
    assert result.with_verdict("passed") == ["A", "E"]
    assert sum(done for _, done in said) == 5
    assert ("A: measuring", 0) in said


def test_a_second_run_repeats_what_did_not_finish(tmp_path):
    fakes = Fakes(A="passed", B="failed", C="skipped", D="error")
    run_checks(fakes.checks(), tmp_path)
    fakes.calls.clear()
    result = run_checks(fakes.checks(), tmp_path)
    assert fakes.calls == ["C", "D"]
    assert result.resumed == ("A", "B")
    fakes.calls.clear()
    assert run_checks(fakes.checks(), tmp_path, fresh=True).resumed == ()
    assert fakes.calls == list("ABCD")


def test_interruption_keeps_what_is_finished(tmp_path):
    fakes = Fakes(A="passed", B="interrupt", C="passed")
    with pytest.raises(KeyboardInterrupt):
        run_checks(fakes.checks(), tmp_path)
    assert list(read(tmp_path)["checks"]) == ["A"]
    fakes.verdicts["B"] = "passed"
    run_checks(fakes.checks(), tmp_path)
    assert fakes.calls == ["A", "B", "B", "C"]


def test_results_of_other_checks_stay(tmp_path):
    fakes = Fakes(A="passed", B="passed")
    first, second = fakes.checks()
    run_checks([first], tmp_path)
    result = run_checks([second], tmp_path)
    assert list(read(tmp_path)["checks"]) == ["A", "B"]
    assert list(result.records) == ["B"]


def test_other_versions_and_other_sources_run_again(tmp_path, monkeypatch):
    fakes = Fakes(A="passed", B="passed")
    checks = fakes.checks()
    run_checks(checks, tmp_path)
    # the same identifier, from another module
    run_checks([replace(checks[0], run=_from_elsewhere(checks[0]))], tmp_path)
    assert fakes.calls == ["A", "B", "A"]
    versions = {**runner.environment(), "jax": "0.0"}
    monkeypatch.setattr(runner, "environment", lambda: versions)
    run_checks(checks[1:], tmp_path)
    assert fakes.calls == ["A", "B", "A", "B"]
    assert list(read(tmp_path)["checks"]) == ["B"]


def test_another_release_of_the_same_source_runs_nothing_again(tmp_path, monkeypatch):
    fakes = Fakes(A="passed")
    run_checks(fakes.checks(), tmp_path)
    versions = {**runner.environment(), "natgrad": "99.0"}
    monkeypatch.setattr(runner, "environment", lambda: dict(versions))
    run_checks(fakes.checks(), tmp_path)
    assert fakes.calls == ["A"]
    assert read(tmp_path)["checks"]["A"]["natgrad"] != "99.0"


def test_a_killed_process_loses_only_what_was_not_finished(tmp_path, monkeypatch):
    monkeypatch.setenv(checks_in_processes.FOLDER, str(tmp_path))
    good, bad = checks_in_processes.here, checks_in_processes.killed
    checks = [checks_in_processes.make(name, run) for name, run in (("A", good), ("B", bad))]
    other = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,))
    other.start()
    result = run_checks(checks, tmp_path, jobs=2)
    records = read(tmp_path)["checks"]
    assert records["A"]["verdict"] == "passed"
    assert records["A"]["data"]["process"] != os.getpid()
    assert "ended from outside" in records["B"]["reason"]
    assert result.with_verdict("error") == ["B"]
    # what somebody else started goes on
    assert multiprocessing.active_children() == [other]
    other.kill()
    other.join()
    checks[1] = checks_in_processes.make("B", good)
    again = run_checks(checks, tmp_path)
    assert (again.resumed, again.with_verdict("passed")) == (("A",), ["A", "B"])


def test_checks_side_by_side_find_room():
    large, other, small = (
        replace(check, memory=memory)
        for check, memory in zip(
            Fakes(A="passed", B="passed", C="passed").checks(), (8, 7, 3), strict=True
        )
    )
    begin = processes._next
    assert begin([large, other, small], [], 10) is large
    assert begin([other, small], [large], 11) is small
    assert begin([other, small], [large], 15) is other
    assert begin([other, small], [large], 10) is None
    # more than there is: alone, it is tried
    assert begin([large], [], 5) is large


def test_no_processes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="jobs must be an integer of at least 1, got 0"):
        run_checks(Fakes(A="passed").checks(), tmp_path, jobs=0)
    assert not list(tmp_path.iterdir())


def _from_elsewhere(check: Check):
    def run(report):
        return check.run(report)

    run.__module__ = "json"
    return run


@pytest.mark.parametrize("content", ["{", "[]", '{"command": "natgrad dynamics"}'])
def test_other_files_are_left_alone(tmp_path, content):
    (tmp_path / "results.json").write_text(content, encoding="utf-8")
    fakes = Fakes(A="passed")
    with pytest.raises(ValueError, match="choose another --out"):
        run_checks(fakes.checks(), tmp_path)
    assert fakes.calls == []
    assert (tmp_path / "results.json").read_text(encoding="utf-8") == content


# ----- the command


def natgrad(*args: object):
    return CliRunner().invoke(app, ["reproduce", *(str(arg) for arg in args)])


@pytest.fixture
def fakes(monkeypatch) -> Fakes:
    made = Fakes(A="passed", B="passed", C="skipped")
    monkeypatch.setattr(registry, "_CHECKS", {c.identifier: c for c in made.checks()})
    return made


def test_list():
    result = natgrad("--list")
    assert result.exit_code == 0
    for check in CHECKS:
        assert check.identifier in result.stdout
    assert "misprint" in result.stdout
    fast = natgrad("--list", "--fast").stdout
    assert "KO-Thm4.1" in fast
    assert "KO-Thm5.1-training" not in fast
    drawn = natgrad("--list", "--paper", "vo", "--figures").stdout
    shown = ["VO-Eq2", "VO-Thm2", "VO-Ex1", "VO-Ex2", "VO-Sec3.2", "VO-A3"]
    assert [c.identifier for c in CHECKS if c.identifier in drawn] == shown
    assert [*map(figure_number, shown), figure_number("KO-Fig1b-left")] == [
        "1", "2", "3, 4", "5", "6", "", "1b",
    ]  # fmt: skip


def test_seconds_are_those_of_the_newest_finished_record(tmp_path, monkeypatch):
    for day, verdict in enumerate(("passed", "failed", "skipped")):
        monkeypatch.setattr(runner, "now", lambda day=day: f"2026-01-0{day + 1}")
        run_checks(Fakes(A=verdict).checks(), tmp_path / verdict)
    folders = [tmp_path / name for name in ("failed", "passed", "skipped", "absent")]
    wanted = read(tmp_path / "failed")["checks"]["A"]["seconds"]
    assert newest_seconds(folders) == {"A": wanted}


def test_checks_name_the_data_that_they_need(monkeypatch):
    def missing(name):
        raise MissingDataError(name)

    readers = {images.require, images.images, images.mnist_pair}
    for check in CHECKS:
        module = inspect.getmodule(check.run)
        reads = [v for v in vars(module).values() if inspect.isfunction(v) and v in readers]
        # the fast checks of such a module need none, as their own tests show
        assert bool(required_data(check)) == (bool(reads) and not check.fast)
    monkeypatch.setattr(images, "require", missing)
    monkeypatch.setattr(autoencoder, "require", missing)
    keys = {"MNIST": "mnist", "CIFAR-10": "cifar10"}
    for check in filter(required_data, CHECKS):
        with pytest.raises(MissingDataError) as needed:
            check.run(lambda what: None)
        assert [keys[name] for name in required_data(check)] == [str(needed.value)]


def test_table_remarks_and_exit_code(fakes, tmp_path):
    result = natgrad("--all", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert "a small number" in result.stdout
    assert "this check needs data" in " ".join(result.stdout.split())
    assert "misprint, B: a sign" in result.stdout
    assert "note, A: a note of A" in result.stdout
    assert "2 passed, 1 skipped" in result.stdout
    again = natgrad("a", "--out", tmp_path)
    assert "1 of 1 checks were finished already" in again.stdout
    assert fakes.calls == list("ABC")
    assert natgrad("--fast", "--fresh", "--out", tmp_path).exit_code == 0
    assert fakes.calls == list("ABCA")


@pytest.mark.parametrize("verdict", ["failed", "error"])
def test_failure_is_exit_code_1(fakes, tmp_path, verdict):
    fakes.verdicts["A"] = verdict
    result = natgrad("--all", "--out", tmp_path)
    assert result.exit_code == 1
    assert "not as expected: A" in result.stderr
    assert fakes.calls == list("ABC")
    assert read(tmp_path)["checks"]["A"]["verdict"] == verdict


def test_interruption_is_exit_code_130(fakes, tmp_path):
    fakes.verdicts["B"] = "interrupt"
    result = natgrad("--all", "--out", tmp_path)
    assert result.exit_code == 130
    assert "finished checks are kept" in result.stderr
    assert list(read(tmp_path)["checks"]) == ["A"]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["KO-Thm41"], "did you mean 'KO-Thm4.1'"),
        ([], "say which checks to run"),
        (["--all", "--fast"], "only one of them"),
        (["KO-Eq5", "--all"], "only one of them"),
        (["KO-Eq5", "--figures"], "give one or the other"),
        (["--paper", "KO", "--figures", "--fast"], "no check is of all"),
        (["--paper", "XY"], "unknown paper 'XY'; known are ko, be, ke, vo, ng"),
        (["--paper", "VO", "--fast", "--all"], "only one of them"),
    ],
)
def test_bad_arguments(tmp_path, args, words):
    result = natgrad(*args, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert words in result.stderr
    assert not (tmp_path / "out").exists()


def test_folder_that_cannot_be_written_to(fakes, tmp_path):
    blocked = tmp_path / "file"
    blocked.touch()
    result = natgrad("--all", "--out", blocked)
    assert result.exit_code == 2
    assert "cannot write" in result.stderr
    assert fakes.calls == []
