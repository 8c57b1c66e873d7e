"""Digests of the source that decides results, by which results of other code are told apart."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import natgrad_datasets

import natgrad_flax
import ntk_analysis

Packages = tuple[tuple[str, Path], ...]
"""Names of packages, or of modules of one file, and where they stand."""


def package(module: object) -> tuple[str, Path]:
    """The name and the folder of an imported package, an entry of ``Packages``.

    Example:
      >>> import natgrad_flax
      >>> from ntk_analysis.sources import package
      >>> package(natgrad_flax)[0]
      'natgrad_flax'
    """
    return str(vars(module)["__name__"]), Path(vars(module)["__file__"]).parent


LIBRARY: Packages = tuple(map(package, (natgrad_flax, natgrad_datasets, ntk_analysis)))
"""All that a result of this library can depend on."""


@cache
def import_digest(file: Path, packages: Packages = LIBRARY) -> str:
    """SHA-256 of the code of a module and of those that its imports lead to.

    Docstrings and comments on lines of their own are no code: an edit of them changes no digest.

    Args:
      file: of the module, which need not belong to the packages.
      packages: that count; what is imported from elsewhere does not.
    """
    digest = hashlib.sha256(_code(file))
    for module in imported_modules(file, packages):
        digest.update(module.encode() + b"\0" + _code(_file(module, packages)))
    return digest.hexdigest()


@cache
def imported_modules(file: Path, packages: Packages = LIBRARY) -> tuple[str, ...]:
    """The modules of the packages that a file's imports lead to, sorted; nothing is imported.

    A name that a package's ``__init__`` takes from elsewhere leads there and not to all else that
    the ``__init__`` imports, also where it is asked for as an attribute of the package; what an
    ``__init__`` calls when it is imported counts.

    Args:
      file: as in ``import_digest``.
      packages: as in ``import_digest``.
    """
    found: set[str] = set()
    waiting = [*_imports(file, packages)]
    while waiting:
        module = waiting.pop()
        if module not in found:
            found.add(module)
            waiting += [*_imports(_file(module, packages), packages)]
            waiting += [*_called_by_parents(module, packages)]
    return tuple(sorted(found))


@cache
def _code(file: Path) -> bytes:
    """The lines of a file without docstrings, comments that fill a line, and empty lines."""
    lines = file.read_bytes().splitlines()
    inside: set[int] = set()  # of texts that are values
    for node in ast.walk(_tree(file)):
        if isinstance(node, ast.Expr) and _is_text(node.value):
            for number in range(node.lineno - 1, node.end_lineno or node.lineno):
                lines[number] = b""
        elif isinstance(node, (ast.Constant, ast.JoinedStr)) and node.end_lineno != node.lineno:
            inside.update(range(node.lineno, node.end_lineno or node.lineno))
    kept = (
        line.rstrip()
        for number, line in enumerate(lines)
        if number in inside or not line.lstrip().startswith(b"#")
    )
    return b"\n".join(filter(None, kept))


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _imports(file: Path, packages: Packages) -> set[str]:
    """Modules of the packages that a file imports at any place, those for types alone left out."""
    found: set[str] = set()
    for name, module in _bound(file, packages):
        if _file(module, packages).name == "__init__.py":
            found.update(_asked_of(name, module, file, packages))
        else:
            found.add(module)
    return found


def _asked_of(name: str, whole: str, file: Path, packages: Packages) -> Iterator[str]:
    """Modules that the attributes of an imported package lead to; itself where it goes elsewhere.

    Args:
      name: that the file has for it.
      whole: a package whose ``__init__`` was imported under this name.
      file: that imported it.
      packages: as in ``import_digest``.
    """
    chains = _attributes(file).get(name.partition(".")[0])
    if not chains or file.name == "__init__.py":
        yield whole
    for chain in chains or ():
        module = whole
        # "import a.b" binds a: what is asked of a.b comes after it
        for attribute in chain[name.count(".") :]:
            if _file(module, packages).name != "__init__.py":
                break
            module = _origin(module, attribute, packages)
        yield module


@cache
def _attributes(file: Path) -> dict[str, set[tuple[str, ...]]]:
    """Of every name of a file the attributes that are asked of it, () where it stands alone."""
    found: dict[str, set[tuple[str, ...]]] = {}
    below: set[ast.AST] = set()  # parts of chains that are there as a whole; the walk is top down
    for node in ast.walk(_tree(file)):
        if node in below or not isinstance(node, (ast.Attribute, ast.Name)):
            continue
        chain: list[str] = []
        top: ast.AST = node
        while isinstance(top, ast.Attribute):
            chain.insert(0, top.attr)
            top = top.value
            below.add(top)
        if isinstance(top, ast.Name):
            found.setdefault(top.id, set()).add(tuple(chain))
    return found


@cache
def _bound(file: Path, packages: Packages) -> tuple[tuple[str, str], ...]:
    """Names that a file's imports bind, each with the module of the packages that defines it."""
    return tuple(_bindings(_tree(file), file, packages))


def _bindings(tree: ast.AST, file: Path, packages: Packages) -> Iterator[tuple[str, str]]:
    """``_bound`` of a part of a file."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                if _is_ours(alias.name, packages):
                    yield alias.asname or alias.name, alias.name
        elif isinstance(node, ast.ImportFrom):
            module = _absolute(node, file, packages)
            for alias in node.names if _is_ours(module, packages) else ():
                yield alias.asname or alias.name, _origin(module, alias.name, packages)
        elif isinstance(node, (ast.stmt, ast.excepthandler, ast.match_case)):
            yield from _bindings(node, file, packages)


def _absolute(node: ast.ImportFrom, file: Path, packages: Packages) -> str:
    """The module of a ``from ... import``, which may be relative to the file."""
    if not node.level:
        return node.module or ""
    folder = file.parents[node.level - 1]
    for package_, root in packages:
        if folder.is_relative_to(root):
            inside = folder.relative_to(root).parts
            return ".".join([package_, *inside, *filter(None, [node.module])])
    return ""


@cache
def _origin(module: str, name: str, packages: Packages) -> str:
    """The module that ``from module import name`` leads to."""
    if _file(f"{module}.{name}", packages).is_file():
        return f"{module}.{name}"
    file = _file(module, packages)
    if file.name == "__init__.py":
        return dict(_bound(file, packages)).get(name, module)
    return module


@cache
def _called_by_parents(module: str, packages: Packages) -> frozenset[str]:
    """Modules of what the packages around a module call when they are imported."""
    parent = module.rpartition(".")[0]
    if not parent:
        return frozenset()
    file = _file(parent, packages)
    known = dict(_bound(file, packages))
    calls = [node for node in _tree(file).body if isinstance(node, ast.Expr)]
    names = {n.id for call in calls for n in ast.walk(call) if isinstance(n, ast.Name)}
    found = {known[name] for name in names if name in known}
    return _called_by_parents(parent, packages) | found


@cache
def _tree(file: Path) -> ast.Module:
    return ast.parse(file.read_bytes())


def _is_ours(module: str, packages: Packages) -> bool:
    return module.partition(".")[0] in dict(packages)


def _file(module: str, packages: Packages) -> Path:
    """Where a module of the packages stands, or would stand."""
    name, _, inside = module.partition(".")
    root = dict(packages)[name]
    path = root.joinpath(*inside.split(".")) if inside else root
    if (path / "__init__.py").is_file():
        return path / "__init__.py"
    return path if path.suffix == ".py" else path.with_suffix(".py")
