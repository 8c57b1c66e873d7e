"""Which Fisher information: exact, Monte-Carlo or empirical, as seeded signals and a residual.

All three have the form F = (1/N) sum_n sum_s (J_n^T s)(J_n^T s)^T. The seeds s are what differs:
the columns of R with R R^T = H (exact), residuals of targets drawn from the model (mc), or the
residual of the data (empirical). So a structure needs to know only one kind of signals.
"""

from __future__ import annotations

from typing import Literal, get_args

import jax.numpy as jnp
from flax import nnx
from jax import Array

from natgrad_flax.capture import linearise
from natgrad_flax.losses import Loss
from natgrad_flax.signals import Residual, Signals

FisherKind = Literal["exact", "mc", "empirical"]
FISHER_KINDS: tuple[str, ...] = get_args(FisherKind)


def fisher_signals(
    model: nnx.Module,
    x: Array,
    y: Array,
    *,
    loss: Loss,
    fisher: FisherKind = "exact",
    key: Array | None = None,
    num_samples: int = 1,
) -> tuple[Signals, Residual]:
    """Signals seeded by a factor of the Fisher, and the loss residual.

    Args:
      model: any module built of layers with signals.
      x: inputs, shape (N, ...).
      y: targets, shape (N, C).
      loss: the loss.
      fisher: "exact" (S = C, or C - 1 for softmax), "mc" (S = num_samples) or "empirical" (S = 1).
      key: randomness of "mc".
      num_samples: drawn targets a sample for "mc".

    Returns:
      Signals with F = J^T J / N, J the seeded Jacobian; and the residual.

    Raises:
      TypeError, ValueError: as in ``linearise``; outputs that do not have the shape of y.
    """
    outputs, backward = linearise(model, x)
    if outputs.shape != y.shape:
        raise ValueError(f"the model returns {outputs.shape}, but y has shape {y.shape}")
    residual = loss.residual(outputs, y)
    if fisher == "exact":
        signals = backward(jnp.swapaxes(loss.factor(outputs), 1, 2))
        return signals, Residual(loss.coefficients(outputs, y), None)
    if fisher == "empirical":
        ones = jnp.ones((outputs.shape[0], 1), outputs.dtype)
        return backward(residual[:, None, :]), Residual(ones, None)
    assert key is not None
    seeds = jnp.swapaxes(loss.sample(key, outputs, num_samples), 1, 2)
    both = backward(jnp.concatenate([seeds, residual[:, None, :]], axis=1))
    directions = tuple(layer.derivatives[:, -1] for layer in both.layers)
    return both.take_seeds(num_samples), Residual(None, directions)
