"""Large micrographs: windows of files, the compiled network, exact merging, seams, tables; each against the whole image at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import imageio.v3 as iio
import numpy as np
import pandas as pd
import pytest
import tifffile
import torch
from scipy import ndimage as ndi
from skimage import graph, segmentation
from skimage.morphology import reconstruction
from torch import nn

import graincast.segment.instances
import graincast.segment.segmenter
from graincast.errors import UserError
from graincast.evaluate.metrics import score_grains, score_instances
from graincast.measure.grains import measure_grains
from graincast.microscope.preparation import Preparation
from graincast.microscope.reader import Micrograph, read_micrograph
from graincast.microscope.streamed import StreamedMicrograph
from graincast.segment import tiled
from graincast.segment.compiled import compiled
from graincast.segment.instances import Cut, _flood, _merge_weak, _peaks, _reconstructed, instances
from graincast.segment.network import STRIDE, build_network, standardise
from graincast.segment.segmenter import Segmenter, eager
from graincast.simulate.tessellation import tessellate

PREPARATION = Preparation(target_pixel_size_um=0.05, scale=None, grain_diameter_px=25.0, clahe_clip=0.0, clahe_tile_px=100.0, cut_info_bar=True,
                          min_size=64, max_saturated=0.5, min_contrast=0.01, default_pixel_size_um=None)


class Dark(nn.Module):
    """A network by hand for dark lines: the boundary is where it is dark, the depth how far away the darkness is."""

    def __init__(self) -> None:
        super().__init__()
        self.near = nn.Conv2d(1, 1, 3, padding=1, padding_mode="replicate")
        self.wide = nn.Conv2d(1, 1, 9, padding=4, padding_mode="replicate")
        with torch.no_grad():
            for conv, gain, level in ((self.near, -4.0, -2.5), (self.wide, 5.0, 0.0)):
                conv.weight.fill_(gain / conv.weight.numel())
                conv.bias.fill_(level)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.near(x), self.wide(x)], dim=1)


class Pooled(Dark):
    """With a coarse view, as that of an encoder: what it sees depends on where the image lies on its grid of `STRIDE` px."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        maps = super().forward(x)
        coarse = nn.functional.avg_pool2d(maps[:, :1], STRIDE)
        return maps + 3 * nn.functional.interpolate(coarse + 1.6, scale_factor=STRIDE)


