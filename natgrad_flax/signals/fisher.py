"""Which Fisher information: exact, Monte-Carlo or empirical, as output directions of signals.

All have the form F = (1/N) sum_n sum_s (J_n^T s)(J_n^T s)^T. The output directions s are
what differs: the columns of R with R R^T = H (exact), residuals of targets drawn from the model
(mc), or the residual of the data (empirical), over its norm (improved: Wu et al. 2024, whose
step lowers every loss alike and not most where it is largest). So a structure knows only one kind
of signals.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from natgrad_flax.arguments.arrays import batch_size
from natgrad_flax.arguments.scalars import check_integer
from natgrad_flax.damping import is_zero
from natgrad_flax.losses import AnyLoss, Heads, LossLike, check_losses
from natgrad_flax.losses.by_head import (
    check_all_values,
    checked_targets,
    checked_weights,
    in_range,
    output_terms,
)
from natgrad_flax.losses.targets import relative
from natgrad_flax.signals.capture import linearise
from natgrad_flax.signals.dense import Signals
from natgrad_flax.signals.gradient import Residual
from natgrad_flax.signals.microbatches import Passes, in_microbatches
from natgrad_flax.signals.model import Path, hashable_filter, with_heads
from natgrad_flax.signals.shared import weigh_rows
from natgrad_flax.signals.stacked import Stacking, arranged

FisherKind = Literal["exact", "mc", "empirical", "improved"]
FISHER_KINDS: tuple[str, ...] = get_args(FisherKind)
OF_TARGETS: tuple[str, ...] = ("empirical", "improved")
"""Kinds whose one direction a sample is made of the data's residual."""


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


class Batch(NamedTuple):
    """The arrays of one step.

    Attributes:
      x: inputs, a tree of arrays (N, ...).
      y: targets, shape (N, ..., C), or class numbers (N, ...); None where nothing is made of them.
        Of several heads a tuple, as all that belongs to outputs.
      weights: of samples (N,) or of positions (N, ...), None for the plain mean.
      fisher_x: inputs (N', ...) of the Fisher, None where it is that at x.
      fisher_y: their targets, for the empirical Fisher.
      fisher_weights: their weights.
      key: draws the targets of a Monte-Carlo Fisher.
      gradient: g by the paths of the parameters; None for that of the loss at x and y.
    """

    x: Any
    y: Any
    weights: Any = None
    fisher_x: Any = None
    fisher_y: Any = None
    fisher_weights: Any = None
    key: Array | None = None
    gradient: dict[Path, Array] | None = None

    def map_samples(self, function: Callable[[Any], Any]) -> Batch:
        """With a function of the trees of arrays whose first axis counts samples."""
        samples, single = self[:6], self[6:]
        return Batch._make((*(function(tree) for tree in samples), *single))


