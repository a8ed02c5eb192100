"""The virtual SEM: a grain map and imaging physics in, a micrograph with exact truth out.

An independent forward model for demonstrations, tests and controlled drift. It learns nothing and shares
nothing with the translator in `graincast.synthesise`. Whatever it writes says that it is virtual.

The chain follows the signal: the specimen's surface (`_surface`), the secondary electrons that leave it and
reach the detector (`_emission`), the scan that turns the field into lines (`_scan`), detection (`_detect`).
The strength of every effect stands in `graincast.config.VirtualSem` with its unit. Signals are relative: a
flat, clean specimen of mean channelling in the middle of the field gives 1.

References
----------
.. [1] W. W. Mullins, "Theory of thermal grooving", J. Appl. Phys. 28, 333 (1957), doi:10.1063/1.1722742.
.. [2] H. Seiler, "Secondary electron emission in the scanning electron microscope", J. Appl. Phys. 54, R1
       (1983), doi:10.1063/1.332840.
.. [3] L. Reimer, Scanning Electron Microscopy, 2nd ed., Springer (1998), doi:10.1007/978-3-540-38967-5.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage as ndi
from scipy import signal as sps
from skimage import measure
from tqdm import tqdm

from graincast.config import VirtualSem, VirtualSession
from graincast.errors import UserError
from graincast.simulate.phase_field import evolve
from graincast.simulate.tessellation import tessellate
from graincast.store.imageset import whole_folder

FEI_METADATA_TAG = 34682
RANDOM_STREAM = 0x53454D  # keeps a session's grains apart from those of a simulation with the same seed
RELAXATION = 0.04  # time of grain growth in units of (diameter in px)^2: junctions settle, few grains vanish
TIME_STEP = 0.1
REGULARITY = 0.5  # of the seeds: equiaxed cells
FEWEST_GRAINS = 4
LEAST_ENERGY = 0.1  # of a boundary, relative to the mean
LINE_PX = 3  # width of the true boundary lines

Grid = np.ndarray


def render(labels: np.ndarray, pixel_size_um: float, sem: VirtualSem, rng: np.random.Generator) -> np.ndarray:
    """Image a grain map as the virtual SEM would.

    Parameters
    ----------
    labels : ndarray of int, shape (H, W)
        Grain map, 1..N; pixels of 0 (boundary lines) are given to the nearest grain.
    pixel_size_um : float
        Pixel size, um; the specimen's and the probe's lengths are scaled with it.
    sem : VirtualSem
        Strength of every effect.
    rng : numpy.random.Generator
        Source of all randomness; the same state gives the same image.

    Returns
    -------
    ndarray of uint8, shape (H, W)
        The micrograph. Lines are scanned along x, from left to right; y is the slow axis.

    Raises
    ------
    UserError
        If `labels` is no 2-D integer map with a grain in it, or the pixel size is not positive.

    Examples
    --------
    >>> labels = np.repeat([[1, 2]], 32, axis=0).repeat(16, axis=1)
    >>> image = render(labels, 0.05, VirtualSem(), np.random.default_rng(0))
    >>> image.shape, image.dtype
    ((32, 32), dtype('uint8'))
    """
    return _expose(labels, pixel_size_um, sem, rng)[0]


def write_session(config: VirtualSession, out: Path | str) -> Path:
    """Write a session of the virtual SEM as an instrument would leave it, with its truth beside it.

    ::

        micrographs/vsem_000.tif ...        what the loop may see, with an info bar below the field
        held_out/images/vsem_h000.tif ...   for the evaluation only, the field alone
        held_out/masks/vsem_h000.png ...    their true boundaries, 255 = line
        session.json                        the parameters

    The held-out images carry no info bar, so that image and mask cover the same field and a score counts
    grains alone. Every TIFF states its pixel size in FEI-style metadata.

    Parameters
    ----------
    config : VirtualSession
        Number and size of the fields, grain size, effects and seed. The same config gives the same bytes.
    out : Path or str
        The folder to make; it appears when it is whole and replaces an older one.

    Returns
    -------
    Path
        `out`.

    Raises
    ------
    UserError
        If a field would hold fewer grains than make a micrograph of grains.
    """
    out = Path(out)
    fields = [("micrographs", k) for k in range(config.micrographs)]
    fields += [("held_out", k) for k in range(config.held_out)]
    with whole_folder(out) as folder:
        for name in ("micrographs", "held_out/images", "held_out/masks"):
            (folder / name).mkdir(parents=True)
        for part, k in tqdm(fields, desc="virtual SEM", unit="field", disable=None):
            image, labels = _acquire(config, part, k)
            if part == "micrographs":
                bar = _info_bar(config.size, config.pixel_size_um)
                _save(folder / part / f"vsem_{k:03d}.tif", np.vstack([image, bar]), config)
            else:
                _save(folder / part / "images" / f"vsem_h{k:03d}.tif", image, config)
                mask = np.where(boundary_lines(labels), np.uint8(255), np.uint8(0))
                Image.fromarray(mask).save(folder / part / "masks" / f"vsem_h{k:03d}.png")
        about = {"virtual": True, "config": config.model_dump(),
                 "instrument": "graincast virtual SEM: images computed from simulated grains, not measured"}
        (folder / "session.json").write_text(json.dumps(about, indent=1, sort_keys=True))
    return out


def boundary_lines(labels: np.ndarray) -> np.ndarray:
    """Draw the boundaries of a dense grain map as closed lines.

    Parameters
    ----------
    labels : ndarray of int, shape (H, W)
        Grain map without zeros.

    Returns
    -------
    ndarray of bool, shape (H, W)
        True on lines about 3 px wide that follow the boundaries to within half a pixel. No two grains are
        4-connected through them.
    """
    line = np.zeros(labels.shape, bool)
    line[:, :-1] |= labels[:, :-1] != labels[:, 1:]
    line[:-1] |= labels[:-1] != labels[1:]
    return ndi.binary_dilation(line, iterations=LINE_PX // 2)


def _acquire(config: VirtualSession, part: str, index: int) -> tuple[Grid, Grid]:
    """Field `index` of a part: micrograph and the dense grain map as it lies in the micrograph."""
    rng = np.random.default_rng([config.seed, RANDOM_STREAM, ("micrographs", "held_out").index(part), index])
    field_um = config.size * config.pixel_size_um
    grains = round(field_um**2 / (math.pi / 4 * config.grain_diameter_um**2))
    if grains < FEWEST_GRAINS:
        raise UserError(f"session.virtual: a field of {field_um:g} um holds only {grains} grains of "
                        f"{config.grain_diameter_um:g} um, want at least {FEWEST_GRAINS}; raise size or "
                        "pixel_size_um, or lower grain_diameter_um")
    cells = tessellate((config.size, config.size), grains, rng, area_spread=config.area_spread, regularity=REGULARITY)
    steps = round(RELAXATION * (config.grain_diameter_um / config.pixel_size_um) ** 2 / TIME_STEP)
    labels = evolve(cells, steps, TIME_STEP).labels
    return _expose(labels, config.pixel_size_um, config.sem, rng)


def _expose(labels: Grid, pixel_um: float, sem: VirtualSem, rng: np.random.Generator) -> tuple[Grid, Grid]:
    """The micrograph, and the dense grain map displaced by the specimen drift as the micrograph is."""
    labels = _dense(labels)
    if not pixel_um > 0:
        raise UserError(f"pixel_size_um: must be a positive number of um, got {pixel_um!r}")
    height = _surface(labels, pixel_um, sem, rng)
    signal = _emission(height, pixel_um, sem) * _channelling(labels, sem, rng)
    signal *= _contamination(labels.shape, pixel_um, sem, rng) * _shading(labels.shape, sem)
    signal = ndi.gaussian_filter(signal, sem.probe_um / pixel_um, mode="mirror")
    signal, seen = _scan(signal, labels, sem, rng)
    return _detect(_charge(signal, pixel_um, sem), sem, rng), seen


def _dense(labels: Grid) -> Grid:
    """The grain map without boundary pixels; separate pieces of one id (periodic maps) count apart.

    Raises
    ------
    UserError
        If it is no grain map.
    """
    if labels.ndim != 2 or not np.issubdtype(labels.dtype, np.integer) or not (labels > 0).any():
        raise UserError("labels: want a 2-D integer grain map with at least one grain, "
                        f"got {labels.dtype} {labels.shape}")
    nearest = ndi.distance_transform_edt(labels <= 0, return_distances=False, return_indices=True)
    return measure.label(labels[tuple(nearest)], connectivity=1, background=0).astype(np.int32)


# ----------------------------------------------------------------------------------------------- the specimen


def _surface(labels: Grid, pixel_um: float, sem: VirtualSem, rng: np.random.Generator) -> Grid:
    """Height of the specimen, um: thermal grooves, tilted facets, fine roughness."""
    half_width = sem.groove_width_um / 2
    distance, depth = _grooves(labels, pixel_um, sem, rng)
    height = depth * mullins_profile(distance / half_width)
    # the facets' planes end at the grooves, whose shape surface diffusion sets
    height += _facets(labels, pixel_um, sem, rng) * -np.expm1(-((distance / half_width) ** 2))
    noise = rng.standard_normal(labels.shape)
    rough = ndi.gaussian_filter(noise, sem.roughness_length_um / pixel_um, mode="wrap")
    height += sem.roughness_um * rough / rough.std()
    return ndi.gaussian_filter(height, 1.0, mode="mirror")  # rounds the stairs of the pixelated boundaries


def _grooves(labels: Grid, pixel_um: float, sem: VirtualSem, rng: np.random.Generator) -> tuple[Grid, Grid]:
    """Distance to the nearest boundary and depth of its groove, um; one depth for each pair of neighbours."""
    across = np.zeros(labels.shape, labels.dtype)  # the grain on the other side, for pixels at a boundary
    for axis in (0, 1):
        here, there = [slice(None)] * 2, [slice(None)] * 2
        here[axis], there[axis] = slice(None, -1), slice(1, None)
        for a, b in ((tuple(here), tuple(there)), (tuple(there), tuple(here))):
            across[a] = np.where(labels[a] != labels[b], labels[b], across[a])
    edge = across > 0
    if not edge.any():
        return np.full(labels.shape, np.inf), np.zeros(labels.shape)
    pairs = np.sort(np.stack([labels[edge], across[edge]]), axis=0)
    boundaries, which = np.unique(pairs, axis=1, return_inverse=True)
    # depth is proportional to the boundary's energy (Mullins 1957); low-angle boundaries have little of it
    energy = np.maximum(1 + sem.groove_depth_spread * rng.standard_normal(boundaries.shape[1]), LEAST_ENERGY)
    depth = np.zeros(labels.shape)
    depth[edge] = sem.groove_depth_um * energy[which]
    distance, nearest = ndi.distance_transform_edt(~edge, return_indices=True)
    depth = depth[tuple(nearest)]
    # at a junction the grooves merge into one another
    depth = ndi.gaussian_filter(depth, sem.groove_width_um / 2 / pixel_um, mode="mirror")
    return (distance + 0.5) * pixel_um, depth


def mullins_profile(x: np.ndarray) -> np.ndarray:
    """Profile of a thermal groove that grew by surface diffusion (Mullins 1957).

    Parameters
    ----------
    x : ndarray of float
        Distance from the groove's root, in units of the distance from the root to a shoulder; x >= 0.

    Returns
    -------
    ndarray of float
        Height over the far surface, in units of the depth from shoulder to root: -0.80 at the root, +0.20 on
        the shoulder at x = 1, 0 far away.

    Examples
    --------
    >>> mullins_profile(np.array([0.0, 1.0, 10.0])).round(2)
    array([-0.8,  0.2,  0. ])
    """
    return np.interp(x, _GROOVE_X, _GROOVE_HEIGHT, right=0.0)


def _mullins_table() -> tuple[Grid, Grid]:
    """Power series of Z'''' = (u Z' - Z) / 4 with Z'(0) = 1 and Z'''(0) = 0, vanishing at infinity."""
    series = [-1 / (math.sqrt(2) * math.gamma(5 / 4)), 1.0, -1 / (2 * math.sqrt(2) * math.gamma(3 / 4)), 0.0]
    for n in range(120):
        series.append(series[n] * (n - 1) / (4 * (n + 1) * (n + 2) * (n + 3) * (n + 4)))
    u = np.linspace(0, 9, 2001)
    height = np.polynomial.polynomial.polyval(u, series)
    shoulder = int(height.argmax())
    return u / u[shoulder], height / (height[shoulder] - height[0])


_GROOVE_X, _GROOVE_HEIGHT = _mullins_table()


def _facets(labels: Grid, pixel_um: float, sem: VirtualSem, rng: np.random.Generator) -> Grid:
    """Height of every grain's tilted plane over its own centre, um."""
    ids, grain = np.unique(labels, return_inverse=True)
    slopes = np.tan(np.radians(sem.facet_tilt_deg)) * rng.standard_normal((2, ids.size))
    grain = grain.reshape(labels.shape)
    area = np.bincount(grain.ravel())
    plane = np.zeros(labels.shape)
    for slope, position in zip(slopes, np.indices(labels.shape, dtype=float), strict=True):
        centre = np.bincount(grain.ravel(), position.ravel()) / area
        plane += slope[grain] * (position - centre[grain]) * pixel_um
    return plane


