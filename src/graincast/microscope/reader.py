"""Reading micrographs: pixels, pixel size and the instrument's settings from the files that microscopes write.

TIFF goes through tifffile, PNG through imagecodecs, JPEG and BMP through Pillow, the makers' own formats through RosettaSciIO.
Image files also carry the operator's name, comments and paths. Only the physical fields named in this module
leave it; nothing else of the metadata does.
"""

from __future__ import annotations

import importlib
import math
import os
import re
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import imagecodecs
import numpy as np
import tifffile
from PIL import Image
from skimage.color import rgb2gray

from graincast.errors import UserError

MICROMETRES = {"m": 1e6, "mm": 1e3, "cm": 1e4, "inch": 25400.0, "µm": 1.0, "μm": 1.0, "um": 1.0, "micron": 1.0,
               "microns": 1.0, "micrometer": 1.0, "\\u00B5m": 1.0, "nm": 1e-3, "Å": 1e-4, "A": 1e-4, "pm": 1e-6,
               "fm": 1e-9}
"""Micrometres in the units of length that image files use."""

COARSEST_RESOLUTION_TAG_UM = 4.0
"""Largest pixel size, um, that plain resolution tags are believed: 4 um is 6350 dpi. Coarser ones are what
software writes for screens and printers (72, 96, 300 dpi ...), not a microscope's calibration."""

LARGEST_SAMPLES = 300_000_000
"""Samples (width times height times channels) that a file may declare: 17 000 x 17 000 px in grey. Reading takes up to some 20 bytes
a sample. Checked before anything is decoded, for a file of a few kilobytes can declare a picture that fills any memory."""

LARGEST_OVERHEAD = 64 * 2**20
"""Bytes that a PNG may have beyond twice those of its pixels; it is read at once."""

COLOURED = 0.15
"""Difference of a pixel's largest and smallest channel, fraction of full scale, above which it is coloured; JPEG leaves less on grey."""

NOT_SQUARE = 0.01
"""Relative difference of a pixel's width and height above which it is not square."""

PHYSICAL_FIELDS = ("model", "accelerating_voltage_kv", "magnification", "detector", "working_distance_mm",
                   "dwell_time_us", "beam_current_na", "spot", "field_width_um", "tilt_deg", "pages")
"""All that `Micrograph.instrument` may hold; ``pages`` counts a file's pages, of which the first is read."""


@dataclass(frozen=True)
class Micrograph:
    """One micrograph as the instrument took it, info bar included.

    Attributes
    ----------
    image : ndarray of float32, shape (H, W)
        Grey values in [0, 1]. Unsigned 1 to 16 bit integers are divided by their full scale. Types that have no
        full scale (float, signed and 32 bit integers) stand as they are when they lie in [0, 1] and are
        stretched from their smallest to their largest value otherwise.
    bit_depth : int
        Bits a sample in the file.
    pixel_size_um : float or None
        Width of a pixel, um; None when the file does not say.
    instrument : dict
        Physical settings; keys are among `PHYSICAL_FIELDS`, units stand in the names.
    scan_rows : int or None
        Rows that the beam scanned, as the metadata have it; the file's further rows are the info bar.
    coloured_px : int
        Pixels that are coloured and not grey, as of something drawn into the image (see `COLOURED`).
    """

    image: np.ndarray
    bit_depth: int
    pixel_size_um: float | None = None
    instrument: dict[str, str | float] = field(default_factory=dict)
    scan_rows: int | None = None
    coloured_px: int = 0


