"""How much synthetic images look like real ones: ``python -m benchmarks.realism RUN``.

RUN is a run's folder (``runs/NAME``), or ``data`` after ``dvc repro``. The four results it is measured on can be named one by one in
its place (``--real, --synthetic, --untextured, --segmenter``). Prints the figures as a table, beside the untextured simulated pictures
and the floor, two halves of the real images; the last line is one JSON object with the same.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from graincast.errors import UserError
from graincast.evaluate.realism import REAL, SYNTHETIC, UNTEXTURED, set_realism
from graincast.report.findings import REALISM
from graincast.segment.segmenter import Segmenter
from graincast.store.imageset import ImageSet

PLACES = {
    REAL: ("micrographs", "set.json"), SYNTHETIC: ("synthetic/training", "set.json"), UNTEXTURED: ("morphologies/synthetic", "set.json"),
    "segmenter": ("segmenter", "segmenter.safetensors"),
}
"""Where a run keeps what is compared, below any step's folder, and a file in it."""


def main(arguments: list[str]) -> None:
    """Measure, print."""
    places = _places(arguments)
    sets = [ImageSet(places[name]) for name in (REAL, SYNTHETIC, UNTEXTURED)]
    found = set_realism(*sets, Segmenter.load(places["segmenter"]).network)
    heads = (f"{name} (95 %)" for name in (SYNTHETIC, UNTEXTURED, f"{REAL} against {REAL}"))
    table = Table("figure", *heads, "good is", title=str(places[SYNTHETIC]))
    for name in (name for name in REALISM if name in found.summary):
        cells = (_cell(found.summary[name], group) for group in (SYNTHETIC, UNTEXTURED, REAL))
        table.add_row(REALISM[name].label, *cells, REALISM[name].good.format(kind=REAL))
    console = Console(width=140)
    console.print(table)
    for note in found.notes:
        console.print(note)
    print(json.dumps({"realism": found.summary, "notes": found.notes}))


def _places(arguments: list[str]) -> dict[str, Path]:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.realism", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", type=Path, help="folder of a run")
    for name, (place, _) in PLACES.items():
        parser.add_argument(f"--{name}", type=Path, help=f"in place of the run's {place}")
    given = vars(parser.parse_args(arguments))
    return {name: given[name] or _find(given["run"], name) for name in PLACES}


def _find(run: Path | None, name: str) -> Path:
    place, file = PLACES[name]
    if run is None:
        raise UserError(f"neither a run nor --{name} was given; a folder under runs/ would be right")
    found = next((path.parent for pattern in (f"{place}/{file}", f"*/{place}/{file}") for path in sorted(run.glob(pattern))), None)
    if found is None:
        raise UserError(f"{run} holds no {place} (a cached step's result stays in the run that made it); --{name} PATH would be right")
    return found


def _cell(values: dict[str, float], group: str) -> str:
    if group not in values:
        return "-"
    interval = f" ({values[f'{group}_low']:.4g} to {values[f'{group}_high']:.4g})" if f"{group}_low" in values else ""
    return f"{values[group]:.4g}{interval}"


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(str(error))
