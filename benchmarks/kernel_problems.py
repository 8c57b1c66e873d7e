"""What the benchmark of kernels compares: sizes, inputs, and both sides of every row."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from numpy.typing import NDArray

import natgrad_flax as ng
from benchmarks.programs import seconds_of, temporary_bytes
from ntk_analysis._neural_tangents import neural_tangents
from ntk_analysis.analytic import analytic_kernels
from ntk_analysis.empirical import empirical_layer_kernels

WEIGHT_VARIANCE = 2.0

Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class Sizes:
    """What is measured.

    Attributes:
      inputs: M_0.
      samples: N of the infinite-width kernels.
      depth_samples: N of their time as a function of the depth.
      depths: L of the same.
      widths: of the network of the finite-width kernels.
      empirical_samples: N of those.
    """

    inputs: int = 784
    samples: int = 5000
    depth_samples: int = 2000
    depths: tuple[int, ...] = (2, 3, 5, 10, 20)
    widths: tuple[int, ...] = (784, 1024, 1024, 1)
    empirical_samples: int = 200


PROFILE_SIZES: dict[str, Sizes] = {
    "smoke": Sizes(64, 100, 60, (3,), (64, 128, 128, 1), 20),
    "fast": Sizes(784, 1000, 500, (3, 10), (784, 256, 256, 1), 40),
    "regular": Sizes(),
    "large": Sizes(784, 10_000, 5000, (3, 10, 20, 40), (784, 2048, 2048, 1), 200),
}
SIZES = PROFILE_SIZES["regular"]
"""What ``python -m benchmarks.kernels`` measures."""


def make_inputs(samples: int, inputs: int) -> Matrix:
    """Gaussian rows of unit norm, the same at every call."""
    x = np.random.default_rng(0).normal(size=(samples, inputs))
    rows: Matrix = x / np.linalg.norm(x, axis=1, keepdims=True)
    return rows


def make_model(widths: Sequence[int]) -> ng.MLP:
    """A ReLU network without biases, in float32."""
    return ng.MLP(tuple(widths), weight_variance=WEIGHT_VARIANCE, rngs=nnx.Rngs(0))


def deep_model(depth: int, inputs: int) -> ng.MLP:
    """L layers; widths do not matter to infinite-width kernels."""
    return make_model((inputs, *[1] * (depth - 1), 1))


def recursion(x: Any, depth: int, numerics: Any) -> Any:
    """The NTK of a ReLU network without biases, with NumPy or ``jax.numpy``, as one would write it.

    Args:
      x: inputs (N, M_0).
      depth: L.
      numerics: the module whose functions are used.
    """
    covariance = WEIGHT_VARIANCE * (x @ x.T) / x.shape[1]
    # sigma_w^2 = 2 keeps the variances from layer to layer
    variances = numerics.diagonal(covariance)
    scale = numerics.sqrt(variances[:, None] * variances[None, :])
    kernel = covariance
    for _ in range(depth - 1):
        cosine = numerics.clip(covariance / scale, -1, 1)
        angle = numerics.arccos(cosine)
        rest = numerics.pi - angle
        covariance = scale * (numerics.sqrt(1 - cosine**2) + rest * cosine) / numerics.pi
        kernel = covariance + rest / numerics.pi * kernel
    return kernel


def analytic_works(sizes: Sizes) -> dict[str, Callable[[], Any]]:
    """The NTK of three ReLU layers: ours, a jitted recursion on the whole matrix, and NumPy.

    Raises:
      ArithmeticError: two of them disagree.
    """
    x, model = make_inputs(sizes.samples, sizes.inputs), deep_model(3, sizes.inputs)
    jitted = jax.jit(partial(recursion, depth=3, numerics=jnp))

    def by_jax() -> Array:
        with jax.enable_x64(True):
            return jitted(x)

    works: dict[str, Callable[[], Any]] = {
        "ours": lambda: analytic_kernels(model, x, parts=("ntk",)).ntk,
        "jitted jnp": by_jax,
        "NumPy": lambda: recursion(x, 3, np),
    }
    check_equal({name: np.asarray(work()) for name, work in works.items()}, 1e-7)
    return works


def layer_works(x: Matrix, depth: int) -> dict[str, Callable[[], Any]]:
    """The kernels of all layers at infinite width, "layers", and their sum alone, "total"."""
    model = deep_model(depth, x.shape[1])
    return {
        "layers": lambda: analytic_kernels(model, x, parts=("tangent",)).tangent,
        "total": lambda: analytic_kernels(model, x, parts=("ntk",)).ntk,
    }


def check_sum(works: dict[str, Callable[[], Any]]) -> None:
    """Raises ArithmeticError where the layers of ``layer_works`` do not sum to the total."""
    check_equal({"all layers": sum(works["layers"]()), "the whole network": works["total"]()}, 1e-8)


def empirical_works(sizes: Sizes) -> dict[str, Callable[[], Any]]:
    """Finite-width kernels in float64: ours layer by layer, and neural-tangents' whole one.

    Raises:
      ArithmeticError: they disagree.
    """
    model = make_model(sizes.widths)
    x = make_inputs(sizes.empirical_samples, sizes.widths[0])
    contraction, state = _contraction(model)

    def theirs() -> Array:
        with jax.enable_x64(True):
            return contraction(state, jnp.asarray(x))

    works: dict[str, Callable[[], Any]] = {
        "ours": lambda: empirical_layer_kernels(model, x),
        "neural-tangents": theirs,
    }
    check_equal({"ours": sum(works["ours"]()), "neural-tangents": np.asarray(theirs())}, 1e-8)
    return works


def _contraction(model: ng.MLP) -> tuple[Any, nnx.State]:
    """neural-tangents' jitted kernel (parameters, x) -> (N C, N C), and float64 parameters."""
    nt = neural_tangents()
    with jax.enable_x64(True):
        graphdef, state = nnx.split(model)
        state = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), state)
    kernel = nt.empirical_ntk_fn(
        lambda parameters, x: nnx.merge(graphdef, parameters)(x),
        trace_axes=(),
        implementation=nt.NtkImplementation.JACOBIAN_CONTRACTION,
    )

    @jax.jit
    def contracted(parameters: nnx.State, x: Array) -> Array:
        blocks = kernel(x, None, parameters)
        size = blocks.shape[0] * blocks.shape[2]
        return blocks.swapaxes(1, 2).reshape(size, size)

    return contracted, state


