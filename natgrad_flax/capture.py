"""From a model and a batch to signals: one forward and one batched backward pass.

The model runs sample by sample under ``vmap``, so whatever it does with its inputs, the first axis
of all that is recorded counts samples. Every supported layer of a copy of the model sows its
inputs and perturbs its outputs; the derivative with respect to the perturbations is D. A parameter
that is used in any other way too gets its explicit Jacobian. The user's own model object is left
as it was.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.extend.core import get_opaque_trace_state

from natgrad_flax.layer_kinds import LAYER_KINDS, NORM_KINDS, Affine, Shape, by_features, multiplies
from natgrad_flax.layers import Dense
from natgrad_flax.shared_signals import ExplicitSignals, SharedSignals
from natgrad_flax.signals import DenseSignals, LayerSignals, ParameterForm, Signals
from natgrad_flax.usage import used_inputs

Path = tuple[Any, ...]
"""Where a layer stands in a model: names of attributes and numbers in lists."""

_TAPPED = ("kernel", "bias", "scale", "embedding")


@dataclass
class _Tape:
    """What happens to the layers in one forward pass.

    Attributes:
      names: path of a layer by the id of its object.
      candidates: values of parameters that the taps may account for, by path.
      held: what stands for them inside of the layers while uses outside are looked for.
      calls: layers in the order of their calls, with the shapes of inputs and outputs.
      strange: parameters that a layer was called with in a way that no formula covers, and why.
      level: where the model is traced; inside of a transformation nothing can be recorded.
    """

    names: dict[int, Path]
    candidates: dict[Path, Any]
    held: dict[Path, Any]
    calls: list[tuple[Path, Shape, Shape]] = field(default_factory=list)
    strange: dict[Path, str] = field(default_factory=dict)
    level: Any = field(default_factory=partial(get_opaque_trace_state, convention="nnx"))


_TAPE: ContextVar[_Tape] = ContextVar("tape")


@functools.cache
def _tapped(kind: type[nnx.Module]) -> type[nnx.Module]:
    """A subclass of a layer type that sows its inputs and perturbs its outputs."""

    class Tapped(kind):  # type: ignore[misc, valid-type]
        def __call__(self, *called: Any, **kwargs: Any) -> Array:
            tape = _TAPE.get()
            path = tape.names.get(id(self))
            if isinstance(self, nnx.BatchNorm):
                _check_held(self, path, called[1:], kwargs)
            here = tape.level == get_opaque_trace_state(convention="nnx")
            if path is None or not here or not called:
                # the parameters count as used outside of the layer
                return super().__call__(*called, **kwargs)
            x, *args = called
            own = {
                (*path, name): variable
                for name in _TAPPED
                if isinstance(variable := getattr(self, name, None), nnx.Variable)
            }
            plain = not args and all(v is None for v in kwargs.values())
            if not (plain or isinstance(self, nnx.BatchNorm)):
                tape.strange.update(dict.fromkeys(own, "called with more than its inputs"))
            features = isinstance(self, NORM_KINDS) and by_features(self, x.ndim)
            before = {name: variable.get_value() for name, variable in own.items()}
            for name, variable in own.items():
                if name not in tape.candidates or name in tape.strange:
                    continue
                if variable.get_value() is not tape.candidates[name]:
                    tape.strange[name] = "changed on its way to the layer"
                elif name in tape.held:
                    variable.set_value(tape.held[name])
            number = sum(1 for called, *_ in tape.calls if called == path)
            if features:
                inputs, outputs = self._normalised(x, own, args, kwargs)
            else:
                inputs, outputs = x, super().__call__(x, *args, **kwargs)
            for name, variable in own.items():
                variable.set_value(before[name])
            tape.calls.append((path, inputs.shape, outputs.shape))
            self.sow(nnx.Intermediate, "inputs", inputs)
            return self.perturb(f"outputs{number}", outputs)

        def _normalised(
            self, x: Array, own: dict[Path, nnx.Variable], args: list[Any], kwargs: Any
        ) -> tuple[Array, Array]:
            """The normalised inputs, and what scale and bias make of them."""
            values = {path[-1]: (variable, variable.get_value()) for path, variable in own.items()}
            for name, (variable, value) in values.items():
                fill = jnp.ones_like(value) if name == "scale" else jnp.zeros_like(value)
                variable.set_value(fill)
            inputs = outputs = super().__call__(x, *args, **kwargs)
            if "scale" in values:
                outputs = outputs * values["scale"][1]
            if "bias" in values:
                outputs = outputs + values["bias"][1]
            return inputs, outputs

    Tapped.__name__ = f"Tapped{kind.__name__}"
    return Tapped


def _check_held(layer: nnx.BatchNorm, path: Path | None, args: Any, kwargs: Any) -> None:
    """Refuses batch statistics, by which the output of a sample depends on the others."""
    chosen = args[0] if args else kwargs.get("use_running_average")
    if not (layer.use_running_average if chosen is None else chosen):
        where = "inside of a transformation" if path is None else f"at {_dotted(path)}"
        asked = "is in training mode" if chosen is None else "is called with its statistics open"
        raise ValueError(
            f"BatchNorm {where} {asked}: its outputs mix the samples of a batch, so no sample has "
            "a Jacobian, and no Fisher, of its own. Hold the statistics: call model.eval(), or "
            "pass nnx.view(model, use_running_average=True)"
        )


def _dotted(path: Path) -> str:
    return ".".join(map(str, path)) or "the root"


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


def dense_layers(model: nnx.Module) -> dict[Path, nnx.Module]:
    """The layers of a model that has no other layers with parameters than affine ones, by path.

    Raises:
      TypeError: a module of another type owns parameters or batch statistics.
    """
    found: dict[Path, nnx.Module] = {}
    for path, module in nnx.iter_modules(model):
        if type(module) in (Dense, nnx.Linear):
            found[tuple(path)] = module
            continue
        own = [v for v in vars(module).values() if isinstance(v, (nnx.Param, nnx.BatchStat))]
        if own:
            raise TypeError(
                f"{type(module).__name__} at {_dotted(tuple(path))} owns parameters, but only "
                "networks of ng.Dense and nnx.Linear layers are served here"
            )
    if not found:
        raise TypeError(f"{type(model).__name__} has no ng.Dense or nnx.Linear layer")
    return found


def parameter_paths(model: nnx.Module, wrt: Any = nnx.Param) -> dict[Path, Any]:
    """The parameters that a filter chooses, by path.

    Raises:
      ValueError: the filter chooses none.
      TypeError: it is no filter, or chooses something that is not floating.
    """
    try:
        state = nnx.state(model, wrt)
    except (TypeError, ValueError):
        raise TypeError(
            f"wrt must be a filter of flax, such as nnx.Param or nnx.PathContains(name), got "
            f"{wrt!r}"
        ) from None
    found = {tuple(path): leaf for path, leaf in nnx.to_flat_state(state)}
    if not found:
        raise ValueError(f"{type(model).__name__} has no parameters for wrt={wrt!r}")
    for path, leaf in found.items():
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(
                f"wrt={wrt!r} chooses {_dotted(path)} of dtype {leaf.dtype}, but only floating "
                "parameters can move"
            )
    return found


def plan_layers(model: nnx.Module, x: Any, wrt: Any = nnx.Param) -> tuple[list[LayerPlan], Any]:
    """Which formula serves which parameter; the model is traced once, nothing is computed.

    Args:
      model: the model.
      x: inputs, shape (N, ...), or their shape and dtype.
      wrt: filter of the parameters.

    Returns:
      The layers in the order of their first call, parameters without a formula last; and the shape
      of the outputs of one sample.

    Raises:
      ValueError: a parameter that the outputs do not depend on; outputs that depend on random
        numbers or on batch statistics, or those of a sample that are not (C,).
      TypeError: as in ``parameter_paths``.
    """
    chosen = parameter_paths(model, wrt)
    modules = {tuple(path): module for path, module in nnx.iter_modules(model)}
    graphdef, state = nnx.split(model)
    values = {path: leaf[...] for path, leaf in chosen.items()}
    keys = {
        tuple(path): leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.RngKey))
    }
    tapes: list[_Tape] = []

    def forward(free: dict[Path, Array], keys: dict[Path, Array], sample: Array) -> Array:
        copy = nnx.merge(graphdef, state, copy=True)
        names = _tap(copy)
        _put(copy, free | keys)
        tape = _Tape(names, free, values)
        tapes.append(tape)
        outputs, *_ = _captured(copy, sample, None, tape)
        return outputs

    sample = jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
    jaxpr, shape = jax.make_jaxpr(forward, return_shape=True)(values, keys, sample)
    if len(shape.shape) != 2 or shape.shape[0] != 1:
        raise ValueError(
            f"for one sample the model returns shape {shape.shape}; it must return (N, C) with "
            "N = 1: one row of outputs a sample"
        )
    order = [*sorted(values), *sorted(keys)]  # as jax flattens dictionaries
    used = dict(zip(order, used_inputs(jaxpr.jaxpr), strict=False))
    for path in keys:
        if used[path]:
            raise ValueError(
                f"the outputs depend on the random numbers of {_dotted(path[:-2])}: a random "
                "network has another Fisher at every call. Call model.eval(), or pass "
                "nnx.view(model, deterministic=True)"
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
                f"the outputs do not depend on the parameter {_dotted(path)}: leave it out with "
                "wrt=, or use it in the forward pass"
            )
        leaf = chosen[path][...]
        units = leaf.shape[-1] if leaf.ndim > 1 else leaf.size
        name: Any = path[-1]
        form = ParameterForm(name, leaf.shape, (leaf.size // units, units), (0, 1))
        reason = _reason(path, modules.get(path[:-1]), path[:-1] in plans, chosen, outside)
        found.append(LayerPlan(path[:-1], "parameter", (), form, None, reason))
    return found, jax.ShapeDtypeStruct(shape.shape[1:], shape.dtype)


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
    inputs: Shape,
    outputs: Shape,
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
        if not forms or not by_features(module, len(outputs)):
            return None
        return LayerPlan(path, kind, (), forms[0], forms[1] if forms[1:] else None)
    affine = LAYER_KINDS[type(module)](module, inputs, outputs) if multiplies(module) else None
    if affine is None or not usable(affine.kernel.name):
        return None
    if chosen[(*path, affine.kernel.name)].shape != affine.kernel.shape:
        return None
    bias = affine.bias if affine.bias and usable(affine.bias.name) else None
    return LayerPlan(path, kind, (affine,), affine.kernel, bias)


def _tap(copy: nnx.Module) -> dict[int, Path]:
    """Changes the classes of a copy's layers; the paths of layers by the ids of their objects."""
    names = {}
    for path, layer in list(nnx.iter_modules(copy)):
        if type(layer) in LAYER_KINDS or type(layer) in NORM_KINDS:
            layer.__class__ = _tapped(type(layer))
            names[id(layer)] = tuple(path)
    return names


