"""Learning rates that grow or fall with the width, layer by layer: the maximal update."""

from __future__ import annotations

from typing import Any

import jax
import optax
from flax import nnx

from natgrad_flax.arguments.scalars import check_integer
from natgrad_flax.models import MLP, ConvNet
from natgrad_flax.models.parametrization import ScaledLayer
from natgrad_flax.models.sizes import check_choice
from natgrad_flax.optimizer.trees import leaf_names
from natgrad_flax.signals.model import dotted

RATE_POWERS: dict[str, tuple[float, float, float]] = {
    "K-FAC": (0.0, 0.0, 0.0),
    "Shampoo": (-0.5, 0.0, 0.5),
    "SGD": (-1.0, 0.0, 1.0),
    "FOOF": (-1.0, -1.0, 0.0),
}
"""c of the first layer, of those between, and of the last: rates eta M^{-c} in muP."""


def scale_by_width(
    model: nnx.Module, optimizer: str, *, base_width: int = 1
) -> optax.GradientTransformation:
    """Rates M^{-c_l} by which every layer moves by O(1) at any width M (Ishikawa & Karakida 2024).

    To be put behind an optimizer on a model with ``parametrization="mup"``; the rate that is tuned
    at one width is then that of all widths. Where c_l is negative M is the number of units of the
    layer, whose derivatives shrink as 1/M; where it is positive that of its inputs, whose changes
    add up. A bias has the c of the first layer (its input is one number): exact for SGD and K-FAC,
    and for ``ng.shampoo`` with ``vectors="full"``.

    Args:
      model: an ``ng.MLP`` or ``ng.ConvNet``, of which only sizes are looked at.
      optimizer: "K-FAC", "Shampoo" (powers -1/4), "SGD" or "FOOF".
      base_width: rates are (M / base_width)^{-c_l}.

    Returns:
      An optax transformation that multiplies the updates.

    Raises:
      ValueError: an unknown optimizer, a base width below 1; in ``update``, updates of another
        model.
      TypeError: another kind of network.

    Example:
      >>> import jax, jax.numpy as jnp, natgrad_flax as ng, optax
      >>> from flax import nnx
      >>> model = ng.MLP((4, 8, 8, 1), parametrization="mup", rngs=nnx.Rngs(0))
      >>> tx = optax.chain(optax.sgd(1.0), ng.scale_by_width(model, "SGD"))
      >>> params = nnx.state(model, nnx.Param)
      >>> ones = jax.tree.map(jnp.ones_like, params)
      >>> updates, _ = tx.update(ones, tx.init(params), params)
      >>> layers = [updates["layers"][l]["kernel"][...] for l in range(3)]
      >>> [float(layer[0, 0]) for layer in layers]
      [-8.0, -1.0, -0.125]
    """
    if not isinstance(model, (MLP, ConvNet)):
        raise TypeError(
            f"model must be an ng.MLP or an ng.ConvNet, whose layers stand in a row, got a "
            f"{type(model).__name__}"
        )
    check_choice("optimizer", optimizer, list(RATE_POWERS))
    base = check_integer("base_width", base_width, 1)
    layers = {
        tuple(path): layer
        for path, layer in nnx.iter_modules(model)
        if isinstance(layer, ScaledLayer)
    }
    order = sorted(layers)
    first, between, last = RATE_POWERS[optimizer]
    factors = {}
    for path, layer in layers.items():
        c = last if path == order[-1] else first if path == order[0] else between
        for name, power in (("kernel", c), ("bias", first)):
            width = layer.kernel.shape[-1] if power < 0 else layer.fan_in
            factors[(*path, name)] = (width / base) ** -power

    def scaled(path: Any, leaf: Any) -> Any:
        names = leaf_names(path)
        if names not in factors:
            raise ValueError(
                f"the updates are not of this model, which has no parameter {dotted(names)}: pass "
                "scale_by_width the model that is trained"
            )
        return leaf * factors[names]

    return optax.stateless(
        lambda updates, params: jax.tree_util.tree_map_with_path(scaled, updates)
    )
