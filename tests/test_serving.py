"""The server as people meet it: a process, a champion from a registry, requests through sockets; and the model through MLflow."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import imagecodecs
import mlflow
import numpy as np
import onnxruntime
import pandas as pd
import psutil
import pytest
import tifffile
import torch

from graincast.cli import main
from graincast.config import Segmenter as SegmenterConfig
from graincast.errors import UserError
from graincast.microscope.reader import from_array
from graincast.segment.instances import Cut
from graincast.segment.network import build_network, standardise
from graincast.segment.segmenter import Segmenter
from graincast.store import bioimage, registry, tracking
from graincast.store.imageset import folder_digest
from graincast.store.pyfunc import ServedSegmenter, as_micrograph
from tests.test_inference import PREPARATION, micrograph
from tests.test_registry import save_segmenter

IMAGE = np.rint(255 * micrograph()).astype(np.uint8)
JSON = {"Content-Type": "application/json"}


@dataclass
class Server:
    """A running ``graincast serve`` and what it should find."""

    url: str
    process: subprocess.Popen[str]
    segmenter: Segmenter

    def post(self, body: Any, headers: dict[str, str] | None = None, **query: Any) -> httpx.Response:
        return httpx.post(f"{self.url}/segment", content=body, headers=headers, params=query, timeout=60)

    def refusal(self, status: int, body: Any, headers: dict[str, str] | None = None, **query: Any) -> str:
        """The sentence with which it refuses; never more than that."""
        answer = self.post(body, headers, **query)
        assert answer.status_code == status, answer.text[:300]
        assert answer.json().keys() == {"detail"}
        assert "Traceback" not in answer.text
        assert "\n" not in answer.json()["detail"]
        return answer.json()["detail"]


def png(image: np.ndarray) -> bytes:
    return imagecodecs.png_encode(image)


def tiff(image: np.ndarray, **options: Any) -> bytes:
    stream = io.BytesIO()
    tifffile.imwrite(stream, image, **options)
    return stream.getvalue()


def start(environment: dict[str, str], *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", "from graincast.cli import main; main()", "serve", "--port", "0", *options]
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def address(process: subprocess.Popen[str]) -> str:
    """Where it listens; its further output is read and forgotten."""
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line)
        if found := re.search(r"http://127\.0\.0\.1:\d+", line):
            threading.Thread(target=process.stdout.read, daemon=True).start()
            return found[0]
    raise AssertionError("".join(said))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[dict[str, str], Segmenter]]:
    """A registry with a champion, as an environment, and that champion."""
    folder = tmp_path_factory.mktemp("serving")
    before, uri = mlflow.get_tracking_uri(), f"sqlite:///{folder}/mlflow.db"
    mlflow.set_tracking_uri(uri)
    mlflow.set_experiment(experiment_id=tracking.ensure_experiment())
    segmenter = Segmenter.load(save_segmenter(folder / "made", 0.1), "cpu")
    segmenter.preparation, segmenter.cut = PREPARATION, Cut(30, rise=1e-4, merge_level=0)  # an untrained network's maps are almost flat
    segmenter.save(folder / "made")
    with mlflow.start_run():
        number = registry.ensure_registered(folder / "made", IMAGE)
    registry.promote_by_hand(number, "it is the only one", by="tests")
    yield {**os.environ, "MLFLOW_TRACKING_URI": uri, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}, segmenter
    mlflow.set_tracking_uri(before)


@pytest.fixture(scope="module")
def server(store: tuple[dict[str, str], Segmenter]) -> Iterator[Server]:
    process = start(store[0], "--max-body-mb", "2", "--max-megapixels", "1")
    try:
        yield Server(address(process), process, store[1])
    finally:
        process.kill()
        process.wait()


def expected(server: Server, image: np.ndarray, pixel_size_um: float | None = None) -> np.ndarray:
    return server.segmenter.segment_micrograph(from_array(image), pixel_size_um)


# What is answered


def test_an_image_comes_back_as_labels_and_a_table(server: Server) -> None:
    answer = server.post(png(IMAGE), pixel_size_um=0.05).json()
    labels = tifffile.imread(io.BytesIO(base64.b64decode(answer["labels"]["data"])))
    np.testing.assert_array_equal(labels, expected(server, IMAGE, 0.05))
    assert labels.dtype == np.uint16
    table = pd.DataFrame(answer["grains"])
    assert len(table) == labels.max() == answer["field"]["grains"] > 0
    np.testing.assert_allclose(table["area_um2"].sum(), IMAGE.size * 0.05**2)
    assert answer["pixel_size_um"] == 0.05
    assert answer["model"] == {"name": registry.MODEL, "version": 1, "dvc_md5": registry.version(1).digest}
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok", "model": answer["model"], "requests": 0}


def test_without_a_pixel_size_numbers_are_in_px(server: Server) -> None:
    answer = server.post(png(IMAGE)).json()
    assert answer["pixel_size_um"] is None
    assert sum(grain["area_px2"] for grain in answer["grains"]) == pytest.approx(IMAGE.size)
    assert not [name for name in answer["grains"][0] if "um" in name.split("_")]


def test_a_files_own_pixel_size_counts_and_goes_out_with_the_labels(server: Server) -> None:
    body = tiff(IMAGE, resolution=(2e5, 2e5), resolutionunit="CENTIMETER")
    labels = server.post(body, {"Accept": "image/tiff"}, pixel_size_um=3)
    assert labels.headers["content-type"] == "image/tiff"
    with tifffile.TiffFile(io.BytesIO(labels.content)) as tif:
        numerator, denominator = tif.pages[0].tags["XResolution"].value
        assert numerator / denominator == pytest.approx(20)
        assert tif.imagej_metadata["unit"] == "um"
        np.testing.assert_array_equal(tif.asarray(), expected(server, IMAGE, 0.05))
    table = server.post(body, {"Accept": "text/csv;q=0.9, */*;q=0.1"})
    assert table.headers["content-type"].startswith("text/csv")
    assert pd.read_csv(io.BytesIO(table.content))["area_um2"].sum() == pytest.approx(IMAGE.size * 0.05**2, rel=1e-4)


@pytest.mark.parametrize(("accept", "begins"), [
    ("image/png", b"\x89PNG"), ("application/zip", b"PK"), ("application/geo+json", b"{"), ("application/vnd.apache.parquet", b"PAR1"),
    ("image/*", b"II*")])
def test_every_export_can_be_asked_for(server: Server, accept: str, begins: bytes) -> None:
    answer = server.post(png(IMAGE), {"Accept": accept}, pixel_size_um=0.05)
    assert (answer.status_code, answer.content[:len(begins)]) == (200, begins)
    assert answer.headers["content-type"] == accept.replace("*", "tiff")


@pytest.mark.parametrize("body", [
    tiff(np.rint(65535 * micrograph()).astype(np.uint16)), tiff(micrograph().astype(np.float32)), png(np.dstack([IMAGE] * 3)),
    imagecodecs.jpeg_encode(IMAGE, level=95),
])
def test_every_kind_of_image_is_read(server: Server, body: bytes) -> None:
    as_is, in_json = server.post(body, pixel_size_um=0.05), json.dumps({"image": base64.b64encode(body).decode(), "pixel_size_um": 0.05})
    assert as_is.status_code == 200, as_is.text
    assert server.post(in_json, JSON).json() == as_is.json()


def test_what_is_odd_about_the_file_is_told_as_on_the_command_line(server: Server) -> None:
    drawn = np.dstack([IMAGE] * 3)
    drawn[140:146, 10:50] = (255, 0, 0)
    assert any(sentence.startswith("240 px are coloured") for sentence in server.post(png(drawn)).json()["warnings"])
    pages = tiff(np.stack([IMAGE, IMAGE]), photometric="minisblack")
    assert "the file has 2 pages, of which the first was segmented" in server.post(pages).json()["warnings"]


def test_rows_of_numbers_are_read(server: Server) -> None:
    answer = server.post(json.dumps({"image": micrograph().round(4).tolist()}), JSON, pixel_size_um=0.05).json()
    assert answer["field"]["grains"] == expected(server, micrograph().round(4), 0.05).max()


# What is refused


def test_bodies_that_are_no_images_get_a_sentence(server: Server) -> None:
    whole = tiff(IMAGE)
    nan = micrograph().astype(np.float32)
    nan[3, 3] = np.nan
    assert "empty" in server.refusal(400, b"")
    for body in (b"hello", b"%PDF-1.7 and so on", bytes(1000), b"\x00", "Grüße".encode()):
        assert "TIFF, PNG, JPEG or BMP would be right" in server.refusal(422, body)
    for body in (whole[:9000], png(IMAGE)[:5000], imagecodecs.jpeg_encode(IMAGE)[:1000], whole[:8], png(IMAGE)[:8], b"\xff\xd8\xff"):
        assert re.match(r"image\.(tif|png|jpg) ", server.refusal(422, body)), "it names no file of the server"
    assert "NaN" in server.refusal(422, tiff(nan))
    assert "complex" in server.refusal(422, tiff(micrograph().astype(np.complex64)))
    assert "too small" in server.refusal(422, png(IMAGE[:20]))
    assert "no contrast" in server.refusal(422, png(np.full((160, 160), 7, np.uint8)))


@pytest.mark.parametrize(("size", "status"), [(-1, 422), (0, 422), ("nan", 422), ("inf", 422), (1e300, 422), ("x", 400), ("", 400)])
def test_wrong_pixel_sizes_get_a_sentence(server: Server, size: Any, status: int) -> None:
    assert "pixel_size_um" in server.refusal(status, png(IMAGE), pixel_size_um=size)


@pytest.mark.parametrize("text", [
    "", "{", "[" * 100_000, "[]", "3", "null", "{}", '{"image": ""}', '{"image": null}', '{"image": 3}', '{"image": {}}', '{"image": "@@@@"}',
    '{"image": "aGVsbG8="}', '{"image": []}', '{"image": [[]]}', '{"image": [[1, 2], [3]]}', '{"image": [["a"]]}', '{"image": [[NaN, 1], [2, 3]]}',
    '{"image": [[1e999]]}', f'{{"image": [[1{"0" * 30}]]}}', f'{{"image": [[1{"0" * 5000}]]}}', '{"image": [[[[[1]]]]]}', '{"image": [[true, null]]}',
    '{"image": [[1, 2], [3, 4]], "pixel_size": 1}', b"\xff\xfe",
    *(f'{{"image": [[1, 2], [3, 4]], "pixel_size_um": {size}}}' for size in ("true", '"0.05"', "[1]", "-1", "1" + 400 * "0", "NaN")),
])
def test_wrong_json_gets_a_sentence(server: Server, text: str | bytes) -> None:
    status = server.post(text, JSON).status_code
    assert status in (400, 422)
    assert server.refusal(status, text, JSON)


def test_wrong_requests_get_a_sentence(server: Server) -> None:
    form = {"Content-Type": "multipart/form-data; boundary=x"}
    assert "--data-binary" in server.refusal(415, png(IMAGE), form)
    assert "pixel_size_um would be right" in server.refusal(400, png(IMAGE), pixel_size=0.05)
    assert "text/csv" in server.refusal(406, png(IMAGE), {"Accept": "video/mp4"})
    for method, path, status in (("GET", "/segment", 405), ("POST", "/nothing", 404)):
        answer = httpx.request(method, f"{server.url}{path}")
        assert answer.status_code == status
        assert answer.json() == {"detail": f"{method} {path} is not served; POST /segment or GET /health would be right"}


def test_a_large_body_is_refused_and_not_read_whole(server: Server) -> None:
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(1000):
            sent += 2**20
            yield bytes(2**20)

    assert "2097152 bytes" in server.refusal(413, bytes(3 * 2**20))
    with memory_stays(server, 100e6), suppress(httpx.TransportError):  # it may hang up on who sends for ever
        assert server.post(endless()).status_code == 413
    assert sent < 200 * 2**20
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(b"POST /segment HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999999\r\n\r\n")
        assert connection.recv(2000).startswith(b"HTTP/1.1 413")


@contextmanager
def memory_stays(server: Server, most: float) -> Iterator[None]:
    """That the server's memory does not grow by more than this, bytes."""
    process = psutil.Process(server.process.pid)
    before = process.memory_info().rss
    yield
    assert process.memory_info().rss < before + most