def _put(copy: nnx.Module, values: dict[Path, Array]) -> None:
    """Sets variables of a copy."""
    for path, value in values.items():
        variable: Any = copy
        for key in path:
            plain = isinstance(variable, Mapping) or not isinstance(key, str)
            variable = variable[key] if plain else getattr(variable, key)
        variable.set_value(value)


def _captured(
    copy: nnx.Module, sample: Array, perturbations: Any, tape: _Tape
) -> tuple[Array, Any, Any]:
    captured: Any = nnx.capture(copy, nnx.Perturbation, nnx.Intermediate, init=perturbations)
    token = _TAPE.set(tape)
    try:
        outputs, used, intermediates = captured(sample[None])
    finally:
        _TAPE.reset(token)
    return outputs, used, intermediates


def linearise(
    model: nnx.Module, x: Array, wrt: Any = nnx.Param
) -> tuple[Array, Callable[[Array], Signals]]:
    """One forward pass, and the function that runs the batched backward pass.

    Args:
      model: any module; the output of a sample must not depend on the other samples.
      x: inputs, shape (N, ...).
      wrt: filter of the parameters, as ``nnx.Optimizer`` takes it; the others are held.

    Returns:
      The outputs (N, C), and a function from seeds (N, S, C), the cotangents to carry back for
      each sample, to the signals of the S seeded outputs.

    Raises:
      ValueError: as in ``plan_layers``.
    """
    plans, _ = plan_layers(model, x, wrt)
    graphdef, state = nnx.split(model)
    chosen = parameter_paths(model, wrt)
    loose = [(*p.path, p.kernel.name) for p in plans if p.kind == "parameter"]

    def forward(perturbations: Any, free: dict[Path, Array], sample: Array) -> Any:
        copy = nnx.merge(graphdef, state, copy=True)
        names = _tap(copy)
        _put(copy, free)
        outputs, used, sown = _captured(copy, sample, perturbations, _Tape(names, {}, {}))
        return outputs[0], (used, sown)

    start = {path: chosen[path][...] for path in loose}
    sample = jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
    _, (perturbed, _) = jax.eval_shape(forward, None, start, sample)
    n = x.shape[0]
    zeros = jax.tree.map(lambda leaf: jnp.zeros((n, *leaf.shape), leaf.dtype), perturbed)
    free = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (n, *leaf.shape)), start)

    def batch(perturbations: Any, free: dict[Path, Array]) -> Any:
        return jax.vmap(forward)(perturbations, free, x)

    outputs, backward, (_, sown) = jax.vjp(batch, zeros, free, has_aux=True)

    def signals(seeds: Array) -> Signals:
        carried, blocks = jax.vmap(backward, in_axes=1, out_axes=1)(seeds)
        layers = tuple(_signals(plan, sown, carried, blocks) for plan in plans)
        return Signals(layers, outputs)

    return outputs, signals


