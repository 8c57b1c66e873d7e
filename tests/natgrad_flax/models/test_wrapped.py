"""One network as a module of nnx, of linen and as a function; and what cannot be wrapped."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from battery import ONE_OF_EACH, QUICK, made
from flax import nnx
from flax.training.train_state import TrainState

import natgrad_flax as ng

LOSS = ng.MeanSquaredError()
X, Y = np.random.default_rng(0).normal(size=(6, 3)), np.random.default_rng(1).normal(size=(6, 2))


class Linen(flax.linen.Module):
    @flax.linen.compact
    def __call__(self, x, train=False):
        h = jnp.tanh(flax.linen.Dense(4, param_dtype=x.dtype)(x))
        h = flax.linen.BatchNorm(use_running_average=not train, param_dtype=x.dtype)(h)
        return flax.linen.Dense(2, param_dtype=x.dtype)(h)


class Stock(nnx.Module):
    def __init__(self, variables):
        params, stats = variables["params"], variables["batch_stats"]["BatchNorm_0"]
        keep = {"param_dtype": jnp.float64, "rngs": nnx.Rngs(0)}
        self.Dense_0, self.Dense_1 = nnx.Linear(3, 4, **keep), nnx.Linear(4, 2, **keep)
        self.BatchNorm_0 = nnx.BatchNorm(4, use_running_average=True, **keep)
        nnx.update(self, nnx.State(jax.tree.map(jnp.asarray, dict(params))))
        for name in ("mean", "var"):
            getattr(self.BatchNorm_0, name).set_value(stats[name])

    def __call__(self, x):
        return self.Dense_1(self.BatchNorm_0(jnp.tanh(self.Dense_0(x))))


def function(params, x):
    h = jnp.tanh(x @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"])
    h = (h - 0.1) / jnp.sqrt(1.5 + 1e-5)
    h = h * params["BatchNorm_0"]["scale"] + params["BatchNorm_0"]["bias"]
    return h @ params["Dense_1"]["kernel"] + params["Dense_1"]["bias"]


def draw():
    """Variables of the linen module with statistics other than those at first."""
    variables = Linen().init(jax.random.key(0), jnp.asarray(X))
    rng = np.random.default_rng(2)
    params = jax.tree.map(lambda p: p + 0.1 * rng.normal(size=p.shape), variables["params"])
    stats = {"BatchNorm_0": {"mean": jnp.full(4, 0.1), "var": jnp.full(4, 1.5)}}
    return {"params": params, "batch_stats": stats}


@pytest.mark.usefixtures("x64")
def test_three_forms_of_one_network():
    variables = draw()
    models = (
        Stock(variables),
        ng.from_linen(Linen(), variables),
        ng.from_function(function, variables["params"]),
    )
    structures = made(3, ONE_OF_EACH)
    steps = []
    for model in models:
        graphdef, state = nnx.split(model)

        @jax.jit
        def run(state, graphdef=graphdef):
            model = nnx.merge(graphdef, state)
            return [
                nnx.to_pure_dict(
                    ng.natural_gradient(
                        model, X, Y, structure=structure, loss=LOSS, damping=0.1, wrt=nnx.Param
                    )
                )
                for structure in structures.values()
            ]

        steps.append(run.lower(state).compile(compiler_options=QUICK)(state))
    for other in steps[1:]:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11), steps[0], other
        )


@pytest.mark.parametrize("average", [None, ng.MovingAverage(0.5)])
def test_train_state_of_linen(average):
    """The loop of linen's examples: plain trees, jitted, any optax chain behind."""
    network, x, y = Linen(), jnp.asarray(X, jnp.float32), jnp.asarray(Y, jnp.float32)
    variables = network.init(jax.random.key(0), x)
    stats = variables["batch_stats"]
    model = ng.from_linen(network, variables)
    kept = {"average": average, "example": (model, x)} if average else {}
    tx = optax.chain(
        ng.natural_gradient_descent(1.0, structure=ng.KFAC(), damping=0.1, loss=LOSS, **kept),
        optax.scale(0.3),
    )
    state = TrainState.create(apply_fn=network.apply, params=variables["params"], tx=tx)

    @jax.jit
    def step(state):
        def objective(params):
            return LOSS(network.apply({"params": params, "batch_stats": stats}, x), y)

        value, grads = jax.value_and_grad(objective)(state.params)
        module = ng.from_linen(network, {"params": state.params, "batch_stats": stats})
        updates, opt_state = tx.update(
            grads, state.opt_state, state.params, module=module, x=x, y=y
        )
        params = optax.apply_updates(state.params, updates)
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state), value

    losses = []
    for _ in range(8):
        state, value = step(state)
        losses.append(float(value))
    assert losses[-1] < 0.75 * losses[0]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["second", "shift", "first", "shape"],
    meta_fields=["scale"],
)
@dataclass
class Fields:
    """A tree with two products, and with what can't move: an order, a function, a number."""

    first: Any
    second: Any
    shift: Any
    shape: Any
    scale: float