def bomb_png(side: int) -> bytes:
    """A PNG of a few kilobytes that declares side x side px of zeros."""
    def chunk(kind: bytes, content: bytes) -> bytes:
        return len(content).to_bytes(4) + kind + content + zlib.crc32(kind + content).to_bytes(4)

    header = side.to_bytes(4) * 2 + bytes([8, 0, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000 * 1000))) + chunk(b"IEND", b"")


def test_a_decompression_bomb_is_refused_before_it_is_decoded(server: Server) -> None:
    with memory_stays(server, 100e6):
        assert "at most 3 million" in server.refusal(422, bomb_png(15_000))
        assert "at most 3 million" in server.refusal(422, tiff(np.zeros((4000, 5000), np.uint8), compression="zlib"))
        assert "at most 1 million are taken" in server.refusal(422, tiff(np.zeros((1200, 1200), np.uint8), compression="zlib"))


def test_it_goes_on_after_all_that(server: Server) -> None:
    assert server.post(png(IMAGE)).status_code == 200
    assert httpx.get(f"{server.url}/health").json()["requests"] == 0, "nothing that was refused is inside still"


# Many at once, slow ones, the end


def test_of_two_hundred_at_once_none_is_lost(server: Server) -> None:
    """Of four kinds, so that an answer which went to another asker would show."""
    images = [np.ascontiguousarray(IMAGE[:80 + 16 * k, :80 + 8 * k]) for k in range(4)]
    right = [expected(server, image, 0.05) for image in images]
    assert len({labels.max() for labels in right}) > 1
    together = threading.Barrier(200)

    def ask(number: int) -> bool:
        together.wait()
        answer = server.post(tiff(images[number % 4]), {"Accept": "image/tiff"}, pixel_size_um=0.05)
        return answer.status_code == 200 and np.array_equal(tifffile.imread(io.BytesIO(answer.content)), right[number % 4])

    with ThreadPoolExecutor(200) as pool:
        assert all(pool.map(ask, range(200)))


