"""A segmenter as a BioImage.IO model, for programs that run such: Fiji (deepImageJ), ilastik, QuPath, ...

The package is described by the specification 0.5 [1]_: ``rdf.yaml``, weights as ONNX, tensors to test them with, documentation, a
cover. It holds the network alone, from a prepared image to its maps; preparing a micrograph and cutting the maps into grains is
graincast's, which finds its own ``segmenter.safetensors`` in the package.

References
----------
.. [1] W. Ouyang et al., "BioImage Model Zoo: a community-driven resource for accessible deep learning in bioimage analysis",
   bioRxiv (2022), doi:10.1101/2022.06.07.495102; https://bioimage-io.github.io/spec-bioimage-io/.
"""

from __future__ import annotations

import logging
import os
import tempfile
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
import torch

from graincast.config import VirtualSem
from graincast.errors import UserError
from graincast.evaluate.overlay import overlay
from graincast.microscope.preparation import Preparation, prepare
from graincast.microscope.virtual_sem import render
from graincast.segment.network import DEPTH_PX, STRIDE, standardise
from graincast.segment.segmenter import WEIGHTS, Segmenter
from graincast.simulate.tessellation import tessellate
from graincast.store.imageset import whole_file

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # ONNX Runtime, which tests the package, would report it, and keep an id in the home

OPSET = 20
"""ONNX operators' version, of 2023: what runs on ONNX Runtime 1.17 and later."""
SIDE, EXPORTED_SIDE = 256, 128
"""Sides of the test image and of the one that the export traces the network with, px."""
HALO = 32
"""Rim of a tile whose prediction other programs are told to drop, px."""
GRAIN_PX, PIXEL_UM = 24.0, 0.05
"""Grain diameter and pixel size of the test image where the segmenter does not name its own, px, um."""
CITED = {"O. Ronneberger, P. Fischer, T. Brox: U-Net (2015)": "10.1007/978-3-319-24574-4_28",
         "J.-Y. Zhu, T. Park, P. Isola, A. A. Efros: CycleGAN (2017)": "10.1109/ICCV.2017.244"}

DOCUMENTATION = """# Grain boundaries in micrographs

Finds the boundaries of grains in scanning electron micrographs of polycrystals. No micrograph was labelled by hand for it: grains grew
in a phase-field simulation, a CycleGAN drew them as the microscope would, and the network was trained on that, after the method of
Zahran et al. 2026, *Physics Informed Generative AI Enabling Labour Free Segmentation For Microscopy Analysis* (phase field, CycleGAN,
U-Net).

**Input**: a micrograph in grey, 0 to 255, without its info bar, resampled so that grains are about {grain_px:.0f} px wide{pixel}{clahe}.

**Output**: `boundary`, the probability that a pixel lies on a boundary line (2 px wide), and `depth`, the distance to the nearest line as a
share of {depth:g} px, 1 further inside. graincast cuts these into grains by a watershed whose seeds are the peaks of the depth
(settings: `config.graincast.cut` in `rdf.yaml`).

## Validation

On micrographs of the kind that it was trained for, compare the boundaries with the image. It was trained for one
look of micrographs; on others (another detector, etching, bright boundaries where they were dark) it fails, with wrong grains and no
warning. `segmenter.safetensors` is graincast's own file of the model, with the preparation that it was trained with:
`graincast segment micrographs --out results --model FOLDER` with the folder that holds it does the whole way from file to grains.
"""


def write_package(segmenter: Segmenter, out: Path) -> Path:
    """Write a segmenter as a BioImage.IO model, format 0.5, after the library's own test has passed it.

    Parameters
    ----------
    segmenter : Segmenter
        On the CPU.
    out : Path
        The .zip to write; it appears when it is whole and tested, and replaces an older one.

    Returns
    -------
    Path
        `out`.

    Raises
    ------
    UserError
        If `out` is no .zip in a folder that is there.
    RuntimeError
        If the library's test fails, which would be a defect of graincast.
    """
    from bioimageio.core import test_model
    from bioimageio.spec import save_bioimageio_package

    out = Path(out)
    if out.suffix.lower() != ".zip" or not out.parent.is_dir():
        raise UserError(f"{out} cannot be written; a name that ends in .zip, in a folder that is there, would be right")
    _quiet()
    image = _test_image(segmenter.preparation)
    with tempfile.TemporaryDirectory(prefix="graincast-") as scratch, whole_file(out) as partial:
        description = _describe(segmenter, image, Path(scratch))
        written = save_bioimageio_package(description, output_path=Path(scratch) / "package.zip")
        summary = test_model(written)
        if summary.status != "passed":
            raise RuntimeError(f"the package does not pass bioimageio's test:\n{summary.format()}")
        partial.write_bytes(Path(written).read_bytes())
    return out


