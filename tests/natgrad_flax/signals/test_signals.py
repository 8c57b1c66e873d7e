"""Signals of our layers and of a user's own module, against automatic differentiation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from natgrad_reference import ACTIVATIONS, make_mlp, reference

import natgrad_flax as ng
from natgrad_flax.linalg.dense import symmetric_product
from natgrad_flax.linalg.execution import Executor, executed_by
from natgrad_flax.signals.dense import symmetric_gram

pytestmark = pytest.mark.usefixtures("x64")


class Residual(nnx.Module):
    """A user's module: standard parametrisation, a skip connection, layers made out of order."""

    def __init__(self, rngs):
        self.readout = nnx.Linear(6, 3, rngs=rngs, param_dtype=jnp.float64)
        self.inner = nnx.Linear(6, 6, use_bias=False, rngs=rngs, param_dtype=jnp.float64)
        self.first = ng.Dense(4, 6, bias_variance=0.5, rngs=rngs, param_dtype=jnp.float64)

    def __call__(self, x):
        h = jnp.tanh(self.first(x))
        return self.readout(h + jax.nn.gelu(self.inner(h)))


def jacobians(model, x):
    """(N C, P_l) by path of the layer, kernel row by row and then the bias."""
    graphdef, state = nnx.split(model)
    jac = jax.jacobian(lambda s: nnx.merge(graphdef, s)(x))(state)
    flat = {}
    for path, leaf in nnx.to_flat_state(jac):
        value = leaf[...]
        flat[path] = value.reshape(value.shape[0] * value.shape[1], -1)
    return flat


def test_signals_of_a_users_module():
    model = Residual(nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (5, 4), jnp.float64)
    before = jax.tree.leaves(nnx.state(model))
    graph = nnx.graphdef(model)
    signals = ng.jacobian_signals(model, x)
    assert [layer.path for layer in signals.layers] == [("first",), ("inner",), ("readout",)]
    np.testing.assert_allclose(signals.outputs, model(x), rtol=1e-14)
    expected = jacobians(model, x)
    for layer in signals.layers:
        parts = [expected[(*layer.path, "kernel")]]
        if layer.bias_scale is not None:
            parts.append(expected[(*layer.path, "bias")])
        np.testing.assert_allclose(layer.to_dense(), np.concatenate(parts, 1), atol=1e-13)
    # capturing leaves the user's module as it was
    assert nnx.graphdef(model) == graph
    after = jax.tree.leaves(nnx.state(model))
    assert all(a is b for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_reference_and_signals_against_jax_jacobian(activation):
    """The NumPy reference of the other tests, and the signals, are the true Jacobian."""
    model = make_mlp((5, 7, 6, 2), 1, activation=activation, bias_variance=0.3)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 5)))
    y = jnp.asarray(np.random.default_rng(1).normal(size=(4, 2)))
    flat = jacobians(model, x)
    expected = np.concatenate(
        [flat[("layers", i, name)] for i in range(3) for name in ("kernel", "bias")], axis=1
    )
    signals = ng.jacobian_signals(model, x)
    np.testing.assert_allclose(signals.to_dense(), expected, atol=1e-13)
    ref = reference(model, x, y, ng.MeanSquaredError())
    np.testing.assert_allclose(ref.jacobian, expected, atol=1e-13)
    np.testing.assert_allclose(signals.gram(), expected @ expected.T, atol=1e-12)


def test_products_over_signals():
    model = make_mlp((5, 7, 6, 3), 2, activation="tanh", bias_variance=0.3)
    rng = np.random.default_rng(0)
    x, other = jnp.asarray(rng.normal(size=(4, 5))), jnp.asarray(rng.normal(size=(6, 5)))
    here, there = ng.jacobian_signals(model, x), ng.jacobian_signals(model, other)
    for a, b in zip(here.layers, there.layers, strict=True):
        dense, cross = np.asarray(a.to_dense()), np.asarray(b.to_dense())
        np.testing.assert_allclose(a.gram(), dense @ dense.T, atol=1e-12)
        np.testing.assert_allclose(b.gram(a), cross @ dense.T, atol=1e-12)
        v = rng.normal(size=(4, 3))
        update = a.vjp(jnp.asarray(v))
        flat = np.concatenate([np.ravel(update["kernel"]), update["bias"]])
        np.testing.assert_allclose(flat, dense.T @ v.reshape(-1), atol=1e-12)
        np.testing.assert_allclose(a.jvp(update).reshape(-1), dense @ flat, atol=1e-11)
        unravelled = a.unravel(jnp.asarray(flat))
        np.testing.assert_array_equal(unravelled["kernel"], update["kernel"])
        np.testing.assert_array_equal(unravelled["bias"], update["bias"])
        d = a.combine(jnp.asarray(v))
        np.testing.assert_allclose(
            a.gram_times(d).reshape(-1), dense @ dense.T @ v.reshape(-1), atol=1e-11
        )