def test_a_client_that_stalls_or_hangs_up_stops_nobody(server: Server) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    head = b"POST /segment HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\nII*\0"
    stalled = [socket.create_connection((host, int(port))) for _ in range(20)]
    for connection in stalled:
        connection.sendall(head)
    assert server.post(png(IMAGE)).status_code == 200
    for connection in stalled:
        connection.close()
    until = time.monotonic() + 10
    while httpx.get(f"{server.url}/health").json()["requests"] and time.monotonic() < until:
        time.sleep(0.05)
    assert httpx.get(f"{server.url}/health").json()["requests"] == 0


def test_a_full_queue_says_when_to_come_back_and_a_stop_finishes_what_is_inside(store: tuple[dict[str, str], Segmenter]) -> None:
    process = start(store[0], "--queue", "2", "--workers", "1")
    try:
        server = Server(address(process), process, store[1])
        host, port = server.url.removeprefix("http://").split(":")
        body = tiff(IMAGE)
        head = f"POST /segment HTTP/1.1\r\nHost: x\r\nAccept: image/tiff\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        with socket.create_connection((host, int(port)), timeout=60) as first, socket.create_connection((host, int(port)), timeout=60) as second:
            for connection in (first, second):
                connection.sendall(head + body[:100])
            while httpx.get(f"{server.url}/health").json()["requests"] < 2:
                time.sleep(0.02)
            turned_away = server.post(body)
            assert (turned_away.status_code, turned_away.headers["retry-after"]) == (503, "30")
            process.send_signal(signal.SIGTERM)
            for connection in (first, second):
                connection.sendall(body[100:])
            for connection in (first, second):
                assert connection.makefile("rb").readline().startswith(b"HTTP/1.1 200")
        assert process.wait(30) in (0, -signal.SIGTERM)
    finally:
        process.kill()
        process.wait()


