"""The pipelines: wiring only. `zenml pipeline run pipelines.<module>.<pipeline> -c <config>` runs one."""

import os

# Dynamic pipelines would store every parameter as an artifact of its own; as parameters, the dashboard shows them.
os.environ.setdefault("ZENML_PARAMETER_SIZE_THRESHOLD", "-1")

from pipelines import console

console.install()
