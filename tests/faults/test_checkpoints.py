"""Checkpoints that are damaged, of another run, or given what they cannot hold."""

import gc
import shutil
import tempfile
import warnings
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from fault_harness import Refused, Right, Warned, over
from flax import nnx

import natgrad_flax as ng
from natgrad_flax import checkpoint

# coroutines of orbax that end with an error, whenever they are collected
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
STRUCTURE = ng.KFAC()
ANY = (ValueError, TypeError, OSError)


@pytest.fixture(scope="module", autouse=True)
def collected():
    """Leaves no such coroutine to the tests of other files."""
    yield
    gc.collect()


def new_run():
    """A model and the state of an optimizer; an array of each is larger than orbax keeps inline."""
    return ng.MLP((8, 64, 3), rngs=nnx.Rngs(0)), {"momentum": jnp.zeros((40, 40)), "count": 0 * X}


X = np.float32([1, 2])


@cache
def saved() -> tuple[Path, dict[int, list[np.ndarray]]]:
    """A folder with the steps 1 and 2, and what each of them holds."""
    folder, values = Path(tempfile.mkdtemp()) / "run", {}
    for step in (1, 2):
        model, state = new_run()
        rng = np.random.default_rng(step)
        nnx.update(model, jax.tree.map(partial(jnp.add, step), nnx.state(model)))
        state["momentum"] = jnp.asarray(rng.normal(size=(40, 40)), jnp.float32)
        state["count"] = state["count"] + step
        checkpoint.save(folder, model, state, structure=STRUCTURE, step=step)
        values[step] = numbers(model, state)
    return folder, values


def numbers(model, state):
    return [np.asarray(leaf) for leaf in jax.tree.leaves((nnx.state(model), state))]


def restored(*harms, again=False, **options):
    """What `restore` reads after the harms were done to a copy of the folder."""
    with tempfile.TemporaryDirectory() as copy:
        folder = Path(shutil.copytree(saved()[0], Path(copy) / "run"))
        for harm in harms:
            harm(folder)
        model, state = new_run()
        state, step = checkpoint.restore(folder, model, state, structure=STRUCTURE, **options)
        if again:
            # a run that goes on saves the step that was damaged once more, and finds it
            checkpoint.save(folder, model, state, structure=STRUCTURE, step=step + 1)
            model, state = new_run()
            state, found = checkpoint.restore(folder, model, state, structure=STRUCTURE)
            assert found == step + 1
        return numbers(model, state)


def flip(pattern, where, bit=0, step=2):
    """Flips a bit of the largest file that matches, at a fraction of its length."""

    def harm(folder):
        path = largest(folder / str(step), pattern)
        content = bytearray(path.read_bytes())
        content[int(where * (len(content) - 1))] ^= 1 << bit
        path.write_bytes(content)

    return harm


def largest(folder, pattern):
    return max(folder.glob(pattern), key=lambda path: path.stat().st_size)


def write(pattern, content, step=2):
    return lambda folder: largest(folder / str(step), pattern).write_bytes(content)


def cut(pattern, step=2):
    def harm(folder):
        path = largest(folder / str(step), pattern)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return harm


def remove(name, step=2):
    def harm(folder):
        path = folder / str(step) / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return harm


DATA, DESCRIPTION = "arrays/**/d/*", "description/metadata"


def step_before(*harms, **options):
    """The newest step is damaged: the one before it, and a sentence."""
    says = r"run/2 is not a whole checkpoint of natgrad: .*the run goes on from step 1"
    return partial(restored, *harms, **options), Warned(says, Right(lambda: saved()[1][1], 0.0))


