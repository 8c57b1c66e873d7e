"""Two processes over loopback: one is killed, the other says so, and a new pair goes on."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
from device_run import train

TIMEOUT = 10
"""Seconds without a heartbeat, to which the documentation of ``connect`` adds 5."""


def start(processes, port, folder, *extra):
    script = Path(__file__).parents[2] / "helpers" / "device_run.py"
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0",
    }
    return [
        subprocess.Popen(
            [
                *(sys.executable, str(script), "--folder", str(folder), "--steps", "4"),
                *("--port", str(port), "--timeout", str(TIMEOUT)),
                *("--processes", str(processes), "--process", str(number), *extra),
            ],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(processes)
    ]


def finish(runs):
    """Exit codes, outputs and errors; no process outlives the test."""
    try:
        found = [run.communicate(timeout=240) for run in runs]
    finally:
        for run in runs:
            run.kill()
    return [(run.returncode, *texts) for run, texts in zip(runs, found, strict=True)]


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def steps(output):
    return [int(number) for number in re.findall(r"^step (\d+)$", output, re.MULTILINE)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    whole, broken = (tmp_path_factory.mktemp("runs") / name for name in ("whole", "broken"))
    return whole, broken


def test_a_killed_process_is_an_error_and_the_run_goes_on(folders):
    whole, broken = folders
    # two processes with two devices each, beside the one device of this process, undisturbed
    pair = start(2, free_port(), broken, "--kill-after", "2")
    pair[1].wait(timeout=240)
    killed = time.monotonic()
    pair[0].wait(timeout=240)
    seconds = time.monotonic() - killed
    (first, output, errors), (second, *_) = finish(pair)
    assert second == -signal.SIGKILL
    assert seconds < TIMEOUT + 5
    # its own error, or JAX's where the heartbeats were faster
    assert first in (3, -signal.SIGABRT), errors[-3000:]
    assert first != 3 or "lost another one, which ended or cannot be reached" in errors
    assert steps(output) == [1, 2]
    # the newest checkpoint is damaged, too: both go on from the one before it
    (broken / "2" / "description" / "metadata").write_text("{}")
    again = finish(start(2, free_port(), broken))
    assert [code for code, *_ in again] == [0, 0], again[0][2][-3000:]
    assert steps(again[0][1]) == [2, 3, 4]
    assert all("the run goes on from step 1" in errors for *_, errors in again)
    assert (broken / "2.damaged-1").is_dir()
    train(Namespace(folder=whole, steps=4, processes=1, process=0, kill_after=None))
    found, wanted = (np.load(folder / "parameters.npy") for folder in (broken, whole))
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
    assert np.ptp(wanted) > 0.1
