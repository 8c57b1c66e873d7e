"""Kernels in files: a run that was killed goes on, and nothing is computed twice."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from flax import nnx

import natgrad_flax as ng
from ntk_analysis import analytic, kernel_store
from ntk_analysis.analytic import analytic_kernels
from ntk_analysis.kernel_store import content_hash, open_store

N, BLOCKS = 11, 6  # of 4 rows: 3 x 3 blocks, half of them computed


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(analytic, "_BLOCK", 4)


@pytest.fixture
def model():
    return ng.MLP((3, 2, 2, 1), rngs=nnx.Rngs(0))


@pytest.fixture
def x():
    return np.random.default_rng(0).normal(size=(N, 3))


class Killed(Exception):
    pass


def count_blocks(monkeypatch) -> list[int]:
    computed = []
    block = analytic.dense_block

    def counted(*args, **options):
        computed.append(1)
        return block(*args, **options)

    monkeypatch.setattr(analytic, "dense_block", counted)
    return computed


def stores(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def test_a_run_that_was_stopped_goes_on(model, x, tmp_path, monkeypatch):
    whole = analytic_kernels(model, x, store=tmp_path / "whole")

    def stop(done: int, total: int) -> None:
        assert total == BLOCKS
        if done == 3:
            raise Killed

    with pytest.raises(Killed):
        analytic_kernels(model, x, store=tmp_path / "cut", progress=stop)
    computed = count_blocks(monkeypatch)
    told = []
    found = analytic_kernels(model, x, store=tmp_path / "cut", progress=lambda *at: told.append(at))
    assert len(computed) == BLOCKS - 3
    assert told == [(4, BLOCKS), (5, BLOCKS), (6, BLOCKS)]
    assert len(stores(tmp_path / "cut")) == 1
    assert list(found.arrays) == list(whole.arrays)
    for name, kernel in whole.arrays.items():
        np.testing.assert_array_equal(found.arrays[name], kernel)

    again = analytic_kernels(model, x, store=tmp_path / "cut")
    assert len(computed) == BLOCKS - 3
    np.testing.assert_array_equal(again.ntk, whole.ntk)


SLOW_RUN = """
import sys, time
import numpy as np
from flax import nnx
import natgrad_flax as ng
from ntk_analysis import analytic

analytic._BLOCK = 4

def slowly(done, total):
    print(done, flush=True)
    if done == 2:
        time.sleep(100)

