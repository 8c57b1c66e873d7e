"""Blocks below units: how many inputs a block needs, and what a smaller one leaves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from natgrad_flax import MLP, UnitBlocks, UnitWise
from ntk_analysis.coefficient import coefficient_matrix
from ntk_analysis.empirical import Matrix
from ntk_analysis.reproduce.natgrad.common import (
    Layer,
    condition_number,
    dense_layers,
    dense_net,
    deviation,
    layer_coefficients,
    off_diagonal,
    sphere,
)
from ntk_analysis.reproduce.registry import (
    Measurement,
    Outcome,
    Report,
    above,
    below,
    between,
    check,
    close,
)
from ntk_analysis.reproduce.ruler import CUTOFF, relative_error

_SAMPLES, _WIDTH = 20, 60
_HALVINGS = 100


@check(
    "NG-Frontier-Projection",
    "A block is a projection: N inputs are enough, fewer are a ridge",
    claim="A block of b inputs of unit i adds to Theta-bar the projection onto the columns of "
    "diag(D_i) a_b. Its rank is min(b, active), with as many active samples as D_i has entries "
    "other than zero (a little less where inputs are zeros of a ReLU). So from b = N on the blocks "
    "of a unit are worth K/b times the unit, and Theta-bar is isotropic as the unit-wise one, with "
    "alpha = sum_l M_l K_l / b for smooth activations, out of P N entries in the place of P M. "
    "Below, columns are as good as Gaussian ones of covariance S_i = diag(D_i) Q_l diag(D_i), and "
    "a projection onto b of them has the mean S_i (S_i + k_i I)^-1 with k_i such that its trace is "
    "b: a ridge on the kernel. The number of blocks has no part in it: projections are free of "
    "each other, but not of the kernel. Only where S_i is a multiple of I do m blocks follow the "
    "law of free projections, with the edges 1 + t (m - 2) -+ 2 sqrt((m - 1) t (1 - t)), t = b/N "
    "(Marchenko-Pastur for small t).",
    setting="two hidden layers of 60 units, ReLU and tanh, one output, no biases, N = 20 Gaussian "
    "inputs of 60 features, blocks of 10 and 20 inputs, and inputs that come in pairs; 20 random "
    "blocks of 32 columns in 128 dimensions, white and of eigenvalues from 1 "
    "to 30; zero damping",
    origin="ours",
    fast=True,
)
def projection(report: Report) -> Outcome:
    """Ranks, isotropy at N inputs, the ridge, free projections, and inputs that come twice."""
    x = sphere(_SAMPLES, _WIDTH)
    measurements: list[Measurement] = []
    for activation in ("relu", "tanh"):
        report(activation)
        measurements += _of_network(activation, x)
    report("random blocks")
    measurements += _random_blocks()
    report("inputs that come twice")
    twice = np.repeat(sphere(_SAMPLES, _WIDTH // 2), 2, axis=1)
    half, whole = (
        off_diagonal(layer_coefficients(structure, _net("tanh"), twice)[0])
        for structure in (UnitBlocks(_SAMPLES), UnitWise())
    )
    name = "inputs twice, layer 1: entries beside the diagonal"
    measurements += [
        above(f"{name}, blocks of N, of which N/2 differ", half, 0.05),
        below(f"{name}, whole units", whole, 1e-6),
    ]
    return Outcome(tuple(measurements))


def _net(activation: str, width: int = _WIDTH, seed: int = 0) -> MLP:
    return dense_net((width, width, width, 1), activation, seed)


def _of_network(activation: str, x: Matrix) -> list[Measurement]:
    model = _net(activation)
    layers = dense_layers(model, x)
    measurements: list[Measurement] = []
    found = {
        size: coefficient_matrix(UnitBlocks(size), model, x) for size in (_SAMPLES // 2, _SAMPLES)
    }
    for size, matrix in found.items():
        name = f"{activation}, blocks of {size}"
        ranks, bound = np.sum([_total_ranks(layer, size) for layer in layers], axis=0)
        measurements += [
            close(f"{name}: trace over the sum of ranks", np.trace(matrix) / ranks, 1.0, 1e-8),
            between(f"{name}: this sum over that of min(b, active)", ranks / bound, 0.99, 1.0),
        ]
        if size < _SAMPLES:
            ridge = _expected(layers, size)
            measurements.append(
                between(
                    f"{name}: condition number over that of the ridge",
                    condition_number(matrix) / condition_number(ridge),
                    0.8,
                    1.3,
                )
            )
    whole, blocks = found[_SAMPLES], _WIDTH // _SAMPLES
    if activation == "tanh":
        alpha = blocks * (2 * _WIDTH + 1)
        measurements.append(
            below("tanh, blocks of N: |Theta-bar / alpha - I|", deviation(whole, alpha), 1e-6)
        )
    units = coefficient_matrix(UnitWise(), model, x)
    measurements.append(
        below(
            f"{activation}, blocks of N against {blocks} times the unit-wise one",
            relative_error(whole, blocks * units),
            1e-6 if activation == "tanh" else 0.01,
        )
    )
    return measurements


def _cut(fan_in: int, size: int) -> list[int]:
    """The sizes of the blocks of a unit."""
    return [min(size, fan_in - start) for start in range(0, fan_in, size)]


def _total_ranks(layer: Layer, size: int) -> tuple[int, int]:
    """Of all blocks of all units: the sum of their ranks, and that of min(b, active)."""
    columns = layer.derivatives.T[:, :, None] * layer.inputs
    starts = np.arange(size, layer.inputs.shape[1], size)
    pieces = np.split(columns, starts, axis=2)
    active = np.count_nonzero(layer.derivatives, axis=0)
    ranks = sum(int(np.sum(np.linalg.matrix_rank(piece))) for piece in pieces)
    return ranks, sum(int(np.sum(np.minimum(piece.shape[2], active))) for piece in pieces)


def expected_blocks(layer: Layer, size: int) -> Matrix:
    """The mean of Theta-bar_l of ``UnitBlocks`` over Gaussian inputs with this Gram matrix.

    sum over units i and blocks of S_i (S_i + k I)^-1 with tr = min(b, rank), the deterministic
    equivalent of a random projection (Derezinski et al. 2020).

    Args:
      layer: of N samples.
      size: b.
    """
    columns = layer.derivatives.T
    gram = layer.grams[0]
    values, vectors = np.linalg.eigh(columns[:, :, None] * gram * columns[:, None, :])
    values = np.where(values > CUTOFF * values[:, -1:], values, 0)
    sizes = _cut(layer.inputs.shape[1], size)
    shares = sum(sizes.count(b) * ridge_shares(values, b) for b in set(sizes))
    result: Matrix = np.einsum("inp,ip,imp->nm", vectors, shares, vectors, optimize=True)
    return result


def _expected(layers: Sequence[Layer], size: int) -> Matrix:
    """Of all layers."""
    parts = [expected_blocks(layer, size) for layer in layers]
    return sum(parts, start=np.zeros_like(parts[0]))


def ridge_shares(values: Matrix, size: int) -> Matrix:
    """s / (s + k) with k such that each row adds up to ``size``, or to its rank.

    Args:
      values: s, eigenvalues, shape (M, N), of which a zero counts as none.
      size: b.
    """
    low, high = np.zeros((len(values), 1)), np.sum(values, axis=1, keepdims=True)
    positive = values > 0
    high = np.where(high > 0, high, 1.0)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        many = np.sum(values / (values + middle), axis=1, keepdims=True) > size
        low, high = np.where(many, middle, low), np.where(many, high, middle)
    enough = np.sum(positive, axis=1, keepdims=True) <= size
    ridge = np.where(enough, 0.0, (low + high) / 2)
    shares: Matrix = np.divide(
        values,
        values + ridge,
        out=np.zeros_like(values),
        where=np.broadcast_to(positive, values.shape),
    )
    return shares


def free_edges(number: float, share: float) -> tuple[float, float]:
    """Edges of the spectrum of a sum of free projections.

    Args:
      number: m, of projections.
      share: t, rank over dimension, with t and 1 - t at least 1/m.
    """
    middle, half = 1 + share * (number - 2), 2 * np.sqrt((number - 1) * share * (1 - share))
    return float(middle - half), float(middle + half)


def _random_blocks() -> list[Measurement]:
    """Twenty projections onto columns of a covariance I, and of one of condition number 30."""
    side, size, number = 128, 32, 20
    rng = np.random.default_rng(0)
    spectrum = np.geomspace(1, 30, side)
    white, other = (
        sum(_onto(roots[:, None] * rng.normal(size=(side, size))) for _ in range(number))
        for roots in (np.ones(side), np.sqrt(spectrum))
    )
    values = np.linalg.eigvalsh(white)
    low, high = free_edges(number, size / side)
    shares = number * ridge_shares(spectrum[None], size)[0]
    mean = np.array([np.mean(part) for part in np.split(np.diag(other), 8)])
    return [
        close("white blocks: smallest eigenvalue over the free edge", values[0] / low, 1.0, 0.1),
        close("white blocks: largest eigenvalue over the free edge", values[-1] / high, 1.0, 0.05),
        below(
            "other blocks: diagonal against the ridge, means of 16 entries",
            relative_error(mean, [np.mean(part) for part in np.split(shares, 8)]),
            0.05,
        ),
        above("other blocks: largest over smallest of these means", mean[-1] / mean[0], 3.0),
    ]


def _onto(columns: Matrix) -> Matrix:
    """The projection onto columns of full rank."""
    basis = np.linalg.qr(columns)[0]
    result: Matrix = basis @ basis.T
    return result


SIZES = (1, 2, 4, 8, 16, 24, 32, 40, 64, 128, 256)
_SIDE, _MANY = 256, 40


@check(
    "NG-Frontier-Blocks",
    "Condition number over the size of a block",
    claim="The condition number falls with the block to that of the unit-wise Fisher, which it "
    "reaches once every block has as many inputs as the unit has active samples: near N/2 for "
    "ReLU, at N for tanh. On the way it is that of the ridge of NG-Frontier-Projection; "
    "projections free of the kernel would leave 1.1 and less at any size.",
    setting="two hidden layers of 256 units, ReLU and tanh, one output, no biases, N = 40 Gaussian "
    "inputs of 256 features and norm 16, blocks of 1 to 256 inputs, two seeds; zero damping",
    origin="ours",
)
def blocks(report: Report) -> Outcome:
    """Measured, expected and free, by activation."""
    x = sphere(_MANY, _SIDE)
    data: dict[str, Any] = {"sizes": list(SIZES), "samples": _MANY, "curves": {}}
    measurements: list[Measurement] = []
    for activation in ("relu", "tanh"):
        found: list[list[float]] = []
        ridge: list[list[float]] = []
        for seed in (0, 1):
            model = _net(activation, _SIDE, seed)
            layers = dense_layers(model, x)
            rows: tuple[list[float], list[float]] = [], []
            for size in SIZES:
                report(f"{activation}, seed {seed}, blocks of {size}")
                rows[0].append(condition_number(coefficient_matrix(UnitBlocks(size), model, x)))
                rows[1].append(condition_number(_expected(layers, size)))
            found.append(rows[0])
            ridge.append(rows[1])
        measured, expected = np.mean(found, axis=0), np.mean(ridge, axis=0)
        free = [_free_condition(size) for size in SIZES if size < _MANY]
        data["curves"][activation] = {
            "measured": measured.tolist(),
            "ridge": expected.tolist(),
            "free": free,
        }
        at = dict(zip(SIZES, measured.tolist(), strict=True))
        apart = measured / expected
        measurements += [
            between(f"{activation}: smallest ratio to the ridge", float(apart.min()), 0.8, 1.05),
            between(f"{activation}: largest ratio to the ridge", float(apart.max()), 0.95, 1.35),
            above(f"{activation}: condition number at 1 over at 256", at[1] / at[256], 3.0),
            below(f"{activation}: at 64 over at 256, less 1", at[64] / at[256] - 1, 1e-6),
            above(f"{activation}: at 8 over that of free projections", at[8] / free[3], 1.5),
        ]
        if activation == "relu":
            measurements.append(below("relu: at 24 over at 256", at[24] / at[256], 1.15))
        else:
            measurements.append(above("tanh: at 24 over at 256", at[24] / at[256], 1.3))
    notes = (
        "At 40 inputs a block the last one of a unit has 16, since 256 is no multiple of 40: the "
        "value of the unit-wise Fisher is reached at 64.",
    )
    return Outcome(tuple(measurements), data, notes)


def _free_condition(size: int) -> float:
    """Of as many free projections as the two hidden layers have blocks."""
    low, high = free_edges(2 * _SIDE * _SIDE / size, size / _MANY)
    return high / low
