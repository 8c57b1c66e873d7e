"""Networks in the styles of others: nearly all parameters have a formula, and all are right."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sequence_styles  # noqa: F401
from battery import QUICK, made
from dense_metrics import DenseLayer, metric
from flax import nnx
from jacobian_oracle import compare, without_formula
from random_signals import rows_of
from styles import STYLES

import natgrad_flax as ng
from natgrad_flax.signals.base import layer_updates, matrix_of
from natgrad_flax.signals.plan import plan_layers
from natgrad_flax.signals.shared import ExplicitSignals, SharedSignals

pytestmark = pytest.mark.usefixtures("x64")
PLACES = "added to products that are not all of one layer"
REASONS = {
    "tied_gpt": {"place": PLACES},
    "vit": {"token": "used by concatenate", "place": "used by add"},
    "whisper": {"place": PLACES},
    "mamba": {"decay": "used by exp"},
}
"""By style the parameters without a formula that do not scale or shift features."""


@pytest.mark.parametrize("name", STYLES)
def test_against_jacobian(name):
    style = STYLES[name]
    model, x = style.make()
    signals = compare(model, x, style.wrt)
    layers = planned(style.shapes(32), x, style.wrt)
    explicit = [layer for layer in layers if layer.is_explicit]
    reasons = {".".join(path): layer.reason for layer in explicit for path in layer.parameters}
    assert set(reasons) == without_formula(signals)
    others = {p: why for p, why in reasons.items() if why != "scales or shifts features"}
    assert others == REASONS.get(name, {})
    assert number_of(explicit) <= 0.1 * number_of(layers)


def planned(model, x, wrt):
    """The layers of a model without values."""
    graphdef, state = nnx.split(model)
    found = []

    def run(state):
        found.extend(plan_layers(nnx.merge(graphdef, state), x, wrt).layers)

    jax.eval_shape(run, state)
    return found


def number_of(layers):
    """The parameters of some layers."""
    forms = (form for layer in layers for form in (layer.kernel, layer.bias) if form)
    return sum(math.prod(form.shape) for form in forms)


def dense_layers(signals, rows):
    """The layers in NumPy, with the Jacobians that jax.jacobian has."""
    found = []
    for layer, jacobian in zip(signals.layers, rows, strict=True):
        shape = (signals.num_samples, -1, layer.fan_in, layer.num_units)
        shared = isinstance(layer, SharedSignals)
        affine = (None, None) if isinstance(layer, ExplicitSignals) else rows_of(layer)
        has_bias = layer.bias_scale is not None
        found.append(DenseLayer(np.reshape(jacobian, shape), has_bias, *affine, shared))
    return found


ALL = ("exact", "block-diagonal", "kfac", "unit-wise", "diagonal")
SOME = ("exact", "kfac")


@pytest.mark.parametrize(
    ("name", "which"),
    [("convnext", ALL), ("nanogpt", ALL), ("mamba", SOME), ("mixture", SOME), ("lora", SOME)],
)
def test_steps(name, which):
    """Natural gradients are those of matrices of jax.jacobian."""
    style = STYLES[name]
    model, x = style.make()
    structures = made(0, which)
    graphdef, params, rest = nnx.split(model, style.wrt, ...)
    loss, damping = ng.MeanSquaredError(), 0.1

    @partial(jax.jit, compiler_options=QUICK)
    def run(params, rest, x):
        def outputs(params):
            return nnx.merge(graphdef, params, rest, copy=True)(x)

        signals = ng.jacobian_signals(nnx.merge(graphdef, params, rest), x, style.wrt)
        y = jnp.cos(jnp.arange(signals.outputs.size)).reshape(signals.outputs.shape)
        gradient = jax.grad(lambda p: jnp.mean(jnp.sum((outputs(p) - y) ** 2, -1)) / 2)(params)
        steps = {
            name: ng.natural_gradient(
                nnx.merge(graphdef, params, rest),
                x,
                y,
                structure=structure,
                loss=loss,
                damping=damping,
                wrt=style.wrt,
            )
            for name, structure in structures.items()
        }

        def flat(tree):
            leaves = {tuple(path): leaf[...] for path, leaf in nnx.to_flat_state(tree)}
            return [matrix_of(u).ravel() for u in layer_updates(signals.layers, leaves)]

        rows = jax.tree.map(
            lambda leaf: leaf.reshape(-1, *leaf.shape[signals.outputs.ndim :]),
            jax.jacobian(outputs)(params),
        )
        steps = {name: flat(step) for name, step in steps.items()}
        return signals, jax.vmap(flat)(rows), flat(gradient), steps

    signals, rows, gradient, steps = run(params, rest, x)
    layers = dense_layers(signals, rows)
    # a loss is a mean over positions
    share = np.prod(signals.outputs.shape[1:-1]) ** -0.5
    for layer in layers:
        layer.jacobian = share * layer.jacobian
        if layer.derivatives is not None:
            layer.derivatives = share * layer.derivatives
    for name, structure in structures.items():
        matrix = metric(structure, layers, damping)
        expected = np.linalg.solve(matrix, np.concatenate(gradient))
        found = np.concatenate(steps[name])
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-7 * np.abs(expected).max())
