"""The frame of the optax transformations that need the batch: settings over steps, damping."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array

from natgrad_flax.arguments.arrays import own_promotion
from natgrad_flax.arguments.scalars import as_number, at_step, is_traced_number
from natgrad_flax.damping import LevenbergMarquardt, RelativeDamping
from natgrad_flax.losses import AnyLoss
from natgrad_flax.losses.by_head import fitted_to
from natgrad_flax.optimizer.checks import check_needed_batch
from natgrad_flax.optimizer.quadratic_model import QuadraticModel, Terms
from natgrad_flax.optimizer.trees import as_state, by_path, leaf_names, moved_by
from natgrad_flax.optimizer.variables import whole_model
from natgrad_flax.signals.model import DoesNotRunError, Path, outputs_of

Damping: TypeAlias = float | optax.Schedule | RelativeDamping | LevenbergMarquardt


class NaturalGradientState(NamedTuple):
    """State of every transformation of natgrad."""

    steps: Array  # shape=(), dtype=int32; steps taken
    damping: Array  # shape=(), dtype=float32; the damping of the next step, adaptive or not
    key: Array  # a jax.random key; draws the targets of a Monte-Carlo Fisher
    kept: Any = ()  # what a method keeps from step to step
    before: Any = ()  # the last step, for the momentum of ng.QuadraticModel


class Step(NamedTuple):
    """A direction of all layers, and what adaptive damping asks of it."""

    direction: Mapping[Path, Mapping[str, Array]]  # downhill, at a learning rate of 1
    slope: Callable[[], Array]  # the sum of its inner products with minus the gradients
    change: Callable[[Array | float, Any], Array]  # L_new - L_old on this batch, by rate and step
    kept: Any = ()
    model: Callable[[Sequence[Any]], Terms] | None = None  # the quadratic one, along directions


Compute = Callable[..., Step]
"""From module, x, y, the damping of this step, the state and a key, and what else is accepted."""


def transformation(
    name: str,
    learning_rate: optax.ScalarOrSchedule | QuadraticModel,
    damping: Damping,
    loss: AnyLoss,
    seed: int,
    compute: Compute,
    init_kept: Callable[[Any], Any] = lambda params: (),
    accepts: Sequence[str] = (),
    wrt: Any = nnx.Param,
    needs_targets: bool = True,
    max_norm: float | None = None,
) -> optax.GradientTransformationExtraArgs:
    """A transformation whose steps are ``compute``'s, times the learning rate.

    Adaptive damping goes by Bernacchia et al. (2018), Eq. 21, its footnote read so that Delta W_i
    is the update at alpha = 1: the predicted change of the loss is (-alpha + alpha^2 / 2) times
    the slope.

    Args:
      name: of the public function, for errors.
      learning_rate: a number or a schedule over steps, or chosen by ``Step.model``.
      damping: a number, a schedule, adaptive, or what ``compute`` resolves itself.
      loss: targets are checked against it.
      seed: of the keys that ``compute`` gets.
      compute: from module, x, y, the damping of this step, the state and a key to the step.
      init_kept: from parameters to what is kept before the first step.
      accepts: names of extra arguments of ``update`` that ``compute`` takes, too; "wrt", the filter
        of the parameters that this tree of updates moves, and "incoming", the updates by the paths
        of the parameters. The tree must have all parameters of the step.
      wrt: filter of the parameters.
      needs_targets: whether ``compute`` looks at y.
      max_norm: the Euclidean norm that no step exceeds, by a smaller learning rate; not with an
        adaptive damping.
    """
    adaptive = damping if isinstance(damping, LevenbergMarquardt) else None
    quadratic = learning_rate if isinstance(learning_rate, QuadraticModel) else None

    @own_promotion()
    def init(params: optax.Params) -> NaturalGradientState:
        fixed = damping if as_number(damping) is not None or is_traced_number(damping) else 0.0
        start = adaptive.initial if adaptive else fixed
        return NaturalGradientState(
            jnp.zeros((), jnp.int32),
            jnp.asarray(start, jnp.float32),
            jax.random.key(seed),
            init_kept(params),
            jax.tree.map(jnp.zeros_like, params) if quadratic and quadratic.momentum else (),
        )

    @own_promotion()
    def update(
        updates: optax.Updates,
        state: NaturalGradientState,
        params: optax.Params | None = None,
        *,
        module: nnx.Module | Callable[[], nnx.Module] | None = None,
        x: Any = None,
        y: Any = None,
        **extra: Any,
    ) -> tuple[optax.Updates, NaturalGradientState]:
        del params
        if module is None or x is None or (needs_targets and y is None):
            what = "module=model, x=x, y=y" if needs_targets else "module=model, x=x"
            raise ValueError(f"{name} needs the batch: pass {what} to update")
        leaves = by_path(updates)
        if not leaves:
            # all is held back, as by optax.partition for a label that no parameter has
            return updates, state
        module, doubt = whole_model(module, leaves, wrt)
        chosen = moved_by(module, updates, wrt)
        if extra.get("weights") is not None and "weights" not in accepts:
            raise ValueError(f"{name} takes no weights: its samples all count the same")
        x, y, weights = check_needed_batch(module, x, y, extra.get("weights"), loss, needs_targets)
        rho: Any = state.damping if adaptive else at_step(damping, state.steps, "damping")
        key, draw = jax.random.split(state.key)
        given = {**extra, "weights": weights, "wrt": chosen, "incoming": leaves}
        further = {name: given[name] for name in accepts if name in given}
        try:
            found = compute(module, x, y, rho, state, draw, **further)
        except DoesNotRunError as error:
            if not doubt:
                raise
            raise DoesNotRunError(f"{error}. {doubt}") from error
        if sum(map(len, found.direction.values())) > len(leaves):
            raise ValueError(
                f"{name} moves all parameters of the model together, and some are not in the tree "
                "of updates: let it see all of them, outside of optax.masked and optax.partition"
            )
        direction, predicted = as_state(updates, found.direction), None
        if quadratic is not None:
            assert found.model is not None
            rate: Any = 1.0
            step, predicted = quadratic.step(found.model, direction, state.before, rho)
        else:
            rate = at_step(learning_rate, state.steps, "learning_rate")
            if max_norm is not None:
                entries = (leaf for layer in found.direction.values() for leaf in layer.values())
                norm = jnp.sqrt(sum(jnp.vdot(leaf, leaf) for leaf in entries))
                rate = jnp.minimum(rate, max_norm / norm)
            step = jax.tree.map(lambda leaf: (rate * leaf).astype(leaf.dtype), direction)
        following = state.damping
        if adaptive:
            if predicted is None:
                predicted = (-rate + rate**2 / 2) * found.slope()
            change = found.change(rate, step)
            following = adaptive.adapt(state.damping, change, predicted)
            if quadratic is not None:
                # known before it is taken: a step that raises the loss of its own batch is not
                taken = change <= 0
                step = jax.tree.map(lambda leaf: jnp.where(taken, leaf, 0), step)
        elif callable(damping):
            following = jnp.asarray(rho, jnp.float32)
        before = step if quadratic and quadratic.momentum else ()
        return step, NaturalGradientState(state.steps + 1, following, key, found.kept, before)

    return optax.GradientTransformationExtraArgs(init, update)


def change_of_loss(
    loss: AnyLoss,
    module: nnx.Module,
    x: Any,
    y: Any,
    outputs: Array | None,
    weights: Any = None,
) -> Callable[[Array | float, Any], Array]:
    """``Step.change`` by one more forward pass; ``outputs`` are the module's at x."""

    def change(rate: Array | float, step: Any) -> Array:
        del rate
        assert y is not None
        assert outputs is not None
        following = outputs_of(_moved(module, step), x).astype(outputs.dtype)
        targets = fitted_to(loss, y, outputs)
        return loss(following, targets, weights) - loss(outputs, targets, weights)

    return change


def _moved(model: nnx.Module, step: Any) -> nnx.Module:
    """A copy of the model one step further."""
    graphdef, state = nnx.split(model)
    leaves = by_path(step)

    def move(path: tuple[Any, ...], leaf: Array) -> Array:
        name = leaf_names(path)
        return leaf + leaves[name] if name in leaves else leaf

    return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(move, state))