NOT_WHOLE = r"run/2 is not a whole checkpoint of natgrad"
DAMAGED = {
    **{
        f"a flipped bit in the data at {where:.0%}": step_before(flip(DATA, where, bit))
        for bit, where in enumerate((0.03, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7))
    },
    **{
        f"a flipped bit in the description at {where:.0%}": step_before(flip(DESCRIPTION, where, 2))
        for where in (0.0, 0.1, 0.3, 0.5, 0.7, 0.9)
    },
    "data cut": step_before(cut(DATA)),
    "data empty": step_before(write(DATA, b"")),
    "data of zeros": step_before(write(DATA, b"\0" * 8192)),
    "no data": step_before(remove("arrays")),
    "no manifest": step_before(remove("arrays/manifest.ocdbt")),
    "metadata of the arrays cut": step_before(cut("arrays/_METADATA")),
    "metadata of the arrays empty": step_before(write("arrays/_METADATA", b"")),
    "metadata of the arrays not text": step_before(write("arrays/_METADATA", b"\xff\xfe")),
    "metadata of the arrays a list": step_before(write("arrays/_METADATA", b"[]")),
    "description cut": step_before(cut(DESCRIPTION)),
    "description gone": step_before(remove(DESCRIPTION)),
    "description a list": step_before(write(DESCRIPTION, b"[1, 2]")),
    "description null": step_before(write(DESCRIPTION, b"null")),
    "description nested too deep": step_before(write(DESCRIPTION, b"[" * 100_000)),
    "description a number in quotes": step_before(write(DESCRIPTION, b'{"format": "2"}')),
    "description of this form alone": step_before(write(DESCRIPTION, b'{"format": 2}')),
    "an empty folder": step_before(lambda f: shutil.rmtree(f / "2"), lambda f: (f / "2").mkdir()),
    "saved again": (
        partial(restored, flip(DATA, 0.5), again=True),
        Warned("the damaged one is now 2.damaged-1", Right(lambda: saved()[1][1], 0.0)),
    ),
    "damaged once more": step_before(lambda f: (f / "2.damaged-1").mkdir(), flip(DATA, 0.5)),
    "the damaged one by name": (
        partial(restored, flip(DATA, 0.5), step=2), Refused(f"{NOT_WHOLE}.* SHA-256"),
    ),
    "all damaged": (
        partial(restored, flip(DATA, 0.5), flip(DATA, 0.4, step=1)),
        Refused(NOT_WHOLE + r".*nor is any of steps \[1\]"),
    ),
    "the older one damaged": (
        partial(restored, flip(DATA, 0.5, step=1)), Right(lambda: saved()[1][2], 0.0),
    ),
    "strange files beside": (
        partial(restored, lambda f: (f / "3").write_text("x"), lambda f: (f / "x").mkdir(),
                lambda f: (f / "loop").symlink_to(f / "loop")),
        Right(lambda: saved()[1][2], 0.0),
    ),
    "of a later version": (
        partial(restored, write(DESCRIPTION, b'{"format": 99}')), Refused("has form 99"),
    ),
}  # fmt: skip


@over(DAMAGED)
def test_a_damaged_checkpoint(run, answer):
    answer.check(run)


def test_nothing_is_renamed_where_no_step_is_whole():
    with tempfile.TemporaryDirectory() as copy:
        folder = Path(shutil.copytree(saved()[0], Path(copy) / "run"))
        for step in (1, 2):
            write(DESCRIPTION, b"{}", step)(folder)
        with pytest.raises(ValueError, match="nor is any of steps"):
            checkpoint.restore(folder, *new_run(), structure=STRUCTURE)
        assert sorted(path.name for path in folder.iterdir()) == ["1", "2"]


def round_trip(saved_with, restored_with=None):
    """Saves with some settings and restores with others; the step."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "run"
        checkpoint.save(place, *new_run(), structure=STRUCTURE, step=1, settings=saved_with)
        wanted = saved_with if restored_with is None else restored_with
        return checkpoint.restore(place, *new_run(), structure=STRUCTURE, settings=wanted)[1]


@dataclass(frozen=True)
class Own:
    """A setting of the user's own, with an array in it."""

    values: Any


LONG = np.arange(5000.0)
OTHER = LONG.copy()
OTHER[2500] += 1
FINE = np.array([0.1, 0.2])
DIFFERENT = Refused(r"run/1 is of a run with a = ")
SAME = Right(np.asarray(1))
SETTINGS = {
    "arrays that differ in the middle": ({"a": LONG}, {"a": OTHER}, DIFFERENT),
    "arrays that differ in the last digit": (
        {"a": FINE}, {"a": np.nextafter(FINE, 1)}, DIFFERENT
    ),
    "JAX arrays that differ in the middle": (
        {"a": jnp.asarray(LONG)}, {"a": jnp.asarray(OTHER)}, DIFFERENT
    ),
    "arrays of another type": ({"a": FINE}, {"a": FINE.astype(np.float32)}, DIFFERENT),
    "arrays inside of lists": ({"a": [LONG]}, {"a": [OTHER]}, DIFFERENT),
    "arrays inside of a class": ({"a": Own(LONG)}, {"a": Own(OTHER)}, DIFFERENT),
    "long texts": ({"a": "x" * 5000 + "y"}, {"a": "x" * 5000 + "z"}, DIFFERENT),
    "1 and True": ({"a": 1}, {"a": True}, DIFFERENT),
    "one more": ({"a": 1}, {"a": 1, "b": 2}, Refused("b = not set, and here it is 2")),
    "equal arrays": ({"a": LONG}, {"a": LONG.copy()}, SAME),
    "equal arrays in a class": ({"a": Own(LONG)}, {"a": Own(LONG + 0)}, SAME),
    "NaN": ({"a": float("nan")}, {"a": float("nan")}, SAME),
    "a lone surrogate": ({"a": "\ud800"}, {"a": "\ud800"}, SAME),
    "another order": ({"a": 1, "b": 2}, {"b": 2, "a": 1}, SAME),
    "a function": ({"a": lambda step: 0.1}, None, Refused("the setting a is <function")),
    "an object without a text": ({"a": object()}, None, Refused("a is <object .* numbers, text")),
    "a list of settings": ([1], None, Refused("settings must be a dictionary")),
    "a text": ("rate", None, Refused("settings must be a dictionary")),
}  # fmt: skip