def _channelling(labels: Grid, sem: VirtualSem, rng: np.random.Generator) -> Grid:
    """Relative signal of each grain from its random orientation; chance alone makes some neighbours alike."""
    ids, grain = np.unique(labels, return_inverse=True)
    level = np.clip(rng.standard_normal(ids.size), -2.5, 2.5)
    return (1 + sem.channelling * level)[grain.reshape(labels.shape)].clip(0.05)


def _contamination(shape: tuple[int, ...], pixel_um: float, sem: VirtualSem,
                   rng: np.random.Generator) -> Grid:
    """Relative signal through spots of deposit, which emits fewer secondary electrons than the specimen."""
    signal = np.ones(shape)
    rows, columns = np.ogrid[: shape[0], : shape[1]]
    expected = sem.contamination * shape[0] * shape[1] * pixel_um**2 / 1000
    for _ in range(rng.poisson(expected)):
        y, x = rng.uniform(0, shape)
        radius = sem.contamination_radius_um / pixel_um * rng.lognormal(0, 0.4)
        signal *= 1 - sem.contamination_darkening * np.exp(-((np.hypot(rows - y, columns - x) / radius) ** 4))
    return signal


# ----------------------------------------------------------------------------------- emission and collection


def _emission(height: Grid, pixel_um: float, sem: VirtualSem) -> Grid:
    """Secondary electrons that reach the detector; 1 for a flat specimen."""
    dy, dx = np.gradient(height, pixel_um)
    secant = np.sqrt(1 + dx**2 + dy**2)  # yield rises as 1 / cos(tilt): Seiler 1983, Reimer 1998
    convexity = np.maximum(-ndi.laplace(height, mode="nearest") / pixel_um**2, 0)
    emitted = 1 + sem.topography * (secant - 1) + sem.edge_brightening_um * convexity
    return emitted * (1 - sem.shadowing * (1 - _open_sky(height, pixel_um, sem)))


