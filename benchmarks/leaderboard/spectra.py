"""Isotropy and cost of a Fisher structure on a workload, to stand beside its times."""

from __future__ import annotations

import warnings
from typing import Any

import natgrad_flax as ng
from benchmarks.leaderboard.contestant import Contestant
from benchmarks.leaderboard.workload import Workload
from natgrad_flax.gradient import model_geometry
from ntk_analysis.cost import gradient_flops, structure_cost
from ntk_analysis.isotropy import isotropy

# outputs N C of the coefficient matrix whose spectrum is taken
OUTPUTS = 400


def structure_outcome(contestant: Contestant, workload: Workload) -> dict[str, Any]:
    """Spectrum of the coefficient matrix at the start of training, and the flops of a step.

    Args:
      contestant: one with a Fisher structure.
      workload: the spectrum is taken on the first samples of it, as many as 400 outputs make; the
        cost is that of its batch.

    Returns:
      The outcome of a "structure" trial; "skipped" with a reason where the theory does not apply.
    """
    structure = contestant.structure
    if structure is None:
        return {"status": "skipped", "reason": f"{contestant.name} has no Fisher structure"}
    data, model = workload.data(), workload.model(0)
    size = workload.batch_size or len(data.x_train)
    rows = min(size, max(2, OUTPUTS // data.y_train.shape[1]))
    damping = contestant.damping
    fixed = 0.0 if damping is None or isinstance(damping, ng.LevenbergMarquardt) else damping
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ng.SingularCouplingWarning)
            report = isotropy(structure, model, data.x_train[:rows], damping=fixed)
        geometry = model_geometry(model, size)
        cost = structure_cost(structure, geometry, damped=True)
    except ValueError as error:
        return {"status": "skipped", "reason": str(error)}
    return {
        "status": "measured",
        "reason": "",
        "samples": rows,
        "alpha": report.alpha,
        "condition_number": report.condition_number,
        "deviation": report.deviation,
        "nonzeros": cost.nonzeros,
        "stored": cost.stored,
        "flops": cost.step_flops,
        "sgd_flops": gradient_flops(geometry),
    }
