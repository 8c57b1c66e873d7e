"""What the layers of a model see of a batch, from which every Fisher approximation is made."""

from natgrad_flax.signals.base import LayerSignals, LayerUpdate
from natgrad_flax.signals.dense import DenseSignals, Signals
from natgrad_flax.signals.shared import ExplicitSignals, SharedSignals

__all__ = [
    "DenseSignals",
    "ExplicitSignals",
    "LayerSignals",
    "LayerUpdate",
    "SharedSignals",
    "Signals",
]
