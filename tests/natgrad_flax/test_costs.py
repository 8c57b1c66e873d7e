"""What ``describe`` says of EKFAC is what it does: sizes of its basis, and flops by XLA's count."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import natgrad_flax as ng
from natgrad_flax.costs import approximate
from natgrad_flax.shared_signals import SharedSignals

LAYERS = {
    "few samples": ng.DenseSignals(np.zeros((4, 50)), np.zeros((4, 3, 40)), None, ()),
    "many samples": ng.DenseSignals(np.zeros((60, 20)), np.zeros((60, 1, 30)), None, ()),
    "few rows": SharedSignals(np.zeros((3, 4, 1, 50)), np.zeros((3, 1, 4, 1, 40)), None, ()),
    "groups": SharedSignals(np.zeros((8, 4, 2, 20)), np.zeros((8, 1, 4, 2, 50)), None, ()),
}


@pytest.mark.parametrize(
    ("name", "sharing"), [(n, "expand") for n in LAYERS] + [("groups", "reduce")]
)
def test_ekfac_costs_what_it_does(name, sharing):
    """Basis and scaling to the byte; LAPACK's part is by hand, XLA counts the rest."""
    structure, layer = ng.EKFAC(sharing=sharing), LAYERS[name]
    n, s = layer.num_samples, layer.num_seeds
    layer = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32), layer)
    signals = ng.Signals((layer,), jax.ShapeDtypeStruct((n, s), jnp.float32))
    said = approximate(structure, signals, 0)
    moments = jax.eval_shape(structure.moments, signals)
    basis, (scaling,) = moments.basis[0], jax.tree.leaves(moments.rotated)
    squares, lapack = [], 0
    for name in ("inputs", "units"):
        groups, params, side = basis[name].shape
        squares.append(groups * side**2)
        lapack += groups * 9 * side**3
        if side < params:
            lapack += groups * (4 * params * side**2 - 4 * side**3 // 3)
    kept = sum(leaf.size for leaf in basis.values()) + scaling.size + sum(squares)
    built = 0
    if isinstance(layer, SharedSignals):
        turned = layer.num_groups * int(np.prod(scaling.shape[1:]))
        built = n * s * min(turned, layer.num_params)
    assert said.held == 4 * (kept + built)

    def solve(signals, weights):
        return structure.solve(signals, ng.Residual(weights, None), 0.1)

    weights = jax.ShapeDtypeStruct((n, s), jnp.float32)
    counted = jax.jit(solve).lower(signals, weights).cost_analysis()["flops"]
    pulled = 0
    if isinstance(layer, SharedSignals) and basis["inputs"].shape[1] == basis["inputs"].shape[2]:
        pulled = 2 * n * layer.num_params * layer.num_positions
    assert said.flops == pytest.approx(counted - pulled + lapack, rel=0.1)
