"""How far training moved the empirical tangent kernel: whether it was lazy, or learnt features."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from natgrad_flax.arguments.memory import check_fits
from ntk_analysis.dynamics import check_targets
from ntk_analysis.empirical import InitialSignals, Matrix, initial_signals
from ntk_analysis.symmetric import zero_below


@dataclass(frozen=True)
class KernelDrift:
    """Two empirical tangent kernels K_0 and K_t on the same inputs, compared.

    Attributes:
      relative_change: |K_t - K_0| / |K_0| in the Frobenius norm, 0 for a kernel that stays.
      layer_changes: the same for the kernel of each layer; infinite where it was 0.
      cka: the centred alignment <K_0', K_t'> / (|K_0'| |K_t'|), K' = H K H, with H taking the mean
        over samples away (from each output by itself); 1 for a kernel that stays or is scaled
        (Cortes et al. 2012; Kornblith et al. 2019).
      alignment_0: the centred alignment of K_0 with y y^T, in [0, 1]; None without targets.
      alignment_t: that of K_t.

    Example:
      >>> import jax.numpy as jnp, natgrad_flax as ng, ntk_analysis as na
      >>> from flax import nnx
      >>> model, x = ng.MLP((4, 8, 1), rngs=nnx.Rngs(0)), jnp.eye(4)
      >>> drift = na.kernel_drift(model, model, x)  # nothing was trained
      >>> drift.relative_change, drift.layer_changes, round(drift.cka, 6)
      (0.0, (0.0, 0.0), 1.0)
    """

    relative_change: float
    layer_changes: tuple[float, ...]
    cka: float
    alignment_0: float | None
    alignment_t: float | None


def kernel_drift(
    model_0: nnx.Module, model_t: nnx.Module, x: ArrayLike, y: ArrayLike | None = None
) -> KernelDrift:
    """Compares the empirical tangent kernels of a model before and after training.

    The theory of this library is that of a kernel that stays, so this number says whether its
    predictions hold ("lazy" training, Chizat et al. 2019). A CKA that falls while the alignment
    with the targets rises is a kernel that learnt (Baratin et al. 2021).

    Args:
      model_0: the model at the start.
      model_t: the same network with other parameters.
      x: inputs (N, ...), at least two that differ.
      y: targets (N, C), as one-hot rows where they are classes.

    Returns:
      The changes, in float64; see ``KernelDrift``.

    Raises:
      ValueError, TypeError: what ``empirical_layer_kernels`` raises; models with other layers or
        outputs; targets of another shape, or the same for all samples; kernels that are 0 or the
        same for all samples.

    Example:
      >>> import jax, jax.numpy as jnp, natgrad_flax as ng, ntk_analysis as na
      >>> from flax import nnx
      >>> model, x = ng.MLP((4, 8, 1), rngs=nnx.Rngs(0)), jnp.eye(4)
      >>> trained = nnx.clone(model)
      >>> nnx.update(
      ...     trained, jax.tree.map(lambda p: 1.1 * p, nnx.state(model, nnx.Param))
      ... )
      >>> drift = na.kernel_drift(model, trained, x)
      >>> # 1.1^2 times the kernel
      >>> round(drift.relative_change, 3), round(drift.cka, 3)
      (0.21, 1.0)
    """
    before = initial_signals(model_0, x)
    targets = None
    if y is not None:
        targets = _centred(check_targets(y, (before.num_train, before.num_outputs)))
        if not np.any(targets):
            raise ValueError("y must differ between samples: a constant aligns with no kernel")
    after = initial_signals(model_t, x)
    here, there = (
        (state.num_outputs, [layer.path for layer in state.everything.layers])
        for state in (before, after)
    )
    if here != there:
        raise ValueError(
            "model_0 and model_t must be the same network with other parameters: one has "
            f"{_counted(before)}, the other {_counted(after)}"
        )
    check_fits(before.everything.size, 8, "a tangent kernel", 2.0 * len(here[1]) + 6)
    starts, ends = _kernels(before), _kernels(after)
    kernels = [sum(starts[1:], starts[0]), sum(ends[1:], ends[0])]
    if not np.any(kernels[0]):
        raise ValueError("the tangent kernel of model_0 is 0 on x, so it has no relative change")
    outputs = before.num_outputs
    centred = [_centred_kernel(kernel, outputs) for kernel in kernels]
    for name, kernel, whole in zip(("model_0", "model_t"), centred, kernels, strict=True):
        if np.abs(kernel).max() <= zero_below(len(kernel), np.abs(whole).max()):
            raise ValueError(
                f"the tangent kernel of {name} is the same for all samples of x, and its centred "
                "alignment asks how they differ: give at least two samples that do"
            )
    found: list[float | None] = [None, None]
    if targets is not None:
        columns = targets.reshape(-1)
        found = [
            float(columns @ kernel @ columns / (np.linalg.norm(kernel) * columns @ columns))
            for kernel in centred
        ]
    first, second = centred
    return KernelDrift(
        _change(*kernels),
        tuple(map(_change, starts, ends)),
        float(np.sum(first * second) / (np.linalg.norm(first) * np.linalg.norm(second))),
        *found,
    )


def _kernels(signals: InitialSignals) -> list[Matrix]:
    with jax.enable_x64(True):
        return [np.asarray(layer.gram()) for layer in signals.everything.layers]


def _change(before: Matrix, after: Matrix) -> float:
    size, moved = np.linalg.norm(before), np.linalg.norm(after - before)
    if size == 0:
        return float("inf") if moved else 0.0
    return float(moved / size)


def _centred(rows: Matrix) -> Matrix:
    """Rows (N, ...) without their mean."""
    centred: Matrix = rows - rows.mean(axis=0)
    return centred


def _centred_kernel(kernel: Matrix, outputs: int) -> Matrix:
    """H K H of a kernel (N C, N C)."""
    rows = _centred(kernel.reshape(-1, outputs, len(kernel))).reshape(kernel.shape)
    return _centred(rows.T.reshape(-1, outputs, len(kernel))).reshape(kernel.shape).T


def _counted(signals: InitialSignals) -> str:
    return f"{len(signals.everything.layers)} layers and {signals.num_outputs} outputs"
