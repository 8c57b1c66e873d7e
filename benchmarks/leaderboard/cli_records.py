"""Commands on the records of a folder: join them, write them into one file, refute one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.leaderboard import RULES
from benchmarks.leaderboard.console import (
    DEFAULT_OUT,
    EntryOption,
    OutOption,
    enlisted,
    existing,
    say,
    scorable,
    sentences,
    warn,
)
from benchmarks.leaderboard.records import Record, trial_key
from benchmarks.leaderboard.store import Store


def merge(
    source: Annotated[list[Path], typer.Argument(help="other folders, or archives of export")],
    out: OutOption = DEFAULT_OUT,
) -> None:
    """Copy the trials and refutations of other folders or of archives into this one.

    Exit code: 0; 2 where one of them holds no record; those after it are not copied then.
    """
    with sentences():
        store = Store.open(out, RULES)
        for one in source:
            merged = store.merge(one)
            if merged.invalid and not (merged.copied or merged.same or merged.kept):
                raise ValueError(
                    f"{one} has no record of a leaderboard: {merged.invalid[0]}; name a folder of "
                    "trials, or an archive that export wrote"
                )
            say(
                f"{one}: {len(merged.copied)} records copied, {merged.same} were here, "
                f"{len(merged.kept)} differ and stay as they are here, {len(merged.invalid)} are "
                "no valid records"
            )
            warn(f"record {key} differs from the one here" for key in merged.kept)
            warn(merged.invalid)


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
        refutations.check_refutable(refuted)
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
        if refutations.is_withdrawn(refuted, records):
            raise ValueError(f"{refuted['key'][:12]} was withdrawn already")
        told = {
            "command": refuted["command"],
            "facts": {**provenance(), "submitter": submitter, "title": refuted["facts"]["title"]},
            "outcome": {},
        }
        written = store.write(config, told)
        count = len(evidence)
        shown = f"with {count} trial{'s' * (count > 1)}" if evidence else "without a trial"
        say(
            f"{config['role']} {written['key']} of {config['contestant']} on {config['workload']}, "
            f"{shown} as evidence"
        )
        if config["kind"] == refutations.REFUTATION:
            say(
                f"{config['contestant']}, as this version of it, has no rank on any workload until "
                f"that is withdrawn: refute {written['key'][:12]}"
            )


def _evidence(store: Store, records: list[Record], names: list[str]) -> list[Record]:
    """The trials that are named by keys of a folder, or that stand in other folders or archives."""
    from benchmarks.leaderboard import refutations
    from benchmarks.leaderboard.record_form import misfit
    from benchmarks.leaderboard.versions import counts

    found: list[Record] = []
    for name in names:
        if not Path(name).exists():
            if not re.fullmatch("[0-9a-f]+", name):
                raise ValueError(f"{name} is no folder, no archive and no key of a trial")
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
    from benchmarks.leaderboard.contestant import contestants
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
        enlisted(entry)
    if (name := config["contestant"]) not in contestants():
        raise ValueError(
            f"{entry} has no contestant {name!r}"
            if entry is not None
            else f"{name} is no contestant of the project: give its file by --entry"
        )
    repeated = {**trial, **execute(config)}
    return repeated, refutations.difference(trial, repeated["outcome"])
