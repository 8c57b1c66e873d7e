"""Structures of low rank, beside those that they approximate, and the mean block, beside theory."""

from functools import partial

import jax
import numpy as np
import pytest
from battery import QUICK
from random_signals import dense, network, shared

import natgrad_flax as ng
from natgrad_flax.structures import Geometry

pytestmark = pytest.mark.usefixtures("x64")


def test_with_all_ranks_they_are_what_they_approximate():
    """Ranks of the units of the dense layer are N = 4, of the Fisher N S = 8."""
    layers = ((dense, 6, 3), (shared, 3, 1, 2, 3))
    signals, residual = network(np.random.default_rng(0), 4, 2, *layers)
    pairs = (
        (ng.LowRankUnits(8), ng.UnitWise()),
        (ng.Nystroem(8, seed=0), ng.Exact()),
        (ng.Nystroem(99, seed=1), ng.Exact()),
    )

    @partial(jax.jit, compiler_options=QUICK)
    def answers(signals, residual):
        def of(structure):
            return structure.to_dense(signals, 0.1), structure.solve(signals, residual, 0.0)

        return [tuple(map(of, pair)) for pair in pairs]

    for found, wanted in answers(signals, residual):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-10), found, wanted)


def test_what_random_directions_see_grows_to_the_fisher_from_below():
    signals, _ = network(np.random.default_rng(1), 4, 2, (dense, 5, 3))
    made = [ng.Nystroem(rank, seed=0) for rank in (2, 5, 8)]
    fisher, *found = jax.jit(lambda s: [g.to_dense(s) for g in (ng.Exact(), *made)])(signals)
    left = [fisher - seen for seen in found]
    assert min(np.linalg.eigvalsh(rest)[0] for rest in left) > -1e-12
    traces = list(map(np.trace, left))
    assert traces[0] > 2 * traces[1] > 0.1
    assert abs(traces[2]) < 1e-10


def test_the_mean_block_of_units_is_isotropic_for_one_output():
    """M_l D_ns . D_nt / |D_n|^2 within a sample, nothing between samples; the trace is alpha's."""
    structure, sizes = ng.MiniBlock("inputs"), ((8, 9), (10, 7), (6, 3))
    made = [
        network(np.random.default_rng(2), 5, s, *((dense, *p) for p in sizes))[0] for s in (1, 3)
    ]
    compiled = jax.jit(
        lambda both: [structure.coefficient(s, s, 0.0) for s in both], compiler_options=QUICK
    )
    for outputs, signals, found in zip((1, 3), made, compiled(made), strict=True):
        wanted = np.zeros((5, outputs, 5, outputs))
        for layer in signals.layers:
            d = np.asarray(layer.derivatives)
            for n in range(5):
                wanted[n, :, n] += d.shape[2] * d[n] @ d[n].T / np.sum(d[n] ** 2)
        np.testing.assert_allclose(found, wanted.reshape(found.shape), atol=1e-10)
        geometry = Geometry(sizes, 5, outputs)
        assert np.trace(found) == pytest.approx(structure.alpha(geometry) * len(found))
        assert bool(structure.failed_conditions(geometry)) == (outputs > 1)


def test_entries_and_ranks():
    geometry = Geometry(((7, 5), (5, 2)), 4, 1, 1.0)
    assert ng.LowRankUnits(2).entries(geometry) == (5 * 49 + 2 * 25, 5 * 14 + 2 * 10)
    assert ng.LowRankUnits(9).entries(geometry) == ng.UnitWise().entries(geometry)
    assert ng.Nystroem(3, 0).entries(geometry) == (45**2, 3 * 45)
    assert ng.MiniBlock("inputs").entries(geometry) == (5 * 49 + 2 * 25, 28 + 15)
    assert ng.MiniBlock("units").entries(geometry) == (7 * 25 + 5 * 4, 15 + 3)
    for small, large in (
        (ng.LowRankUnits(3), ng.LowRankUnits(4)),
        (ng.Nystroem(3, 0), ng.Nystroem(4, 0)),
    ):
        assert small.failed_conditions(geometry)
        assert not large.failed_conditions(geometry)
        assert small.alpha(geometry) == large.alpha(geometry)


@pytest.mark.parametrize("make", [ng.LowRankUnits, lambda rank: ng.Nystroem(rank, 0)])
@pytest.mark.parametrize("rank", [0, 2.5])
def test_a_rank_is_a_positive_integer(make, rank):
    with pytest.raises(ValueError, match="rank must be an integer of at least 1"):
        make(rank)


def test_other_bad_settings_are_refused():
    with pytest.raises(ValueError, match="seed must be an integer"):
        ng.Nystroem(3, seed=-1)
    with pytest.raises(ValueError, match="side must be one of"):
        ng.MiniBlock("both")
    with pytest.raises(ValueError, match="has no alpha"):
        ng.MiniBlock("units").alpha(Geometry(((7, 5),), 4, 1))
