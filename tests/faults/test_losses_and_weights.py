"""Losses that are none, class numbers, weights and functions of a user's that do not serve."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fault_harness import Refused, Right, over
from fault_networks import Net, X, plain
from flax import nnx

import natgrad_flax as ng
import ntk_analysis as na
from natgrad_flax.devices import sharded_natural_gradient
from natgrad_flax.linear import online_natural_gradient_descent

LABELS = np.array([0, 1, 1, 0])
ONE_HOT = np.eye(2, dtype=np.float32)[LABELS]
TOKENS = np.stack([X, X, X], 1)
BAD_WEIGHTS = {
    "negative": (np.array([1, -0.5, 1, -1.0]), r"weights must be 0 or .* 2 are neg.* -0.5 at \(1,"),
    "all zero": (np.zeros(4), "weights are all 0 and leave nothing to learn from"),
    "an empty mask": (np.zeros(4, bool), "weights are all 0 and leave nothing"),
    "NaN": (np.array([1, np.nan, 1, 1]), "weights has 1 NaN or infinite entries of 4"),
    "infinite": (np.array([1, np.inf, 1, 1]), "weights has 1 NaN or infinite entries"),
    "too few": (np.ones(3), r"weights must have shape \(N,\).* with N = 4, got \(3,\)"),
    "one number": (1.0, r"weights must have shape \(N,\).*got \(\)"),
    "a column": (np.ones((4, 1)), r"returns \(4, 2\), but weights have shape \(4, 1\).*\(4,\)"),
    "text": ("mask", "weights must be an array of numbers"),
    "complex": (np.ones(4) * 1j, "weights has dtype complex"),
}
BAD_LABELS = {
    "too large": (np.array([0, 1, 2, 5]), r"y has 2 class numbers that .* 2 outputs, 2 at \(2,\)"),
    "negative": (np.array([0, -100, 1, 0]), r"y has 1 class .*-100 at \(1,\).* count from 0 to 1"),
    "floats": (LABELS.astype(np.float32), r"integer dtype and the shape \(N, \.\.\.\)"),
    "truth values": (LABELS > 0, "integer dtype"),
    "integer rows": (
        ONE_HOT.astype(int),
        r"y has shape \(4, 2\); class numbers .* \(4,\), one-hot",
    ),
    "too few": (LABELS[:3], r"and N = 4, got \(3,\)"),
    "no probabilities": (2 * ONE_HOT, "must be rows of probabilities"),
}


def run(y, weights=None, loss=None, forward=None, x=X, **settings):
    loss = ng.SoftmaxCrossEntropy() if loss is None else loss
    settings = {"structure": ng.Exact(), "damping": 0.1, **settings}
    return ng.natural_gradient(Net(forward), x, y, loss=loss, weights=weights, **settings)


def by_optimizer(y, weights=None, tx=None):
    tx = tx or ng.natural_gradient_descent(
        0.1, structure=ng.Exact(), loss=ng.SoftmaxCrossEntropy(), damping=0.1
    )
    model = Net()
    params = nnx.state(model, nnx.Param)
    return tx.update(params, tx.init(params), params, module=model, x=X, y=y, weights=weights)


def on_a_mesh(y, weights=None):
    return sharded_natural_gradient(
        Net(),
        X,
        y,
        weights=weights,
        structure=ng.Exact(),
        loss=ng.SoftmaxCrossEntropy(),
        damping=0.1,
        mesh=jax.make_mesh((1,), ("data",)),
    )


ENTRIES = {"natural_gradient": run, "optimizer": by_optimizer, "a mesh": on_a_mesh}
CASES = {
    f"{entry}: weights that are {name}": (
        lambda f=function, w=weights: f(LABELS, w),
        Refused(says),
    )
    for entry, function in ENTRIES.items()
    for name, (weights, says) in BAD_WEIGHTS.items()
} | {
    f"{entry}: class numbers, {name}": (lambda f=function, y=labels: f(y), Refused(says))
    for entry, function in ENTRIES.items()
    for name, (labels, says) in BAD_LABELS.items()
}


@over(CASES)
def test_weights_and_class_numbers(run, answer):
    answer.check(run)


def tokens(model, x):
    return plain(model, x)


def curve(f, y):
    return jnp.sum(jnp.cos(f - y))


OTHERS = {
    "a class": (lambda: run(LABELS, loss=ng.Poisson), Refused(r"instance: write Poisson\(\)")),
    "a class that needs a function": (
        lambda: run(LABELS, loss=ng.GaussNewton),
        Refused(r"instance: write GaussNewton\(function\)"),
    ),
    "a function for a loss": (
        lambda: run(LABELS, loss=curve),
        Refused(
            r"loss must be one of .*ng.Likelihood\(function\), .*ng.MeanSquaredError\(\), .*got"
        ),
    ),
    "class numbers for squares": (
        lambda: run(LABELS, loss=ng.MeanSquaredError()),
        Refused(r"one-hot encoding, or are for ng.SoftmaxCrossEntropy\(\)"),
    ),
    "class numbers for binary targets": (
        lambda: run(LABELS, loss=ng.SigmoidCrossEntropy()),
        Refused(r"y must have shape \(N, C\),.* and N = 4, got \(4,\)"),
    ),
    "no binary targets": (
        lambda: run(3 * ONE_HOT, loss=ng.SigmoidCrossEntropy()),
        Refused("must lie between 0 and 1.*found 0 to 3"),
    ),
    "negative counts": (
        lambda: run(-ONE_HOT, loss=ng.Poisson()),
        Refused("must be counts, 0 or more; found -1"),
    ),
    "targets of a Gaussian": (
        lambda: run(ONE_HOT, loss=ng.GaussianNegativeLogLikelihood()),
        Refused(r"returns \(4, 2\), but y has shape \(4, 2\); it must have shape \(4, 1\)"),
    ),
    "no scalar": (
        lambda: run(ONE_HOT, loss=ng.GaussNewton(lambda f, y: f - y)),
        Refused(r"must return a floating scalar for the outputs \(2,\)"),
    ),
    "not convex": (
        lambda: run(10 * ONE_HOT, loss=ng.GaussNewton(lambda f, y: -jnp.sum((f - y) ** 2))),
        Refused("not positive semi-definite: it has the eigenvalue -2 at row 0"),
    ),
    "not convex where nothing counts": (
        lambda: run(
            np.array([1.0, 1, 1, -1], np.float32),
            np.array([1, 1, 1, 0]),
            loss=ng.GaussNewton(lambda f, y: y * jnp.sum(f**2)),
        ),
        Right(),
    ),
    "no damping": (
        lambda: run(ONE_HOT, loss=ng.GaussNewton(curve), damping=0.0),
        Refused("ng.GaussNewton needs a positive damping"),
    ),
    "nothing to draw": (
        lambda: run(ONE_HOT, loss=ng.GaussNewton(curve), fisher="mc", key=jax.random.key(0)),
        Refused("no distribution that targets could be drawn from"),
    ),
    "labels that are ignored": (
        lambda: run(np.array([0, 1, -100, 7]), np.array([True, True, False, False])),
        Right(lambda: run(LABELS[:2], x=X[:2]), 1e-4),
    ),
    "missing targets that are ignored": (
        lambda: run(
            np.float32([[0, 1], [1, 0], [np.nan, np.nan], [np.inf, 0]]),
            np.array([1, 1, 0, 0]),
            loss=ng.MeanSquaredError(),
        ),
        Right(lambda: run(np.float32([[0, 1], [1, 0]]), x=X[:2], loss=ng.MeanSquaredError()), 1e-4),
    ),
    "missing targets": (
        lambda: run(np.float32([[0, 1], [1, 0], [np.nan, 0], [0, 0]]), loss=ng.Huber()),
        Refused("y has 1 NaN or infinite entries"),
    ),
    "padding alone that nobody sees": (
        lambda: jax.jit(lambda w: nnx.as_pure(run(LABELS, w)))(np.zeros(4)),
        Right(lambda: jax.tree.map(jnp.zeros_like, nnx.as_pure(run(LABELS)))),
    ),
    "rows of zeros that are ignored": (
        lambda: run(ONE_HOT * [[1], [1], [0], [0]], np.array([1, 1, 0, 0])),
        Right(lambda: run(LABELS[:2], x=X[:2]), 1e-4),
    ),
    "labels of positions": (
        lambda: run(np.zeros((4, 2), int), x=TOKENS),
        Refused(r"returns \(4, 3, 2\), but y has shape \(4, 2\); class numbers .* \(4, 3\)"),
    ),
    "weights of other positions": (
        lambda: run(np.zeros((4, 3), int), np.ones((4, 2)), x=TOKENS),
        Refused(r"\(4, 3, 2\), but weights have shape \(4, 2\).* \(4,\), or \(4, 3\) for one a p"),
    ),
    "class numbers of positions": (
        lambda: run(np.full((4, 3), 2), x=TOKENS),
        Refused(r"y has 12 class numbers .* 2 at \(0, 0\) for one"),
    ),
    "weights of the Fisher alone": (
        lambda: run(LABELS, fisher_weights=np.ones(4)),
        Refused("fisher_weights belongs to a fisher_x"),
    ),
    "a transformation without weights": (
        lambda: by_optimizer(
            ONE_HOT, np.ones(4), online_natural_gradient_descent(loss=ng.SoftmaxCrossEntropy())
        ),
        Refused("online_natural_gradient_descent takes no weights"),
    ),
    "the theory of positions": (
        lambda: na.predict_flow(ng.Exact(), Net(), TOKENS, np.zeros((4, 3, 2)), [1.0]),
        Refused(r"theory is that of outputs \(N, C\), and the model returns \(4, 3, 2\)"),
    ),
    "a Fisher without targets": (
        lambda: ng.fisher(Net(), X, structure=ng.Exact(), loss=ng.GaussNewton(curve)),
        Refused('fisher="exact" is made of targets: pass y'),
    ),
}


@over(OTHERS)
def test_losses(run, answer):
    answer.check(run)


def test_an_exact_fisher_of_many_positions_is_refused(monkeypatch):
    """And one by drawn targets is not."""
    monkeypatch.setattr("natgrad_flax.arguments.memory.available_memory", lambda: 2**30)
    x = jax.ShapeDtypeStruct((64, 1024, 5), jnp.float32)
    y = jax.ShapeDtypeStruct((64, 1024), jnp.int32)
    settings = {"structure": ng.Diagonal(), "loss": ng.SoftmaxCrossEntropy(), "damping": 0.1}

    def trace(**more):
        def f(x, y):
            return ng.natural_gradient(Net(), x, y, **settings, **more)

        return jax.eval_shape(f, x, y)

    with pytest.raises(ValueError, match=r'fisher="mc"'):
        trace()
    trace(fisher="mc", key=jax.random.key(0))
