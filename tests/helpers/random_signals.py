"""Random signals of layers of every kind, and their Jacobians by NumPy."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

import natgrad_flax as ng
from natgrad_flax.signals.lookup import OneHot
from natgrad_flax.signals.shared import ExplicitSignals, SharedSignals
from natgrad_flax.signals.tied import TiedSignals


def dense(rng, n, s, fan_in, units, bias=0.7):
    """Signals of a layer that is called once."""
    inputs, slopes = rng.normal(size=(n, fan_in)), rng.normal(size=(n, s, units))
    return ng.DenseSignals(jnp.asarray(inputs), jnp.asarray(slopes), bias, ("dense", fan_in))


def shared(rng, n, s, t, groups, fan_in, units, bias=0.5):
    """Signals of a layer with T positions and groups of units."""
    inputs = rng.normal(size=(n, t, groups, fan_in))
    slopes = rng.normal(size=(n, s, t, groups, units))
    return SharedSignals(jnp.asarray(inputs), jnp.asarray(slopes), bias, ("shared", fan_in))


def tied(rng, n, s, t, read, fan_in, units, one_hot=True):
    """Signals of weights of two uses, at t positions and transposed at others."""
    own = shared(rng, n, s, t, 1, fan_in, units, None)
    turned = shared(rng, n, s, read, 1, units, fan_in, None)
    inputs = OneHot(jnp.asarray(rng.integers(0, fan_in + 1, (n, t))), fan_in, 0.7)
    return TiedSignals(
        inputs if one_hot else own.inputs, own.derivatives, None, ("tied", fan_in), turned=turned
    )


def explicit(rng, n, s, rows, units):
    """Signals of a normalisation, or of a parameter without a formula."""
    block = jnp.asarray(rng.normal(size=(n, s, rows, units)))
    return ExplicitSignals(block, None if rows == 1 else 1.0, ("explicit", rows))


def network(rng, n, s, *layers):
    """Signals of layers that are given as functions of (rng, n, s), with a residual."""
    found = tuple(make(rng, n, s, *sizes) for make, *sizes in layers)
    signals = ng.Signals(found, jnp.zeros((n, s)))
    return signals, ng.Residual(jnp.asarray(rng.normal(size=(n, s))), None)


def rows_of(layer):
    """Inputs with the bias (N, T, G, K) and derivatives (N, S, T, G, M/G) of an affine layer."""
    a, d = layer.inputs, np.asarray(layer.derivatives)
    a = np.asarray(a.dense(d.dtype) if isinstance(a, OneHot) else a)
    if a.ndim == 2:
        a, d = a[:, None, None], d[:, :, None, None]
    if layer.bias_scale is not None:
        a = np.concatenate([a, np.full((*a.shape[:3], 1), layer.bias_scale)], axis=3)
    return a, d


def jacobian_of(layer):
    """J_l, shape (N S, P_l): parameters input by input, then group by group, then unit by unit."""
    if isinstance(layer, ExplicitSignals):
        block = np.asarray(layer.block)
        return block.reshape(block.shape[0] * block.shape[1], -1)
    a, d = rows_of(layer)
    jacobian = np.einsum("ntgk,nstgm->nskgm", a, d)
    return jacobian.reshape(a.shape[0] * d.shape[1], -1)
