"""The report as one HTML page that needs nothing else."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from ntk_analysis.palette import STYLES
from ntk_analysis.report.drawing import Drawn
from ntk_analysis.report.sections import sections
from ntk_analysis.report.settings import ReportSettings
from ntk_analysis.report.typeset import typeset
from ntk_analysis.report.verdict import FAST, FOLLOWS, ISOTROPIC, NEARLY_ISOTROPIC
from ntk_analysis.reproduce import PAPERS, paper_of
from ntk_analysis.reproduce.registry import KINDS
from ntk_analysis.tables import setting_sentence

PAGE_NAME = "report.html"
PAPERS_FOLDER = "papers"
"""Of the pages of the papers, beside that of the report."""
_TEMPLATE = "template.html"
# one sign for each Matplotlib marker of the palette
_SIGNS = dict(zip("osD^vPXph*<>8d", "●■◆▲▼✚✖⬟⬢★◀▶⯃◊", strict=True))
_FORMULAS = {
    "Θ̄": '<span class="bar">Θ</span>',
    "σ_w²": "σ<sub>w</sub>²",
    "σ_b²": "σ<sub>b</sub>²",
    "G⁻¹ Jᵀ": "G<sup>−1</sup> J<sup>T</sup>",
    "f₀": "f<sub>0</sub>",
}


def render(document: dict[str, Any], settings: ReportSettings, drawn: Mapping[str, Drawn]) -> str:
    """The page.

    Args:
      document: what results.json of the report holds.
      settings: of the report.
      drawn: the figures; their SVG files become part of the page.
    """
    training = document["parts"]["training"]
    template = templates().get_template(_TEMPLATE)
    return template.render(
        report=document,
        training=training,
        setting=setting_sentence(training),
        sections=sections(document, settings, drawn),
        kinds=KINDS,
        groups=_groups(document["checks"]),
        papers=PAPERS,
        papers_folder=PAPERS_FOLDER,
        gpu=any(not name.startswith("CPU") for name in document["devices"]),
        signs={name: (s.color, _SIGNS.get(s.marker, "●")) for name, s in STYLES.items()},
        limits={
            "isotropic": ISOTROPIC, "nearly": NEARLY_ISOTROPIC, "fast": FAST, "follows": FOLLOWS
        },
        seed=settings.training.seed,
        synthetic=settings.training.dataset == "gaussian",
    )  # fmt: skip


@cache
def templates() -> jinja2.Environment:
    """The templates of this package, with the filters that they share."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(__package__, ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": number,
        "percent": percent,
        "data_uri": data_uri,
        "day": lambda date: str(date).replace("T", " ").replace("+00:00", " UTC"),
        "duration": duration,
        "formulas": formulas,
        "typeset": typeset,
        "command": command,
        "whose": whose,
    }
    return environment


def number(value: float | str | None, digits: int = 3) -> Markup | str:
    """A number as readers expect it, powers of ten outside of 10^-3 to 10^5.

    Args:
      value: None is how JSON has one that is not finite, "" one that is not there.
      digits: significant ones.
    """
    if value is None:
        return "not finite"
    if isinstance(value, str):
        return value or "–"
    if not math.isfinite(value):
        return "∞"
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        if abs(value) >= 10**digits:
            return f"{value:.0f}"
        return f"{value:.{digits}g}".replace("-", "−")
    mantissa, exponent = f"{value:.{digits - 2}e}".split("e")
    signed = str(int(exponent)).replace("-", "−")
    return Markup(f"{mantissa.replace('-', '−')}&nbsp;×&nbsp;10<sup>{signed}</sup>")


def percent(share: float | None, digits: int = 2) -> Markup | str:
    """A share in %."""
    if share is None:
        return "not finite"
    value = 100 * share
    if 0 < value < 1e-3:
        return Markup("{} %").format(number(value, digits))
    if value >= 10:
        return f"{value:.1f} %".replace(".0 %", " %")
    return f"{value:.{digits}g} %"


def duration(seconds: float) -> str:
    """A time in words."""
    return f"{seconds:.1f} s" if seconds < 60 else f"{seconds / 60:.1f} min"


def formulas(text: str) -> Markup:
    """Text with the signs of formulas that Unicode has no good characters for."""
    safe = str(Markup.escape(text))
    for plain, html in _FORMULAS.items():
        safe = safe.replace(plain, html)
    return Markup(safe)


def command(text: str) -> Markup:
    """A command that breaks between words only, never after a hyphen."""
    words = (Markup("<span>{}</span>").format(word) for word in text.split(" "))
    return Markup(" ").join(words)


def whose(check: Mapping[str, Any]) -> str:
    """Where the setting of a check comes from."""
    if check["origin"] == "paper, partly":
        return f"of the paper in part: {check['differs']}"
    return "of the paper" if check["origin"] == "paper" else "ours, where the paper states none"


def data_uri(path: Path) -> str:
    """An SVG file as an address that holds it."""
    return f"data:image/svg+xml;base64,{base64.b64encode(path.read_bytes()).decode()}"


def _groups(checks: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Checks by paper, each with the page of the paper, or None where it has none."""
    groups: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    for name, record in checks.items():
        groups.setdefault(paper_of(name) or name.partition("-")[0], []).append((name, record))
    return [
        {
            "page": name if name in PAPERS else None,
            "paper": PAPERS[name].citation if name in PAPERS else name,
            "checks": members,
        }
        for name, members in groups.items()
    ]
