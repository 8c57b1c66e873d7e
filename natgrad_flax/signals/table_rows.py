"""Whether the tables of a model have the rows that a batch looks up."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jax.interpreters import partial_eval

from natgrad_flax.arguments.arrays import batch_size, is_concrete, shapes_of
from natgrad_flax.signals.dense import Signals
from natgrad_flax.signals.lookup import LookupSignals
from natgrad_flax.signals.model import dotted
from natgrad_flax.signals.plan import model_arguments
from natgrad_flax.signals.program import Path, Place, run
from natgrad_flax.signals.survey import survey
from natgrad_flax.signals.views import View


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["missing"],
    meta_fields=["path", "rows", "gives", "sources"],
)
@dataclass(frozen=True)
class _Lookup:
    """A place where rows of a table are taken.

    Attributes:
      missing: of each sample how many the table does not have, (N,).
      path: of the table.
      rows: how many it has.
      gives: what stands in place of the others.
      sources: which arrays of x say the numbers of rows.
    """

    missing: Array
    path: Path
    rows: int
    gives: str
    sources: tuple[int, ...]


def check_rows(model: nnx.Module, x: Any, signals: Signals, name: str = "x") -> None:
    """Refuses numbers of rows that a table does not have, where all values are known.

    JAX gives NaN for such a row, or another one, so that a token outside of the vocabulary spoils
    the step in silence. What the model itself replaces may be missing.

    Args:
      model: the model.
      x: inputs, an array (N, ...) or a tree of them; looked at where one holds integers, or where
        the signals are of a table.
      signals: of the model, or their shapes.
      name: of the argument.

    Raises:
      ValueError: a row is missing, and the outputs depend on what is taken for it.
    """
    leaves = jax.tree_util.tree_leaves_with_path(x)
    integers = any(jnp.issubdtype(leaf.dtype, jnp.integer) for _, leaf in leaves)
    layers = [getattr(layer, "layer", layer) for layer in signals.layers]
    if not integers and not any(isinstance(layer, LookupSignals) for layer in layers):
        return
    graphdef, state = nnx.split(model)
    known = jax.tree.leaves((state, x))
    if not all(is_concrete(a) and getattr(a, "is_fully_addressable", True) for a in known):
        return
    with jax.ensure_compile_time_eval():
        found = [one for one in _lookups(state, x, graphdef=graphdef) if np.any(one.missing)]
        if not found or not _are_seen(state, x, graphdef=graphdef):
            return
    first = found[0]
    rest = f"rows count from 0 to {first.rows - 1}, and any other number gives {first.gives}"
    for place, leaf in (leaves[source] for source in first.sources):
        numbers = np.asarray(leaf)
        # negative ones count from the end
        bad = (numbers >= first.rows) | (numbers < -first.rows)
        if bad.any():
            where = tuple(map(int, np.argwhere(bad)[0]))
            rows, more = ("1 row", "") if bad.sum() == 1 else (f"{bad.sum()} rows", " for one")
            raise ValueError(
                f"{name + jax.tree_util.keystr(place)} looks up {rows} that the table "
                f"{dotted(first.path)} does not have, number {numbers[where]} at {where}{more}: "
                f"{rest}"
            )
    sample = int(np.argmax(np.asarray(first.missing) > 0))
    raise ValueError(
        f"sample {sample} of {name} leads to a row that the table {dotted(first.path)} does not "
        f"have: {rest}"
    )


class _Tables:
    """The places where rows of tables are taken, in the program of one sample."""

    def __init__(self, model: nnx.Module, x: Any) -> None:
        forward, self._held = model_arguments(model, _is_floating)
        closed = jax.make_jaxpr(forward)(*self._held, shapes_of(x, skip=1))
        values = self._held[0]
        # jax flattens dictionaries in the order of their keys
        tags: list[View | None] = [View.of(path, values[path].shape) for path in sorted(values)]
        tags += [None] * (len(closed.jaxpr.invars) - len(tags))
        self._program, _ = survey(closed.jaxpr, closed.consts, tags)
        self.places = [place for place in self._program.all_places() if _gives(place)]

    def run(self, sample: Any, added: list[Array] | None = None) -> tuple[Array, list[Array]]:
        """The outputs of a sample, and where rows are missing, with something added there."""
        zeros = {
            place.number: jnp.zeros((*place.loops, *place.outputs.shape), place.outputs.dtype)
            for place in self.places
        }
        if added is not None:
            for place, missing in zip(self.places, added, strict=True):
                lead, axes = len(place.loops), place.params["dimension_numbers"].offset_dims
                missing = jnp.expand_dims(missing, [lead + axis for axis in axes])
                zeros[place.number] += missing.astype(place.outputs.dtype)
        (outputs,), tape = run(self._program, jax.tree.leaves((*self._held, sample)), zeros)
        return outputs, [_missing(place, tape[place.number]) for place in self.places]


def _missing(place: Place, ids: Array) -> Array:
    """Where numbers (..., axes of the table) are of no row, (...)."""
    return jnp.any((ids < 0) | (ids > jnp.asarray(_last(place))), axis=-1)


def _last(place: Place) -> list[int]:
    """The largest number along each axis of a table that is looked up."""
    axes = place.params["dimension_numbers"].start_index_map
    return [place.view.shape[axis] - place.params["slice_sizes"][axis] for axis in axes]


@jax.jit
def _lookups(state: Any, x: Any, *, graphdef: Any) -> list[_Lookup]:
    """What ``x`` looks up in the tables of a model; of its program nothing else is computed."""
    tables = _Tables(nnx.merge(graphdef, state), x)
    count = len(tables.places)
    if not count:
        return []
    batched = jax.make_jaxpr(jax.vmap(lambda sample: tables.run(sample)[1]))(x)
    jaxpr, used = partial_eval.dce_jaxpr(batched.jaxpr, [True] * count)
    given = [leaf for leaf, is_used in zip(jax.tree.leaves(x), used, strict=True) if is_used]
    found = jaxpr_as_fun(ClosedJaxpr(jaxpr, batched.consts))(*given)
    lookups = []
    for index, (place, missing) in enumerate(zip(tables.places, found, strict=True)):
        own = [number == index for number in range(count)]
        reached = partial_eval.dce_jaxpr(batched.jaxpr, own)[1]
        lookups.append(
            _Lookup(
                jnp.sum(missing.reshape(batch_size(x), -1), axis=1),
                place.view.source,
                _last(place)[0] + 1,
                _gives(place),
                tuple(source for source, is_used in enumerate(reached) if is_used),
            )
        )
    return lookups


@jax.jit
def _are_seen(state: Any, x: Any, *, graphdef: Any) -> Array:
    """Whether outputs depend on what is taken for missing rows."""
    tables = _Tables(nnx.merge(graphdef, state), x)

    def sample(x: Any) -> Array:
        outputs, missing = tables.run(x)
        # NaN is unlike itself
        return jnp.any(outputs != tables.run(x, missing)[0])

    return jnp.any(jax.vmap(sample)(x))


def _gives(place: Place) -> str:
    """What stands in place of a missing row; "" where that is what the model asks for."""
    if place.kind != "gather" or not place.params["dimension_numbers"].start_index_map:
        return ""
    mode, value = place.params["mode"], place.params["fill_value"]
    if mode == jax.lax.GatherScatterMode.PROMISE_IN_BOUNDS:
        return "another row"
    fills = mode == jax.lax.GatherScatterMode.FILL_OR_DROP
    return "NaN" if fills and (value is None or np.isnan(value)) else ""


def _is_floating(path: Any, value: Any) -> bool:
    """A filter of Flax: all that may be a table, whatever moves."""
    del path
    dtype = getattr(value, "dtype", None)
    return dtype is not None and bool(jnp.issubdtype(dtype, jnp.floating))
