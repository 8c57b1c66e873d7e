"""Numbers of rows that a table does not have are refused before a step, and no others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import natgrad_flax as ng
from natgrad_flax import devices

ROWS = 6
IDS = np.array([[0, 5, 2], [1, 3, -6]])
Y = jnp.ones((2, 2))
SETTINGS = {"structure": ng.KFAC(), "loss": ng.MeanSquaredError(), "damping": 0.1}


def looped(embed, x):
    """One position after the other."""
    return jax.lax.scan(lambda h, ids: (h + embed(ids), None), 0 * embed(x[:, 0]), x.T)[0][:, None]


LOOKED_UP = {
    "embedding": lambda embed, x: embed(x),
    "own table": lambda embed, x: embed.embedding[...][x],
    "scaled and cast": lambda embed, x: (2 * embed.embedding[...]).astype(jnp.bfloat16)[x],
    "in a loop": looped,
    "behind jit": lambda embed, x: jax.jit(lambda x: embed(x))(x),
    "of floats": lambda embed, x: embed((x + 0.0).astype(int)),
    "checkpoint": lambda embed, x: jax.checkpoint(lambda x: embed(x))(x),
}
IN_ORDER = {
    "clipped": lambda embed, x: jnp.take(embed.embedding[...], x, axis=0, mode="clip"),
    "zeros": lambda embed, x: jnp.take(embed.embedding[...], x, axis=0, fill_value=0),
    "of an own table, replaced": lambda embed, x: jnp.where(
        (x < ROWS)[..., None], embed.embedding[...][x], 0
    ),
    "replaced": lambda embed, x: jnp.where(
        (x >= -ROWS)[..., None] & (x < ROWS)[..., None], embed(x), 0
    ),
    "remainders": lambda embed, x: embed(x % ROWS),
}
"""Where the outputs show nothing of it."""


class Text(nnx.Module):
    def __init__(self, look_up):
        self.embed = nnx.Embed(ROWS, 3, rngs=nnx.Rngs(0))
        self.readout = nnx.Linear(3, 2, rngs=nnx.Rngs(1))
        self.look_up = look_up

    def __call__(self, x):
        ids = x["text"] if isinstance(x, dict) else x
        return self.readout(self.look_up(self.embed, ids).mean(axis=1).astype(jnp.float32))


def refused(where, count, value, name="x", gives="(NaN|another row)"):
    rows, more = ("1 row", "") if count == 1 else (f"{count} rows", " for one")
    return (
        rf"^{name} looks up {rows} that the table embed.embedding does not have, number {value} at "
        rf"\({where}\){more}: rows count from 0 to 5, and any other number gives {gives}$"
    )


def with_ids(*changes):
    ids = IDS.copy()
    for place, value in changes:
        ids[place] = value
    return ids


@pytest.mark.parametrize("name", LOOKED_UP)
def test_tokens_outside_of_the_vocabulary(name):
    model = Text(LOOKED_UP[name])
    with pytest.raises(ValueError, match=refused("0, 1", 2, 6)):
        ng.natural_gradient(model, with_ids(((0, 1), 6), ((1, 2), 9)), Y, **SETTINGS)


def test_what_is_in_the_table():
    """Numbers below 0 count from the end."""
    model = Text(LOOKED_UP["embedding"])
    step = ng.natural_gradient(model, IDS, Y, **SETTINGS)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(step))
    with pytest.raises(ValueError, match=refused("1, 0", 1, -7)):
        ng.natural_gradient(model, with_ids(((1, 0), -7)), Y, **SETTINGS)


@pytest.mark.parametrize("name", IN_ORDER)
def test_a_missing_row_that_leaves_no_trace(name):
    step = ng.natural_gradient(Text(IN_ORDER[name]), with_ids(((0, 1), 9)), Y, **SETTINGS)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(step))


def test_numbers_that_are_floats():
    model = Text(lambda embed, x: embed(x.astype(int)))
    with pytest.raises(ValueError, match=refused("0, 1", 1, "6.0")):
        ng.natural_gradient(model, with_ids(((0, 1), 6)).astype(np.float32), Y, **SETTINGS)


def test_a_table_that_does_not_move():
    wrt = nnx.PathContains("readout")
    with pytest.raises(ValueError, match=refused("0, 0", 1, 7)):
        ng.natural_gradient(
            Text(LOOKED_UP["embedding"]), with_ids(((0, 0), 7)), Y, wrt=wrt, **SETTINGS
        )


def test_numbers_that_the_model_computes():
    message = "^sample 1 of x leads to a row that the table embed.embedding does not have"
    with pytest.raises(ValueError, match=message):
        ng.natural_gradient(
            Text(lambda embed, x: embed(x + 3)), with_ids(((0, 1), 1), ((1, 1), 3)), Y, **SETTINGS
        )


def test_one_of_several_inputs():
    bad = {"text": with_ids(((1, 1), 8)), "mask": np.ones((2, 3), int)}
    with pytest.raises(ValueError, match=refused("1, 1", 1, 8, r"x\['text'\]")):
        ng.natural_gradient(Text(LOOKED_UP["embedding"]), bad, Y, **SETTINGS)


def test_other_entries():
    model, bad = Text(LOOKED_UP["embedding"]), with_ids(((0, 1), 6))
    with pytest.raises(ValueError, match=refused("0, 1", 1, 6, "fisher_x")):
        ng.natural_gradient(model, IDS, Y, fisher_x=bad, **SETTINGS)
    with pytest.raises(ValueError, match=refused("0, 1", 1, 6)):
        ng.fisher(model, bad, structure=ng.Exact(), loss=ng.MeanSquaredError())
    mesh = jax.make_mesh((1,), ("data",))
    with pytest.raises(ValueError, match=refused("0, 1", 1, 6)):
        devices.sharded_natural_gradient(model, bad, Y, mesh=mesh, **SETTINGS)
    tx = ng.natural_gradient_descent(0.1, **SETTINGS)
    params = nnx.state(model, nnx.Param)
    with pytest.raises(ValueError, match=refused("0, 1", 1, 6)):
        tx.update(params, tx.init(params), params, module=model, x=bad, y=Y)
