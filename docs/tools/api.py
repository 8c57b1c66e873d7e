"""The pages of the API reference: every public name, found where the packages list them."""

from __future__ import annotations

import inspect
from importlib import import_module
from typing import Any, NamedTuple, get_origin


class Page(NamedTuple):
    """A page of the reference.

    Attributes:
      title: its heading.
      text: what stands below it.
      package: whose ``__all__`` names what it shows; without one the whole module is shown.
      parts: the parts of the package, as ``structures``, whose names are on this page; empty for
        all that are on no other page.
    """

    title: str
    text: str
    package: str
    parts: tuple[str, ...] = ()


PAGES = {
    "api/steps.md": Page(
        "Steps and Fishers",
        "Natural gradients, optimizers, averages, dampings, and the Fisher as an operator.",
        "natgrad_flax",
        ("optimizer", "damping"),
    ),
    "api/structures.md": Page(
        "Structures",
        "What is kept of the Fisher. [Which one?](../structures.md)",
        "natgrad_flax",
        ("structures",),
    ),
    "api/transformations.md": Page(
        "Transformations of gradients",
        "Optax transformations of gradients of any tree, which know nothing of a Fisher.",
        "natgrad_flax",
        ("transformations",),
    ),
    "api/losses.md": Page(
        "Losses",
        "What outputs mean, and with it which Fisher they have.",
        "natgrad_flax",
        ("losses",),
    ),
    "api/models.md": Page(
        "Models",
        "Models at hand, their layers, and how others come in.",
        "natgrad_flax",
        ("models",),
    ),
    "api/further.md": Page(
        "Costs, signals, XLA",
        "What a step costs, the signals that structures are made of, and what works around XLA.",
        "natgrad_flax",
    ),
    "api/linear.md": Page(
        "Linear models", "Where the Fisher has a closed form.", "natgrad_flax.linear"
    ),
    "api/devices.md": Page(
        "Devices", "The same on a mesh of devices and processes.", "natgrad_flax.devices"
    ),
    "api/checkpoint.md": Page(
        "Checkpoints", "Whole runs on disk, bit for bit.", "natgrad_flax.checkpoint"
    ),
    "api/geometry.md": Page(
        "Geometry", "Natural gradients of any map and metric.", "natgrad_flax.geometry"
    ),
    "api/theory.md": Page(
        "ntk_analysis",
        "The theory beside training, in float64 whatever the model is.",
        "ntk_analysis",
    ),
    "api/datasets.md": Page(
        "natgrad_datasets", "Data sets, prepared as in the papers.", "natgrad_datasets"
    ),
}
"""The pages by their place; a public name of a part that no page claims goes to the last resort."""


def names_of(place: str) -> list[str]:
    """The public names on a page, each with its package; a module without ``__all__`` itself."""
    page = PAGES[place]
    public = getattr(import_module(page.package), "__all__", None)
    if public is None:
        return [page.package]
    same = [other for other in PAGES.values() if other.package == page.package]
    claimed = {part for other in same for part in other.parts}

    def here(name: str) -> bool:
        part = _part(page.package, name)
        return part in page.parts if page.parts else part not in claimed

    return [f"{page.package}.{name}" for name in sorted(public, key=str.lower) if here(name)]


def write(place: str) -> str:
    """The Markdown of a page; mkdocstrings puts the docstrings in."""
    page, names = PAGES[place], names_of(place)
    lines = [f"# {page.title}", "", page.text, ""]
    if names != [page.package]:
        lines += ["| name | |", "|---|---|"]
        lines += [
            f"| [`{n.removeprefix(page.package + '.')}`][{n}] | {_summary(n)} |" for n in names
        ]
    for name in names:
        lines += ["", f"::: {name}"]
        if _base_of(name, names):
            lines += ["    options:", "      members: false"]
    return "\n".join(lines) + "\n"


def table() -> str:
    """The pages, and what is on each."""
    rows = [
        f"| [{page.title}]({place.removeprefix('api/')}) | {page.text} |"
        for place, page in PAGES.items()
    ]
    return "\n".join(["| | |", "|---|---|", *rows])


def _base_of(name: str, names: list[str]) -> bool:
    """Whether a base class on the same page has the methods already."""
    package, _, last = name.rpartition(".")
    found = getattr(import_module(package), last)
    bases = found.__mro__[1:] if inspect.isclass(found) else ()
    return any(f"{package}.{base.__name__}" in names for base in bases)


def _part(package: str, name: str) -> str:
    """Below which part of its package a name is defined."""
    module = getattr(getattr(import_module(package), name), "__module__", "") or ""
    return module.removeprefix(f"{package}.").split(".")[0]


def _summary(name: str) -> str:
    """The first sentence of a docstring; nothing of a constant or of a type's other name."""
    package, _, last = name.rpartition(".")
    found: Any = getattr(import_module(package), last)
    documented = inspect.ismodule(found) or (callable(found) and get_origin(found) is None)
    text = inspect.getdoc(found) if documented else None
    return (text or "").split("\n\n")[0].replace("\n", " ").replace("|", "\\|")
