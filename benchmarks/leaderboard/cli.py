"""``python -m benchmarks.leaderboard``: run trials, score them, write the page."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from benchmarks.leaderboard import RULES, cli_records
from benchmarks.leaderboard.console import (
    DEFAULT_OUT,
    EntryOption,
    OutOption,
    WorkloadOption,
    app,
    enlisted,
    existing,
    say,
    scorable,
    sentences,
    warn,
)
from benchmarks.leaderboard.progress import Display
from benchmarks.leaderboard.records import trial_key
from benchmarks.leaderboard.runner import Summary
from benchmarks.leaderboard.runner import run as run_trials
from benchmarks.leaderboard.store import Store
from ntk_analysis.cli.app import WithLists, errors, output

if TYPE_CHECKING:
    from benchmarks.leaderboard.plan import Plan

WIDE = 130
"""Columns of a terminal that take the whole board."""
CACHE = "JAX_COMPILATION_CACHE_DIR"
"""Where JAX keeps compiled programs for later processes."""

for _command in (cli_records.merge, cli_records.export):
    app.command()(_command)
app.command(cls=WithLists)(cli_records.refute)


@app.command(cls=WithLists)
def run(
    profile: Annotated[
        str, typer.Option(help="default, diagnosis, training, large, networks or full")
    ] = "default",
    workload: Annotated[list[str] | None, typer.Option(help="instead of the profile's")] = None,
    contestant: Annotated[list[str] | None, typer.Option(help="instead of the profile's")] = None,
    seeds: Annotated[int | None, typer.Option(help="number of evaluation seeds")] = None,
    ruleset: Annotated[
        str | None, typer.Option(help="tuned or self-tuning, instead of both")
    ] = None,
    out: OutOption = DEFAULT_OUT,
    jobs: Annotated[int, typer.Option(help="processes for trials without a clock")] = 1,
    scheduler: Annotated[
        str | None, typer.Option(help="of Dask: an address, or local for workers of this machine")
    ] = None,
) -> None:
    """Run the trials of a leaderboard that are not in the folder yet, and write its page.

    First the learning rates of the tuned contestants, then everyone on the same seeds, then the
    isotropy and the cost of the structures. Interrupted or killed, the same command goes on.

    Exit code: 0; 1 where a trial raised an error; 2 on bad arguments; 130 when interrupted.
    """
    from benchmarks.leaderboard.cluster import LOCAL, common_identity, exposure
    from benchmarks.leaderboard.identity import identity
    from benchmarks.leaderboard.plan import make_plan
    from benchmarks.leaderboard.trial import execute

    with sentences():
        plan = make_plan(profile, workload, contestant, seeds, ruleset)
        if scheduler is not None and scheduler != LOCAL:
            warn(filter(None, [exposure(scheduler)]))
            plan = replace(plan, machine=common_identity(scheduler, identity))
        _carry_out(
            plan, Store.open(out, RULES),
            partial(run_trials, execute=execute, jobs=jobs, scheduler=scheduler, identity=identity),
        )  # fmt: skip


@app.command()
def add(
    entry: Annotated[Path, typer.Argument(help="a Python file with CONTESTANTS")],
    submitter: Annotated[str, typer.Option(help="who enters it, for its rows")] = "",
    workload: Annotated[
        list[str] | None, typer.Option(help="instead of those of the board in the folder")
    ] = None,
    out: OutOption = DEFAULT_OUT,
) -> None:
    """Enter the contestants of a file: run what they lack on the board of a folder, nothing else.

    On the workloads and seeds of the board that the folder holds, or the default ones in a new
    folder; with --workload on those, and the board of those alone is shown. Interrupted or killed,
    the same command goes on. Their rows stand beside all earlier.

    Exit code: as that of run.
    """
    from benchmarks.leaderboard.entry import check_entry
    from benchmarks.leaderboard.plan import extended
    from benchmarks.leaderboard.trial import execute

    with sentences():
        members = enlisted(entry)
        for contestant in members:
            for sentence in check_entry(contestant):
                errors.print(sentence, highlight=False, markup=False)
        store = Store.open(out, RULES)
        names = [member.name for member in members]
        plan = extended(scorable(store, quiet=True), names, workload)
        told = partial(execute, submitter=submitter)
        _carry_out(plan, store, partial(run_trials, execute=told), workload or ())


@app.command("check-entry")
def check_entry_(
    entry: Annotated[Path, typer.Argument(help="a Python file with CONTESTANTS")],
) -> None:
    """Try whether the contestants of a file keep the rules, on a smoke workload; nothing is stored.

    Exit code: 0; 2 where one does not, with the reason.
    """
    from benchmarks.leaderboard.entry import check_entry

    broken: list[ValueError] = []
    with sentences():
        for contestant in enlisted(entry):
            try:
                for sentence in check_entry(contestant):
                    say(sentence)
                say(f"{contestant.name} keeps the rules {RULES}")
            except ValueError as error:
                broken.append(error)
        if broken:
            warn(broken[:-1])
            raise broken[-1]


def _carry_out(
    plan: Plan,
    store: Store,
    run_stage: Callable[..., Summary],
    shown: Sequence[str] = (),
) -> None:
    """Runs the stages of a plan, each by what the one before has found, and shows the board.

    ``shown`` are the workloads of that; all in the folder by default.
    """
    if CACHE in os.environ:
        raise ValueError(
            f"{CACHE} is set, and a program that is found there would count as compiled in no "
            "time: unset it, so that all contestants compile anew"
        )
    stages = (
        ("tuning", lambda: list(plan.tuning())),
        ("evaluation", lambda: list(plan.evaluation(scorable(store, quiet=True)))),
        ("isotropy and cost", lambda: list(plan.structures())),
    )
    total, ended, display = Summary(), [], Display(errors)
    for name, configs in stages:
        errors.print(name, style="bold")
        summary = run_stage(configs(), store, display=display)
        ended.append(summary)
        errors.print(str(summary), highlight=False, markup=False)
        for failure in summary.failed:
            errors.print(str(failure), style="red", highlight=False, markup=False)
        warn(summary.quarantined)
        if summary.interrupted:
            raise typer.Exit(130)
        total.trial_seconds += summary.trial_seconds
        total.seconds += summary.seconds
    if total.trial_seconds:
        share = (total.seconds - total.trial_seconds) / total.trial_seconds
        errors.print(f"around the trials: {share:.2%} of their time", highlight=False)
    _show(store, shown)
    if any(summary.failed for summary in ended):
        raise typer.Exit(1)


def _show(store: Store, workloads: Sequence[str]) -> None:
    from benchmarks.leaderboard import board, page

    records = scorable(store)
    _print_boards(board.build(records, workloads))
    written = page.write(records, store.folder, workloads=workloads)
    say(f"wrote {written}")


def _print_boards(document: dict[str, Any], clock: str = "seconds") -> None:
    from benchmarks.leaderboard import tables

    # a file has no width to keep to
    console = output if output.is_terminal else Console(width=WIDE)
    for device in document["devices"]:
        console.print(tables.board_table(device, clock, wide=console.width >= WIDE))
        for sentence in tables.refutations(device):
            say(sentence)


@app.command()
def score(
    out: OutOption = DEFAULT_OUT,
    clock: Annotated[str, typer.Option(help="seconds, training or steps")] = "seconds",
    workload: WorkloadOption = None,
) -> None:
    """Print the ranking of the trials in a folder, for each device."""
    from benchmarks.leaderboard import board

    with sentences():
        _print_boards(board.build(scorable(existing(out)), workload or ()), clock)


@app.command()
def page(
    out: OutOption = DEFAULT_OUT,
    readme: Annotated[
        Path | None, typer.Option(help="also put the table between the markers of this file")
    ] = None,
    command: Annotated[
        str | None, typer.Option(help="what made the trials, for that table [make leaderboard]")
    ] = None,
    workload: WorkloadOption = None,
) -> None:
    """Write the page of the trials in a folder: one HTML file beside them."""
    from benchmarks.leaderboard import board
    from benchmarks.leaderboard import readme as markers
    from benchmarks.leaderboard.page import write

    with sentences():
        if readme is not None:
            markers.around(readme)
        records = scorable(existing(out))
        say(f"wrote {write(records, out, workloads=workload or ())}")
        if readme is not None:
            made_by = command or markers.COMMAND
            built = board.build(records, workload or ())
            changed = markers.update(readme, built, command=made_by)
            say(f"{readme} {'changed' if changed else 'is up to date'}")


@app.command()
def trial(
    workload: str,
    contestant: str,
    seed: Annotated[int, typer.Option(help="of parameters, batches and sampled targets")] = 0,
    learning_rate: Annotated[float | None, typer.Option(help="of a tuned contestant")] = None,
    no_target: Annotated[
        bool, typer.Option("--no-target", help="to the end of the budget")
    ] = False,
    structure: Annotated[bool, typer.Option("--structure", help="isotropy and cost")] = False,
    entry: EntryOption = None,
) -> None:
    """Run one trial and print its outcome as JSON; nothing is stored."""
    from benchmarks.leaderboard.contestant import find_contestant
    from benchmarks.leaderboard.targets import target_of
    from benchmarks.leaderboard.trial import configuration, execute
    from benchmarks.leaderboard.workload import find_workload

    with sentences():
        if structure and learning_rate is not None:
            raise ValueError("isotropy and cost have no learning rate: leave --learning-rate out")
        if entry is not None:
            enlisted(entry)
        where = find_workload(workload)
        target = None if no_target or structure else float(target_of(where)["target"])
        config = configuration(
            where, find_contestant(contestant).name, seed,
            target=target,
            role="structure" if structure else "evaluation",
            learning_rate=learning_rate,
            kind="structure" if structure else "timed",
        )  # fmt: skip
        output.print_json(data=execute(config)["outcome"])


@app.command()
def freeze(
    workload: str,
    contestant: Annotated[
        list[str] | None, typer.Option(help="baselines to tune, instead of all of them")
    ] = None,
    seeds: Annotated[int, typer.Option(help="of the best baseline, to the end of its steps")] = 20,
    out: OutOption = DEFAULT_OUT,
) -> None:
    """Set the target of a new version of a workload by its best tuned baseline.

    Steps alone end these trials, so that a busy machine gives the same target as an idle one.
    """
    from benchmarks.leaderboard import plan, targets
    from benchmarks.leaderboard.trial import configuration, execute
    from benchmarks.leaderboard.workload import find_workload

    with sentences():
        where = find_workload(workload)
        plan.check_seeds(seeds)
        tried = plan.baselines(contestant)
        store, display = Store.open(out, RULES), Display(errors)
        trials = [config for entry in tried for config in plan.freezing_configs(where.name, entry)]
        run_trials(trials, store, execute, display=display)
        best, rate = plan.best_baseline(where.name, scorable(store, quiet=True), tried)
        finals = [
            configuration(where, best.name, seed, target=None, role="freezing", learning_rate=rate)
            for seed in range(seeds)
        ]
        run_trials(finals, store, execute, display=display)
        keys = [store.read(trial_key(config)) for config in finals]
        names = [entry.name for entry in tried]
        path = targets.write_target(where, [record for record in keys if record], tried=names)
        found = targets.target_of(where)
        say(f"wrote {path.name}: {found['target']:g}, {found['how']}")


@app.command()
def torture(
    kills: Annotated[int, typer.Option(help="how many SIGKILLs")] = 100,
    runners: Annotated[int, typer.Option(help="runners on the folder at a time")] = 1,
) -> None:
    """Kill runners at random moments and count what is lost: it must be nothing."""
    from benchmarks.leaderboard import torture as torment

    with sentences():
        report = torment.torture(kills, runners, console=errors)
    output.print(report.table())
    if not report.passed:
        raise typer.Exit(1)


@app.command("list")
def list_them() -> None:
    """List workloads with their targets, and contestants, a line each that begins with its name."""
    from benchmarks.leaderboard.contestant import contestants
    from benchmarks.leaderboard.targets import target_of
    from benchmarks.leaderboard.workload import workloads

    for name, workload in workloads().items():
        try:
            target = f"target {target_of(workload)['target']:g}"
        except ValueError as error:
            target = str(error)
        missing = f"; {reason}" if (reason := workload.missing()) else ""
        say(f"{name}: {workload.title} (version {workload.version}; {target}{missing})")
    say("")
    for name, entry in contestants().items():
        facts = entry.facts()
        told = {"Fisher": facts["fisher"], "damping": facts["damping"], "rate": facts["rate_rule"]}
        words = "; ".join(f"{what} {words}" for what, words in told.items() if words)
        say(f"{name}: {facts['title']} ({words})")
