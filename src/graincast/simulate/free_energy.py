r"""The grain-growth model that every solver here solves, and the time steps that keep it stable.

Every grain i has an order parameter :math:`\eta_i`, 1 inside the grain and 0 outside. The free energy [1]_

.. math:: F = \int \sum_i \left(-\frac{\eta_i^2}{2} + \frac{\eta_i^4}{4}\right) + \sum_{i<j} \eta_i^2 \eta_j^2
              + \sum_i \frac12 \nabla\eta_i \cdot K \nabla\eta_i + \Psi \sum_i \eta_i^2 \; dV

falls along the Allen-Cahn equation :math:`\partial\eta_i/\partial t = -L\,\delta F/\delta\eta_i`. With
:math:`\phi = \sum_i \eta_i^2`, L = 1, grid spacing 1 and periodic boundaries this is

.. math:: \partial\eta_i/\partial t = \eta_i \, (1 + \eta_i^2 - 2\phi - 2\Psi) + \nabla \cdot K \nabla \eta_i .

**Anisotropy.** K is the identity (kappa = 1) unless the boundary energy depends on the direction of the boundary. Its
normal n then costs :math:`\sqrt{n \cdot K n}` of the isotropic energy. det K = 1, so areas shrink at the isotropic rate.

**Obstacles.** :math:`\Psi` is 0 in the material and `OBSTACLE` in pores and second-phase particles, which no grain can
enter; boundaries that run through them are shorter, which pins them [2]_.

References
----------
.. [1] L.-Q. Chen, W. Yang, Phys. Rev. B 50 (1994) 15752, doi:10.1103/PhysRevB.50.15752.
.. [2] N. Moelans, B. Blanpain, P. Wollants, Acta Mater. 53 (2005) 1771, doi:10.1016/j.actamat.2004.12.026.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from graincast.errors import UserError

OBSTACLE = 1.0
"""Energy density that an order parameter of 1 costs inside an obstacle, in units of the bulk energy density; above
0.5 no grain can live there."""


class Stencil(NamedTuple):
    """Weights of a cell's neighbours in div(K grad eta), planar: 9 points.

    Attributes
    ----------
    across : float
        Of the neighbours to the left and to the right.
    down : float
        Of those above and below.
    falling : float
        Of those to the upper left and to the lower right.
    rising : float
        Of those to the upper right and to the lower left.
    """

    across: float
    down: float
    falling: float
    rising: float

    @property
    def kernel(self) -> np.ndarray:
        """(3, 3), float64, weight of the cell itself included: the weights add up to 0."""
        a, d, f, r = self
        return np.array([[f, d, r], [a, -2 * (a + d + f + r), a], [r, d, f]])

    @property
    def stiffness(self) -> float:
        """Largest kappa of any direction, the largest eigenvalue of K."""
        a, d, f, r = self
        return float(np.linalg.eigvalsh([[a + f + r, f - r], [f - r, d + f + r]])[-1])


ISOTROPIC = Stencil(4 / 6, 4 / 6, 1 / 6, 1 / 6)
"""The isotropic Laplacian: its leading error does not depend on direction."""

STRONGEST_ANISOTROPY = 2.0
"""Largest ratio of boundary energies: the thinnest boundaries are then 0.7 times as wide as isotropic ones."""

VOLUME_KERNEL = np.zeros((3, 3, 3))
"""The isotropic 19-point Laplacian of volumes: 1/3 for faces, 1/6 for edges. On a volume one cell deep it is that of
`ISOTROPIC`."""
VOLUME_KERNEL[1] = np.array([[1, 2, 1], [2, -24, 2], [1, 2, 1]]) / 6
VOLUME_KERNEL[0] = VOLUME_KERNEL[2] = np.array([[0, 1, 0], [1, 2, 1], [0, 1, 0]]) / 6


def anisotropic_stencil(ratio: float, direction_deg: float) -> Stencil:
    """Weights for a boundary energy that depends on the boundary's direction.

    Parameters
    ----------
    ratio : float
        Largest boundary energy by smallest, 1 (isotropic) to `STRONGEST_ANISOTROPY`.
    direction_deg : float
        Direction of the boundaries of smallest energy, along which grains become long: degrees from +x (right)
        towards the image's top.

    Returns
    -------
    Stencil
        Second-order accurate. No weight is negative, so that order parameters stay between 0 and 1.

    Raises
    ------
    UserError
        If the ratio is below 1 or above `STRONGEST_ANISOTROPY`.

    Examples
    --------
    >>> anisotropic_stencil(1, 30) == ISOTROPIC
    True
    >>> [round(weight, 3) for weight in anisotropic_stencil(2, 0)]
    [1.583, 0.083, 0.208, 0.208]
    """
    if not 1 <= ratio <= STRONGEST_ANISOTROPY:
        raise UserError(f"simulate.boundary_anisotropy: {ratio:g} is outside 1 (isotropic) to {STRONGEST_ANISOTROPY:g} "
                        "(as much as the grid resolves)")
    if ratio == 1:
        return ISOTROPIC
    x, y = math.cos(math.radians(direction_deg)), -math.sin(math.radians(direction_deg))  # rows run downwards
    # A boundary along (x, y) has its normal across it, for which n.Kn is 1 / ratio.
    k_xx = ratio * x * x + y * y / ratio
    k_yy = ratio * y * y + x * x / ratio
    k_xy = (ratio - 1 / ratio) * x * y
    diagonals = max((k_xx + k_yy) / 6, abs(k_xy))  # the former as in `ISOTROPIC`, the latter so that no weight is negative
    return Stencil(k_xx - diagonals, k_yy - diagonals, (diagonals + k_xy) / 2, (diagonals - k_xy) / 2)


def time_step_bound(kernel: np.ndarray, obstacles: bool = False) -> float:
    """Largest stable time step of the explicit Euler scheme, in units of 1/L.

    Parameters
    ----------
    kernel : numpy.ndarray
        Weights of div(K grad eta), (3, 3) or (3, 3, 3), none negative but the cell's own.
    obstacles : bool, optional
        Whether there are obstacles.

    Returns
    -------
    float
        A step up to the bound maps states with phi <= 1 and eta >= 0 to such states, and does not raise the energy.

    Notes
    -----
    With c the magnitude of the cell's own weight, a step averages the neighbours (weights dt w, in sum dt c) with the
    cell's own eta (1 - dt c), changed by its reaction. phi' <= 1 follows from Jensen's inequality when
    s (1 + t (1 - s^2)) <= 1 for s <= 1 and t = dt / (1 - dt c), that is t <= 1/2 or dt <= 1 / (c + 2). eta' >= 0 when
    t (2 phi + 2 Psi - 1) <= 1, that is dt <= 1 / (c + 1 + 2 Psi). On that set of states the Hessian of F is at most
    the largest eigenvalue of -div(K grad), plus 5 for the bulk terms, plus 2 Psi, and a gradient step of at most 2
    over that does not raise F.

    Examples
    --------
    >>> round(time_step_bound(ISOTROPIC.kernel), 4), round(time_step_bound(ISOTROPIC.kernel, obstacles=True), 4)
    (0.1875, 0.1579)
    """
    penalty = OBSTACLE if obstacles else 0.0
    centre = -float(kernel[(1,) * kernel.ndim])
    return min(1 / (centre + 2), 1 / (centre + 1 + 2 * penalty), 2 / (_stiffest(kernel) + 5 + 2 * penalty))


def _stiffest(kernel: np.ndarray) -> float:
    """Largest eigenvalue of the negative of a periodic convolution, found among 32 wave numbers a direction."""
    field = np.zeros((32,) * kernel.ndim)
    field[(slice(3),) * kernel.ndim] = -kernel
    return float(np.abs(np.fft.fftn(field)).max())


def check_time_step(time_step: float, kernel: np.ndarray, obstacles: bool = False) -> None:
    """Refuse a time step that is not stable.

    Raises
    ------
    UserError
        Naming the bound.
    """
    bound = time_step_bound(kernel, obstacles)
    if not 0 < time_step <= bound * (1 + 1e-9):
        raise UserError(f"simulate.time_step: {time_step:g} is not stable, the explicit scheme needs a time step above "
                        f"0 and at most {bound:.4g} (in units of 1/L)")
