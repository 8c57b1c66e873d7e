"""Shampoo against its formulas in NumPy, and what theory says of it."""

import functools
import math
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import natgrad_flax as ng

STEPS = 5
EPSILON = 1e-3


def gradients(**shapes: tuple[int, ...]) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [{key: rng.normal(size=shape) for key, shape in shapes.items()} for _ in range(STEPS)]


def run(tx: optax.GradientTransformation, sequence: list, params=None) -> list:
    """The updates of all steps, with the signs of the gradients."""
    update, state, found = jax.jit(tx.update), tx.init(sequence[0]), []
    for gradient in sequence:
        step, state = update(gradient, state, params)
        found.append(jax.tree.map(lambda leaf: -np.asarray(leaf), step))
    return found


def close(found, expected, rtol: float = 1e-9) -> None:
    same = functools.partial(np.testing.assert_allclose, rtol=rtol, atol=1e-12)
    jax.tree.map(same, found, expected)


def unfolded(tensor: np.ndarray, axis: int) -> np.ndarray:
    return np.moveaxis(tensor, axis, 0).reshape(tensor.shape[axis], -1)


def power_of(matrix: np.ndarray, power: float) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * values**power) @ vectors.T


def multiplied(tensor: np.ndarray, matrices: list[np.ndarray]) -> np.ndarray:
    letters = "abc"[: tensor.ndim]
    out = "xyz"[: tensor.ndim]
    pairs = ",".join(o + i for o, i in zip(out, letters, strict=True))
    return np.einsum(f"{letters},{pairs}->{out}", tensor, *matrices)


def by_formula(
    sequence: list[np.ndarray],
    *,
    decay: float = 1.0,
    every: int = 1,
    inverse_every: int = 1,
    power: float | None = None,
) -> list[np.ndarray]:
    """Gupta et al., Algorithm 2, one factor a dimension; averages with the weights written out."""
    found, seen, roots = [], [], []
    for t, gradient in enumerate(sequence):
        if t % every == 0:
            rows = [unfolded(gradient, axis) for axis in range(gradient.ndim)]
            seen.append([matrix @ matrix.T for matrix in rows])
        if t % inverse_every == 0:
            weights = decay ** np.arange(len(seen))[::-1]
            if decay < 1:
                weights = weights * (1 - decay) / (1 - decay ** len(seen))
            roots = []
            for moments in zip(*seen, strict=True):
                factor = sum(w * m for w, m in zip(weights, moments, strict=True))
                exponent = power or -1 / (2 * gradient.ndim)
                roots.append(power_of(factor + EPSILON * np.eye(len(factor)), exponent))
        found.append(multiplied(gradient, roots))
    return found


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"decay": 0.8, "every": 2, "inverse_every": 4, "power": -0.5},
    ],
    ids=str,
)
def test_matrices_and_tensors_by_the_formula(x64, settings) -> None:
    sequence = gradients(matrix=(5, 4), tensor=(2, 3, 4), alike=(5, 4))
    tx = ng.shampoo(1.0, epsilon=EPSILON, merge_dims=False, **settings)
    expected = {
        key: by_formula([gradient[key] for gradient in sequence], **settings) for key in sequence[0]
    }
    for t, step in enumerate(run(tx, sequence)):
        close(step, {key: steps[t] for key, steps in expected.items()})


def test_blocks_have_factors_of_their_own(x64) -> None:
    """Sizes that blocks do not divide, at both ends."""
    sequence = [gradient["w"] for gradient in gradients(w=(5, 7))]
    found = run(ng.shampoo(1.0, epsilon=EPSILON, block_size=3), sequence)
    rows, columns = [slice(0, 3), slice(3, 5)], [slice(0, 3), slice(3, 6), slice(6, 7)]
    for i in rows:
        for j in columns:
            expected = by_formula([gradient[i, j] for gradient in sequence])
            close([step[i, j] for step in found], expected)


