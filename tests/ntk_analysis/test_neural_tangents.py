"""neural-tangents on every supported JAX, without TensorFlow and without a trace in jax."""

from __future__ import annotations

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntk_analysis import _neural_tangents
from ntk_analysis._neural_tangents import neural_tangents, stax


def run_python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_package_imports_nothing_heavy() -> None:
    """Or every command, and ``natgrad reproduce --list``, would wait for it."""
    loaded = run_python(
        "import sys, ntk_analysis.cli, ntk_analysis.sweep\n"
        "import natgrad_flax, ntk_analysis.reproduce.karakida_osawa.figures\n"
        "print(*sorted({name.split('.')[0] for name in sys.modules}))"
    ).split()
    heavy = {"neural_tangents", "tensorflow", "tf2jax", "matplotlib", "seaborn", "pandas"}
    assert "jax" in loaded
    assert not (heavy | {"diffrax"}) & set(loaded)


LEAVES_NO_TRACE = """
import sys
import jax, jax.core, jax.extend.core, jax.interpreters.ad

def names():
    # submodules that an import brings along are not the shim's
    found = {}
    for module in (jax, jax.core, jax.interpreters.ad):
        found[module.__name__] = {
            name: value for name, value in vars(module).items()
            if f"{module.__name__}.{name}" not in sys.modules
        }
    return found

before = names()
from ntk_analysis import _neural_tangents as shim
neural_tangents = shim.neural_tangents
whole, shim._MOVED = shim._MOVED, ("Jaxpr",)
try:
    neural_tangents()
except ImportError as error:
    print(error)
left = [name for name in sys.modules if name.startswith(("neural_tangents", "jax.util"))]
assert not left, left
assert not hasattr(jax, "util")
shim._MOVED = whole
package = neural_tangents()
after = names()
assert {m: set(n) for m, n in before.items()} == {m: set(n) for m, n in after.items()}
assert all(before[m][name] is value for m in after for name, value in after[m].items())
assert "jax.util" not in sys.modules and not hasattr(jax, "util")
for module in ("tensorflow", "tf2jax", "jax.experimental.jax2tf"):
    assert module not in sys.modules, module
import neural_tangents as theirs
assert theirs is package and neural_tangents() is package
import neural_tangents.stax
import neural_tangents.experimental
assert "TensorFlow" in neural_tangents.experimental.__doc__
assert "tensorflow" not in sys.modules
print("clean")
"""


def test_jax_is_left_as_it_was_by_imports_that_fail_and_succeed() -> None:
    """The second gives the module of the user's own import."""
    # the module and our function share a name only inside this program
    code = LEAVES_NO_TRACE.replace(
        "import neural_tangents.stax", "neural_tangents = package\nimport neural_tangents.stax"
    )
    message, end = run_python(code).splitlines()
    assert message.startswith("neural-tangents cannot be imported on JAX " + jax.__version__)
    assert "is tested with neural-tangents 0.6.5 on JAX 0.10, 0.11 and 0.12" in message
    assert end == "clean"


def test_absent_package_is_an_import_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n.split(".")[0] == "neural_tangents"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "neural_tangents._src", None)
    neural_tangents.cache_clear()
    try:
        with pytest.raises(ImportError, match=r"cannot be imported on JAX .* is tested with"):
            neural_tangents()
    finally:
        neural_tangents.cache_clear()


def test_lent_names_are_taken_back_after_an_error() -> None:
    before = set(vars(jax.core)), set(vars(jax.interpreters.ad)), set(vars(jax))

    def use_and_fail() -> None:
        with _neural_tangents._lent_names():
            assert jax.core.Primitive is not None
            util = sys.modules["jax.util"]
            assert util.safe_map(abs, [-1, 2]) == [1, 2]
            util.safe_zip([1], [1, 2])

    with pytest.raises(ValueError, match="zip"):
        use_and_fail()
    assert (set(vars(jax.core)), set(vars(jax.interpreters.ad)), set(vars(jax))) == before
    assert "jax.util" not in sys.modules


