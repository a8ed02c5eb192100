"""The command line: ``graincast segment``, ``compare``, ``models``, ``promote``, ``rollback``, ``watch``, ``sessions``, ``schedule``, ``configure``,
``simulate``, ``growth``, ``stage`` and ``virtual-sem``.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from graincast.config import Config, load_config, parse_config
from graincast.errors import UserError

if TYPE_CHECKING:
    from graincast.store.registry import Record

MONITORING = Path(".graincast/monitoring")
"""What the monitor keeps, in a checkout: ledger, alerts, the watch's state."""

app = typer.Typer(
    help="Label-free grain segmentation of SEM micrographs.", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)


def main() -> None:
    """Run the command line; a `UserError` ends it with one sentence and exit status 2."""
    try:
        app()
    except UserError as error:
        print(f"graincast: {error}", file=sys.stderr)
        sys.exit(2)


@app.command()
def segment(
    sources: Annotated[list[Path], typer.Argument(help="micrographs, or folders of them")],
    out: Annotated[Path, typer.Option(help="folder for the results")],
    model: Annotated[
        str | None,
        typer.Option(help="MLflow model URI, e.g. models:/graincast-segmenter/3; default: the registered champion, else the newest version"),
    ] = None,
    pixel_size: Annotated[float | None, typer.Option(min=1e-6, help="pixel size in um of files whose metadata has none")] = None,
    export: Annotated[
        str, typer.Option(help="what to write, with commas between: labels, overlay, csv, parquet, roi, geojson, coco, report; or all")
    ] = "labels,overlay,csv,report",
) -> None:
    """Find and measure the grains of micrographs; a folder that is segmented again is only done where something has changed.

    Exit status: 0 every file was done, 1 some were refused, 2 none was done.
    """
    from graincast.export.kinds import chosen
    from graincast.inference import count, segment_files
    from graincast.store.registry import load_segmenter

    kinds = chosen(export)
    segmenter = load_segmenter(model).compile()  # pays from 4 million pixels on; always, or a file's grains would depend on what lies beside it
    outcomes = segment_files(segmenter, sources, out, pixel_size, exports=kinds)
    table = Table("micrograph", "grains", "mean diameter", "ASTM G", "")
    for outcome in outcomes:
        found = outcome.summary
        cells = _grain_cells(found) if found else (f"[red]refused[/]: {escape(outcome.refused or '')}", "", "")
        table.add_row(escape(outcome.file), *cells, "done before" if outcome.before else "")
    console = Console()
    console.print(table)
    counts = count(outcomes)
    told = ", ".join(f"{number} {state}" for state, number in counts.items()).replace("_", " ")
    console.print(f"{told}; results: {out}")
    for sentence in json.loads((out / "summary.json").read_text())["warnings"]:
        console.print(escape(sentence))
    if counts["refused"]:
        raise typer.Exit(1 if counts["refused"] < len(outcomes) else 2)


def _grain_cells(found: dict[str, Any]) -> tuple[str, str, str]:
    unit = "um" if found["pixel_size_um"] else "px"
    mean, number = found[f"mean_equivalent_diameter_{unit}"], found.get("astm_grain_size_number")
    return str(found["grains"]), f"{mean:.3g} {unit}" if mean is not None else "-", f"{number:.1f}" if number is not None else "-"


@app.command()
def serve(
    host: Annotated[str, typer.Option(help="address to listen on; 0.0.0.0 for all, which lets every machine of the network in")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="port to listen on; 0: one that is free")] = 5001,
    model: Annotated[
        str | None, typer.Option(help="version (3), alias (challenger) or folder of a segmenter; default: the champion, else the newest version")
    ] = None,
    max_body_mb: Annotated[int, typer.Option(min=1, help="largest body, MiB")] = 64,
    max_megapixels: Annotated[float, typer.Option(min=0.01, help="largest image, million px; a worker takes some hundred MB for each")] = 25,
    queue: Annotated[int, typer.Option(min=1, help="requests that may wait or be worked on at once; further ones are told to come back")] = 1000,
    workers: Annotated[int | None, typer.Option(min=1, help="images that are segmented at once; default: one a processor, at most 4")] = None,
) -> None:
    """Serve a segmenter over HTTP: POST a micrograph to /segment, get labels and the table of grains (docs/serving.md)."""
    from graincast import serve as server

    limits = server.Limits(max_body_mb * 2**20, round(1e6 * max_megapixels), queue, **({"workers": workers} if workers else {}))
    server.serve(server.Model.load(model), host, port, limits)


