"""What models return, models that are none, and complex numbers anywhere."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fault_harness import Refused, Right, over
from fault_networks import ENTRIES, SETTINGS, Net, X, Y, kernels, plain, step, update
from flax import linen, nnx
from jax.experimental import io_callback

import natgrad_flax as ng
import ntk_analysis as na
from natgrad_flax.devices import sharded_natural_gradient
from natgrad_flax.linear import completion, deep_linear_descent, diagonal_network, references
from natgrad_flax.linear.deep_linear_moments import check_weights, moments

ROW = r"it must return \(N, C\) with N = 1: one row of outputs a sample"
ONE = r"it must return one array \(N, C\)"
FLOATING = "a Fisher needs derivatives of real floating outputs"
CONSTANT = "no derivative with respect to any parameter .* constant, or all under .*stop_gradient"
RUN = r"Net does not run on one sample, model\(x\) with x of float32 \(1, 5\): "
OUTPUTS = {
    "bool": (lambda m, x: plain(m, x) > 0, "dtype bool, but " + FLOATING),
    "integers": (lambda m, x: jnp.int32(plain(m, x)), "dtype int32, but " + FLOATING),
    "complex": (lambda m, x: plain(m, x) * 1j, FLOATING + "; return real and imaginary parts"),
    "a constant": (lambda m, x: jnp.ones((len(x), 2)), CONSTANT),
    "a constant of NumPy": (lambda m, x: np.ones((len(x), 2), np.float32), CONSTANT),
    "the inputs": (lambda m, x: x, CONSTANT),
    "all stopped": (lambda m, x: jax.lax.stop_gradient(plain(m, x)), CONSTANT),
    "a stopped trunk": (lambda m, x: jnp.sin(jax.lax.stop_gradient(m.a(x))), CONSTANT),
    "one number a sample": (lambda m, x: plain(m, x)[:, 0], r"returns shape \(1,\); " + ROW),
    "a scalar": (lambda m, x: plain(m, x).sum(), r"returns shape \(\); " + ROW),
    "no rows": (lambda m, x: plain(m, x)[:0], r"returns shape \(0, 2\); " + ROW),
    "two rows": (lambda m, x: jnp.tile(plain(m, x), (2, 1)), r"shape \(2, 2\); " + ROW),
    "a dictionary": (lambda m, x: {"logits": plain(m, x)}, "returns a dict of 'logits'; " + ONE),
    "a tuple": (lambda m, x: (plain(m, x), 1), "returns a tuple of 2; " + ONE),
    "None": (lambda m, x: None, "returns a NoneType; " + ONE),
    "a Python number": (lambda m, x: 1.0, "returns a float; " + ONE),
    "a parameter": (lambda m, x: m.b.kernel, "returns a Param; " + ONE),
    "another argument": (lambda m, x: plain(m, x, True), RUN + "TypeError: plain"),
    "a branch on values": (lambda m, x: x if x.sum() > 0 else -x, RUN + "TracerBool"),
    "NumPy inside": (lambda m, x: np.asarray(x), RUN + "TracerArrayConversionError"),
    "an error of its own": (lambda m, x: {}["w"], RUN + "KeyError: 'w'"),
}
OUTPUT_CASES = {
    f"{entry}: {name}": (lambda e=entry, f=forward: ENTRIES[e](Net(f)), Refused(says))
    for name, (forward, says) in OUTPUTS.items()
    for entry in ENTRIES
}


@over(OUTPUT_CASES)
def test_outputs_that_are_refused(run, answer):
    answer.check(run)


def on_the_host(function, a, **settings):
    return jax.pure_callback(function, jax.ShapeDtypeStruct(a.shape, a.dtype), a, **settings)


@jax.custom_jvp
def ruled(h):
    """A tanh of NumPy's."""
    return on_the_host(np.tanh, h, vmap_method="sequential")


