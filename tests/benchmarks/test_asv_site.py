"""asv's page of two commits: whole in its folder, and opened from there by a browser."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import asv_site

CHECKOUT = Path(asv_site.__file__).parents[1]
SUITE = "toy.Toy.track_seconds"
MACHINE = {"machine": "cpu-toy", "os": "Linux", "arch": "x", "cpu": "A <b>", "num_cpu": "2"}
BUILD = "import sys; from pathlib import Path; from benchmarks import asv_site; \
asv_site.write(*map(Path, sys.argv[1:]))"


def git(root, *arguments):
    names = ("-c", "user.name=x", "-c", "user.email=x@x")
    command = ["git", "-C", str(root), *names, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def write_json(path, **document):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document))


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    root = tmp_path_factory.mktemp("repository")
    results = root / "results"
    git(root, "init", "-q", "-b", "main")
    write_json(root / "asv.conf.json", version=1, project="toy", repo=".", branches=["main"])
    suite = {"name": SUITE, "code": "", "type": "track", "unit": "seconds", "version": "1"}
    suite |= {"param_names": ["structure"], "params": [["'exact'", "'kfac'"]], "timeout": 60}
    write_json(results / "benchmarks.json", version=2, **{SUITE: suite})
    write_json(results / "cpu-toy" / "machine.json", version=1, **MACHINE)
    for number, values in enumerate(([2.0, 3.0], [1.0, 4.0])):
        git(root, "commit", "-q", "--allow-empty", "-m", str(number))
        commit = git(root, "rev-parse", "HEAD")
        write_json(
            results / "cpu-toy" / f"{commit[:8]}-env.json",
            version=2, commit_hash=commit, env_name="env", date=1000 * number, params=MACHINE,
            python="3.11", requirements={}, env_vars={}, durations={},
            result_columns=["result", "params", "version"],
            results={SUITE: [values, suite["params"], "1"]},
        )  # fmt: skip
    command = [sys.executable, "-c", BUILD, *map(str, (results, root / "html", root))]
    subprocess.run(command, cwd=CHECKOUT, check=True)
    return root / "html" / "index.html"


def test_all_that_the_page_loads_lies_in_its_folder(page):
    loaded = re.findall(r'<(?:script|link|img)[^>]* (?:src|href)="([^"]+)"', page.read_text())
    assert len(loaded) > 15
    missing = [name for name in loaded if not (page.parent / name).is_file()]
    assert missing == []


def test_a_browser_shows_it_from_disk(page, browser):
    context = browser.new_context(viewport={"width": 1280, "height": 800}, offline=True)
    tab, problems = context.new_page(), []
    tab.on("console", lambda message: problems.append(message.text))
    tab.on("pageerror", lambda error: problems.append(str(error)))
    tab.on("request", lambda r: r.url.startswith(("file:", "data:")) or problems.append(r.url))
    tab.goto(page.as_uri() + "#summarylist?sort=1&dir=desc")
    rows = tab.locator("#summarylist-body tbody tr")
    rows.nth(1).wait_for()
    assert ["kfac" in row for row in rows.all_inner_texts()] == [True, False]
    tab.locator("#summarylist-body thead th").nth(1).click()
    assert ["kfac" in row for row in rows.all_inner_texts()] == [False, True]
    tab.goto(page.as_uri() + f"#{SUITE}?x-axis=structure")
    tab.locator("canvas.flot-base").wait_for()
    assert "exact" in tab.locator("#graph-display").inner_text()
    for group in ("toy", "Toy"):  # of the tree at the side
        tab.locator("#graphdisplay-navigation").get_by_text(group, exact=True).click()
    tab.locator("a", has_text="track_seconds").last.wait_for()
    assert set(tab.locator("label b").all_text_contents()) == {""}
    assert problems == []
    context.close()


def test_results_that_are_not_there_or_of_other_commits(page, tmp_path):
    root = page.parents[1]
    git(root, "checkout", "-q", "--orphan", "other")
    git(root, "branch", "-q", "-D", "main")
    git(root, "commit", "-q", "--allow-empty", "-m", "x")
    git(root, "branch", "-q", "-m", "main")
    command = [sys.executable, "-c", BUILD, *map(str, (root / "results", tmp_path / "a", root))]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert "are of a commit on ['main']" in done.stderr
    with pytest.raises(ValueError, match="holds no results of asv; `make bench-keep`"):
        asv_site.write(tmp_path, tmp_path / "out")
