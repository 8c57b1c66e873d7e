"""What natgrad makes of a model: formula, sizes and cost of every layer, from shapes alone."""

from __future__ import annotations

import html
import io
import math
import textwrap
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from natgrad_flax.arguments.arrays import own_promotion
from natgrad_flax.arguments.renamed import Renamed
from natgrad_flax.arguments.scalars import check_integer
from natgrad_flax.costs.flops import cost_of
from natgrad_flax.costs.programs import Approximation, approximate, shared_system
from natgrad_flax.losses import Heads, LossLike, check_losses
from natgrad_flax.losses.by_head import output_terms
from natgrad_flax.optimizer.checks import check_input_shape, check_inputs, check_structure
from natgrad_flax.signals.capture import linearise
from natgrad_flax.signals.dense import DenseSignals, Signals
from natgrad_flax.signals.fisher import FisherKind, check_kind
from natgrad_flax.signals.model import parameter_paths, with_heads
from natgrad_flax.signals.plan import LayerPlan, plan_layers
from natgrad_flax.signals.shared import ExplicitSignals, SharedSignals
from natgrad_flax.signals.stacked import arranged
from natgrad_flax.signals.tied import TiedSignals
from natgrad_flax.structures import Structure
from natgrad_flax.structures.memory import sample_jacobian_entries, signal_entries

WIDTH = 200
"""Characters of a printed line at most; a table is as narrow as its cells let it."""


@dataclass(frozen=True)
class LayerDescription:
    """One layer, or one parameter without a formula.

    Attributes:
      path: of the module that owns the parameters.
      type: of that module.
      parameters: names and shapes.
      formula: of the Jacobian J_l: "dense (a, D)", "shared (a, D)" over positions,
        "tied (a, D)" over those of weights and of their transpose, "explicit block".
      reason: why the block is explicit, "" where it is not.
      positions: T, how many positions of a sample share the weights, in all calls together.
      groups: G, sets of units with inputs of their own.
      fan_in: K, parameters a unit, with the bias.
      units: M.
      signals: bytes of inputs and derivatives, or of the block.
      gram_by: how the Gram matrix K_l = J_l J_l^T comes about: "inputs and units", "pairs of
        positions" or "Jacobians".
      gram: bytes of K_l, (N S)^2 entries, and of what it is built from besides the signals.
      flops: of the layer in the forward and the backward passes; "mc" has one more than S.
      gram_flops: to build K_l.
      approximation: what the structure makes of it, None without a structure.
    """

    path: str
    type: str
    parameters: tuple[tuple[str, tuple[int, ...]], ...]
    formula: str
    reason: str
    positions: int
    groups: int
    fan_in: int
    units: int
    signals: int
    gram_by: str
    gram: int
    flops: int
    gram_flops: int
    approximation: Approximation | None

    @property
    def num_params(self) -> int:
        """P_l."""
        return self.fan_in * self.units


