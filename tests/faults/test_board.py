"""The leaderboard with folders, records, names and options that nobody should have made."""

import os
import shutil
import tempfile
from functools import partial
from pathlib import Path

import pytest
from boards import board, command, copied, put, record
from fault_harness import Exits, Refused, over
from strange_files import holding, link, of_size

from benchmarks.leaderboard import RULES, locks
from benchmarks.leaderboard.reading import LARGEST
from benchmarks.leaderboard.runner import run
from benchmarks.leaderboard.store import MANIFEST, Store

LONG = "a" * 300
ANY = (ValueError, TypeError, OSError)


def on(*harms, verb="score", arguments=()):
    """A command on a copy of the board after the harms."""
    with copied(*harms) as folder:
        arguments = [folder / a if isinstance(a, Path) else a for a in arguments]
        return command(verb, *arguments, "--out", folder)


def at(name, make):
    """Puts something into the place of a file or folder of the board."""

    def harm(folder):
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        make(path)

    return harm


HERE = f"trials/aa/aa{'0' * 62}.json"
LOOP = link(None)


def scored(says):
    """The board is printed all the same, and a sentence says what was wrong with the file."""
    return Exits(0, f"(?=.*{says})(?=.*kfac)")


DEEP = b"[" * 100_000
FILES = {
    "a pipe": (HERE, os.mkfifo, scored("it is a folder, a pipe or a device")),
    "a folder": (HERE, Path.mkdir, scored("it is a folder, a pipe or a device")),
    "a device": (HERE, link("/dev/zero"), scored("it is a folder, a pipe or a device")),
    "a link to itself": (HERE, LOOP, scored("Too many levels of symbolic links")),
    "a link to nowhere": (HERE, link("nowhere"), scored("")),
    "too large": (HERE, of_size(LARGEST + 1), scored("more than 16 MiB")),
    "nested too deep": (HERE, holding(DEEP), scored("nested too deep")),
    "nested objects": (HERE, holding(b'{"a":' * 100_000), scored("nested too deep")),
    "empty": (HERE, holding(b""), scored("the file is empty")),
    "zeros": (HERE, holding(b"\0" * 4096), scored("the file is empty")),
    "binary": (HERE, holding(b"\xff\xfe\x00"), scored("not JSON")),
    "a list": (HERE, holding(b"[1]"), scored("its JSON is no object")),
    "NaN": (HERE, holding(b'{"schema": 1, "a": NaN}'), scored("numbers that are not finite")),
    "of another form": (HERE, holding(b'{"schema": "1"}'), scored("of schema '1'")),
    "a name with markup": ("trials/aa/[red]x[bold].json", holding(b"x"), scored("not JSON")),
    "a name that clears the screen": (
        "trials/aa/\x1b[2J.json", holding(b"x"), scored("aa/\ufffd\\[2J.json")
    ),
    "no trials but a file": ("trials", holding(b"x"), Exits(2, "no trials to score")),
    "no trials but a link to itself": ("trials", LOOP, Exits(2, "no trials to score")),
    "a pipe as folder of trials": ("trials/ab", os.mkfifo, scored("")),
    "a file as quarantine": ("quarantine", holding(b"x"), scored("")),
    "a lock that is a folder": ("trials/aa/.x.lock", Path.mkdir, scored("")),
    "a pipe as manifest": (MANIFEST, os.mkfifo, Exits(2, "is not the manifest")),
    "a folder as manifest": (MANIFEST, Path.mkdir, Exits(2, "is not the manifest")),
    "a manifest nested too deep": (MANIFEST, holding(DEEP), Exits(2, "is not the manifest")),
    "an empty manifest": (MANIFEST, holding(b""), Exits(2, "is not the manifest")),
    "a list as manifest": (MANIFEST, holding(b"[]"), Exits(2, "is not the manifest")),
    "a manifest of other rules": (
        MANIFEST, holding(b'{"rules": ["[/x]"]}'), Exits(2, r"trials of rules \['\[/x\]'\]")
    ),
    "a manifest that is a link to itself": (MANIFEST, LOOP, Exits(2, "holds no leaderboard")),
}  # fmt: skip