def check_equal(kernels: dict[str, Matrix], tolerance: float) -> None:
    """Raises ArithmeticError where kernels differ by more than a part of the largest entry."""
    first, *others = kernels
    scale = np.abs(kernels[first]).max()
    for other in others:
        if not np.abs(kernels[first] - kernels[other]).max() <= tolerance * scale:
            raise ArithmeticError(f"the kernels of {first} and {other} differ")


def empirical_memory(sizes: Sizes) -> dict[str, int]:
    """XLA's temporary memory of both finite-width kernels, each as one program in float64."""
    model = make_model(sizes.widths)
    contraction, state = _contraction(model)
    graphdef = nnx.graphdef(model)

    @jax.jit
    def layers(parameters: nnx.State, x: Array) -> list[Array]:
        signals = ng.jacobian_signals(nnx.merge(graphdef, parameters), x)
        return [layer.gram() for layer in signals.layers]

    with jax.enable_x64(True):
        x = jnp.asarray(make_inputs(sizes.empirical_samples, sizes.widths[0]))
        return {
            "ours": temporary_bytes(layers.lower(state, x).compile()),
            "neural-tangents": temporary_bytes(contraction.lower(state, x).compile()),
        }


def medians(works: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each, alternating, after a first call of each that is not counted."""
    for work in works.values():
        jax.block_until_ready(work())
    found: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            found[name].append(seconds_of(work))
    return {name: statistics.median(times) for name, times in found.items()}
