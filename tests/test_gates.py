"""Data gates: every fault is made for real, in a file or in a set, and must be told by its own sentence; what is good passes."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import logging
import os
import re
import resource
import shutil
import signal
import socket
import struct
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import imageio.v3 as iio
import numpy as np
import pandas as pd
import pytest
import tifffile
from PIL import Image
from scipy import ndimage as ndi

from graincast.config import Gates, Ingest, Simulate, parse_config
from graincast.errors import UserError
from graincast.measure.grains import measure_grains
from graincast.microscope import ingest as ingesting
from graincast.microscope import reader
from graincast.microscope.ingest import ingest
from graincast.microscope.preparation import Preparation
from graincast.microscope.quality import focus
from graincast.microscope.reader import find_session_files, printable, read_micrograph
from graincast.simulate.library import simulate_set
from graincast.stages import run_gate_library, run_gate_session, run_gate_synthetic, run_ingest_session
from graincast.store.gates import PAGE, Gate, check_grains, check_library, check_session, check_synthetic, read_grains
from graincast.store.imageset import ImageSet, ImageSetWriter
from tests.test_microscope import REAL, grains, needs_real, to_bytes, write_fei

PREPARATION = Preparation(0.029 * 30 / 24, None, 24.0, 0.0, 96.0, True, 64, 0.5, 0.01, None)
"""Of a training on files with pixel sizes (that of `write_fei`), grains of 30 px brought to 24 px."""
BOMB = (100_000, 100_000)
"""Height and width that a decompression bomb declares: 10 GB in 8 bits."""


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inbox") / "tuesday"
    folder.mkdir()
    for index in range(4):
        write_fei(folder / f"{index}.tif", grains(diameter=30, seed=index)[0])
    return folder


@pytest.fixture
def session(good: Path, tmp_path: Path) -> Path:
    """A good session to put faults into."""
    return shutil.copytree(good, tmp_path / "tuesday")


def taken_in(session: Path, out: Path, gates: Gates | None = None, usual_scale: float | None = None) -> ImageSet:
    return run_ingest_session(replace(PREPARATION, usual_scale=usual_scale), session, out, gates or Gates())


def refusals(images: ImageSet) -> dict[str, str]:
    return images.refused.set_index("source")["refused"].to_dict()


# ------------------------------------------------------------------------------------------------------ files of a session


def png_bomb(path: Path) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(9)
    pixels = b"".join(packer.compress(bytes(100_001)) for _ in range(1000)) + packer.flush()
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", BOMB[1], BOMB[0], 8, 0, 0, 0, 0))
                     + chunk(b"IDAT", pixels) + chunk(b"IEND", b""))


def tiff_bomb(path: Path) -> None:
    """Deflated zeros: each strip of 100 rows is 10 MB in 10 kB, and the page declares a thousand of them."""
    strips = itertools.repeat(zlib.compress(bytes(100 * BOMB[1]), 9), BOMB[0] // 100)
    tifffile.imwrite(path, strips, shape=BOMB, dtype=np.uint8, compression="zlib", rowsperstrip=100)


def jpeg_of(shape: tuple[int, int]) -> bytes:
    """A small JPEG whose frame header says that it is of another size."""
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((64, 64), np.uint8)).save(buffer, "JPEG")
    data = bytearray(buffer.getvalue())
    at = data.index(b"\xff\xc0")
    data[at + 5:at + 9] = struct.pack(">HH", *shape)
    return bytes(data)


def jpeg_bomb(path: Path) -> None:
    path.write_bytes(jpeg_of((60_000, 60_000)))


def jpeg_in_tiff_bomb(path: Path) -> None:
    """The page is small, and the JPEG stream in it is not."""
    tifffile.imwrite(path, iter([jpeg_of((60_000, 60_000))]), shape=(64, 64), dtype=np.uint8, compression="jpeg", rowsperstrip=64)


def tile_bomb(path: Path) -> None:
    """The page is small, and its one tile is not."""
    tifffile.imwrite(path, iter([zlib.compress(bytes(64))]), shape=(64, 64), dtype=np.uint8, compression="zlib", tile=(60_000, 60_000))


def bmp_bomb(path: Path) -> None:
    path.write_bytes(b"BM" + struct.pack("<IHHI", 100, 0, 0, 54) + struct.pack("<IiiHHIIiiII", 40, 20_000, 20_000, 1, 24, 0, 0, 1, 1, 0, 0))


def mrc_bomb(path: Path) -> None:
    """A header that declares 10 GB, and a sparse file that has them."""
    header = bytearray(1024)
    header[:16] = struct.pack("<4i", BOMB[1], BOMB[0], 1, 0)
    header[208:216] = b"MAP DD\0\0"
    path.write_bytes(header)
    os.truncate(path, 1024 + BOMB[0] * BOMB[1])


def padded_png(path: Path) -> None:
    """A small picture in a file that would take much memory to read."""
    iio.imwrite(path, np.zeros((64, 64), np.uint8))
    os.truncate(path, 10 * reader.LARGEST_OVERHEAD)


BOMBS: dict[str, tuple[Callable[[Path], None], str]] = {
    "bomb.png": (png_bomb, "declares 100000 x 100000 x 1 samples"), "bomb.tif": (tiff_bomb, "declares 100000 x 100000 samples"),
    "bomb.jpg": (jpeg_bomb, "bomb.jpg"), "stream.tif": (jpeg_in_tiff_bomb, "declares 60000 x 60000 x 1 samples"),
    "tile.tif": (tile_bomb, "declares 60000 x 60000 samples"), "bomb.bmp": (bmp_bomb, "bomb.bmp"),
    "bomb.mrc": (mrc_bomb, "declares 100000 x 100000 samples"), "padded.png": (padded_png, "much larger than its 64 x 64 px need"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_what_a_file_declares_is_checked_before_it_is_decoded(tmp_path: Path, name: str) -> None:
    make, words = BOMBS[name]
    make(tmp_path / name)
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=words):
            read_micrograph(tmp_path / name)
        assert tracemalloc.get_traced_memory()[1] < 4 * reader.LARGEST_OVERHEAD  # NumPy's arrays are traced, too
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("compression", ["zlib", "lzw", "packbits", "lzma", "zstd", "jpeg", "jpeg2000", None])
def test_compressions_are_read_as_before(tmp_path: Path, compression: str | None) -> None:
    image = to_bytes(ndi.gaussian_filter(grains((80, 70))[0], 2))
    options = {"compressionargs": {"level": 98}} if compression == "jpeg" else {}
    tifffile.imwrite(tmp_path / "a.tif", image, compression=compression, **options)
    np.testing.assert_allclose(read_micrograph(tmp_path / "a.tif").image, image / 255, atol=0.02 if compression == "jpeg" else 1e-6)


def test_a_strip_that_inflates_beyond_its_page_does_not(tmp_path: Path) -> None:
    packer = zlib.compressobj(9)
    packed = b"".join(packer.compress(bytes(10**6)) for _ in range(500)) + packer.flush()
    tifffile.imwrite(tmp_path / "a.tif", iter([packed]), shape=(64, 64), dtype=np.uint8, compression="zlib", rowsperstrip=64)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with contextlib.suppress(UserError):  # cut off at the page's 4096 bytes, or refused
        assert read_micrograph(tmp_path / "a.tif").image.shape == (64, 64)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


def test_a_compression_without_bounds_is_refused(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((64, 64, 3), np.uint8), photometric="rgb", compression="webp")
    with pytest.raises(UserError, match="compressed with WEBP, which is not read; a TIFF without compression"):
        read_micrograph(tmp_path / "a.tif")


def test_entities_that_multiply_are_not_expanded(tmp_path: Path) -> None:
    laughs = "".join(f'<!ENTITY l{n} "{f"&l{n - 1};" * 10}">' for n in range(1, 12))
    text = f'<?xml version="1.0"?><!DOCTYPE OME [<!ENTITY l0 "ha">{laughs}]><OME><Pixels PhysicalSizeX="0.1">&l11;</Pixels></OME>'
    tifffile.imwrite(tmp_path / "a.tif", np.eye(64, dtype=np.uint8), description=text, metadata=None)
    assert read_micrograph(tmp_path / "a.tif").pixel_size_um is None


def test_each_bad_file_is_refused_with_one_sentence_and_the_rest_goes_on(session: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret.tif"
    write_fei(secret, grains(diameter=30, seed=9)[0])
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(secret, tmp_path / "elsewhere" / "far.tif")
    whole = (session / "0.tif").read_bytes()
    expected = {}

    def fault(name: str, content: bytes | None, words: str) -> None:
        if content is not None:
            (session / name).parent.mkdir(exist_ok=True)
            (session / name).write_bytes(content)
        expected[printable(name)] = words

    fault("zero.tif", b"", "zero.tif is empty")
    fault("cut.tif", whole[:-5000], "truncated")
    fault("noise.tif", np.random.default_rng(0).bytes(5000), "cannot be read as a TIF")
    fault("flipped.tif", whole[:4] + bytes(reversed(whole[4:])), "cannot be read as a TIF")
    fault("tiff.png", whole, "is a TIFF file by its content; the extension .tif would be right")
    fault("report.jpg", b"%PDF-1.7 a report", "is a PDF file by its content; a TIFF would be right")
    fault("image.tif.bak", whole, "is a TIFF image by its content; the extension .tif would be right")
    fault("line\nbreak.tif", whole, "has a name that cannot be printed")
    fault("turned\u202efit.tif", whole, "has a name that cannot be printed")
    fault(os.fsdecode(b"bytes-\xff\xfe.tif"), whole, "has a name that cannot be printed")
    os.symlink(secret, session / "link.tif")
    expected["link.tif"] = "is a link, and links are not followed"
    os.symlink(session / "0.tif", session / "inside.tif")
    expected["inside.tif"] = "is a link, and links are not followed"
    os.symlink(tmp_path / "elsewhere", session / "folder")
    expected["folder"] = "is a link, and links are not followed"
    os.symlink(session, session / "loop")
    expected["loop"] = "is a link, and links are not followed"
    os.mkfifo(session / "pipe.tif")
    expected["pipe.tif"] = "is no regular file"
    tiff_bomb(session / "bomb.tif")
    expected["bomb.tif"] = "declares 100000 x 100000 samples"
    (session / "notes.txt").write_text("of no interest")
    (session / ".hidden.tif").write_bytes(b"")
    (session / "..evil.tif").write_bytes(whole[:100])  # hidden, not a way up
    (session / "deep").mkdir()
    (session / "deep" / "back\\slash$HOME;rm.tif").write_bytes((session / "3.tif").read_bytes() + b"\0")

    images = taken_in(session, tmp_path / "set")
    assert set(images.rows.source) == {"0.tif", "1.tif", "2.tif", "3.tif", "deep/back\\slash$HOME;rm.tif"}
    found = refusals(images)
    assert set(found) == set(expected)
    for name, words in expected.items():
        assert words in found[name], (name, found[name])
        assert "\n" not in found[name]
    assert not any(str(tmp_path) in reason for reason in found.values())
    assert set(images.rows.session) == {"tuesday"}
    images.verify()
    assert not any("/" in name for name in images.rows.id)


@pytest.mark.parametrize("lure", ["fifo", "link"])
def test_formats_that_refer_to_other_files_are_refused_unopened(session: Path, tmp_path: Path, lure: str) -> None:
    """A FIFO would be waited for without end, a link be followed out of the session."""
    secret = tmp_path / "secret.raw"
    secret.write_bytes(np.random.default_rng(0).bytes(300 * 300))
    for name in ("a.raw", "b_1.ser", "c.img"):
        os.mkfifo(session / name) if lure == "fifo" else os.symlink(secret, session / name)
    (session / "a.rpl").write_text("key\tvalue\nwidth\t300\nheight\t300\ndepth\t1\noffset\t0\ndata-length\t1\ndata-type\tunsigned\n"
                                   "byte-order\tdont-care\nrecord-by\tvector\n")
    (session / "b.EMI").write_bytes(b"<ObjectInfo></ObjectInfo>")
    (session / "c.asw").write_bytes(bytes(200))
    with deadline(20):
        images = taken_in(session, tmp_path / "set")
    found = refusals(images)
    assert [found[name].endswith("refers to other files; an exported TIFF would be right") for name in ("a.rpl", "b.EMI", "c.asw")] == [True] * 3
    assert len(images) == 4


@contextlib.contextmanager
def deadline(seconds: int) -> Iterator[None]:
    """A test that would hang fails."""
    def late(*_: object) -> None:
        raise TimeoutError("a file is waited for")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("kind", ["external link", "external data", "virtual data"])
def test_hdf5_with_data_in_other_files_is_refused_unopened(session: Path, tmp_path: Path, kind: str) -> None:
    os.mkfifo(session / "pipe")
    with h5py.File(session / "a.emd", "w") as file:
        file["own"] = np.zeros((4, 4))
        if kind == "external link":
            file["a/b"] = h5py.ExternalLink("pipe", "/data")
        elif kind == "external data":
            file.create_dataset("a/b", (30, 30), "u1", external=[("pipe", 0, 900)])
        else:
            layout = h5py.VirtualLayout((30, 30), "u1")
            layout[:] = h5py.VirtualSource("pipe", "data", (30, 30))
            file.create_virtual_dataset("a/b", layout)
    with deadline(20):
        found = refusals(taken_in(session, tmp_path / "set"))
    assert found["a.emd"] == "a.emd refers to other files; an exported TIFF would be right"


def test_a_movie_and_an_ome_file_do_not_open_what_lies_beside_them(session: Path, tmp_path: Path) -> None:
    """Electron-detector movies are read with their info files and OME-TIFF with the files of its series, if one lets them."""
    os.mkfifo(session / "20240101_00001_info.txt")
    mrc_of(session / "20240101_00001_movie.mrc", np.random.default_rng(0).integers(0, 255, (120, 120)).astype(np.uint8))
    os.mkfifo(session / "pipe")
    ome = ('<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Image ID="Image:0"><Pixels ID="Pixels:0" DimensionOrder="XYZCT" '
           'Type="uint8" SizeX="200" SizeY="200" SizeZ="2" SizeC="1" SizeT="1">'
           + "".join(f'<TiffData IFD="0" FirstZ="{z}" PlaneCount="1"><UUID FileName="pipe">urn:uuid:{z}</UUID></TiffData>' for z in range(2))
           + "</Pixels></Image></OME>")
    tifffile.imwrite(session / "series.tif", to_bytes(grains(diameter=30, seed=8)[0])[:200, :200], description=ome, metadata=None,
                     extratags=[(271, "s", 0, "JEOL Ltd.", True)])
    with deadline(20):
        images = taken_in(session, tmp_path / "set")
    assert {"0.tif", "1.tif", "2.tif", "3.tif"} <= set(images.rows.source)


def mrc_of(path: Path, image: np.ndarray) -> None:
    """One plane of unsigned bytes with the 1024-byte header of MRC2014."""
    header = np.zeros(256, "<i4")
    header[:4] = image.shape[1], image.shape[0], 1, 0
    header[7:10] = image.shape[1], image.shape[0], 1
    header[16:19] = 1, 2, 3
    path.write_bytes(header.tobytes() + image.tobytes())


def test_a_socket_is_no_micrograph(session: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(session)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("s.tif")
        assert {file.name: file.refused for file in find_session_files(session)}["s.tif"] == "is no regular file"


def test_a_session_that_is_a_link_a_file_or_missing_is_told(session: Path, tmp_path: Path) -> None:
    for folder in (tmp_path / "none", session / "0.tif"):
        with pytest.raises(UserError, match="is no folder; a folder of micrographs would be right"):
            taken_in(folder, tmp_path / "set")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no micrographs"):
        taken_in(tmp_path / "empty", tmp_path / "set")
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize("change", ["grows", "other image", "vanishes"])
@pytest.mark.parametrize("way", ["session", "training"])
def test_a_file_that_changes_while_it_is_read_is_refused(session: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str,
                                                          way: str) -> None:
    """The change happens where it hurts most: after the file was hashed and looked at, before its pixels are taken."""
    victim, read = session / "2.tif", read_micrograph
    reads = {"count": 0}

    def meddling(path: Path) -> reader.Micrograph:
        if Path(path) == victim:
            reads["count"] += 1
            if reads["count"] == 2:
                if change == "grows":
                    victim.write_bytes(victim.read_bytes() + b"more")
                elif change == "other image":
                    write_fei(victim, grains(diameter=30, seed=77)[0])
                else:
                    victim.unlink()
        return read(path)

    monkeypatch.setattr(ingesting, "read_micrograph", meddling)
    images = taken_in(session, tmp_path / "set") if way == "session" else ingest(Ingest(), session, 24.0, tmp_path / "set")
    reason = refusals(images)["2.tif"]
    assert ("is no file" if change == "vanishes" else "2.tif changed while it was read; run again once it is whole") in reason
    assert set(images.rows.source) == {"0.tif", "1.tif", "3.tif"}


def test_too_many_files_are_refused_before_one_is_read(session: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"session tuesday holds 4 files, at most 3 may be \(gates.most_images\)"):
        taken_in(session, tmp_path / "set", Gates(most_images=3))


def test_nothing_usable_names_each_file_and_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "bad"
    folder.mkdir()
    for index in range(8):
        (folder / f"{index}.tif").touch()
    with pytest.raises(UserError) as caught:
        taken_in(folder, tmp_path / "set")
    assert all(f"{index}.tif is empty" in str(caught.value) for index in range(8))
    assert not (tmp_path / "set").exists()


# ------------------------------------------------------------------------------------------- preparation of a session


def test_a_session_is_prepared_as_the_training_was(good: Path, tmp_path: Path) -> None:
    training = ingest(Ingest(), good, 24.0, tmp_path / "training")
    preparation = Preparation.from_dict(training.info["preparation"])
    images = run_ingest_session(preparation, good, tmp_path / "set", Gates())
    shared = [column for column in training.rows if column != "session"]
    pd.testing.assert_frame_equal(images.rows[shared], training.rows[shared])
    assert Preparation.from_dict(images.info["preparation"]) == preparation
    for index in range(len(images)):
        np.testing.assert_array_equal(images.image(index), training.image(index))
    again = run_ingest_session(preparation, good, tmp_path / "again", Gates())
    assert again.digest == images.digest


def test_no_scale_is_chosen_anew(session: Path, tmp_path: Path) -> None:
    """Another magnification shows: by its pixel size it comes to the training's, without one it stays at the usual scale."""
    for file in session.iterdir():
        file.unlink()
    write_fei(session / "known.tif", grains(diameter=60, seed=1)[0])
    iio.imwrite(session / "unknown.png", to_bytes(grains(diameter=60, seed=2)[0]))
    scale = 24 / 30
    rows = taken_in(session, tmp_path / "set", usual_scale=scale).rows.set_index("source")
    np.testing.assert_allclose(rows.scale, scale)
    np.testing.assert_allclose(rows.grain_diameter_px * rows.scale, 48, rtol=0.25)  # twice as large as in the training
    assert rows.pixel_size_um["known.tif"] == pytest.approx(0.029 / scale)
    assert np.isnan(rows.pixel_size_um["unknown.png"])
    adapted = taken_in(session, tmp_path / "adapted").rows.set_index("source")
    assert adapted.grain_diameter_px["unknown.png"] * adapted.scale["unknown.png"] == pytest.approx(24)


