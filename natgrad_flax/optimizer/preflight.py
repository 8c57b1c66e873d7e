"""Checks of a structure on a batch that need the shapes of signals, and nothing computed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import Array

from natgrad_flax.arguments.arrays import is_concrete
from natgrad_flax.arguments.memory import check_fits
from natgrad_flax.damping import (
    LevenbergMarquardt,
    RelativeDamping,
    check_damping_shape,
    warn_of_rounding,
)
from natgrad_flax.losses import AnyLoss
from natgrad_flax.losses.by_head import check_all_labels, output_terms
from natgrad_flax.optimizer.checks import check_normal
from natgrad_flax.signals.dense import Signals
from natgrad_flax.signals.fisher import Batch, Fisher
from natgrad_flax.signals.microbatches import Passes
from natgrad_flax.signals.model import outputs_of
from natgrad_flax.signals.table_rows import check_rows
from natgrad_flax.structures import Structure
from natgrad_flax.structures.memory import check_signals_fit


def preflight(
    structure: Structure,
    model: nnx.Module,
    fisher: Fisher,
    batch: Batch,
    damping: object,
    size: Callable[[Signals], int] | None = None,
) -> Signals:
    """Checks that need shapes: sizes that cannot fit, couplings that do not match the depth.

    Args:
      structure: the Fisher approximation.
      model: the model.
      fisher: which Fisher.
      batch: arrays, or their shapes.
      damping: as in ``natural_gradient``.
      size: from signals to the side of the largest square array; ``structure.gram_size`` unless
        told.

    Returns:
      The shapes of the signals.

    Raises:
      ValueError: the largest array or the signals do not fit, the structure does not suit the
        network, or the damping has another shape than the structure takes.
    """
    graphdef, state = nnx.split(model)
    # through jit, so that only the first call of a shape is traced
    signals = jax.eval_shape(
        partial(_signals, graphdef=graphdef, fisher=fisher, passes=structure.passes), state, batch
    )
    side = structure.gram_size(signals) if size is None else size(signals)
    check_fits(
        side,
        signals.outputs.dtype.itemsize,
        f"the system that {structure.name} solves",
        structure.system_arrays(signals) if size is None else 2.0,
    )
    if size is None:
        check_signals_fit(structure, signals)
    check_damping_on_batch(structure, signals, damping, inside=fisher.kind != "mc")
    structure.check(signals, damping)
    check_known_numbers(model, fisher.loss, batch, signals)
    _check_curvature(model, fisher, batch)
    return signals


def check_known_numbers(model: nnx.Module, loss: AnyLoss, batch: Batch, signals: Signals) -> None:
    """Refuses numbers of classes and of rows of tables that are known, and none of the model's.

    Args:
      model: the model.
      loss: what class numbers are for.
      batch: arrays, or their shapes.
      signals: of the batch, or their shapes.

    Raises:
      ValueError: a class number below 0, or of no output, whose weight is not 0; a row that a table
        does not have.
    """
    for x, name in ((batch.x, "x"), (batch.fisher_x, "fisher_x")):
        if x is not None:
            check_rows(model, x, signals, name)
    shape = signals.outputs.shape
    if batch.y is not None:
        check_all_labels(loss, batch.y, batch.weights, shape)
    if batch.fisher_y is not None:
        check_all_labels(loss, batch.fisher_y, batch.fisher_weights, shape, "fisher_y")


def _check_curvature(model: nnx.Module, fisher: Fisher, batch: Batch) -> None:
    """Refuses a Hessian that is not positive semi-definite, where all values are known."""
    if not (fisher.kind == "exact" and fisher.loss.needs_targets):
        return
    graphdef, state = nnx.split(model)
    if all(map(is_concrete, jax.tree.leaves((state, batch)))):
        with jax.ensure_compile_time_eval():
            x, y, weights = fisher.arrays(batch)
            outputs = _outputs(state, x, graphdef=graphdef)
            output_terms(fisher.loss, outputs, y, weights).check_curvature()


@jax.jit
def _outputs(state: Any, x: Any, *, graphdef: Any) -> Array:
    return outputs_of(nnx.merge(graphdef, state), x)


def check_damping_on_batch(
    structure: Structure, signals: Signals, damping: Any, *, inside: bool
) -> None:
    """Its shape beside that of the structure's own scale, and its size beside the rounding.

    Args:
      structure: the structure.
      signals: of the batch, or their shapes.
      damping: rho.
      inside: what is solved for lies in the span of the output directions.

    Raises:
      ValueError: another shape than the structure takes, or lost in the precision.
    """
    if callable(damping) or isinstance(damping, (RelativeDamping, LevenbergMarquardt)):
        return
    if np.ndim(damping):
        scale = jax.eval_shape(structure.damping_scale, signals).shape
        check_damping_shape(damping, scale, structure.name, len(signals.layers))
    check_normal(damping, signals.outputs.dtype)
    # a gradient outside of the span of the output directions is divided by the damping (Woodbury)
    margin = max(structure.damping_margin, 1.0 if inside else 100.0)
    warn_of_rounding(damping, signals.outputs.dtype, margin)


@partial(jax.jit, static_argnames=("fisher", "passes"))
def _signals(state: Any, batch: Batch, *, graphdef: Any, fisher: Fisher, passes: Passes) -> Signals:
    return fisher.signals(nnx.merge(graphdef, state), batch, passes)[0]
