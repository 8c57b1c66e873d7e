"""Theory of kernels on broken models, bad data, traced arrays and extreme scales."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from fault_harness import Refused, Right, over
from flax import nnx

import natgrad_flax as ng
import ntk_analysis as na
from natgrad_flax.optimizer.spectrum import check_symmetric, rate_of_alpha, rate_of_largest
from ntk_analysis.analytic import analytic_kernels, analytic_layer_kernels
from ntk_analysis.methods import Method, theoretical_learning_rate

RNG = np.random.default_rng(0)
X, Y, MORE = RNG.normal(size=(4, 5)), RNG.normal(size=(4, 2)), RNG.normal(size=(3, 5))
MSE = ng.MeanSquaredError()


def make_model(value=None, activation="tanh", bias=0.1):
    model = ng.MLP((5, 6, 6, 2), activation=activation, bias_variance=bias, rngs=nnx.Rngs(0))
    if value is not None:
        kernel = model.layers[1].kernel
        kernel.set_value(kernel[...].at[0, 0].set(value))
    return model


MODEL = make_model()


class Words(nnx.Module):
    """Embedded words, their mean, a readout."""

    def __init__(self):
        self.words = nnx.Embed(7, 3, rngs=nnx.Rngs(0))
        self.readout = nnx.Linear(3, 2, rngs=nnx.Rngs(1))

    def __call__(self, x):
        return self.readout(jnp.tanh(self.words(x).reshape(len(x), -1, 3).mean(axis=1)))


class Centred(nnx.Module):
    """A network that takes the mean over the batch away."""

    def __init__(self):
        self.linear = nnx.Linear(5, 2, rngs=nnx.Rngs(0))

    def __call__(self, x):
        h = self.linear(x)
        return h - h.mean(axis=0)


# every public entry that takes a model and data, by what it is given
ENTRIES = {
    "coefficient": lambda m, x, y=Y: na.coefficient_matrix(ng.Exact(), m, x),
    "coefficient at": lambda m, x, y=Y: na.coefficient_matrix(ng.Exact(), m, X, x),
    "kernels": lambda m, x, y=Y: na.empirical_layer_kernels(m, x),
    "drift": lambda m, x, y=Y: na.kernel_drift(MODEL, m, x, y),
    "isotropy": lambda m, x, y=Y: na.isotropy(ng.BlockDiagonal(), m, x).eigenvalues,
    "displacement": lambda m, x, y=Y: na.parameter_displacement(ng.Exact(), m, x, y, 0.1, 3),
    "predict": lambda m, x, y=Y: na.predict(ng.Exact(), m, x, y, MORE, kernels="empirical").mean,
    "dynamics": lambda m, x, y=Y: na.predict_dynamics(ng.Exact(), m, x, y, 0.1, 2).outputs_train,
    "flow": lambda m, x, y=Y: na.predict_flow(ng.Exact(), m, x, y, [0.1], loss=MSE).outputs_train,
    "resonances": lambda m, x, y=Y: na.resonances(ng.BlockTriDiagonal(), m, x),
    "window": lambda m, x, y=Y: na.resonance_window(ng.BlockTriDiagonal(), m, x),
    "radius": lambda m, x, y=Y: na.spectral_radius(ng.Exact(), m, x, 0.1, [0.1]),
}
ANALYTIC = {
    "analytic": lambda m, x, y=Y: analytic_kernels(m, x).ntk,
    "analytic layers": lambda m, x, y=Y: analytic_layer_kernels(m, X, x),
    "analytic coefficient": lambda m, x, y=Y: na.coefficient_matrix(
        ng.KFAC(), m, x, kernels="analytic"
    ),
    "analytic isotropy": lambda m, x, y=Y: na.isotropy(ng.Exact(), m, x, kernels="analytic"),
    "analytic predict": lambda m, x, y=Y: na.predict(ng.Exact(), m, x, y, MORE).mean,
}
WITH_TARGETS = ("drift", "displacement", "predict", "dynamics", "flow")


def spoilt(array, value):
    return np.where(array == array[0, 0], value, array)


INPUTS = {
    "NaN": (spoilt(X, np.nan), "1 NaN or infinite"),
    "infinity": (spoilt(X, np.inf), "1 NaN or infinite"),
    "no samples": (X[:0], "batch is empty"),
    "other features": (X[:, :3], r"N, 5\).*\(4, 3\)"),
    "one sample": (X[0], r"for one sample, .*\[None\]"),
    "complex": (X + 1j, "only real numbers"),
    "words": ("abc", "array of numbers"),
    "out of range": (1e155 * X, "out of range: .* reach .*scale the inputs"),
    "shapes alone": (jax.ShapeDtypeStruct((4, 5), jnp.float32), "known numbers: .*outside"),
}
REFUSALS = {
    f"{entry}: {name}": (lambda f=run, a=x: f(MODEL, a), Refused(says))
    for entry, run in (ENTRIES | ANALYTIC).items()
    for name, (x, says) in INPUTS.items()
}
BROKEN = {"NaN": make_model(jnp.nan), "infinite": make_model(jnp.inf)}
REFUSALS |= {
    f"{entry}: {name} parameters": (
        lambda f=run, m=model: f(m, X),
        Refused("the parameters at .* has 1 NaN or infinite"),
    )
    for entry, run in ENTRIES.items()
    for name, model in BROKEN.items()
}
REFUSALS |= {
    f"{entry}: traced": (lambda f=run: jax.jit(lambda x: f(MODEL, x))(X), Refused("outside of"))
    for entry, run in (ENTRIES | ANALYTIC).items()
}
REFUSALS |= {
    f"{entry}: traced model": (lambda f=run: nnx.jit(lambda m: f(m, X))(MODEL), Refused("outside"))
    for entry, run in (ENTRIES | ANALYTIC).items()
}
REFUSALS |= {
    f"{entry}: targets {name}": (lambda f=ENTRIES[entry], t=y: f(MODEL, X, t), Refused(says))
    for entry in WITH_TARGETS
    for name, (y, says) in {
        "NaN": (spoilt(Y, np.nan), "NaN"),
        "complex": (Y + 1j, "only real numbers"),
        "of one output": (Y[:, 0], r"shape \(N, C\) = \(4, 2\)"),
        "words": ("ab", "array of numbers"),
    }.items()
}
REFUSALS |= {
    f"{entry}: integers": (lambda f=run: f(MODEL, np.ones((4, 5), int)), Refused("convert it"))
    for entry, run in ANALYTIC.items()
}
REFUSALS |= {
    "coupled samples": (
        lambda: na.coefficient_matrix(ng.Exact(), Centred(), X),
        Refused("depend on the other samples"),
    ),
    "test samples of another kind": (
        lambda: na.coefficient_matrix(ng.Exact(), Words(), np.ones((4, 2), int), np.ones((4, 3))),
        Refused("x_test must have samples like those of x_train"),
    ),
    "a class as a model": (lambda: na.isotropy(ng.Exact(), Words, X), Refused("Words|model")),
    "weights too large for the kernels": (
        lambda: analytic_kernels(
            ng.MLP((5, 2, 2, 2, 1), weight_variance=1e300, rngs=nnx.Rngs(0)), X
        ),
        Refused("the kernels overflow"),
    ),
    "inputs whose squares are 0": (
        lambda: analytic_kernels(make_model(bias=0.0), 1e-170 * X),
        Refused("not positive: .*so small"),
    ),
    "saturated units, two samples the same to the network": (
        lambda: na.isotropy(ng.BlockDiagonal(), MODEL, np.arange(20.0).reshape(4, 5)).eigenvalues,
        # pseudo-inverses of the Jacobians of the layers by singular values
        Right(np.asarray([0, 0, 2, 2, 3, 3, 3, 3.0]), 1e-6),
    ),
}


@over(REFUSALS)
def test_theory_refuses(run, answer):
    answer.check(run)


IDS = np.array([[0, 1], [2, 3], [4, 5], [6, 0]])
WORDS = Words()
RIGHT = {
    f"{entry}: integer ids": (lambda f=run: f(WORDS, IDS), Right())
    for entry, run in ENTRIES.items()
    if entry in ("kernels", "isotropy", "displacement", "dynamics", "flow", "resonances")
}
RIGHT |= {
    "one id a sample": (lambda: na.empirical_layer_kernels(WORDS, IDS[:, 0]), Right()),
    "integers are numbers": (
        lambda: na.empirical_layer_kernels(MODEL, np.ones((4, 5), int)),
        Right(lambda: na.empirical_layer_kernels(MODEL, np.ones((4, 5))), 1e-14),
    ),
    "lists are arrays": (
        lambda: na.empirical_layer_kernels(MODEL, X.tolist()),
        Right(lambda: na.empirical_layer_kernels(MODEL, X), 1e-14),
    ),
    "a sample twice in a prediction": (
        lambda: (
            na.predict(
                na.GradientDescent(),
                MODEL,
                X[[0, 1, 1]],
                Y[[0, 1, 2]],
                X[[0, 1]],
                kernels="empirical",
            ).mean
        ),
        Right(lambda: np.stack([Y[0], (Y[1] + Y[2]) / 2]), 1e-8),
    ),
}


@over(RIGHT)
def test_theory_is_right(run, answer):
    answer.check(run)


DEAD = make_model(activation="relu", bias=0.0)
ZERO = jnp.zeros((4, 5))
RATES = {
    f"{name}, inputs 0": (
        lambda s=structure: ng.optimal_learning_rate(s, DEAD, x=ZERO),
        Refused(f"{name} has no learning rate here: .* no step moves the outputs"),
    )
    for name, structure in (
        ("Exact", ng.Exact()),
        ("KFAC", ng.KFAC()),
        ("GradientDescent", na.GradientDescent()),
    )
}
RATES |= {
    "of a relative damping, inputs 0": (
        lambda: ng.optimal_learning_rate(
            ng.Exact(), DEAD, x=ZERO, damping=ng.RelativeDamping(1e-3)
        ),
        Refused("no learning rate here|not finite"),
    ),
    "of a broken model": (
        lambda: ng.optimal_learning_rate(ng.Exact(), make_model(jnp.nan), x=jnp.asarray(X)),
        Refused("the parameters at .* NaN"),
    ),
    "of a traced batch": (
        lambda: jax.jit(lambda x: ng.optimal_learning_rate(ng.Exact(), MODEL, x=x))(X),
        Refused("known numbers"),
    ),
    "of an indefinite coupling": (
        lambda: ng.optimal_learning_rate(ng.LayerWise(-np.eye(3)), MODEL, 2),
        Refused("its alpha is -"),
    ),
    "of a curve": (
        lambda: theoretical_learning_rate(Method("gd", 1.0, 0.0), MODEL, 4, np.zeros((8, 8))),
        Refused("no learning rate here"),
    ),
    "of a curve with NaN": (
        lambda: theoretical_learning_rate(
            Method("gd", 1.0, 0.0), MODEL, 4, np.full((8, 8), np.nan)
        ),
        Refused("is not finite"),
    ),
    "lambda_max NaN": (lambda: rate_of_largest(float("nan"), "X"), Refused("no learning rate")),
    "lambda_max negative": (lambda: rate_of_largest(-1.0, "X"), Refused("no learning rate")),
    "lambda_max tiny": (lambda: rate_of_largest(1e-310, "X"), Refused("no learning rate")),
    "alpha 0": (lambda: rate_of_alpha(0.0, "X"), Refused("its alpha is 0")),
    "lambda_max": (lambda: rate_of_largest(4.0, "X"), Right(np.float64(0.25), 0)),
    "asymmetric": (lambda: check_symmetric(np.eye(3, k=1), "X"), Refused("lost in rounding")),
}


@over(RATES)
def test_learning_rates(run, answer):
    answer.check(run)
