"""Signals of networks with shared weights, and steps from them, against dense matrices in NumPy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from battery import QUICK
from dense_metrics import DenseLayer, factors, metric
from flax import nnx
from natgrad_reference import loss_terms
from random_signals import rows_of

import natgrad_flax as ng
from natgrad_flax.signals.base import matrix_of, named_updates
from natgrad_flax.signals.shared import SharedSignals

pytestmark = pytest.mark.usefixtures("x64")


MSE, SOFTMAX = ng.MeanSquaredError(), ng.SoftmaxCrossEntropy()
DAMPING = 0.02


class Mixed(nnx.Module):
    """Grouped convolution, normalisation, a layer used twice on tokens, a bare parameter."""

    def __init__(self, param_dtype, rngs):
        keys = {"param_dtype": param_dtype, "rngs": rngs}
        self.conv = nnx.Conv(2, 4, (3, 3), strides=2, feature_group_count=2, **keys)
        self.norm = nnx.LayerNorm(4, **keys)
        self.tokens = nnx.Linear(4, 4, **keys)
        self.gain = nnx.Param(jnp.ones(4, param_dtype))
        self.readout = nnx.Linear(4, 3, **keys)

    def __call__(self, x):
        h = self.norm(self.conv(x).reshape(len(x), 4, 4))
        h = jnp.tanh(self.tokens(jnp.tanh(self.tokens(h)) * self.gain[...]))
        return self.readout(h.mean(1))


def limit(p, patches, e):
    """``Mixed`` on one sample by hand, with perturbations e, and what its layers see."""
    u = jnp.einsum("tgk,kgm->tgm", patches, p["conv"]["kernel"].reshape(9, 2, 2))
    h = u.reshape(4, 4) + p["conv"]["bias"] + e["conv"]
    h = (h - h.mean(1, keepdims=True)) / jnp.sqrt(h.var(1, keepdims=True) + 1e-6)
    first = h * p["norm"]["scale"] + p["norm"]["bias"]
    w, b = p["tokens"]["kernel"], p["tokens"]["bias"]
    second = jnp.tanh(first @ w + b + e["tokens"][:4]) * p["gain"]
    h = jnp.tanh(second @ w + b + e["tokens"][4:])
    last = h.mean(0)
    f = last @ p["readout"]["kernel"] + p["readout"]["bias"] + e["readout"][0]
    return f, {
        "conv": patches,
        "tokens": jnp.concatenate([first, second])[:, None],
        "readout": last[None, None],
    }


def patches_by_hand(images):
    """What a 3 x 3 kernel with stride 2 sees of a 4 x 4 image, (N, T, G, taps)."""
    padded = np.pad(images, ((0, 0), (0, 1), (0, 1), (0, 0)))
    corners = [(i, j) for i in (0, 2) for j in (0, 2)]
    found = [padded[:, i : i + 3, j : j + 3].reshape(len(images), 9, 2) for i, j in corners]
    return np.stack(found, 1).swapaxes(2, 3)


MODELS = {
    "mixed": (Mixed, (4, 4, 2)),
    "convnet": (
        partial(ng.ConvNet, (4, 4, 2), (3, 4), 3, strides=(1, 2), bias_variance=0.1),
        (4, 4, 2),
    ),
    "residual": (partial(ng.ResidualNet, (4, 4, 2), (2, 4), 1, 3, groups=2), (4, 4, 2)),
    "transformer": (partial(ng.VisionTransformer, (4, 4, 2), 2, 4, 1, 2, 5, 3), (4, 4, 2)),
    "batch": (partial(ng.ResidualNet, (4, 4, 2), (3,), 1, 3, normalisation="batch"), (4, 4, 2)),
    "autoencoder": (partial(ng.Autoencoder, (3, 4, 2, 4, 3)), (3,)),
}


def problem(name, loss, samples=3):
    """A model in evaluation mode with NumPy's random parameters, and a batch."""
    make, shape = MODELS[name]
    rng = np.random.default_rng(len(name))
    graphdef, params, stats, rest = nnx.split(
        nnx.eval_shape(lambda: make(param_dtype=jnp.float64, rngs=nnx.Rngs(0))),
        *(nnx.Param, nnx.BatchStat, ...),
    )

    def draw(leaf):
        return jnp.asarray(rng.normal(size=leaf.shape) * (0.7 if leaf.ndim > 1 else 1))

    params = jax.tree.map(draw, params)
    stats = jax.tree.map(lambda leaf: jnp.asarray(rng.uniform(0.5, 2, leaf.shape)), stats)
    model = nnx.merge(graphdef, params, stats, rest)
    model.eval()
    x = rng.normal(size=(samples, *shape))
    y = np.eye(3)[rng.integers(0, 3, samples)] if loss == SOFTMAX else rng.normal(size=(samples, 3))
    return model, jnp.asarray(x), jnp.asarray(y)


