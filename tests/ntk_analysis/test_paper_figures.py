"""The figures on the pages of the papers."""

from __future__ import annotations

import numpy as np
import pytest
from paper_records import CATALOGUE, IDENTIFIERS, committed, page, record, simple

from ntk_analysis.frame import theme
from ntk_analysis.report.papers import draw, drawing_sources, write_papers
from ntk_analysis.reproduce import paper_of
from ntk_analysis.reproduce.drawings import DRAWINGS, draws
from ntk_analysis.reproduce.registry import find_checks
from ntk_analysis.reproduce.runner import run_checks
from ntk_analysis.reproduce.van_oostrum.common import picture
from ntk_analysis.results import plain

pytestmark = pytest.mark.filterwarnings(
    # a dependency of Matplotlib's font search, not ours
    "ignore::DeprecationWarning:matplotlib.*"
)


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


def test_a_check_has_one_figure():
    with pytest.raises(ValueError, match="figure of KO-Fig3 is registered twice"):
        draws("KO-New", "KO-Fig3")
    assert "KO-New" not in DRAWINGS


@pytest.mark.parametrize("identifier", DRAWINGS)
def test_a_figure_is_drawn_anew_when_its_module_changes(identifier):
    first = drawing_sources(DRAWINGS[identifier])[0].__name__
    name = f"ntk_analysis.reproduce.{paper_of(identifier)}.figures"
    assert first.startswith(name), first


@pytest.mark.parametrize("identifier", [i for i in DRAWINGS if i.startswith("KO-")])
def test_figures_of_karakida_and_osawa_from_committed_results(identifier):
    """What was measured on real images, as it came back from JSON."""
    data = committed()[identifier]["data"]
    with theme():
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


def test_figures_of_the_frontier():
    curves = [{"power": p, "conditions": [2.0, 4.0]} for p in (0.0, 0.25, 0.5, 1.0)]
    (axis,) = DRAWINGS["NG-Frontier-Shampoo"]({"counts": [24, 96], "curves": curves}).axes
    dotted = [list(line.get_ydata()) for line in axis.lines if line.get_linewidth() < 1]
    assert dotted == [[2.0, 8.0], [2.0, 4.0]]
    curve = {"measured": [3.0, 1.0], "ridge": [2.9, 1.1], "free": [1.05]}
    data = {"sizes": [1, 64], "samples": 40, "curves": {"relu": curve, "tanh": curve}}
    for axis in DRAWINGS["NG-Frontier-Blocks"](data).axes:
        assert [list(line.get_ydata()) for line in axis.lines[:3]] == [[2.9, 1.1], [3, 1], [1.05]]
    points = [
        {"name": name, "structure": structure, "stored": stored, "flops": flops, "relu": relu}
        for name, structure, stored, flops, relu in (
            ("gradient descent", "GradientDescent", 0, 1.0, 20.0),
            ("A alone", "Foof", 10, 1.1, 1.3),
            ("B alone", "Foof", 20, 1.2, 1.4),
        )
    ]
    left, right = DRAWINGS["NG-Frontier-Map"]({"points": points}).axes
    assert [list(line.get_xdata()) for line in left.lines] == [[1.0], [10, 20]]
    assert [list(line.get_xdata()) for line in right.lines] == [[1.0], [1.1, 1.2]]
    assert [text.get_text() for text in left.texts] == ["A", "B"]
    rows = [
        {"name": name, "structure": name, "predicted": 1, "measured": steps}
        for name, steps in (("Exact", 2), ("KFAC", 3), ("Diagonal", 90))
    ]
    (axis,) = DRAWINGS["NG-Frontier-Training"]({"rows": {"relu": rows}}).axes
    assert [label.get_text() for label in axis.get_yticklabels()] == ["Exact", "KFAC", "Diagonal"]
    shown = {line.get_ydata()[0]: line.get_xdata()[-1] for line in axis.lines}
    assert shown == {0: 2, 1: 3, 2: 90}


def test_figures_of_the_finite_width_law():
    law = {"mean": 4.0, "spread": 8.0}
    data = {"widths": [4, 16], "losses": {"tanh": [1.0, 0.1], "relu": [2.0, 0.5]}, "law": law}
    (axis,) = DRAWINGS["NG-Width-Kink"](data).axes
    assert [list(line.get_ydata()) for line in axis.lines[2:]] == [[2.0, 0.375], [1.0, 0.25]]
    curve = {"losses": [8e-3, 5e-4], "p": 2.0, "interval": [1.9, 2.1]}
    curves = {name: {"Exact": curve, "KFAC": curve} for name in ("tanh", "relu")}
    smooth, kinked = DRAWINGS["NG-Width-Law"]({"widths": [4, 16], "curves": curves}).axes
    dotted = [axis.lines[-1].get_ydata() for axis in (smooth, kinked)]
    assert [first / last for first, last in dotted] == [16, 4]
    assert "p from 1.90 to 2.10" in smooth.get_title()


def test_figure_of_sparse_networks():
    values = [[[[0.4, 0.6], [0.7, 0.9]]]]
    limit = {"accuracy": [0.5, 0.8], "alignment": [0.1, 0.2]}
    data = {"counts": [50, 100], "dim": 100, "scales": [0.1], "methods": ["one"], "limit": limit}
    figure = DRAWINGS["NG-Sparse-Networks"](data | {"accuracy": values, "alignment": values})
    for axis, dotted in zip(figure.axes, limit.values(), strict=True):
        curve, last = axis.lines[0], axis.lines[-1]
        assert list(curve.get_xdata()) == [0.5, 1]
        assert list(curve.get_ydata()) == pytest.approx([0.5, 0.8])
        assert list(last.get_ydata()) == dotted


def test_figures_of_the_drift():
    curve = {"steps": [0, 1, 2], "changes": [0.0, 0.1, 0.2], "cka": 0.9}
    data = {"width": 8, "curves": {"tanh": {"Exact": curve}, "relu": {"KFAC": curve}}}
    for axis in DRAWINGS["NG-Drift-Structures"](data).axes:
        (line,) = axis.lines
        assert list(line.get_xdata()) == [1, 2]
        assert list(line.get_ydata()) == [0.1, 0.2]
    runs = {
        name: curve | {"losses": [1, 0.5, 0.3], "cka": [1, 0.9, 0.8]}
        for name in ("full", "batches", "adam")
    }
    figure = DRAWINGS["NG-Drift-Batches"]({"runs": {"ntk": runs}})
    losses, cka = figure.axes
    assert [list(line.get_ydata()) for line in losses.lines] == [[0.5, 0.3]] * 3
    assert [list(line.get_ydata()) for line in cka.lines] == [[0.9, 0.8]] * 3
