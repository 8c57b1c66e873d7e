"""Fisher approximations behind one protocol, one file each."""

from natgrad_flax.structures.averaged import AveragedStructure, Moments
from natgrad_flax.structures.base import Geometry, IsotropyWarning, Structure
from natgrad_flax.structures.block_diagonal import BlockDiagonal
from natgrad_flax.structures.diagonal import Diagonal
from natgrad_flax.structures.ekfac import EKFAC
from natgrad_flax.structures.exact import Exact
from natgrad_flax.structures.foof import Foof
from natgrad_flax.structures.kfac import KFAC
from natgrad_flax.structures.kfoc import KFOC
from natgrad_flax.structures.layer_wise import (
    BlockTriDiagonal,
    LayerWise,
    SingularCouplingWarning,
)
from natgrad_flax.structures.low_rank_units import LowRankUnits
from natgrad_flax.structures.mini_block import MiniBlock
from natgrad_flax.structures.nystroem import Nystroem
from natgrad_flax.structures.quasi_diagonal import QuasiDiagonal
from natgrad_flax.structures.shampoo import Shampoo
from natgrad_flax.structures.style import Style, styled
from natgrad_flax.structures.unit_blocks import UnitBlocks
from natgrad_flax.structures.unit_wise import UnitWise

STRUCTURES: tuple[type[Structure], ...] = (
    Exact,
    LayerWise,
    BlockDiagonal,
    BlockTriDiagonal,
    KFAC,
    EKFAC,
    UnitWise,
    Diagonal,
    QuasiDiagonal,
    Foof,
    UnitBlocks,
    Shampoo,
    KFOC,
    LowRankUnits,
    Nystroem,
    MiniBlock,
)
"""Every approximation of the Fisher, in the order of tables; a new one is a line more here."""

NAMED: tuple[type[Structure], ...] = tuple(cls for cls in STRUCTURES if cls.style.command)
"""Those that need no arguments, and so have a name on command lines."""

__all__ = [
    "EKFAC",
    "KFAC",
    "KFOC",
    "NAMED",
    "STRUCTURES",
    "AveragedStructure",
    "BlockDiagonal",
    "BlockTriDiagonal",
    "Diagonal",
    "Exact",
    "Foof",
    "Geometry",
    "IsotropyWarning",
    "LayerWise",
    "LowRankUnits",
    "MiniBlock",
    "Moments",
    "Nystroem",
    "QuasiDiagonal",
    "Shampoo",
    "SingularCouplingWarning",
    "Structure",
    "Style",
    "UnitBlocks",
    "UnitWise",
    "styled",
]