def _signals(plan: LayerPlan, sown: Any, carried: Any, blocks: dict[Path, Array]) -> LayerSignals:
    """The signals of one layer from what was recorded."""
    if plan.kind == "parameter":
        block = blocks[(*plan.path, plan.kernel.name)]
        shape = (*block.shape[:2], *plan.kernel.split)
        return ExplicitSignals(block.reshape(shape), None, plan.path, plan.kernel, None)
    inputs = _dig(sown, plan.path)["inputs"]
    # a variable holds the tuple of all calls
    inputs = inputs.get_value() if isinstance(inputs, nnx.Variable) else inputs
    slopes = _dig(carried, plan.path)
    derivatives = [slopes[f"outputs{number}"][...] for number in range(len(inputs))]
    if plan.is_norm:
        rows = []
        for name in [form.name for form in (plan.kernel, plan.bias) if form]:
            parts = [
                _over_positions(d, a if name == "scale" else None)
                for a, d in zip(inputs, derivatives, strict=True)
            ]
            rows.append(sum(parts[1:], start=parts[0]))
        scale = None if plan.bias is None else 1.0
        return ExplicitSignals(jnp.stack(rows, axis=2), scale, plan.path, plan.kernel, plan.bias)
    arranged = [form.inputs(a) for form, a in zip(plan.affine, inputs, strict=True)]
    turned = [form.derivatives(d) for form, d in zip(plan.affine, derivatives, strict=True)]
    a, d = jnp.concatenate(arranged, axis=1), jnp.concatenate(turned, axis=2)
    first = plan.affine[0]
    a = jnp.asarray(first.weight_scale, a.dtype) * a if first.weight_scale != 1 else a
    scale = None if plan.bias is None else first.bias_scale
    rest = (scale, plan.path, plan.kernel, plan.bias)
    if a.shape[1:3] == (1, 1):
        return DenseSignals(a[:, 0, 0], d[:, :, 0, 0], *rest)
    return SharedSignals(a, d, *rest)


