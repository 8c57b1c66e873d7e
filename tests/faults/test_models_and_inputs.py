"""Models as users write them, whatever their names, and inputs of every kind."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fault_harness import Refused, Right, over
from fault_networks import ENTRIES, SETTINGS, Net, X, Y, kernels, plain, step, update
from flax import nnx

import natgrad_flax as ng
from natgrad_flax.devices import shard_batch, sharded_natural_gradient
from natgrad_flax.optimizer.checks import check_inputs

IDS = np.array([0, 4, 2, 2])
PIXELS = np.random.default_rng(1).integers(0, 256, (4, 5)).astype(np.uint8)
MASK = np.array([[1, 0, 1, 1, 0]] * 3 + [[0, 1, 1, 1, 1]], bool)


def by_autodiff(x, forward=plain):
    """The kernels of Net from jax.jacobian of the whole batch."""
    graphdef, state = nnx.split(Net())
    rows = jax.jacobian(lambda state: forward(nnx.merge(graphdef, state), x))(state)

    def gram(layer):
        flat = [leaf.reshape(len(Y) * 2, -1) for leaf in jax.tree.leaves(layer)]
        return sum(np.asarray(rows) @ np.asarray(rows).T for rows in flat)

    return [gram(rows["a"]), gram(rows["b"])]


# names


def sows(name):
    def forward(model, x):
        model.sow(nnx.Intermediate, name, x)
        model.a.sow(nnx.Intermediate, name, 2 * x)
        return plain(model, x)

    return forward


def perturbs(name):
    def forward(model, x):
        h = model.a.perturb(name, model.a(model.perturb(name, x)))
        return model.b(jnp.tanh(h))

    return forward


def captures(model, x):
    """A capture of the user's own, inside of the forward pass."""
    h, _ = nnx.capture(model.a, nnx.Intermediate)(x)
    return model.b(jnp.tanh(h))


def with_variables():
    model = Net(perturbs("outputs0"))
    model.a.inputs = nnx.Intermediate((jnp.ones((7, 5)),))
    model.a.outputs0 = nnx.Perturbation(jnp.ones((7, 3)))
    model.outputs0 = nnx.Perturbation(jnp.ones((7, 5)))
    return model


class Named(nnx.Module):
    """The layers of Net under names that natgrad, flax or JAX use themselves."""

    def __init__(self, *names):
        net, self.names = Net(), names
        for name, layer in zip(names, (net.a, net.b), strict=True):
            setattr(self, name, layer)

    def __call__(self, x):
        first, second = (getattr(self, name) for name in self.names)
        return second(jnp.tanh(first(x)))


NAMES = {
    **{f"sow {n}": partial(Net, sows(n)) for n in ("inputs", "outputs0", "kernel_seen", "layers")},
    **{f"perturb {name}": partial(Net, perturbs(name)) for name in ("inputs", "outputs0", "x")},
    "a capture inside": partial(Net, captures),
    "variables of a capture before": with_variables,
    "widths": partial(Net, widths=(64, 64)),
    "outputs": partial(Net, outputs=7),
    "input_shape": partial(Net, input_shape=(32, 32, 3)),
    "activation": partial(Net, activation=jnp.tanh),
    "sizes in a list": partial(Net, activation=[3], widths=[64]),
    **{
        f"layers named {first}, {second}": partial(Named, first, second)
        for first, second in (("inputs", "outputs"), ("value", "values"), ("kernel", "layers"))
    },
}
AS_PLAIN = Right(partial(by_autodiff, X), 1e-4)
NAME_CASES = {name: (lambda make=make: kernels(make()), AS_PLAIN) for name, make in NAMES.items()}


@over(NAME_CASES)
def test_names_of_a_users_own(run, answer):
    answer.check(run)


@pytest.mark.parametrize("name", ["widths", "outputs", "input_shape", "activation"])
def test_attributes_of_other_models_mean_what_they_mean_there(name):
    """They are read of natgrad's own networks alone."""
    model = NAMES[name]()
    assert update_shapes(model) == update_shapes(Net())
    assert ng.describe(model, X).num_params == 26


def update_shapes(model):
    shapes = jax.eval_shape(lambda x: update(model, x), X)
    return [leaf.shape for leaf in jax.tree.leaves(shapes)]


# inputs


def looks_up(model, ids):
    return plain(model, jax.nn.one_hot(ids, 5))


def of_dict(model, x):
    return plain(model, x["p"] * x["m"])


def of_tuple(model, x):
    return plain(model, x[0] + jax.nn.one_hot(x[1][0], 5))


def of_keys(model, keys):
    return plain(model, jax.vmap(lambda key: jax.random.normal(key, (5,)))(keys))


KEYS = jax.random.split(jax.random.key(3), 4)
FLOATS = {
    "uint8": (plain, PIXELS, PIXELS.astype(np.float32)),
    "int32": (plain, PIXELS.astype(np.int32), PIXELS.astype(np.float32)),
    "int64": (plain, PIXELS.astype(np.int64), PIXELS.astype(np.float32)),
    "bool": (plain, MASK, MASK.astype(np.float32)),
    "another byte order": (plain, X.astype(">f4"), X),
    "nested lists": (plain, X.tolist(), X),
    "nested tuples": (plain, tuple(map(tuple, X.tolist())), X),
    "a list of rows": (plain, list(X), X),
    "lists in a dictionary": (of_dict, {"p": list(X), "m": MASK.tolist()}, {"p": X, "m": MASK}),
    "one id a sample": (looks_up, IDS, IDS),
    "uint8 ids": (looks_up, IDS.astype(np.uint8), IDS),
    "one number a sample": (lambda m, x: plain(m, x[:, None] * np.ones(5)), X[:, 0], X[:, 0]),
    "a dictionary": (of_dict, {"p": X, "m": MASK}, {"p": X, "m": MASK}),
    "a dictionary with None": (of_dict, {"p": X, "m": MASK, "q": None}, {"p": X, "m": MASK}),
    "a nested tuple": (of_tuple, (X, (IDS,)), (X, (IDS,))),
    "random keys": (of_keys, KEYS, KEYS),
}
INPUT_CASES = {
    name: (
        lambda case=case: kernels(Net(case[0]), check_inputs(case[1])),
        Right(lambda case=case: by_autodiff(case[2], case[0]), 1e-4),
    )
    for name, case in FLOATS.items()
}


