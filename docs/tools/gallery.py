"""Runs the scripts of the gallery and writes each as a page with its output and figures.

A script begins with a docstring, title first. A block begins with a line ``# %%``: the comment
right below is text (Markdown), what follows is code. ``python docs/tools/gallery.py SCRIPT FOLDER``
runs one; the build of the site runs those whose page is older than they or the packages are.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import inspect
import io
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "docs" / "examples"
FINISHED = "finished"
STYLE = {
    "figure.dpi": 160,
    "figure.figsize": (7.2, 3.6),
    "figure.constrained_layout.use": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": "medium",
    "font.size": 10,
    "legend.frameon": False,
    "savefig.facecolor": "white",
}


class Block(NamedTuple):
    """A text in Markdown and the code below it; either may be empty."""

    text: str
    code: str


def order() -> list[Path]:
    """The scripts in the order of the gallery, which each says in a line ``# gallery: NUMBER``."""

    def number(script: Path) -> int:
        found = re.search(r"^# gallery: (\d+)$", script.read_text(encoding="utf-8"), re.MULTILINE)
        if found is None:
            raise ValueError(f"{script.name} has no line '# gallery: NUMBER', its place")
        return int(found[1])

    return sorted(EXAMPLES.glob("*.py"), key=number)


def split(source: str) -> tuple[str, str, list[Block]]:
    """Title, introduction and blocks of a script."""
    docstring = ast.get_docstring(ast.parse(source))
    if not docstring:
        raise ValueError("a script of the gallery begins with a docstring, title first")
    title, _, introduction = docstring.partition("\n")
    blocks = []
    for part in re.split(r"^# %%\n", source, flags=re.MULTILINE)[1:]:
        comment = re.match(r"(?:#.*\n)*", part)
        assert comment is not None
        text = re.sub(r"^# ?", "", comment[0], flags=re.MULTILINE)
        blocks.append(Block(text.strip(), part[comment.end() :].strip()))
    return title.rstrip("."), introduction.strip(), blocks


def run(script: Path, folder: Path) -> None:
    """Executes a script and writes its page and figures.

    Args:
      script: a script of the gallery.
      folder: gets ``NAME.md`` and ``NAME-1.png``, ... .

    Raises:
      Exception: what the script raises.
    """
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(STYLE)
    plt.show = lambda *_, **__: None
    folder.mkdir(parents=True, exist_ok=True)
    title, introduction, blocks = split(script.read_text(encoding="utf-8"))
    lines = [f"# {title}", "", introduction, ""]
    scope: dict[str, Any] = {"__name__": "__main__", "__file__": str(script)}
    drawn = 0
    for block in blocks:
        lines += [block.text, ""]
        if not block.code:
            continue
        lines += ["```python", block.code, "```", ""]
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            exec(compile(block.code, str(script), "exec"), scope)
        if said.getvalue():
            lines += ["```text", said.getvalue().rstrip(), "```", ""]
        figures = [plt.figure(number) for number in plt.get_fignums()]
        # one that a function has made without pyplot
        if not figures and (alone := scope.pop("figure", None)) is not None:
            figures = [alone]
        for figure in figures:
            drawn += 1
            name = f"{script.stem}-{drawn}.png"
            figure.savefig(folder / name, metadata={"Software": None})
            lines += [f"![{title}]({name})", ""]
        scope.pop("figure", None)
        plt.close("all")
    lines += [f"The script: `docs/examples/{script.name}`.", ""]
    (folder / f"{script.stem}.md").write_text("\n".join(lines), encoding="utf-8")


def build(folder: Path) -> Iterator[Path]:
    """Runs what is not up to date, each script in a process of its own; yields every script.

    Raises:
      RuntimeError: a script failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    packages = [*ROOT.glob("n*_*/**/*.py"), *ROOT.glob("datasets/**/*.py")]
    shared = [path.read_text(encoding="utf-8") for path in sorted(packages)]
    shared += [inspect.getsource(split), inspect.getsource(run), repr(STYLE)]
    for script in order():
        print_, stamp = (
            _print([*shared, script.read_text(encoding="utf-8")]),
            folder / f"{script.stem}.{FINISHED}",
        )
        if not stamp.is_file() or stamp.read_text() != print_:
            for old in folder.glob(f"{script.stem}*"):
                old.unlink()
            command = [sys.executable, __file__, str(script), str(folder)]
            environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"}
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
            if done.returncode:
                raise RuntimeError(f"{script.name} of the gallery failed:\n{done.stderr}")
            stamp.write_text(print_)
        yield script


def table() -> str:
    """A picture and the title of every script, with links to their pages."""
    cards = []
    for script in order():
        page, title = f"{script.stem}.md", split(script.read_text(encoding="utf-8"))[0]
        cards.append(
            f"<figure markdown>[![]({script.stem}-1.png)]({page})"
            f"<figcaption>[{title}]({page})</figcaption></figure>"
        )
    return "\n".join(['<div class="gallery" markdown>', *cards, "</div>"])


def _print(texts: list[str]) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


if __name__ == "__main__":
    run(Path(sys.argv[1]), Path(sys.argv[2]))
