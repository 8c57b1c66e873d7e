"""The command ``natgrad``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, NoReturn

import natgrad_datasets
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from typer.core import TyperCommand

from ntk_analysis.experiment import run_dynamics, work_units
from ntk_analysis.figures import draw_dynamics
from ntk_analysis.results import FILE_NAME, now, write_json
from ntk_analysis.settings import DynamicsSettings
from ntk_analysis.tables import dataset_table, dynamics_table, method_label

app = typer.Typer(
    name="natgrad",
    help="Natural-gradient training of wide networks, beside what kernel theory predicts.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
_output = Console()
_errors = Console(stderr=True)

_LISTS = ("--widths", "--classes", "--structures")


class _WithLists(TyperCommand):
    """Lets an option take several values: ``--widths 4096 4096``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        spread: list[str] = []
        current = None
        for arg in args:
            if arg.startswith("-"):
                current = arg if arg in _LISTS else None
            elif current and spread[-1] != current:
                spread.append(current)
            spread.append(arg)
        return super().parse_args(ctx, spread)


@app.command(cls=_WithLists)
def dynamics(
    dataset: Annotated[
        str | None,
        typer.Option(
            help="digits, mnist, fashion_mnist, cifar10 or gaussian [default: mnist where it is "
            "on this machine, else digits]"
        ),
    ] = None,
    classes: Annotated[
        list[int] | None,
        typer.Option(help="class ids, as in: --classes 0 7; two give targets +-0.5, more one-hot"),
    ] = None,
    num_train: Annotated[
        int | None, typer.Option(help="training samples N [default: 100; digits: 40]")
    ] = None,
    num_test: Annotated[
        int | None, typer.Option(help="test samples [default: 100; digits: 50]")
    ] = None,
    widths: Annotated[
        list[int] | None,
        typer.Option(
            help="hidden widths, as in: --widths 4096 4096 (the paper's) [default: 2048 2048]"
        ),
    ] = None,
    activation: Annotated[
        str, typer.Option(help="relu, tanh, erf, gelu, leaky_relu or identity")
    ] = "relu",
    weight_variance: Annotated[float, typer.Option(help="sigma_w^2")] = 2.0,
    bias_variance: Annotated[float, typer.Option(help="sigma_b^2; 0 means no biases")] = 0.0,
    structures: Annotated[
        list[str] | None,
        typer.Option(
            help="gd, exact, block-diagonal, block-tri-diagonal, kfac, unit-wise, diagonal, "
            "quasi-diagonal [default: all, and block-diagonal at c = 0.25 and 0.5]"
        ),
    ] = None,
    damping: Annotated[
        float | None,
        typer.Option(
            help="rho, added to every Fisher in the 1/N convention [default: 0, but relative "
            "damping 0.001 for unit-wise, diagonal and quasi-diagonal]"
        ),
    ] = None,
    relative_damping: Annotated[
        float | None, typer.Option(help="damping relative to the mean diagonal of the Gram matrix")
    ] = None,
    scale: Annotated[
        float, typer.Option(help="multiplies every learning rate: eta = scale / alpha")
    ] = 1.0,
    steps: Annotated[int, typer.Option(help="full-batch steps")] = 10,
    seed: Annotated[int, typer.Option(help="of the initial parameters")] = 0,
    dtype: Annotated[
        str, typer.Option(help="float32 or float64, of training; theory is always float64")
    ] = "float32",
    out: Annotated[Path, typer.Option(help="folder of results.json and figures")] = Path(
        "natgrad-out"
    ),
    fresh: Annotated[bool, typer.Option("--fresh", help="run finished methods again, too")] = False,
) -> None:
    """Train a network with each structure at its theoretical learning rate, beside theory.

    Writes a table, results.json, and the figures loss.png and learning_rates.png (and .svg): loss
    per step on training and test data, theory as lines and the network as markers. Defaults are
    Fig. 1a of Karakida & Osawa (2020) at a smaller width. Every finished method is kept: after
    Ctrl-C, or with more structures, the same command goes on where it ended.

    Learning rates: 1 for exact, 1/L for block-diagonal, 1/alpha for block-tri-diagonal (Lemma 4.3),
    1/(N L) for kfac, 1/alpha for unit-wise (Theorem 5.1), and 1/lambda_max of the coefficient
    matrix at initialisation for gd, diagonal and quasi-diagonal.

    Exit code: 0; 1 where a loss ceased to be finite though theory lets it fall; 2 on bad arguments;
    130 when interrupted.
    """
    try:
        settings = DynamicsSettings(
            dataset=dataset,
            classes=tuple(classes) if classes else None,
            num_train=num_train,
            num_test=num_test,
            widths=tuple(widths) if widths else DynamicsSettings.widths,
            activation=activation,
            weight_variance=weight_variance,
            bias_variance=bias_variance,
            structures=tuple(structures) if structures else None,
            damping=damping,
            relative_damping=relative_damping,
            scale=scale,
            steps=steps,
            seed=seed,
            dtype=dtype,
        )
        with _progress() as progress:
            task = progress.add_task("starting", total=work_units(settings))
            experiment = run_dynamics(
                settings,
                out,
                fresh=fresh,
                report=lambda what, done: progress.update(task, description=what, advance=done),
            )
    except ValueError as error:
        _fail(error)
    except OSError as error:
        _fail(f"cannot write to {out}: {error.strerror}")
    except KeyboardInterrupt:
        _errors.print(
            f"interrupted; finished methods are kept in {out / FILE_NAME}, and the same command "
            "goes on from there",
            highlight=False,
        )
        raise typer.Exit(130) from None
    if experiment.restarted:
        _output.print(f"{out / FILE_NAME} held results of other settings and was replaced")
    if experiment.resumed:
        _output.print(f"{len(experiment.resumed)} methods were finished already (--fresh reruns)")
    records = experiment.records
    _output.print(dynamics_table(experiment.document, records))
    for note in _notes(records):
        _output.print(f"note: {note}", highlight=False)
    files = draw_dynamics(experiment.document, records, out)
    names = [FILE_NAME, *(file.name for file in files)]
    _output.print(f"wrote {', '.join(names)} to {out}", highlight=False)
    if experiment.failures:
        _errors.print(
            f"[red]error:[/] losses are not finite, against theory: "
            f"{', '.join(experiment.failures)}"
        )
        raise typer.Exit(1)