@dataclass(frozen=True)
class Description:
    """What natgrad makes of a model; ``print`` shows it as a table.

    Attributes:
      layers: one entry a layer, in the order of the signals.
      left_out: parameters that ``wrt`` does not choose, with their shapes.
      structure: its name, "" without.
      system: what the structure solves for all layers together, None where every layer is solved
        on its own.
      num_samples, num_directions, num_outputs: N, S, C.
      dtype: of the outputs.
    """

    layers: tuple[LayerDescription, ...]
    left_out: tuple[tuple[str, tuple[int, ...]], ...]
    structure: str
    system: Approximation | None
    num_samples: int
    num_directions: int
    num_outputs: int
    dtype: str

    num_seeds = Renamed("num_directions")

    @property
    def num_params(self) -> int:
        """P."""
        return sum(layer.num_params for layer in self.layers)

    def __str__(self) -> str:
        table = Table(box=box.SIMPLE, pad_edge=False, padding=(0, 1))
        for name in (
            "layer",
            "parameters",
            "formula",
            "sizes",
            "signals",
            self.structure or "Gram",
        ):
            table.add_column(
                name, no_wrap=name != "formula", max_width=28 if name == "formula" else None
            )
        for layer in self.layers:
            table.add_row(*map(Text, _cells(layer)))
        console = Console(file=io.StringIO(), width=WIDTH)
        console.print(table)
        assert isinstance(console.file, io.StringIO)
        lines = [line.rstrip() for line in console.file.getvalue().splitlines()]
        return "\n".join([*(line for line in lines if line), *self._totals()])

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"

    def _totals(self) -> list[str]:
        lines = [
            f"N = {self.num_samples} samples, S = {self.num_directions} output directions a "
            f"sample, C = {self.num_outputs} outputs, {self.num_params:,} parameters in "
            f"{len(self.layers)} blocks, {self.dtype}",
            f"signals: {_bytes(sum(a.signals for a in self.layers))}, "
            f"{_flops(sum(a.flops for a in self.layers))} in the layers",
        ]
        if not self.structure:
            lines.append(
                f"Gram matrices: {_bytes(sum(a.gram for a in self.layers))}, "
                f"{_flops(sum(a.gram_flops for a in self.layers))}"
            )
        else:
            parts = [a.approximation for a in self.layers if a.approximation]
            parts += [self.system] if self.system else []
            line = f"{self.structure}: {_bytes(sum(part.held for part in parts))}, "
            line += _flops(sum(part.flops for part in parts))
            lines.append(line + (f"; {self.system.form}" if self.system else ""))
        if self.left_out:
            names = ", ".join(f"{path} {shape}" for path, shape in self.left_out)
            lines += textwrap.wrap(f"left out by wrt: {names}", 112, subsequent_indent="  ")
        return lines


@own_promotion()
def describe(
    model: nnx.Module,
    x: Any,
    *,
    structure: Structure | None = None,
    loss: LossLike | None = None,
    fisher: FisherKind = "mc",
    mc_samples: int = 1,
    wrt: Any = nnx.Param,
) -> Description:
    """Which formula serves which layer of a model, with its sizes and its cost.

    Nothing is computed: the model is traced with the shapes of a batch.

    Args:
      model: the model, or its shapes from ``nnx.eval_shape``.
      x: inputs, an array (N, ...) or a tree of them, or of ``jax.ShapeDtypeStruct``.
      structure: the Fisher approximation; without one the Gram matrices are described. Of one on a
        mesh of devices, what all of them hold and compute together is described.
      loss: for the number of output directions of the exact Fisher, C without it; a model of
        several heads needs theirs.
      fisher: "exact", "mc", "empirical" or "improved".
      mc_samples: targets drawn a sample, for "mc".
      wrt: the parameters that move.

    Raises:
      ValueError, TypeError: a model or a batch that natgrad cannot serve, with the reason.

    Example:
      >>> import jax, jax.numpy as jnp, natgrad_flax as ng
      >>> from flax import nnx
      >>> model = ng.MLP((4, 8, 1), rngs=nnx.Rngs(0))
      >>> batch = jax.ShapeDtypeStruct((5, 4), jnp.float32)
      >>> found = ng.describe(
      ...     model, batch, structure=ng.KFAC(), loss=ng.MeanSquaredError()
      ... )
      >>> [(layer.path, layer.formula, layer.num_params) for layer in found.layers]
      [('layers.0', 'dense (a, D)', 32), ('layers.1', 'dense (a, D)', 8)]
      >>> print(str(found).splitlines()[0])  # print(found) shows the whole table
       layer      parameters      formula        sizes      signals    KFAC
    """
    if structure is not None:
        check_structure(structure)
        structure = structure.plain
    known = None if loss is None else check_losses(loss)
    check_kind(fisher)
    mc_samples = check_integer("mc_samples", mc_samples, 1)
    x = check_inputs(x, model)
    check_input_shape(model, x)
    if isinstance(known, Heads):
        model, known = with_heads(model, x, known)
    graphdef, state = nnx.split(model)
    plans: list[LayerPlan] = []

    def run(state: Any, x: Any) -> Signals:
        traced = nnx.merge(graphdef, state)
        plans.extend(plan_layers(traced, x, wrt).layers)
        outputs, backward = linearise(traced, x, wrt)
        n, *shape = outputs.shape
        directions = {"exact": math.prod(shape), "mc": mc_samples}.get(fisher, 1)
        # the factor of a function of the user's has as many columns as there are outputs
        if fisher == "exact" and known is not None and not known.needs_targets:
            directions = output_terms(known, outputs, None, None).directions().shape[1]
        found = backward(jnp.zeros((n, directions, *shape), outputs.dtype))
        return arranged(found, None, "none")[0]

    signals = jax.eval_shape(run, state, x)
    types = {tuple(path): type(module).__name__ for path, module in nnx.iter_modules(model)}
    layers = tuple(
        _describe(plan, signals, index, structure, types.get(plan.path, ""), fisher != "mc")
        for index, plan in enumerate(plans)
    )
    system = None
    if structure is not None:
        made = [layer.approximation for layer in layers if layer.approximation]
        system = shared_system(structure, signals, made, inside=fisher != "mc")
    chosen = parameter_paths(model, wrt)
    others = nnx.to_flat_state(nnx.state(model, nnx.Param))
    left_out = [(path, leaf.shape) for path, leaf in others if tuple(path) not in chosen]
    return Description(
        layers,
        tuple((_name(tuple(path)), tuple(shape)) for path, shape in left_out),
        structure.name if structure else "",
        system,
        signals.num_samples,
        signals.num_directions,
        math.prod(signals.outputs.shape[1:]),
        str(signals.outputs.dtype),
    )


