"""Plain gradient descent as the structure G = I, so that theory treats it like the others."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array

from natgrad_flax import Signals, Structure
from natgrad_flax.damping import is_zero
from natgrad_flax.operators.base import Blocks
from natgrad_flax.operators.entries import Entries
from natgrad_flax.signals.base import LayerSignals, LayerUpdate
from natgrad_flax.signals.gradient import Gradient
from natgrad_flax.structures import Geometry
from natgrad_flax.structures.style import styled


@dataclass(frozen=True)
class GradientDescent(Structure):
    """G = I: gradient descent; its coefficient matrix is the neural tangent kernel itself.

    Theta(x', x) = J(x') J(x)^T / N (Karakida & Osawa 2020, Eq. 4). It is not isotropic; the best
    constant learning rate of the linearised network is 1 / lambda_max(Theta).

    Example:
      >>> import jax.numpy as jnp, numpy as np
      >>> import natgrad_flax as ng, ntk_analysis as na
      >>> from flax import nnx
      >>> model, x = ng.MLP((4, 8, 1), rngs=nnx.Rngs(0)), jnp.eye(4)
      >>> theta = na.coefficient_matrix(na.GradientDescent(), model, x)
      >>> bool(np.allclose(theta, sum(na.empirical_layer_kernels(model, x)) / 4))
      True
    """

    style = styled("Gradient descent", "#4d4d4d", "o", command="gd")
    takes_damping = False
    infinite_width = "all"

    def operator(self, signals: Signals) -> Blocks:
        """The identity."""
        dtype = signals.outputs.dtype
        return Blocks(
            tuple(
                Entries(a, a.update(jnp.ones((a.fan_in, a.num_units), dtype)))
                for a in signals.layers
            )
        )

    def solve(
        self, signals: Signals, gradient: Gradient, damping: Array | float
    ) -> tuple[LayerUpdate, ...]:
        """The gradient itself."""
        return gradient.vector(signals.layers)

    def coefficient(self, test: Signals, train: Signals, damping: Array | float) -> Array:
        """Theta(x', x) = K(x', x) / N, shape (N' C, N S)."""
        return test.gram(train) / train.num_samples

    def damping_scale(self, signals: Signals) -> Array:
        """Raises ValueError: there is no Fisher to damp."""
        raise ValueError(_NO_DAMPING)

    def alpha(self, geometry: Geometry) -> float:
        """Raises ValueError: not isotropic."""
        raise ValueError(
            "gradient descent is not isotropic, so sizes alone give no learning rate; "
            "use 1 / lambda_max of its coefficient matrix"
        )

    def check(self, signals: Signals, damping: object) -> None:
        """Raises ValueError on a damping other than 0."""
        if not is_zero(damping):
            raise ValueError(_NO_DAMPING)

    def entries(self, geometry: Geometry) -> tuple[int, int]:
        """Those of the identity, of which nothing is stored."""
        return sum(geometry.params), 0

    def block_form(self, layer: LayerSignals) -> str:
        """See ``Structure.block_form``."""
        return "identity"


_NO_DAMPING = "gradient descent inverts no Fisher, so it takes no damping: pass damping=0"