def test_a_model_that_was_tampered_with_is_not_served(
        store: tuple[dict[str, str], Segmenter], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    digest, root = registry.version(1).digest, Path(store[0]["MLFLOW_TRACKING_URI"].removeprefix("sqlite:///")).parent / "mlartifacts"
    file, = (path for path in root.rglob("segmenter.safetensors") if folder_digest(path.parent) == digest)
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    monkeypatch.setattr(sys, "argv", ["graincast", "serve", "--port", "0"])
    try:
        with pytest.raises(SystemExit) as end:
            main()
    finally:
        file.write_bytes(content)
    assert end.value.code == 2
    assert re.search(r"^graincast: model .* has been tampered with", capsys.readouterr().err, re.MULTILINE)


# The model through MLflow


def test_the_registered_model_takes_what_people_have(store: tuple[dict[str, str], Segmenter]) -> None:
    model = mlflow.pyfunc.load_model(f"models:/{registry.MODEL}@champion")
    right = store[1].segment_micrograph(from_array(IMAGE), 0.05)
    forms = [IMAGE, tiff(IMAGE), png(IMAGE), base64.b64encode(png(IMAGE)).decode()]
    found = model.predict(pd.DataFrame({"image": forms, "pixel_size_um": [0.05] * 3 + [None]}))
    for labels, grains, size in zip(found["labels"], found["grains"], found["pixel_size_um"], strict=True):
        assert labels.dtype == np.int32
        assert len(grains) == labels.max()
        assert ("area_px2" in grains[0]) == pd.isna(size)
    for labels in found["labels"][:3]:
        np.testing.assert_array_equal(labels, right)
    assert len(model.predict(pd.DataFrame({"image": [np.rint(4095 * micrograph()).astype(np.uint16)]}))) == 1
    with pytest.raises(UserError, match=r"image 2: .* TIFF, PNG, JPEG or BMP"):
        model.predict(pd.DataFrame({"image": [IMAGE, b"hello"]}))
    assert as_micrograph(model.input_example["image"][0]).image.shape == (160, 160)


def test_a_single_image_will_do_where_mlflow_does_not_stand_between(store: tuple[dict[str, str], Segmenter]) -> None:
    served = ServedSegmenter(store[1])
    for image in (IMAGE, png(IMAGE)):
        assert served.predict(image)["labels"][0].shape == IMAGE.shape


# The package


@pytest.mark.slow
def test_the_package_passes_the_tests_of_its_library_and_predicts_as_graincast_does(tmp_path: Path) -> None:
    from bioimageio.core import test_model as validate
    from bioimageio.spec import load_model_description

    settings = SegmenterConfig(precision="float32").model_dump()
    segmenter = Segmenter(build_network("Unet", "resnet18", None).eval(), Cut(30, merge_level=0.3), settings, PREPARATION)
    package = bioimage.write_package(segmenter, tmp_path / "model.zip")
    summary = validate(package)
    assert summary.status == "passed", summary.format()
    described = load_model_description(package)
    assert described.format_version.startswith("0.5.")
    assert described.config.model_dump()["graincast"]["cut"]["merge_level"] == 0.3
    with zipfile.ZipFile(package) as file:
        file.extractall(tmp_path / "model")
    assert folder_digest(package_of(tmp_path / "model", "segmenter.safetensors")) == folder_digest(saved(segmenter, tmp_path / "saved"))
    image = np.ascontiguousarray(IMAGE[:128, :96])
    session = onnxruntime.InferenceSession(tmp_path / "model" / "segmenter.onnx", providers=["CPUExecutionProvider"])
    given = np.stack([standardise(image), standardise(255 - image), standardise(image)])[:, None]
    logits, = session.run(None, {"micrograph": given})
    with torch.no_grad():
        np.testing.assert_allclose(logits, segmenter.network(torch.from_numpy(given)).numpy(), atol=1e-4)
    with pytest.raises(UserError, match=r"ends in \.zip"):
        bioimage.write_package(segmenter, tmp_path / "model.tar")


def package_of(folder: Path, name: str) -> Path:
    """A folder with nothing but that file of another."""
    alone = folder / "alone"
    alone.mkdir()
    return (folder / name).rename(alone / name).parent


def saved(segmenter: Segmenter, folder: Path) -> Path:
    folder.mkdir()
    segmenter.save(folder)
    return folder
