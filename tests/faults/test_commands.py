"""Commands of `natgrad` on results that were damaged or edited, and on bad folders and numbers."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fault_harness import Exits, over
from run_records import COMMANDS, again, finished, records_of

from ntk_analysis.report.comparison import read_sources

Document = dict[str, Any]
BOTH = ("exact", "gd")


def edit(change: Callable[[Document], object]) -> Callable[[Path], None]:
    """Changes the document."""

    def damage(path: Path) -> None:
        document = json.loads(path.read_text(encoding="utf-8"))
        change(document)
        path.write_text(json.dumps(document), encoding="utf-8")

    return damage


def put(*keys: str, value: object) -> Callable[[Path], None]:
    """Another value in the first record."""

    def change(document: Document) -> None:
        inner = next(iter(records_of(document).values()))
        for key in keys[:-1]:
            inner = inner[key]
        assert keys[-1] in inner
        inner[keys[-1]] = value

    return edit(change)


def top(key: str, value: object) -> Callable[[Path], None]:
    return edit(lambda document: document.update({key: value}))


def without(key: str) -> Callable[[Path], None]:
    return edit(lambda document: document.pop(key))


def record(value: object) -> Callable[[Path], None]:
    """Another value in the place of the first record."""
    return edit(lambda d: records_of(d).update({next(iter(records_of(d))): value}))


def swap(document: Document) -> None:
    records = records_of(document)
    (first, a), (second, b) = records.items()
    records[first], records[second] = b, a


def swap_digests(document: Document) -> None:
    swap({"methods": document["digests"]})


def content(text: str | bytes) -> Callable[[Path], None]:
    data = text.encode() if isinstance(text, str) else text
    return lambda path: path.write_bytes(data) and None


def instead(make: Callable[[Path], object]) -> Callable[[Path], None]:
    """Something else than a file."""

    def damage(path: Path) -> None:
        path.unlink()
        make(path)

    return damage


def nested(depth: int) -> list:
    return [] if depth == 0 else [nested(depth - 1)]


COPY = r"results\.1\.json"
ONE = (
    r"results.json: 1 of 2 records \(.*\) do not have the digest they were written with, damaged "
    "or edited, and are left out; the earlier file is kept as " + COPY
)
TWO = ONE.replace("1 of 2", "2 of 2")
EDITED_RECORDS: dict[str, Callable[[Path], None]] = {
    "a learning rate": put("learning_rate", value=0.5),
    "a last digit": put("learning_rate", value=1.0000000000000002),
    "a string for a number": put("learning_rate", value="1"),
    "null for a number": put("learning_rate", value=None),
    "an object for a number": put("learning_rate", value={}),
    "infinity": put("learning_rate", value=float("inf")),
    "a huge number": put("learning_rate", value=10**400),
    "a shorter curve": put("theory", "train_loss", value=[0.5]),
    "a curve of strings": put("theory", "train_loss", value=["a", "b"]),
    "a curve that is null": put("network", "test_loss", value=None),
    "another structure": put("structure", value="KFAC"),
    "a structure that is none": put("structure", value="[/x]"),
    "a divergence": put("unexpected_divergence", value=True),
    "notes that are text": put("notes", value="trust me"),
    "another date": put("date", value="2027-01-01"),
    "a record that is null": record(None),
    "a record that is a list": record([1, 2]),
    "a record that is text": record("exact"),
    "a record that is empty": record({}),
    "a record nested too deep for us": record(nested(300)),
}  # fmt: skip
DOCUMENTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "records in the place of each other": (edit(swap), TWO),
    "digests in the place of each other": (edit(swap_digests), TWO),
    "records that are null": (top("methods", None), "methods is no object: damaged or edited"),
    "records that are a list": (top("methods", []), "methods is no object"),
    "records that are text": (top("methods", "all"), "methods is no object"),
    "no records": (without("methods"), "methods is no object"),
    "no digests, as before": (without("digests"), "have no digests: edited, or of an older"),
    "digests that are a list": (top("digests", []), "have no digests"),
    "digests that are null": (top("digests", None), "have no digests"),
    "empty digests": (top("digests", {}), TWO),
    "digests that are numbers": (top("digests", {"gd": 1, "exact": 2}), TWO),
    "another fingerprint": (top("fingerprint", "0" * 64), "results of other settings, .* replaced"),
    "a fingerprint that is a list": (top("fingerprint", [1]), "results of other settings"),
    "no fingerprint": (without("fingerprint"), "results of other settings"),
}
HARMLESS: dict[str, Callable[[Path], None]] = {
    "nothing": edit(lambda document: None),
    "other settings in the head": edit(lambda d: d["settings"].update(steps=99)),
    "other data in the head": edit(lambda d: d["data"].update(num_train=99)),
    "settings that are null": top("settings", None),
    "another date": top("date", 5),
    "something more": top("more", {"a": 1}),
    "a digest of nothing": edit(lambda d: d["digests"].update(kfac="0")),
}
FILES: dict[str, Callable[[Path], None]] = {
    "empty": content(""),
    "half of it": lambda path: path.write_bytes(path.read_bytes()[:200]) and None,
    "zeros, as after a power cut": content(bytes(500)),
    "not UTF-8": content(b'{"command": "\xff"}'),
    "two documents": content("{}{}"),
    "a list": content("[]"),
    "null": content("null"),
    "a number": content("1e999"),
    "text": content('"natgrad"'),
    "an object": content("{}"),
    "nested too deep": content("[" * 100_000),
    "an object nested too deep": content('{"command":' * 100_000),
    "a command that is a list": content('{"command": ["natgrad"]}'),
    "a folder": instead(Path.mkdir),
    "a pipe": instead(os.mkfifo),
    "a link to nothing": instead(lambda path: path.symlink_to("gone")),
    "a link to itself": instead(lambda path: path.symlink_to(path.name)),
    "a device without an end": instead(lambda path: path.symlink_to("/dev/zero")),
}
LEFT_ALONE = r"results.json (is there and holds no results of natgrad|holds results of) .*--out"

CASES = {
    **{
        f"dynamics, edited: {name}": (again("dynamics", damage, reruns=("exact",)), Exits(0, ONE))
        for name, damage in EDITED_RECORDS.items()
    },
    **{
        f"dynamics: {name}": (
            again("dynamics", damage, reruns=BOTH),
            Exits(0, says if says == TWO else f"{says}.*; the earlier file is kept as {COPY}"),
        )
        for name, (damage, says) in DOCUMENTS.items()
    },
    **{
        f"dynamics, harmless: {name}": (
            again("dynamics", damage, reruns=()), Exits(0, "2 methods were finished already"),
        )
        for name, damage in HARMLESS.items()
    },
    **{
        f"dynamics, a file that is {name}": (
            again("dynamics", damage, reruns=()), Exits(2, LEFT_ALONE),
        )
        for name, damage in FILES.items()
    },
    **{
        f"{command}, a file that is {name}": (
            again(command, FILES[name], reruns=()), Exits(2, LEFT_ALONE),
        )
        for command in ("predict", "isotropy", "reproduce", "datasets")
        for name in ("nested too deep", "a list", "a pipe", "a link to nothing", "a folder")
    },
    **{
        f"{command}, results of dynamics": (
            again(command, content(finished("dynamics")), reruns=()),
            Exits(2, "holds results of natgrad dynamics; choose another --out"),
        )
        for command in COMMANDS if command != "dynamics"
    },
    "predict, an accuracy of 0.999": (
        again("predict", put("accuracy", value=0.999), reruns=("exact",)),
        Exits(0, f"{ONE}.* 62.50 "),
    ),
    "predict, accuracies that are text": (
        again("predict", put("accuracies", value="all"), reruns=("exact",)), Exits(0, ONE),
    ),
    "isotropy, a condition number": (
        again("isotropy", put("condition_number", value=1.5), reruns=("exact",)), Exits(0, ONE),
    ),
    "isotropy, a row that is null": (
        again("isotropy", record(None), reruns=("exact",)), Exits(0, ONE),
    ),
    "reproduce, a verdict": (
        again("reproduce", put("verdict", value="failed"), reruns=("A",)), Exits(0, ONE),
    ),
    "reproduce, a measurement": (
        again("reproduce", put("measurements", value=[]), reruns=("A",)), Exits(0, ONE),
    ),
    "reproduce, a fingerprint": (
        again("reproduce", put("fingerprint", value="0"), reruns=("A",)), Exits(0, ONE),
    ),
    "reproduce, checks that are a list": (
        again("reproduce", top("checks", [1]), reruns=("A", "B")),
        Exits(0, "checks is no object: damaged or edited; the earlier file is kept"),
    ),
    "reproduce, another version of jax": (
        again(
            "reproduce", edit(lambda d: d["environment"].update(jax="0.0.1")), reruns=("A", "B")
        ),
        Exits(
            0, "results of other versions of the software, which were replaced; the earlier file "
            "is kept as results.1.json",
        ),
    ),
    "reproduce, an environment that is null": (
        again("reproduce", top("environment", None), reruns=("A", "B")),
        Exits(0, "results of other versions"),
    ),
    "dynamics, --fresh": (
        again("dynamics", edit(lambda d: None), "--fresh", reruns=BOTH),
        Exits(0, "earlier results were replaced; the earlier file is kept as results.1.json"),
    ),
}  # fmt: skip


@over(CASES)
def test_results_are_taken_over_only_as_they_were_written(run, answer):
    answer.check(run)


# ----- documents of other runs, which a report shows


def found_in(damage: Callable[[Path], None]) -> Callable[[], tuple[int, str]]:
    """How many records a report takes from a damaged document, and what it says."""

    def run() -> tuple[int, str]:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "gpu.json"
            path.write_text(finished("reproduce"), encoding="utf-8")
            damage(path)
            sources, notes = read_sources(Path(folder), ())
            return sum(len(source.checks) for source in sources), "; ".join(notes)

    return run


UNSOUND = r"gpu.json: {} of 2 records \(.*\) do not have the digest they were written with"
NO_DOCUMENT = "gpu.json is not a document of this project and was left out"
SOURCES = {
    "whole": (found_in(edit(lambda d: None)), Exits(2, "^$")),
    "a time": (found_in(put("seconds", value=0.0)), Exits(1, UNSOUND.format(1))),
    "a verdict that is a list": (found_in(put("verdict", value=[])), Exits(1, UNSOUND.format(1))),
    "measurements that are text": (
        found_in(put("measurements", value="x")), Exits(1, UNSOUND.format(1)),
    ),
    "a record that is null": (found_in(record(None)), Exits(1, UNSOUND.format(1))),
    "another device": (
        found_in(edit(lambda d: d["environment"].update(device="gpu: H200"))),
        Exits(0, UNSOUND.format(2)),
    ),
    "no environment": (found_in(without("environment")), Exits(0, UNSOUND.format(2))),
    "no digests": (found_in(without("digests")), Exits(0, "gpu.json: its records have no digests")),
    "checks that are null": (found_in(top("checks", None)), Exits(0, "checks is no object")),
    "another command": (found_in(top("command", "natgrad predict")), Exits(0, "^$")),
    "a command that is a list": (found_in(top("command", [])), Exits(0, "^$")),
    **{
        name: (found_in(FILES[name]), Exits(0, NO_DOCUMENT))
        for name in ("empty", "half of it", "a list", "nested too deep", "a folder", "a pipe",
                     "a link to nothing", "a link to itself", "a device without an end")
    },
}  # fmt: skip


@over(SOURCES)
def test_a_report_shows_only_what_was_written(run, answer):
    answer.check(run)
