"""Commands on the records of a folder: join them, write them into one file, refute one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from benchmarks.leaderboard import RULES
from benchmarks.leaderboard.console import (
    DEFAULT_OUT,
    EntryOption,
    OutOption,
    existing,
    say,
    scorable,
    sentences,
    warn,
)
from benchmarks.leaderboard.records import Record, trial_key
from benchmarks.leaderboard.store import Store
from ntk_analysis.cli.app import output


def merge(
    source: Annotated[Path, typer.Argument(help="another folder, or an archive of export")],
    out: OutOption = DEFAULT_OUT,
) -> None:
    """Copy the trials and refutations of another folder or of an archive into this one."""
    with sentences():
        merged = Store.open(out, RULES).merge(source)
    output.print(
        f"{len(merged.copied)} records copied, {merged.same} were here, {len(merged.kept)} differ "
        f"and stay as they are here, {len(merged.invalid)} files are no valid records",
        highlight=False,
    )
    warn([*(f"record {key} differs from the one here" for key in merged.kept), *merged.invalid])


def export(
    archive: Annotated[Path, typer.Argument(help="a file of JSON lines; .gz compresses it")],
    out: OutOption = DEFAULT_OUT,
) -> None:
    """Write all records of a folder into one file, a line each, for merge and other programs."""
    with sentences():
        store = existing(out)
        number = store.export(archive)
        warn(store.quarantined)
        say(f"wrote {number} records into {archive}")


def refute(
    key: Annotated[str, typer.Argument(help="of a trial of the row, or its first digits")],
    reason: Annotated[str, typer.Option(help="what does not hold, and how one sees it")] = "",
    with_: Annotated[
        list[str] | None,
        typer.Option(
            "--with", help="trials that show it: keys of this folder, another folder, an archive"
        ),
    ] = None,
    rerun: Annotated[
        bool, typer.Option("--rerun", help="repeat the trial, and refute it only if it differs")
    ] = False,
    entry: EntryOption = None,
    submitter: Annotated[str, typer.Option(help="who refutes it")] = "",
    out: OutOption = DEFAULT_OUT,
) -> None:
    """Refute a row: it stays on the page with the reason and the evidence, and loses its rank.

    The key of a refutation withdraws it. Nothing is removed.

    Exit code: 0; 2 where there is nothing of that key, or no reason.
    """
    from benchmarks.leaderboard import refutations
    from benchmarks.leaderboard.identity import provenance

    with sentences():
        store = existing(out)
        records = scorable(store)
        refuted = refutations.named(records, key)
        evidence = _evidence(store, records, with_ or [])
        if rerun:
            repeated, difference = _repeated(refuted, entry)
            if not difference:
                say("confirmed: a repeat reached the same in as many steps; nothing was recorded")
                return
            evidence, reason = [*evidence, repeated], reason or difference
        config = refutations.refutation(refuted, reason, evidence)
        if store.has(trial_key(config)):
            raise ValueError(f"{refuted['key'][:12]} was refuted in these words already")
        told = {
            "command": refuted["command"],
            "facts": {**provenance(), "submitter": submitter, "title": refuted["facts"]["title"]},
            "outcome": {},
        }
        written = store.write(config, told)
        say(f"{config['role']} {written['key']} of {config['contestant']} on {config['workload']}")


def _evidence(store: Store, records: list[Record], names: list[str]) -> list[Record]:
    """The trials that are named by keys of a folder, or that stand in other folders or archives."""
    from benchmarks.leaderboard import refutations
    from benchmarks.leaderboard.record_form import misfit
    from benchmarks.leaderboard.versions import counts

    found: list[Record] = []
    for name in names:
        if not Path(name).exists():
            found.append(refutations.named(records, name))
            continue
        read = store.read_from(Path(name))
        trials = [record for record in read if not misfit(record) and counts(record)]
        if not trials:
            raise ValueError(f"{name} holds no evaluation trial, which alone is evidence")
        found += trials
    return list({record["key"]: record for record in found}.values())


def _repeated(trial: Record, entry: Path | None) -> tuple[Record, str]:
    """A trial run once more, and how it differs from the one that is there."""
    from benchmarks.leaderboard import refutations
    from benchmarks.leaderboard.contestant import contestants, enlist
    from benchmarks.leaderboard.identity import identity
    from benchmarks.leaderboard.trial import execute

    if not refutations.is_trial(trial):
        raise ValueError("a refutation cannot be run again: name the trial that it refutes")
    config = trial["config"]
    if any(config[name] != value for name, value in identity().items()):
        raise ValueError(
            "steps repeat exactly on the same machine with the same versions alone, and the trial "
            "is of others: run its command, and give what comes of it by --with"
        )
    if entry is not None:
        enlist(entry)
    if config["contestant"] not in contestants():
        raise ValueError(
            f"{config['contestant']} is no contestant of the project: give its file by --entry"
        )
    repeated = {**trial, **execute(config)}
    return repeated, refutations.difference(trial, repeated["outcome"])
