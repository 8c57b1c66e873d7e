"""Solves and steps under vmap: equal to one by one, with derivatives of any mode and order."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from battery import ONE_OF_EACH, made
from fault_harness import Right, over
from flax import nnx

import natgrad_flax as ng
from natgrad_flax.linalg.dense import eigh, inverse_psd, lu_solve, pinv_solve, qr, solve_psd
from natgrad_flax.xla.batched_solve import solve_scaled_gram

RNG = np.random.default_rng(0)
THREE = RNG.normal(size=(2, 3, 3))
ROWS = RNG.normal(size=(2, 3, 4, 2))
RHS = RNG.normal(size=(2, 4, 2))
WEIGHTS = RNG.normal(size=(4, 2))
POINTS = RNG.normal(size=(3, 2))
"""Two parameters, at three points."""


def blend(parts, theta):
    """A smooth curved family of arrays."""
    return parts[0] + theta[0] * parts[1] + theta[1] ** 2 * parts[0][::-1]


def deficient(theta):
    """Symmetric (4, 4) of rank 2, everywhere."""
    rows = blend(ROWS[:, 0], theta)
    return rows @ rows.T


def definite(theta):
    """Symmetric positive definite (4, 4)."""
    rows = blend(ROWS[:, 1], theta)
    return rows @ rows.T + np.diag([1.0, 2.0, 3.0, 4.0])


def general(theta):
    """Regular (3, 3) without symmetry."""
    return blend(THREE, theta) + 5 * np.eye(3)


def pinv(matrix):
    return np.linalg.pinv(matrix, rtol=1e-9, hermitian=True)


def spectral(xp, values, vectors):
    """What does not depend on the signs of eigenvectors."""
    return vectors**2 * xp.exp(values / 9)


def unsigned(xp, span, triangle):
    """What does not depend on the signs of Q and R."""
    return xp.concatenate([span**2, triangle**2])


def unit_systems(theta):
    gram, scale, shift = definite(theta), blend(ROWS[:, 2], theta), WEIGHTS**2 + theta[1] ** 2
    return gram, scale, shift, blend(RHS, theta)


def solve_units(theta):
    gram, scale, shift, rhs = unit_systems(theta)
    solved = [
        np.linalg.solve(np.diag(scale[:, i]) @ gram @ np.diag(scale[:, i]) + np.diag(e), rhs[:, i])
        for i, e in enumerate(shift.T)
    ]
    return np.stack(solved, axis=1)


# the function, and the same by NumPy
SOLVES = {
    "definite": (
        lambda t: solve_psd(definite(t), blend(RHS, t), shifted=True),
        lambda t: np.linalg.solve(definite(t), blend(RHS, t)),
    ),
    "deficient": (
        lambda t: solve_psd(deficient(t), blend(RHS, t), shifted=False),
        lambda t: pinv(deficient(t)) @ blend(RHS, t),
    ),
    "pseudo-inverse": (
        lambda t: pinv_solve(deficient(t), blend(RHS, t)[:, 0]),
        lambda t: pinv(deficient(t)) @ blend(RHS, t)[:, 0],
    ),
    "inverse": (
        lambda t: inverse_psd(definite(t), shifted=True) @ WEIGHTS,
        lambda t: np.linalg.inv(definite(t)) @ WEIGHTS,
    ),
    "inverse-deficient": (
        lambda t: inverse_psd(deficient(t), shifted=False) @ WEIGHTS,
        lambda t: pinv(deficient(t)) @ WEIGHTS,
    ),
    "general": (
        lambda t: lu_solve(general(t), blend(RHS, t)[:3]),
        lambda t: np.linalg.solve(general(t), blend(RHS, t)[:3]),
    ),
    "eigenvectors": (
        lambda t: spectral(jnp, *eigh(definite(t))),
        lambda t: spectral(np, *np.linalg.eigh(definite(t))),
    ),
    "triangle": (
        lambda t: unsigned(jnp, *qr(blend(ROWS[:, 2], t))),
        lambda t: unsigned(np, *np.linalg.qr(blend(ROWS[:, 2], t))),
    ),
    "units": (lambda t: solve_scaled_gram(*unit_systems(t)), solve_units),
}


def weighed(found):
    return (found * np.cos(np.arange(found.size)).reshape(found.shape)).sum()


@functools.cache
def derivatives(name):
    """Every way to a derivative that vmap and grad give, from one program."""

    def value(theta):
        return weighed(SOLVES[name][0](theta))

    @jax.jit
    def everything(points):
        gradient = jax.grad(value)
        twice = jax.vmap(jax.vmap(gradient))(jnp.stack([points, points]))
        return {
            "values": jax.vmap(value)(points),
            "forward": jax.vmap(jax.jacfwd(value))(points),
            "vmap of grad": jax.vmap(gradient)(points),
            "grad of vmap": jax.grad(lambda points: jnp.sum(jax.vmap(value)(points)))(points),
            "twice": twice[1],
            "second": jax.vmap(jax.jacfwd(gradient))(points),
        }

    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, everything(jnp.asarray(POINTS)))


def stencil(function, point, step):
    """Central differences of fourth order, shape (2, ...)."""
    found = []
    for direction in step * np.eye(2):
        at = [function(point + factor * direction) for factor in (-2, -1, 1, 2)]
        found.append((at[0] - 8 * at[1] + 8 * at[2] - at[3]) / (12 * step))
    return np.stack(found)


def differences(name, kind):
    """The same by finite differences of NumPy's results."""

    def value(theta):
        return weighed(SOLVES[name][1](theta))

    if kind == "values":
        return np.stack([value(point) for point in POINTS])
    if kind == "second":
        slope = functools.partial(stencil, value, step=1e-3)
        return np.stack([stencil(slope, point, 1e-3) for point in POINTS])
    return np.stack([stencil(value, point, 1e-4) for point in POINTS])


