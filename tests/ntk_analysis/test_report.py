"""The report, built from small parts on the embedded digits."""

from __future__ import annotations

import dataclasses
import json
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
from html_page import Page
from typer.testing import CliRunner

import ntk_analysis.report.build
from ntk_analysis.cli import app
from ntk_analysis.experiment import Experiment
from ntk_analysis.isotropy_run import IsotropySettings
from ntk_analysis.prediction_run import PredictionSettings
from ntk_analysis.report import ReportSettings, build_report
from ntk_analysis.report.commands import dynamics_command, isotropy_command, prediction_command
from ntk_analysis.report.comparison import (
    HERE,
    STALE,
    STORED,
    Source,
    counted,
    merge_checks,
    read_sources,
    side_by_side,
)
from ntk_analysis.report.page import number, percent
from ntk_analysis.report.settings import ReportSettings as Settings
from ntk_analysis.report.verdict import _check_sentence, answer, isotropy_class
from ntk_analysis.reproduce import PAPERS, load_checks
from ntk_analysis.reproduce.runner import fingerprint
from ntk_analysis.results import CHECKS, digests
from ntk_analysis.settings import DynamicsSettings
from ntk_analysis.sweep import SweepSettings

CHECK = "KO-NZ"
CATALOGUE = {check.identifier: check for check in load_checks()}
NAMES = ("gd", "exact", "block-diagonal", "kfac", "diagonal")
SECTIONS = (
    "verdict", "isotropy", "spectra", "training", "accuracy", "cost", "checks", "devices",
    "environment", "limits",
)  # fmt: skip


def small() -> Settings:
    training = DynamicsSettings(
        dataset="digits", num_train=12, num_test=10, widths=(64, 64), steps=3, structures=NAMES
    )
    finite = PredictionSettings(
        dataset="digits", classes=(3, 8), num_train=10, num_test=20, widths=(32, 32),
        structures=("gd", "exact"), kernels="empirical",
    )  # fmt: skip
    sweep = SweepSettings("width", (24, 48), (0,), num_samples=8, num_inputs=8)
    return ReportSettings(
        training,
        IsotropySettings(sweep, ("gd", "exact")),
        PredictionSettings(
            dataset="digits", num_train=30, num_test=20, widths=(32, 32), initialisations=2,
            structures=("exact",),
        ),
        (finite,),
        (CHECK,),
    )  # fmt: skip


def record(verdict: str, measured: float, **other: object) -> dict:
    return {
        "title": "A <b>title</b> & more", "claim": "a claim < 1", "setting": "s", "origin": "ours",
        "differs": "", "kind": "", "remark": "", "verdict": verdict, "reason": "", "seconds": 3.0,
        "data": {}, "notes": [],
        "measurements": [
            {"what": "loss <1>", "measured": measured, "expected": "≤ 1", "passed": True}
        ],
        **other,
    }  # fmt: skip


