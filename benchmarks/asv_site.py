"""asv's page of its results, as a folder that a browser opens without a network.

What ``asv publish`` writes takes jQuery, flot and Bootstrap from public servers, and its data by
requests that a browser refuses for files. Here the scripts come from packages, and the data lie
beside them in a script.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

PACKAGED = {
    "xstatic-jquery": ("data/jquery.min.js",),
    "js.jquery-flot": tuple(
        f"resources/jquery.flot{part}.min.js" for part in ("", ".time", ".selection", ".categories")
    ),
    "sphinx-bootstrap-theme": tuple(
        f"bootstrap-3.4.1/{name}" for name in ("js/bootstrap.min.js", "css/bootstrap.min.css")
    ),
}
"""Files of distributions that the page loads, in order."""

ROOT = Path(__file__).resolve().parents[1]
OWN = Path(__file__).with_suffix(".js")
FOLDER = "packages"
DATA = "data.js"

_FOREIGN = re.compile(
    r'[ \t]*<(?:script src|link rel="stylesheet" href)="https?://[^>]*>(?:</script>)?\n'
)


def write(results: Path, out: Path, root: Path = ROOT) -> Path:
    """Writes the page.

    Args:
      results: a folder of results of asv with its ``benchmarks.json``.
      out: the folder of the page; what it holds goes.
      root: the checkout with the commits and an ``asv.conf.json``.

    Returns:
      The page.

    Raises:
      ValueError: there are no results of commits that are here, or a package is not installed.
    """
    if not (results / "benchmarks.json").is_file():
        raise ValueError(f"{results} holds no results of asv; `make bench-keep` puts them there")
    packaged = dict(_packaged())
    from asv.commands.publish import Publish  # type: ignore[import-untyped]
    from asv.config import Config  # type: ignore[import-untyped]

    settings = Config.load(str(root / "asv.conf.json"))
    settings.repo, settings.results_dir, settings.html_dir = map(str, (root, results, out))
    Publish.run(settings, pull=False)
    if not (out / "graphs").is_dir():
        raise ValueError(f"no results in {results} are of a commit on {settings.branches}")
    (out / FOLDER).mkdir()
    for name, content in {**packaged, OWN.name: OWN.read_bytes()}.items():
        (out / FOLDER / name).write_bytes(content)
    _pack_data(out)
    page = out / "index.html"
    names = [DATA, *(f"{FOLDER}/{name}" for name in (*packaged, OWN.name))]
    page.write_text(_local(page.read_text(encoding="utf-8"), names), encoding="utf-8")
    return page


def _pack_data(out: Path) -> None:
    """Puts all files of JSON into one script."""
    data = {}
    for path in sorted(out.rglob("*.json")):
        data[path.relative_to(out).as_posix()] = json.loads(path.read_bytes())
        path.unlink()
    shutil.rmtree(out / "graphs")
    text = f"window.asvFiles = {json.dumps(data, separators=(',', ':'))};\n"
    (out / DATA).write_text(text, encoding="utf-8")


def _local(html: str, names: Sequence[str]) -> str:
    """A page with scripts and styles of its folder in the place of those of public servers."""
    style, script = '<link rel="stylesheet" href="{}">\n', '<script src="{}"></script>\n'
    tags = [(style if name.endswith(".css") else script).format(name) for name in names]
    before, *rest = _FOREIGN.split(html)
    return "".join([before, *tags, *rest])


def _packaged() -> Iterator[tuple[str, bytes]]:
    """Names and contents of the scripts and styles that are in packages."""
    for distribution, ends in PACKAGED.items():
        try:
            there = files(distribution) or []
        except PackageNotFoundError:
            there = []
        for end in ends:
            found = [file for file in there if file.as_posix().endswith(f"/{end}")]
            if not found:
                raise ValueError(
                    f"{end} of the package {distribution} is missing: pip install 'natgrad[bench]'"
                )
            yield found[0].name, found[0].read_binary()


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes the page and prints where it is."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.asv_site", description=__doc__)
    parser.add_argument("--results", type=Path, default=Path("results/asv"))
    parser.add_argument("--out", type=Path, default=Path(".asv/html"))
    given = parser.parse_args(arguments)
    try:
        print(f"wrote {write(given.results.absolute(), given.out.absolute())}")
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
