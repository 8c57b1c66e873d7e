"""Checkpoints of a training run, of one process or of several, through orbax.

What a run needs to go on bit for bit: every variable of the model, the state of the optimizer with
the key of its Monte-Carlo Fisher, and the step. Beside the arrays stands a description, by which a
checkpoint of another structure, of other settings or of another form is refused before anything is
read. A checkpoint is whole or not there: orbax writes it under another name and renames it.
"""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from jax import Array

from natgrad_flax.checks import check_structure
from natgrad_flax.devices.structure import Sharded
from natgrad_flax.scalars import check_integer
from natgrad_flax.structures import Structure

FORMAT = 1
"""The version of what is written; it changes when older files cannot be read any more."""

Settings = Mapping[str, Any]


def save(
    folder: str | PathLike[str],
    model: nnx.Module,
    optimizer: Any,
    *,
    structure: Structure,
    step: int,
    settings: Settings | None = None,
    keep: int = 2,
) -> Path:
    """Writes a checkpoint below a folder. Of several processes, all call it, with one folder.

    Args:
      folder: of all checkpoints of a run; it is made where it is not there.
      model: all of its variables are written, parameters and others.
      optimizer: an ``nnx.Optimizer``, or the state of an optax transformation.
      structure: the Fisher approximation; ``restore`` has to be given the same.
      step: of the run; the checkpoint's name.
      settings: whatever else must not change, by name (damping, learning rate, seed, ...); values
        are compared by their ``repr``.
      keep: older checkpoints than this many are removed.

    Returns:
      The folder of this checkpoint.

    Raises:
      TypeError: the structure is none, or a leaf is not an array.
      ValueError: step or keep is out of range, or the folder has a checkpoint of this step.
    """
    step, keep = check_integer("step", step, 0), check_integer("keep", keep, 1)
    leaves = _leaves(model, optimizer)
    description = {
        "format": FORMAT,
        "step": step,
        "arrays": {name: _kind(leaf) for name, leaf in leaves.items()},
        **_describe(structure, settings),
    }
    arrays = {str(index): _plain(leaf) for index, leaf in enumerate(leaves.values())}
    with _manager(folder, keep) as manager:
        if step in manager.all_steps():
            raise ValueError(f"{Path(folder) / str(step)} is there already: a step is saved once")
        manager.save(
            step,
            args=ocp.args.Composite(
                arrays=ocp.args.StandardSave(arrays), description=ocp.args.JsonSave(description)
            ),
        )
    return Path(folder).absolute() / str(step)


def restore(
    folder: str | PathLike[str],
    model: nnx.Module,
    optimizer: Any,
    *,
    structure: Structure,
    settings: Settings | None = None,
    step: int | None = None,
) -> tuple[Any, int]:
    """Reads a checkpoint into a model and an optimizer that were set up as for a new run.

    Arrays are put where those of the model and the optimizer lie, so a run may go on with other
    devices, or more or fewer of them, than it was begun with.

    Args:
      folder: as for ``save``.
      model: its variables are set in place.
      optimizer: an ``nnx.Optimizer``, set in place, too; or the state of an optax transformation.
      structure: that of the run; another one is refused.
      settings: those of the run.
      step: which checkpoint, the newest by default.

    Returns:
      The optimizer (the same object, or the state that was read) and the step.

    Raises:
      FileNotFoundError: the folder has no checkpoint, or none of this step.
      ValueError: the checkpoint is of another structure, other settings, another model or
        optimizer, or another version of this form; or not one of natgrad.
      TypeError: the structure is none.
    """
    wanted = _describe(structure, settings)
    leaves = _leaves(model, optimizer)
    if step is not None:
        step = check_integer("step", step, 0)
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"{folder} is not there, so no run can go on from it")
    with _manager(folder, None) as manager:
        steps = manager.all_steps()
        chosen = manager.latest_step() if step is None else step
        if chosen is None or chosen not in steps:
            found = f"only of steps {sorted(steps)}" if steps else "none at all"
            which = "" if step is None else f" of step {step}"
            raise FileNotFoundError(f"{folder} has no checkpoint{which}, {found}")
        place = Path(folder) / str(chosen)
        _check(_description(manager, chosen, place), wanted, leaves, place)
        templates = {str(index): _template(leaf) for index, leaf in enumerate(leaves.values())}
        arrays = manager.restore(
            chosen, args=ocp.args.Composite(arrays=ocp.args.StandardRestore(templates))
        )["arrays"]
    restored = [_typed(arrays[str(index)], leaf) for index, leaf in enumerate(leaves.values())]
    state = nnx.state(model)
    count = len(jax.tree.leaves(state))
    nnx.update(model, jax.tree.unflatten(jax.tree.structure(state), restored[:count]))
    own = nnx.state(optimizer) if isinstance(optimizer, nnx.Optimizer) else optimizer
    found_state = jax.tree.unflatten(jax.tree.structure(own), restored[count:])
    if isinstance(optimizer, nnx.Optimizer):
        nnx.update(optimizer, found_state)
        return optimizer, chosen
    return found_state, chosen


