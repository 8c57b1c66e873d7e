"""Names of an earlier release, which still work and say what they are called now."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any


class Renamed:
    """An attribute of a class that has another name now.

    Args:
      new: the name.
    """

    def __init__(self, new: str) -> None:
        self.new = new

    def __set_name__(self, owner: type, name: str) -> None:
        self.old = name

    def __get__(self, instance: Any, owner: type) -> Any:
        _warn(f"{owner.__name__}.{self.old}", f"{owner.__name__}.{self.new}")
        return getattr(owner if instance is None else instance, self.new)


def renamed_names(package: str, names: Mapping[str, str], found: Mapping[str, Any]) -> Callable:
    """A module's ``__getattr__`` that finds its earlier names, too.

    Args:
      package: what the module is called in messages.
      names: from earlier to present names.
      found: what the module holds, by present names.
    """

    def get(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        _warn(f"{package}.{name}", f"{package}.{names[name]}")
        return found[names[name]]

    return get


def _warn(old: str, new: str) -> None:
    warnings.warn(
        f"{old} is called {new} now; the earlier name goes with the next release",
        DeprecationWarning,
        stacklevel=3,
    )
