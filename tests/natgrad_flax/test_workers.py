"""Workers end with their context; that they do with a killed parent, ``tests/benchmarks`` shows."""

import multiprocessing
import os
import time
from concurrent.futures.process import BrokenProcessPool

import pytest

from natgrad_flax.processes import workers


def test_workers_end_with_the_context_in_the_midst_of_their_work():
    others = multiprocessing.active_children()
    with workers() as new_pool:
        pool = new_pool(1)
        assert pool.submit(os.getpid).result() != os.getpid()
        asleep = pool.submit(time.sleep, 60)
        # until then the end of a pool would cancel it
        while not asleep.running():
            time.sleep(0.01)
    with pytest.raises(BrokenProcessPool):
        asleep.result(timeout=0)
    assert multiprocessing.active_children() == others
