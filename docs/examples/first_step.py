"""First step: all samples at once

Ten points on a circle and a wide network. Gradient descent at the largest learning rate that is of
use learns the broad shape first and the details late; a natural-gradient step at the learning rate
of theory moves all outputs to their targets.
"""

# gallery: 1

# %%
# The inputs are angles, given to the network as unit vectors.
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from flax import nnx

import natgrad_flax as ng
import ntk_analysis as na


def on_circle(angle):
    return jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=1)


angles = np.linspace(-np.pi, np.pi, 10, endpoint=False) + 0.2
x, y = on_circle(angles), jnp.sin(3 * angles)[:, None] * 0.8
model = ng.MLP((2, 1024, 1024, 1), bias_variance=0.1, rngs=nnx.Rngs(0))
loss = ng.MeanSquaredError()

# %%
# A step needs the batch, a structure (what of the Fisher is kept) and a loss. The exact Fisher
# wants the learning rate 1, whatever the network: that is the rate at which the linearised network
# has fitted its samples after one step.
structure = ng.Exact()
eta = ng.optimal_learning_rate(structure, model, num_samples=len(x))
update = ng.natural_gradient(model, x, y, structure=structure, loss=loss)
print("learning rate", eta)

# %%
# The update is a tree like the parameters, so a step is a line.


def stepped(model, update, eta):
    graphdef, params = nnx.split(model)
    return nnx.merge(graphdef, jax.tree.map(lambda p, u: p - eta * u, params, update))


after_one = stepped(model, update, eta)
update = ng.natural_gradient(after_one, x, y, structure=structure, loss=loss)
after_two = stepped(after_one, update, eta)
for steps, network in enumerate((model, after_one, after_two)):
    print(f"loss after {steps} natural-gradient steps: {loss(network(x), y):.1e}")

# %%
# Gradient descent beside it, at 1 / lambda_max of its own coefficient matrix.
rate = na.isotropy(na.GradientDescent(), model, x).learning_rate
gradient_step = nnx.jit(
    lambda model: stepped(model, nnx.grad(lambda m: loss(m(x), y))(model), rate)
)
descended, after = model, {}
for step in range(1, 101):
    descended = gradient_step(descended)
    after[step] = descended
for steps in (1, 10, 100):
    print(f"loss after {steps} gradient steps: {loss(after[steps](x), y):.1e}")

# %%
fine = np.linspace(-np.pi, np.pi, 400)
figure, axes = plt.subplots(1, 2, sharey=True)
axes[0].set_title("gradient descent")
for step, color in ((1, "#c6dbef"), (10, "#6baed6"), (100, "#2171b5")):
    label = f"{step} step" + "s" * (step > 1)
    axes[0].plot(fine, after[step](on_circle(fine)), color=color, label=label)
axes[1].set_title("natural-gradient descent")
axes[1].plot(fine, after_one(on_circle(fine)), color="#fdae6b", label="1 step")
axes[1].plot(fine, after_two(on_circle(fine)), color="#D55E00", label="2 steps")
for axis in axes:
    axis.plot(fine, model(on_circle(fine)), color="0.7", linestyle=":", label="before")
    axis.plot(angles, y, "ko", markersize=5, zorder=3)
    axis.set_xlabel("angle")
    axis.set_xticks([-np.pi, 0, np.pi], ["−π", "0", "π"])
    axis.legend(loc="upper left", fontsize="small", ncols=2)
axes[0].set(ylabel="output", ylim=(-1.6, 2))
plt.show()
