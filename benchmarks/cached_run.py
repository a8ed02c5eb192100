"""How long a run takes whose every stage comes from the cache: ``python -m benchmarks.cached_run [CONFIG]``.

Prints a JSON line, ``{"cached_run_s": SECONDS}``: the median of three, start of Python included, in seconds. The first,
unmeasured run fills the cache.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time

RUNS = 3


def main(config: str = "configs/demo.yaml") -> None:
    """Fill the cache, then time `RUNS` runs."""
    command = ["zenml", "pipeline", "run", "pipelines.training.training_pipeline", "-c", config]
    seconds = []
    for _ in range(1 + RUNS):
        start = time.monotonic()
        subprocess.run(command, check=True, stdout=sys.stderr)
        seconds.append(time.monotonic() - start)
    print(json.dumps({"cached_run_s": round(statistics.median(seconds[1:]), 1)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
