"""The pipelines: wiring only. `zenml pipeline run pipelines.<module>.<pipeline> -c <config>` runs one."""

from pipelines import console

console.install()
