r"""Grain growth by a multi-order-parameter phase field, solved only where something happens.

Every grain i has an order parameter :math:`\eta_i`, 1 inside the grain and 0 outside. The free energy [1]_

.. math:: F = \int \sum_i \left(-\frac{\eta_i^2}{2} + \frac{\eta_i^4}{4}\right) + \sum_{i<j} \eta_i^2 \eta_j^2
              + \frac{\kappa}{2} \sum_i |\nabla \eta_i|^2 \; dV

falls along the Allen-Cahn equation :math:`\partial\eta_i/\partial t = -L\,\delta F/\delta\eta_i`. With
:math:`\phi = \sum_i \eta_i^2`, :math:`\kappa = L = 1`, grid spacing 1 and periodic boundaries this is

.. math:: \partial\eta_i/\partial t = \eta_i \, (1 + \eta_i^2 - 2\phi) + \nabla^2 \eta_i .

**Space and time.** Explicit Euler, and the isotropic 9-point Laplacian (edges 4/6, corners 1/6, centre
-20/6), whose leading error does not depend on direction. The time step is bounded (see `TIME_STEP_BOUND`). On
this grid a circular grain stays a circle and its area shrinks at a constant 0.95 of the sharp-interface rate
:math:`2\pi L\kappa` (measured for radii from 140 to 15 px; 0.99 and 0.999 on grids two and three times
finer), so boundaries are resolved well enough not to pin.

**What is stored.** Each grain owns a rectangular window just large enough for it, as in the bounding-box
method [2]_, so no two grains ever share an order parameter and none can coalesce. Inside a window only *runs*
are stepped: the stretches of a row near the grain's boundary. Grain interiors and what lies further out are
settled and skipped. That is the idea of active-parameter storage [3]_, [4]_, [5]_, with runs of cells, which
a processor steps many at a time, in place of lists per cell. Windows and runs follow the grains every
`INTERVAL` steps.

**Memory order.** The window rows that lie on one image row are neighbours in memory, so that a step streams
through it. Each image row's :math:`\phi` and then its new values come from the old buffer and go to the spare
one. One structure keeps one core busy; the solver holds no Python lock meanwhile, so several structures run
on several threads.

References
----------
.. [1] L.-Q. Chen, W. Yang, Phys. Rev. B 50 (1994) 15752, doi:10.1103/PhysRevB.50.15752.
.. [2] L. Vanherpe, N. Moelans, B. Blanpain, S. Vandewalle, Phys. Rev. E 76 (2007) 056702,
   doi:10.1103/PhysRevE.76.056702.
.. [3] S. Vedantam, B. S. V. Patnaik, Phys. Rev. E 73 (2006) 016703, doi:10.1103/PhysRevE.73.016703.
.. [4] J. Gruber, N. Ma, Y. Wang, A. D. Rollett, G. S. Rohrer, Modelling Simul. Mater. Sci. Eng. 14 (2006)
   1189, doi:10.1088/0965-0393/14/7/007.
.. [5] S. G. Kim, D. I. Kim, W. T. Kim, Y. B. Park, Phys. Rev. E 74 (2006) 061605,
   doi:10.1103/PhysRevE.74.061605.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numba
import numpy as np

from graincast.errors import UserError

TIME_STEP_BOUND = 3 / 16
"""Largest stable time step, in units of 1/L.

