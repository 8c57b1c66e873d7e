"""Random deep linear networks with random data, and the explicit side of the checks.

Nothing here uses the formulas of ``natgrad_flax.linear``: gradients and Jacobians are those of
autodiff, the Fisher information is the mean of J_n^T S^{-1} J_n over samples, and inverses are
dense. Samples are rows, as in the library: our W_i is the paper's W_i^T.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from natgrad_flax.linear.deep_linear import Moments, moments
from ntk_analysis.empirical import Matrix
from ntk_analysis.reproduce.ruler import pseudo_inverse

DRAWS = 4
"""Random instances of every shape; the worst of them counts."""
SAMPLES = 20
"""N."""
SQUARE = (3, 3, 3, 3)
WIDE = (3, 5, 4, 2)
"""Every hidden layer is as wide as inputs and outputs."""
BOTTLENECK = (4, 2, 3)
NARROW = (2, 4, 4, 5)
"""No bottleneck, but hidden layers that are narrower than the outputs."""

SETTING = (
    f"W_i = I + G, entries of G from N(0, 1 / (4 n_(i-1))), {SAMPLES} samples of Gaussian x and y, "
    f"random covariances of both, {DRAWS} draws of each shape, float64"
)


@dataclass(frozen=True, eq=False)
class Problem:
    """A linear network with data.

    Attributes:
      weights: W_1..W_L, of shapes (n_{i-1}, n_i).
      x: inputs, shape (N, n_0).
      y: targets, shape (N, n_L).
      covariance: S, that of the model's outputs, shape (n_L, n_L).
    """

    weights: list[Array]
    x: Array
    y: Array
    covariance: Array

    @cached_property
    def data(self) -> Moments:
        """The moments, which the library works on."""
        return moments(self.x, self.y, self.covariance)

    @property
    def depth(self) -> int:
        """L."""
        return len(self.weights)

    @cached_property
    def precision(self) -> Matrix:
        """S^{-1}, shape (n_L, n_L)."""
        inverse: Matrix = np.linalg.inv(np.asarray(self.covariance))
        return inverse

    @cached_property
    def inputs(self) -> Matrix:
        """Sigma, shape (n_0, n_0)."""
        return _second_moment(np.asarray(self.x))

    @cached_property
    def optimum(self) -> Matrix:
        """W*, by least squares, shape (n_0, n_L)."""
        solution: Matrix = np.linalg.lstsq(np.asarray(self.x), np.asarray(self.y), rcond=None)[0]
        return solution

    @cached_property
    def factors(self) -> list[Matrix]:
        """The weights as NumPy arrays."""
        return [np.asarray(factor) for factor in self.weights]

    @cached_property
    def before(self) -> list[Matrix]:
        """A_i = W_1 ... W_{i-1}, shapes (n_0, n_{i-1})."""
        start = np.eye(len(self.factors[0]))
        return list(itertools.accumulate(self.factors[:-1], np.matmul, initial=start))

    @cached_property
    def after(self) -> list[Matrix]:
        """B_i = W_{i+1} ... W_L, shapes (n_i, n_L)."""
        start = np.eye(self.factors[-1].shape[1])
        behind = reversed(self.factors[1:])
        return list(itertools.accumulate(behind, lambda b, w: w @ b, initial=start))[::-1]

    @cached_property
    def product(self) -> Matrix:
        """W, shape (n_0, n_L)."""
        return product_of(self.weights)

    def loss(self, weights: Sequence[Array]) -> float:
        """The loss of a network on the data, written out."""
        return float(_value(weights, self.x, self.y, self.precision))

    def excess(self, product: Any) -> float:
        """L(W) - L_min for a product W (n_0, n_L)."""
        return self.loss([jnp.asarray(product)]) - self.loss([jnp.asarray(self.optimum)])

    def with_unit_noise(self) -> Problem:
        """The same with S = I, for which the loss is the mean squared error."""
        return replace(self, covariance=jnp.asarray(np.eye(self.y.shape[1])))

    @cached_property
    def model(self) -> nnx.Sequential:
        """The network as a Flax module of linear layers without biases."""
        return linear_module(self.weights)

    @cached_property
    def slopes(self) -> list[Matrix]:
        """dL/dW_i of the explicit loss, by autodiff."""
        return [np.asarray(g) for g in _slopes(self.weights, self.x, self.y, self.precision)]

    @cached_property
    def jacobian(self) -> Matrix:
        """d vec W / d theta, shape (n_0 n_L, P)."""
        # that of the outputs is x times it, and x has full column rank
        parts: Matrix = np.tensordot(np.linalg.pinv(np.asarray(self.x)), self.output_jacobian, 1)
        return parts.reshape(-1, parts.shape[2])

    @cached_property
    def output_jacobian(self) -> Matrix:
        """d f / d theta by autodiff, shape (N, n_L, P), parameters of W_1 row by row first."""
        parts = [np.asarray(part) for part in _jacobian(self.weights, self.x)]
        return np.concatenate([part.reshape(*part.shape[:2], -1) for part in parts], axis=2)

    @cached_property
    def fisher(self) -> Matrix:
        """The Fisher information, shape (P, P), by autodiff."""
        jacobian = self.output_jacobian
        weighted = np.einsum("ab,nbp->nap", self.precision, jacobian)
        matrix: Matrix = np.einsum("nap,naq->pq", jacobian, weighted) / len(jacobian)
        return matrix

    @cached_property
    def natural_direction(self) -> Matrix:
        """-d vec W F^+ grad: what the natural gradient does to W, shape (n_0, n_L)."""
        moved = self.jacobian @ pseudo_inverse(self.fisher, symmetric=True) @ flat(self.slopes)
        return -moved.reshape(self.product.shape)

    def push_forward(self, steps: Iterable[Any]) -> Matrix:
        """The change of W under steps of the factors, to first order, shape (n_0, n_L)."""
        return (self.jacobian @ flat(steps)).reshape(self.product.shape)

    def layer_moments(self) -> list[tuple[Matrix, Matrix]]:
        """<x_{i-1}^T x_{i-1}> over the samples and <e_i^T e_i> under the model, for each layer."""
        x = np.asarray(self.x)
        return [
            (_second_moment(x @ a), b @ self.precision @ b.T)
            for a, b in zip(self.before, self.after, strict=True)
        ]


def linear_module(weights: Iterable[Array]) -> nnx.Sequential:
    """The Flax module of linear layers without biases that has these weights."""
    layers = []
    for weight in weights:
        layer = nnx.Linear(
            *weight.shape, use_bias=False, param_dtype=weight.dtype, rngs=nnx.Rngs(0)
        )
        layer.kernel[...] = weight
        layers.append(layer)
    return nnx.Sequential(*layers)


def draw(widths: Sequence[int], seed: int) -> Problem:
    """A random network of the given widths (n_0, ..., n_L), and random data."""
    rng = np.random.default_rng([seed, *widths])

    def near_identity(rows: int, columns: int) -> Matrix:
        noise = rng.standard_normal((rows, columns)) / (2 * np.sqrt(rows))
        matrix: Matrix = np.eye(rows, columns) + noise
        return matrix

    weights = [near_identity(*pair) for pair in itertools.pairwise(widths)]
    inputs, outputs = widths[0], widths[-1]
    x = rng.standard_normal((SAMPLES, inputs)) @ near_identity(inputs, inputs)
    y = rng.standard_normal((SAMPLES, outputs))
    spread = rng.standard_normal((outputs, 3 * outputs))
    covariance = spread @ spread.T / (3 * outputs)
    return Problem([jnp.asarray(w) for w in weights], *map(jnp.asarray, (x, y, covariance)))


def draws(widths: Sequence[int]) -> list[Problem]:
    """The random instances of a shape."""
    return [draw(widths, seed) for seed in range(DRAWS)]


def network(weights: Sequence[Array], x: Array) -> Array:
    """f = x W_1 ... W_L, shape (N, n_L)."""
    return functools.reduce(jnp.matmul, weights, x)


def _loss(weights: Sequence[Array], x: Array, y: Array, precision: Any) -> Array:
    """1/2 <(y - f) S^{-1} (y - f)^T>, written out (Eq. 6)."""
    error = y - network(weights, x)
    return jnp.sum((error @ precision) * error) / (2 * len(x))


_value = jax.jit(_loss)
_slopes = jax.jit(jax.grad(_loss))
_jacobian = jax.jit(jax.jacfwd(network))


def product_of(weights: Iterable[Any]) -> Matrix:
    """W_1 ... W_L by plain products, shape (n_0, n_L)."""
    product: Matrix = functools.reduce(np.matmul, map(np.asarray, weights))
    return product


def flat(arrays: Iterable[Any]) -> Matrix:
    """Arrays as one vector, in the order of the parameters."""
    return np.concatenate([np.ravel(np.asarray(array)) for array in arrays])


def kernels(tree: Any) -> list[Matrix]:
    """The kernels of a tree of parameters of ``Problem.model``, in the order of the layers."""
    return [np.asarray(layer["kernel"]) for _, layer in sorted(tree["layers"].items())]


def parameters(model: nnx.Module) -> Any:
    """The parameters of a module as a tree of arrays."""
    return nnx.as_pure(nnx.state(model, nnx.Param))


def update(transformation: Any, problem: Problem, state: Any = None) -> Any:
    """The step of an optax transformation on a network and its data, and the state after it."""
    graphdef, params = nnx.graphdef(problem.model), parameters(problem.model)
    state = transformation.init(params) if state is None else state
    return _update(
        params, problem.x, problem.y, state, graphdef=graphdef, transformation=transformation
    )


@functools.partial(jax.jit, static_argnames=("graphdef", "transformation"))
def _update(
    params: Any, x: Array, y: Array, state: Any, *, graphdef: Any, transformation: Any
) -> Any:
    model = nnx.merge(graphdef, params)
    return transformation.update(params, state, params, module=model, x=x, y=y)


def _second_moment(rows: Matrix) -> Matrix:
    moment: Matrix = rows.T @ rows / len(rows)
    return moment
