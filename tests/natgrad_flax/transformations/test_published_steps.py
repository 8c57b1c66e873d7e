"""Shampoo and SOAP against sixty steps of another library's."""

import jax
import numpy as np
import pytest
from published_steps import STEPS, gradients, read, start

import natgrad_flax as ng

# SOAP: the other adds epsilon to an average that is not corrected for its start, which is 1e-9 over
# entries down to 1e-4, and decomposes in float32
CASES = {
    "shampoo": (ng.shampoo(0.5, epsilon=1e-4, vectors="full", merge_dims=False), 1e-12),
    "soap": (ng.soap(0.05, b1=0.9, b2=0.8, eps=1e-9, basis_every=5, merge_dims=False), 2e-5),
}


@pytest.mark.parametrize("name", CASES)
def test_the_steps_of_another_library(x64, name) -> None:
    tx, tolerance = CASES[name]
    params, update = start(), jax.jit(tx.update)
    state, found = tx.init(params), []
    for number in range(1, STEPS + 1):
        updates, state = update(gradients(params), state)
        params = {key: params[key] + np.asarray(updates[key]) for key in params}
        if number % 10 == 0:
            found.append(params)
    for ours, theirs in zip(found, read()[name], strict=True):
        for key, tensor in ours.items():
            np.testing.assert_allclose(tensor, theirs[key], rtol=0, atol=tolerance, err_msg=key)
