"""``natgrad isotropy``: the spectrum of the coefficient matrix against one setting."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, cast, get_args

import typer

from ntk_analysis.cli.app import WithLists, app, progress_bar, show, work
from ntk_analysis.cli.options import (
    ActivationOption,
    BiasVarianceOption,
    NetworkOption,
    StructuresOption,
    WeightVarianceOption,
)
from ntk_analysis.coefficient import Kernels
from ntk_analysis.isotropy_run import DEFAULT_VALUES, IsotropySettings, run_isotropy
from ntk_analysis.methods import STRUCTURES
from ntk_analysis.palette import STYLES
from ntk_analysis.sweep import SweepSettings, Variable
from ntk_analysis.tables_theory import isotropy_table


@app.command(cls=WithLists)
def isotropy(
    vary: Annotated[
        str, typer.Option(help="width, depth, num_samples, damping or activation")
    ] = "width",
    values: Annotated[
        list[str] | None,
        typer.Option(
            help="of what is varied, as in: --values 128 256 [default for width: 128 256 512 1024]"
        ),
    ] = None,
    structures: StructuresOption = None,
    seeds: Annotated[
        list[int] | None,
        typer.Option(help="of parameters and gaussian inputs [default: 0 1 2]"),
    ] = None,
    dataset: Annotated[
        str, typer.Option(help="gaussian, digits, mnist, fashion_mnist or cifar10")
    ] = "gaussian",
    classes: Annotated[
        list[int] | None,
        typer.Option(help="class ids to take the first N samples of [default: all]"),
    ] = None,
    network: NetworkOption = SweepSettings.network,
    width: Annotated[
        int, typer.Option(help="units of every hidden layer, or channels")
    ] = SweepSettings.width,
    depth: Annotated[int, typer.Option(help="layers with parameters, L")] = SweepSettings.depth,
    num_samples: Annotated[int, typer.Option(help="N")] = SweepSettings.num_samples,
    num_inputs: Annotated[
        int | None, typer.Option(help="M_0 of gaussian inputs [default: 100]")
    ] = None,
    num_outputs: Annotated[int, typer.Option(help="C")] = SweepSettings.num_outputs,
    activation: ActivationOption = SweepSettings.activation,
    weight_variance: WeightVarianceOption = SweepSettings.weight_variance,
    bias_variance: BiasVarianceOption = SweepSettings.bias_variance,
    damping: Annotated[
        float, typer.Option(help="rho in the 1/N convention")
    ] = SweepSettings.damping,
    relative_damping: Annotated[
        bool,
        typer.Option(
            "--relative-damping", help="dampings are relative to the mean diagonal of Gram matrices"
        ),
    ] = False,
    kernels: Annotated[
        str, typer.Option(help="empirical (one network a seed) or analytic (infinite width)")
    ] = "empirical",
    out: Annotated[Path, typer.Option(help="folder of results.json and figures")] = Path(
        "natgrad-isotropy"
    ),
    fresh: Annotated[bool, typer.Option("--fresh", help="run finished rows again, too")] = False,
) -> None:
    """Measure how isotropic each structure is, against the width or another setting.

    Isotropic means that the coefficient matrix at initialisation is alpha times the identity, so
    that its condition number is 1. Writes a table, results.json, and the figures
    condition_number.png, spectra.png and cost.png (and .svg): spectra and costs are those of the
    last value and the first seed. Defaults stand in for Fig. 3 of Karakida & Osawa (2020). Every
    finished network is kept: after Ctrl-C, or with more values, seeds or structures, the same
    command goes on where it ended.

    Exit code: 0, also where a structure does not suit a network, which a note says; 2 on bad
    arguments; 130 when interrupted.
    """
    with work(out, "finished networks are kept"):
        if vary not in get_args(Variable):
            raise ValueError(f"--vary must be one of {', '.join(get_args(Variable))}, got {vary!r}")
        variable = cast("Variable", vary)
        settings = IsotropySettings(
            SweepSettings(
                variable=variable,
                values=parse_values(variable, values) if values else DEFAULT_VALUES[variable],
                seeds=tuple(seeds) if seeds else (0, 1, 2),
                network=network,
                width=width,
                depth=depth,
                num_samples=num_samples,
                num_inputs=num_inputs,
                num_outputs=num_outputs,
                activation=activation,
                weight_variance=weight_variance,
                bias_variance=bias_variance,
                damping=damping,
                relative_damping=relative_damping,
                dataset=dataset,
                classes=tuple(classes) if classes else None,
            ),
            tuple(structures) if structures else tuple(STRUCTURES),
            cast("Kernels", kernels),
        )
        with progress_bar() as progress:
            task = progress.add_task("starting", total=len(settings.rows))
            experiment = run_isotropy(
                settings,
                out,
                fresh=fresh,
                report=lambda what, done: progress.update(task, description=what, advance=done),
                say=progress.say,
            )
        # Matplotlib takes a second to import, which --help and bad arguments need not wait for
        from ntk_analysis.figures_theory import draw_isotropy

        show(experiment, "rows", isotropy_table, _notes, draw_isotropy, out)


def parse_values(variable: Variable, values: list[str]) -> tuple[Any, ...]:
    """What is varied, from the command line.

    Raises:
      ValueError: something that is not a number where one is wanted.
    """
    if variable == "activation":
        return tuple(values)
    kind, wanted = (float, "numbers") if variable == "damping" else (int, "integers")
    try:
        return tuple(kind(value) for value in values)
    except ValueError:
        raise ValueError(f"--values of {variable} must be {wanted}, got {values}") from None


def _notes(document: dict[str, Any], rows: Sequence[dict[str, Any]]) -> list[str]:
    """A note a structure: where conditions fail or it does not suit, and why at the first point."""
    variable = document["settings"]["variable"]
    notes = []
    for label in dict.fromkeys(row["structure"] for row in rows):
        about = [row for row in rows if row["structure"] == label]
        for part, what in (("failed_conditions", "conditions fail"), ("failure", "no result")):
            there = [row for row in about if row[part]]
            if there:
                points = ", ".join(dict.fromkeys(str(row[variable]) for row in there))
                first = there[0]
                notes.append(
                    f"{STYLES[first['class']].label}: {what} at {variable} {points}; at "
                    f"{first[variable]}, seed {first['seed']}: {first[part]}"
                )
    return notes
