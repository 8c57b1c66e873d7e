"""The harness itself: it must see each kind of bad answer."""

import jax.numpy as jnp
import numpy as np
import pytest
from fault_harness import Exits, Refused, Right, Warned

import natgrad_flax as ng


def refuse():
    ng.MLP((0,), rngs=None)


def from_inside():
    jnp.zeros(2) @ jnp.zeros(3)


BAD_ANSWERS = {
    "no error": (Refused("sizes"), lambda: 1),
    "an error from inside": (Refused("dot_general"), from_inside),
    "an error that names another thing": (Refused("targets"), refuse),
    "NaN": (Right(), lambda: {"a": jnp.nan}),
    "nothing": (Right(), lambda: {}),
    "a wrong value": (Right(np.ones(2), 1e-3), lambda: np.asarray([1, 1.01])),
    "another shape": (Right(np.ones(2)), lambda: np.ones((2, 1))),
    "a dropped imaginary part": (Right(np.ones(2) + 1j), lambda: np.ones(2)),
    "no warning": (Warned("rank"), lambda: 1.0),
    "a traceback": (Exits(2, ""), lambda: (2, "Traceback (most recent call last)")),
    "another exit code": (Exits(2, ""), lambda: (1, "sorry")),
}


@pytest.mark.parametrize("case", BAD_ANSWERS)
def test_a_bad_answer_is_seen(case):
    answer, run = BAD_ANSWERS[case]
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        answer.check(run)


def test_good_answers_pass():
    Refused("widths").check(refuse)
    Right(np.ones(2)).check(lambda: jnp.ones(2))
    Exits(2, "no such file").check(lambda: (2, "error: no such\n file"))