@over(
    {name: (partial(on, at(place, make)), answer) for name, (place, make, answer) in FILES.items()}
)
def test_files_among_the_trials(run, answer):
    answer.check(run)


ABSENT = object()


def signed(part, name, value):
    """A record with a right digest and one entry that is not what it should be, or not there."""

    def harm(folder):
        entry = record("adam", "digits-mse")
        place = entry
        for step in filter(None, part.split(".")):
            place = place[step]
        place[name] = value
        if value is ABSENT:
            del place[name]
        put(folder, entry)

    return harm


SHAPES = {
    "no rate": ("config", "learning_rate", ABSENT, "config.learning_rate is not a number or null"),
    "no target": ("config", "target", ABSENT, "config.target is not a number or null"),
    "no facts": ("", "facts", {}, "facts.title is not a text"),
    "no status": ("outcome", "status", ABSENT, "outcome.status is not one of reached"),
    "a rate as text": ("config", "learning_rate", "fast", "config.learning_rate is not a number"),
    "a target as text": ("config", "target", "low", "config.target is not a number"),
    "a seed as list": ("config", "seed", [1], "config.seed is not a number"),
    "a name as number": ("config", "contestant", 7, "config.contestant is not a text"),
    "a role as null": ("config", "role", None, "config.role is not a text"),
    "a machine as list": ("config", "environment", [], "config.environment is not a dictionary"),
    "cores as list": ("config.environment", "cores", [2], "environment is not a dictionary of"),
    "no device": ("config.environment", "device", None, "environment is not a dictionary of"),
    "an endless integer": ("config", "seed", 10**400, "config.seed is not a number"),
    "a title as number": ("facts", "title", 1, "facts.title is not a text"),
    "a metric as null": ("facts", "metric", None, "facts.metric is not a text"),
    "a date as number": ("", "date", 20261129, "date is not a text"),
    "a command as null": ("", "command", None, "command is not a text"),
    "an unknown status": ("outcome", "status", "won", "outcome.status is not one of reached"),
    "a status as list": ("outcome", "status", [], "outcome.status is not one of reached"),
    "no reason": ("outcome", "reason", None, "outcome.reason is not a text"),
    "negative seconds": ("outcome", "seconds_to_target", -1.0, "is not a number of at least 0"),
    "no seconds": ("outcome", "seconds_to_target", None, "is not a number of at least 0"),
    "seconds as bool": ("outcome", "compile_seconds", True, "is not a number of at least 0"),
    "a curve as text": ("outcome", "curve", "up", "outcome.curve.steps is not a list"),
    "a short column": ("outcome.curve", "train", [1.0], "of different lengths"),
    "steps that fall": ("outcome.curve", "steps", [0, 10, 5], "steps do not ascend"),
    "negative steps": ("outcome.curve", "steps", [-2, 0, 5], "steps do not ascend"),
    "losses as texts": ("outcome.curve", "train", ["a", "b", "c"], "holds what is no number"),
}


@over(
    {
        name: (partial(on, signed(*entry)), scored(f"is left out: .*{says}"))
        for name, (*entry, says) in SHAPES.items()
    }
)
def test_whole_records_that_are_no_trials(run, answer):
    answer.check(run)


def page(make, *, harms=()):
    with copied(*harms) as folder:
        path = folder / "README.md"
        make(path)
        return command("page", "--out", folder, "--readme", path)