def _open_sky(height: Grid, pixel_um: float, sem: VirtualSem, directions: int = 8) -> Grid:
    """Share of the emitted electrons whose path the surrounding surface leaves open; 1 for a flat specimen.

    Of electrons that leave in all directions alike, a horizon of elevation h blocks the share sin(h); one
    below the level (h < 0), on a slope, opens as much more. The Everhart-Thornley detector draws more of the
    electrons that start towards its side, so slopes that face away from it are in the shade.
    """
    reach = max(int(np.ceil(1.5 * sem.groove_width_um / pixel_um)), 1)
    steps = np.unique(np.geomspace(1, reach, 8).round())
    padded = np.pad(height, reach + 1, mode="edge")
    detector = math.radians(sem.detector_azimuth_deg)
    sky = np.zeros_like(height)
    for azimuth in np.arange(directions) * 2 * np.pi / directions:
        slope = np.full_like(height, -np.inf)
        for step in steps:
            sy, sx = round(-step * math.sin(azimuth)), round(step * math.cos(azimuth))
            top, left = reach + 1 + sy, reach + 1 + sx
            there = padded[top : top + height.shape[0], left : left + height.shape[1]]
            np.maximum(slope, (there - height) / (math.hypot(sy, sx) * pixel_um), out=slope)
        weight = 1 + sem.detector_asymmetry * math.cos(azimuth - detector)
        sky += weight * (1 - slope / np.sqrt(1 + slope**2))
    return sky / directions


