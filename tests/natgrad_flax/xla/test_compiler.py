"""The faulty fusions of jaxlib 0.10 are off, and only these."""

import os

import jax
import jax.numpy as jnp
import jaxlib.version
import numpy as np
import pytest
from battery import AS_USERS
from flax import nnx
from jax._src import xla_bridge

from natgrad_flax.signals.capture import linearise
from natgrad_flax.xla.compiler import (
    WITHOUT_FAULTY_FUSIONS,
    avoid_faulty_fusions,
    flags_of_others,
)


class Normalised(nnx.Module):
    """Tokens, normalised and averaged; the scale of the norm is all that is trained before it."""

    def __init__(self, rngs):
        self.embedding = nnx.Linear(4, 64, rngs=rngs)
        self.norm = nnx.LayerNorm(64, rngs=rngs)
        self.readout = nnx.Linear(64, 5, rngs=rngs)

    def __call__(self, x):
        return self.readout(self.norm(self.embedding(x)).mean(1))


def test_compiled_derivatives_of_several_outputs_are_right():
    """Sizes at which jaxlib 0.10.2 got all cotangents but the first wrong by 40 %."""
    graphdef, state = nnx.split(Normalised(nnx.Rngs(0)))
    keys = jax.random.split(jax.random.key(0), 2)
    x = jax.random.normal(keys[0], (64, 64, 4))
    seeds = jax.random.normal(keys[1], (64, 3, 5))

    def derivatives(state, x, seeds):
        _, backward = linearise(nnx.merge(graphdef, state), x)
        return backward(seeds).layers[0].derivatives

    found = jax.jit(derivatives, compiler_options=AS_USERS)(state, x, seeds)
    expected = derivatives(state, x, seeds)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-6)


def test_compiled_products_with_one_number_everywhere_are_right():
    """Fused with the product, the number was lost and others came in its place."""
    x = jax.random.normal(jax.random.key(0), (30, 7))

    def products(x):
        ones = jnp.ones((7, 3))
        return x @ ones, x.T @ (x @ ones), x @ jnp.broadcast_to(x[0, 0], (7, 3))

    found = jax.jit(products, compiler_options=AS_USERS)(x)
    a = np.asarray(x, np.float64)
    sums = a.sum(1, keepdims=True) * np.ones(3)
    for got, expected in zip(found, (sums, a.T @ sums, a[0, 0] * sums), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


@pytest.fixture
def fresh(monkeypatch):
    """As before the first computation of a process with jaxlib 0.10.2 and a flag of the user's."""
    monkeypatch.setattr(xla_bridge, "backends_are_initialized", lambda: False)
    monkeypatch.setattr(jaxlib.version, "__version__", "0.10.2")
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=true")


@pytest.mark.usefixtures("fresh")
def test_flags_of_the_user_stay():
    avoid_faulty_fusions()
    flags = os.environ["XLA_FLAGS"]
    assert flags == f"--xla_cpu_multi_thread_eigen=true {WITHOUT_FAULTY_FUSIONS}"
    avoid_faulty_fusions()
    assert os.environ["XLA_FLAGS"] == flags
    assert flags_of_others(flags) == "--xla_cpu_multi_thread_eigen=true"


@pytest.mark.usefixtures("fresh")
def test_other_versions_are_left_alone(monkeypatch):
    monkeypatch.setattr(jaxlib.version, "__version__", "0.12.0")
    avoid_faulty_fusions()
    assert os.environ["XLA_FLAGS"] == "--xla_cpu_multi_thread_eigen=true"


@pytest.mark.usefixtures("fresh")
def test_too_late(monkeypatch):
    monkeypatch.setattr(xla_bridge, "backends_are_initialized", lambda: True)
    with pytest.warns(RuntimeWarning, match="import natgrad_flax before the first computation"):
        avoid_faulty_fusions()
