"""The verdict: one row a structure, and sentences that follow from the numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from ntk_analysis.palette import STYLES
from ntk_analysis.report.comparison import STALE, remarks
from ntk_analysis.tables_theory import step_over_gradient

Isotropy = Literal["yes", "nearly", "no"]

ISOTROPIC = 1.001
NEARLY_ISOTROPIC = 3.0
"""Largest condition numbers that count as isotropic, and as nearly so."""
FAST = 0.1
"""A structure keeps the fast convergence where one step leaves at most this share of the loss."""
FOLLOWS = 0.1
"""A network follows the theory within this share of its initial loss."""


def summary_rows(
    training: dict[str, Any], initial: dict[str, Any], finite: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """One row a structure, in the order of the tables.

    Args:
      training: results of ``run_dynamics``.
      initial: results of ``run_isotropy`` on the same network at initialisation, one width and
        one seed.
      finite: results of ``run_prediction`` with empirical kernels, one document a seed.
    """
    rows = []
    for found in initial["methods"].values():
        name = found["structure"]
        curve = training["methods"][name]
        network = np.array(curve["network"]["train_loss"], float)
        theory = np.array(curve["theory"]["train_loss"], float)
        accuracies = [d["methods"][name]["accuracy"] for d in finite if name in d["methods"]]
        cost = found["cost"]
        rows.append(
            {
                "name": name,
                "structure": found["class"],
                "label": STYLES[found["class"]].label,
                "isotropic": isotropy_class(found["condition_number"]),
                "condition_number": found["condition_number"],
                "alpha": found["alpha"],
                "theoretical_alpha": found["theoretical_alpha"],
                "learning_rate": curve["learning_rate"],
                "learning_rate_rule": curve["learning_rate_rule"],
                "damping": curve["damping"],
                "initial_loss": float(network[0]),
                "loss_after_1": _number(network[1]),
                "share_after_1": _number(network[1] / network[0]),
                "share_at_end": _number(network[-1] / network[0]),
                "theory_distance": _number(np.max(np.abs(network - theory)) / network[0]),
                "accuracy": float(np.mean(accuracies)) if accuracies else None,
                "accuracies": accuracies,
                "fraction_of_exact": cost["fraction_of_exact"],
                "step_over_gradient": step_over_gradient(cost),
            }
        )
    return rows


def isotropy_class(condition_number: float | None) -> Isotropy:
    """Which of "yes", "nearly" and "no" it is; None is how JSON has infinity."""
    if condition_number is None or condition_number > NEARLY_ISOTROPIC:
        return "no"
    return "yes" if condition_number <= ISOTROPIC else "nearly"


def answer(rows: Sequence[dict[str, Any]]) -> str:
    """The question answered in one sentence."""
    keep = [row for row in _approximations(rows) if _is_fast(row)]
    lose = [row for row in _approximations(rows) if not _is_fast(row)]
    if not keep:
        return (
            "On this network no approximation keeps the fast convergence: one step leaves more "
            f"than {FAST:.0%} of the training loss with each of {_names(lose)}."
        )
    costs = [row["step_over_gradient"] for row in keep]
    text = (
        f"{_first(_names(keep))} {_keep(keep)} the fast convergence of natural gradient: one step "
        f"leaves {_percent_range([row['share_after_1'] for row in keep])} of the training loss, at "
        f"{_range(costs)} times the arithmetic of a gradient step."
    )
    if lose:
        text += f" {_first(_names(lose))} {'does' if len(lose) == 1 else 'do'} not."
    return text


def sentences(
    rows: Sequence[dict[str, Any]], training: dict[str, Any], checks: dict[str, dict[str, Any]]
) -> list[str]:
    """What else the numbers say; every sentence is computed from them.

    Args:
      rows: of ``summary_rows``.
      training: results of ``run_dynamics``.
      checks: records of ``run_checks``, by identifier.
    """
    found = [_isotropy_sentence(rows), *_descent_sentence(rows, training), _theory_sentence(rows)]
    found += [*_accuracy_sentence(rows), *_size_sentence(rows), *_check_sentence(checks)]
    return found


def _isotropy_sentence(rows: Sequence[dict[str, Any]]) -> str:
    groups = {kind: [r for r in rows if r["isotropic"] == kind] for kind in ("yes", "nearly", "no")}
    parts = []
    if groups["yes"]:
        parts.append(f"isotropic at initialisation: {_names(groups['yes'])}")
    for kind, words in (("nearly", "nearly isotropic"), ("no", "not isotropic")):
        if groups[kind]:
            numbers = [f"{_name(row)} ({_short(row['condition_number'])})" for row in groups[kind]]
            parts.append(f"{words} (condition number): {_join(numbers)}")
    return f"{_first('; '.join(parts))}."


def _descent_sentence(rows: Sequence[dict[str, Any]], training: dict[str, Any]) -> list[str]:
    descent = [row for row in rows if row["name"] == "gd"]
    if not descent or descent[0]["share_after_1"] is None:
        return []
    row, steps = descent[0], training["settings"]["steps"]
    end = row["share_at_end"]
    last = "" if end is None or steps == 1 else f" and {_percent(end)} after {steps}"
    return [
        f"Gradient descent at its best constant step keeps {_percent(row['share_after_1'])} of the "
        f"loss after one step{last}."
    ]


def _theory_sentence(rows: Sequence[dict[str, Any]]) -> str:
    broken = [row for row in rows if row["theory_distance"] is None]
    known = [row for row in rows if row["theory_distance"] is not None]
    if broken:
        return f"The loss of {_names(broken)} ceased to be finite, so theory does not describe it."
    worst = max(known, key=lambda row: row["theory_distance"])
    size = (
        f"the largest distance of its training loss from the predicted one is "
        f"{_percent(worst['theory_distance'])} of the initial loss ({_name(worst)})"
    )
    away = [row for row in known if row["theory_distance"] > FOLLOWS]
    if away:
        return f"The network departs from the theory with {_names(away)}: {size}."
    return f"The network trains as the theory says, with every structure: {size}."


def _accuracy_sentence(rows: Sequence[dict[str, Any]]) -> list[str]:
    known = [r for r in rows if r["accuracy"] is not None and r["isotropic"] != "no"]
    if len(known) < 2:
        return []
    low, high = (f(known, key=lambda r: r["accuracy"]) for f in (min, max))
    points = 100 * (high["accuracy"] - low["accuracy"])
    return [
        f"Where training ends, test accuracies of the structures that are isotropic or nearly so "
        f"lie within {points:.1f} points: {_percent(low['accuracy'])} ({_name(low)}) to "
        f"{_percent(high['accuracy'])} ({_name(high)})."
    ]


def _size_sentence(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The smallest Fisher that keeps the fast convergence."""
    keep = [row for row in _approximations(rows) if _is_fast(row)]
    if not keep:
        return []
    small = min(keep, key=lambda row: row["fraction_of_exact"])
    return [
        "The smallest Fisher among those that keep the fast convergence is that of "
        f"{_name(small)}: "
        f"{_percent(small['fraction_of_exact'])} of the entries of the exact one."
    ]


