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
        ("import natgrad_datasets as d\nprint(d)", ["natgrad_datasets.separable"], COMPILER),
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
    monkeypatch.setattr(
        sources, "_file", lambda name, packages: moved.get(name) or plain(name, packages)
    )

    def digest() -> str:
        sources._code.cache_clear()
        sources._tree.cache_clear()
        return import_digest.__wrapped__(file)

    first = digest()
    base.write_text("x = 1", encoding="utf-8")
    second = digest()
    file.write_text("from natgrad_flax import geometry\nagain = 1", encoding="utf-8")
    assert len({first, second, digest()}) == 3


def test_every_check_stands_on_its_library():
    """Not on commands and pages, and each on less than there is."""
    everything = {path for _, root in sources.LIBRARY for path in root.rglob("*.py")}
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


@pytest.mark.parametrize(
    ("text", "inside", "outside"),
    [
        ("ng.KFAC()", "natgrad_flax.structures.kfac", "natgrad_flax.structures.ekfac"),
        ("ng.models.sizes", "natgrad_flax.models.sizes", "natgrad_flax.models.convnet"),
        ("print(ng)", "natgrad_flax.structures.ekfac", "json"),
        ("ng.KFAC(); ng.natural_gradient", "natgrad_flax.optimizer.gradient",
         "natgrad_flax.structures.unit_wise"),
    ],
)  # fmt: skip
def test_attributes_of_a_package_lead_to_where_they_are_defined(tmp_path, text, inside, outside):
    file = tmp_path / "module.py"
    file.write_text(f"import natgrad_flax as ng\n{text}\n", encoding="utf-8")
    found = imported_modules(file)
    assert inside in found
    assert outside not in found


def test_a_package_imported_by_its_long_name(tmp_path):
    file = tmp_path / "module.py"
    file.write_text(
        "import natgrad_flax.structures\nnatgrad_flax.structures.KFAC()\n", encoding="utf-8"
    )
    found = imported_modules(file)
    assert "natgrad_flax.structures.kfac" in found
    assert "natgrad_flax.structures.ekfac" not in found


CODE = '''"""Says {0}."""

# {0}
x = """a
# {1}
"""


def f():
    """Says {0}.

    # and {0}
    """
    return {2}  # in a line of code


y = 1
"""{0}"""
'''


@pytest.mark.parametrize(
    ("words", "same"),
    [
        (("more", "text", "x"), True),
        (("this", "TEXT", "x"), False),
        (("this", "text", "x + x"), False),
    ],
)
def test_docstrings_and_comments_are_no_code(tmp_path, words, same):
    """What only looks like a comment, inside of a value, is code."""
    digests = set()
    for number, used in enumerate([("this", "text", "x"), words]):
        file = tmp_path / f"module{number}.py"
        file.write_text(CODE.format(*used), encoding="utf-8")
        digests.add(import_digest(file))
    assert (len(digests) == 1) is same


def test_packages_of_ones_own_and_single_files_count(tmp_path):
    """As an entry of the leaderboard brings them."""
    helper, entry = tmp_path / "helper.py", tmp_path / "entry.py"
    helper.write_text("x = 1", encoding="utf-8")
    entry.write_text("import helper\nprint(helper.x)", encoding="utf-8")
    beside = (("helper", helper),)
    assert imported_modules(entry) == ()
    assert imported_modules(entry, beside) == ("helper",)
    before = import_digest.__wrapped__(entry, beside)
    sources._code.cache_clear()
    helper.write_text("x = 2", encoding="utf-8")
    sources._tree.cache_clear()
    assert import_digest.__wrapped__(entry, beside) != before
