"""Trees of updates, gradients of one's own, optax around the transformation, inputs of any kind."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from fault_harness import Refused, Right, over
from flax import nnx

import natgrad_flax as ng
from natgrad_flax import devices, linear

MSE = ng.MeanSquaredError()
MODEL = ng.MLP((3, 4, 2), activation="tanh", rngs=nnx.Rngs(0))
NARROW = ng.MLP((3, 3, 2), activation="tanh", rngs=nnx.Rngs(0))
LINEAR = ng.MLP((3, 3, 3), activation="identity", rngs=nnx.Rngs(0))
X = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32)
Y = jnp.asarray(np.random.default_rng(1).normal(size=(4, 2)), jnp.float32)
PARAMS = nnx.as_pure(nnx.state(MODEL, nnx.Param))
HEAD = nnx.All(nnx.Param, nnx.PathContains(1))


def layers(params, *chosen):
    """A mask of the parameters of some layers."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[1].key in chosen, params)


IN_HEAD = layers(PARAMS, 1)
BATCH = {"module": MODEL, "x": X, "y": Y}
MESH = jax.make_mesh((1,), ("data",))


def descent(structure=ng.Exact(), rate=1.0, **settings):  # noqa: B008
    return ng.natural_gradient_descent(
        rate, **{"structure": structure, "loss": MSE, "damping": 0.1, **settings}
    )


def one(tx, params=PARAMS, updates=None, start=None, **batch):
    """The first step of a transformation, from the parameters or others at its start."""
    state = tx.init(params if start is None else start)
    given = params if updates is None else updates
    return jax.jit(lambda: tx.update(given, state, params, **{**BATCH, **batch})[0])()


def negative(tree):
    return jax.tree.map(lambda leaf: -leaf, tree)


@functools.cache
def of_the_head(structure):
    """The natural gradient of the head alone, the rest of the network held."""
    found = ng.natural_gradient(MODEL, X, Y, structure=structure, loss=MSE, damping=0.1, wrt=HEAD)
    return negative(found)


def online():
    return linear.online_natural_gradient_descent(damping=0.1, mc_samples=2)


def masked(structure, **settings):
    return one(optax.masked(descent(structure, **settings), IN_HEAD))["layers"][1]


def labelled(structure, **others):
    labels = jax.tree.map(lambda chosen: "head" if chosen else "body", IN_HEAD)
    parts = {"head": descent(structure), "body": optax.set_to_zero(), **others}
    return one(optax.partition(parts, labels))


def inside_nnx(structure):
    """The step that nnx.Optimizer takes in the head of a copy of the model."""
    model = nnx.clone(MODEL)
    labels = jax.tree.map(lambda chosen: "head" if chosen else "body", IN_HEAD)
    parts = {"head": descent(structure), "body": optax.set_to_zero()}
    optimizer = nnx.Optimizer(model, optax.partition(parts, labels), wrt=nnx.Param)
    optimizer.update(model, nnx.state(model, nnx.Param), **{**BATCH, "module": model})
    return jax.tree.map(jnp.subtract, nnx.as_pure(nnx.state(model, nnx.Param)), PARAMS)


def head_of(tree):
    return nnx.as_pure(tree)["layers"][1]


def part(tree):
    """The head's part of a tree, as a state of its own."""
    return nnx.State({"layers": {1: head_of(tree)}})


DEEP = ng.MLP((3, 4, 4, 2), activation="tanh", rngs=nnx.Rngs(0))
DEEP_PARAMS = nnx.as_pure(nnx.state(DEEP, nnx.Param))
COUPLED = ng.LayerWise([[2.0, 1.0], [1.0, 2.0]])
IN_LATER = layers(DEEP_PARAMS, 1, 2)


def coupled():
    """The step of the last two of three layers, coupled with one another."""
    wrt = nnx.All(nnx.Param, nnx.Not(nnx.PathContains(0)))
    settings = {"structure": COUPLED, "loss": MSE, "damping": 0.1, "wrt": wrt}
    return negative(nnx.as_pure(ng.natural_gradient(DEEP, X, Y, **settings)))


