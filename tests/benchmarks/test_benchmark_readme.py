"""What benchmarks/README.md says is so: its example runs, its suites exist with their figures."""

import re
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

README = (Path(__file__).parents[2] / "benchmarks" / "README.md").read_text(encoding="utf-8")


def test_the_example_measures_and_checks(tmp_path, monkeypatch):
    source = re.search(r"<!-- example -->\n```python\n(.*?)```", README, re.DOTALL)[1]
    names: dict = {}
    exec(source, names)
    kind = names["LayerKernels"]
    for case in kind.cases():
        suite = kind()
        suite.setup(str(tmp_path), *case)
        assert suite.track_seconds(str(tmp_path), *case) > 0
    assert suite.track_seconds.unit == "seconds"
    honest = names["empirical_layer_kernels"]

    def skew(model, x):
        first, last = honest(model, x)
        return np.triu(first), last

    names["empirical_layer_kernels"] = skew
    with pytest.raises(ArithmeticError, match="K_1 and its transpose differ"):
        kind().measure(20)


def test_suites_of_the_table_exist_and_have_the_figures_that_it_names():
    rows = re.findall(r"^\| (?:`(\w+)\.(\w+)`)? ?\| (.*?) \|", README, re.MULTILINE)
    suite, found = None, set()
    for module, name, text in rows:
        if module:
            suite = getattr(import_module(f"benchmarks.{module}"), name)
            found.add(suite)
        elif suite is None:
            continue
        for figure in re.findall(r"`(\w+)`", text):
            assert hasattr(suite, f"track_{figure}") or hasattr(suite, figure), (suite, figure)
    assert len(found) == 18
