"""SOAP: Adam in the eigenbasis of Shampoo."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from natgrad_flax.arguments.scalars import check_integer, check_number
from natgrad_flax.linalg.dense import eigh, full_products, qr
from natgrad_flax.optimizer.averages import MovingAverage
from natgrad_flax.transformations.blocks import (
    Blocking,
    Group,
    Vectors,
    along,
    along_each,
    check_same,
    products,
)
from natgrad_flax.transformations.settings import as_tree, check_decay, descent, due, tensors


class SOAPState(NamedTuple):
    """What SOAP keeps from step to step, a tuple with one entry for each group of blocks.

    Attributes:
      steps: taken so far, shape ().
      factors: for each axis the second moment (n, d, d).
      bases: for each axis eigenvectors (n, d, d) as columns, largest eigenvalue first.
      first: averages of the gradients (n, ...), in these bases.
      second: averages of their squares (n, ...), taken in these bases.
    """

    steps: Array
    factors: Any
    bases: Any
    first: Any
    second: Any


def soap(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float = 0.95,
    b2: float = 0.95,
    eps: float = 1e-8,
    decay: float | None = None,
    every: int = 1,
    basis_every: int = 10,
    weight_decay: float = 0.0,
    block_size: int | None = None,
    merge_dims: bool = True,
    max_dim: int = 10_000,
    vectors: Vectors = "diagonal",
) -> optax.GradientTransformation:
    """SOAP (Vyas et al. 2024, Algorithm 3) on gradients of any pytree.

    With L and R averages of G G^T and G^T G, and Q_L and Q_R their eigenvectors, a step is
    Q_L N Q_R^T, with N the step of Adam for the gradient Q_L^T G Q_R. After every
    ``basis_every``-th step a basis is renewed by one step of the power method, the Q of the QR
    decomposition of L Q_L, its columns sorted by q^T L q before; the average of squares stays as it
    is, sorted with them, and that of the gradients is turned to the new basis (the paper keeps it
    in the original space, which is the same). The bases of the first step are eigenvectors of its
    own G G^T and G^T G. Adam's averages are corrected for their start. Tensors of order k have k
    bases; entries without one move as in Adam.

    Args:
      learning_rate: a number, or a schedule over steps.
      b1: weight of the past in the average of the gradients.
      b2: the same for their squares.
      eps: added to the root of the average of squares.
      decay: weight of the past in the factors L and R; None means ``b2``.
      every: steps from one renewal of the factors to the next.
      basis_every: steps from one renewal of the bases to the next.
      weight_decay: decoupled; then ``update`` needs the parameters.
      block_size: as in ``shampoo``.
      merge_dims: as in ``shampoo``.
      max_dim: dimensions that are larger have no basis, and are not cut.
      vectors: "diagonal" treats tensors of order 1 as Adam does; with "full" they have a basis.

    Returns:
      An optax transformation. Its state is a plain pytree in float32, or in float64 where a
      parameter is.

    Raises:
      ValueError: a setting is out of range; in ``update`` a state of other parameters.
      TypeError: in ``init`` and ``update``, leaves that are no real floating-point arrays.

    Example:
      >>> import jax, jax.numpy as jnp, natgrad_flax as ng, optax
      >>> target = jax.random.normal(jax.random.key(0), (4, 3))
      >>> params, tx = {"w": jnp.zeros((4, 3))}, ng.soap(0.1)
      >>> loss = lambda params: jnp.sum((params["w"] - target) ** 2)
      >>> @jax.jit
      ... def train_step(params, state):
      ...     updates, state = tx.update(jax.grad(loss)(params), state, params)
      ...     return optax.apply_updates(params, updates), state
      >>> before, state = loss(params), tx.init(params)
      >>> for _ in range(30):
      ...     params, state = train_step(params, state)
      >>> bool(loss(params) < before / 10)
      True
    """
    blocking = Blocking(block_size, merge_dims, max_dim, vectors)
    rule = _Rule(
        check_decay("b1", b1),
        check_decay("b2", b2),
        check_number("eps", eps, positive=True),
        MovingAverage(check_decay("decay", b2 if decay is None else decay), every),
        check_integer("basis_every", basis_every, 1),
    )

    def init(params: Any) -> SOAPState:
        groups = blocking.groups(params)
        squares = tuple(group.squares() for group in groups)
        bases = tuple(group.squares(1.0) for group in groups)
        # two arrays, for jit to take over both
        first, second = (tuple(group.zeros() for group in groups) for _ in range(2))
        return SOAPState(jnp.zeros((), jnp.int32), squares, bases, first, second)

    def update(updates: Any, state: SOAPState, params: Any = None) -> tuple[Any, SOAPState]:
        del params
        groups = blocking.groups(updates)
        check_same(state, jax.eval_shape(init, updates))
        leaves = jax.tree.leaves(updates)
        with full_products():
            blocks = tuple(group.gather(leaves) for group in groups)
            moved, state = rule(groups, blocks, state)
        return as_tree(updates, tensors(groups, moved)), state

    return descent(
        optax.GradientTransformation(init, update), learning_rate, weight_decay=weight_decay
    )


@dataclass(frozen=True)
class _Rule:
    """A step, of given settings; see ``soap``."""

    b1: float
    b2: float
    eps: float
    average: MovingAverage
    basis_every: int

    def __call__(
        self, groups: Sequence[Group], blocks: tuple[Array, ...], state: SOAPState
    ) -> tuple[tuple[Array, ...], SOAPState]:
        """The blocks of a step, and the state after it."""
        factors, steps = state.factors, state.steps

        def statistics() -> Any:
            return tuple(
                products(block, group.axes) for group, block in zip(groups, blocks, strict=True)
            )

        def started() -> Any:
            bases = jax.tree.map(jax.vmap(_eigenvectors), statistics())
            return bases, state.first, state.second

        def renewed() -> Any:
            found = [
                jax.vmap(lambda *arrays, axes=group.axes: _turned(*arrays, axes=axes))(*arrays)
                for group, *arrays in zip(
                    groups, factors, state.bases, state.first, state.second, strict=True
                )
            ]
            return tuple(zip(*found, strict=True)) if found else ((), (), ())

        # of the paper's renewal at the end of a step only the place differs
        kind = jnp.where(steps == 0, 0, jnp.where(steps % self.basis_every == 0, 1, 2))
        bases, first, second = lax.switch(
            kind, (started, renewed, lambda: (state.bases, state.first, state.second))
        )
        turned = _rotated(groups, blocks, bases, transposed=True)
        first = optax.tree.update_moment(turned, first, self.b1, 1)
        second = optax.tree.update_moment(turned, second, self.b2, 2)
        after = steps + 1
        directions = tuple(
            mean
            / (1 - jnp.asarray(self.b1, mean.dtype) ** after)
            / (jnp.sqrt(square / (1 - jnp.asarray(self.b2, mean.dtype) ** after)) + self.eps)
            for mean, square in zip(first, second, strict=True)
        )
        moved = _rotated(groups, directions, bases, transposed=False)
        every = self.average.every
        factors = due(
            steps,
            every,
            lambda: self.average.mix(factors, statistics(), steps // every + 1),
            factors,
        )
        return moved, SOAPState(after, factors, bases, first, second)


def _rotated(
    groups: Sequence[Group], blocks: Sequence[Array], bases: Any, *, transposed: bool
) -> tuple[Array, ...]:
    """Blocks in the eigenbases, or back from them."""
    if transposed:
        bases = jax.tree.map(lambda basis: jnp.swapaxes(basis, 1, 2), bases)
    return tuple(
        along_each(basis, block, group.axes)
        for group, block, basis in zip(groups, blocks, bases, strict=True)
    )


def _eigenvectors(factor: Array) -> Array:
    return eigh(factor)[1][:, ::-1]


def _turned(
    factors: tuple[Array, ...],
    bases: tuple[Array, ...],
    first: Array,
    second: Array,
    *,
    axes: tuple[int, ...],
) -> tuple[tuple[Array, ...], Array, Array]:
    """The bases of a block after a step of the power method, and its averages in them."""
    found = []
    for axis, factor, basis in zip(axes, factors, bases, strict=True):
        image = factor @ basis
        order = jnp.argsort(-jnp.sum(basis * image, axis=0))
        second = jnp.take(second, order, axis)
        found.append(qr(image[:, order])[0])
    change = [new.T @ old for new, old in zip(found, bases, strict=True)]
    return tuple(found), along(change, first, axes), second
