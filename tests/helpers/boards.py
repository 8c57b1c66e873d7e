"""A small leaderboard for the fault tables: made once, copied for each case."""

import json
import shutil
import tempfile
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from leaderboard_records import CPU, record, sample
from typer.testing import CliRunner

from benchmarks.leaderboard import RULES
from benchmarks.leaderboard.cli import app
from benchmarks.leaderboard.records import digest
from benchmarks.leaderboard.store import Store

__all__ = ["board", "command", "copied", "put", "record"]


def command(*arguments):
    """Exit code and all that a command prints, in a terminal that is wide enough for a sentence."""
    result = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "400"})
    wild = result.exception and not isinstance(result.exception, SystemExit)
    return result.exit_code, result.output + f"Traceback {result.exception!r}" * bool(wild)


@cache
def board():
    """A folder with the trials of three contestants."""
    folder = Path(tempfile.mkdtemp()) / "board"
    store = Store.open(folder, RULES)
    for entry in sample(names=("sgd", "exact", "kfac"), workloads=("digits-mse",), devices=(CPU,),
                        seeds=1, tuning=1):  # fmt: skip
        put(store.folder, entry)
    return folder


def put(folder, entry):
    """Stores a record as it is, with the key and the digest that it should have."""
    entry = {**entry, "config": {**entry["config"], "rules": RULES}}
    entry["key"] = digest(entry["config"])
    entry.pop("digest", None)
    entry["digest"] = digest(entry)
    path = folder / "trials" / entry["key"][:2] / f"{entry['key']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(entry))
    return entry["key"]


@contextmanager
def copied(*harms):
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(shutil.copytree(board(), Path(parent) / "board"))
        for harm in harms:
            harm(folder)
        yield folder
