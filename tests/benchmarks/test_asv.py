"""Every suite is one that asv can run, and that a reader of its page can understand."""

import importlib
import inspect
import json
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import benchmarks
from benchmarks.common import Suite
from benchmarks.problems import SKIPS, TIMING_SKIPS, Case, skip_reason

ROOT = Path(benchmarks.__file__).parents[1]
BENCHMARK = re.compile(
    r"(time|timeraw|mem|peakmem|track)_.+|(Time|Timeraw|Mem|PeakMem|Track)[A-Z_]"
)
MODULES = [
    importlib.import_module(f"benchmarks.{info.name}")
    for info in pkgutil.iter_modules(benchmarks.__path__)
    if not info.ispkg
]


def suites() -> list[type]:
    """Classes with benchmarks, as asv finds them: by name, in the modules that define them."""
    return [
        value
        for module in MODULES
        for _, value in sorted(vars(module).items())
        if inspect.isclass(value)
        and not inspect.isabstract(value)
        and value.__module__ == module.__name__
        and any(BENCHMARK.match(name) for name in dir(value))
    ]


SUITES = suites()


def tracks(suite: type) -> list[Any]:
    return [getattr(suite, name) for name in dir(suite) if BENCHMARK.match(name)]


def test_the_suites_of_the_issue_are_there() -> None:
    modules = {suite.__module__.removeprefix("benchmarks.") for suite in SUITES}
    costs = {"step", "compile", "memory", "growth", "linear"}
    wanted = costs | {"kernels", "isotropy", "dynamics", "accuracy"}
    assert wanted <= modules
    names = [suite.__name__ for suite in SUITES]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("suite", SUITES, ids=lambda suite: suite.__name__)
def test_suite_says_what_a_change_means(suite: type) -> None:
    assert suite.__doc__
    assert suite.__doc__ != Suite.__doc__
    assert isinstance(suite.version, str)  # type: ignore[attr-defined]
    assert len(suite.params) == len(suite.param_names)  # type: ignore[attr-defined]
    assert all(isinstance(values, list) and values for values in suite.params)  # type: ignore[attr-defined]
    for track in tracks(suite):
        assert track.__doc__, track
        if track.__name__.startswith("track_"):
            assert track.unit != "unit"


@pytest.mark.parametrize("suite", SUITES, ids=lambda suite: suite.__name__)
def test_no_parameter_is_an_object_without_a_readable_name(suite: type) -> None:
    for values in suite.params:  # type: ignore[attr-defined]
        assert all(isinstance(value, (str, int, float)) for value in values)


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_no_helper_is_taken_for_a_benchmark(module: Any) -> None:
    functions = [name for name, value in vars(module).items() if inspect.isfunction(value)]
    assert not [name for name in functions if BENCHMARK.match(name)]
    # a class that is imported into another module would run twice
    assert not [
        name
        for name, value in vars(module).items()
        if value in SUITES and value.__module__ != module.__name__
    ]


def test_every_rule_has_a_reason_and_leaves_cases() -> None:
    for rule in TIMING_SKIPS:
        assert re.match(r"\w.{20,}", rule.reason)
    assert "softmax of one output" in str(skip_reason(Case(8, 3, 4, 1, "cross-entropy")))
    assert "nothing to sample" in str(skip_reason(Case(8, 3, 4, 1, "mse", "mc")))
    assert skip_reason(Case(8, 3, 4, 3)) is None
    assert skip_reason(Case(8, 3, 4, 1, "mse")) is None
    assert skip_reason(Case(8, 3, 4, 1, "mse"), TIMING_SKIPS)
    assert len(SKIPS) < len(TIMING_SKIPS)