def _shading(shape: tuple[int, ...], sem: VirtualSem) -> Grid:
    """Large-scale relative signal, brighter towards the detector."""
    detector = math.radians(sem.detector_azimuth_deg)
    y, x = (np.linspace(-0.5, 0.5, n) for n in shape)
    return (1 + sem.shading * (math.cos(detector) * x[None, :] - math.sin(detector) * y[:, None])).clip(0)


# ---------------------------------------------------------------------------------------- scan and detection


def _scan(signal: Grid, labels: Grid, sem: VirtualSem, rng: np.random.Generator) -> tuple[Grid, Grid]:
    """Sample line by line as the specimen drifts and the lines jitter; the labels follow the drift alone."""
    rows, columns = np.indices(signal.shape, dtype=float)
    direction = rng.uniform(0, 2 * np.pi)
    elapsed = np.linspace(-0.5, 0.5, signal.shape[0])[:, None] * sem.drift_px
    rows, columns = rows + elapsed * math.sin(direction), columns + elapsed * math.cos(direction)
    jitter = sem.line_jitter_px * rng.standard_normal((signal.shape[0], 1))
    sampled = ndi.map_coordinates(signal, [rows, columns + jitter], order=3, mode="mirror")
    seen = ndi.map_coordinates(labels, [rows, columns], order=0, mode="mirror")
    return sampled, seen


