"""Whether the features of wide networks move: the coordinate check of Yang & Hu 2021."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from jax.typing import ArrayLike

from natgrad_flax import MLP, ConvNet
from natgrad_flax.arguments.scalars import check_integer, check_steps
from natgrad_flax.losses import Loss, LossLike, check_loss
from natgrad_flax.models.sizes import size_tuple
from natgrad_flax.optimizer.checks import check_model_inputs
from ntk_analysis.empirical import Matrix


class MakeModel(Protocol):
    """A network of a given width."""

    def __call__(self, width: int, rngs: nnx.Rngs) -> MLP | ConvNet:
        """The network, with parameters drawn from ``rngs``."""


@dataclass(frozen=True, eq=False)
class CoordinateCheck:
    """How far the pre-activations of every layer moved, against the width.

    Attributes:
      widths: M, ascending.
      changes: the root mean square of u_l(t) - u_l(0) over samples, units and seeds, for each
        width, step t = 1, ..., T and layer, shape (widths, T, L).

    Example:
      >>> import ntk_analysis as na, numpy as np
      >>> changes = np.ones((3, 1, 2)) * np.array([1.0, 0.5, 0.25])[:, None, None]
      >>> # features move as M^{-1/2}: lazy
      >>> na.CoordinateCheck((16, 64, 256), changes).exponents
      array([-0.5, -0.5])
    """

    widths: tuple[int, ...]
    changes: Matrix

    @property
    def exponents(self) -> Matrix:
        """p of changes ~ M^p after the last step, by least squares, shape (L,).

        0 where features move as much at any width, negative where wide networks are lazy, positive
        where they diverge; NaN where a layer did not move, or one width is all.
        """
        if len(self.widths) < 2:
            return np.full(self.changes.shape[2], np.nan)
        logarithms = np.log(self.widths)
        centred = logarithms - logarithms.mean()
        with np.errstate(divide="ignore", invalid="ignore"):
            slopes: Matrix = centred @ np.log(self.changes[:, -1]) / (centred @ centred)
        return np.where(np.isfinite(slopes), slopes, np.nan)


def coordinate_check(
    make: MakeModel,
    widths: Sequence[int],
    x: ArrayLike,
    y: ArrayLike,
    *,
    optimizer: Callable[[nnx.Module], optax.GradientTransformation],
    loss: LossLike,
    steps: int = 3,
    seeds: int = 1,
) -> CoordinateCheck:
    """Trains a network at several widths and compares how far every layer moves.

    In a maximal-update parametrisation (muP) each layer moves by O(1) at any width (Yang & Hu 2021;
    for K-FAC and Shampoo Ishikawa & Karakida 2024); in the standard and the NTK parametrisation
    hidden layers of wide networks hardly move.

    Args:
      make: ``make(width, rngs)`` gives the network of a width, an ``ng.MLP`` or ``ng.ConvNet``.
      widths: at least one, in ascending order.
      x: inputs (N, ...).
      y: targets, as the loss takes them.
      optimizer: from a network to its optax transformation; natural-gradient descent gets its
        batch.
      loss: the loss.
      steps: T, on the whole batch.
      seeds: initialisations of each width, ``nnx.Rngs(0)`` and on.

    Returns:
      The changes; see ``CoordinateCheck``.

    Raises:
      ValueError, TypeError: bad sizes, inputs or targets; widths that do not ascend; a network
        without ``pre_activations``.

    Example:
      >>> import jax.numpy as jnp, natgrad_flax as ng, ntk_analysis as na, optax
      >>> x, y = jnp.eye(4), jnp.ones((4, 1))
      >>> def make(width, rngs):
      ...     return ng.MLP((4, width, width, 1), parametrization="mup", rngs=rngs)
      >>> def optimizer(model):
      ...     return optax.chain(optax.sgd(0.1), ng.scale_by_width(model, "SGD"))
      >>> settings = {"optimizer": optimizer, "loss": ng.MeanSquaredError(), "steps": 2}
      >>> found = na.coordinate_check(make, [8, 64], x, y, **settings)
      >>> found.changes.shape  # widths, steps, layers
      (2, 2, 3)
    """
    what = "positive integers in ascending order"
    sizes = size_tuple("widths", tuple(widths), what)
    if any(one >= other for one, other in itertools.pairwise(sizes)):
        raise ValueError(f"widths must be {what}, got {sizes}")
    steps, seeds = check_steps(steps, minimum=1), check_integer("seeds", seeds, 1)
    squares = []
    for width in sizes:
        models = [make(width, nnx.Rngs(seed)) for seed in range(seeds)]
        if not hasattr(models[0], "pre_activations"):
            raise TypeError(
                "make must give networks that know their pre-activations, an ng.MLP or an "
                f"ng.ConvNet, got a {type(models[0]).__name__}"
            )
        inputs = check_model_inputs(models[0], x, "x")
        run = _program(models[0], optimizer(models[0]), check_loss(loss), steps)
        moved = [run(nnx.state(model), inputs, jnp.asarray(y)) for model in models]
        squares.append(np.mean(np.asarray(moved, np.float64), axis=0))
    return CoordinateCheck(sizes, np.sqrt(np.stack(squares)))


def _program(
    model: MLP | ConvNet, optimizer: optax.GradientTransformation, loss: Loss, steps: int
) -> Callable[[Any, Array, Array], Array]:
    """From parameters, x and y to mean squares of the changes by step and layer, shape (T, L)."""
    tx = optax.with_extra_args_support(optimizer)
    graphdef = nnx.graphdef(model)

    @jax.jit
    def run(start: Any, x: Array, y: Array) -> Array:
        before = nnx.merge(graphdef, start).pre_activations(x)

        def step(carry: Any, _: None) -> tuple[Any, Array]:
            params, state = carry
            gradient = jax.grad(lambda p: loss(nnx.merge(graphdef, p)(x), y))(params)
            module = nnx.merge(graphdef, params)
            update, state = tx.update(gradient, state, params, module=module, x=x, y=y)
            params = optax.apply_updates(params, update)
            after = nnx.merge(graphdef, params).pre_activations(x)
            moves = [jnp.mean((u - v) ** 2) for u, v in zip(after, before, strict=True)]
            return (params, state), jnp.stack(moves)

        return jax.lax.scan(step, (start, tx.init(start)), length=steps)[1]

    return run
