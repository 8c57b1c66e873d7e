"""Analytic kernels on two processes of four forced host devices each, beside one device here."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from block_devices_run import DEVICES, SAMPLES, convolutional, dense, images, inputs

from ntk_analysis.analytic import analytic_kernels
from ntk_analysis.block_devices import compute_blocks

ROWS = SAMPLES // 2
BLOCKS = ROWS * (ROWS + 1) // 2
"""Of 2 samples, on the diagonal and above."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What both processes left."""
    place = tmp_path_factory.mktemp("kernels")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0",
    }
    script = Path(__file__).parents[1] / "helpers" / "block_devices_run.py"
    runs = [
        subprocess.Popen(
            [sys.executable, str(script), str(place), str(port), str(process)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]
    try:
        errors = [run.communicate(timeout=300)[1] for run in runs]
    finally:
        for run in runs:
            run.kill()
    assert [run.returncode for run in runs] == [0, 0], "\n".join(error[-2000:] for error in errors)
    return place


@pytest.fixture(scope="module")
def counts(folder):
    """Blocks by device, and messages, of each process."""
    return [json.loads((folder / f"found-{p}.json").read_text("utf-8")) for p in range(2)]


def test_several_devices_and_processes_find_what_one_device_finds(folder):
    wanted = dict.fromkeys(("automatic", "local", "together", "resumed"), (dense(), inputs()))
    wanted["cross"] = (dense(), inputs()[:3] + 1, inputs())
    wanted["conv"] = (convolutional(), images())
    for name, arguments in wanted.items():
        one = analytic_kernels(*arguments, parts=("tangent", "ntk"))
        for process in range(2):
            with np.load(folder / f"{name}-{process}.npz") as found:
                assert list(found) == list(one.arrays)
                for kernel in found:
                    np.testing.assert_allclose(found[kernel], one.arrays[kernel], rtol=1e-12)


def test_every_device_has_its_share_of_the_blocks_and_no_block_is_computed_twice(counts):
    for found in counts:
        # 36 blocks are enough work for two devices
        assert sorted(found["automatic"].values()) == [BLOCKS // 2] * 2
        assert sorted(found["local"].values()) == [BLOCKS // DEVICES] * DEVICES
        assert sorted(found["cross"].values()) == [2 * ROWS // DEVICES] * DEVICES
        # of single images, 15 of 25 pairs
        assert sorted(found["conv"].values()) == [7, 8]
    # what a device has computed lies on it alone
    assert not set(counts[0]["local"]) & set(counts[1]["local"])
    assert all(device.isdecimal() for found in counts for device in found["local"])
    together = counts[0]["together"] | counts[1]["together"]
    assert len(together) == 2 * DEVICES
    assert sum(together.values()) == BLOCKS
    assert max(together.values()) - min(together.values()) == 1


def test_processes_that_were_stopped_go_on_together(counts):
    for found in counts:
        assert found["told"] == [[done, BLOCKS] for done in range(21, BLOCKS + 1)]
    assert sum(sum(found["resumed"].values()) for found in counts) == BLOCKS - 20


def test_processes_that_do_not_call_the_same_are_refused(counts):
    for process, found in enumerate(counts):
        assert "the processes gave different models, inputs" in found["different"]
        assert found["others"].startswith("devices must all be of this process, or some of every")
        assert found["others"].endswith(f"in process {process} of 2")


def test_blocks_come_in_order_and_what_is_not_started_is_cancelled():
    computed = []

    def compute(block, device):
        computed.append(block)
        return [np.zeros((1, 1))]

    blocks = [(0, j) for j in range(40)]
    results = compute_blocks(compute, blocks, (None,), (1, 1, 1))
    assert [next(results)[0], next(results)[0]] == blocks[:2]
    results.close()
    assert len(computed) < 10
    assert sorted(computed) == blocks[: len(computed)]


@pytest.mark.parametrize(
    ("devices", "error", "words"),
    [
        ("cpu", TypeError, "devices must be JAX devices, such as jax.local_devices"),
        (["cpu"], TypeError, "devices must be JAX devices"),
        (4, TypeError, "devices must be JAX devices"),
        ([], ValueError, "devices must be one or more different ones"),
        (2 * jax.devices(), ValueError, "devices must be one or more different ones"),
    ],
)
def test_bad_devices(devices, error, words):
    with pytest.raises(error, match=words):
        analytic_kernels(dense(), inputs(), devices=devices)
