"""What GPUs and TPUs do otherwise, without one: products in fewer bits, other kernels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from battery import made
from emulated_precision import MANTISSA_BITS, products_rounded_to
from flax import nnx
from jax import export, lax
from natgrad_reference import flatten, make_mlp

import natgrad_flax as ng

LOSS = ng.SoftmaxCrossEntropy()
STRUCTURES = made(3) | {"exact in parameters": ng.Exact("parameter")}
structures = pytest.mark.parametrize("structure", STRUCTURES.values(), ids=STRUCTURES)


def problem(dtype):
    rng = np.random.default_rng(0)
    model = make_mlp((12, 24, 24, 3), 0, dtype, activation="tanh")
    y = np.eye(3)[rng.integers(0, 3, 16)]
    return model, jnp.asarray(rng.normal(size=(16, 12)), dtype), jnp.asarray(y, dtype)


def step(structure, dtype, fisher="exact", damping=1e-4):
    found = ng.natural_gradient(
        *problem(dtype),
        structure=structure,
        loss=LOSS,
        damping=damping,
        fisher=fisher,
        key=jax.random.key(0),
    )
    return flatten(found)


@pytest.mark.parametrize(
    ("structure", "bound"), [(ng.Exact(), 1e-3), (ng.BlockTriDiagonal(), 6e-3), (ng.KFAC(), 4e-3)]
)
def test_rounded_products_cost_no_more_than_the_rounded_passes(structure, bound):
    """With rounded Gram matrices and inverses, too, it would be 1.1e-3, 9e-3 and 7.6e-3."""
    with jax.enable_x64(True):
        exact = step(structure, np.float64)
    with products_rounded_to(MANTISSA_BITS["TF32"]):
        found = step(structure, np.float32)
    assert np.linalg.norm(found - exact) < bound * np.linalg.norm(exact)


def test_the_emulation_rounds_products_of_default_precision_only():
    a = jax.random.normal(jax.random.key(0), (20, 30))
    exact = np.asarray(a, np.float64) @ np.asarray(a, np.float64).T
    errors = {}
    for name, bits in MANTISSA_BITS.items():
        with products_rounded_to(bits):
            for precision in (None, "highest"):
                found = jax.jit(lambda a, p=precision: jnp.matmul(a, a.T, precision=p))(a)
                errors[name, precision] = np.linalg.norm(found - exact) / np.linalg.norm(exact)
    assert 1e-4 < errors["TF32", None] < 1e-3 < errors["bfloat16", None] < 1e-2
    assert errors["TF32", "highest"] < 1e-6
    assert errors["bfloat16", "highest"] < 1e-6


def default_products(jaxpr):
    """How many products of default precision a program has, in all of its parts."""
    count = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            count += equation.params["precision"] in (None, (lax.Precision.DEFAULT,) * 2)
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")
        ):
            inner = getattr(inner, "jaxpr", inner)
            count += default_products(inner) if hasattr(inner, "eqns") else 0
    return count


@structures
@pytest.mark.parametrize("fisher", ["exact", "mc"])
def test_only_the_passes_through_the_model_have_default_precision(structure, fisher):
    model, x, y = problem(np.float32)
    key = jax.random.key(0)
    settings = {"loss": LOSS, "fisher": fisher, "key": key}

    def passes(x, y):
        return ng.fisher_signals(model, x, y, **settings)

    def stepped(x, y):
        return ng.natural_gradient(
            model, x, y, structure=structure, damping=jnp.float32(0.1), **settings
        )

    expected = default_products(jax.make_jaxpr(passes)(x, y).jaxpr)
    assert expected >= 5
    assert default_products(jax.make_jaxpr(stepped)(x, y).jaxpr) == expected


def test_averaged_factors_are_of_full_precision_too():
    """What is left of default precision, passes and gradient, does not depend on the structure."""
    model, x, y = problem(np.float32)
    settings = {"loss": LOSS, "damping": 0.1, "average": ng.MovingAverage(every=2)}
    params = nnx.state(model)
    counts = []
    for structure in (ng.Diagonal(), ng.KFAC(), ng.EKFAC()):
        tx = ng.natural_gradient_descent(1.0, structure=structure, example=(model, x), **settings)

        def stepped(params, x, y, tx=tx):
            return tx.update(params, tx.init(params), params, module=model, x=x, y=y)

        counts.append(default_products(jax.make_jaxpr(stepped)(params, x, y).jaxpr))
    assert counts[0] == counts[1] == counts[2] > 5


@structures
def test_steps_lower_for_accelerators(structure):
    model, x, y = problem(np.float32)

    def stepped(x, y):
        return ng.natural_gradient(
            model, x, y, structure=structure, loss=LOSS, damping=jnp.float32(0.1)
        )

    lowered = export.export(jax.jit(stepped), platforms=["cuda", "tpu"])(x, y)
    assert lowered.platforms == ("cuda", "tpu")
    assert lowered.mlir_module_serialized
