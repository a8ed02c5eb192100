"""What would fail late is told before the first stage starts."""

from __future__ import annotations

from pathlib import Path

from graincast.config import Config, Segmenter, Simulate


def check(config: Config) -> None:
    """Try what a configuration asks for that costs no training to try.

    Raises
    ------
    UserError
        If a device, architecture or encoder is not to be had, the simulation is not stable, resolved or too large for the memory,
        there are no micrographs, or masks (``session.masks``, ``promotion.fields``) do not belong to them.
    """
    default = Segmenter()
    # torch takes seconds to import, which a run from the cache need not spend on the settings that always work
    if {config.translator.device, config.segmenter.device} - {"auto", "cpu"}:
        from graincast.compute import pick_device

        pick_device(config.translator.device)
        pick_device(config.segmenter.device)
    chosen = config.segmenter
    if (chosen.architecture, chosen.encoder, chosen.encoder_weights) != (default.architecture, default.encoder, default.encoder_weights):
        from graincast.segment.network import build_network

        build_network(chosen.architecture, chosen.encoder, chosen.encoder_weights)
    if config.simulate != Simulate():
        from graincast.simulate import library

        library.check(config.simulate)
    if config.session.folder and Path(config.session.folder).is_dir():
        from graincast.microscope.reader import find_micrographs

        find_micrographs(Path(config.session.folder), Path(config.session.masks) if config.session.masks else None)
    if config.session.folder and config.session.masks:
        from graincast.evaluate.evaluation import check_masks, match_masks

        check_masks(match_masks(Path(config.session.folder), Path(config.session.masks)))
    if config.promotion.fields:
        from graincast.evaluate.evaluation import check_masks, match_masks

        check_masks(match_masks(Path(config.promotion.fields) / "images", Path(config.promotion.fields) / "masks"))
