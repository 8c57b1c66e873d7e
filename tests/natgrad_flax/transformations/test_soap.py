"""SOAP against the algorithm of its paper in NumPy, and what theory says of it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import natgrad_flax as ng

B1, B2, EPS = 0.9, 0.8, 1e-3


class Reference:
    """Vyas et al. 2024, Algorithm 3, for one matrix, with the momentum in the original space."""

    def __init__(self, decay: float = B2, every: int = 1, basis_every: int = 1):
        self.decay, self.every, self.basis_every = decay, every, basis_every
        self.t = 0

    def step(self, g: np.ndarray) -> np.ndarray:
        self.t += 1
        if self.t == 1:
            self.m, self.v = np.zeros_like(g), np.zeros_like(g)
            self.l, self.r = np.zeros((len(g),) * 2), np.zeros((g.shape[1],) * 2)
            self.ql, self.qr = (np.linalg.eigh(x)[1][:, ::-1] for x in (g @ g.T, g.T @ g))
        projected = self.ql.T @ g @ self.qr
        self.m = B1 * self.m + (1 - B1) * g
        self.v = B2 * self.v + (1 - B2) * projected**2
        mean = self.ql.T @ self.m @ self.qr / (1 - B1**self.t)
        n = mean / (np.sqrt(self.v / (1 - B2**self.t)) + EPS)
        step = self.ql @ n @ self.qr.T
        if (self.t - 1) % self.every == 0:
            self.l = self.decay * self.l + (1 - self.decay) * g @ g.T
            self.r = self.decay * self.r + (1 - self.decay) * g.T @ g
        if self.t % self.basis_every == 0:
            self.ql, self.v = self.renewed(self.l, self.ql, self.v)
            self.qr, turned = self.renewed(self.r, self.qr, self.v.T)
            self.v = turned.T
        return step

    @staticmethod
    def renewed(factor, q, v) -> tuple[np.ndarray, np.ndarray]:
        """Sorted by q^T L q, then one power step; the rows of v go with the columns of q."""
        order = np.argsort([-(column @ factor @ column) for column in q.T])
        return np.linalg.qr(factor @ q[:, order])[0], v[order]


def gradients(shape: tuple[int, ...], steps: int = 8) -> list[np.ndarray]:
    """Random, of scales that differ by rows and columns."""
    rng = np.random.default_rng(0)
    scales = np.geomspace(1, 8, shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    return [scales * rng.normal(size=shape) for _ in range(steps)]


def run(tx: optax.GradientTransformation, sequence: list) -> list[np.ndarray]:
    update, state, found = jax.jit(tx.update), tx.init(sequence[0]), []
    for gradient in sequence:
        step, state = update(gradient, state)
        found.append(jax.tree.map(lambda leaf: -np.asarray(leaf), step))
    return found


def soap(**settings) -> optax.GradientTransformation:
    return ng.soap(1.0, b1=B1, b2=B2, eps=EPS, **settings)


@pytest.mark.parametrize(
    "settings",
    [{"basis_every": 1}, {"decay": 0.5, "every": 2, "basis_every": 3}],
    ids=str,
)
def test_the_algorithm_of_the_paper(x64, settings) -> None:
    sequence = gradients((5, 4))
    reference = Reference(**settings)
    for gradient, step in zip(sequence, run(soap(**settings), sequence), strict=True):
        np.testing.assert_allclose(step, reference.step(gradient), rtol=1e-8, atol=1e-10)


def test_blocks_and_leaves_stand_for_themselves(x64) -> None:
    """One leaf in blocks, a kernel whose dimensions are merged, and a vector by Adam.

    Of all of them the first gradient decides all eigenvectors.
    """
    steps = zip(gradients((5, 4)), gradients((2, 2, 4)), gradients((3,)), strict=True)
    sequence = [dict(zip(("w", "kernel", "b"), step, strict=True)) for step in steps]
    parts = (slice(0, 3), slice(3, 5))
    block, kernel = {i: Reference() for i in range(2)}, Reference()
    adam = run(optax.adam(1.0, b1=B1, b2=B2, eps=EPS), [step["b"] for step in sequence])
    blocked = run(soap(basis_every=1, block_size=3, merge_dims=False), sequence)
    merged = run(soap(basis_every=1), sequence)
    for t, gradient in enumerate(sequence):
        for i, rows in enumerate(parts):
            expected = block[i].step(gradient["w"][rows, 0:3])
            np.testing.assert_allclose(blocked[t]["w"][rows, 0:3], expected, rtol=1e-8)
        expected = kernel.step(gradient["kernel"].reshape(4, 4))
        np.testing.assert_allclose(merged[t]["kernel"].reshape(4, 4), expected, rtol=1e-8)
        np.testing.assert_allclose(merged[t]["b"], adam[t], rtol=1e-6)


def test_in_the_basis_of_the_coordinates_it_is_adam(x64) -> None:
    """Gradients with one entry in each row and column leave L and R diagonal."""
    rng = np.random.default_rng(1)
    places = np.eye(4)[:, [2, 0, 3, 1]] * np.array([1.0, 2, 4, 8])
    sequence = [places * rng.uniform(0.9, 1.1, 4) for _ in range(6)]
    found = run(soap(basis_every=2), sequence)
    adam = run(optax.adam(1.0, b1=B1, b2=B2, eps=EPS), sequence)
    np.testing.assert_allclose(found, adam, rtol=1e-6, atol=1e-7)


def test_rotated_gradients_give_rotated_steps(x64) -> None:
    """Of tensors of order 3, each dimension with a basis of its own; Adam has no such thing."""
    rng = np.random.default_rng(2)
    turns = [np.linalg.qr(rng.normal(size=(n, n)))[0] for n in (2, 3, 4)]
    sequence = gradients((2, 3, 4), steps=4)
    tx = soap(basis_every=2, merge_dims=False)

    def turned(tensors):
        return [np.einsum("abc,xa,yb,zc->xyz", tensor, *turns) for tensor in tensors]

    expected = turned(run(tx, sequence))
    np.testing.assert_allclose(run(tx, turned(sequence)), expected, rtol=1e-7, atol=1e-9)


def test_the_basis_converges_to_eigenvectors(x64) -> None:
    """Of a constant second moment, though each renewal is one step of the power method."""
    rng = np.random.default_rng(3)
    turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    tx = soap(decay=0.999, basis_every=5)
    noise = jnp.asarray(rng.normal(size=(4000, 3, 3)))
    sequence = jnp.asarray(turn * np.array([1.0, 3, 9])) @ noise
    state, _ = jax.lax.scan(
        lambda state, gradient: (tx.update(gradient, state)[1], None),
        tx.init(jnp.zeros((3, 3))),
        sequence,
    )
    basis = np.asarray(state[0].bases[0][0][0])
    np.testing.assert_allclose(np.abs(basis.T @ turn), np.eye(3)[::-1], atol=0.05)
