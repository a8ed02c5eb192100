"""Mistakes that can be known before the first stage are told there."""

from __future__ import annotations

import subprocess
import sys

import imageio.v3 as iio
import numpy as np
import pytest

from graincast.config import parse_config
from graincast.errors import UserError
from graincast.preflight import check


@pytest.mark.parametrize(("tree", "message"), [
    ({"segmenter": {"architecture": "Unett"}}, "segmenter.architecture 'Unett'"),
    ({"segmenter": {"encoder": "resnet19"}}, "encoder 'resnet19'"),
    ({"translator": {"device": "cuda:9"}}, "device 'cuda:9' is not there"),
    ({"segmenter": {"device": "gpu"}}, "device 'gpu' is unknown"),
])
def test_what_is_not_to_be_had_is_named(tree, message):
    with pytest.raises(UserError, match=message):
        check(parse_config(tree))


def test_masks_of_other_images_are_named(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    iio.imwrite(tmp_path / "images" / "a.png", np.zeros((64, 80), np.uint8))
    iio.imwrite(tmp_path / "masks" / "b.png", np.zeros((64, 80), np.uint8))
    config = parse_config({"session": {"folder": str(tmp_path / "images"), "masks": str(tmp_path / "masks")}})
    with pytest.raises(UserError, match=r"no mask in .* is named like a micrograph"):
        check(config)
    (tmp_path / "masks" / "b.png").unlink()
    iio.imwrite(tmp_path / "masks" / "a.png", np.zeros((64, 81), np.uint8))
    with pytest.raises(UserError, match=r"a\.png"):
        check(config)


def test_a_folder_without_micrographs_is_told_before_anything_is_simulated(tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(UserError, match="holds no micrographs"):
        check(parse_config({"session": {"folder": str(tmp_path)}}))


def test_the_usual_settings_cost_no_import():
    program = ("import sys; from graincast.config import Config; from graincast.preflight import check; check(Config()); "
               "print(sorted({'torch', 'skimage'} & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
