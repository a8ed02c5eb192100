r"""Grain growth of many structures at once on a device that computes in bulk, such as a GPU.

The equations and the time stepping are those of `graincast.simulate.free_energy` and
`graincast.simulate.phase_field`; what differs is how the order parameters are stored. A device wants the same
arithmetic on long rows of memory, so the order parameters of a structure lie in a few *layers*, fields over all cells,
each of which grains far from one another share [1]_, [2]_. Seven layers hold the 112 grains of a 512 x 512 field.

**Footprints.** In its layer a grain owns the cells where its order parameter is above `SETTLED`, its *core*, and those
within `MARGIN` of them, together its *footprint*. Everywhere else its order parameter is kept at 0. Footprints follow
the grains every `INTERVAL` steps.

**No coalescence.** Grains of a layer keep their cores more than `SEPARATION` apart. Their footprints then have cells
between them that nobody owns, so no cell ever sees another grain's order parameter as its own. Whenever footprints
are about to be drawn, grains that have come nearer to one another in a layer are told apart: one stays, the others move
to the first layer where they are far from all grains, a new one if need be. Because a footprint depends on its grain
alone, the layers a grain lies in do not show in the result, but for the rounding of sums.

**Frames.** Every layer has a frame one cell wide that repeats the cells at the opposite side of the periodic field.
A neighbour then lies at a fixed distance in memory, and a step runs through a layer as through one long row, whatever
its dimensions.

**First fit.** Layer by layer, the grains that wait for a place are tried from the highest id to the lowest, all that
beat their waiting neighbours at the same time [3]_. This colours the graph of grains that are near each other as
sequential greedy colouring does, without the graph.

References
----------
.. [1] C. E. Krill III, L.-Q. Chen, Acta Mater. 50 (2002) 3057, doi:10.1016/S1359-6454(02)00084-8.
.. [2] C. J. Permann, M. R. Tonks, B. Fromm, D. R. Gaston, Comput. Mater. Sci. 115 (2016) 18,
   doi:10.1016/j.commatsci.2015.12.042.
.. [3] M. T. Jones, P. E. Plassmann, SIAM J. Sci. Comput. 14 (1993) 654, doi:10.1137/0914041.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import cache

import numpy as np
import psutil
import torch
from torch.nn.functional import pad
from torch.utils._triton import has_triton

from graincast.compute import pick_device
from graincast.errors import UserError
from graincast.simulate.free_energy import ISOTROPIC, VOLUME_KERNEL, Stencil, check_time_step

SETTLED = 0.01
"""Order parameter above which a cell belongs to a grain's core."""

MARGIN = 5
"""Cells around its core that a grain owns, in every direction of the grid. Tails fall by a factor e per cell, so what
is cut off is below 1e-4 of the order parameter."""

INTERVAL = 16
"""Steps between two updates of the footprints; a boundary moves by a fraction of a cell in between."""

SEPARATION = 2 * MARGIN + 1
"""Cores this near to each other, along the axis where they are furthest apart, cannot share a layer."""

TAIL = 4
"""Cells by which cores grow while sharp boundaries become diffuse; the first layers leave room for it."""

LAYERS = {2: 12, 3: 28}
"""Layers that suffice for grain structures in 2 and 3 dimensions; for planning only."""

TOGETHER = 8
"""Structures whose footprints are updated at a time: enough to keep a device busy, few enough for its memory."""

SHARE = 0.8
"""Of the free memory, what batches are planned to fill; the rest is for more layers than planned, and for gaps."""

Taps = tuple[tuple[float, int], ...]
"""Weights of a stencil, each with how far away in memory its cell lies."""


