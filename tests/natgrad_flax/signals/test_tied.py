"""Weights that are used as they stand and transposed: exact signals, and one pair of factors."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from battery import QUICK, made
from dense_metrics import DenseLayer, TiedLayer, metric
from flax import nnx
from jacobian_oracle import compare, with_values, without_formula
from random_signals import network, rows_of, tied

import natgrad_flax as ng
from natgrad_flax.signals.base import ravel
from natgrad_flax.signals.lookup import OneHot
from natgrad_flax.signals.shared import weigh_rows
from natgrad_flax.signals.tied import TiedSignals
from natgrad_flax.structures import Moments
from natgrad_flax.structures.memory import sample_jacobian_entries

pytestmark = pytest.mark.usefixtures("x64")

N, S, K, M = 4, 3, 6, 2


class Ties(nnx.Module):
    """A table that is read out, an autoencoder, and both inside a loop over layers."""

    def __init__(self, rngs):
        kind = {"param_dtype": jnp.float64, "rngs": rngs}
        self.words = nnx.Embed(7, 3, dtype=jnp.float64, **kind)
        self.code = nnx.Linear(6, 4, **kind)
        self.loops = nnx.Param(jnp.zeros((2, 3, 2)))
        self.square = nnx.Param(jnp.zeros((3, 3)))

    def __call__(self, x):
        table = 3**0.5 * self.words.embedding[...]
        h = table[x] + table[jnp.flip(x, 1)] / 2

        @jax.checkpoint
        def layer(h, w):
            return h + jnp.tanh(jnp.tanh(h @ w) @ w.T), None

        h, _ = jax.lax.scan(layer, h, self.loops[...])
        h = jnp.tanh(h @ self.square[...]) + h @ self.square[...].T
        flat = h.reshape(len(x), 6)
        back = jnp.tanh(self.code(flat)) @ self.code.kernel[...].T
        return self.words.attend(jnp.tanh(back.reshape(h.shape)))


def test_against_jacobian():
    model = with_values(nnx.eval_shape(lambda: Ties(nnx.Rngs(0))))
    signals = compare(model, jnp.asarray([[1, 4], [0, 0]]))
    found = [(a.kernel_form.name, a) for a in signals.layers if isinstance(a, TiedSignals)]
    names = ["embedding", "loops", "loops", "square", "kernel"]
    assert [name for name, _ in found] == names
    assert [name for name, a in found if isinstance(a.inputs, OneHot)] == ["embedding"]
    # added to one use of two
    assert {"code.bias"} == without_formula(signals)


LAYERS = ((tied, 2, 1, K, M), (tied, 2, 3, M, K, False))


def outer_products(layer):
    """The Jacobian (N, S, K, M), position by position."""
    a, d = rows_of(layer)
    h, e = rows_of(layer.turned)
    found = np.zeros((N, S, layer.fan_in, layer.num_units))
    for n, s in np.ndindex(N, S):
        for t in range(a.shape[1]):
            found[n, s] += np.outer(a[n, t, 0], d[n, s, t, 0])
        for t in range(h.shape[1]):
            found[n, s] += np.outer(e[n, s, t, 0], h[n, t, 0])
    return found


def test_what_the_signals_answer():
    """All by the definition of the Jacobian as a sum of outer products."""
    signals, residual = network(np.random.default_rng(0), N, S, *LAYERS)
    others, _ = network(np.random.default_rng(1), N, S, *LAYERS)
    w, mix = residual.coefficients, jnp.asarray(np.random.default_rng(2).normal(size=(N, S, 2)))

    def answers(layer, other):
        update = layer.unravel(jnp.arange(1.0, 1 + layer.num_params))
        cotangent = layer.cotangent(1)
        return {
            "jacobian": layer.jacobian(),
            "gram": layer.gram(),
            "crossed": layer.gram(other),
            "norms": layer.gram_norms(),
            "squares": layer.squares()["kernel"],
            "jvp": layer.jvp(update),
            "vjp": layer.vjp(w)["kernel"],
            "one": layer.local_vjp(cotangent)["kernel"],
            "dual": jnp.vdot(layer.local_jvp(update), cotangent),
            "mixed": layer.mix_directions(mix).take_directions(0, 1).jacobian(),
        }

    run = jax.jit(
        lambda one, two: list(map(answers, one.layers, two.layers)), compiler_options=QUICK
    )
    for layer, other, found in zip(
        signals.layers, others.layers, run(signals, others), strict=True
    ):
        jacobian = outer_products(layer)
        rows, crossed = jacobian.reshape(N * S, -1), outer_products(other).reshape(N * S, -1)
        update = np.arange(1.0, 1 + layer.num_params)
        expected = {
            "jacobian": jacobian,
            "gram": rows @ rows.T,
            "crossed": rows @ crossed.T,
            "norms": np.sum(jacobian**2, axis=(2, 3)),
            "squares": np.sum(jacobian**2, axis=(0, 1)),
            "jvp": (rows @ update).reshape(N, S),
            "vjp": np.einsum("ns,nskm->km", w, jacobian),
            "one": jacobian[:, 1].sum(axis=0),
            "dual": jacobian[:, 1].sum(axis=0).ravel() @ update,
            "mixed": np.einsum("nsr,nskm->nrkm", mix, jacobian)[:, :1],
        }
        for name, value in found.items():
            np.testing.assert_allclose(value, expected[name], atol=1e-10, err_msg=name)
        # both ways to a Gram matrix are met
        assert sample_jacobian_entries(ng.Diagonal(), layer) == S * layer.num_params
        assert layer.pairs_are_cheaper() == isinstance(layer.inputs, OneHot)


NAMES = ("kfac-literal-pi", "kfac-reduce", "ekfac", "ekfac-reduce", "foof")


def test_structures_are_their_matrices():
    """One batch, and means of its halves, against factors of each use by itself."""
    signals, residual = network(np.random.default_rng(3), N, S, *LAYERS)
    weights = np.linspace(0.5, 1.5, N)
    signals = weigh_rows(signals, jnp.asarray(weights)[:, None])
    structures = made(2, NAMES)

    @partial(jax.jit, compiler_options=QUICK)
    def run(signals):
        found = {}
        for name, structure in structures.items():
            moments = of_halves(structure, signals)
            inverse = structure.invert(moments, 0.1, N)
            gradient = residual.vector(signals.layers)
            found[name] = {
                "matrix": structure.to_dense(signals, 0.1),
                "solved": ravel(structure.solve(signals, residual, 0.1)),
                "averaged": ravel(structure.apply(inverse, gradient)),
                "scale": structure.damping_scale(signals),
                "averaged scale": structure.scale_of(moments, N),
            }
        return found

    layers = []
    for layer in signals.layers:
        (a, d), (h, e) = rows_of(layer), rows_of(layer.turned)
        a, h = (np.sqrt(weights)[:, None, None, None] * rows for rows in (a, h))
        turned, one_hot = DenseLayer.affine(h, e, False), isinstance(layer.inputs, OneHot)
        layers.append(TiedLayer(outer_products(layer), False, a, d, True, turned, one_hot))
    rows = np.concatenate([layer.rows for layer in layers], axis=1)
    gradient = rows.T @ np.ravel(residual.coefficients) / N
    for name, found in run(signals).items():
        matrix = metric(structures[name], layers, 0.1)
        expected = {"matrix": matrix, "solved": np.linalg.solve(matrix, gradient)}
        expected |= {"averaged": expected["solved"], "averaged scale": found["scale"]}
        for what, value in found.items():
            if what != "scale":
                atol = 1e-9 * np.abs(expected[what]).max()
                np.testing.assert_allclose(
                    value, expected[what], rtol=0, atol=atol, err_msg=f"{name}, {what}"
                )


def of_halves(structure, signals):
    """The moments of a batch as means of those of its halves."""
    parts = [jax.tree.map(lambda leaf, i=i: leaf[i : i + N // 2], signals) for i in (0, N // 2)]

    def mean(of):
        return jax.tree.map(lambda a, b: (a + b) / 2, *map(of, parts))

    averages = mean(structure.statistics)
    basis = structure.basis(averages)
    return Moments(averages, basis, mean(lambda part: structure.rotated(part, basis)))


class Reader(nnx.Module):
    """A table that is read out, behind a mean over the tokens before."""

    def __init__(self, rows, width, dtype=jnp.float64):
        values = np.sin(np.arange(1, 1 + rows * width)).reshape(rows, width) / width**0.5
        self.table = nnx.Param(jnp.asarray(values, dtype))

    def __call__(self, x):
        h = self.table[...][x]
        counts = jnp.arange(1, 1 + x.shape[1], dtype=h.dtype)[:, None]
        return jnp.tanh(jnp.cumsum(h, axis=1) / counts) @ self.table[...].T


def test_masks_are_deletion_and_microbatches_the_batch():
    """Two steps of averaged K-FAC, with what is masked left out of factors of both uses."""
    rng = np.random.default_rng(4)
    x, y = rng.integers(0, 5, (2, N, 3))
    longer = np.concatenate([x, rng.integers(0, 5, (N, 2))], axis=1)
    mask = np.broadcast_to(np.arange(5) < 3, (N, 5))
    ends = []
    for tokens, targets, weights, microbatches in (
        (x, y, None, 1),
        (longer, np.pad(y, ((0, 0), (0, 2))), mask, 2),
    ):
        model = Reader(5, 3)
        tx = ng.natural_gradient_descent(
            0.5,
            structure=ng.KFAC(split="pi"),
            loss=ng.SoftmaxCrossEntropy(),
            fisher="empirical",
            damping=0.1,
            average=ng.MovingAverage(0.5),
            example=(model, tokens),
            microbatches=microbatches,
        )
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        more = {} if weights is None else {"weights": weights}

        @nnx.jit
        def train(model, optimizer, x=tokens, y=targets, more=more):
            grads = nnx.state(model, nnx.Param)
            optimizer.update(model, grads, module=model, x=x, y=y, **more)

        for _ in range(2):
            train(model, optimizer)
        ends.append(model.table[...])
    np.testing.assert_allclose(*ends, rtol=1e-9)
    assert np.abs(ends[0] - Reader(5, 3).table[...]).max() > 0.1


def test_a_vocabulary_of_fifty_thousand():
    """The plan of a step has no room for V x V numbers, nor for half of N S V D."""
    rows, width, n, t = 50_000, 64, 16, 2
    model, tokens = Reader(rows, width, jnp.float32), jax.ShapeDtypeStruct((n, t), jnp.int32)
    tx = ng.natural_gradient_descent(
        0.1,
        structure=ng.KFAC(),
        loss=ng.SoftmaxCrossEntropy(),
        fisher="empirical",
        damping=0.1,
        average=ng.MovingAverage(),
        example=(model, tokens),
    )
    graphdef, params = nnx.split(model)

    def run(params, kept, x, y):
        return tx.update(params, kept, params, module=nnx.merge(graphdef, params), x=x, y=y)

    kept = jax.eval_shape(tx.init, params)
    plan = jax.jit(run).lower(params, kept, tokens, tokens).compile().memory_analysis()
    assert plan.temp_size_in_bytes < 4 * n * rows * width / 2
