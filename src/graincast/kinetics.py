"""The kinetics of grain growth: R^n - R0^n = k t (Burke & Turnbull 1952), fitted with intervals that know how few grains there are.

Mean sizes at successive times are of the same grains, so their errors go together, and the residuals of a fit look far better
than the fit is. What can be taken as independent are parts of the field some grains wide: the field is cut into blocks, and
every interval is the jackknife's over these [1]_, with all times of a block left out at once.

References
----------
.. [1] B. Efron, R. J. Tibshirani, "An Introduction to the Bootstrap", Chapman & Hall 1993, chapter 11 (delete-one jackknife, here of
   blocks, as H. R. Kuensch, Ann. Statist. 17 (1989) 1217-1241, does for dependent data).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.stats import t as student

from graincast.errors import UserError

CONFIDENCE = 0.95
EXPONENTS = (0.5, 12.0)
"""Exponents that are sought: 2 is ideal grain growth, 3 and 4 diffusion of solutes and pores; beyond lies stagnation."""
IDEAL = 2.0
"""Exponent of curvature-driven growth (Burke & Turnbull 1952)."""
FEWEST_TIMES = 4
"""One more than n, R0 and k."""


@dataclass(frozen=True)
class Sizes:
    """Diameters of the grains of a growing structure, summed up by block and time.

    Attributes
    ----------
    count, total, squares : ndarray
        (blocks, times), float: number of grains, sum of their diameters and of the squares of these.
    """

    count: np.ndarray
    total: np.ndarray
    squares: np.ndarray

    def at(self, times: np.ndarray) -> Sizes:
        """Those at some of the times (a mask or indices)."""
        return Sizes(self.count[:, times], self.total[:, times], self.squares[:, times])

    def without(self, block: int) -> Sizes:
        """All blocks but one."""
        return Sizes(*(np.delete(values, block, axis=0) for values in (self.count, self.total, self.squares)))

    @property
    def mean(self) -> np.ndarray:
        """Mean diameter at each time, (times,); NaN where there is no grain."""
        return self._by_count(self.total)

    @property
    def deviation(self) -> np.ndarray:
        """Standard deviation of the diameters at each time, (times,)."""
        return np.sqrt(np.maximum(self._by_count(self.squares) - self.mean**2, 0))

    def _by_count(self, values: np.ndarray) -> np.ndarray:
        count = self.count.sum(axis=0)
        return np.divide(values.sum(axis=0), count, out=np.full(count.shape, np.nan), where=count > 0)


@dataclass(frozen=True)
class Estimate:
    """A value with its `CONFIDENCE` interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3g} ({self.low:.3g} to {self.high:.3g})"


