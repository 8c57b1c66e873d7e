"""What the online algorithm costs a step, and whether one sampled target is enough."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import natgrad_datasets
import numpy as np
from flax import nnx

from natgrad_flax.costs.flops import cost_of
from natgrad_flax.linear import online_natural_gradient_descent
from natgrad_flax.linear.inverse_moments import MovingInverse
from ntk_analysis.reproduce.bernacchia.teachers import (
    GAUSSIAN,
    NETWORKS,
    REACHED,
    Experiment,
    steps_to,
    train,
)
from ntk_analysis.reproduce.bernacchia.training import gradient_step, natural_step
from ntk_analysis.reproduce.registry import Outcome, Report, above, below, check, close

ONE, EIGHT = "K = 1, direct inverse", "K = 8, direct inverse"
MOVING, LAGGING = "K = 1, moving inverse, decay 0.8", "K = 1, moving inverse, decay 0.95"
VARIANTS: dict[str, dict[str, Any]] = {
    ONE: {},
    EIGHT: {"mc_samples": 8},
    MOVING: {"inverse": MovingInverse(decay=0.8)},
    LAGGING: {"inverse": MovingInverse(decay=0.95)},
}
WIDTHS = (128, 256, 512, 1024, 2048, 4096)
SEEDS = (0, 1)
BATCH = 1_000
EXAMPLES = 60_000


def flops(width: int) -> dict[str, float]:
    """Counted flops of a step of every variant over those of SGD on the same batch."""
    graphdef, params = nnx.split(
        nnx.eval_shape(
            lambda: nnx.Sequential(
                *(nnx.Linear(width, width, use_bias=False, rngs=nnx.Rngs(0)) for _ in range(3))
            )
        )
    )
    batch = jax.ShapeDtypeStruct((BATCH, width), jnp.float32)
    rate = jax.ShapeDtypeStruct((), jnp.float32)
    plain = cost_of(gradient_step(graphdef), (params, rate), batch, batch).flops
    found = {}
    for name, settings in VARIANTS.items():
        optimizer = online_natural_gradient_descent(1.0, **settings)
        state = params, jax.eval_shape(optimizer.init, params)
        step = natural_step(graphdef, optimizer)
        found[name] = cost_of(step, state, batch, batch).flops / plain
    return found


@check(
    "BE-Cost",
    "One sampled target, and moving inverses",
    claim="One sampled target for each sample suffices (K = 1). Inverses by Sherman-Morrison "
    "updates scale better than direct inversion, and adaptive damping is harder to bring into "
    "them (Section 5, Discussion).",
    setting=f"counted flops of a step of three layers, n_i = {WIDTHS[0]} to {WIDTHS[-1]}, batch "
    f"{BATCH}; training as BE-Fig1A, four layers of 20 units, Gaussian weights, {EXAMPLES} "
    "examples, two teachers; moving inverses by Woodbury's identity with 64 samples a step",
    origin="ours",
)
def cost(report: Report) -> Outcome:
    """Flops against width, and the steps that every variant takes to the noise."""
    report("counting flops")
    counted = {width: flops(width) for width in WIDTHS}
    with jax.enable_x64(True):
        runs = _train(report)
    steps = {name: [steps_to(run.errors, REACHED) for run in found] for name, found in runs.items()}
    gain = [row[MOVING] / row[ONE] for row in counted.values()]
    return Outcome(
        (
            below("most steps to the noise, K = 1 over K = 8", max(steps[ONE]) / max(steps[EIGHT]),
                  1.2),
            above("flops of K = 8 over K = 1, smallest",
                  min(row[EIGHT] / row[ONE] for row in counted.values()), 1.5),
            above("flops of K = 1 over SGD, widest over narrowest: a cubic part",
                  counted[WIDTHS[-1]][ONE] / counted[WIDTHS[0]][ONE], 2),
            below("moving inverse, decay 0.95: flops over those of the direct one, largest",
                  max(row[LAGGING] / row[ONE] for row in counted.values()), 1),
            close("decay 0.8: teachers on which the noise is reached",
                  float(np.isfinite(steps[MOVING]).sum()), len(SEEDS), 0),
            above("decay 0.95: log10 of the test error, best teacher: the damping lags behind",
                  min(run.errors[-1] for run in runs[LAGGING]), -5),
        ),
        {
            "widths": list(WIDTHS),
            "flops": {name: [row[name] for row in counted.values()] for name in VARIANTS},
            "curves": [
                {"name": name, "runs": [run.curve() for run in found]}
                for name, found in runs.items()
            ],
        },
        (
            "A moving inverse needs no factorisation, but its product with the gradient is as "
            "cubic as that of a direct one, and the damping enters it as (1 - decay) n random "
            f"rows: with decay 0.8 it takes {gain[0]:.2f} of the flops of direct inversion at "
            f"n = {WIDTHS[0]} and {gain[-1]:.2f} at n = {WIDTHS[-1]}.",
        ),
    )  # fmt: skip


def _train(report: Report) -> dict[str, list[Any]]:
    setting = replace(
        natgrad_datasets.LINEAR_TEACHER_SETTINGS["BE-Fig1A"], widths=(20,) * 5, examples=EXAMPLES
    )
    runs: dict[str, list[Any]] = {}
    for name, settings in VARIANTS.items():
        experiment = Experiment(setting, **settings)
        runs[name] = [
            train(experiment.natural(NETWORKS[GAUSSIAN], seed), EXAMPLES, name, report)
            for seed in SEEDS
        ]
    return runs
