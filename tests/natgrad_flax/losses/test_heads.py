"""Models of several heads: a loss a head, against dense matrices of the concatenated problem."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from jax.flatten_util import ravel_pytree

import natgrad_flax as ng
from natgrad_flax import devices

pytestmark = pytest.mark.usefixtures("x64")
N, T, V, RHO = 4, 3, 3, 0.1
RNG = np.random.default_rng(0)
X = RNG.normal(size=(N, T, 4))
Y = {"words": RNG.integers(0, V, (N, T)), "box": RNG.normal(size=(N, 2))}
WEIGHTS = {"words": RNG.integers(0, 2, (N, T)) * RNG.uniform(1, 2, (N, T)), "box": None}
SCALES = {"words": 0.5, "box": 2.0}
LOSSES = {"words": ng.SoftmaxCrossEntropy(), "box": ng.MeanSquaredError()}
PLAIN = {"words": None, "box": None}
LITERAL = ng.KFAC(last_layer="literal")
LOSS = ng.Heads(LOSSES, weights=SCALES)


class Model(nnx.Module):
    """Words at every token and a box for all of them, behind a trunk in common."""

    def __init__(self):
        keys = {"param_dtype": jnp.float64, "rngs": nnx.Rngs(0)}
        self.trunk = nnx.Linear(4, 5, **keys)
        self.words = nnx.Linear(5, V, **keys)
        self.box = nnx.Linear(5, 2, **keys)

    def __call__(self, x):
        h = jnp.tanh(self.trunk(x))
        return {"words": self.words(h), "box": self.box(h.mean(1))}


class Single(Model):
    """The head of the words alone."""

    def __call__(self, x):
        return super().__call__(x)["words"]


class Alone(Model):
    """The same in a dictionary."""

    def __call__(self, x):
        return {"words": super().__call__(x)["words"]}


class Pair(Model):
    """Both heads as a tuple."""

    def __call__(self, x):
        return tuple(super().__call__(x).values())


class Whole(Model):
    """A box of the whole batch."""

    def __call__(self, x):
        found = super().__call__(x)
        return {**found, "box": found["box"].mean(0, keepdims=True)}


@functools.cache
def network(kind=Model):
    """Made where 64-bit mode is on."""
    return kind()


def flat(tree):
    return np.asarray(ravel_pytree(nnx.as_pure(tree))[0])


def step(kind=Model, y=Y, *, loss=LOSS, structure=ng.Exact(), damping=RHO, **settings):  # noqa: B008
    settings = {"structure": structure, "loss": loss, "damping": damping, **settings}
    return flat(ng.natural_gradient(network(kind), X, y, **settings))


def dense(weights, drawn=None):
    """Gradient and Fisher of the weighted sum of the heads, head by head with jax.jacrev."""
    graphdef, state = nnx.split(network(), nnx.Param)
    start, unravel = ravel_pytree(nnx.as_pure(state))

    def run(flat):
        return nnx.merge(graphdef, jax.tree.map(lambda a: a, unravel(flat)))(X)

    jacobians, outputs = jax.jacrev(run)(start), run(start)
    slope, fisher = 0.0, 0.0
    for name, loss in LOSSES.items():
        rows = outputs[name].reshape(-1, outputs[name].shape[-1])
        jacobian = jacobians[name].reshape(*rows.shape, -1)
        places = outputs[name].shape[:-1]
        w = np.ones(places) if weights[name] is None else weights[name]
        w = SCALES[name] * w.reshape(-1) / w.sum()
        targets = jnp.asarray(Y[name]).reshape(len(rows), *Y[name].shape[len(places) :])
        slope += jnp.einsum("n,nc,ncp->p", w, loss.residual(rows, targets), jacobian)
        fisher += jnp.einsum("n,nap,nab,nbq->pq", w, jacobian, loss.fisher(rows), jacobian)
    return np.asarray(slope), np.asarray(fisher)


@pytest.mark.parametrize("weights", [PLAIN, WEIGHTS], ids=["plain", "mask"])
def test_exact_is_the_dense_solve(weights):
    slope, fisher = dense(weights)
    expected = np.linalg.solve(fisher + RHO * np.eye(len(slope)), slope)
    for microbatches in (1, 2):
        found = step(weights=weights, microbatches=microbatches)
        np.testing.assert_allclose(found, expected, atol=1e-10)
    operator = ng.fisher(network(), X, structure=ng.Exact(), loss=LOSS, weights=weights)
    np.testing.assert_allclose(operator.to_dense(), fisher, atol=1e-10)


def test_without_damping_is_the_pseudo_inverse():
    """A head without weights has directions of its own beside one whose columns may vanish."""
    slope, fisher = dense(PLAIN)
    expected = np.linalg.pinv(fisher, rcond=1e-12) @ slope
    np.testing.assert_allclose(step(damping=0.0), expected, atol=1e-8 * np.abs(expected).max())
    layers = ng.describe(network(), X, loss=LOSS, fisher="exact", structure=ng.KFAC())
    assert layers.num_directions == T * (V - 1) + 2


def test_a_module_of_linen_has_heads():
    class Linen(linen.Module):
        @linen.compact
        def __call__(self, x):
            h = linen.Dense(3, param_dtype=float)(x.mean(1))
            return {"box": linen.Dense(2, param_dtype=float)(h)}

    variables = Linen().init(jax.random.key(0), X)
    settings = {"structure": ng.Exact(), "loss": {"box": LOSSES["box"]}, "damping": RHO}
    bridged = nnx.bridge.ToNNX(Linen(), rngs=nnx.Rngs(0)).lazy_init(jnp.asarray(X))
    nnx.update(bridged, nnx.State(jax.tree.map(nnx.Param, variables["params"])))
    found = [
        flat(ng.natural_gradient(model, X, {"box": Y["box"]}, **settings))
        for model in (ng.from_linen(Linen(), variables), bridged)
    ]
    np.testing.assert_allclose(*found, atol=1e-12)


def test_drawn_targets_are_an_unbiased_fisher():
    """With many draws, and the gradient outside of their span is that of the data."""
    slope, fisher = dense(WEIGHTS)
    settings = {"structure": ng.Exact(), "loss": LOSS, "weights": WEIGHTS, "fisher": "mc"}
    operator = ng.fisher(network(), X, key=jax.random.key(0), mc_samples=40_000, **settings)
    found = np.asarray(operator.to_dense())
    assert np.linalg.norm(found - fisher) < 0.02 * np.linalg.norm(fisher)
    found = step(weights=WEIGHTS, fisher="mc", key=jax.random.key(0), damping=1e6)
    np.testing.assert_allclose(found, slope / 1e6, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize(("structure", "scale"), [(ng.Exact(), 3.0), (ng.KFAC(), 1.0)])
def test_one_head_is_the_plain_problem(structure, scale):
    """Its mask and its positions, too; a weight of the head scales gradient and Fisher alike."""
    wrt = nnx.All(nnx.Param, nnx.Not(nnx.PathContains("box")))
    plain = {"loss": LOSSES["words"], "weights": WEIGHTS["words"], "damping": RHO}
    expected = step(Single, Y["words"], structure=structure, wrt=wrt, **plain)
    found = step(
        Alone,
        {"words": Y["words"]},
        loss=ng.Heads({"words": LOSSES["words"]}, weights={"words": scale}),
        weights={"words": WEIGHTS["words"]},
        damping=scale * RHO,
        structure=structure,
        wrt=wrt,
    )
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_a_tuple_of_heads_and_a_weight_for_all():
    """One array of weights counts for each head, and a sample of weight 0 is not there."""
    weights = np.array([0.0, 2.0, 2.0, 2.0])
    y = (jnp.asarray(Y["words"]).at[0].set(-1), Y["box"])
    settings = {"structure": LITERAL, "loss": tuple(LOSSES.values()), "damping": RHO}
    found = ng.natural_gradient(network(Pair), X, y, weights=weights, **settings)
    rest = ng.natural_gradient(network(Pair), X[1:], (Y["words"][1:], Y["box"][1:]), **settings)
    np.testing.assert_allclose(flat(found), flat(rest), atol=1e-12)


def test_an_optimizer_descends():
    """Adaptive damping, moving averages and a mesh get the heads as they get one output."""
    model = network()
    mesh = jax.make_mesh((1,), ("data",))
    average = ng.MovingAverage(0.0)
    kinds = {
        "average": {"structure": ng.KFAC(), "average": average, "example": (model, X)},
        "mesh": {"structure": devices.Sharded(ng.KFAC(), mesh)},
        "adaptive": {"structure": ng.Exact(), "damping": ng.LevenbergMarquardt(initial=RHO)},
    }
    graphdef, params = nnx.split(model)
    params, found = nnx.as_pure(params), {}
    for name, settings in kinds.items():
        tx = ng.natural_gradient_descent(0.5, loss=LOSS, **{"damping": RHO, **settings})

        @jax.jit
        def update(params, state, tx=tx):
            module = nnx.merge(graphdef, params)
            batch = {"module": module, "x": X, "y": Y, "weights": WEIGHTS}
            return tx.update(params, state, params, **batch)

        found[name], state = update(params, tx.init(params))
    expected = -0.5 * step(weights=WEIGHTS, structure=ng.KFAC())
    for name in ("average", "mesh"):
        np.testing.assert_allclose(flat(found[name]), expected, atol=1e-10)
    np.testing.assert_allclose(flat(found["adaptive"]), -0.5 * step(weights=WEIGHTS), atol=1e-7)
    after = nnx.merge(graphdef, nnx.State(optax.apply_updates(params, found["adaptive"])))
    change = LOSS(after(X), Y, WEIGHTS) - LOSS(model(X), Y, WEIGHTS)
    predicted = (-0.5 + 0.5**2 / 2) * dense(WEIGHTS)[0] @ step(weights=WEIGHTS)
    damping = ng.LevenbergMarquardt(initial=RHO).adapt(jnp.asarray(RHO), change, predicted)
    np.testing.assert_allclose(state.damping, damping, rtol=1e-6)
    assert change < 0


BAD = {
    "a missing head": ({"y": {"box": Y["box"]}}, ValueError, "y must have .* nothing for 'words'"),
    "a head too many": ({"y": {**Y, "z": 1}}, ValueError, "y must have .* 'z' besides"),
    "an array for all heads": ({"y": Y["box"]}, TypeError, "y must be a dictionary .* got a ndarr"),
    "heads that the model lacks": (
        {"loss": {**LOSSES, "mask": ng.Huber()}, "y": {**Y, "mask": Y["box"]}},
        ValueError,
        "the outputs of the model must have .* nothing for 'mask'",
    ),
    "heads without a loss": (
        {"loss": {"box": LOSSES["box"]}, "y": {"box": Y["box"]}},
        ValueError,
        "the outputs of the model must have .* 'words' besides",
    ),
    "a tuple of losses": (
        {"loss": tuple(LOSSES.values()), "y": tuple(Y.values())},
        TypeError,
        "the outputs of the model must be a tuple .* got a dict",
    ),
    "one loss": ({"loss": LOSSES["box"], "y": Y["box"]}, TypeError, r"a loss for each .*ng\.Heads"),
    "a model of one output": (
        {"kind": Single},
        TypeError,
        "the outputs of the model must be a dictionary",
    ),
    "an output for all samples": (
        {"kind": Whole},
        ValueError,
        r"head 'box' must have shape \(N, \.\.\., C\) with N = 4, got \(1, 2\)",
    ),
    "targets of another shape": (
        {"y": {**Y, "box": Y["box"][:, :1]}},
        ValueError,
        r"head 'box': the model returns \(4, 2\), but y has shape \(4, 1\)",
    ),
    "too few targets": ({"y": {**Y, "box": Y["box"][:2]}}, ValueError, r"y\['box'\] must have"),
    "a class too many": (
        {"y": {**Y, "words": Y["words"] + 1}},
        ValueError,
        r"y\['words'\] has .* class numbers that are none of the model's 3 outputs",
    ),
    "NaN": ({"y": {**Y, "box": np.nan * Y["box"]}}, ValueError, r"y\['box'\] has 8 NaN"),
    "negative weights": (
        {"weights": {"words": None, "box": -np.ones(N)}},
        ValueError,
        r"weights\['box'\] must be 0 or positive",
    ),
    "weights of positions for all": (
        {"weights": np.ones((N, T))},
        ValueError,
        "weights of positions are given by head",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_one_sentence(case):
    settings, error, message = BAD[case]
    with pytest.raises(error, match=message):
        step(**settings)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((3,), TypeError, "needs a dictionary of losses"),
        (({},), TypeError, "needs a dictionary of losses"),
        (({"box": ng.Huber},), TypeError, "the loss of head 'box' must be an instance"),
        (
            (LOSSES, {"box": 1.0}),
            ValueError,
            "weights of ng.Heads must have .* nothing for 'words'",
        ),
        ((LOSSES, {"box": 1.0, "words": 0}), ValueError, "weight of head 'words' must be positive"),
    ],
)
def test_losses_that_do_not_fit(arguments, error, message):
    with pytest.raises(error, match=message):
        ng.Heads(*arguments)
