"""``natgrad predict``: where training ends with every structure, on test data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from ntk_analysis.cli.app import WithLists, app, progress_bar, show, work
from ntk_analysis.cli.options import (
    ActivationOption,
    BiasVarianceOption,
    DampingOption,
    DatasetOption,
    SeedOption,
    WeightVarianceOption,
)
from ntk_analysis.coefficient import Kernels
from ntk_analysis.methods import STRUCTURES
from ntk_analysis.palette import STYLES
from ntk_analysis.prediction_run import (
    DEFAULT_STRUCTURES,
    WITH_LIMIT,
    PredictionSettings,
    run_prediction,
)
from ntk_analysis.tables_theory import prediction_table


@app.command(cls=WithLists)
def predict(
    dataset: DatasetOption = None,
    classes: Annotated[
        list[int] | None,
        typer.Option(
            help="class ids, as in: --classes 0 7; two give targets +-0.5, more one-hot "
            "[default: all]"
        ),
    ] = None,
    num_train: Annotated[
        int | None, typer.Option(help="training samples N [default: 1000; digits: 1437]")
    ] = None,
    num_test: Annotated[
        int | None, typer.Option(help="test samples [default: 1000; digits: 360]")
    ] = None,
    widths: Annotated[
        list[int] | None,
        typer.Option(
            help="hidden widths of the networks that initialisations are drawn from, and of "
            "empirical kernels [default: 2048 2048]"
        ),
    ] = None,
    activation: ActivationOption = "relu",
    weight_variance: WeightVarianceOption = 2.0,
    bias_variance: BiasVarianceOption = 0.0,
    structures: Annotated[
        list[str] | None,
        typer.Option(
            help=f"{', '.join(WITH_LIMIT)}; with empirical kernels "
            f"{', '.join(name for name in STRUCTURES if name not in WITH_LIMIT)} too "
            f"[default: {' '.join(DEFAULT_STRUCTURES)}]"
        ),
    ] = None,
    damping: DampingOption = None,
    ridge: Annotated[
        float, typer.Option(help="lambda of lambda/2 (theta - theta_0)^T G (theta - theta_0)")
    ] = 0.0,
    kernels: Annotated[
        str, typer.Option(help="analytic (infinite width) or empirical (one network)")
    ] = "analytic",
    initialisations: Annotated[
        int | None,
        typer.Option(help="how many f_0 to draw [default: 10; with empirical kernels none]"),
    ] = None,
    covariance: Annotated[
        str,
        typer.Option(
            help="none, or variance: of the outputs over initialisations in closed form, and the "
            "expected accuracy"
        ),
    ] = "none",
    seed: SeedOption = 0,
    forster: Annotated[
        bool,
        typer.Option(help="transform the inputs of K-FAC where their rank is below N"),
    ] = False,
    rank_tolerance: Annotated[
        float | None,
        typer.Option(
            help="singular values below this share of the largest are cut off before the Forster "
            "transform [default: 0.03, or 0.1 where that has none]"
        ),
    ] = None,
    store: Annotated[
        Path | None,
        typer.Option(help="folder to keep kernels in, for runs to come [default: memory only]"),
    ] = None,
    out: Annotated[Path, typer.Option(help="folder of results.json and figures")] = Path(
        "natgrad-predict"
    ),
    fresh: Annotated[
        bool, typer.Option("--fresh", help="run finished structures again, too")
    ] = False,
) -> None:
    """Predict on test data the outputs to which training with each structure converges.

    Writes a table, results.json and the figure accuracy.png (and .svg): test accuracy of the mean
    over random initialisations, of each drawn one, and, with --covariance variance, the expected
    one. Kernels are those of infinite width, as in Fig. 2 of Karakida & Osawa (2020); its sizes are
    --num-train 10000 --num-test 10000, for which --store is there. Every finished structure is
    kept: after Ctrl-C, or with more structures, the same command goes on where it ended.

    K-FAC: where the training inputs have a rank below N, it converges at a rate of its own for each
    sample. With --forster they go through a Forster transform, after which it is isotropic. That
    whitens them, which magnifies what they hardly use and costs accuracy on images; weak directions
    are cut off before, and a note says how many.

    Exit code: 0; 2 on bad arguments; 130 when interrupted.
    """
    with work(out, "finished structures are kept"):
        settings = PredictionSettings(
            dataset=dataset,
            classes=tuple(classes) if classes else None,
            num_train=num_train,
            num_test=num_test,
            widths=tuple(widths) if widths else PredictionSettings.widths,
            activation=activation,
            weight_variance=weight_variance,
            bias_variance=bias_variance,
            structures=tuple(structures) if structures else DEFAULT_STRUCTURES,
            damping=damping,
            ridge=ridge,
            kernels=cast("Kernels", kernels),
            initialisations=initialisations,
            covariance=covariance,
            seed=seed,
            forster=forster,
            rank_tolerance=rank_tolerance,
        )
        with progress_bar() as progress:
            task = progress.add_task("starting", total=len(settings.structures))
            pieces = progress.add_task("blocks of kernels", total=None)
            experiment = run_prediction(
                settings,
                out,
                fresh=fresh,
                store=store,
                report=lambda what, done: progress.update(task, description=what, advance=done),
                say=progress.say,
                blocks=lambda done, total: progress.update(pieces, completed=done, total=total),
            )
        # Matplotlib takes a second to import, which --help and bad arguments need not wait for
        from ntk_analysis.figures_theory import draw_prediction

        show(experiment, "structures", prediction_table, _notes, draw_prediction, out)


def _notes(document: dict[str, Any], records: Sequence[dict[str, Any]]) -> list[str]:
    notes = list(document["data"]["notes"])
    for record in records:
        damping = [] if record["damping"] == "0" else [f"damping: {record['damping']}"]
        label = STYLES[record["structure"]].label
        notes += [f"{label}: {note}" for note in (*record["notes"], *damping)]
    return notes