@pytest.fixture(scope="module")
def network():
    layers = stax()
    return layers.serial(
        layers.Dense(64, W_std=2**0.5), layers.Relu(), layers.Dense(1, W_std=2**0.5)
    )


@pytest.fixture(scope="module")
def inputs():
    x = np.random.default_rng(0).normal(size=(6, 5))
    return jnp.asarray(x / np.linalg.norm(x, axis=1, keepdims=True), jnp.float32)


@pytest.fixture(scope="module")
def parameters(network):
    return network[0](jax.random.key(0), (-1, 5))[1]


def test_stax_kernel_and_batch(network, inputs) -> None:
    kernel = network[2](inputs, None, ("nngp", "ntk"))
    # both entries of the diagonal in closed form: q = 2 |x|^2 / M_0 is kept from layer to layer
    np.testing.assert_allclose(jnp.diagonal(kernel.nngp), 2 / 5, rtol=1e-5)
    np.testing.assert_allclose(jnp.diagonal(kernel.ntk), 4 / 5, rtol=1e-3)
    batched = neural_tangents().batch(network[2], batch_size=3)
    np.testing.assert_allclose(batched(inputs, None, "ntk"), kernel.ntk, rtol=1e-4)


def test_monte_carlo_kernel(network, inputs) -> None:
    estimate = neural_tangents().monte_carlo_kernel_fn(
        network[0], network[1], jax.random.key(1), n_samples=64
    )
    found = estimate(inputs[:2], None, "nngp")
    expected = network[2](inputs[:2], None, "nngp")
    np.testing.assert_allclose(found, expected, atol=0.2)


# the products ask for the size of a shape, which JAX 0.10 to 0.12 allow with a warning
@pytest.mark.filterwarnings("ignore:size requires ndarray:DeprecationWarning")
@pytest.mark.parametrize("kind", ["JACOBIAN_CONTRACTION", "NTK_VECTOR_PRODUCTS"])
def test_empirical_kernels(network, inputs, parameters, kind) -> None:
    nt = neural_tangents()
    jacobian = jax.jacobian(network[1])(parameters, inputs)
    rows = [np.asarray(leaf).reshape(6, -1) for leaf in jax.tree.leaves(jacobian)]
    expected = sum(row @ row.T for row in rows)
    empirical = nt.empirical_ntk_fn(network[1], implementation=nt.NtkImplementation[kind])
    np.testing.assert_allclose(empirical(inputs, None, parameters), expected, rtol=1e-4)


def test_structured_derivatives_say_that_they_do_not_work(network, inputs, parameters) -> None:
    nt = neural_tangents()
    kind = nt.NtkImplementation.STRUCTURED_DERIVATIVES
    with pytest.raises(NotImplementedError, match=r"ntk_analysis\.empirical_layer_kernels"):
        nt.empirical_ntk_fn(network[1], implementation=kind)(inputs, None, parameters)


def test_linearize_and_predict(network, inputs, parameters) -> None:
    nt = neural_tangents()
    moved = jax.tree.map(lambda leaf: 1.01 * leaf, parameters)
    linear = nt.linearize(network[1], parameters)
    step = jax.tree.map(lambda a, b: a - b, moved, parameters)
    value, slope = jax.jvp(lambda p: network[1](p, inputs), (parameters,), (step,))
    np.testing.assert_allclose(linear(moved, inputs), value + slope, rtol=1e-4, atol=1e-5)

    kernel = network[2](inputs, None, "ntk")
    y = jnp.linspace(-1, 1, 6)[:, None]
    predict = nt.predict.gradient_descent_mse(kernel, y)
    f0 = jnp.zeros((6, 1))
    rates, vectors = np.linalg.eigh(np.asarray(kernel, np.float64))
    decay = vectors @ np.diag(np.exp(-rates * 2.0 / 6)) @ vectors.T
    expected = np.asarray(y) - decay @ np.asarray(y)
    np.testing.assert_allclose(predict(2.0, f0), expected, rtol=1e-3, atol=1e-4)