@dataclass(frozen=True)
class Kinetics:
    """What was fitted; lengths in the unit of the diameters, R being half of their mean, times in that of the times.

    Attributes
    ----------
    exponent : Estimate
        n of R^n - R0^n = k (t - t0), t0 the first time, with R0 and k free as well.
    initial_radius, rate : float
        R0 and k of that fit; k in length^n per time.
    ideal_initial_radius, ideal_rate : Estimate
        The same with n = 2; k in length^2 per time.
    log_slope : Estimate
        d log R / d log t: 1 / n where R0 and t0 no longer count, less before.
    r_squared, ideal_r_squared : float
        Of R, of both fits.
    replicates : dict of str to ndarray
        exponent, ideal_rate and log_slope with each block left out, (blocks,).
    """

    exponent: Estimate
    initial_radius: float
    rate: float
    ideal_initial_radius: Estimate
    ideal_rate: Estimate
    log_slope: Estimate
    r_squared: float
    ideal_r_squared: float
    replicates: dict[str, np.ndarray]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, without the replicates."""
        return {key: value for key, value in asdict(self).items() if key != "replicates"}


def fit_kinetics(times: np.ndarray, sizes: Sizes) -> Kinetics:
    """Fit the growth law to mean grain sizes.

    Parameters
    ----------
    times : ndarray
        (times,), rising, > 0, at least `FEWEST_TIMES`.
    sizes : Sizes
        Of at least two blocks.

    Returns
    -------
    Kinetics
        Least squares in R, each time weighted by the square of the standard error of its mean, R^n being linear in t for each
        n; intervals by the jackknife over the blocks, with Student's t.

    Raises
    ------
    UserError
        If there are too few times, they do not rise from above 0, or no size is known at one of them.
    """
    times = np.asarray(times, float)
    if len(times) < FEWEST_TIMES:
        raise UserError(f"growth kinetics have three unknowns (n, R0, k) and {len(times)} times; at least {FEWEST_TIMES} would be right")
    if times[0] <= 0 or (np.diff(times) <= 0).any():
        raise UserError("the times of growth kinetics have to rise and lie after 0")
    replicates = [_fit(times, sizes.without(block)) for block in range(len(sizes.count))]
    whole, left_out = _fit(times, sizes), {name: np.array([one[name] for one in replicates]) for name in replicates[0]}

    def estimate(name: str) -> Estimate:
        return interval(whole[name], left_out[name])

    return Kinetics(estimate("exponent"), whole["initial_radius"], whole["rate"], estimate("ideal_initial_radius"), estimate("ideal_rate"),
                    estimate("log_slope"), whole["r_squared"], whole["ideal_r_squared"],
                    {name: left_out[name] for name in ("exponent", "ideal_rate", "log_slope")})


def difference(a: Kinetics, b: Kinetics, name: str) -> Estimate:
    """``a`` less ``b`` in exponent, ideal_rate or log_slope, of the same blocks: what both have in common drops out of the interval."""
    return interval(getattr(a, name).value - getattr(b, name).value, a.replicates[name] - b.replicates[name])


def interval(value: float, left_out: np.ndarray) -> Estimate:
    """A value with the jackknife's interval from its `left_out` (blocks,) replicates."""
    blocks = len(left_out)
    error = np.sqrt((blocks - 1) / blocks * np.sum((left_out - left_out.mean()) ** 2))
    reach = float(student.ppf((1 + CONFIDENCE) / 2, blocks - 1) * error)
    return Estimate(float(value), float(value) - reach, float(value) + reach)


def radius_at(times: np.ndarray, since: float, exponent: float, initial_radius: float, rate: float) -> np.ndarray:
    """R of the law at `times`, (times,), that began with `initial_radius` at the time `since`."""
    return np.maximum(initial_radius**exponent + rate * (times - since), 0) ** (1 / exponent)


def _fit(times: np.ndarray, sizes: Sizes) -> dict[str, float]:
    radius = sizes.mean / 2
    error = sizes.deviation / 2 / np.sqrt(sizes.count.sum(axis=0))
    if not (np.isfinite(radius).all() and (error > 0).all()):
        raise UserError("at some times fewer than two grains were seen, so their sizes have no spread; a larger field would be right")
    found = minimize_scalar(lambda n: _linear(times, radius, error, n)[2], bounds=EXPONENTS, method="bounded", options={"xatol": 1e-4})
    exponent = float(found.x)
    power, rate, _ = _linear(times, radius, error, exponent)
    ideal_power, ideal_rate, _ = _linear(times, radius, error, IDEAL)
    initial, ideal_initial = max(power, 0.0) ** (1 / exponent), max(ideal_power, 0.0) ** (1 / IDEAL)
    return {"exponent": exponent, "initial_radius": initial, "rate": rate,
            "ideal_initial_radius": ideal_initial, "ideal_rate": ideal_rate,
            "log_slope": float(np.polyfit(np.log(times), np.log(radius), 1, w=radius / error)[0]),
            "r_squared": _r_squared(radius, radius_at(times, times[0], exponent, initial, rate)),
            "ideal_r_squared": _r_squared(radius, radius_at(times, times[0], IDEAL, ideal_initial, ideal_rate))}


def _linear(times: np.ndarray, radius: np.ndarray, error: np.ndarray, exponent: float) -> tuple[float, float, float]:
    """R0^n, k and the sum of squares of the weighted line through R^n; errors of R^n are n R^(n-1) times those of R."""
    scale = np.exp(np.mean(np.log(radius)))  # so that powers stay of the order of 1
    ratio = radius / scale
    weight = scale / (exponent * ratio ** (exponent - 1) * error)
    rate, power = np.polyfit(times - times[0], ratio**exponent, 1, w=weight)
    residual = weight * (ratio**exponent - power - rate * (times - times[0]))
    return float(power * scale**exponent), float(rate * scale**exponent), float(residual @ residual)


def _r_squared(found: np.ndarray, fitted: np.ndarray) -> float:
    return float(1 - np.sum((found - fitted) ** 2) / np.sum((found - found.mean()) ** 2))