def document(device: str, date: str, **checks: dict) -> dict:
    environment = {"jax": "9.9.9", "natgrad": "0.1.0", "device": device}
    whole = {
        "command": "natgrad reproduce", "date": date, "environment": environment, "checks": checks,
    }  # fmt: skip
    return whole | {"digests": digests(whole, CHECKS)}


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    gpu = document("gpu: Fancy <X>", "2026-01-02", **{"KO-Fig1a": record("passed", 0.125)})
    cpu = document("cpu: cpu", "2026-01-01", **{"KO-Fig1a": record("passed", 0.25)})
    for name, content in (("gpu", gpu), ("cpu", cpu)):
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    (folder / "asv").mkdir()
    for name in ("broken", "asv/benchmarks"):
        (folder / f"{name}.json").write_text("{", encoding="utf-8")
    part = document("gpu: g", "2026-01-03", **{"KO-Fig1a": {"verdict": "passed"}})
    (folder / "part.json").write_text(json.dumps(part), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def built(tmp_path_factory, results):
    with warnings.catch_warnings():
        # a dependency of Matplotlib's font search, not ours
        warnings.filterwarnings("ignore", category=DeprecationWarning, module="matplotlib.*")
        return build_report(small(), tmp_path_factory.mktemp("report"), results=results)


@pytest.fixture(scope="module")
def html(built) -> str:
    return built.page.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(html) -> Page:
    return Page(html)


def test_page_is_well_formed_and_self_contained(built, html, page):
    assert page.open == []
    assert html.startswith("<!doctype html>")
    pages = {f"papers/{name}.html" for name in PAPERS}
    others = {a for a in page.addresses if not a.startswith(("#", "data:image/svg+xml;base64,"))}
    assert others == pages
    assert all((built.page.parent / name).is_file() for name in pages)
    assert {a[1:] for a in page.addresses if a.startswith("#")} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert not re.search(r"@import|url\(|<script|<link", html)
    assert 'name="viewport"' in html
    assert "@media print" in html
    assert len(html) < 3_000_000


def test_sections_and_figures(built, page):
    assert [name for name in page.ids if name in SECTIONS] == list(SECTIONS)
    assert len(page.images) == 12
    assert all(page.images)
    figures = {path.name for path in (built.page.parent / "figures").iterdir()}
    for name in ("loss", "condition_number", "spectra", "accuracy", "finite_accuracy", "cost"):
        assert {f"{name}.png", f"{name}.svg"} <= figures


def accuracy_text(value: float | None) -> str:
    return "–" if value is None else percent(value, 3)


def test_verdict_table_shows_the_results(built, html):
    stored = json.loads((built.page.parent / "results.json").read_text(encoding="utf-8"))
    assert stored == built.document
    rows = stored["summary"]
    assert [row["name"] for row in rows] == list(NAMES)
    table = re.search(r'<table class="verdict">.*?</table>', html, re.S).group()
    shown = re.findall(r"<tr>(.*?)</tr>", table, re.S)[1:]
    assert len(shown) == len(rows)
    for text, row in zip(shown, rows, strict=True):
        assert row["label"] in text
        cells = re.findall(r'<td data-label="([^"]+)"><span>(.*?)</span></td>', text)
        values = dict(cells)
        assert values["α measured"] == number(row["alpha"], 4)
        assert values["Loss after 1 step"] == percent(row["share_after_1"])
        assert values["Test accuracy"] == accuracy_text(row["accuracy"])
        assert values["Non-zeros / P²"] == number(row["fraction_of_exact"])
        assert values["Step / gradient"] == number(row["step_over_gradient"])


def test_summary_follows_from_the_parts(built):
    parts = built.document["parts"]
    rows = {row["name"]: row for row in built.document["summary"]}
    for name in ("exact", "block-diagonal", "kfac"):
        assert rows[name]["isotropic"] == "yes"
        assert rows[name]["alpha"] == pytest.approx(rows[name]["theoretical_alpha"], rel=1e-6)
    assert rows["block-diagonal"]["alpha"] == pytest.approx(3)
    assert rows["kfac"]["alpha"] == pytest.approx(3 * 12)
    assert rows["gd"]["isotropic"] == "no"
    assert rows["gd"]["step_over_gradient"] == 1
    assert rows["exact"]["fraction_of_exact"] == 1
    curve = parts["training"]["methods"]["gd"]
    losses = np.array(curve["network"]["train_loss"])
    assert rows["gd"]["share_after_1"] == pytest.approx(losses[1] / losses[0])
    off = np.abs(losses - curve["theory"]["train_loss"]).max() / losses[0]
    assert rows["gd"]["theory_distance"] == pytest.approx(off)
    assert (
        rows["gd"]["accuracy"] == parts["accuracy at finite width"][0]["methods"]["gd"]["accuracy"]
    )


def test_checks_of_this_run_and_of_files(built, html):
    assert list(built.document["checks"]) == ["KO-Fig1a", CHECK]
    found = built.document["checks"]["KO-Fig1a"]
    assert (found["source"], found["device"]) == ("cpu.json", "CPU")
    assert built.document["checks"][CHECK]["source"] == "this report"
    assert f'<details id="{CHECK}">' in html
    assert "data" not in built.document["checks"]["KO-Fig1a"]
    assert f"natgrad</span> <span>reproduce</span> <span>{CHECK}" in html


def test_devices_side_by_side_are_escaped(built, html):
    assert built.document["devices"] == ["CPU", "GPU (Fancy <X>)"]
    assert "GPU (Fancy &lt;X&gt;)" in html
    assert "loss &lt;1&gt;" in html
    assert "loss <1>" not in html
    row = built.document["side_by_side"][0]["rows"][0]
    assert row["measured"] == [0.25, 0.125]
    assert "0.125" in html
    assert "part.json has records that are not whole" in html
    assert html.count(".json is not a document of this project") == 1
    assert "broken.json is not a document of this project" in html


def test_resume_runs_nothing_again_and_no_results_are_fine(built, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("a finished part was run again")

    for name in (
        "ntk_analysis.experiment._Laboratory", "ntk_analysis.isotropy_run.isotropy_sweep",
        "ntk_analysis.prediction_run._Laboratory.run", "ntk_analysis.reproduce.runner._run",
    ):  # fmt: skip
        monkeypatch.setattr(name, never)
    drawn = {}
    monkeypatch.setattr(ntk_analysis.report.build, "draw_figures", lambda *args: drawn)
    monkeypatch.setattr(ntk_analysis.report.build, "render", lambda *args: "page")
    again = build_report(small(), built.page.parent, results=built.page.parent / "absent")
    assert again.document["summary"] == built.document["summary"]
    assert again.resumed == (
        "training",
        "network",
        "isotropy",
        "accuracy",
        "accuracy-seed-0",
        "checks",
    )
    assert again.document["side_by_side"] == []
    assert list(again.document["checks"]) == [CHECK]


def test_other_results_in_the_folder_are_not_overwritten(tmp_path):
    (tmp_path / "results.json").write_text('{"command": "natgrad dynamics"}', encoding="utf-8")
    with pytest.raises(ValueError, match="natgrad dynamics"):
        build_report(small(), tmp_path)


def fresh(device: str, name: str, verdict: str, measured: float) -> dict:
    """A record as the present source would write it on a device."""
    versions = document(device, "")["environment"]
    print_ = fingerprint(CATALOGUE[name], versions)
    return record(verdict, measured, fingerprint=print_)


def test_failed_checks_are_preferred_to_nothing_but_not_to_own(tmp_path):
    own = Source(
        "own", document("cpu: cpu", "1", A=record("failed", 1), B=record("skipped", 1))
    ).judged(())
    other = Source(
        "x", document("gpu: g", "2", A=record("passed", 2), B=record("passed", 2))
    ).judged(())
    merged = merge_checks(own, [other], ["B", "A"])
    assert list(merged) == ["B", "A"]
    assert (merged["A"]["verdict"], merged["B"]["source"]) == ("failed", "x")
    devices, rows = side_by_side([own, other])
    assert devices == ["CPU", "GPU (g)"]
    assert rows[1]["runs"][0] is None
    assert rows[1]["rows"][0]["measured"] == ["", 2]
    assert side_by_side([own]) == (["CPU"], [])
    assert read_sources(tmp_path / "absent", ()) == ([], [])


def test_results_of_another_source_are_told_from_fresh_ones():
    catalogue = CATALOGUE.values()
    gpu = document("gpu: g", "1", **{"KO-NZ": fresh("gpu: g", "KO-NZ", "passed", 1)})
    cpu = document(
        "cpu: cpu", "2", Gone=record("passed", 3),
        **{"KO-NZ": record("failed", 2, claim="of old", fingerprint="0")},
    )  # fmt: skip
    sources = [Source(d["date"], d).judged(catalogue) for d in (gpu, cpu)]
    own = {"KO-Lem4.3": fresh("cpu: cpu", "KO-Lem4.3", "passed", 4)}
    own = Source("own", document("cpu: cpu", "3", **own)).judged(catalogue, HERE)
    merged = merge_checks(own, sources, CATALOGUE)
    evidence = {name: found["evidence"] for name, found in merged.items()}
    # of a GPU and earlier, but of this source
    assert evidence == {"KO-Lem4.3": HERE, "KO-NZ": STORED, "Gone": STALE}
    assert merged["KO-NZ"]["source"] == "1"
    counts = counted(merged.values())
    assert [counts[key] for key in ("passed", "failed", HERE, STORED, STALE)] == [2, 0, 1, 1, 1]
    old = merge_checks(own, sources[1:], CATALOGUE)["KO-NZ"]
    assert (old["evidence"], old["claim"]) == (STALE, CATALOGUE["KO-NZ"].claim)
    (text,) = _check_sentence(merged)
    assert text.startswith("2 of 3 checks")
    assert "1 were measured with another version of the source" in text


def test_answer_is_computed():
    row = {
        "name": "kfac", "label": "K-FAC", "share_after_1": 0.02, "step_over_gradient": 1.5,
        "structure": "KFAC",
    }  # fmt: skip
    slow = {**row, "name": "diagonal", "label": "Diagonal", "share_after_1": 0.5}
    assert answer([row, slow]).startswith("K-FAC keeps the fast convergence")
    assert answer([row, slow]).endswith("Diagonal does not.")
    assert "no approximation keeps" in answer([slow])
    assert "no approximation keeps" in answer([{**row, "share_after_1": None}])
    assert [isotropy_class(c) for c in (1.0, 1.5, 9.0, None)] == ["yes", "nearly", "no", "no"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"), (1.0, "1"), (0.1234, "0.123"), (-2.5, "−2.5"), (56224.4, "56224"),
        (1.5e-7, "1.5&nbsp;×&nbsp;10<sup>−7</sup>"), (None, "not finite"), ("", "–"),
    ],
)  # fmt: skip
def test_numbers(value, text):
    assert number(value) == text


def test_percentages():
    assert [percent(s) for s in (1, 0.5, 0.0123, 0.901, None)] == [
        "100 %", "50 %", "1.2 %", "90.1 %", "not finite",
    ]  # fmt: skip


@pytest.mark.parametrize("settings", [small(), Settings.standard("digits", 3)])
def test_commands_repeat_the_settings(settings, monkeypatch, tmp_path):
    """The commands on the page, run as printed, do what the report did."""
    asked = []

    def catch(part, out, **kwargs):
        asked.append(part)
        raise ValueError("enough")

    for name in ("dynamics.run_dynamics", "isotropy.run_isotropy", "predict.run_prediction"):
        monkeypatch.setattr(f"ntk_analysis.cli.{name}", catch)
    commands = [
        dynamics_command(settings.training), isotropy_command(settings.sweep),
        isotropy_command(settings.network), prediction_command(settings.limit),
        *map(prediction_command, settings.finite),
    ]  # fmt: skip
    for command in commands:
        assert CliRunner().invoke(app, command.split()[1:]).exit_code == 2
    wanted = [settings.training, settings.sweep, settings.network, settings.limit, *settings.finite]
    assert asked == wanted


def test_unequal_widths_are_refused():
    settings = small()
    training = dataclasses.replace(settings.training, widths=(8, 16))
    with pytest.raises(ValueError, match="equal"):
        dataclasses.replace(settings, training=training)


@pytest.mark.parametrize(
    "arguments", [["--dataset", "nonsense"], ["--seed", "-1"], ["--results", "/nowhere/at/all"]]
)
def test_bad_arguments(arguments, tmp_path):
    result = CliRunner().invoke(app, ["report", *arguments, "--out", str(tmp_path / "x")])
    assert result.exit_code == 2
    assert "error:" in result.stderr
    assert not (tmp_path / "x").exists()


def test_exit_code_of_a_failed_check(monkeypatch, tmp_path):
    old = record("failed", 1.0, evidence=STALE)
    checks = {CHECK: record("failed", 1.0, evidence=HERE), "KO-Eq5": old}
    found = {
        "answer": "yes",
        "sentences": [],
        "checks": checks,
        "parts": {"training": {"methods": {}}},
    }
    outcome = ntk_analysis.report.build.Built(tmp_path / "report.html", found, ())
    monkeypatch.setattr(ntk_analysis.report, "build_report", lambda *args, **kwargs: outcome)
    result = CliRunner().invoke(app, ["report", "--dataset", "digits", "--out", str(tmp_path)])
    assert result.exit_code == 1
    assert CHECK in result.stderr
    assert "KO-Eq5" not in result.stderr


def test_divergence_against_theory_is_a_failure(tmp_path):
    methods = {"kfac": {"label": "kfac", "unexpected_divergence": True}}
    found = {"checks": {}, "parts": {"training": {"methods": methods}}}
    assert ntk_analysis.report.build.Built(tmp_path, found, ()).failures == ["kfac"]
    assert Experiment({"methods": methods}, ("kfac",), ()).failures == ["kfac"]
