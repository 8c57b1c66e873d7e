"""The suite of isotropy: its figures, its checks against theory, and what asv reads of it."""

import math

import numpy as np
import pytest

from benchmarks import isotropy
from benchmarks.isotropy import Isotropy
from ntk_analysis import IsotropyReport
from ntk_analysis.methods import STRUCTURES


def report(eigenvalues, alpha, *, asymmetry=0.0, failed=()):
    return IsotropyReport("x", np.sort(np.asarray(eigenvalues, float)), asymmetry, alpha, failed)


def test_figures_of_an_isotropic_structure_and_of_gradient_descent(tmp_path):
    suite = Isotropy()
    suite.setup(str(tmp_path), "block-diagonal", 48)
    assert suite.track_condition_number() == pytest.approx(1, abs=1e-9)
    assert suite.track_alpha_error() == suite.track_deviation() == isotropy.ROUNDING
    suite.setup(str(tmp_path), "gd", 48)
    assert suite.track_condition_number() > 100
    assert suite.track_deviation() > 1
    assert math.isnan(suite.track_alpha_error())


def test_what_the_suite_shows_is_named_and_has_units():
    assert len(Isotropy.params) == len(Isotropy.param_names)
    assert set(Isotropy.params[0]) <= set(STRUCTURES)
    tracks = [getattr(Isotropy, name) for name in dir(Isotropy) if name.startswith("track_")]
    assert len(tracks) == 3
    assert all(track.unit and track.__doc__ for track in tracks)


def test_alpha_error_is_relative():
    assert isotropy.alpha_error(report([2, 4], 2.0)) == pytest.approx(0.5)
    assert isotropy.alpha_error(report([2, 4], 4.0)) == pytest.approx(0.25)
    assert math.isnan(isotropy.alpha_error(report([2, 4], None)))


@pytest.mark.parametrize(
    ("structure", "found", "message"),
    [
        ("diagonal", report([-1, 2], None), "not symmetric and positive"),
        ("diagonal", report([1, 2], None, asymmetry=0.1), "not symmetric and positive"),
        ("diagonal", report([1e-30, 2], None), "singular"),
        ("gd", report([1, 1.5], None), "cannot be isotropic"),
        ("block-diagonal", report([3, 3.1], 3.0), "must be isotropic with alpha 3"),
        ("block-diagonal", report([2, 2], 3.0), "must be isotropic with alpha 3"),
        ("unit-wise", report([10, 20], 15.0), "must be isotropic"),
    ],
)
def test_a_spectrum_against_theory_raises(structure, found, message):
    with pytest.raises(ArithmeticError, match=message):
        isotropy.check(structure, 10_000, found, isotropy.alpha_error(found))


def test_spectra_that_theory_allows():
    for structure, found in (
        ("diagonal", report([1, 50], None)),
        ("kfac", report([1, 5], 3.0, failed=("a layer has too few units",))),
        # at width 64 unit-wise is isotropic up to about a quarter
        ("unit-wise", report([58, 70], 65.0)),
    ):
        isotropy.check(structure, 64, found, isotropy.alpha_error(found))
    with pytest.raises(ArithmeticError, match="unit-wise at width 65536"):
        isotropy.check("unit-wise", 65536, report([58, 70], 65.0), 0.02)
