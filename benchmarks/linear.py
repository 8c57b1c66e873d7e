"""What a natural-gradient step of a deep linear network costs, as the ratio to one SGD step.

The exact natural gradient of Bernacchia et al. (2018), undamped (Eq. 16) and damped (Eqs. 20, 21),
and their online algorithm with one sampled backward pass. All steps are optax updates that are
jitted as in training, on one network and batch, timed alternately in one process.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from numpy.typing import NDArray

import natgrad_flax as ng
from benchmarks.common import StepSuite, by_profile
from benchmarks.programs import (
    LEARNING_RATE,
    Steps,
    alternate,
    check_finite,
    flops,
    temporary_bytes,
)
from natgrad_flax.linear import deep_linear_descent, online_natural_gradient_descent

DAMPING = ng.LevenbergMarquardt(initial=0.01)

OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformationExtraArgs]] = {
    "exact": lambda: deep_linear_descent(LEARNING_RATE),
    "damped": lambda: deep_linear_descent(LEARNING_RATE, damping=DAMPING),
    "online": lambda: online_natural_gradient_descent(LEARNING_RATE, damping=DAMPING),
}

CASES = by_profile(
    smoke=(["exact"], [8], [3], [256]),
    fast=(list(OPTIMIZERS), [100], [16], [1000]),
    regular=(list(OPTIMIZERS), [100, 400], [4, 16], [1000, 4000]),
    large=(list(OPTIMIZERS), [100, 1000], [4, 16], [1000, 10_000]),
)
REPEATS = by_profile(smoke=1, fast=15, regular=15, large=15)

SEED = 0
SAMPLES_A_UNIT = 10
"""Least samples over the width with which the online algorithm can be checked."""
TOLERANCE = 0.02
"""Most of |G u - g| / |g| for steps without randomness; rounding leaves less than a tenth of it."""

Kernels = Sequence[NDArray[np.floating]]


class LinearStep(StepSuite):
    """A natural-gradient step of a linear network of equal widths, beside an SGD step.

    A rise of the ratio says that the closed form got dearer. At width 100, 16 layers and 1000
    samples an exact step is to stay within 4 SGD steps. Flops and bytes are the compiler's and
    carry no noise.
    """

    params: ClassVar = CASES
    param_names: ClassVar = ["method", "width", "depth", "samples"]
    version = "1"

    def skipped(self, method: str, width: int, depth: int, samples: int) -> str | None:
        if method == "online" and samples < SAMPLES_A_UNIT * width:
            return (
                f"with fewer than {SAMPLES_A_UNIT} samples a unit the sampled moments of errors "
                "are too coarse for a check"
            )
        return None

    def measure(self, method: str, width: int, depth: int, samples: int) -> dict[str, float]:
        model, x, y = make_problem(width, depth, samples)
        steps = prepare(OPTIMIZERS[method](), model, x, y)
        check_step(method, model, x, y, nnx.merge(nnx.graphdef(model), steps.natural()))
        natural, sgd = (np.median(seconds) for seconds in alternate(steps, REPEATS))
        return {
            "ratio": float(natural / sgd),
            "natural": float(natural),
            "sgd": float(sgd),
            "flops": flops(steps.natural_compiled) / 1e9,
            "temporary": temporary_bytes(steps.natural_compiled),
        }


def make_problem(width: int, depth: int, samples: int) -> tuple[nnx.Sequential, Array, Array]:
    """A linear network, inputs and targets, in float32, the same numbers at every call.

    Random orthogonal weights keep a product of many layers far from singular, so that float32 can
    be checked; the last layer has the singular values 1 to 3, and the inputs have a covariance of
    condition number 20, so that the moments of errors and of inputs both count. What a step costs
    does not depend on the numbers.

    Args:
      width: of inputs, outputs and every layer.
      depth: layers.
      samples: of the batch.
    """
    rng = np.random.default_rng(SEED)
    weights = [_orthogonal(rng, width) for _ in range(depth)]
    weights[-1] = weights[-1] * np.linspace(1, 3, width)
    layers = [
        nnx.Linear(width, width, use_bias=False, param_dtype=jnp.float32, rngs=nnx.Rngs(SEED))
        for _ in weights
    ]
    for layer, weight in zip(layers, weights, strict=True):
        layer.kernel[...] = jnp.asarray(weight, jnp.float32)
    deviations = np.exp(-1.5 * np.arange(width) / width)
    x = rng.standard_normal((samples, width)) * deviations @ _orthogonal(rng, width)
    y = x @ rng.standard_normal((width, width)) / math.sqrt(width)
    return nnx.Sequential(*layers), jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)


def _orthogonal(rng: np.random.Generator, size: int) -> NDArray[np.float64]:
    return np.asarray(np.linalg.qr(rng.standard_normal((size, size)))[0])


def prepare(
    optimizer: optax.GradientTransformationExtraArgs, model: nnx.Module, x: Array, y: Array
) -> Steps:
    """Compiles the step of an optimizer; that of SGD compiles at its first call."""
    graphdef, params = nnx.split(model)
    baseline = optax.sgd(LEARNING_RATE)
    step, sgd = (_step(rule, graphdef) for rule in (optimizer, baseline))
    kept, nothing = optimizer.init(params), baseline.init(params)
    start = time.perf_counter()
    natural = step.lower(params, kept, x, y).compile()
    seconds = time.perf_counter() - start
    return Steps(
        params,
        lambda: sgd(params, nothing, x, y)[0],
        lambda: natural(params, kept, x, y)[0],
        natural,
        seconds,
    )


def _step(rule: optax.GradientTransformation, graphdef: Any) -> jax.stages.Wrapped:
    """The jitted step (parameters, state, x, y) -> (parameters, state), as a user writes it."""
    extended = optax.with_extra_args_support(rule)
    loss = ng.MeanSquaredError()

    @jax.jit
    def step(params: nnx.State, kept: Any, x: Array, y: Array) -> tuple[Any, Any]:
        slopes = jax.grad(lambda params: loss(nnx.merge(graphdef, params)(x), y))(params)
        module = nnx.merge(graphdef, params)
        moves, kept = extended.update(slopes, kept, params, module=module, x=x, y=y)
        return optax.apply_updates(params, moves), kept

    return step


def check_step(
    method: str, before: nnx.Sequential, x: Array, y: Array, after: nnx.Sequential
) -> float:
    """Compares a step with the definition in Eqs. 10 and 20, in NumPy and float64.

    L (Lambda_i + r I) u_i (Lambda~_i + r I) must be -dL/dW_i, where u_i is the step over the
    learning rate, Lambda_i and Lambda~_i are the second moments of the inputs and of the model's
    errors, and r is the root of the damping. The online algorithm knows Lambda~_i from one sampled
    error for each of N samples, up to about sqrt(n / N), so its defect is of that size.

    Args:
      method: key of OPTIMIZERS.
      before: the network.
      x: inputs of the batch (N, n).
      y: targets (N, n).
      after: the network after the step.

    Returns:
      The defect |G u - g| / |g| over all layers.

    Raises:
      FloatingPointError: parameters that are not finite.
      ArithmeticError: the step is wrong.
    """
    check_finite(nnx.state(after))
    old, new = (_kernels(model) for model in (before, after))
    taken = [(b - a) / LEARNING_RATE for a, b in zip(old, new, strict=True)]
    root = 0.0 if method == "exact" else math.sqrt(DAMPING.initial)
    error = _defect(old, taken, np.asarray(x, np.float64), np.asarray(y, np.float64), root)
    allowed = TOLERANCE
    if method == "online":
        allowed += 2 * math.sqrt((x.shape[1] + 1) / len(x))
    if not error <= allowed:
        raise ArithmeticError(
            f"the {method} step u is wrong: with the metric G of Eq. 20 and the gradient g, "
            f"|G u - g| / |g| = {error:.3g} (at most {allowed:.3g})"
        )
    return error


def _kernels(model: nnx.Sequential) -> Kernels:
    return [np.asarray(layer.kernel[...], np.float64) for layer in model.layers]  # type: ignore[attr-defined]


def _defect(
    weights: Kernels, taken: Kernels, x: NDArray[np.float64], y: NDArray[np.float64], root: float
) -> float:
    depth, eye = len(weights), np.eye(len(weights[0]))
    before, after = [eye], [eye]
    for first, last in zip(weights[:-1], weights[:0:-1], strict=True):
        before.append(before[-1] @ first)
        after.append(last @ after[-1])
    after.reverse()
    seen = x.T @ (y - x @ before[-1] @ weights[-1]) / len(x)
    moment = x.T @ x / len(x)
    rest, size = 0.0, 0.0
    for a, b, step in zip(before, after, taken, strict=True):
        inputs, errors = a.T @ moment @ a + root * eye, b @ b.T + root * eye
        wanted = a.T @ seen @ b.T
        rest += float(np.sum((depth * inputs @ step @ errors - wanted) ** 2))
        size += float(np.sum(wanted**2))
    return math.sqrt(rest / size)