def _name(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path)) or "(root)"


def _describe(
    plan: LayerPlan,
    signals: Signals,
    index: int,
    structure: Structure | None,
    kind: str,
    inside: bool,
) -> LayerDescription:
    layer = signals.layers[index]
    itemsize = signals.outputs.dtype.itemsize
    positions = layer.num_positions if isinstance(layer, SharedSignals) else 1
    groups = layer.num_groups if isinstance(layer, SharedSignals) else 1
    if isinstance(layer, DenseSignals):
        formula = "dense (a, D)"
    elif isinstance(layer, TiedSignals):
        formula = "tied (a, D)"
    elif isinstance(layer, SharedSignals):
        formula = "shared (a, D)"
    else:
        formula = "explicit block"
    forms = [form for form in (plan.kernel, plan.bias) if form]
    n, s = layer.num_samples, layer.num_directions
    backward = s if inside else s + 1
    passes = 2 * n * positions * layer.num_params * (1 + backward)
    if isinstance(layer, ExplicitSignals):
        passes = 2 * n * backward * layer.num_params
    return LayerDescription(
        _name(plan.path),
        kind,
        tuple((form.name, tuple(form.shape)) for form in forms),
        formula,
        plan.reason,
        positions,
        groups,
        layer.fan_in,
        layer.num_units,
        itemsize * signal_entries(layer),
        layer.gram_by,
        itemsize * (sample_jacobian_entries(None, layer) + (n * s) ** 2),
        passes,
        round(cost_of(lambda layer: layer.gram(), layer).flops),
        approximate(structure, signals, index, inside=inside) if structure else None,
    )


def _cells(layer: LayerDescription) -> list[str]:
    sizes = [f"T {layer.positions}"] if layer.positions > 1 else []
    sizes += [f"G {layer.groups}"] if layer.groups > 1 else []
    sizes += [f"K {layer.fan_in}", f"M {layer.units}"]
    made = layer.approximation
    if made is None:
        last = f"by {layer.gram_by}\n{_bytes(layer.gram)}, {_flops(layer.gram_flops)}"
    else:
        last = f"{made.form}\n{_bytes(made.held)}, {_flops(made.flops)}"
    return [
        f"{layer.path}\n{layer.type}",
        "\n".join(f"{name} {shape}" for name, shape in layer.parameters),
        layer.formula + (f": {layer.reason}" if layer.reason else ""),
        ", ".join(sizes),
        f"{_bytes(layer.signals)}\n{_flops(layer.flops)}",
        last,
    ]


def _bytes(count: int) -> str:
    return _scaled(count, ("B", "kB", "MB", "GB", "TB"))


def _flops(count: int) -> str:
    return _scaled(count, ("flop", "kflop", "Mflop", "Gflop", "Tflop"))


def _scaled(count: int, units: tuple[str, ...]) -> str:
    step = min(len(units) - 1, int(math.log10(max(count, 1))) // 3)
    value = count / 1000**step
    return (
        f"{value:.0f} {units[step]}" if step == 0 or value >= 99.5 else f"{value:.2g} {units[step]}"
    )
