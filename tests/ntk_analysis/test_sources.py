"""Which modules decide a result, found from imports without importing them."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

from ntk_analysis import sources
from ntk_analysis.reproduce import load_checks
from ntk_analysis.sources import import_digest, imported_modules

HEADER = "import numpy as np\n"
COMPILER = "natgrad_flax.xla.compiler"
"""What natgrad_flax calls when it is imported."""


@pytest.mark.parametrize(
    ("text", "inside", "outside"),
    [
        ("import natgrad_flax.geometry", ["natgrad_flax.geometry", COMPILER], "json"),
        ("from natgrad_flax import geometry", ["natgrad_flax.geometry"], "natgrad_flax.models"),
        # a name of an __init__ leads to where it is defined, and on from there
        (
            "from natgrad_flax import KFAC",
            ["natgrad_flax.structures.kfac", "natgrad_flax.operators.kronecker"],
            "natgrad_flax.optimizer.descent",
        ),
        (
            "def f():\n  try:\n    import natgrad_flax.damping\n  except Exception:\n    pass",
            ["natgrad_flax.damping"],
            "natgrad_flax.models",
        ),
        # relative imports; one that defines its name here
        (
            "from natgrad_datasets import load",
            ["natgrad_datasets.loading", "natgrad_datasets.store"],
            "natgrad_datasets.separable",
        ),
        ("from natgrad_flax.structures import NAMED", ["natgrad_flax.structures.ekfac"], "json"),
        ("import natgrad_datasets as d", ["natgrad_datasets.separable"], COMPILER),
        ("if TYPE_CHECKING:\n  import natgrad_flax.damping", [], "natgrad_flax.damping"),
    ],
)  # fmt: skip
def test_imports_are_followed(tmp_path, text, inside, outside):
    file = tmp_path / "module.py"
    file.write_text(HEADER + text, encoding="utf-8")
    found = imported_modules(file)
    assert set(inside) <= set(found)
    assert outside not in found
    assert list(found) == sorted(set(found))


def test_a_digest_follows_the_module_and_what_it_stands_on(tmp_path, monkeypatch):
    file, base = tmp_path / "check.py", tmp_path / "base.py"
    file.write_text("from natgrad_flax import geometry", encoding="utf-8")
    base.write_text("", encoding="utf-8")
    plain = sources._file
    moved = {"natgrad_flax.geometry": base}
    monkeypatch.setattr(sources, "_file", lambda name: moved.get(name) or plain(name))

    def digest() -> str:
        return import_digest.__wrapped__(file)

    first = digest()
    base.write_text("x = 1", encoding="utf-8")
    second = digest()
    file.write_text("from natgrad_flax import geometry  # again", encoding="utf-8")
    assert len({first, second, digest()}) == 3


def test_every_check_stands_on_its_library():
    """Not on commands and pages, and each on less than there is."""
    everything = {path for root in sources._PACKAGES.values() for path in root.rglob("*.py")}
    files = {Path(inspect.getfile(inspect.unwrap(check.run))) for check in load_checks()}
    assert len(files) > 30
    for file in files:
        found = imported_modules(file)
        assert "ntk_analysis.reproduce.registry" in found
        assert COMPILER in found
        assert len(found) < 0.7 * len(everything)
        assert not [
            m
            for m in found
            if m.startswith(("ntk_analysis.cli", "ntk_analysis.report")) and "reproduce" not in m
        ]
