"""Digests of the source that decides results, by which results of other code are told apart."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import natgrad_datasets

import natgrad_flax
import ntk_analysis

_PACKAGES = {
    package.__name__: Path(package.__file__ or "").parent
    for package in (natgrad_flax, natgrad_datasets, ntk_analysis)
}
_AFTERWARDS = ("cli", "report", "reproduce")
"""Folders of ntk_analysis that only ask, draw or check."""


def source_digest(further: Iterable[Path] = ()) -> str:
    """SHA-256 of every module of the packages, wherever in them it stands.

    Args:
      further: files that count, too.
    """
    digest = hashlib.sha256()
    for package, folder in _PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            inside = path.relative_to(folder)
            if package != ntk_analysis.__name__ or inside.parts[0] not in _AFTERWARDS:
                digest.update(inside.as_posix().encode() + b"\0" + path.read_bytes())
    for path in further:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


@cache
def import_digest(file: Path) -> str:
    """SHA-256 of a module and of those modules of the packages that its imports lead to.

    Args:
      file: of the module, which need not belong to the packages.
    """
    digest = hashlib.sha256(file.read_bytes())
    for module in imported_modules(file):
        digest.update(module.encode() + b"\0" + _file(module).read_bytes())
    return digest.hexdigest()


def imported_modules(file: Path) -> tuple[str, ...]:
    """The modules of the packages that a file's imports lead to, sorted; nothing is imported.

    A name that a package's ``__init__`` takes from elsewhere leads there and not to all else that
    the ``__init__`` imports; what an ``__init__`` calls when it is imported counts.
    """
    found: set[str] = set()
    waiting = [*_imports(file)]
    while waiting:
        module = waiting.pop()
        if module not in found:
            found.add(module)
            waiting += [*_imports(_file(module)), *_called_by_parents(module)]
    return tuple(sorted(found))


def _imports(file: Path) -> set[str]:
    """Modules of the packages that a file imports at any place, those for types alone left out."""
    return {module for _, module in _bound(file)}


@cache
def _bound(file: Path) -> tuple[tuple[str, str], ...]:
    """Names that a file's imports bind, each with the module of the packages that defines it."""
    return tuple(_bindings(_tree(file), file))


def _bindings(tree: ast.AST, file: Path) -> Iterator[tuple[str, str]]:
    """``_bound`` of a part of a file."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                if _is_ours(alias.name):
                    yield alias.asname or alias.name, alias.name
        elif isinstance(node, ast.ImportFrom):
            module = _absolute(node, file)
            for alias in node.names if _is_ours(module) else ():
                yield alias.asname or alias.name, _origin(module, alias.name)
        elif isinstance(node, (ast.stmt, ast.excepthandler, ast.match_case)):
            yield from _bindings(node, file)


def _absolute(node: ast.ImportFrom, file: Path) -> str:
    """The module of a ``from ... import``, which may be relative to the file."""
    if not node.level:
        return node.module or ""
    folder = file.parents[node.level - 1]
    for package, root in _PACKAGES.items():
        if folder.is_relative_to(root):
            inside = folder.relative_to(root).parts
            return ".".join([package, *inside, *filter(None, [node.module])])
    return ""


@cache
def _origin(module: str, name: str) -> str:
    """The module that ``from module import name`` leads to."""
    if _file(f"{module}.{name}").is_file():
        return f"{module}.{name}"
    file = _file(module)
    if file.name == "__init__.py":
        return dict(_bound(file)).get(name, module)
    return module


@cache
def _called_by_parents(module: str) -> frozenset[str]:
    """Modules of what the packages around a module call when they are imported."""
    parent = module.rpartition(".")[0]
    if not parent:
        return frozenset()
    file = _file(parent)
    known = dict(_bound(file))
    calls = [node for node in _tree(file).body if isinstance(node, ast.Expr)]
    names = {n.id for call in calls for n in ast.walk(call) if isinstance(n, ast.Name)}
    return _called_by_parents(parent) | {known[name] for name in names if name in known}


@cache
def _tree(file: Path) -> ast.Module:
    return ast.parse(file.read_bytes())


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] in _PACKAGES


def _file(module: str) -> Path:
    """Where a module of the packages stands, or would stand."""
    package, _, inside = module.partition(".")
    path = _PACKAGES[package].joinpath(*inside.split("."))
    return path / "__init__.py" if (path / "__init__.py").is_file() else path.with_suffix(".py")
