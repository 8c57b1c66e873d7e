"""Networks that are no modules of nnx: functions of trees (also Equinox's), and linen's modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array


class Wrapped(nnx.Module):
    """A function of parameters and inputs as a module; made by ``from_function``.

    The parameters stand under their own names, so trees of gradients and updates for the plain
    parameters fit this module.
    """

    def __init__(
        self,
        function: Callable[[Any, Any, Any], Any],
        params: Mapping[str, Any],
        held: Mapping[str, Any],
    ) -> None:
        self.wrapped_call = function
        self.wrapped_names = tuple(params)
        self.wrapped_held = nnx.data(jax.tree.map(nnx.Variable, dict(held)))
        for name, tree in params.items():
            setattr(self, name, nnx.data(jax.tree.map(nnx.Param, tree)))

    def __call__(self, x: Any) -> Any:
        """What the function makes of the parameters and of x."""
        params = {name: getattr(self, name) for name in self.wrapped_names}
        params, held = jax.tree.map(
            lambda leaf: leaf[...], (params, self.wrapped_held), is_leaf=_is_variable
        )
        return self.wrapped_call(params, held, x)


def _is_variable(leaf: Any) -> bool:
    return isinstance(leaf, nnx.Variable)


def from_function(function: Callable[[Any, Any], Array], params: Any) -> Wrapped:
    """A module for a plain function of parameters: f(params, x) of shape (N, ..., C).

    Args:
      function: from parameters and inputs, arrays (N, ...) or a tree of them, to outputs. Programs
        compile once for a function object.
      params: a dictionary by names, of arrays or of dictionaries and lists of them. Or a tree with
        named fields, such as a module of Equinox: its floating arrays are the parameters, and
        whatever else it has is held.

    Raises:
      TypeError: no function, no names, or a parameter that is no floating array.
      ValueError: a name that is none of Python's, or that a module has for itself.

    Example:
      >>> import jax, jax.numpy as jnp, optax, natgrad_flax as ng
      >>> def network(params, x):
      ...     return jnp.tanh(x @ params["w"] + params["b"]) @ params["v"]
      >>> keys = jax.random.split(jax.random.key(0), 3)
      >>> params = {"w": jax.random.normal(keys[0], (4, 8)), "b": jnp.zeros(8),
      ...           "v": jax.random.normal(keys[1], (8, 2))}
      >>> x, y = jax.random.normal(keys[2], (16, 4)), jnp.ones((16, 2))
      >>> loss = ng.MeanSquaredError()
      >>> tx = ng.natural_gradient_descent(0.1, structure=ng.KFAC(), damping=0.1, loss=loss)
      >>> state, before = tx.init(params), loss(network(params, x), y)
      >>> for _ in range(5):
      ...     grads = jax.grad(lambda p: loss(network(p, x), y))(params)
      ...     module = ng.from_function(network, params)
      ...     updates, state = tx.update(grads, state, params, module=module, x=x, y=y)
      ...     params = optax.apply_updates(params, updates)
      >>> bool(loss(network(params, x), y) < before)
      True

      With Equinox, ``network = lambda net, x: jax.vmap(net)(x)`` and ``net`` a module of it::

        params = eqx.filter(net, eqx.is_inexact_array)
        grads = eqx.filter_grad(lambda net: loss(network(net, x), y))(net)
        module = ng.from_function(network, net)
        updates, state = tx.update(grads, state, params, module=module, x=x, y=y)
        net = eqx.apply_updates(net, updates)
    """
    if not callable(function):
        raise TypeError(f"function must be a function f(params, x), got {function!r:.60}")
    if isinstance(params, Mapping):
        return Wrapped(_OfFunction(function), _checked(params, "params"), {})
    leaves, tree = jax.tree.flatten(params)
    moving = [_is_floating(leaf) for leaf in leaves]
    fields = _fields(jax.tree.map(lambda leaf: leaf if _is_floating(leaf) else None, params))
    arrays = {
        str(i): leaf
        for i, leaf in enumerate(leaves)
        if isinstance(leaf, Array | np.ndarray) and not moving[i]
    }
    others = [None if moving[i] or str(i) in arrays else leaf for i, leaf in enumerate(leaves)]
    call = _OfTree(function, tree, tuple(fields), tuple(moving), tuple(others))
    return Wrapped(call, _checked(fields or params, "params"), arrays)


def from_linen(module: Any, variables: Mapping[str, Any], **arguments: Any) -> Wrapped:
    """A module for one of flax.linen with its variables; the parameters are those of "params".

    Args:
      module: the module of linen.
      variables: as ``module.init`` returns them. Collections besides "params", such as
        batch statistics, are held.
      arguments: further arguments of its call, such as ``train=False``.

    Raises:
      TypeError: no module of linen, or variables without "params".

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, natgrad_flax as ng
      >>> network = nn.Sequential([nn.Dense(8), jnp.tanh, nn.Dense(2)])
      >>> x = jax.random.normal(jax.random.key(0), (16, 4))
      >>> variables = network.init(jax.random.key(1), x)
      >>> model = ng.from_linen(network, variables)
      >>> step = ng.natural_gradient(model, x, jnp.ones((16, 2)), structure=ng.KFAC(),
      ...                            loss=ng.MeanSquaredError(), damping=0.1)
      >>> sorted(step)
      ['layers_0', 'layers_2']
    """
    if not callable(getattr(module, "apply", None)):
        raise TypeError(f"module must be a module of flax.linen, got {module!r:.60}")
    if not isinstance(variables, Mapping) or "params" not in variables:
        raise TypeError(
            'variables must be a dictionary of collections with the parameters under "params", as '
            "module.init(key, x) returns it"
        )
    held = {name: tree for name, tree in variables.items() if name != "params"}
    call = _OfLinen(module, tuple(sorted(arguments.items())))
    return Wrapped(call, _checked(variables["params"], 'variables["params"]'), held)


@dataclass(frozen=True)
class _OfFunction:
    """f(params, x); equal to another one of the same function, so that programs are found again."""

    function: Callable[[Any, Any], Any]

    def __call__(self, params: Any, held: Any, x: Any) -> Any:
        del held
        return self.function(params, x)


@dataclass(frozen=True)
class _OfTree:
    """f(tree, x) of a tree with named fields; equal where all but its arrays is.

    Attributes:
      function: f.
      tree: structure of the tree.
      fields: names of those that hold parameters, in its order.
      moving: for each leaf whether it is a parameter.
      others: the leaves that are no arrays, by their place.
    """

    function: Callable[[Any, Any], Any]
    tree: Any
    fields: tuple[str, ...]
    moving: tuple[bool, ...]
    others: tuple[Any, ...]

    def __call__(self, params: Any, held: Any, x: Any) -> Any:
        values = iter(jax.tree.leaves([params[name] for name in self.fields]))
        leaves = [
            next(values) if moves else held.get(str(number), other)
            for number, (moves, other) in enumerate(zip(self.moving, self.others, strict=True))
        ]
        return self.function(self.tree.unflatten(leaves), x)


def _fields(tree: Any) -> dict[str, Any]:
    """The fields of a tree that have leaves, by their names."""
    inside = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda node: node is not tree)
    named = [(path, field) for path, field in inside if jax.tree.leaves(field)]
    if not all(path and isinstance(path[0], jax.tree_util.GetAttrKey) for path, _ in named):
        return {}
    return {path[0].name: field for path, field in named}


def _is_floating(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)


@dataclass(frozen=True)
class _OfLinen:
    """A module of linen, applied to its variables."""

    module: Any
    arguments: tuple[tuple[str, Any], ...]

    def __call__(self, params: Any, held: Any, x: Any) -> Any:
        return self.module.apply({"params": params, **held}, x, **dict(self.arguments))


def _checked(params: Any, name: str) -> dict[str, Any]:
    """Parameters by names that can be attributes of a module."""
    if not isinstance(params, Mapping) or not params:
        raise TypeError(
            f"{name} must be a dictionary of parameters by name, or a tree with named fields that "
            f'has some, got {params!r:.60}; put other trees into one: {{"params": tree}}'
        )
    for key, tree in params.items():
        if not (isinstance(key, str) and key.isidentifier()) or hasattr(nnx.Module, key):
            raise ValueError(f"{name} has the name {key!r}, which cannot be one of a module")
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            if not _is_floating(leaf):
                where = name + f"[{key!r}]" + jax.tree_util.keystr(path)
                raise TypeError(f"{where} must be a floating array, got {leaf!r:.60}")
    return {key: _plain(tree) for key, tree in params.items()}


def _plain(tree: Any) -> Any:
    """Mappings of any kind as dictionaries."""
    if isinstance(tree, Mapping):
        return {key: _plain(value) for key, value in tree.items()}
    return tree