@ruled.defjvp
def _(primals, tangents):
    h = ruled(*primals)
    return h, (1 - h**2) * tangents[0]


def logs(m, x, **settings):
    """Shows activations to the host on their way."""
    io_callback(lambda a: None, None, m.a(x), **settings)
    return plain(m, x)


def speaks(m, x):
    h = m.a(x)
    jax.debug.callback(lambda a: None, h)
    return m.b(jnp.tanh(h))


DERIVATIVES = (
    "the outputs of Net have no derivatives that JAX finds by reverse mode for each sample "
)
PROGRAMS = {
    "a callback on activations": (
        lambda m, x: m.b(on_the_host(np.tanh, m.a(x), vmap_method="sequential")),
        Refused(DERIVATIVES + ".*use `jax.custom_jvp`"),
    ),
    "a callback on a batch": (
        lambda m, x: plain(m, on_the_host(np.copy, x)),
        Refused(DERIVATIVES + ".*vmap_method"),
    ),
    "activations for a log": (logs, Refused(DERIVATIVES + ".*IO callbacks do not support JVP")),
    "an order of calls": (
        lambda m, x: logs(m, jax.lax.stop_gradient(x), ordered=True),
        Refused(DERIVATIVES),
    ),
    "a loop of unknown length": (
        lambda m, x: m.b(jax.lax.while_loop(lambda h: h.sum() < 1, lambda h: h + 1, m.a(x))),
        Refused(DERIVATIVES + ".*lax.while_loop"),
    ),
    "a callback on inputs": (
        lambda m, x: plain(m, on_the_host(np.copy, x, vmap_method="sequential")),
        AS_PLAIN := Right(lambda: update(Net()), 1e-5),
    ),
    "a callback with a rule": (lambda m, x: m.b(ruled(m.a(x))), AS_PLAIN),
    "a debugger": (speaks, AS_PLAIN),
}


@over({name: (lambda f=f: update(Net(f)), answer) for name, (f, answer) in PROGRAMS.items()})
def test_programs_that_call_the_host_or_cannot_be_differentiated(run, answer):
    answer.check(run)


@dataclasses.dataclass
class Config:
    """A user's settings, which cannot be hashed."""

    sizes: list


class Linen(linen.Module):
    """The network of Net in linen."""

    @linen.compact
    def __call__(self, x):
        return linen.Dense(2, name="b")(jnp.tanh(linen.Dense(3, name="a")(x)))


MODELS = {
    "a function": (
        lambda x: x,
        r"got a function: .* a function f\(params, x\) .* by ng.from_function",
    ),
    "a linen module": (Linen(), r"got a Linen: .* ng.from_linen\(module, variables\)"),
    "a class": (Net, "got the class Net: make an instance"),
    "an array": (X, "got a ndarray"),
    "text": ("mlp", "got a str"),
    "a state": (nnx.state(Net()), "got a State"),
}
MODEL_CASES = {
    f"{entry}: {name}": (
        lambda e=entry, m=model: ENTRIES[e](m),
        Refused(r"model must be a flax\.nnx\.Module, " + says),
    )
    for name, (model, says) in MODELS.items()
    for entry in ENTRIES
    if (entry, name) != ("optimizer", "a function")  # there it returns the model
} | {
    "a function that returns none": (
        lambda: step(lambda: 3),
        Refused("model must be a flax.nnx.Module, got a int"),
    ),
    "shapes of a model": (
        lambda: update(nnx.eval_shape(Net)),
        Refused("the parameters at .* are a shape without values"),
    ),
    "a filter that is none": (lambda: update(Net(), wrt={}), Refused("wrt must be a filter")),
    "a number for a filter": (lambda: update(Net(), wrt=[3]), Refused("wrt must be a filter")),
}


@over(MODEL_CASES)
def test_models_that_are_none(run, answer):
    answer.check(run)


def stopped(model, x):
    """A trunk under stop_gradient, which stays where it is."""
    return model.b(jax.lax.stop_gradient(jnp.tanh(model.a(x))))