class BatchedGrowth:
    """Grain structures of the same shape in the course of their evolution.

    Parameters
    ----------
    labels : numpy.ndarray
        Dense grain ids 1..N of each structure at the start, (B, H, W) or volumes (B, D, H, W), integer, periodic; N
        may differ between structures. The boundaries are sharp.
    time_step : float
        Time step in units of 1/L.
    stencil : Stencil, optional
        Weights of the neighbours in div(K grad eta), planar structures only; volumes are isotropic.
    obstacles : numpy.ndarray, optional
        Psi of `graincast.simulate.free_energy`, shape of `labels`, float. No grain is in them at the start.
    device : str, optional
        Device of torch: ``cuda``, ``cuda:N``, ``cpu`` or ``auto``. On CUDA the step is compiled at its first use, which
        takes seconds, if Triton and a C compiler are there; otherwise and on CPUs structures are stepped one by one.

    Attributes
    ----------
    shape : tuple of int
        Of one structure.
    grains : tuple of int
        Number of grains of each structure at the start.
    time_step : float
        In units of 1/L.
    layers : tuple of int
        Number of layers each structure uses now.

    Raises
    ------
    UserError
        If the time step is unstable, the device is not there or its memory too small.
    ValueError
        If the arrays are not as described.

    Examples
    --------
    >>> start = np.repeat([1, 2], 16)[None, None].repeat(32, axis=1)
    >>> growth = BatchedGrowth(start, time_step=0.1, device="cpu")
    >>> growth.advance(100)
    >>> bool((growth.labels() == start).all()), round(float(growth.picture().max()), 3)
    (True, 1.0)
    """

    def __init__(self, labels: np.ndarray, time_step: float, *, stencil: Stencil = ISOTROPIC,
                 obstacles: np.ndarray | None = None, device: str = "cuda") -> None:
        if labels.ndim not in (3, 4) or labels.size == 0 or labels.min() < 1:
            raise ValueError("want a batch of maps (B, H, W) or volumes (B, D, H, W) of grain ids 1..N")
        if obstacles is not None and obstacles.shape != labels.shape:
            raise ValueError(f"obstacles have the shape {obstacles.shape}, the labels {labels.shape}")
        if labels.ndim == 4 and stencil != ISOTROPIC:
            raise ValueError("volumes are isotropic: they take no stencil")
        kernel = stencil.kernel if labels.ndim == 3 else VOLUME_KERNEL
        check_time_step(time_step, kernel, obstacles is not None)
        self.shape = labels.shape[1:]
        self.grains = tuple(int(structure.max()) for structure in labels)
        self.time_step = time_step
        self._device = pick_device(device)
        self._check_memory(min(max(self.grains), LAYERS[len(self.shape)]))
        self._taps = _taps(kernel, self.shape)
        self._obstacles = None if obstacles is None else self._framed(self._sent(obstacles.astype(np.float32))[:, None])
        self._fused = self._device.type == "cuda" and _can_compile()
        ids = self._sent(labels.astype(self._id_type()))[:, None]
        self._layer = torch.cat([_first_layers(some, max(self.grains)) for some in ids.split(TOGETHER)])
        self.layers = _counted(self._layer)
        self._check_memory(max(self.layers))
        self._owner = self._framed(_distribute(ids, self._layer, max(self.layers)))
        self._eta = (self._owner > 0).float()
        if self._obstacles is not None:
            self._eta *= (1 - 2 * self._obstacles).clamp_(min=0).sqrt_()

    def advance(self, steps: int) -> None:
        """Take `steps` time steps."""
        for done in range(0, steps, INTERVAL):
            for part in self._parts():
                self._follow(part)
            for _ in range(min(INTERVAL, steps - done)):
                self._step()

    def picture(self, weights: Sequence[np.ndarray] | None = None) -> np.ndarray:
        """Sum of the squared order parameters, each times its grain's weight.

        Parameters
        ----------
        weights : sequence of numpy.ndarray, optional
            For each structure one weight a grain, (N,), float; 1 when left out, which gives phi.

        Returns
        -------
        numpy.ndarray
            (B, *shape), float32.
        """
        pictures = []
        for index, (eta, owner) in enumerate(zip(self._inside(self._eta), self._inside(self._owner), strict=True)):
            square = eta.square()
            if weights is not None:
                table = self._sent(np.concatenate([[0], weights[index]]).astype(np.float32))
                square *= table[owner.long()]
            pictures.append(square.sum(0).cpu().numpy())
        return np.stack(pictures)

    def labels(self) -> np.ndarray:
        """Id of the largest order parameter of every cell, (B, *shape), int32; 0 where there is none, in obstacles."""
        largest, layer = self._inside(self._eta).max(1, keepdim=True)
        owner = self._inside(self._owner).gather(1, layer) * (largest > 0)
        return owner[:, 0].int().cpu().numpy()

    def energy(self) -> np.ndarray:
        """Free energy of each structure above that of one endless grain, (B,), float64.

        In units of the bulk energy density times the cells' volume.
        """
        self._close()
        energies = []
        for index in range(len(self.grains)):
            eta, owner = self._eta[index, None].double(), self._owner[index, None]
            phi = self._inside(eta).square().sum(1)
            shared = 0.25 - phi / 2 + phi.square() / 2
            if self._obstacles is not None:
                shared += self._inside(self._obstacles)[index] * phi
            here = _cells(eta, self._taps)
            own = (here.pow(4) / 4 + here * _diffusion(eta, self._taps) / 2) * (_cells(owner, self._taps) > 0)
            energies.append(float(shared.sum() - own.sum()))
        return np.array(energies)

    def _id_type(self) -> type[np.signedinteger]:
        return np.int16 if max(self.grains) <= np.iinfo(np.int16).max else np.int32

    def _sent(self, array: np.ndarray) -> torch.Tensor:
        """The array on the device."""
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device)

    def _check_memory(self, layers: int) -> None:
        """Refuse a batch that needs more memory than the device has."""
        cells = math.prod(self.shape)
        needed = len(self.grains) * _bytes_each(cells, layers) + _bytes_shared(cells, layers)
        if needed > free_memory(self._device):
            raise _too_large(len(self.grains), self.shape, self._device, needed)

    def _parts(self) -> Iterator[slice]:
        return (slice(first, first + TOGETHER) for first in range(0, len(self.grains), TOGETHER))

    def _step(self) -> None:
        """Take one time step: all structures at once, or one after the other, each with its own layers only."""
        self._close()
        eta, owner, obstacles = self._eta, self._owner, self._obstacles
        if self._fused:
            self._eta = _compiled_step()(eta, owner, obstacles, self._taps, self.time_step)
            return
        for index, layers in enumerate(self.layers):
            own = slice(index, index + 1), slice(layers)
            eta[own] = _step(eta[own], owner[own], None if obstacles is None else obstacles[own[0]], self._taps, self.time_step)

    def _framed(self, field: torch.Tensor) -> torch.Tensor:
        """Fields (B, Q, *shape) with a frame of zeros, as rows (B, Q, P)."""
        framed = field.new_zeros((*field.shape[:2], math.prod(size + 2 for size in self.shape)))
        self._inside(framed).copy_(field)
        return framed

    def _unrolled(self, framed: torch.Tensor) -> torch.Tensor:
        """View of framed fields (B, Q, P) with the axes of the structures."""
        return framed.view(*framed.shape[:2], *(size + 2 for size in self.shape))

    def _inside(self, framed: torch.Tensor) -> torch.Tensor:
        """View of the cells (B, Q, *shape) inside the frame of fields (B, Q, P)."""
        inside = self._unrolled(framed)
        for axis, size in enumerate(self.shape, start=2):
            inside = inside.narrow(axis, 1, size)
        return inside

    def _close(self) -> None:
        """Fill the frame with the order parameters at the opposite side of the periodic field."""
        eta = self._unrolled(self._eta)
        for axis, size in enumerate(self.shape, start=2):
            eta.select(axis, 0).copy_(eta.select(axis, size))
            eta.select(axis, size + 1).copy_(eta.select(axis, 1))

    def _cores(self, part: slice) -> torch.Tensor:
        """Grain whose core each cell of each layer lies in, 0 where none is."""
        return self._inside(self._owner[part]) * (self._inside(self._eta[part]) > SETTLED)

    def _follow(self, part: slice) -> None:
        """Fit the footprints to where the grains are now, after moving grains that came too near to others."""
        cores = self._cores(part)
        footprints = _dilated(cores, MARGIN)
        crowding = (cores > 0) & (_dilated(footprints, SEPARATION - MARGIN) > cores)  # all but the highest of them
        crowded = crowding.flatten(1).any(1).nonzero()[:, 0]
        if len(crowded):
            self._rearrange(part.start + crowded, cores[crowded], _grains(crowding[crowded], cores[crowded], self._layer.shape[1]))
            footprints = _dilated(self._cores(part), MARGIN)
        self._inside(self._eta[part]).mul_(footprints == self._inside(self._owner[part]))
        self._inside(self._owner)[part] = footprints

    def _rearrange(self, which: torch.Tensor, cores: torch.Tensor, waiting: torch.Tensor) -> None:
        """Move the grains `waiting` (K, N + 1) of the structures `which` (K,) to layers where there is room for them."""
        before = self._layer[which]
        after = _first_fit(cores, before, waiting, SEPARATION)
        self._layer[which] = after
        self.layers = _counted(self._layer)
        self._provide(max(self.layers))
        footprints = _dilated(_distribute(cores, after, self._owner.shape[1]), MARGIN)
        source = _of_cells(before, footprints).clamp_(min=0)
        eta, owner = self._inside(self._eta), self._inside(self._owner)
        eta[which] = eta[which].gather(1, source) * (owner[which].gather(1, source) == footprints)
        owner[which] = footprints

    def _provide(self, layers: int) -> None:
        """Add empty layers until there are as many."""
        missing = layers - self._owner.shape[1]
        if missing > 0:
            self._owner, self._eta = (torch.cat([field, field.new_zeros((len(field), missing, *field.shape[2:]))], 1)
                                      for field in (self._owner, self._eta))


