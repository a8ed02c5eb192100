"""Grain size numbers, as the standards define them.

Every function takes quantities at unit magnification, in mm, and names standard and procedure.

References
----------
.. [1] ASTM E112-13, "Standard Test Methods for Determining Average Grain Size". Its metric number comes from the
   planimetric count; the intercept formula gives 0.015 more where the mean intercept is sqrt(pi A / 4), A the mean area.
.. [2] ASTM E1382-97, "Standard Test Methods for Determining Average Grain Size Using Semiautomatic and Automatic Image
   Analysis", from the mean area of the grains that the border does not cut.
.. [3] ASTM E930-99, "Standard Test Methods for Estimating the Largest Grain Observed in a Metallographic Section (ALA Grain
   Size)".
.. [4] ISO 643:2019, "Steels - Micrographic determination of the apparent grain size": m = 8 * 2^G.
"""

from __future__ import annotations

import math

MIN_GRAINS, MIN_FIELDS = 50, 5
"""What ASTM E112-13 asks for: grains in a field of the planimetric procedure, and fields of a specimen."""
ACCEPTABLE_PERCENT = 10
"""Relative accuracy that ASTM E112-13 calls acceptable for most purposes, per cent."""


def astm_e112_planimetric(grains_per_mm2: float) -> float:
    """G of the planimetric (Jeffries) procedure [1]_ from N_A, 1/mm^2.

    Examples
    --------
    >>> round(astm_e112_planimetric(15.50), 2)  # one grain per square inch at 100x is G = 1 by definition
    1.0
    """
    return 3.321928 * math.log10(grains_per_mm2) - 2.954


def astm_e112_intercept(mean_intercept_mm: float) -> float:
    """G of the intercept procedures [1]_ from the mean lineal intercept, mm.

    Examples
    --------
    >>> round(astm_e112_intercept(0.320), 2)  # G = 0
    -0.0
    """
    return -6.643856 * math.log10(mean_intercept_mm) - 3.288


def astm_e1382_area(mean_area_mm2: float) -> float:
    """G from the mean area of whole grains [2]_, mm^2."""
    return -3.3223 * math.log10(mean_area_mm2) - 2.955


def astm_e930_ala(largest_area_mm2: float) -> float:
    """G of the largest grain in view, "as large as" [3]_, from its area, mm^2: the planimetric number of one grain in it."""
    return astm_e112_planimetric(1 / largest_area_mm2)


def iso_643_planimetric(grains_per_mm2: float) -> float:
    """G from m, grains per mm^2 [4]_; 0.046 below ASTM's number of the same count.

    Examples
    --------
    >>> iso_643_planimetric(16)
    1.0
    """
    return math.log2(grains_per_mm2 / 8)
