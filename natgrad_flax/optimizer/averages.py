"""Moving averages of the statistics of a structure, and inverses that are renewed now and then.

An average s_t = decay s_{t-1} + (1 - decay) new starts at zero, so it is divided by 1 - decay^t
(Kingma & Ba 2015, Section 3). What is kept is that quotient itself:
s_t / (1 - decay^t) = (1 - w_t) (its predecessor) + w_t new, with w_t = (1 - decay) / (1 - decay^t).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from natgrad_flax.arguments.arrays import batch_size, shapes_of
from natgrad_flax.arguments.instances import call_of, own_subclasses
from natgrad_flax.arguments.scalars import check_integer, check_number, keep_plain
from natgrad_flax.damping import RelativeDamping, damping_as
from natgrad_flax.linalg.dense import full_products
from natgrad_flax.optimizer.gradient import Solved, loss_gradient
from natgrad_flax.optimizer.trees import by_path, moved_by
from natgrad_flax.signals.base import LayerUpdate, layer_updates
from natgrad_flax.signals.capture import linearise, plain_directions
from natgrad_flax.signals.dense import Signals
from natgrad_flax.signals.fisher import Batch, Fisher
from natgrad_flax.signals.gradient import ParameterGradient
from natgrad_flax.signals.microbatches import in_microbatches
from natgrad_flax.signals.stacked import arranged
from natgrad_flax.structures import AveragedStructure, Moments
from natgrad_flax.structures.stacked import stacked, stacking_of


@dataclass(frozen=True)
class MovingAverage:
    """How a structure's statistics are averaged over batches, and how often they are renewed.

    A step at which nothing is renewed costs one gradient and the products with the inverses that
    are kept; a changed damping counts from the next renewal on. EKFAC's scaling is averaged in the
    basis of its time, and enters the inverse at once; when the basis is renewed (every
    ``inverse_every`` steps) that average starts anew with the batch of this step (George et al.
    2018, Algorithm 1, which renews the basis by one batch, too, but here from averaged factors).

    Args:
      decay: weight of the past at a renewal, at least 0 and below 1. At 0 each renewal forgets the
        past, and a layer with more inputs than samples keeps the rows of its factor alone.
      every: steps from one renewal of the statistics to the next.
      inverse_every: steps from one renewal of inverses and eigenbases to the next, a multiple of
        ``every``; None means the same.

    Raises:
      ValueError: a number is out of range, or ``inverse_every`` no multiple of ``every``.

    Example:
      >>> import jax.numpy as jnp, natgrad_flax as ng
      >>> from flax import nnx
      >>> model, loss = ng.MLP((4, 8, 1), rngs=nnx.Rngs(0)), ng.MeanSquaredError()
      >>> x, y = jnp.eye(4), jnp.ones((4, 1))
      >>> average = ng.MovingAverage(decay=0.95, every=1, inverse_every=5)
      >>> options = {"structure": ng.KFAC(), "loss": loss, "damping": 0.1}
      >>> tx = ng.natural_gradient_descent(
      ...     0.1, average=average, example=(model, x), **options
      ... )
      >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
      >>> @nnx.jit
      ... def train_step(model, optimizer, x, y):
      ...     value, grads = nnx.value_and_grad(lambda model: loss(model(x), y))(model)
      ...     optimizer.update(model, grads, module=model, x=x, y=y)
      ...     return value
      >>> values = [train_step(model, optimizer, x, y) for _ in range(20)]
      >>> bool(values[-1] < values[0] / 100)
      True
    """

    decay: float = 0.95
    every: int = 1
    inverse_every: int | None = None

    def __post_init__(self) -> None:
        keep_plain(self)
        check_number("decay", self.decay, positive=False)
        if self.decay >= 1:
            raise ValueError(f"decay must be below 1, got {self.decay!r}")
        check_integer("every", self.every, 1)
        if self.inverse_every is not None:
            check_integer("inverse_every", self.inverse_every, 1)
            if self.inverse_every % self.every:
                raise ValueError(
                    f"inverse_every must be a multiple of every, got {self.inverse_every} and "
                    f"{self.every}: inverses are renewed when statistics are"
                )

    def weight(self, count: Array, dtype: Any) -> Array:
        """w_t of the t-th renewal, shape ()."""
        past = jnp.asarray(self.decay, dtype)
        return (1 - past) / (1 - past ** count.astype(dtype))

    def mix(self, average: Any, new: Any, count: Array) -> Any:
        """The average after the renewal of this number, 1 for the first, in the dtypes it has."""
        if self.decay == 0:
            return _cast_like(average, new)

        def one(old: Array, now: Array) -> Array:
            weight = self.weight(count, old.dtype)
            # the first has nothing before it, and rounding would remain of it
            return jnp.where(count == 1, now, old + weight * (now - old)).astype(old.dtype)

        return jax.tree.map(one, average, new)


class Averages(NamedTuple):
    """What is kept from step to step.

    Attributes:
      renewals: of the factors so far, shape ().
      turns: renewals of what is averaged in the present basis, shape ().
      moments: averages, corrected for their start; without the basis, which is part of the inverse.
      inverse: what ``AveragedStructure.apply`` needs.
    """

    renewals: Array
    turns: Array
    moments: Moments
    inverse: Any


def check_average(average: object, structure: object, example: object) -> None:
    """Raises TypeError or ValueError where a moving average does not serve.

    Raises:
      TypeError: no ``MovingAverage``; a structure that is no function of means; no example.
      ValueError: an example without an average.
    """
    if average is None:
        if example is not None:
            raise ValueError("example= is for average=ng.MovingAverage(...) only")
        return
    if not isinstance(average, MovingAverage):
        raise TypeError(f"average must be an ng.MovingAverage, got {average!r}")
    if not isinstance(structure, AveragedStructure):
        known = own_subclasses(AveragedStructure)  # type: ignore[type-abstract]
        *most, last = [f"ng.{call_of(cls)}" for cls in known]
        raise TypeError(
            "average= needs a structure that means over samples make up: "
            f"{', '.join(most)} or {last}; {getattr(structure, 'name', structure)} solves "
            "each batch by itself, for which ng.Exact() and ng.BlockDiagonal() take momentum="
        )
    if (
        not isinstance(example, tuple)
        or len(example) != 2
        or not isinstance(example[0], nnx.Module)
        or not (leaves := jax.tree.leaves(example[1]))
        or not all(hasattr(leaf, "shape") and hasattr(leaf, "dtype") for leaf in leaves)
    ):
        raise TypeError(
            "average= keeps arrays whose shapes the model decides: pass example=(model, x) with "
            "the model and a batch of inputs, or the shape of one as jax.ShapeDtypeStruct"
        )


@dataclass(frozen=True)
class AveragedStep:
    """One step with averaged statistics, of given settings.

    Attributes:
      average: decay and intervals.
      structure: the Fisher approximation.
      fisher: which Fisher.
    """

    average: MovingAverage
    structure: AveragedStructure
    fisher: Fisher

    def empty(self, model: nnx.Module, x: Any) -> Callable[[Any], Averages]:
        """A function that makes averages of nothing, with the shapes that a model gives them.

        It takes the tree of parameters that move, of which some may be held back.

        Args:
          model: of which only shapes are looked at.
          x: inputs (N, ...), a tree of arrays or of their shapes and dtypes.

        Raises:
          ValueError, TypeError: a model that cannot be served, at once; in the function, a tree
            that is not one of its parameters.
        """
        graphdef, arrays = nnx.split(model)
        # shapes alone, so that the parameters of now are not kept
        state = jax.eval_shape(lambda: arrays)
        inputs, own = shapes_of(x), self.fisher.wrt

        def moments(wrt: Any, state: Any, x: Any) -> tuple[Moments, Any]:
            outputs, backward = linearise(nnx.merge(graphdef, state), x, wrt)
            plain = backward(plain_directions(outputs))
            signals, _ = arranged(plain, None, stacking_of(self.structure))
            structure = stacked(self.structure, signals)
            found = Moments(self._means(structure, signals))
            if structure.has_basis:
                basis = structure.basis(found.factors)
                found = Moments(found.factors, basis, structure.rotated(signals, basis))
            one = jnp.ones((), signals.outputs.dtype)
            inverse = structure.invert(found, one, batch_size(x))
            return found._replace(basis=()), inverse

        whole = jax.eval_shape(partial(moments, own), state, inputs)

        def empty(params: Any) -> Averages:
            moved = moved_by(nnx.merge(graphdef, state), params, own) if by_path(params) else own
            shapes = whole
            if moved is not own:
                shapes = jax.eval_shape(partial(moments, moved), state, inputs)
            start = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
            return Averages(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32), *start)

        return empty

    def _means(self, structure: AveragedStructure, signals: Signals) -> tuple[Any, ...]:
        """The statistics of a batch, or of a microbatch."""
        alone = self.average.decay == 0 and self.fisher.microbatches == 1
        return structure.latest(signals) if alone else structure.statistics(signals)

    def __call__(
        self,
        model: nnx.Module,
        batch: Batch,
        kept: Averages,
        steps: Array,
        damping: Any,
    ) -> tuple[Solved, Averages]:
        """The natural gradient, and what is kept; the outputs at x, of a gradient of its own.

        Args:
          model: the model.
          batch: the arrays of this step.
          kept: of the step before.
          steps: taken before this one.
          damping: a number, or relative.
        """
        fisher = replace(self.fisher, stacking=stacking_of(self.structure))
        shapes = jax.eval_shape(lambda: fisher.signals(model, batch)[0])
        whole = replace(self, structure=stacked(self.structure, shapes), fisher=fisher)
        return whole._step(model, batch, shapes, kept, steps, damping)

    def _step(
        self,
        model: nnx.Module,
        batch: Batch,
        shapes: Signals,
        kept: Averages,
        steps: Array,
        damping: Any,
    ) -> tuple[Solved, Averages]:
        """``__call__`` for signals of which the shapes, stacked or not, are known."""
        every, incoming = self.average.every, batch.gradient

        def aside() -> Averages:
            return self._renew(model, batch, False, kept, steps, damping)[2]

        def held() -> tuple[tuple[LayerUpdate, ...], Array, Averages]:
            found, outputs = loss_gradient(model, batch, self.fisher)
            return layer_updates(shapes.layers, found), outputs, kept

        outputs: Any = None
        if incoming is not None:
            gradient = layer_updates(shapes.layers, incoming)
            after = self._at(steps, every, aside, lambda: kept)
        elif batch.fisher_x is None:
            # one pass gives the statistics and the gradient
            def renewed() -> tuple[tuple[LayerUpdate, ...], Array, Averages]:
                return self._renew(model, batch, True, kept, steps, damping)

            gradient, outputs, after = self._at(steps, every, renewed, held)
        else:
            gradient, outputs, _ = held()
            after = self._at(steps, every, aside, lambda: kept)
        with full_products():
            updates = self.structure.apply(after.inverse, gradient)
        return Solved(updates, shapes, ParameterGradient(gradient), outputs, None), after

    def _at(self, steps: Array, every: int, due: Callable[[], Any], held: Callable[[], Any]) -> Any:
        """One of two results, by whether this step is a multiple of an interval."""
        return due() if every == 1 else jax.lax.cond(steps % every == 0, due, held)

    def _renew(
        self,
        model: nnx.Module,
        batch: Batch,
        own: bool,
        kept: Averages,
        steps: Array,
        damping: Any,
    ) -> tuple[tuple[LayerUpdate, ...], Array, Averages]:
        """The gradient (if the batch is its own) and the outputs of a batch, and what is kept."""
        structure, average, fisher = self.structure, self.average, self.fisher
        arrays, microbatches = fisher.arrays(batch), fisher.microbatches
        size = batch_size(arrays)

        def first_pass(first: Any, *part: Any) -> tuple[Any, Any]:
            signals, residual = fisher.of_microbatch(model, part, first, batch.key, size)
            gradient: Any = ()
            if own:
                assert residual is not None
                gradient = residual.vector(signals.layers)
            with full_products():
                statistics = self._means(self.structure, signals)
            # of several microbatches the layers are not held
            seen = signals if microbatches == 1 else replace(signals, layers=())
            return (statistics, gradient), seen

        (new, gradient), signals = in_microbatches(first_pass, arrays, microbatches)
        counted = signals.num_counted
        _check_shapes(kept.moments.factors, new, size, average.decay == 0)
        count = kept.renewals + 1
        factors = average.mix(kept.moments.factors, new, count)

        turn = full_products()(structure.rotated)

        def rotated(basis: Any) -> Any:
            if microbatches == 1:
                return turn(signals, basis)

            def second_pass(first: Any, *part: Any) -> tuple[Any, tuple[()]]:
                signals, _ = fisher.of_microbatch(model, part, first, batch.key, size)
                return turn(signals, basis), ()

            return in_microbatches(second_pass, arrays, microbatches)[0]

        before = structure.basis_of(kept.inverse)

        def fresh() -> tuple[Any, Any, Array]:
            with full_products():
                basis = structure.basis(factors)
            found = basis, rotated(basis), jnp.ones((), jnp.int32)
            return _cast_like((before, kept.moments.rotated, kept.turns), found)

        def same() -> tuple[Any, Any, Array]:
            turns = kept.turns + 1
            return before, average.mix(kept.moments.rotated, rotated(basis), turns), turns

        interval = average.inverse_every or average.every
        basis, turned, turns = before, kept.moments.rotated, kept.turns
        if structure.has_basis:
            always = 1 if interval == average.every else interval
            basis, turned, turns = self._at(steps, always, fresh, same)
        moments = Moments(factors, basis, turned)

        @full_products()
        def inverted() -> Any:
            rho = damping
            if isinstance(damping, RelativeDamping):
                rho = damping.times(structure.scale_of(moments, counted))
            rho = damping_as(rho, jax.tree.leaves(moments)[0].dtype)
            return _cast_like(kept.inverse, structure.invert(moments, rho, counted))

        always = 1 if structure.cheap_inverse or interval == average.every else interval
        inverse = self._at(steps, always, inverted, lambda: kept.inverse)
        after = Averages(count, turns, moments._replace(basis=()), inverse)
        return gradient, signals.outputs, after


def _cast_like(kept: Any, new: Any) -> Any:
    """A tree with the dtypes of another one, so that a loop can carry it."""
    return jax.tree.map(lambda old, leaf: leaf.astype(old.dtype), kept, new)


def _check_shapes(kept: Any, new: Any, size: int, rows: bool) -> None:
    """Refuses statistics of other layers or, where they are rows of a batch, of another size."""
    before, now = (jax.tree.map(jnp.shape, entries) for entries in (kept, new))
    if before == now:
        return
    if not rows:
        raise ValueError(
            "the averages that are kept are of other layers than this module has: start them anew, "
            "with init and an example=(model, x) of this model"
        )
    raise ValueError(
        f"average= with decay 0 keeps what is as large as a batch, and example=(model, x) had "
        f"another number of samples than this batch, which has {size}: pass an example with as "
        "many, or a positive decay"
    )
