"""Dampings that a structure cannot take, and the solves behind the structures."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from battery import ONE_OF_EACH, made
from fault_harness import Refused, Right, Warned, over
from flax import nnx

import natgrad_flax as ng
from natgrad_flax.damping import per_layer, warn_of_rounding
from natgrad_flax.linalg.dense import pinv_solve, solve_psd
from natgrad_flax.operators.coupling import solve_in_ranges, solve_undamped
from natgrad_flax.operators.least_squares import least_squares, normal_solve
from natgrad_flax.structures.base import ravel

MODEL = ng.MLP((3, 4, 2), rngs=nnx.Rngs(0))
X, Y = jnp.linspace(-1, 1, 15).reshape(5, 3), jnp.ones((5, 2))
STRUCTURES = made(2, [name for name in ONE_OF_EACH if name != "block-tri-diagonal"])


def step(structure, damping, **more):
    return ng.natural_gradient(
        MODEL, X, Y, structure=structure, loss=ng.MeanSquaredError(), damping=damping, **more
    )


def optimise(structure, damping):
    transform = ng.natural_gradient_descent(
        0.1, structure=structure, loss=ng.MeanSquaredError(), damping=damping
    )
    optimizer = nnx.Optimizer(MODEL, transform, wrt=nnx.Param)
    grads = nnx.grad(lambda model: jnp.mean((model(X) - Y) ** 2))(MODEL)
    optimizer.update(MODEL, grads, model=MODEL, x=X, y=Y)


WRONG_SHAPES = {
    f"{name} {shape}": (
        partial(step, structure, np.full(shape, 0.1, np.float32)),
        Refused("damping of .* must be one number.*got an array of shape"),
    )
    for name, structure in STRUCTURES.items()
    for shape in ((3,), (5,), (2, 2), (2, 1), (1, 2))
    if not (name == "kfac" and shape == (2, 2))
}


@over(WRONG_SHAPES)
def test_an_array_of_another_shape_is_refused(run, answer):
    answer.check(run)


LOST = {
    f"{name} {value:g}": (partial(step, structure, value), Refused("smallest normal number"))
    for name, structure in STRUCTURES.items()
    for value in (1e-40, 1e-300)
}
LOST |= {
    "an entry": (
        partial(step, ng.Diagonal(), np.array([0.1, 1e-45])),
        Refused("smallest normal number"),
    ),
    "too few entries": (partial(per_layer, np.ones(2), 3), Refused("each of 3 layers")),
}


@over(LOST)
def test_a_damping_that_the_precision_cannot_hold_is_refused(run, answer):
    answer.check(run)


def held(value, dtype=jnp.float32):
    warn_of_rounding(value, jnp.dtype(dtype))
    return 0.0


SMALL = {
    "below the rounding of float32": (partial(held, 1e-9), Warned("6e\\+01 lambda of the step")),
    "an entry below it": (partial(held, [1.0, 1e-9]), Warned("below the rounding")),
    "below that of float64": (partial(held, 1e-17, float), Warned("below the rounding of float64")),
    "a step with it": (partial(step, ng.Diagonal(), 1e-9), Warned("below the rounding")),
    "a step of K-FAC": (partial(step, ng.KFAC(), 1e-6), Warned("below 100 times the rounding")),
    "a step of one system": (
        partial(step, ng.Exact(), 1e-6),
        Warned("below 100 times the rounding"),
    ),
    "without a system": (partial(step, ng.Diagonal(), 1e-6), Right()),
    "in an eigenbasis": (partial(step, ng.EKFAC(), 1e-6), Right()),
    "Monte-Carlo": (
        partial(step, ng.Diagonal(), 1e-6, fisher="mc", key=jax.random.key(1)),
        Warned("use 6e-06 or more"),
    ),
    "above it": (partial(held, 1e-7), Right()),
    "an array above it": (partial(held, np.array([1e-7, 1.0])), Right()),
    "zero": (partial(held, 0), Right()),
    "zero among others": (partial(held, [0.0, 1.0]), Right()),
    "float64 at 1e-12": (partial(held, 1e-12, float), Right()),
}


@over(SMALL)
def test_a_damping_below_the_rounding_is_told(run, answer):
    answer.check(run)


ONES = {
    name: (
        partial(step, STRUCTURES[name], np.full(shape, 0.1, np.float32)),
        Right(lambda name=name: step(STRUCTURES[name], 0.1), 1e-5),
    )
    for name, shape in (
        ("block-diagonal", (2,)),
        ("diagonal", (2,)),
        ("quasi-diagonal", (2,)),
        ("kfac", (2, 2)),
    )
}
ONES["kfac, one a layer"] = (
    partial(step, ng.KFAC(), np.full(2, 0.1, np.float32)),
    ONES["kfac"][1],
)


@over(ONES)
def test_an_array_of_the_right_shape_is_one_number_a_layer(run, answer):
    answer.check(run)


def rows_of(count, size, rank, condition=1e3, dtype=np.float32):
    """Rows (R, P) of a rank, whose singular values fall from 1 to 1 / condition."""
    rng = np.random.default_rng(count)
    left = np.linalg.qr(rng.normal(size=(count, rank)))[0]
    right = np.linalg.qr(rng.normal(size=(size, rank)))[0]
    values = np.geomspace(1, 1 / condition, rank)
    return ((left * values) @ right.T).astype(dtype)


def pseudo_inverse(rows):
    return np.linalg.pinv(rows.astype(np.float64), rcond=1e-5)


ROWS = {
    "more rows": rows_of(9, 4, 4),
    "more columns": rows_of(4, 9, 4),
    "square": rows_of(5, 5, 5),
    "lost rank, more rows": rows_of(9, 4, 2),
    "lost rank, more columns": rows_of(4, 9, 2),
    "condition 3e4": rows_of(9, 4, 4, 3e4),
    "one row": rows_of(1, 4, 1),
    "one column": rows_of(4, 1, 1),
    "large": 1e15 * rows_of(9, 4, 4),
    "zero": np.zeros((4, 3), np.float32),
}
# an error of eps cond(J), which normal equations would square
TOLERANCE = {"condition 3e4": 5e-3}
LEAST_SQUARES = {
    name: (
        partial(jax.jit(least_squares), rows, np.ones(len(rows), np.float32)),
        Right(pseudo_inverse(rows) @ np.ones(len(rows)), TOLERANCE.get(name, 5e-4)),
    )
    for name, rows in ROWS.items()
}
NORMAL = {
    name: (
        partial(jax.jit(normal_solve), rows, rows.T @ np.ones(len(rows), np.float32)),
        Right(pseudo_inverse(rows) @ np.ones(len(rows)), 2e-2),
    )
    for name, rows in ROWS.items()
    if name not in ("condition 3e4", "large")
}


@over(LEAST_SQUARES)
def test_least_squares_loses_the_condition_and_not_its_square(run, answer):
    answer.check(run)


@over(NORMAL)
def test_normal_solve_is_the_pseudo_inverse(run, answer):
    answer.check(run)


@pytest.mark.parametrize("size", [4, 40, 400])
def test_the_rank_decision_keeps_a_condition_of_1e5(size):
    """A cutoff of n eps would drop what a float32 matrix of 400 rows still holds."""
    basis = np.linalg.qr(np.random.default_rng(size).normal(size=(size, size)))[0]
    values = np.geomspace(1, 1e-5, size)
    matrix = ((basis * values) @ basis.T).astype(np.float32)
    target = basis[:, -1].astype(np.float32)
    for solve in (pinv_solve, partial(solve_psd, shifted=False)):
        found = solve(jnp.asarray(matrix), jnp.asarray(target))
        np.testing.assert_allclose(basis[:, -1] @ np.asarray(found), 1e5, rtol=0.1)


SIGMAS = {
    "definite": np.array([[2.0, 1.0, 0.5], [1.0, 2.0, 1.0], [0.5, 1.0, 2.0]]),
    "indefinite": np.array([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0], [0.0, 1.0, 1.0]]),
    "singular": np.ones((3, 3)) + np.diag([0.0, 1.0, 0.0]),
}
RANKS = {"full": (5, 5, 5), "one layer": (5, 2, 5), "all": (2, 3, 4), "a dead layer": (5, 0, 5)}


def coupled(sigma, ranks):
    """G^+ S^T (1 (x) b) beside the duals' S^T u, by NumPy's pseudo-inverse of the dense G."""
    rows = [rows_of(5, 7, max(r, 1), 10.0, np.float64) * (r > 0) for r in ranks]
    jacobian = np.zeros((15, 21))
    for index, block in enumerate(rows):
        jacobian[5 * index : 5 * index + 5, 7 * index : 7 * index + 7] = block
    dense = jacobian.T @ np.kron(sigma, np.eye(5)) @ jacobian
    target = np.linspace(-1, 2, 5)
    expected = np.linalg.pinv(dense, rcond=1e-7, hermitian=True) @ jacobian.T @ np.tile(target, 3)
    grams = [jnp.asarray(block @ block.T) for block in rows]
    return jacobian, grams, jnp.asarray(target), expected


COUPLED = [(sigma, ranks) for sigma in SIGMAS for ranks in RANKS]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("name", "ranks"), COUPLED)
def test_undamped_couplings_are_the_pseudo_inverse(name, ranks):
    """Whatever the ranks of the layers, also where Sigma is singular."""
    sigma = SIGMAS[name]
    jacobian, grams, target, expected = coupled(sigma, RANKS[ranks])
    for duals in (
        solve_undamped(sigma, grams, target),
        solve_in_ranges(sigma, grams, [target] * 3, 0.0),
    ):
        found = jacobian.T @ np.concatenate(duals)
        np.testing.assert_allclose(found, expected, atol=1e-6 * np.abs(expected).max())


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["layer-wise", "block-tri-diagonal"])
def test_both_spaces_agree_where_samples_repeat(name):
    """By sizes the layers have full row rank; by the data they have half of it."""
    sigma = SIGMAS["definite"]
    rng = np.random.default_rng(1)
    layers = tuple(
        ng.DenseSignals(
            jnp.asarray(np.tile(rng.normal(size=(2, 5)), (2, 1))),
            jnp.asarray(np.tile(rng.normal(size=(2, 1, 4)), (2, 1, 1))),
            0.5,
            (index,),
        )
        for index in range(3)
    )
    signals = ng.Signals(layers, jnp.zeros((4, 1)))
    residual = ng.Residual(jnp.asarray(rng.normal(size=(4, 1))), None)
    make = (
        (lambda space: ng.LayerWise(sigma, space)) if name == "layer-wise" else ng.BlockTriDiagonal
    )
    found = [ravel(make(space).solve(signals, residual, 0.0)) for space in ("sample", "parameter")]
    np.testing.assert_allclose(*found, atol=1e-9)