def seeds_of(loss, fisher, outputs, y, key):
    """(N, S, C), the seeds of the Fisher."""
    residual, hessian = loss_terms(loss, outputs, np.asarray(y))
    if fisher == "empirical":
        return residual[:, None, :]
    if fisher == "mc":
        return np.swapaxes(loss.sample(key, jnp.asarray(outputs), 2), 1, 2)
    values, vectors = np.linalg.eigh(hessian)
    return (vectors * np.sqrt(np.maximum(values, 0))[:, None, :]).swapaxes(1, 2)


def weighted(jacobian, seeds):
    """The Jacobian (N, C, ...) of each parameter with its outputs seeded, (N S, size)."""
    return {
        tuple(path): np.einsum("nsc,nc...->ns...", seeds, np.asarray(leaf[...])).reshape(
            seeds.shape[0] * seeds.shape[1], -1
        )
        for path, leaf in nnx.to_flat_state(jacobian)
    }


def columns_of(signals):
    """Where every parameter stands in the Jacobian of the signals, by its path."""
    places = signals.unravel(jnp.arange(signals.num_params))
    named = named_updates(signals.layers, places)
    return {
        (*path, name): np.asarray(leaf)
        for path, tree in named.items()
        for name, leaf in tree.items()
    }


def units_of(columns, path):
    """The unit of every entry of a parameter.

    The units of a layer are the last axes of its kernel, as many as its bias has; those of a
    parameter without a bias its last axis.
    """
    shape, other = columns[path].shape, columns.get((*path[:-1], "bias"))
    axes = other.ndim if other is not None and len(shape) > 1 else 1
    units = np.prod(shape[len(shape) - (len(shape) if path[-1] == "bias" else axes) :], dtype=int)
    return np.arange(np.prod(shape, dtype=int)) % units


CASES = [
    ("mixed", SOFTMAX, "exact", "sample"),
    ("convnet", MSE, "mc", "parameter"),
    ("residual", SOFTMAX, "exact", "auto"),
    ("transformer", SOFTMAX, "empirical", "sample"),
    ("autoencoder", MSE, "exact", "sample"),
    ("batch", MSE, "exact", "sample"),
]