def test_inverted_contrast_is_refused_as_by_the_segmenter(session: Path, tmp_path: Path) -> None:
    write_fei(session / "inverted.tif", 1 - grains(diameter=30, seed=5)[0])
    dark = replace(PREPARATION, bright_boundaries=False)
    images = run_ingest_session(dark, session, tmp_path / "set", Gates())
    assert "inverted contrast" in refusals(images)["inverted.tif"]
    assert len(images) == 4


# ------------------------------------------------------------------------------------------------ the gate of a session


def made(kind: str) -> np.ndarray:
    """An image with one fault, in [0, 1]."""
    image, _ = grains(diameter=30, seed=6)
    rng = np.random.default_rng(0)
    return {"blurred": lambda: ndi.gaussian_filter(image, 9) + 0.005 * rng.standard_normal(image.shape),
            "saturated": lambda: np.where(image > np.percentile(image, 55), 1, image),
            "noisy": lambda: 0.5 + 0.2 * (image - 0.5) + 0.23 * rng.standard_normal(image.shape),
            "faint": lambda: 0.5 + 0.06 * (image - 0.5)}[kind]().clip(0, 1)


QUARANTINED = {"blurred": "blurred: a sharpness of", "saturated": "saturated: 0.4", "noisy": "noise", "faint": "no contrast: grey values span"}


