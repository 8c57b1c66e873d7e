"""Finite-width kernels, layer by layer, from the signals of a model.

Everything here runs in float64 inside a local ``jax.enable_x64`` scope; the switch of the program
that calls it is left as it is. Results are NumPy arrays, which are float64 outside the scope too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import ArrayLike
from numpy.typing import NDArray

from natgrad_flax import Signals, jacobian_signals
from natgrad_flax.arguments.arrays import batch_size, check_concrete, described, shapes_of
from natgrad_flax.arguments.memory import check_bytes, check_fits
from natgrad_flax.optimizer.checks import check_model_inputs
from natgrad_flax.signals.independence import check_samples_alone
from natgrad_flax.signals.model import check_model
from natgrad_flax.structures.memory import signal_entries

Matrix = NDArray[np.float64]
_LARGEST = 1e75


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
    def test(self) -> Signals:
        """Signals of the N' test samples."""
        return _samples(self.everything, slice(self.num_train, None))

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
      x_train: inputs, an array (N, ...) or a tree of them.
      x_test: more inputs, (N', ...).

    Raises:
      ValueError, TypeError: bad inputs, a layer without signals, samples whose outputs depend on
        each other, traced arrays, or numbers so large that kernels overflow.
    """
    check_model(model)
    check_concrete(nnx.state(model, nnx.Param), "the parameters")
    with jax.enable_x64(True):
        parts = [_inputs(model, x_train, "x_train")]
        if x_test is not None:
            parts.append(_inputs(model, x_test, "x_test"))
            here, there = (shapes_of(part, skip=1) for part in parts)
            if here != there:
                raise ValueError(
                    "x_test must have samples like those of x_train, "
                    f"{described(here)}, got {described(there)}"
                )
        inputs = jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *parts)
        cast = _in_float64(model)
        check_samples_alone(cast, inputs)
        graphdef, state = nnx.split(cast)
        # through jit, so that only the first call of a shape is traced
        shapes, _ = jax.eval_shape(_signals, graphdef, state, inputs)
        if shapes.outputs.ndim != 2:
            raise ValueError(
                "the theory is that of outputs (N, C), and the model returns "
                f"{shapes.outputs.shape}: wrap it in a module that returns one row a sample"
            )
        held = sum(map(signal_entries, shapes.layers))
        check_bytes(
            8 * held,
            f"{held:,} inputs and derivatives of layers need",
            "use fewer samples, or a smaller network",
        )
        signals, largest = _signals(graphdef, state, inputs)
        check_range(float(largest), "its inputs, outputs or derivatives")
    return InitialSignals(signals, batch_size(parts[0]))


@jax.jit
def _signals(graphdef: Any, state: Any, inputs: Any) -> tuple[Signals, Array]:
    # one program; op by op every new shape would compile dozens
    signals = jacobian_signals(nnx.merge(graphdef, state), inputs)
    largest = [jnp.max(jnp.abs(leaf)) for leaf in jax.tree.leaves(signals)]
    return signals, jnp.max(jnp.stack([size.astype(jnp.float64) for size in largest]))


def check_range(largest: float, what: str) -> None:
    """Raises ValueError where products of four such numbers leave the range of float64."""
    if not largest < _LARGEST:
        raise ValueError(
            f"the network is out of range: {what} reach {largest:.3g}, and kernels are products of "
            "them that float64 cannot hold; scale the inputs or the parameters"
        )


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

    Example:
      >>> import jax.numpy as jnp, natgrad_flax as ng, ntk_analysis as na
      >>> from flax import nnx
      >>> model, x = ng.MLP((4, 8, 2), rngs=nnx.Rngs(0)), jnp.eye(4)
      >>> layers = na.empirical_layer_kernels(model, x)
      >>> # the empirical neural tangent kernel, (N C, N C)
      >>> len(layers), sum(layers).shape
      (2, (8, 8))
    """
    signals = initial_signals(model, x1, x2)
    size = signals.everything.size
    with jax.enable_x64(True):
        check_fits(size, 8, "the kernel of a layer", len(signals.everything.layers) + 2.0)
        first = signals.train
        if x2 is None:
            return [np.asarray(layer.gram()) for layer in first.layers]
        return [
            np.asarray(left.gram(right))
            for left, right in zip(first.layers, signals.test.layers, strict=True)
        ]


def _samples(signals: Signals, chosen: slice) -> Signals:
    # every array of every kind of signals has the samples first
    return jax.tree.map(lambda array: array[chosen], signals)


def _in_float64(model: nnx.Module) -> nnx.Module:
    graphdef, state = nnx.split(model)
    copy = nnx.merge(graphdef, jax.tree.map(_float64, state))
    layer: Any
    for _, layer in nnx.iter_modules(copy):
        if getattr(layer, "dtype", None) is not None:  # what Flax's layers compute in
            layer.dtype = jnp.float64
    return copy


def _float64(leaf: Any) -> Any:
    return leaf.astype(jnp.float64) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf


def _inputs(model: nnx.Module, x: Any, name: str) -> Any:
    """Inputs that a model takes, an array or a tree of them, floating ones in float64."""
    x = check_model_inputs(model, x, name)
    check_concrete(x, name)
    return jax.tree.map(_float64, x)