@pytest.mark.parametrize("shape", [(1030, 7), (1000, 784), (777, 301), (512, 256)])
def test_large_symmetric_product_is_the_full_product(shape):
    x = jax.random.normal(jax.random.key(0), shape, jnp.float64)
    for y in (x, x.T.reshape(shape)):
        np.testing.assert_allclose(jax.jit(symmetric_product)(y), y @ y.T, atol=1e-10)


class ManyDevices(Executor):
    """As on a mesh, where products are whole so that their rows can be shared out."""

    many_devices = True


@pytest.mark.parametrize("n", [52, 57])
def test_gram_of_wide_layers_by_blocks(n):
    """Of layers together, with a last block that overlaps and without; derivatives, too."""
    keys = iter(jax.random.split(jax.random.key(1), 4))
    layers = tuple(
        ng.DenseSignals(
            jax.random.normal(next(keys), (n, fan_in), jnp.float64),
            jax.random.normal(next(keys), (n, 10, units), jnp.float64),
            bias,
            (),
        )
        for fan_in, units, bias in ((6, 256, 0.3), (5, 3, None))
    )
    rows = jnp.concatenate([layer.to_dense() for layer in layers], axis=1)
    np.testing.assert_allclose(jax.jit(symmetric_gram)(layers), rows @ rows.T, atol=1e-9)
    blocks = str(jax.make_jaxpr(symmetric_gram)(layers))
    with executed_by(ManyDevices()):
        # of a function of its own, as traces are kept
        both = jax.make_jaxpr(lambda *a: (symmetric_gram(a), symmetric_product(rows)))(*layers)
    assert "scan" in blocks
    assert "scan" not in str(both)
    if n % 4 == 0:
        # derivatives take another way, which knows no blocks
        return

    def total(size):
        scaled = jax.tree.map(lambda leaf: size * leaf, layers)
        return jnp.sum(jnp.sin(symmetric_gram(scaled)))

    # inputs and derivatives are scaled, the bias is not
    (wide, thin) = layers
    thin_gram = thin.to_dense() @ thin.to_dense().T
    units = wide.flat_derivatives() @ wide.flat_derivatives().T
    inputs = jnp.kron(wide.inputs @ wide.inputs.T, jnp.ones((10, 10)))
    change = 4 * thin_gram + units * (4 * inputs + 2 * 0.3**2)
    wanted = float(jnp.vdot(jnp.cos(rows @ rows.T), change))
    assert float(jax.grad(total)(1.0)) == pytest.approx(wanted, rel=1e-9)
    assert float(jax.jvp(total, (1.0,), (1.0,))[1]) == pytest.approx(wanted, rel=1e-9)


class Odd(nnx.Module):
    """A user's module that does not return one row of outputs a sample."""

    def __init__(self, rngs, form):
        self.layer = nnx.Linear(3, 3, rngs=rngs)
        self.form = form

    def __call__(self, x):
        return self.layer(x) if self.form == "rows" else self.layer(x)[0]


class Unused(nnx.Module):
    def __init__(self, rngs):
        self.layer = nnx.Linear(3, 3, rngs=rngs)
        self.spare = nnx.Linear(3, 3, rngs=rngs)

    def __call__(self, x):
        return self.layer(x)


class Parameterless(nnx.Module):
    def __call__(self, x):
        return x


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Odd(nnx.Rngs(0), "row"), r"returns shape \(3,\); it must return \(N, C\)"),
        (Unused(nnx.Rngs(0)), r"do not depend on the parameter spare\.\w+"),
        (Parameterless(), "Parameterless has no parameters"),
    ],
)
def test_modules_without_signals(model, message):
    with pytest.raises(ValueError, match=message):
        ng.jacobian_signals(model, jnp.ones((2, 3)))


def test_only_dense_layers_where_a_theory_needs_them():
    model = nnx.Sequential(nnx.Linear(3, 3, rngs=nnx.Rngs(0)), nnx.LayerNorm(3, rngs=nnx.Rngs(0)))
    with pytest.raises(TypeError, match=r"LayerNorm at layers\.1 owns parameters"):
        ng.optimal_learning_rate(ng.Exact(), model, 2)