LATER = layers(nnx.as_pure(nnx.state(LINEAR, nnx.Param)), 1)
AVERAGED = {"average": ng.MovingAverage(), "example": (MODEL, X)}
UNKNOWN = Refused("does not fit the module: no parameter of MLP .* is called layers.2.kernel")
SHAPE = Refused(r"layers.0.kernel has shape \(3, 4\) in them and \(3, 3\) in MLP")

TREES = {
    "masked, exact": (lambda: masked(ng.Exact()), Right(lambda: head_of(of_the_head(ng.Exact())))),
    "masked, coupled layers": (
        lambda: jax.tree.leaves(
            one(optax.masked(descent(COUPLED), IN_LATER), DEEP_PARAMS, module=DEEP)
        )[1:],
        Right(lambda: jax.tree.leaves(coupled())),
    ),
    "masked, averages": (
        lambda: masked(ng.KFAC(), **AVERAGED),
        Right(lambda: head_of(of_the_head(ng.KFAC()))),
    ),
    "masked, momentum": (
        lambda: masked(ng.Exact(), momentum=0.9),
        Right(lambda: head_of(of_the_head(ng.Exact()))),
    ),
    "partition": (
        lambda: labelled(ng.Exact())["layers"][1],
        Right(lambda: head_of(of_the_head(ng.Exact()))),
    ),
    "partition, the rest": (
        lambda: labelled(ng.Exact())["layers"][0],
        Right({"kernel": np.zeros((3, 4))}, 0),
    ),
    "partition, a label of nothing": (
        lambda: labelled(ng.Exact(), other=descent())["layers"][1],
        Right(lambda: head_of(of_the_head(ng.Exact()))),
    ),
    "partition in nnx.Optimizer": (
        lambda: inside_nnx(ng.Exact())["layers"][1],
        Right(lambda: head_of(of_the_head(ng.Exact()))),
    ),
    "a state of the head": (
        lambda: one(descent(), part(PARAMS)),
        Right(lambda: nnx.as_pure(of_the_head(ng.Exact()))),
    ),
    "nothing": (lambda: one(descent(), {}) or 0, Right(0, 0)),
    "more than wrt= chooses": (
        lambda: one(descent(wrt=HEAD)),
        Refused("no parameter of MLP that wrt= chooses is called layers.0.kernel"),
    ),
    "of another model": (lambda: one(descent(), module=NARROW), SHAPE),
    "of a deeper model": (
        lambda: one(descent(), DEEP_PARAMS),
        Refused(r"layers.1.kernel has shape \(4, 4\) in them and \(4, 2\) in MLP"),
    ),
    "of a layer that is not there": (
        lambda: one(descent(), {"layers": {2: {"kernel": X}}}),
        UNKNOWN,
    ),
    "of another model, in nnx.Optimizer": (
        lambda: nnx.Optimizer(MODEL, descent(), wrt=nnx.Param).update(
            MODEL, nnx.state(MODEL, nnx.Param), **{**BATCH, "module": NARROW}
        ),
        SHAPE,
    ),
    "of a layer that is not there, in nnx.Optimizer": (
        lambda: nnx.Optimizer(DEEP, descent(), wrt=nnx.Param).update(
            DEEP, nnx.state(DEEP, nnx.Param), **BATCH
        ),
        Refused("which MLP does not have: module= must be the model"),
    ),
    "of another model, deep linear": (
        lambda: one(linear.deep_linear_descent(), module=LINEAR, y=X),
        SHAPE,
    ),
    "some layers, deep linear": (
        lambda: one(
            linear.deep_linear_descent(),
            part(nnx.state(LINEAR, nnx.Param)),
            module=LINEAR,
            y=X,
        ),
        Refused("deep_linear_descent moves all parameters of the model together"),
    ),
    "some layers, deep linear, in nnx.Optimizer": (
        lambda: nnx.Optimizer(
            LINEAR, optax.masked(linear.deep_linear_descent(), LATER), wrt=nnx.Param
        ).update(LINEAR, nnx.state(LINEAR, nnx.Param), module=LINEAR, x=X, y=X),
        Refused("deep_linear_descent moves all parameters of the model together"),
    ),
    "some layers, online": (
        lambda: one(online(), part(PARAMS))["layers"][1],
        # of two layers that move a step has half of the size
        Right(lambda: jax.tree.map(lambda leaf: 2 * leaf, one(online())["layers"][1])),
    ),
    "averages of another model": (
        lambda: one(descent(ng.KFAC(), average=ng.MovingAverage(), example=(NARROW, X))),
        SHAPE,
    ),
    "averages of another model in the batch": (
        lambda: one(
            descent(ng.KFAC(), **AVERAGED),
            nnx.as_pure(nnx.state(NARROW, nnx.Param)),
            start=PARAMS,
            module=NARROW,
        ),
        Refused("averages that are kept are of other layers"),
    ),
    "momentum of other parameters": (
        lambda: one(descent(momentum=0.9), part(PARAMS), start=PARAMS),
        Refused("the step that momentum= keeps has other parameters"),
    ),
}