@pytest.mark.parametrize(("name", "loss", "fisher", "space"), CASES)
def test_signals_and_steps_against_dense(name, loss, fisher, space):
    """The Jacobian, parameter by parameter and unit by unit, and what the public call makes of it.

    On such signals every structure is in ``test_structure_battery.py``.
    """
    model, x, y = problem(name, loss)
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    key = jax.random.key(2)
    structures = (ng.Exact(space), ng.UnitWise(space), ng.Diagonal())

    @partial(jax.jit, compiler_options=QUICK)
    def run(params, x, y):
        model = nnx.merge(graphdef, params, rest)
        settings = {"loss": loss, "fisher": fisher, "key": key}
        signals, _ = ng.fisher_signals(model, x, y, num_samples=2, **settings)
        jacobian = jax.jacobian(lambda p: nnx.merge(graphdef, p, rest)(x))(params)
        settings |= {"mc_samples": 2, "damping": DAMPING}
        steps = [ng.natural_gradient(model, x, y, structure=s, **settings) for s in structures]
        return signals, signals.to_dense(), jacobian, steps

    signals, found, jacobian, steps = run(params, x, y)
    outputs, n = np.asarray(signals.outputs), len(x)
    seeded = weighted(jacobian, seeds_of(loss, fisher, outputs, y, key))
    columns = columns_of(signals)
    assert columns.keys() == seeded.keys()
    rows = np.zeros((len(next(iter(seeded.values()))), signals.num_params))
    for path, places in columns.items():
        rows[:, places.ravel()] = seeded[path]
    # the seeds are unique up to a rotation
    fisher = rows.T @ rows
    np.testing.assert_allclose(found.T @ found, fisher, atol=1e-9 * np.abs(fisher).max())
    layers, first = [], 0
    unit = np.zeros(signals.num_params, int)
    for path, places in columns.items():
        unit[places.ravel()] = units_of(columns, path)
    for layer in signals.layers:
        last = first + layer.num_params
        shape = (n, -1, layer.fan_in, layer.num_units)
        made = DenseLayer(rows[:, first:last].reshape(shape), layer.bias_scale is not None)
        np.testing.assert_array_equal(unit[first:last], made.units)
        layers.append(made)
        first = last
    residual, _ = loss_terms(loss, outputs, np.asarray(y))
    slope = np.zeros(signals.num_params)
    for path, leaf in weighted(jacobian, residual[:, None, :]).items():
        slope[columns[path].ravel()] = leaf.sum(axis=0) / n
    for structure, step in zip(structures, steps, strict=True):
        expected = np.linalg.solve(metric(structure, layers, DAMPING), slope)
        got = np.zeros_like(expected)
        for path, leaf in nnx.to_flat_state(step):
            got[columns[tuple(path)].ravel()] = np.ravel(leaf[...])
        atol = 1e-8 * np.abs(expected).max()
        np.testing.assert_allclose(got, expected, atol=atol, err_msg=structure.name)


def test_kronecker_factors_of_a_mixed_network():
    """What its layers see, and the derivatives with respect to what they give, by hand."""
    model, x, y = problem("mixed", SOFTMAX)
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    @partial(jax.jit, compiler_options=QUICK)
    def run(params, x, y, patches):
        model = nnx.merge(graphdef, params, rest)
        signals, _ = ng.fisher_signals(model, x, y, loss=SOFTMAX)
        pure = nnx.as_pure(params)
        zeros = {"conv": (4, 4), "tokens": (8, 4), "readout": (1, 3)}
        zeros = {name: jnp.zeros(shape) for name, shape in zeros.items()}
        outputs, seen = jax.vmap(lambda a: limit(pure, a, zeros))(patches)
        derivatives = jax.vmap(jax.jacobian(lambda e, a: limit(pure, a, e)[0]), (None, 0))(
            zeros, patches
        )
        return signals, outputs, seen, derivatives

    found = run(params, x, y, patches_by_hand(np.asarray(x)))
    signals, outputs, seen, derivatives = jax.tree.map(np.asarray, found)
    np.testing.assert_allclose(outputs, signals.outputs, rtol=1e-10)
    seeds = np.swapaxes(SOFTMAX.factor(signals.outputs), 1, 2)
    affine = {a.path[0]: a for a in signals.layers if a.path and a.path[0] in seen}
    assert affine.keys() == seen.keys()
    for name, layer in affine.items():
        a, d = seen[name], np.einsum("nsc,nctm->nstm", seeds, derivatives[name])
        d = d.reshape(*d.shape[:3], a.shape[2], -1)
        by_hand = DenseLayer.affine(np.concatenate([a, np.ones((*a.shape[:3], 1))], 3), d, True)
        for sharing in ("expand", "reduce"):
            pairs = zip(
                factors(sharing, DenseLayer.affine(*rows_of(layer), bias=True)),
                factors(sharing, by_hand),
                strict=True,
            )
            for got, wanted in pairs:
                np.testing.assert_allclose(got, wanted, rtol=1e-9, atol=1e-12)


