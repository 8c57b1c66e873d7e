"""Convolutions with gradients in the layout of XLA's fast kernel, against those of JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.extend.core import jaxprs_in_params

import natgrad_flax as ng
from natgrad_flax.optimizer.gradient import loss_gradient
from natgrad_flax.signals.fisher import Batch, Fisher

NUMBERS = {1: ("NHC", "HIO", "NHC"), 2: ("NHWC", "HWIO", "NHWC"), 3: ("NHWDC", "HWDIO", "NHWDC")}

# images (N, *spatial, K), kernel (*spatial, K, M), and how the kernel moves
CASES = {
    "one dimension": ((2, 9, 3), (4, 3, 2), (2,), [(1, 0)], {}),
    "same": ((2, 6, 5, 2), (3, 3, 2, 4), (1, 1), "SAME", {}),
    "strides that leave a rest": ((3, 8, 7, 2), (3, 2, 2, 3), (3, 2), "VALID", {}),
    "no positions cut": ((2, 5, 5, 1), (2, 2, 1, 3), (2, 2), [(0, 2), (3, 0)], {}),
    "cut images": ((2, 6, 6, 2), (2, 2, 2, 2), (1, 2), [(-1, 0), (0, -2)], {}),
    "dilated kernel": ((2, 9, 8, 2), (3, 2, 2, 3), (1, 2), "SAME", {"rhs_dilation": (2, 3)}),
    "dilated images": (
        (2, 4, 3, 2),
        (3, 2, 2, 3),
        (1, 2),
        [(1, 0), (2, 1)],
        {"lhs_dilation": (2, 3)},
    ),
    "three dimensions": ((2, 4, 3, 4, 2), (2, 2, 2, 2, 3), (2, 1, 1), "SAME", {}),
    "groups": ((2, 5, 5, 4), (3, 3, 2, 6), (1, 1), "SAME", {"feature_group_count": 2}),
}


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_jax(case, x64):
    images, kernel, strides, padding, further = CASES[case]
    rng = np.random.default_rng(len(case))
    lhs, rhs = jnp.asarray(rng.normal(size=images)), jnp.asarray(rng.normal(size=kernel))
    rest = {"dimension_numbers": NUMBERS[lhs.ndim - 2], **further}
    found, backward = jax.vjp(
        lambda a, b: ng.conv_general_dilated(a, b, strides, padding, **rest), lhs, rhs
    )
    expected, reference = jax.vjp(
        lambda a, b: lax.conv_general_dilated(a, b, strides, padding, **rest), lhs, rhs
    )
    slope = jnp.asarray(rng.normal(size=expected.shape))
    np.testing.assert_allclose(found, expected, atol=1e-13)
    for ours, theirs in zip(backward(slope), reference(slope), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-12)


def test_other_layouts_are_left_to_jax():
    lhs, rhs = jnp.ones((2, 3, 5, 5)), jnp.ones((4, 3, 2, 2))
    found = ng.conv_general_dilated(lhs, rhs, (1, 1), "VALID")
    np.testing.assert_array_equal(found, lax.conv_general_dilated(lhs, rhs, (1, 1), "VALID"))


def test_names_of_paddings_are_for_images_without_dilation():
    with pytest.raises(ValueError, match="String padding"):
        ng.conv_general_dilated(
            jnp.ones((1, 4, 1)),
            jnp.ones((2, 1, 1)),
            (1,),
            "SAME",
            lhs_dilation=(2,),
            dimension_numbers=NUMBERS[1],
        )


def convolutions(jaxpr):
    """The dimension numbers of every convolution in a program and in its parts."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "conv_general_dilated":
            yield equation.params["dimension_numbers"]
        for part in jaxprs_in_params(equation.params):
            yield from convolutions(part)


@pytest.mark.parametrize("kind", [ng.Conv, nnx.Conv])
def test_what_natgrad_runs_of_a_model_has_no_other_layout(kind):
    class Two(nnx.Module):
        def __init__(self, rngs):
            self.first = kind(2, 3, (3, 3), strides=2, padding="SAME", rngs=rngs)
            self.second = kind(3, 2, (2, 2), padding="VALID", rngs=rngs)

        def __call__(self, x):
            return jnp.sum(self.second(jnp.tanh(self.first(x))), axis=(1, 2))

    model = Two(nnx.Rngs(0))
    x, y = jnp.ones((4, 6, 6, 2)), jnp.ones((4, 2))
    graphdef, state = nnx.split(model)
    loss = ng.MeanSquaredError()

    def signals(state):
        return ng.fisher_signals(nnx.merge(graphdef, state), x, y, loss=loss)

    def gradient(state):
        return loss_gradient(nnx.merge(graphdef, state), Batch(x, y), Fisher(loss))

    for program in (signals, gradient):
        found = list(convolutions(jax.make_jaxpr(program)(state).jaxpr))
        # both layers forward, at least one of them backward
        assert len(found) >= 3
        for numbers in found:
            assert numbers.lhs_spec == numbers.out_spec == (0, 3, 1, 2)
            assert numbers.rhs_spec == (3, 2, 0, 1)
    # the user's own model keeps its convolution
    assert model.first.conv_general_dilated is lax.conv_general_dilated


def test_forward_mode_is_refused():
    lhs, rhs = jnp.ones((1, 4, 4, 1)), jnp.ones((2, 2, 1, 1))

    def run(a):
        return ng.conv_general_dilated(a, rhs, (1, 1), "VALID", dimension_numbers=NUMBERS[2])

    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(run, (lhs,), (lhs,))