@app.command()
def package(
    out: Annotated[Path, typer.Argument(help="file to write, e.g. graincast.zip")],
    model: Annotated[
        str | None, typer.Option(help="version (3), alias (challenger) or folder of a segmenter; default: the champion, else the newest version")
    ] = None,
) -> None:
    """Write a segmenter as a BioImage.IO model package (format 0.5), which its own test has passed."""
    from graincast.store.bioimage import write_package
    from graincast.store.registry import load_segmenter

    print(f"{write_package(load_segmenter(model, 'cpu'), out)}: a BioImage.IO model, tested")


By = Annotated[str, typer.Option(help="who decides, for the record")]


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(help="folder that `graincast segment` wrote, or a table (CSV, Parquet): what is compared against")],
    b: Annotated[Path, typer.Argument(help="the other one")],
    column: Annotated[
        list[str] | None,
        typer.Option(help="column to compare, e.g. feret_max_um; twice where A and B name it differently; default: equivalent diameter"),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="folder for the figure and the figures as JSON")] = None,
) -> None:
    """Compare two sessions' grain sizes, or what was found with what was measured by hand."""
    from graincast.measure.compare import compare_files, write_comparison

    columns = column or []
    if len(columns) > 2:
        raise UserError(f"--column is given {len(columns)} times; once for both tables or once for each would be right")
    found = compare_files(a, b, (columns[0], columns[-1]) if columns else (None, None))
    for sentence in (found.sentence, *found.warnings):
        print(sentence)
    if out is not None:
        print(f"results: {', '.join(str(path) for path in write_comparison(found, out))}")


@app.command()
def models(history: Annotated[bool, typer.Option("--history", help="show the decisions, newest first, and why they were taken")] = False) -> None:
    """Show the registered segmenters, or the decisions about them."""
    from graincast.store import registry

    records = registry.history()
    if history:
        table = Table("when (UTC)", "decision", "champion before", "after", "by", "decided by", "why")
        for record in records:
            decision = f"{record.action} {record.version}" + ("" if record.status == registry.DONE else f"\n({record.status})")
            table.add_row(record.when[:19].replace("T", " "), decision, str(record.champion or "-"), str(record.after.get(registry.CHAMPION, "-")),
                          escape(record.by), record.decided_by, escape("\n".join(record.reasons)))
    else:
        table = Table("version", "alias", "registered (UTC)", "AP50, or label-free score", "DVC hashes")
        for found in registry.versions():
            scores = "\n".join(f"{name}: {value:.3f}" for name, value in registry.figures(found, records).items())
            hashes = "\n".join(f"{name} {digest[:8]}" for name, digest in sorted(found.hashes.items()))
            table.add_row(str(found.number), ", ".join(found.aliases), f"{found.created:%Y-%m-%d %H:%M}", escape(scores), escape(hashes))
    Console().print(table)


@app.command()
def promote(
    version: Annotated[int, typer.Argument(help="version to make the champion")],
    reason: Annotated[str, typer.Option(help="why, for the record")],
    by: By = "graincast promote",
) -> None:
    """Make a registered segmenter the champion by hand; the decision is kept on record."""
    from graincast.store import registry

    _tell(registry.promote_by_hand(version, reason, by=by))


@app.command()
def rollback(reason: Annotated[str, typer.Option(help="why, for the record")], by: By = "graincast rollback") -> None:
    """Make the previous champion the champion again; a second rollback goes one further back."""
    from graincast.store import registry

    _tell(registry.rollback(reason, by=by))


def _tell(record: Record) -> None:
    aliases = ", ".join(f"{alias}: version {number}" for alias, number in sorted(record.after.items()))
    print(f"version {record.version} is the champion, before it was {record.champion or 'none'} ({aliases}); record: MLflow run {record.id}")


@app.command()
def configure(
    base: Annotated[Path, typer.Argument(help="configuration to start from, e.g. configs/demo.yaml")],
    set_: Annotated[list[str], typer.Option("--set", help="KEY=VALUE, e.g. session.folder=micrographs or segmenter.epochs=50")],
    out: Annotated[Path, typer.Option("--out", "-o", help="file to write")],
) -> None:
    """Write a copy of a configuration with some keys changed; unknown keys are refused."""
    changes = {}
    for assignment in set_:
        key, equals, text = assignment.partition("=")
        if not equals:
            raise UserError(f"--set {assignment}: KEY=VALUE would be right, e.g. segmenter.epochs=50")
        changes[key] = text
    _write_copy(base, changes, out)


