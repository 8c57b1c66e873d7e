"""Predict training: the whole curve before the first step

A wide network stays close to its linearisation, and that has a closed form for every structure.
`na.predict_dynamics` gives the training and the test curve from the network as it is initialised;
here they are drawn beside what training does.
"""

# gallery: 3

# %%
import jax
import matplotlib.pyplot as plt
import numpy as np
from flax import nnx
from matplotlib.lines import Line2D
from natgrad_datasets import load

import natgrad_flax as ng
import ntk_analysis as na
from ntk_analysis.palette import STYLES

data = load("digits", classes=(3, 8), num_train=40, num_test=70)
x, y, x_test, y_test = data.x_train, data.y_train, data.x_test, data.y_test
loss = ng.MeanSquaredError()
STEPS = 6


def network():
    return ng.MLP((64, 2048, 2048, 1), rngs=nnx.Rngs(1))


# %%
# Half of the learning rate of theory, so that there is something to see: the error then halves at
# each step where the structure is isotropic. Damping is what it is by default for each structure.
structures = {
    ng.Exact(): 0.0,
    ng.BlockDiagonal(): 0.0,
    ng.KFAC(): 0.0,
    ng.Diagonal(): ng.RelativeDamping(1e-3),
    na.GradientDescent(): 0.0,
}


def predicted(structure, damping):
    model = network()
    rate = 0.5 * na.isotropy(structure, model, x, damping=damping).learning_rate
    settings = {"learning_rate": rate, "steps": STEPS, "damping": damping, "x_test": x_test}
    return rate, na.predict_dynamics(structure, model, x, y, **settings)


# %%
# Training by a plain loop. Gradient descent takes the gradient as it is.


def trained(structure, rate, damping):
    model = network()
    graphdef, params = nnx.split(model)

    @jax.jit
    def step(params):
        model = nnx.merge(graphdef, params)
        losses = loss(model(x), y), loss(model(x_test), y_test)
        if isinstance(structure, na.GradientDescent):
            update = nnx.grad(lambda m: loss(m(x), y))(model)
        else:
            update = ng.natural_gradient(
                model, x, y, structure=structure, loss=loss, damping=damping
            )
        return jax.tree.map(lambda p, u: p - rate * u, params, update), losses

    history = []
    for _ in range(STEPS + 1):
        params, losses = step(params)
        history.append([float(value) for value in losses])
    return np.array(history)


# %%
figure, axes = plt.subplots(1, 2, figsize=(7.2, 3.8))
handles = []
for structure, damping in structures.items():
    style = STYLES[type(structure).__name__]
    rate, theory = predicted(structure, damping)
    measured = trained(structure, rate, damping)
    curves = theory.train_losses, theory.test_losses(y_test)
    for axis, curve, dots in zip(axes, curves, measured.T, strict=True):
        axis.plot(curve, color=style.color, linewidth=1.5)
        axis.plot(dots, style.marker, color=style.color, markersize=5)
    handles.append(Line2D([], [], color=style.color, marker=style.marker, label=style.label))
    gap = np.abs(measured[:, 0] - theory.train_losses).max() / theory.train_losses[0]
    print(f"{style.label:<18} furthest from its prediction: {gap:.1%} of the first loss")
axes[0].set(title="training loss", xlabel="step", yscale="log")
axes[1].set(title="test loss", xlabel="step")
figure.legend(handles=handles, loc="outside lower center", ncols=5, fontsize="small")
plt.show()

# %%
# Lines are predictions, dots the network. K-FAC leaves its linearisation first. The narrower the
# network, the further apart they are: try a width of 64.
