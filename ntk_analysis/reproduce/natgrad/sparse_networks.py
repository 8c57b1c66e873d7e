"""A sparse teacher learnt by two-layer ReLU networks: does natural gradient hide the structure?"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from natgrad_datasets import sparse_classification
from natgrad_datasets.separable import SparseClassification

from natgrad_flax import MLP, Exact, RelativeDamping, SigmoidCrossEntropy, natural_gradient
from ntk_analysis.analytic import analytic_kernels
from ntk_analysis.empirical import Matrix
from ntk_analysis.reproduce.registry import (
    Measurement,
    Outcome,
    Report,
    above,
    below,
    check,
)

_DIM, _RELEVANT, _WIDTH = 200, 8, 64
_COUNTS, _SEEDS = (50, 100, 200, 500), range(5)
_TEST, _FRESH, _GOAL = 1000, 1000, 0.05
_SCALES = (1.0, 0.1)
_LOSS = SigmoidCrossEntropy()


class Method(NamedTuple):
    """How a network is trained.

    Attributes:
      name: in tables and figures.
      fisher: "train", "fresh" or "empirical"; "" for gradient descent.
      rate: of a step; that of gradient descent is divided by the loss.
      most: steps at most.
      damping: of the Fisher.
    """

    name: str
    fisher: str
    rate: float
    most: int
    damping: RelativeDamping | float = 0.0


GRADIENT = Method("gradient descent", "", 0.3, 4000)
TRAIN = Method("natural, training set", "train", 0.1, 80, RelativeDamping(1e-2))
FRESH = Method("natural, fresh inputs", "fresh", 0.05, 60, RelativeDamping(0.3))
EMPIRICAL = Method("natural, empirical", "empirical", 0.02, 150, RelativeDamping(1e-2))
METHODS = (GRADIENT, TRAIN, FRESH, EMPIRICAL)


@partial(jax.jit, static_argnames=("graphdef", "method"))
def _train(
    graphdef: Any, state: nnx.State, x: Array, targets: Array, key: Array, method: Method
) -> nnx.State:
    """Until the training loss is the goal, or the steps are used up."""

    def loss_of(state: nnx.State) -> Array:
        return jnp.mean(_LOSS.values(nnx.merge(graphdef, state)(x), targets))

    def step(carry: tuple[nnx.State, Array, Array]) -> tuple[nnx.State, Array, Array]:
        state, loss, count = carry
        if method.fisher:
            inputs = jax.random.normal(jax.random.fold_in(key, count), (_FRESH, x.shape[1]))
            update = natural_gradient(
                nnx.merge(graphdef, state),
                x,
                targets,
                structure=Exact(),
                loss=_LOSS,
                damping=method.damping,
                fisher="empirical" if method.fisher == "empirical" else "exact",
                fisher_x=inputs if method.fisher == "fresh" else None,
            )
        else:
            update = jax.tree.map(lambda g: g / loss, jax.grad(loss_of)(state))
        state = jax.tree.map(lambda p, u: p - method.rate * u, state, update)
        return state, loss_of(state), count + 1

    start = (state, loss_of(state), jnp.zeros((), jnp.int32))
    return jax.lax.while_loop(
        lambda carry: (carry[1] > _GOAL) & (carry[2] < method.most), step, start
    )[0]


@partial(jax.jit, static_argnames=("graphdef",))
def _judge(graphdef: Any, state: nnx.State, x: Array, y: Array) -> tuple[Array, Array]:
    """Share of right signs, and of the squared input gradient that is on the support."""

    def output(x: Array) -> Array:
        return nnx.merge(graphdef, state)(x[None])[0, 0]

    found, slopes = jax.vmap(jax.value_and_grad(output))(x)
    energy = jnp.mean(slopes**2, axis=0)
    return jnp.mean(found * y > 0), jnp.sum(energy[:_RELEVANT]) / jnp.sum(energy)


def _network(scale: float, seed: int) -> MLP:
    """In NTK parametrisation, all weights times the scale."""
    model = MLP((_DIM, _WIDTH, 1), rngs=nnx.Rngs(seed))
    for layer in model.layers:
        layer.kernel[...] *= scale
    return model


def _kernel_limit(data: SparseClassification, count: int) -> tuple[float, float]:
    """Accuracy of the labels' interpolant at infinite width, and alignment of its linear part.

    The kernel is c_0 + c_1 x x' / D + ... with terms of higher order that are nearly a ridge, so
    K^-1 y weighs inputs as a ridge regression does.
    """
    inputs = np.concatenate([data.x_train[:count], data.x_test])
    kernel = np.sum(analytic_kernels(_network(1.0, 0), inputs).tangent, axis=0)
    weights = np.linalg.solve(kernel[:count, :count], data.y_train[:count])
    right = kernel[count:, :count] @ weights * data.y_test > 0
    linear = (data.x_train[:count].T @ weights) ** 2
    return float(right.mean()), float(linear[:_RELEVANT].sum() / linear.sum())


@check(
    "NG-Sparse-Networks",
    "A sparse teacher and ReLU networks: the dip at N = D is one of linear models",
    claim="Kerekes et al. show that natural gradient with the Fisher of the training set loses the "
    "sparse structure in linear models, where N < D samples decide nothing but the span, and is at "
    "chance at N = D. A network of two layers has more parameters than samples on both sides of "
    "N = D. From f_0 = 0 at infinite width it interpolates by a kernel whose parts beyond the "
    "linear one act as a ridge, which has no dip. Networks of small weights end at the accuracy of "
    "this kernel, whether by gradient descent or by natural gradient with the Fisher of the "
    "training set or the empirical one, and find the support as far as its linear part does, no "
    "further. What they say of linear models is left as a shade: natural gradient has a little "
    "less of its slope on the support where samples are many. At the scale of the NTK the random "
    "f_0 costs accuracy. A damped Fisher of fresh inputs, the better one in linear models, is the "
    "worst here.",
    setting=f"D = {_DIM}, teacher of {_RELEVANT} ones, x ~ N(0, I), N = "
    f"{', '.join(map(str, _COUNTS))}; ReLU networks of {_WIDTH} hidden units without biases, all "
    "weights of the NTK parametrisation times 1 or 0.1; sigmoid cross-entropy until the training "
    f"loss is {_GOAL}; steps of 0.3 / loss (gradient), 0.1 (training set, damping 0.01 of the mean "
    f"diagonal), 0.05 ({_FRESH} fresh inputs a step, damping 0.3; with 0.01 it diverges), 0.02 "
    "(empirical, damping 0.01); 5 seeds; float32; alignment: share of the mean squared input "
    f"gradient on the support, {_RELEVANT / _DIM:g} by chance",
    origin="ours",
)
def sparse_networks(report: Report) -> Outcome:
    """Accuracy and alignment by scale, method and number of samples."""
    sets = [sparse_classification(_COUNTS[-1], _TEST, _DIM, _RELEVANT, seed) for seed in _SEEDS]
    limit = np.array([[_kernel_limit(data, count) for data in sets] for count in _COUNTS])
    limit = limit.mean(axis=1)
    shape = (len(_SCALES), len(METHODS), len(_COUNTS), len(_SEEDS))
    accuracy, alignment, fitted = np.empty(shape), np.empty(shape), np.empty(shape)
    for place in np.ndindex(*shape):
        scale, method = _SCALES[place[0]], METHODS[place[1]]
        count, seed = _COUNTS[place[2]], _SEEDS[place[3]]
        report(f"weights times {scale}, {method.name}, N = {count}, seed {seed}")
        graphdef, state = nnx.split(_network(scale, seed))
        data = sets[seed]
        x, y = (jnp.asarray(a[:count], jnp.float32) for a in (data.x_train, data.y_train))
        state = _train(graphdef, state, x, (y[:, None] + 1) / 2, jax.random.key(seed), method)
        fitted[place] = _judge(graphdef, state, x, y)[0]
        test = (jnp.asarray(a, jnp.float32) for a in (data.x_test, data.y_test))
        accuracy[place], alignment[place] = _judge(graphdef, state, *test)
    found = {
        "counts": _COUNTS,
        "dim": _DIM,
        "chance": _RELEVANT / _DIM,
        "limit": {"accuracy": limit[:, 0], "alignment": limit[:, 1]},
        "scales": _SCALES,
        "methods": [method.name for method in METHODS],
        "accuracy": accuracy,
        "alignment": alignment,
    }
    return Outcome(tuple(_measure(accuracy, alignment, fitted, limit)), found)


def _measure(
    accuracy: Matrix, alignment: Matrix, fitted: Matrix, limit: Matrix
) -> list[Measurement]:
    """What is claimed, with the spread over seeds; arrays (scales, methods, counts, seeds)."""
    large, small = accuracy.mean(axis=3)
    gradient, train, fresh, empirical = range(len(METHODS))
    of_kernel = [gradient, train, empirical]
    at, root = _COUNTS.index(_DIM), np.sqrt(len(_SEEDS))

    def errors(values: Matrix) -> float:
        """The mean over seeds in its standard errors."""
        return float(values.mean() / (values.std(ddof=1) / root))

    slopes = alignment[1, :, -1]
    return [
        above(
            "gradient descent, natural (training set): training samples fitted, smallest share",
            float(fitted[:, [gradient, train]].min()),
            0.99,
        ),
        above(
            "natural (training set), N = D: accuracy less 0.5 of linear models, in standard errors",
            min(errors(accuracy[scale, train, at] - 0.5) for scale in (0, 1)),
            4,
        ),
        above(
            "natural (training set): smallest rise of the accuracy with N",
            float(np.diff(accuracy.mean(axis=3)[:, train]).min()),
            0,
        ),
        below(
            "small weights, all but fresh inputs: accuracy from the kernel's, largest",
            float(np.abs(small[of_kernel] - limit[:, 0]).max()),
            0.03,
        ),
        below(
            "the same: alignment from that of the kernel's linear part, largest",
            float(np.abs(alignment[1, of_kernel].mean(axis=2) - limit[:, 1]).max()),
            0.12,
        ),
        above(
            "NTK scale, all but fresh inputs, N = 2.5 D: accuracy below the kernel's, smallest",
            float((limit[-1, 0] - large[of_kernel, -1]).min()),
            0.04,
        ),
        below(
            "natural (training set): accuracy from gradient descent's, largest",
            float(np.abs(accuracy[:, train] - accuracy[:, gradient]).mean(axis=2).max()),
            0.03,
        ),
        above(
            "small weights, N = 2.5 D: alignment of gradient descent less natural (training set), "
            "in standard errors",
            errors(slopes[gradient] - slopes[train]),
            3,
        ),
        below(
            "the same, difference over that of gradient descent",
            float(1 - slopes[train].mean() / slopes[gradient].mean()),
            0.1,
        ),
        above(
            "the same, natural (training set) less fresh inputs, in standard errors",
            errors(slopes[train] - slopes[fresh]),
            3,
        ),
    ]