def read_micrograph(path: Path | str, largest_samples: int = LARGEST_SAMPLES) -> Micrograph:
    """Read a micrograph.

    Parameters
    ----------
    path : Path or str
        A TIFF (with FEI/Thermo, Zeiss, OME, ImageJ or other metadata), PNG, JPEG or BMP, or a maker's format that
        RosettaSciIO decodes (see `EXTENSIONS`). Of several pages the first is read.
    largest_samples : int
        Samples (width times height times channels) that it may declare.

    Returns
    -------
    Micrograph

    Raises
    ------
    UserError
        If the file is absent, empty, truncated, of an unknown or wrong format, no 2-D image, complex, declares more than
        `largest_samples`, or holds NaN or infinite values.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} is no file; give a micrograph or a folder of micrographs")
    suffix = path.suffix.lower()
    if suffix not in EXTENSIONS:
        raise UserError(f"{path} has an unsupported extension; graincast reads {', '.join(EXTENSIONS)}")
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty")
    try:
        if suffix in _READERS:
            _check_content(path)
        return _READERS.get(suffix, _read_makers_format)(path, largest_samples)
    except UserError:
        raise
    except ImportError as error:
        raise UserError(f"{path} needs the Python package {error.name} to be read; install it") from error
    except Exception as error:  # decoders raise all sorts on damaged bytes: the file is at fault, not graincast
        raise UserError(f"{path} cannot be read as a {suffix[1:].upper()} image: {_sentence(error)}") from error


def read_bytes(content: bytes, largest_samples: int = LARGEST_SAMPLES) -> Micrograph:
    """Read a micrograph from the bytes of a file, as they come through a network: their first ones tell the format.

    Parameters
    ----------
    content : bytes
        A TIFF, PNG, JPEG or BMP.
    largest_samples : int
        As for `read_micrograph`.

    Returns
    -------
    Micrograph

    Raises
    ------
    UserError
        If they are of another format, and as `read_micrograph`.
    """
    found = _format_of(content)
    if found not in _EXTENSIONS_OF:
        what = "there are no bytes" if not content else f"the bytes are {'those of a ' + found if found else 'of no image format that is known'}"
        raise UserError(f"{what}; those of a TIFF, PNG, JPEG or BMP would be right")
    with tempfile.TemporaryDirectory(prefix="graincast-") as folder:
        path = Path(folder, f"image{_EXTENSIONS_OF[found][0]}")
        path.write_bytes(content)
        try:
            return read_micrograph(path, largest_samples)
        except UserError as error:
            raise UserError(reason(error, path)) from error


def from_array(pixels: np.ndarray, pixel_size_um: float | None = None) -> Micrograph:
    """A micrograph of an array that is in memory already.

    Parameters
    ----------
    pixels : ndarray
        (H, W), (H, W, 1 to 4): bool, integer or float; grey values as `Micrograph.image` takes them from files.
    pixel_size_um : float, optional
        Width of a pixel, um.

    Returns
    -------
    Micrograph

    Raises
    ------
    UserError
        If it has another shape, no pixels, no numbers, or NaN or infinite values.
    """
    if pixels.dtype.kind not in "buif":
        raise UserError(f"the array holds values of type {pixels.dtype}; whole numbers or floats would be right")
    bits = 1 if pixels.dtype.kind == "b" else 8 * pixels.itemsize
    return Micrograph(_grey(pixels, 2**bits - 1, Path("the array")), bits, pixel_size_um)


def find_micrographs(path: Path | str, exclude: Path | str | None = None) -> list[Path]:
    """List the micrographs of a folder and its sub-folders.

    Parameters
    ----------
    path : Path or str
        A folder, or one file.
    exclude : Path or str, optional
        A folder within `path` that is left out, such as that of masks or of results; ignored where it is not within.

    Returns
    -------
    list of Path
        Files of a known extension (in any case), hidden ones left out, sorted by their path in the folder.

    Raises
    ------
    UserError
        If `path` is missing, holds no such file, or is a file of another extension.
    """
    path = Path(path)
    if path.is_file():
        if path.suffix.lower() not in EXTENSIONS:
            raise UserError(f"{path} has an unsupported extension; graincast reads {', '.join(EXTENSIONS)}")
        return [path]
    if not path.is_dir():
        raise UserError(f"{path} does not exist; give a folder of micrographs or one micrograph")

    excluded = None if exclude is None or not Path(exclude).resolve().is_relative_to(path.resolve()) else Path(exclude).resolve()

    def wanted(file: Path) -> bool:
        if file.suffix.lower() not in EXTENSIONS or any(part.startswith(".") for part in file.relative_to(path).parts):
            return False
        return file.is_file() and not (excluded and file.resolve().is_relative_to(excluded))

    files = sorted((f for f in path.rglob("*") if wanted(f)), key=lambda f: f.relative_to(path).parts)
    if not files:
        outside = f" outside {exclude}" if excluded else ""
        raise UserError(f"{path} holds no micrographs{outside}; graincast reads {', '.join(EXTENSIONS)}")
    return files


class SessionFile(NamedTuple):
    """A file of a session: where it lies, its path within the session as it can be printed, and why it must not be opened."""

    path: Path
    name: str
    refused: str | None = None


def find_session_files(folder: Path | str) -> list[SessionFile]:
    """List what a session's folder holds, as far as it is or should be a micrograph.

    Unlike `find_micrographs`, which reads what a user points at, this trusts nothing: the folder was filled by somebody else.

    Parameters
    ----------
    folder : Path or str
        The session; its sub-folders belong to it.

    Returns
    -------
    list of SessionFile
        Sorted by name. Refused are links (followed, they could lead anywhere; within the session they would count a file twice),
        folders that cannot be listed, what is no regular file, names that cannot be printed (line breaks, bytes that are no UTF-8),
        formats that refer to other files (which could be any of these) and
        images whose extension does not say so. Hidden files and files that are no images are left out.

    Raises
    ------
    UserError
        If the folder is missing or holds no such file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{printable(str(folder))} is no folder; a folder of micrographs would be right")
    files = sorted((found for found in _walk(folder) if found is not None), key=lambda found: found.name)
    if not files:
        raise UserError(f"{printable(str(folder))} holds no micrographs; graincast reads {', '.join(EXTENSIONS)}")
    return files


