"""Whether the signals of a network fit, and what a structure makes of them, known from shapes.

What is counted are the arrays that XLA keeps at once in a compiled step on a CPU (its plan, which
measured peaks follow): it computes the Gram matrices of all layers before it adds or solves.
"""

from __future__ import annotations

import math

import jax

from natgrad_flax.arguments import memory
from natgrad_flax.signals.base import LayerSignals
from natgrad_flax.signals.dense import Signals
from natgrad_flax.signals.lookup import LookupSignals
from natgrad_flax.signals.shared import ExplicitSignals, SharedSignals
from natgrad_flax.signals.tied import TiedSignals
from natgrad_flax.structures import Structure


def signal_entries(layer: LayerSignals) -> int:
    """Numbers that the signals of a layer hold."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(layer))


def sample_jacobian_entries(structure: Structure | None, layer: LayerSignals) -> int:
    """Numbers of what a structure builds of shared weights besides: Jacobians or pairs; else 0.

    Args:
      structure: the structure; None for Gram matrices, as ``Exact`` builds them.
      layer: the signals of the layer, or their shapes.
    """
    needs = "gram" if structure is None else structure.plain.shared_weights
    if not isinstance(layer, SharedSignals) or needs == "rows":
        return 0
    n, s = layer.num_samples, layer.num_directions
    if needs == "squares" and isinstance(layer, (LookupSignals, TiedSignals)):
        # of one sample after the other, at most
        return s * layer.num_params
    if needs == "gram" and layer.pairs_are_cheaper():
        return (n * layer.num_positions) ** 2 * layer.num_groups * (1 + s**2)
    return n * s * layer.num_params


def _copies(layer: LayerSignals) -> int:
    """How often the signals of a layer are there while they are computed.

    A block of gradients is transposed; patches of images, and derivatives on their way back through
    a convolution, are there besides what is recorded.
    """
    return 3 if isinstance(layer, SharedSignals) else 2 if isinstance(layer, ExplicitSignals) else 1


def step_bytes(structure: Structure, signals: Signals) -> float:
    """Bytes that a step needs beside parameters, batch and update.

    Args:
      structure: the structure.
      signals: their shapes, from ``jax.eval_shape``.
    """
    held = sum(_copies(layer) * signal_entries(layer) for layer in signals.layers)
    # built for one layer after the other
    built = max(sample_jacobian_entries(structure, layer) for layer in signals.layers)
    system = structure.system_arrays(signals) * structure.gram_size(signals) ** 2
    return signals.outputs.dtype.itemsize * (held + built + system)


def check_signals_fit(structure: Structure, signals: Signals) -> None:
    """Refuses a batch whose signals cannot fit, before any work.

    Args:
      structure: what is made of them.
      signals: their shapes, from ``jax.eval_shape``.

    Raises:
      ValueError: a Jacobian block, the per-sample Jacobians of shared weights, or the inputs and
        derivatives of a layer need more than the device has, together with the others and the
        system that is solved.
    """
    itemsize = signals.outputs.dtype.itemsize
    held = [itemsize * signal_entries(layer) for layer in signals.layers]
    built = [itemsize * sample_jacobian_entries(structure, layer) for layer in signals.layers]
    total = step_bytes(structure, signals)
    if total <= memory.SMALL or total <= (free := memory.available_memory()):
        return
    needs = [a + b for a, b in zip(held, built, strict=True)]
    largest = max(range(len(needs)), key=needs.__getitem__)
    layer = signals.layers[largest]
    where = ".".join(map(str, layer.path)) or "the root"
    sizes = f"{layer.num_samples} x {layer.num_directions} x {layer.num_params}"
    if isinstance(layer, ExplicitSignals):
        names = [form.name for form in (layer.kernel_form, layer.bias_form) if form]
        what = f"the explicit Jacobian block of {' and '.join(names)} at {where}, N S P = {sizes},"
    elif built[largest] > held[largest]:
        what = f"the per-sample Jacobians of {where} (N S P = {sizes}), or pairs of its positions,"
    else:
        shapes = [str(leaf.shape) for leaf in jax.tree.leaves(layer)]
        what = f"the inputs and derivatives of {where}, {' and '.join(shapes)},"
    rest = f" of the {total / 2**30:,.1f} GiB that a step needs"
    raise ValueError(
        f"{what} need {needs[largest] / 2**30:,.1f} GiB{rest}, and the device has "
        f'{free / 2**30:,.1f} GiB: use a smaller batch or fisher="mc", or leave the parameters '
        "out with wrt="
    )
