"""Settings that are instances of classes of ours, such as structures and losses."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import TypeVar

T = TypeVar("T")


def check_instance(name: str, value: object, base: type[T]) -> T:
    """The value; raises TypeError unless it is an instance of a class.

    Args:
      name: of the setting.
      value: what was given.
      base: the class; the message names the subclasses that this package has of it.
    """
    if isinstance(value, type) and issubclass(value, base):
        raise TypeError(f"{name} must be an instance: write {call_of(value)}")
    if not isinstance(value, base):
        names = ", ".join(f"ng.{call_of(cls)}" for cls in own_subclasses(base))
        raise TypeError(f"{name} must be one of {names}, got {value!r}")
    return value


def own_subclasses(base: type[T]) -> Iterator[type[T]]:
    """Classes below a class that stand in its package and can be made, in order of definition."""
    package = base.__module__.rpartition(".")[0]
    for cls in base.__subclasses__():
        if cls.__module__.startswith(f"{package}.") and not cls.__name__.startswith("_"):
            if not inspect.isabstract(cls):
                yield cls
            yield from own_subclasses(cls)


def call_of(cls: type) -> str:
    """An instance of a class, with the arguments that it cannot do without."""
    arguments = inspect.signature(cls).parameters.values()
    needed = [arg.name for arg in arguments if arg.default is arg.empty]
    return f"{cls.__name__}({', '.join(needed)})"