OUT = {
    "too long": LONG,
    "a file": __file__,
    "in a file": f"{__file__}/x",
    "in /proc": "/proc/x",
    "a name that is markup": "/proc/[/x]",
}
COMMANDS = {
    "no README": (partial(page, lambda path: None), Exits(2, "README.md: No such file")),
    "a README that is a folder": (partial(page, Path.mkdir), Exits(2, "README.md: it is a folder")),
    "a README that is a pipe": (partial(page, os.mkfifo), Exits(2, "README.md: it is a folder")),
    "a README that is a device": (
        partial(page, link("/dev/zero")), Exits(2, "README.md: it is a folder")
    ),
    "a README that is a link to itself": (partial(page, LOOP), Exits(2, "README.md: Too many lev")),
    "a binary README": (partial(page, holding(b"\xff\xfe")), Exits(2, "is not a text in UTF-8")),
    "a README without markers": (partial(page, holding(b"x")), Exits(2, "must have one line <!--")),
    "a README with a name too long": (
        lambda: command("page", "--out", board(), "--readme", LONG), Exits(2, "File name too long")
    ),
    "a folder as page": (
        partial(on, at("leaderboard.html", Path.mkdir), verb="page"), Exits(2, "Is a directory")
    ),
    **{
        f"{verb} --out {name}": (
            partial(command, verb, *more, "--out", out),
            Exits(2, "not a folder|cannot write to|holds no leaderboard|File name too long"),
        )
        for name, out in OUT.items()
        for verb, more in (("score", ()), ("page", ()), ("merge", (".",)))
    },
    "merge of nothing": (
        partial(on, verb="merge", arguments=["/nowhere"]), Exits(2, "holds no leaderboard")
    ),
    "merge of itself": (partial(on, verb="merge", arguments=[Path()]), Exits(2, "to merge into")),
    "merge of a long name": (
        partial(on, verb="merge", arguments=[LONG]), Exits(2, "holds no leaderboard")
    ),
    **{
        f"trial at rate {rate}": (
            partial(command, "trial", "digits-fit", "adam", "--learning-rate", rate),
            Exits(2, "learning_rate must be positive and finite"),
        )
        for rate in ("nan", "inf", "0", "-0.1")
    },
    "trial of an untuned contestant at a rate": (
        partial(command, "trial", "digits-fit", "exact", "--learning-rate", "0.1"),
        Exits(2, "exact has its learning rate by a rule"),
    ),
    "trial of a line search at a rate": (
        partial(command, "trial", "digits-fit", "lbfgs", "--learning-rate", "0.1"),
        Exits(2, "line search.*leave learning_rate out"),
    ),
    "trial without a rate": (
        partial(command, "trial", "digits-fit", "adam"), Exits(2, "its trials need a learning rate")
    ),
    "isotropy at a rate": (
        partial(command, "trial", "digits-fit", "kfac", "--structure", "--learning-rate", "1"),
        Exits(2, "leave --learning-rate out"),
    ),
    **{
        f"trial of seed {seed}": (
            partial(command, "trial", "digits-fit", "exact", "--seed", seed),
            Exits(2, "seed must be an integer of 0 to 4294967295"),
        )
        for seed in ("-1", "4294967296", "99999999999999999999")
    },
    **{
        f"run with {seeds} seeds": (
            partial(command, "run", "--seeds", seeds, "--out", "/proc/x"),
            Exits(2, "seeds must be at least 1, and at most 1000"),
        )
        for seeds in ("0", "-3", "1001", "1000000000")
    },
}  # fmt: skip


@over(COMMANDS)
def test_commands(run, answer):
    answer.check(run)


def locked(make, monkeypatch):
    """A run of one trial where the lock of the machine is something else."""
    with copied() as folder:
        make(folder / locks.MACHINE_LOCK)
        monkeypatch.setattr(tempfile, "tempdir", str(folder))
        config = {"rules": RULES, "kind": "timed", "workload": "w", "contestant": "c"}
        return run([config], Store.open(folder, RULES), lambda config: {})


@pytest.mark.parametrize("make", [Path.mkdir, LOOP], ids=["a folder", "a link to itself"])
def test_the_lock_of_the_machine(make, monkeypatch):
    Refused("the lock of this machine cannot be opened", ANY).check(
        lambda: locked(make, monkeypatch)
    )