def test_pairs_of_positions_and_jacobians_give_one_gram_matrix(monkeypatch):
    rng = np.random.default_rng(0)

    def shared(n, t):
        a, d = rng.normal(size=(n, t, 2, 3)), rng.normal(size=(n, 2, t, 2, 4))
        return SharedSignals(jnp.asarray(a), jnp.asarray(d), 0.7, ("layer",))

    here, there = shared(3, 4), shared(2, 5)
    grams = {}
    for pairs in (True, False):
        monkeypatch.setattr(SharedSignals, "pairs_are_cheaper", lambda *args, pairs=pairs: pairs)
        grams[pairs] = here.gram(), here.gram(there)
    dense, cross = np.asarray(here.to_dense()), np.asarray(there.to_dense())
    for own, mixed in grams.values():
        np.testing.assert_allclose(own, dense @ dense.T, rtol=1e-11, atol=1e-11)
        np.testing.assert_allclose(mixed, dense @ cross.T, rtol=1e-11, atol=1e-11)
    monkeypatch.undo()
    assert shared(2, 1).pairs_are_cheaper()
    assert not shared(3, 40).pairs_are_cheaper()


@pytest.mark.parametrize("groups", [1, 2])
def test_products_over_shared_signals(groups):
    """Against the explicit Jacobian: every product, and the explicit form of the same layer."""
    rng = np.random.default_rng(groups)
    a, d = rng.normal(size=(3, 4, groups, 2)), rng.normal(size=(3, 2, 4, groups, 3))
    layer = SharedSignals(jnp.asarray(a), jnp.asarray(d), 0.7, ("layer",))
    jacobian = np.einsum("ntgk,nstgm->nskgm", a, d).reshape(3, 2, 2, -1)
    jacobian = np.concatenate([jacobian, 0.7 * d.sum(2).reshape(3, 2, 1, -1)], axis=2)
    flat = jacobian.reshape(6, -1)
    v, step = rng.normal(size=(3, 2)), rng.normal(size=flat.shape[1])
    for signals in (layer, layer.explicit()):
        assert (signals.num_params, signals.num_directions) == (flat.shape[1], 2)
        update = signals.unravel(jnp.asarray(step))
        direction = signals.combine(jnp.asarray(v))
        pulled = matrix_of(signals.local_vjp(direction)).reshape(-1)
        pairs = {
            "dense": (signals.to_dense(), flat),
            "norms": (signals.gram_norms(), np.sum(flat**2, axis=1).reshape(3, 2)),
            "jvp": (signals.jvp(update), (flat @ step).reshape(3, 2)),
            "vjp": (pulled, flat.T @ v.reshape(-1)),
            "dual": (
                jnp.sum(signals.local_jvp(update) * direction),
                step @ flat.T @ v.reshape(-1),
            ),
            "gram times": (
                signals.gram_times(direction).reshape(-1),
                flat @ flat.T @ v.reshape(-1),
            ),
            "squares": (matrix_of(signals.squares()).reshape(-1), np.sum(flat**2, axis=0)),
        }
        factor = rng.normal(size=(3, 2, 1))
        mixed = np.einsum("nsr,nsp->nrp", factor, flat.reshape(3, 2, -1))
        pairs["reseed"] = (signals.mix_directions(jnp.asarray(factor)).to_dense(), mixed[:, 0])
        pairs["seeds"] = (signals.take_directions(1, 2).to_dense(), flat[1::2])
        for name, (got, expected) in pairs.items():
            np.testing.assert_allclose(got, expected, rtol=1e-11, atol=1e-11, err_msg=name)
