"""What describe says of a model, against the signals themselves and XLA's own counts."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import natgrad_flax as ng


class Mixed(nnx.Module):
    """A layer of each kind, and parameters without a formula for every reason."""

    def __init__(self):
        rngs = nnx.Rngs(jax.random.key(0, impl="rbg"))
        self.conv = nnx.Conv(2, 4, (3, 3), feature_group_count=2, rngs=rngs)
        self.norm = nnx.LayerNorm(4, rngs=rngs)
        self.tokens = nnx.Linear(4, 8, use_bias=False, rngs=rngs)
        self.gain = nnx.Param(jnp.ones(8))
        self.tied = nnx.Linear(8, 8, rngs=rngs)
        self.remat = nnx.Linear(8, 8, rngs=rngs)
        self.changed = nnx.SpectralNorm(nnx.Linear(8, 8, rngs=rngs), rngs=rngs)
        self.readout = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        x = self.norm(self.conv(x)).reshape(len(x), -1, 4)
        x = (self.tokens(x) * self.gain[...]).mean(1)
        x = self.tied(x) @ self.tied.kernel[...].T
        x = nnx.remat(lambda layer, x: layer(x))(self.remat, x)
        return self.readout(jnp.tanh(self.changed(x, update_stats=False)))


MIXED = nnx.eval_shape(Mixed)
X = jax.ShapeDtypeStruct((5, 4, 4, 2), jnp.float32)


def described(**settings):
    description = ng.describe(MIXED, X, **settings)
    return description, {layer.path: layer for layer in description.layers}


def test_every_layer_with_its_formula_and_its_reason():
    description, layers = described()
    assert layers["conv"].formula == "shared (a, D)"
    assert (layers["conv"].positions, layers["conv"].groups) == (16, 2)
    assert (layers["conv"].fan_in, layers["conv"].units) == (10, 4)
    assert layers["conv"].parameters == (("kernel", (3, 3, 1, 4)), ("bias", (4,)))
    assert layers["norm"].formula == "explicit block"
    assert layers["readout"].formula == "dense (a, D)"
    assert next(a.formula for a in description.layers if a.path == "tied") == "tied (a, D)"
    reasons = {f"{a.path}.{a.parameters[0][0]}": a.reason for a in description.layers if a.reason}
    assert reasons == {
        "norm.scale": "scales or shifts features",
        "(root).gain": "scales or shifts features",
        "tied.bias": "added to products that are not all of one layer",
        "changed.layer_instance.kernel": "weights that are also used by div",
        "changed.layer_instance.bias": "scales or shifts features",
    }
    total = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(MIXED, nnx.Param)))
    assert description.num_params == total
    text = str(description)
    for layer in description.layers:
        assert layer.path in text
    assert max(map(len, text.splitlines())) < 140
    assert "&lt;" not in text
    assert description._repr_html_().startswith("<pre> layer")


def test_sizes_and_flops_are_those_of_the_signals():
    """Bytes exactly; the flops of Gram matrices against XLA's count of the lowered program."""
    model = nnx.eval_shape(
        lambda: ng.ConvNet((8, 8, 3), (6, 12), 4, strides=2, bias_variance=0.1, rngs=nnx.Rngs(0))
    )
    x = jax.ShapeDtypeStruct((6, 8, 8, 3), jnp.float32)
    description = ng.describe(model, x, fisher="exact")
    graphdef, state = nnx.split(model)
    signals = jax.eval_shape(
        lambda state, x: ng.jacobian_signals(nnx.merge(graphdef, state), x), state, x
    )
    assert description.num_directions == 4
    for said, layer in zip(description.layers, signals.layers, strict=True):
        assert said.signals == sum(4 * leaf.size for leaf in jax.tree.leaves(layer))
        counted = jax.jit(lambda layer: layer.gram()).lower(layer).cost_analysis()["flops"]
        assert said.gram_flops == pytest.approx(counted, rel=0.15)
        assert said.num_params == layer.num_params
    assert [layer.gram_by for layer in description.layers] == [
        "Jacobians",
        "pairs of positions",
        "inputs and units",
    ]


FORMS = {
    ng.KFAC(): ("Kronecker, expand", "exact block a unit", "Kronecker"),
    ng.KFAC(sharing="reduce"): ("Kronecker, reduce", "exact block a unit", "Kronecker"),
    ng.EKFAC(): ("Kronecker, expand eigenbasis", "exact block a unit", "Kronecker eigenbasis"),
    ng.Exact(): ("exact, by Jacobians", "exact, by Jacobians", "exact, by inputs and units"),
    ng.BlockDiagonal(): ("exact block, by Jacobians", None, "exact block, by inputs and units"),
    ng.BlockTriDiagonal(): ("exact, coupled, by Jacobians", None, None),
    ng.BlockDiagonal("parameter"): ("exact block, P x P",) * 3,
    ng.UnitWise(): ("exact block a unit",) * 3,
    ng.Diagonal(): ("diagonal",) * 3,
    ng.QuasiDiagonal(): ("diagonal and row of the bias, a unit",) * 3,
}


