"""What the commands of the leaderboard share: the application, its folder, and how they speak."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from benchmarks.leaderboard import RULES
from benchmarks.leaderboard.records import Record
from benchmarks.leaderboard.store import MANIFEST, Store
from benchmarks.leaderboard.texts import printable
from ntk_analysis.cli.app import errors, fail, output

if TYPE_CHECKING:
    from benchmarks.leaderboard.contestant import Contestant

app = typer.Typer(
    name="python -m benchmarks.leaderboard",
    help="Optimizers against frozen targets, natural-gradient ones at their theoretical rates.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

OutOption = Annotated[Path, typer.Option(help="folder of the trials")]
DEFAULT_OUT = Path("leaderboard")

WorkloadOption = Annotated[
    list[str] | None, typer.Option("--workload", help="of the board, instead of all of them")
]

EntryOption = Annotated[
    Path | None,
    typer.Option("--entry", help="the file of a contestant that is not one of the project's"),
]


@contextmanager
def sentences() -> Iterator[None]:
    """Turns what goes wrong into one sentence and exit code 2."""
    try:
        yield
    except ValueError as error:
        fail(printable(error))
    except OSError as error:
        # one of ours is a sentence, one of the system has a number and names a file
        fail(printable(f"{error.filename}: {error.strerror}" if error.strerror else error))


def say(text: str) -> None:
    """Prints a line as it is, without what would steer a terminal."""
    output.print(printable(text), highlight=False, markup=False, soft_wrap=True)


def scorable(store: Store, *, quiet: bool = False) -> list[Record]:
    """All records that can be scored; unless quiet, says which files hold none."""
    from benchmarks.leaderboard.record_form import misfit

    found = [(record, misfit(record)) for record in store.records()]
    if not quiet:
        warn(store.quarantined)
        warn(f"trial {record['key']} is left out: {why}" for record, why in found if why)
    return [record for record, why in found if not why]


def warn(lines: Iterable[object]) -> None:
    """Prints lines on standard error."""
    for line in lines:
        errors.print(printable(line), style="yellow", highlight=False, markup=False, soft_wrap=True)


def enlisted(entry: Path) -> list[Contestant]:
    """The contestants of a file; JAX is imported for them, and only then."""
    from benchmarks.leaderboard import contestant

    return contestant.enlist(entry)


def existing(out: Path) -> Store:
    """The store of a folder; ValueError where it holds none."""
    if not (out / MANIFEST).exists():
        raise ValueError(
            f"{out} holds no leaderboard; make one with `python -m benchmarks.leaderboard run "
            f"--out {out}`"
        )
    return Store.open(out, RULES)
