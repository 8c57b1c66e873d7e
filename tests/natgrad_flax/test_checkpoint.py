"""A run that goes on from a checkpoint is the run that was never interrupted, bit for bit."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import natgrad_flax as ng
from natgrad_flax import checkpoint, devices

LOSS = ng.SoftmaxCrossEntropy()
X = jax.random.normal(jax.random.key(1), (8, 4))
Y = jax.nn.one_hot(jnp.arange(8) % 3, 3)


def new_run(widths=(4, 5, 3)):
    model = ng.MLP(widths, bias_variance=0.1, rngs=nnx.Rngs(0))
    transformation = ng.natural_gradient_descent(
        0.5, structure=ng.KFAC(), loss=LOSS, damping=ng.LevenbergMarquardt(), fisher="mc"
    )
    return model, nnx.Optimizer(model, transformation, wrt=nnx.Param)


@nnx.jit
def update(model, optimizer):
    optimizer.update(model, nnx.state(model, nnx.Param), module=model, x=X, y=Y)


def numbers(tree):
    leaves = jax.tree.leaves(nnx.state(tree))
    is_key = lambda leaf: jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)  # noqa: E731
    return [np.asarray(jax.random.key_data(leaf) if is_key(leaf) else leaf) for leaf in leaves]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with checkpoints of the steps 1 and 2, and the run after step 4."""
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    model, optimizer = new_run()
    for step in range(1, 5):
        update(model, optimizer)
        if step < 3:
            place = checkpoint.save(
                folder,
                model,
                optimizer,
                structure=ng.KFAC(),
                step=step,
                settings={"learning_rate": 0.5},
            )
            assert place == folder / str(step)
    return folder, model, optimizer


def restore(folder, model, optimizer, structure=None, rate=0.5, **rest):
    return checkpoint.restore(
        folder,
        model,
        optimizer,
        structure=structure or ng.KFAC(),
        settings={"learning_rate": rate},
        **rest,
    )


@pytest.mark.parametrize("step", [None, 1])
def test_a_restored_run_goes_on_bit_for_bit(saved, step):
    folder, model, optimizer = saved
    again, state = new_run()
    same, found = restore(folder, again, state, step=step)
    assert same is state
    assert found == (step or 2)
    for _ in range(4 - found):
        update(again, state)
    for here, there in ((again, model), (state, optimizer)):
        for a, b in zip(numbers(here), numbers(there), strict=True):
            np.testing.assert_array_equal(a, b)


def test_without_its_key_the_run_would_be_another_one(saved):
    folder, model, _ = saved
    again, state = new_run()
    restore(folder, again, state)
    state.opt_state.key.set_value(jax.random.key(1))
    for _ in range(2):
        update(again, state)
    assert np.abs(numbers(again)[1] - numbers(model)[1]).max() > 1e-4


def test_the_state_of_a_plain_transformation_is_returned(tmp_path):
    model, _ = new_run()
    transformation = optax.adam(1e-3)
    state = transformation.init(nnx.state(model, nnx.Param))
    marked = jax.tree.map(lambda leaf: leaf + 1, state)
    checkpoint.save(tmp_path, model, marked, structure=ng.Exact(), step=7)
    found, step = checkpoint.restore(tmp_path, model, state, structure=ng.Exact())
    assert step == 7
    assert jax.tree.structure(found) == jax.tree.structure(marked)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(marked), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_run_may_go_on_with_other_devices(saved):
    folder, *_ = saved
    mesh = jax.make_mesh((1,), ("data",))
    model, optimizer = new_run()
    for tree in (model, optimizer):
        nnx.update(tree, devices.replicate(mesh, nnx.state(tree)))
    restore(folder, model, optimizer, devices.Sharded(ng.KFAC(), mesh))
    for leaf in jax.tree.leaves(nnx.state(model)):
        assert isinstance(leaf.sharding, jax.sharding.NamedSharding)