def _over_positions(derivatives: Array, inputs: Array | None) -> Array:
    """sum over positions of D, times a where given: (N, S, features)."""
    n, s, features = *derivatives.shape[:2], derivatives.shape[-1]
    flat = derivatives.reshape(n, s, -1, features)
    if inputs is None:
        return jnp.sum(flat, axis=2)
    return jnp.einsum("nsti,nti->nsi", flat, inputs.reshape(n, -1, features))


def _dig(state: Any, path: Path) -> Any:
    return functools.reduce(lambda node, key: node[key], path, state)


def output_seeds(outputs: Array) -> Array:
    """The seeds (N, C, C) that give derivatives of the plain outputs: the identity."""
    n, c = outputs.shape
    return jnp.broadcast_to(jnp.eye(c, dtype=outputs.dtype), (n, c, c))


def jacobian_signals(model: nnx.Module, x: Array, wrt: Any = nnx.Param) -> Signals:
    """Signals of the plain outputs: S = C, J = df/dtheta.

    Args:
      model: any module; the output of a sample must not depend on the other samples.
      x: inputs, shape (N, ...).
      wrt: filter of the parameters.

    Raises:
      ValueError: as in ``linearise``.
    """
    outputs, backward = linearise(model, x, wrt)
    return backward(output_seeds(outputs))