@app.command()
def datasets(
    out: Annotated[
        Path | None, typer.Option(help="folder to write results.json into [default: none]")
    ] = None,
) -> None:
    """List the data sets: sizes, where they were found, licence, state of the checksums.

    Nothing is downloaded. Files are searched in the folder that the environment variable
    NATGRAD_DATA names, then in the user's cache.
    """
    try:
        rows = natgrad_datasets.status()
        _output.print(dataset_table(rows))
        if out is not None:
            document = {
                "command": "natgrad datasets",
                "date": now(),
                "datasets": [asdict(row) for row in rows],
            }
            write_json(out / FILE_NAME, document)
            _output.print(f"wrote {FILE_NAME} to {out}", highlight=False)
    except ValueError as error:
        _fail(error)
    except OSError as error:
        _fail(f"cannot write to {out}: {error.strerror}")


def main() -> None:
    """The entry point."""
    app()


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=_errors,
        transient=True,
    )


def _notes(records: list[dict[str, Any]]) -> list[str]:
    """Notes with the methods that they are about; the same note stands once."""
    about: dict[str, list[str]] = {}
    for record in records:
        damping = [] if record["damping"] == "0" else [f"damping: {record['damping']}"]
        for note in (*record["notes"], *damping):
            about.setdefault(note, []).append(method_label(record))
    return [f"{', '.join(labels)}: {note}" for note, labels in about.items()]


def _fail(message: object) -> NoReturn:
    _errors.print(f"error: {message}", style="red", highlight=False, markup=False, soft_wrap=True)
    raise typer.Exit(2)
