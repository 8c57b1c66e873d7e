"""The examples of docstrings run, and every public name of the reference has one."""

import doctest
import inspect
from functools import cache, wraps
from importlib import import_module
from pathlib import Path
from typing import get_origin

import jaxtyping
import pytest
from jax import Array

from docs.tools import api

ROOT = Path(__file__).parents[1]
FINDER = doctest.DocTestFinder(exclude_empty=True)


def by_room():
    """Modules with an example, those of a folder together: they share compiled programs."""
    rooms = {}
    for package in ("natgrad_flax", "ntk_analysis", "datasets/natgrad_datasets"):
        for path in sorted((ROOT / package).rglob("*.py")):
            if ">>> " in path.read_text("utf-8"):
                parts = path.relative_to((ROOT / package).parent).with_suffix("").parts
                room = ".".join(parts[: 1 + (parts[0] == "natgrad_flax")])
                rooms.setdefault(room, []).append(".".join(parts).removesuffix(".__init__"))
    return rooms


ROOMS = by_room()


@cache
def examples_of(module):
    """The docstrings of a module that have examples, by the full name of what they describe."""
    found = FINDER.find(import_module(module), module)
    return {test.name: test for test in found if test.examples}


def has_example(thing):
    """Whether the docstring of a module, a class or a function is among those that are run."""
    if inspect.ismodule(thing):
        return thing.__name__ in examples_of(thing.__name__)
    return f"{thing.__module__}.{thing.__qualname__}" in examples_of(thing.__module__)


def public():
    """Every name of the reference with what it stands for, constants left out."""
    for place in api.PAGES:
        for name in api.names_of(place):
            package, _, last = name.rpartition(".")
            thing = getattr(import_module(package), last, None)
            if inspect.ismodule(thing) and name == api.PAGES[place].package:  # it has no list
                for inner, one in inspect.getmembers(thing, inspect.isroutine):
                    if not inner.startswith("_") and one.__module__ == name:
                        yield f"{name}.{inner}", one
            elif inspect.ismodule(thing) or (callable(thing) and get_origin(thing) is None):
                yield name, thing


def held_to_shapes(function):
    """A function whose arguments and result must have the shapes that its signature says."""
    names = {"Float": jaxtyping.Float, "Array": Array}
    said = {k: eval(v, names) for k, v in function.__annotations__.items() if "Float[" in v}

    @wraps(function)
    def held(*args, **kwargs):
        given = inspect.signature(function).bind(*args, **kwargs).arguments
        with jaxtyping.jaxtyped("context"):  # a letter stands for one number in it
            for name in said.keys() & given:
                assert isinstance(given[name], said[name]), f"{name}: no {said[name]}"
            result = function(*args, **kwargs)
            assert isinstance(result, said.get("return", object)), f"no {said['return']}"
        return result

    return held


def test_every_public_name_has_an_example():
    named = dict(public())
    assert len(named) > 100
    assert not [name for name, thing in named.items() if not has_example(thing)]


@pytest.mark.parametrize("room", ROOMS)
def test_examples_run(room, monkeypatch, tmp_path):
    """As a reader would run them: one by one, without files, a network or a module's own names."""
    monkeypatch.delenv("NATGRAD_DATA", raising=False)
    monkeypatch.setenv("NATGRAD_OFFLINE", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    runner, said = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS, verbose=False), []
    for module in ROOMS[room]:
        found = import_module(module)
        for name, function in inspect.getmembers(found, inspect.isfunction):
            if function.__module__ == module and "Float[" in str(function.__annotations__):
                held = held_to_shapes(function)
                for place in (found, import_module(module.rpartition(".")[0])):  # exports it
                    if getattr(place, name, None) is function:
                        monkeypatch.setattr(place, name, held)
        for test in examples_of(module).values():
            test.globs = {"__name__": "__main__"}
            runner.run(test, out=said.append)
    assert not said, "".join(said)
    assert runner.tries
