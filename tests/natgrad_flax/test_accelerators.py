"""What GPUs and TPUs do otherwise, without one: products in fewer bits, other kernels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from emulated_precision import MANTISSA_BITS, products_rounded_to
from jax import export
from natgrad_reference import flatten, make_mlp

import natgrad_flax as ng

LOSS = ng.SoftmaxCrossEntropy()
STRUCTURES = [
    ng.Exact(),
    ng.Exact(space="parameter"),
    ng.BlockDiagonal(),
    ng.BlockTriDiagonal(),
    ng.KFAC(),
    ng.EKFAC(),
    ng.UnitWise(),
    ng.Diagonal(),
    ng.QuasiDiagonal(),
]
structures = pytest.mark.parametrize("structure", STRUCTURES, ids=repr)


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


@structures
def test_rounded_products_cost_no_more_than_the_rounded_passes(structure):
    """At a damping of 1e-4 a solve of rounded Gram matrices would be off by 30 to 100 %."""
    with jax.enable_x64(True):
        exact = step(structure, np.float64)
    with products_rounded_to(MANTISSA_BITS["TF32"]):
        found = step(structure, np.float32)
    error = np.linalg.norm(found - exact) / np.linalg.norm(exact)
    print("ERR", structure.name, error)
    assert error < 0.03


@structures
@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_steps_lower_for_accelerators(structure, platform):
    model, x, y = problem(np.float32)

    def stepped(x, y):
        return ng.natural_gradient(
            model, x, y, structure=structure, loss=LOSS, damping=jnp.float32(0.1)
        )

    lowered = export.export(jax.jit(stepped), platforms=[platform])(x, y)
    assert lowered.platforms == (platform,)
    assert len(lowered.mlir_module_serialized) > 1000
