r"""Dense solvers of the grain-growth model: the other ways to run it, which `benchmarks.simulate` compares with.

Each keeps all N order parameters on every cell, as float32, and takes the same explicit Euler steps with the same
isotropic 9-point Laplacian as `graincast.simulate.phase_field.GrainGrowth`:

.. math:: \eta_i' = \eta_i + \Delta t \, [\eta_i (1 + \eta_i^2 - 2\phi) + \nabla^2 \eta_i], \quad \phi = \sum_i \eta_i^2 .

All are written to be fast: what the sparse solver is measured against has to be a fair opponent.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, Protocol

import numba
import numpy as np

from graincast.errors import UserError

F32 = np.float32
LINE = 16  # float32 values a cache line


class Peer(Protocol):
    """A dense solver of one structure."""

    def __init__(self, labels: np.ndarray, time_step: float) -> None:
        """Start from dense ids 1..N, (height, width), integer, periodic, with sharp boundaries."""

    def advance(self, steps: int) -> None:
        """Take `steps` time steps."""

    def order_parameters(self) -> np.ndarray:
        """(N, height, width), float32."""


def one_hot(labels: np.ndarray) -> np.ndarray:
    """Order parameters of sharp grains, (N, height, width), float32."""
    return (labels == np.arange(1, labels.max() + 1)[:, None, None]).astype(F32)


class PlainNumpy:
    """The model written down in NumPy as one does: whole arrays, neighbours by `numpy.roll`."""

    def __init__(self, labels: np.ndarray, time_step: float) -> None:
        self._eta = one_hot(labels)
        self._time_step = F32(time_step)

    def advance(self, steps: int) -> None:
        for _ in range(steps):
            eta = self._eta
            phi = (eta**2).sum(0)
            self._eta = eta + self._time_step * (eta * (1 + eta**2 - 2 * phi) + self._laplacian())

    def _laplacian(self) -> np.ndarray:
        def moved(rows: int, columns: int) -> np.ndarray:
            return np.roll(self._eta, (rows, columns), (1, 2))

        edges = moved(1, 0) + moved(-1, 0) + moved(0, 1) + moved(0, -1)
        corners = moved(1, 1) + moved(1, -1) + moved(-1, 1) + moved(-1, -1)
        return (4 * edges + corners - 20 * self._eta) / F32(6)

    def order_parameters(self) -> np.ndarray:
        return self._eta


class TunedNumpy:
    """NumPy at its best: one grain at a time, which stays in cache; all in place, nothing allocated, a periodic halo.

    The Laplacian is separable: [1, 4, 1] down times [1, 4, 1] across, over 6, less 6 of the cell itself.
    """

    def __init__(self, labels: np.ndarray, time_step: float) -> None:
        height, width = labels.shape
        self._eta = np.pad(one_hot(labels), ((0, 0), (1, 1), (1, 1)))
        self._time_step = F32(time_step)
        self._reaction, self._work = np.empty((2, height, width), F32)
        self._column = np.empty((height, width + 2), F32)

    def advance(self, steps: int) -> None:
        for _ in range(steps):
            self._react()
            for eta in self._eta:
                self._update(eta)

    def _react(self) -> None:
        """The factor 1 + dt (1 - 6 - 2 phi) that all grains share; the halos."""
        self._reaction.fill(0)
        for eta in self._eta:
            eta[0], eta[-1] = eta[-2], eta[1]
            eta[:, 0], eta[:, -1] = eta[:, -2], eta[:, 1]
            np.square(eta[1:-1, 1:-1], out=self._work)
            self._reaction += self._work
        self._reaction *= -2 * self._time_step
        self._reaction += 1 - 5 * self._time_step

    def _update(self, eta: np.ndarray) -> None:
        own, column, work = eta[1:-1, 1:-1], self._column, self._work
        np.multiply(eta[1:-1], 4, out=column)
        column += eta[:-2]
        column += eta[2:]
        column *= self._time_step / 6
        np.square(own, out=work)
        work *= self._time_step
        work += self._reaction
        own *= work
        np.multiply(column[:, 1:-1], 4, out=work)
        work += column[:, :-2]
        work += column[:, 2:]
        own += work

    def order_parameters(self) -> np.ndarray:
        return self._eta[:, 1:-1, 1:-1]


class FusedNumba:
    """All order parameters in one parallel, vectorised sweep, close to memory bandwidth.

    Of several layouts and blockings this was the fastest on a machine with two cores: image row by image row, all
    grains' rows one behind the other. phi of the next row is summed while its cells are in the cache as neighbours of
    this one, so that each cell is read from memory once and written once a step.
    """

    def __init__(self, labels: np.ndarray, time_step: float) -> None:
        rows = one_hot(labels).transpose(1, 0, 2)
        self._eta = np.pad(rows, ((0, 0), (0, 0), (1, 1)), mode="wrap")
        self._spare = np.empty_like(self._eta)
        self._time_step = F32(time_step)

    def advance(self, steps: int) -> None:
        for _ in range(steps):
            _sweep(self._eta, self._spare, self._time_step)
            self._eta, self._spare = self._spare, self._eta

    def order_parameters(self) -> np.ndarray:
        return self._eta[:, :, 1:-1].transpose(1, 0, 2)


BANDS = 8
"""Bands of image rows that `_sweep` shares out among the threads."""


@numba.njit(cache=True, parallel=True, fastmath=True)
def _sweep(cells: np.ndarray, spare: np.ndarray, time_step: float) -> None:
    """One Euler step of (height, N, width + 2) cells, the outer two of each row periodic echoes."""
    height, grains, padded = cells.shape
    width = padded - 2
    edge, corner = time_step * F32(4 / 6), time_step * F32(1 / 6)
    keep, twice = F32(1) + time_step * F32(1 - 20 / 6), F32(2) * time_step
    for band in numba.prange(BANDS):
        first, end = band * height // BANDS, (band + 1) * height // BANDS
        reaction, coming = np.empty(width, F32), np.zeros(width, F32)
        for grain in range(grains):
            for x in range(width):
                coming[x] += cells[first, grain, x + 1] ** 2
        for y in range(first, end):
            for x in range(width):
                reaction[x] = keep - twice * coming[x]
                coming[x] = 0
            for grain in range(grains):
                above, here = cells[y - 1 if y else height - 1, grain], cells[y, grain]
                below, new = cells[y + 1 if y + 1 < height else 0, grain], spare[y, grain]
                for x in range(width):
                    eta, next_eta = here[x + 1], below[x + 1]
                    coming[x] += next_eta * next_eta
                    edges = here[x] + here[x + 2] + above[x + 1] + next_eta
                    corners = above[x] + above[x + 2] + below[x] + below[x + 2]
                    new[x + 1] = eta * (reaction[x] + time_step * eta * eta) + edge * edges + corner * corners
                new[0], new[width + 1] = new[width], new[1]


class Pystencils:
    """The model as a kernel that pystencils [1]_ generates: one pass, vector instructions, OpenMP.

    The layout is that of `FusedNumba`, aligned to cache lines.

    Raises
    ------
    UserError
        If pystencils is not installed.

    References
    ----------
    .. [1] M. Bauer et al., "Code generation for massively parallel phase-field simulations", SC '19 (2019).
    """

    def __init__(self, labels: np.ndarray, time_step: float) -> None:
        require_pystencils()
        height, width = labels.shape
        grains = int(labels.max())
        self._eta, self._spare = (_aligned(height + 2, grains, width) for _ in range(2))
        self._eta[1:-1, :, 1:-1] = one_hot(labels).transpose(1, 0, 2)
        self._step = _generate(self._fields(), time_step)

    def advance(self, steps: int) -> None:
        for _ in range(steps):
            eta = self._eta
            eta[:, :, 0], eta[:, :, -1] = eta[:, :, -2], eta[:, :, 1]
            eta[0], eta[-1] = eta[-2], eta[1]
            self._step(**self._fields())
            self._eta, self._spare = self._spare, self._eta

    def _fields(self) -> dict[str, np.ndarray]:
        """pystencils' view: (height + 2, width + 2, N)."""
        return {"source": self._eta.transpose(0, 2, 1), "target": self._spare.transpose(0, 2, 1)}

    def order_parameters(self) -> np.ndarray:
        return self._eta[1:-1, :, 1:-1].transpose(1, 0, 2)


