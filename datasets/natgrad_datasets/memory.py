"""What does not fit into memory is refused before it is drawn."""

from __future__ import annotations

import math
import os
from pathlib import Path

from .errors import DatasetError

try:
    import resource
except ImportError:  # on Windows
    resource = None  # type: ignore[assignment]

_CONTAINER = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)


def memory_limit() -> float:
    """Bytes that this process may have: of the machine, its container or its address space.

    Infinite where the system does not say.
    """
    limits: list[float] = [math.inf]
    if resource is not None:
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
        address_space = resource.getrlimit(resource.RLIMIT_AS)[0]
        if address_space != resource.RLIM_INFINITY:
            limits.append(address_space)
    for path in _CONTAINER:
        try:
            limits.append(int(path.read_text()))
        except (OSError, ValueError):  # not there, or "max"
            continue
    return min(limits)


def check_fits(entries: int, what: str) -> None:
    """Refuse arrays of float64 that cannot fit, whatever else is done with them.

    Args:
        entries: How many numbers they have together.
        what: What to call them in an error.

    Raises:
        DatasetError: They need more memory than there is.
    """
    needed, limit = 8 * entries, memory_limit()
    if needed > limit:
        raise DatasetError(
            f"{what} would take {needed / 2**30:,.1f} GiB of memory, and this process may have "
            f"{limit / 2**30:,.1f} GiB; ask for less"
        )