def test_a_tree_with_fields():
    """As the dictionary of its parameters; what is no floating array is held."""
    variables, order = draw()["params"], np.array([1, 0])
    names = ("Dense_0", "Dense_1")
    dense = {name: variables[name]["kernel"] for name in names} | {"shift": jnp.ones(2)}

    def plain(params, x):
        out = jnp.tanh(x @ params["Dense_0"]) @ params["Dense_1"]
        return 2 * out[:, order] + params["shift"]

    def run(tree, x):
        out = tree.shape["f"](x @ tree.first["w"]) @ tree.second
        return tree.scale * out[:, tree.shape["order"]] + tree.shift

    def module():
        shape = {"order": order, "f": jnp.tanh}
        first = {"w": dense["Dense_0"]}
        return ng.from_function(run, Fields(first, dense["Dense_1"], dense["shift"], shape, 2.0))

    settings = {"structure": ng.KFAC(), "loss": LOSS, "damping": 0.1}
    found = ng.natural_gradient(module(), X, Y, **settings)
    wanted = ng.natural_gradient(ng.from_function(plain, dense), X, Y, **settings)
    for one, other in (
        (found["first"]["w"], wanted["Dense_0"]),
        (found["second"], wanted["Dense_1"]),
        (found["shift"], wanted["shift"]),
    ):
        np.testing.assert_allclose(one[...], other[...], rtol=1e-5, atol=1e-6)
    assert nnx.graphdef(module()) == nnx.graphdef(module()), "each would be compiled anew"


def test_equinox():
    """The loop of the docstring, step by step as that of the network as a plain function."""
    eqx = pytest.importorskip("equinox")
    x, y = jnp.asarray(X, jnp.float32), jnp.asarray(Y, jnp.float32)
    net = eqx.nn.MLP(3, 2, 4, 1, activation=jnp.tanh, key=jax.random.key(0))
    params = {f"l{i}": {"w": a.weight, "b": a.bias} for i, a in enumerate(net.layers)}

    def network(net, x):
        return jax.vmap(net)(x)

    def plain(params, x):
        one, two = params["l0"], params["l1"]
        return jnp.tanh(x @ one["w"].T + one["b"]) @ two["w"].T + two["b"]

    tx = ng.natural_gradient_descent(0.2, structure=ng.KFAC(), damping=0.1, loss=LOSS)
    state, other = tx.init(eqx.filter(net, eqx.is_inexact_array)), tx.init(params)
    for _ in range(3):
        chosen = eqx.filter(net, eqx.is_inexact_array)
        grads = eqx.filter_grad(lambda net: LOSS(network(net, x), y))(net)
        module = ng.from_function(network, net)
        updates, state = tx.update(grads, state, chosen, module=module, x=x, y=y)
        net = eqx.apply_updates(net, updates)
        grads = jax.grad(lambda p: LOSS(plain(p, x), y))(params)
        module = ng.from_function(plain, params)
        updates, other = tx.update(grads, other, params, module=module, x=x, y=y)
        params = optax.apply_updates(params, updates)
    for layer, wanted in zip(net.layers, params.values(), strict=True):
        np.testing.assert_allclose(layer.weight, wanted["w"], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(layer.bias, wanted["b"], rtol=1e-4, atol=1e-5)


def test_statistics_in_training_are_refused():
    variables = Linen().init(jax.random.key(0), jnp.asarray(X))
    model = ng.from_linen(Linen(), variables, train=True)
    with pytest.raises(ValueError, match="does not run on one sample"):
        ng.natural_gradient(model, X, Y, structure=ng.KFAC(), loss=LOSS, damping=0.1)


BAD = {
    "no function": (lambda: ng.from_function(None, {"w": X}), "must be a function f"),
    "no dictionary": (lambda: ng.from_function(function, [X]), "must be a dictionary of param"),
    "a tree without parameters": (
        lambda: ng.from_function(function, Fields({}, None, None, np.arange(2), 1.0)),
        "tree with named fields that has some, got Fields",
    ),
    "nothing": (lambda: ng.from_function(function, {}), "must be a dictionary of parameters"),
    "integers": (
        lambda: ng.from_function(function, {"w": {"n": np.arange(3)}}),
        r"params\['w'\]\['n'\] must be a floating array",
    ),
    "no linen": (lambda: ng.from_linen(function, {"params": {}}), "must be a module of flax.linen"),
    "no collections": (lambda: ng.from_linen(Linen(), {"w": X}), 'parameters under "params"'),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    call, message = BAD[name]
    with pytest.raises(TypeError, match=message):
        call()


@pytest.mark.parametrize("name", ["two words", "eval", 3])
def test_names(name):
    with pytest.raises(ValueError, match="cannot be one of a module"):
        ng.from_function(function, {name: X})
