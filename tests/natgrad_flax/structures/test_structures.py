"""Every structure against explicit dense matrices, on random small networks."""

import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from battery import ONE_OF_EACH, QUICK, STRUCTURES
from flax import nnx
from hypothesis import assume, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from natgrad_reference import (
    ACTIVATIONS,
    blocks_of,
    flatten,
    make_mlp,
    metric,
    reference,
    solve_dense,
)

import natgrad_flax as ng
from natgrad_flax.operators.dense_units import solve_units_of_grams
from natgrad_flax.xla.batched_solve import ScaledGram


@st.composite
def problems(draw, min_width=2, max_depth=4, loss=None):
    """A random MLP, a batch and a loss, in float64."""
    depth = draw(st.integers(1, max_depth))
    loss = loss or draw(st.sampled_from([ng.MeanSquaredError(), ng.SoftmaxCrossEntropy()]))
    least = 2 if isinstance(loss, ng.SoftmaxCrossEntropy) else 1
    hidden = draw(st.lists(st.integers(min_width, 9), min_size=depth - 1, max_size=depth - 1))
    widths = (draw(st.integers(min_width, 8)), *hidden, draw(st.integers(least, 4)))
    seed = draw(st.integers(0, 2**16))
    model = make_mlp(
        widths,
        seed,
        activation=draw(st.sampled_from(sorted(ACTIVATIONS))),
        weight_variance=draw(st.sampled_from([1.0, 2.0])),
        bias_variance=draw(st.sampled_from([0.0, 0.3])),
    )
    n = draw(st.integers(1, 5))
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=(n, widths[0])))
    if isinstance(loss, ng.SoftmaxCrossEntropy):
        y = jnp.asarray(np.eye(widths[-1])[rng.integers(0, widths[-1], n)])
    else:
        y = jnp.asarray(rng.normal(size=(n, widths[-1])))
    return model, x, y, loss


def has_documented_inverse(structure, ref):
    """Whether the undamped update is the pseudo-inverse's: it is not for every structure."""
    if isinstance(structure, ng.QuasiDiagonal):
        # a weight whose input does not vary gets a generalised inverse that is not Moore-Penrose
        matrix = metric(structure, ref, 0.0)
        blocks = [matrix[np.ix_(rows, rows)] for rows in blocks_of(structure, ref)]
        return all(np.linalg.matrix_rank(b) == len(b) or not b.any() for b in blocks)
    if isinstance(structure, ng.LayerWise) and not isinstance(structure, ng.BlockDiagonal):
        # Theorem 4.1 needs layer Jacobians of full row rank
        needed = np.linalg.matrix_rank(ref.backward[-1]).sum()
        for a, d in zip(ref.inputs, ref.backward, strict=True):
            jacobian = np.einsum("nsm,nk->nskm", d, a).reshape(d.shape[0] * d.shape[1], -1)
            if np.linalg.matrix_rank(jacobian, rtol=1e-4) < needed:
                return False
    return True


def check(name, problem, space, damping, fisher="exact"):
    model, x, y, loss = problem
    structure = STRUCTURES[name](model.depth, space)
    key = jax.random.key(3) if fisher == "mc" else None
    seeds = None
    if fisher == "empirical":
        seeds = loss.residual(model(x), y)[:, None, :]
    elif fisher == "mc":
        seeds = jnp.swapaxes(loss.sample(key, model(x), 2), 1, 2)
    ref = reference(model, x, y, loss, seeds)
    expected, condition = solve_dense(structure, ref, damping)
    assume(condition < 1e6)
    if damping == 0:
        assume(has_documented_inverse(structure, ref))
    graphdef, state = nnx.split(model)
    settings = {"loss": loss, "fisher": fisher, "mc_samples": 2, "damping": damping}

    @partial(jax.jit, compiler_options=QUICK)
    def step(state, x, y):
        model = nnx.merge(graphdef, state)
        return ng.natural_gradient(model, x, y, structure=structure, key=key, **settings)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ng.SingularCouplingWarning)
        try:
            update = step(state, x, y)
        except ValueError as error:
            # undamped couplings of layers whose Jacobians cannot have full row rank
            if damping != 0 or "full row rank" not in str(error):
                raise
            assume(False)
    scale = max(np.abs(expected).max(), 1e-6)
    np.testing.assert_allclose(flatten(update) / scale, expected / scale, atol=1e-8, rtol=0)


@pytest.fixture(autouse=True)
def _forget_compiled_programs():
    """Every example has programs of its own: those of one test stay few."""
    yield
    jax.clear_caches()


SPACES, DAMPINGS = st.sampled_from(["auto", "sample", "parameter"]), st.sampled_from([1e-3, 0.3])
NAMES = [*ONE_OF_EACH, "layer-wise-indefinite", "kfac-literal-pi"]


@pytest.mark.usefixtures("x64")
class TestAgainstDense:
    """Random networks; in all that a structure answers it is in ``test_structure_battery.py``."""

    @pytest.mark.parametrize("name", NAMES)
    @hypothesis_settings(max_examples=2)
    @given(problem=problems(), space=SPACES, damping=DAMPINGS)
    def test_damped(self, name, problem, space, damping):
        check(name, problem, space, damping)

    @pytest.mark.parametrize("name", NAMES)
    @hypothesis_settings(max_examples=2)
    @given(problem=problems(), space=SPACES)
    def test_undamped(self, name, problem, space):
        check(name, problem, space, 0.0)

    @pytest.mark.parametrize("fisher", ["mc", "empirical"])
    @pytest.mark.parametrize("name", NAMES)
    @hypothesis_settings(max_examples=1)
    @given(problem=problems(), space=SPACES)
    def test_other_fishers(self, name, fisher, problem, space):
        check(name, problem, space, 0.1, fisher)


def test_a_layer_that_cholesky_cannot_solve_leaves_the_others():
    """Units of all layers are solved together; eigenvalues serve the layer that needs them."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(8, 12))
    fine = [x @ x.T / 12, np.abs(rng.normal(size=(8, 3))), np.asarray(0.1), rng.normal(size=(8, 3))]
    thin = [np.ones((8, 8)), np.ones((8, 2)), np.asarray(1e-30), np.ones((8, 2))]
    systems = [ScaledGram(*(jnp.asarray(a, jnp.float32) for a in parts)) for parts in (fine, thin)]
    both = solve_units_of_grams(systems)
    np.testing.assert_array_equal(both[0], solve_units_of_grams(systems[:1])[0])
    # the pseudo-inverse of a matrix of ones
    np.testing.assert_allclose(both[1], np.full((8, 2), 1 / 8), rtol=1e-5)
