"""Parametrisations and the coordinate check: what moves as the width grows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import natgrad_flax as ng
import ntk_analysis as na
from ntk_analysis.figures_theory import draw_coordinates

LOSS = ng.MeanSquaredError()
X = np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)
Y = np.sin(3 * X[:, :2])
WIDTHS = (16, 128)


def network(parametrization: str, width: int, rngs: nnx.Rngs) -> ng.MLP:
    return ng.MLP(
        (6, width, width, 2),
        activation="tanh",
        weight_variance=1.0,
        parametrization=parametrization,
        rngs=rngs,
    )


def kfac(model: nnx.Module) -> optax.GradientTransformation:
    return ng.natural_gradient_descent(
        0.03,
        structure=ng.KFAC(split="pi"),
        loss=LOSS,
        damping=ng.RelativeDamping(0.1),
        check_samples=False,
    )


def scaled(name: str, tx: optax.GradientTransformation):
    """The rates of muP behind an optimizer, those of the smallest width being 1."""
    return lambda model: optax.chain(tx, ng.scale_by_width(model, name, base_width=WIDTHS[0]))


def check(parametrization: str, optimizer, widths=WIDTHS, y=Y, **settings) -> na.CoordinateCheck:
    make = functools.partial(network, parametrization)
    return na.coordinate_check(
        make, widths, X, y, optimizer=optimizer, loss=LOSS, **{"steps": 2, **settings}
    )


def test_kfac_moves_features_in_mup_alone() -> None:
    """M^-1/2 in the standard parametrisation, M^0 in muP (Ishikawa & Karakida 2024)."""
    standard, mup = (check(name, kfac).exponents for name in ("standard", "mup"))
    np.testing.assert_allclose(standard[:2], -0.5, atol=0.15)
    np.testing.assert_allclose(mup, 0, atol=0.15)


@pytest.mark.parametrize(
    ("name", "tx"), [("SGD", optax.sgd(0.1)), ("Shampoo", ng.shampoo(0.03))], ids=["SGD", "Shampoo"]
)
def test_rates_of_mup_move_all_layers_alike(name, tx) -> None:
    exponents = check("mup", scaled(name, tx), seeds=4).exponents
    np.testing.assert_allclose(exponents, 0, atol=0.15)


def test_features_of_ntk_parametrisation_stay_under_gradient_descent(tmp_path) -> None:
    """By M^-1/2 (Lee et al. 2019), while the outputs move as much; numbers and figure.

    Beside such targets the outputs at the start, which are random, do not count.
    """
    found = check("ntk", lambda model: optax.sgd(0.01), y=10 * Y, seeds=2)
    np.testing.assert_allclose(found.exponents, [-0.5, -0.5, 0], atol=0.15)
    assert found.changes.shape == (2, 2, 3)
    files = draw_coordinates(found, tmp_path / "coordinates", "SGD")
    assert [path.suffix for path in files] == [".png", ".svg"]
    assert "layer 3" in files[1].read_text()


def test_changes_are_root_mean_squares_over_seeds() -> None:
    """One step by hand; without a second width there is no exponent."""
    found = check("standard", lambda model: optax.sgd(0.1), (4,), steps=1, seeds=2)
    squares = []
    for seed in range(2):
        model = network("standard", 4, nnx.Rngs(seed))
        before = model.pre_activations(X)
        gradient = nnx.grad(lambda model: LOSS(model(X), jnp.asarray(Y)))(model)
        nnx.update(model, jax.tree.map(lambda p, g: p - 0.1 * g, nnx.state(model), gradient))
        after = model.pre_activations(X)
        squares.append([float(jnp.mean((u - v) ** 2)) for u, v in zip(after, before, strict=True)])
    np.testing.assert_allclose(found.changes[0, 0], np.sqrt(np.mean(squares, axis=0)), rtol=1e-4)
    assert np.isnan(found.exponents).all()


def test_one_kfac_step_from_zero_output_weights_is_ridge_regression(x64) -> None:
    """On the last features; no derivative reaches the layers before, and these stay."""
    model = ng.MLP((6, 5, 4, 2), parametrization="mup", param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    model.layers[2].kernel[...] = jnp.zeros((4, 2))
    x, y, rho = jnp.asarray(X, jnp.float64), jnp.asarray(Y, jnp.float64), 0.1
    structure = ng.KFAC(last_layer="literal")
    step = ng.natural_gradient(model, x, y, structure=structure, loss=LOSS, damping=rho)
    flat = dict(nnx.to_flat_state(step))
    hidden = [np.asarray(flat["layers", i, "kernel"][...]) for i in range(2)]
    assert not any(map(np.any, hidden))
    features = np.maximum(np.asarray(model.pre_activations(x)[1]), 0)
    ridge = np.linalg.solve(features.T @ features + 8 * rho * np.eye(4), features.T @ y)
    # the factor of the outputs is the identity, and damped, too
    np.testing.assert_allclose(-(1 + rho) * flat["layers", 2, "kernel"][...], ridge, rtol=1e-12)


def test_layers_are_drawn_as_their_powers_say() -> None:
    """N(0, v fan_in^-2b) without a factor in front, biases N(0, sigma_b^2), and NTK as ever."""
    for name, powers in {"standard": (0.5, 0.5, 0.5), "mup": (0.5, 0.5, 1.0)}.items():
        settings = {"weight_variance": 3.0, "bias_variance": 0.2, "rngs": nnx.Rngs(0)}
        model = ng.MLP((50, 40, 30, 20), parametrization=name, **settings)
        plain = ng.MLP((50, 40, 30, 20), **{**settings, "rngs": nnx.Rngs(0)})
        for layer, ntk, power in zip(model.layers, plain.layers, powers, strict=True):
            deviation = 3**0.5 * layer.in_features**-power
            np.testing.assert_allclose(layer.kernel[...], deviation * ntk.kernel[...], rtol=1e-5)
            np.testing.assert_allclose(layer.bias[...], 0.2**0.5 * ntk.bias[...], rtol=1e-5)
            assert (layer.weight_scale, layer.bias_scale) == (1, 1)
        x = jnp.ones((2, 50))
        if name == "standard":
            np.testing.assert_allclose(model(x), plain(x), rtol=1e-4)
    images = ng.ConvNet((4, 4, 2), (3,), 2, strides=1, parametrization="mup", rngs=nnx.Rngs(0))
    ntk = ng.ConvNet((4, 4, 2), (3,), 2, strides=1, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 4, 4, 2))
    np.testing.assert_allclose(images.pre_activations(x)[0], ntk.pre_activations(x)[0], rtol=1e-4)
    np.testing.assert_allclose(images(x), ntk(x) * 48**-0.5, rtol=1e-4)
    with pytest.raises(ValueError, match=r"it is not an ng.Dense in NTK parametrisation"):
        na.analytic_kernels(model, np.ones((2, 50)))


def test_rates_of_every_layer() -> None:
    model = ng.MLP((3, 4, 5, 2), bias_variance=0.1, rngs=nnx.Rngs(0))
    expected = {
        "K-FAC": ((1, 1), (1, 1), (1, 1)),
        "SGD": ((4, 4), (1, 5), (1 / 5, 2)),
        "Shampoo": ((4**0.5, 4**0.5), (1, 5**0.5), (5**-0.5, 2**0.5)),
        "FOOF": ((4, 4), (5, 5), (1, 2)),
    }
    ones = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
    for name, factors in expected.items():
        tx = ng.scale_by_width(model, name)
        flat = dict(nnx.to_flat_state(tx.update(ones, tx.init(ones))[0]))
        for layer, pair in enumerate(factors):
            for part, factor in zip(("kernel", "bias"), pair, strict=True):
                np.testing.assert_allclose(flat["layers", layer, part][...], factor, rtol=1e-6)


def sgd(model: nnx.Module) -> optax.GradientTransformation:
    return optax.sgd(0.1)


def test_bad_input() -> None:
    model = network("ntk", 4, nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"unknown parametrization 'mpu'.*Did you mean 'mup'"):
        network("mpu", 4, nnx.Rngs(0))
    with pytest.raises(ValueError, match="init_power must be None or a number"):
        ng.Dense(2, 3, init_power="half", rngs=nnx.Rngs(0))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown optimizer 'kfac'; known: K-FAC"):
        ng.scale_by_width(model, "kfac")
    with pytest.raises(ValueError, match="base_width must be an integer of at least 1"):
        ng.scale_by_width(model, "SGD", base_width=0)
    with pytest.raises(TypeError, match=r"model must be an ng.MLP or an ng.ConvNet"):
        ng.scale_by_width(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), "SGD")
    with pytest.raises(ValueError, match="no parameter other"):
        ng.scale_by_width(model, "SGD").update({"other": jnp.ones(2)}, optax.EmptyState())
    with pytest.raises(ValueError, match="widths must be positive integers in ascending order"):
        check("mup", sgd, (8, 4))
    with pytest.raises(ValueError, match="steps must be an integer of at least 1"):
        check("mup", sgd, steps=0)
    with pytest.raises(TypeError, match="know their pre-activations"):
        na.coordinate_check(
            lambda width, rngs: nnx.Linear(6, width, rngs=rngs),  # type: ignore[arg-type,return-value]
            (2,),
            X,
            Y,
            optimizer=sgd,
            loss=LOSS,
        )