def test_dimensions_are_merged_and_left_out(x64) -> None:
    """A kernel of a convolution as a matrix; beyond ``max_dim`` one side alone, or entries."""
    sequence = gradients(kernel=(2, 2, 3, 4), table=(9, 3), none=(9, 10), bias=(6,), scalar=())
    found = run(ng.shampoo(1.0, epsilon=EPSILON, max_dim=4, block_size=12), sequence)
    apart = run(ng.shampoo(1.0, epsilon=EPSILON, max_dim=12), sequence)
    kernels = by_formula([gradient["kernel"].reshape(12, 4) for gradient in sequence])
    close([step["kernel"].reshape(12, 4) for step in apart], kernels)
    summed = jax.tree.map(lambda *several: np.cumsum(np.square(several), axis=0), *sequence)
    for t, gradient in enumerate(sequence):
        right = sum(earlier["table"].T @ earlier["table"] for earlier in sequence[: t + 1])
        table = gradient["table"] @ power_of(right + EPSILON * np.eye(3), -1 / 2)
        close(found[t]["table"], table)
        for key in ("none", "bias", "scalar"):
            close(found[t][key], gradient[key] / np.sqrt(summed[key][t] + EPSILON))


def test_a_vector_with_a_factor_is_full_adagrad(x64) -> None:
    sequence = [gradient["v"] for gradient in gradients(v=(4,))]
    found = run(ng.shampoo(1.0, epsilon=EPSILON, vectors="full"), sequence)
    outer = np.cumsum([np.outer(g, g) for g in sequence], axis=0)
    roots = [power_of(matrix + EPSILON * np.eye(4), -1 / 2) for matrix in outer]
    close(found, [root @ gradient for root, gradient in zip(roots, sequence, strict=True)])


@pytest.mark.parametrize("kind", ["sgd", "adam", "rmsprop_normalized"])
def test_grafting_lends_the_length(x64, kind) -> None:
    sequence = gradients(w=(4, 3), b=(3,))
    plain = run(ng.shampoo(1.0, block_size=2), sequence)
    found = run(
        ng.shampoo(1.0, block_size=2, grafting=kind, grafting_decay=0.9, grafting_epsilon=0.1),
        sequence,
    )
    for key in sequence[0]:
        v = np.zeros(sequence[0][key].shape)
        for t, gradient in enumerate(gradient[key] for gradient in sequence):
            if kind == "rmsprop_normalized":
                gradient = gradient / np.linalg.norm(gradient)
            v = 0.9 * v + 0.1 * gradient**2
            share = 1 - 0.9 ** (t + 1) if kind == "adam" else 1.0
            lent = gradient if kind == "sgd" else gradient / (np.sqrt(v / share) + 0.1)
            direction = plain[t][key] / np.linalg.norm(plain[t][key])
            close(found[t][key], np.linalg.norm(lent) * direction)


def test_kl_shampoo_by_the_formula(x64) -> None:
    """S_A <- (1 - b) S_A + b / d_B G S_B^-1 G^T from I on, both at once; blocks with fewer rows."""
    sequence = [gradient["w"] for gradient in gradients(w=(4, 5))]
    tx = ng.shampoo(1.0, statistics="kl", decay=0.7, epsilon=EPSILON, block_size=3)
    found = run(tx, sequence)
    for i in (slice(0, 3), slice(3, 4)):
        for j in (slice(0, 3), slice(3, 5)):
            d_a, d_b = sequence[0][i, j].shape
            a, b = np.eye(d_a), np.eye(d_b)
            inverse_a, inverse_b = a, b
            for t, gradient in enumerate(part[i, j] for part in sequence):
                a = 0.7 * a + 0.3 / d_b * gradient @ inverse_b @ gradient.T
                b = 0.7 * b + 0.3 / d_a * gradient.T @ inverse_a @ gradient
                damped = a + EPSILON * np.eye(d_a), b + EPSILON * np.eye(d_b)
                inverse_a, inverse_b = map(np.linalg.inv, damped)
                step = power_of(damped[0], -0.5) @ gradient @ power_of(damped[1], -0.5)
                close(found[t][i, j], step)


def test_kl_shampoo_of_tensors_has_all_others_in_each_factor(x64) -> None:
    """S_A from G (S_B (x) S_C)^-1 G^T / (d_B d_C), from the second step on."""
    sequence = [gradient["w"] for gradient in gradients(w=(2, 3, 4))]
    tx = ng.shampoo(1.0, statistics="kl", decay=0.7, epsilon=EPSILON, merge_dims=False)
    factors = [np.eye(n) for n in (2, 3, 4)]
    inverses = factors
    for gradient, step in zip(sequence, run(tx, sequence), strict=True):
        new = []
        for axis, factor in enumerate(factors):
            one, other = (inverses[i] for i in range(3) if i != axis)
            rows = unfolded(gradient, axis)
            moment = rows @ np.kron(one, other) @ rows.T * len(factor) / gradient.size
            new.append(0.7 * factor + 0.3 * moment)
        factors = new
        damped = [factor + EPSILON * np.eye(len(factor)) for factor in factors]
        inverses = [np.linalg.inv(factor) for factor in damped]
        close(step, multiplied(gradient, [power_of(factor, -0.5) for factor in damped]))