@over(TREES)
def test_trees_of_updates(run, answer):
    answer.check(run)


def injected(rate=0.1, damping=0.1, jit=False):
    """The step of a transformation whose numbers live in its state."""
    make = optax.inject_hyperparams(lambda rate, rho: descent(rate=rate, damping=rho))
    tx = make(rate=rate, rho=damping)
    run = lambda state: tx.update(PARAMS, state, PARAMS, **BATCH)  # noqa: E731
    step, state = (jax.jit(run) if jit else run)(tx.init(PARAMS))
    assert state.inner_state.steps == 1
    return step


def plain(rate=0.1):
    return one(descent(rate=rate))


FLAT = Refused("one array has no names of parameters; optax.flatten can stand behind this only")
AROUND = {
    "inject_hyperparams": (injected, Right(plain)),
    "inject_hyperparams, compiled": (lambda: injected(jit=True), Right(plain)),
    "inject_hyperparams, a schedule": (
        lambda: injected(lambda step: 0.2 / (1 + step)),
        Right(lambda: plain(0.2)),
    ),
    "inject_hyperparams, a bad rate": (
        lambda: injected(float("nan")),
        Refused("learning_rate must be positive and finite"),
    ),
    "inject_hyperparams of what decides a program": (
        lambda: jax.jit(
            lambda samples: descent(mc_samples=samples).init(PARAMS).steps,
        )(2),
        Refused("mc_samples must be an integer .* traced .*inject_hyperparams .* static_args"),
    ),
    "flatten around": (lambda: one(optax.flatten(descent())), FLAT),
    "flatten behind": (
        lambda: one(optax.chain(descent(rate=0.1), optax.flatten(optax.trace(0.9)))),
        Right(plain),
    ),
    "apply_if_finite": (lambda: one(optax.apply_if_finite(descent(rate=0.1), 3)), Right(plain)),
}


@over(AROUND)
def test_optax_around_the_transformation(run, answer):
    answer.check(run)


def gradient_of(g, structure=ng.Exact(), y=None, **settings):  # noqa: B008
    return ng.natural_gradient(
        MODEL, X, y, structure=structure, loss=MSE, damping=0.1, gradient=g, **settings
    )


def own(**settings):
    return descent(gradient="incoming", **settings)


