"""Natural gradients on a mesh of devices, of one process or of several."""

from natgrad_flax.devices.gradient import UnsolvedError, sharded_natural_gradient
from natgrad_flax.devices.placement import replicate, shard_batch
from natgrad_flax.devices.structure import Sharded
from natgrad_flax.processes import LostPeerError, connect, lost_peers

__all__ = [
    "LostPeerError",
    "Sharded",
    "UnsolvedError",
    "connect",
    "lost_peers",
    "replicate",
    "shard_batch",
    "sharded_natural_gradient",
]
