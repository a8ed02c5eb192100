"""Drift over time: a run a session in MLflow's experiment ``graincast-monitoring``, and a chart of them."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from graincast.errors import UserError
from graincast.store.tracking import ensure_experiment, reach

if TYPE_CHECKING:
    from graincast.monitor.drift import Drift

EXPERIMENT = "graincast-monitoring"
STORE = "the drift history in MLflow"
DIGEST, CHAMPION = "session.digest", "champion"
VERDICT = ("severity", "cause", "drifted", "mendable", "sentence")

SCORES = ("columns_score", "embedding_score")
"""The scores that decide, in units of their thresholds; the chart shows them."""

COLOURS = {"none": "#0072b2", "slight": "#e69f00", "strong": "#d55e00"}
"""Of a verdict's severity; Okabe & Ito's palette, told apart by colour-blind readers too."""

MARKERS = {"columns_score": "o", "embedding_score": "^"}


def record(name: str, digest: str, drift: Drift, *, champion: str, tags: Mapping[str, str | None] | None = None,
           files: Iterable[Path] = ()) -> str:
    """Note a session's verdict in MLflow.

    Parameters
    ----------
    name, digest : str
        The session's, as in `graincast.monitor.inbox.Session`.
    drift : Drift
        Its verdict; scores that are NaN or infinite are left out.
    champion : str
        Version of the model that it was judged for.
    tags : Mapping of str to str, optional
        Further tags, e.g. DVC hashes; None is left out.
    files : Iterable of Path, optional
        Files and folders to keep with the run.

    Returns
    -------
    str
        Id of the run. A session that was noted for this champion before, also by a process that died over it, has
        its run completed, not a second one.

    Raises
    ------
    UserError
        If the tracking store cannot be reached or written.
    """
    from mlflow.entities import Metric, RunTag

    now = int(time.time() * 1000)
    verdict = {key: str(getattr(drift, key)) for key in VERDICT}
    labels = {DIGEST: digest, CHAMPION: champion, "session": name, **verdict, **(tags or {})}
    with reach(STORE) as client:
        experiment = ensure_experiment(EXPERIMENT)
        known = client.search_runs([experiment], f"tags.`{DIGEST}` = '{digest}' and tags.`{CHAMPION}` = '{champion}'", max_results=1)
        run = known[0] if known else client.create_run(experiment, run_name=name, tags={DIGEST: digest, CHAMPION: champion})
        run_id = run.info.run_id
        client.log_batch(run_id, metrics=[Metric(k, float(v), now, 0) for k, v in drift.scores.items() if math.isfinite(v)],
                         tags=[RunTag(k, v) for k, v in labels.items() if v is not None])
        for file in files:
            if file.is_dir():
                client.log_artifacts(run_id, str(file), file.name)
            else:
                client.log_artifact(run_id, str(file))
        client.set_terminated(run_id)
    return str(run_id)


def history() -> pd.DataFrame:
    """All verdicts, oldest first.

    Returns
    -------
    DataFrame
        A row a session: ``when`` (UTC), ``session``, ``digest``, ``champion``, ``severity``, ``cause``, ``drifted``,
        ``mendable``, ``sentence``, ``run_id``, and a column a score.

    Raises
    ------
    UserError
        If the tracking store cannot be reached.
    """
    rows: list[dict[str, Any]] = []
    with reach(STORE) as client:
        experiment, token = ensure_experiment(EXPERIMENT), None
        while token != "":
            page = client.search_runs([experiment], "attributes.status = 'FINISHED'", order_by=["attributes.start_time ASC"], page_token=token)
            rows += [_row(run) for run in page]
            token = page.token or ""
    columns = ["when", "session", "digest", "champion", *VERDICT, "run_id", *SCORES]
    return pd.DataFrame(rows, columns=None if rows else columns)


def _row(run: Any) -> dict[str, Any]:
    tags = run.data.tags
    verdict = {key: tags[key] for key in VERDICT} | {key: tags[key] == "True" for key in ("drifted", "mendable")}
    return {"when": pd.Timestamp(run.info.start_time, unit="ms", tz="UTC"), "session": tags["session"], "digest": tags[DIGEST],
            "champion": tags[CHAMPION], **verdict, "run_id": run.info.run_id, **run.data.metrics}


def draw_history(verdicts: pd.DataFrame, file: Path | str, last: int = 60) -> Path:
    """Draw the scores of the latest sessions over the order in which they came.

    Parameters
    ----------
    verdicts : DataFrame
        What `history` returned.
    file : Path
        PNG or SVG, by its extension.
    last : int
        Sessions at most.

    Returns
    -------
    Path
        `file`.

    Raises
    ------
    UserError
        If there is no session to draw.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    shown = verdicts.tail(last).reset_index(drop=True)
    if shown.empty:
        raise UserError(f"no session has been judged yet, so there is nothing to draw in {file}")
    width = min(16.0, max(7.0, 2.5 + 0.32 * len(shown)))
    layout = ConstrainedLayoutEngine(rect=(0, 0, 1 - 0.75 / width, 0.96))  # beside and above it stand words
    figure = Figure(figsize=(width, 4.2), dpi=160, layout=layout, facecolor="white")
    axes = figure.subplots()
    axes.axhline(1, color="#1f2430", linewidth=1, linestyle=(0, (4, 3)))
    axes.text(1.005, 1, "threshold", transform=axes.get_yaxis_transform(), va="center", fontsize=8.5, color="#1f2430").set_in_layout(False)
    for score in SCORES:
        axes.plot(shown.index, shown[score], color="#d9dce1", linewidth=1, zorder=1)
        for severity, colour in COLOURS.items():
            of = shown[shown["severity"] == severity]
            axes.scatter(of.index, of[score], marker=MARKERS[score], s=34, color=colour, zorder=2)
    _mark_champions(axes, shown)
    axes.set_yscale("symlog", linthresh=1)
    top, bottom = max(2.0, 1.6 * float(shown[list(SCORES)].max().max())), min(0.0, 1.2 * float(shown[list(SCORES)].min().min()))
    ticks = [0, 0.5, 1, *(step * 10**power for power in range(9) for step in (2, 5, 10))]
    axes.set_yticks([tick for tick in ticks if tick <= top], minor=False)
    axes.set_yticks([], minor=True)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set(xlim=(-0.6, len(shown) - 0.4), ylim=(bottom, top))
    axes.set_ylabel("score, in units of its threshold")
    axes.set_xticks(shown.index, [f"{row['session'][:24]}\n{row['when']:%Y-%m-%d}" for _, row in shown.iterrows()], rotation=90, fontsize=7.5,
                    parse_math=False)  # names may hold a $
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#d9dce1", linewidth=0.6)
    axes.set_axisbelow(True)
    _legend(figure)
    figure.savefig(file, metadata={"Date": None} if Path(file).suffix == ".svg" else {"Software": None})
    return Path(file)


def _mark_champions(axes: Any, shown: pd.DataFrame) -> None:
    """A line where another champion took over, with its version."""
    changed = shown.index[shown["champion"] != shown["champion"].shift()]
    for place in changed:
        if place > 0:
            axes.axvline(place - 0.5, color="#8a8f98", linewidth=1)
        label = f"model {shown['champion'][place]}"
        axes.text(place - 0.45, 1.01, label, transform=axes.get_xaxis_transform(), fontsize=8.5, color="#6b7079").set_in_layout(False)


def _legend(figure: Any) -> None:
    from matplotlib.lines import Line2D

    names = {"columns_score": "single descriptors", "embedding_score": "all together"}
    words = {"none": "in control", "slight": "slight drift", "strong": "strong drift"}
    handles = [Line2D([], [], marker=MARKERS[score], color="#8a8f98", linestyle="", label=names[score]) for score in SCORES]
    handles += [Line2D([], [], marker="s", color=colour, linestyle="", label=words[severity]) for severity, colour in COLOURS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)