def _walk(folder: Path) -> Iterator[SessionFile | None]:
    closed: list[OSError] = []
    for here, folders, files in os.walk(folder, onerror=closed.append):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (_session_file(folder, Path(here, name)) for name in (*folders, *files) if not name.startswith("."))
    for error in closed:
        path = Path(error.filename)
        yield SessionFile(path, printable(path.relative_to(folder).as_posix()), f"cannot be listed: {error.strerror}")


def _session_file(folder: Path, path: Path) -> SessionFile | None:
    """What is to be done with an entry of a folder; None: nothing, it is a folder or of no interest."""
    relative = path.relative_to(folder).as_posix()
    name, known = printable(relative), path.suffix.lower() in EXTENSIONS
    try:
        mode = path.lstat().st_mode
        if stat.S_ISDIR(mode):
            return None
        if stat.S_ISLNK(mode):
            refused = "is a link, and links are not followed; a copy of the file would be right"
        elif not stat.S_ISREG(mode):
            refused = "is no regular file"
        elif name != relative:
            refused = "has a name that cannot be printed; another name would be right"
        elif path.suffix.lower() in _REFERRING:
            refused = "refers to other files; an exported TIFF would be right"
        elif not known and (content := _content(path)) in _EXTENSIONS_OF:
            refused = f"is a {content} image by its content; the extension {_EXTENSIONS_OF[content][0]} would be right"
        else:
            return SessionFile(path, name) if known else None
    except OSError as error:
        refused = f"cannot be read: {error.strerror}"
    return SessionFile(path, name, refused)


def printable(text: str) -> str:
    """A text with everything escaped that does not print: control characters, bytes that are no UTF-8, marks that turn the direction.

    Examples
    --------
    >>> printable("a\\nb \u00b5m")
    'a\\\\nb \u00b5m'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def reason(error: Exception, path: Path) -> str:
    """An error's sentence for the records: with the file's name, without the folders of the user's machine."""
    return str(error).replace(str(path.resolve()), path.name).replace(str(path), path.name)


# ------------------------------------------------------------------------------------------------ what files declare


_SIGNATURES = {b"II*\0": "TIFF", b"MM\0*": "TIFF", b"II+\0": "TIFF", b"MM\0+": "TIFF", b"\x89PNG": "PNG", b"\xff\xd8\xff": "JPEG",
               b"BM": "BMP", b"GIF8": "GIF", b"%PDF": "PDF", b"PK\3\4": "ZIP", b"%!PS": "PostScript"}
_EXTENSIONS_OF = {"TIFF": (".tif", ".tiff"), "PNG": (".png",), "JPEG": (".jpg", ".jpeg"), "BMP": (".bmp",)}


def _content(path: Path) -> str | None:
    """The format that a file's first bytes name; None: none that is known."""
    with path.open("rb") as stream:
        return _format_of(stream.read(8))


def _format_of(head: bytes) -> str | None:
    return next((name for signature, name in _SIGNATURES.items() if head.startswith(signature)), None)


