"""What ``describe`` says of structures is what their solves do on layers of every kind."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import natgrad_flax as ng
from natgrad_flax.costs.programs import approximate, shared_system
from natgrad_flax.signals.shared import ExplicitSignals, SharedSignals

LAYERS = {
    "few samples": ng.DenseSignals(np.zeros((4, 50)), np.zeros((4, 3, 40)), None, ()),
    "many samples": ng.DenseSignals(np.zeros((60, 20)), np.zeros((60, 1, 30)), None, ()),
    "few rows": SharedSignals(np.zeros((3, 4, 1, 50)), np.zeros((3, 1, 4, 1, 40)), None, ()),
    "groups": SharedSignals(np.zeros((8, 4, 2, 20)), np.zeros((8, 1, 4, 2, 50)), None, ()),
    "explicit": ExplicitSignals(np.zeros((8, 2, 30, 5)), None, ()),
}


def shapes_of(layer):
    layer = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32), layer)
    n, s = layer.num_samples, layer.num_directions
    return layer, ng.Signals((layer,), jax.ShapeDtypeStruct((n, s), jnp.float32))


def lapack(layer, sharing):
    """Eigendecompositions of both factors of EKFAC, and QR of rows that are few."""
    groups = layer.num_groups if isinstance(layer, SharedSignals) else 1
    positions = layer.num_positions if isinstance(layer, SharedSignals) else 1
    rows = layer.num_samples * positions
    total = 0
    for r, p in (rows, layer.fan_in), (rows * layer.num_directions, layer.num_units // groups):
        small = p if sharing == "reduce" else min(r, p)
        total += groups * 9 * small**3
        if small < p:
            total += groups * (4 * p * small**2 - 4 * small**3 // 3)
    return total


@pytest.mark.parametrize(
    ("name", "sharing"),
    [(n, "expand") for n in LAYERS if n != "explicit"] + [("groups", "reduce")],
)
def test_ekfac_costs_what_it_does(name, sharing):
    """LAPACK's part is by hand, XLA counts the rest."""
    structure = ng.EKFAC(sharing=sharing)
    layer, signals = shapes_of(LAYERS[name])
    said = approximate(structure, signals, 0, inside=True)

    def solve(signals, weights):
        return structure.solve(signals, ng.Residual(weights, None), 0.1)

    weights = jax.ShapeDtypeStruct((layer.num_samples, layer.num_directions), jnp.float32)
    counted = jax.jit(solve).lower(signals, weights).cost_analysis()["flops"]
    assert said.flops == pytest.approx(counted + lapack(layer, sharing), rel=0.1)
    assert said.form.endswith("eigenbasis")


KEPT = {
    # factors of both sides, or the blocks of units
    ng.KFAC(): {"few samples": 4**2 + 12**2, "many samples": 20**2 + 30**2},
    # eigenvectors of both sides and their scaling
    ng.EKFAC(): {"few samples": 50 * 4 + 40 * 12 + 4 * 12, "many samples": 20**2 + 30**2 + 600},
    ng.BlockDiagonal(): {"few samples": 12**2, "many samples": 60**2, "explicit": 16**2},
    ng.Diagonal(): {"few samples": 50 * 40, "many samples": 20 * 30},
}


@pytest.mark.parametrize("structure", KEPT, ids=lambda s: s.name)
def test_a_structure_holds_what_it_keeps_and_a_few_more(structure):
    for name, kept in KEPT[structure].items():
        held = approximate(structure, shapes_of(LAYERS[name])[1], 0, inside=True).held
        assert 4 * kept / 2 <= held <= 4 * 6 * kept, name


@pytest.mark.parametrize("inside", [True, False])
def test_layers_and_what_is_solved_together_make_the_whole(inside):
    """A Gram matrix a layer; then its factorisation, and the way back to every parameter."""
    layer, one = shapes_of(LAYERS["few samples"])
    signals = ng.Signals((layer, layer, layer), one.outputs)
    made = [approximate(ng.Exact(), signals, i, inside=inside) for i in range(3)]
    n, s, k, m = 4, 3, 50, 40
    gram = 2 * n**2 * k + (n * s) ** 2 * (2 * m + 1)
    assert [(a.form, a.held, a.flops) for a in made] == [
        ("exact, by inputs and units", 4 * (n * s) ** 2, gram)
    ] * 3
    system = shared_system(ng.Exact(), signals, made, inside=inside)
    side = n * s
    back = 2 * n * k * m + 2 * n * s * m
    if not inside:
        # the residual's own directions in sample space, and what the seeds leave of them
        back += 2 * n**2 * m + 2 * n * s * m + 2 * n * m
    assert system.flops == pytest.approx(side**3 / 3 + 2 * side**2 + 3 * back, rel=0.02)
    assert system.held == 4 * side**2
    assert shared_system(ng.KFAC(), signals, made, inside=inside) is None


def test_a_structure_of_ones_own_is_counted():
    class Own(ng.Diagonal):
        block_form = ng.Structure.block_form

    _, signals = shapes_of(LAYERS["many samples"])
    made = approximate(Own(), signals, 0, inside=True)
    assert made == dataclasses.replace(
        approximate(ng.Diagonal(), signals, 0, inside=True), form="as Own says"
    )