def structures_at_once(shape: tuple[int, ...], device: str = "cuda") -> int:
    """Number of structures that fit in a device's free memory together.

    Parameters
    ----------
    shape : tuple of int
        Of one structure, (H, W) or (D, H, W).
    device : str, optional
        As `BatchedGrowth` takes it.

    Returns
    -------
    int
        At least 1.

    Raises
    ------
    UserError
        If the device is not there, or not even one structure fits.
    """
    cells, layers, place = math.prod(shape), LAYERS[len(shape)], pick_device(device)
    room = int(SHARE * free_memory(place)) - _bytes_shared(cells, layers)
    each = _bytes_each(cells, layers)
    if room < each:
        raise _too_large(1, shape, place, (each + _bytes_shared(cells, layers)) / SHARE)
    return room // each


def free_memory(device: torch.device) -> int:
    """Bytes that tensors may still take on a device."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return psutil.virtual_memory().available


def _too_large(structures: int, shape: tuple[int, ...], device: torch.device, needed: float) -> UserError:
    return UserError(f"simulate.device: {structures} structures of {' x '.join(map(str, shape))} cells at once need {needed / 1e9:.1f} GB, "
                     f"{device} has {free_memory(device) / 1e9:.1f} GB free; fewer or smaller ones would be right")


def _bytes_each(cells: int, layers: int) -> int:
    """Memory of one structure: two buffers and the owners (up to 4 bytes each) a layer, obstacles and phi."""
    return cells * (12 * layers + 8)


def _bytes_shared(cells: int, layers: int) -> int:
    """Memory for temporary fields while `TOGETHER` structures are rearranged."""
    return cells * layers * TOGETHER * 48


def _can_compile() -> bool:
    """Whether Triton and the C compiler that it needs are there."""
    return has_triton() and any(map(shutil.which, (os.environ.get("CC", "gcc"), "gcc", "clang")))


@cache
def _compiled_step() -> Callable[..., torch.Tensor]:
    """The step as two kernels: the sum of squares, then all the rest, without intermediate results in memory."""
    in_one_go = dict.fromkeys(("realize_opcount_threshold", "realize_acc_reads_threshold"), 1000)
    return torch.compile(_step, fullgraph=True, recompile_limit=64, options=in_one_go)  # type: ignore[call-overload]


def _step(eta: torch.Tensor, owner: torch.Tensor, obstacles: torch.Tensor | None, taps: Taps, time_step: float) -> torch.Tensor:
    """The order parameters (B, Q, P) one Euler step later; the frame is undefined."""
    here = _cells(eta, taps)
    change = here.square()
    phi = change.sum(1, keepdim=True)
    if obstacles is not None:
        phi = phi + _cells(obstacles, taps)
    change = change.add_(1).sub_(2 * phi).mul_(here).add_(_diffusion(eta, taps))
    stepped = change.mul_(time_step).add_(here).mul_(_cells(owner, taps) > 0)
    rim = (eta.shape[2] - here.shape[2]) // 2
    return pad(stepped, (rim, rim))


def _diffusion(eta: torch.Tensor, taps: Taps) -> torch.Tensor:
    """div(K grad eta) of the `_cells` of framed fields (B, Q, P)."""
    total = torch.zeros_like(_cells(eta, taps))
    for weight, distance in taps:
        total.add_(_cells(eta, taps, distance), alpha=weight)
    return total


def _cells(field: torch.Tensor, taps: Taps, distance: int = 0) -> torch.Tensor:
    """View of the cells of framed fields (B, Q, P) that have all their neighbours, or of what lies a distance further."""
    reach = max(far for _, far in taps)
    return field[:, :, reach + distance:field.shape[2] - reach + distance]


def _taps(kernel: np.ndarray, shape: tuple[int, ...]) -> Taps:
    """The weights of a stencil that are not 0."""
    strides = np.cumprod([1, *(n + 2 for n in shape[:0:-1])])[::-1]
    return tuple((float(kernel[place]), int((np.array(place) - 1) @ strides)) for place in zip(*kernel.nonzero(), strict=True))


def _dilated(field: torch.Tensor, radius: int) -> torch.Tensor:
    """Largest value within `radius` cells along every axis of fields (B, Q, *shape), periodic."""
    for axis in range(2, field.ndim):
        width = 1
        while width <= radius:  # each cell knows the largest of itself and the width - 1 cells after it
            shift = min(width, radius + 1 - width)
            field = torch.maximum(field, field.roll(-shift, axis))
            width += shift
        field = torch.maximum(field, field.roll(radius, axis))
    return field


def _of_cells(table: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """What a table (B, N + 1) says of the grain of each cell, shape of `ids` (B, Q, *shape)."""
    return table.gather(1, ids.flatten(1).long()).view_as(ids)


def _grains(where: torch.Tensor, ids: torch.Tensor, size: int) -> torch.Tensor:
    """Which grains have a cell `where` (B, Q, *shape) is true, (B, size), bool."""
    found = torch.zeros((len(ids), size), dtype=torch.bool, device=ids.device)
    found.scatter_(1, (ids * where).flatten(1).long(), True)
    found[:, 0] = False
    return found


def _distribute(cores: torch.Tensor, layer: torch.Tensor, layers: int) -> torch.Tensor:
    """Put every grain's core in the layer that the table `layer` (B, N + 1) says; (B, layers, *shape)."""
    place = _of_cells(layer, cores)
    return torch.stack([(cores * (place == one)).amax(1) for one in range(layers)], 1)