def _write_copy(base: Path, changes: Mapping[str, str], out: Path) -> None:
    tree = load_config(base).model_dump(exclude_unset=True)
    for key, text in changes.items():
        tree = _assign(tree, key, text)
    document = yaml.safe_load(base.read_text())
    document["parameters"]["config"] = parse_config(tree, str(out)).model_dump(exclude_unset=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    partial.write_text(yaml.safe_dump(document, sort_keys=False))
    partial.replace(out)


def _assign(tree: Any, key: str, text: str) -> dict[str, Any]:
    """The tree with another value; its type is left to `parse_config`, so that a folder may well be called 2026-11-20."""
    first, dot, rest = key.partition(".")
    tree = tree if isinstance(tree, dict) else {}
    value = _assign(tree.get(first), rest, text) if dot else None if text == "null" else text
    return {**tree, first: value}


@app.command()
def watch(
    inbox: Annotated[Path, typer.Argument(help="folder in which every sub-folder is a session of micrographs")],
    config: Annotated[Path, typer.Option("--config", "-c", help="configuration file")] = Path("configs/demo.yaml"),
    cron: Annotated[str | None, typer.Option(help="when to run, e.g. '0 6 * * 1-5'; default: monitoring.cron")] = None,
    every: Annotated[float | None, typer.Option(min=1, help="time from run to run, s; default: monitoring.every_seconds")] = None,
    once: Annotated[bool, typer.Option(help="one run now, then end; for a cron line")] = False,
) -> None:
    """Run the monitoring pipeline whenever it is due and the inbox has something new, until SIGTERM or Ctrl-C."""
    from graincast.monitor.schedule import Watch, state_file

    if cron is not None and every is not None:
        raise UserError("--cron and --every exclude each other; one of them would be right")
    root, inbox = _checkout(), inbox.absolute()
    state = root / MONITORING
    options = {"monitoring.inbox": str(inbox), "monitoring.cron": cron if every is None else "null", "monitoring.every_seconds": every}
    changes = {key: str(value) for key, value in options.items() if value is not None}
    key = hashlib.sha256(f"{config.absolute()} {changes}".encode()).hexdigest()[:8]  # what another watch runs with stays as it is
    copy = state_file(state, inbox).with_suffix(f".{key}.yaml")
    _write_copy(config, changes, copy)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s graincast %(levelname)s: %(message)s")
    command = [_tool("zenml"), "pipeline", "run", "pipelines.monitoring.monitoring_pipeline", "-c", str(copy)]
    process = Watch(inbox, load_config(copy).monitoring, command, state, root)
    if not once:
        process.run()
    elif status := process.once():
        raise typer.Exit(status)


@app.command()
def sessions(
    retry: Annotated[str | None, typer.Option(help="name or digest of a session that is done, failed or was set aside: process it again")] = None,
) -> None:
    """Show what became of every session of the inbox."""
    from graincast.config import Monitoring
    from graincast.monitor.inbox import Ledger

    ledger = Ledger.open(_checkout() / MONITORING, Monitoring())
    if retry is not None:
        if not ledger.retry(retry):
            raise UserError(f"no session '{retry}' is done, failed or set aside; `graincast sessions` lists them all")
        print(f"'{retry}' is processed again in the next run")
        return
    table = Table("session", "state", "last claimed (UTC)", "attempts", "why", "digest")
    for record in ledger.records():
        claims = record["claims"]
        why = record["reason"] or (record["result"] or {}).get("headline", "")
        last = claims[-1]["when"][:19].replace("T", " ")
        table.add_row(escape(record["name"]), record["state"], last, str(len(claims)), escape(why), record["digest"][:12])
    Console().print(table)


@app.command()
def schedule(
    cron: Annotated[str, typer.Option(help="when to run, in the orchestrator's time zone (usually UTC), e.g. '0 6 * * 1-5'")],
    config: Annotated[Path, typer.Option("--config", "-c", help="configuration file")] = Path("configs/demo.yaml"),
    inbox: Annotated[Path | None, typer.Option(help="inbox, as the orchestrator's machines see it; default: monitoring.inbox")] = None,
) -> None:
    """Have ZenML's orchestrator run the monitoring pipeline on a schedule, where it has one."""
    root = _checkout()
    load_config(config)
    arguments = ["--cron", cron, "--config", str(config.absolute()), *(["--inbox", str(inbox)] if inbox else [])]
    if status := subprocess.run([sys.executable, "-m", "pipelines.schedule", *arguments], cwd=root).returncode:
        raise typer.Exit(status)


def _checkout() -> Path:
    """The checkout whose environment this is; the pipelines and their state lie there."""
    root = os.environ.get("GRAINCAST_ROOT")
    if not root or not (Path(root) / "pipelines").is_dir():
        raise UserError("GRAINCAST_ROOT names no checkout of graincast; `source env.sh` in it first")
    return Path(root)


def _tool(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise UserError(f"the command '{name}' is not on PATH; `source env.sh` in the checkout first")
    return found


@app.command()
def stage(
    name: Annotated[str, typer.Argument(help="stage of dvc.yaml")],
    config: Annotated[Path, typer.Option("--config", "-c", help="configuration file")] = Path("configs/demo.yaml"),
    data: Annotated[Path, typer.Option(help="folder that holds the stages' results")] = Path("data"),
) -> None:
    """Run one stage of the loop on the results of the stages before it, as `dvc repro` does."""
    if name not in STAGES:
        raise UserError(f"there is no stage '{name}'; {', '.join(STAGES)} would be right")
    STAGES[name](load_config(config), data)


@app.command()
def simulate(
    out: Annotated[Path, typer.Option(help="folder to make, an ImageSet")],
    config: Annotated[Path | None, typer.Option("--config", "-c", help="configuration file; default: every default")] = None,
    structures: Annotated[int, typer.Option(min=1, help="number of structures")] = 300,
    frames: Annotated[str | None, typer.Option(help="time steps at which to keep each structure, e.g. 0,200,1000; default: the last only")] = None,
) -> None:
    """Grow a library of labelled grain structures, or sequences of their growth, from the `simulate` section."""
    from graincast.simulate.library import simulate_sequences, simulate_set

    settings = (load_config(config) if config else Config()).simulate
    made = simulate_set(settings, structures, out) if frames is None else simulate_sequences(settings, structures, _steps(frames), out)
    diameter = f"{made.rows['mean_diameter_px'].mean():.3g} px"
    if settings.pixel_size_um:
        diameter += f", {made.rows['mean_diameter_um'].mean():.3g} um"
    print(f"{out}: {len(made)} images of {made.rows['grains'].mean():.0f} grains on average, mean diameter {diameter}")


def _steps(text: str) -> list[int]:
    try:
        return [int(step) for step in text.split(",")]
    except ValueError:
        raise UserError(f"--frames {text}: time steps with commas between them would be right, e.g. 0,200,1000") from None


@app.command()
def growth(
    out: Annotated[Path, typer.Option(help="folder to make: growth.csv, growth.json, growth.png and growth.gif")],
    model: Annotated[str | None, typer.Option(help="version (3) or alias (challenger); default: the champion, else the newest version")] = None,
    run: Annotated[Path | None, typer.Option(help="folder of a training run whose models to take instead, e.g. runs/training_pipeline-...")] = None,
    translator: Annotated[Path | None, typer.Option(help="folder of a translator to take instead; needs --segmenter")] = None,
    segmenter: Annotated[Path | None, typer.Option(help="folder of a segmenter to take instead; needs --translator")] = None,
    config: Annotated[Path | None, typer.Option("--config", "-c", help="configuration file with a simulate section; default: every default")] = None,
    frames: Annotated[str, typer.Option(help="number of frames, evenly in time, or time steps, e.g. 2000,4000,8000,16000")] = "16",
    size: Annotated[int, typer.Option(min=64, help="side of the simulated field, px; the larger, the more grains")] = 1024,
    seed: Annotated[int, typer.Option(min=0, help="seed of surface and noise")] = 0,
) -> None:
    """Watch grains grow through the microscope: a simulated series, imaged, segmented and measured, with the kinetics of growth."""
    from graincast.growth import growth_of, load_models

    asked = _steps(frames)
    settings = (load_config(config) if config else Config()).simulate
    models = load_models(model, run, translator, segmenter)
    grown = growth_of(*models, settings, out, frames=asked[0] if len(asked) == 1 else asked, size=size, seed=seed)
    table = Table("kinetics, 95 % interval", *grown.fits)
    for name, words in (("exponent", "exponent n"), ("ideal_rate", f"ideal rate k, {grown.unit}² L"), ("log_slope", "log-log slope")):
        table.add_row(words, *(str(getattr(fit, name)) for fit in grown.fits.values()))
    console = Console()
    console.print(grown.doubt if grown.doubt else table)
    console.print(f"{len(grown.table)} frames: {out}")


@app.command()
def virtual_sem(
    out: Annotated[Path, typer.Option(help="folder to make")],
    config: Annotated[Path | None, typer.Option("--config", "-c", help="configuration file; default: every default")] = None,
) -> None:
    """Make a session of the virtual SEM: micrographs, and held-out micrographs with exact masks."""
    from graincast.stages import run_virtual_sem

    run_virtual_sem((load_config(config) if config else Config()).session.virtual, out)


def _stage_virtual_sem(config: Config, data: Path) -> None:
    from graincast.stages import run_virtual_sem

    run_virtual_sem(config.session.virtual, data / "session")


def _stage_simulate(config: Config, data: Path) -> None:
    from graincast.stages import run_simulate

    run_simulate(config.simulate, data / "morphologies")


def _stage_ingest(config: Config, data: Path) -> None:
    from graincast.stages import run_ingest
    from graincast.store.imageset import ImageSet

    source = Path(config.session.folder) if config.session.folder else data / "session" / "micrographs"
    masks = Path(config.session.masks) if config.session.masks else None
    run_ingest(config.ingest, source, ImageSet(data / "morphologies" / "translator"), data / "micrographs", masks)


def _stage_gate_library(config: Config, data: Path) -> None:
    from graincast.stages import run_gate_library
    from graincast.store.imageset import ImageSet

    morphologies = {name: ImageSet(data / "morphologies" / name) for name in ("translator", "synthetic", "validation")}
    run_gate_library(config.gates, morphologies, data / "gates" / "library")


def _stage_gate_micrographs(config: Config, data: Path) -> None:
    from graincast.stages import run_gate_session
    from graincast.store.imageset import ImageSet

    run_gate_session(config.gates, ImageSet(data / "micrographs"), data / "gates" / "micrographs")


def _stage_gate_synthetic(config: Config, data: Path) -> None:
    from graincast.stages import run_gate_synthetic
    from graincast.store.imageset import ImageSet

    synthetic = {name: ImageSet(data / "synthetic" / name) for name in ("training", "validation")}
    run_gate_synthetic(config.gates, synthetic, ImageSet(data / "micrographs"), data / "gates" / "synthetic")


def _stage_drift_reference(config: Config, data: Path) -> None:
    from graincast.stages import run_reference
    from graincast.store.imageset import ImageSet

    micrographs, training = ImageSet(data / "micrographs"), ImageSet(data / "synthetic" / "training")
    run_reference(config.drift, data / "segmenter", micrographs, training, data / "drift_reference")


def _stage_train_translator(config: Config, data: Path) -> None:
    from graincast.checkpoint import Checkpoint
    from graincast.stages import run_train_translator
    from graincast.store.imageset import ImageSet

    with Checkpoint(data / "checkpoints", "translator") as checkpoint:
        run_train_translator(config.translator, ImageSet(data / "morphologies" / "translator"), ImageSet(data / "micrographs"),
                             data / "translator", checkpoint=checkpoint)


def _stage_synthesise(config: Config, data: Path) -> None:
    from graincast.stages import run_synthesise
    from graincast.store.imageset import ImageSet

    morphologies = {name: ImageSet(data / "morphologies" / name) for name in ("synthetic", "validation")}
    run_synthesise(config.synthesise, morphologies, data / "translator", data / "synthetic")


def _stage_train_segmenter(config: Config, data: Path) -> None:
    from graincast.checkpoint import Checkpoint
    from graincast.stages import run_train_segmenter
    from graincast.store.imageset import ImageSet

    training, validation = (ImageSet(data / "synthetic" / name) for name in ("training", "validation"))
    with Checkpoint(data / "checkpoints", "segmenter") as checkpoint:
        run_train_segmenter(config.segmenter, training, validation, ImageSet(data / "micrographs"), data / "segmenter", checkpoint=checkpoint)


def _stage_evaluate(config: Config, data: Path) -> None:
    from graincast.stages import masked_files, run_evaluate
    from graincast.store.imageset import ImageSet

    synthetic = {name: ImageSet(data / "synthetic" / name) for name in ("training", "validation")}
    images, masks = masked_files(config.session, data / "session")
    morphologies, micrographs = ImageSet(data / "morphologies" / "synthetic"), ImageSet(data / "micrographs")
    run_evaluate(config.evaluate, data / "segmenter", data / "translator", morphologies, synthetic, micrographs, data / "evaluation",
                 images=images, masks=masks, virtual=config.session.folder is None)


STAGES: dict[str, Callable[[Config, Path], None]] = {
    "virtual-sem": _stage_virtual_sem,
    "simulate": _stage_simulate,
    "ingest": _stage_ingest,
    "gate-library": _stage_gate_library,
    "gate-micrographs": _stage_gate_micrographs,
    "train-translator": _stage_train_translator,
    "synthesise": _stage_synthesise,
    "gate-synthetic": _stage_gate_synthetic,
    "train-segmenter": _stage_train_segmenter,
    "evaluate": _stage_evaluate,
    "drift-reference": _stage_drift_reference,
}
