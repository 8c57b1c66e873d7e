"""What the subcommands of ``natgrad`` share: the application, consoles, progress and errors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from typer.core import TyperCommand

from ntk_analysis.results import FILE_NAME

app = typer.Typer(
    name="natgrad",
    help="Natural-gradient training of wide networks, beside what kernel theory predicts.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
output = Console()
errors = Console(stderr=True)


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


def progress_bar() -> Progress:
    """A bar on standard error that leaves nothing behind."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=errors,
        transient=True,
    )


def fail(message: object) -> NoReturn:
    """Prints one sentence and exits with code 2, which says bad arguments."""
    errors.print(f"error: {message}", style="red", highlight=False, markup=False, soft_wrap=True)
    raise typer.Exit(2)


@contextmanager
def work(out: Path | None, kept: str) -> Iterator[None]:
    """Turns what goes wrong in a command into one sentence and an exit code.

    Args:
      out: the folder that the command writes to.
      kept: what is kept of an interrupted run.
    """
    try:
        yield
    except ValueError as error:
        fail(error)
    except OSError as error:
        fail(f"cannot write to {out}: {error.strerror}")
    except KeyboardInterrupt:
        errors.print(
            f"interrupted; {kept} in {out}, and the same command goes on from there",
            highlight=False,
        )
        raise typer.Exit(130) from None


def say_resumed(experiment: Any, what: str) -> None:
    """Says which part of an earlier run was replaced or kept."""
    if experiment.restarted:
        output.print("the folder held results of other settings, which were replaced")
    if experiment.resumed:
        output.print(f"{len(experiment.resumed)} {what} were finished already (--fresh reruns)")


def say_written(out: Path, files: Iterable[Path]) -> None:
    """Names the files of a finished run."""
    names = [FILE_NAME, *(file.name for file in files)]
    output.print(f"wrote {', '.join(names)} to {out}", highlight=False, markup=False)
