"""The command `natgrad` as tests call it, and what it leaves behind."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

from typer.testing import CliRunner

from ntk_analysis.cli import app


def natgrad(*args: object):
    with warnings.catch_warnings():
        # a dependency of Matplotlib's font search, not ours
        warnings.filterwarnings("ignore", category=DeprecationWarning, module="matplotlib.*")
        return CliRunner().invoke(app, [str(arg) for arg in args])


def read(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def one_sentence(result, longest: int = 400) -> str:
    assert result.exit_code == 2
    assert result.exception is None or isinstance(result.exception, SystemExit)
    text = result.stderr.strip()
    assert "Traceback" not in text
    assert len(text) < longest
    return text
