"""Tensors of a tree cut into blocks, and blocks of equal shapes brought together.

So a program has one set of operations for each shape of a block, however many tensors there are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from natgrad_flax.arguments.arrays import check_real, solve_dtype
from natgrad_flax.arguments.scalars import check_integer

Vectors = Literal["diagonal", "full"]

_ALIGNED = 16


@dataclass(frozen=True)
class Layout:
    """How one tensor is cut.

    Attributes:
      shape: of the tensor.
      merged: its dimensions after merging.
      sides: of a block, one a merged dimension; the blocks at the end of a dimension are filled up
        with zeros. Without axes that have factors a block is one entry, and has no sides.
      axes: of a block, those with a factor.
    """

    shape: tuple[int, ...]
    merged: tuple[int, ...]
    sides: tuple[int, ...]
    axes: tuple[int, ...]

    @property
    def pieces(self) -> tuple[int, ...]:
        """Blocks along each merged dimension."""
        return tuple(-(-d // side) for d, side in zip(self.merged, self.sides, strict=True))

    @property
    def count(self) -> int:
        """Blocks in all."""
        return math.prod(self.pieces) if self.axes else math.prod(self.shape)

    def filled(self) -> tuple[np.ndarray, ...]:
        """For each axis how many rows of each block are no filling, shape (n,)."""
        ends = [
            np.minimum(side, d - side * np.arange(pieces))
            for d, side, pieces in zip(self.merged, self.sides, self.pieces, strict=True)
        ]
        grid = np.meshgrid(*ends, indexing="ij")
        return tuple(sizes.ravel() for sizes in grid)

    def cut(self, leaf: Array) -> Array:
        """The blocks (n, *sides) of a tensor."""
        if not self.axes:
            return leaf.reshape(-1)
        if self.pieces == (1,) * len(self.merged):
            return leaf.reshape(1, *self.sides)
        whole = zip(self.merged, self.sides, self.pieces, strict=True)
        widths = [(0, side * pieces - d) for d, side, pieces in whole]
        split = [n for pair in zip(self.pieces, self.sides, strict=True) for n in pair]
        blocks = jnp.pad(leaf.reshape(self.merged), widths).reshape(split)
        order = (*range(0, len(split), 2), *range(1, len(split), 2))
        return blocks.transpose(order).reshape(-1, *self.sides)

    def joined(self, blocks: Array) -> Array:
        """The tensor of its blocks (n, *sides)."""
        if not self.axes:
            return blocks.reshape(self.shape)
        order = len(self.merged)
        split = blocks.reshape(*self.pieces, *self.sides)
        mixed = split.transpose([axis for i in range(order) for axis in (i, order + i)])
        whole = mixed.reshape([p * s for p, s in zip(self.pieces, self.sides, strict=True)])
        return whole[tuple(slice(d) for d in self.merged)].reshape(self.shape)


@dataclass(frozen=True)
class Group:
    """Blocks of one shape.

    Attributes:
      members: places of the tensors among the leaves of the tree, and how each is cut.
      dtype: of what is computed with them.
    """

    members: tuple[tuple[int, Layout], ...]
    dtype: Any

    @property
    def sides(self) -> tuple[int, ...]:
        """Of a block."""
        return self.members[0][1].sides if self.axes else ()

    @property
    def axes(self) -> tuple[int, ...]:
        """Of a block, those with a factor."""
        return self.members[0][1].axes

    @property
    def count(self) -> int:
        """Blocks in all."""
        return sum(layout.count for _, layout in self.members)

    @property
    def filled(self) -> tuple[np.ndarray, ...]:
        """As ``Layout.filled``, of all blocks."""
        each = [layout.filled() for _, layout in self.members]
        return tuple(np.concatenate(sizes) for sizes in zip(*each, strict=True))

    def gather(self, leaves: Sequence[Array]) -> Array:
        """The blocks (n, *sides) of these tensors."""
        parts = [layout.cut(leaves[place].astype(self.dtype)) for place, layout in self.members]
        return parts[0] if len(parts) == 1 else jnp.concatenate(parts)

    def scatter(self, blocks: Array) -> Iterator[tuple[int, Array]]:
        """The tensors of these blocks, with their places."""
        start = 0
        for place, layout in self.members:
            yield place, layout.joined(blocks[start : start + layout.count])
            start += layout.count

    def zeros(self) -> Array:
        """Blocks of zeros (n, *sides)."""
        return jnp.zeros((self.count, *self.sides), self.dtype)

    def squares(self, scale: float = 0.0) -> tuple[Array, ...]:
        """For each axis with a factor n multiples of the identity."""
        sides = (self.sides[axis] for axis in self.axes)
        return tuple(
            jnp.tile(scale * jnp.eye(side, dtype=self.dtype), (self.count, 1, 1)) for side in sides
        )


@dataclass(frozen=True)
class Blocking:
    """Which tensors are cut how, and which of their dimensions have a factor.

    Attributes:
      block_size: largest side of a block; None for whole tensors.
      merge_dims: of tensors of order above 2 neighbouring dimensions become one, from the first
        on, while their product is at most ``block_size`` (or ``max_dim``) and two are left.
      max_dim: dimensions that are larger have no factor, and are not cut. A tensor without any
        factor is treated entry by entry.
      vectors: "full" gives tensors of order 1 a factor, "diagonal" treats their entries.

    Raises:
      ValueError: a size below 1, an unknown word.
    """

    block_size: int | None
    merge_dims: bool
    max_dim: int
    vectors: Vectors

    def __post_init__(self) -> None:
        if self.block_size is not None:
            check_integer("block_size", self.block_size, 1)
        check_integer("max_dim", self.max_dim, 1)
        if self.vectors not in get_args(Vectors):
            raise ValueError(f'vectors must be "diagonal" or "full", got {self.vectors!r}')

    def layout(self, shape: tuple[int, ...]) -> Layout:
        """How a tensor of this shape is cut."""
        merged = self._merged(shape)
        axes = tuple(axis for axis, d in enumerate(merged) if d <= self.max_dim)
        if 0 in shape or not shape or (len(shape) == 1 and self.vectors == "diagonal"):
            axes = ()
        sides = tuple(
            _side(d, self.block_size) if axis in axes else d for axis, d in enumerate(merged)
        )
        return Layout(shape, merged, sides, axes)

    def _merged(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        if not self.merge_dims:
            return shape
        merged, left = list(shape), len(shape) - 2
        at = 0
        while left > 0 and at + 1 < len(merged):
            both = merged[at] * merged[at + 1]
            if both <= (self.block_size or self.max_dim):
                merged[at : at + 2] = [both]
                left -= 1
            else:
                at += 1
        return tuple(merged)

    def groups(self, tree: Any) -> tuple[Group, ...]:
        """The groups of blocks of the leaves of a tree of arrays, or of their shapes.

        Raises:
          TypeError: leaves that are no arrays of real floating-point numbers.
        """
        found: dict[Any, list[tuple[int, Layout]]] = {}
        for place, (path, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(tree)):
            name = f"the leaf at {jax.tree_util.keystr(path) or 'the root'}"
            if not hasattr(leaf, "dtype"):
                raise TypeError(f"{name} is no array, but a {type(leaf).__name__}")
            check_real(leaf, name)
            if not jnp.issubdtype(leaf.dtype, jnp.floating):
                raise TypeError(
                    f"{name} has dtype {leaf.dtype}, and has no gradient: hold it back with "
                    "optax.masked or optax.partition"
                )
            layout, dtype = self.layout(tuple(leaf.shape)), solve_dtype(leaf.dtype)
            sides = layout.sides if layout.axes else ()
            found.setdefault((sides, layout.axes, dtype), []).append((place, layout))
        return tuple(Group(tuple(members), dtype) for (*_, dtype), members in found.items())


def _side(size: int, most: int | None) -> int:
    """The side of blocks, as few and as equal as can be, and of a size that products like."""
    if most is None or size <= most:
        return size
    equal = -(-size // -(-size // most))
    return min(-(-equal // _ALIGNED) * _ALIGNED, most)


def products(blocks: Array, axes: tuple[int, ...]) -> tuple[Array, ...]:
    """For each axis G G^T of n blocks (n, ...), with G unfolded along this axis."""
    return jax.vmap(lambda block: tuple(product_along(block, block, axis) for axis in axes))(blocks)


def product_along(one: Array, other: Array, axis: int) -> Array:
    """X Y^T of two blocks that are unfolded along an axis."""
    rest = [i for i in range(one.ndim) if i != axis]
    return jnp.tensordot(one, other, (rest, rest))


def along(matrices: Sequence[Array], block: Array, axes: tuple[int, ...]) -> Array:
    """A block times one matrix along each axis: M_1 G M_2^T of an ordinary matrix G."""
    for axis, matrix in zip(axes, matrices, strict=True):
        if axis == block.ndim - 1:
            # the new axis comes last by itself: transposing costs as much as the product
            block = jnp.tensordot(block, matrix, (axis, 1))
        else:
            block = jnp.moveaxis(jnp.tensordot(matrix, block, (1, axis)), 0, axis)
    return block


def along_each(matrices: Sequence[Array], blocks: Array, axes: tuple[int, ...]) -> Array:
    """``along`` for n blocks (n, ...), each with matrices (n, d, d) of its own."""
    return jax.vmap(lambda block, *own: along(own, block, axes))(blocks, *matrices)


def check_same(kept: Any, fresh: Any) -> None:
    """Refuses a state that is not one of these parameters.

    Raises:
      ValueError: its arrays have other shapes than those of a fresh state.
    """
    shapes = [jax.tree.map(jnp.shape, state) for state in (kept, fresh)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            "the state is of other parameters than these updates, or of other settings: start it "
            "anew with init"
        )
