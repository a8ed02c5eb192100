"""The ImageSet: the one thing that flows between stages.

A folder of few large files::

    images.tif        page stack, uint8 or uint16, uncompressed (Fiji and napari open it; memory-mapped here)
    labels.tif        optional page stack of instance ids, uint16 or uint32; 0 = boundary or nothing, 1..N = grains
    manifest.parquet  one row an image, refused inputs included (their ``refused`` says why)
    set.json          kind, configuration and the digests of the parents; written last

Images of unequal size share the stack: each page is padded with zeros at the bottom and right, and its row's
``height`` and ``width`` say what is real. A folder appears under its final name only when it is whole.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pandas as pd
import tifffile

from graincast.errors import Unavailable, UserError

FORMAT = 1
PARTIAL = ".partial-"
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def folder_digest(path: Path) -> str:
    """Content hash of a folder, by DVC's own rule.

    Parameters
    ----------
    path : Path
        A folder; its file names and bytes count, nothing else does.

    Returns
    -------
    str
        32 hexadecimal digits and ``.dir``: the MD5 of the sorted JSON listing of relative paths and file MD5s,
        which is what ``dvc add`` and ``dvc repro`` record.
    """
    listing = []
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        with file.open("rb") as stream:
            md5 = hashlib.file_digest(stream, "md5").hexdigest()
        listing.append({"md5": md5, "relpath": file.relative_to(path).as_posix()})
    listing.sort(key=lambda entry: entry["relpath"])
    return hashlib.md5(json.dumps(listing, sort_keys=True).encode()).hexdigest() + ".dir"


def content_digest(path: Path, key: str) -> str:
    """Content hash of a folder (`folder_digest`) or a file (MD5) that a user named under the configuration's `key`.

    Raises
    ------
    UserError
        If there is neither, or a file in it cannot be read.
    """
    try:
        if path.is_dir():
            return folder_digest(path)
        if path.is_file():
            with path.open("rb") as stream:
                return hashlib.file_digest(stream, "md5").hexdigest()
    except OSError as error:
        raise UserError(f"{key}: '{error.filename or path}' cannot be read: {error.strerror}") from error
    raise UserError(f"{key}: '{path}' does not exist; an existing folder would be right")


def _disk_is_full(error: OSError) -> bool:
    return error.errno in DISK_FULL or str(error).endswith(" written")  # numpy's tofile says "N requested and M written" without errno


class whole_folder:
    """Context manager that makes a folder appear under its name only when it is complete.

    Parameters
    ----------
    path : Path
        Where the folder shall stand. What stood there before is replaced at the very end.

    Raises
    ------
    UserError
        If the folder cannot be made there; `Unavailable` if the disk is full.

    Notes
    -----
    The body writes into the yielded temporary sibling. Any exception, Ctrl-C included, removes it and leaves what
    stood at `path` untouched; a kill leaves a ``.partial-*`` sibling that no reader accepts. Of two processes that
    make the same folder at once, the later one leaves the other's standing if it has the same content.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)

    def __enter__(self) -> Path:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists() and not self.path.is_dir():
                raise FileExistsError(errno.EEXIST, "a file has that name")
            self._partial = Path(tempfile.mkdtemp(prefix=f"{PARTIAL}{self.path.name}-", dir=self.path.parent))
            self._partial.chmod(0o755)
        except OSError as error:
            raise self._unwritable(error) from error
        return self._partial

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                self._sync()
                self._place()
        except OSError as failure:
            raise self._unwritable(failure) from failure
        finally:
            shutil.rmtree(self._partial, ignore_errors=True)
        if isinstance(error, OSError) and _disk_is_full(error):
            raise self._unwritable(error) from error

    def _sync(self) -> None:
        for file in self._partial.rglob("*"):
            if file.is_file():
                _sync(file)

    def _place(self) -> None:
        """Rename what stands at `path` aside and the new folder in; nothing is deleted before the new one stands."""
        aside = self._partial.with_name(f"{self._partial.name}-old")
        with contextlib.suppress(FileNotFoundError):
            self.path.rename(aside)
        try:
            self._partial.rename(self.path)
        except BaseException as error:
            if not self.path.exists() and aside.exists():
                aside.rename(self.path)
            if not (isinstance(error, OSError) and self._another_made_it()):
                raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    def _another_made_it(self) -> bool:
        return self.path.is_dir() and folder_digest(self.path) == folder_digest(self._partial)

    def _unwritable(self, error: OSError) -> UserError:
        said = f"{self.path} cannot be written: {error.strerror or error}"
        if _disk_is_full(error):
            return Unavailable(f"{said}; free some space and run again, finished stages are kept")
        return UserError(f"{said}; a folder that you may write to would be right")


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """As `whole_folder`, for one file in a folder that exists; an OSError comes through.

    The body writes the yielded sibling, which is synced and put in place at the end. An exception removes it and leaves what
    stood at `path`.
    """
    partial = path.with_name(f".{path.name}{PARTIAL}{os.getpid()}-{threading.get_ident()}")
    try:
        yield partial
        _sync(partial)
        partial.replace(path)
        _sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class ImageSet:
    """A whole, read-only set of images with what is known about them.

    Parameters
    ----------
    path : Path
        The folder.

    Attributes
    ----------
    kind : str
        What the set holds, e.g. ``morphologies``, ``micrographs``, ``synthetic``.
    info : dict
        ``config`` (the section that made it), ``parents`` (name to digest) and anything the maker noted.
    rows : pandas.DataFrame
        One row an accepted image, in page order: ``id, session, source, pixel_size_um, seed, height, width,
        checksum`` and what the maker added.
    refused : pandas.DataFrame
        One row a refused input, with the reason in ``refused``.

    Raises
    ------
    UserError
        If the folder is absent, incomplete or of another format.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        try:
            self.info: dict[str, Any] = json.loads((self.path / "set.json").read_text())
            manifest = pd.read_parquet(self.path / "manifest.parquet")
        except (OSError, ValueError) as error:
            raise UserError(f"{self.path} is no whole ImageSet (set.json and manifest.parquet expected): {error}") from error
        if self.info["format"] != FORMAT:
            raise UserError(f"{self.path} has ImageSet format {self.info['format']}; this graincast reads {FORMAT}")
        self.kind: str = self.info["kind"]
        accepted = manifest["refused"].isna()
        self.rows = manifest[accepted].drop(columns="refused").reset_index(drop=True)
        self.refused = manifest[~accepted].reset_index(drop=True)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self.image(i) for i in range(len(self)))

    @cached_property
    def _images(self) -> np.ndarray:
        return _open_stack(self.path / "images.tif")

    @cached_property
    def _labels(self) -> np.ndarray:
        return _open_stack(self.path / "labels.tif")

    @property
    def labelled(self) -> bool:
        """Whether every image has instance labels."""
        return (self.path / "labels.tif").exists()

    def image(self, index: int) -> np.ndarray:
        """Image `index`, (height, width), uint8 or uint16, without padding, in memory."""
        return self._crop(self._images, index)

    def labels(self, index: int) -> np.ndarray:
        """Instance ids of image `index`, (height, width), int32; 0 = boundary, 1..N = grains."""
        return self._crop(self._labels, index).astype(np.int32)

    def _crop(self, stack: np.ndarray, index: int) -> np.ndarray:
        row = self.rows.iloc[index]
        return np.array(stack[index, : row["height"], : row["width"]])

    @cached_property
    def digest(self) -> str:
        """The set's DVC hash (see `folder_digest`)."""
        return folder_digest(self.path)

    def verify(self) -> None:
        """Recompute every image's checksum.

        Raises
        ------
        UserError
            Naming the first image whose bytes are not those that were written.
        """
        for i, row in self.rows.iterrows():
            labels = self.labels(int(i)) if self.labelled else None  # type: ignore[call-overload]
            if checksum(self.image(int(i)), labels) != row["checksum"]:  # type: ignore[call-overload]
                raise UserError(f"{self.path}: image {row['id']} is corrupt, its checksum differs; make the set again")


