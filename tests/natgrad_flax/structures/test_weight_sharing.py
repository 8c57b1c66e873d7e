"""The sizes and conditions behind learning rates of networks whose positions share weights."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import natgrad_flax as ng
from natgrad_flax.structures import Geometry
from natgrad_flax.structures.weight_sharing import (
    SharedGeometry,
    shared_failures,
    traced_geometry,
)

# a convolution at 9 positions, a normalisation, and a readout of two outputs
NORMED = SharedGeometry(((18, 40), (2, 5), (20, 2)), 3, 2, None, (9, None, 1))


class Stock(nnx.Module):
    """A convolution and a readout of stock layers, without an ``input_shape``."""

    def __init__(self, rngs: nnx.Rngs, channels: int = 60):
        self.convolution = nnx.Conv(6, channels, (3, 3), rngs=rngs)
        self.readout = nnx.Linear(4 * channels, 2, rngs=rngs)

    def __call__(self, x):
        h = jnp.tanh(self.convolution(x))
        return self.readout(h.reshape(len(h), -1))


def test_ranks_that_isotropy_needs():
    assert [tuple(need) for need in ng.KFAC().needed_ranks(NORMED)] == [
        (0, "inputs", 27, 18),
        (0, "derivatives", 54, 40),
        (2, "inputs", 3, 20),
    ]
    assert [tuple(need) for need in ng.UnitWise().needed_ranks(NORMED)] == [
        (0, "channel", 6, 18),
        (1, "channel", 6, 2),
        (2, "channel", 3, 20),
    ]


@pytest.mark.parametrize(
    ("structure", "needs"),
    [
        (ng.Exact(), [(0, "network", 12, 22)]),
        (ng.BlockDiagonal(), [(0, "jacobian", 12, 12), (1, "jacobian", 12, 10)]),
        (ng.KFAC(), [(0, "equal leverages", 6, 3), (0, "derivatives", 12, 4), (1, "inputs", 6, 5)]),
        (ng.UnitWise(), [(0, "inputs", 6, 3), (1, "inputs", 6, 5)]),
    ],
)
def test_ranks_that_a_fully_connected_network_needs(structure, needs):
    geometry = Geometry(((3, 4), (5, 2)), 6, 2)
    assert [tuple(need) for need in structure.needed_ranks(geometry)] == needs
    assert ng.Diagonal().needed_ranks(geometry) is None


def test_sizes_that_cannot_have_these_ranks_are_named():
    assert shared_failures(ng.Exact(), NORMED) == []
    assert shared_failures(ng.BlockDiagonal(), NORMED) == []
    assert shared_failures(ng.KFAC(), NORMED) == [
        "layer 1 has 18 inputs, and its inputs need rank 27 (N times 9 positions)",
        "layer 1 has 40 channels, and its derivatives need rank 54 (N times 9 positions)",
    ]
    assert shared_failures(ng.UnitWise(), NORMED) == ["layer 2: a channel has 2 inputs and needs 6"]
    many = SharedGeometry(NORMED.layers, 400, 2, None, NORMED.positions)
    (whole,) = shared_failures(ng.Exact(), many)
    assert whole == "the network has 770 parameters for N C = 800 outputs"
    assert shared_failures(ng.BlockTriDiagonal(), many) == [
        f"layer {index} has {size} parameters for N C = 800 outputs"
        for index, size in ((1, 720), (2, 10), (3, 40))
    ]


def test_sizes_of_a_network_of_stock_layers():
    found = traced_geometry(Stock(nnx.Rngs(0)), (2, 2, 6), np.float32, 7)
    assert found == SharedGeometry(((55, 60), (241, 2)), 7, 2, None, (4, 1))


@pytest.mark.parametrize(
    ("structure", "alpha"),
    [(ng.Exact(), 1), (ng.BlockDiagonal(), 2), (ng.KFAC(), 3 * (4**2 + 1)), (ng.UnitWise(), 61)],
)
def test_learning_rate_of_shared_weights_is_that_of_the_coefficient_matrix(structure, alpha, x64):
    model = Stock(nnx.Rngs(1))
    x = np.random.default_rng(0).normal(size=(3, 2, 2, 6))
    rate = ng.optimal_learning_rate(structure, model, 3, x=x[:1])
    assert rate == pytest.approx(1 / alpha)
    assert ng.optimal_learning_rate(structure, model, x=x) == pytest.approx(rate, rel=1e-3)


def test_learning_rates_that_sizes_do_not_give():
    model, x = Stock(nnx.Rngs(0), 4), np.ones((1, 2, 2, 6), np.float32)
    with pytest.raises(ValueError, match=r"4 channels, and its derivatives need rank 24 .*without"):
        ng.optimal_learning_rate(ng.KFAC(), model, 3, x=x)
    with pytest.raises(TypeError, match="Conv at convolution owns parameters"):
        ng.optimal_learning_rate(ng.KFAC(), model, 3)
    with pytest.raises(ValueError, match="EKFAC has no alpha"):
        ng.optimal_learning_rate(ng.EKFAC(), model, 3, x=x)
    known = ng.ConvNet((2, 2, 6), (4, 4), 1, strides=1, rngs=nnx.Rngs(0))
    assert ng.optimal_learning_rate(ng.BlockDiagonal(), known, 3) == 1 / 3