@dataclass(frozen=True)
class Fisher:
    """Which Fisher information of a model is taken.

    Attributes:
      loss: what the outputs mean.
      kind: "exact" (S = C, or C - 1 for softmax), "mc" (S = samples), "empirical" or
        "improved" (S = 1).
      samples: targets drawn a sample, for "mc".
      wrt: filter of the parameters.
      microbatches: how many, one after the other, the model runs a batch in.
      stacking: which layers of a loop have their signals together.
    """

    loss: AnyLoss
    kind: FisherKind = "exact"
    samples: int = 1
    wrt: Any = nnx.Param
    microbatches: int = 1
    stacking: Stacking = "none"

    @property
    def made_of_targets(self) -> bool:
        """Whether the Fisher itself looks at targets of data."""
        return self.kind in OF_TARGETS or (self.kind == "exact" and self.loss.needs_targets)

    @property
    def in_span(self) -> bool:
        """Whether the residual lies in the span of the output directions."""
        return self.kind in OF_TARGETS or (self.kind == "exact" and self.loss.in_span)

    def bound(self, model: nnx.Module, x: Any) -> tuple[nnx.Module, Fisher]:
        """The model with its outputs in one array, and the Fisher that knows the heads in it.

        Args:
          model: the model.
          x: inputs, a tree of arrays (N, ...).

        Raises:
          DoesNotRunError, ValueError, TypeError: as ``with_heads``.
        """
        if not isinstance(self.loss, Heads):
            return model, self
        model, loss = with_heads(model, x, self.loss)
        return model, replace(self, loss=loss)

    def needs_targets(self, batch: Batch) -> bool:
        """Whether anything is made of y."""
        own = batch.fisher_x is None
        return batch.gradient is None or (self.made_of_targets and own)

    def arrays(self, batch: Batch) -> tuple[Any, Any, Any]:
        """Inputs, targets and weights, over their mean, at which the Fisher is taken.

        Without targets it has no residual.
        """
        if batch.fisher_x is not None:
            return batch.fisher_x, batch.fisher_y, jax.tree.map(relative, batch.fisher_weights)
        y = batch.y if self.needs_targets(batch) else None
        return batch.x, y, jax.tree.map(relative, batch.weights)

    def signals(
        self, model: nnx.Module, batch: Batch, passes: Passes = in_microbatches
    ) -> tuple[Signals, Residual | None]:
        """Signals of the output directions, and the residual of the loss where there are targets.

        Args:
          model: the model.
          batch: the arrays.
          passes: how the batch runs through the model.
        """
        arrays = self.arrays(batch)
        size = batch_size(arrays)

        def run(first: Array | int, *part: Any) -> tuple[tuple[()], Any]:
            return (), self.of_microbatch(model, part, first, batch.key, size)

        _, found = passes(run, arrays, self.microbatches)
        return found

    def of_microbatch(
        self,
        model: nnx.Module,
        arrays: tuple[Any, ...],
        first: Array | int,
        key: Array | None,
        batch_size: int,
    ) -> tuple[Signals, Residual | None]:
        """``signals`` of some samples of ``arrays``, the first of which has a given number.

        A model is traced once for shapes that it has seen: checks before a step look at the same
        program.
        """
        graphdef, state = nnx.split(model)
        plain = Fisher(self.loss, self.kind, self.samples, self.wrt)
        signals, residual = _traced(
            state, arrays, first, key, graphdef=graphdef, fisher=plain, size=batch_size
        )
        return arranged(signals, residual, self.stacking)

    def in_range(
        self, signals: Signals, residual: Residual | None, damping: Any
    ) -> tuple[Signals, Residual | None]:
        """What a zero damping leaves of an exact Fisher and of its residual; all at a positive one.

        The pseudo-inverse drops the component of the gradient outside of the Fisher's range.
        A class whose probability is 0 to rounding has no Fisher, but the residual of a wrong label.
        """
        if self.kind != "exact" or not is_zero(damping):
            return signals, residual
        inside = in_range(self.loss, signals.outputs)
        if inside is None:
            return signals, residual
        kept = inside.astype(signals.outputs.dtype)
        eye = jnp.eye(kept.shape[1], dtype=kept.dtype)
        signals = signals.mix_directions(kept[:, :, None] * eye)
        if residual is None:
            return signals, None
        assert residual.coefficients is not None
        return signals, Residual(jnp.where(inside, residual.coefficients, 0), None)

    def _directions(
        self,
        model: nnx.Module,
        arrays: tuple[Any, ...],
        first: Any,
        key: Array | None,
        size: int,
    ) -> tuple[Signals, Residual | None]:
        x, y, weights = arrays
        outputs, pull_back = linearise(model, x, self.wrt)
        terms = output_terms(self.loss, outputs, y, weights)

        def backward(directions: Array) -> Signals:
            signals = pull_back(directions)
            return signals if terms.weights is None else weigh_rows(signals, terms.weights)

        if self.kind == "empirical":
            residual = terms.residual()
            ones = jnp.ones((outputs.shape[0], 1), outputs.dtype)
            return backward(residual[:, None]), Residual(ones, None)
        if self.kind == "improved":
            seeds, lengths = _normalised(terms.residual(), terms.weights)
            return backward(seeds[:, None]), Residual(lengths[:, None], None)
        if self.in_span:
            signals = backward(terms.directions())
            return signals, None if y is None else Residual(terms.coefficients(), None)
        own = None if y is None else terms.residual()
        if self.kind == "exact":
            directions = terms.directions()
        else:
            assert key is not None
            directions = terms.drawn(key, self.samples, first, size)
        if own is None:
            return backward(directions), None
        both = backward(jnp.concatenate([directions, own[:, None]], axis=1))
        cotangents = tuple(layer.cotangent(-1) for layer in both.layers)
        return both.take_directions(directions.shape[1]), Residual(None, cotangents)


