"""Influence: which training samples made a prediction

How would the loss at a test sample change if a training sample counted more? To first order as
−g_testᵀ (F + ρ)⁻¹ g_train, and with EKFAC for the Fisher that is a solve with its eigenbasis
(Grosse et al. 2023, arXiv:2308.03296).
"""

# gallery: 6

# %%
# A small network on handwritten digits, five of whose labels are wrong on purpose.
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from natgrad_datasets import load

import natgrad_flax as ng

data = load("digits", num_train=600, num_test=200)
x, labels = jnp.asarray(data.x_train), np.array(data.labels_train)
x_test, labels_test = jnp.asarray(data.x_test), jnp.asarray(data.labels_test)
wrong = np.random.default_rng(0).choice(len(x), 5, replace=False)
labels[wrong] = (labels[wrong] + 3) % 10
labels = jnp.asarray(labels)

model = nnx.Sequential(
    *(nnx.Linear(64, 32, rngs=nnx.Rngs(0)), jnp.tanh),
    nnx.Linear(32, 10, rngs=nnx.Rngs(1)),
)
loss = ng.SoftmaxCrossEntropy()
optimizer = nnx.Optimizer(model, optax.adam(0.01), wrt=nnx.Param)


@nnx.jit
def step(model, optimizer):
    optimizer.update(model, nnx.grad(lambda m: loss(m(x), labels))(model))


for _ in range(400):
    step(model, optimizer)
right = (model(x_test).argmax(1) == labels_test).mean()
print(f"test accuracy {right:.1%}")

# %%
# The Fisher by EKFAC. One solve a test sample, and an inner product with the gradient of each
# training sample; the gradients of all of them are one `vmap`.
F = ng.fisher(model, x, structure=ng.EKFAC(), loss=loss)
graphdef, params = nnx.split(model, nnx.Param)


def gradient(x, label):
    def of(params):
        return loss(nnx.merge(graphdef, params)(x[None]), label[None])

    return jax.grad(of)(params)


each = jax.jit(jax.vmap(gradient))(x, labels)


def influence(x, label):
    solved = F.solve(gradient(x, label), damping=1e-3)
    products = jax.tree.map(lambda g, s: jnp.tensordot(g, s, s.ndim), each, solved)
    return np.asarray(-jax.tree.reduce(jnp.add, products)) / len(each)


# %%
# Three test samples with large losses; beside each the training samples that helped most (more of
# them would lower its loss) and those that hurt most.
losses = -jax.nn.log_softmax(model(x_test))[jnp.arange(len(x_test)), labels_test]
chosen = np.argsort(np.asarray(losses))[[-1, -4, -8]]
raw = load("digits", num_train=600, num_test=200, prepare=False)
figure, axes = plt.subplots(3, 9, figsize=(8, 3.2))
for row, test in zip(axes, chosen, strict=True):
    scores = influence(x_test[test], labels_test[test])
    ranked = np.argsort(scores)
    shown = [*ranked[:4], *ranked[::-1][:4]]
    images = [raw.x_test[test], *raw.x_train[np.array(shown)]]
    names = [f"test: {labels_test[test]}", *(str(labels[i]) for i in shown)]
    for place, (axis, image, name) in enumerate(zip(row, images, names, strict=True)):
        color = "black" if place == 0 else "#0072B2" if place < 5 else "#D55E00"
        mark = " (wrong)" if place and shown[place - 1] in wrong else ""
        axis.imshow(image.reshape(8, 8), cmap="gray_r")
        axis.set_title(name + mark, color=color, fontsize=8)
        axis.set(xticks=(), yticks=())
        for side in axis.spines.values():
            side.set(visible=True, color=color, linewidth=1.5 if place else 2.5)
figure.supxlabel(
    "blue: helped most, orange: hurt most; each with its label in training", fontsize=9
)
plt.show()

# %%
# The same scores find wrong labels: a sample whose influence on its own loss is large is one that
# the others do not explain.
solved = jax.vmap(lambda g: F.solve(g, damping=1e-3))(each)
own = jax.tree.map(lambda g, s: jnp.sum(g * s, range(1, g.ndim)), each, solved)
order = np.argsort(-np.asarray(jax.tree.reduce(jnp.add, own)))
places = 1 + np.flatnonzero(np.isin(order, wrong))
print("places of the five wrong labels among 600:", *places)