def test_models_that_cannot_be_hashed(capfd):
    """Lists, dictionaries and data classes as attributes, a list for a filter, and prints."""

    def speak(model, x):
        print("traced")
        jax.debug.print("ran")
        return plain(model, x)

    expected = update(Net())

    def make():
        return Net(
            speak, sizes=nnx.static([3, 2]), named=nnx.static({"a": [1]}), config=Config([3])
        )

    with pytest.raises(TypeError, match="unhashable"):
        hash(nnx.split(make())[0])
    Right(expected, 1e-6).check(lambda: update(make(), wrt=[nnx.Param, nnx.BatchStat]))
    captured = capfd.readouterr().out
    assert "traced" in captured
    assert "ran" in captured
    update(make(), wrt=[nnx.Param, nnx.BatchStat])
    assert "traced" not in capfd.readouterr().out, "another object of equal settings compiles anew"
    mesh = jax.make_mesh((1,), ("data",))
    Right(expected, 1e-4).check(
        lambda: sharded_natural_gradient(make(), X, Y, mesh=mesh, **SETTINGS)
    )


def test_linen_by_the_bridge_of_flax():
    """The same network, with the parameters of the other; kernels add up over what moves alone."""
    model = nnx.bridge.ToNNX(Linen(), rngs=nnx.Rngs(0)).lazy_init(X)
    other = Net()
    for name in ("a", "b"):
        for part in ("kernel", "bias"):
            getattr(model, name)[part][...] = getattr(getattr(other, name), part)[...]
    found, wanted = sum(map(np.asarray, kernels(model))), sum(map(np.asarray, kernels(other)))
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_a_stopped_trunk_does_not_move():
    signals = ng.jacobian_signals(Net(stopped), X)
    assert not np.asarray(signals.layers[0].gram()).any()
    np.testing.assert_allclose(signals.layers[1].gram(), kernels(Net())[1], rtol=1e-5)


# complex numbers


def inside(model, x):
    """Real outputs of real parameters, complex in between: |W (1 + i) x|^2 + Re and Im."""
    h = model.a(x * (1 + 0.5j))
    return model.b(jnp.real(h) * jnp.imag(h))


def test_complex_numbers_inside_of_a_network():
    """A formula for real layers would drop the imaginary parts; explicit blocks do not."""
    graphdef, state = nnx.split(Net())
    rows = jax.jacobian(lambda state: inside(nnx.merge(graphdef, state), X))(state)
    flat = [np.asarray(leaf).reshape(8, -1) for leaf in jax.tree.leaves(rows)]
    found = sum(map(np.asarray, kernels(Net(inside))))
    np.testing.assert_allclose(found, sum(a @ a.T for a in flat), rtol=1e-4, atol=1e-5)
    reasons = [layer.reason for layer in ng.describe(Net(inside), X).layers]
    assert reasons == [*["used by a cast to complex64"] * 2, ""]
    assert [layer.formula for layer in ng.describe(Net(stopped), X).layers] == ["dense (a, D)"] * 2


class Complex(nnx.Module):
    """Complex parameters and real outputs."""

    def __init__(self):
        self.w = nnx.Param(jnp.ones((5, 2)) * (1 + 1j))

    def __call__(self, x):
        return jnp.abs(x @ self.w[...])


Z = X * (1 + 1j)
LABELS = np.array([1, -1, 1, -1])
SIGNS = np.array([[1.0, 0.5, 2, 1, 1], [1, 1, 1, 1, 2]], np.float32)
MASK = np.ones((4, 5), bool)
REAL = "only real numbers are served here"


def linear_step(x=X, y=Y):
    model = ng.MLP((5, 3, 2), activation="identity", rngs=nnx.Rngs(0))
    params, tx = nnx.state(model, nnx.Param), deep_linear_descent(0.1, damping=0.1)
    return tx.update(params, tx.init(params), params, module=model, x=x, y=y)


