"""Views of a parameter against the same operations on an array of the numbers of its entries."""

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from natgrad_flax.signals.views import View, common_factors

SHAPES = st.sampled_from([(6,), (2, 3), (4, 3, 2), (2, 2, 3, 2), (1, 4, 3), (12, 1)])


def entries(view):
    """Which entry of the source stands where."""
    found = np.array(view.offset)
    for axis in view.axes:
        along = np.array(0)
        for n, stride in axis:
            along = np.add.outer(along, stride * np.arange(n)).reshape(-1)
        found = np.add.outer(found, along.reshape(-1) if axis else np.zeros(1, int))
    return found.reshape(view.shape)


def factorisations(draw, size):
    """A shape of this many entries."""
    shape = []
    while size > 1:
        divisor = draw(st.sampled_from([d for d in range(2, size + 1) if size % d == 0]))
        shape.append(divisor)
        size //= divisor
    return tuple(shape)


@st.composite
def rearranged(draw, kinds):
    """A view, and the array that the same steps make of the numbers of the entries."""
    shape = draw(SHAPES)
    view, array = View.of("source", shape), np.arange(math.prod(shape)).reshape(shape)
    for kind in draw(st.lists(st.sampled_from(kinds), max_size=5)):
        rank = array.ndim
        if kind == "reshape":
            new = factorisations(draw, array.size)
            moved, array_moved = view.reshape(new), array.reshape(new)
        elif kind == "transpose":
            order = draw(st.permutations(range(rank)))
            moved, array_moved = view.transpose(order), array.transpose(order)
        elif kind == "expand":
            moved = view.broadcast((1, *array.shape), range(1, rank + 1))
            array_moved = array[None]
        elif kind == "repeat":
            moved = view.broadcast((*array.shape, 2), range(rank))
            array_moved = np.broadcast_to(array[..., None], (*array.shape, 2))
        elif kind == "squeeze":
            dropped = [axis for axis, n in enumerate(array.shape) if n == 1]
            moved, array_moved = view.squeeze(dropped), array.squeeze(tuple(dropped))
        elif kind == "flip":
            axes = [draw(st.integers(0, rank - 1))] if rank else []
            moved, array_moved = view.flip(axes), np.flip(array, axes)
        else:
            starts = [draw(st.integers(0, n - 1)) for n in array.shape]
            jumps = [draw(st.integers(1, 2)) for _ in array.shape]
            moved = view.slice(starts, array.shape, jumps)
            array_moved = array[tuple(map(slice, starts, array.shape, jumps))]
        if moved is not None:
            view, array = moved, array_moved
    return view, array


EVERY = ("reshape", "transpose", "expand", "repeat", "squeeze", "flip", "slice")


@given(rearranged(EVERY))
@settings(max_examples=300)
def test_entries_stand_where_they_do_in_an_array(both):
    view, array = both
    assert view.shape == array.shape
    np.testing.assert_array_equal(entries(view), array)


def test_a_reshape_that_cuts_across_is_no_view():
    assert View.of("source", (2, 3)).transpose((1, 0)).reshape((2, 3)) is None
    assert View.of("source", (2, 3)).reshape((3, 2)) is not None


@given(rearranged(("reshape", "transpose", "expand", "squeeze")), st.data())
@settings(max_examples=200)
def test_layout_of_a_parameter(both, data):
    """A matrix made of the view, and brought back, is the parameter."""
    view, array = both
    order = data.draw(st.permutations(range(array.ndim)))
    form = view.form("kernel", (array.size,), order)
    assert form is not None
    matrix = array.transpose(order).reshape(-1)
    np.testing.assert_array_equal(form.to_parameter(matrix), np.arange(array.size))
    np.testing.assert_array_equal(form.to_matrix(np.arange(array.size), matrix.shape), matrix)


@given(rearranged(EVERY), st.data())
@settings(max_examples=200)
def test_what_shows_entries_twice_or_not_at_all_has_no_layout(both, data):
    view, array = both
    size = 1 + int(array.max())
    form = view.form("kernel", (size,), data.draw(st.permutations(range(array.ndim))))
    plain = sorted(array.reshape(-1)) == list(range(size))
    # a flip shows every entry once, and is no layout
    assert form is None or plain


@given(rearranged(("reshape", "transpose")), st.data())
@settings(max_examples=100)
def test_common_factors(both, data):
    """Two views of one shape, digit by digit."""
    view, array = both
    order = data.draw(st.permutations(range(array.ndim)))
    other = View.of("other", array.transpose(order).shape).transpose(np.argsort(order).tolist())
    factors = common_factors((view, other))
    if factors is None:
        return
    for position in range(2):
        axes = tuple(tuple((n, strides[position]) for n, strides in axis) for axis in factors)
        expected = (view, other)[position]
        np.testing.assert_array_equal(entries(expected._replace(axes=axes)), entries(expected))
