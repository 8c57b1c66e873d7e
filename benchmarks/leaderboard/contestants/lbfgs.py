"""L-BFGS with its zoom line search."""

import optax

from benchmarks.leaderboard.contestant import Contestant
from benchmarks.leaderboard.workload import Workload


def _unsuitable(workload: Workload) -> str:
    if workload.batch_size is None:
        return ""
    return "its line search and its curvature pairs need the same loss at every step: full batches"


CONTESTANTS = (
    Contestant(
        name="lbfgs",
        title="L-BFGS, memory 10",
        family="quasi-Newton",
        rate_rule="line search",
        optimizer=lambda workload, rate, seed: optax.lbfgs(memory_size=10),
        unsuitable=_unsuitable,
    ),
)
