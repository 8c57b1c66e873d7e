"""Records of checks, made up and stored, the pages that they make, and a simple figure."""

from __future__ import annotations

from pathlib import Path

from html_page import Page

from ntk_analysis.frame import panels
from ntk_analysis.report.comparison import (
    HERE,
    Source,
    merge_checks,
    read_sources,
)
from ntk_analysis.reproduce import load_checks

ROOT = Path(__file__).parents[2]
CATALOGUE = load_checks()
IDENTIFIERS = [check.identifier for check in CATALOGUE]


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


def page(out: Path, name: str = "karakida_osawa") -> Page:
    return Page((out / "papers" / f"{name}.html").read_text(encoding="utf-8"))


def simple(data: dict):
    figure, axes = panels(1, 1, (2, 2))
    axes[0, 0].plot(data["curve"])
    return figure
