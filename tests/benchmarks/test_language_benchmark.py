"""The benchmark of a language model at a size of seconds."""

import jax.numpy as jnp
import pytest

from benchmarks.language import TINY, Run, measure, table


def test_a_round_of_each():
    found = measure(TINY, ["K-FAC"], 1)
    assert list(found) == ["SGD", "K-FAC"]
    assert found["SGD"]["ratio"] == found["SGD"]["memory"] == 1
    # factors and inverses are held beside parameters
    assert found["K-FAC"]["memory"] > 1
    assert found["K-FAC"]["seconds"] > 0
    assert table(found).row_count == 2


def test_what_is_not_finite_is_not_timed():
    run = Run(TINY, "SGD")
    run._carry[0]["readout"]["kernel"][...] = jnp.full((8, 11), jnp.nan)
    with pytest.raises(FloatingPointError, match="not finite"):
        run.check()
