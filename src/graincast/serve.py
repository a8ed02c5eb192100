"""A segmenter behind HTTP: a micrograph in, its labels and its table of grains out.

=======  ============  ==========================================================================================
method   path          what it does
=======  ============  ==========================================================================================
POST     ``/segment``  segments the image in the body; ``?pixel_size_um=0.05`` for one that does not know its own
GET      ``/health``   says which model serves, and how many requests are inside
=======  ============  ==========================================================================================

Why not ``mlflow models serve``: it reads bodies of any size whole, answers wrong ones with a traceback, loads a model
without asking whether its bytes are the registered ones, and gives up on what has waited for a minute (docs/serving.md).
"""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import os
import tempfile
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import ClientDisconnect

from graincast.errors import UserError
from graincast.export.kinds import KINDS, Segmented
from graincast.found import Found
from graincast.microscope.reader import Micrograph
from graincast.segment.segmenter import Segmenter
from graincast.store import registry
from graincast.store.imageset import folder_digest
from graincast.store.pyfunc import IMAGE, PIXEL_SIZE, ServedSegmenter, as_micrograph, records

logger = logging.getLogger(__name__)

ROOM_BYTES = 512 * 2**20
"""Bytes of bodies that are held in memory; further ones wait in the network until there is room."""
BODY_SECONDS = 60.0
"""Longest time that a body may take to arrive once there is room for it, s."""
LINGER_SECONDS, LINGER_BYTES = 2.0, 64 * 2**20
"""How long and how much of a refused body is read and dropped: a client that is still sending would not see the answer else."""
SHUTDOWN_SECONDS = 300
"""How long requests that are inside are given to finish once the server was told to stop, s."""
RETRY_SECONDS = 30
"""What a client is told to wait when the queue is full, s."""
MOST_WORKERS = 4


@dataclass(frozen=True)
class Limits:
    """What the server takes.

    Attributes
    ----------
    body_bytes : int
        Largest body, bytes.
    image_px : int
        Largest image, px; segmenting takes some hundred bytes for each.
    queue : int
        Requests that may be inside at once, waiting or worked on; further ones are told to come back.
    workers : int
        Images that are segmented at once.
    """

    body_bytes: int = 64 * 2**20
    image_px: int = 25_000_000
    queue: int = 1000
    workers: int = field(default_factory=lambda: min(MOST_WORKERS, os.cpu_count() or 1))


@dataclass(frozen=True)
class Model:
    """A segmenter that serves, and which one it is: its version (None: of no registry) and the DVC hash of its bytes."""

    segmenter: Segmenter
    version: int | None
    digest: str

    @classmethod
    def load(cls, reference: str | None = None) -> Model:
        """Load a model after its bytes have been verified; `reference` and errors are those of `registry.load_segmenter`."""
        if reference and Path(reference).is_dir():
            return cls(Segmenter.load(Path(reference)), None, folder_digest(Path(reference)))
        with tempfile.TemporaryDirectory(prefix="graincast-") as scratch:
            folder = registry.fetch(reference, Path(scratch) / "segmenter")
            digest = folder_digest(folder)
            number = next((found.number for found in registry.versions() if found.digest == digest), None)
            return cls(Segmenter.load(folder), number, digest)

    def to_dict(self) -> dict[str, Any]:
        """For answers."""
        return {"name": registry.MODEL, "version": self.version, "dvc_md5": self.digest}