x = np.random.default_rng(0).normal(size=(11, 3))
model = ng.MLP((3, 2, 2, 1), rngs=nnx.Rngs(0))
analytic.analytic_kernels(model, x, store=sys.argv[1], progress=slowly)
"""


def test_a_run_that_was_killed_goes_on(model, x, tmp_path, monkeypatch):
    command = [sys.executable, "-c", SLOW_RUN, str(tmp_path / "cut")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert [process.stdout.readline().strip() for _ in range(2)] == ["1", "2"]
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait(60) == -signal.SIGKILL
    computed = count_blocks(monkeypatch)
    found = analytic_kernels(model, x, store=tmp_path / "cut")
    assert len(computed) == BLOCKS - 2
    whole = analytic_kernels(model, x, store=tmp_path / "whole")
    for name, kernel in whole.arrays.items():
        np.testing.assert_array_equal(found.arrays[name], kernel)


def test_a_damaged_block_is_computed_anew(model, x, tmp_path, monkeypatch):
    whole = analytic_kernels(model, x, store=tmp_path)
    (place,) = stores(tmp_path)
    damaged = np.load(place / "tangent.2.npy", mmap_mode="r+")
    damaged[9, 1] = np.nextafter(damaged[9, 1], 9)
    damaged.flush()
    computed = count_blocks(monkeypatch)
    with pytest.warns(UserWarning, match="1 of 6 finished blocks .* are computed anew") as caught:
        found = analytic_kernels(model, x, store=tmp_path)
    assert caught[0].filename == __file__
    assert len(computed) == 1
    for name, kernel in analytic_kernels(model, x).arrays.items():
        np.testing.assert_array_equal(found.arrays[name], kernel)
        np.testing.assert_array_equal(whole.arrays[name], kernel)


def test_store_and_memory_hold_the_same(model, x, tmp_path):
    here, there = analytic_kernels(model, x), analytic_kernels(model, x, store=tmp_path)
    assert list(here.arrays) == list(there.arrays)
    for name, kernel in here.arrays.items():
        assert not isinstance(kernel, np.memmap)
        assert isinstance(there.arrays[name], np.memmap)
        np.testing.assert_array_equal(there.arrays[name], kernel)
    with pytest.raises(ValueError, match="read-only"):
        there.ntk[0, 0] = 1
    # files alone, years later
    (place,) = stores(tmp_path)
    np.testing.assert_array_equal(np.load(place / "ntk.npy"), here.ntk)


def test_everything_that_decides_the_kernels_decides_the_folder(model, x, tmp_path, monkeypatch):
    def add(model=model, x1=x, x2=None, parts=("ntk",)) -> int:
        analytic_kernels(model, x1, x2, parts=parts, store=tmp_path)
        return len(stores(tmp_path))

    assert add() == 1
    assert add(model=ng.MLP((3, 8, 5, 1), rngs=nnx.Rngs(9))) == 1  # width and parameters do not
    assert add(x1=x + 1e-15) == 2
    assert add(x1=x[::-1]) == 3
    assert add(x2=x) == 4
    assert add(parts=("ntk", "nngp")) == 5
    assert add(model=ng.MLP((3, 2, 2, 1), bias_variance=0.1, rngs=nnx.Rngs(0))) == 6
    assert add(model=ng.MLP((3, 2, 2, 1), activation="erf", rngs=nnx.Rngs(0))) == 7
    assert add(model=ng.MLP((3, 2, 2, 2, 1), rngs=nnx.Rngs(0))) == 8
    versions = {**kernel_store._versions(), "jax": "0.0"}
    monkeypatch.setattr(kernel_store, "_versions", lambda: versions)
    assert add() == 9


def test_content_hash_sees_values_shape_and_order():
    a = np.arange(6.0)
    hashes = [
        content_hash(parts)
        for parts in (
            [a],
            [a.reshape(2, 3)],
            [a.astype(np.float32)],
            [a, None],
            [None, a],
            [{"a": 1}],
            [{"a": 2}],
        )
    ]
    assert len(set(hashes)) == len(hashes)
    assert content_hash([a]) == content_hash([np.arange(12.0)[::2] / 2])
    assert content_hash([{"a": 1, "b": 2}]) == content_hash([{"b": 2, "a": 1}])


def test_damaged_stores_are_refused(model, x, tmp_path):
    def run() -> None:
        analytic_kernels(model, x, parts=("ntk",), store=tmp_path)

    run()
    (place,) = stores(tmp_path)
    manifest = place / "kernels.json"
    for text, message in (
        ("{ not json", "is not a whole store of kernels .*remove it"),
        ("[]", "is not a whole store"),
        ("{}", "is not a whole store"),
        ('{"hash": "0"}', "holds other kernels; remove it"),
    ):
        manifest.write_text(text)
        with pytest.raises(ValueError, match=message):
            run()
    manifest.unlink()
    with pytest.raises(ValueError, match="is not a whole store"):
        run()
    shutil.rmtree(place)
    run()
    os.truncate(place / "ntk.npy", 200)
    with pytest.raises(ValueError, match="is not a whole store"):
        run()
    (place / "ntk.npy").unlink()
    with pytest.raises(ValueError, match=r"is not a whole store .*ntk\.npy"):
        run()
    shutil.rmtree(place)
    run()


def test_disk_without_room(model, x, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(ValueError, match=r"11 kernels of 11 x 11 need .* GiB .* the disk has"):
        analytic_kernels(model, x, store=tmp_path)
    assert not stores(tmp_path)
    # 968 bytes fit
    assert analytic_kernels(model, x, parts=("ntk",), store=tmp_path).ntk.shape == (N, N)


def test_a_faster_program_wins(tmp_path, monkeypatch):
    arguments = (tmp_path, ["a"], (2, 2), [1], 4)
    with open_store(*arguments) as target:
        target.write(0, 0, [np.eye(2)], mirror=False)
    (place,) = stores(tmp_path)
    # a second program that looked before the first had made the folder
    kernel_store._create(place, ["a"], (2, 2), (1, 1), {"hash": "other"})
    assert stores(tmp_path) == [place]
    with open_store(*arguments) as target:
        assert target.done[0, 0]
        np.testing.assert_array_equal(target.arrays()["a"], np.eye(2))


def test_writes_mirror_across_the_diagonal():
    with open_store(None, ["a", "b"], (3, 3), [], 2) as target:
        target.write(0, 2, [np.array([[1.0], [2]]), np.array([[3.0], [4]])], mirror=True)
        assert target.done[0, 1]
        assert not target.done[1, 1]
        assert target.arrays()["a"][2, :2].tolist() == [1, 2]
        assert target.arrays()["b"][:2, 2].tolist() == [3, 4]