def _check_sentence(checks: dict[str, dict[str, Any]]) -> list[str]:
    if not checks:
        return []
    fresh = {name: record for name, record in checks.items() if record["evidence"] != STALE}
    passed = sum(record["verdict"] == "passed" for record in fresh.values())
    wrong = [name for name, r in fresh.items() if r["verdict"] in ("failed", "error")]
    text = f"{passed} of {len(checks)} checks of the literature came out as expected"
    if len(fresh) < len(checks):
        text += f"; {len(checks) - len(fresh)} were measured with another version of the source"
    if wrong:
        text += f"; not so: {_join(wrong)}"
    kinds = [f"{kind}: {len(names)}" for kind, names in remarks(checks).items()]
    if kinds:
        text += f"; remarks on what holds, which they test: {_join(kinds)}"
    return [f"{text}."]


def _approximations(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row["name"] not in ("gd", "exact")]


def _is_fast(row: dict[str, Any]) -> bool:
    return row["share_after_1"] is not None and row["share_after_1"] <= FAST


def _names(rows: Sequence[dict[str, Any]]) -> str:
    return _join([_name(row) for row in rows])


def _name(row: dict[str, Any]) -> str:
    """The label inside a sentence."""
    label: str = row["label"]
    return label if label[:2].isupper() or label[1:2] == "-" else label[:1].lower() + label[1:]


def _keep(rows: Sequence[object]) -> str:
    return "keeps" if len(rows) == 1 else "keep"


def _join(words: Sequence[str]) -> str:
    if len(words) < 2:
        return "".join(words)
    return f"{', '.join(words[:-1])} and {words[-1]}"


def _first(text: str) -> str:
    """The text as the beginning of a sentence."""
    return text[:1].upper() + text[1:]


def _short(value: float | None) -> str:
    if value is None:
        return "infinite"
    return f"{value:.2f}" if value < 10 else f"{value:.3g}" if value < 1e5 else f"{value:.1e}"


def _percent(share: float) -> str:
    percent = 100 * share
    return f"{percent:.1f} %" if percent >= 9.95 else f"{percent:.2g} %"


def _percent_range(shares: Sequence[float]) -> str:
    low, high = _percent(min(shares)), _percent(max(shares))
    return low if low == high else f"{low.removesuffix(' %')} to {high}"


def _range(values: Sequence[float]) -> str:
    low, high = f"{min(values):.3g}", f"{max(values):.3g}"
    return low if low == high else f"{low} to {high}"


def _number(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None