class ImageSetWriter:
    """Write an ImageSet; it appears under `path` when the ``with`` block ends without an exception.

    Parameters
    ----------
    path : Path
        The folder to make; an older one is replaced at the end.
    kind : str
        What the set holds.
    config : Mapping, optional
        The configuration that makes it, JSON-able.
    parents : Mapping of str to str, optional
        Digests of the sets and models it is made from.

    Examples
    --------
    >>> import tempfile, numpy as np
    >>> with ImageSetWriter(Path(tempfile.mkdtemp()) / "set", "demo") as writer:
    ...     writer.add(np.zeros((4, 5), np.uint8), id="a", pixel_size_um=0.1)
    >>> len(writer.result), writer.result.image(0).shape
    (1, (4, 5))
    """

    def __init__(self, path: Path | str, kind: str, *, config: Mapping[str, Any] | None = None,
                 parents: Mapping[str, str] | None = None) -> None:
        self.path, self.kind = Path(path), kind
        self.info: dict[str, Any] = {"config": dict(config or {}), "parents": dict(parents or {})}
        self._images: list[np.ndarray] = []
        self._labels: list[np.ndarray] = []
        self._rows: list[dict[str, Any]] = []

    def add(self, image: np.ndarray, *, id: str, labels: np.ndarray | None = None, session: str | None = None,
            source: str | None = None, pixel_size_um: float | None = None, seed: int | None = None, **more: Any) -> None:
        """Append an image, (height, width) uint8 or uint16, with its row; `labels` are integer ids of the same shape."""
        if image.ndim != 2 or image.dtype not in (np.uint8, np.uint16):
            raise ValueError(f"image {id}: want a 2-D uint8 or uint16 array, got {image.dtype} {image.shape}")
        if self._images and image.dtype != self._images[0].dtype:
            raise ValueError(f"image {id}: {image.dtype}, but the set holds {self._images[0].dtype}")
        if labels is not None and labels.shape != image.shape:
            raise ValueError(f"image {id}: labels {labels.shape} do not fit the image {image.shape}")
        if self._images and (labels is not None) != bool(self._labels):
            raise ValueError(f"image {id}: either every image of a set has labels or none has")
        self._images.append(np.array(image))
        if labels is not None:
            self._labels.append(labels.astype(np.int32))
        self._rows.append({"id": id, "session": session, "source": source, "pixel_size_um": pixel_size_um, "seed": seed,
                           "height": image.shape[0], "width": image.shape[1],
                           "checksum": checksum(image, labels), "refused": None, **more})

    def refuse(self, reason: str, *, id: str, session: str | None = None, source: str | None = None, **more: Any) -> None:
        """Note an input that did not get in, and why."""
        self._rows.append({"id": id, "session": session, "source": source, "refused": reason, **more})

    def __len__(self) -> int:
        return len(self._images)

    def __enter__(self) -> Self:
        self._folder = whole_folder(self.path)
        self._partial = self._folder.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            try:
                self._write()
            except BaseException as failure:
                self._folder.__exit__(type(failure), failure, failure.__traceback__)
                raise
        self._folder.__exit__(kind, error, trace)
        if kind is None:
            self.result = ImageSet(self.path)

    def _write(self) -> None:
        if not self._images:
            raise UserError(f"{self.path.name}: not one image was accepted" + self._reasons())
        accepted_first = sorted(self._rows, key=lambda row: row["refused"] is not None)
        sizes = {row["pixel_size_um"] for row in self._rows if row["refused"] is None}
        pixel_size = sizes.pop() if len(sizes) == 1 else None
        _save_stack(self._partial / "images.tif", self._images, self._images[0].dtype, pixel_size)
        if self._labels:
            largest = max(int(page.max()) for page in self._labels)
            _save_stack(self._partial / "labels.tif", self._labels, np.dtype(np.uint16 if largest < 65536 else np.uint32), pixel_size)
        manifest = pd.DataFrame(accepted_first).astype({"pixel_size_um": "float64", "refused": "string", "seed": "Int64",
                                                       "session": "string", "source": "string", "height": "Int64", "width": "Int64"})
        manifest.to_parquet(self._partial / "manifest.parquet", index=False)
        (self._partial / "set.json").write_text(json.dumps({"format": FORMAT, "kind": self.kind, **self.info}, indent=1, sort_keys=True))

    def reasons(self) -> list[str]:
        """What was refused, and why."""
        return [f"{row['source'] or row['id']}: {row['refused']}" for row in self._rows if row["refused"]]

    def _reasons(self) -> str:
        refused = self.reasons()
        return ("; " + "; ".join(refused[:5]) + (f"; and {len(refused) - 5} more" if len(refused) > 5 else "")) if refused else ""


