"""Infinite-width kernels, layer by layer, at any depth.

One pass through the network gives those of all layers (``dense_kernels``, ``conv_kernels``), so the
cost is linear in the depth. Entries are computed block by block, half of them where the kernel is
symmetric, in float64 and with an exact diagonal; on several devices, each has its share of the
blocks (``block_devices``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from natgrad_flax.arguments.arrays import check_concrete
from natgrad_flax.arguments.memory import available_memory
from natgrad_flax.optimizer.checks import check_array
from ntk_analysis.block_devices import (
    AT_ONCE,
    Block,
    Compute,
    check_devices,
    compute_blocks,
    done_everywhere,
    usable_devices,
)
from ntk_analysis.conv_kernels import block_bytes, block_rows, convolutional_block
from ntk_analysis.dense_kernels import dense_block
from ntk_analysis.empirical import Matrix, check_range
from ntk_analysis.engines import Engine
from ntk_analysis.infinite_width import (
    ConvolutionalLimit,
    Limit,
    infinite_width_limit,
    require_limit,
    sample_shape,
)
from ntk_analysis.kernel_store import KernelArrays, open_store

Progress = Callable[[int, int], object]
"""Called with the number of finished blocks and of all blocks."""

PARTS = ("tangent", "inputs", "derivatives", "nngp", "ntk")
CONVOLUTIONAL_PARTS = ("tangent", "nngp", "ntk")
"""Of a ConvNet: its inputs and derivatives are matrices over positions, too."""
_BLOCK = 256  # its arrays, 0.5 MB each, stay in the cache from layer to layer
_TEMPORARIES = 4  # of its arrays in every layer
_ARITHMETIC = "angles"  # named anew where values change, so that stored ones are not taken for them


@dataclass(frozen=True, eq=False)
class AnalyticKernels:
    """Infinite-width kernels between two sets of inputs, for one output; all (N1, N2), float64.

    For C outputs every kernel is this one times the identity over outputs.

    Attributes:
      arrays: by name, "tangent.1" to "ntk"; the properties name them.
      limit: what they are kernels of.

    Example:
      >>> import jax.numpy as jnp, numpy as np
      >>> import natgrad_flax as ng, ntk_analysis as na
      >>> from flax import nnx
      >>> model = ng.MLP((4, 8, 1), bias_variance=0.1, rngs=nnx.Rngs(0))
      >>> kernels = na.analytic_kernels(model, jnp.eye(4))
      >>> kernels.nngp.shape, len(kernels.tangent)
      ((4, 4), 2)
      >>> bool(np.allclose(sum(kernels.tangent), kernels.ntk))
      True
    """

    arrays: KernelArrays
    limit: Limit

    @property
    def tangent(self) -> list[Matrix]:
        """Theta_l without 1/N, the limit of K_l, l = 1..L."""
        return self._layers("tangent")

    @property
    def inputs(self) -> list[Matrix]:
        """Q_l = sigma_w^2 A_{l-1} + sigma_b^2, l = 1..L, the limit of a_{l-1} a_{l-1}^T."""
        return self._layers("inputs")

    @property
    def derivatives(self) -> list[Matrix]:
        """B_l, l = 1..L, the limit of D_l D_l^T; the last is 1."""
        return self._layers("derivatives")

    @property
    def forward(self) -> list[Matrix]:
        """A_l = E[phi(u_l) phi(u_l)], l = 0..L-1, with A_0 = x x^T / M_0."""
        variances = zip(
            self.inputs,
            self.limit.description["weight_variances"],
            self.limit.description["bias_variances"],
            strict=True,
        )
        return [(inputs - bias) / weight for inputs, weight, bias in variances]

    @property
    def nngp(self) -> Matrix:
        """Q_L, the covariance of the outputs at initialisation."""
        return self._array("nngp")

    @property
    def ntk(self) -> Matrix:
        """sum_l Theta_l, the neural tangent kernel, without 1/N."""
        return self._array("ntk")

    def _layers(self, part: str) -> list[Matrix]:
        return [self._array(f"{part}.{layer}") for layer in range(1, self.limit.depth + 1)]

    def _array(self, name: str) -> Matrix:
        if name not in self.arrays:
            part = name.split(".")[0]
            raise ValueError(f"{part} was not computed: ask for parts=({part!r}, ...)")
        return self.arrays[name]


def analytic_layer_kernels(
    model: nnx.Module,
    x1: ArrayLike,
    x2: ArrayLike | None = None,
    *,
    store: Path | None = None,
    progress: Progress | None = None,
    devices: Sequence[jax.Device] | None = None,
    engine: Engine = "auto",
) -> list[Matrix]:
    """The tangent kernel Theta_l of each layer at infinite width, without 1/N, for one output.

    Their sum is the analytic neural tangent kernel; the limit of ``empirical_layer_kernels``.

    Args:
      model: an ``ng.MLP`` or ``ng.ConvNet``, L layers; its parameters and hidden widths do not
        matter.
      x1: inputs, shape (N1, M_0), or images (N1, H, W, C).
      x2: inputs, shape (N2, ...); x1 by default, and then the diagonal is exact.
      store: folder for kernels that are to outlive the program; see ``analytic_kernels``.
      progress: told about finished blocks.
      devices: see ``analytic_kernels``.
      engine: see ``infinite_width_limit``.

    Returns:
      L float64 arrays (N1, N2), in forward order.

    Raises:
      ValueError, TypeError: as ``analytic_kernels``.

    Example:
      >>> import jax.numpy as jnp, natgrad_flax as ng, ntk_analysis as na
      >>> from flax import nnx
      >>> layers = na.analytic_layer_kernels(
      ...     ng.MLP((4, 8, 1), rngs=nnx.Rngs(0)), jnp.eye(4)
      ... )
      >>> [layer.shape for layer in layers], layers[0].dtype
      ([(4, 4), (4, 4)], dtype('float64'))
    """
    return analytic_kernels(
        model, x1, x2, parts=("tangent",), store=store, progress=progress, devices=devices,
        engine=engine,
    ).tangent  # fmt: skip


def analytic_kernels(
    model: nnx.Module,
    x1: ArrayLike,
    x2: ArrayLike | None = None,
    *,
    parts: Sequence[str] | None = None,
    store: Path | None = None,
    progress: Progress | None = None,
    devices: Sequence[jax.Device] | None = None,
    engine: Engine = "auto",
) -> AnalyticKernels:
    """All infinite-width kernels that are asked for, in one pass.

    For images of P positions a pair of samples costs O(P) where a ``ng.ConvNet`` flattens, and
    O(P^2) where it takes the mean over positions: for the default of four convolutions on 32 x 32
    pixels 0.07 ms and 54 ms of a core.

    Args:
      model: an ``ng.MLP`` or an ``ng.ConvNet``.
      x1: inputs, shape (N1, M_0), or images (N1, H, W, C).
      x2: inputs, shape (N2, ...); x1 by default.
      parts: any of "tangent", "inputs", "derivatives" (L arrays each), "nngp" and "ntk"; all by
        default. A ConvNet has no "inputs" and "derivatives" of a pair of samples alone.
      store: keep the kernels in files below this folder, under a hash of all that decides them.
        Finished blocks of an earlier call, killed or not, are not computed again, unless they lost
        the checksum that they were written with, which a warning says; the arrays returned are
        memory maps of the files, read-only.
      progress: told about finished blocks.
      devices: those that compute, each its share of the blocks. By default those of this process
        that have enough to do: each compiles the steps for itself. With devices of other processes
        (``jax.devices()`` after ``ng.devices.connect``) every process makes the same call, computes
        on its own devices, and has all kernels in the end; stores may be one folder or several. A
        process that is lost is an error in the others, see ``ng.devices.lost_peers``.
      engine: see ``infinite_width_limit``.

    Raises:
      ValueError: bad inputs, an unknown part, kernels that cannot fit in memory or on the disk, a
        model without an infinite-width limit, a kernel with a variance that is not positive, no
        devices, or processes that make different calls.
      TypeError: the model is neither of those, inputs are not floating, or these are no devices.
      ImportError: the engine is not installed.

    Example:
      >>> import jax.numpy as jnp, numpy as np
      >>> import natgrad_flax as ng, ntk_analysis as na
      >>> from flax import nnx
      >>> model = ng.MLP((4, 8, 1), rngs=nnx.Rngs(0))
      >>> x, x_test = jnp.eye(4), jnp.ones((2, 4))
      >>> kernels = na.analytic_kernels(model, x_test, x, parts=["nngp", "ntk"])
      >>> kernels.ntk.shape, bool((kernels.ntk > kernels.nngp).all())
      ((2, 4), True)
    """
    check_devices(devices)
    limit = infinite_width_limit(model, engine)
    convolutional = isinstance(limit, ConvolutionalLimit)
    known = CONVOLUTIONAL_PARTS if convolutional else PARTS
    parts = known if parts is None else parts
    unknown = [part for part in parts if part not in known]
    if unknown or not parts:
        raise ValueError(
            f"parts of a{' ConvNet' if convolutional else 'n MLP'} must be some of "
            f"{', '.join(known)}, got {tuple(parts)}"
        )
    first = analytic_inputs(x1, model, "x1")
    second = None if x2 is None else analytic_inputs(x2, model, "x2")
    names = _names(parts, limit.depth)
    shape = (len(first), len(first) if second is None else len(second))
    needed = len(names) * shape[0] * shape[1] * 8
    if store is None and needed > available_memory():
        raise ValueError(
            f"{len(names)} kernels of {shape[0]} x {shape[1]} need {needed / 2**30:,.1f} GiB and "
            f"the device has {available_memory() / 2**30:,.1f} GiB; ask for fewer parts, or give "
            "store= to keep them in files"
        )
    size, block_memory = _BLOCK, 8 * _BLOCK**2 * _TEMPORARIES * limit.depth
    if isinstance(limit, ConvolutionalLimit):
        _check_block(limit)
        size, block_memory = block_rows(limit), block_bytes(limit)
    _check_variances(limit, first, "x1")
    if second is not None:
        _check_variances(limit, second, "x2")
    made_of = (limit.description, _ARITHMETIC, first, second)
    with open_store(store, names, shape, made_of, size) as target:
        blocks = [
            (i, j)
            for i in range(0, shape[0], size)
            for j in range(0, shape[1], size)
            if second is not None or i <= j
        ]
        done = done_everywhere(devices or (), [*made_of, names, size], target.done)
        todo = [(i, j) for i, j in blocks if not done[i // size, j // size]]
        used = usable_devices(devices, len(todo), block_memory)
        finished = len(blocks) - len(todo)
        compute = _computation(limit, first, second, names, size)
        filled = (len(names), min(size, shape[0]), min(size, shape[1]))
        for (i, j), values in compute_blocks(compute, todo, used, filled):
            rows, width = min(size, shape[0] - i), min(size, shape[1] - j)
            target.write(i, j, [value[:rows, :width] for value in values], mirror=second is None)
            finished += 1
            if progress:
                progress(finished, len(blocks))
        return AnalyticKernels(target.arrays(), limit)


def _computation(
    limit: Limit, first: Matrix, second: Matrix | None, names: Sequence[str], size: int
) -> Compute:
    """The function that computes a block, filled up to ``size`` rows and columns."""
    columns = first if second is None else second

    def compute(block: Block, device: jax.Device | None) -> list[np.ndarray]:
        i, j = block
        diagonal = second is None and i == j
        # the switch of 64-bit mode belongs to a thread
        with jax.enable_x64(True):
            left, right = _cut(first, i, size), _cut(columns, j, size)
            if device is not None:
                left, right = jax.device_put((left, right), device)
            if isinstance(limit, ConvolutionalLimit):
                values = convolutional_block(limit, left, right, names=names, diagonal=diagonal)
            else:
                values = dense_block(limit, left, right, names=names, diagonal=diagonal)
            arrays = [np.asarray(value) for value in values]
        if not all(np.isfinite(array).all() for array in arrays):
            raise ValueError(
                "the kernels overflow: the variances of the weights, or the inputs, are too large "
                f"for a network of {limit.depth} layers; scale them"
            )
        return arrays

    return compute


def _names(parts: Sequence[str], depth: int) -> list[str]:
    names = []
    for part in PARTS:
        if part in parts:
            single = part in ("nngp", "ntk")
            names += [part] if single else [f"{part}.{layer}" for layer in range(1, depth + 1)]
    return names


def _cut(x: Matrix, start: int, size: int) -> Matrix:
    """A block of rows; a short last one is filled up, so that one compiled program serves all."""
    rows = x[start : start + size]
    missing = min(size, len(x)) - len(rows)
    return np.concatenate([rows, np.repeat(rows[-1:], missing, axis=0)]) if missing else rows


def _check_block(limit: ConvolutionalLimit) -> None:
    """Raises ValueError where the covariances of the smallest block cannot fit."""
    needed, free = AT_ONCE * block_bytes(limit), available_memory()
    if needed <= free:
        return
    positions = [math.prod(patches.positions) for patches in limit.patches]
    most = max(math.prod(limit.patches[0].shape), *positions)
    hint = 'use pooling="flatten", which needs a covariance a position, or ' if limit.pooled else ""
    raise ValueError(
        f"a pair of samples has {max(limit.covariances()):,} covariances between {most:,} "
        f"positions in one layer: {AT_ONCE} pairs at once need {needed / 2**30:,.1f} GiB and the "
        f"device has {free / 2**30:,.1f} GiB; {hint}use smaller images"
    )


def _check_variances(limit: Limit, x: Matrix, name: str) -> None:
    """Raises ValueError where all pre-activations of the first layer have the variance 0."""
    check_range(float(np.max(np.abs(x))), f"the inputs {name}")
    weight, bias = (limit.description[f"{kind}_variances"][0] for kind in ("weight", "bias"))
    variances = weight * np.mean(x**2, axis=tuple(range(1, x.ndim))) + bias
    bad = np.flatnonzero(~(variances > 0))
    if bad.size:
        raise ValueError(
            f"the kernel is not positive: sample {bad[0]} of {name} has the variance "
            f"{variances[bad[0]]:g} in layer 1, because all its inputs are 0 (or so small that "
            "their squares are); remove such samples, scale them, or use a model with biases"
        )


def analytic_inputs(x: ArrayLike, model: nnx.Module, name: str) -> Matrix:
    """Inputs of a model, (N, M_0) or (N, H, W, C), as float64.

    Args:
      x: the inputs.
      model: an ``ng.MLP`` or an ``ng.ConvNet``.
      name: of the argument, for messages.

    Raises:
      ValueError, TypeError: the model has no infinite-width limit, or the inputs do not fit it or
        are not finite floating numbers.
    """
    wanted = sample_shape(require_limit(model))
    with jax.enable_x64(True):
        array = check_array(x, name)
        check_concrete(array, name)
        values = np.asarray(array, np.float64)
    if values.shape[1:] != wanted:
        shape = ", ".join(map(str, wanted))
        raise ValueError(f"{name} must have shape (N, {shape}), got {values.shape}")
    return values
