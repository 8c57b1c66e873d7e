"""Commands on records that are made by hand: what they do with files, without any training."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

from typer.testing import CliRunner

from ntk_analysis.cli import app
from ntk_analysis.reproduce import registry
from ntk_analysis.reproduce.registry import Check, Outcome, below

DATA = ["--dataset", "digits", "--num-train", "6", "--num-test", "5"]
COMMANDS: dict[str, list[str]] = {
    "dynamics": ["dynamics", *DATA, "--widths", "4", "--steps", "1", "--structures", "exact", "gd"],
    "predict": [
        "predict", *DATA, "--widths", "4", "--initialisations", "0", "--structures", "exact", "gd",
    ],
    "isotropy": [
        "isotropy", "--values", "4", "--seeds", "0", "--num-samples", "3", "--num-inputs", "3",
        "--structures", "exact", "gd",
    ],
    "reproduce": ["reproduce", "A", "B"],
    "datasets": ["datasets"],
}  # fmt: skip
"""Arguments of each command, without --out."""


def curve(method: Any) -> dict[str, Any]:
    """A record of `natgrad dynamics`."""
    losses = {"train_loss": [0.5, 0.25], "test_loss": [0.5, 0.375]}
    return {
        "label": method.identifier, "structure": method.structure.name, "factor": 1.0,
        "learning_rate": 1.0, "learning_rate_rule": "1/alpha", "damping": "0",
        "eigenvalues": {"min": 1.0, "max": 1.0}, "theory": losses, "network": losses,
        "seconds_per_step": 0.001, "compile_seconds": 0.1, "unexpected_divergence": False,
        "notes": [], "date": "2026-01-01",
    }  # fmt: skip


def prediction(method: Any) -> dict[str, Any]:
    """A record of `natgrad predict`."""
    return {
        "label": method.name, "structure": method.structure.name, "damping": "0",
        "accuracy": 0.625, "accuracies": [], "expected_accuracy": None, "test_loss": 0.125,
        "mean_deviation": None, "input_dim": 64, "notes": [], "date": "2026-01-01",
    }  # fmt: skip


def row(name: str, value: Any) -> dict[str, Any]:
    """A record of `natgrad isotropy`."""
    numbers = dict.fromkeys(("alpha", "theoretical_alpha", "condition_number", "deviation"), 1.0)
    return {
        "structure": name, "width": value, "seed": 0, **numbers, "learning_rate": 1.0,
        "failed_conditions": "", "failure": "", "eigenvalues": [1.0], "cost": None,
        "class": {"exact": "Exact", "gd": "GradientDescent"}[name],
    }  # fmt: skip


@contextmanager
def by_hand(ran: list[str], checks: tuple[str, ...] = ("A", "B")) -> Iterator[None]:
    """Commands write records made by hand; the names of what was asked for go into a list."""

    class Laboratory:
        def __init__(self, *rest: object) -> None:
            pass

        def check(self, methods: object) -> None:
            pass

        def run(self, method: Any, *rest: object) -> dict[str, Any]:
            ran.append(method.name)
            return prediction(method) if not rest else curve(method)

    def measure(settings: Any, part: Any, names: tuple[str, ...], *rest: object) -> Iterator[dict]:
        ran.extend(names)
        yield from (row(name, value) for name in names for value in part.values)

    def check(name: str) -> Check:
        def run(report: object) -> Outcome:
            ran.append(name)
            return Outcome((below("a small number", 0.5, 1.0),))

        return Check(name, f"title of {name}", "claim", "setting", "ours", run, fast=True)

    nothing = lambda *args, **options: []  # noqa: E731
    package = "ntk_analysis."
    with ExitStack() as stack:
        for place, new in (
            ("experiment._Laboratory", Laboratory),
            ("prediction_run._Laboratory", Laboratory),
            ("isotropy_run._measure", measure),
            ("figures.draw_dynamics", nothing),
            ("figures_theory.draw_prediction", nothing),
            ("figures_theory.draw_isotropy", nothing),
            ("report.papers.write_papers", nothing),
        ):
            stack.enter_context(patch(package + place, new))
        made = {name: check(name) for name in checks}
        stack.enter_context(patch.object(registry, "_CHECKS", made))
        yield


def natgrad(*args: object) -> tuple[int, str]:
    """Exit code and everything that was printed."""
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    unexpected = result.exception if not isinstance(result.exception, SystemExit) else None
    trace = f"Traceback: {unexpected!r}" if unexpected else ""
    return result.exit_code, result.output + trace


@cache
def finished(command: str) -> str:
    """The results.json of a run to its end."""
    with tempfile.TemporaryDirectory() as folder, by_hand([]):
        code, text = natgrad(*COMMANDS[command], "--out", folder)
        assert code == 0, text
        return (Path(folder) / "results.json").read_text(encoding="utf-8")


def records_of(document: dict[str, Any]) -> dict[str, Any]:
    """The records, wherever they stand."""
    return document.get("methods") or document["checks"]


def again(
    command: str, damage: Callable[[Path], None], *options: object, reruns: tuple[str, ...]
) -> Callable[[], tuple[int, str]]:
    """The same command on a folder whose results.json was damaged.

    Args:
      command: its name.
      damage: changes the file.
      *options: more arguments.
      reruns: what must be worked out anew; all else is taken over. Without any, the file stays.
    """

    def run() -> tuple[int, str]:
        ran: list[str] = []
        with tempfile.TemporaryDirectory() as folder, by_hand(ran):
            path = Path(folder) / "results.json"
            path.write_text(finished(command), encoding="utf-8")
            damage(path)
            before = path.read_bytes() if path.is_file() and not path.is_symlink() else None
            code, text = natgrad(*COMMANDS[command], *options, "--out", folder)
            assert tuple(ran) == reruns
            if code == 0:
                found = json.loads(path.read_text(encoding="utf-8"))
                whole = json.loads(finished(command))
                undated = [
                    {name: r | {"date": "", "seconds": 0} for name, r in records_of(d).items()}
                    for d in (found, whole)
                ]
                assert undated[0] == undated[1]
                copies = [p.read_bytes() for p in path.parent.glob("results.*.json")]
                assert copies == ([before] if "is kept as" in " ".join(text.split()) else [])
            elif before is not None:
                assert path.read_bytes() == before
            assert not [p for p in path.parent.iterdir() if p.name.startswith(".")]
            return code, text

    return run