@over(INPUT_CASES)
def test_inputs_of_every_kind(run, answer):
    answer.check(run)


def test_trees_through_every_entry():
    """Parts of a batch, a Fisher on a batch of its own, devices, averages, the optimizer."""
    x, model = {"p": X, "m": MASK}, Net(of_dict)
    expected = Right(update(model, x), 1e-4)
    expected.check(lambda: update(model, x, microbatches=2))
    expected.check(lambda: update(model, x, fisher_x=x))
    mesh = jax.make_mesh((1,), ("data",))
    sharded, y = shard_batch(mesh, x, Y)
    assert set(sharded) == {"p", "m"}
    expected.check(lambda: sharded_natural_gradient(model, sharded, y, mesh=mesh, **SETTINGS))
    down = jax.tree.map(lambda leaf: -leaf / 0.1, step(model, x))
    expected.check(lambda: down)
    structs = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((9, 5), leaf.dtype), x)
    assert ng.describe(model, structs).num_samples == 9
    rate = ng.optimal_learning_rate(ng.Exact(), model, 4, x=x)
    assert rate == pytest.approx(1)
    average = ng.MovingAverage(0.9)
    settings = {**SETTINGS, "structure": ng.KFAC(), "average": average}
    tx = ng.natural_gradient_descent(0.1, **settings, example=(model, x), microbatches=2)
    state = jax.eval_shape(tx.init, nnx.state(model, nnx.Param))
    assert state.kept.renewals.shape == ()


BAD_INPUTS = {
    "None": (None, "x must be an array of numbers, got NoneType"),
    "text": ("digits", "x must be an array of numbers, got str 'digits'"),
    "an array of text": (np.array([["a"]]), "x must be an array of numbers, got ndarray"),
    "objects": (np.array([[None]]), "x must be an array of numbers"),
    "a masked array": (np.ma.masked_array(X, X > 0), "x must be an array of numbers, got Masked"),
    "an empty tuple": ((), "the batch is empty"),
    "no samples in a tree": ({"p": X[:0], "m": MASK[:0]}, "the batch is empty: x has shape"),
    "a ragged list": ([[1.0, 2.0], [3.0]], "x must be an array of numbers, got list"),
    "a number": (3.0, "x must have an axis of N samples first, got a single number"),
    "a number in a tree": ({"p": X, "t": np.ones(())}, r"x\['t'\] must have an axis of N samples"),
    "other numbers of samples": ((X, X[:3]), r"same number of samples .* \(\(4, 5\), \(3, 5\)\)"),
    "NaN in a tree": ({"p": X * np.nan, "m": MASK}, r"x\['p'\] has 20 NaN or infinite"),
    "infinity in a tuple": ((X, X * np.inf), r"x\[1\] has 20 NaN"),
    "too large integers": (PIXELS + np.int64(2**40), "x has integers that int32 cannot hold"),
    "complex numbers": (X * 1j, "x has dtype complex64, but only real numbers"),
    "complex numbers in a tree": ({"p": X, "m": X * 1j}, r"x\['m'\] has dtype complex64"),
    "another width": (X[:, :3], r"Net does not run on one sample, .*float32 \(1, 3\).*dot_general"),
    "a tree for an array": (
        {"p": X},
        r"does not run on one sample, model\(x\) with x of \{'p'",
    ),
}
BAD_INPUT_CASES = {
    f"{entry}: {name}": (lambda e=entry, x=x: ENTRIES[e](Net(), x), Refused(says))
    for name, (x, says) in BAD_INPUTS.items()
    for entry in ("natural_gradient", "describe", "optimal_learning_rate")
    if x is not None or entry != "optimal_learning_rate"
} | {
    "the Fisher's batch": (
        lambda: update(Net(), fisher_x=X[:, :3]),
        Refused(r"fisher_x must have"),
    ),
    "the Fisher's tree": (
        lambda: update(Net(of_dict), {"p": X, "m": MASK}, fisher_x=X),
        Refused(r"fisher_x must have shape \(N', ...\) like x of \{'m'"),
    ),
    "NaN in the Fisher's batch": (lambda: update(Net(), fisher_x=X * np.nan), Refused("^fisher_x")),
    "parts of a tree": (
        lambda: update(Net(of_dict), {"p": X, "m": MASK}, microbatches=3),
        Refused("a batch of 4 samples has no 3 equal parts"),
    ),
    "shapes and numbers": (
        lambda: ng.describe(Net(), {"a": jax.ShapeDtypeStruct((), "f4")}),
        Refused("axis of N samples"),
    ),
    "numbers of text": (
        lambda: update(Net(), y=np.array([["a", "b"]] * 4)),
        Refused("y must be an"),
    ),
    "an example that is no batch": (
        lambda: ng.natural_gradient_descent(
            0.1,
            **{**SETTINGS, "structure": ng.KFAC()},
            average=ng.MovingAverage(),
            example=(Net(), {}),
        ),
        Refused(r"example=\(model, x\)"),
    ),
}


@over(BAD_INPUT_CASES)
def test_inputs_that_are_refused(run, answer):
    answer.check(run)
