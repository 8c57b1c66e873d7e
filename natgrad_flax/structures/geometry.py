"""The sizes that decide the theory of a structure, and the ranks that it asks for."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal, NamedTuple

INFINITE = 2**62
"""The size of what is infinite: more than any rank."""


@dataclass(frozen=True)
class Geometry:
    """The sizes that decide the theory of a structure.

    Attributes:
      layers: for each layer the parameters a unit (inputs, plus 1 with a bias) and the units.
      num_samples: N.
      num_outputs: C.
      active_fraction: gamma = P(phi' != 0) of the hidden activation, None where it is unknown.
    """

    layers: tuple[tuple[int, int], ...]
    num_samples: int
    num_outputs: int
    active_fraction: float | None = None

    @property
    def depth(self) -> int:
        """L."""
        return len(self.layers)

    @property
    def params(self) -> tuple[int, ...]:
        """P_l."""
        return tuple(fan_in * units for fan_in, units in self.layers)

    @property
    def biases(self) -> tuple[bool, ...]:
        """Which layers have a bias, which shows where they follow each other.

        Layer 1 is taken to be like layer 2, and a single layer to have none.
        """
        pairs = itertools.pairwise(self.layers)
        shown = [fan_in > units for (_, units), (fan_in, _) in pairs]
        return (*shown[:1], *shown) if shown else (False,) * self.depth

    @property
    def positions(self) -> tuple[int | None, ...]:
        """T_l, how many positions share the weights of a layer."""
        return (1,) * self.depth

    def where(self, index: int) -> str:
        """What a sentence calls the layer of this index."""
        return f"layer {index + 1}" + (" (the last)" if index == self.depth - 1 else "")


@dataclass(frozen=True)
class SharedGeometry(Geometry):
    """The sizes of a network with shared weights.

    Attributes:
      positions: T_l, one a layer: 1 where nothing is shared, None for parameters that have no
        inputs and units (those of explicit Jacobian blocks).
    """

    positions: tuple[int | None, ...] = ()


class NeededRank(NamedTuple):
    """A rank that isotropy asks for.

    Attributes:
      layer: the index of the layer, 0 for the network.
      what: of which matrix: the Jacobian of the "network" or that of the layer ("jacobian"), its
        "inputs" (or else "equal leverages" of them) or its "derivatives", the inputs of a "channel"
        that positions share.
      rank: the rank that is needed.
      size: parameters, inputs or units, which no rank exceeds.
    """

    layer: int
    what: Literal["network", "jacobian", "inputs", "equal leverages", "derivatives", "channel"]
    rank: int
    size: int
