"""Isotropy: which structures train all directions alike

Training is fast when every direction of the outputs is learned at the same rate. The rates are the
eigenvalues of the coefficient matrix J G⁻¹ Jᵀ / N: with gradient descent (G = I) they spread over
orders of magnitude, and the smallest decides how long training takes. A Fisher approximation is
*isotropic* where they are all alike (Karakida & Osawa 2020).
"""

# gallery: 2

# %%
# Handwritten digits, zeros against sevens, which scikit-learn embeds; any of your own models will
# do, of any width.
import matplotlib.pyplot as plt
import numpy as np
from flax import nnx
from natgrad_datasets import load

import natgrad_flax as ng
import ntk_analysis as na
from ntk_analysis.palette import STYLES

data = load("digits", classes=(0, 7), num_train=40)
model = ng.MLP((64, 1024, 1024, 1), rngs=nnx.Rngs(0))
x, y = data.x_train, data.y_train

# %%
# One call a structure gives the spectrum, alpha (what the eigenvalues are where they are all
# alike), and which conditions of the theory fail.
structures = (
    na.GradientDescent(),
    ng.Diagonal(),
    ng.UnitWise(),
    ng.KFAC(),
    ng.BlockTriDiagonal(),
    ng.BlockDiagonal(),
    ng.Exact(),
)
reports = {structure.name: na.isotropy(structure, model, x) for structure in structures}
print(f"{'structure':<20}{'condition number':>18}   learning rate")
for report in reports.values():
    print(f"{report.structure:<20}{report.condition_number:>18.3g}   {report.learning_rate:.3g}")

# %%
# Each dot is an eigenvalue, as a share of the largest: what a step of the best learning rate takes
# off the error in that direction. At 1 one step is enough.
figure, axes = plt.subplots(1, 2, figsize=(7.2, 3.8), gridspec_kw={"width_ratios": [3, 2]})
for place, structure in enumerate(structures):
    style = STYLES[type(structure).__name__]
    shares = reports[structure.name].eigenvalues / reports[structure.name].eigenvalues.max()
    axes[0].scatter(shares, np.full(len(shares), place), s=14, color=style.color, alpha=0.5)
    prediction = na.predict_dynamics(
        structure, model, x, y, learning_rate=reports[structure.name].learning_rate, steps=20
    )
    losses = np.maximum(prediction.train_losses / prediction.train_losses[0], 1e-9)
    axes[1].semilogy(losses, color=style.color, marker=style.marker, markersize=4)
axes[0].set_yticks(range(len(structures)), [STYLES[type(s).__name__].label for s in structures])
axes[0].set(xscale="log", xlabel="eigenvalue, as a share of the largest")
axes[1].set(xlabel="step", ylim=(1e-9, 3), title="loss that this predicts")
axes[1].set_xticks((0, 5, 10, 15, 20))
plt.show()

# %%
# The exact, layer-wise and Kronecker-factored Fishers fit everything in one step. The unit-wise
# one gets there as the network becomes wider, the diagonal never does. What a condition of the
# theory asks for, and which one a network of yours fails, is in `report.failed_conditions`.