def _normalised(residual: Array, weights: Array | None) -> tuple[Array, Array]:
    """r_n / |r_n| with the root of the sample's mean weight, and what makes r_n of it.

    A sample without a residual has no direction.

    Args:
      residual: r, weighted, shape (N, ...).
      weights: (N, T), or None.
    """
    axes = tuple(range(1, residual.ndim))
    squares = jnp.sum(residual**2, axis=axes)
    root = jnp.ones_like(squares)
    if weights is not None:
        root = jnp.sqrt(jnp.mean(weights, axis=1))
    some = (squares > 0) & (root > 0)
    norm = jnp.sqrt(jnp.where(some, squares, 1))
    scale = jnp.where(some, root / norm, 0)
    lengths = jnp.where(some, norm / jnp.where(some, root, 1), 0)
    return residual * jnp.expand_dims(scale, axes), lengths


@partial(jax.jit, static_argnames=("fisher", "size"), inline=True)
def _traced(
    state: Any,
    arrays: tuple[Any, ...],
    first: Array | int,
    key: Array | None,
    *,
    graphdef: Any,
    fisher: Fisher,
    size: int,
) -> tuple[Signals, Residual | None]:
    return fisher._directions(nnx.merge(graphdef, state), arrays, first, key, size)


def fisher_signals(
    model: nnx.Module,
    x: Any,
    y: Any,
    *,
    loss: LossLike,
    fisher: FisherKind = "exact",
    key: Array | None = None,
    num_samples: int = 1,
    wrt: Any = nnx.Param,
    microbatches: int = 1,
    weights: Any = None,
) -> tuple[Signals, Residual]:
    """Signals of the output directions of a Fisher, and the loss residual.

    Of these two a structure makes its step: ``structure.solve(signals, residual, damping)``.

    Args:
      model: any module; the output of a sample must not depend on the other samples.
      x: inputs, an array (N, ...) or a tree of them.
      y: targets, shape (N, ..., C), or class numbers (N, ...) where the loss takes them.
      loss: the loss, or those of several heads.
      fisher: "exact" (S = C, or C - 1 for softmax, a position), "mc" (S = num_samples),
        "empirical" or "improved" (S = 1).
      key: randomness of "mc".
      num_samples: drawn targets a sample for "mc".
      wrt: filter of the parameters.
      microbatches: parts in which the model runs, a divisor of N; they change nothing but memory.
      weights: of samples (N,) or of positions (N, ...), 0 or positive; None for the plain mean.

    Returns:
      Signals with F = J^T J / N, J the Jacobian of the output directions; and the residual.

    Raises:
      TypeError, ValueError: as in ``linearise``; outputs that do not have the shape of y; an
        unknown Fisher, or "mc" without a key.

    Example:
      >>> import jax, jax.numpy as jnp, natgrad_flax as ng
      >>> from flax import nnx
      >>> model, loss = ng.MLP((4, 8, 3), rngs=nnx.Rngs(0)), ng.SoftmaxCrossEntropy()
      >>> x, labels = jnp.eye(4), jnp.array([0, 1, 2, 0])
      >>> signals, residual = ng.fisher_signals(model, x, labels, loss=loss)
      >>> signals.layers[0].derivatives.shape  # C - 1 = 2 directions of softmax
      (4, 2, 8)
      >>> drawn = {"fisher": "mc", "key": jax.random.key(0)}
      >>> sampled, _ = ng.fisher_signals(model, x, labels, loss=loss, **drawn)
      >>> sampled.layers[0].derivatives.shape
      (4, 1, 8)
    """
    check_kind(fisher)
    check_key(fisher, key)
    loss = check_losses(loss)
    settings = Fisher(
        loss,
        fisher,
        check_integer("num_samples", num_samples, 1),
        hashable_filter(wrt),
        microbatches,
    )
    n = batch_size(x)
    weights = checked_weights(loss, weights, n)
    y = checked_targets(loss, y, n)
    check_all_values(loss, y, weights)
    batch = Batch(x, y, weights, key=key)
    model, settings = settings.bound(model, x)
    signals, residual = settings.signals(model, batch)
    assert residual is not None
    return signals, residual
