"""The pages of the papers: what they show, their figures, and how they get there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from paper_records import CATALOGUE, IDENTIFIERS, page, record, simple
from typer.testing import CliRunner

from ntk_analysis.cli import app
from ntk_analysis.report.comparison import (
    STALE,
    without_data,
)
from ntk_analysis.report.papers import write_papers
from ntk_analysis.report.typeset import typeset
from ntk_analysis.reproduce import PAPERS, Check, Outcome, paper_of, registry
from ntk_analysis.reproduce.drawings import DRAWINGS
from ntk_analysis.reproduce.registry import below, find_checks

pytestmark = pytest.mark.filterwarnings(
    # a dependency of Matplotlib's font search, not ours
    "ignore::DeprecationWarning:matplotlib.*"
)


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """Pages of one record of every verdict, without a figure."""
    out = tmp_path_factory.mktemp("pages")
    records = {
        "KO-Eq5": record(),
        "KO-Eq9": record(
            "failed",
            kind="misprint",
            remark="a sign",
            origin="paper, partly",
            differs="eta is ours",
        ),
        "KO-Eq10": record("skipped", reason="no data", measurements=[]),
        "KO-Eq18": record("error", reason="RuntimeError: the cable broke", measurements=[]),
        "KO-Gone": record(title="of an older catalogue", evidence=STALE),
        "Other-1": record(),
    }
    write_papers(records, CATALOGUE, out)
    return out


def test_every_paper_has_a_page_a_text_and_its_checks(written):
    assert {path.name for path in (written / "papers").iterdir()} == {f"{n}.html" for n in PAPERS}
    for name, paper in PAPERS.items():
        found = page(written, name)
        own = [i for i in IDENTIFIERS if i.startswith(f"{paper.prefix}-")]
        assert own
        shown = re.findall(r'<section class="check" id="([^"]+)">', found.html)
        assert shown == own + (["KO-Gone"] if name == "karakida_osawa" else [])
        assert paper.title in found.html
        assert str(paper.year) in found.html
        text = found.html[found.html.index('id="text"') : found.html.index('id="checks"')]
        # our own page has three subjects: convolutions, the frontier, and what is beyond it
        most = 2400 if paper.own else 900
        assert 350 < len(re.sub(r"<[^>]+>", "", text).split()) < most


@pytest.mark.parametrize("name", PAPERS)
def test_pages_are_self_contained_and_their_links_lead_somewhere(written, name):
    found = page(written, name)
    assert len(found.ids) == len(set(found.ids))
    others = {f"{other}.html" for other in PAPERS if other != name}
    for address in found.addresses:
        assert address in others or address.startswith(("#", "data:image/svg+xml;base64,"))
    assert {a[1:] for a in found.addresses if a.startswith("#")} <= set(found.ids)
    assert others <= set(found.addresses)
    assert not re.search(r"@import|url\(|<script|<link", found.html)
    assert 'name="viewport"' in found.html
    assert "@media print" in found.html
    assert "prefers-color-scheme: dark" in found.html


def test_each_verdict_says_what_there_is_to_say(written):
    found = page(written)
    passed = found.section("KO-Eq5")
    assert '<span class="badge passed">passed</span>' in passed
    assert "A &lt;b&gt;title&lt;/b&gt; &amp; more" in passed
    assert "loss &lt;1&gt;" in passed
    assert "0.125" in passed
    assert "≤ 1" in passed
    assert "a note" in passed
    assert "ours, where the paper states none" in passed
    assert "here.json, CPU, 2026-01-02 03:04:05 UTC, 3.0 s" in passed
    assert "<span>natgrad</span> <span>reproduce</span> <span>KO-Eq5</span>" in passed
    failed = found.section("KO-Eq9")
    assert '<span class="badge failed">failed</span>' in failed
    assert '<span class="badge remark">misprint</span>' in failed
    assert "<b>Misprint.</b> a sign" in failed
    assert "(of the paper in part: η is ours)" in failed
    withdrawn = found.section("KO-Forster")
    assert "<b>Misread by us.</b>" in withdrawn
    assert "badge remark" not in withdrawn
    assert "no data" in found.section("KO-Eq10")
    assert "the cable broke" in found.section("KO-Eq18")
    (fast,) = find_checks(["KO-Thm4.1"])
    missing = found.section("KO-Thm4.1")
    assert '<span class="badge missing">not run</span>' in missing
    assert fast.title in missing
    assert "in seconds" in missing
    assert "Measured:" not in missing
    assert "in minutes or more" in found.section("KO-Fig1a")


def test_summary_counts(written):
    found = page(written)
    known = [check for check in CATALOGUE if check.identifier.startswith("KO-")]
    total = len(known) + 1
    counts = f"1 passed, 2 failed, 1 skipped, 1 of another version, {total - 5} not run"
    assert f"{total} checks: {counts}" in found.html
    evidence = "4 ran here, 0 are stored and of the present source,\n1 are stored and of another"
    assert evidence in found.html
    assert '<span class="badge missing">passed</span>' in found.section("KO-Gone")
    assert "of another version of the source: to be run again" in found.section("KO-Gone")
    assert "of another version" not in found.section("KO-Eq5")
    replaced = {name: "ours" for name in ("KO-Eq5", "KO-Eq10", "KO-Eq18")}
    replaced["KO-Eq9"] = "paper, partly"
    origins = [replaced.get(check.identifier, check.origin) for check in known] + ["ours"]
    settings = [origins.count(origin) for origin in ("paper", "paper, partly", "ours")]
    text = "Settings: {} of the paper, {} of the paper in part, {} ours".format(*settings)
    assert text in found.html
    for kind, names in {
        "misprint": ["KO-Eq9", "KO-Eq20"],
        "too general": ["KO-Lem4.3", "KO-Thm5.1"],
        "depends on solver or setting": [
            f"KO-Fig{figure}" for figure in ("1b-left", "1b-right", "2-left", "2-left-small")
        ],
        "misread by us": ["KO-Forster"],
    }.items():
        (line,) = re.findall(f"<li><b>{kind}</b>.*?</li>", found.html)
        assert re.findall('href="#([^"]+)"', line) == names
    assert "wrong" not in found.html[: found.html.index('id="text"')]
    assert "a sign" not in page(written, "bernacchia").html


def test_link_to_the_report_where_there_is_one(tmp_path):
    write_papers({}, CATALOGUE, tmp_path)
    assert "report.html" not in page(tmp_path).html
    (tmp_path / "report.html").touch()
    write_papers({}, CATALOGUE, tmp_path, {"A <site>": "../index.html"})
    assert page(tmp_path).addresses[:2] == ["../report.html", "../index.html"]
    assert "A &lt;site&gt;" in page(tmp_path).html


@pytest.mark.parametrize(
    ("identifier", "name"),
    [("KO-Fig1a", "karakida_osawa"), ("KE-Thm3/4", "kerekes"), ("KOX-1", None), ("", None)],
)
def test_paper_of(identifier, name):
    assert paper_of(identifier) == name


# ----- the commands


def test_reproduce_writes_the_pages_of_all_records(tmp_path, monkeypatch):
    def run(report) -> Outcome:
        report("measuring")
        return Outcome((below("a number", 0.5, 1.0),), data={"curve": [3.0, 4.0]})

    checks = {
        name: Check(name, f"title of {name}", "claim", "setting", "ours", run)
        for name in ("KO-Eq5", "KO-Eq9")
    }
    monkeypatch.setattr(registry, "_CHECKS", checks)
    monkeypatch.setitem(DRAWINGS, "KO-Eq5", simple)
    for identifier in checks:
        result = CliRunner().invoke(app, ["reproduce", identifier, "--out", str(tmp_path)])
        assert result.exit_code == 0, result.output
    assert "papers" in result.stdout
    found = page(tmp_path)
    assert "2 checks: 2 passed" in found.html
    assert len(found.images) == 1
    assert "results.json, CPU" in found.section("KO-Eq5")


def test_bare_folder_without_rights_is_an_error(tmp_path):
    (tmp_path / "papers").touch()
    with pytest.raises(OSError, match="papers"):
        write_papers({}, CATALOGUE, tmp_path)


def test_figure_data_are_no_part_of_the_document():
    assert without_data({"data": {"curve": [1]}, "verdict": "passed"}) == {"verdict": "passed"}


# ----- formulas


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("eta = 1/lambda_max(Theta)", "η = 1/λ<sub>max</sub>(Θ)"),
        ("Theta-bar_1 - alpha I", '<span class="bar">Θ</span><sub>1</sub> - α I'),
        ("sum_l (Sigma^-1 1)_l", "∑<sub>l</sub> (Σ<sup>−1</sup> 1)<sub>l</sub>"),
        ("x_(i-1)^T, e^(-2t)", "x<sub>i−1</sub><sup>T</sup>, e<sup>−2t</sup>"),
        ("sigma_w^2 >= 2", "σ<sub>w</sub><sup>2</sup> ≥ 2"),
        ("<e e^T>_p & J^Tg", "&lt;e e<sup>T</sup>&gt;<sub>p</sub> &amp; J<sup>T</sup>g"),
        ("F F^+ F^-T, 2^(1/L)", "F F<sup>+</sup> F<sup>−T</sup>, 2<sup>1/L</sup>"),
        ("e^-u_max, W_i^T", "e<sup>−u<sub>max</sub></sup>, W<sub>i</sub><sup>T</sup>"),
        ("dtheta_l, theta_inf", "dθ<sub>l</sub>, θ<sub>∞</sub>"),
        ("psi = phi o f, Sigma (x) I, f(x) o", "ψ = φ ∘ f, Σ ⊗ I, f(x) o"),
        ("loss_1 / |f_200 - y|", "loss<sub>1</sub> / |f<sub>200</sub> - y|"),
        ("data_batch_1, gram_matrix(), in_float64", "data_batch_1, gram_matrix(), in_float64"),
        ("a maximum of the Pipeline, 1e-6", "a maximum of the Pipeline, 1e-6"),
        ("<script>_x", "&lt;script&gt;<sub>x</sub>"),
    ],
)  # fmt: skip
def test_formulas(text, html):
    assert typeset(text) == html