@over(
    {
        name: (partial(round_trip, saved_with, here), answer)
        for name, (saved_with, here, answer) in SETTINGS.items()
    }
)
def test_settings(run, answer):
    answer.check(run)


def save(place=None, model=None, state=None, **options):
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "run" if place is None else place
        default, rest = new_run()
        options = {"structure": STRUCTURE, "step": 1} | options
        state = rest if state is None else state
        checkpoint.save(place, default if model is None else model, state, **options)
        model, kept = new_run()
        kept, _ = checkpoint.restore(place, model, state, structure=STRUCTURE)
        return jax.tree.leaves(kept)


def under_jit():
    jax.jit(lambda x: save(state={"x": x}) or x)(jnp.ones(2))


def donated():
    x = jnp.ones(3)
    x.delete()
    save(state={"x": x})


def on_a_full_disk():
    """What orbax raises on a full tmpfs; the checkpoint before stays."""

    def save(*args, **options):
        raise ValueError("RESOURCE_EXHAUSTED: Error writing 0/0: No space left on device")

    with tempfile.TemporaryDirectory() as copy, pytest.MonkeyPatch.context() as patch:
        folder = Path(shutil.copytree(saved()[0], Path(copy) / "run"))
        patch.setattr(ocp.CheckpointManager, "save", save)
        try:
            checkpoint.save(folder, *new_run(), structure=STRUCTURE, step=3)
        finally:
            assert checkpoint.restore(folder, *new_run(), structure=STRUCTURE)[1] == 2


HERE = Path(__file__)
BITS = np.array([0x7FC12345, 0x80000000, 1], np.uint32).view(np.float32)
ARGUMENTS = {
    "a file as folder": (partial(save, HERE), Refused("cannot be written", ANY)),
    "a folder in a file": (partial(save, HERE / "x"), Refused("cannot be written", ANY)),
    "a folder in /proc": (partial(save, "/proc/x"), Refused("/proc/x/1 cannot be written", ANY)),
    "a name too long": (partial(save, "/tmp/" + 300 * "a"), Refused("cannot be written", ANY)),
    "bytes as folder": (partial(save, b"run"), Refused("folder must be a path")),
    "a number as folder": (partial(save, 3), Refused("folder must be a path")),
    "a full disk": (on_a_full_disk, Refused("run/3 cannot be written; checkpoints before", ANY)),
    "no model": (partial(save, model="net"), Refused("model must be a Flax nnx module, got str")),
    "a text in the state": (partial(save, state={"a": "x"}), Refused("holds arrays only")),
    "a number in the state": (partial(save, state={"a": 1.0}), Refused("holds arrays only")),
    "objects": (partial(save, state={"a": np.array([{}])}), Refused("holds arrays only")),
    "no entries": (partial(save, state={"a": np.zeros((0, 3))}), Refused(r"a'\] has no entries")),
    "inside of jit": (under_jit, Refused("is traced: save and restore outside of jax.jit")),
    "donated": (donated, Refused("it was donated")),
    "a step below 0": (partial(save, step=-1), Refused("step must be an integer")),
    "a step of 1.5": (partial(save, step=1.5), Refused("step must be an integer")),
    "a step of True": (partial(save, step=True), Refused("step must be an integer")),
    "a text as step": (partial(save, step="1"), Refused("step must be an integer")),
    "keep nothing": (partial(save, keep=0), Refused("keep must be an integer of at least 1")),
    "no structure": (partial(save, structure=None), Refused("structure must be one of")),
    "NaN, -0 and a denormal": (
        lambda: [leaf.view(np.uint32) for leaf in save(state={"a": BITS})],
        Right([BITS.view(np.uint32)], 0.0),
    ),
    "big-endian": (
        lambda: save(state={"a": np.array([1.5, 2.5], ">f4")}), Right([np.array([1.5, 2.5])], 0.0)
    ),
    "bfloat16": (
        lambda: save(state={"a": jnp.array([1.5, 3], jnp.bfloat16)}),
        Right([np.array([1.5, 3.0])], 0.0),
    ),
    "numbers of a scalar": (lambda: save(state={"a": np.array(3.0)}), Right([np.array(3.0)], 0.0)),
}  # fmt: skip


@over(ARGUMENTS)
def test_arguments(run, answer):
    answer.check(run)


def test_a_whole_checkpoint_says_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for found, wanted in zip(restored(), saved()[1][2], strict=True):
            np.testing.assert_array_equal(found, wanted)
