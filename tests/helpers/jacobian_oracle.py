"""Models with NumPy's values, and their signals beside jax.jacobian."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from battery import QUICK
from flax import nnx

import natgrad_flax as ng
from natgrad_flax.signals.shared import ExplicitSignals


def with_values(model: nnx.Module, seed: int = 0) -> nnx.Module:
    """A model in evaluation mode with random values for its shapes, so that none is compiled."""
    rng = np.random.default_rng(seed)
    graphdef, params, stats, rest = nnx.split(model, nnx.Param, nnx.BatchStat, ...)

    def draw(leaf: Any) -> Any:
        return jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype)

    def other(leaf: Any) -> Any:
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.key(seed)
        return jnp.asarray(rng.integers(0, 2, leaf.shape), leaf.dtype)

    params = jax.tree.map(draw, params)
    stats = jax.tree.map(lambda leaf: jnp.asarray(np.abs(draw(leaf)) + 0.5), stats)
    model = nnx.merge(graphdef, params, stats, jax.tree.map(other, rest))
    model.eval()
    return model


def compare(
    model: nnx.Module, x: Any, wrt: Any = nnx.Param, *, all_move: bool = True
) -> ng.Signals:
    """Signals whose rows, in the shapes of the parameters, are those of jax.jacobian.

    Args:
      model: the model.
      x: a batch.
      wrt: filter of the parameters.
      all_move: whether each parameter must have an influence.
    """
    graphdef, chosen, rest = nnx.split(model, wrt, ...)

    @partial(jax.jit, compiler_options=QUICK)
    def run(chosen: Any, rest: Any, x: Any) -> Any:
        signals = ng.jacobian_signals(nnx.merge(graphdef, chosen, rest), x, wrt)
        rows = [
            jax.vmap(lambda row, a=a: a.parameters(a.unravel(row)))(a.to_dense())
            for a in signals.layers
        ]
        truth = jax.jacobian(lambda p: nnx.merge(graphdef, p, rest, copy=True)(x))(chosen)
        return signals, rows, [a.gram() for a in signals.layers], truth

    signals, rows, grams, truth = run(chosen, rest, x)
    axes = signals.outputs.ndim
    expected = {
        tuple(path): np.reshape(leaf[...], (-1, *leaf.shape[axes:]))
        for path, leaf in nnx.to_flat_state(truth)
    }
    seen = set()
    for layer, found, gram in zip(signals.layers, rows, grams, strict=True):
        flat = []
        for name, value in found.items():
            path, part = (*layer.path, name), layer.parts()[name]
            want = expected[path]
            if part is not None:
                lead = next(form.lead for form in layer.forms if form.name == name)
                want = want.reshape(len(want), -1, *want.shape[1 + len(lead) :])[:, part]
            scale = max(1.0, np.abs(want).max())
            np.testing.assert_allclose(
                value / scale, want / scale, atol=1e-10, rtol=0, err_msg=str(path)
            )
            # softmax does not see what all keys share
            moves = path[-2:] == ("key", "bias") or np.abs(want).max() > 1e-6
            assert moves or not all_move, f"{path} has no influence: the test shows nothing"
            flat.append(want.reshape(len(want), -1))
            assert (path, part) not in seen
            seen.add((path, part))
        dense = np.concatenate(flat, axis=1)
        np.testing.assert_allclose(gram, dense @ dense.T, rtol=1e-9, atol=1e-9)
    assert {path for path, _ in seen} == set(expected)
    return signals


def without_formula(signals: ng.Signals) -> set[str]:
    """The parameters with explicit blocks, by their paths with dots."""
    return {
        ".".join(map(str, (*layer.path, name)))
        for layer in signals.layers
        if isinstance(layer, ExplicitSignals)
        for name in layer.parts()
    }
