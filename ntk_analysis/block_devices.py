"""Blocks of a kernel dealt out to devices, of one process or of several.

Block b goes to device b mod k, so that each device has its share to within one block whatever part
of a symmetric kernel is computed. Every device runs the compiled steps of one block by itself;
results come back as NumPy arrays. Where some devices belong to other processes, the processes
exchange what they have computed after every k blocks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from natgrad_flax.arguments.memory import available_memory
from ntk_analysis.results import content_hash

Block = tuple[int, int]
"""The first row and the first column."""
Compute = Callable[[Block, jax.Device | None], list[np.ndarray]]
"""A block of every kernel, (n1, n2), computed on a device, or where JAX puts it."""

AT_ONCE = 2
"""Blocks that a device has at once, so that it is busy while results are fetched."""
_AHEAD = 2  # rounds that wait for their turn, so that an uneven block stops nobody
_PAYS = 100  # blocks that make up for compiling all steps for one more device


def check_devices(devices: object) -> None:
    """Raises TypeError or ValueError unless these are different devices, or None."""
    if devices is None:
        return
    if not isinstance(devices, Sequence) or not all(isinstance(d, jax.Device) for d in devices):
        raise TypeError(
            f"devices must be JAX devices, such as jax.local_devices() has, got {devices!r}"
        )
    if not devices or len(set(devices)) < len(devices):
        raise ValueError(f"devices must be one or more different ones, got {list(devices)}")
    processes = {device.process_index for device in devices}
    if processes not in ({jax.process_index()}, set(range(jax.process_count()))):
        raise ValueError(
            "devices must all be of this process, or some of every process, such as jax.devices() "
            f"has, got {list(devices)} in process {jax.process_index()} of {jax.process_count()}"
        )


def usable_devices(
    devices: Sequence[jax.Device] | None, count: int, block_bytes: int
) -> tuple[jax.Device | None, ...]:
    """The devices that are asked for, or those of this process as far as they pay.

    Args:
      devices: as in ``analytic_kernels``.
      count: blocks to compute.
      block_bytes: what a block needs while it is computed.
    """
    if devices is not None:
        return tuple(devices)
    here = jax.local_devices()
    most = count // _PAYS
    if here[0].memory_stats() is None:
        # devices of one processor share its memory
        most = min(most, available_memory() // max(AT_ONCE * block_bytes, 1))
    chosen = jax.config.jax_default_device  # type: ignore[attr-defined]
    if most < 2 or len(here) < 2 or chosen is not None:
        return (None,)
    return tuple(here[:most])


def spans_processes(devices: Sequence[jax.Device | None]) -> bool:
    """Whether devices of other processes take part."""
    return any(device is not None and not _is_own(device) for device in devices)


def done_everywhere(
    devices: Sequence[jax.Device | None], made_of: Sequence[Any], done: np.ndarray
) -> np.ndarray:
    """Flags of the blocks that need not be computed: all processes that take part have them.

    Args:
      devices: of all processes.
      made_of: all that decides the kernels: arrays, and what JSON can hold.
      done: nonzero where this process has a block.

    Raises:
      ValueError: the processes do not compute the same.
    """
    if not spans_processes(devices):
        return done
    digest = content_hash([*made_of, [device.id for device in devices if device is not None]])
    everyone = multihost_utils.process_allgather(np.frombuffer(bytes.fromhex(digest), np.uint8))
    if (everyone != everyone[0]).any():
        raise ValueError(
            "the processes gave different models, inputs, parts or devices: with devices of "
            "several processes all of them make the same call"
        )
    return np.asarray(multihost_utils.process_allgather(np.asarray(done))).min(axis=0)


def compute_blocks(
    compute: Compute,
    blocks: Sequence[Block],
    devices: Sequence[jax.Device | None],
    shape: tuple[int, int, int],
) -> Iterator[tuple[Block, Sequence[np.ndarray]]]:
    """Yields blocks in order, with their values.

    Args:
      compute: computes one; it is called in threads.
      blocks: to be computed.
      devices: on which.
      shape: of the values of a block, the number of kernels first.
    """
    together = spans_processes(devices)
    own = [i for i, device in enumerate(devices) if device is None or _is_own(device)]
    rounds = [blocks[first : first + len(devices)] for first in range(0, len(blocks), len(devices))]
    pool = ThreadPoolExecutor(max(1, AT_ONCE * len(own)))

    def submit(batch: Sequence[Block]) -> list[Future[list[np.ndarray]]]:
        return [pool.submit(compute, batch[i], devices[i]) for i in own if i < len(batch)]

    try:
        ahead = deque(submit(batch) for batch in rounds[: AT_ONCE + _AHEAD])
        for number, batch in enumerate(rounds):
            values: Any = [future.result() for future in ahead.popleft()]
            if number + AT_ONCE + _AHEAD < len(rounds):
                ahead.append(submit(rounds[number + AT_ONCE + _AHEAD]))
            if together:
                values = _exchange(values, devices, shape)
            yield from zip(batch, values, strict=False)
    finally:
        pool.shutdown(cancel_futures=True)


def _exchange(
    values: Sequence[Sequence[np.ndarray]],
    devices: Sequence[jax.Device | None],
    shape: tuple[int, int, int],
) -> list[np.ndarray]:
    """The values of a round in the order of the devices, from all processes."""
    owners = [device.process_index for device in devices if device is not None]
    most = max(map(owners.count, owners))
    mine = np.zeros((most, *shape))
    for place, value in zip(mine, values, strict=False):
        place[...] = value
    with jax.enable_x64(True):
        everyone = np.asarray(multihost_utils.process_allgather(mine))
    seen = [owners[:index].count(owner) for index, owner in enumerate(owners)]
    return [everyone[owner, place] for owner, place in zip(owners, seen, strict=True)]


def _is_own(device: jax.Device) -> bool:
    return bool(device.process_index == jax.process_index())
