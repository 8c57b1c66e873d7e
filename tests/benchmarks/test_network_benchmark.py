"""The step of networks with shared weights is measured on what it says, and its answer checked."""

import jax
import numpy as np
import pytest
from flax import nnx

import natgrad_flax as ng
from benchmarks import networks, step
from benchmarks.answers import check_step, metric_times
from benchmarks.problems import LINES, NETWORKS, STRUCTURES, make_problem
from natgrad_flax.signals.shared import SharedSignals
from natgrad_flax.structures.base import ravel


def test_lines_have_the_sizes_of_the_table():
    counts = {}
    for name in ("conv", "transformer"):
        line = networks.line_of(name)
        assert line is LINES[f"{name}-mc"]
        model = nnx.eval_shape(lambda name=name: NETWORKS[name](nnx.Rngs(0)))
        params = nnx.state(model, nnx.Param)
        counts[name] = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert 0.29e6 < counts["conv"] < 0.35e6
    assert 0.05e6 < counts["transformer"] < 0.1e6


@pytest.mark.parametrize("structure", ["quasi-diag"])
def test_steps_satisfy_their_definition_and_a_wrong_one_is_found(structure):
    line, entry = networks.line_of("small transformer"), STRUCTURES[structure]
    steps, _, (defect, scale) = step.first_step(line, entry)
    assert defect < 0.01
    assert abs(scale - 1) < 1e-3
    wrong = jax.tree.map(lambda new, old: 1.1 * new - 0.1 * old, steps.natural(), steps.state)
    with pytest.raises(ArithmeticError, match=entry.structure.name):
        check_step(line, entry, make_problem(line, entry), wrong)


@pytest.mark.parametrize(("fan_in", "sharing"), [(5, "expand"), (20, "expand"), (5, "reduce")])
def test_reference_metric_of_shared_weights_is_the_dense_one(fan_in, sharing, x64):
    rng, structure = np.random.default_rng(0), ng.EKFAC(sharing=sharing)
    a, d = rng.normal(size=(3, 4, 1, fan_in)), rng.normal(size=(3, 2, 4, 1, 6))
    layer = SharedSignals(*map(jax.numpy.asarray, (a, d)), None, ("conv",))
    signals = ng.Signals((layer,), jax.numpy.zeros((3, 2)))
    vector = jax.numpy.asarray(rng.normal(size=layer.num_params))
    applied = ravel(metric_times(structure, signals, 0.1, signals.unravel(vector)))
    np.testing.assert_allclose(applied, structure.to_dense(signals, 0.1) @ vector, rtol=1e-9)
