"""Every kind of layer on eight forced host devices, and what each device does of the work.

Apart from ``test_devices.py``, so that two processes share the compilation, and since the newest
JAX needs one of them: what a release can break shows in the steps there.
"""

import pytest
from own_process import on_eight_devices


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    """What ``device_checks.py`` found on eight devices."""
    return on_eight_devices(tmp_path_factory.mktemp("devices"), "solves", "flops", "chains")


def test_every_kind_of_layer_is_solved_as_by_one_device(eight):
    assert len(eight["solves"]) == 17
    assert max(eight["solves"].values()) < 1e-9, eight["solves"]


def test_a_device_does_its_share_of_the_work_and_no_more(eight):
    flops = {name: found["flops"] for name, found in eight["flops"].items()}
    assert len(flops) == 6
    # of small arrays, the elementwise work of all devices counts, too
    assert max(flops.pop("K-FAC"), flops.pop("EKFAC")) < 1.25
    # less than 1, too: of a Gram matrix the ring computes one half
    assert max(flops.values()) < 1.1, flops
    memory = {name: found["memory"] for name, found in eight["flops"].items()}
    assert memory["exact"] < 0.25, "rows of the Gram matrix must stay sharded"
    assert "collective-permute" in eight["flops"]["exact"]["collectives"]
    assert "all-reduce" in eight["flops"]["diagonal"]["collectives"]


def test_cubic_operations_that_need_each_other_are_dealt_out_one_after_the_other(eight):
    assert eight["chains"]["flops"] < 1.25
    assert eight["chains"]["error"] < 1e-6
