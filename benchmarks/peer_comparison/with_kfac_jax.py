"""kfac-jax in a worker, on a JAX that it imports on.

Conventions, from its documentation and sources (release 0.0.8): the loss is normalised by the
batch and registered; a squared error is registered as weight |y - f|^2, so ours has the weight 1/2.
Curvature carries 1/N, as ours does, but for ``fisher_empirical``, whose squares are averaged over
the batch twice: it is 1/N of ours (``BlockDiagonalCurvature.update_curvature_matrix_estimate``).
A factor of inputs has the bias last, and kernels are (inputs, units), as ours. Damping is added to
the Fisher; Kronecker factors share it by the pi split of Martens & Grosse (2015), which takes mean
diagonals (``pi_adjusted_kronecker_factors``), other blocks take it whole. Factors are moving
averages, corrected for their start, so those of a first step are the batch's own. A convolution has
the factors of Grosse & Martens (2016), the "expand" form.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.peer_comparison.exchange import Array, Problem

RATE = 1e-3
"""Learning rate of the steps."""

MODES = {"exact": "fisher_exact", "empirical": "fisher_empirical", "mc": "fisher_empirical"}
"""How it estimates each Fisher; the Monte-Carlo one of given draws is the empirical one of them."""

BLOCKS = {"kfac": "TwoKroneckerFactored", "block-diagonal": "Full", "diagonal": "Diagonal"}
"""Endings of the names of its blocks by our structures."""

Params = tuple[tuple[jax.Array, ...], ...]
Batch = tuple[jax.Array, jax.Array]


class Side:
    """kfac-jax on one problem.

    Args:
      problem: the problem; its dtype becomes JAX's.
    """

    def __init__(self, problem: Problem) -> None:
        jax.config.update("jax_enable_x64", problem.x.dtype == np.float64)
        self._problem = problem
        self._batch = (jnp.asarray(problem.x), jnp.asarray(problem.y))
        self._drawn = (self._batch[0], jnp.asarray(problem.drawn))
        self._loss = partial(loss, problem)
        self._training: Training | None = None

    def versions(self) -> dict[str, str]:
        """Of kfac-jax and JAX."""
        return {name: version(name) for name in ("kfac-jax", "jax")}

    def quantity(self, name: str) -> Array:
        """See ``worker.Side``."""
        kind, _, which = name.rpartition("/")
        if name == "gradient":
            return _vector(self._gradient())
        if name == "fisher/exact":
            return self._dense(self._fisher_times)
        if name == "step/kfac/exact":
            training = Training(self._problem, "fisher_exact")
            before = _vector(parameters(self._problem))
            training.step(self._batch)
            return (before - _vector(training.params)) / RATE
        structure = kind.removeprefix("step/")
        # an empirical Fisher that is 1/N of ours needs 1/N of the damping for N times the step
        share = 1.0 if which == "exact" else 1 / self._problem.num_samples
        estimator, state = self._estimate(structure, which)
        if kind != structure:
            rho = self._problem.damping * share
            solved = estimator.multiply_inverse(
                state, self._gradient(), identity_weight=rho,
                exact_power=False, use_cached=False, pmap_axis_name=None,
            )  # fmt: skip
            return _vector(solved) * share
        times = partial(
            estimator.multiply, state, identity_weight=0.0,
            exact_power=True, use_cached=False, pmap_axis_name=None,
        )  # fmt: skip
        if structure == "diagonal":
            return _vector(times(jax.tree.map(jnp.ones_like, parameters(self._problem)))) / share
        return self._dense(times) / share

    def step(self) -> None:
        """A step of the optimizer: factors of a drawn target a sample, inverses, the move."""
        if self._training is None:
            self._training = Training(self._problem, "fisher_gradients")
        self._training.step(self._batch)

    def _gradient(self) -> Params:
        slopes: Params = jax.jit(jax.grad(self._loss))(parameters(self._problem), self._batch)
        return slopes

    def _estimate(self, structure: str, which: str) -> tuple[Any, Any]:
        """The estimator of a structure, and its state after this batch alone."""
        import kfac_jax

        batch = self._drawn if which == "mc" else self._batch
        blocks = {
            kind.lower(): getattr(kfac_jax, f"{kind}{BLOCKS[structure]}")
            for kind in ("Dense", "Conv2D")
        }
        estimator = kfac_jax.BlockDiagonalCurvature(self._loss, layer_tag_to_block_ctor=blocks)
        arguments = (parameters(self._problem), batch)
        key = jax.random.key(0)
        state = estimator.init(key, arguments, None, None)
        update = partial(
            estimator.update_curvature_matrix_estimate,
            ema_old=0.0, ema_new=1.0, identity_weight=0.0,
            batch_size=self._problem.num_samples, estimation_mode=MODES[which],
        )  # fmt: skip
        return estimator, update(state, rng=key, func_args=arguments)

    def _fisher_times(self, vector: Params) -> Params:
        import kfac_jax

        curvature = kfac_jax.ImplicitExactCurvature(self._loss)
        found: Params = curvature.multiply_fisher((parameters(self._problem), self._batch), vector)
        return found

    def _dense(self, times: Callable[[Params], Params]) -> Array:
        """The matrix of a product."""
        from jax.flatten_util import ravel_pytree

        flat, unravel = ravel_pytree(parameters(self._problem))
        eye = jnp.eye(len(flat), dtype=flat.dtype)
        columns = jax.lax.map(lambda row: ravel_pytree(times(unravel(row)))[0], eye)
        return np.asarray(columns).T


class Training:
    """The optimizer in training, renewing factors and inverses at every step.

    Args:
      problem: network and batch.
      mode: its estimation mode.
    """

    def __init__(self, problem: Problem, mode: str) -> None:
        import kfac_jax

        self._optimizer = kfac_jax.Optimizer(
            jax.value_and_grad(partial(loss, problem)),
            l2_reg=0.0,
            estimation_mode=mode,
            inverse_update_period=1,
            num_burnin_steps=0,
        )
        self._key = jax.random.PRNGKey(0)
        self._settings = {
            "learning_rate": jnp.asarray(RATE, problem.x.dtype),
            "momentum": jnp.asarray(0.0, problem.x.dtype),
            "damping": jnp.asarray(problem.damping, problem.x.dtype),
        }
        # a step frees the parameters that it starts from
        self.params = jax.tree.map(jnp.array, parameters(problem))
        self._state: Any = None
        self._steps = 0

    def step(self, batch: Batch) -> None:
        """One step, over when it returns."""
        if self._state is None:
            self._state = self._optimizer.init(self.params, self._key, batch)
        self._key, key = jax.random.split(self._key)
        self.params, self._state, _ = self._optimizer.step(
            self.params, self._state, key, batch=batch,
            global_step_int=self._steps, **self._settings,
        )  # fmt: skip
        self._steps += 1
        jax.block_until_ready(self.params)


def parameters(problem: Problem) -> Params:
    """Kernel and bias of each layer, shaped as ours."""
    return tuple(
        tuple(jnp.asarray(part) for part in (layer.kernel, layer.bias) if part is not None)
        for layer in problem.layers
    )


def loss(problem: Problem, params: Params, batch: Batch) -> jax.Array:
    """The loss of a problem, registered."""
    import kfac_jax

    x, y = batch
    outputs = network(problem, params, x)
    if problem.loss == "cross-entropy":
        kfac_jax.register_softmax_cross_entropy_loss(outputs, y)
        return -jnp.sum(y * jax.nn.log_softmax(outputs)) / len(x)
    kfac_jax.register_squared_error_loss(outputs, y, weight=0.5)
    return jnp.sum((outputs - y) ** 2) / (2 * len(x))


def network(problem: Problem, params: Params, x: jax.Array) -> jax.Array:
    """The outputs, (N, C)."""
    phi = {"relu": jax.nn.relu, "tanh": jnp.tanh}[problem.activation]
    h = x
    for index, (layer, parts) in enumerate(zip(problem.layers, params, strict=True)):
        h = phi(h) if index else h
        if layer.is_convolution:
            h = jax.lax.conv_general_dilated(
                layer.scale * h, parts[0], layer.strides, layer.pads,
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )  # fmt: skip
        else:
            if h.ndim > 2:
                flat = problem.pooling == "flatten"
                h = h.reshape(len(h), -1) if flat else h.mean(axis=(1, 2))
            h = (layer.scale * h) @ parts[0]
        h = h + parts[1] if len(parts) > 1 else h
    return h


def _vector(params: Params) -> Array:
    return np.concatenate([np.asarray(part).reshape(-1) for layer in params for part in layer])
