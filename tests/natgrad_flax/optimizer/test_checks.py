"""Bad input: one clear error each, before any work."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import natgrad_flax as ng
from natgrad_flax.arguments import memory
from natgrad_flax.structures.memory import check_signals_fit

MODEL = ng.MLP((5, 8, 8, 2), rngs=nnx.Rngs(0))
X = jax.random.normal(jax.random.key(0), (4, 5))
Y = jnp.eye(2)[jnp.asarray([0, 1, 0, 1])]
BROKEN = ng.MLP((5, 8, 2), rngs=nnx.Rngs(0))
BROKEN.layers[0].kernel[...] = BROKEN.layers[0].kernel[...].at[0, 0].set(jnp.nan)
GOOD = {"structure": ng.Exact(), "loss": ng.MeanSquaredError(), "damping": 0.1}

CASES = {
    "inputs of another width": ({"x": X[:, :4]}, ValueError, r"inputs of shape \(N, 5\)"),
    "one sample without its axis": ({"x": X[0]}, ValueError, r"\(N, features\)"),
    "empty batch": ({"x": X[:0], "y": Y[:0]}, ValueError, "batch is empty"),
    "NaN in the inputs": ({"x": X.at[1, 2].set(jnp.nan)}, ValueError, "x has 1 NaN or infinite"),
    "infinity in the targets": ({"y": Y.at[0, 0].set(jnp.inf)}, ValueError, "y has 1 NaN"),
    "NaN in the parameters": ({"model": BROKEN}, ValueError, "parameters at .*kernel.* has 1 NaN"),
    "class numbers": ({"y": jnp.asarray([0, 1, 0, 1])}, ValueError, "one-hot"),
    "integer targets": ({"y": jnp.ones((4, 2), int)}, TypeError, "one_hot"),
    "another number of outputs": ({"y": Y[:, :1]}, ValueError, "2 outputs"),
    "another number of targets": ({"y": Y[:3]}, ValueError, "N = 4"),
    "probabilities that do not sum to 1": (
        {"y": Y * 0.7, "loss": ng.SoftmaxCrossEntropy()},
        ValueError,
        "sum to 1",
    ),
    "labels of both signs": (
        {"y": Y - 0.5, "loss": ng.SoftmaxCrossEntropy()},
        ValueError,
        "probabilities",
    ),
    "unknown structure": ({"structure": "kfac"}, TypeError, r"ng.KFAC\(\)"),
    "structure class": ({"structure": ng.KFAC}, TypeError, r"write KFAC\(\)"),
    "unknown loss": ({"loss": "mse"}, TypeError, "ng.MeanSquaredError"),
    "unknown Fisher": ({"fisher": "true"}, ValueError, "exact, mc, empirical, improved"),
    "negative damping": ({"damping": -1e-3}, ValueError, "damping must be 0 or positive"),
    "NaN damping": ({"damping": float("nan")}, ValueError, "damping must be 0 or positive"),
    "damping of another type": ({"damping": "auto"}, TypeError, "damping must be a number"),
    "schedule outside the optimizer": ({"damping": lambda t: 0.1}, TypeError, "schedule"),
    "adaptive damping outside the optimizer": (
        {"damping": ng.LevenbergMarquardt()},
        TypeError,
        "natural_gradient_descent",
    ),
    "Monte-Carlo without a key": ({"fisher": "mc"}, ValueError, "key="),
    "undamped Monte-Carlo": (
        {"fisher": "mc", "damping": 0.0, "key": jax.random.key(0)},
        ValueError,
        "positive damping",
    ),
    "no samples to draw": ({"mc_samples": 0}, ValueError, "mc_samples"),
    "sigma of another depth": (
        {"structure": ng.LayerWise(np.eye(2))},
        ValueError,
        "2 x 2 but the network has 3 layers",
    ),
}


class Words(nnx.Module):
    """Embedded numbers, a normalisation, dropout, and a layer that is not always used."""

    def __init__(self, rows=7, spare=False, use_running_average=None):
        rngs = nnx.Rngs(jax.random.key(0, impl="rbg"))
        self.embedding = nnx.Embed(rows, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.readout = nnx.Linear(4, 2, rngs=rngs)
        self.spare = nnx.Linear(4, 2, rngs=rngs) if spare else None
        self.use_running_average = use_running_average

    def __call__(self, x):
        x = self.norm(self.embedding(x).mean(1), use_running_average=self.use_running_average)
        return self.readout(self.drop(x))


def words(train=False, **settings):
    model = Words(**settings)
    return model if train else nnx.view(model, deterministic=True, use_running_average=True)


IDS = jnp.asarray([[0, 1, -1], [2, 2, 6], [3, 4, 5], [6, 0, 0]])
IMAGES = {
    "model": ng.ConvNet((4, 4, 1), (2,), 2, strides=1, rngs=nnx.Rngs(0)),
    "x": jnp.ones((4, 4, 4, 1)),
}


def on_words(**settings):
    return {"x": IDS, "model": partial(words, **settings)}


LAYER_CASES = {
    "images of another shape": (
        {**IMAGES, "x": jnp.ones((4, 4, 5, 1))},
        ValueError,
        r"images of shape \(N, 4, 4, 1\), got x of \(4, 4, 5, 1\)",
    ),
    "another number of outputs": (
        {**IMAGES, "y": jnp.ones((4, 3))},
        ValueError,
        r"the model has 2 outputs, but y has shape \(4, 3\)",
    ),
    "batch statistics": (
        on_words(train=True),
        ValueError,
        r"BatchNorm at norm is in training mode: .* no Fisher, of its own. .* model.eval\(\)",
    ),
    "batch statistics on demand": (
        on_words(use_running_average=False),
        ValueError,
        "BatchNorm at norm is in training mode",
    ),
    "dropout": (
        on_words(train=True, use_running_average=True),
        ValueError,
        r"depend on the random numbers of drop: .* deterministic=True",
    ),
    "a parameter that is not used": (
        on_words(spare=True),
        ValueError,
        r"do not depend on the parameter spare\.\w+: leave it out with wrt=",
    ),
    "a filter that chooses nothing": (
        {**on_words(), "wrt": nnx.LoRAParam},
        ValueError,
        "Words has no parameters for wrt=",
    ),
    "no filter": ({**on_words(), "wrt": 3}, TypeError, "wrt must be a filter of flax.*got 3"),
    "a filter that chooses integers": (
        {**on_words(), "wrt": nnx.Any(nnx.Param, nnx.RngCount)},
        TypeError,
        r"chooses drop\.rngs\.count of dtype uint32",
    ),
    "complex inputs": ({**on_words(), "x": IDS * 1j}, TypeError, "dtype complex64"),
}


@pytest.mark.parametrize("name", LAYER_CASES)
def test_models_and_batches(name):
    changes, error, message = LAYER_CASES[name]
    arguments = {"y": Y, **GOOD, **changes}
    model = arguments.pop("model")
    model = model() if isinstance(model, partial) else model
    with pytest.raises(error, match=message):
        ng.natural_gradient(model, arguments.pop("x"), arguments.pop("y"), **arguments)


def test_integers_are_inputs_of_an_embedding():
    """Also negative ones, which count from the end; a spare layer is left out by wrt."""
    model = words(spare=True)
    wrt = nnx.All(nnx.Param, nnx.Not(nnx.PathContains("spare")))
    update = ng.natural_gradient(model, IDS, Y, **GOOD, wrt=wrt)
    wrapped = ng.natural_gradient(model, jnp.where(IDS < 0, IDS + 7, IDS), Y, **GOOD, wrt=wrt)
    assert set(update) == {"embedding", "norm", "readout"}
    for a, b in zip(jax.tree.leaves(update), jax.tree.leaves(wrapped), strict=True):
        np.testing.assert_array_equal(a, b)


class Large(nnx.Module):
    """Numbers to 16 embedded tokens, an affine layer on them, and a gain of every entry."""

    def __init__(self, rows, units, gains):
        self.words = nnx.Embed(rows, 16, rngs=nnx.Rngs(0))
        self.tokens = nnx.Linear(16, units, rngs=nnx.Rngs(0))
        self.gains = nnx.Param(jnp.ones((gains, 16, units)))

    def __call__(self, x):
        return (self.tokens(self.words(x)) * self.gains[...].sum(0)).sum(1)[:, :2]


GIB = 2**30


@pytest.mark.parametrize(
    ("sizes", "structure", "message"),
    [
        (
            (2, 8, 1000),
            ng.KFAC(),
            r"the explicit Jacobian block of gains at the root, N S P = 20000 x 2 x 128000, need "
            r"19\.1 GiB of the .* GiB that a step needs, and the device has 10\.0 GiB",
        ),
        (
            (2, 4096, 1),
            ng.UnitWise(),
            r"per-sample Jacobians of tokens \(N S P = 20000 x 2 x 69632\), or pairs of .* need",
        ),
        (
            (2, 2000, 1),
            ng.KFAC(),
            r"the inputs and derivatives of tokens, .*\(20000, 2, 16, 1, 2000\), need 4\.8 GiB",
        ),
    ],
)
def test_signals_that_cannot_fit(sizes, structure, message, monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda: 10 * GIB)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Large(*sizes)))
    signals = jax.eval_shape(
        lambda state, x: ng.jacobian_signals(nnx.merge(graphdef, state), x),
        state,
        jax.ShapeDtypeStruct((20_000, 16), jnp.int32),
    )
    with pytest.raises(ValueError, match=message):
        check_signals_fit(structure, signals)
    monkeypatch.setattr(memory, "available_memory", lambda: 10**4 * GIB)
    check_signals_fit(structure, signals)


@pytest.mark.parametrize("name", CASES)
def test_natural_gradient(name):
    changes, error, message = CASES[name]
    arguments = {"model": MODEL, "x": X, "y": Y, **GOOD, **changes}
    with pytest.raises(error, match=message):
        ng.natural_gradient(
            arguments.pop("model"), arguments.pop("x"), arguments.pop("y"), **arguments
        )


@pytest.mark.parametrize(
    ("sigma", "message"),
    [
        (np.ones((3, 3)), "singular"),
        ([[1.0, 2.0], [0.0, 1.0]], "symmetric"),
        (np.ones((2, 3)), "square"),
        ([[np.nan, 0.0], [0.0, 1.0]], "NaN"),
    ],
)
def test_sigma(sigma, message):
    with pytest.raises(ValueError, match=message):
        ng.LayerWise(sigma)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"widths": (5,)}, "at least two positive integers"),
        ({"widths": (5, 0, 1)}, "at least two positive integers"),
        ({"widths": (5, 2.5, 1)}, "at least two positive integers"),
        ({"activation": "rleu"}, "unknown activation 'rleu'.*Did you mean 'relu'"),
        ({"weight_variance": 0.0}, "weight_variance"),
        ({"bias_variance": -1.0}, "bias_variance"),
        ({"bias_variance": float("nan")}, "bias_variance"),
    ],
)
def test_models(arguments, message):
    with pytest.raises(ValueError, match=message):
        ng.MLP(**{"widths": (5, 4, 1), "rngs": nnx.Rngs(0), **arguments})


@pytest.mark.parametrize(
    ("structure", "widths", "message"),
    [
        (ng.BlockDiagonal(), (784, 64, 64, 1), r"layer 3 \(the last\) has 64 inputs for 100"),
        (ng.BlockTriDiagonal(), (784, 64, 64, 1), "layer 3"),
        (ng.KFAC(), (784, 200, 99, 1), "layer 2 has 99 units for N C = 100"),
        (ng.UnitWise(), (64, 200, 200, 1), "layer 1 has 64 inputs for 100 samples"),
        (ng.Exact(), (3, 4, 1), "16 parameters for N C = 100"),
        (ng.Diagonal(), (784, 200, 200, 1), "not isotropic at any width"),
        (ng.QuasiDiagonal(), (784, 200, 200, 1), "not isotropic at any width"),
    ],
)
def test_optimal_learning_rate_names_the_failed_condition(structure, widths, message):
    model = ng.MLP(widths, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=message):
        ng.optimal_learning_rate(structure, model, 100)


@pytest.mark.parametrize("count", [0, -1, 2.5, None])
def test_optimal_learning_rate_needs_a_number_of_samples(count):
    with pytest.raises(ValueError, match="num_samples"):
        ng.optimal_learning_rate(ng.Exact(), MODEL, count)


def test_too_few_units_for_an_undamped_coupling():
    x = jax.random.normal(jax.random.key(0), (30, 40))
    model = ng.MLP((40, 20, 20, 1), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"full row rank: layer 3 .* has 20 inputs for 30 samples"):
        ng.natural_gradient(
            model, x, jnp.ones((30, 1)), structure=ng.BlockTriDiagonal(), loss=GOOD["loss"]
        )


@pytest.mark.parametrize(
    ("structure", "message"),
    [
        (ng.Exact(), r"that Exact solves is 400000 x 400000: .* needs 4,470.3 GiB"),
        (ng.Exact(space="parameter"), "726000 x 726000"),
        (ng.BlockDiagonal(), "400000 x 400000"),
        (ng.BlockTriDiagonal(space="sample"), "1200000 x 1200000"),
    ],
)
def test_arrays_that_cannot_fit(structure, message, monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda: 24 * 2**30)
    model = ng.MLP((600, 600, 600, 10), rngs=nnx.Rngs(0))
    x = jnp.ones((40_000, 600), jnp.float32)
    y = jnp.ones((40_000, 10), jnp.float32)
    with pytest.raises(ValueError, match=message):
        ng.natural_gradient(model, x, y, structure=structure, loss=GOOD["loss"], damping=0.1)


def test_model_that_returns_another_shape():
    class Odd(nnx.Module):
        def __init__(self):
            self.layer = nnx.Linear(5, 3, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.layer(x)

    with pytest.raises(ValueError, match=r"returns \(4, 3\), but y has shape \(4, 2\)"):
        ng.natural_gradient(Odd(), X, Y, **GOOD)


@pytest.mark.parametrize("ratio", [0.0, -1.0, float("inf")])
def test_relative_damping(ratio):
    with pytest.raises(ValueError, match="RelativeDamping"):
        ng.RelativeDamping(ratio)


@pytest.mark.parametrize(
    "changes",
    [
        {"initial": 0.0},
        {"increase": 0.9},
        {"decrease": 1.1},
        {"lower": 0.8},
        {"maximum": 0.5},
        {"maximum": float("inf")},
    ],
)
def test_levenberg_marquardt(changes):
    with pytest.raises(ValueError, match="LevenbergMarquardt"):
        ng.LevenbergMarquardt(**changes)


@pytest.mark.parametrize("field", ["last_layer", "split", "first_layer"])
def test_kfac_options(field):
    with pytest.raises(ValueError, match=field):
        ng.KFAC(**{field: "other"})


@pytest.mark.parametrize(
    "structure", [ng.Exact, ng.BlockDiagonal, ng.BlockTriDiagonal, ng.KFAC, ng.UnitWise]
)
def test_space(structure):
    with pytest.raises(ValueError, match="auto, sample, parameter"):
        structure(space="samples")


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan")])
def test_learning_rate(rate):
    with pytest.raises(ValueError, match="learning_rate"):
        ng.natural_gradient_descent(rate, **GOOD)


def test_optimizer_without_the_batch():
    tx = ng.natural_gradient_descent(1.0, **GOOD)
    params = nnx.as_pure(nnx.state(MODEL, nnx.Param))
    with pytest.raises(ValueError, match="pass module=model, x=x, y=y"):
        tx.update(params, tx.init(params), params)


def test_sizes_are_refused_only_where_a_system_of_that_size_is_solved(monkeypatch):
    """The entry-wise structures solve none; K-FAC counts N^2 N S in its damping, past 32 bits."""
    monkeypatch.setattr("natgrad_flax.arguments.memory.available_memory", lambda: 10**6)
    model = ng.MLP((5, 4, 10), bias_variance=0.1, rngs=nnx.Rngs(0))
    x, y = jnp.zeros((700, 5)), jax.nn.one_hot(jnp.arange(700) % 10, 10)
    settings = {"loss": ng.SoftmaxCrossEntropy(), "damping": ng.RelativeDamping(1e-3)}
    for structure in (ng.Diagonal(), ng.QuasiDiagonal(), ng.KFAC()):
        jax.eval_shape(partial(ng.natural_gradient, model, structure=structure, **settings), x, y)
    with pytest.raises(ValueError, match="the system that Exact solves is 6300 x 6300"):
        ng.natural_gradient(model, x, y, structure=ng.Exact("sample"), **settings)