def _check_content(path: Path) -> None:
    """Refuse a file that is of another format than its extension says: what decodes it must not be the sender's choice."""
    content = _content(path)
    if content is None or path.suffix.lower() in _EXTENSIONS_OF.get(content, ()):
        return
    remedy = f"the extension {_EXTENSIONS_OF[content][0]} would be right" if content in _EXTENSIONS_OF else "a TIFF would be right"
    raise UserError(f"{path} is a {content} file by its content; {remedy}")


def _check_size(shape: Sequence[int], path: Path, largest: int) -> None:
    if math.prod(shape) > largest:
        raise UserError(f"{path} declares {' x '.join(str(side) for side in shape)} samples, at most {largest / 1e6:.3g} million "
                        "are read; a part of it would be right")


# ------------------------------------------------------------------------------------------------------- pixels


def _sentence(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__


def _grey(pixels: np.ndarray, full_scale: int, path: Path) -> np.ndarray:
    """Any sample type, (H, W) or (H, W, channels), to float32 (H, W) in [0, 1]."""
    if np.iscomplexobj(pixels):
        raise UserError(f"{path} holds complex values; give a real image, for instance the modulus")
    if pixels.ndim not in (2, 3) or pixels.size == 0:
        raise UserError(f"{path} holds an array of shape {pixels.shape}; a micrograph has rows and columns")
    if not np.isfinite(pixels).all():
        raise UserError(f"{path} holds NaN or infinite values; replace or crop them")
    scaled = pixels.astype(np.float64)
    if pixels.dtype.kind == "u" and pixels.itemsize <= 2:
        scaled /= full_scale
    else:
        low, high = scaled.min(), scaled.max()
        if low < 0 or high > 1:
            scaled = (scaled - low) / ((high - low) or 1)
    if scaled.ndim == 3:
        scaled = _one_channel(scaled, path)
    return scaled.astype(np.float32)


def _coloured(pixels: np.ndarray, full_scale: int) -> int:
    """How many pixels of (H, W, 3 or 4) unsigned integers are coloured; 0 for every other image."""
    if pixels.ndim != 3 or pixels.shape[2] < 3 or pixels.dtype.kind != "u" or pixels.itemsize > 2:
        return 0
    rgb = pixels[..., :3]
    return int(np.count_nonzero(rgb.max(axis=2) - rgb.min(axis=2) > COLOURED * full_scale))


def _square(width: float | None, height: float | None) -> float | None:
    """The side of a pixel of that width and height, um; the height may be unknown."""
    if width is not None and height is not None and abs(width - height) > NOT_SQUARE * width:
        raise ValueError(f"its pixels are not square, {width:.4g} um wide and {height:.4g} um high; "
                         f"the image resampled to {min(width, height):.4g} um both ways would be right")
    return width


def _one_channel(pixels: np.ndarray, path: Path) -> np.ndarray:
    """Luminance of grey, grey + alpha, RGB or RGBA; transparency is ignored, the pixels below it are the image."""
    channels = pixels.shape[2]
    if channels > 4:
        raise UserError(f"{path} has {channels} channels; graincast reads grey, RGB and RGBA")
    if channels <= 2:
        return pixels[..., 0]
    rgb = pixels[..., :3]
    is_grey = (rgb == rgb[..., :1]).all()
    return rgb[..., 0] if is_grey else rgb2gray(rgb)


# --------------------------------------------------------------------------------------------------------- TIFF


def _read_tiff(path: Path, largest: int) -> Micrograph:
    with tifffile.TiffFile(path) as tif:
        if not len(tif.pages):
            raise ValueError("it holds no image")
        page = tif.pages[0]
        _check_length(tif, page, path)
        _check_page(tif, page, path, largest)
        pixels, full_scale = _decode_page(page)
        bits = int(np.ravel(page.bitspersample)[0])
        pixel_size, instrument, scan_rows = _found(tif, path)
        return Micrograph(_grey(pixels, full_scale, path), bits, pixel_size, instrument, scan_rows, _coloured(pixels, full_scale))


def _check_length(tif: tifffile.TiffFile, page: tifffile.TiffPage, path: Path) -> None:
    for start, length in zip(page.dataoffsets, page.databytecounts, strict=True):
        if start + length > tif.filehandle.size:
            raise UserError(f"{path} is truncated: {tif.filehandle.size} bytes, but the image needs {start + length}; copy it again")


def _check_page(tif: tifffile.TiffFile, page: tifffile.TiffPage, path: Path, largest: int) -> None:
    """Refuse a page that declares too much, be it as a whole, in one of its tiles or in a compressed stream of its own format."""
    _check_size(page.shape, path, largest)
    _check_size(page.chunks, path, largest)
    compression = tifffile.COMPRESSION(page.compression)
    if compression in _BOUNDED:
        return
    if compression not in _DECLARED:
        raise UserError(f"{path} is compressed with {compression.name}, which is not read; a TIFF without compression would be right")
    for start, length in zip(page.dataoffsets, page.databytecounts, strict=True):
        tif.filehandle.seek(start)
        _check_size(_DECLARED[compression](tif.filehandle.read(length)), path, largest)


_BOUNDED = {tifffile.COMPRESSION[name] for name in (
    "NONE", "CCITTRLE", "CCITT_T4", "CCITT_T6", "LZW", "ADOBE_DEFLATE", "DEFLATE", "PACKBITS", "LZMA", "ZSTD")}
"""Compressions that tifffile decodes into no more bytes than the page declares."""


def _jpeg_size(stream: bytes) -> tuple[int, ...]:
    """Height, width and components in the frame header of a JPEG (ITU-T T.81, B.2.2)."""
    at = 2
    while at + 10 <= len(stream):
        marker = stream[at + 1]
        if stream[at] != 0xFF or marker == 0xFF:
            at += 1
        elif marker in _JPEG_FRAMES:
            return int.from_bytes(stream[at + 5:at + 7]), int.from_bytes(stream[at + 7:at + 9]), stream[at + 9]
        elif marker in _JPEG_LONE_MARKERS:
            at += 2
        else:
            at += 2 + int.from_bytes(stream[at + 2:at + 4])
    return (0,)


_JPEG_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_JPEG_LONE_MARKERS = {0x00, 0x01, *range(0xD0, 0xD9)}


def _jpeg2000_size(stream: bytes) -> tuple[int, ...]:
    """Components, height and width in the image header of a JPEG 2000 codestream (ITU-T T.800, A.5.1), the largest there is."""
    heads = [stream[match.end():match.end() + 36] for match in re.finditer(rb"\xff\x4f\xff\x51", stream)]
    sizes = [(int.from_bytes(head[34:36]), int.from_bytes(head[8:12]), int.from_bytes(head[4:8])) for head in heads]
    return max(sizes, key=math.prod, default=(0,))


_DECLARED: dict[tifffile.COMPRESSION, Callable[[bytes], tuple[int, ...]]] = {
    tifffile.COMPRESSION.JPEG: _jpeg_size,
    **dict.fromkeys((tifffile.COMPRESSION.JPEG2000, tifffile.COMPRESSION.APERIO_JP2000_YCBC, tifffile.COMPRESSION.APERIO_JP2000_RGB),
                    _jpeg2000_size),
}
"""What compressed streams of a format of their own declare: they, not the page, say how much they decode into."""


def _decode_page(page: tifffile.TiffPage) -> tuple[np.ndarray, int]:
    """Pixels as (H, W) or (H, W, channels), 0 = black, and the full scale of unsigned integers."""
    pixels = page.asarray()
    return _black_is_zero(page, np.moveaxis(pixels, 0, -1) if page.axes.startswith("S") else pixels)


def _black_is_zero(page: tifffile.TiffPage, pixels: np.ndarray) -> tuple[np.ndarray, int]:
    """A page's pixels, or a part of them, (H, W) or (H, W, channels), by its colours' meaning; and the full scale of unsigned integers."""
    full_scale = 2 ** int(np.ravel(page.bitspersample)[0]) - 1
    if page.photometric == tifffile.PHOTOMETRIC.PALETTE and page.colormap is not None:
        return np.moveaxis(page.colormap[:, pixels], 0, -1), 65535
    if page.photometric == tifffile.PHOTOMETRIC.MINISWHITE and pixels.dtype.kind in "bu":
        pixels = ~pixels if pixels.dtype.kind == "b" else full_scale - pixels
    return pixels, full_scale


Found = tuple[float | None, dict[str, str | float], int | None]


def _found(tif: tifffile.TiffFile, path: Path) -> Found:
    """What any of the makers' metadata or, failing them, the resolution tags say."""
    nothing: Found = (None, {}, None)
    pixel_size, instrument, scan_rows = _fei(tif) or _zeiss(tif) or nothing
    if pixel_size is None:
        pixel_size = _ome_pixel_size(tif) or _imagej_pixel_size(tif) or _makers_tag_pixel_size(tif, path) or _resolution_tag_pixel_size(tif)
    if len(tif.pages) > 1:
        instrument = {**instrument, "pages": len(tif.pages)}
    return pixel_size, instrument, scan_rows


def _fei(tif: tifffile.TiffFile) -> Found | None:
    """FEI and Thermo Fisher, tags 34680 and 34682: INI sections, SI units."""
    tags = tif.fei_metadata
    if not tags:
        return None

    def value(section: str, key: str, factor: float = 1.0) -> float | None:
        return _positive(tags.get(section, {}).get(key), factor)

    scanned = value("Image", "ResolutionY")
    section = "Scan" if value("Scan", "PixelWidth") else "EScan"
    return _square(value(section, "PixelWidth", 1e6), value(section, "PixelHeight", 1e6)), _allowed({
        "model": tags.get("System", {}).get("SystemType") or tags.get("System", {}).get("Type"),
        "detector": tags.get("Detectors", {}).get("Name"),
        "accelerating_voltage_kv": value("Beam", "HV", 1e-3),
        "working_distance_mm": value("EBeam", "WD", 1e3) or value("Stage", "WorkingDistance", 1e3),
        "dwell_time_us": value("Scan", "Dwelltime", 1e6) or value("Scan", "Dwell", 1e6),
        "beam_current_na": value("EBeam", "BeamCurrent", 1e9),
        "spot": value("Beam", "Spot"),
        "field_width_um": value("Scan", "HorFieldsize", 1e6),
    }), int(scanned) if scanned else None


def _zeiss(tif: tifffile.TiffFile) -> Found | None:
    """Zeiss SmartSEM, tag 34118: entries (label, value, unit)."""
    tags = tif.sem_metadata
    if not tags:
        return None

    def length(key: str) -> float | None:
        """In um."""
        entry = tags.get(key, ())
        return _positive(entry[1], MICROMETRES[entry[2]]) if len(entry) == 3 and entry[2] in MICROMETRES else None

    def text(key: str) -> Any:
        return tags.get(key, (None, None))[1]

    dwell = tags.get("dp_dwell_time", ())
    seconds = {"ns": 1e-3, "µs": 1.0, "us": 1.0, "ms": 1e3}
    current = tags.get("ap_iprobe", ())
    amperes = {"pA": 1e-3, "nA": 1.0, "µA": 1e3}
    volts = tags.get("ap_actualkv", ())
    kilovolts = {"kV": 1.0, "V": 1e-3}
    working_distance = length("ap_wd")
    # old versions only have the pixel size of a 1024 px wide screen, fourth in the unnamed block, m
    screen = tags.get("", ())
    pixel_size = length("ap_image_pixel_size") or (
        _positive(screen[3], 1e6 * 1024 / tif.pages[0].imagewidth) if len(screen) > 3 else None)
    return pixel_size, _allowed({
        "model": text("dp_sem"),
        "detector": text("dp_detector_type") or text("dp_detector_channel"),
        "accelerating_voltage_kv": _positive(volts[1], kilovolts.get(volts[2], math.nan)) if len(volts) == 3 else None,
        "magnification": _magnification(text("ap_mag")),
        "working_distance_mm": working_distance / 1e3 if working_distance else None,
        "dwell_time_us": _positive(dwell[1], seconds.get(dwell[2], math.nan)) if len(dwell) == 3 else None,
        "beam_current_na": _positive(current[1], amperes.get(current[2], math.nan)) if len(current) == 3 else None,
        "field_width_um": length("ap_width"),
    }), None


def _magnification(text: Any) -> float | None:
    """Zeiss writes '50.00 K X'."""
    match = re.match(r"\s*([\d.]+)\s*(K?)\s*X", str(text), re.IGNORECASE)
    return float(match[1]) * (1000 if match[2] else 1) if match else None


def _ome_pixel_size(tif: tifffile.TiffFile) -> float | None:
    if not tif.ome_metadata or "<!DOCTYPE" in tif.ome_metadata:  # OME has none; entities that multiply need one
        return None
    pixels = ElementTree.fromstring(tif.ome_metadata).find(".//{*}Pixels")
    if pixels is None:
        return None
    width, height = (_positive(pixels.get(f"PhysicalSize{axis}"), MICROMETRES.get(pixels.get(f"PhysicalSize{axis}Unit", "µm"), math.nan))
                     for axis in "XY")  # um is the schema's default
    return _square(width, height)


def _imagej_pixel_size(tif: tifffile.TiffFile) -> float | None:
    metadata = tif.imagej_metadata or {}
    unit, tags = metadata.get("unit"), tif.pages[0].tags
    values = [tags[name].value for name in ("XResolution", "YResolution") if name in tags]
    if unit in (None, "inch", "pixel") or not values or not all(numerator for numerator, _ in values):  # ImageJ's inches are the printer's
        return None
    factors = (MICROMETRES.get(unit, math.nan), MICROMETRES.get(metadata.get("yunit", unit), math.nan))
    width, height = ([_positive(below / above, factor) for (above, below), factor in zip(values, factors, strict=False)] + [None])[:2]
    return _square(width, height)


def _makers_tag_pixel_size(tif: tifffile.TiffFile, path: Path) -> float | None:
    """Makers whose tags RosettaSciIO knows: TVIPS, Olympus SIS, JEOL SightX, Gatan DigitalMicrograph."""
    page = tif.pages[0]
    make = page.tags.get("Make")
    gatan = any(65003 <= tag.code <= 65025 for tag in page.tags)
    if not (tif.is_tvips or page.is_sis or gatan or (make is not None and make.value == "JEOL Ltd.")):
        return None
    # without pixels, and by pages: the series of an OME file may lie in other files, which would be opened
    signal = importlib.import_module("rsciio.tiff").file_reader(str(path), lazy=True, multipage_as_list=True)[0]
    return _axis_pixel_size(signal["axes"])


def _resolution_tag_pixel_size(tif: tifffile.TiffFile) -> float | None:
    """From the plain resolution tags, where they can only be a microscope's."""
    tags = tif.pages[0].tags
    values = [tags[name].value for name in ("XResolution", "YResolution") if name in tags]
    unit = {2: "inch", 3: "cm"}.get(int(tags["ResolutionUnit"].value)) if "ResolutionUnit" in tags else None
    if unit is None or len(values) < 2 or not all(numerator for numerator, _ in values):
        return None
    width, height = (MICROMETRES[unit] * denominator / numerator for numerator, denominator in values)
    return _positive(_square(width, height)) if width <= COARSEST_RESOLUTION_TAG_UM else None


# ------------------------------------------------------------------------------------------------- other formats


def _read_png(path: Path, largest: int) -> Micrograph:
    with path.open("rb") as stream:
        head = stream.read(26)
        # the first chunk is the header (ISO/IEC 15948, 11.2.2): width, height, bits a sample, colour type
        if len(head) < 26 or head[:4] != b"\x89PNG":
            raise ValueError("it does not begin as a PNG")
        shape = int.from_bytes(head[20:24]), int.from_bytes(head[16:20]), {0: 1, 4: 2, 6: 4}.get(head[25], 3)
        _check_size(shape, path, largest)
        stream.seek(0)
        content = stream.read(4 * math.prod(shape) + LARGEST_OVERHEAD + 1)
    if len(content) > 4 * math.prod(shape) + LARGEST_OVERHEAD:
        raise UserError(f"{path} is much larger than its {shape[1]} x {shape[0]} px need; the image saved anew would be right")
    pixels = imagecodecs.png_decode(content)  # keeps 16 bit RGB, which Pillow does not
    bits = 8 * pixels.itemsize
    return Micrograph(_grey(pixels, 2**bits - 1, path), bits, coloured_px=_coloured(pixels, 2**bits - 1))


def _read_picture(path: Path, largest: int) -> Micrograph:
    """JPEG and BMP. Like PNG's, their resolution fields are the screen's or the printer's and not read."""
    with Image.open(path, formats=("JPEG", "BMP")) as picture:
        _check_size((picture.height, picture.width, 3), path, largest)
        pixels = np.asarray(picture.convert("RGB"))
        return Micrograph(_grey(pixels, 255, path), 8, coloured_px=_coloured(pixels, 255))


_MAKERS_FORMATS = {".dm3": "digitalmicrograph", ".dm4": "digitalmicrograph", ".emd": "emd", ".bcf": "bruker",
                   ".ser": "tia", ".emi": "tia", ".mrc": "mrc", ".elid": "phenom", ".asw": "jeol",
                   ".sur": "digitalsurf", ".hspy": "hspy", ".zspy": "zspy", ".rpl": "ripple"}


_NEVER_LAZY = {".elid", ".sur"}
"""Formats that RosettaSciIO reads at once only."""

_REFERRING = {".rpl", ".emi", ".asw"}
"""Formats whose pixels lie in other files, which RosettaSciIO opens by name whatever they are."""

_HDF5 = {".emd", ".hspy"}


def _read_makers_format(path: Path, largest: int) -> Micrograph:
    """Through RosettaSciIO: the first signal of the file that is one 2-D image."""
    module = importlib.import_module(f"rsciio.{_MAKERS_FORMATS[path.suffix.lower()]}")
    options: dict[str, Any] = {} if path.suffix.lower() in _NEVER_LAZY else {"lazy": True}  # sizes before pixels
    if path.suffix.lower() in _HDF5:
        _check_whole(path)
    elif path.suffix.lower() == ".mrc":
        options["metadata_file"] = None  # or files beside one that is called a movie would be opened
    images = [signal for signal in module.file_reader(str(path), **options) if sum(side > 1 for side in signal["data"].shape) == 2]
    if not images:
        raise UserError(f"{path} holds no 2-D image; export the micrograph on its own")
    _check_size(images[0]["data"].shape, path, largest)
    pixels = np.squeeze(np.asarray(images[0]["data"]))
    bits = 8 * pixels.itemsize
    settings = images[0].get("metadata", {}).get("Acquisition_instrument", {})
    settings = settings.get("SEM") or settings.get("TEM") or {}
    detector = settings.get("Detector")
    return Micrograph(_grey(pixels, 2**bits - 1, path), bits, _axis_pixel_size(images[0]["axes"]), _allowed({
        "model": settings.get("microscope"),
        "detector": detector if isinstance(detector, str) else None,
        "accelerating_voltage_kv": _positive(settings.get("beam_energy")),
        "magnification": _positive(settings.get("magnification")),
        "working_distance_mm": _positive(settings.get("working_distance")),
        "beam_current_na": _positive(settings.get("beam_current")),
    }))


def _check_whole(path: Path) -> None:
    """Refuse an HDF5 file with a link to, or data in, another file: HDF5 opens what it names, whatever that is."""
    h5py = importlib.import_module("h5py")
    with h5py.File(path, "r") as file:
        def outside(name: str, found: Any) -> bool | None:
            if isinstance(found, h5py.Dataset):
                elsewhere = found.external or (found.is_virtual and any(source.file_name != "." for source in found.virtual_sources()))
                return True if elsewhere else None
            return True if isinstance(found, h5py.ExternalLink) else None

        if file.visititems_links(outside) or file.visititems(outside):
            raise UserError(f"{path} refers to other files; an exported TIFF would be right")


def _axis_pixel_size(axes: list[Mapping[str, Any]]) -> float | None:
    """Pixel size from RosettaSciIO's axes; the last two are the image's height and width."""
    sizes = [_positive(axis.get("scale"), MICROMETRES.get(str(axis.get("units")), math.nan)) for axis in axes[-2:]]
    return _square(sizes[-1], sizes[0])


def _positive(value: Any, factor: float = 1.0) -> float | None:
    """`value` times `factor` when that is a number above zero, else None."""
    try:
        number = float(value) * factor
    except (TypeError, ValueError):
        return None
    return float(f"{number:.7g}") if math.isfinite(number) and number > 0 else None


def _allowed(fields: Mapping[str, Any]) -> dict[str, str | float]:
    return {name: fields[name] for name in PHYSICAL_FIELDS if fields.get(name) not in (None, "")}


_READERS: dict[str, Callable[[Path, int], Micrograph]] = {
    ".tif": _read_tiff, ".tiff": _read_tiff,
    ".png": _read_png, ".jpg": _read_picture, ".jpeg": _read_picture, ".bmp": _read_picture,
}

EXTENSIONS = (*_READERS, *_MAKERS_FORMATS)
"""File extensions that are read, in lower case."""
