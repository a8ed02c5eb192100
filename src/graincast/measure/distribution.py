"""Distribution of the grain sizes of a field or of a session: moments and percentiles by number and by area, log-normal fit."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from scipy import stats

LILLIEFORS_5_PERCENT = 0.886
"""Critical Kolmogorov distance to a normal law with fitted mean and variance, times sqrt(n), at 5 % and n > 30
(H. W. Lilliefors, J. Am. Stat. Assoc. 62 (1967) 399-402)."""


def distribution(diameter: np.ndarray, area: np.ndarray, unit: str) -> dict[str, float | None]:
    """Describe a distribution of equivalent diameters.

    Parameters
    ----------
    diameter, area : (N,) float ndarrays
        Of whole grains, in `unit` and its square.
    unit : str
        ``um`` or ``px``.

    Returns
    -------
    dict
        ``*`` stands for the unit; None for what too few grains leave undefined.

        ``mean_``, ``std_``, ``median_``, ``d10_``, ``d90_equivalent_diameter_*``
            Each grain counts once. Sample standard deviation; percentiles interpolated linearly.
        ``area_weighted_mean_``, ``..._std_``, ``..._median_``, ``..._d10_``, ``..._d90_equivalent_diameter_*``
            Each grain counts by its area: the share of the section that grains up to this size cover.
        ``lognormal_median_*``, ``lognormal_sigma``
            Of the log-normal law with the same mean and standard deviation of ln D: exp(mu) and sigma. mu itself is
            the logarithm of a length and changes with the unit.
        ``lognormal_ks``, ``lognormal_ks_critical_5_percent``
            Largest distance between the two cumulative distributions, and the distance from which on a log-normal
            law is refuted at 5 % (Lilliefors).
    """
    whole = diameter.size > 0
    several = diameter.size > 1
    rows: dict[str, Any] = {
        f"mean_equivalent_diameter_{unit}": diameter.mean() if whole else None,
        f"std_equivalent_diameter_{unit}": diameter.std(ddof=1) if several else None,
        f"area_weighted_mean_equivalent_diameter_{unit}": np.average(diameter, weights=area) if whole else None,
        f"area_weighted_std_equivalent_diameter_{unit}": _weighted_std(diameter, area) if several else None,
    }
    for name, share in (("d10", 0.1), ("median", 0.5), ("d90", 0.9)):
        rows[f"{name}_equivalent_diameter_{unit}"] = np.quantile(diameter, share) if whole else None
        weighted = np.quantile(diameter, share, weights=area, method="inverted_cdf") if whole else None
        rows[f"area_weighted_{name}_equivalent_diameter_{unit}"] = weighted
    return {name: plain(value) for name, value in {**rows, **_lognormal(diameter, unit)}.items()}


def _weighted_std(diameter: np.ndarray, area: np.ndarray) -> float:
    return math.sqrt(np.average((diameter - np.average(diameter, weights=area)) ** 2, weights=area))


def _lognormal(diameter: np.ndarray, unit: str) -> dict[str, float | None]:
    logs = np.log(diameter)
    sigma = float(logs.std(ddof=1)) if logs.size > 1 else None
    distance = float(stats.kstest(logs, stats.norm(logs.mean(), sigma).cdf).statistic) if sigma and sigma > 1e-9 else None
    return {
        f"lognormal_median_{unit}": math.exp(logs.mean()) if logs.size else None,
        "lognormal_sigma": sigma,
        "lognormal_ks": distance,
        "lognormal_ks_critical_5_percent": LILLIEFORS_5_PERCENT / math.sqrt(logs.size) if logs.size > 30 else None,
    }


def plain(value: Any) -> Any:
    """A number for JSON: NaN and infinity are None, numpy's own types Python's."""
    if value is None or isinstance(value, str):
        return value
    if not np.isfinite(value):
        return None
    return int(value) if isinstance(value, int | np.integer) else float(value)
