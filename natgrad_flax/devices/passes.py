"""The passes through the model, each device with its own samples.

Left to itself XLA partitions products with ease, but not the backward pass of a convolution, whose
samples and output directions are one axis by then.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
from jax import Array, lax
from jax.sharding import PartitionSpec

from natgrad_flax.arguments.arrays import batch_size
from natgrad_flax.devices.placement import Placement
from natgrad_flax.signals.microbatches import Run, in_microbatches


@dataclass(frozen=True)
class OverDevices:
    """``in_microbatches`` with the microbatches of all devices at once.

    Attributes:
      placement: the devices. Parameters that the model holds may be sharded over other axes of the
        mesh, which are left to XLA.
    """

    placement: Placement

    def __call__(self, run: Run, arrays: tuple[Any, ...], microbatches: int) -> tuple[Any, Any]:
        """What ``run`` gives for a whole batch.

        Args:
          run: of one microbatch; as in ``in_microbatches``.
          arrays: of the batch, or trees of them; the first axis counts N samples and is sharded.
          microbatches: how many, one after the other, on every device; a divisor of N / k.

        Returns:
          The means over all samples, and the arrays with all of them in order, sharded.
        """
        axis = self.placement.axis

        def local(*own: Any) -> tuple[Any, Any]:
            start = lax.axis_index(axis) * batch_size(own)

            def from_start(first: Array | int, *microbatch: Any) -> tuple[Any, Any]:
                return run(start + first, *microbatch)

            means, rows = in_microbatches(from_start, own, microbatches)
            return jax.tree.map(lambda leaf: lax.pmean(leaf, axis), means), rows

        return jax.shard_map(
            local,
            mesh=self.placement.mesh,
            in_specs=PartitionSpec(axis),
            out_specs=(PartitionSpec(), PartitionSpec(axis)),
            axis_names={axis},
            check_vma=False,
        )(*arrays)