def test_only_the_newest_are_kept(tmp_path):
    model, optimizer = new_run()
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, model, optimizer, structure=ng.KFAC(), step=step, keep=2)
    # what a killed process leaves behind is not a checkpoint
    (tmp_path / "9.orbax-checkpoint-tmp-0").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 1, only of steps \[2, 3\]"):
        checkpoint.restore(tmp_path, model, optimizer, structure=ng.KFAC(), step=1)
    assert checkpoint.restore(tmp_path, model, optimizer, structure=ng.KFAC())[1] == 3
    with pytest.raises(ValueError, match="3 is there already"):
        checkpoint.save(tmp_path, model, optimizer, structure=ng.KFAC(), step=3)


def test_another_run_is_refused(saved, tmp_path):
    folder, *_ = saved
    model, optimizer = new_run()
    before = numbers(model)
    with pytest.raises(ValueError, match=r"is of a run with KFAC\(.*, not Exact\("):
        restore(folder, model, optimizer, ng.Exact())
    with pytest.raises(ValueError, match=r"with KFAC\(last_layer='scaled'.* not KFAC\(last_layer="):
        restore(folder, model, optimizer, ng.KFAC(last_layer="literal"))
    with pytest.raises(ValueError, match=r"with learning_rate = 0.5, and here it is 0.1"):
        restore(folder, model, optimizer, rate=0.1)
    with pytest.raises(ValueError, match=r"learning_rate = 0\.5, and here it is not set"):
        checkpoint.restore(folder, model, optimizer, structure=ng.KFAC())
    with pytest.raises(ValueError, match=r"another model or optimizer: model.* is float32\[5"):
        restore(folder, *new_run((4, 6, 3)))
    with pytest.raises(ValueError, match=r"another model or optimizer: optimizer.*absent"):
        restore(folder, model, optax.adam(0.1).init(nnx.state(model, nnx.Param)))
    with pytest.raises(FileNotFoundError, match="is not there, so no run can go on"):
        restore(tmp_path / "none", model, optimizer)
    with pytest.raises(FileNotFoundError, match="has no checkpoint, none at all"):
        restore(tmp_path, model, optimizer)
    for a, b in zip(numbers(model), before, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"format": 1}', "has form 1 of a checkpoint, and this natgrad reads form 2"),
        ("{}", "is not a whole checkpoint of natgrad"),
        ("{", "is not a whole checkpoint of natgrad"),
        (None, "is not a whole checkpoint of natgrad"),
    ],
)
def test_other_versions_and_damaged_checkpoints_are_refused(tmp_path, text, words):
    model, optimizer = new_run()
    place = checkpoint.save(tmp_path, model, optimizer, structure=ng.KFAC(), step=1)
    description = place / "description" / "metadata"
    assert json.loads(description.read_text())["format"] == checkpoint.FORMAT
    if text is None:
        description.unlink()
    else:
        description.write_text(text)
    with pytest.raises(ValueError, match=words):
        checkpoint.restore(tmp_path, model, optimizer, structure=ng.KFAC())


def test_bad_arguments(tmp_path):
    model, optimizer = new_run()
    with pytest.raises(ValueError, match="step must be an integer of at least 0"):
        checkpoint.save(tmp_path, model, optimizer, structure=ng.KFAC(), step=-1)
    with pytest.raises(ValueError, match="keep must be an integer of at least 1"):
        checkpoint.save(tmp_path, model, optimizer, structure=ng.KFAC(), step=1, keep=0)
    with pytest.raises(TypeError, match="structure must be one of"):
        checkpoint.save(tmp_path, model, optimizer, structure="K-FAC", step=1)
    with pytest.raises(TypeError, match="a checkpoint holds arrays only"):
        checkpoint.save(tmp_path, model, {"rate": 0.1}, structure=ng.KFAC(), step=1)
    assert not list(tmp_path.iterdir())
