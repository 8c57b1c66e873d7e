"""One page a paper: what it claims, what we measured, the figures in its layout."""

from __future__ import annotations

from typing import NamedTuple

from ntk_analysis.names import find

FOLDER = "papers"
"""Of the pages, below that of the results."""


class Paper(NamedTuple):
    """A paper whose claims are checks, or results of the project that are no paper.

    Attributes:
      prefix: what the identifiers of its checks begin with.
      short: its authors, in a few words.
      authors: by their full names.
      year: of publication.
      title: as printed.
      venue: where it appeared.
      own: whether these are results of this project.
    """

    prefix: str
    short: str
    authors: str
    year: int
    title: str
    venue: str
    own: bool = False

    @property
    def citation(self) -> str:
        """Authors, year and title in one line."""
        return f"{self.short} ({self.year}), {self.title}"


PAPERS = {
    "karakida_osawa": Paper(
        "KO",
        "Karakida & Osawa",
        "Ryo Karakida and Kazuki Osawa",
        2020,
        "Understanding approximate Fisher information for fast convergence of natural gradient "
        "descent in wide neural networks",
        "NeurIPS 2020",
    ),
    "bernacchia": Paper(
        "BE",
        "Bernacchia, Lengyel & Hennequin",
        "Alberto Bernacchia, Máté Lengyel and Guillaume Hennequin",
        2018,
        "Exact natural gradient in deep linear networks and its application to the nonlinear case",
        "NeurIPS 2018",
    ),
    "kerekes": Paper(
        "KE",
        "Kerekes, Mészáros & Huszár",
        "Anna Kerekes, Anna Mészáros and Ferenc Huszár",
        2021,
        "Depth without the magic: inductive bias of natural gradient descent",
        "Preprint",
    ),
    "van_oostrum": Paper(
        "VO",
        "van Oostrum, Müller & Ay",
        "Jesse van Oostrum, Johannes Müller and Nihat Ay",
        2022,
        "Invariance properties of the natural gradient in overparametrised systems",
        "Information Geometry",
    ),
    "natgrad": Paper(
        "NG",
        "Our own results",
        "The natgrad project",
        2026,
        "Which Fisher approximations are isotropic, and what they cost",
        "A result of this project",
        own=True,
    ),
}
"""By the name of the package of its checks, which is that of its page, too."""


def paper_of(identifier: str) -> str | None:
    """The name of the paper that a check belongs to; None for a check of no paper here."""
    prefix = identifier.partition("-")[0]
    return next((name for name, paper in PAPERS.items() if paper.prefix == prefix), None)


def find_paper(prefix: str) -> str:
    """The name of the paper whose checks begin with "KO", say; case does not matter.

    Raises:
      ValueError: there is none; the message says which there are.
    """
    names = {paper.prefix.lower(): name for name, paper in PAPERS.items()}
    return names[find("paper", prefix, names)]
