"""The theorems of van Oostrum et al. (2022) on random maps, metrics and objectives."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from natgrad_flax import geometry
from natgrad_flax.geometry import Map
from ntk_analysis.reproduce.precision import in_float64
from ntk_analysis.reproduce.registry import Outcome, Report, above, below, check, close
from ntk_analysis.reproduce.ruler import relative_error
from ntk_analysis.reproduce.van_oostrum.common import (
    DRAWS,
    Case,
    draw,
    drawn,
    picture,
    smallest,
    worst,
)

SETTING = (
    "phi = B sin(A xi + cos(C xi) / 4), whose fibres are curved, a metric that depends on the "
    f"point, {DRAWS} random draws, float64"
)


@check(
    "VO-Eq2",
    "The gradient of a model is a projection",
    claim="The natural gradient on a model is the orthogonal projection of the gradient of the "
    "space around it on the tangent space (Eq. 2); the projection is idempotent and self-adjoint "
    "in the metric.",
    setting=f"d = 5 parameters, D = 4, rank 3; {SETTING}",
    origin="ours",
    fast=True,
)
@in_float64
def eq_2(report: Report) -> Outcome:
    """The projection of ``span_projection`` by its defining properties."""
    report("projecting")

    def properties(case: Case) -> tuple[float, float, float]:
        projection = geometry.span_projection(case.phi, case.xi, case.metric)
        matrix = case.metric(case.phi(case.xi))
        jacobian = jax.jacfwd(case.phi)(case.xi)
        # what is left over is orthogonal to every coordinate vector
        rest = case.ambient - projection @ case.ambient
        adjoint = matrix @ projection
        return (
            relative_error(projection @ projection, projection),
            relative_error(adjoint.T, adjoint),
            float(jnp.linalg.norm(jacobian.T @ matrix @ rest) / jnp.linalg.norm(matrix @ rest)),
        )

    found = [properties(draw(seed, 5, 4, 3)) for seed in range(DRAWS)]
    square, adjoint, rest = (max(values) for values in zip(*found, strict=True))
    return Outcome(
        (
            below("Pi^2 - Pi, relative", square, 1e-10),
            below("g Pi - (g Pi)^T, relative", adjoint, 1e-10),
            below("grad - Pi grad against the coordinate vectors", rest, 1e-10),
        ),
        picture(),
    )


@check(
    "VO-Eq4",
    "Generalised inverses solve what can be solved",
    claim="A A^- w = w for every generalised inverse A^- and every w in the range of A (Eq. 4).",
    setting=f"A of shape 6 x 5 and rank 3, A^- = A^+ + Z - A^+ A Z A A^+, {DRAWS} draws",
    origin="ours",
    fast=True,
)
@in_float64
def eq_4(report: Report) -> Outcome:
    """Random inverses that are neither reflexive nor symmetric."""
    report("inverting")
    rng, errors, gaps = np.random.default_rng(0), [], []
    for _ in range(DRAWS):
        matrix = jnp.asarray(rng.standard_normal((6, 3)) @ rng.standard_normal((3, 5)))
        free = jnp.asarray(rng.standard_normal((5, 6)))
        inverse = geometry.any_generalised_inverse(matrix, free)
        inside = matrix @ jnp.asarray(rng.standard_normal(5))
        errors.append(relative_error(matrix @ (inverse @ inside), inside))
        gaps.append(relative_error(inverse, jnp.linalg.pinv(matrix)))
    return Outcome(
        (
            below("A A^- w - w, relative", max(errors), 1e-10),
            above("A^- - A^+, relative, in every draw", min(gaps), 0.1),
        )
    )


@check(
    "VO-Thm1",
    "The push-forward is the projected gradient, whatever the inverse",
    claim="d phi G^- grad_xi L = Pi grad L for every generalised inverse (Lemma 1, Theorem 1), and "
    "it is the natural gradient of the model where the coordinate vectors span its tangent space.",
    setting=f"d = 5, D = 4, rank 3, and d = 6, D = 4, rank 4; {SETTING}",
    origin="ours",
    fast=True,
)
@in_float64
def theorem_1(report: Report) -> Outcome:
    """Moore-Penrose and a random inverse against the projection."""

    def error(case: Case, free: bool) -> float:
        inverse = None
        if free:
            inverse = lambda gram: geometry.any_generalised_inverse(gram, case.free)  # noqa: E731
        vector = geometry.natural_parameter_gradient(
            case.phi, case.objective, case.xi, case.metric, inverse
        )
        moved = geometry.push_forward(case.phi, case.xi, vector)
        projection = geometry.span_projection(case.phi, case.xi, case.metric)
        return relative_error(moved, projection @ case.ambient)

    def proper(case: Case) -> float:
        moved = geometry.push_forward(case.phi, case.xi, case.natural(case.phi, case.xi))
        return relative_error(moved, case.ambient)

    report("comparing push-forwards")
    return Outcome(
        (
            below(
                "Moore-Penrose inverse, relative", worst(lambda c: error(c, False), 5, 4, 3), 1e-10
            ),
            below("random inverse, relative", worst(lambda c: error(c, True), 5, 4, 3), 1e-8),
            below("proper points: against the gradient itself", worst(proper, 6, 4, 4), 1e-8),
            above("the same at rank 3, in every draw", smallest(proper, 5, 4, 3), 1e-3),
        )
    )


@check(
    "VO-Thm2",
    "Reparametrisation invariance on the model",
    claim="For psi = phi o f with a diffeomorphism f, the push-forwards of the two natural "
    "parameter gradients are equal (Theorem 2).",
    setting=f"d = 5, D = 4, rank 3, f(theta) = A theta + tanh(theta) / 5; {SETTING}",
    origin="ours",
    fast=True,
)
@in_float64
def theorem_2(report: Report) -> Outcome:
    """The violation of the natural gradient, and of the gradient for comparison."""

    def violation(case: Case) -> float:
        return float(geometry.model_violation(case.natural, case.phi, case.change, case.xi))

    def of_gradient(case: Case) -> float:
        def plain(phi: Map, xi: Array) -> Array:
            slope: Array = jax.grad(lambda here: case.objective(phi(here)))(xi)
            return slope

        return float(geometry.model_violation(plain, case.phi, case.change, case.xi))

    report("changing parameters")
    return Outcome(
        (
            below("natural gradient: difference on the model", worst(violation, 5, 4, 3), 1e-10),
            above("ordinary gradient, in every draw", smallest(of_gradient, 5, 4, 3), 1e-3),
        ),
        picture(),
    )


@check(
    "VO-Rem1",
    "Where the parametrisation is a diffeomorphism, all notions agree",
    claim="If phi is a diffeomorphism onto the model, invariance on the model and on the parameter "
    "space are the same, and the natural gradient has both (Remark 1).",
    setting=f"d = 3, D = 4, rank 3; {SETTING}",
    origin="ours",
    fast=True,
)
@in_float64
def remark_1(report: Report) -> Outcome:
    """Both violations of an immersion."""
    report("changing parameters")

    def on_parameters(case: Case) -> float:
        return float(geometry.parameter_violation(case.natural, case.phi, case.change, case.xi))

    def on_model(case: Case) -> float:
        return float(geometry.model_violation(case.natural, case.phi, case.change, case.xi))

    return Outcome(
        (
            below("difference of parameter vectors", worst(on_parameters, 3, 4, 3), 1e-9),
            below("difference on the model", worst(on_model, 3, 4, 3), 1e-10),
        )
    )


@check(
    "VO-Sec3.2",
    "No invariance on the parameter space",
    claim="In overparametrised models df(grad_theta) differs from grad_xi, by a vector that d phi "
    "maps to zero; it is F^T (F G F^T)^+ F grad_xi L, the solution of G y = grad_xi L that is "
    "shortest in the norm |F^-T y| (Eqs. 26-33).",
    setting="d = 5, D = 4, rank 3, F the transposed derivative of f, and the case of the figure; "
    f"{SETTING}",
    origin="ours",
    fast=True,
)
@in_float64
def section_3_2(report: Report) -> Outcome:
    """The vector of Eq. 31, written out."""
    report("changing parameters")

    def parts(case: Case) -> tuple[float, float, float, float]:
        theta, xi = case.xi, case.change(case.xi)
        derivative = jax.jacfwd(case.change)(theta)
        moved = derivative @ case.natural(case.psi, theta)
        mine = case.natural(case.phi, xi)
        gram = geometry.gram_matrix(case.phi, xi, case.metric)
        slope = jax.grad(lambda here: case.objective(case.phi(here)))(xi)
        inner = jnp.linalg.pinv(derivative.T @ gram @ derivative, rtol=1e-11)
        printed = derivative @ inner @ derivative.T @ slope
        unseen = geometry.push_forward(case.phi, xi, moved - mine)
        # the shortest solution has no part in the kernel of G, in its own norm
        kernel = jnp.eye(len(xi)) - jnp.linalg.pinv(gram, rtol=1e-11) @ gram
        back = jnp.linalg.inv(derivative)
        leak = kernel.T @ back.T @ back @ moved
        return (
            relative_error(moved, mine),
            float(jnp.linalg.norm(unseen) / jnp.linalg.norm(moved - mine)),
            relative_error(moved, printed),
            float(jnp.linalg.norm(leak) / jnp.linalg.norm(back @ moved)),
        )

    found = [parts(case) for case in (drawn(), *(draw(seed, 5, 4, 3) for seed in range(DRAWS)))]
    gap, unseen, printed, leak = zip(*found, strict=True)
    return Outcome(
        (
            above("|y_Theta - y_Xi| / |y_Xi|, in every draw", min(gap), 1e-3),
            below("d phi (y_Theta - y_Xi), relative", max(unseen), 1e-9),
            below("y_Theta against Eq. 31, relative", max(printed), 1e-8),
            below("F^-T y_Theta against the kernel of G: not shorter", max(leak), 1e-8),
        ),
        picture(),
    )


FIBRES = {"full rank": (3, 4, 3), "flat fibres": (5, 4, 3), "curved fibres": (5, 4, 3)}
"""Shapes (d, D, r) of the maps that steps are taken with."""
CHANGES = ("orthogonal", "affine", "nonlinear")
AGREE = {("orthogonal", fibres) for fibres in FIBRES} | {
    ("affine", "full rank"),
    ("affine", "flat fibres"),
}
"""Changes f and maps for which a step of any size ends at one point of the model."""


def stepping_case(seed: int, change: str, fibres: str) -> Case:
    """A random case with the kind of f and of phi that decide whether finite steps agree."""
    case = draw(seed, *FIBRES[fibres], flat=fibres == "flat fibres")
    # both are invertible; f = A theta + tanh(theta) / 5 has a derivative like A
    matrix = jax.jacfwd(case.change)(jnp.zeros(len(case.xi)))
    if change == "orthogonal":
        matrix = jnp.linalg.qr(matrix)[0]
    shift = case.free[0]
    changes = {"nonlinear": case.change}
    return replace(case, change=changes.get(change, lambda theta: matrix @ theta + shift))


@check(
    "VO-traj",
    "When finite steps with two parametrisations end at one point",
    claim="A step of finite size with phi and with phi o f ends in general at different points of "
    "the model (Section 4, discussion).",
    setting="step sizes 0.2, 1e-3 and 5e-4; f orthogonal and affine, affine, and A theta + "
    f"tanh(theta) / 5; d = 3, D = 4, rank 3, or d = 5 and fibres that are flat, phi = B sin(A xi), "
    f"or curved; {SETTING}; the classification is ours",
    origin="ours",
    fast=True,
)
@in_float64
def trajectories(report: Report) -> Outcome:
    """Distances on the model where steps should agree, and their order where they should not.

    With an orthogonal matrix Q, (Q^T G Q)^+ = Q^T G^+ Q: even the parameters agree. With any other
    the two vectors differ by one in the kernel of d phi, which is empty at full rank; a flat fibre
    contains the whole step along it, a curved one is left at the second order, as is the line that
    a nonlinear f bends.
    """
    report("stepping")

    def gap(case: Case, rate: float) -> float:
        return float(geometry.finite_step_gap(case.natural, case.phi, case.change, case.xi, rate))

    measurements = []
    for fibres in FIBRES:
        for change in CHANGES:
            what = f"{fibres}, f {change}"
            cases = [stepping_case(seed, change, fibres) for seed in range(4)]
            if (change, fibres) in AGREE:
                largest = max(gap(case, 0.2) for case in cases)
                measurements.append(below(f"{what}: distance after a step of 0.2", largest, 1e-12))
                continue
            gaps = np.array([[gap(case, rate) for rate in (1e-3, 5e-4)] for case in cases])
            measurements.append(
                close(f"{what}: order in the step size, the draw farthest from 2",
                      max(np.log2(gaps[:, 0] / gaps[:, 1]), key=lambda order: abs(order - 2)),
                      2, 0.15)
            )  # fmt: skip
            measurements.append(
                above(f"{what}: distance after a step of 1e-3, smallest", gaps[:, 0].min(), 1e-10)
            )
    return Outcome(tuple(measurements))