COMPLEX_CASES = {
    **{
        f"{entry}: parameters": (
            lambda e=entry: ENTRIES[e](Complex()),
            Refused("chooses w of dtype complex64, but only floating parameters can move"),
        )
        for entry in ("natural_gradient", "describe", "jacobian_signals", "optimal_learning_rate")
    },
    **{
        f"{entry}: inputs": (lambda e=entry: ENTRIES[e](Net(), Z), Refused("x has dtype complex64"))
        for entry in ENTRIES
    },
    "kernels of parameters": (lambda: na.empirical_layer_kernels(Complex(), X), Refused("complex")),
    "kernels of inputs": (lambda: na.empirical_layer_kernels(Net(), Z), Refused("complex64")),
    "kernels of outputs": (
        lambda: na.empirical_layer_kernels(Net(lambda m, x: plain(m, x) * 1j), X),
        Refused(FLOATING),
    ),
    "targets": (lambda: update(Net(), y=Y * 1j), Refused("y must be floating.*complex64")),
    "targets of the optimizer": (lambda: step(Net(), y=Y * 1j), Refused("y must be floating")),
    "the Fisher's inputs": (lambda: update(Net(), fisher_x=Z), Refused("fisher_x has dtype")),
    "the Fisher's targets": (
        lambda: update(Net(), fisher="empirical", fisher_x=X, fisher_y=Y * 1j),
        Refused("fisher_y must be floating targets"),
    ),
    "sigma": (lambda: ng.LayerWise(np.eye(2) * (1 + 1j)), Refused("sigma has dtype complex")),
    "deep linear inputs": (lambda: linear_step(x=Z), Refused("x has dtype complex64")),
    "deep linear integers": (lambda: linear_step(x=X.astype(int)), Refused("x must be a floating")),
    "deep linear trees": (
        lambda: linear_step(x={"x": X}),
        Refused("takes one array, got x as a dict"),
    ),
    "deep linear moments": (lambda: moments(X, Z), Refused("y has dtype complex64")),
    "a covariance": (lambda: moments(X, Y, np.eye(2) * 1j), Refused("output_covariance has dtype")),
    "factors": (lambda: check_weights([Z.T, Z], moments(X, X)), Refused("W_1 has dtype complex")),
    "data of a diagonal network": (
        lambda: diagonal_network.gradient_field(Z, LABELS),
        Refused("x has dtype complex64"),
    ),
    "weights of a diagonal network": (
        lambda: diagonal_network.natural_gradient(X, LABELS, SIGNS * 1j),
        Refused("weights must be a floating array, got dtype complex64"),
    ),
    "a margin": (lambda: references.max_margin(Z, LABELS), Refused(REAL)),
    "a separation": (lambda: references.separation(Z, LABELS), Refused(REAL)),
    "least squares": (lambda: references.least_squares(Z, LABELS), Refused(REAL)),
    "support vectors": (lambda: references.all_support_vectors(Z, LABELS), Refused(REAL)),
    "where a flow starts": (
        lambda: references.natural_gradient_limit(X, LABELS, np.ones(5) * 1j),
        Refused("start has dtype complex128"),
    ),
    "an accuracy": (
        lambda: references.gaussian_accuracy(np.ones(3), np.ones(3) * 1j),
        Refused("truth has dtype complex128"),
    ),
    "text for an accuracy": (
        lambda: references.gaussian_accuracy(np.array(["a"]), np.ones(1)),
        Refused("coefficients must be an array of numbers"),
    ),
    "observations": (
        lambda: references.min_nuclear_norm(Z, MASK),
        Refused("target must be a floating array, got dtype complex64"),
    ),
    "an effective rank": (
        lambda: completion.effective_rank(Z),
        Refused("matrix has dtype complex"),
    ),
}


@over(COMPLEX_CASES)
def test_complex_numbers_are_refused(run, answer):
    answer.check(run)
