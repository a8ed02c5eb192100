r"""Grain growth by a multi-order-parameter phase field, solved only where something happens.

The model, its stencils and its stability bound are in `graincast.simulate.free_energy`. Time goes in explicit Euler steps.
On this grid a circular grain stays a circle and its area shrinks at a constant 0.95 of the sharp-interface rate
:math:`2\pi L\kappa` (measured for radii from 140 to 15 px; 0.99 and 0.995 on grids two and three times finer), so
boundaries are resolved well enough not to pin.

**What is stored.** Each grain owns a box-shaped window just large enough for it, as in the bounding-box method [1]_, so no
two grains ever share an order parameter and none can coalesce. Inside a window only *runs* are stepped: the stretches of a
line of cells near the grain's boundary. Grain interiors and what lies further out are settled and skipped. That is the idea
of active-parameter storage [2]_, [3]_, [4]_, with runs of cells, which a processor steps `LANES` at a time, in place of
lists per cell. Windows and runs follow the grains every `INTERVAL`.

**Order in memory and time.** The window lines that lie on one line of the field are neighbours in memory. A step of a line
takes its neighbours from the old buffer and writes to the spare one, so lines may be stepped in any order in which no line
runs ahead of its neighbours by more than one step. The field is therefore cut into blocks that stay in a core's cache for
up to `TILE` steps, each step one line less at either end; then the gaps between the blocks are filled in the same way ("split
tiling" [5]_). Blocks of one phase do not depend on each other, which is how threads share a structure: twice in `TILE`
steps they wait for each other. Every number comes out of the same operations in the same order whatever their number.

References
----------
.. [1] L. Vanherpe, N. Moelans, B. Blanpain, S. Vandewalle, Phys. Rev. E 76 (2007) 056702,
   doi:10.1103/PhysRevE.76.056702.
.. [2] S. Vedantam, B. S. V. Patnaik, Phys. Rev. E 73 (2006) 016703, doi:10.1103/PhysRevE.73.016703.
.. [3] J. Gruber, N. Ma, Y. Wang, A. D. Rollett, G. S. Rohrer, Modelling Simul. Mater. Sci. Eng. 14 (2006) 1189,
   doi:10.1088/0965-0393/14/7/007.
.. [4] S. G. Kim, D. I. Kim, W. T. Kim, Y. B. Park, Phys. Rev. E 74 (2006) 061605, doi:10.1103/PhysRevE.74.061605.
.. [5] T. Henretty, R. Veras, F. Franchetti, L.-N. Pouchet, J. Ramanujam, P. Sadayappan, Proc. ICS (2013) 13,
   doi:10.1145/2464996.2467268.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any, NamedTuple

import numba
import numpy as np

from graincast.simulate.free_energy import ISOTROPIC, VOLUME_KERNEL, Stencil, check_time_step
from graincast.simulate.simd import LANES, load, splat, store

SETTLED = np.float32(0.02)
"""Outside a grain a cell is settled when its order parameter is below this, and so are those within `MARGIN` of it."""

MARGIN = 4
"""Width of the settled rim outside that is stepped all the same, px, where kappa is 1; it goes with the width of boundaries,
the square root of kappa. Tails fall by a factor e per px, so what the solver leaves out is below 4e-4 of the order
parameter, and in phi, where it comes in squared, below 2e-7."""

SOLID = np.float32(1 - 2e-4)
"""Inside a grain a cell is settled when its order parameter is above this, and so are those within `RIM` of it; it then
stays as it is. The bound is so tight because not only boundaries are unsettled: where a grain has vanished inside another,
the order parameter recovers slowly."""

RIM = 2
"""Width of the settled rim inside that is stepped all the same, px, where kappa is 1."""

INTERVAL = 6.4
"""Time between two updates of windows and runs, in units of 1/L: in it a grain of radius 3.6 px vanishes, and its neighbours
come to less than `MARGIN` beyond where they were. At the start, where sharp boundaries spread, it doubles from as many steps as
the rim is wide, since a step reaches one cell."""

TILE = 32
"""Steps that a block of lines takes while it is in the cache, at most: a block is twice as many lines (in volumes layers), and
every thread needs one."""

WORTH_SKIPPING = 16
"""Settled cells in a row, from which on leaving them out saves time."""

NARROWEST = LANES
"""Smallest extent of a field along x, px."""

WINDOW = np.dtype([(name, np.int64) for name in ("front", "layers", "top", "rows", "left", "columns", "line")])
"""A grain's window: field position of its first cell, size, and the place of its first line in tables of window lines.
In memory the cells just ahead of a line and behind it are 0 or, where the window is as wide as the field, echo the cell at
the other end."""

CELL, COLUMN, LENGTH, AROUND = 0, 1, 2, 3
"""A run, a row of integers: place in memory and field column of its first cell, number of cells, then the places of the
cells beside its first cell on the neighbouring lines (two in a plane, eight in a volume)."""

STEPPED, INSIDE, ECHOED = range(3)
"""Kinds of runs: cells to step; cells settled at 1, which count in phi only; lines whose ends are to be echoed."""

PLANE = np.array([(0, -1), (0, 1)])
VOLUME = np.array([(0, -1), (0, 1), (-1, 0), (1, 0), (-1, -1), (-1, 1), (1, -1), (1, 1)])
"""Neighbouring lines: how many layers and rows further; in a volume first those that share a face."""

ZEROS = LANES  # place in memory of a line of zeros
FAR = 1 << 30  # stands for a column beyond every other
ONE = np.float32(1)  # a literal would lift the arithmetic to float64


class Evolution(NamedTuple):
    """What `evolve` returns.

    Attributes
    ----------
    phi : numpy.ndarray
        Sum of the squared order parameters, (height, width), float32: 1 in grains, about 0.64 on boundaries.
    labels : numpy.ndarray
        Id of the largest order parameter, (height, width), int32; every cell has one.
    """

    phi: np.ndarray
    labels: np.ndarray


def evolve(labels: np.ndarray, steps: int, time_step: float, threads: int = 1) -> Evolution:
    """Let a grain structure grow.

    Parameters
    ----------
    labels : numpy.ndarray
        Dense grain ids 1..N, (height, width) or (depth, height, width), integer, periodic.
    steps : int
        Number of time steps.
    time_step : float
        Time step in units of 1/L, at most 3/16 (volumes: 1/6).
    threads : int, optional
        Processors to share the work; the result does not depend on it.

    Returns
    -------
    Evolution
        The grains keep their ids; the ids of grains that vanished are missing.

    Raises
    ------
    UserError
        If the time step is unstable.

    Examples
    --------
    >>> start = np.repeat([1, 2], 16)[None].repeat(32, axis=0)
    >>> phi, labels = evolve(start, steps=100, time_step=0.1)
    >>> bool((labels == start).all()), bool(0.6 < phi.min() < 0.7), round(float(phi.max()), 3)
    (True, True, 1.0)
    """
    growth = GrainGrowth(labels, time_step, threads=threads)
    growth.advance(steps)
    return Evolution(growth.picture(), growth.labels())


class GrainGrowth:
    """A grain structure in the course of its evolution.

    Parameters
    ----------
    labels : numpy.ndarray
        Dense grain ids 1..N at the start, (height, width) or (depth, height, width), integer, periodic; the boundaries are
        sharp. At least `NARROWEST` px wide.
    time_step : float
        Time step in units of 1/L, at most `graincast.simulate.free_energy.time_step_bound`.
    stencil : Stencil, optional
        Weights of div(K grad eta); of planes only, volumes are isotropic.
    obstacles : numpy.ndarray, optional
        Energy density that obstacles add to an order parameter of 1, of the labels' shape, float, 0 to
        `graincast.simulate.free_energy.OBSTACLE`; no grain is in them at the start. None: no obstacles.
    threads : int, optional
        Processors to share the work; the result does not depend on it.

    Raises
    ------
    UserError
        If the time step is unstable.
    """

    def __init__(self, labels: np.ndarray, time_step: float, *, stencil: Stencil = ISOTROPIC, obstacles: np.ndarray | None = None,
                 threads: int = 1) -> None:
        if labels.ndim not in (2, 3) or labels.min() < 1 or labels.shape[-1] < NARROWEST:
            raise ValueError(f"want a map of grain ids 1..N without gaps, (height, width) or (depth, height, width), at least {NARROWEST} px wide")
        if labels.ndim == 3 and stencil != ISOTROPIC:
            raise ValueError("volumes are isotropic")
        self._kernel = stencil.kernel if labels.ndim == 2 else VOLUME_KERNEL
        check_time_step(time_step, self._kernel, obstacles is not None)
        self.shape = labels.shape
        self.grains = int(labels.max())
        self.time_step = time_step
        self.threads = threads
        self._step = self._due = 0
        self._runs, self._bounds, self._overhangs = np.zeros((0, AROUND), np.int64), np.zeros(1, np.int64), np.zeros(0, np.int64)
        self._margin, self._rim = (math.ceil(width * math.sqrt(stencil.stiffness) - 1e-9) for width in (MARGIN, RIM))
        self._volume = labels.shape if labels.ndim == 3 else (1, *labels.shape)
        self._slabs = (labels.shape[0], 1 if labels.ndim == 2 else labels.shape[1])  # lines or layers, of how many lines
        self._tile = max(1, min(TILE, self._slabs[0] // (2 * threads)))
        self._around = PLANE if labels.ndim == 2 else VOLUME
        keep = 1 + time_step * (1 + self._kernel[(1,) * labels.ndim])
        neighbours = stencil if labels.ndim == 2 else (VOLUME_KERNEL[1, 1, 0], VOLUME_KERNEL[1, 0, 0])
        self._weights = np.array([keep, time_step, *(time_step * weight for weight in neighbours)], np.float32)
        lines = self._volume[0] * self._volume[1]
        self._obstacles = np.zeros((0, 0), np.float32) if obstacles is None else np.ascontiguousarray(obstacles, np.float32).reshape(lines, -1)
        self._windows = _first_windows(labels.reshape(self._volume))
        self._places, size = _lay_out(self._windows, self._volume)
        self._cells = _aligned(size)
        self._cells[:] = 0
        self._spare = _aligned(size)
        level = np.ones(self._volume) if obstacles is None else np.sqrt(np.maximum(1 - 2 * obstacles, 0))  # at rest in an obstacle
        _fill(self._cells, self._windows, self._places, labels.reshape(self._volume).astype(np.int32), level.reshape(self._volume))
        _echo(self._cells, self._windows, self._places, self._volume[2])

    def advance(self, steps: int) -> None:
        """Take `steps` time steps; how they are parted among calls does not matter."""
        last = self._step + steps
        with ThreadPoolExecutor(self.threads) as pool:
            while self._step < last:
                if self._step == self._due:
                    self._runs, self._bounds, self._overhangs = self._follow(pool)
                    self._due += self._interval()
                self._march(min(self._tile, last - self._step, self._due - self._step), pool)

    def _interval(self) -> int:
        """Steps until windows and runs are next updated."""
        time = self._step * self.time_step
        return max(self._rim, round(min(INTERVAL, time) / self.time_step))

    def picture(self, weights: np.ndarray | None = None) -> np.ndarray:
        """Sum of the squared order parameters, each times its grain's weight.

        Parameters
        ----------
        weights : numpy.ndarray, optional
            One weight a grain, (N,), float; 1 when left out, which gives phi.

        Returns
        -------
        numpy.ndarray
            Of the field's shape, float32.
        """
        if weights is None:
            weights = np.ones(self.grains)
        return _project(self._cells, self._windows, self._places, weights.astype(np.float32), self._volume)[0].reshape(self.shape)

    def labels(self) -> np.ndarray:
        """Id of the largest order parameter of every cell, of the field's shape, int32."""
        weights = np.ones(self.grains, np.float32)
        return _project(self._cells, self._windows, self._places, weights, self._volume)[1].reshape(self.shape)

    def energy(self) -> float:
        """Free energy above that of one endless grain, in units of the bulk energy density times px^2 (px^3)."""
        phi = self.picture().astype(float)
        kernel = self._kernel.reshape(-1, 3, 3)
        middle = len(kernel) // 2
        others = kernel[middle + self._around[:, 0], 1 + self._around[:, 1]]
        own = _own_energy(self._cells, self._windows, self._places, self._volume, self._around, kernel[middle, 1], others)
        hindered = (phi * self._obstacles.reshape(phi.shape)).sum() if self._obstacles.size else 0.0
        return float((0.25 - phi / 2 + phi**2 / 2).sum() - own + hindered)

    @property
    def stepped(self) -> int:
        """Order parameters that the latest time step computed: cells times grains there."""
        bounds = self._bounds
        return sum(int(self._runs[first:end, LENGTH].sum()) for first, end in zip(bounds[STEPPED::3], bounds[INSIDE::3], strict=False))

    def _follow(self, pool: Executor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Fit the windows to where the grains are now; return the table of runs (see `_find_runs`)."""
        parts = self._parts()
        extents = np.concatenate(_share(pool, lambda part: _extents(self._cells, self._windows[part], self._places), parts))
        windows = _fitted(self._windows, extents, self._volume, self._margin)
        places, size = _lay_out(windows, self._volume)
        cells = self._spare if size <= self._spare.size else _aligned(size + size // 4)
        cells[:size] = 0
        _share(pool, lambda part: _move(self._cells, self._windows[part], self._places, cells, windows[part], places, self._volume), parts)
        _echo(cells, windows, places, self._volume[2])
        spare = self._cells if self._cells.size == cells.size else _aligned(cells.size)
        self._cells, self._spare, self._windows, self._places = cells, spare, windows, places
        spans = np.concatenate(_share(pool, lambda part: _find_spans(cells, windows[part], places, self._volume, self._margin, self._rim), parts))
        runs, bounds, overhangs = _find_runs(windows, places, spans, self._volume, self._around)
        spare[:size] = cells[:size]
        return runs, bounds, overhangs

    def _parts(self) -> list[slice]:
        """The grains in as many parts as there are threads, of about equally many window lines."""
        lines = np.cumsum(self._windows["layers"] * self._windows["rows"])
        cuts = [0, *(int(np.searchsorted(lines, lines[-1] * k / self.threads)) for k in range(1, self.threads)), self.grains]
        return [slice(first, end) for first, end in itertools.pairwise(cuts)]

    def _march(self, steps: int, pool: Executor) -> None:
        """Take up to `_tile` steps, in blocks of lines (of layers in volumes)."""
        slabs, thickness = self._slabs
        blocks = max(slabs // (2 * self._tile), 1)
        edges = np.arange(blocks + 1) * slabs // blocks
        shrinks = slabs >= 2 * self._tile

        def march(first: np.ndarray, end: np.ndarray, growth: int) -> None:
            def some(part: slice) -> None:
                _march(self._cells, self._spare, self._obstacles, self._weights, self._runs, self._bounds, self._overhangs, self._volume[2],
                       first[part], end[part], growth, thickness, steps)

            cuts = [blocks * k // self.threads for k in range(self.threads + 1)]
            _share(pool, some, [slice(a, b) for a, b in itertools.pairwise(cuts) if a < b])

        if shrinks:
            march(edges[:-1], edges[1:], -1)
            march(edges[:-1], edges[:-1], 1)
        else:
            march(edges[:-1], edges[1:], 0)
        if steps % 2:
            self._cells, self._spare = self._spare, self._cells
        self._step += steps


def _share(pool: Executor, work: Callable[[slice], Any], parts: list[slice]) -> list[Any]:
    """Results of some work on all parts; this thread does the first, the pool's the others."""
    others = [pool.submit(work, part) for part in parts[1:]]
    return [work(parts[0]), *(other.result() for other in others)]


def _aligned(size: int) -> np.ndarray:
    """Room for `size` float32 numbers, which starts with a cache line."""
    unit = 64 // 4
    room = np.empty(size + unit, np.float32)
    skip = -(room.ctypes.data // 4) % unit
    return room[skip:skip + size]


def _first_windows(labels: np.ndarray) -> np.ndarray:
    """Windows just around the grains of a dense map."""
    windows = np.zeros(int(labels.max()), WINDOW)
    for axis, (start, length) in enumerate((("front", "layers"), ("top", "rows"), ("left", "columns"))):
        size = labels.shape[axis]
        for grain, line in enumerate(_occupied(labels, windows.size, axis)):
            places = np.flatnonzero(line)
            if places.size:
                gaps = np.diff(places, append=places[0] + size)
                widest = gaps.argmax()
                windows[start][grain] = places[(widest + 1) % places.size]
                windows[length][grain] = size - gaps[widest] + 1
    return windows


@numba.njit(cache=True, nogil=True)
def _occupied(labels: np.ndarray, grains: int, axis: int) -> np.ndarray:
    """Whether a grain has cells at a position along an axis, (grains, size of the axis)."""
    occupied = np.zeros((grains, labels.shape[axis]), np.bool_)
    for z in range(labels.shape[0]):
        for y in range(labels.shape[1]):
            for x in range(labels.shape[2]):
                occupied[labels[z, y, x] - 1, z if axis == 0 else y if axis == 1 else x] = True
    return occupied


def _fitted(windows: np.ndarray, extents: np.ndarray, volume: tuple[int, ...], margin: int) -> np.ndarray:
    """Windows (n,) that hold the `extents` (n, 6: first and last layer, row and column) and a margin."""
    fitted = windows.copy()
    vanished = extents[:, 1] < extents[:, 0]
    for axis, (start, length) in enumerate((("front", "layers"), ("top", "rows"), ("left", "columns"))):
        size = volume[axis]
        first, last = extents[:, 2 * axis], extents[:, 2 * axis + 1]
        unit = LANES if length == "columns" else 1
        begin = (windows[start] + first - margin) // unit * unit
        needed = -(-(windows[start] + last + 1 + margin - begin) // unit) * unit
        wraps = (windows[length] == size) | (needed >= size)
        fitted[start] = np.where(wraps, windows[start], begin) % size
        fitted[length] = np.where(vanished, 0, np.where(wraps, size, needed))
    return fitted


@numba.njit(cache=True, nogil=True)
def _lay_out(windows: np.ndarray, volume: tuple[int, ...]) -> tuple[np.ndarray, int]:
    """Give every window line its place in memory, in the order of the field's lines; return the places and the memory's
    size.

    Ahead of all lies a line of zeros, which serves as neighbour of every window's first and last line.
    """
    depth, height, width = volume
    total = 0
    ends = np.zeros(depth * height + 1, np.int64)
    for window in windows:
        window.line = total
        total += window.layers * window.rows
        for k in range(window.layers):
            for r in range(window.rows):
                ends[_field_line(window, k, r, depth, height) + 1] += _stride(window.columns)
    ends[0] = _stride(width)
    ends = np.cumsum(ends)
    places = np.empty(total, np.int64)
    for window in windows:
        for k in range(window.layers):
            for r in range(window.rows):
                line = _field_line(window, k, r, depth, height)
                places[window.line + k * window.rows + r] = ends[line] + LANES
                ends[line] += _stride(window.columns)
    return places, ends[-2] + LANES


@numba.njit(cache=True, nogil=True)
def _stride(columns: int) -> int:
    """Cells that a window line takes up, those between it and the one before included."""
    return LANES + -(-columns // LANES) * LANES


@numba.njit(cache=True, nogil=True)
def _field_line(window: Any, layer: int, row: int, depth: int, height: int) -> int:
    """The line of the field on which a line of a window lies."""
    return (window.front + layer) % depth * height + (window.top + row) % height


@numba.njit(cache=True, nogil=True)
def _place(window: Any, places: np.ndarray, layer: int, row: int, depth: int, height: int) -> int:
    """Place in memory of a window's line, of zeros beyond the window; round where it is as large as the field."""
    if window.layers == depth:
        layer %= depth
    if window.rows == height:
        row %= height
    if 0 <= layer < window.layers and 0 <= row < window.rows:
        return places[window.line + layer * window.rows + row]
    return ZEROS


@numba.njit(cache=True, nogil=True)
def _fill(cells: np.ndarray, windows: np.ndarray, places: np.ndarray, labels: np.ndarray, level: np.ndarray) -> None:
    """Set each grain to the given level where the dense map shows it."""
    depth, height, width = labels.shape
    for grain in range(windows.size):
        window = windows[grain]
        for k in range(window.layers):
            for r in range(window.rows):
                place = places[window.line + k * window.rows + r]
                z, y = (window.front + k) % depth, (window.top + r) % height
                for c in range(window.columns):
                    x = (window.left + c) % width
                    if labels[z, y, x] == grain + 1:
                        cells[place + c] = level[z, y, x]


@numba.njit(cache=True, nogil=True)
def _extents(cells: np.ndarray, windows: np.ndarray, places: np.ndarray) -> np.ndarray:
    """First and last layer, row and column of each grain's cells above `SETTLED`, (n, 6); last < first if it has none."""
    extents = np.empty((windows.size, 6), np.int64)
    extents[:, ::2], extents[:, 1::2] = FAR, -1
    for grain in range(windows.size):
        window = windows[grain]
        extent = extents[grain]
        for k in range(window.layers):
            for r in range(window.rows):
                first, end = _outline(cells, places[window.line + k * window.rows + r], window.columns)
                if first < end:
                    extent[0], extent[1] = min(extent[0], k), max(extent[1], k)
                    extent[2], extent[3] = min(extent[2], r), max(extent[3], r)
                    extent[4], extent[5] = min(extent[4], first), max(extent[5], end - 1)
    return extents


@numba.njit(cache=True, nogil=True)
def _outline(cells: np.ndarray, place: int, columns: int) -> tuple[Any, Any]:
    """First and end of a window line's cells above `SETTLED`; equal if there are none."""
    first, end, one = np.uint64(place), np.uint64(place + columns), np.uint64(1)
    while first < end and cells[first] <= SETTLED:
        first += one
    while first < end and cells[end - one] <= SETTLED:
        end -= one
    return np.int64(first) - place, np.int64(end) - place


@numba.njit(cache=True, nogil=True)
def _interior(cells: np.ndarray, place: int, first: int, end: int) -> tuple[Any, Any]:
    """First and end of a window line's cells settled at 1, between two columns, if they are in one piece."""
    start, stop, one = np.uint64(place + first), np.uint64(place + end), np.uint64(1)
    while start < stop and cells[start] < SOLID:
        start += one
    after = start
    while after < stop and cells[after] >= SOLID:
        after += one
    pieces = np.uint64(start < after)
    for j in range(after, stop):
        pieces += np.uint64(cells[j] >= SOLID)
    return (np.int64(start) - place, np.int64(after) - place) if pieces == one else (FAR, -FAR)


@numba.njit(cache=True, nogil=True)
def _move(cells: np.ndarray, windows: np.ndarray, places: np.ndarray, moved_cells: np.ndarray, moved_windows: np.ndarray,
          moved_places: np.ndarray, volume: tuple[int, ...]) -> None:
    """Copy the cells of each window to where they lie in the new layout."""
    depth, height, width = volume
    for grain in range(windows.size):
        old, new = windows[grain], moved_windows[grain]
        shift = (new.left - old.left) % width
        period = width - shift
        for k in range(new.layers):
            for r in range(new.rows):
                layer, row = (new.front + k - old.front) % depth, (new.top + r - old.top) % height
                if layer < old.layers and row < old.rows:
                    source = places[old.line + layer * old.rows + row]
                    target = moved_places[new.line + k * new.rows + r]
                    # The old window's columns from the new one's left edge on, then those a period further.
                    _copy(cells, source + shift, moved_cells, target, min(new.columns, old.columns - shift))
                    _copy(cells, source, moved_cells, target + period, min(new.columns - period, old.columns))


@numba.njit(cache=True, nogil=True)
def _copy(source: np.ndarray, at: int, target: np.ndarray, to: int, count: int) -> None:
    if count > 0:
        target[to:to + count] = source[at:at + count]


@numba.njit(cache=True, nogil=True)
def _find_spans(cells: np.ndarray, windows: np.ndarray, places: np.ndarray, volume: tuple[int, ...], margin: int, rim: int) -> np.ndarray:
    """Columns to step in each window line, (lines, 4): from the first to the settled ones, from their end to the end."""
    depth, height, width = volume
    spans = np.empty(((windows["layers"] * windows["rows"]).sum(), 4), np.int64)
    done = 0
    for window in windows:
        own = spans[done:done + window.layers * window.rows]
        done += len(own)
        for r in range(len(own)):
            place = places[window.line + r]
            first, end = _outline(cells, place, window.columns)
            settled, unsettled = _interior(cells, place, first, end)
            own[r] = (first, settled, unsettled, end) if first < end else (FAR, settled, unsettled, -FAR)
        box = own.reshape(window.layers, window.rows, 4)
        for k in range(window.layers):
            _spread(box[k], window.rows == height, margin, rim)
        if depth > 1:
            for r in range(window.rows):
                _spread(box[:, r], window.layers == depth, margin, rim)
        for span in own:
            _round_up(span, window.columns, width, margin, rim)
    return spans


@numba.njit(cache=True, nogil=True)
def _spread(spans: np.ndarray, periodic: bool, margin: int, rim: int) -> None:
    """Let each line, (n, 4), step the columns that lines within `margin` of it have outside the settled ones, and skip only
    those that lines within `rim` of it skip, too."""
    count = len(spans)
    raw = spans.copy()
    for r in range(count):
        span = spans[r]
        for near in range(r - margin, r + margin + 1):
            if periodic:
                near %= count
            if 0 <= near < count:
                span[0], span[3] = min(span[0], raw[near, 0]), max(span[3], raw[near, 3])
        for near in range(r - rim, r + rim + 1):
            if periodic:
                near %= count
            if 0 <= near < count:
                span[1], span[2] = max(span[1], raw[near, 1]), min(span[2], raw[near, 2])
            else:
                span[1], span[2] = FAR, -FAR


@numba.njit(cache=True, nogil=True)
def _round_up(span: np.ndarray, columns: int, width: int, margin: int, rim: int) -> None:
    """Add margin and rim in the direction of the line and lengthen the runs to whole vectors."""
    first, settled, unsettled, end = span[0] - margin, span[1] + rim, span[2] - rim, span[3] + margin
    if first >= end:
        span[:] = 0
        return
    if columns == width and (first < 0 or end > width):
        first, end = 0, width
    first, end = max(first, 0), min(end, columns)
    if columns < width:
        first, settled, unsettled, end = first // LANES * LANES, -(-settled // LANES) * LANES, unsettled // LANES * LANES, -(-end // LANES) * LANES
    if unsettled - settled < WORTH_SKIPPING or settled - first < LANES or end - unsettled < LANES:
        length = max(end - first, min(LANES, columns))
        first = min(first, columns - length)
        settled = unsettled = end = first + length
    span[0], span[1], span[2], span[3] = first, settled, unsettled, end


@numba.njit(cache=True, nogil=True)
def _find_runs(windows: np.ndarray, places: np.ndarray, spans: np.ndarray, volume: tuple[int, ...],
               around: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All runs (n, 3 + neighbours); where those of each line of the field and kind start, (3 lines + 1,); and how far the
    runs of each line reach beyond the field's last column, (lines,)."""
    depth, height, width = volume
    runs = np.empty((0, AROUND + len(around)), np.int64)
    place = np.zeros(3 * depth * height + 1, np.int64)  # first counts runs, then leads to where the next one belongs
    bounds = place
    overhangs = np.zeros(depth * height, np.int64)
    for filling in (False, True):
        if filling:
            bounds = np.cumsum(place)
            place = bounds.copy()
            runs = np.empty((bounds[-1], runs.shape[1]), np.int64)
        for grain in range(windows.size):
            window = windows[grain]
            for k in range(window.layers):
                for r in range(window.rows):
                    here, span = places[window.line + k * window.rows + r], spans[window.line + k * window.rows + r]
                    line = _field_line(window, k, r, depth, height)
                    for part in range(4):
                        at, end = (span[part], span[part + 1]) if part < 3 else (0, window.columns // width)
                        key = 3 * line + (STEPPED, INSIDE, STEPPED, ECHOED)[part]
                        if at < end and not filling:
                            place[key + 1] += 1
                        elif at < end:
                            run = runs[place[key]]
                            place[key] += 1
                            run[CELL], run[COLUMN], run[LENGTH] = here + at, (window.left + at) % width, end - at
                            for n in range(len(around)):
                                run[AROUND + n] = _place(window, places, k + around[n, 0], r + around[n, 1], depth, height) + at
                            overhangs[line] = max(overhangs[line], run[COLUMN] + run[LENGTH] - width)
    return runs, bounds, overhangs


@numba.njit(cache=True, nogil=True)
def _echo(cells: np.ndarray, windows: np.ndarray, places: np.ndarray, width: int) -> None:
    """Echo the ends of all window lines as wide as the field."""
    for grain in range(windows.size):
        window = windows[grain]
        if window.columns == width:
            for r in range(window.layers * window.rows):
                _echo_ends(cells, places[window.line + r], width)


@numba.njit(cache=True, nogil=True)
def _echo_ends(cells: np.ndarray, cell: int, width: int) -> None:
    """Echo the ends of a line that starts at `cell`."""
    cells[cell - 1], cells[cell + width] = cells[cell + width - 1], cells[cell]


@numba.njit(cache=True, nogil=True)
def _echo_line(cells: np.ndarray, runs: np.ndarray, first: int, end: int, width: int) -> None:
    for k in range(first, end):
        _echo_ends(cells, runs[k, CELL], width)


# Positions are unsigned and runs are read number by number, here and where lines are scanned above: Numba then neither tests
# positions for being negative nor counts references to slices.


@numba.njit(cache=True, nogil=True)
def _march(cells: np.ndarray, spare: np.ndarray, obstacles: np.ndarray, weights: np.ndarray, runs: np.ndarray, bounds: np.ndarray,
           overhangs: np.ndarray, width: int, first: np.ndarray, end: np.ndarray, growth: int, thickness: int, steps: int) -> None:
    """Step blocks from slab `first` to slab `end` (of `thickness` lines), which grow by `growth` slabs on either side each step."""
    phi = np.empty(2 * width + LANES, np.float32)
    lines = overhangs.size
    for block in range(first.size):
        old, new = cells, spare
        for step in range(steps):
            for number in range((first[block] - growth * step) * thickness, (end[block] + growth * step) * thickness):
                line = np.uint64(number % lines)
                stepped, inside = bounds[3 * line + STEPPED], bounds[3 * line + INSIDE]
                echoed, last = bounds[3 * line + ECHOED], bounds[3 * line + 3]
                _clear(phi, obstacles, line, width, overhangs[line])
                _add_up(old, runs, stepped, inside, phi)
                _add_ones(runs, inside, echoed, phi)
                _fold(phi, width, overhangs[line])
                if weights.size == 6:
                    _step_plane(old, new, runs, stepped, inside, phi, weights)
                else:
                    _step_volume(old, new, runs, stepped, inside, phi, weights)
                _echo_line(new, runs, echoed, last, width)
            old, new = new, old


@numba.njit(cache=True, nogil=True)
def _clear(phi: np.ndarray, obstacles: np.ndarray, line: int, width: int, overhang: int) -> None:
    """Psi of one line of the field, in phi's place: it acts on the grains as phi does."""
    for x in range(width + overhang):
        phi[x] = 0
    if obstacles.size:
        for x in range(width):
            phi[x] = obstacles[line, x]


@numba.njit(cache=True, nogil=True)
def _add_up(cells: np.ndarray, runs: np.ndarray, first: int, last: int, phi: np.ndarray) -> None:
    """phi of one line of the field; columns beyond its last one are those from its first one on."""
    lanes, one = np.uint64(LANES), np.uint64(1)
    for k in range(np.uint64(first), np.uint64(last)):
        cell, column = np.uint64(runs[k, CELL]), np.uint64(runs[k, COLUMN])
        end = column + np.uint64(runs[k, LENGTH])
        while column + lanes <= end:
            eta = load(cells, cell)
            store(phi, column, load(phi, column) + eta * eta)
            cell += lanes
            column += lanes
        while column < end:
            phi[column] += cells[cell] * cells[cell]
            cell += one
            column += one


@numba.njit(cache=True, nogil=True)
def _add_ones(runs: np.ndarray, first: int, last: int, phi: np.ndarray) -> None:
    """What grain interiors add to phi."""
    for k in range(np.uint64(first), np.uint64(last)):
        column = np.uint64(runs[k, COLUMN])
        for j in range(np.uint64(runs[k, LENGTH])):
            phi[column + j] += ONE


@numba.njit(cache=True, nogil=True)
def _fold(phi: np.ndarray, width: int, overhang: int) -> None:
    """Add what lies beyond the last column to the first ones, and repeat those there."""
    for x in range(overhang):
        phi[x] += phi[width + x]
        phi[width + x] = phi[x]


@numba.njit(cache=True, nogil=True)
def _step_plane(cells: np.ndarray, spare: np.ndarray, runs: np.ndarray, first: int, last: int, phi: np.ndarray, weights: np.ndarray) -> None:
    """One Euler step of one line of a plane."""
    keep, time, two = splat(weights[0]), splat(weights[1]), splat(np.float32(2))
    across, down, falling, rising = splat(weights[2]), splat(weights[3]), splat(weights[4]), splat(weights[5])
    lanes, one = np.uint64(LANES), np.uint64(1)
    for k in range(np.uint64(first), np.uint64(last)):
        here, column, length = np.uint64(runs[k, CELL]), np.uint64(runs[k, COLUMN]), np.uint64(runs[k, LENGTH])
        above, below = np.uint64(runs[k, AROUND]), np.uint64(runs[k, AROUND + 1])
        j = np.uint64(0)
        while j < length:
            j = min(j, length - lanes)  # the last vector may overlap the one before
            eta = load(cells, here + j)
            grown = eta * (keep + time * (eta * eta - two * load(phi, column + j)))
            grown += across * (load(cells, here + j - one) + load(cells, here + j + one))
            grown += down * (load(cells, above + j) + load(cells, below + j))
            grown += falling * (load(cells, above + j - one) + load(cells, below + j + one))
            grown += rising * (load(cells, above + j + one) + load(cells, below + j - one))
            store(spare, here + j, grown)
            j += lanes


@numba.njit(cache=True, nogil=True)
def _step_volume(cells: np.ndarray, spare: np.ndarray, runs: np.ndarray, first: int, last: int, phi: np.ndarray, weights: np.ndarray) -> None:
    """One Euler step of one line of a volume."""
    keep, time, two = splat(weights[0]), splat(weights[1]), splat(np.float32(2))
    face, edge = splat(weights[2]), splat(weights[3])
    lanes, one = np.uint64(LANES), np.uint64(1)
    for k in range(np.uint64(first), np.uint64(last)):
        here, column, length = np.uint64(runs[k, CELL]), np.uint64(runs[k, COLUMN]), np.uint64(runs[k, LENGTH])
        j = np.uint64(0)
        while j < length:
            j = min(j, length - lanes)
            eta = load(cells, here + j)
            grown = eta * (keep + time * (eta * eta - two * load(phi, column + j)))
            faces = load(cells, here + j - one) + load(cells, here + j + one)
            edges = splat(np.float32(0))
            for n in range(4):
                beside = np.uint64(runs[k, AROUND + n]) + j
                faces += load(cells, beside)
                edges += load(cells, beside - one) + load(cells, beside + one)
                edges += load(cells, np.uint64(runs[k, AROUND + 4 + n]) + j)
            store(spare, here + j, grown + face * faces + edge * edges)
            j += lanes


@numba.njit(cache=True, nogil=True)
def _project(cells: np.ndarray, windows: np.ndarray, places: np.ndarray, weights: np.ndarray,
             volume: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Weighted sum of squares, and id of the largest order parameter, of every cell of the field."""
    depth, height, width = volume
    total = np.zeros((depth * height, width), np.float32)
    largest = np.zeros((depth * height, width), np.float32)
    labels = np.zeros((depth * height, width), np.int32)
    for grain in range(windows.size):
        window = windows[grain]
        for k in range(window.layers):
            for r in range(window.rows):
                line = _field_line(window, k, r, depth, height)
                place = places[window.line + k * window.rows + r]
                for c in range(window.columns):
                    x = window.left + c
                    x -= width if x >= width else 0
                    eta = cells[place + c]
                    total[line, x] += weights[grain] * eta * eta
                    if eta > largest[line, x]:
                        largest[line, x] = eta
                        labels[line, x] = grain + 1
    return total, labels


@numba.njit(cache=True, nogil=True)
def _own_energy(cells: np.ndarray, windows: np.ndarray, places: np.ndarray, volume: tuple[int, ...], around: np.ndarray, own: np.ndarray,
                others: np.ndarray) -> float:
    """Sum over all grains of eta^4 / 4 + eta div(K grad eta) / 2, with the stencil's weights on a cell's own line, (3,), and on
    the neighbouring lines, (n, 3)."""
    depth, height, _ = volume
    total = 0.0
    for grain in range(windows.size):
        window = windows[grain]
        for k in range(window.layers):
            for r in range(window.rows):
                here = places[window.line + k * window.rows + r]
                for c in range(window.columns):
                    eta = float(cells[here + c])
                    if eta > 0:
                        bend = _bend(cells, here + c, own)
                        for n in range(len(around)):
                            bend += _bend(cells, _place(window, places, k + around[n, 0], r + around[n, 1], depth, height) + c, others[n])
                        total += eta**4 / 4 + eta * bend / 2
    return total


@numba.njit(cache=True, nogil=True)
def _bend(cells: np.ndarray, at: int, weights: np.ndarray) -> float:
    return weights[0] * cells[at - 1] + weights[1] * cells[at] + weights[2] * cells[at + 1]