def test_kl_shampoo_finds_a_kronecker_product(x64) -> None:
    """Gradients of covariance A (x) B: the limit is c A and B / c."""
    rng = np.random.default_rng(1)
    one, other = np.diag([1.0, 2, 4]), np.diag([1.0, 3])
    tx = ng.shampoo(1.0, statistics="kl", decay=0.999)
    state = tx.init(jnp.zeros((3, 2)))
    noise = jnp.asarray(rng.normal(size=(6000, 3, 2)))
    sequence = jnp.sqrt(one) @ noise @ jnp.sqrt(other)

    def step(state, gradient):
        return tx.update(gradient, state)[1], None

    state, _ = jax.lax.scan(step, state, sequence)
    a, b = (np.asarray(factor[0]) for factor in state[0].factors[0])
    np.testing.assert_allclose(np.kron(a, b), np.kron(one, other), atol=1.2)
    np.testing.assert_allclose(a / a[0, 0], one, atol=0.3)


def test_rotated_gradients_give_rotated_steps(x64) -> None:
    rng = np.random.default_rng(2)
    left, right = (np.linalg.qr(rng.normal(size=(n, n)))[0] for n in (4, 3))
    sequence = [gradient["w"] for gradient in gradients(w=(4, 3))]
    tx = ng.shampoo(1.0, decay=0.9, grafting="sgd", epsilon=EPSILON)
    plain = run(tx, sequence)
    turned = run(tx, [left @ gradient @ right.T for gradient in sequence])
    close(turned, [left @ step @ right.T for step in plain])


def test_one_step_makes_all_singular_values_equal(x64) -> None:
    """L^-1/4 G R^-1/4 = U V^T for the first G = U S V^T."""
    gradient = gradients(w=(4, 3))[0]["w"]
    (step,) = run(ng.shampoo(1.0), [gradient])
    u, _, v = np.linalg.svd(gradient, full_matrices=False)
    np.testing.assert_allclose(step, u @ v, atol=1e-9)


def test_momentum_weight_decay_and_a_schedule(x64) -> None:
    sequence = [gradient["w"] for gradient in gradients(w=(3, 2))]
    plain = run(ng.shampoo(1.0), sequence)
    params = np.full((3, 2), 2.0)
    rate = optax.linear_schedule(1.0, 0.0, STEPS)
    found = run(ng.shampoo(rate, momentum=0.5, weight_decay=0.1), sequence, params)
    moved = np.zeros((3, 2))
    for t, step in enumerate(plain):
        moved = 0.5 * moved + step
        # optax's schedules are in float32
        close(found[t], (1 - t / STEPS) * (moved + 0.1 * params), rtol=1e-6)
    tx = ng.shampoo(1.0, weight_decay=0.1)
    state = tx.init(sequence[0])
    with pytest.raises(ValueError, match="requires the current value of parameters"):
        tx.update(sequence[0], state)


EITHER = pytest.mark.parametrize(
    "make",
    [
        functools.partial(ng.shampoo, decay=0.9, every=2, inverse_every=2, grafting="adam"),
        functools.partial(ng.shampoo, decay=0.9, statistics="kl", grafting="rmsprop_normalized"),
        functools.partial(ng.soap, basis_every=2, vectors="full"),
    ],
    ids=["shampoo", "kl", "soap"],
)


@EITHER
def test_zero_gradients_low_precision_and_donated_states(make) -> None:
    """In bfloat16 and float32 side by side, nothing is NaN, and the state's types stay."""
    tx = make(0.1, block_size=3)
    params = {
        "w": jnp.ones((4, 5), jnp.bfloat16),
        "v": jnp.ones(3),
        "empty": jnp.ones((0, 2)),
        "masked": optax.MaskedNode(),
    }
    update = jax.jit(tx.update, donate_argnums=1)
    state = tx.init(params)
    kinds = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state)
    slopes = [jax.tree.map(jnp.zeros_like, params)] * 3 + [params, params]
    for t, gradient in enumerate(slopes):
        step, state = update(gradient, state)
        for leaf, like in zip(jax.tree.leaves(step), jax.tree.leaves(params), strict=True):
            assert leaf.dtype == like.dtype
            assert bool(jnp.isfinite(leaf).all())
            assert bool(jnp.all(leaf == 0) if t < 3 else jnp.all(leaf < 0))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state) == kinds
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(state))


