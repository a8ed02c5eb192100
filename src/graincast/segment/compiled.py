"""The network compiled for the processor by OpenVINO: the same weights and maps in a fraction of the time.

Against torch in its faster layout it takes about half the time in float32, with maps that agree to some 1e-6, and a third in
bfloat16, with maps that are nearer to those of float32 than torch's bfloat16 comes (``python -m benchmarks.segment_throughput``).
"""

from __future__ import annotations

import sys
import threading
import warnings
from typing import TYPE_CHECKING

import numpy as np
import torch

from graincast.compute import has_fast_bfloat16
from graincast.segment.network import STRIDE

if TYPE_CHECKING:
    from graincast.segment.segmenter import Run

sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # OpenVINO then does without: it would report each conversion
import openvino  # type: ignore[import-untyped]  # noqa: E402


def compiled(network: torch.nn.Module, precision: str, threads: int | None = None) -> Run:
    """Compile a network.

    Parameters
    ----------
    network : torch.nn.Module
        In evaluation mode, on the processor.
    precision : str
        As for `graincast.compute.autocast`.
    threads : int, optional
        Images that are predicted at the same time, each by one thread; None: one image by as many threads as torch uses.

    Returns
    -------
    callable
        From a standardised image, float32 (height, width), sides multiples of `STRIDE`, to its maps, float32
        (2, height, width) in [0, 1]. Any thread may call it.
    """
    narrow = precision == "bfloat16" or (precision == "auto" and has_fast_bfloat16(torch.device("cpu")))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own of the tracer that OpenVINO calls
        model = openvino.convert_model(network, example_input=torch.zeros(1, 1, 2 * STRIDE, 2 * STRIDE))
    settings = {"INFERENCE_PRECISION_HINT": "bf16" if narrow else "f32", "NUM_STREAMS": threads or 1,
                "INFERENCE_NUM_THREADS": threads or torch.get_num_threads()}
    ready = openvino.Core().compile_model(model, "CPU", settings)
    own = threading.local()

    def run(image: np.ndarray) -> np.ndarray:
        if not hasattr(own, "request"):
            own.request = ready.create_infer_request()
        logits = own.request.infer({0: np.ascontiguousarray(image)[None, None]}, share_outputs=True)[0][0]
        return torch.sigmoid(torch.from_numpy(logits)).numpy()

    return run