CASES = {
    f"{name}-{kind}": (
        lambda name=name, kind=kind: derivatives(name)[kind],
        Right(
            functools.partial(differences, name, kind),
            {"values": 1e-12, "second": 1e-5}.get(kind, 1e-7),
        ),
    )
    for name in SOLVES
    for kind in ("values", "forward", "vmap of grad", "grad of vmap", "twice", "second")
}


@over(CASES)
def test_a_solve_and_its_derivatives(run, answer):
    answer.check(run)


MSE = ng.MeanSquaredError()
X, Y = RNG.normal(size=(3, 4)), RNG.normal(size=(3, 2))
DAMPINGS = (0.1, 0.7)
STRUCTURES = made(2, [name for name in ONE_OF_EACH if name not in ("diagonal", "quasi-diagonal")])


def members(widths, count, dtype):
    """The definition of networks of one shape, their states, and these stacked."""
    models = [
        ng.MLP(widths, activation="tanh", bias_variance=0.1, param_dtype=dtype, rngs=nnx.Rngs(seed))
        for seed in range(count)
    ]
    states = [nnx.state(model) for model in models]
    return nnx.graphdef(models[0]), states, stacked(states)


def stacked(trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


@functools.cache
def small(name=""):
    # fewer layers compile faster; two have a singular tri-diagonal coupling
    widths = (4, 4, 4, 2) if name == "block-tri-diagonal" else (4, 4, 2)
    with jax.enable_x64(True):
        return members(widths, 2, jnp.float64)


def step(state, damping, name):
    graphdef = small(name)[0]
    return ng.natural_gradient(
        nnx.merge(graphdef, state),
        jnp.asarray(X),
        jnp.asarray(Y),
        structure=STRUCTURES[name],
        loss=MSE,
        damping=damping,
    )


def one_by_one(name):
    """Members by dampings, each by itself."""
    with jax.enable_x64(True):
        return stacked(
            [stacked([step(state, rho, name) for rho in DAMPINGS]) for state in small(name)[1]]
        )


def twice_vmapped(name):
    with jax.enable_x64(True):
        over_dampings = jax.vmap(functools.partial(step, name=name), (None, 0))
        both = jax.jit(jax.vmap(over_dampings, (0, None)))
        return both(small(name)[2], jnp.asarray(DAMPINGS))


def undamped(name):
    """Only the members: a damping of 0 is a property of the program."""
    with jax.enable_x64(True):
        each = functools.partial(step, damping=0.0, name=name)
        found = jax.jit(jax.vmap(each))(small()[2])
        return jax.tree.map(jnp.subtract, found, stacked([each(s) for s in small()[1]]))


@functools.cache
def trained():
    """Two steps of the optimizer for members and learning rates, vmapped and one by one."""
    graphdef, states, together = small()

    def train(state, rate):
        average = ng.MovingAverage(decay=0.5, every=1, inverse_every=2)
        model = nnx.merge(graphdef, state)
        tx = ng.natural_gradient_descent(
            rate, structure=ng.KFAC(), loss=MSE, damping=0.1, average=average, example=(model, X)
        )
        kept = tx.init(state)
        for _ in range(2):
            model = nnx.merge(graphdef, state)
            moved, kept = tx.update(state, kept, module=model, x=X, y=Y)
            state = optax.apply_updates(state, moved)
        return state

    rates = jnp.asarray([0.1, 0.3])
    with jax.enable_x64(True):
        together = jax.jit(jax.vmap(jax.vmap(train, (None, 0)), (0, None)))(together, rates)
        alone = jax.jit(train)
        each = stacked([stacked([alone(state, rate) for rate in rates]) for state in states])
    return together, each


def slopes(name):
    """The derivative through a step along a direction, vmap of grad and grad of vmap."""
    states = small(name)[2]

    def value(state, damping):
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(step(state, damping, name)))

    def along(gradient):
        return sum(jnp.vdot(*pair) for pair in zip(*map(jax.tree.leaves, gradient), strict=True))

    @jax.jit
    def backward(states, damping):
        inside = jax.vmap(jax.grad(value), (0, None))(states, damping)
        outside = jax.grad(lambda s: jnp.sum(jax.vmap(value, (0, None))(s, damping)))(states)
        return jnp.stack([along((inside, states)), along((outside, states))])

    with jax.enable_x64(True):
        found = backward(states, 0.1)
        moved = [
            sum(value(jax.tree.map(lambda leaf, f=f: f * leaf, s), 0.1) for s in small(name)[1])
            for f in (1 - 2e-4, 1 - 1e-4, 1 + 1e-4, 1 + 2e-4)
        ]
        expected = (moved[0] - 8 * moved[1] + 8 * moved[2] - moved[3]) / 12e-4
    return found - expected


