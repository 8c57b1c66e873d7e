"""Structure x loss x Fisher x precision x damping x degenerate situation, beside dense references.

The signals are made in NumPy and rounded, so that what is measured is a structure's arithmetic.
"""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from battery import made
from dense_reference import BIAS_SCALE, Problem, linearise, solve
from fault_harness import Right, over
from scipy import special

import natgrad_flax as ng
from natgrad_flax.structures.base import ravel

pytestmark = pytest.mark.usefixtures("x64")

WIDTHS, FEW = (6, 8, 7, 3), (2, 3, 3)
SIGMA = np.array([[1.6, 0.4, -0.2], [0.4, 1.0, 0.3], [-0.2, 0.3, 1.2]])

STRUCTURES = made(3) | {
    # the Sigma that the bounds below were measured with
    "layer-wise": ng.LayerWise(SIGMA),
    "kfac-literal-pi": ng.KFAC("literal", "pi"),
    "unit-wise-parameter": ng.UnitWise("parameter"),
}
LOSSES = ("mse", "cross-entropy")
FISHERS = ("exact", "empirical", "mc")
DAMPINGS = (0.0, 1e-12, 1e-6, 1e-3, 1.0, 1e3)


def situation(name):
    """Parameters, inputs and labels; all that varies is one degeneracy."""
    rng = np.random.default_rng(5)
    widths = FEW if name == "more outputs than parameters" else WIDTHS
    n = {"one sample": 1, "more outputs than parameters": 24}.get(name, 4)
    parameters = [
        (rng.normal(size=pair), rng.normal(size=pair[1])) for pair in itertools.pairwise(widths)
    ]
    x, labels = rng.normal(size=(n, widths[0])), rng.integers(1, widths[-1], n)
    if name == "samples that repeat":
        x[n // 2 :] = x[: n // 2]
    elif name == "samples that are all the same":
        x[:] = x[0]
    elif name == "inputs that are zero":
        x[:] = 0
    elif name == "a dead layer":
        parameters[1][1][:] = -1e3
    elif name == "dead units":
        parameters[0][1][:4] = -1e3
        parameters[1][1][:3] = -1e3
    elif name == "saturated outputs":
        parameters[2][1][0] = 12 / BIAS_SCALE
    return parameters, x, labels


SITUATIONS = (
    "nothing special",
    "samples that repeat",
    "samples that are all the same",
    "inputs that are zero",
    "a dead layer",
    "dead units",
    "saturated outputs",
    "more outputs than parameters",
    "one sample",
)


def problem(name: str, loss: str, fisher: str, dtype: type) -> Problem:
    """The signals of a situation; MSE has H = I, cross-entropy H = diag(p) - p p^T."""
    parameters, x, labels = situation(name)
    rng = np.random.default_rng(7)
    n, c = len(x), parameters[-1][0].shape[1]
    onehot, noise, draws = np.eye(c)[labels], rng.normal(size=(n, 2, c)), rng.random((n, 2))

    def residual(f):
        return f - onehot if loss == "mse" else special.softmax(f, axis=1) - onehot

    def factor(f):
        if loss == "mse":
            return np.broadcast_to(np.eye(c), (n, c, c))
        root = np.sqrt(special.softmax(f, axis=1))
        complement = np.linalg.svd(root[:, None, :])[2][:, 1:]
        return complement * root[:, None, :]

    def sampled(f):
        if loss == "mse":
            return noise / np.sqrt(2)
        p = special.softmax(f, axis=1)
        drawn = np.minimum((draws[:, :, None] > np.cumsum(p, axis=1)[:, None]).sum(axis=2), c - 1)
        return (p[:, None] - np.eye(c)[drawn]) / np.sqrt(2)

    def inside(f):
        pairs = zip(factor(f), residual(f), strict=True)
        return np.stack([np.linalg.lstsq(rows.T, r, rcond=None)[0] for rows, r in pairs])

    seeds, coefficients = {
        "exact": (factor, inside),
        "empirical": (lambda f: residual(f)[:, None], lambda f: np.ones((n, 1))),
        "mc": (sampled, None),
    }[fisher]
    return linearise(parameters, x, seeds, residual, coefficients, dtype)


def signals_of(made: Problem, dtype: type) -> tuple[ng.Signals, ng.Residual]:
    def cast(array):
        return jnp.asarray(array, dtype)

    layers = tuple(
        ng.DenseSignals(cast(a.inputs[:, :-1]), cast(a.derivatives), BIAS_SCALE, (index,))
        for index, a in enumerate(made.layers)
    )
    outputs = cast(np.zeros((len(made.layers[0].inputs), made.layers[-1].inputs.shape[1])))
    if made.coefficients is not None:
        return ng.Signals(layers, outputs), ng.Residual(cast(made.coefficients), None)
    directions = tuple(cast(a.direction) for a in made.layers)
    return ng.Signals(layers, outputs), ng.Residual(None, directions)


def step(structure, signals, residual, rho):
    """The product's, one program for all dampings but 0."""
    hidden = jax.tree_util.Partial(structure.solve)
    if rho == 0:
        return _run(hidden, signals, residual)
    return _run(hidden, signals, residual, jnp.asarray(rho, signals.outputs.dtype))


@jax.jit
def _run(solve, signals, residual, rho=0.0):
    return ravel(solve(signals, residual, rho))


def bound(structure, made, dtype, rho, condition):
    """The error, over the norm of the reference, that a cell may have; None: it is finite.

    Up to a condition of 1e5 it is 1e-3 in float32, or a third of eps cond where that is more, 4e-3
    at most; where layers are coupled two thirds, and for a Monte-Carlo gradient, whose rounding
    outside of the span of the samples is divided by the damping, eps cond itself.
    """
    eps, outside = float(np.finfo(dtype).eps), made.coefficients is None
    coupled = isinstance(structure, ng.LayerWise) and not isinstance(structure, ng.BlockDiagonal)
    least = 1e-3 if dtype == np.float32 else 1e-8
    if condition < 1e5:
        return max(least, (1 if outside else 0.67 if coupled else 0.33) * eps * condition)
    if coupled or outside:
        return None
    if rho == 0 and (isinstance(structure, ng.EKFAC) or 500 * eps * condition > 1):
        return None  # rounding decides on the eigenvectors, or on the rank
    return max(least, 10 * eps * condition)


def failures(structure, made, dtype, dampings):
    signals, residual = signals_of(made, dtype)
    for rho in dampings:
        if rho == 0 and made.coefficients is None:
            continue
        expected, condition = solve(structure, made, rho)
        found = np.asarray(step(structure, signals, residual, rho), np.float64)
        error = np.linalg.norm(found - expected) / (np.linalg.norm(expected) or 1)
        limit = bound(structure, made, dtype, rho, condition)
        if not error <= (np.inf if limit is None else limit) or not np.isfinite(found).all():
            yield f"damping {rho:g}: off by {error:.1e} at condition {condition:.1e}"


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", STRUCTURES)
def test_every_cell(name, dtype):
    found = []
    for where, loss, fisher in itertools.product(SITUATIONS, LOSSES, FISHERS):
        structure = STRUCTURES[name]
        if name == "layer-wise" and where == "more outputs than parameters":
            structure = ng.LayerWise(SIGMA[:2, :2])
        made = problem(where, loss, fisher, dtype)
        told = failures(structure, made, dtype, DAMPINGS)
        found += [f"{where}, {loss}, {fisher}, {text}" for text in told]
    assert not found, "\n".join(found)


def cell(name, where, loss, fisher, dtype, rho):
    """One cell of the sweep, as a case of a fault table."""

    def run():
        told = list(failures(STRUCTURES[name], problem(where, loss, fisher, dtype), dtype, [rho]))
        assert not told, told
        return 0.0

    return run, Right()


F32, F64 = np.float32, np.float64
DEAD, UNITS, SAME, AGAIN = SITUATIONS[4], SITUATIONS[5], SITUATIONS[2], SITUATIONS[1]
ONE, MANY, ZERO, NORMAL = SITUATIONS[8], SITUATIONS[7], SITUATIONS[3], SITUATIONS[0]

WAS_WRONG = {
    " ".join(map(str, (*key[:4], key[4].__name__, key[5]))): cell(*key)
    for key in (
        # coupled layers that lose rank by their data: 0.25 to 1
        ("block-tri-diagonal", DEAD, "mse", "exact", F32, 0.0),
        ("block-tri-diagonal", UNITS, "mse", "exact", F32, 0.0),
        ("block-tri-diagonal", AGAIN, "mse", "exact", F32, 0.0),
        ("block-tri-diagonal", SAME, "mse", "exact", F32, 0.0),
        ("block-tri-diagonal", NORMAL, "mse", "exact", F32, 0.0),
        ("layer-wise", DEAD, "mse", "exact", F64, 0.0),
        ("layer-wise", UNITS, "mse", "exact", F64, 0.0),
        ("layer-wise", AGAIN, "mse", "exact", F64, 0.0),
        # NaN, and steps of 1e14
        ("block-tri-diagonal", AGAIN, "mse", "exact", F32, 1e-12),
        ("block-tri-diagonal", SAME, "mse", "exact", F32, 1e-12),
        ("block-tri-diagonal", ZERO, "mse", "exact", F32, 1e-12),
        ("unit-wise", DEAD, "mse", "exact", F32, 1e-12),
        ("unit-wise", AGAIN, "mse", "exact", F32, 1e-12),
        ("unit-wise", SAME, "mse", "exact", F32, 1e-12),
        # rounding that a small damping divides
        ("block-tri-diagonal", SAME, "cross-entropy", "mc", F32, 1e-3),
        ("block-tri-diagonal", AGAIN, "mse", "mc", F32, 1e-3),
        ("ekfac", SAME, "mse", "exact", F32, 1e-6),
        ("ekfac", ZERO, "mse", "exact", F32, 1e-6),
        ("quasi-diagonal", SAME, "mse", "exact", F32, 1e-6),
        ("quasi-diagonal", ZERO, "mse", "exact", F32, 1e-6),
        ("quasi-diagonal", SAME, "mse", "exact", F32, 1e-12),
        ("quasi-diagonal", NORMAL, "mse", "exact", F32, 1e-3),
        # normal equations: all of the step
        ("exact", MANY, "mse", "empirical", F32, 0.0),
        ("quasi-diagonal", ONE, "mse", "empirical", F32, 0.0),
    )
}


@over(WAS_WRONG)
def test_cells_that_were_wrong(run, answer):
    answer.check(run)


@pytest.mark.parametrize("name", ["exact", "unit-wise", "quasi-diagonal", "ekfac"])
@pytest.mark.parametrize("where", [SAME, ZERO, DEAD])
def test_a_traced_damping_of_zero_is_finite(name, where):
    signals, residual = signals_of(problem(where, "mse", "exact", F32), F32)
    hidden = jax.tree_util.Partial(STRUCTURES[name].solve)
    Right().check(lambda: _run(hidden, signals, residual, jnp.zeros((), F32)))