@pytest.mark.parametrize("kind", QUARANTINED)
def test_a_bad_image_is_quarantined_and_the_session_goes_on(session: Path, tmp_path: Path, kind: str) -> None:
    write_fei(session / "bad.tif", made(kind))
    images = taken_in(session, tmp_path / "set")
    assert set(images.rows.source) == {f"{index}.tif" for index in range(4)}
    assert QUARANTINED[kind] in refusals(images)["bad.tif"]
    gate = check_session(images, Gates())
    assert gate.passed
    assert list(gate.quarantined) == ["bad.tif"]
    assert QUARANTINED[kind] in gate.quarantined["bad.tif"]
    assert gate.figures == {"images": 5, "good": 4, "quarantined": 1}


def test_one_bit_wrong_units_and_copies_are_quarantined(session: Path, tmp_path: Path) -> None:
    shutil.copy(session / "1.tif", session / "one_again.tif")
    write_fei(session / "metres.tif", grains(diameter=30, seed=8)[0])
    data = (session / "metres.tif").read_bytes()
    for side in (b"PixelWidth", b"PixelHeight"):
        data = data.replace(side + b"=2.9e-08", side + b"=2.9e-02")
    (session / "metres.tif").write_bytes(data)
    found = refusals(run_ingest_session(replace(PREPARATION, target_pixel_size_um=None, scale=0.8), session, tmp_path / "set", Gates()))
    assert found["one_again.tif"] == "the same file as 1.tif"
    assert "a pixel size of 2.9e+04 um, 0.0005 to 10 would be right (gates.min_pixel_size_um and gates.max_pixel_size_um)" in found["metres.tif"]


