"""What a leaderboard writes: foreign names stay text, and files are whole or as they were."""

import os
import resource
import stat
from functools import partial
from pathlib import Path

import pytest
from boards import command, copied, put, record
from fault_harness import Exits, Right, over

from benchmarks.leaderboard import RULES, cluster, readme, texts
from benchmarks.leaderboard.store import Store
from benchmarks.leaderboard.versions import counts

EVIL = {
    "closing markup": "[/x]",
    "markup": "[red]red[/red]",
    "a link on the terminal": "[link=https://example.org]here[/link]",
    "a script": "<script>alert(1)</script>",
    "an image": '<img src=x onerror="alert(1)">',
    "an end of the section": f"{readme.END} # gone",
    "a Markdown link": "[here](javascript:alert(1))",
    "a Markdown image": "![x](https://example.org/x.png)",
    "cells": "a | b\n| c",
    "emphasis": "*a* _b_ ~c~ `d` \\",
    "steering the terminal": "\x1b[2J\x1b]8;;https://example.org\x07x",
    "turning the text": "\u202egnp.exe",
}


def shown(name):
    """Terminal, page and README with an evil name in every place; the README's text."""
    with copied() as folder:
        entry = record("sgd", title=name, structure=name)
        entry["config"] |= {"contestant": name, "workload": name}
        entry["config"]["environment"] |= {"processor": name, "jax": name}
        put(folder, entry)
        row = next(
            r for r in Store.open(folder, RULES).records()
            if counts(r) and r["config"]["contestant"] == "exact"
        )  # fmt: skip
        said = ("--reason", name, "--submitter", name)
        code, text = command("refute", row["key"], *said, "--out", folder)
        assert (code, "Traceback" in text) == (0, False), text
        code, text = command("score", "--out", folder)
        assert (code, "Traceback" in text, "\x1b[2J" in text) == (0, False, False), text
        path = folder / "README.md"
        path.write_text(f"# Title\n{readme.BEGIN}\n{readme.END}\nEnd.\n")
        code, text = command("page", "--out", folder, "--readme", path)
        assert (code, "Traceback" in text) == (0, False), text
        page = (folder / "leaderboard.html").read_text(encoding="utf-8")
        assert "<script>alert" not in page
        assert "<img src=x" not in page
        return path.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", EVIL.values(), ids=EVIL)
def test_names_stay_text(name):
    found = shown(name)
    assert found.startswith(f"# Title\n{readme.BEGIN}\n")
    assert found.endswith(f"\n{readme.END}\nEnd.\n")
    assert found.count(readme.END) == 1
    body = found.split(readme.BEGIN)[1].split(readme.END)[0]
    for raw in ("<script", "<img", "[here](", "![x](", "*a*", "`d`", "\x1b", "\u202e", "a | b"):
        assert raw not in body, body
    assert texts.markdown(name) in body


MARKDOWN = {
    "<b>&amp;": "&lt;b&gt;&amp;amp;",
    "a|b": "a\\|b",
    "[x](y)": "\\[x\\](y)",
    "_a_ *b* `c` ~d~ #e": "\\_a\\_ \\*b\\* \\`c\\` \\~d\\~ \\#e",
    "\\|": "\\\\\\|",
    "a\r\nb\tc": "a  b c",
    "Intel(R) Xeon(R), 2 cores; =": "Intel(R) Xeon(R), 2 cores; =",
    "K-FAC – naïve": "K-FAC – naïve",
}


@pytest.mark.parametrize(("raw", "written"), MARKDOWN.items())
def test_markdown(raw, written):
    assert texts.markdown(raw) == written


MARKERS = f"{readme.BEGIN}\r\nold\r\n{readme.END}\r\nEnd.\r\n".encode()


def kept():
    """Mode, link, line ends and the rest of a README, and nothing left beside it."""
    with copied() as folder:
        real, path = folder / "text.md", folder / "README.md"
        real.write_bytes(MARKERS)
        real.chmod(0o640)
        path.symlink_to(real)
        assert command("page", "--out", folder, "--readme", path)[0] == 0
        content = real.read_bytes()
        assert path.is_symlink()
        assert stat.S_IMODE(real.stat().st_mode) == 0o640
        assert not [p for p in folder.iterdir() if p.name.startswith(".")]
        assert content.endswith(b"\r\n" + readme.END.encode() + b"\r\nEnd.\r\n")
        assert content.count(b"\n") == content.count(b"\r\n") > 5


def full_disk():
    """A limit on the size of files stands in for the disk: the README keeps its end."""
    with copied() as folder:
        path = folder / "README.md"
        before = b"x" * 5000 + MARKERS
        path.write_bytes(before)
        assert command("page", "--out", folder)[0] == 0
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
            answer = command("page", "--out", folder, "--readme", path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert path.read_bytes() == before
        assert (folder / "leaderboard.html").read_text(encoding="utf-8").endswith("</html>")
        return answer


def mode_of_page(umask):
    with copied() as folder:
        before = os.umask(umask)
        try:
            assert command("page", "--out", folder)[0] == 0
        finally:
            os.umask(before)
        return stat.S_IMODE((folder / "leaderboard.html").stat().st_mode) & 0o644


@over({"a README on a full disk": (full_disk, Exits(2, "File too large"))})
def test_what_cannot_be_written_stays(run, answer):
    answer.check(run)


@over(
    {
        f"umask {umask:03o}": (partial(mode_of_page, umask), Right(0o644 & ~umask, 0.0))
        for umask in (0o022, 0o077, 0o027)
    }
)
def test_the_mode_of_a_new_page_follows_the_umask(run, answer):
    answer.check(run)


def test_a_readme_keeps_what_is_not_the_board():
    kept()


ADDRESSES = {
    **dict.fromkeys(
        ("local", "tcp://127.0.0.1:8786", "127.0.0.1:8786", "localhost:8786", "tcp://[::1]:8786",
         "tls://10.0.0.5:8786", "wss://cluster:8786"),
        "",
    ),
    **dict.fromkeys(
        ("tcp://10.0.0.5:8786", "cluster:8786", "0.0.0.0:8786", "ws://cluster:1", ""),
        "runs any code there",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("address", "says"), ADDRESSES.items())
def test_who_may_run_code_on_a_cluster(address, says):
    found = cluster.exposure(address)
    assert bool(found) == bool(says)
    assert says in found


def test_the_commands_for_a_cluster_name_the_loopback():
    text = (Path(cluster.__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    for line in (cluster.SCHEDULER, cluster.WORKER.replace("ADDRESS", "tcp://127.0.0.1:8786")):
        assert line in text
        assert line.count("127.0.0.1") >= 2