def serve(model: Model, host: str, port: int, limits: Limits) -> None:
    """Serve until SIGTERM or Ctrl-C; requests that are inside then are finished first."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    uvicorn.run(build_app(model, limits), host=host, port=port, http="h11", log_config=None, server_header=False,
                timeout_graceful_shutdown=SHUTDOWN_SECONDS)


def build_app(model: Model, limits: Limits) -> FastAPI:
    """The application; `serve` runs it."""
    desk = _Desk(model, limits)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        desk.pool.shutdown(cancel_futures=True)

    # no pages of its own: they would fetch their scripts from elsewhere
    app = FastAPI(title="graincast", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    app.add_api_route("/segment", desk.segment, methods=["POST"])
    app.add_api_route("/health", desk.health, methods=["GET"])
    for status in (404, 405):
        app.add_exception_handler(status, _elsewhere)
    app.add_exception_handler(UserError, _refused)
    app.add_exception_handler(ClientDisconnect, _gone)
    app.add_exception_handler(Exception, _failed)
    return app


class _Room:
    """Bytes that may be held at once, given out first come, first served, so that a large body is not passed by for ever."""

    def __init__(self, free: int) -> None:
        self.free, self.turn, self.freed = free, asyncio.Lock(), asyncio.Event()

    @asynccontextmanager
    async def taken(self, size: int) -> AsyncIterator[None]:
        async with self.turn:
            while self.free < size:
                self.freed.clear()
                await self.freed.wait()
            self.free -= size
        try:
            yield
        finally:
            self.free += size
            self.freed.set()


class _Desk:
    """Takes requests in, has them worked on in their order, and answers."""

    def __init__(self, model: Model, limits: Limits) -> None:
        self.model, self.limits, self.inside = model, limits, 0
        self.served = ServedSegmenter(model.segmenter.compile(limits.workers))
        self.room = _Room(max(ROOM_BYTES, limits.body_bytes))
        self.free_workers = asyncio.Semaphore(limits.workers)
        threads = max((os.cpu_count() or 1) // limits.workers, 1)
        self.pool = ThreadPoolExecutor(limits.workers, "segment", torch.set_num_threads, (threads,))

    async def health(self) -> Response:
        return JSONResponse({"status": "ok", "model": self.model.to_dict(), "requests": self.inside})

    async def segment(self, request: Request) -> Response:
        answer, media_type = _answer_for(request.headers.get("accept", "*/*"))
        size = _pixel_size(request)
        is_json = _is_json(request.headers.get("content-type", ""))
        if self.inside >= self.limits.queue:
            sentence = f"{self.inside} requests are inside already; try again in {RETRY_SECONDS} s"
            raise HTTPException(503, sentence, {"Retry-After": str(RETRY_SECONDS)})
        self.inside += 1
        try:
            declared = self._declared(request)
            if declared > self.limits.body_bytes:
                raise await self._too_large(request)
            async with self.room.taken(declared):
                body = await self._body(request)
                async with self.free_workers:
                    if await request.is_disconnected():  # nobody waits for it any more
                        raise ClientDisconnect
                    job = (body, is_json, size, answer)
                    content = await asyncio.get_running_loop().run_in_executor(self.pool, self._work, *job)
            return Response(content, media_type=media_type)
        finally:
            self.inside -= 1

    def _declared(self, request: Request) -> int:
        """What the body may need: what its sender says, else the most that is taken; of chunks, a length says nothing (RFC 9112, 6.3)."""
        length = None if "transfer-encoding" in request.headers else request.headers.get("content-length")
        return int(length) if length else self.limits.body_bytes  # that it is a number, h11 has made sure

    async def _body(self, request: Request) -> bytes:
        content = bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for chunk in request.stream():
                    content += chunk
                    if len(content) > self.limits.body_bytes:
                        raise await self._too_large(request)
        except TimeoutError:
            raise HTTPException(408, f"the body did not arrive within {BODY_SECONDS:.0f} s", {"Connection": "close"}) from None
        if not content:
            raise HTTPException(400, "the body is empty; the bytes of a TIFF, PNG, JPEG or BMP would be right")
        return bytes(content)

    async def _too_large(self, request: Request) -> HTTPException:
        await _drop(request)
        sentence = f"the body has more than the {self.limits.body_bytes} bytes that are taken; a part of the image would be right"
        return HTTPException(413, sentence, {"Connection": "close"})

    def _work(self, body: bytes, is_json: bool, pixel_size_um: float | None, answer: Answer) -> bytes:
        """In a thread of the pool."""
        image: Any = body
        if is_json:
            image, pixel_size_um = _from_json(body, pixel_size_um)
        micrograph = as_micrograph(image, 3 * self.limits.image_px)  # a grey image may be stored as RGB
        if micrograph.image.size > self.limits.image_px:
            height, width = micrograph.image.shape
            raise UserError(f"the image has {width} x {height} px, at most {self.limits.image_px / 1e6:.3g} million are taken; "
                            "a part of it would be right")
        return answer(self.model, micrograph, self.served.segment(micrograph, pixel_size_um))


async def _drop(request: Request) -> None:
    """Read and forget what is still coming, for a while: the answer is lost where a connection is closed on a client that sends."""
    dropped = 0
    try:
        async with asyncio.timeout(LINGER_SECONDS):
            async for chunk in request.stream():
                dropped += len(chunk)
                if dropped > LINGER_BYTES:
                    return
    except (TimeoutError, RuntimeError):  # Starlette gives a stream out once
        return


# What is asked


def _pixel_size(request: Request) -> float | None:
    for name in request.query_params:
        if name != PIXEL_SIZE:
            raise HTTPException(400, f"there is no parameter '{name}'; {PIXEL_SIZE} would be right")
    text = request.query_params.get(PIXEL_SIZE)
    if text is None:
        return None
    try:
        return float(text)
    except ValueError:
        raise HTTPException(400, f"{PIXEL_SIZE} '{text[:40]}' is no number; micrometres, e.g. 0.05, would be right") from None


def _is_json(content_type: str) -> bool:
    kind = content_type.partition(";")[0].strip().lower()
    if kind.startswith("multipart/"):
        raise HTTPException(415, "a form is not read; the image itself as the body would be right: curl --data-binary @image.tif")
    return kind == "application/json"


def _from_json(body: bytes, pixel_size_um: float | None) -> tuple[Any, float | None]:
    """Image and pixel size of a JSON body."""
    right = f'{{"{IMAGE}": "base64 of a TIFF, PNG, JPEG or BMP", "{PIXEL_SIZE}": 0.05}} would be right'
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError):
        raise HTTPException(400, f"the body is no JSON; {right}") from None
    if not isinstance(asked, dict) or IMAGE not in asked or not asked.keys() <= {IMAGE, PIXEL_SIZE}:
        raise HTTPException(400, f"the JSON has not the keys that are wanted; {right}")
    return asked[IMAGE], asked.get(PIXEL_SIZE, pixel_size_um)


# What is answered


def _as_json(model: Model, micrograph: Micrograph, found: Found) -> bytes:
    labels = base64.b64encode(_as_file("labels", model, micrograph, found)).decode()
    answer = {"model": model.to_dict(), PIXEL_SIZE: found.pixel_size_um, "field": found.sizes.to_dict(), "warnings": found.warnings,
              "grains": records(found.grains), "labels": {"media_type": "image/tiff", "encoding": "base64", "data": labels}}
    return json.dumps(answer, allow_nan=False).encode()


def _as_file(kind: str, model: Model, micrograph: Micrograph, found: Found) -> bytes:
    """What `graincast segment` would write of this kind."""
    segmented = Segmented.of("image", micrograph.image, found)
    with tempfile.TemporaryDirectory(prefix="graincast-") as folder:
        path = Path(folder, f"image{KINDS[kind].suffix}")
        KINDS[kind].write(segmented, path)
        return path.read_bytes()


Answer = Callable[[Model, Micrograph, Found], bytes]
_ANSWERS: dict[str, Answer] = {
    "application/json": _as_json,
    **{media_type: partial(_as_file, kind) for media_type, kind in {
        "image/tiff": "labels", "image/png": "overlay", "text/csv": "csv", "application/vnd.apache.parquet": "parquet",
        "application/zip": "roi", "application/geo+json": "geojson"}.items()},
}
"""What an answer may be, by its media type: everything, or one of the exports."""
_ANY = {"*/*": "application/json", "application/*": "application/json", "image/*": "image/tiff", "text/*": "text/csv"}


def _answer_for(accept: str) -> tuple[Answer, str]:
    """The first of the asker's kinds that there is."""
    for wanted in accept.lower().split(","):
        kind = wanted.partition(";")[0].strip()
        kind = _ANY.get(kind, kind)
        if kind in _ANSWERS:
            return _ANSWERS[kind], kind
    raise HTTPException(406, f"there is no answer of the kind that Accept names; {', '.join(_ANSWERS)} would be right")


async def _elsewhere(request: Request, error: Exception) -> Response:
    assert isinstance(error, StarletteHTTPException)
    sentence = f"{request.method} {request.url.path[:100]} is not served; POST /segment or GET /health would be right"
    return JSONResponse({"detail": sentence}, error.status_code, error.headers)


async def _refused(request: Request, error: Exception) -> Response:
    return JSONResponse({"detail": str(error)}, 422)


async def _gone(request: Request, error: Exception) -> Response:
    logger.info("a client hung up before it was answered")
    return Response(status_code=499)  # nobody reads it


async def _failed(request: Request, error: Exception) -> Response:
    """A defect: its traceback goes to the log (Starlette raises it again) and not to the client."""
    return JSONResponse({"detail": "the server failed on this image; its log says why"}, 500)
