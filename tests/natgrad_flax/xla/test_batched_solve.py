"""Tests of natgrad_flax.xla.batched_solve against numpy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from natgrad_flax.xla import batched_solve
from natgrad_flax.xla.batched_solve import ScaledGram, solve_scaled_gram, solve_scaled_grams

if hasattr(jax, "enable_x64"):
    enable_x64 = jax.enable_x64
else:
    from jax.experimental import enable_x64


def _problem(n, m, dtype, seed=0, rank=None):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rank or 2 * n, n)) * np.logspace(0, -1, n)
    d = np.maximum(rng.normal(size=(n, m)), 0)
    e = rng.uniform(0.01, 0.1, size=(n, m))
    return [a.astype(dtype) for a in (x.T @ x / len(x), d, e, rng.normal(size=(n, m)))]


def _residual(a, d, e, b, v):
    a, d, e, b, v = (np.asarray(x, np.float64) for x in (a, d, e, b, v))
    e = np.broadcast_to(e, b.shape)
    d = np.broadcast_to(d, b.shape)
    k = d.T[:, :, None] * a * d.T[:, None] + np.eye(len(a)) * e.T[:, :, None]
    ref = np.linalg.solve(k, b.T[..., None])[..., 0].T
    res = np.linalg.norm(d * (a @ (d * v)) + e * v - b, axis=0) / np.linalg.norm(b, axis=0)
    return res.max(), np.abs(v - ref).max() / np.abs(ref).max()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("n", "m", "chunk"),
    [(1, 1, None), (1, 5, 2), (3, 1, None), (7, 130, 64), (23, 301, None), (45, 9, 4)],
)
def test_matches_numpy(n, m, chunk, dtype):
    with enable_x64(True):
        args = [jnp.asarray(x) for x in _problem(n, m, dtype)]
        v = jax.jit(lambda *a: solve_scaled_gram(*a, chunk_size=chunk))(*args)
        assert v.dtype == dtype
        assert v.shape == (n, m)
        res, err = _residual(*args, v)
        tol = 1e-5 if dtype == np.float32 else 1e-12
        assert res < tol
        assert err < 10 * tol


@pytest.mark.parametrize("sizes", [(70, 3, 33), (1, 40), (0, 5)])
def test_several_gram_matrices_in_one_loop(sizes):
    problems = [_problem(12, m, np.float32, seed) for seed, m in enumerate(sizes)]
    systems = [ScaledGram(*map(jnp.asarray, problem)) for problem in problems]
    found = jax.jit(solve_scaled_grams)(systems)
    for m, problem, v in zip(sizes, problems, found, strict=True):
        assert v.shape == (12, m)
        assert m == 0 or _residual(*problem, v)[0] < 1e-5


def test_one_gram_matrix_that_is_not_finite_leaves_the_others():
    fine, spoilt = (list(map(jnp.asarray, _problem(6, 4, np.float32, seed))) for seed in range(2))
    spoilt[0] = spoilt[0].at[0, 0].set(jnp.nan)
    found, lost = solve_scaled_grams([ScaledGram(*fine), ScaledGram(*spoilt)])
    np.testing.assert_array_equal(found, solve_scaled_gram(*fine))
    assert jnp.isnan(lost).any()


def test_many_blocks():
    args = _problem(100, 70, np.float32)
    res, _ = _residual(*args, jax.jit(solve_scaled_gram)(*args))
    assert res < 1e-5


def test_zero_scale_and_singular_gram():
    a, d, e, b = _problem(12, 20, np.float32, rank=3)
    d[:, 4] = 0
    v = np.asarray(solve_scaled_gram(*map(jnp.asarray, (a, d, e, b))))
    np.testing.assert_allclose(v[d == 0], (b / e)[d == 0], rtol=1e-5)
    assert _residual(a, d, e, b, v)[0] < 1e-5


@pytest.mark.parametrize("shape", [(), (12, 1)])
def test_broadcast_shift(shape):
    a, d, _, b = _problem(12, 20, np.float32)
    e = np.full(shape, 0.1, np.float32)
    v = solve_scaled_gram(*map(jnp.asarray, (a, d, e, b)))
    assert _residual(a, d, e, b, v)[0] < 1e-5


@pytest.mark.parametrize("closed", [1, 4], ids=["gram", "everything"])
def test_constants_compile_to_the_program_of_arguments(closed):
    # folded loops let XLA fuse the whole factorisation into a few kernels that are slow
    args = [jnp.asarray(x) for x in _problem(20, 20, np.float32)]

    def compiled(*constants):
        step = jax.jit(lambda *rest: solve_scaled_gram(*constants, *rest))
        return step.lower(*args[len(constants) :]).compile().as_text()

    ours, plain = compiled(*args[:closed]), compiled()
    loops = [text.count(" while(") for text in (ours, plain)]
    assert loops[0] == loops[1] > 0
    instructions = [text.count(" = ") for text in (ours, plain)]
    assert 0.9 < instructions[0] / instructions[1] < 1.1


def test_lapack_path():
    args = [jnp.asarray(x) for x in _problem(6, 11, np.float32)]
    e = jnp.broadcast_to(args[2], args[3].shape)
    v = batched_solve._solve_by_lapack(ScaledGram(*args[:2], e, args[3]), 4)
    np.testing.assert_allclose(v, solve_scaled_gram(*args), rtol=1e-4, atol=1e-5)


def test_gradients_of_blocks_under_vmap():
    with enable_x64(True):
        a, d, e, b = (jnp.asarray(x) for x in _problem(5, 3, np.float64))

        def blocks(d, b):
            return jnp.sum(jnp.sin(solve_scaled_gram(a, d, e, b, chunk_size=2)))

        def dense(d, b):
            matrix = d.T[:, :, None] * a * d.T[:, None] + jnp.eye(5) * e.T[:, :, None]
            return jnp.sum(jnp.sin(jnp.linalg.inv(matrix) @ b.T[..., None]))

        rhs = jnp.stack([b, b[::-1]])
        ours, theirs = (
            jax.vmap(jax.grad(f, argnums=(0, 1)), in_axes=(None, 0))(d, rhs)
            for f in (blocks, dense)
        )
        for x, y in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-8, atol=1e-8)
