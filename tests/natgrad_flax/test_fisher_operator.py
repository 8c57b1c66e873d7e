"""Products, solves and spectra of ``ng.fisher`` against the dense matrix of each structure."""

import doctest

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.flatten_util import ravel_pytree
from scipy.sparse.linalg import aslinearoperator

import natgrad_flax as ng
from natgrad_flax import information, memory

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
    "unit-wise": ng.UnitWise(),
    "diagonal": ng.Diagonal(),
    "quasi-diagonal": ng.QuasiDiagonal(),
}
MODELS = {"dense": (3,), "mixed": (3, 2)}
INDEFINITE = ("tri-diagonal",)


@pytest.fixture(scope="module", params=MODELS)
def models(request):
    with jax.enable_x64(True):
        model = Mixed() if request.param == "mixed" else DENSE
        graphdef, state = nnx.split(model)
        model = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf.astype(jnp.float64), state))
        x = jax.random.normal(jax.random.key(1), (4, *MODELS[request.param]), jnp.float64)
    return model, x


@pytest.mark.parametrize("name", STRUCTURES)
def test_everything_agrees_with_the_dense_matrix(models, name):
    model, x = models
    structure = STRUCTURES[name]
    made = ng.fisher(model, x, structure=structure, loss=ng.SoftmaxCrossEntropy())
    params = nnx.state(model, nnx.Param)
    v = jax.tree.map(lambda leaf: jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape), params)
    flat = ravel_pytree(v)[0]
    dense, damped = np.asarray(made.to_dense()), np.asarray(made.to_dense(RHO))
    assert made.num_params == len(dense) == len(flat)
    np.testing.assert_allclose(dense, dense.T, atol=1e-14)
    if name == "exact":
        # the order of a raveled tree, from derivatives of the model alone
        graphdef, _, rest = nnx.split(model, nnx.Param, ...)
        shapes = ravel_pytree(params)[1]
        jacobian = jax.jacobian(lambda p: nnx.merge(graphdef, shapes(p), rest)(x))
        j = np.asarray(jacobian(ravel_pytree(params)[0]))
        p = np.asarray(jax.nn.softmax(model(x)))
        output = p[:, :, None] * np.eye(3) - p[:, :, None] * p[:, None, :]
        truth = np.einsum("nap,nab,nbq->pq", j, output, j) / len(x)
        np.testing.assert_allclose(dense, truth, atol=1e-12)

    def agree(found, wanted):
        found = ravel_pytree(found)[0]
        np.testing.assert_allclose(found, wanted, atol=1e-10 * max(1, np.abs(wanted).max()))

    agree(made.matvec(v), dense @ flat)
    agree(made @ v, dense @ flat)
    agree(made.solve(v, RHO), np.linalg.solve(damped, flat))
    agree(made.diagonal(), np.diagonal(dense))
    agree(made.trace(), np.trace(dense))
    agree(made.quadratic_form(v), flat @ dense @ flat)
    agree(made.inner(v, params), flat @ ravel_pytree(params)[0])
    agree(aslinearoperator(made.to_scipy()) @ np.asarray(flat), dense @ flat)
    agree(made.to_scipy(RHO).matvec(np.asarray(flat)), np.linalg.solve(damped, flat))
    agree(made.to_lineax().mv(flat), dense @ flat)
    values = np.linalg.eigvalsh(dense)
    found = np.asarray(made.eigenvalues())
    padded = np.sort(np.append(found, np.zeros(len(values) - min(len(found), len(values)))))
    if len(found) > len(values):
        # duplicates of zero: rows are more than their span
        assert np.abs(np.sort(np.abs(found))[: len(found) - len(values)]).max() < 1e-12
        padded = found[np.argsort(-np.abs(found))][: len(values)]
    agree(np.sort(padded), values)
    sign, logdet = np.linalg.slogdet(damped)
    if sign > 0 and np.linalg.eigvalsh(damped)[0] > 0:
        agree(made.logdet(RHO), logdet)
    spectrum = np.linalg.eigvalsh(damped)
    report = made.conditioning(RHO)
    if spectrum[0] > 0:
        np.testing.assert_allclose(report.condition, spectrum[-1] / spectrum[0], rtol=1e-6)
    assert not report.pseudo_inverse
    rank = np.linalg.matrix_rank(dense, tol=1e-10 * np.abs(values).max())
    assert report.rank == rank
    assert made.conditioning().pseudo_inverse


@pytest.mark.parametrize("name", [n for n in STRUCTURES if n not in INDEFINITE])
def test_draws_have_the_covariance(models, name):
    model, x = models
    made = ng.fisher(model, x, structure=STRUCTURES[name], loss=ng.MeanSquaredError())
    count = 4000
    for draw, wanted in (
        (made.sample, np.asarray(made.to_dense(RHO))),
        (made.sample_inverse, np.linalg.inv(np.asarray(made.to_dense(RHO)))),
    ):
        keys = jax.random.split(jax.random.key(5), count)
        draws = jax.lax.map(lambda key, draw=draw: _raw(made, draw, key), keys)
        found = np.cov(np.asarray(draws).T, bias=True)
        scale = np.sqrt(np.outer(np.diag(wanted), np.diag(wanted)))
        # the error of a covariance is below sqrt(2 / count) of its scale
        assert np.abs((found - wanted) / scale).max() < 6 * np.sqrt(2 / count)


def _raw(made, draw, key):
    tree = made._tree(made._run(draw.__name__, key, damping=RHO))
    return ravel_pytree(tree)[0]


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


def test_the_examples_run():
    with jax.enable_x64(False):
        found = doctest.testmod(information)
    assert found.attempted > 15
    assert not found.failed