With the Laplacian's centre weight c = 10/3 an Euler step maps every state with phi <= 1 and eta >= 0 to such
a state if dt <= 1/(c + 2) = 3/16. On that set the Hessian of the energy is at most 16/3 (Laplacian) + 5
(bulk), so the energy cannot rise for dt <= 2/(16/3 + 5) = 0.194 either: 3/16 is the tighter of the two.
"""

SETTLED = np.float32(0.01)
"""A cell is settled when its order parameter is this near to 0 or 1, and so are its neighbours within
`MARGIN`."""

MARGIN = 5
"""Width of the settled rim that is stepped all the same, px. Tails fall by a factor e per px, so what the
solver leaves out is below 1e-4 of the order parameter."""

INTERVAL = 16
"""Steps between two updates of windows and runs; a boundary moves by a fraction of a pixel in between."""

WORTH_SKIPPING = 16
"""Settled cells in a row, from which on leaving them out saves time."""

LANES = 8
"""Runs are lengthened to a multiple of as many cells as a processor steps at a time, which saves it the odd
rest."""

WINDOW = np.dtype([(name, np.int64) for name in ("top", "left", "rows", "columns", "row")])
"""A grain's window: image position of its first cell, size, and the place of its first row in tables of
window rows. In memory a row has one more cell at either end, 0 or, where the window is as wide as the field,
an echo of the cell at the other end."""

RUN = np.dtype([(name, np.int64) for name in ("cell", "above", "below", "column", "length")])
"""Neighbouring cells of a window row that are stepped: the first of them, the cells above and below it, its
image column, their number. Without cells above and below (`NOWHERE`) it is a run settled at 1, which counts
in phi only."""

NOWHERE = -1
ZEROS = 1  # place in memory of a row of zeros
FAR = 1 << 30  # stands for a column beyond every other
ONE, TWO = np.float32(1), np.float32(2)  # a literal would lift the arithmetic to float64


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


def evolve(labels: np.ndarray, steps: int, time_step: float) -> Evolution:
    """Let a grain structure grow.

    Parameters
    ----------
    labels : numpy.ndarray
        Dense grain ids 1..N, (height, width), integer, periodic.
    steps : int
        Number of time steps.
    time_step : float
        Time step in units of 1/L, at most `TIME_STEP_BOUND`.

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
    growth = GrainGrowth(labels, time_step)
    growth.advance(steps)
    return Evolution(growth.picture(), growth.labels())


