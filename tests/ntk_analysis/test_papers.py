"""The pages of the papers: what they show, their figures, and how they get there."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from html_page import Page
from typer.testing import CliRunner

from ntk_analysis import reproduce
from ntk_analysis.cli import app
from ntk_analysis.report.comparison import (
    HERE,
    STALE,
    Source,
    merge_checks,
    read_sources,
    without_data,
)
from ntk_analysis.report.papers import PAPERS, pages, paper_of
from ntk_analysis.report.papers.pages import DRAWINGS, draw, write_papers
from ntk_analysis.report.typeset import typeset
from ntk_analysis.reproduce import Check, Outcome, load_checks, registry
from ntk_analysis.reproduce.registry import below, find_checks
from ntk_analysis.reproduce.runner import run_checks
from ntk_analysis.reproduce.van_oostrum.common import picture
from ntk_analysis.results import plain

ROOT = Path(__file__).parents[2]
CATALOGUE = load_checks()
IDENTIFIERS = [check.identifier for check in CATALOGUE]

pytestmark = pytest.mark.filterwarnings(
    # a dependency of Matplotlib's font search, not ours
    "ignore::DeprecationWarning:matplotlib.*"
)


def record(verdict: str = "passed", **other: object) -> dict:
    return {
        "title": "A <b>title</b> & more", "claim": "a claim < 1", "setting": "the setting",
        "origin": "ours", "differs": "", "kind": "", "remark": "", "verdict": verdict,
        "reason": "", "seconds": 3.0, "data": {}, "notes": ["a note"], "source": "here.json",
        "device": "CPU", "evidence": HERE,
        "date": "2026-01-02T03:04:05+00:00",
        "measurements": [
            {"what": "loss <1>", "measured": 0.125, "expected": "≤ 1", "passed": True}
        ],
        **other,
    }  # fmt: skip


def committed() -> dict[str, dict]:
    """The records of ``results/``."""
    sources, notes = read_sources(ROOT / "results", CATALOGUE)
    assert notes == []
    own = Source("none", {"checks": {}})
    return merge_checks(own, sources, IDENTIFIERS)


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


def page(out: Path, name: str = "karakida_osawa") -> Page:
    return Page((out / "papers" / f"{name}.html").read_text(encoding="utf-8"))


def test_every_paper_has_a_page_a_text_and_its_checks(written):
    assert tuple(PAPERS) == reproduce.PAPERS
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
        assert 350 < len(re.sub(r"<[^>]+>", "", text).split()) < 900


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
    write_papers({}, CATALOGUE, tmp_path)
    assert '<a href="../report.html">' in page(tmp_path).html


@pytest.mark.parametrize(
    ("identifier", "name"),
    [("KO-Fig1a", "karakida_osawa"), ("KE-Thm3/4", "kerekes"), ("KOX-1", None), ("", None)],
)
def test_paper_of(identifier, name):
    assert paper_of(identifier) == name


# ----- figures


def simple(data: dict):
    figure, axes = pages.frame.panels(1, 1, (2, 2))
    axes[0, 0].plot(data["curve"])
    return figure


def test_figures_are_in_the_page_and_beside_it(tmp_path, monkeypatch):
    monkeypatch.setitem(DRAWINGS, "KE-Thm3/4", simple)
    monkeypatch.setitem(DRAWINGS, "KO-Eq5", simple)
    records = {name: record(data={"curve": [1, 2]}) for name in ("KE-Thm3/4", "KO-Eq5")}
    records["KO-Eq9"] = record("skipped", data={"curve": [1]})
    write_papers(records, CATALOGUE, tmp_path)
    files = {path.name for path in (tmp_path / "papers" / "figures").iterdir()}
    assert files == {"KE-Thm3-4.png", "KE-Thm3-4.svg", "KO-Eq5.png", "KO-Eq5.svg"}
    for name in ("kerekes", "karakida_osawa"):
        found = page(tmp_path, name)
        assert len(found.images) == 1
        assert "a claim < 1" in found.images[0]
        assert sum(a.startswith("data:image/svg+xml;base64,") for a in found.addresses) == 1


def test_a_drawing_that_raises_does_not_lose_the_page(tmp_path, monkeypatch):
    def broken(data: dict):
        raise KeyError("curve <1>")

    def ill_set(data: dict):
        figure = simple(data)
        figure.axes[0].set_title(r"$\nonsense$")
        return figure

    monkeypatch.setitem(DRAWINGS, "KO-Eq5", broken)
    monkeypatch.setitem(DRAWINGS, "KO-Eq9", ill_set)
    monkeypatch.setitem(DRAWINGS, "KO-Eq10", simple)
    records = {name: record(data={"curve": [1, 2]}) for name in ("KO-Eq5", "KO-Eq9")}
    records["KO-Eq10"] = record()
    write_papers(records, CATALOGUE, tmp_path)
    found = page(tmp_path)
    said = found.section("KO-Eq5")
    assert "could not be drawn: KeyError: &#39;curve &lt;1&gt;&#39;" in said
    assert "0.125" in said
    assert "could not be drawn: ValueError" in found.section("KO-Eq9")
    assert "its record holds no data of the figure" in found.section("KO-Eq10")
    assert found.images == []
    assert list((tmp_path / "papers").glob("figures/*")) == []


def test_a_figure_is_drawn_again_only_where_its_data_changed(tmp_path):
    calls = []

    def counted(data: dict):
        calls.append(data)
        return simple(data)

    for curve in ([1, 2], [1, 2], [1, 3]):
        found = draw("KO-Eq5", counted, {"curve": curve}, tmp_path)
        assert found.svg is not None
    assert calls == [{"curve": [1, 2]}, {"curve": [1, 3]}]
    whole = found.svg.read_text(encoding="utf-8")
    # as after an interruption
    found.svg.write_text(whole[: len(whole) // 2], encoding="utf-8")
    draw("KO-Eq5", counted, {"curve": [1, 3]}, tmp_path)
    assert len(calls) == 3
    assert found.svg.read_text(encoding="utf-8") == whole
    (tmp_path / "KO-Eq5.png").unlink()
    draw("KO-Eq5", counted, {"curve": [1, 3]}, tmp_path)
    assert len(calls) == 4
    found.svg.write_bytes(b"\xff not UTF-8")
    draw("KO-Eq5", counted, {"curve": [1, 3]}, tmp_path)
    assert found.svg.read_text(encoding="utf-8") == whole


def test_drawings_belong_to_checks():
    assert set(DRAWINGS) <= set(IDENTIFIERS)


@pytest.mark.parametrize("identifier", DRAWINGS)
def test_a_figure_is_drawn_anew_when_its_module_changes(identifier):
    first = pages.drawing_sources(DRAWINGS[identifier])[0].__name__
    assert first.startswith("ntk_analysis.report.papers."), first


@pytest.mark.parametrize("identifier", [i for i in DRAWINGS if i.startswith("KO-")])
def test_figures_of_karakida_and_osawa_from_committed_results(identifier):
    """What was measured on real images, as it came back from JSON."""
    data = committed()[identifier]["data"]
    with pages.frame.theme():
        figure = DRAWINGS[identifier](data)
        figure.draw_without_rendering()
    for axis in figure.axes:
        assert axis.get_xlabel() or identifier.startswith("KO-Fig2")
        assert axis.get_ylabel()
        assert axis.lines


def test_figure_1a_shows_theory_and_network():
    data = committed()["KO-Fig1a"]["data"]
    (axis,) = DRAWINGS["KO-Fig1a"](data).axes
    theory, network = axis.lines[0::2], axis.lines[1::2]
    first = [curve for curve in data["curves"] if curve["seed"] == 0]
    for curve, line, markers in zip(first, theory, network, strict=True):
        shown = [y for y in markers.get_ydata() if y == y]
        assert shown == [y for y in curve["network"] if y > 1e-10]
        assert line.get_ydata()[0] == curve["theory"][0]
    assert axis.get_yscale() == "log"


def test_figure_1b_shows_what_explodes():
    data = committed()["KO-Fig1b-right"]["data"]
    left, right = DRAWINGS["KO-Fig1b-right"](data).axes
    drawn = [np.asarray(line.get_ydata()) for line in left.lines[0::2]]
    exploding = [losses for losses in drawn if np.nanmax(losses) > 100 * losses[0]]
    assert len(exploding) == 1
    double = next(c for c in data["curves"] if c["precision"] == "float64")["damping"]
    label = next(line for line in right.lines if "float64" in str(line.get_label()))
    assert double in label.get_xdata()
    assert max(label.get_ydata()) == right.get_ylim()[1]


@pytest.mark.parametrize("identifier", ["VO-Ex1", "VO-Ex2", "VO-A3"])
def test_figures_of_van_oostrum_from_their_checks(identifier, tmp_path):
    (kept,) = run_checks(find_checks([identifier]), tmp_path).records.values()
    assert kept["verdict"] == "passed"
    data = kept["data"]
    figure = DRAWINGS[identifier](data)
    figure.draw_without_rendering()
    arrows = arrows_of(figure)
    vectors = [v["vector"] if isinstance(v, dict) else v for v in (data["phi"], data["psi"])]
    for vector in vectors:
        assert pytest.approx(vector, abs=1e-12) in arrows


def arrows_of(figure):
    """The vectors that are drawn."""
    found = [a for axis in figure.axes for a in axis.collections if hasattr(a, "U")]
    return [[float(a.U[0]), float(a.V[0])] for a in found]


def test_spaces_of_van_oostrum(x64):
    data = plain(picture())
    model, xi = data["model"], data["xi"]
    for identifier, count in (("VO-Eq2", 2), ("VO-Thm2", 2), ("VO-Sec3.2", 5)):
        figure = DRAWINGS[identifier](data)
        figure.draw_without_rendering()
        arrows = arrows_of(figure)
        assert len(arrows) == count
        assert arrows[-1] == pytest.approx(model["vectors"]["natural"])
    # the tangent of z2 = sin(1.5 z1) / 1.5, and what the gradient has along it
    tangent = np.array([1, np.cos(1.5 * model["point"][0])])
    along = tangent @ model["vectors"]["gradient"] / (tangent @ tangent)
    assert model["vectors"]["natural"] == pytest.approx(along * tangent)
    # u = xi1 + xi2^2 / 3 grows alike with both vectors, which differ
    here, there = (np.array(xi["vectors"][name]) for name in ("y_Xi", "df y_Theta"))
    slope = np.array([1, 2 / 3 * xi["point"][1]])
    assert slope @ here == pytest.approx(slope @ there)
    assert np.linalg.norm(here - there) > 0.1


def test_figures_of_our_own_results():
    channels = [16, 64]
    first = {
        "channels": channels,
        "whole": {name: [0.2, 0.1] for name in ("Exact", "BlockDiagonal", "KFAC", "UnitWise")},
        "first_layer": {"KFAC": [0.5, 0.4], "UnitWise": [0.3, 0.2]},
    }
    left, right = DRAWINGS["NG-Conv-First"](first).axes
    assert [list(line.get_ydata()) for line in left.lines] == [[0.2, 0.1]] * 2
    assert [list(line.get_ydata()) for line in right.lines] == [[0.5, 0.4], [0.3, 0.2]]
    run = {"gradient_descent": [0.1, 0.05], "condition_number": 337.04}
    (axis,) = DRAWINGS["NG-Conv-Digits"]({"networks": {"mlp": run, "conv-average": run}}).axes
    assert "condition number 337" in axis.get_legend().get_texts()[0].get_text()
    losses = {"Exact": [[0.1, 0.01], [0.1, 0.001]]}
    data = {"widths": {"mlp": [4, 8]}, "losses": {"mlp": losses}}
    (axis,) = DRAWINGS["NG-Conv-Training"](data).axes
    assert [list(line.get_ydata()) for line in axis.lines] == losses["Exact"]


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
