"""Which formula serves which parameter of a model, found by tracing it once."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from natgrad_flax.arguments.arrays import check_real, shapes_of
from natgrad_flax.models.layers import Dense
from natgrad_flax.signals.affine import LAYER_KINDS, NORM_KINDS, Affine, by_features, multiplies
from natgrad_flax.signals.base import ParameterForm
from natgrad_flax.signals.recording import (
    Call,
    Path,
    Tape,
    dotted,
    make_recording,
    put,
    recorded_pass,
)
from natgrad_flax.signals.usage import used_inputs


@dataclass(frozen=True)
class LayerPlan:
    """What the signals of one layer are made of.

    Attributes:
      path: of the module that owns the parameters.
      kind: type of the module, or "parameter" for one without a formula.
      affine: the form of each call of an affine layer; empty for others.
      kernel: layout of the weights; for a normalisation of its scale, or its bias alone.
      bias: layout of the bias, None without.
      reason: why a parameter goes without a formula.
    """

    path: Path
    kind: str
    affine: tuple[Affine, ...]
    kernel: ParameterForm
    bias: ParameterForm | None
    reason: str = ""

    @property
    def is_norm(self) -> bool:
        """Whether it is the scale and bias of a normalisation."""
        return not self.affine and self.kind != "parameter"


def check_model(model: object) -> None:
    """Raises TypeError unless given a module of Flax nnx."""
    if isinstance(model, nnx.Module):
        return
    kind = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
    raise TypeError(
        f"model must be a flax.nnx.Module, got {kind}: make an instance of a class; a linen module "
        "becomes one by nnx.bridge.ToNNX(module, rngs=nnx.Rngs(0)).lazy_init(x), a function by an "
        "nnx.Module that holds its parameters as nnx.Param and calls it"
    )


def hashable_filter(wrt: Any) -> Any:
    """A filter of Flax in a form by which a compiled program is found again.

    Raises:
      TypeError: it is no filter.
    """
    if isinstance(wrt, list | tuple):
        return tuple(map(hashable_filter, wrt))
    if not isinstance(wrt, Hashable):
        raise _no_filter(wrt)
    return wrt


def _no_filter(wrt: object) -> TypeError:
    return TypeError(
        f"wrt must be a filter of flax, such as nnx.Param or nnx.PathContains(name), got {wrt!r}"
    )


def dense_layers(model: nnx.Module) -> dict[Path, nnx.Module]:
    """The layers of a model that has no other layers with parameters than affine ones, by path.

    Raises:
      TypeError: a module of another type owns parameters or batch statistics.
    """
    check_model(model)
    found: dict[Path, nnx.Module] = {}
    for path, module in nnx.iter_modules(model):
        if type(module) in (Dense, nnx.Linear):
            found[tuple(path)] = module
            continue
        own = [v for v in vars(module).values() if isinstance(v, (nnx.Param, nnx.BatchStat))]
        if own:
            raise TypeError(
                f"{type(module).__name__} at {dotted(tuple(path))} owns parameters, but only "
                "networks of ng.Dense and nnx.Linear layers are served here"
            )
    if not found:
        raise TypeError(f"{type(model).__name__} has no ng.Dense or nnx.Linear layer")
    return found


def parameter_paths(model: nnx.Module, wrt: Any = nnx.Param) -> dict[Path, Any]:
    """The parameters that a filter chooses, by path.

    Raises:
      ValueError: the filter chooses none.
      TypeError: no model, no filter, or one that chooses something that is not floating.
    """
    check_model(model)
    try:
        state = nnx.state(model, wrt)
    except (TypeError, ValueError):
        raise _no_filter(wrt) from None
    found = {tuple(path): leaf for path, leaf in nnx.to_flat_state(state)}
    if not found:
        raise ValueError(f"{type(model).__name__} has no parameters for wrt={wrt!r}")
    for path, leaf in found.items():
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(
                f"wrt={wrt!r} chooses {dotted(path)} of dtype {leaf.dtype}, but only floating "
                "parameters can move"
            )
    return found


def plan_layers(
    model: nnx.Module, x: Any, wrt: Any = nnx.Param
) -> tuple[list[LayerPlan], list[Call]]:
    """Which formula serves which parameter; the model is traced once, nothing is computed.

    Args:
      model: the model.
      x: inputs, a tree of arrays (N, ...), or of their shapes and dtypes.
      wrt: filter of the parameters.

    Returns:
      The layers in the order of their first call, parameters without a formula last; and all calls
      of layers that a tape records.

    Raises:
      ValueError: a parameter that the outputs do not depend on; outputs that depend on random
        numbers or on batch statistics, or those of a sample that are not (C,).
      TypeError: as in ``parameter_paths``; complex inputs, or outputs that are not floating.
    """
    chosen = parameter_paths(model, wrt)
    for place, leaf in jax.tree_util.tree_leaves_with_path(x):
        check_real(leaf, "x" + jax.tree_util.keystr(place))
    modules = {tuple(path): module for path, module in nnx.iter_modules(model)}
    graphdef, state = nnx.split(model)
    values = {path: leaf[...] for path, leaf in chosen.items()}
    keys = {
        tuple(path): leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.RngKey))
    }
    tapes: list[Tape] = []

    def forward(
        free: dict[Path, Array], held: dict[Path, Array], keys: dict[Path, Array], sample: Any
    ) -> Array:
        copy = nnx.merge(graphdef, state, copy=True)
        names = make_recording(copy)
        put(copy, free | keys)
        tapes.append(Tape(names, free, held))
        return recorded_pass(copy, sample, tapes[-1])

    jaxpr = jax.make_jaxpr(forward)(values, values, keys, shapes_of(x, skip=1)).jaxpr
    reached = used_inputs(jaxpr, by_derivative=True)
    if not any(reached[: 2 * len(values)]):
        raise ValueError(
            f"the outputs of {type(model).__name__} have no derivative with respect to any "
            f"parameter of wrt={wrt!r}: they are constant, or all under jax.lax.stop_gradient"
        )
    found_used = used_inputs(jaxpr)
    # jax flattens dictionaries in the order of their keys
    used = dict(zip(sorted(values), found_used, strict=False))
    random = dict(zip(sorted(keys), found_used[2 * len(values) :], strict=False))
    for path in keys:
        if random[path]:
            raise ValueError(
                f"the outputs depend on the random numbers of {dotted(path[:-2])}: a random "
                "network has another Fisher at every call. Call model.eval(), or pass "
                "nnx.view(model, deterministic=True); to train with them, take their gradient "
                'yourself and precondition it with gradient="incoming"'
            )
    tape = tapes[-1]
    outside = {path: "also used outside of its layer" for path in values if used[path]}
    outside |= tape.strange
    plans: dict[Path, LayerPlan | None] = {}
    for path, inputs, outputs in tape.calls:
        if path not in plans:
            plans[path] = _plan(modules[path], path, inputs, outputs, chosen, outside)
        elif (plan := plans[path]) is not None and plan.affine:
            again = _plan(modules[path], path, inputs, outputs, chosen, outside)
            assert again is not None
            plans[path] = replace(plan, affine=(*plan.affine, *again.affine))
    found = [plan for plan in plans.values() if plan is not None]
    covered = {
        (*plan.path, form.name) for plan in found for form in (plan.kernel, plan.bias) if form
    }
    for path in chosen:
        if path in covered:
            continue
        if path not in outside and path[:-1] not in plans:
            raise ValueError(
                f"the outputs do not depend on the parameter {dotted(path)}: leave it out with "
                "wrt=, or use it in the forward pass"
            )
        leaf = chosen[path][...]
        units = leaf.shape[-1] if leaf.ndim > 1 else leaf.size
        name: Any = path[-1]
        form = ParameterForm(name, leaf.shape, (leaf.size // units, units), (0, 1))
        reason = _reason(path, modules.get(path[:-1]), path[:-1] in plans, chosen, outside)
        found.append(LayerPlan(path[:-1], "parameter", (), form, None, reason))
    return found, tape.calls


def _reason(
    path: Path,
    module: nnx.Module | None,
    called: bool,
    chosen: Mapping[Path, Any],
    outside: Mapping[Path, str],
) -> str:
    """Why a parameter goes without a formula."""
    if module is None:
        return "it belongs to no module"
    if type(module) not in LAYER_KINDS and type(module) not in NORM_KINDS:
        return f"no formula for {type(module).__name__}"
    if not called:
        return "its layer is called inside of a transformation, or not at all"
    if path in outside:
        return outside[path]
    weights = (*path[:-1], "kernel")
    if path[-1] == "bias" and (weights in outside or weights not in chosen):
        return "the kernel of its layer goes without one"
    return "no formula for this form of the layer"


def _plan(
    module: nnx.Module,
    path: Path,
    inputs: Any,
    outputs: Any,
    chosen: dict[Path, Any],
    outside: Mapping[Path, str],
) -> LayerPlan | None:
    """The formula of a called layer, None where its parameters go without."""

    def usable(name: str) -> bool:
        return (*path, name) in chosen and (*path, name) not in outside

    kind = type(module).__name__
    if isinstance(module, NORM_KINDS):
        forms = [
            ParameterForm.plain(name, chosen[(*path, name)].shape)
            for name in ("scale", "bias")
            if usable(name)
        ]
        if not forms or not by_features(module, outputs.ndim):
            return None
        return LayerPlan(path, kind, (), forms[0], forms[1] if forms[1:] else None)
    if not multiplies(module):
        return None
    affine = LAYER_KINDS[type(module)](module, inputs.shape, outputs.shape)
    if affine is None or not usable(affine.kernel.name):
        return None
    if chosen[(*path, affine.kernel.name)].shape != affine.kernel.shape:
        return None
    bias = affine.bias if affine.bias and usable(affine.bias.name) else None
    return LayerPlan(path, kind, (affine,), affine.kernel, bias)