def test_rules_count_in_their_profiles_only(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(8, 3, 4, 3, "mse")
    for name, left_out in (("fast", True), ("regular", False), ("large", False)):
        monkeypatch.setenv("NATGRAD_BENCH_PROFILE", name)
        assert (skip_reason(case) is not None) == left_out


PROFILES = ("smoke", "fast", "regular", "large")
# one process, because most of an import is JAX; every profile imports all suites anew
SCRIPT = """
import importlib, json, math, os, pkgutil, sys
from jax._src import xla_bridge

def load(name):
    return importlib.import_module(name)

def start(profile):
    os.environ["NATGRAD_BENCH_PROFILE"] = profile
    for name in [name for name in sys.modules if name.split(".")[0] == "benchmarks"]:
        del sys.modules[name]
    return load("benchmarks")

found = {}
for profile in sys.argv[1:]:
    cases = {}
    for info in pkgutil.iter_modules(start(profile).__path__):
        if info.ispkg:
            continue
        for name, value in vars(load(f"benchmarks.{info.name}")).items():
            if isinstance(value, type) and {"param_names", "params"} <= set(dir(value)):
                cases[name] = math.prod(map(len, value.params))
    found[profile] = {"cases": cases, "device": xla_bridge.backends_are_initialized()}
start("fats")
try:
    load("benchmarks.memory")
except BaseException as error:
    found["fats"] = str(error)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def imported() -> dict[str, Any]:
    """What a process that has not started JAX finds when it imports all suites."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *PROFILES],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("name", PROFILES)
def test_every_profile_imports_without_touching_a_device(
    imported: dict[str, Any], name: str
) -> None:
    """asv imports the suites in one process and forks: JAX must not have started its threads."""
    assert not imported[name]["device"]
    assert imported[name]["cases"]["Step"] >= 8
    if name == "smoke":
        assert imported[name]["cases"]["Step"] == 8
    else:
        assert imported[name]["cases"] != imported["smoke"]["cases"]


def test_unknown_profile_stops_the_import_of_a_suite(imported: dict[str, Any]) -> None:
    assert "did you mean 'fast'?" in imported["fats"]


def test_configuration_names_what_exists() -> None:
    text = (ROOT / "asv.conf.json").read_text(encoding="utf-8")
    settings = json.loads(re.sub(r"^\s*//.*$", "", text, flags=re.MULTILINE))
    assert settings["environment_type"] == "uv"
    assert settings["launch_method"] == "forkserver"
    assert set(settings["matrix"]["req"]) == {"uv", "jax"}
    assert (ROOT / settings["benchmark_dir"] / "__init__.py").is_file()
    assert settings["default_benchmark_timeout"] >= 600


def shell(*words: str, **further: Any) -> str:
    return subprocess.run(words, check=True, capture_output=True, text=True, **further).stdout


def test_make_bench_takes_the_last_commits_or_those_that_are_named(tmp_path: Path) -> None:
    git = ("git", "-c", "user.name=n", "-c", "user.email=e")
    shell("git", "init", "--quiet", cwd=tmp_path)
    for number in range(4):
        shell(*git, "commit", "--quiet", "--allow-empty", "-m", str(number), cwd=tmp_path)
    newest = shell("git", "rev-list", "HEAD", cwd=tmp_path).split()
    shell("git", "tag", "v1", newest[3], cwd=tmp_path)
    for name, told in (("python", "echo here"), ("asv", 'echo "$@" >&2; cat')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{told}\n")
        (tmp_path / name).chmod(0o755)

    own = ("COMMITS", "REVISIONS", "BENCH_ARGS", "MAKEFLAGS", "MAKELEVEL")
    environment = {name: value for name, value in os.environ.items() if name not in own}

    def measured(*settings: str) -> list[str]:
        # what stands in for asv prints the commits that it is given
        make = ("make", "-f", str(ROOT / "Makefile"), "-o", ".venv/.bench", "BIN=.", "bench")
        return shell(*make, *settings, cwd=tmp_path, env=environment).split()

    assert measured() == newest[:1]
    assert measured("COMMITS=3") == newest[:3]
    assert measured("REVISIONS=v1 HEAD HEAD~2") == [newest[3], newest[0], newest[2]]
    assert measured("REVISIONS=v1..HEAD~1") == newest[1:3]
    with pytest.raises(subprocess.CalledProcessError) as raised:
        measured("REVISIONS=v1 nosuch")
    assert "nosuch" in raised.value.stderr
    assert "HASHFILE" not in raised.value.stderr
