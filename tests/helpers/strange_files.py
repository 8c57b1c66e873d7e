"""What may stand in the place of a file: each makes something at a path."""

from collections.abc import Callable
from pathlib import Path

Make = Callable[[Path], object]


def holding(content: bytes) -> Make:
    """A file with some content."""
    return lambda path: path.write_bytes(content)


def link(target: str | None) -> Make:
    """A link; to itself for None."""
    return lambda path: path.symlink_to(target or path)


def of_size(size: int) -> Make:
    """A file of zeros that take no room."""

    def make(path: Path) -> None:
        with path.open("wb") as file:
            file.truncate(size)

    return make