def _counted(layer: torch.Tensor) -> tuple[int, ...]:
    """Number of layers each structure needs, from the layers (B, N + 1) of its grains."""
    return tuple((layer.amax(1) + 1).tolist())


def _first_layers(ids: torch.Tensor, grains: int) -> torch.Tensor:
    """Layers for the grains of maps (B, 1, *shape), (B, grains + 1)."""
    layer = torch.full((len(ids), grains + 1), -1, device=ids.device)
    return _first_fit(ids, layer, _grains(ids > 0, ids, grains + 1), SEPARATION + 2 * TAIL)


def _first_fit(cores: torch.Tensor, layer: torch.Tensor, waiting: torch.Tensor, distance: int) -> torch.Tensor:
    """Give each grain that waits the first layer where no core lies within `distance` of its own.

    Parameters
    ----------
    cores : torch.Tensor
        Grain ids of the cores where they lie now, 0 elsewhere, (B, Q, *shape).
    layer : torch.Tensor
        Layer of each grain that does not wait, (B, N + 1).
    waiting : torch.Tensor
        Grains to be placed, (B, N + 1), bool.
    distance : int
        Along the axis where the cores are furthest apart.

    Returns
    -------
    torch.Tensor
        Layer of each grain, (B, N + 1).
    """
    layer, waiting = layer.clone(), waiting.clone()
    current = 0
    while waiting.any():
        taken = (cores * _of_cells(~waiting & (layer == current), cores)).amax(1, keepdim=True)
        candidates = waiting.clone()
        while True:
            candidates &= ~_grains(_dilated(taken, distance) > 0, cores, layer.shape[1])
            if not candidates.any():
                break
            rivals = (cores * _of_cells(candidates, cores)).amax(1, keepdim=True)
            chosen = candidates & ~_grains(_dilated(rivals, distance) > cores, cores, layer.shape[1])
            taken = torch.maximum(taken, (cores * _of_cells(chosen, cores)).amax(1, keepdim=True))
            layer[chosen] = current
            waiting &= ~chosen
            candidates &= ~chosen
        current += 1
    return layer
