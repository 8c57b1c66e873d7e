"""Shampoo: gradients between roots of the second moments of their rows and columns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from natgrad_flax.arguments.arrays import solve_dtype
from natgrad_flax.arguments.scalars import as_number, check_number, shown
from natgrad_flax.linalg.dense import eigh, full_products
from natgrad_flax.optimizer.averages import MovingAverage
from natgrad_flax.transformations.blocks import (
    Blocking,
    Group,
    Vectors,
    along,
    along_each,
    check_same,
    product_along,
    products,
)
from natgrad_flax.transformations.settings import as_tree, check_decay, descent, due, tensors

Grafting = Literal["sgd", "adam", "rmsprop_normalized"]
Statistics = Literal["gradient", "kl"]


class ShampooState(NamedTuple):
    """What Shampoo keeps from step to step.

    Attributes:
      steps: taken so far, shape ().
      factors: for each group of blocks and axis the second moment (n, d, d); without a factor
        that of the entries (n,).
      roots: their inverse roots, in these shapes.
      inverses: their inverses, for statistics="kl".
      grafting: second moments of what lends its length, as the gradient.
    """

    steps: Array
    factors: Any
    roots: Any
    inverses: Any
    grafting: Any


def shampoo(
    learning_rate: optax.ScalarOrSchedule,
    *,
    decay: float = 1.0,
    every: int = 1,
    inverse_every: int | None = None,
    epsilon: float = 1e-12,
    power: float | None = None,
    statistics: Statistics = "gradient",
    grafting: Grafting | None = None,
    grafting_decay: float = 0.999,
    grafting_epsilon: float = 1e-8,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    block_size: int | None = None,
    merge_dims: bool = True,
    max_dim: int = 10_000,
    vectors: Vectors = "diagonal",
) -> optax.GradientTransformation:
    """Shampoo (Gupta, Koren & Singer 2018, Algorithms 1 and 2) on gradients of any pytree.

    A matrix G moves along L^{-1/4} G R^{-1/4} with L = epsilon I + sum_t G_t G_t^T and R =
    epsilon I + sum_t G_t^T G_t; a tensor of order k has one factor a dimension and the power
    -1/(2k). Where a dimension is too large for a factor, k counts those that are left: a matrix
    with one of them moves along L^{-1/2} G, and entries as in AdaGrad.

    With ``statistics="kl"`` (KL-Shampoo, Lin et al. 2025) the factors estimate E[vec(G) vec(G)^T]
    by S_A (x) S_B in the Kullback-Leibler divergence: from S_A = S_B = I on,
    S_A <- decay S_A + (1 - decay) G S_B^{-1} G^T / d_B and likewise S_B, with the inverses of the
    last renewal, and the power is -1/2.

    Args:
      learning_rate: a number, or a schedule over steps.
      decay: weight of the past in the factors. 1 sums all gradients, as the paper does; below 1
        they are averages, corrected for their start (those of "kl" are not, which start at I).
      every: steps from one renewal of the factors to the next.
      inverse_every: steps from one renewal of the roots to the next, a multiple of ``every``; None
        means the same.
      epsilon: added to the factors before a root is taken, positive.
      power: exponent of all factors, negative (-1/4; -1/2 is "Shampoo squared"); None as above.
      statistics: "gradient" or "kl".
      grafting: each tensor takes its direction from Shampoo and its length from another step
        (Anil et al. 2020): "sgd", the gradient; "adam", g / (sqrt(v) + grafting_epsilon) with v
        the average of g^2, corrected for its start, without Adam's momentum; or
        "rmsprop_normalized", g' / (sqrt(v) + grafting_epsilon) with g' = g / |g| and v the average
        of g'^2, uncorrected. None keeps Shampoo's length.
      grafting_decay: weight of the past in v.
      grafting_epsilon: see ``grafting``.
      momentum: of the preconditioned gradients, m <- momentum m + u.
      weight_decay: decoupled; then ``update`` needs the parameters.
      block_size: tensors are cut into blocks of at most this many rows and columns, each with
        factors of its own (Anil et al. 2020); None for none.
      merge_dims: of tensors of order above 2 neighbouring dimensions become one, from the first
        on, while their product is at most ``block_size`` (or ``max_dim``) and two are left: the
        kernel (3, 3, 16, 32) of a convolution is a matrix (144, 32).
      max_dim: dimensions that are larger have no factor, and are not cut.
      vectors: "diagonal" treats tensors of order 1 entry by entry; with "full" they have a factor,
        and the step is AdaGrad's with its full matrix.

    Returns:
      An optax transformation. Its state is a plain pytree; factors and roots are in float32, or in
      float64 where a parameter is.

    Raises:
      ValueError: a setting is out of range; in ``update`` a state of other parameters.
      TypeError: in ``init`` and ``update``, leaves that are no real floating-point arrays.

    Example:
      >>> import jax, jax.numpy as jnp, natgrad_flax as ng
      >>> params = {"w": jnp.zeros((4, 3))}
      >>> grads = {"w": jax.random.normal(jax.random.key(0), (4, 3))}
      >>> tx = ng.shampoo(0.1)
      >>> updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
      >>> lengths = jnp.linalg.svd(updates["w"], compute_uv=False)
      >>> print(lengths.round(3))  # the first step of G = U S V^T is -0.1 U V^T
      [0.1 0.1 0.1]
    """
    blocking = Blocking(block_size, merge_dims, max_dim, vectors)
    if decay != 1:
        check_decay("decay", decay)
    average = MovingAverage(0.0 if decay == 1 else decay, every, inverse_every)
    rule = _Rule(
        average,
        decay == 1,
        check_number("epsilon", epsilon, positive=True),
        _checked_power(power),
        statistics == "kl",
    )
    if statistics not in get_args(Statistics):
        raise ValueError(f'statistics must be "gradient" or "kl", got {statistics!r}')
    if rule.kl and decay == 1:
        raise ValueError('statistics="kl" estimates an average: give a decay below 1, such as 0.95')
    if grafting not in (None, *get_args(Grafting)):
        raise ValueError(
            'grafting must be None, "sgd", "adam" or "rmsprop_normalized", got ' + shown(grafting)
        )
    lender = _Grafting(
        grafting,
        check_decay("grafting_decay", grafting_decay),
        check_number("grafting_epsilon", grafting_epsilon, positive=True),
    )

    def init(params: Any) -> ShampooState:
        groups = blocking.groups(params)
        # each array by itself, for jit to take over all; roots are taken anew at the first step
        factors, roots, inverses = (tuple(map(rule.start, groups)) for _ in range(3))
        kept = inverses if rule.kl else ()
        steps = jnp.zeros((), jnp.int32)
        return ShampooState(steps, factors, roots, kept, lender.start(params))

    def update(updates: Any, state: ShampooState, params: Any = None) -> tuple[Any, ShampooState]:
        del params
        groups = blocking.groups(updates)
        check_same(state, jax.eval_shape(init, updates))
        leaves = jax.tree.leaves(updates)
        blocks = [group.gather(leaves) for group in groups]
        with full_products():
            kept = rule.renewed(groups, blocks, state)
            moved = [
                rule.apply(group, block, root)
                for group, block, root in zip(groups, blocks, kept.roots, strict=True)
            ]
        found, grafting = lender(leaves, tensors(groups, moved), state)
        return as_tree(updates, found), kept._replace(grafting=grafting)

    return descent(
        optax.GradientTransformation(init, update),
        learning_rate,
        weight_decay=weight_decay,
        momentum=momentum,
    )


@dataclass(frozen=True)
class _Rule:
    """Factors and their roots, of given settings; see ``shampoo``."""

    average: MovingAverage
    summed: bool
    epsilon: float
    power: float | None
    kl: bool

    def start(self, group: Group) -> tuple[Array, ...]:
        """Factors before the first step."""
        return group.squares(float(self.kl)) if group.axes else (group.zeros(),)

    def renewed(
        self, groups: Sequence[Group], blocks: Sequence[Array], state: ShampooState
    ) -> ShampooState:
        """The state with the factors and roots of this step."""
        count = state.steps // self.average.every + 1

        def with_blocks() -> Any:
            inverses = state.inverses or (None,) * len(groups)
            return tuple(
                self._mixed(group, block, old, inverse, count)
                for group, block, old, inverse in zip(
                    groups, blocks, state.factors, inverses, strict=True
                )
            )

        factors = due(state.steps, self.average.every, with_blocks, state.factors)

        def inverted() -> Any:
            found = [self._inverted(*each) for each in zip(groups, factors, strict=True)]
            roots, inverses = zip(*found, strict=True) if found else ((), ())
            return roots, inverses if self.kl else ()

        every = self.average.inverse_every or self.average.every
        roots, inverses = due(state.steps, every, inverted, (state.roots, state.inverses))
        return state._replace(
            steps=state.steps + 1, factors=factors, roots=roots, inverses=inverses
        )

    def apply(self, group: Group, blocks: Array, roots: tuple[Array, ...]) -> Array:
        """The preconditioned blocks."""
        if not group.axes:
            return blocks * roots[0]
        return along_each(roots, blocks, group.axes)

    def _mixed(
        self, group: Group, blocks: Array, kept: tuple[Array, ...], inverses: Any, count: Array
    ) -> tuple[Array, ...]:
        if self.kl and group.axes:
            past = self.average.decay
            found = self._divergence(group, blocks, inverses)
            return tuple(
                past * old + (1 - past) * new for old, new in zip(kept, found, strict=True)
            )
        found = products(blocks, group.axes) if group.axes else (blocks**2,)
        if self.summed:
            return tuple(old + new for old, new in zip(kept, found, strict=True))
        mixed: tuple[Array, ...] = self.average.mix(kept, found, count)
        return mixed

    def _divergence(
        self, group: Group, blocks: Array, inverses: tuple[Array, ...]
    ) -> tuple[Array, ...]:
        """G S_B^{-1} G^T / d_B for each axis, B all others."""

        def one(block: Array, *inverses: Array) -> tuple[Array, ...]:
            found = []
            for place, axis in enumerate(group.axes):
                others = inverses[:place] + inverses[place + 1 :]
                rest = group.axes[:place] + group.axes[place + 1 :]
                found.append(product_along(block, along(others, block, rest), axis))
            return tuple(found)

        sizes = group.filled
        divisors = [np.prod(sizes[:axis] + sizes[axis + 1 :], axis=0) for axis in group.axes]
        return tuple(
            new / jnp.broadcast_to(jnp.asarray(divisor, new.dtype), len(new))[:, None, None]
            for new, divisor in zip(jax.vmap(one)(blocks, *inverses), divisors, strict=True)
        )

    def _inverted(
        self, group: Group, factors: tuple[Array, ...]
    ) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        """Roots and, for "kl", inverses of the factors of a group."""
        if not group.axes:
            return ((factors[0] + self.epsilon) ** -0.5,), factors
        power = self.power or (-0.5 if self.kl else -0.5 / len(group.axes))

        def one(factor: Array) -> tuple[Array, Array]:
            values, vectors = eigh(factor)
            # rounding may leave them below zero
            values = jnp.maximum(values, 0) + self.epsilon
            root = (vectors * values**power) @ vectors.T
            return root, (vectors / values) @ vectors.T if self.kl else root

        pairs = [jax.vmap(one)(factor) for factor in factors]
        roots, inverses = zip(*pairs, strict=True)
        return roots, inverses


@dataclass(frozen=True)
class _Grafting:
    """The lengths of steps, lent by another step; see ``shampoo``."""

    kind: Grafting | None
    decay: float
    epsilon: float

    def start(self, params: Any) -> tuple[Array, ...]:
        """Second moments before the first step."""
        if self.kind in (None, "sgd"):
            return ()
        leaves = jax.tree.leaves(params)
        return tuple(jnp.zeros(leaf.shape, solve_dtype(leaf.dtype)) for leaf in leaves)

    def __call__(
        self, gradient: Sequence[Array], found: Sequence[Array], state: ShampooState
    ) -> tuple[Sequence[Array], tuple[Array, ...]]:
        """The tensors of a step with the lengths of the other, and its second moments."""
        if self.kind is None:
            return found, ()
        leaves = [leaf.astype(new.dtype) for leaf, new in zip(gradient, found, strict=True)]
        if self.kind == "rmsprop_normalized":
            leaves = [_scaled(leaf, 1.0) for leaf in leaves]
        lending, moments = leaves, []
        if self.kind != "sgd":
            moments = [
                self.decay * old + (1 - self.decay) * leaf**2
                for old, leaf in zip(state.grafting, leaves, strict=True)
            ]
            lending = [
                leaf / (jnp.sqrt(moment / self._share(state.steps, moment.dtype)) + self.epsilon)
                for leaf, moment in zip(leaves, moments, strict=True)
            ]
        grafted = [
            _scaled(new, jnp.linalg.norm(jnp.ravel(other)))
            for new, other in zip(found, lending, strict=True)
        ]
        return grafted, tuple(moments)

    def _share(self, steps: Array, dtype: Any) -> Array | float:
        """What of an average over all steps the steps so far have."""
        if self.kind == "rmsprop_normalized":
            return 1.0
        return 1 - jnp.asarray(self.decay, dtype) ** (steps + 1)


def _scaled(tensor: Array, length: Array | float) -> Array:
    """A tensor with another length; zeros stay."""
    before = jnp.linalg.norm(jnp.ravel(tensor))
    return tensor * (length / jnp.where(before > 0, before, 1))


def _checked_power(power: object) -> float | None:
    if power is None:
        return None
    found = as_number(power)
    if found is None or not -math.inf < found < 0:
        raise ValueError(
            f"power must be None or a negative number such as -1/4 or -1/2, got {shown(power)}"
        )
    return found
