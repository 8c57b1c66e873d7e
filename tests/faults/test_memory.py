"""Memory: what the machine and its limits leave, and what cannot fit."""

from __future__ import annotations

import resource

import numpy as np
import pytest
from fault_harness import Refused, over
from flax import nnx

import natgrad_flax as ng
import ntk_analysis as na
from natgrad_flax.arguments import memory
from ntk_analysis.networks import build_network

MODEL = ng.MLP((5, 6, 6, 2), activation="tanh", bias_variance=0.1, rngs=nnx.Rngs(0))


def machine(folder, available=8000, statm=100):
    """Files of a kernel, below a folder."""
    for name, text in {
        "proc/meminfo": f"MemTotal: 9999999 kB\nMemAvailable:   {available} kB\n",
        "proc/self/statm": f"{statm} 0 0 0 0 0 0\n",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def group(folder, names, values, stat=""):
    folder.mkdir(parents=True)
    for name, value in zip(names, values, strict=True):
        (folder / name).write_text(f"{value}\n")
    (folder / "memory.stat").write_text(stat)


V2 = ("memory.max", "memory.current")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes")


def test_memory_that_the_kernel_has(tmp_path):
    assert memory.host_memory(machine(tmp_path)) == 8000 * 1024
    # nothing that says how much: the machine
    assert memory.host_memory(tmp_path / "empty") > 2**20


@pytest.mark.parametrize("inside", ["", "a/b"])
def test_limits_of_a_container(tmp_path, inside):
    root = machine(tmp_path)
    (root / "proc/self/cgroup").write_text("0::/a/b\n")
    base = root / "sys/fs/cgroup"
    group(base / inside, V2, (5_000_000, 2_000_000), "anon 5\ninactive_file 300000\n")
    assert memory.host_memory(root) == 3_300_000


def test_the_tightest_of_nested_groups_counts(tmp_path):
    root = machine(tmp_path)
    (root / "proc/self/cgroup").write_text("0::/a/b\n")
    base = root / "sys/fs/cgroup"
    group(base / "a", V2, (4_000_000, 1_000_000))
    group(base / "a/b", V2, ("max", 500_000))
    assert memory.host_memory(root) == 3_000_000


def test_limits_of_the_first_version_of_cgroups(tmp_path):
    root = machine(tmp_path)
    (root / "proc/self/cgroup").write_text("5:cpu,cpuacct:/d\n4:memory:/d\n")
    base = root / "sys/fs/cgroup/memory"
    group(base / "d", V1, (6_000_000, 5_000_000), "total_inactive_file 1000\n")
    assert memory.host_memory(root) == 1_001_000


def test_the_limit_of_the_process_counts(tmp_path, monkeypatch):
    root = machine(tmp_path, statm=1000)
    page = resource.getpagesize()
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1000 * page + 77, -1))
    assert memory.host_memory(root) == 77
    monkeypatch.setattr(resource, "getrlimit", lambda _: (5, -1))
    assert memory.host_memory(root) == 0


def with_little(call):
    """A call on a machine with 1 MiB left."""
    before = memory.available_memory
    memory.available_memory = lambda: 2**20
    try:
        return call()
    finally:
        memory.available_memory = before


BIG = {"x": np.zeros((3000, 5)), "y": np.zeros((3000, 2))}
SIZES = {
    "a network too wide": (
        lambda: build_network("mlp", (784,), (99_999_999, 99_999_999), 1, seed=0),
        Refused(r"hidden widths 99999999, 99999999 has 10,000,.* parameters, which need .* GiB"),
    ),
    "a network wider than integers": (
        lambda: build_network("mlp", (784,), (10**12, 10**12), 1, seed=0),
        Refused("choose smaller widths"),
    ),
    "a ConvNet too wide": (
        lambda: build_network("conv-average", (8, 8, 1), (10**7, 10**7), 2, seed=0),
        Refused("hidden widths 10000000, 10000000 has .* choose smaller widths"),
    ),
    "a coefficient matrix": (
        lambda: with_little(lambda: na.coefficient_matrix(ng.Exact(), MODEL, BIG["x"])),
        Refused("is 6000 x 6000: .* GiB"),
    ),
    "signals": (
        lambda: with_little(lambda: na.isotropy(ng.Exact(), MODEL, np.zeros((200_000, 5)))),
        Refused("inputs and derivatives of layers need .* GiB"),
    ),
    "a step": (
        lambda: with_little(
            lambda: ng.natural_gradient(
                MODEL, **BIG, structure=ng.Exact("sample"), loss=ng.MeanSquaredError(), damping=0.1
            )
        ),
        Refused("the system that Exact solves is 6000 x 6000: .* GiB"),
    ),
}


@over(SIZES)
def test_what_cannot_fit(run, answer):
    answer.check(run)