@EITHER
def test_trains_a_model_in_a_scan_and_goes_on_from_a_copy(make) -> None:
    model = ng.MLP((3, 4, 2), rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(model)
    x = jax.random.normal(jax.random.key(0), (8, 3))
    y, tx = jnp.sin(x[:, :2]), make(0.03)

    def step(carry, _):
        params, state = carry

        def loss(params):
            return jnp.mean((nnx.merge(graphdef, params)(x) - y) ** 2)

        value, gradient = jax.value_and_grad(loss)(params)
        update, state = tx.update(gradient, state, params)
        return (optax.apply_updates(params, update), state), value

    halves = jax.jit(lambda carry: jax.lax.scan(step, carry, length=15))
    middle, first = halves((params, tx.init(params)))
    end, second = halves(middle)
    assert second[-1] < 0.5 * first[0]
    again, _ = halves(pickle.loads(pickle.dumps(jax.device_get(middle))))
    for one, other in zip(jax.tree.leaves(end), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(one, other)


def test_programs_do_not_grow_with_the_layers() -> None:
    """Twelve layers more take the same number of factorisations."""
    count = []
    for layers in (2, 14):
        tree = [jnp.ones((4, 4))] * layers
        tx = ng.shampoo(1.0)
        text = str(jax.make_jaxpr(tx.update)(tree, tx.init(tree)))
        count.append(text.count("eigh["))
    assert count[0] == count[1] > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every": 0}, "every must be an integer of at least 1, got 0"),
        ({"every": 2, "inverse_every": 3}, "inverse_every must be a multiple of every"),
        ({"block_size": 0}, "block_size must be an integer of at least 1, got 0"),
        ({"max_dim": 0.5}, "max_dim must be an integer of at least 1"),
        ({"power": 0.5}, "power must be None or a negative number"),
        ({"power": math.nan}, "power must be None or a negative number"),
        ({"decay": 1.5}, "decay must be below 1, got 1.5"),
        ({"decay": -0.1}, "decay must be 0 or positive"),
        ({"epsilon": 0.0}, "epsilon must be positive"),
        ({"momentum": 1.0}, "momentum must be below 1"),
        ({"weight_decay": -1.0}, "weight_decay must be 0 or positive"),
        ({"grafting": "lion"}, "grafting must be None"),
        ({"grafting_decay": 1}, "grafting_decay must be below 1"),
        ({"statistics": "fisher"}, "statistics must be"),
        ({"statistics": "kl"}, "estimates an average: give a decay below 1"),
        ({"vectors": "half"}, "vectors must be"),
        ({"learning_rate": -1.0}, "learning_rate must be positive"),
    ],
    ids=str,
)
def test_bad_settings_of_shampoo(settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        ng.shampoo(**{"learning_rate": 0.1, **settings})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"basis_every": 0}, "basis_every must be an integer of at least 1"),
        ({"every": 0}, "every must be an integer of at least 1"),
        ({"b1": 1.0}, "b1 must be below 1"),
        ({"b2": -0.5}, "b2 must be 0 or positive"),
        ({"decay": 1.0}, "decay must be below 1"),
        ({"eps": 0.0}, "eps must be positive"),
    ],
    ids=str,
)
def test_bad_settings_of_soap(settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        ng.soap(0.1, **settings)


@EITHER
def test_bad_trees(make) -> None:
    tx, params = make(0.1), {"w": jnp.ones((2, 3))}
    with pytest.raises(TypeError, match=r"\['w'\] has dtype complex64, but only real"):
        tx.init({"w": jnp.ones((2, 3), jnp.complex64)})
    with pytest.raises(TypeError, match=r"\['w'\] has dtype int32, and has no gradient"):
        tx.init({"w": jnp.ones((2, 3), jnp.int32)})
    with pytest.raises(TypeError, match="is no array, but a float"):
        tx.init({"w": 1.0})
    with pytest.raises(ValueError, match="the state is of other parameters"):
        tx.update({"w": jnp.ones((3, 3))}, tx.init(params))
