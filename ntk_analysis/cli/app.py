"""What the subcommands of ``natgrad`` share: the application, consoles, progress and errors."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from typer.core import TyperCommand

import natgrad_flax as ng
from ntk_analysis.files import own_folder
from ntk_analysis.results import FILE_NAME

if TYPE_CHECKING:
    from rich.table import Table

    from ntk_analysis.experiment import Experiment
    from ntk_analysis.reproduce.runner import Reproduction

Document = dict[str, Any]
Present = Callable[[Document, Sequence[Document]], "Table"]
Notes = Callable[[Document, Sequence[Document]], Iterable[str]]
Draw = Callable[[Document, Sequence[Document], Path], Iterable[Path]]
_Command = TypeVar("_Command", bound=Callable[..., None])

_STANDARD_OUTPUT = "standard output"

app = typer.Typer(
    name="natgrad",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        output.print(f"natgrad {ng.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="print the version"),
    ] = False,
) -> None:
    """Natural-gradient training of wide networks, beside what kernel theory predicts."""


# text is taken as it is: a name of the user's is no markup
_AS_IT_IS: dict[str, Any] = {"markup": False, "emoji": False, "highlight": False}


class _Output(Console):
    """Standard output, whose errors name it."""

    def print(self, *objects: Any, **options: Any) -> None:
        """As ``Console.print``.

        Raises:
          OSError: it cannot be written to, as where it is a file on a full disk.
        """
        try:
            super().print(*objects, **options)
        except OSError as error:
            raise OSError(error.errno, error.strerror, _STANDARD_OUTPUT) from error


output = _Output(**_AS_IT_IS)
errors = Console(stderr=True, **_AS_IT_IS)


def filled(**words: str) -> Callable[[_Command], _Command]:
    """Decorates a command: its docstring, which is its help, gets words from elsewhere."""

    def fill(command: _Command) -> _Command:
        command.__doc__ = (command.__doc__ or "").format(**words)
        return command

    return fill


class WithLists(TyperCommand):
    """Lets every option of type list take several values: ``--widths 4096 4096``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Repeats the name of the option before each of its values."""
        lists = {
            name
            for param in self.params
            if getattr(param, "multiple", False)
            for name in param.opts
        }
        spread: list[str] = []
        current = None
        for arg in args:
            if arg.startswith("-"):
                current = arg if arg in lists else None
            elif current and spread[-1] != current:
                spread.append(current)
            spread.append(arg)
        return super().parse_args(ctx, spread)


class _Bar(Progress):
    """A bar on standard error that leaves nothing behind."""

    def say(self, sentence: str) -> None:
        """Prints a sentence to standard output, where the bar is not in its way."""
        self.stop()
        output.print(sentence)
        self.start()


def progress_bar() -> _Bar:
    """The bar of a command."""
    return _Bar(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=errors,
        transient=True,
    )


def fail(message: object) -> NoReturn:
    """Prints one sentence and exits with code 2, which says bad arguments."""
    complain(message)
    raise typer.Exit(2)


def complain(message: object) -> None:
    """Prints one sentence as an error."""
    errors.print(f"error: {message}", style="red", soft_wrap=True)


@contextmanager
def work(out: Path | None, kept: str) -> Iterator[None]:
    """Owns the folder of a command; turns what goes wrong into one sentence and an exit code.

    All that a command does stands inside, to the last figure and line.

    Args:
      out: the folder that the command writes to, or None.
      kept: what is kept of an interrupted run.
    """
    try:
        with warnings.catch_warnings(), nullcontext() if out is None else own_folder(out):
            warnings.showwarning = _show_warning
            yield
    except ValueError as error:
        fail(error)
    except MemoryError as error:
        fail(f"out of memory; ask for smaller sizes ({error})")
    except OSError as error:
        place = error.filename or out
        if place == _STANDARD_OUTPUT:
            _give_up_output()
        fail(f"cannot write to {place}: {error.strerror or error}")
    except KeyboardInterrupt:
        errors.print(f"interrupted; {kept} in {out}, and the same command goes on from there")
        raise typer.Exit(130) from None


def _show_warning(message: Warning | str, *where: object, **more: object) -> None:
    """A warning as a sentence, without the line of the library that it comes from."""
    errors.print(f"warning: {message}", style="yellow", soft_wrap=True)


def _give_up_output() -> None:
    """Nothing more is written to standard output: what its buffer holds would fail at exit, too."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def show(
    experiment: Experiment, what: str, table: Present, notes: Notes, draw: Draw, out: Path
) -> None:
    """Prints what a run found and draws its figures.

    Args:
      experiment: what was found.
      what: its records are called, in plural.
      table: of a document and the records to show.
      notes: sentences on them.
      draw: writes figures of them into a folder.
      out: the folder.
    """
    say_resumed(experiment, what)
    document, records = experiment.document, experiment.records
    output.print(table(document, records))
    for note in notes(document, records):
        output.print(f"note: {note}")
    names = [FILE_NAME, *(file.name for file in draw(document, records, out))]
    output.print(f"wrote {', '.join(names)} to {out}")


def say_resumed(experiment: Experiment | Reproduction, what: str) -> None:
    """Says which part of an earlier run was kept."""
    if experiment.resumed:
        output.print(f"{len(experiment.resumed)} {what} were finished already (--fresh reruns)")