def require_pystencils() -> None:
    """Refuse to go on without pystencils."""
    if not all(map(find_spec, ("pystencils", "cpuinfo"))):
        raise UserError("pystencils or py-cpuinfo is not installed: pip install -e '.[bench]' brings them, --without-pystencils leaves "
                        "this comparison out")


def _aligned(rows: int, grains: int, width: int) -> np.ndarray:
    """Zeros, (rows, grains, width + 2), float32, the second cell of every row at the start of a cache line."""
    pitch = (width + 2 * LINE) // LINE * LINE
    space = np.zeros(rows * grains * pitch + 2 * LINE, F32)
    start = -(space.ctypes.data // space.itemsize) % LINE
    return space[start:start + rows * grains * pitch].reshape(rows, grains, pitch)[:, :, LINE - 1:LINE + 1 + width]


def _generate(fields: dict[str, np.ndarray], time_step: float) -> Callable[..., Any]:
    """Compile the step from one field to the other."""
    import pystencils as ps
    import sympy as sp

    source, target = (ps.Field.create_from_numpy_array(name, array, index_dimensions=1) for name, array in fields.items())
    grains = fields["source"].shape[2]
    phi = sp.Symbol("phi")
    step = [ps.Assignment(phi, sp.Add(*(source[0, 0](i) ** 2 for i in range(grains))))]
    for i in range(grains):
        eta = source[0, 0](i)
        edges = sum(source[at](i) for at in ((1, 0), (-1, 0), (0, 1), (0, -1)))
        corners = sum(source[at](i) for at in ((1, 1), (1, -1), (-1, 1), (-1, -1)))
        reaction = 1 + time_step * (1 - 20 / 6 + eta**2 - 2 * phi)
        step.append(ps.Assignment(target[0, 0](i), eta * reaction + time_step * (4 * edges + corners) / 6))
    config = ps.CreateKernelConfig(target=ps.Target.CurrentCPU, default_dtype="float32", ghost_layers=1)
    config.cpu.openmp.enable = True
    config.cpu.openmp.num_threads = numba.get_num_threads()
    config.cpu.vectorize.enable = True
    config.cpu.vectorize.assume_inner_stride_one = True
    config.cpu.vectorize.assume_aligned = True
    return ps.create_kernel(step, config).compile()
