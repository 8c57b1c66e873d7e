"""Momentum for Fisher blocks that are solved batch by batch (SPRING).

A step that a batch determines in the span of its own Jacobian says nothing about the rest of the
space. So the step before, times mu, stays where this batch sees nothing, and is corrected where it
does: phi = argmin (1/N) |J phi - w|^2 + rho |phi - mu phi_before|^2, that is
phi = (F + rho)^{-1} (g + rho mu phi_before) = mu phi_before + (F + rho)^{-1} (g - F mu phi_before)
(Goldshlager, Abrahamsen & Lin 2024, arXiv:2401.10190). A momentum behind the transformation would
count again what the new batch already contains.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax import Array

from natgrad_flax.arguments.scalars import check_number, keep_plain
from natgrad_flax.damping import per_layer
from natgrad_flax.operators.base import Blocks
from natgrad_flax.signals.base import LayerUpdate, layer_updates
from natgrad_flax.signals.dense import Signals
from natgrad_flax.signals.gradient import Gradient, ParameterGradient, Residual
from natgrad_flax.signals.model import Path
from natgrad_flax.structures import Structure


@dataclass(frozen=True)
class SPRING:
    """Settings of projected momentum: ``momentum=ng.SPRING(...)``.

    The k-th step is -min(eta, max_norm / |u|) u with u = phi / sqrt(1 - decay^(2k)), |u| its
    Euclidean norm over all parameters. The correction is that of Guzman-Cordero, Dangel,
    Goldshlager & Zeinhofer (2025, arXiv:2505.12149): phi is short as long as few steps are in it.
    The bound is the norm constraint C of Goldshlager et al., max_norm = sqrt(C); what is carried
    to the next step is phi itself.

    Args:
      decay: mu, how much of the step before is taken along, between 0 and 1.
      bias_correction: whether to divide by sqrt(1 - decay^(2k)).
      max_norm: the Euclidean norm that no step exceeds; None for no bound.

    Raises:
      ValueError: a number is out of range.
      TypeError: ``bias_correction`` is no bool.

    Example:
      >>> import jax, jax.numpy as jnp, natgrad_flax as ng
      >>> from flax import nnx
      >>> from jax.flatten_util import ravel_pytree
      >>> model = ng.MLP((4, 8, 1), rngs=nnx.Rngs(0))
      >>> x, y = jnp.eye(4), jnp.ones((4, 1))
      >>> options = {
      ...     "structure": ng.Exact(),
      ...     "loss": ng.MeanSquaredError(),
      ...     "damping": 0.01,
      ... }
      >>> momentum = ng.SPRING(0.9, max_norm=0.1)
      >>> tx = ng.natural_gradient_descent(1.0, momentum=momentum, **options)
      >>> params = nnx.state(model, nnx.Param)
      >>> update = jax.jit(
      ...     lambda p, state: tx.update(p, state, p, module=model, x=x, y=y)
      ... )
      >>> updates, state = update(params, tx.init(params))
      >>> round(float(jnp.linalg.norm(ravel_pytree(updates)[0])), 4)  # the bound
      0.1
    """

    decay: float
    bias_correction: bool = True
    max_norm: float | None = None

    def __post_init__(self) -> None:
        keep_plain(self)
        check_number("decay", self.decay, positive=True)
        if self.decay >= 1:
            raise ValueError(f"decay must be below 1, got {self.decay!r}")
        if not isinstance(self.bias_correction, bool):
            raise TypeError(f"bias_correction must be True or False, got {self.bias_correction!r}")
        if self.max_norm is not None:
            check_number("max_norm", self.max_norm, positive=True)

    def corrected(self, phi: tuple[LayerUpdate, ...], steps: Array) -> tuple[LayerUpdate, ...]:
        """u of the step that follows so many steps."""
        if not self.bias_correction:
            return phi

        def one(leaf: Array) -> Array:
            # 1 - decay^(2k) itself would lose its digits for a decay near 1
            power = 2 * math.log(self.decay) * (steps + 1).astype(leaf.dtype)
            return leaf / jnp.sqrt(-jnp.expm1(power))

        return jax.tree.map(one, phi)


@dataclass(frozen=True)
class Momentum:
    """The step before, and how much of it is taken along.

    Attributes:
      decay: mu.
      before: phi of the step before, by the paths of the parameters.
    """

    decay: float
    before: dict[Path, Array]

    def _carried(self, signals: Signals) -> tuple[LayerUpdate, ...]:
        """mu phi_before, layer by layer."""
        before = layer_updates(signals.layers, self.before)
        dtype = signals.outputs.dtype
        return jax.tree.map(lambda leaf: self.decay * leaf.astype(dtype), before)

    def solve(
        self, structure: Structure, signals: Signals, gradient: Gradient, damping: Array | float
    ) -> tuple[LayerUpdate, ...]:
        """phi for a gradient; of the residual of the same batch without a division by rho."""
        carried, w = self._carried(signals), gradient.coefficients
        if w is None:
            rhos = per_layer(damping, len(carried))
            pulled = tuple(
                jax.tree.map(lambda g, before, rho=rho: g + rho * before, *pair)
                for *pair, rho in zip(gradient.vector(signals.layers), carried, rhos, strict=True)
            )
            return structure.solve(signals, ParameterGradient(pulled), damping)
        # inside the span of the output directions: what is left of the residual is solved for
        images = [layer.jvp(a) for layer, a in zip(signals.layers, carried, strict=True)]
        if isinstance(structure.operator(signals), Blocks):
            rhos = per_layer(damping, len(images))
            solved = tuple(
                structure.solve(replace(signals, layers=(layer,)), Residual(w - image, None), rho)[
                    0
                ]
                for layer, image, rho in zip(signals.layers, images, rhos, strict=True)
            )
        else:
            left = w - sum(images[1:], start=images[0])
            solved = structure.solve(signals, Residual(left, None), damping)
        return jax.tree.map(jnp.add, carried, solved)