def test_a_missing_pixel_size_is_told_or_refused(session: Path, tmp_path: Path) -> None:
    iio.imwrite(session / "unknown.png", to_bytes(grains(diameter=30, seed=2)[0]))
    gate = check_session(taken_in(session, tmp_path / "set", usual_scale=0.8), Gates())
    assert gate.passed
    assert gate.warnings == ["unknown.png: without a known pixel size, so their lengths stay in pixels"]
    strict = taken_in(session, tmp_path / "strict", Gates(require_pixel_size=True), usual_scale=0.8)
    assert "no pixel size" in refusals(strict)["unknown.png"]


def test_too_few_good_images_fail_and_each_is_named(session: Path, tmp_path: Path) -> None:
    for index in range(7):
        (session / f"empty-{index}.tif").touch()
    images = taken_in(session, tmp_path / "set")
    with pytest.raises(UserError) as caught:
        run_gate_session(Gates(least_good_images=5), images, tmp_path / "gate")
    sentence = str(caught.value)
    assert "too few good images: 4, at least 5 are needed (gates.least_good_images)" in sentence
    assert "only 0.364 of the files are good, at least 0.5 must be" in sentence
    assert all(f"empty-{index}.tif is empty" in sentence for index in range(7))
    assert str(tmp_path / "gate" / PAGE) in sentence
    assert not Gate.load(tmp_path / "gate").passed  # the page stands although the gate failed
    assert "empty-6.tif" in (tmp_path / "gate" / PAGE).read_text()


