"""Which formula serves which parameter of a model, found in its traced program."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax import Array
from jax.interpreters import partial_eval

from natgrad_flax.arguments.arrays import check_real, shapes_of
from natgrad_flax.signals.affine import Affine, affine_map
from natgrad_flax.signals.base import ParameterForm
from natgrad_flax.signals.model import dotted, outputs_of, parameter_paths, put
from natgrad_flax.signals.program import Path, Place, Program, Tape, Uses, run
from natgrad_flax.signals.survey import survey
from natgrad_flax.signals.usage import has_derivative
from natgrad_flax.signals.views import Step, View, common_factors

Shape = tuple[int, ...]


@dataclass(frozen=True)
class LayerPlan:
    """What the signals of one layer are made of.

    Attributes:
      path: of the module that owns the parameters.
      kernel: layout of the weights; of an explicit block its first parameter.
      bias: layout of the bias, or of a second parameter of an explicit block; None without.
      places: where the weights act, and how they read as affine maps; empty for an explicit block.
      bias_scale: the factor in front of the bias, beside that of the weights.
      reason: why the block is explicit.
    """

    path: Path
    kernel: ParameterForm
    bias: ParameterForm | None
    places: tuple[tuple[Place, Affine], ...] = ()
    bias_scale: float = 1.0
    reason: str = ""

    @property
    def is_explicit(self) -> bool:
        """Whether it goes without a formula."""
        return not self.places

    @property
    def parameters(self) -> list[Path]:
        """Paths of its parameters."""
        return [(*self.path, form.name) for form in (self.kernel, self.bias) if form]


class Plan(NamedTuple):
    """The program of a model on one sample, and its layers.

    Attributes:
      program: of ``survey``; its inputs are parameters by path, other state, and the sample.
      paths: of the parameters, in the order of the inputs.
      state: the inputs before the sample.
      of_sample: for each array of a sample whether the program has it as an input.
      layers: in the order in which the program uses them first.
    """

    program: Program
    paths: list[Path]
    state: list[Array]
    of_sample: list[bool]
    layers: list[LayerPlan]

    @property
    def values(self) -> dict[Path, Array]:
        """The parameters."""
        return dict(zip(self.paths, self.state, strict=False))

    @property
    def places(self) -> dict[int, Place]:
        """Those of all layers, by their numbers."""
        return {place.number: place for layer in self.layers for place, _ in layer.places}

    def run(
        self, perturbations: Mapping[int, Array], free: Mapping[Path, Array], sample: Any
    ) -> tuple[Array, Tape]:
        """The outputs (C,) of one sample, and what ``program.run`` records.

        Args:
          perturbations: as in ``program.run``.
          free: parameters in place of those of the model.
          sample: a tree of arrays.
        """
        arguments = list(self.state)
        for path, value in free.items():
            arguments[self.paths.index(path)] = value
        given = zip(jax.tree.leaves(sample), self.of_sample, strict=True)
        arguments += [leaf for leaf, is_used in given if is_used]
        (outputs,), tape = run(self.program, arguments, perturbations)
        return outputs, tape


def model_arguments(model: nnx.Module, wrt: Any) -> tuple[Any, tuple[Any, Any, Any]]:
    """The function of one sample that is traced, and its arguments but for the sample.

    Returns:
      From the parameters by path, the random keys by path, all other state and a sample to the
      outputs (C,); and the first three of these.

    Raises:
      ValueError, TypeError: as in ``parameter_paths``.
    """
    chosen = parameter_paths(model, wrt)
    graphdef, state = nnx.split(model)
    values = {path: leaf[...] for path, leaf in chosen.items()}
    keys = {
        tuple(path): leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.RngKey))
    }

    def forward(values: dict[Path, Array], keys: Any, state: Any, sample: Any) -> Array:
        copy = nnx.merge(graphdef, state, copy=True)
        put(copy, values | keys)
        held = nnx.to_flat_state(nnx.state(copy, nnx.BatchStat))
        before = {path: leaf[...] for path, leaf in held}
        outputs = outputs_of(copy, jax.tree.map(lambda leaf: leaf[None], sample))
        _check_held(copy, before)
        return outputs[0]

    return forward, (values, keys, state)


def _check_held(copy: nnx.Module, before: Mapping[Path, Array]) -> None:
    """Refuses batch statistics, by which the output of a sample depends on the others."""
    for path, leaf in nnx.to_flat_state(nnx.state(copy, nnx.BatchStat)):
        if leaf[...] is before[path]:
            continue
        modules = {tuple(p): type(m).__name__ for p, m in nnx.iter_modules(copy)}
        kind = modules.get(tuple(path[:-1]), "a module")
        raise ValueError(
            f"{kind} at {dotted(tuple(path[:-1]))} is in training mode: its outputs mix the "
            "samples of a batch, so no sample has a Jacobian, and no Fisher, of its own. Hold the "
            "statistics: call model.eval(), or pass nnx.view(model, use_running_average=True); to "
            "train with batch statistics, take their gradient yourself and precondition it with "
            'gradient="incoming"'
        )


def plan_layers(model: nnx.Module, x: Any, wrt: Any = nnx.Param) -> Plan:
    """Which formula serves which parameter; the model is traced once, nothing is computed.

    Args:
      model: the model.
      x: inputs, a tree of arrays (N, ...), or of their shapes and dtypes.
      wrt: filter of the parameters.

    Raises:
      ValueError: a parameter that the outputs do not depend on; outputs that depend on random
        numbers or on batch statistics, or those of a sample that are not (C,).
      TypeError: as in ``parameter_paths``; complex inputs, or outputs that are not floating.
    """
    for place, leaf in jax.tree_util.tree_leaves_with_path(x):
        check_real(leaf, "x" + jax.tree_util.keystr(place))
    forward, (values, keys, state) = model_arguments(model, wrt)
    closed = jax.make_jaxpr(forward)(values, keys, state, shapes_of(x, skip=1))
    # jax flattens dictionaries in the order of their keys
    paths, places = sorted(values), sorted(keys)
    if not has_derivative(closed.jaxpr, len(paths)):
        raise ValueError(
            f"the outputs of {type(model).__name__} have no derivative with respect to any "
            f"parameter of wrt={wrt!r}: they are constant, or all under jax.lax.stop_gradient"
        )
    jaxpr, used = partial_eval.dce_jaxpr(closed.jaxpr, [True])
    for path, is_used in zip(places, used[len(paths) :], strict=False):
        if is_used:
            raise ValueError(
                f"the outputs depend on the random numbers of {dotted(path[:-2])}: a random "
                "network has another Fisher at every call. Call model.eval(), or pass "
                "nnx.view(model, deterministic=True); to train with them, take their gradient "
                'yourself and precondition it with gradient="incoming"'
            )
    for path, is_used in zip(paths, used, strict=False):
        if not is_used:
            raise ValueError(
                f"the outputs do not depend on the parameter {dotted(path)}: leave it out with "
                "wrt=, or use it in the forward pass"
            )
    tags: list[View | None] = [View.of(path, values[path].shape) for path in paths]
    tags += [None] * (len(jaxpr.invars) - len(tags))
    program, uses = survey(jaxpr, closed.consts, tags)
    uses = {path: uses.get(path, Uses(len(jaxpr.eqns), others=["others"])) for path in paths}
    leaves = jax.tree.leaves((values, keys, state))
    kept = [leaf for leaf, is_used in zip(leaves, used, strict=False) if is_used]
    shapes = {path: tuple(leaf.shape) for path, leaf in values.items()}
    return Plan(
        program,
        paths,
        kept,
        used[len(leaves) :],
        _layers(uses, shapes),
    )


def _layers(uses: Mapping[Path, Uses], shapes: Mapping[Path, Shape]) -> list[LayerPlan]:
    """The layers in the order of their first use; parameters that only add or scale join."""
    found: list[tuple[tuple[int, ...], LayerPlan]] = []
    covered: set[Path] = set()
    for path, use in uses.items():
        for plan in _weights(path, use, uses, shapes):
            found.append((_place_in_order(use, plan), plan))
            covered.update(plan.parameters)
    for path in sorted(set(uses) - covered, key=lambda path: uses[path].first):
        if path in covered:
            continue
        others = set(uses) - covered - {path}
        partner = next((p for p in sorted(others) if _joins(path, p, uses, shapes)), None)
        pair = [path] if partner is None else [path, partner]
        covered.update(pair)
        for plan in _explicit(pair, uses, shapes):
            found.append((_place_in_order(uses[path], plan), plan))
    return [plan for _, plan in sorted(found, key=lambda both: both[0])]


def _place_in_order(use: Uses, plan: LayerPlan) -> tuple[int, ...]:
    """By the first use; of the layers of a loop all of one step before those of the next."""
    lengths = [loop.parts for loop in use.loops]
    steps = np.unravel_index(plan.kernel.part or 0, lengths) if use.loops else ()
    order: list[int] = []
    for own, step in zip(use.loops, map(int, steps), strict=True):
        order += [own.loop.number, -step if own.backwards else step]
    return (*order, use.first)


def _weights(
    path: Path,
    use: Uses,
    uses: Mapping[Path, Uses],
    shapes: Mapping[Path, Shape],
) -> list[LayerPlan]:
    """The layers of a parameter that acts as weights wherever it is used; none for others."""
    if use.others or use.biases or not use.places or not use.equally_often:
        return []
    form, chosen = _oriented(path, use.places, shapes[path])
    if form is None:
        return []
    bias, scale = None, 1.0
    tied = any(found.turned for found in chosen)
    for other, added in uses.items():
        beside = other[:-1] == path[:-1] and not tied
        if beside and added.biases and not (added.others or added.places):
            joined = _bias(other, added, use.places, chosen, shapes[other])
            if joined is not None:
                bias, scale = joined
    maps_of = tuple(zip(use.places, chosen, strict=True))
    return [
        LayerPlan(
            path[:-1], form._replace(part=part), bias and bias._replace(part=part), maps_of, scale
        )
        for part in use.parts(shapes[path])
    ]


def _oriented(
    path: Path, places: list[Place], shape: Shape
) -> tuple[ParameterForm | None, list[Affine]]:
    """The layout of weights that serves all places, some of which may take the transpose.

    None where there is none. It is that of the first place, or of the first where a table is
    looked up, whose inputs are one-hot so.
    """
    tables = [place.kind == "gather" for place in places]
    base = affine_map(places[tables.index(True) if any(tables) else 0])
    if base is None:
        return None, []

    def layout(found: Affine) -> tuple[ParameterForm | None, tuple[int, int, int]]:
        return found.view.form(path[-1], shape, found.matrix), found.sizes

    chosen, common = list[Affine](), layout(base)
    for found in map(affine_map, places):
        if found is not None and layout(found) != common and found.sizes[0] == 1:
            found = found.transposed()
        if found is None or layout(found) != common:
            return None, []
        chosen.append(found)
    return common[0], chosen


def _bias(
    path: Path, use: Uses, places: list[Place], maps: list[Affine], shape: Shape
) -> tuple[ParameterForm, float] | None:
    """The layout and scale of a bias that is added to every result of some places."""
    added = {bias.result.source: bias for bias in use.biases}
    if len(added) != len(use.biases) or set(added) != {place.number for place in places}:
        return None
    found = set()
    for place, chosen in zip(places, maps, strict=True):
        bias = added[place.number]
        factors = common_factors((bias.result, bias.view))
        if factors is None or not bias.result.scale or _loops(bias.view) != _loops(place.view):
            return None
        flat = [factor for axis in factors for factor in axis]
        outputs = place.outputs.shape
        strides = [math.prod(outputs[axis + 1 :]) for axis in range(len(outputs))]
        ordered: list[tuple[int, int]] = []
        for axis in chosen.units:
            low, size = strides[axis], outputs[axis]
            inside = [f for f in flat if low <= f[1][0] < low * size]
            inside.sort(key=lambda f: -f[1][0])
            ordered += [(size, stride) for size, (_, stride) in inside]
            flat = [f for f in flat if f not in inside]
        units = math.prod(outputs[axis] for axis in chosen.units)
        if any(stride for _, (_, stride) in flat) or math.prod(n for n, _ in ordered) != units:
            return None
        view = bias.view._replace(axes=(tuple(ordered),))
        form = view.form(path[-1], shape, [0])
        if form is None:
            return None
        found.add((form, bias.view.scale / bias.result.scale))
    return found.pop() if len(found) == 1 else None


def _loops(view: View) -> list[Step]:
    """The loops that take another part at each step, and which."""
    return [step._replace(stride=0) for step in view.steps]


def _joins(
    path: Path, other: Path, uses: Mapping[Path, Uses], shapes: Mapping[Path, Shape]
) -> bool:
    """Whether of two parameters of one module one scales features and the other shifts them."""
    both = [uses[p] for p in (path, other)]
    kinds = {frozenset(use.others) for use in both}
    return (
        path[:-1] == other[:-1]
        and shapes[path] == shapes[other]
        and len(_of_one(both[0], shapes[path])) == 1
        and both[0].steps == both[1].steps
        and not any(use.places or use.biases for use in both)
        and kinds == {frozenset({"mul"}), frozenset({"add"})}
    )


def _of_one(use: Uses, shape: Shape) -> Shape:
    """The shape of what one layer has of a parameter."""
    return shape[len(use.lead(shape)) :]


def _explicit(
    paths: list[Path], uses: Mapping[Path, Uses], shapes: Mapping[Path, Shape]
) -> list[LayerPlan]:
    """A block for a parameter, or for two that scale and shift the same features."""
    paths = sorted(paths, key=lambda path: "add" in uses[path].others)
    use, whole = uses[paths[0]], shapes[paths[0]]
    shape = _of_one(use, whole)
    units = shape[-1] if len(shape) > 1 else math.prod(shape)
    split = (math.prod(shape) // units, units) if len(paths) == 1 else shape
    order, lead = tuple(range(len(split))), use.lead(whole)
    forms = [ParameterForm(path[-1], shape, split, order, lead=lead) for path in paths]
    reason = _reason(use, shape)
    return [
        LayerPlan(
            paths[0][:-1],
            forms[0]._replace(part=part),
            forms[1]._replace(part=part) if forms[1:] else None,
            reason=reason,
        )
        for part in use.parts(whole)
    ]


def _reason(use: Uses, shape: Shape) -> str:
    """Why a parameter goes without a formula."""
    others = list(dict.fromkeys(use.others))
    if len(shape) == 1 and not (use.places or use.biases) and set(others) <= {"mul", "add"}:
        return "scales or shifts features"
    if use.places and (others or use.biases):
        return f"weights that are also used by {', '.join(others or ['add'])}"
    if use.places and not use.equally_often:
        return "weights of which loops use some parts more often than others"
    if use.places:
        return "weights of products of different forms"
    if use.biases:
        return "added to products that are not all of one layer"
    return f"used by {', '.join(others)}"
