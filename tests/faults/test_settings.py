"""Numbers that settings are: every kind of number is looked at, everything else gets a sentence."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
from fault_harness import Refused, Right, over
from flax import nnx

import natgrad_flax as ng
import ntk_analysis as na
from natgrad_flax import checkpoint, devices, linear
from natgrad_flax.linear import completion, deep_linear, matrix_factorization, references

MSE = ng.MeanSquaredError()
MODEL = ng.MLP((3, 4, 2), activation="tanh", rngs=nnx.Rngs(0))
X = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32)
Y = jnp.asarray(np.random.default_rng(1).normal(size=(4, 2)), jnp.float32)
MESH = jax.make_mesh((1,), ("data",))
KEY = jax.random.key(0)
TINY = 1e-40
"""Positive, and 0 in the arithmetic of float32."""


def gradient(damping=0.1, structure=ng.Exact(), **settings):  # noqa: B008
    return ng.natural_gradient(
        MODEL, X, Y, structure=structure, loss=MSE, damping=damping, **settings
    )


def sharded(damping=0.1, **settings):
    return devices.sharded_natural_gradient(
        MODEL, X, Y, structure=ng.KFAC(), loss=MSE, damping=damping, mesh=MESH, **settings
    )


def descent(rate=0.1, **settings):
    settings = {"structure": ng.Exact(), "loss": MSE, "damping": 0.1, **settings}
    return ng.natural_gradient_descent(rate, **settings)


@functools.cache
def known():
    """The step at damping 0.1, from a Python number."""
    return gradient()


def traced(value, function):
    """A call with a number that only a program knows."""
    return jax.eval_shape(function, jnp.asarray(value))


def theory(damping=0.0, rate=0.1, steps=2):
    return na.predict_dynamics(ng.Exact(), MODEL, X, Y, rate, steps, damping=damping).outputs_train


def displaced(rate=0.1, steps=2):
    return na.parameter_displacement(ng.Exact(), MODEL, X, Y, rate, steps)


ZERO = Refused("a Monte-Carlo Fisher needs a positive damping")
NEGATIVE = Refused("damping must be 0 or positive and finite")
NO_DAMPING = Refused("damping must be a number, an ng.RelativeDamping")
NORMAL = Refused("smallest normal number here, and would count as 0")

DAMPINGS = {
    "0 of NumPy, Monte-Carlo": (lambda: gradient(np.float32(0), fisher="mc", key=KEY), ZERO),
    "0 of JAX, Monte-Carlo": (lambda: gradient(jnp.zeros(()), fisher="mc", key=KEY), ZERO),
    "0 in an array, Monte-Carlo": (lambda: gradient(np.array(0), fisher="mc", key=KEY), ZERO),
    "0 of JAX, Monte-Carlo, on a mesh": (
        lambda: sharded(jnp.zeros(()), fisher="mc", key=KEY),
        ZERO,
    ),
    "0 of NumPy, Monte-Carlo, descent": (lambda: descent(damping=np.int64(0), fisher="mc"), ZERO),
    "0 of JAX, with momentum": (
        lambda: descent(damping=jnp.zeros(()), momentum=0.9),
        Refused("momentum= needs a positive damping"),
    ),
    "0 of JAX, online": (
        lambda: linear.online_natural_gradient_descent(damping=jnp.zeros(())),
        Refused("sampled second moments need a positive damping"),
    ),
    "0 of JAX is the pseudo-inverse": (
        lambda: gradient(jnp.zeros(())),
        Right(lambda: gradient(0.0), 0),
    ),
    "an entry a sample": (
        lambda: gradient(jnp.full(4, 0.1)),
        Refused(r"array of shape \(4,\)"),
    ),
    "an entry a layer, one too many": (
        lambda: gradient(jnp.full(3, 0.1), ng.BlockDiagonal()),
        Refused(r"of BlockDiagonal must be one number or \(2,\), one a layer, .* shape \(3,\)"),
    ),
    "a matrix": (
        lambda: gradient(jnp.full((2, 3), 0.1), ng.KFAC()),
        Refused(r"one number or \(2,\), one a layer or \(2, 2\), one a factor, .* \(2, 3\)"),
    ),
    "one entry in an array, on a mesh": (
        lambda: sharded(np.full((1,), 0.1)),
        Refused(r"damping of KFAC must be .* shape \(1,\)"),
    ),
    "a traced entry a sample": (
        lambda: traced(np.full(4, 0.1), gradient),
        Refused(r"Exact must be one number, got an array of shape \(4,\)"),
    ),
    "an entry a layer": (
        lambda: gradient(jnp.full(2, 0.1), ng.BlockDiagonal()),
        Right(lambda: gradient(0.1, ng.BlockDiagonal())),
    ),
    "nothing in it": (lambda: gradient(jnp.zeros((0,))), NEGATIVE),
    "a list": (lambda: gradient([0.1, 0.1]), NO_DAMPING),
    "text": (lambda: gradient("0.1"), NO_DAMPING),
    "text in an array": (lambda: gradient(np.array("0.1")), NO_DAMPING),
    "None": (lambda: gradient(None), NO_DAMPING),
    "a truth value": (lambda: gradient(True), NO_DAMPING),
    "complex": (lambda: gradient(1j), NO_DAMPING),
    "complex of JAX": (lambda: gradient(jnp.asarray(0.1 + 0j)), NO_DAMPING),
    "traced and complex": (lambda: traced(1j, gradient), NO_DAMPING),
    "negative of NumPy": (lambda: gradient(np.float32(-0.1)), NEGATIVE),
    "negative of JAX": (lambda: gradient(jnp.asarray(-0.1)), NEGATIVE),
    "one negative entry": (
        lambda: gradient(jnp.asarray([0.1, -0.1]), ng.BlockDiagonal()),
        NEGATIVE,
    ),
    "NaN of JAX, descent": (lambda: descent(damping=jnp.asarray(jnp.nan)), NEGATIVE),
    "below float32": (lambda: gradient(TINY), NORMAL),
    "below float32, Monte-Carlo": (
        lambda: gradient(TINY, ng.BlockTriDiagonal(), fisher="mc", key=KEY),
        NORMAL,
    ),
    "below float32, on a mesh": (lambda: sharded(TINY), NORMAL),
    "below float64": (lambda: na.coefficient_matrix(ng.Exact(), MODEL, X, damping=1e-310), NORMAL),
    "below float32, in float64 theory": (
        lambda: na.coefficient_matrix(ng.BlockDiagonal(), MODEL, X, damping=TINY),
        Right(),
    ),
    "np.float32(0.1)": (lambda: gradient(np.float32(0.1)), Right(known, 1e-6)),
    "jnp.asarray(0.1)": (lambda: gradient(jnp.asarray(0.1)), Right(known, 1e-6)),
    "theory, np.float32(0)": (lambda: theory(np.float32(0)), Right(lambda: theory(0.0), 0)),
    "theory, jnp 0": (lambda: theory(jnp.zeros(())), Right(lambda: theory(0.0), 0)),
    "theory, an array": (lambda: theory(np.full(2, 0.1)), Refused("theory needs a fixed damping")),
    "theory, a list": (lambda: na.isotropy(ng.Exact(), MODEL, X, damping=[0.1]), NO_DAMPING),
    "theory, complex": (lambda: na.isotropy(ng.Exact(), MODEL, X, damping=1j), NO_DAMPING),
    "a rate's, an array": (
        lambda: ng.optimal_learning_rate(ng.Exact(), MODEL, 4, damping=np.full(3, -0.1)),
        NEGATIVE,
    ),
    "deep linear, an array": (
        lambda: linear.deep_linear_descent(damping=np.full(2, 0.1)),
        Refused("damping must be a number, a schedule"),
    ),
    "adaptive, text": (
        lambda: ng.LevenbergMarquardt(initial="1"),
        Refused("initial of LevenbergMarquardt must be a number, got '1'"),
    ),
    "adaptive, below float32": (
        lambda: ng.LevenbergMarquardt(minimum=TINY),
        Refused("LevenbergMarquardt needs .* 1.2e-38 <= minimum"),
    ),
}


@over(DAMPINGS)
def test_dampings(run, answer):
    answer.check(run)


NO_RATE = Refused("learning_rate must be a number")
BAD_RATE = Refused("learning_rate must be positive and finite")
STEPS = Refused("steps must be (an integer|at most 10,000,000)")
ENTRIES = {
    "descent": descent,
    "deep linear": linear.deep_linear_descent,
    "online": linear.online_natural_gradient_descent,
    "dynamics": lambda rate: theory(rate=rate),
    "displacement": lambda rate: displaced(rate),
    "radius": lambda rate: na.spectral_radius(ng.Exact(), MODEL, X, rate, [0.1]),
}
RATES = {
    "NaN of NumPy": (np.float32(np.nan), BAD_RATE),
    "NaN of JAX": (jnp.asarray(jnp.nan), BAD_RATE),
    "0 of NumPy": (np.float32(0), BAD_RATE),
    "complex": (1j, NO_RATE),
    "a list": ([0.1], NO_RATE),
    "an array": (jnp.full(3, 0.1), NO_RATE),
}
LEARNING_RATES = {
    f"{entry}, {name}": (functools.partial(call, rate), answer)
    for entry, call in ENTRIES.items()
    for name, (rate, answer) in RATES.items()
} | {
    "descent, a truth value": (lambda: descent(True), NO_RATE),
    "descent, text": (lambda: descent("0.1"), NO_RATE),
    "descent, traced and complex": (lambda: traced(1j, lambda rate: descent(rate) and 0), NO_RATE),
    "dynamics, a schedule": (lambda: theory(rate=lambda step: 0.1), NO_RATE),
    "dynamics, traced": (lambda: traced(0.1, lambda rate: theory(rate=rate)), NO_RATE),
    "dynamics, of JAX": (
        lambda: theory(rate=jnp.asarray(0.5)),
        Right(lambda: theory(rate=0.5), 0),
    ),
    "descend, NaN": (
        lambda: linear.descend(lambda p: p, X, step_size=np.float32(np.nan), steps=2),
        Refused("step_size must be positive and finite"),
    ),
    "descend, an array": (
        lambda: linear.descend(lambda p: p, X, step_size=X, steps=2),
        Refused("step_size must be a number, got an array of float32 and shape"),
    ),
    "one step of factors, complex": (
        lambda: matrix_factorization.step_kernel(
            [X[:3, :3]], (0, 0), kind="euclidean", step_size=1j, error=1.0
        ),
        Refused("step_size must be a number"),
    ),
    "one step of factors, an error that is text": (
        lambda: matrix_factorization.step_kernel(
            [X[:3, :3]], (0, 0), kind="euclidean", step_size=0.1, error="1"
        ),
        Refused("error must be finite and not 0, got '1'"),
    ),
    "the law of a step, NaN": (
        lambda: deep_linear.euler_product(jnp.eye(2), jnp.eye(2), 3, np.float32(np.nan)),
        BAD_RATE,
    ),
    "the flow, a negative time": (
        lambda: deep_linear.flow_product(jnp.eye(2), jnp.eye(2), np.float32(-1)),
        Refused("time must be 0 or positive"),
    ),
}


@over(LEARNING_RATES)
def test_learning_rates(run, answer):
    answer.check(run)


def constant(value):
    """One step of a descent whose schedule gives a value."""
    tx = descent(lambda step: value)
    params = nnx.state(MODEL, nnx.Param)
    return tx.update(params, tx.init(params), params, module=MODEL, x=X, y=Y)


def flow(times, **settings):
    return na.predict_flow(ng.Exact(), MODEL, X, Y, times, loss=MSE, **settings)


COUNTS = {
    "dynamics, 10^9 steps": (lambda: theory(steps=10**9), STEPS),
    "displacement, 10^9 steps": (lambda: displaced(steps=10**9), STEPS),
    "descend, 10^9 steps": (
        lambda: linear.descend(lambda p: p, X, step_size=0.1, steps=10**9),
        STEPS,
    ),
    "dynamics, more steps than memory": (
        lambda: na.predict_dynamics(
            ng.Diagonal(), MODEL, np.ones((500, 3)), np.ones((500, 2)), 0.1, 10**7
        ),
        Refused("the outputs at every step .* needs .* take fewer steps"),
    ),
    "displacement, NaN steps": (lambda: displaced(steps=math.nan), STEPS),
    "displacement, negative steps of NumPy": (lambda: displaced(steps=np.int64(-1)), STEPS),
    "displacement, steps in a list": (lambda: displaced(steps=[2]), STEPS),
    "dynamics, 2.0 steps": (lambda: theory(steps=2.0), STEPS),
    "dynamics, True": (lambda: theory(steps=True), STEPS),
    "dynamics, steps of NumPy": (lambda: theory(steps=np.int64(2)), Right(theory, 0)),
    "dynamics, steps of JAX": (lambda: theory(steps=jnp.int32(2)), Right(theory, 0)),
    "displacement, steps of NumPy": (lambda: displaced(steps=np.int32(2)), Right(displaced, 0)),
    "completion, 10^10 steps": (
        lambda: completion.complete(
            np.eye(3, dtype=np.float32), np.eye(3), [jnp.eye(3)] * 2, max_steps=10**10
        ),
        Refused("max_steps must be at most"),
    ),
    "microbatches, 10^9": (
        lambda: gradient(microbatches=10**9),
        Refused("4 samples has no 1000000000 equal parts; use microbatches=4"),
    ),
    "microbatches of NumPy": (lambda: gradient(microbatches=np.int64(2)), Right(known, 1e-6)),
    "microbatches, 2.0": (
        lambda: gradient(microbatches=2.0),
        Refused("microbatches must be an integer"),
    ),
    "samples of NumPy for a rate": (
        lambda: ng.optimal_learning_rate(ng.Exact(), MODEL, np.int64(4)),
        Right(1.0, 0),
    ),
    "samples of JAX for a rate": (
        lambda: ng.optimal_learning_rate(ng.Exact(), MODEL, jnp.int32(4)),
        Right(1.0, 0),
    ),
    "True samples for a rate": (
        lambda: ng.optimal_learning_rate(ng.Exact(), MODEL, True),
        Refused("num_samples must be an integer of at least 1, got True"),
    ),
    "widths of NumPy": (
        lambda: nnx.state(ng.MLP((np.int64(3), 4, np.int32(2)), rngs=nnx.Rngs(0)), nnx.Param),
        Right(lambda: nnx.state(ng.MLP((3, 4, 2), rngs=nnx.Rngs(0)), nnx.Param), 0),
    ),
    "widths that are truth values": (
        lambda: ng.MLP((3, True, 2), rngs=nnx.Rngs(0)),
        Refused("at least two positive integers"),
    ),
    "outputs of NumPy": (
        lambda: ng.ConvNet((4, 4, 1), (2,), np.int64(2), strides=1, rngs=nnx.Rngs(0))(
            jnp.ones((1, 4, 4, 1))
        ),
        Right(),
    ),
    "a variance that is NaN of JAX": (
        lambda: ng.MLP((3, 2), weight_variance=jnp.asarray(jnp.nan), rngs=nnx.Rngs(0)),
        Refused("weight_variance must be positive and finite"),
    ),
    "targets drawn, of NumPy": (
        lambda: gradient(fisher="mc", key=KEY, mc_samples=np.int64(2)),
        Right(lambda: gradient(fisher="mc", key=KEY, mc_samples=2), 0),
    ),
    "targets drawn, 2.0": (lambda: descent(mc_samples=2.0), Refused("mc_samples must be an int")),
    "a seed out of range": (lambda: descent(seed=10**20), Refused("seed must be an integer of 0")),
    "a seed that is text": (lambda: descent(seed="0"), Refused("seed must be an integer of 0")),
    "an interval of NumPy": (
        lambda: [ng.MovingAverage(every=np.int64(2), decay=np.float32(0.5)).every],
        Right([2], 0),
    ),
    "decay of 1 of NumPy": (
        lambda: ng.MovingAverage(decay=np.float64(1)),
        Refused("decay must be below 1"),
    ),
    "momentum, NaN of JAX": (
        lambda: descent(momentum=jnp.asarray(jnp.nan)),
        Refused("momentum must be 0 or positive and finite"),
    ),
    "momentum, 1 of NumPy": (
        lambda: descent(momentum=np.int64(1)),
        Refused("momentum must be below 1"),
    ),
    "momentum of K-FAC, of NumPy": (
        lambda: descent(structure=ng.KFAC(), momentum=np.float32(0.9)),
        Refused("behind KFAC put optax.trace"),
    ),
    "a schedule that gives an array": (
        lambda: constant(jnp.ones(3)),
        Refused(r"schedule of learning_rate must give one number .* shape \(3,\)"),
    ),
    "a schedule that gives complex": (
        lambda: constant(1j),
        Refused("schedule of learning_rate must give one number"),
    ),
    "times that are text": (lambda: flow(["1"]), Refused("times must be a sequence of numbers")),
    "times that are complex": (lambda: flow([1j]), Refused("times must be a sequence of numbers")),
    "one time alone": (lambda: flow(1.0), Refused("times must be a sequence of numbers")),
    "a tolerance that is NaN": (
        lambda: flow([1.0], rtol=np.float32(np.nan)),
        Refused("rtol and atol must be positive"),
    ),
    "dampings that are text": (
        lambda: na.spectral_radius(ng.Exact(), MODEL, X, 0.1, ["a"]),
        Refused("dampings must be a sequence of numbers"),
    ),
    "a ridge that is complex": (
        lambda: na.predict(ng.Exact(), MODEL, X, Y, X, ridge=1j),
        Refused("ridge must be a number"),
    ),
    "iterations on a mesh, 1.5": (
        lambda: devices.Sharded(ng.Exact(), MESH, max_iterations=1.5),
        Refused("max_iterations must be an integer"),
    ),
    "numbers of JAX in a structure that decides a program": (
        lambda: hash(devices.Sharded(ng.Exact(), MESH, "data", "auto", jnp.asarray(1e-3), 9)) and 1,
        Right(1, 0),
    ),
    "rows of an interpolant, 2.5": (
        lambda: references.interpolant_accuracy(2.5, 4),
        Refused("num_samples must be an integer"),
    ),
    "a step of a checkpoint, 1.5": (
        lambda: checkpoint.save("unused", MODEL, optax.EmptyState(), structure=ng.KFAC(), step=1.5),
        Refused("step must be an integer"),
    ),
    "a sweep's seed out of range": (
        lambda: na.SweepSettings(variable="width", values=(8,), seeds=(10**20,)),
        Refused("every seed must be an integer of 0"),
    ),
    "a sweep of NumPy's integers": (
        lambda: na.SweepSettings(variable="width", values=tuple(np.arange(2, 4))).values,
        Right((2, 3), 0),
    ),
    "Fisher signals without a key": (
        lambda: ng.fisher_signals(MODEL, X, Y, loss=MSE, fisher="mc"),
        Refused(r"pass key=jax.random.key\(seed\)"),
    ),
    "Fisher signals of no kind": (
        lambda: ng.fisher_signals(MODEL, X, Y, loss=MSE, fisher="foo"),
        Refused("fisher must be one of exact, mc, empirical, improved, got 'foo'"),
    ),
    "Fisher signals of a list": (
        lambda: ng.fisher_signals(MODEL, X, Y, loss=MSE, fisher=["mc"]),
        Refused("fisher must be one of"),
    ),
    "Fisher signals of no samples": (
        lambda: ng.fisher_signals(MODEL, X, Y, loss=MSE, fisher="mc", key=KEY, num_samples=0),
        Refused("num_samples must be an integer of at least 1"),
    ),
    "a number as key": (
        lambda: gradient(fisher="mc", key=0),
        Refused("key must be one key of"),
    ),
    "many keys": (
        lambda: gradient(fisher="mc", key=jax.random.split(KEY, 3)),
        Refused("key must be one key of jax.random"),
    ),
}


@over(COUNTS)
def test_counts_and_other_numbers(run, answer):
    answer.check(run)