def _describe(segmenter: Segmenter, image: np.ndarray, folder: Path) -> Any:
    """The model's description; the files that it names are written to `folder`."""
    from bioimageio.spec.model import v0_5 as spec

    def file(name: str) -> Any:
        return spec.FileDescr(source=folder / name)

    with torch.no_grad():
        maps = torch.sigmoid(segmenter.network(torch.from_numpy(standardise(image))[None, None])).numpy()
    np.save(folder / "image.npy", image[None, None])
    np.save(folder / "maps.npy", maps)
    iio.imwrite(folder / "image.png", image)
    iio.imwrite(folder / "cover.png", overlay(image, segmenter.segment(image)))
    (folder / "README.md").write_text(_documentation(segmenter.preparation))
    segmenter.save(folder)
    _export(segmenter.network, folder / "segmenter.onnx")
    pixel_um = segmenter.preparation.target_pixel_size_um if segmenter.preparation else None
    place: dict[str, Any] = {"unit": "micrometer", "scale": pixel_um} if pixel_um else {}
    sides = [spec.SpaceInputAxis(id=spec.AxisId(axis), size=spec.ParameterizedSize(min=2 * HALO + STRIDE, step=STRIDE), **place) for axis in "yx"]
    given = spec.InputTensorDescr(
        id=spec.TensorId("micrograph"), description="prepared micrograph, grey",
        axes=[spec.BatchAxis(), spec.ChannelAxis(channel_names=[spec.Identifier("grey")]), *sides],
        data=spec.IntervalOrRatioDataDescr(type="uint8", range=(0, 255)), test_tensor=file("image.npy"), sample_tensor=file("image.png"),
        preprocessing=[spec.ZeroMeanUnitVarianceDescr(kwargs=spec.ZeroMeanUnitVarianceKwargs(axes=[spec.AxisId(a) for a in ("channel", "y", "x")])),
                       spec.EnsureDtypeDescr(kwargs=spec.EnsureDtypeKwargs(dtype="float32"))])  # or the input's would be ensured
    sides_out = [spec.SpaceOutputAxisWithHalo(id=spec.AxisId(axis), halo=HALO, **place,
                                              size=spec.SizeReference(tensor_id=given.id, axis_id=spec.AxisId(axis))) for axis in "yx"]
    found = spec.OutputTensorDescr(
        id=spec.TensorId("maps"), description="boundary probability, and depth inside the grain",
        axes=[spec.BatchAxis(), spec.ChannelAxis(channel_names=[spec.Identifier("boundary"), spec.Identifier("depth")]), *sides_out],
        data=spec.IntervalOrRatioDataDescr(type="float32", range=(0, 1)), test_tensor=file("maps.npy"),
        postprocessing=[spec.SigmoidDescr()])
    settings = {"cut": asdict(segmenter.cut), "preparation": segmenter.preparation.to_dict() if segmenter.preparation else None}
    return spec.ModelDescr(
        name="graincast grain boundaries", description="Boundaries of grains in scanning electron micrographs, trained without human labels",
        covers=[file("cover.png")], documentation=file("README.md"), attachments=[file(WEIGHTS)],
        authors=[spec.Author(name="graincast")], license=spec.LicenseId("Apache-2.0"),
        cite=[spec.CiteEntry(text=text, doi=spec.Doi(doi)) for text, doi in CITED.items()],
        tags=["segmentation", "grains", "materials", "scanning-electron-microscopy", "unet", "2d"],
        inputs=[given], outputs=[found], config=spec.Config(graincast=settings),
        weights=spec.WeightsDescr(onnx=spec.OnnxWeightsDescr(source=folder / "segmenter.onnx", opset_version=OPSET)))


def _export(network: torch.nn.Module, path: Path) -> None:
    """The network, logits out, as ONNX for images of any number and sides that are multiples of `STRIDE`."""
    batch, side = torch.export.Dim("batch"), torch.export.Dim.DYNAMIC
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of the exporter's own makings
        torch.onnx.export(network, (torch.zeros(2, 1, EXPORTED_SIDE, EXPORTED_SIDE),), path, input_names=["micrograph"], output_names=["logits"],
                          opset_version=OPSET, dynamo=True, external_data=False, verbose=False, dynamic_shapes=({0: batch, 2: side, 3: side},))


def _test_image(preparation: Preparation | None) -> np.ndarray:
    """What the network would see of a specimen of the virtual SEM, uint8 (`SIDE`, `SIDE`); always the same."""
    rng = np.random.default_rng(0)
    diameter = preparation.grain_diameter_px if preparation else GRAIN_PX
    labels = tessellate((SIDE, SIDE), max(round(SIDE**2 / (np.pi / 4 * diameter**2)), 4), rng)
    seen = render(labels, PIXEL_UM, VirtualSem(), rng)
    return prepare(seen / np.float32(255), 1.0, preparation.clahe_clip, preparation.clahe_tile_px) if preparation else seen


def _documentation(preparation: Preparation | None) -> str:
    pixel = f" ({preparation.target_pixel_size_um:.3g} um a pixel)" if preparation and preparation.target_pixel_size_um else ""
    clahe = (f", stretched from its 0.1 to its 99.9 percentile and equalised (CLAHE, clip limit {preparation.clahe_clip:g}, "
             f"tiles of {preparation.clahe_tile_px:.0f} px)" if preparation and preparation.clahe_clip else "")
    return DOCUMENTATION.format(grain_px=preparation.grain_diameter_px if preparation else GRAIN_PX, pixel=pixel, clahe=clahe, depth=DEPTH_PX)


def _quiet() -> None:
    """bioimageio says on the terminal what it does, through a logger of its own kind; the exporter through Python's."""
    from loguru import logger

    logger.disable("bioimageio")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