def test_a_set_that_was_tampered_with_fails(good: Path, tmp_path: Path) -> None:
    images = taken_in(good, tmp_path / "set")
    stack = tifffile.memmap(images.path / "images.tif", mode="r+")
    stack[2, 50, 50] ^= 1
    stack.flush()
    with pytest.raises(UserError, match=r"2\.tif: the image's bytes are not those that were written"):
        run_gate_session(Gates(), ImageSet(images.path), tmp_path / "gate")


def test_the_micrographs_of_a_training_go_through_the_same_gate(session: Path, tmp_path: Path) -> None:
    """`ingest` judges less strictly: what it let through and the gate would not is told."""
    write_fei(session / "bad.tif", made("blurred"))
    gate = check_session(ingest(Ingest(), session, 24.0, tmp_path / "set"), Gates())
    assert gate.passed
    assert list(gate.quarantined) == ["bad.tif"]
    assert "bad.tif should not be used and is in the set all the same" in gate.warnings[-1]


def test_focus_follows_blur_and_not_magnification() -> None:
    image, diameter = grains((500, 500), 40, noise=0.01)
    sharp = focus(image, diameter)
    zoomed = ndi.zoom(image, 2, order=1)
    assert focus(zoomed, 2 * diameter) == pytest.approx(sharp, abs=0.1)
    assert focus(5 * image - 2, diameter) == pytest.approx(sharp, abs=1e-3)
    blurred = [focus(ndi.gaussian_filter(image, share * diameter), diameter) for share in (0.05, 0.1, 0.3)]
    assert sharp > blurred[0] > blurred[1] > blurred[2]
    assert sharp > 0.5 > Gates().min_focus > blurred[2]


