"""How maps are best cut into grains, by synthetic images alone: ``python -m benchmarks.cut [--only FIELD] [--seeds N]``.

For every field the segmenter of `benchmarks.real_micrographs` predicts the synthetic images that chose its epoch, imaged anew
by the augmentation it was trained with: as unlike the training set as the micrographs may be. Every pair of a peak's rise and
a merging level is scored (ap50); no micrograph and no mask takes part. The defaults of `graincast.segment.instances.Cut` are
the best of the last table. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks import machine
from benchmarks.real_micrographs import MATERIALS, PRESETS, RESULTS, ROOT, Study, our_segmenter
from graincast import stages
from graincast.config import Augment, load_config
from graincast.evaluate.metrics import score_grains
from graincast.segment.augment import augmented_crop
from graincast.segment.instances import Cut, instances
from graincast.segment.segmenter import predict_maps
from graincast.store import tracking

FIELDS = ("perovskite_sem", "pure_iron_optical", "steel_316l_optical", "nbt_ceramic_sem")
CROPS, SIDE = 4, 256
"""Crops drawn from each image, and their side, px."""
RISES, MERGE_LEVELS = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3), (0.0, 0.2, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6)
CUTS = [Cut(0, *values) for values in itertools.product(RISES, MERGE_LEVELS)]


def scores(study: Study, cuts: Sequence[Cut]) -> Iterator[dict[str, float | str]]:
    """A row a crop and cut: ap50."""
    segmenter = our_segmenter(study)
    validation = study.synthetic()["validation"]
    augment = Augment.model_validate(segmenter.config["augment"])
    rng = np.random.default_rng(study.seed)
    for index, _ in itertools.product(stages.halves(validation)[0], range(CROPS)):
        image, labels = augmented_crop(validation.image(index), validation.labels(index), SIDE, augment, rng)
        maps = predict_maps(segmenter.network, image, segmenter.config["precision"])
        for cut in cuts:
            found = instances(maps, replace(cut, smallest_px=segmenter.cut.smallest_px))
            yield {"field": study.name, **asdict(cut), "ap50": score_grains(found, labels == 0)["ap50"]}


def main() -> None:
    """Score the cuts."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=FIELDS, default=FIELDS, metavar="FIELD", help=", ".join(FIELDS))
    parser.add_argument("--seeds", type=int, default=1, help="trainings of each field with other random numbers throughout")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder of the micrographs")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "study", help="where the trainings of the study are kept")
    parser.add_argument("--record", action="store_true", help="keep the figures under benchmarks/results")
    options = parser.parse_args()
    config = load_config(ROOT / "configs" / f"{PRESETS['cpu']}.yaml")
    studies = [Study(name, MATERIALS[name], options.data.resolve(), options.work.resolve(), config, seed)
               for name in options.only for seed in range(options.seeds)]
    rows = pd.DataFrame([row for study in studies for row in scores(study, CUTS)])
    by_field = rows.groupby(["field", "rise", "merge_level"])["ap50"].mean()
    for name in dict.fromkeys(rows["field"]):
        print(f"\n{name}: ap50\n{by_field[name].unstack().round(3).to_string()}")
    mean = by_field.groupby(["rise", "merge_level"]).mean()
    print(f"\nmean of the fields\n{mean.unstack().round(3).to_string()}")
    found = {"best": dict(zip(mean.index.names, mean.idxmax(), strict=True)), "ap50": round(float(mean.max()), 4),
             "ap50_of_the_defaults": round(float(mean[tuple(asdict(Cut(0)).values())[1:]]), 4)}
    if options.record:
        rows_of = [{**dict(zip(mean.index.names, place, strict=True)), "ap50": round(float(value), 4)} for place, value in mean.items()]
        (RESULTS / "cut.json").write_text(json.dumps({
            "command": f"python -m benchmarks.cut --record --seeds {options.seeds}", "fields": options.only, "commit": tracking.git_commit(ROOT),
            "machine": machine.describe(), **found, "mean_of_the_fields": rows_of}, indent=1) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