def zeros(found):
    return jax.tree.map(jnp.zeros_like, found)


STEPS = {
    **{
        name: (lambda name=name: twice_vmapped(name), Right(lambda n=name: one_by_one(n), 1e-10))
        for name in STRUCTURES
    },
    "optimizer": (lambda: trained()[0], Right(lambda: trained()[1], 1e-10)),
    "undamped": (lambda: undamped("block-diagonal"), Right(lambda: zeros(small()[2]), 1e-9)),
    "slope": (lambda: slopes("block-tri-diagonal"), Right(np.zeros(2), 1e-8)),
}


@over(STEPS)
def test_steps_of_many_models_are_those_of_each(run, answer):
    answer.check(run)


@pytest.mark.slow
@pytest.mark.parametrize("name", STRUCTURES)
def test_derivatives_through_steps_of_every_structure(name):
    Right(np.zeros(2), 1e-8).check(lambda: slopes(name))


def test_an_ensemble_as_large_as_hung():
    graphdef, states, together = members((16, 128, 3), 4, jnp.float32)
    x, y = RNG.normal(size=(64, 16)), RNG.normal(size=(64, 3))
    x, y = jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)

    def direction(state):
        return ng.natural_gradient(
            nnx.merge(graphdef, state), x, y, structure=ng.BlockDiagonal(), loss=MSE, damping=0.1
        )

    expected = stacked([direction(state) for state in states])
    Right(expected, 1e-5).check(lambda: jax.jit(jax.vmap(direction))(together))
