"""Which Fisher information: exact, Monte-Carlo or empirical, as output directions of signals.

All three have the form F = (1/N) sum_n sum_s (J_n^T s)(J_n^T s)^T. The output directions s are
what differs: the columns of R with R R^T = H (exact), residuals of targets drawn from the model
(mc), or the residual of the data (empirical). So a structure knows only one kind of signals.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from natgrad_flax.arguments.arrays import batch_size
from natgrad_flax.arguments.scalars import check_integer
from natgrad_flax.damping import is_zero
from natgrad_flax.losses import Loss
from natgrad_flax.signals.capture import linearise
from natgrad_flax.signals.dense import Signals
from natgrad_flax.signals.gradient import Residual
from natgrad_flax.signals.microbatches import in_microbatches

FisherKind = Literal["exact", "mc", "empirical"]
FISHER_KINDS: tuple[str, ...] = get_args(FisherKind)


def check_kind(fisher: object) -> None:
    """Raises ValueError on an unknown kind of Fisher."""
    if not (isinstance(fisher, str) and fisher in FISHER_KINDS):
        raise ValueError(f"fisher must be one of {', '.join(FISHER_KINDS)}, got {fisher!r}")


def check_key(fisher: FisherKind, key: object) -> None:
    """Raises ValueError or TypeError where a Monte-Carlo Fisher has no key to draw by."""
    if fisher != "mc":
        return
    if key is None:
        raise ValueError('fisher="mc" draws targets: pass key=jax.random.key(seed)')
    dtype, shape = getattr(key, "dtype", None), getattr(key, "shape", None)
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    if not (shape == () if typed else dtype == jnp.uint32 and shape != ()):
        raise TypeError(f"key must be one key of jax.random, jax.random.key(seed), got {key!r:.60}")


def fisher_signals(
    model: nnx.Module,
    x: Any,
    y: Array,
    *,
    loss: Loss,
    fisher: FisherKind = "exact",
    key: Array | None = None,
    num_samples: int = 1,
    wrt: Any = nnx.Param,
    microbatches: int = 1,
) -> tuple[Signals, Residual]:
    """Signals of the output directions of a Fisher, and the loss residual.

    Args:
      model: any module; the output of a sample must not depend on the other samples.
      x: inputs, an array (N, ...) or a tree of them.
      y: targets, shape (N, C).
      loss: the loss.
      fisher: "exact" (S = C, or C - 1 for softmax), "mc" (S = num_samples) or "empirical" (S = 1).
      key: randomness of "mc".
      num_samples: drawn targets a sample for "mc".
      wrt: filter of the parameters.
      microbatches: parts in which the model runs, a divisor of N; they change nothing but memory.

    Returns:
      Signals with F = J^T J / N, J the Jacobian of the output directions; and the residual.

    Raises:
      TypeError, ValueError: as in ``linearise``; outputs that do not have the shape of y; an
        unknown Fisher, or "mc" without a key.
    """
    check_kind(fisher)
    check_key(fisher, key)
    draw = sampler(loss, key, check_integer("num_samples", num_samples, 1), batch_size(x))

    def run(first: Array | int, x: Any, y: Array) -> tuple[tuple[()], tuple[Signals, Residual]]:
        signals, residual = microbatch_signals(
            model, x, y, first, loss=loss, fisher=fisher, draw=draw, wrt=wrt
        )
        assert residual is not None
        return (), (signals, residual)

    _, found = in_microbatches(run, (x, y), microbatches)
    return found


def population_signals(
    model: nnx.Module,
    x: Any,
    y: Array | None,
    *,
    loss: Loss,
    fisher: FisherKind,
    key: Array | None,
    num_samples: int,
    wrt: Any,
    microbatches: int = 1,
) -> Signals:
    """The signals of ``fisher_signals`` without a residual; targets are for "empirical" only."""
    draw = sampler(loss, key, num_samples, batch_size(x))

    def run(first: Array | int, x: Any, y: Array | None = None) -> tuple[tuple[()], Signals]:
        part = microbatch_signals(model, x, y, first, loss=loss, fisher=fisher, draw=draw, wrt=wrt)
        return (), part[0]

    _, found = in_microbatches(run, (x,) if y is None else (x, y), microbatches)
    return found


Draw = Callable[[Array, Array | int], Array]
"""From the outputs of some samples, and the number of the first, to output directions (n, S, C)."""


def sampler(loss: Loss, key: Array | None, num_samples: int, batch_size: int) -> Draw:
    """Output directions of a Monte-Carlo Fisher that do not depend on the microbatches.

    Targets of a sample depend on its own outputs and on its place in the batch.
    """

    def draw(outputs: Array, first: Array | int) -> Array:
        assert key is not None
        if len(outputs) == batch_size:
            return jnp.swapaxes(loss.sample(key, outputs, num_samples), 1, 2)
        whole = jnp.zeros((batch_size, outputs.shape[1]), outputs.dtype)
        whole = jax.lax.dynamic_update_slice_in_dim(whole, outputs, first, 0)
        drawn = jnp.swapaxes(loss.sample(key, whole, num_samples), 1, 2)
        return jax.lax.dynamic_slice_in_dim(drawn, first, len(outputs))

    return draw


def in_range(
    signals: Signals,
    residual: Residual | None,
    *,
    loss: Loss,
    fisher: FisherKind,
    damping: Any,
) -> tuple[Signals, Any]:
    """What a zero damping leaves of an exact Fisher and of its residual; all at a positive one.

    The pseudo-inverse drops the component of the gradient outside of the Fisher's range. A class
    whose probability is zero to rounding has no Fisher, but the residual of a wrong label.
    """
    if fisher != "exact" or not is_zero(damping):
        return signals, residual
    inside = loss.columns_in_range(signals.outputs)
    if inside is None:
        return signals, residual
    kept = inside.astype(signals.outputs.dtype)
    signals = signals.mix_directions(kept[:, :, None] * jnp.eye(kept.shape[1], dtype=kept.dtype))
    if residual is None:
        return signals, None
    assert residual.coefficients is not None
    return signals, Residual(jnp.where(inside, residual.coefficients, 0), None)


def microbatch_signals(
    model: nnx.Module,
    x: Any,
    y: Array | None,
    first: Array | int,
    *,
    loss: Loss,
    fisher: FisherKind,
    draw: Draw,
    wrt: Any,
) -> tuple[Signals, Residual | None]:
    """``fisher_signals`` of some samples of a batch; without targets there is no residual."""
    outputs, backward = linearise(model, x, wrt)
    if y is not None and outputs.shape != y.shape:
        raise ValueError(f"the model returns {outputs.shape}, but y has shape {y.shape}")
    y = None if y is None else y.astype(outputs.dtype)
    if fisher == "exact":
        signals = backward(jnp.swapaxes(loss.factor(outputs), 1, 2))
        return signals, None if y is None else Residual(loss.coefficients(outputs, y), None)
    if y is None:
        assert fisher == "mc"
        return backward(draw(outputs, first)), None
    residual = loss.residual(outputs, y)
    if fisher == "empirical":
        ones = jnp.ones((outputs.shape[0], 1), outputs.dtype)
        return backward(residual[:, None, :]), Residual(ones, None)
    directions = draw(outputs, first)
    both = backward(jnp.concatenate([directions, residual[:, None, :]], axis=1))
    cotangents = tuple(layer.cotangent(-1) for layer in both.layers)
    return both.take_directions(directions.shape[1]), Residual(None, cotangents)
