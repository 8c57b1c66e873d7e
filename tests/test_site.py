"""The pages of the site without building it: navigation, reference, inclusions, code."""

import ast
import json
import posixpath
import re
from importlib import import_module
from pathlib import Path

import pytest
import yaml

from docs.tools import api, gallery, history, include

DOCS = Path(__file__).parents[1] / "docs"
PAGES = {path.relative_to(DOCS).as_posix(): path.read_text("utf-8") for path in DOCS.rglob("*.md")}
CONFIG = yaml.safe_load((DOCS.parent / "mkdocs.yml").read_text("utf-8"))
EXAMPLES = {f"gallery/{script.stem}.md" for script in gallery.order()}
BLOCK = re.compile(r"(<!-- run -->\n)?```python\n(.*?)```", re.DOTALL)


def leaves(nav):
    if isinstance(nav, str):
        return [nav]
    parts = nav.values() if isinstance(nav, dict) else nav
    return [leaf for part in parts for leaf in leaves(part)]


def test_navigation_names_every_page_once():
    assert sorted(leaves(CONFIG["nav"])) == sorted({*PAGES, *api.PAGES, *EXAMPLES})


@pytest.mark.parametrize("package", ["natgrad_flax", "ntk_analysis", "natgrad_datasets"])
def test_every_public_name_has_one_place_in_the_reference(package):
    written = "\n".join(api.write(place) for place in api.PAGES)
    shown = re.findall(r"^::: (\S+)$", written, re.MULTILINE)
    for name in import_module(package).__all__:
        assert shown.count(f"{package}.{name}") == 1, name


def test_a_new_public_name_appears_by_itself(monkeypatch):
    import natgrad_flax

    class Foreign:
        """Some structure."""

    Foreign.__module__ = "natgrad_flax.structures.foreign"
    monkeypatch.setattr(natgrad_flax, "Foreign", Foreign, raising=False)
    monkeypatch.setattr(natgrad_flax, "__all__", [*natgrad_flax.__all__, "Foreign"])
    assert "::: natgrad_flax.Foreign\n" in api.write("api/structures.md")
    Foreign.__module__ = "natgrad_flax.somewhere"
    assert "::: natgrad_flax.Foreign\n" in api.write("api/further.md")


def test_what_pages_include_is_there_and_its_links_lead_to_pages():
    known = {*PAGES, *api.PAGES, *EXAMPLES, *(f"{page[:-3]}-1.png" for page in EXAMPLES)}
    for page, text in PAGES.items():
        expanded = include.expand(page, text)
        assert "<!-- include" not in expanded
        prose = re.sub(r"```.*?```", "", expanded, flags=re.DOTALL)
        for target in re.findall(r"\]\((?!https?:)([^)#\s]+)", prose):
            place = posixpath.normpath(posixpath.join(posixpath.dirname(page), target))
            assert place in known or (DOCS / place).is_file(), f"{page} links to {target}"


def test_a_section_that_is_gone_is_named():
    with pytest.raises(ValueError, match="no section #no-such"):
        include.expand("index.md", "<!-- include: README.md#no-such -->")
    with pytest.raises(ValueError, match="no page of docs/ includes SECURITY"):
        include.home("SECURITY.md", None)


def test_headings_inside_of_code_are_no_sections_and_levels_shift(tmp_path, monkeypatch):
    (tmp_path / "A.md").write_text("# A\n\n## B\nx\n```\n# no\n```\n### C\ny\n## D\nz\n")
    monkeypatch.setattr(include, "ROOT", tmp_path)
    assert include.expand("p.md", "<!-- include: A.md#b -->") == "x\n```\n# no\n```\n## C\ny"
    assert include.expand("p.md", "<!-- include: A.md#b alone -->") == "x\n```\n# no\n```"


@pytest.mark.parametrize(
    "page", sorted(page for page, text in PAGES.items() if "```python" in text)
)
def test_code_of_pages_compiles_and_runs_where_marked(page):
    scope = {}
    for marked, code in BLOCK.findall(PAGES[page]):
        tree = ast.parse(code)
        if marked:
            exec(compile(tree, page, "exec"), scope)
    if page == "index.md":  # "by a factor of a hundred and more"
        loss, model, stepped, x, y = (scope[n] for n in ("loss", "model", "stepped", "x", "y"))
        assert loss(stepped(x), y) < loss(model(x), y) / 100


def test_scripts_of_the_gallery_are_split_into_text_and_code():
    for script in gallery.order():
        title, introduction, blocks = gallery.split(script.read_text(encoding="utf-8"))
        assert title
        assert introduction
        assert any(re.search(r"plt\.show\(\)|figure = ", code) for _, code in blocks)
        ast.parse("\n".join(code for _, code in blocks))


def test_a_script_becomes_a_page_with_output_and_figures(tmp_path):
    script = tmp_path / "toy.py"
    script.write_text(
        '"""A title\n\nAn introduction.\n"""\n\n# %%\n# Some *text*.\nprint(6 * 7)\n\n'
        "# %%\nimport matplotlib.pyplot as plt\n\nplt.plot([1, 2])\nplt.show()\n"
    )
    gallery.run(script, tmp_path / "out")
    page = (tmp_path / "out" / "toy.md").read_text()
    assert page.startswith(
        "# A title\n\nAn introduction.\n\nSome *text*.\n\n```python\nprint(6 * 7)\n```"
    )
    assert "```text\n42\n```" in page
    assert "![A title](toy-1.png)" in page
    assert (tmp_path / "out" / "toy-1.png").read_bytes().startswith(b"\x89PNG")


def test_the_history_of_the_suites_counts_the_commits_of_each_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(history, "RESULTS", tmp_path)
    assert history.measured() == {}
    (tmp_path / "cpu-x").mkdir()
    for name in ("machine", "a-py3.11", "a-py3.12", "b-py3.11"):
        path = tmp_path / "cpu-x" / f"{name}.json"
        path.write_text(json.dumps({"commit_hash": name[0]}))
    assert "2 commits on `cpu-x`" in history.told(built=True)
    assert "make bench-site" in history.told(built=False)
