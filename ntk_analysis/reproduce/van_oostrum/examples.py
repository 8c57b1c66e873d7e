"""The worked examples of van Oostrum et al. (2022), and their propositions on non-proper points."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from natgrad_flax import geometry
from natgrad_flax.geometry import Map, Objective, Representation
from ntk_analysis.empirical import Matrix
from ntk_analysis.reproduce.precision import in_float64
from ntk_analysis.reproduce.registry import Outcome, Report, above, below, between, check, close
from ntk_analysis.reproduce.ruler import max_abs_error


def natural(objective: Objective) -> Representation:
    """The natural parameter gradient in the Euclidean metric."""
    return lambda phi, xi: geometry.natural_parameter_gradient(phi, objective, xi)


def trace(curve: Map, low: float, high: float) -> list[list[float]]:
    """Points of a curve, for its figure."""
    return [curve(jnp.full(1, t)).tolist() for t in np.linspace(low, high, 97)]


@check(
    "VO-Ex1",
    "Two parametrisations whose coordinate vectors share no direction",
    claim="At one non-singular point of a model two parametrisations can have coordinate vectors "
    "whose spans intersect trivially; then no representation but zero is the same for both, and "
    "the natural parameter gradients are the projections of the natural gradient on the two spans "
    "(Example 1).",
    setting="phi(s, t) = (s, t^3) and psi, the same turned by 90 degrees, both onto the plane; "
    "L = 3 x + 2 y; at the origin and at 50 random points of the plane",
    origin="ours",
    fast=True,
)
@in_float64
def example_1(report: Report) -> Outcome:
    """The plane in two parametrisations, each folded flat along another axis."""

    def phi(xi: Array) -> Array:
        return jnp.stack([xi[0], xi[1] ** 3])

    def psi(xi: Array) -> Array:
        x, y = phi(xi)
        return jnp.stack([-y, x])

    represent = natural(lambda z: 3 * z[0] + 2 * z[1])

    def push(curve: Map, at: Array) -> Array:
        return geometry.push_forward(curve, at, represent(curve, at))

    report("projecting")
    zero = jnp.zeros(2)
    spans = [jax.jacobian(curve)(zero)[:, 0] for curve in (phi, psi)]
    ranks = [geometry.coordinate_rank(curve, zero) for curve in (phi, psi)]
    here, there = push(phi, zero), push(psi, zero)
    missed, proper = [], []
    for x, y in np.random.default_rng(0).uniform(-2, 2, (50, 2)):
        for curve, at in ((phi, [x, np.cbrt(y)]), (psi, [y, np.cbrt(-x)])):
            missed.append(max_abs_error(curve(jnp.asarray(at)), [x, y]))
            proper.append(max_abs_error(push(curve, jnp.asarray(at)), [3, 2]))
    dependence = geometry.parametrisation_dependence(represent, phi, zero, psi, zero)
    # lines of equal steps of t, apart from each other by a gap
    heights = [t**3 for t in np.linspace(-1.3, 1.3, 15)]
    lines = [p for y in heights for p in ([-2.4, y], [3.4, y], [np.nan, np.nan])]
    return Outcome(
        (
            close("rank of each at the origin: sum", float(sum(ranks)), 2, 0),
            close("rank of both together",
                  float(jnp.linalg.matrix_rank(jnp.stack(spans))), 2, 0),
            below("push-forward of phi against (3, 0)", max_abs_error(here, [3, 0]), 1e-12),
            below("push-forward of psi against (0, 2)", max_abs_error(there, [0, 2]), 1e-12),
            close("dependence on the parametrisation", float(dependence), 13**0.5, 1e-12),
            below("random points of the plane: one model, both reach them", max(missed), 1e-12),
            below("there: push-forwards of both against (3, 2)", max(proper), 1e-9),
        ),
        {
            "gradient": [3.0, 2.0],
            "phi": {"curve": lines, "tangent": spans[0], "vector": here},
            "psi": {"curve": [[-y, x] for x, y in lines], "tangent": spans[1], "vector": there},
        },
    )  # fmt: skip


@check(
    "VO-Ex2",
    "A curve that crosses itself",
    claim="phi = (sin 2x, sin x) runs twice through the origin; with f that takes one passage to "
    "the other, psi = phi o f has another natural gradient there (Example 2, Appendix A.2).",
    setting="L = x + 3 y; the two passages are at x = 0 and x = pi",
    origin="paper, partly",
    differs=("domain and f, as the remark says"),
    kind="misprint",
    remark=(
        "Appendix A.2 has the domain (-pi/8, 5 pi/8), f(theta) = pi/4 - theta and the second "
        "passage at pi/2. For the printed phi = (sin 2x, sin x) it is at pi, which makes f(theta)"
        " = pi - theta and the domain (-pi/4, 5 pi/4). The domain and pi/2 can stay as they are "
        "if phi is (sin 4x, sin 2x) and f(theta) = pi/2 - theta. Both results are as printed, "
        "with either."
    ),
    fast=True,
)
@in_float64
def example_2(report: Report) -> Outcome:
    """The two vectors of the appendix."""

    def phi(x: Array) -> Array:
        return jnp.concatenate([jnp.sin(2 * x), jnp.sin(x)])

    def change(theta: Array) -> Array:
        return jnp.pi - theta

    def psi(theta: Array) -> Array:
        return phi(change(theta))

    report("projecting")
    zero, represent = jnp.zeros(1), natural(lambda z: z[0] + 3 * z[1])

    def push(curve: Map, at: Array) -> Array:
        return geometry.push_forward(curve, at, represent(curve, at))

    here, there = push(phi, zero), push(psi, zero)
    spans = [geometry.push_forward(curve, zero, jnp.ones(1)) for curve in (phi, psi)]
    gram = float(geometry.gram_matrix(phi, zero)[0, 0])
    violation = float(geometry.model_violation(represent, phi, change, zero))
    return Outcome(
        (
            close("G at x = 0", gram, 5, 1e-12),
            below("push-forward of phi against (2, 1)", max_abs_error(here, [2, 1]), 1e-12),
            below("push-forward of psi against (-0.4, 0.2)",
                  max_abs_error(there, [-0.4, 0.2]), 1e-12),
            below("the points phi(0) and phi(pi)",
                  max_abs_error(phi(jnp.full(1, jnp.pi)), [0, 0]), 1e-12),
            above("|phi(pi/2)|, the second passage as printed",
                  float(jnp.linalg.norm(phi(jnp.full(1, jnp.pi / 2)))), 0.99),
            below("the other reading, phi = (sin 4x, sin 2x): second passage at pi/2",
                  max_abs_error(push(lambda x: phi(2 * x), jnp.full(1, jnp.pi / 2)), [-0.4, 0.2]),
                  1e-12),
            below("no violation of Theorem 2: theta = 0 belongs to x = pi", violation, 1e-12),
        ),
        {
            "gradient": [1.0, 3.0],
            "phi": {
                "curve": trace(phi, -np.pi / 4, 5 * np.pi / 4), "tangent": spans[0], "vector": here,
            },
            "psi": {"tangent": spans[1], "vector": there},
        },
    )  # fmt: skip


@check(
    "VO-A3",
    "Two parameter vectors, one gradient on the model",
    claim="phi = (x1 + x2, 0) with f = (2 t1, t2) and L = x^2 at theta = (1, 1): y_Xi = (3, 3), "
    "y_Theta = (4.8, 1.2), and 6 d/dx on the model for both (Appendix A.3).",
    setting="as printed",
    origin="paper",
    fast=True,
)
@in_float64
def appendix_3(report: Report) -> Outcome:
    """Every number of the example."""

    def phi(xi: Array) -> Array:
        return jnp.stack([xi[0] + xi[1], jnp.zeros(())])

    def change(theta: Array) -> Array:
        return jnp.stack([2 * theta[0], theta[1]])

    def psi(theta: Array) -> Array:
        return phi(change(theta))

    report("projecting")
    represent, theta, xi = natural(lambda z: z[0] ** 2), jnp.ones(2), jnp.asarray([2.0, 1.0])
    here, there = represent(phi, xi), represent(psi, theta)
    grams = geometry.gram_matrix(phi, xi), geometry.gram_matrix(psi, theta)
    return Outcome(
        (
            below("G at xi against [[1, 1], [1, 1]]",
                  max_abs_error(grams[0].ravel(), [1, 1, 1, 1]), 1e-12),
            below("G at theta against [[4, 2], [2, 1]]",
                  max_abs_error(grams[1].ravel(), [4, 2, 2, 1]), 1e-12),
            below("y_Xi against (3, 3)", max_abs_error(here, [3, 3]), 1e-12),
            below("y_Theta against (4.8, 1.2)", max_abs_error(change(there), [4.8, 1.2]), 1e-12),
            below("push-forward of phi",
                  max_abs_error(geometry.push_forward(phi, xi, here), [6, 0]), 1e-12),
            below("push-forward of psi",
                  max_abs_error(geometry.push_forward(psi, theta, there), [6, 0]), 1e-12),
        ),
        {
            # both rows of G y = (6, 6) say that the entries of y sum to 6
            "solutions": [[0.0, 6.0], [6.0, 0.0]],
            "phi": here,
            "psi": change(there),
        },
    )  # fmt: skip


@check(
    "VO-Prop1",
    "Non-proper points are rare",
    claim="The image of the points where the coordinate vectors do not span the tangent space has "
    "measure zero (Proposition 1, by Sard's theorem).",
    setting="phi(s, t) = (s^2 - t, t^2 + s), non-proper where t = -1 / (4 s): 60 random points; "
    "the images of 10^5 non-proper points, and of 10^5 of all, 0.25 <= |s|, |t| <= 1, in boxes of "
    "side 1/16 and 1/32; phi(t) = t^3 at 0",
    origin="ours",
    fast=True,
)
@in_float64
def proposition_1(report: Report) -> Outcome:
    """Ranks at random points and at the exceptions, and the area that the exceptions reach."""

    def phi(t: Array) -> Array:
        return jnp.stack([t[0] ** 2 - t[1], t[1] ** 2 + t[0]])

    def area(s: Matrix, t: Matrix, side: float) -> float:
        image = np.asarray(phi(jnp.stack([s, t])))
        return side**2 * len(set(zip(*np.floor(image / side), strict=True)))

    report("counting")
    rng = np.random.default_rng(0)
    s, t = (1 - 0.75 * rng.random((2, 10**5))) * rng.choice([-1.0, 1.0], (2, 10**5))
    few = [geometry.is_proper(phi, jnp.asarray(p), 2) for p in zip(s[:60], t[:60], strict=True)]
    # where -1 / (4 s) is a number of the machine
    exact = [jnp.asarray([s, -1 / (4 * s)]) for s in (-1.0, -0.5, -0.25, 0.25, 0.5, 1.0)]
    cube = geometry.is_proper(lambda t: t**3, jnp.zeros(1), 1)
    report("measuring images")
    every, rare = (area(s, y, 1 / 32) / area(s, y, 1 / 16) for y in (t, -1 / (4 * s)))
    return Outcome(
        (
            close("share of proper points among random ones", float(np.mean(few)), 1, 0),
            close("share of proper points where t = -1 / (4 s)",
                  float(np.mean([geometry.is_proper(phi, point, 2) for point in exact])), 0, 0),
            close("t^3 is proper at 0", float(cube), 0, 0),
            between("area of the boxes that non-proper points reach, side 1/32 over 1/16",
                    rare, 0.45, 0.6),
            between("the same of all points", every, 0.85, 1),
        )
    )  # fmt: skip


@check(
    "VO-Prop2",
    "Only zero is independent of all parametrisations",
    claim="A representation that is the same for every parametrisation of a model is zero "
    "(Proposition 2): f(t) = t^3 + xi is a homeomorphism, and its derivative at t = 0 is zero "
    "(Remark 3).",
    setting="phi(xi) = (xi, 2 xi), xi = 1.5, L = x + y^2",
    origin="ours",
    fast=True,
)
@in_float64
def proposition_2(report: Report) -> Outcome:
    """The same point of a line, reached with speed zero."""

    def phi(xi: Array) -> Array:
        return jnp.concatenate([xi, 2 * xi])

    def psi(t: Array) -> Array:
        return phi(t**3 + 1.5)

    report("projecting")
    zero, xi, represent = jnp.zeros(1), jnp.full(1, 1.5), natural(lambda z: z[0] + z[1] ** 2)
    there = geometry.push_forward(psi, zero, represent(psi, zero))
    here = geometry.push_forward(phi, xi, represent(phi, xi))
    return Outcome(
        (
            below("|psi(0) - phi(1.5)|", float(jnp.linalg.norm(psi(zero) - phi(xi))), 0.0),
            below("push-forward of psi at 0", float(jnp.linalg.norm(there)), 0.0),
            # (1, 2) (1 + 2 * 2 y) / 5 at y = 3
            below("push-forward of phi against (2.6, 5.2)", max_abs_error(here, [2.6, 5.2]), 1e-12),
        )
    )
