"""What the figures of the page need, as plain data: curves, and how a contestant is drawn."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ntk_analysis.palette import STYLES, tint

CURVE_POINTS = 28
_DIGITS = 4
# on a dark page a colour is mixed with white, or it would not stand out
_DARK_STRENGTH = 0.72
_DASHES = ("", "7 3", "2 3", "9 3 2 3", "4 2", "12 4", "2 2 6 2")
# whoever has no structure is grey: told apart by dash and open marker
_GREYS = (("#2b2b2b", "#f0f0f0"), ("#6a6a6a", "#b9b9b9"), ("#979797", "#8b8b8b"))
_MARKERS = ("o", "s", "^", "D", "v", "p", "h", "P", "X")


class Look(NamedTuple):
    """How a contestant is drawn.

    Attributes:
      light: colour on a light page, "#rrggbb".
      dark: colour on a dark page.
      dash: SVG's stroke-dasharray, "" for a solid line.
      marker: a Matplotlib marker, as in the palette.
      open: whether the marker is an outline.
    """

    light: str
    dark: str
    dash: str
    marker: str
    open: bool


def looks(rows: Iterable[dict[str, Any]]) -> dict[str, Look]:
    """How every contestant is drawn, the same on all devices.

    A structure has its colour and marker of the palette; its variants differ in their dashes. The
    others are grey, with open markers.

    Args:
      rows: of boards; a contestant may be there many times.
    """
    unique = {row["contestant"]: row for row in rows}
    variants: Counter[str] = Counter()
    result = {}
    for name in sorted(unique, key=lambda name: (len(name), name)):
        row = unique[name]
        kind = row["structure"] if row["family"] == "natural-gradient" else ""
        style = STYLES[kind] if kind else None
        number = variants[kind]
        variants[kind] += 1
        dash = _DASHES[number % len(_DASHES)]
        if style:
            dark = tint(style.color, _DARK_STRENGTH)
            result[name] = Look(style.color, dark, dash, style.marker, False)
        else:
            light, dark = _GREYS[number % len(_GREYS)]
            result[name] = Look(light, dark, dash, _MARKERS[number % len(_MARKERS)], True)
    return result


def thinned(steps: Sequence[int], most: int = CURVE_POINTS) -> list[int]:
    """Indices of a curve's points that are drawn: first and last, the others even in log(1 + step).

    Args:
      steps: ascending.
      most: how many; a curve with fewer points keeps them all.

    Returns:
      Ascending indices, at most ``most`` of them.
    """
    if len(steps) <= most:
        return list(range(len(steps)))
    grid = np.log1p(np.asarray(steps, np.float64))
    wanted = np.linspace(grid[0], grid[-1], most)
    chosen = set(np.minimum(np.searchsorted(grid, wanted), len(steps) - 1).tolist())
    return sorted(chosen)


def curve(record: dict[str, Any]) -> dict[str, Any] | None:
    """The curve of a trial, short enough for a page with thousands of them.

    Args:
      record: of a timed trial.

    Returns:
      Lists ``x`` (steps), ``t`` (seconds of training), ``a`` (training loss) and ``b`` (held-out
      metric; null where not finite), ``o`` (seconds before training: compilation and preparation)
      and ``s`` (steps to the target, or null); None for a trial without a curve.
    """
    outcome = record["outcome"]
    points = outcome.get("curve") or {}
    if not points.get("steps"):
        return None
    chosen = thinned(points["steps"])
    return {
        "x": [points["steps"][i] for i in chosen],
        "t": [rounded(points["seconds"][i]) for i in chosen],
        "a": [rounded(points["train"][i]) for i in chosen],
        "b": [rounded(points["held_out"][i]) for i in chosen],
        "o": rounded(
            (outcome.get("compile_seconds") or 0.0) + (outcome.get("preparation_seconds") or 0.0)
        ),
        "s": outcome.get("steps_to_target"),
    }


def rounded(value: Any, digits: int = _DIGITS) -> Any:
    """A value with its numbers at so many significant digits, to keep a page small."""
    if isinstance(value, dict):
        return {key: rounded(entry, digits) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(entry, digits) for entry in value]
    if not isinstance(value, float):
        return value
    if not math.isfinite(value):
        return None
    short = float(f"{value:.{digits}g}")
    return int(short) if short.is_integer() and abs(short) < 1e15 else short
