"""Checkpoints of a training run, of one process or of several, through orbax.

What a run needs to go on bit for bit: every variable of the model, the state of the optimizer with
the key of its Monte-Carlo Fisher, and the step. Beside the arrays stands a description, by which a
checkpoint of another structure, of other settings or of another form is refused before anything is
read. A checkpoint is whole or not there: orbax writes it under another name and renames it. What
happens to its bytes afterwards shows by the SHA-256 of each array and of the description.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import sys
import textwrap
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from jax import Array
from jax.experimental import multihost_utils

from natgrad_flax.arguments.scalars import check_integer
from natgrad_flax.checkpoint import stored_arrays
from natgrad_flax.optimizer.checks import check_structure
from natgrad_flax.processes import LostPeerError, lost_peers
from natgrad_flax.structures import Structure

FORMAT = 2
"""The version of what is written; it changes when older files cannot be read any more."""

Settings = Mapping[str, Any]

_LONGEST = 400
"""Characters of a setting that a description holds as they are."""


class _DamagedError(ValueError):
    """A checkpoint that is not what was written."""


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
        are compared by their ``repr``, in which arrays have all of their entries and digits.
      keep: older checkpoints than this many are removed.

    Returns:
      The folder of this checkpoint.

    Raises:
      TypeError: the structure or the model is none, a leaf is not an array of numbers, or a setting
        is written in another way by every process.
      ValueError: step or keep is out of range, or the folder has a checkpoint of this step.
      OSError: the checkpoint cannot be written; those before it are kept.

    Example:
      >>> import tempfile, natgrad_flax as ng, optax
      >>> from flax import nnx
      >>> from natgrad_flax import checkpoint
      >>> model = ng.MLP((4, 8, 1), rngs=nnx.Rngs(0))
      >>> optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
      >>> run = {"structure": ng.KFAC(), "settings": {"damping": 0.1}}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     checkpoint.save(folder, model, optimizer, step=3, **run).name
      '3'
    """
    step, keep = check_integer("step", step, 0), check_integer("keep", keep, 1)
    place = _path(folder).absolute() / str(step)
    described = _describe(structure, settings)
    leaves = _leaves(model, optimizer)
    description = {
        "format": FORMAT,
        "step": step,
        "arrays": {name: stored_arrays.kind(leaf) for name, leaf in leaves.items()},
        "sha256": {name: stored_arrays.digest(leaf) for name, leaf in leaves.items()},
        **described,
    }
    description["digest"] = _sha256(description)
    arrays = {str(index): stored_arrays.plain(leaf) for index, leaf in enumerate(leaves.values())}
    try:
        with lost_peers(), _manager(folder, keep) as manager:
            there = step in manager.all_steps()
            if not there:
                manager.save(
                    step,
                    args=ocp.args.Composite(
                        arrays=ocp.args.StandardSave(arrays),
                        description=ocp.args.JsonSave(description),
                    ),
                )
    except LostPeerError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        raise OSError(
            f"{place} cannot be written; checkpoints before it are kept: {_short(error)}"
        ) from error
    if there:
        raise ValueError(f"{place} is there already: a step is saved once")
    return place


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

    Where the newest checkpoint is damaged the run goes on from the one before it, with a warning;
    the damaged one is renamed, so that the run can save this step again.

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
        optimizer, or another version of this form; or not one of natgrad, or damaged, as are all
        before it.
      TypeError: the structure or the model is none.

    Example:
      >>> import tempfile, natgrad_flax as ng, optax
      >>> from flax import nnx
      >>> from natgrad_flax import checkpoint
      >>> model = ng.MLP((4, 8, 1), rngs=nnx.Rngs(0))
      >>> optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = checkpoint.save(
      ...         folder, model, optimizer, structure=ng.KFAC(), step=3
      ...     )
      ...     optimizer, step = checkpoint.restore(
      ...         folder, model, optimizer, structure=ng.KFAC()
      ...     )
      >>> step
      3
    """
    wanted = _describe(structure, settings)
    leaves = _leaves(model, optimizer)
    if step is not None:
        step = check_integer("step", step, 0)
    if not _path(folder).is_dir():
        raise FileNotFoundError(f"{folder} is not there, so no run can go on from it")
    damaged: dict[Path, str] = {}
    with _manager(folder, None) as manager:
        steps = sorted(manager.all_steps(), reverse=True)
        if not steps or step not in (None, *steps):
            found = f"only of steps {sorted(steps)}" if steps else "none at all"
            which = "" if step is None else f" of step {step}"
            raise FileNotFoundError(f"{folder} has no checkpoint{which}, {found}")
        for chosen in steps if step is None else [step]:
            place = Path(folder) / str(chosen)
            try:
                restored = _read(manager, chosen, place, wanted, leaves)
                break
            except _DamagedError as error:
                damaged[place] = str(error)
        else:
            others = f"; nor is any of steps {sorted(steps)[:-1]}" if len(damaged) > 1 else ""
            raise ValueError(next(iter(damaged.values())) + others)
    for other, reason in damaged.items():
        aside = _set_aside(other)
        told = f"; the damaged one is now {aside.name}" if aside else ""
        warnings.warn(
            f"{reason}; the run goes on from step {chosen}{told}", RuntimeWarning, stacklevel=2
        )
    state = nnx.state(model)
    count = len(jax.tree.leaves(state))
    nnx.update(model, jax.tree.unflatten(jax.tree.structure(state), restored[:count]))
    own = nnx.state(optimizer) if isinstance(optimizer, nnx.Optimizer) else optimizer
    found_state = jax.tree.unflatten(jax.tree.structure(own), restored[count:])
    if isinstance(optimizer, nnx.Optimizer):
        nnx.update(optimizer, found_state)
        return optimizer, chosen
    return found_state, chosen


def _path(folder: object) -> Path:
    if not isinstance(folder, (str, PathLike)) or not isinstance(fspath(folder), str):
        raise TypeError(f"folder must be a path, got {folder!r}")
    return Path(folder)


def _manager(folder: str | PathLike[str], keep: int | None) -> ocp.CheckpointManager:
    return ocp.CheckpointManager(
        Path(folder).absolute(),
        options=ocp.CheckpointManagerOptions(
            max_to_keep=keep, create=keep is not None, enable_async_checkpointing=False
        ),
    )


def _describe(structure: object, settings: Settings | None) -> dict[str, Any]:
    # a run may go on with other devices
    plain = check_structure(structure).plain
    if not isinstance(settings, Mapping | None):
        raise TypeError(f"settings must be a dictionary from names to values, got {settings!r}")
    named = {str(name): _text(str(name), value) for name, value in (settings or {}).items()}
    return {"structure": _text("structure", plain), "settings": named}


def _text(name: str, value: object) -> str:
    """A value in full; what is long as its beginning and its SHA-256."""
    with np.printoptions(threshold=sys.maxsize, floatmode="unique"):
        text = repr(value)
    if re.search(r" at 0x[0-9a-f]+>", text):
        raise TypeError(
            f"the setting {name} is {textwrap.shorten(text, 100)}, which every process writes in "
            "another way: give what makes it, numbers, text or arrays"
        )
    if len(text) <= _LONGEST:
        return text
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    return f"{text[:_LONGEST]}... with SHA-256 {digest}"


def _leaves(model: nnx.Module, optimizer: Any) -> dict[str, Any]:
    """All arrays by what they are called in messages, those of the model first."""
    if not isinstance(model, nnx.Module):
        raise TypeError(f"model must be a Flax nnx module, got {type(model).__name__}")
    own = nnx.state(optimizer) if isinstance(optimizer, nnx.Optimizer) else optimizer
    leaves = {}
    for owner, tree in (("model", nnx.state(model)), ("optimizer", own)):
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            name = owner + jax.tree_util.keystr(path)
            if not isinstance(leaf, (Array, np.ndarray)) or leaf.dtype == object:
                raise TypeError(f"{name} is {leaf!r}; a checkpoint holds arrays only")
            if isinstance(leaf, jax.core.Tracer):
                raise TypeError(f"{name} is traced: save and restore outside of jax.jit")
            if isinstance(leaf, Array) and leaf.is_deleted():
                raise ValueError(f"{name} has no values any more: it was donated to a computation")
            if leaf.size == 0:
                raise ValueError(f"{name} has no entries (shape {leaf.shape}), which orbax refuses")
            leaves[name] = leaf
    return leaves


def _sha256(description: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()


def _read(
    manager: ocp.CheckpointManager,
    step: int,
    place: Path,
    wanted: dict[str, Any],
    leaves: dict[str, Any],
) -> list[Any]:
    """The arrays of a checkpoint, as the leaves are.

    Raises:
      ValueError: it is of another run, or of another version of this form.
      _DamagedError: in every process where one of them cannot read it, or not what was saved.
    """

    def description() -> dict[str, Any]:
        args = ocp.args.Composite(description=ocp.args.JsonRestore())
        found: dict[str, Any] = manager.restore(step, args=args)["description"]
        if not isinstance(found, dict) or not isinstance(found.get("format"), int):
            raise ValueError("its description has no format")
        if found["format"] == FORMAT and found.pop("digest", None) != _sha256(found):
            raise ValueError("its description is not what was saved: the SHA-256 is another")
        return found

    def arrays() -> list[Any]:
        templates = {
            str(index): stored_arrays.template(leaf) for index, leaf in enumerate(leaves.values())
        }
        args = ocp.args.Composite(arrays=ocp.args.StandardRestore(templates))
        plain = manager.restore(step, args=args)["arrays"]
        return [
            stored_arrays.typed(plain[str(index)], leaf)
            for index, leaf in enumerate(leaves.values())
        ]

    def verify() -> None:
        # all of them before a word is said, because others may wait for their parts
        digests = [stored_arrays.digest(leaf) for leaf in restored]
        for name, digest in zip(leaves, digests, strict=True):
            if found["sha256"][name] != digest:
                raise ValueError(f"{name} is not what was saved: the SHA-256 is another")

    found: dict[str, Any] = _together(place, description)
    _check(found, wanted, leaves, place)
    restored: list[Any] = _together(place, arrays)
    _together(place, verify)
    return restored


def _together(place: Path, read: Callable[[], Any]) -> Any:
    """What is read; _DamagedError in all processes where one of them cannot read it."""
    fault = ""
    try:
        with lost_peers():
            result = read()
    except (LostPeerError, MemoryError):
        raise
    # whatever orbax, tensorstore and the decoders of text raise
    except Exception as error:
        fault = _short(error)
    if jax.process_count() > 1:
        with lost_peers():
            faults = multihost_utils.process_allgather(np.asarray(bool(fault)))
        if np.any(faults):
            fault = fault or "another process cannot read it"
    if fault:
        raise _DamagedError(f"{place} is not a whole checkpoint of natgrad: {fault}")
    return result


def _short(error: Exception) -> str:
    return textwrap.shorten(f"{type(error).__name__}: {error}", 240, placeholder=" ...")


def _set_aside(place: Path) -> Path | None:
    """Renames a damaged checkpoint; says where it is, in the process that did it."""
    aside = None
    if jax.process_index() == 0:
        names = (place.with_name(f"{place.name}.damaged-{n}") for n in itertools.count(1))
        with suppress(OSError):  # of a folder that may only be read
            aside = place.rename(next(name for name in names if not name.exists()))
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"natgrad checkpoint {place.name}")
    return aside


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
    kinds = {name: stored_arrays.kind(leaf) for name, leaf in leaves.items()}
    for name in [*found["arrays"], *kinds]:
        there, here = found["arrays"].get(name, "absent"), kinds.get(name, "absent")
        if there != here:
            raise ValueError(
                f"{place} is of another model or optimizer: {name} is {there} there and {here} here"
            )
