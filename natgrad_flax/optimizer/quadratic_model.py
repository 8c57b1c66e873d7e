"""Learning rate and momentum of a step from the quadratic model of the loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array

from natgrad_flax.arguments.arrays import solve_dtype
from natgrad_flax.arguments.scalars import as_number
from natgrad_flax.losses.by_head import output_terms
from natgrad_flax.losses.targets import relative
from natgrad_flax.optimizer.momentum import SPRING
from natgrad_flax.optimizer.trees import by_path, leaf_names
from natgrad_flax.signals.fisher import Batch, Fisher
from natgrad_flax.signals.microbatches import Passes
from natgrad_flax.signals.model import DoesNotRunError, outputs_of

Terms: TypeAlias = tuple[Array, Array]
"""Of k directions d: d_i^T F d_j, shape (k, k), and the products with the gradient, (k,)."""


@dataclass(frozen=True)
class QuadraticModel:
    """Learning rate and momentum that minimise the quadratic model of the loss, step by step.

    The step is alpha d + mu d_before, of the direction d = -G^{-1} g of the structure and the step
    before, with the alpha and mu at which g . step + step^T (F + rho I) step / 2 is least (Martens
    & Grosse 2015, Sections 6.4 and 7). F is the exact Fisher of the batch, through the network and
    not through the structure, so a direction that is too long gets a small alpha. It costs a
    forward pass with two tangents, about one step of gradient descent, and where a
    ``jax.custom_vjp`` in the model refuses them two backward passes instead. rho is the damping
    where that is one number, and 0 for an ``ng.RelativeDamping``.

    Beside ``ng.LevenbergMarquardt`` rho is adapted by how well this model predicts, and a step that
    would raise the loss of its own batch is not taken. That is what ``ng.natural_gradient_descent``
    does without a learning rate and a damping.

    Args:
      momentum: whether the step before is taken along.

    Raises:
      TypeError: no bool.

    Example:
      >>> import natgrad_flax as ng
      >>> tx = ng.natural_gradient_descent(
      ...     ng.QuadraticModel(),
      ...     structure=ng.KFAC(last_layer="literal", split="pi"),
      ...     damping=ng.LevenbergMarquardt(),
      ...     loss=ng.SoftmaxCrossEntropy(),
      ...     fisher="mc",
      ... )
    """

    momentum: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.momentum, bool):
            raise TypeError(f"momentum must be True or False, got {self.momentum!r}")

    def step(
        self, model: Callable[[Sequence[Any]], Terms], direction: Any, before: Any, damping: Any
    ) -> tuple[Any, Array]:
        """The step, and the change of the loss that the model predicts, which is negative.

        Args:
          model: F and the gradient along directions.
          direction: d, a tree of updates.
          before: the step before, the same tree, of zeros at the first step; without momentum ().
          damping: rho; anything but one number counts as 0.
        """
        directions = [direction, before] if self.momentum else [direction]
        curvature, slopes = model(directions)
        if as_number(damping) is not None or (isinstance(damping, Array) and not damping.ndim):
            rho = jnp.asarray(damping, curvature.dtype)
            curvature = curvature + rho * _inner_products(directions, curvature.dtype)
        factors = _minimiser(curvature, slopes)

        def combine(*leaves: Array) -> Array:
            parts = [f * leaf for f, leaf in zip(factors, leaves, strict=True)]
            return sum(parts[1:], start=parts[0]).astype(leaves[0].dtype)

        return jax.tree.map(combine, *directions), factors @ slopes / 2


def quadratic_terms(
    model: nnx.Module, batch: Batch, fisher: Fisher, passes: Passes, directions: Sequence[Any]
) -> Terms:
    """The Fisher of x along directions, and their products with the gradient.

    Args:
      model: the model.
      batch: x, y and weights count; its gradient in place of that of the loss, where there is one.
      fisher: whose loss, parameters and microbatches count.
      passes: how the batch runs through the model.
      directions: trees of updates.
    """
    graphdef, chosen, rest = nnx.split(model, fisher.wrt, ...)  # type: ignore[misc]
    leaves = [by_path(direction) for direction in directions]

    def stack(path: tuple[Any, ...], leaf: Array) -> Array:
        return jnp.stack([tree[leaf_names(path)].astype(leaf.dtype) for tree in leaves])

    tangents = jax.tree_util.tree_map_with_path(stack, chosen)

    def run(first: Array | int, x: Any, y: Any, weights: Any) -> tuple[Terms, tuple[()]]:
        del first

        def forward(state: Any) -> Array:
            # a merge without a copy keeps the Variables of rest, which belong to another trace
            return outputs_of(nnx.merge(graphdef, state, rest, copy=True), x)

        computed, images = _images(forward, chosen, tangents)
        dtype = solve_dtype(computed.dtype, *(leaf.dtype for leaf in jax.tree.leaves(chosen)))
        terms = output_terms(fisher.loss, computed.astype(dtype), y, weights)
        images = images.astype(dtype)
        curvature = _between(terms.curvature, images)
        if batch.gradient is not None:
            return (curvature, jnp.zeros(len(images), dtype)), ()
        return (curvature, jnp.stack([terms.slope(image) for image in images])), ()

    weights = jax.tree.map(relative, batch.weights)
    (curvature, slopes), _ = passes(run, (batch.x, batch.y, weights), fisher.microbatches)
    if batch.gradient is not None:
        given = batch.gradient
        slopes = jnp.stack(
            [sum(jnp.vdot(tree[name], given[name]) for name in tree) for tree in leaves]
        ).astype(curvature.dtype)
    return curvature, slopes


def _images(forward: Callable[[Any], Array], chosen: Any, tangents: Any) -> tuple[Array, Array]:
    """Outputs f of parameters, and J times each of some tangents.

    Raises:
      ValueError: derivatives by forward mode are refused (``jax.custom_vjp``), and the rule for
        reverse mode has none of its own.
    """
    along = jax.vmap(lambda tangent: jax.jvp(forward, (chosen,), (tangent,)), out_axes=(None, 0))
    try:
        return along(tangents)
    except DoesNotRunError as error:
        if "forward-mode" not in str(error):
            raise
        refused = error
    # J t is the derivative of <J^T v, t> by v
    outputs, backward = jax.vjp(forward, chosen)
    try:
        _, transposed = jax.vjp(lambda v: backward(v)[0], jnp.zeros_like(outputs))
        (images,) = jax.vmap(transposed)(tangents)
    except (TypeError, ValueError, NotImplementedError):
        raise ValueError(
            "ng.QuadraticModel needs J times a direction, but a jax.custom_vjp of the model has "
            "neither derivatives by forward mode nor a rule for reverse mode that JAX can "
            "differentiate: give a learning rate, or define a jax.custom_jvp"
        ) from refused
    return outputs, images


def check_one_momentum(learning_rate: object, spring: SPRING | None) -> None:
    """Raises ValueError on a quadratic model beside settings that it would contradict."""
    if not isinstance(learning_rate, QuadraticModel) or spring is None:
        return
    if learning_rate.momentum:
        raise ValueError(
            "momentum= and ng.QuadraticModel would both take the step before along: use "
            "ng.QuadraticModel(momentum=False), or a learning rate"
        )
    if spring.max_norm is not None:
        raise ValueError(
            "max_norm of ng.SPRING bounds a given learning rate; ng.QuadraticModel chooses its own"
        )


def _inner_products(directions: Sequence[Any], dtype: Any) -> Array:
    """Those of the directions among each other, (k, k)."""
    trees = optax.tree.cast(tuple(directions), dtype)
    return _between(optax.tree.vdot, trees)


def _between(product: Callable[[Any, Any], Array], vectors: Sequence[Any] | Array) -> Array:
    """The products of all pairs of k vectors, (k, k)."""
    return jnp.stack([jnp.stack([product(u, v) for v in vectors]) for u in vectors])


def _minimiser(curvature: Array, slopes: Array) -> Array:
    """The c at which c . slopes + c^T curvature c / 2 is least, for one or two directions.

    The second direction is made conjugate to the first. One along which there is no curvature to
    rounding gets 0.
    """
    eps = float(jnp.finfo(curvature.dtype).eps)

    def ratio(slope: Array, bend: Array, scale: Array) -> Array:
        usable = bend > 10 * eps * scale
        return jnp.where(usable, -slope / jnp.where(usable, bend, 1), 0)

    first = ratio(slopes[0], curvature[0, 0], jnp.zeros(()))
    if len(slopes) == 1:
        return first[None]
    shared = -ratio(curvature[0, 1], curvature[0, 0], jnp.zeros(()))
    second = ratio(
        slopes[1] - shared * slopes[0],
        curvature[1, 1] - shared * curvature[0, 1],
        curvature[1, 1],
    )
    return jnp.stack([first - second * shared, second])
