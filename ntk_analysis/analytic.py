"""Infinite-width kernels, layer by layer, at any depth, through neural-tangents.

Theta_l = B_l Q_l entry by entry (Karakida & Osawa 2020, Section 2 and Supplement E): Q_l is the
limit of the Gram matrix of the scaled inputs a_{l-1}, B_l that of the derivatives D_l. One pass
through the network gives all of them: each activation is run with a tangent kernel of ones, which
comes out as E[phi' phi'], and B_l is a running product of those from the last layer down. So the
cost is linear in the depth. Entries are computed block by block, half of them where the kernel is
symmetric, in float64 and with an exact diagonal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import ArrayLike

from natgrad_flax.checks import available_memory, check_inputs
from ntk_analysis.empirical import Matrix
from ntk_analysis.kernel_store import KernelArrays, open_store
from ntk_analysis.twin import InfiniteWidthTwin, infinite_width_twin, require_mlp

Progress = Callable[[int, int], object]
"""Called with the number of finished blocks and of all blocks."""

PARTS = ("tangent", "inputs", "derivatives", "nngp", "ntk")
_BLOCK = 256  # its arrays, 0.5 MB each, stay in the cache from layer to layer
_AT_ONCE = 2


@dataclass(frozen=True, eq=False)
class AnalyticKernels:
    """Infinite-width kernels between two sets of inputs, for one output; all (N1, N2), float64.

    For C outputs every kernel is this one times the identity over outputs.

    Attributes:
      arrays: by name, "tangent.1" to "ntk"; the properties name them.
      twin: what they are kernels of.
    """

    arrays: KernelArrays
    twin: InfiniteWidthTwin

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
            self.twin.description["weight_variances"],
            self.twin.description["bias_variances"],
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
        return [self._array(f"{part}.{layer}") for layer in range(1, self.twin.depth + 1)]

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
) -> list[Matrix]:
    """The tangent kernel Theta_l of each layer at infinite width, without 1/N, for one output.

    Their sum is the analytic neural tangent kernel; the limit of ``empirical_layer_kernels``.

    Args:
      model: an ``ng.MLP``, L layers; its parameters and hidden widths do not matter.
      x1: inputs, shape (N1, M_0).
      x2: inputs, shape (N2, M_0); x1 by default, and then the diagonal is exact.
      store: folder for kernels that are to outlive the program; see ``analytic_kernels``.
      progress: told about finished blocks.

    Returns:
      L float64 arrays (N1, N2), in forward order.

    Raises:
      ValueError, TypeError: as ``analytic_kernels``.
    """
    kernels = analytic_kernels(model, x1, x2, parts=("tangent",), store=store, progress=progress)
    return kernels.tangent


def analytic_kernels(
    model: nnx.Module,
    x1: ArrayLike,
    x2: ArrayLike | None = None,
    *,
    parts: Sequence[str] = PARTS,
    store: Path | None = None,
    progress: Progress | None = None,
) -> AnalyticKernels:
    """All infinite-width kernels that are asked for, in one pass.

    Args:
      model: an ``ng.MLP``.
      x1: inputs, shape (N1, M_0).
      x2: inputs, shape (N2, M_0); x1 by default.
      parts: any of "tangent", "inputs", "derivatives" (L arrays each), "nngp" and "ntk".
      store: keep the kernels in files below this folder, under a hash of all that decides them.
        Finished blocks of an earlier call, killed or not, are not computed again; the arrays
        returned are memory maps of the files, read-only.
      progress: told about finished blocks.

    Raises:
      ValueError: bad inputs, an unknown part, kernels that cannot fit in memory or on the disk, a
        model without an infinite-width twin, or a kernel with a variance that is not positive.
      TypeError: the model is not an ``ng.MLP``, or inputs are not floating.
    """
    unknown = [part for part in parts if part not in PARTS]
    if unknown or not parts:
        raise ValueError(f"parts must be some of {', '.join(PARTS)}, got {tuple(parts)}")
    twin = infinite_width_twin(model)
    first = analytic_inputs(x1, model, "x1")
    second = None if x2 is None else analytic_inputs(x2, model, "x2")
    names = _names(parts, twin.depth)
    shape = (len(first), len(first) if second is None else len(second))
    needed = len(names) * shape[0] * shape[1] * 8
    if store is None and needed > available_memory():
        raise ValueError(
            f"{len(names)} kernels of {shape[0]} x {shape[1]} need {needed / 2**30:,.1f} GiB and "
            f"the device has {available_memory() / 2**30:,.1f} GiB; ask for fewer parts, or give "
            "store= to keep them in files"
        )
    _check_variances(twin, first, "x1")
    if second is not None:
        _check_variances(twin, second, "x2")
    made_of = (twin.description, first, second)
    with open_store(store, names, shape, made_of, _BLOCK) as target:
        blocks = [
            (i, j)
            for i in range(0, shape[0], _BLOCK)
            for j in range(0, shape[1], _BLOCK)
            if second is not None or i <= j
        ]
        todo = [block for block in blocks if not target.is_done(*block)]
        finished = len(blocks) - len(todo)
        for block, values in _evaluate(twin, first, second, names, todo):
            row, column = block
            target.write(row, column, values, mirror=second is None)
            finished += 1
            if progress:
                progress(finished, len(blocks))
        return AnalyticKernels(target.arrays(), twin)


def _evaluate(
    twin: InfiniteWidthTwin,
    first: Matrix,
    second: Matrix | None,
    names: Sequence[str],
    blocks: Sequence[tuple[int, int]],
) -> Any:
    """Yields blocks with their values, a few at once so that every core has work."""
    columns = first if second is None else second

    def compute(block: tuple[int, int]) -> tuple[tuple[int, int], list[np.ndarray]]:
        i, j = block
        left, right = _cut(first, i), _cut(columns, j)
        rows, width = min(_BLOCK, len(first) - i), min(_BLOCK, len(columns) - j)
        # the switch of 64-bit mode belongs to a thread
        with jax.enable_x64(True):
            diagonal = second is None and i == j
            values = _block(twin, left, right, names=tuple(names), diagonal=diagonal)
            return block, [np.asarray(value)[:rows, :width] for value in values]

    queue = list(reversed(blocks))
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        running = {pool.submit(compute, queue.pop()) for _ in range(min(_AT_ONCE, len(queue)))}
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                if queue:
                    running.add(pool.submit(compute, queue.pop()))
                yield future.result()


def _block(
    twin: InfiniteWidthTwin, x1: Matrix, x2: Matrix, *, names: Sequence[str], diagonal: bool
) -> list[Array]:
    """The kernels of one block; on the diagonal of the whole kernel, with exact variances.

    One compiled program a step, and not one for all layers: in that one XLA would work out every
    layer anew for each array that is returned, so the cost would grow with the depth squared.
    """
    kernel = _enter(x1, x2, affine=twin.affine[0], diagonal=diagonal)
    inputs, slopes = [kernel.nngp], []
    for activation, affine in zip(twin.activations, twin.affine[1:], strict=True):
        kernel, slope = _through(
            kernel,
            activation=activation,
            affine=affine,
            slope_on_diagonal=twin.diagonal_derivative,
            diagonal=diagonal,
        )
        slopes.append(slope)
        inputs.append(kernel.nngp)
    values = {"nngp": inputs[-1]}
    values.update({f"inputs.{layer}": array for layer, array in enumerate(inputs, 1)})
    variances = twin.description["weight_variances"]
    derivative, total = jnp.ones_like(inputs[-1]), jnp.zeros_like(inputs[-1])
    for layer in range(twin.depth, 0, -1):
        values[f"derivatives.{layer}"] = derivative
        if f"tangent.{layer}" in names:
            values[f"tangent.{layer}"] = _product(inputs[layer - 1], derivative, 1.0)
        if "ntk" in names:
            total = _add_product(total, inputs[layer - 1], derivative)
        if layer > 1:
            derivative = _product(slopes[layer - 2], derivative, variances[layer - 1])
    values["ntk"] = total
    return [values[name] for name in names]


@partial(jax.jit, static_argnames=("affine", "diagonal"))
def _enter(x1: Array, x2: Array, *, affine: Any, diagonal: bool) -> Any:
    """The kernel behind the first affine layer."""
    kernel = affine(x1, x2, None)
    if diagonal:
        kernel = kernel.replace(nngp=_on_diagonal(kernel.nngp, kernel.cov1))
    return kernel.replace(ntk=None)


@partial(jax.jit, static_argnames=("activation", "affine", "slope_on_diagonal", "diagonal"))
def _through(
    kernel: Any, *, activation: Any, affine: Any, slope_on_diagonal: float | None, diagonal: bool
) -> tuple[Any, Array]:
    """The kernel behind an activation and the affine layer after it, and E[phi' phi']."""
    kernel = activation(kernel.replace(ntk=jnp.ones_like(kernel.nngp)))
    slope = kernel.ntk
    kernel = affine(kernel.replace(ntk=None))
    if diagonal:
        kernel = kernel.replace(nngp=_on_diagonal(kernel.nngp, kernel.cov1))
        if slope_on_diagonal is not None:
            slope = _on_diagonal(slope, slope_on_diagonal)
    return kernel, slope


def _on_diagonal(values: Array, diagonal: Array | float) -> Array:
    return jnp.where(jnp.eye(len(values), dtype=bool), diagonal, values)


@jax.jit
def _product(first: Array, second: Array, factor: float) -> Array:
    return factor * first * second


@jax.jit
def _add_product(total: Array, first: Array, second: Array) -> Array:
    return total + first * second


def _names(parts: Sequence[str], depth: int) -> list[str]:
    names = []
    for part in PARTS:
        if part in parts:
            single = part in ("nngp", "ntk")
            names += [part] if single else [f"{part}.{layer}" for layer in range(1, depth + 1)]
    return names


def _cut(x: Matrix, start: int) -> Matrix:
    """A block of rows; a short last one is filled up, so that one compiled program serves all."""
    rows = x[start : start + _BLOCK]
    missing = min(_BLOCK, len(x)) - len(rows)
    return np.concatenate([rows, np.repeat(rows[-1:], missing, axis=0)]) if missing else rows


def _check_variances(twin: InfiniteWidthTwin, x: Matrix, name: str) -> None:
    """Raises ValueError where a pre-activation of the first layer has no positive variance."""
    weight, bias = (twin.description[f"{name}_variances"][0] for name in ("weight", "bias"))
    variances = weight * np.mean(x**2, axis=1) + bias
    bad = np.flatnonzero(~(variances > 0))
    if bad.size:
        raise ValueError(
            f"the kernel is not positive: sample {bad[0]} of {name} has the variance "
            f"{variances[bad[0]]:g} in layer 1, because all its inputs are 0; remove such samples "
            "or use a model with biases"
        )


def analytic_inputs(x: ArrayLike, model: nnx.Module, name: str) -> Matrix:
    """Inputs (N, M_0) of a model as float64.

    Args:
      x: the inputs.
      model: an ``ng.MLP``.
      name: of the argument, for messages.

    Raises:
      ValueError, TypeError: the model has no infinite-width twin, or the inputs do not fit it or
        are not finite floating numbers.
    """
    width = require_mlp(model).widths[0]
    try:
        with jax.enable_x64(True):
            values = np.asarray(check_inputs(x), np.float64)
    except (ValueError, TypeError) as error:
        raise type(error)(f"{name}: {error}") from None
    if values.shape[1:] != (width,):
        raise ValueError(f"{name} must have shape (N, {width}), got {values.shape}")
    return values