def _manager(folder: str | PathLike[str], keep: int | None) -> ocp.CheckpointManager:
    return ocp.CheckpointManager(
        Path(folder).absolute(),
        options=ocp.CheckpointManagerOptions(
            max_to_keep=keep, create=keep is not None, enable_async_checkpointing=False
        ),
    )


def _describe(structure: object, settings: Settings | None) -> dict[str, Any]:
    check_structure(structure)
    if isinstance(structure, Sharded):
        # a run may go on with other devices
        structure = structure.structure
    named = {str(name): repr(value) for name, value in (settings or {}).items()}
    return {"structure": repr(structure), "settings": named}


def _leaves(model: nnx.Module, optimizer: Any) -> dict[str, Any]:
    """All arrays by what they are called in messages, those of the model first."""
    own = nnx.state(optimizer) if isinstance(optimizer, nnx.Optimizer) else optimizer
    leaves = {}
    for owner, tree in (("model", nnx.state(model)), ("optimizer", own)):
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            name = owner + jax.tree_util.keystr(path)
            if not isinstance(leaf, (Array, np.ndarray)):
                raise TypeError(f"{name} is {leaf!r}; a checkpoint holds arrays only")
            leaves[name] = leaf
    return leaves


def _is_key(leaf: Any) -> bool:
    return bool(jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key))


def _kind(leaf: Any) -> str:
    kind = str(jax.random.key_impl(leaf)) if _is_key(leaf) else str(leaf.dtype)
    return f"{kind}{list(leaf.shape)}"


def _plain(leaf: Any) -> Any:
    """A leaf as orbax takes it: keys as numbers, those of one process from the host."""
    plain = jax.random.key_data(leaf) if _is_key(leaf) else leaf
    if jax.process_count() > 1 and isinstance(plain, Array) and plain.is_fully_addressable:
        return np.asarray(plain)
    return plain


def _template(leaf: Any) -> Any:
    plain = _plain(leaf)
    if isinstance(plain, np.ndarray):
        return plain
    return jax.ShapeDtypeStruct(plain.shape, plain.dtype, sharding=plain.sharding)


def _typed(plain: Any, leaf: Any) -> Any:
    """What was read, in the form and at the place of a leaf."""
    if isinstance(leaf, np.ndarray):
        return np.asarray(plain)
    if _is_key(leaf):
        return jax.random.wrap_key_data(plain, impl=jax.random.key_impl(leaf))
    return jax.device_put(plain, leaf.sharding) if isinstance(plain, np.ndarray) else plain


def _description(manager: ocp.CheckpointManager, step: int, place: Path) -> dict[str, Any]:
    try:
        args = ocp.args.Composite(description=ocp.args.JsonRestore())
        found: dict[str, Any] = manager.restore(step, args=args)["description"]
        assert isinstance(found["format"], int)
    except (KeyError, TypeError, ValueError, FileNotFoundError, AssertionError) as error:
        raise ValueError(f"{place} is not a whole checkpoint of natgrad: {error}") from error
    return found


def _check(
    found: dict[str, Any], wanted: dict[str, Any], leaves: dict[str, Any], place: Path
) -> None:
    """Raises ValueError with the first difference between a checkpoint and what is to go on."""
    if found["format"] != FORMAT:
        raise ValueError(
            f"{place} has form {found['format']} of a checkpoint, and this natgrad reads form "
            f"{FORMAT}: go on with the version of natgrad that wrote it"
        )
    if found["structure"] != wanted["structure"]:
        raise ValueError(
            f"{place} is of a run with {found['structure']}, not {wanted['structure']}: go on with "
            "that structure, or begin a new run in another folder"
        )
    for name in sorted(found["settings"].keys() | wanted["settings"].keys()):
        there, here = (side["settings"].get(name, "not set") for side in (found, wanted))
        if there != here:
            raise ValueError(
                f"{place} is of a run with {name} = {there}, and here it is {here}: go on with "
                "that setting, or begin a new run in another folder"
            )
    kinds = {name: _kind(leaf) for name, leaf in leaves.items()}
    for name in [*found["arrays"], *kinds]:
        there, here = found["arrays"].get(name, "absent"), kinds.get(name, "absent")
        if there != here:
            raise ValueError(
                f"{place} is of another model or optimizer: {name} is {there} there and {here} here"
            )
