"""Our own formulas of activations against neural-tangents, and theory without it."""

import subprocess
import sys

import numpy as np
import pytest
from flax import nnx

import natgrad_flax as ng
import ntk_analysis as na
from ntk_analysis import engines
from ntk_analysis.activation_kernels import ACTIVATION_KERNELS
from ntk_analysis.engines import activation_through


def apart(model, x1, x2):
    """The largest difference of any kernel by the two engines, over its largest entry."""
    ours, theirs = (
        na.analytic_kernels(model, x1, x2, engine=engine).arrays
        for engine in ("natgrad", "neural-tangents")
    )
    return max(np.abs(ours[n] - theirs[n]).max() / np.abs(theirs[n]).max() for n in theirs)


@pytest.mark.parametrize("activation", [n for n, k in ACTIVATION_KERNELS.items() if not k.stax or
                                        k.negative_slope is None])  # fmt: skip
def test_kernels_of_a_deep_network(activation):
    rng = np.random.default_rng(0)
    model = ng.MLP((6, 2, 2, 1), activation=activation, weight_variance=1.7, bias_variance=0.3,
                   rngs=nnx.Rngs(0))  # fmt: skip
    x1, x2 = rng.normal(size=(5, 6)), rng.normal(size=(4, 6))
    assert apart(model, x1, None) < 1e-13
    assert apart(model, x1, x2) < 1e-13


@pytest.mark.parametrize("pooling", ["flatten", "average"])
@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "gelu", "identity"])
def test_kernels_of_a_convolutional_network(activation, pooling):
    """Also of images with a border of zeros, whose patches have variance 0."""
    x = np.random.default_rng(1).normal(size=(4, 4, 4, 2))
    x[0, :, :2] = 0
    model = ng.ConvNet(
        (4, 4, 2), (2, 2), 1, strides=1, activation=activation, pooling=pooling,
        bias_variance=0.0, rngs=nnx.Rngs(0),
    )  # fmt: skip
    assert apart(model, x, None) < 1e-12
    assert apart(model, x[:2], x[1:]) < 1e-12


def test_moments_of_equal_and_of_opposite_pre_activations():
    """E[phi(u) phi(-u)] by hand: relu 0, identity -q; E[phi' phi'] of relu 1/2 and 0."""
    q = np.array([0.5, 2.0])
    covariance = np.array([[0.5, -0.5], [2.0, -2.0]])
    for name, expected in (("relu", [[0.25, 0], [1.0, 0]]), ("identity", covariance)):
        value, slope = ACTIVATION_KERNELS[name].moments(covariance, q[:, None], q[:, None])
        np.testing.assert_allclose(value, expected, atol=1e-6)
        half = [[0.5, 0], [0.5, 0]] if name == "relu" else np.ones((2, 2))
        np.testing.assert_allclose(slope, half, atol=1e-3)


def test_auto_is_neural_tangents_where_it_is_installed(monkeypatch):
    assert engines.chosen_engine("auto") == "neural-tangents"
    monkeypatch.setattr(engines, "find_spec", lambda name: None)
    assert engines.chosen_engine("auto") == "natgrad"
    model = ng.MLP((3, 2, 1), activation="erf", rngs=nnx.Rngs(0))
    assert na.infinite_width_limit(model).description["engine"] == "natgrad"
    with pytest.raises(ImportError, match=r"pip install 'natgrad\[neural-tangents\]'"):
        na.analytic_kernels(model, np.ones((2, 3)), engine="neural-tangents")
    with pytest.raises(ValueError, match="engine must be one of auto, neural-tangents, natgrad"):
        na.analytic_kernels(model, np.ones((2, 3)), engine="nt")


def test_an_activation_is_the_same_object_for_the_same_engine():
    """Or every call would compile its step anew."""
    assert activation_through("gelu", "natgrad") is activation_through("gelu", "natgrad")
    assert activation_through("gelu", "natgrad") is not activation_through(
        "gelu", "neural-tangents"
    )


def test_theory_without_neural_tangents():
    """Isotropy and analytic kernels in a process that cannot import it."""
    code = """
import sys
sys.modules["neural_tangents"] = None  # an import of it fails
from importlib import util
find, util.find_spec = util.find_spec, lambda name, *rest: (
    None if name.startswith("neural_tangents") else find(name, *rest))
import jax.numpy as jnp, numpy as np
from flax import nnx
import natgrad_flax as ng, ntk_analysis as na
model = ng.MLP((12, 2, 2, 1), activation="gelu", rngs=nnx.Rngs(0))
x = np.random.default_rng(0).normal(size=(6, 12))
report = na.isotropy(ng.BlockDiagonal(), model, x, kernels="analytic")
print(round(float(report.condition_number), 6))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "1.0"