# ----------------------------------------------------------------------------------------------- simulated and synthetic


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    config = Simulate(size=128, grains=18, steps=200, translator_structures=3, pixel_size_um=0.1)
    return simulate_set(config, 3, tmp_path_factory.mktemp("library") / "library")


def synthetic_of(library: ImageSet, out: Path, labels: Callable[[int, np.ndarray], np.ndarray] = lambda i, labels: labels,
                 image: Callable[[int, np.ndarray], np.ndarray] = lambda i, image: image, fidelity: float = 0.8, dropped: int = 0) -> ImageSet:
    """A synthetic set of a library's own pictures, with what `labels` and `image` make of those."""
    with ImageSetWriter(out, "synthetic", config={"min_fidelity": 0.5}) as writer:
        for index in range(len(library)):
            noise = np.random.default_rng(index).normal(0, 4, library.image(index).shape)
            picture = np.clip(library.image(index) * 0.8 + noise, 1, 254).astype(np.uint8)
            writer.add(image(index, picture), labels=labels(index, library.labels(index)), id=f"s{index}", look="translated", fidelity=fidelity)
        for index in range(dropped):
            writer.refuse("label fidelity too low", id=f"d{index}", look="translated", fidelity=0.1)
    return writer.result


def test_a_sound_library_and_a_sound_set_pass(library: ImageSet, tmp_path: Path) -> None:
    assert check_library(library, Gates()) == Gate("simulated library", True, [], [], {}, {"rows": 3, "bad": 0}, {})
    gate = check_synthetic(synthetic_of(library, tmp_path / "set"), None, Gates())
    assert gate.passed
    assert gate.failures == []
    assert gate.warnings == ["the micrographs tell no grain size, so that of the labels was compared with none"]


def with_gap(index: int, labels: np.ndarray) -> np.ndarray:
    return np.where(labels == 2, labels.max() + 1, labels) if index == 1 else labels