def grey_grains(shape: tuple[int, int], grains: int, seed: int = 0) -> np.ndarray:
    """A picture, uint8, of grains with dark, noisy and here and there faint boundaries."""
    rng = np.random.default_rng(seed)
    labels = tessellate(shape, grains, rng)
    line = ndi.gaussian_filter(segmentation.find_boundaries(labels).astype(float), 0.7)
    faint = np.clip(1 + ndi.gaussian_filter(rng.standard_normal(shape), 12) * 12, 0.2, 1)
    return np.clip(190 - 150 * line * faint + rng.normal(0, 6, shape), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def segmenter() -> Segmenter:
    return Segmenter(Dark().eval(), Cut(40), {"precision": "float32"}, PREPARATION)


@pytest.fixture(scope="module")
def field() -> np.ndarray:
    return grey_grains((700, 900), 1000)


def write(path: Path, image: np.ndarray, pixel_size_um: float = 0.05, **options) -> Path:
    tifffile.imwrite(path, image, resolution=(1e4 / pixel_size_um,) * 2, resolutionunit="CENTIMETER", **options)
    return path


class TestWindows:
    """Of every kind of TIFF, windows are those of the whole image."""

    GREY = grey_grains((130, 170), 30)
    KINDS: ClassVar = {
        "plain": (GREY, {}),
        "strips": (GREY, {"rowsperstrip": 7, "compression": "zlib"}),
        "tiles": (GREY, {"tile": (32, 48), "compression": "lzw"}),
        "plain tiles": (GREY, {"tile": (16, 16)}),
        "jpeg": (GREY, {"tile": (64, 64), "compression": "jpeg"}),
        "predictor": (GREY.astype(np.uint16) * 99, {"tile": (32, 48), "compression": "zstd", "predictor": True}),
        "big-endian": (GREY.astype(np.uint16) * 99, {"byteorder": ">"}),
        "white is zero": (GREY, {"photometric": "miniswhite", "rowsperstrip": 16}),
        "colour": (np.stack([GREY, GREY // 2, GREY // 3], -1), {"photometric": "rgb", "tile": (32, 32)}),
        "palette": (GREY, {"photometric": "palette", "colormap": np.arange(768, dtype=np.uint16).reshape(3, 256) * 80, "rowsperstrip": 16}),
        "floats": (GREY * 3.5 - 100, {"rowsperstrip": 16, "compression": "zlib"}),
        "signed": (GREY.astype(np.int16) - 500, {}),
        "bilevel": (GREY > 128, {"rowsperstrip": 16, "compression": "packbits"}),
    }

    @pytest.mark.parametrize("kind", KINDS)
    def test_are_those_of_the_whole(self, tmp_path, kind):
        image, options = self.KINDS[kind]
        whole = read_micrograph(write(tmp_path / "m.tif", image, **options))
        with StreamedMicrograph(tmp_path / "m.tif") as file:
            assert (file.shape, file.bit_depth, file.pixel_size_um) == (whole.image.shape, whole.bit_depth, whole.pixel_size_um)
            for rows, columns in ((slice(None), slice(None)), (slice(30, 77), slice(5, 100)), (slice(129, 130), slice(160, 999))):
                np.testing.assert_allclose(file.window(rows, columns), whole.image[rows, columns], atol=1e-6)

    def test_other_formats_are_read_whole(self, tmp_path):
        iio.imwrite(tmp_path / "m.png", self.GREY)
        with StreamedMicrograph(tmp_path / "m.png") as file:
            np.testing.assert_array_equal(file.window(slice(3, 9), slice(5, 50)), read_micrograph(tmp_path / "m.png").image[3:9, 5:50])

    def test_what_cannot_be_streamed_is_named(self, tmp_path):
        path = write(tmp_path / "m.tif", self.GREY)
        path.write_bytes(path.read_bytes()[:9000])
        with pytest.raises(UserError, match=r"m\.tif is truncated"):
            StreamedMicrograph(path)
        tifffile.imwrite(tmp_path / "planes.tif", np.stack([self.GREY] * 3), photometric="rgb", planarconfig="separate")
        with pytest.raises(UserError, match=r"axes SYX.*a plain grey TIFF"):
            StreamedMicrograph(tmp_path / "planes.tif")
        with pytest.raises(UserError, match="is no file"):
            StreamedMicrograph(tmp_path / "none.tif")

    def test_values_that_are_not_finite_are_refused(self, tmp_path):
        image = self.GREY / np.float32(255)
        image[50, 60] = np.nan
        with StreamedMicrograph(write(tmp_path / "m.tif", image, rowsperstrip=16)) as file, pytest.raises(UserError, match="NaN"):
            file.window(slice(40, 60), slice(40, 70))

    def test_a_file_that_changes_meanwhile_is_refused(self, tmp_path, segmenter, field):
        path = write(tmp_path / "m.tif", field)
        with pytest.raises(UserError, match="changed while it was read"):
            tiled.segment_large(segmenter, path, tmp_path / "labels.tif", progress=lambda *_: os.utime(path, ns=(1, 1)))
        assert [file.name for file in tmp_path.iterdir()] == ["m.tif"]


def merged_by_skimage(grains: np.ndarray, boundary: np.ndarray, level: float) -> np.ndarray:
    """What `_merge_weak` computes, through scikit-image's region adjacency graph."""
    def joint(neighbours: graph.RAG, kept: int, merged: int, other: int) -> dict[str, float]:
        parts = [neighbours[grain].get(other, {"weight": 0.0, "count": 0}) for grain in (kept, merged)]
        count = sum(part["count"] for part in parts)
        return {"count": count, "weight": sum(part["count"] * part["weight"] for part in parts) / count}

    neighbours = graph.rag_boundary(grains, boundary.astype(np.float64), connectivity=1)
    return graph.merge_hierarchical(grains, neighbours, level, rag_copy=False, in_place_merge=True, merge_func=lambda *_: None, weight_func=joint)


def same_partition(one: np.ndarray, other: np.ndarray) -> bool:
    pairs = np.unique(np.stack([one.ravel(), other.ravel()]), axis=1).shape[1]
    return pairs == len(np.unique(one)) == len(np.unique(other))


class TestExactMerging:
    @pytest.mark.parametrize("seed", range(3))
    @pytest.mark.parametrize("level", [0.0, 0.3, 0.5, 0.7, 1.1])
    def test_is_that_of_scikit_image(self, seed, level):
        rng = np.random.default_rng(seed)
        boundary = ndi.gaussian_filter(rng.random((200, 260)), 3)
        boundary = ((boundary - boundary.min()) / np.ptp(boundary)).astype(np.float32)
        grains = segmentation.watershed(boundary, _peaks(1 - boundary, 0.02)[0])
        assert grains.max() > 100
        found = _merge_weak(grains, boundary, level)
        assert same_partition(found, merged_by_skimage(grains, boundary, level))

    @pytest.mark.parametrize("shape", [(200, 260), (70, 3), (1, 90), (900, 700)])
    @pytest.mark.parametrize("rise", [3000, 0, 65535])
    def test_reconstruction_is_that_of_scikit_image(self, monkeypatch, shape, rise):
        monkeypatch.setattr(graincast.segment.instances, "BAND_PX", 20_000)
        hilly = ndi.gaussian_filter(np.random.default_rng(0).random(shape), 4)
        mask = np.rint(65535 * (hilly - hilly.min()) / np.ptp(hilly)).astype(np.uint16)
        marker = mask - np.minimum(mask, np.uint16(rise))
        np.testing.assert_array_equal(_reconstructed(marker.copy(), mask), reconstruction(marker, mask, footprint=np.ones((3, 3))))

    def test_reconstruction_finds_the_end_of_a_maze(self):
        mask = np.full((61, 61), 9, np.uint16)
        mask[1::4, 1:] = mask[3::4, :-1] = 0
        marker = np.zeros_like(mask)
        marker[0, 0] = 7
        np.testing.assert_array_equal(_reconstructed(marker, mask), np.minimum(mask, 7))

    @pytest.mark.parametrize("low", [-1.0, -0.4, 0.2])
    def test_watershed_is_that_of_scikit_image(self, low):
        """Wherever level 0 lies: above most lines, in their middle, below every basin."""
        rng = np.random.default_rng(0)
        hilly = ndi.gaussian_filter(rng.random((300, 400)), 3)
        landscape = (low + (hilly - hilly.min()) / np.ptp(hilly)).astype(np.float32)
        seeds, count = _peaks(landscape.max() - landscape, 0.1)
        assert count > 100
        np.testing.assert_array_equal(_flood(landscape, seeds), segmentation.watershed(landscape, seeds))

    def test_small_grains_are_dissolved_as_by_flooding_all_anew(self):
        rng = np.random.default_rng(0)
        boundary = ndi.gaussian_filter(rng.random((200, 260)), 3)
        boundary = ((boundary - boundary.min()) / np.ptp(boundary)).astype(np.float32)
        maps = np.stack([boundary, 1 - boundary])
        before = instances(maps, Cut(0, rise=0.02, merge_level=0.3))
        small = np.bincount(before.ravel()) < 200
        assert 10 < small.sum() < len(small) / 2
        anew = segmentation.watershed(2 * boundary - 1, np.where(small[before], 0, before))
        assert same_partition(instances(maps, Cut(200, rise=0.02, merge_level=0.3)), anew)


class TestCompiled:
    @pytest.fixture(scope="class")
    def network(self) -> nn.Module:
        torch.manual_seed(0)
        return build_network("Unet", "resnet18", None).eval()

    @pytest.mark.parametrize(("precision", "largest", "mean"), [("float32", 1e-4, 1e-5), ("bfloat16", 0.05, 0.01)])
    def test_maps_are_those_of_torch_in_float32(self, network, precision, largest, mean):
        run = compiled(network, precision)
        for shape in ((96, 128), (64, 64)):
            image = standardise(grey_grains(shape, 12))
            difference = np.abs(run(image) - eager(network, "float32")(image))
            assert difference.max() < largest
            assert difference.mean() < mean

    def test_many_threads_may_ask(self, segmenter):
        run = compiled(segmenter.network, "float32", threads=2)
        images = [standardise(grey_grains((64, 96), 12, seed)) for seed in range(8)]
        with ThreadPoolExecutor(4) as pool:
            for found, image in zip(pool.map(run, images), images, strict=True):
                np.testing.assert_allclose(found, eager(segmenter.network, "float32")(image), atol=1e-5)


class TestSeams:
    def test_grains_that_meet_and_share_most_of_the_smaller_one_are_one(self):
        first = np.repeat([[1, 1, 1, 1, 2, 2, 2, 2]], 8, axis=0)
        second = np.repeat([[11, 11, 11, 11, 11, 12, 12, 12]], 8, axis=0)
        assert tiled._one_grain(first, second).T.tolist() == [[1, 11], [2, 12]]

    def test_where_one_block_parts_what_the_other_does_not_it_is_one(self):
        first, second = np.ones((8, 8), int), np.repeat([[11, 11, 11, 11, 12, 12, 12, 12]], 8, axis=0)
        assert tiled._one_grain(first, second).T.tolist() == [[1, 11], [1, 12]]

    def test_a_tip_that_reaches_into_a_neighbour_by_a_pixel_does_not_join_them(self):
        first, second = (np.repeat([[1], [2]], 4, axis=0).repeat(8, axis=1) + ten for ten in (0, 10))
        first[4, 3] = 1
        assert tiled._one_grain(first, second).size == 0


class TestLarge:
    @pytest.fixture(scope="class", params=[1.0, 0.8, 1.3], ids="scale {}".format)
    def both(self, request, segmenter, field, tmp_path_factory):
        """A field with an info bar, whole and in 20 or so blocks."""
        folder = tmp_path_factory.mktemp("large")
        image = np.concatenate([field, np.zeros((40, field.shape[1]), np.uint8)])
        image[710:730, 50:400:7] = 255
        path = write(folder / "m.tif", image, 0.05 * request.param, tile=(64, 64), compression="zlib")
        calls = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tiled, "BLOCK_PX", 330)
            found = tiled.segment_large(segmenter, path, folder / "labels.tif", progress=lambda *done: calls.append(done))
        assert calls == [(done, len(calls)) for done in range(1, len(calls) + 1)]
        assert len(calls) >= 12
        return found, tifffile.imread(found.labels), segmenter.segment_micrograph(read_micrograph(path))

    def test_grains_are_those_of_the_whole(self, both):
        found, labels, whole = both
        assert labels.dtype == np.uint32
        assert found.shape == labels.shape == whole.shape
        assert found.bar_row == 700
        assert not labels[700:].any()
        assert np.array_equal(np.unique(labels[:700]), np.arange(1, len(found.boxes) + 1))
        line = segmentation.find_boundaries(whole[:700], mode="thick")
        scores = score_grains(labels[:700].astype(np.int32), line)
        assert scores["ap50"] >= 0.99
        assert abs(int(labels.max()) / whole.max() - 1) <= 0.005

    def test_every_grain_is_in_one_piece(self, both):
        _, labels, _ = both
        assert ndi.label(labels == 0)[1] == 1  # the bar alone
        pieces = sum(ndi.label(labels[box] == label)[1] for label, box in enumerate(ndi.find_objects(labels.astype(np.int32)), 1))
        assert pieces == labels.max()

    def test_boxes_and_table_are_those_of_the_map(self, both, monkeypatch):
        found, labels, _ = both
        ids = labels.astype(np.int32)
        boxes = [(y.start, y.stop, x.start, x.stop) for y, x in ndi.find_objects(ids)]
        assert np.array_equal(found.boxes, boxes)
        monkeypatch.setattr(tiled, "MEASURED_PX", 200)
        assert sum(len(block.grains) for block in found.blocks()) == len(boxes)
        whole = measure_grains(ids, found.pixel_size_um, "m", field=ids > 0)
        pd.testing.assert_frame_equal(found.grains("m"), whole, check_dtype=False)

    def test_the_file_carries_the_pixel_size_and_is_compressed(self, both):
        found, labels, _ = both
        with StreamedMicrograph(found.labels) as file:
            assert file.pixel_size_um == pytest.approx(found.pixel_size_um, rel=1e-5)
        assert found.labels.stat().st_size < labels.nbytes / 5

    def test_blocks_lie_on_the_network_s_grid(self, field, tmp_path, monkeypatch):
        monkeypatch.setattr(tiled, "BLOCK_PX", 450)
        monkeypatch.setattr(graincast.segment.segmenter, "TILE", 512)  # smaller than the field, whose tiles then begin at the grid's lines
        pooled = Segmenter(Pooled().eval(), Cut(40), {"precision": "float32"}, PREPARATION)
        path = write(tmp_path / "m.tif", field)
        labels = tifffile.imread(tiled.segment_large(pooled, path, tmp_path / "labels.tif").labels).astype(np.int32)
        assert score_instances(labels, pooled.segment_micrograph(read_micrograph(path)))["ap50"] >= 0.99

    def test_a_grain_larger_than_the_blocks_is_one(self, segmenter, tmp_path, monkeypatch):
        monkeypatch.setattr(tiled, "BLOCK_PX", 250)
        image = grey_grains((500, 600), 500)
        image[150:350] = 190 + np.random.default_rng(0).normal(0, 6, (200, 600))
        found = tiled.segment_large(segmenter, write(tmp_path / "m.tif", image), tmp_path / "labels.tif")
        labels = tifffile.imread(found.labels)
        assert len(np.unique(labels[200:300])) == 1

    def test_the_sample_of_a_larger_field_serves(self, segmenter, field, tmp_path, monkeypatch):
        path = write(tmp_path / "m.tif", field)
        monkeypatch.setattr(tiled, "SPREAD_PX", 100)
        with StreamedMicrograph(path) as file:
            part = tiled._Field(file, PREPARATION, 0.05)
        prepared = PREPARATION.prepare(read_micrograph(path)).image
        assert part.grey_range == pytest.approx(np.percentile(field / 255, [0.1, 99.9]), abs=0.02)
        assert (part.mean, part.deviation) == pytest.approx((prepared.mean(), prepared.std()), rel=0.05)

    @pytest.mark.parametrize(("clip", "scale"), [(0.0, 1.0), (0.0, 1.37), (0.0, 0.6), (0.02, 1.37)])
    def test_windows_are_prepared_as_the_whole(self, field, tmp_path, clip, scale):
        preparation = replace(PREPARATION, clahe_clip=clip, target_pixel_size_um=0.05 / scale)
        image, _, _ = preparation.prepare(Micrograph(field / np.float32(255), 8, 0.05))
        with StreamedMicrograph(write(tmp_path / "m.tif", field)) as file:
            part = tiled._Field(file, preparation, 0.05)
            found = part.standard(slice(90, 350), slice(200, 420)) * part.deviation + part.mean
        assert part.resampled_shape == image.shape
        difference = np.abs(found - image[90:350, 200:420])
        assert difference.max() <= (1.5 if clip == 0 else 12)
        assert difference.mean() < (0.02 if clip == 0 else 3)

    def test_what_is_refused_is_refused_here_too(self, segmenter, field, tmp_path):
        for image, words in ((np.full((300, 300), 90, np.uint8), "no contrast"), (field[:50, :50], "too small")):
            with pytest.raises(UserError, match=words):
                tiled.segment_large(segmenter, write(tmp_path / "m.tif", image), tmp_path / "labels.tif")
        without = Segmenter(segmenter.network, segmenter.cut, segmenter.config)
        with pytest.raises(UserError, match="trained without micrographs"):
            tiled.segment_large(without, write(tmp_path / "m.tif", field), tmp_path / "labels.tif")
        assert [file.name for file in tmp_path.iterdir()] == ["m.tif"]


@pytest.mark.proof
def test_the_benchmark_ends_in_one_json_object():
    command = [sys.executable, "-m", "benchmarks.segment_throughput", "--quick"]
    ended = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True)
    figures = json.loads(ended.stdout.splitlines()[-1])
    assert list(figures)[:4] == ["mpx_per_s", "peak_gb", "tiled_vs_whole_ap50", "tiled_vs_whole_count_ratio"]
    assert all(value > 0 for value in figures.values())
