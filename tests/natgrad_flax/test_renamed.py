"""Names of the release before work for one more, and say what they are called now."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import natgrad_flax as ng
import ntk_analysis as na

EARLIER = {
    "num_seeds": "num_directions",
    "take_seeds": "take_directions",
    "reseed": "mix_directions",
}
OF_LAYERS = EARLIER | {
    "direction": "cotangent",
    "pull_back": "local_vjp",
    "push_forward": "local_jvp",
}


def signals():
    model = ng.MLP((3, 4, 2), rngs=nnx.Rngs(0))
    return ng.jacobian_signals(model, jax.random.normal(jax.random.key(0), (5, 3)))


def same(owner, old, new):
    with pytest.warns(DeprecationWarning, match=rf"\.{old} is called .*\.{new} now"):
        assert getattr(owner, old) == getattr(owner, new)


def test_signals():
    found = signals()
    for old, new in EARLIER.items():
        same(found, old, new)
    for old, new in OF_LAYERS.items():
        same(found.layers[0], old, new)


def test_residual():
    residual = ng.Residual(None, (jnp.ones((5, 4)),))
    for old, new in {"direction": "cotangent", "directions": "cotangents"}.items():
        with pytest.warns(DeprecationWarning, match=rf"\.{old} is called .*\.{new} now"):
            assert getattr(residual, old) is not None


def test_infinite_width():
    for old, new in {
        "InfiniteWidthTwin": "InfiniteWidthLimit",
        "infinite_width_twin": "infinite_width_limit",
    }.items():
        same(na, old, new)
    with pytest.raises(AttributeError, match="'ntk_analysis' has no attribute 'nothing'"):
        na.nothing  # noqa: B018
