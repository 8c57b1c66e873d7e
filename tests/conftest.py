"""Shared fixtures, hypothesis settings, and one store of compiled programs for all processes."""

import ctypes
import gc
import time
from pathlib import Path

import jax
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
TRIM = getattr(ctypes.CDLL(None), "malloc_trim", None)
"""Of glibc, which else keeps what was freed: a worker grew to 5 GB, of which 1 was in use."""


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


def pytest_collection_finish() -> None:
    """Collects garbage seldom, and not among what is imported: that was a tenth of all time.

    Tracing makes objects by the hundred thousand, and nearly all of them stay or go without it.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)


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
    gc.collect()
    if TRIM is not None:
        TRIM(0)
