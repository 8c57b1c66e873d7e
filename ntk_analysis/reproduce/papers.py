"""What a package of checks says of its paper."""

from __future__ import annotations

from typing import NamedTuple


class Paper(NamedTuple):
    """A paper whose claims are checks, or results of the project that are no paper.

    Attributes:
      prefix: what the identifiers of its checks begin with.
      short: its authors, in a few words.
      authors: by their full names.
      year: of publication.
      title: as printed.
      venue: where it appeared.
      modules: of its package that register checks, and those that register their figures.
      order: identifiers, or what they begin with, in the order of the page.
      own: whether these are results of this project.
    """

    prefix: str
    short: str
    authors: str
    year: int
    title: str
    venue: str
    modules: tuple[str, ...]
    order: tuple[str, ...]
    own: bool = False

    @property
    def citation(self) -> str:
        """Authors, year and title in one line."""
        return f"{self.short} ({self.year}), {self.title}"