BROKEN = jax.tree.map(lambda leaf: leaf.at[0, 0].set(jnp.nan), PARAMS)
OWN = {
    "no such source": (lambda: descent(gradient="own"), Refused('must be "batch" or "incoming"')),
    "a gradient as source": (lambda: descent(gradient=PARAMS), Refused("gradient must be")),
    "adaptive damping": (
        lambda: own(damping=ng.LevenbergMarquardt()),
        Refused("LevenbergMarquardt predicts the change of the loss"),
    ),
    "NaN": (lambda: gradient_of(BROKEN), Refused("gradient at layers.0.kernel has 1 NaN")),
    "NaN on a mesh": (
        lambda: devices.sharded_natural_gradient(
            MODEL, X, None, structure=ng.KFAC(), loss=MSE, mesh=MESH, damping=0.1, gradient=BROKEN
        ),
        Refused("gradient at layers.0.kernel has 1 NaN"),
    ),
    "nothing": (lambda: gradient_of({}), Refused("gradient= has no entries")),
    "one array": (lambda: gradient_of(X), FLAT),
    "of another model": (
        lambda: gradient_of(nnx.state(NARROW, nnx.Param)),
        Refused(r"has shape \(3, 3\) in them and \(3, 4\)"),
    ),
    "no targets of an empirical Fisher": (
        lambda: gradient_of(PARAMS, fisher="empirical"),
        Refused("y must be"),
    ),
    "no targets of a step": (
        lambda: one(descent(), y=None),
        Refused("pass module=model, x=x, y=y"),
    ),
    "no inputs": (lambda: one(own(), x=None), Refused("pass module=model, x=x to update")),
    "no targets of an empirical step": (
        lambda: one(own(fisher="empirical"), y=None),
        Refused("pass module=model, x=x, y=y"),
    ),
    "targets that do not matter": (
        lambda: one(own(), y=np.array(["a"] * 4)),
        Right(lambda: negative(gradient_of(PARAMS))),
    ),
    "of the head": (
        lambda: nnx.as_pure(gradient_of(part(PARAMS))),
        Right(lambda: nnx.as_pure(gradient_of(part(PARAMS), wrt=HEAD))),
    ),
    "of the head, masked": (
        lambda: one(optax.masked(own(), IN_HEAD))["layers"][1],
        Right(lambda: negative(head_of(gradient_of(part(PARAMS))))),
    ),
}


@over(OWN)
def test_gradients_of_ones_own(run, answer):
    answer.check(run)


def natural(x=X, y=Y, **settings):
    settings = {"structure": ng.Exact(), "loss": MSE, "damping": 0.1, **settings}
    return ng.natural_gradient(MODEL, x, y, **settings)


NUMBERS = Refused("x must be an array of numbers")
INPUTS = {
    "x is None": (lambda: natural(None), NUMBERS),
    "x is text": (lambda: natural("x"), NUMBERS),
    "x holds text": (lambda: natural(np.array([["a", "b"]])), NUMBERS),
    "x holds objects": (lambda: natural(np.array([[None, 1.0]], object)), NUMBERS),
    "x is a function": (lambda: natural(lambda: 1), NUMBERS),
    "rows of other lengths": (lambda: natural([[1.0], [1.0, 2.0]]), NUMBERS),
    "integers beyond 64 bits": (lambda: natural([[10**30, 1, 1]]), NUMBERS),
    "y is None": (lambda: natural(y=None), Refused("y must be an array of numbers")),
    "y is text": (lambda: natural(y="y"), Refused("y must be an array of numbers")),
    "big-endian": (
        lambda: natural(np.asarray(X, ">f4"), np.asarray(Y, ">f4")),
        Right(natural, 0),
    ),
    "NaN in fisher_x": (
        lambda: natural(fisher_x=X.at[0, 0].set(jnp.nan)),
        Refused("^fisher_x has 1 NaN"),
    ),
    "one sample of fisher_x": (
        lambda: natural(fisher_x=X[0]),
        Refused("^fisher_x must have shape"),
    ),
    "fisher_x is text": (lambda: natural(fisher_x="x"), Refused("fisher_x must be an array")),
    "fisher_y is text": (
        lambda: natural(fisher_x=X, fisher_y="y", fisher="empirical"),
        Refused("fisher_y must be an array of numbers"),
    ),
    "x is None, in a step": (lambda: one(descent(), x=[None]), NUMBERS),
    "inputs of another width, described": (
        lambda: ng.describe(MODEL, X[:, :2]),
        Refused(r"takes inputs of shape \(N, 3\)"),
    ),
    "a shape of another width, described": (
        lambda: ng.describe(MODEL, jax.ShapeDtypeStruct((4, 2), jnp.float32)),
        Refused(r"takes inputs of shape \(N, 3\)"),
    ),
    "samples of a description, 1.5": (
        lambda: ng.describe(MODEL, X, mc_samples=1.5),
        Refused("mc_samples must be an integer"),
    ),
}


@over(INPUTS)
def test_inputs_of_any_kind(run, answer):
    answer.check(run)
