"""How much memory there is, and what cannot fit into it: one clear error before any work."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from pathlib import Path

import jax

SMALL = 2**24
"""Bytes of which nobody asks whether there is room: looking takes longer than failing."""

_PAGE = os.sysconf("SC_PAGE_SIZE")


def available_memory() -> int:
    """Bytes that are free for new arrays on the default device.

    Those of its own where the device says so; else of the machine, as far as limits of containers
    (cgroups, version 1 and 2) and of the process (``ulimit -v``) allow, and what is in use counts.
    """
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"] - stats.get("bytes_in_use", 0))
    return host_memory()


def host_memory(root: Path = Path("/")) -> int:
    """Bytes that this process can still take on this machine.

    Args:
      root: of the file system, whose ``proc`` and ``sys`` say so.
    """
    free = [os.sysconf("SC_PHYS_PAGES") * _PAGE, *_machine(root), *_groups(root)]
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    used = _read(root / "proc/self/statm")
    if limit != resource.RLIM_INFINITY and used:
        free.append(limit - int(used.split()[0]) * _PAGE)
    return max(0, min(free))


def _machine(root: Path) -> Iterator[int]:
    """What the kernel counts as available: free, or in caches that it would give up."""
    for line in _read(root / "proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            yield int(line.split()[1]) * 1024


def _groups(root: Path) -> Iterator[int]:
    """What is left in the cgroups of this process and in those around them."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            base, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            base = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        # seen from inside a container the root of the mount may be the group itself
        group = base / path.lstrip("/")
        for place in (group, *group.parents):
            limit, used = (_read(place / name).strip() for name in names[:2])
            if limit.isdigit() and used.isdigit():
                rows = (row.split() for row in _read(place / "memory.stat").splitlines())
                caches = {name: int(value) for name, value in rows}
                yield int(limit) - int(used) + caches.get(names[2], 0)
            if place == base:
                break


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def check_bytes(needed: float, what: str, advice: str) -> None:
    """Refuses what cannot fit.

    Args:
      needed: bytes.
      what: needs them, for the message: "kernels of 3 x 3 need".
      advice: what to do instead.

    Raises:
      ValueError: there is less memory than that.
    """
    if needed <= SMALL:
        return
    free = available_memory()
    if needed > free:
        raise ValueError(
            f"{what} {needed / 2**30:,.1f} GiB and the device has {free / 2**30:,.1f} GiB; {advice}"
        )


def check_fits(side: int, itemsize: int, what: str, arrays: float = 2.0) -> None:
    """Refuses a square array that cannot fit.

    Args:
      side: rows of the array.
      itemsize: bytes of an entry.
      what: the array, for the message.
      arrays: how many of its size there are at once, with what it is made of and its
        factorisation.

    Raises:
      ValueError: they need more than there is.
    """
    check_bytes(
        arrays * side * side * itemsize,
        f"{what} is {side} x {side}: with its factorisation it needs",
        'use a smaller batch, fisher="mc", or a structure with smaller blocks',
    )
