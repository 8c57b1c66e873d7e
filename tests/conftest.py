"""Shared fixtures and hypothesis settings."""

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