def torn(index: int, labels: np.ndarray) -> np.ndarray:
    """Grains 1 and 2 of one image become one grain, in two pieces, and the last takes the free id."""
    merged = np.where(labels == 2, 1, labels)
    return np.where(merged == labels.max(), 2, merged) if index == 1 else labels


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "a gap in the ids": ({"labels": with_gap}, "set/s1: has gaps in its ids"),
    "a torn grain": ({"labels": torn}, "set/s1: has 1 grains in several pieces"),
    "no labels": ({"labels": lambda i, labels: labels * (i != 1)}, "set/s1: has no labels"),
    "one grain": ({"labels": lambda i, labels: np.minimum(labels, 1)}, "shows 1 grains"),
    "no boundaries": ({"labels": lambda i, labels: np.maximum(labels, 1)}, "of its pixels is boundary"),
    "fat boundaries": ({"labels": lambda i, labels: labels * ndi.binary_erosion(labels > 0, iterations=5)}, "of its pixels is boundary"),
    "grey": ({"image": lambda i, image: np.full_like(image, 128) + (np.arange(128, dtype=np.uint8) % 3)}, "no contrast: grey values span"),
    "white": ({"image": lambda i, image: np.where(image > 90, 255, image).astype(np.uint8)}, "saturated: "),
    "blurred": ({"image": lambda i, image: ndi.gaussian_filter(image, 9)}, "blurred: a sharpness of"),
    "noise": ({"image": lambda i, image: np.random.default_rng(i).integers(1, 255, image.shape).astype(np.uint8)}, "too noisy: noise of"),
    "moved boundaries": ({"fidelity": 0.3}, "a label fidelity of 0.3, at least 0.5 is needed (synthesise.min_fidelity)"),
    "a translator that moves boundaries": ({"dropped": 7}, "0.7 of its images were dropped, at most 0.5 may be (gates.max_dropped_share)"),
    "copies": ({"image": lambda i, image: np.tile(np.arange(0, 250, 10, dtype=np.uint8), (128, 6))[:, :128],
                "labels": lambda i, labels: np.kron(np.arange(1, 17).reshape(4, 4), np.pad(np.ones((30, 30), int), 1)).astype(np.int32)},
               "set/s1, set/s2: the same image and labels as set/s0"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_synthetic_set_never_reaches_training(library: ImageSet, tmp_path: Path, fault: str) -> None:
    how, words = BROKEN[fault]
    broken = synthetic_of(library, tmp_path / "set", **how)
    with pytest.raises(UserError) as caught:
        run_gate_synthetic(Gates(), broken, None, tmp_path / "gate")
    assert words in str(caught.value)
    assert not Gate.load(tmp_path / "gate").passed


def copied(images: ImageSet, out: Path) -> ImageSet:
    return ImageSet(shutil.copytree(images.path, out))


def change(stack: Path, page: int) -> None:
    pages = tifffile.memmap(stack, mode="r+")
    pages[page, 60:64, 60:64] ^= 1
    pages.flush()


@pytest.mark.parametrize("file", ["images.tif", "labels.tif"])
@pytest.mark.parametrize("kind", ["library", "synthetic"])
def test_a_changed_pixel_or_id_is_found(library: ImageSet, tmp_path: Path, file: str, kind: str) -> None:
    images = copied(library, tmp_path / "set") if kind == "library" else synthetic_of(library, tmp_path / "set")
    change(images.path / file, 1)
    run = {"library": lambda out: run_gate_library(Gates(), ImageSet(images.path), out),
           "synthetic": lambda out: run_gate_synthetic(Gates(), ImageSet(images.path), None, out)}[kind]
    with pytest.raises(UserError, match=r"set/\S*1: is corrupt, its checksum differs"):
        run(tmp_path / "gate")


@pytest.mark.parametrize("file", ["images.tif", "labels.tif"])
@pytest.mark.parametrize("damage", ["cut", "gone", "a page less", "text"])
def test_a_damaged_stack_fails_and_is_no_crash(library: ImageSet, tmp_path: Path, file: str, damage: str) -> None:
    images = copied(library, tmp_path / "set")
    stack = images.path / file
    if damage == "cut":
        stack.write_bytes(stack.read_bytes()[:-20_000])
    elif damage == "gone":
        stack.unlink()
    elif damage == "text":
        stack.write_text("no stack of pages")
    else:
        tifffile.imwrite(stack, tifffile.imread(stack)[:2], photometric="minisblack", metadata={"axes": "ZYX"})
    with pytest.raises(UserError, match=r"cannot be read, or its set holds other pages than rows|has no labels"):
        run_gate_library(Gates(), ImageSet(images.path), tmp_path / "gate")


def test_a_manifest_that_tells_another_story_fails(library: ImageSet, tmp_path: Path) -> None:
    images = copied(library, tmp_path / "set")
    manifest = pd.read_parquet(images.path / "manifest.parquet")
    manifest["grains"] += 1
    manifest["mean_diameter_px"] *= 1.1
    manifest.to_parquet(images.path / "manifest.parquet", index=False)
    failures = check_library(ImageSet(images.path), Gates()).failures
    assert any("shows other grains than its row says" in failure for failure in failures)
    assert any("a mean grain diameter that is not the recorded one" in failure for failure in failures)


def test_a_structure_must_not_serve_two_purposes(library: ImageSet) -> None:
    gate = check_library({"translator": library, "validation": library}, Gates())
    assert not gate.passed
    assert "validation/structure-00000" in gate.failures[0]
    assert "the same image and labels as translator/structure-00000" in gate.failures[0]


@pytest.mark.parametrize(("factor", "passes"), [(1.0, True), (1.3, True), (0.6, False), (1.8, False)])
def test_grain_sizes_must_agree_with_the_micrographs_own(library: ImageSet, good: Path, tmp_path: Path, factor: float, passes: bool) -> None:
    """The micrographs are brought to `factor` times the library's grain size."""
    size = library.rows.mean_diameter_px.mean()
    micrographs = ingest(Ingest(), good, factor * size, tmp_path / "micrographs")
    gate = check_synthetic(synthetic_of(library, tmp_path / "set"), micrographs, Gates())
    assert gate.passed == passes
    assert gate.warnings == []
    if not passes:
        assert f"the micrographs suggest {factor * size:.3g} px" in gate.failures[0]
        assert "gates.max_size_ratio" in gate.failures[0]


# --------------------------------------------------------------------------------------------------------------- grains


@pytest.fixture
def table(library: ImageSet) -> pd.DataFrame:
    return pd.concat([measure_grains(library.labels(i), 0.1, image_id=f"s{i}") for i in range(3)], ignore_index=True)


def test_measured_grains_pass(table: pd.DataFrame, library: ImageSet) -> None:
    expected = (library.rows.mean_diameter_px * 0.1).set_axis([f"s{i}" for i in range(3)]).to_dict()
    gate = check_grains(table, Gates(), expected)
    assert gate.passed
    assert gate.failures == gate.warnings == []
    doubled = check_grains(table, Gates(), {name: 2 * value for name, value in expected.items()})
    assert doubled.passed  # neither of the two is the truth
    assert "times as wide as the micrograph itself suggests" in doubled.warnings[0]


@pytest.mark.parametrize(("column", "value", "words"), [
    ("area_um2", -1.0, "an area of -1"), ("area_um2", np.nan, "no area"),
    ("equivalent_diameter_um", 100.0, "a diameter that does not fit its area"),
    ("aspect_ratio", 0.5, "an aspect ratio of 0.5"), ("circularity", 1.2, "a circularity of 1.2"),
    ("orientation_deg", 270.0, "an orientation of 270"),
    ("label", 1, "listed twice"), ("label", 0, "an id of 0"), ("perimeter_um", 0.0, "a perimeter of 0"), ("aspect_ratio", np.nan, "no aspect_ratio"),
])
def test_impossible_grains_fail(table: pd.DataFrame, column: str, value: float, words: str) -> None:
    table.loc[5, column] = value
    gate = check_grains(table, Gates())
    assert not gate.passed
    assert any(words in failure and failure.startswith("s0: grain") for failure in gate.failures), gate.failures


def test_tables_of_a_folder(table: pd.DataFrame, tmp_path: Path) -> None:
    for name, rows in table.groupby("image_id"):
        rows.drop(columns="image_id").to_csv(tmp_path / f"{name}_grains.csv", index=False, float_format="%.6g")
    assert check_grains(read_grains(tmp_path), Gates()).figures["rows"] == len(table)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no table of grains"):
        read_grains(tmp_path / "empty")
    with pytest.raises(UserError, match="lacks the column 'area'"):
        check_grains(table.drop(columns="area_um2"), Gates())
    assert check_grains(table.iloc[:0], Gates()).failures == ["it holds no grains"]


# ------------------------------------------------------------------------------------------------------- pages and files


def test_the_page_is_safe_whole_and_the_same_each_time(session: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A file name is a stranger's text: it must not become markup, nor a Python template's placeholder."""
    name = "<img src=x onerror=alert(1)>${HOME}&amp;.tif"
    write_fei(session / name, made("blurred"))
    images = taken_in(session, tmp_path / "set")
    with caplog.at_level(logging.WARNING):
        first, second = (run_gate_session(Gates(), images, tmp_path / out) for out in ("a", "b"))
    # Great Expectations logs what it could not render, and goes on
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    files = {path.name: path.read_bytes() for path in first.iterdir()}
    assert files == {path.name: path.read_bytes() for path in second.iterdir()}
    assert set(files) == {"gate.json", "validation.json", "index.html"}
    page = files["index.html"].decode()
    assert "<img" not in page
    assert "<script" not in page
    assert "http" not in page.replace("http-equiv", "")
    assert page.count("&lt;img src=x onerror=alert(1)&gt;") >= 2  # in the verdict, and in Great Expectations' own tables
    assert "values must be greater than or equal to 0.35" in " ".join(re.sub(r"<[^>]*>", "", page).split())
    assert list(Gate.load(first).quarantined) == [name]
    assert json.loads(files["validation.json"])["meta"]["great_expectations_version"].startswith("1.")


def test_a_session_of_which_nothing_is_left_has_a_page_too(tmp_path: Path) -> None:
    Gate.refused("session", "session <b>: not one of its files can be used").save(tmp_path)
    gate = Gate.load(tmp_path)
    assert not gate.passed
    assert gate.failures == ["session <b>: not one of its files can be used"]
    assert "session &lt;b&gt;: not one of its files can be used" in (tmp_path / PAGE).read_text()


def test_a_folder_without_a_gate_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no result of a data gate"):
        Gate.load(tmp_path)


def test_bounds_in_the_wrong_order_are_told() -> None:
    with pytest.raises(UserError, match=r"gates.min_boundary_share 0.5 is not below gates.max_boundary_share 0.4"):
        parse_config({"gates": {"min_boundary_share": 0.5}})


# --------------------------------------------------------------------------------------------------------- real micrographs


@needs_real
@pytest.mark.parametrize(("name", "target_um", "scale"), [
    pytest.param("nbt", 0.0568, None, marks=pytest.mark.slow), ("perovskite_sem", None, 30 / 83),
    ("pure_iron_optical", None, 30 / 66), ("steel", None, 30 / 60)])
def test_nothing_good_is_quarantined(tmp_path: Path, name: str, target_um: float | None, scale: float | None) -> None:
    folder = tmp_path / name
    folder.mkdir()
    if name == "nbt":
        files = [REAL / "nbt-ceramic-sem" / "images" / f"{n}.tif" for n in
                 ("1_001", "1_003", "2_001", "3_001", "3_002", "5_001", "5_004", "6_001", "6_004", "6_005", "6_007", "8_001")]
    elif name == "steel":
        files = sorted(f for f in (REAL / "steel-316l-optical").rglob("*.jpg") if "masks" not in f.parts)[::45]
    else:
        files = [next(f for f in (REAL / "single-fields").rglob(f"{name}.*") if "masks" not in f.parts)]
    for file in files:
        shutil.copy(file, folder)
    preparation = Preparation(target_um, scale, 30.0, 0.0, 120.0, True, 64, 0.5, 0.01, None)
    images = run_ingest_session(preparation, folder, tmp_path / "set", Gates())
    assert refusals(images) == {}
    gate = check_session(images, Gates())
    assert gate.passed
    assert gate.quarantined == {}
    assert len(images) == len(files)
