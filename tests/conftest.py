"""Shared fixtures, hypothesis settings, and one store of compiled programs for all processes."""

import os
import time
from pathlib import Path

import jax
import jaxlib.version
import pytest
from hypothesis import HealthCheck, Phase, settings

# the same examples on every run, no deadline and no shrinking: an example's time is compilation
settings.register_profile(
    "natgrad",
    derandomize=True,
    deadline=None,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=(HealthCheck.too_slow, HealthCheck.filter_too_much),
)
settings.load_profile("natgrad")

DAYS_KEPT = 3

QUICK = ["--xla_backend_optimization_level=0"]
"""Flags of XLA that make compiling 2 to 4 times as cheap, and programs slower."""
if jaxlib.version.__version__.startswith("0.10."):
    # the emitters of before; jaxlib 0.12 has no others, and ends the process over the flag
    QUICK.append("--xla_cpu_use_fusion_emitters=false")
if os.environ.get("NATGRAD_QUICK_COMPILATION"):
    # before the first computation, and for the processes that tests start
    missing = [flag for flag in QUICK if flag not in os.environ.get("XLA_FLAGS", "")]
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *missing]).strip()


def pytest_configure(config: pytest.Config) -> None:
    """Lets what one worker or an earlier run has compiled serve all others.

    Most of the time of these tests is compilation. JAX stores a program under a hash of its code,
    options, versions and processor; it is switched on for the test processes only; programs that a
    test starts have it where their fixture says so. Without pytest's cache
    (`-p no:cacheprovider`) nothing is stored.
    """
    if not hasattr(config, "cache"):
        return
    folder = Path(config.cache.mkdir("compiled"))
    if not hasattr(config, "workerinput"):
        oldest = time.time() - DAYS_KEPT * 24 * 3600
        for program in folder.iterdir():
            if program.stat().st_mtime < oldest:
                program.unlink(missing_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


@pytest.fixture
def x64():
    """Float64 for one test, without touching the global switch."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(autouse=True, scope="module")
def _forget_compiled_programs():
    """Hundreds of compiled programs would exhaust the memory maps of a long test process."""
    yield
    jax.clear_caches()
