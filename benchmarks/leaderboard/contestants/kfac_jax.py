"""K-FAC of kfac-jax, a peer: on the board with the reason why it does not run here.

kfac-jax 0.0.8, the newest release, imports TensorFlow Probability's JAX substrate through distrax,
which needs names that JAX 0.10 no longer has. So there is nothing yet that a training program
could be written and tested against.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

from benchmarks.leaderboard.contestant import Contestant
from benchmarks.leaderboard.workload import Workload


def _unsuitable(workload: Workload) -> str:
    """Why it does not run: never "", whatever the workload is."""
    del workload
    try:
        found = version("kfac-jax")
    except PackageNotFoundError:
        return "kfac-jax is not installed"
    try:
        import_module("kfac_jax")
    # whatever a package of another JAX's time raises at import
    except Exception as error:
        return f"kfac-jax {found} does not run on JAX {version('jax')}: {error}"
    return f"kfac-jax {found} is newer than this contestant, which has no training program for it"


CONTESTANTS = (
    Contestant(
        name="kfac-jax",
        title="kfac-jax",
        family="peer",
        rate_rule="line search",
        damping_words="adapted, on both factors (its default)",
        unsuitable=_unsuitable,
        packages=("kfac-jax",),
    ),
)
