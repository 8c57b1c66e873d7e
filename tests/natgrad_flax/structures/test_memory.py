"""Estimates of memory against measured peaks, a process a case."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from memory_run import CASES

SCRIPT = Path(__file__).parents[2] / "helpers" / "memory_run.py"


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_estimates_are_within_a_quarter_of_measured_peaks(name):
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", SCRIPT, name],
        capture_output=True, text=True, env=environment, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["peak"] > 2**28
    assert 0.75 < found["estimate"] / found["peak"] < 1.25, found