def checksum(image: np.ndarray, labels: np.ndarray | None) -> str:
    """SHA-256 of an image's pixels, shape and, where there are some, instance ids."""
    sha = hashlib.sha256(f"{image.dtype.str}{image.shape}".encode())
    sha.update(np.ascontiguousarray(image).tobytes())
    if labels is not None:
        sha.update(np.ascontiguousarray(labels, dtype="<i4").tobytes())
    return sha.hexdigest()


def _open_stack(path: Path) -> np.ndarray:
    stack = tifffile.memmap(path, mode="r")
    return stack[None] if stack.ndim == 2 else stack


def _save_stack(path: Path, pages: list[np.ndarray], dtype: np.dtype, pixel_size_um: float | None) -> None:
    height, width = max(p.shape[0] for p in pages), max(p.shape[1] for p in pages)

    def padded() -> Iterator[np.ndarray]:
        for page in pages:
            yield np.pad(page.astype(dtype), ((0, height - page.shape[0]), (0, width - page.shape[1])))

    resolution = {"resolution": (1e4 / pixel_size_um,) * 2, "resolutionunit": "CENTIMETER"} if pixel_size_um else {}
    tifffile.imwrite(path, padded(), shape=(len(pages), height, width), dtype=dtype, photometric="minisblack",
                     metadata={"axes": "ZYX"}, bigtiff=len(pages) * height * width * dtype.itemsize > 3_900_000_000, **resolution)