def _charge(signal: Grid, pixel_um: float, sem: VirtualSem) -> Grid:
    """Add the trails that charge left by bright features draws along the scan; it leaks off exponentially."""
    keep = math.exp(-pixel_um / sem.charging_length_um)
    excess = np.maximum(signal - signal.mean(), 0)
    charge = sps.lfilter([0, 1 - keep], [1, -keep], excess, axis=1)
    return signal + sem.charging * charge


def _detect(signal: Grid, sem: VirtualSem, rng: np.random.Generator) -> Grid:
    """Count electrons, amplify, add the amplifier's noise, digitise to 8 bit."""
    signal = rng.poisson(sem.electrons * np.maximum(signal, 0)) / sem.electrons
    signal *= 1 + sem.line_gain * rng.standard_normal((signal.shape[0], 1))
    level = sem.offset + 0.5 * sem.gain * signal + sem.detector_noise * rng.standard_normal(signal.shape)
    return np.clip(np.rint(255 * level), 0, 255).astype(np.uint8)


# -------------------------------------------------------------------------------------------------- the files


def _save(path: Path, image: Grid, config: VirtualSession) -> None:
    """Write a micrograph with the pixel size where an FEI instrument states it (INI text in its own tag)."""
    pixel_m = config.pixel_size_um * 1e-6
    sections: dict[str, dict[str, Any]] = {
        "System": {"Type": "Virtual SEM", "Software": "graincast"},
        "Scan": {"PixelWidth": pixel_m, "PixelHeight": pixel_m,
                 "HorFieldsize": pixel_m * config.size, "VerFieldsize": pixel_m * config.size},
        "Image": {"ResolutionX": config.size, "ResolutionY": config.size},
        "Detectors": {"Number": 1, "Name": "Virtual ETD"},
    }
    text = "\r\n".join(f"[{name}]\r\n" + "".join(f"{key}={value}\r\n" for key, value in keys.items())
                       for name, keys in sections.items())
    tifffile.imwrite(path, image, photometric="minisblack", metadata=None, software="graincast virtual SEM",
                     extratags=[(FEI_METADATA_TAG, "s", 0, text, True)])


def _info_bar(width: int, pixel_um: float) -> Grid:
    """The strip below the field, black with white text and a scale bar, as instruments print it."""
    row = width // 32
    font = ImageFont.load_default(size=0.8 * row)
    strip = Image.new("L", (width, 2 * row), 0)
    draw = ImageDraw.Draw(strip)
    columns = [("VIRTUAL", "SEM"), ("HV", "none"), ("det", "virtual ETD"),
               ("pixel", f"{1000 * pixel_um:.4g} nm"), ("HFW", f"{width * pixel_um:.3g} um")]
    left = 0.0
    for head, value in columns:
        cell = max(draw.textlength(head, font), draw.textlength(value, font)) + row / 2
        draw.text((left + cell / 2, row / 2), head, 255, font, anchor="mm")
        draw.text((left + cell / 2, 1.5 * row), value, 255, font, anchor="mm")
        left += cell
        draw.line([(left, 0), (left, 2 * row)], 255)
    length_um = _round_length(0.8 * (width - left) * pixel_um)
    half = length_um / pixel_um / 2
    middle = (left + width) / 2
    draw.line([(middle - half, 1.5 * row), (middle + half, 1.5 * row)], 255, width=max(row // 8, 1))
    for end in (middle - half, middle + half):
        draw.line([(end, 1.2 * row), (end, 1.8 * row)], 255)
    draw.text((middle, 0.6 * row), f"{length_um:g} um", 255, font, anchor="mm")
    return np.asarray(strip)


def _round_length(longest: float) -> float:
    """The largest 1, 2 or 5 times a power of ten that is not over `longest`."""
    decade = 10.0 ** math.floor(math.log10(longest))
    return max(step * decade for step in (1, 2, 5) if step * decade <= longest)
