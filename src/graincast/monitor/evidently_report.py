"""Evidently's column drift of a session against the reference, and its page.

Evidently compares distributions column by column. It knows nothing of images that belong to one session, or of how many columns
are asked at once, so with bounds of its own it cries wolf; it is given those of `graincast.monitor.drift`, whose verdict counts.
The page holds all its scripts and opens without a network.
"""

from __future__ import annotations

import html
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

METHOD = "wasserstein"  # normed: in standard deviations of the reference; says how far, which a p-value does not


def write_report(reference: pd.DataFrame, session: pd.DataFrame, bounds: Mapping[str, float], out: Path, sentence: str) -> dict[str, float]:
    """Write Evidently's data-drift page of two tables.

    Parameters
    ----------
    reference, session : pandas.DataFrame
        Descriptors, a row an image. NaN where there is none.
    bounds : mapping of str to float
        The columns to compare, and the distance from which on each has drifted, standard deviations of the reference.
    out : Path
        The HTML file.
    sentence : str
        The verdict, which stands at the top of the page.

    Returns
    -------
    dict of str to float
        ``evidently_share``: share of the columns whose normed Wasserstein distance exceeds its bound, and ``evidently_NAME``: that
        distance, in standard deviations of the reference.
    """
    from evidently import DataDefinition, Dataset, Report
    from evidently.presets import DataDriftPreset

    columns = [name for name in bounds if session[name].notna().any()]
    definition = DataDefinition(numerical_columns=columns)
    current, known = (Dataset.from_pandas(frame[columns].astype(float).reset_index(drop=True), data_definition=definition)
                      for frame in (session, reference))
    report = Report([DataDriftPreset(columns=columns, method=METHOD, per_column_threshold={name: bounds[name] for name in columns},
                                     drift_share=1 / len(columns))], include_tests=False)
    with warnings.catch_warnings():  # its density curves of columns that are constant in a session
        warnings.simplefilter("ignore", RuntimeWarning)
        snapshot = report.run(current, known)
        page = snapshot.get_html_str(as_iframe=False)
    heading = f'<p style="font: 16px sans-serif; margin: 24px; max-width: 60em">{html.escape(sentence)}</p>'
    out.write_text(page.replace("<body>", f"<body>{heading}", 1), encoding="utf-8")
    return _figures(snapshot.dict())


def _figures(snapshot: dict[str, Any]) -> dict[str, float]:
    figures = {}
    for metric in snapshot["metrics"]:
        if "column" in metric["config"]:
            figures[f"evidently_{metric['config']['column']}"] = float(metric["value"])
        else:
            figures["evidently_share"] = float(metric["value"]["share"])
    return figures
