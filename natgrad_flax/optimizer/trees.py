"""Trees of parameters: their leaves by path, and which parameters a tree of updates moves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from natgrad_flax.arguments.arrays import check_finite
from natgrad_flax.signals.plan import parameter_paths
from natgrad_flax.signals.recording import Path, dotted


def as_state(params: Any, updates: Mapping[Path, Mapping[str, Array]]) -> Any:
    """Updates by path and name in the tree of the parameters, with their dtypes."""
    flat = {(*path, name): leaf for path, layer in updates.items() for name, leaf in layer.items()}

    def pick(path: tuple[Any, ...], leaf: Any) -> Any:
        return flat[leaf_names(path)].astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(pick, params)


def by_path(tree: Any) -> dict[Path, Array]:
    """The leaves of a pytree of parameters by their paths."""
    return {leaf_names(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def leaf_names(path: tuple[Any, ...]) -> Path:
    """The path of a parameter in a pytree, whether its leaves are Variables or plain arrays."""
    names: list[str | int] = []
    for entry in path:
        if isinstance(entry, jax.tree_util.DictKey | jax.tree_util.FlattenedIndexKey):
            names.append(entry.key)
        elif isinstance(entry, jax.tree_util.SequenceKey):
            names.append(entry.idx)
        elif entry is not path[-1] or entry.name != "value":
            names.append(entry.name)
    return tuple(names)


@dataclass(frozen=True)
class ByPath:
    """A filter of Flax that chooses parameters by their paths.

    Attributes:
      paths: of the parameters.
    """

    paths: frozenset[Path]

    def __call__(self, path: Any, value: Any) -> bool:
        """Whether a parameter is chosen."""
        del value
        return tuple(path) in self.paths


def misfit(module: nnx.Module, path: Path) -> ValueError:
    """What to raise where a tree of updates has an entry that is no parameter of the module."""
    what = f"no parameter of {type(module).__name__} that wrt= chooses is called {dotted(path)}"
    if path == ():
        what = "one array has no names of parameters; optax.flatten can stand behind this only"
    return ValueError(
        f"the tree of updates does not fit the module: {what}. Pass gradients with the tree of "
        "nnx.state(model, wrt), and the same wrt= to the optimizer"
    )


def moved_by(module: nnx.Module, updates: Any, wrt: Any) -> Any:
    """The filter of the parameters that a tree of updates moves.

    Args:
      module: the model.
      updates: a tree with the paths of its parameters, or of some of them: what ``optax.masked``
        and ``optax.partition`` hold back is not in it.
      wrt: filter of the parameters that may move.

    Returns:
      ``wrt`` where the tree has all of them, and else a filter of those that it has.

    Raises:
      ValueError: an entry is no parameter that wrt chooses, or has another shape.
    """
    chosen, found = parameter_paths(module, wrt), by_path(updates)
    for path, leaf in found.items():
        if path not in chosen:
            raise misfit(module, path)
        if jnp.shape(leaf) != chosen[path].shape:
            raise ValueError(
                f"the updates do not fit the module: {dotted(path)} has shape {jnp.shape(leaf)} in "
                f"them and {chosen[path].shape} in {type(module).__name__}"
            )
    return wrt if len(found) == len(chosen) else ByPath(frozenset(found))


def moved_by_gradient(module: nnx.Module, gradient: Any, wrt: Any) -> Any:
    """The filter of the parameters that a gradient of the caller's own has.

    Raises:
      ValueError: as ``moved_by``; an empty gradient, NaN or infinity.
    """
    found = by_path(gradient)
    if not found:
        raise ValueError("gradient= has no entries: pass a tree like nnx.state(model, wrt)")
    for path, leaf in found.items():
        if isinstance(leaf, jax.core.Tracer) or getattr(leaf, "is_fully_addressable", True):
            check_finite(jnp.asarray(leaf), f"the gradient at {dotted(path)}")
    return moved_by(module, gradient, wrt)
