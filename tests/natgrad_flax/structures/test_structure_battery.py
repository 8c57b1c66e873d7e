"""Every structure on signals of every kind of layer, in everything it answers, beside its matrix.

That models give these signals is for ``test_signals.py`` and ``test_shared_structures.py``.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from battery import QUICK, STRUCTURES
from dense_metrics import DenseLayer, metric
from random_signals import dense, explicit, jacobian_of, network, rows_of, shared

import natgrad_flax as ng
from natgrad_flax.signals.shared import ExplicitSignals
from natgrad_flax.structures import AveragedStructure, Moments
from natgrad_flax.structures.base import ravel

pytestmark = pytest.mark.usefixtures("x64")

SAMPLES, SEEDS, DAMPING = 6, 2, 0.05
NETWORKS = {
    # with and without a bias, more and fewer inputs than samples; every layer has rank N S
    "dense": ((dense, 4, 4), (dense, 9, 2, None), (dense, 6, 3)),
    # Gram matrices by pairs of positions and by Jacobians, and both ways into an eigenbasis
    "mixed": (
        (dense, 3, 4),
        (dense, 9, 2, None),
        (shared, 3, 1, 2, 3),
        (shared, 5, 2, 3, 3, None),
        (explicit, 2, 3),
        (explicit, 1, 3),
        (dense, 4, 2),
    ),
}
COUPLED = ("block-tri-diagonal", "layer-wise", "layer-wise-indefinite")
# what they do is the same for all dampings and kinds of layers
ONE_WAY = (
    "unit-blocks",
    "kfoc",
    "shampoo",
    "low-rank-units",
    "nystroem",
    "mini-block",
    "mini-block-units",
)
SPACELESS = ("ekfac", "ekfac-reduce", "diagonal", "quasi-diagonal", *ONE_WAY)
# the code of half of K-FAC, by either factor
HALVES = ("foof", "foof-units")
WAYS = (
    ("dense", "sample", "number"),
    ("dense", "parameter", "zero"),
    ("mixed", "parameter", "number"),
    ("mixed", "sample", "each"),
    ("mixed", "sample", "zero"),
)


def differs(name, which, _, damping):
    """Whether a way asks a structure for something that the other ways do not."""
    if name.endswith("reduce"):
        # without shared weights it is "expand"
        return which == "mixed" and damping == ("each" if name in SPACELESS else "number")
    if name in HALVES:
        return (name == "foof-units") == (which == "mixed" and damping != "each")
    if name == "nystroem":
        # one damping for all layers
        return (which, damping) in (("mixed", "number"), ("dense", "zero"))
    if name in ONE_WAY:
        return (which, damping) in (("mixed", "each"), ("dense", "zero"))
    if name == "kfac-literal-pi" and which == "mixed":
        return damping == "number"
    if damping == "each":
        return name not in ("exact", *COUPLED)
    if which == "mixed" and name in COUPLED:
        # undamped they need layers of full row rank
        return damping == "number"
    return not (which == "mixed" and damping == "number" and name in SPACELESS)


CASES = [(name, *way) for name in STRUCTURES for way in WAYS if differs(name, *way)]


def described(signals):
    """The layers in NumPy."""
    found = []
    for layer in signals.layers:
        shape = (signals.num_samples, layer.num_directions, layer.fan_in, layer.num_units)
        bias = layer.bias_scale is not None
        if isinstance(layer, ExplicitSignals):
            found.append(DenseLayer(jacobian_of(layer).reshape(shape), bias))
        else:
            is_shared = not isinstance(layer, ng.DenseSignals)
            found.append(DenseLayer.affine(*rows_of(layer), bias, is_shared))
    return found


def scale_of(structure, layers):
    """``Structure.damping_scale`` by its definition: means of diagonals of Gram matrices over N."""
    n = len(layers[0].jacobian)
    norms = np.asarray([np.mean(np.sum(layer.rows**2, axis=1)) / n for layer in layers])
    if isinstance(structure, ng.Exact | ng.Nystroem):
        return norms.sum()
    if isinstance(structure, ng.BlockDiagonal):
        return norms
    if isinstance(structure, ng.LayerWise):
        return norms.mean()
    if isinstance(structure, ng.UnitWise):
        return norms / [layer.jacobian.shape[3] for layer in layers]
    if not isinstance(structure, ng.KFAC | ng.Foof | ng.Shampoo):
        return np.asarray([np.mean(np.sum(layer.rows**2, axis=0)) / n for layer in layers])
    return None


def random_like(rng, tree):
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), tree)


@pytest.mark.filterwarnings("ignore::natgrad_flax.SingularCouplingWarning")
@pytest.mark.parametrize(("name", "which", "space", "damping"), CASES)
def test_against_dense(name, which, space, damping):
    rng = np.random.default_rng(3)
    layers = NETWORKS[which]
    structure = STRUCTURES[name](len(layers), space)
    both, _ = network(rng, SAMPLES, SEEDS + 1, *layers)
    # the last seed is a residual outside of the span of the others, as a Monte-Carlo Fisher has it
    signals = both.take_directions(SEEDS)
    outside = ng.Residual(None, tuple(layer.cotangent(SEEDS) for layer in both.layers))
    inside = ng.Residual(jnp.asarray(rng.normal(size=(SAMPLES, SEEDS))), None)
    test, _ = network(rng, 3, 3, *layers)
    slope = random_like(rng, signals.unravel(jnp.zeros(signals.num_params)))
    rhos = {"number": DAMPING, "zero": 0.0}.get(damping)
    if damping == "each":
        shape = (len(layers), 2) if name.startswith(("kfac", "shampoo")) else (len(layers),)
        rhos = DAMPING * (1 + rng.random(shape))

    def run(signals, outside, inside, test, slope, rho):
        found = {
            "matrix": structure.to_dense(signals, rho),
            "inside": ravel(structure.solve(signals, inside, rho)),
            "any": ravel(structure.precondition(signals, slope, rho)),
            "scale": structure.damping_scale(signals),
        }
        if which == "dense" or damping == "number" or name in SPACELESS:
            found["coefficient"] = structure.coefficient(test, signals, rho)
        if damping != "zero":
            found["outside"] = ravel(structure.solve(signals, outside, rho))
        if isinstance(structure, AveragedStructure) and (which, damping) != ("mixed", "zero"):
            moments = of_halves(structure, signals)
            inverse = structure.invert(moments, rho, SAMPLES)
            found["averaged"] = ravel(structure.apply(inverse, slope))
            found["averaged scale"] = structure.scale_of(moments, SAMPLES)
        return found

    given = (signals, outside, inside, test, slope)
    if damping == "zero":
        compiled = jax.jit(lambda *a: run(*a, 0.0), compiler_options=QUICK)
    else:
        compiled, given = jax.jit(run, compiler_options=QUICK), (*given, jnp.asarray(rhos))
    found = jax.tree.map(np.asarray, compiled(*given))

    made = described(signals)
    matrix = metric(structure, made, rhos)
    inverse = np.linalg.pinv(matrix, rcond=1e-11, hermitian=True)
    rows = np.concatenate([layer.rows for layer in made], axis=1)
    extra = np.concatenate(
        [layer.jacobian[:, SEEDS].reshape(SAMPLES, -1) for layer in described(both)], axis=1
    )
    others = np.concatenate([layer.rows for layer in described(test)], axis=1)
    g = np.asarray(ravel(slope))
    wanted = {
        "matrix": matrix,
        "inside": inverse @ rows.T @ np.ravel(inside.coefficients) / SAMPLES,
        "any": inverse @ g,
        "coefficient": others @ inverse @ rows.T / SAMPLES,
        "outside": inverse @ extra.sum(axis=0) / SAMPLES,
        "averaged": inverse @ g,
        "scale": scale_of(structure, made),
    }
    wanted["averaged scale"] = found["scale"] if wanted["scale"] is None else wanted["scale"]
    for what, value in found.items():
        if wanted[what] is not None:
            atol = 1e-8 * np.abs(wanted[what]).max()
            np.testing.assert_allclose(value, wanted[what], rtol=0, atol=atol, err_msg=what)


def of_halves(structure, signals):
    """The moments of a batch as means of those of its halves."""
    half = SAMPLES // 2
    parts = [jax.tree.map(lambda leaf, i=i: leaf[i : i + half], signals) for i in (0, half)]

    def mean(of):
        return jax.tree.map(lambda a, b: (a + b) / 2, *map(of, parts))

    averages = mean(structure.statistics)
    basis = structure.basis(averages)
    return Moments(averages, basis, mean(lambda part: structure.rotated(part, basis)))
