"""Finite-width kernels, layer by layer, from the signals of a model.

Everything here runs in float64 inside a local ``jax.enable_x64`` scope; the switch of the program
that calls it is left as it is. Results are NumPy arrays, which are float64 outside the scope too.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import ArrayLike
from numpy.typing import NDArray

from natgrad_flax import Signals, jacobian_signals
from natgrad_flax.checks import check_fits, check_inputs

Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class InitialSignals:
    """Float64 signals of a model on training and test inputs, from one pass over both.

    Attributes:
      everything: signals of the training samples followed by the test samples.
      num_train: N.
    """

    everything: Signals
    num_train: int

    @property
    def train(self) -> Signals:
        """Signals of the N training samples."""
        return _samples(self.everything, slice(self.num_train))

    @property
    def num_test(self) -> int:
        """N', 0 without test inputs."""
        return self.everything.num_samples - self.num_train

    @property
    def num_outputs(self) -> int:
        """C."""
        return self.everything.outputs.shape[1]

    @property
    def outputs(self) -> Matrix:
        """f_0 on training samples, then test samples, shape (N + N', C)."""
        return np.asarray(self.everything.outputs)


def initial_signals(
    model: nnx.Module, x_train: ArrayLike, x_test: ArrayLike | None = None
) -> InitialSignals:
    """The float64 signals of a model, to be shared by all structures.

    Args:
      model: any module built of layers with signals; parameters of any precision.
      x_train: inputs, shape (N, ...).
      x_test: more inputs, shape (N', ...).

    Raises:
      ValueError, TypeError: bad inputs, or a layer without signals.
    """
    with jax.enable_x64(True):
        parts = [_float64_inputs(x_train, "x_train")]
        if x_test is not None:
            parts.append(_float64_inputs(x_test, "x_test"))
            if parts[0].shape[1:] != parts[1].shape[1:]:
                raise ValueError(
                    "x_test must have samples of the shape of x_train's, "
                    f"{parts[0].shape[1:]}, got {parts[1].shape[1:]}"
                )
        inputs = jnp.concatenate(parts)
        widths = getattr(model, "widths", None)
        if widths is not None and inputs.shape[1:] != (widths[0],):
            raise ValueError(
                f"the model takes inputs of shape (N, {widths[0]}), got {parts[0].shape}"
            )
        signals = _signals(*nnx.split(_in_float64(model)), inputs)
    return InitialSignals(signals, len(parts[0]))


@partial(jax.jit, static_argnums=0)
def _signals(graphdef: Any, state: Any, inputs: Array) -> Signals:
    # one program; op by op every new shape would compile dozens
    return jacobian_signals(nnx.merge(graphdef, state), inputs)


def empirical_layer_kernels(
    model: nnx.Module, x1: ArrayLike, x2: ArrayLike | None = None
) -> list[Matrix]:
    """The tangent kernel of each layer, K_l = J_l(x1) J_l(x2)^T without 1/N.

    Their sum is the empirical neural tangent kernel. Computed from layer inputs and
    output-to-pre-activation derivatives; no Jacobian is built.

    Args:
      model: any module built of layers with signals, L in number.
      x1: inputs, shape (N1, ...).
      x2: inputs, shape (N2, ...); x1 by default.

    Returns:
      L float64 arrays (N1 C, N2 C) in forward order; rows and columns run over samples, then over
      outputs.

    Raises:
      ValueError, TypeError: bad inputs, a layer without signals, or kernels that cannot fit in
        memory.
    """
    signals = initial_signals(model, x1, x2)
    size = signals.everything.size
    with jax.enable_x64(True):
        check_fits(size, 8, "the kernel of a layer")
        first = signals.train
        if x2 is None:
            return [np.asarray(layer.gram()) for layer in first.layers]
        second = _samples(signals.everything, slice(signals.num_train, None))
        return [
            np.asarray(left.gram(right))
            for left, right in zip(first.layers, second.layers, strict=True)
        ]


def _samples(signals: Signals, chosen: slice) -> Signals:
    # every array of every kind of signals has the samples first
    layers = jax.tree.map(lambda array: array[chosen], signals.layers)
    return Signals(layers, signals.outputs[chosen])


def _in_float64(model: nnx.Module) -> nnx.Module:
    def cast(leaf: Any) -> Any:
        return leaf.astype(jnp.float64) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    graphdef, state = nnx.split(model)
    copy = nnx.merge(graphdef, jax.tree.map(cast, state))
    for _, module in nnx.iter_modules(copy):
        # what Flax's layers compute in
        if getattr(module, "dtype", None) is not None:
            module.dtype = jnp.float64  # type: ignore[attr-defined]
    return copy


def _float64_inputs(x: ArrayLike, name: str) -> jax.Array:
    try:
        return check_inputs(x).astype(jnp.float64)
    except (ValueError, TypeError) as error:
        raise type(error)(f"{name}: {error}") from None
