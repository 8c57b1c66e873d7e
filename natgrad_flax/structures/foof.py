"""One Kronecker factor alone: that of the inputs (FOOF), or that of the units."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

import jax.numpy as jnp
from jax import Array

from natgrad_flax.damping import is_zero, of_block, per_layer
from natgrad_flax.linalg.dense import has_full_rank
from natgrad_flax.operators.base import Blocks, Space, check_space
from natgrad_flax.operators.factor import DiagonalFactor, IdentityFactor
from natgrad_flax.operators.kronecker import Dampings, Kronecker, affine
from natgrad_flax.operators.units import invert_blocks
from natgrad_flax.signals.base import LayerSignals
from natgrad_flax.signals.dense import Signals
from natgrad_flax.signals.shared import ExplicitSignals, Sharing
from natgrad_flax.signals.tied import TiedSignals
from natgrad_flax.structures.averaged import Moments
from natgrad_flax.structures.base import dense_layer, has_shared_layers, triangle
from natgrad_flax.structures.factor_entries import (
    INPUTS,
    Entry,
    inverse_groups,
    invert_inputs,
    num_positions,
)
from natgrad_flax.structures.geometry import Geometry
from natgrad_flax.structures.kronecker_average import (
    FactorAverage,
    factor_sides,
    kronecker_words,
    no_shared_limit,
)
from natgrad_flax.structures.style import styled

Side = Literal["inputs", "units"]
"""Which factor of a layer is kept; the other one is the identity."""


@dataclass(frozen=True)
class Foof(FactorAverage):
    """Half of K-FAC: I (x) (A* + rho I), or its mirror (B* + rho I) (x) I.

    ``side="inputs"`` is FOOF, gradient descent on the neurons (Benzing 2022, Algorithm 1); the
    factors are those of ``KFAC``, A* = a^T a / N and B* = D^T D / N, without scalings of its own.
    The derivatives of S output directions need no solve with A*: undamped, with inputs of rank N
    in every layer, Theta-bar_l(n s, m t) is delta_nm (D_ns . D_mt), for one output the diagonal
    |D_n|^2. In the mirror it is |a_n|^2 where derivatives have rank N S, which those of the last
    layer never have. So neither is isotropic at finite width: alpha is unknown.

    A* knows nothing of output directions: all kinds of Fisher give the same, and the one with the
    fewest directions, "empirical", costs least (1.07 of a step of gradient descent by processor
    time where 128 samples pass layers of 1024 units; with C = 10 directions 2.8).

    Parameters without Kronecker factors, and weights that are also used transposed, keep their
    exact Fisher block a unit.

    Args:
      side: the factor that is kept, "inputs" or "units".
      space: "sample", "parameter" or "auto", of its systems.
      sharing: "expand" or "reduce", for weights that several positions share, as for ``KFAC``.

    Raises:
      ValueError: an unknown side, space or sharing.

    Example:
      >>> import jax.numpy as jnp, natgrad_flax as ng
      >>> from flax import nnx
      >>> model = ng.MLP((4, 8, 1), rngs=nnx.Rngs(0))
      >>> x, y = jnp.eye(4), jnp.ones((4, 1))
      >>> loss, structure = ng.MeanSquaredError(), ng.Foof("inputs")
      >>> options = {"structure": structure, "loss": loss, "damping": 1e-3}
      >>> step = ng.natural_gradient(model, x, y, fisher="empirical", **options)
      >>> same = ng.natural_gradient(model, x, y, fisher="exact", **options)
      >>> u, v = (tree["layers"][0]["kernel"] for tree in (step, same))
      >>> bool(jnp.allclose(u, v, rtol=1e-3))
      True
    """

    side: Side
    space: Space = "auto"
    sharing: Sharing = "expand"
    style = styled("FOOF", "#117A8B", "<", command="")
    stacking = "all"
    infinite_width = "all"
    shared_weights = "rows"
    limit_kernels = ("inputs", "derivatives")
    coefficient_arrays = (0.0, 8.0)

    def __post_init__(self) -> None:
        check_space(self.space)
        for field, allowed in (("side", get_args(Side)), ("sharing", get_args(Sharing))):
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field} must be one of {allowed}, got {getattr(self, field)!r}")

    @property
    def _index(self) -> int:
        """Of the factor among (A, B)."""
        return int(self.side == "units")

    def no_limit(self, shared: bool) -> str:
        """Kernels of layers do not hold positions."""
        return no_shared_limit("Foof") if shared else ""

    def _kronecker(self, signals: Signals, index: int) -> Kronecker:
        """A (x) I or I (x) B; see ``FactorAverage``."""
        n, layer = signals.num_samples, affine(signals.layers[index])
        divisors = float(n * num_positions(layer, self.sharing)), float(n)
        both = Kronecker.of(layer, self.sharing, divisors, self.space, self._split)
        if self.side == "inputs":
            return replace(both, right=IdentityFactor(both.right.rows))
        if isinstance(both.left, DiagonalFactor):
            return replace(both, left=DiagonalFactor(jnp.ones_like(both.left.values)))
        return replace(both, left=IdentityFactor(both.left.rows))

    def _split(self, damping: Array | float) -> Dampings:
        return (0.0, damping) if self.side == "units" else (damping, 0.0)

    def operator(self, signals: Signals) -> Blocks:
        """See ``FactorAverage``; weights of two uses, one factor of which is none, by blocks."""
        return super().operator(_apart_from_ties(signals))

    def _statistics(self, signals: Signals, *, rows: bool) -> tuple[Entry, ...]:
        signals = _apart_from_ties(signals)
        dropped = INPUTS if self.side == "units" else ("units",)
        return tuple(
            {name: value for name, value in entry.items() if name not in dropped}
            for entry in super()._statistics(signals, rows=rows and self.side == "inputs")
        )

    def invert(
        self, moments: Moments, damping: Array | float, num_samples: int | Array
    ) -> tuple[Entry, ...]:
        """The inverse of the factor, or of the blocks of units."""
        shifted, found = not is_zero(damping), list[Entry]()
        factors = moments.factors
        for entry, rho in zip(factors, per_layer(damping, len(factors)), strict=True):
            if "blocks" in entry:
                found.append({"blocks": invert_blocks(entry["blocks"], of_block(rho))})
            elif self.side == "units":
                found.append({"units": inverse_groups(entry["units"], rho, shifted=shifted)})
            else:
                (inputs,) = (entry[name] for name in INPUTS if name in entry)
                found.append(invert_inputs(entry, inputs, rho, shifted=shifted))
        return tuple(found)

    def scale_of(self, moments: Moments, num_samples: int | Array) -> Array:
        """Mean diagonal of the Gram matrix of the factor over N, (L,)."""
        norms = jnp.stack([entry["norms"][self._index] for entry in moments.factors])
        return norms / num_samples

    def damping_scale(self, signals: Signals) -> Array:
        """See ``scale_of``."""
        layers = _apart_from_ties(signals).layers
        norms = [self._gram_means(layer)[self._index] for layer in layers]
        return jnp.stack(norms) / signals.num_counted

    def undamped_diagonal(self, train: Signals) -> Array | None:
        """sum_l |D_n|^2 of one output, or sum_l |a_n|^2 of the mirror.

        None where a factor lacks the rank, or where inputs leave the outputs of a sample coupled.
        """
        if has_shared_layers(train):
            return None
        layers, s = list(map(dense_layer, train.layers)), train.num_directions
        if self.side == "inputs":
            grams = [layer.input_gram() for layer in layers]
            norms = [layer.derivative_norms().reshape(-1) for layer in layers]
        else:
            grams = [layer.derivative_gram() for layer in layers]
            norms = [jnp.repeat(layer.input_norms(), s) for layer in layers]
        coupled = self.side == "inputs" and s > 1
        if coupled or not all(has_full_rank(gram) for gram in grams):
            return None
        return jnp.sum(jnp.stack(norms), axis=0)

    def gram_size(self, signals: Signals) -> int:
        """The side of the factor that ``space`` chooses."""
        return max(
            factor_sides(layer, self.sharing, self.space)[self._index] for layer in signals.layers
        )

    def system_arrays(self, signals: Signals) -> float:
        """The factors of the layers at work, their inverses and what is between."""
        return 8.0

    def entries(self, geometry: Geometry) -> tuple[int, int]:
        """A block for each unit, or for each input, of which one is stored."""
        pairs = [size if self.side == "inputs" else size[::-1] for size in geometry.layers]
        return sum(k**2 * m for k, m in pairs), sum(triangle(k) for k, _ in pairs)

    def block_form(self, layer: LayerSignals) -> str:
        """See ``Structure.block_form``."""
        if isinstance(layer, (ExplicitSignals, TiedSignals)):
            return "exact block a unit"
        return f"{kronecker_words(layer, self.sharing)}, {self.side} alone"


def _apart_from_ties(signals: Signals) -> Signals:
    """With explicit blocks in place of ``TiedSignals``."""
    layers = (
        layer.explicit() if isinstance(layer, TiedSignals) else layer for layer in signals.layers
    )
    return replace(signals, layers=tuple(layers))
