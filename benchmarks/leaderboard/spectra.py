"""Isotropy and cost of a Fisher structure on a workload, to stand beside its times."""

from __future__ import annotations

import warnings
from typing import Any

import jax
from flax import nnx

import natgrad_flax as ng
from benchmarks.leaderboard.contestant import Contestant
from benchmarks.leaderboard.natural import is_dense
from benchmarks.leaderboard.workload import Workload
from natgrad_flax.optimizer.learning_rate import model_geometry
from ntk_analysis.cost import gradient_flops, structure_cost
from ntk_analysis.isotropy import isotropy

# outputs N C of the coefficient matrix whose spectrum is taken, of fully connected networks and of
# others, whose signals are larger
OUTPUTS, SHARED_OUTPUTS = 400, 100


def structure_outcome(contestant: Contestant, workload: Workload) -> dict[str, Any]:
    """Spectrum of the coefficient matrix at the start of training, and the flops of a step.

    Args:
      contestant: one with a Fisher structure.
      workload: the spectrum is taken on the first samples of it, as many as 400 outputs make, or
        100 where weights are shared; the cost is that of its batch.

    Returns:
      The outcome of a "structure" trial; "skipped" with a reason where the theory does not apply.
    """
    structure = contestant.structure
    if structure is None:
        return {"status": "skipped", "reason": f"{contestant.name} has no Fisher structure"}
    data, model = workload.data(), workload.model(0)
    size = workload.batch_size or len(data.x_train)
    outputs = OUTPUTS if is_dense(model) else SHARED_OUTPUTS
    rows = min(size, max(2, outputs // data.y_train.shape[1]))
    damping = contestant.damping
    fixed = 0.0 if damping is None or isinstance(damping, ng.LevenbergMarquardt) else damping
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ng.SingularCouplingWarning)
            report = isotropy(structure, model, data.x_train[:rows], damping=fixed)
        cost = _cost(structure, model, workload)
    except ValueError as error:
        return {"status": "skipped", "reason": str(error)}
    return {
        "status": "measured",
        "reason": "",
        "samples": rows,
        "alpha": report.alpha,
        "condition_number": report.condition_number,
        "deviation": report.deviation,
        **cost,
    }


def _cost(structure: ng.Structure, model: nnx.Module, workload: Workload) -> dict[str, Any]:
    """What the Fisher holds, where that is known, and the flops of a step with the true one."""
    x = workload.data().x_train
    size = workload.batch_size or len(x)
    try:
        geometry = model_geometry(model, size)
        cost = structure_cost(structure, geometry, damped=True)
    except TypeError:
        # weights that positions share, or a structure whose entries are not counted
        batch = jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype)
        made = ng.describe(model, batch, structure=structure, loss=workload.loss, fisher="exact")
        parts = [layer.approximation for layer in made.layers] + [made.system]
        solve = sum(part.flops for part in parts if part)
        # forward, and backward to the inputs and to the weights: as many passes as "mc" has
        plain = ng.describe(model, batch, fisher="mc")
        return {
            "nonzeros": None,
            "stored": None,
            "flops": float(sum(layer.flops for layer in made.layers) + solve),
            "sgd_flops": float(sum(layer.flops for layer in plain.layers)),
        }
    return {
        "nonzeros": cost.nonzeros,
        "stored": cost.stored,
        "flops": cost.step_flops,
        "sgd_flops": gradient_flops(geometry),
    }
