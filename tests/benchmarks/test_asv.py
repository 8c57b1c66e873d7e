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


SCRIPT = """
import importlib, jax, json, pkgutil, benchmarks
from jax._src import xla_bridge
found = {}
for info in pkgutil.iter_modules(benchmarks.__path__):
    if info.ispkg:
        continue
    module = importlib.import_module(f"benchmarks.{info.name}")
    for name, value in vars(module).items():
        if isinstance(value, type) and hasattr(value, "param_names") and hasattr(value, "params"):
            count = 1
            for values in value.params:
                count *= len(values)
            found[name] = count
print(json.dumps({"cases": found, "device": xla_bridge.backends_are_initialized()}))
"""


@pytest.mark.parametrize("name", ["smoke", "fast", "regular", "large"])
def test_every_profile_imports_without_touching_a_device(name: str) -> None:
    """asv imports the suites in one process and forks: JAX must not have started its threads."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=ROOT,
        env=os.environ | {"NATGRAD_BENCH_PROFILE": name},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert not found["device"]
    assert found["cases"]["Step"] >= 7
    if name == "smoke":
        assert found["cases"]["Step"] == 7


def test_unknown_profile_stops_the_import_of_a_suite() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import benchmarks.memory"],
        cwd=ROOT,
        env=os.environ | {"NATGRAD_BENCH_PROFILE": "fats"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "did you mean 'fast'?" in done.stderr


def test_configuration_names_what_exists() -> None:
    text = (ROOT / "asv.conf.json").read_text(encoding="utf-8")
    settings = json.loads(re.sub(r"^\s*//.*$", "", text, flags=re.MULTILINE))
    assert settings["environment_type"] == "uv"
    assert settings["launch_method"] == "forkserver"
    assert set(settings["matrix"]["req"]) == {"uv", "jax"}
    assert (ROOT / settings["benchmark_dir"] / "__init__.py").is_file()
    assert settings["default_benchmark_timeout"] >= 600
