"""Training with the block tri-diagonal Fisher, its damped system solved in two ways.

The system is ((Sigma (x) I) blockdiag(K_1, ..., K_L) / N + rho I) u = 1 (x) (f - y): by the
library's odd-even elimination, or by one plain LU factorisation of the whole L N x L N matrix.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from scipy.linalg import LinAlgWarning, lu_factor, lu_solve

from natgrad_flax import (
    MLP,
    BlockTriDiagonal,
    MeanSquaredError,
    Signals,
    SingularCouplingWarning,
    SmallDampingWarning,
    jacobian_signals,
    natural_gradient,
)
from natgrad_flax.optimizer.trees import as_state
from ntk_analysis.empirical import Matrix

Update = Callable[[MLP, Array, Array, float], Any]
"""From a network, inputs, targets and a damping to G^{-1} dL in the tree of its parameters."""
Precision = Literal["float32", "float64"]

RATE = 0.25
"""The paper's learning rate, 0.5 / alpha with alpha = 2 for four and for five layers."""
_STRUCTURE = BlockTriDiagonal()
_LOSS = MeanSquaredError()


def structured_update(model: MLP, x: Array, y: Array, damping: float) -> Any:
    """The update of ``BlockTriDiagonal``; see ``natural_gradient``."""
    return natural_gradient(model, x, y, structure=_STRUCTURE, loss=_LOSS, damping=damping)


def dense_update(model: MLP, x: Array, y: Array, damping: float) -> Any:
    """The same update by one LU factorisation with pivoting of the coupled L N x L N matrix.

    It works in the precision of the model. A matrix that is singular in this precision gives an
    update that is not finite.

    Args:
      model: the network.
      x: inputs, shape (N, M_0).
      y: targets, shape (N, C).
      damping: rho > 0 in the 1/N convention.
    """
    graphdef, state = nnx.split(model)
    signals: Signals = _signals(state, x, graphdef=graphdef)
    n, depth = signals.num_samples, len(signals.layers)
    grams = [np.asarray(layer.gram()) / n for layer in signals.layers]
    sigma = _STRUCTURE.coupling(depth).astype(grams[0].dtype)
    matrix = np.block(
        [[weight * gram for weight, gram in zip(row, grams, strict=True)] for row in sigma]
    )
    matrix[np.diag_indices_from(matrix)] += matrix.dtype.type(damping)
    residual = np.asarray(signals.outputs - y).reshape(-1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LinAlgWarning)
        factors = lu_factor(matrix, check_finite=False)
    solution = lu_solve(factors, np.tile(residual, depth), check_finite=False) / n
    parts = jnp.asarray(solution).reshape(depth, *signals.outputs.shape)
    updates = {layer.path: layer.vjp(u) for layer, u in zip(signals.layers, parts, strict=True)}
    return as_state(nnx.state(model, nnx.Param), updates)


@partial(jax.jit, static_argnames="graphdef")
def _signals(state: Any, x: Array, *, graphdef: Any) -> Signals:
    return jacobian_signals(nnx.merge(graphdef, state), x)


def train(
    model: MLP,
    update: Update,
    inputs: Matrix,
    targets: Matrix,
    damping: float,
    steps: int,
    precision: Precision = "float32",
) -> Matrix:
    """Train loss before the first and after each step at the learning rate 0.25.

    Args:
      model: the network; it is not changed.
      update: which solver.
      inputs: x, shape (N, M_0).
      targets: y, shape (N, C).
      damping: rho in the 1/N convention.
      steps: number of steps.
      precision: of parameters and solver.

    Returns:
      Shape (steps + 1,), infinite from where the loss ceases to be finite.
    """
    losses = np.full(steps + 1, np.inf)
    with jax.enable_x64(precision == "float64"), warnings.catch_warnings():
        warnings.simplefilter("ignore", SingularCouplingWarning)
        # what rounding makes of dampings that it swallows is what is looked at
        warnings.simplefilter("ignore", SmallDampingWarning)
        x, y = jnp.asarray(inputs, precision), jnp.asarray(targets, precision)
        graphdef, state = nnx.split(nnx.clone(model))
        current = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf.astype(precision), state))
        for t in range(steps + 1):
            loss = float(_LOSS(current(x), y))
            if not np.isfinite(loss):
                break
            losses[t] = loss
            if t < steps:
                step = update(current, x, y, damping)
                params = nnx.state(current, nnx.Param)
                nnx.update(current, jax.tree.map(lambda p, u: p - RATE * u, params, step))
    return losses