class GrainGrowth:
    """A grain structure in the course of its evolution.

    Parameters
    ----------
    labels : numpy.ndarray
        Dense grain ids 1..N at the start, (height, width), integer, periodic; the boundaries are sharp.
    time_step : float
        Time step in units of 1/L, at most `TIME_STEP_BOUND`.

    Raises
    ------
    UserError
        If the time step is unstable.
    """

    def __init__(self, labels: np.ndarray, time_step: float) -> None:
        if not 0 < time_step <= TIME_STEP_BOUND:
            raise UserError(f"simulate.time_step: {time_step:g} is not stable, the explicit scheme needs a "
                            f"time step above 0 and at most {TIME_STEP_BOUND:g} (in units of 1/L)")
        if labels.ndim != 2 or labels.min() < 1:
            raise ValueError("want a 2-D map of grain ids 1..N without gaps")
        self.shape = labels.shape
        self.grains = int(labels.max())
        self.time_step = time_step
        self._windows = _first_windows(labels)
        self._rows, size = _lay_out(self._windows, *self.shape)
        self._cells = np.zeros(size, np.float32)
        self._spare = np.empty_like(self._cells)
        _fill(self._cells, self._windows, self._rows, labels.astype(np.int32))

    def advance(self, steps: int) -> None:
        """Take `steps` time steps."""
        for done in range(0, steps, INTERVAL):
            count = min(INTERVAL, steps - done)
            runs, starts, echoes = self._follow()
            _advance(self._cells, self._spare, runs, starts, echoes, self.shape[1], self.time_step, count)
            if count % 2:
                self._cells, self._spare = self._spare, self._cells

    def picture(self, weights: np.ndarray | None = None) -> np.ndarray:
        """Sum of the squared order parameters, each times its grain's weight.

        Parameters
        ----------
        weights : numpy.ndarray, optional
            One weight a grain, (N,), float; 1 when left out, which gives phi.

        Returns
        -------
        numpy.ndarray
            (height, width), float32.
        """
        if weights is None:
            weights = np.ones(self.grains)
        return _project(self._cells, self._windows, self._rows, weights.astype(np.float32), *self.shape)[0]

    def labels(self) -> np.ndarray:
        """Id of the largest order parameter of every cell, (height, width), int32."""
        weights = np.ones(self.grains, np.float32)
        return _project(self._cells, self._windows, self._rows, weights, *self.shape)[1]

    def energy(self) -> float:
        """Free energy above that of one endless grain, in units of the bulk energy density times px^2."""
        phi = self.picture().astype(float)
        own = _own_energy(self._cells, self._windows, self._rows, *self.shape)
        return float((0.25 - phi / 2 + phi**2 / 2).sum() - own)

    def _follow(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Fit the windows to where the grains are now; return the runs to step, in the order of the image
        rows, where each image row's runs start, and the cells to echo."""
        windows = _fitted(self._windows, _extents(self._cells, self._windows, self._rows), self.shape)
        rows, size = _lay_out(windows, *self.shape)
        cells = self._spare if size <= self._spare.size else np.empty(size + size // 4, np.float32)
        cells[:size] = 0
        _move(self._cells, self._windows, self._rows, cells, windows, rows, *self.shape)
        echoes = _find_echoes(windows, rows, self.shape[1])
        _echo(cells, echoes)
        spare = self._cells if self._cells.size == cells.size else np.empty_like(cells)
        self._cells, self._spare = cells, spare
        self._spare[:size] = cells[:size]
        self._windows, self._rows = windows, rows
        spans = _find_spans(cells, windows, rows, *self.shape)
        return *_find_runs(windows, rows, spans, *self.shape), echoes


def _first_windows(labels: np.ndarray) -> np.ndarray:
    """Windows just around the grains of a dense map."""
    grains = int(labels.max())
    windows = np.zeros(grains, WINDOW)
    for axis, (start, length) in enumerate((("top", "rows"), ("left", "columns"))):
        size = labels.shape[axis]
        occupied = np.zeros((grains, size), bool)
        occupied[labels - 1, np.arange(size).reshape((-1, 1) if axis == 0 else (1, -1))] = True
        for grain, line in enumerate(occupied):
            places = np.flatnonzero(line)
            if places.size:
                gaps = np.diff(places, append=places[0] + size)
                widest = gaps.argmax()
                windows[start][grain] = places[(widest + 1) % places.size]
                windows[length][grain] = size - gaps[widest] + 1
    return windows


def _fitted(windows: np.ndarray, extents: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Windows (n,) that hold the `extents` (n, 4: first and last row, first and last column) and a margin."""
    fitted = windows.copy()
    for axis, (start, length) in enumerate((("top", "rows"), ("left", "columns"))):
        first, last = extents[:, 2 * axis], extents[:, 2 * axis + 1]
        needed = last - first + 1 + 2 * MARGIN
        wraps = (windows[length] == shape[axis]) | (needed >= shape[axis])
        fitted[start] = np.where(wraps, windows[start], windows[start] + first - MARGIN) % shape[axis]
        fitted[length] = np.where(last < first, 0, np.where(wraps, shape[axis], needed))
    return fitted


@numba.njit(cache=True, nogil=True)
def _lay_out(windows: np.ndarray, height: int, width: int) -> tuple[np.ndarray, int]:
    """Give every window row its place in memory, image row by image row; return the places and the memory's
    size.

    Ahead of all lies a row of zeros, which serves as neighbour of every window's first and last row.
    """
    total = 0
    ends = np.zeros(height + 1, np.int64)
    for grain in range(windows.size):
        windows[grain].row = total
        total += windows[grain].rows
        for r in range(windows[grain].rows):
            ends[(windows[grain].top + r) % height + 1] += windows[grain].columns + 2
    ends[0] = width + 2
    ends = np.cumsum(ends)
    rows = np.empty(total, np.int64)
    for grain in range(windows.size):
        window = windows[grain]
        for r in range(window.rows):
            y = (window.top + r) % height
            rows[window.row + r] = ends[y] + 1
            ends[y] += window.columns + 2
    return rows, ends[height - 1]


@numba.njit(cache=True, nogil=True)
def _neighbours(window: Any, rows: np.ndarray, r: int, height: int) -> tuple[int, int]:
    """Places of the rows above and below row `r` of a window."""
    wraps = window.rows == height
    above = rows[window.row + (r - 1) % height] if r > 0 or wraps else ZEROS
    below = rows[window.row + (r + 1) % height] if r + 1 < window.rows or wraps else ZEROS
    return above, below


@numba.njit(cache=True, nogil=True)
def _fill(cells: np.ndarray, windows: np.ndarray, rows: np.ndarray, labels: np.ndarray) -> None:
    """Set each grain to 1 where the dense map shows it."""
    height, width = labels.shape
    for grain in range(windows.size):
        window = windows[grain]
        for r in range(window.rows):
            for c in range(window.columns):
                if labels[(window.top + r) % height, (window.left + c) % width] == grain + 1:
                    cells[rows[window.row + r] + c] = 1


@numba.njit(cache=True, nogil=True)
def _extents(cells: np.ndarray, windows: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """First and last row and column of each grain's cells above `SETTLED`, (n, 4); last < first if it has
    none."""
    extents = np.empty((windows.size, 4), np.int64)
    for grain in range(windows.size):
        window = windows[grain]
        top, bottom, left, right = window.rows, -1, window.columns, -1
        for r in range(window.rows):
            place = rows[window.row + r]
            first, end = _outline(cells[place:place + window.columns])
            if first < end:
                top, bottom, left, right = min(top, r), r, min(left, first), max(right, end - 1)
        extents[grain, 0], extents[grain, 1], extents[grain, 2], extents[grain, 3] = top, bottom, left, right
    return extents


@numba.njit(cache=True, nogil=True)
def _outline(line: np.ndarray) -> tuple[int, int]:
    """First and end of the cells above `SETTLED`."""
    first, end = 0, line.size
    while first < end and line[first] <= SETTLED:
        first += 1
    while first < end and line[end - 1] <= SETTLED:
        end -= 1
    return first, end


@numba.njit(cache=True, nogil=True)
def _interior(line: np.ndarray, first: int, end: int) -> tuple[int, int]:
    """First and end of the cells settled at 1, if they are in one piece."""
    while first < end and line[first] < ONE - SETTLED:
        first += 1
    while first < end and line[end - 1] < ONE - SETTLED:
        end -= 1
    unsettled = 0
    for value in line[first:end]:
        unsettled += value < ONE - SETTLED
    return (first, end) if unsettled == 0 else (FAR, -FAR)


@numba.njit(cache=True, nogil=True)
def _move(cells: np.ndarray, windows: np.ndarray, rows: np.ndarray, moved_cells: np.ndarray, moved_windows:
          np.ndarray, moved_rows: np.ndarray, height: int, width: int) -> None:
    """Copy the cells of each window to where they lie in the new layout."""
    for grain in range(windows.size):
        old, new = windows[grain], moved_windows[grain]
        shift = (new.left - old.left) % width
        for r in range(new.rows):
            row = (new.top + r - old.top) % height
            if row < old.rows:
                source, target = rows[old.row + row], moved_rows[new.row + r]
                # The old window's columns from the new one's left edge on, then those a period further.
                _copy(cells, source + shift, moved_cells, target, min(new.columns, old.columns - shift))
                period = width - shift
                _copy(cells, source, moved_cells, target + period, min(new.columns - period, old.columns))


@numba.njit(cache=True, nogil=True)
def _copy(source: np.ndarray, at: int, target: np.ndarray, to: int, count: int) -> None:
    if count > 0:
        target[to:to + count] = source[at:at + count]


@numba.njit(cache=True, nogil=True)
def _find_spans(cells: np.ndarray, windows: np.ndarray, rows: np.ndarray, height: int,
                width: int) -> np.ndarray:
    """Columns to step in each window row, (rows, 4): from the first to the settled ones, from their end to
    the end."""
    spans = np.empty((rows.size, 4), np.int64)
    for grain in range(windows.size):
        window = windows[grain]
        raw = np.empty((window.rows, 4), np.int64)
        for r in range(window.rows):
            place = rows[window.row + r]
            line = cells[place:place + window.columns]
            first, end = _outline(line)
            raw[r, 1], raw[r, 2] = _interior(line, first, end)
            raw[r, 0], raw[r, 3] = (first, end) if first < end else (FAR, -FAR)
        for r in range(window.rows):
            first, settled, unsettled, end = FAR, -FAR, FAR, -FAR
            for near in range(r - MARGIN, r + MARGIN + 1):
                if 0 <= near < window.rows or window.rows == height:
                    near %= window.rows
                    first, end = min(first, raw[near, 0]), max(end, raw[near, 3])
                    settled, unsettled = max(settled, raw[near, 1]), min(unsettled, raw[near, 2])
                else:
                    settled = FAR
            first, end = first - MARGIN, end + MARGIN
            settled, unsettled = settled + MARGIN, unsettled - MARGIN
            if window.columns == width and first < end and (first < 0 or end > width):
                first, end = 0, width
            first, end = max(first, 0), min(end, window.columns)
            settled += (first - settled) % LANES
            unsettled -= (unsettled - end) % LANES
            if unsettled - settled < WORTH_SKIPPING:
                end = min(end + (first - end) % LANES, window.columns)
                settled = unsettled = end
            span = spans[window.row + r]
            span[0], span[1], span[2], span[3] = first, settled, unsettled, end
    return spans


@numba.njit(cache=True, nogil=True)
def _find_runs(windows: np.ndarray, rows: np.ndarray, spans: np.ndarray, height: int,
               width: int) -> tuple[np.ndarray, np.ndarray]:
    """All runs in the order of their image rows, and where each image row's runs start, (height + 1,)."""
    loose = np.empty(6 * rows.size, RUN)
    lines = np.empty(loose.size, np.int64)
    starts = np.zeros(height + 1, np.int64)
    count = 0
    for grain in range(windows.size):
        window = windows[grain]
        for r in range(window.rows):
            here = rows[window.row + r]
            above, below = _neighbours(window, rows, r, height)
            for part in range(3):
                at, end = spans[window.row + r, part], spans[window.row + r, part + 1]
                while at < end:  # twice where the seam of the field cuts it
                    run = loose[count]
                    run.cell = here + at
                    run.above, run.below = (NOWHERE, NOWHERE) if part == 1 else (above + at, below + at)
                    run.column = (window.left + at) % width
                    run.length = min(end - at, width - run.column)
                    lines[count] = (window.top + r) % height
                    starts[lines[count] + 1] += 1
                    count += 1
                    at += run.length
    starts = np.cumsum(starts)
    place = starts.copy()
    runs = np.empty(count, RUN)
    for k in range(count):
        runs[place[lines[k]]] = loose[k]
        place[lines[k]] += 1
    return runs, starts


@numba.njit(cache=True, nogil=True)
def _find_echoes(windows: np.ndarray, rows: np.ndarray, width: int) -> np.ndarray:
    """Sources and targets, (n, 2), of the echoed cells of windows as wide as the field."""
    count = 0
    echoes = np.empty((2 * rows.size, 2), np.int64)
    for grain in range(windows.size):
        if windows[grain].columns == width:
            for r in range(windows[grain].rows):
                place = rows[windows[grain].row + r]
                echoes[count, 0], echoes[count, 1] = place, place + width
                echoes[count + 1, 0], echoes[count + 1, 1] = place + width - 1, place - 1
                count += 2
    return echoes[:count].copy()


@numba.njit(cache=True, nogil=True)
def _echo(cells: np.ndarray, echoes: np.ndarray) -> None:
    for k in range(len(echoes)):
        cells[echoes[k, 1]] = cells[echoes[k, 0]]


@numba.njit(cache=True, nogil=True)
def _advance(cells: np.ndarray, spare: np.ndarray, runs: np.ndarray, starts: np.ndarray, echoes: np.ndarray,
             width: int, time_step: float, steps: int) -> None:
    """Take Euler steps from one buffer to the other and back."""
    phi = np.empty(width, np.float32)
    for _ in range(steps):
        for row in range(starts.size - 1):
            own = runs[starts[row]:starts[row + 1]]
            _add_up(cells, own, phi)
            _step(cells, spare, own, phi, np.float32(time_step))
        _echo(spare, echoes)
        cells, spare = spare, cells


@numba.njit(cache=True, nogil=True)
def _add_up(cells: np.ndarray, runs: np.ndarray, phi: np.ndarray) -> None:
    """phi of one image row. Unsigned positions, here and in `_step`, let the compiler take many cells at a
    time."""
    phi[:] = 0
    for k in range(runs.size):
        run = runs[k]
        cell, column, length = np.uint64(run.cell), np.uint64(run.column), np.uint64(run.length)
        if run.above == NOWHERE:
            for j in range(length):
                phi[column + j] += ONE
        else:
            for j in range(length):
                eta = cells[cell + j]
                phi[column + j] += eta * eta


@numba.njit(cache=True, nogil=True)
def _step(cells: np.ndarray, spare: np.ndarray, runs: np.ndarray, phi: np.ndarray, time_step: float) -> None:
    """One Euler step of one image row."""
    edge, corner = time_step * np.float32(4 / 6), time_step * np.float32(1 / 6)
    keep = ONE + time_step * np.float32(1 - 20 / 6)
    one = np.uint64(1)
    for k in range(runs.size):
        run = runs[k]
        if run.above == NOWHERE:
            continue
        here, above, below = np.uint64(run.cell), np.uint64(run.above), np.uint64(run.below)
        column, length = np.uint64(run.column), np.uint64(run.length)
        for j in range(length):
            eta = cells[here + j]
            edges = cells[above + j] + cells[below + j] + cells[here + j - one] + cells[here + j + one]
            corners = (cells[above + j - one] + cells[above + j + one]
                       + cells[below + j - one] + cells[below + j + one])
            reaction = keep + time_step * (eta * eta - TWO * phi[column + j])
            spare[here + j] = eta * reaction + edge * edges + corner * corners


@numba.njit(cache=True, nogil=True)
def _project(cells: np.ndarray, windows: np.ndarray, rows: np.ndarray, weights: np.ndarray, height: int,
             width: int) -> tuple[np.ndarray, np.ndarray]:
    """Weighted sum of squares, and id of the largest order parameter, of every cell of the field."""
    total = np.zeros((height, width), np.float32)
    largest = np.zeros((height, width), np.float32)
    labels = np.zeros((height, width), np.int32)
    for grain in range(windows.size):
        window = windows[grain]
        for r in range(window.rows):
            y = (window.top + r) % height
            for c in range(window.columns):
                x = (window.left + c) % width
                eta = cells[rows[window.row + r] + c]
                total[y, x] += weights[grain] * eta * eta
                if eta > largest[y, x]:
                    largest[y, x] = eta
                    labels[y, x] = grain + 1
    return total, labels


@numba.njit(cache=True, nogil=True)
def _own_energy(cells: np.ndarray, windows: np.ndarray, rows: np.ndarray, height: int, width: int) -> float:
    """Sum over all grains of eta^4 / 4 + eta (Laplacian of eta) / 2."""
    total = 0.0
    for grain in range(windows.size):
        window = windows[grain]
        for r in range(window.rows):
            here = rows[window.row + r]
            above, below = _neighbours(window, rows, r, height)
            for c in range(window.columns):
                eta = float(cells[here + c])
                edges = float(cells[here + c - 1]) + cells[here + c + 1] + cells[above + c] + cells[below + c]
                corners = (float(cells[above + c - 1]) + cells[above + c + 1]
                           + cells[below + c - 1] + cells[below + c + 1])
                total += eta**4 / 4 + eta * (4 * edges + corners - 20 * eta) / 12
    return total
