"""Products, solves and spectra of ``ng.fisher`` against the dense matrix of each structure."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.flatten_util import ravel_pytree
from scipy.sparse.linalg import aslinearoperator

import natgrad_flax as ng
from natgrad_flax.arguments import memory
from natgrad_flax.signals.base import ravel, unravel
from natgrad_flax.signals.gradient import ParameterGradient

pytestmark = pytest.mark.usefixtures("x64")

RHO = 0.1


class Mixed(nnx.Module):
    """A grouped convolution, a normalisation and a readout: all three kinds of signals."""

    def __init__(self):
        rngs = nnx.Rngs(3)
        kinds = {"param_dtype": jnp.float64, "rngs": rngs}
        self.conv = nnx.Conv(2, 4, (2,), feature_group_count=2, **kinds)
        self.norm = nnx.LayerNorm(4, **kinds)
        self.readout = nnx.Linear(4, 3, **kinds)

    def __call__(self, x):
        return self.readout(self.norm(jnp.tanh(self.conv(x))).mean(axis=1))


DENSE = ng.MLP((3, 5, 4, 3), rngs=nnx.Rngs(0))
STRUCTURES = {
    "exact": ng.Exact(),
    "block-diagonal": ng.BlockDiagonal(),
    "tri-diagonal": ng.BlockTriDiagonal(),
    "layer-wise": ng.LayerWise(np.eye(3) + 0.3),
    "kfac": ng.KFAC(),
    "kfac-pi-reduce": ng.KFAC(split="pi", sharing="reduce"),
    "ekfac": ng.EKFAC(),
    "foof": ng.Foof("inputs"),
    "unit-wise": ng.UnitWise(),
    "unit-blocks": ng.UnitBlocks(2),
    "low-rank-units": ng.LowRankUnits(2),
    "diagonal": ng.Diagonal(),
    "quasi-diagonal": ng.QuasiDiagonal(),
}
DRAWS = 1000


@pytest.fixture(scope="module")
def mixed():
    with jax.enable_x64(True):
        return Mixed(), jax.random.normal(jax.random.key(1), (4, 3, 2), jnp.float64)


@pytest.fixture(scope="module")
def signals(mixed):
    model, x = mixed
    with jax.enable_x64(True):
        y = jax.nn.one_hot(jnp.arange(4) % 3, 3, dtype=jnp.float64)
        graphdef, state = nnx.split(model)

        # one program; op by op it is a hundred
        @jax.jit
        def run(state):
            return ng.fisher_signals(
                nnx.merge(graphdef, state), x, y, loss=ng.SoftmaxCrossEntropy()
            )[0]

        return run(state)


@partial(jax.jit, static_argnames="structure")
def answers(signals, flat, key, *, structure):
    """All that an operator answers, in one program; vectors raveled."""
    operator = structure.operator(signals)
    vector = unravel(signals.layers, flat)
    keys = jax.random.split(key, DRAWS)
    return {
        "dense": operator.to_dense(),
        "damped": operator.to_dense(RHO),
        "matvec": ravel(operator.matvec(vector)),
        "solve": ravel(operator.solve(ParameterGradient(vector), RHO)),
        "diagonal": ravel(operator.diagonal()),
        "trace": operator.trace(),
        "eigenvalues": operator.eigenvalues(),
        "logdet": operator.logdet(RHO),
        "extremes": jnp.stack(operator.extremes(RHO)),
        "sample": jax.lax.map(lambda k: ravel(operator.sample(k, RHO)), keys),
        "sample_inverse": ravel(operator.sample_inverse(keys[0], RHO)),
    }


@pytest.mark.parametrize("name", STRUCTURES)
def test_every_answer_is_that_of_the_dense_matrix(signals, name):
    flat = np.cos(np.arange(signals.num_params))
    found = answers(signals, flat, jax.random.key(5), structure=STRUCTURES[name])
    found = {key: np.asarray(value) for key, value in found.items()}
    dense, damped = found["dense"], found["damped"]
    np.testing.assert_allclose(dense, dense.T, atol=1e-14)
    if name == "exact":
        jacobian = np.asarray(signals.to_dense())
        np.testing.assert_allclose(dense, jacobian.T @ jacobian / 4, atol=1e-14)
    values, spectrum = np.linalg.eigvalsh(dense), np.linalg.eigvalsh(damped)
    for key, wanted in {
        "matvec": dense @ flat,
        "solve": np.linalg.solve(damped, flat),
        "diagonal": np.diagonal(dense),
        "trace": np.trace(dense),
        "eigenvalues": values,
        "extremes": spectrum[[0, -1]],
        "logdet": np.linalg.slogdet(damped)[1],
        "sample": damped,
        "sample_inverse": np.linalg.solve(damped, found["sample"][0]),
    }.items():
        have = found[key]
        if key == "eigenvalues":
            # zeros may be left out, and rows may be more than what they span
            both = [
                np.append(v, np.zeros(len(values) + len(have) - len(v))) for v in (have, values)
            ]
            have, wanted = (np.sort(v) for v in both)
        if spectrum[0] <= 0 and key in ("logdet", "sample", "sample_inverse"):
            assert not np.isfinite(have).all()
            continue
        if key == "sample":
            # 6 standard errors of an entry of a covariance
            scale = np.sqrt(np.outer(np.diagonal(wanted), np.diagonal(wanted)))
            error = np.abs(have.T @ have / DRAWS - wanted) / scale
            assert error.max() < 6 * np.sqrt(2 / DRAWS), key
            continue
        np.testing.assert_allclose(
            have, wanted, atol=1e-10 * max(1, np.abs(wanted).max()), err_msg=key
        )


def test_vectors_are_trees_of_parameters(mixed):
    model, x = mixed
    made = ng.fisher(model, x, structure=ng.Exact(), loss=ng.SoftmaxCrossEntropy())
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    flat, unravel = ravel_pytree(params)
    outputs = jax.jit(jax.jacobian(lambda p: nnx.merge(graphdef, unravel(p), rest)(x)))
    j, p = np.asarray(outputs(flat)), np.asarray(jax.nn.softmax(model(x)))
    output = p[:, :, None] * np.eye(3) - p[:, :, None] * p[:, None, :]
    truth = np.einsum("nap,nab,nbq->pq", j, output, j) / len(x)
    v = np.cos(np.arange(len(flat)))
    tree = unravel(jnp.asarray(v))
    solved = np.linalg.solve(truth + RHO * np.eye(len(v)), v)

    def agree(found, wanted):
        np.testing.assert_allclose(ravel_pytree(found)[0], np.ravel(wanted), atol=1e-10)

    agree(made.to_dense(), truth)
    agree(made @ tree, truth @ v)
    agree(made.solve(tree, RHO), solved)
    agree(made.diagonal(), np.diagonal(truth))
    agree(made.quadratic_form(tree), v @ truth @ v)
    agree(aslinearoperator(made.to_scipy()) @ v, truth @ v)
    agree(made.to_scipy(RHO).matvec(v), solved)
    agree(made.to_lineax().mv(jnp.asarray(v)), truth @ v)
    values = np.linalg.eigvalsh(truth)
    agree(made.eigenvalues()[-3:], values[-3:])
    report = made.conditioning(RHO)
    assert report.rank == np.linalg.matrix_rank(truth, tol=1e-12)
    assert not report.pseudo_inverse
    np.testing.assert_allclose(report.condition, (values[-1] + RHO) / RHO, rtol=1e-6)
    assert made.conditioning() == (report.rank, np.inf, True)
    relative = ng.RelativeDamping(0.1)
    scale = np.trace(truth) / (len(x) * 2)
    agree(made.solve(tree, relative), np.linalg.solve(truth + 0.1 * scale * np.eye(len(v)), v))


def test_the_cross_matrix_is_the_coefficient_matrix():
    import ntk_analysis as na

    model, x = DENSE, np.random.default_rng(0).normal(size=(5, 3))
    settings = {"structure": ng.KFAC(), "loss": ng.MeanSquaredError()}
    made = ng.fisher(model, x[:4].astype(np.float32), **settings)
    wanted = na.coefficient_matrix(ng.KFAC(), model, x[:4], x_test=x, damping=RHO)
    found = made.cross(model, x.astype(np.float32), RHO)
    np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_a_laplace_posterior_of_a_linear_model_is_the_bayesian_one():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(6, 3))
    model = nnx.Linear(3, 2, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    made = ng.fisher(model, x, structure=ng.Exact(), loss=ng.MeanSquaredError())
    prior, n = 0.5, len(x)
    inside = np.concatenate([x, np.ones((n, 1))], axis=1)
    one = inside.T @ inside + prior * np.eye(4)
    # two outputs of unit noise, each with the same precision
    wanted = 2 * np.linalg.slogdet(one)[1]
    found = made.logdet(prior / n) + made.num_params * np.log(n)
    np.testing.assert_allclose(found, wanted, rtol=1e-10)


def test_bad_input_is_told():
    model, x = DENSE, np.ones((4, 3), np.float32)

    def make(**more):
        settings = {"structure": ng.Exact(), "loss": ng.MeanSquaredError(), **more}
        return ng.fisher(model, x, **settings)

    made = make()
    params = nnx.state(model, nnx.Param)
    for bad, message in (
        (nnx.state(ng.MLP((3, 6, 4, 3), rngs=nnx.Rngs(0)), nnx.Param), "has shape"),
        ({"layers": {}}, "has nothing"),
        (np.ones(5), "tree like"),
    ):
        with pytest.raises(ValueError, match=message):
            made.matvec(bad)
    turned = jax.tree.map(lambda leaf: leaf * 1j, params)
    with pytest.raises((TypeError, ValueError), match="complex"):
        made.solve(turned, 0.1)
    with pytest.raises(ValueError, match="array of shape"):
        made.solve(params, np.ones(3))
    with pytest.warns(ng.SmallDampingWarning, match="100 times the rounding"):
        made.solve(params, 1e-20)
    with pytest.raises(TypeError, match="key must be"):
        made.sample(3)
    for damping, message in ((-1.0, "0 or positive"), (np.nan, "0 or positive")):
        with pytest.raises(ValueError, match=message):
            made.solve(params, damping)
    with pytest.raises(TypeError, match="damping"):
        made.solve(params, lambda step: 0.1)
    with pytest.raises(ValueError, match=r"log-determinant .* singular"):
        made.logdet(0.0)
    with pytest.raises(ValueError, match="takes no targets"):
        make(y=np.ones((4, 3), np.float32))
    with pytest.raises(ValueError, match="pass y"):
        make(fisher="empirical")
    with pytest.raises(ValueError, match="draws targets"):
        make(fisher="mc")
    with pytest.raises(ValueError, match="no covariance"):
        make(structure=ng.BlockTriDiagonal()).sample(jax.random.key(0), 0.1)


def test_a_matrix_that_does_not_fit_is_refused(monkeypatch):
    made = ng.fisher(DENSE, np.ones((4, 3)), structure=ng.Exact(), loss=ng.MeanSquaredError())
    monkeypatch.setattr(memory, "available_memory", lambda: 1000)
    monkeypatch.setattr(memory, "SMALL", 0)
    with pytest.raises(ValueError, match=r"matrix of FisherOperator.* GiB"):
        made.to_dense()
