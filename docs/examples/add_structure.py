"""Add a structure: a metric of your own in one class

A structure says what is kept of the Fisher. All that the library does (steps, averages, operators,
theory, tables and figures) follows from a few methods. Here is a metric with one number a layer,
raced against what the library has.
"""

# gallery: 10

# %%
# `statistics` is what a batch tells, `invert` and `apply` make a step of it, and `operator` is the
# matrix itself, from which everything else comes. That is a whole structure.
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from flax import nnx
from jax.flatten_util import ravel_pytree
from natgrad_datasets import load

import natgrad_flax as ng
import ntk_analysis as na
from natgrad_flax.damping import per_layer
from natgrad_flax.operators.base import Blocks
from natgrad_flax.operators.entries import Entries
from natgrad_flax.structures import AveragedStructure, styled
from ntk_analysis.palette import STYLES


@dataclass(frozen=True)
class LayerScale(AveragedStructure):
    """G_l = (t_l + rho) I, with t_l the mean diagonal of the Fisher block of layer l."""

    style = styled("One number a layer")
    default_damping = ng.RelativeDamping(0.01)

    def statistics(self, signals):
        n = signals.num_samples
        return tuple(jnp.sum(a.gram_norms()) / (n * a.num_params) for a in signals.layers)

    def operator(self, signals):
        pairs = zip(signals.layers, self.statistics(signals), strict=True)
        full = [(a, jnp.full((a.fan_in, a.num_units), t)) for a, t in pairs]
        return Blocks(tuple(Entries(a, a.update(t)) for a, t in full))

    def invert(self, moments, damping, num_samples):
        rho = per_layer(damping, len(moments.factors))
        return tuple(1 / (t + r) for t, r in zip(moments.factors, rho, strict=True))

    def apply(self, inverse, gradient):
        pairs = zip(inverse, gradient, strict=True)
        return tuple(jax.tree.map(lambda g, s=scale: s * g, layer) for scale, layer in pairs)

    def scale_of(self, moments, num_samples):
        return jnp.stack(moments.factors)

    def gram_size(self, signals):
        return 0


# %%
# It is its own oracle: the step equals that of the dense matrix.
data = load("digits", classes=(0, 7), num_train=40)
x, y, loss = data.x_train, data.y_train, ng.MeanSquaredError()
tiny = ng.MLP((64, 5, 1), rngs=nnx.Rngs(0))
F = ng.fisher(tiny, x, structure=LayerScale(), loss=loss)
g = nnx.grad(lambda m: loss(m(x), y))(tiny)
step = ravel_pytree(F.solve(g, damping=0.1))[0]
dense = jnp.linalg.solve(F.to_dense(damping=0.1), ravel_pytree(g)[0])
distance = jnp.linalg.norm(step - dense) / jnp.linalg.norm(dense)
print(f"distance to the dense step: {distance:.0e}")

# %%
# Theory takes it as it takes the others: how its training goes, and how isotropic it is.
model = ng.MLP((64, 512, 512, 1), rngs=nnx.Rngs(0))
figure, axis = plt.subplots(figsize=(6, 3.4))
for structure in (na.GradientDescent(), LayerScale(), ng.Diagonal(), ng.UnitWise(), ng.KFAC()):
    damping = ng.RelativeDamping(1e-3) if structure.name in ("Diagonal", "UnitWise") else 0.0
    report = na.isotropy(structure, model, x, damping=damping)
    rate = report.learning_rate
    curve = na.predict_dynamics(
        structure, model, x, y, learning_rate=rate, steps=30, damping=damping
    ).train_losses
    style = STYLES[type(structure).__name__]
    label = f"{style.label}: condition {report.condition_number:.3g}"
    shares = np.maximum(curve / curve[0], 1e-8)
    axis.semilogy(shares, color=style.color, marker=style.marker, markersize=4, label=label)
axis.set(xlabel="step", ylabel="share of the first loss", ylim=(1e-8, 2))
axis.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()

# %%
# In the library a structure is a file in `natgrad_flax/structures/` and a line in its
# `__init__.py`: [Extending](../extending/structure.md) has the whole protocol and its tests.