@pytest.mark.parametrize("structure", FORMS, ids=str)
def test_what_a_structure_makes_of_each_layer(structure):
    description, layers = described(structure=structure, fisher="exact")
    forms = [layers[name].approximation for name in ("conv", "norm", "readout")]
    for made, form in zip(forms, FORMS[structure], strict=True):
        assert form is None or made.form == form
        assert made.held > 0
        assert made.flops > 0
    assert (description.system is not None) == isinstance(
        structure, (ng.Exact, ng.BlockTriDiagonal)
    )
    assert structure.name in str(description)


def test_seeds_and_filters():
    loss = ng.SoftmaxCrossEntropy()
    assert described(fisher="exact", loss=loss)[0].num_directions == 2
    assert described(fisher="mc", mc_samples=3)[0].num_directions == 3
    assert described(fisher="empirical")[0].num_directions == 1
    readout = nnx.All(nnx.Param, nnx.PathContains("readout"))
    description, _ = described(wrt=readout)
    (layer,) = description.layers
    assert layer.path == "readout"
    assert ("conv.kernel", (3, 3, 1, 4)) in description.left_out
    assert "left out by wrt: " in str(description)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"structure": ng.KFAC}, TypeError, r"write KFAC\(\)"),
        ({"loss": "mse"}, TypeError, "loss must be one of"),
        ({"fisher": "true"}, ValueError, "exact, mc, empirical, improved"),
        ({"mc_samples": 0}, ValueError, "mc_samples"),
        ({"wrt": nnx.LoRAParam}, ValueError, "no parameters for wrt=<class 'flax.nnx.*LoRAParam'>"),
        ({"wrt": "kernel"}, ValueError, "no parameters"),
    ],
)
def test_bad_input(settings, error, message):
    with pytest.raises(error, match=message):
        described(**settings)


TEXTS = "\n".join(
    (Path(__file__).parents[3] / name).read_text(encoding="utf-8")
    for name in ("README.md", "docs/guides/models.md", "docs/guides/mini-batches.md")
)


@pytest.fixture
def quick_compilation():
    """The programs run for a few steps: compiling is what costs."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def block(mark):
    """An example of the README or the guides."""
    return re.search(rf"<!-- {mark} -->\n```python\n(.*?)```", TEXTS, re.DOTALL)[1]


def examples_scope():
    """What the examples below the training loop find: its step, a batch and a loss."""
    x = jax.random.normal(jax.random.key(0, impl="rbg"), (16, 32, 32, 3))
    scope = {"jax": jax, "ng": ng, "nnx": nnx, "x": x, "y": jnp.eye(10)[jnp.arange(16) % 10]}
    scope["loss"] = ng.SoftmaxCrossEntropy()
    exec("@nnx.jit" + block("training loop").split("@nnx.jit")[1].split("\n\n")[0], scope)
    return scope


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("name", ["stock ConvNet", "stock transformer"])
def test_examples(name, capsys):
    """Each example is below 20 lines, runs after the training loop, and every loss falls."""
    code = block(name)
    assert len(code.strip().splitlines()) < 20
    exec(code, examples_scope())
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    for structure in ("KFAC", "Exact"):
        losses = [float(value) for who, value in lines if who == structure]
        assert len(losses) == 10
        assert losses[-1] < 0.9 * losses[0]


@pytest.mark.usefixtures("quick_compilation")
def test_examples_on_mini_batches_and_devices(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope = examples_scope()
    exec(block("stock ConvNet").split("\nloss")[0], scope)
    exec(block("mini-batches"), scope)
    losses = [float(line.split()[1]) for line in capsys.readouterr().out.splitlines()]
    assert losses[-1] < 0.9 * losses[0]
    assert (tmp_path / "run" / "10").is_dir()
    exec(block("devices"), scope)
    assert isinstance(scope["structure"], scope["devices"].Sharded)
    alone = ng.natural_gradient(
        scope["model"],
        scope["x"],
        scope["y"],
        structure=ng.Exact(),
        loss=scope["loss"],
        damping=0.1,
    )
    for ours, one in zip(jax.tree.leaves(scope["update"]), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(ours, one, rtol=1e-4, atol=1e-5 * float(jnp.abs(one).max()))


def test_table_of_the_guide():
    """It is what describe says of the transformer of the guide."""
    source = block("stock transformer")
    scope = {"jax": jax, "ng": ng, "nnx": nnx, "jnp": jnp}
    exec(source.split("\nfor structure")[0], scope)
    model = nnx.eval_shape(lambda: scope["Transformer"](nnx.Rngs(0)))
    x = jax.ShapeDtypeStruct((64, 32, 32, 3), jnp.float32)
    said = str(ng.describe(model, x, structure=ng.KFAC()))
    assert said in TEXTS
