"""``natgrad dynamics``: train a network with every structure, beside theory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ntk_analysis.cli.app import WithLists, app, complain, filled, progress_bar, show, work
from ntk_analysis.cli.options import (
    ActivationOption,
    BiasVarianceOption,
    DampingOption,
    DatasetOption,
    NetworkOption,
    SeedOption,
    WeightVarianceOption,
)
from ntk_analysis.experiment import run_dynamics, work_units
from ntk_analysis.methods import STRUCTURES, learning_rates, small_rates
from ntk_analysis.settings import DynamicsSettings
from ntk_analysis.tables import dynamics_table, method_label


@app.command(cls=WithLists)
@filled(learning_rates=learning_rates())
def dynamics(
    dataset: DatasetOption = None,
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
    network: NetworkOption = "mlp",
    widths: Annotated[
        list[int] | None,
        typer.Option(
            help="hidden widths, as in: --widths 4096 4096 (the paper's), or channels "
            "[default: 2048 2048; convolutional: 64 64]"
        ),
    ] = None,
    activation: ActivationOption = "relu",
    weight_variance: WeightVarianceOption = 2.0,
    bias_variance: BiasVarianceOption = 0.0,
    structures: Annotated[
        list[str] | None,
        typer.Option(help=f"{', '.join(STRUCTURES)} [default: all, and {small_rates()}]"),
    ] = None,
    damping: DampingOption = None,
    relative_damping: Annotated[
        float | None, typer.Option(help="damping relative to the mean diagonal of the Gram matrix")
    ] = None,
    scale: Annotated[
        float, typer.Option(help="multiplies every learning rate: eta = scale / alpha")
    ] = 1.0,
    steps: Annotated[int, typer.Option(help="full-batch steps")] = 10,
    seed: SeedOption = 0,
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

    Learning rates: {learning_rates}.

    Exit code: 0; 1 where a loss ceased to be finite though theory lets it fall; 2 on bad arguments;
    130 when interrupted.
    """
    with work(out, "finished methods are kept"):
        settings = DynamicsSettings(
            dataset=dataset,
            classes=tuple(classes) if classes else None,
            num_train=num_train,
            num_test=num_test,
            network=network,
            widths=tuple(widths) if widths else None,
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
        with progress_bar() as progress:
            task = progress.add_task("starting", total=work_units(settings))
            experiment = run_dynamics(
                settings,
                out,
                fresh=fresh,
                report=lambda what, done: progress.update(task, description=what, advance=done),
                say=progress.say,
            )
        # Matplotlib takes a second to import, which --help and bad arguments need not wait for
        from ntk_analysis.figures import draw_dynamics

        show(experiment, "methods", dynamics_table, _notes, draw_dynamics, out)
    if experiment.failures:
        complain(f"losses are not finite, against theory: {', '.join(experiment.failures)}")
        raise typer.Exit(1)


def _notes(document: dict[str, Any], records: Sequence[dict[str, Any]]) -> list[str]:
    """Notes with the methods that they are about; the same note stands once."""
    about: dict[str, list[str]] = {}
    for record in records:
        damping = [] if record["damping"] == "0" else [f"damping: {record['damping']}"]
        for note in (*record["notes"], *damping):
            about.setdefault(note, []).append(method_label(record))
    return [f"{', '.join(labels)}: {note}" for note, labels in about.items()]
