"""Models that mix the samples of a batch, and what ``nnx.Optimizer`` takes off a model."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from fault_harness import Refused, Right, over
from fault_networks import SETTINGS, Net, X, Y, plain, step, update
from flax import nnx

import natgrad_flax as ng
from natgrad_flax.devices import sharded_natural_gradient
from natgrad_flax.linear import online_natural_gradient_descent
from natgrad_flax.optimizer.variables import whole_model
from natgrad_flax.signals import independence
from natgrad_flax.signals.independence import check_samples_alone

BATCH = np.random.default_rng(2).normal(size=(8, 5)).astype(np.float32)


def centred(model, x):
    h = model.a(x)
    return model.b(jnp.tanh(h - h.mean(0)))


def normalised(model, x):
    h = model.a(x)
    return model.b((h - h.mean(0)) / (h.std(0) + 1e-5))


def attends(model, x):
    h = model.a(x)
    return model.b(jax.nn.softmax(h @ h.T) @ h)


def contrasts(model, x):
    h = model.a(x)
    return (h / jnp.linalg.norm(h, axis=1, keepdims=True)) @ h[:2].mean(0)[:, None] * jnp.ones(2)


def routes(model, x):
    """Top-1 experts with a capacity of half of the even share: what comes late is dropped."""
    h = model.a(x)
    chosen = jax.nn.one_hot(h.argmax(1), 3)
    place = (jnp.cumsum(chosen, axis=0) * chosen).sum(1)
    return model.b(jnp.tanh(h) * (place <= max(1, len(x) // 6))[:, None])


def convolves(model, x):
    """A graph convolution over the samples, in a ring; a node without neighbours divides by 0."""
    nodes = jnp.arange(len(x))
    ring = jnp.abs(nodes[:, None] - nodes) == 1
    return model.b(jnp.tanh(ring @ model.a(x) / ring.sum(1, keepdims=True)))


def hidden(model, x):
    """A mean over the batch behind a gate that starts at 0."""
    return plain(model, x) + model.gate[...] * x.mean()


COUPLED = {
    "centred by the batch": (centred, "differ by [0-9.]+ of their size"),
    "normalised by the batch": (normalised, "differ by"),
    "attention over the batch": (attends, "differ by"),
    "in reverse order": (lambda m, x: plain(m, x)[::-1], "differ by"),
    "shifted by one": (lambda m, x: jnp.roll(plain(m, x), 1, axis=0), "differ by"),
    "a contrastive head": (contrasts, "differ by"),
    "experts with a capacity": (routes, "differ by"),
    "a graph convolution": (convolves, "differ, the latter are NaN"),
    "the size of the batch": (lambda m, x: plain(m, x) / len(x), "differ by"),
    "the place in the batch": (lambda m, x: plain(m, x) * jnp.arange(1, len(x) + 1)[:, None], "by"),
    "fewer rows": (lambda m, x: plain(m, x).mean(0, keepdims=True), r"for 8 samples .* \(1, 2\)"),
    "a batch that does not run": (lambda m, x: plain(m, x.reshape(1, 5)), "not run on 8 samples"),
}
WHOLE = "the outputs of a sample depend on the other samples of its batch.*"
COUPLED_CASES = {
    name: (
        lambda forward=forward: check_samples_alone(Net(forward), BATCH),
        Refused(WHOLE + says if "differ" in says or says == "by" else says),
    )
    for name, (forward, says) in COUPLED.items()
}
MESH = jax.make_mesh((1,), ("data",))
FLIPPED = Net(lambda m, x: plain(m, x)[::-1])


def online():
    tx = online_natural_gradient_descent(0.1, damping=0.1)
    params = nnx.state(FLIPPED, nnx.Param)
    return tx.update(params, tx.init(params), params, module=FLIPPED, x=X, y=Y)


ENTRY_CASES = {
    "natural_gradient": lambda: update(FLIPPED),
    "optimizer": lambda: step(FLIPPED),
    "jacobian_signals": lambda: ng.jacobian_signals(FLIPPED, X),
    "optimal_learning_rate": lambda: ng.optimal_learning_rate(ng.Exact(), FLIPPED, x=X),
    "devices": lambda: sharded_natural_gradient(FLIPPED, X, Y, mesh=MESH, **SETTINGS),
    "online": online,
    "a gate at 0": lambda: check_samples_alone(Net(hidden, gate=nnx.Param(jnp.zeros(2))), BATCH),
    "a tree": lambda: check_samples_alone(
        Net(lambda m, x: plain(m, x["x"] - x["x"].mean(0))), {"x": BATCH}
    ),
}


@over(COUPLED_CASES | {name: (run, Refused(WHOLE)) for name, run in ENTRY_CASES.items()})
def test_samples_that_are_coupled(run, answer):
    answer.check(run)


class Deep(nnx.Module):
    """Many layers, a softmax and a norm within the sample, in one precision."""

    def __init__(self, dtype, depth=12):
        kinds = {"dtype": dtype, "rngs": nnx.Rngs(jax.random.key(0, impl="rbg"))}
        self.layers = nnx.List([nnx.Linear(5, 5, **kinds) for _ in range(depth)])
        self.norm = nnx.LayerNorm(5, **kinds)

    def __call__(self, x):
        for layer in self.layers:
            x = 2 * jnp.sin(3 * layer(x))
        return jnp.float32(self.norm(x) + jax.nn.softmax(x))


def passes(model, x=BATCH):
    check_samples_alone(model, x)
    return jnp.ones(())


@over(
    {
        "float32": (lambda: passes(Deep(jnp.float32)), Right()),
        "bfloat16 inside": (lambda: passes(Deep(jnp.bfloat16, 8)), Right()),
        "float16 inside": (lambda: passes(Deep(jnp.float16, 8)), Right()),
        "outputs of 0": (lambda: passes(Net(lambda m, x: 0 * plain(m, x))), Right()),
        "NaN in all": (lambda: passes(Net(lambda m, x: jnp.nan * plain(m, x))), Right()),
        "one sample": (lambda: passes(FLIPPED, BATCH[:1]), Right()),
        "a relative order": (lambda: passes(Net(lambda m, x: plain(m, jnp.sort(x)))), Right()),
    }
)
def test_rounding_is_no_coupling(run, answer):
    answer.check(run)


def test_one_switch_takes_the_samples_one_by_one():
    """What it gives then is the natural gradient of the model at single samples."""

    def of_place(model, x):
        return plain(model, x) * jnp.arange(1, len(x) + 1)[:, None]

    Right(update(Net()), 1e-6).check(lambda: update(Net(of_place), check_samples=False))


def test_a_model_and_a_shape_are_tried_once(monkeypatch):
    """A loop pays for the first call alone, and a traced step for none."""
    runs = []
    found = jnp.zeros(()), jnp.ones(())
    monkeypatch.setattr(independence, "_difference", lambda *given: runs.append(given) or found)
    model = Net(lambda m, x: plain(m, x) + 0)
    for _ in range(3):
        ng.jacobian_signals(model, X)
        model.a.kernel[...] += 1
    assert len(runs) == 1
    ng.jacobian_signals(model, X[:3])
    assert len(runs) == 2
    jax.eval_shape(lambda x: ng.jacobian_signals(FLIPPED, x), X)
    jax.eval_shape(lambda x: step(FLIPPED, x), X)
    ng.jacobian_signals(ng.MLP((5, 3, 2), rngs=nnx.Rngs(0)), X)
    assert len(runs) == 2, "a trace or a network of ours was tried"
    monkeypatch.undo()
    with pytest.raises(ValueError, match="other samples"):
        ng.jacobian_signals(FLIPPED, X)


# behind nnx.Optimizer


class Tied(nnx.Module):
    """One kernel in two layers."""

    def __init__(self):
        rngs = nnx.Rngs(jax.random.key(0, impl="rbg"))
        self.first = nnx.Linear(5, 5, use_bias=False, rngs=rngs)
        self.second = nnx.Linear(5, 5, use_bias=False, rngs=rngs)
        self.second.kernel = self.first.kernel
        self.last = nnx.Linear(5, 2, rngs=rngs)

    def __call__(self, x):
        return self.last(jnp.tanh(self.second(jnp.tanh(self.first(x)))))


class Stateful(nnx.Module):
    """Layers of Flax that keep more than parameters: keys, statistics, and a frozen norm."""

    def __init__(self):
        rngs = nnx.Rngs(jax.random.key(0, impl="rbg"))
        self.cell = nnx.RNN(nnx.GRUCell(5, 5, rngs=rngs))
        self.norm = nnx.LayerNorm(5, rngs=rngs)
        self.batch = nnx.BatchNorm(5, use_running_average=True, rngs=rngs)
        self.drop = nnx.Dropout(0.5, deterministic=True, rngs=rngs)
        self.shift = jnp.ones(5)
        self.head = nnx.List([nnx.Linear(5, 2, rngs=rngs)])

    def __call__(self, x):
        h = self.batch(self.norm(self.cell(x[:, None])[:, -1])) + self.shift
        return self.head[0](self.drop(h))


class Counting(Net):
    """A counter of the calls."""

    def __init__(self):
        super().__init__()
        self.calls = nnx.Variable(jnp.zeros(()))

    def __call__(self, x):
        self.calls[...] += 1
        return plain(self, x)


def stripped(model, params=None):
    """What nnx.Optimizer makes of a keyword argument, and the paths of the parameters."""
    params = nnx.state(model, nnx.Param if params is None else params)
    return nnx.as_pure({"module": model})["module"], [
        tuple(path) for path, _ in nnx.to_flat_state(params)
    ]


@pytest.mark.parametrize("wrt", [nnx.Param, nnx.PathContains("head")], ids=["all", "the head"])
def test_variables_of_flax_come_back(wrt):
    model = Stateful()
    bare, params = stripped(model, wrt)
    found, doubt = whole_model(bare, params, nnx.Param)
    assert "lambda: model" in doubt, "an array of the user's own may have been a Variable"
    kinds = {tuple(path): type(leaf) for path, leaf in nnx.to_flat_state(nnx.state(found))}
    for path, leaf in nnx.to_flat_state(nnx.state(model)):
        kind = type(leaf)
        if tuple(path) not in params and kind is nnx.Param:
            kind = nnx.Variable
        assert kinds[tuple(path)] is kind, path
    if wrt is nnx.Param:
        x = jnp.asarray(X)
        np.testing.assert_array_equal(found(x), model(x))


def test_a_model_goes_untouched_through_a_function():
    """Weights that are tied stay tied; in the model as it comes that can't be seen any more."""
    model, tx = Tied(), ng.natural_gradient_descent(1.0, **SETTINGS)
    expected = update(model)
    optimizer = nnx.Optimizer(model, optax.chain(tx, optax.scale(1.0)), wrt=nnx.Param)
    gradients = nnx.state(model, nnx.Param)

    with pytest.raises(ValueError, match=r"second.kernel and first.kernel are .*lambda: model"):
        optimizer.update(model, gradients, module=model, x=X, y=Y)

    with pytest.raises(ValueError, match="are the same array"):
        nnx.jit(lambda o, m, g: o.update(m, g, module=m, x=X, y=Y))(optimizer, model, gradients)

    down = optimizer.update(model, gradients, module=lambda: model, x=X, y=Y)
    Right(jax.tree.map(jnp.negative, nnx.as_pure(expected)), 1e-5).check(lambda: down)


def counted():
    model = Counting()
    optimizer = nnx.Optimizer(model, ng.natural_gradient_descent(1.0, **SETTINGS), wrt=nnx.Param)
    optimizer.update(model, nnx.state(model, nnx.Param), module=model, x=X, y=Y)


@over(
    {
        "a counter": (counted, Refused("does not run on one .*pass module=lambda: model")),
        "another model": (
            lambda: whole_model(stripped(Net())[0], stripped(Tied())[1], nnx.Param),
            Refused("the updates move first.kernel, which Net does not have"),
        ),
        "a function with another result": (
            lambda: whole_model(lambda: X, [], nnx.Param),
            Refused("model must be a flax.nnx.Module, got a ndarray"),
        ),
    }
)
def test_models_behind_the_optimizer_that_are_refused(run, answer):
    answer.check(run)
