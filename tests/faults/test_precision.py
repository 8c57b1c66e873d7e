"""Dtypes, mixed precision, strict promotion: the update of float32, in the model's own dtypes."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from battery import ONE_OF_EACH, made
from fault_harness import Right, over
from flax import nnx

import natgrad_flax as ng
import ntk_analysis as na
from natgrad_flax import linear

BF16, F16, F32, F64 = jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64
RNG = np.random.default_rng(0)
# numbers that all dtypes have
X = RNG.integers(-8, 9, size=(4, 3)) / 8
Y = np.eye(2)[[0, 1, 1, 0]]
STRUCTURES = made(2, [name for name in ONE_OF_EACH if name != "block-tri-diagonal"])
FISHERS = ("exact", "mc", "empirical")


class Net(nnx.Module):
    """Two layers that compute in a dtype, None for that of their inputs; parameters of others."""

    def __init__(self, dtype, *param_dtypes):
        rngs = nnx.Rngs(0)
        first, last = param_dtypes[0], param_dtypes[-1]
        self.a = nnx.Linear(3, 4, dtype=dtype, param_dtype=first, rngs=rngs)
        self.b = nnx.Linear(4, 2, dtype=dtype, param_dtype=last, rngs=rngs)
        for layer in (self.a, self.b):
            size = layer.kernel[...].size
            numbers = np.cos(np.arange(size)).reshape(layer.kernel[...].shape)
            layer.kernel[...] = jnp.asarray(np.round(8 * numbers) / 8, layer.kernel[...].dtype)

    def __call__(self, x):
        return self.b(nnx.tanh(self.a(x)))


@contextlib.contextmanager
def switches(**named):
    """Settings of JAX, for a while."""
    with contextlib.ExitStack() as stack:
        for name, value in named.items():
            stack.enter_context(getattr(jax, name)(value))
        yield


# settings of JAX, dtype of the layers, dtypes of the parameters, of x and of y; tolerance
PLAIN = ({}, None, (F32,), F32, F32)
MODES = {
    "bfloat16 layers": (({}, BF16, (F32,), F32, F32), 1e-1),
    "bfloat16": (({}, BF16, (BF16,), BF16, BF16), 1e-1),
    "bfloat16 parameters": (({}, None, (BF16,), F32, F32), 1e-2),
    "float16": (({}, F16, (F16,), F16, F32), 1e-2),
    "float64 targets": (({"enable_x64": True}, None, (F32,), F32, F64), 1e-5),
    "float64 inputs": (({"enable_x64": True}, None, (F32,), F64, F32), 1e-5),
    "float32 and float64": (({"enable_x64": True}, None, (F64, F32), F32, F32), 1e-5),
    "float64 and float32": (({"enable_x64": True}, None, (F32, F64), F32, F64), 1e-5),
    "float64 in float32": (({"enable_x64": True}, F32, (F64,), F64, F64), 1e-5),
    "x64": (({"enable_x64": True}, None, (F32,), F32, F32), 1e-5),
    "strict dtypes": (({"numpy_dtype_promotion": "strict"}, None, (F32,), F32, F32), 1e-6),
    "strict ranks": (({"numpy_rank_promotion": "raise"}, None, (F32,), F32, F32), 1e-6),
    "strict x64": (
        ({"numpy_dtype_promotion": "strict", "enable_x64": True}, None, (F32,), F32, F32),
        1e-5,
    ),
    "debug NaNs": (({"debug_nans": True}, None, (F32,), F32, F32), 1e-6),
}


def step(mode, structure, fisher="exact"):
    """The jitted step of a mode, and its arguments."""
    _, dtype, param_dtypes, x_dtype, y_dtype = mode
    x, y = jnp.asarray(X, x_dtype), jnp.asarray(Y, y_dtype)
    graphdef, state = nnx.split(Net(dtype, *param_dtypes))

    # optimising is what compiling costs
    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def run(state, x, y):
        return ng.natural_gradient(
            nnx.merge(graphdef, state),
            x,
            y,
            structure=STRUCTURES[structure],
            loss=ng.SoftmaxCrossEntropy(),
            damping=0.5,
            fisher=fisher,
            key=jax.random.key(0),
        )

    return run, (state, x, y)


def dtypes(tree):
    return [str(leaf.dtype) for leaf in jax.tree.leaves(tree)]


def update(mode, *case):
    with switches(**mode[0]):
        run, arguments = step(mode, *case)
        found = run(*arguments)
        assert dtypes(found) == dtypes(arguments[0])
        return [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(found)]


@functools.cache
def plain(*case):
    return update(PLAIN, *case)


def lowered(mode, *case):
    """No error up to code for XLA, and the dtypes of the parameters."""
    with switches(**mode[0]):
        run, arguments = step(mode, *case)
        traced = run.trace(*arguments)
        traced.lower()
        wanted = dtypes(arguments[0])
        return float([str(leaf.dtype) for leaf in jax.tree.leaves(traced.out_info)] == wanted)


def as_plain(mode, *case):
    described, tolerance = MODES[mode]
    return lambda: update(described, *case), Right(lambda: plain(*case), tolerance)


VALUES = {
    **{f"layers-{name}": as_plain("bfloat16 layers", name, "exact") for name in STRUCTURES},
    **{f"{mode}-kfac": as_plain(mode, "kfac", "exact") for mode in MODES},
    "bfloat16-ekfac": as_plain("bfloat16", "ekfac", "exact"),
    "bfloat16-unit-wise": as_plain("bfloat16", "unit-wise", "exact"),
    "layers-mc": as_plain("bfloat16 layers", "exact", "mc"),
    "layers-empirical": as_plain("bfloat16 layers", "exact", "empirical"),
    "float64 targets-mc": as_plain("float64 targets", "exact", "mc"),
    "float64 targets-empirical": as_plain("float64 targets", "exact", "empirical"),
}

LOWERED = {
    f"{mode}-{name}-{fisher}": (
        lambda mode=mode, name=name, fisher=fisher: lowered(MODES[mode][0], name, fisher),
        Right(1.0),
    )
    for first, mode in enumerate(MODES)
    for number, name in enumerate(STRUCTURES)
    for fisher in [FISHERS[(first + number) % 3]]
    if f"{mode}-{name}" not in VALUES or fisher != "exact"
}


@over(VALUES)
def test_the_update_is_that_of_float32(run, answer):
    answer.check(run)


@over(LOWERED)
def test_every_structure_compiles_in_every_precision(run, answer):
    answer.check(run)


def trained(mode, **settings):
    """Two steps of the optimizer in a scan, whose state must keep its dtypes."""
    described, dtype, param_dtypes, x_dtype, y_dtype = mode
    with switches(**described):
        model = Net(dtype, *param_dtypes)
        x, y = jnp.asarray(X, x_dtype), jnp.asarray(Y, y_dtype)
        graphdef, state = nnx.split(model)
        if "average" in settings:
            settings["example"] = (model, x)
        tx = ng.natural_gradient_descent(
            0.1, loss=ng.MeanSquaredError(), **{"damping": 0.5, **settings}
        )

        def one(carry, _):
            state, kept = carry
            moved, kept = tx.update(state, kept, module=nnx.merge(graphdef, state), x=x, y=y)
            return (jax.tree.map(jnp.add, state, moved), kept), None

        (found, _), _ = jax.jit(lambda start: jax.lax.scan(one, start, length=2))(
            (state, tx.init(state))
        )
        assert dtypes(found) == dtypes(state)
        return [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(found)]


AVERAGE = {"structure": ng.KFAC(), "average": ng.MovingAverage(0.5, every=2, inverse_every=2)}
SCHEDULED = {"structure": ng.BlockDiagonal(), "damping": lambda steps: 0.5 / (1 + steps)}
ADAPTIVE = {"structure": ng.BlockDiagonal(), "damping": ng.LevenbergMarquardt()}
MOMENTUM = {"structure": ng.Exact(), "momentum": 0.9}
RUNS = {
    f"{mode}-{name}": (
        lambda mode=mode, settings=settings: trained(MODES[mode][0], **settings),
        Right(lambda settings=settings: trained(PLAIN, **settings), MODES[mode][1]),
    )
    for mode, name, settings in [
        ("bfloat16", "average", AVERAGE),
        ("x64", "average", AVERAGE),
        ("bfloat16", "momentum", MOMENTUM),
        ("strict x64", "schedule", SCHEDULED),
        ("bfloat16 layers", "adaptive", ADAPTIVE),
    ]
}


@over(RUNS)
def test_training_keeps_the_dtypes(run, answer):
    answer.check(run)


def outputs(model, shape):
    with switches(numpy_rank_promotion="raise", numpy_dtype_promotion="strict"):
        return model(jnp.ones(shape))


def kernels(dtype):
    return na.empirical_layer_kernels(Net(dtype, F32), X)


NETWORKS = {
    "MLP": (lambda: ng.MLP((3, 4, 2), bias_variance=0.1, rngs=nnx.Rngs(0)), (2, 3)),
    "ConvNet": (
        lambda: ng.ConvNet((4, 4, 1), (2,), 2, strides=1, bias_variance=0.1, rngs=nnx.Rngs(0)),
        (2, 4, 4, 1),
    ),
    "transformer": (
        lambda: ng.VisionTransformer(
            (4, 4, 2), patch=2, width=4, depth=1, heads=2, mlp=6, outputs=3, rngs=nnx.Rngs(0)
        ),
        (2, 4, 4, 2),
    ),
}
OTHERS = {
    **{
        name: (
            lambda build=build, shape=shape: outputs(build(), shape),
            Right(lambda build=build, shape=shape: build()(jnp.ones(shape)), 1e-6),
        )
        for name, (build, shape) in NETWORKS.items()
    },
    "kernels": (lambda: kernels(F32), Right(lambda: kernels(None), 1e-14)),
    "kernels-bfloat16": (lambda: kernels(BF16), Right(lambda: kernels(None), 1e-14)),
    "rate": (
        lambda: ng.optimal_learning_rate(ng.BlockDiagonal(), Net(BF16, F32), x=X, damping=0.5),
        Right(
            lambda: ng.optimal_learning_rate(ng.BlockDiagonal(), Net(None, F32), x=X, damping=0.5),
            1e-1,
        ),
    ),
    "isotropy": (
        lambda: na.isotropy(ng.Exact(), Net(F32, F32), X, damping=0.5).eigenvalues,
        Right(lambda: na.isotropy(ng.Exact(), Net(None, F32), X, damping=0.5).eigenvalues, 1e-12),
    ),
}


def linear_step(descent, dtype, y_dtype, **settings):
    """One step of a chain of linear layers."""
    with switches(**settings):
        rngs = nnx.Rngs(0)
        layers = [nnx.Linear(3, 3, use_bias=False, param_dtype=dtype, rngs=rngs) for _ in range(2)]
        for layer in layers:
            layer.kernel[...] = jnp.asarray([[1, 0.5, 0], [0, 1, -0.25], [0.5, 0, 2]], dtype)
        model = nnx.Sequential(*layers)
        tx = getattr(linear, descent)(0.1, damping=0.5)
        state = nnx.state(model)
        moved, _ = tx.update(
            state,
            tx.init(state),
            module=model,
            x=jnp.asarray(X, dtype),
            y=jnp.asarray(X[:, ::-1], y_dtype),
        )
        assert dtypes(moved) == dtypes(state)
        return [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(moved)]


LINEAR = {
    f"{descent}-{name}": (
        lambda descent=descent, case=case: linear_step(descent, *case[:2], **case[2]),
        Right(lambda descent=descent: linear_step(descent, F32, F32), case[3]),
    )
    for descent in ("deep_linear_descent", "online_natural_gradient_descent")
    for name, case in {
        "bfloat16": (BF16, BF16, {}, 5e-2),
        "float64 targets": (F32, F64, {"enable_x64": True}, 1e-5),
        "strict": (F32, F32, {"numpy_dtype_promotion": "strict"}, 1e-6),
    }.items()
}


@over(LINEAR)
def test_linear_networks(run, answer):
    answer.check(run)


@over(OTHERS)
def test_networks_and_theory(run, answer):
    answer.check(run)


def test_a_seed_is_rounded_where_the_model_computes_and_nowhere_else():
    signals = ng.jacobian_signals(Net(BF16, F32), jnp.asarray(X, F32))
    assert set(dtypes(signals)) == {"float32"}


@pytest.mark.parametrize("name", ["exact", "unit-wise", "kfac"])
def test_dead_systems_under_debug_nans(name):
    # duplicate samples: Cholesky's NaN stays inside of the program
    with switches(debug_nans=True):
        found = ng.natural_gradient(
            Net(None, F32),
            jnp.asarray(X[[0, 0, 1, 1]], F32),
            jnp.asarray(Y, F32),
            structure=STRUCTURES[name],
            loss=ng.MeanSquaredError(),
        )
    Right().check(lambda: found)
