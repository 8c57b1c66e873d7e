"""Fisher approximations behind one protocol, one file each."""

from natgrad_flax.structures.averaged import AveragedStructure, Moments
from natgrad_flax.structures.base import Geometry, IsotropyWarning, Structure
from natgrad_flax.structures.block_diagonal import BlockDiagonal
from natgrad_flax.structures.diagonal import Diagonal
from natgrad_flax.structures.ekfac import EKFAC
from natgrad_flax.structures.exact import Exact
from natgrad_flax.structures.kfac import KFAC
from natgrad_flax.structures.layer_wise import (
    BlockTriDiagonal,
    LayerWise,
    SingularCouplingWarning,
)
from natgrad_flax.structures.quasi_diagonal import QuasiDiagonal
from natgrad_flax.structures.unit_wise import UnitWise

__all__ = [
    "EKFAC",
    "KFAC",
    "AveragedStructure",
    "BlockDiagonal",
    "BlockTriDiagonal",
    "Diagonal",
    "Exact",
    "Geometry",
    "IsotropyWarning",
    "LayerWise",
    "Moments",
    "QuasiDiagonal",
    "SingularCouplingWarning",
    "Structure",
    "UnitWise",
]
