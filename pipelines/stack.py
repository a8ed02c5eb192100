"""Set a checkout up: ZenML repository and stack, MLflow experiment, DVC; ``python -m pipelines.stack``.

Does in one process what ``zenml init``, ``zenml experiment-tracker register``, ``zenml model-registry
register``, ``zenml stack register``, ``zenml stack set`` and ``dvc init`` would, and does it again without
harm. The places come from the environment (``env.sh``), a ZenML or MLflow server of the user's own included.
"""

from __future__ import annotations

import os
from pathlib import Path

from zenml.client import Client
from zenml.enums import StackComponentType, StoreType

from graincast.store import tracking, versioning

ROOT = Path(__file__).resolve().parents[1]
STACK = "graincast"

CREDENTIALS = {  # ZenML's setting: MLflow's usual variable
    "tracking_username": "MLFLOW_TRACKING_USERNAME",
    "tracking_password": "MLFLOW_TRACKING_PASSWORD",
    "tracking_token": "MLFLOW_TRACKING_TOKEN",
}


def set_up() -> None:
    """Bring the checkout into the state in which ``zenml pipeline run`` works."""
    versioning.initialise(ROOT)
    tracking.ensure_experiment()
    if not Client.is_repository_directory(ROOT):
        Client.initialize(ROOT)
    if os.environ.get("ZENML_ACTIVE_STACK_ID"):
        return  # a stack of the user's own
    client = Client()
    if client.list_stacks(name=STACK) and client.zen_store.type != StoreType.SQL:
        client.activate_stack(STACK)  # a colleague registered it on the server; theirs to change
        return
    mlflow = {StackComponentType.EXPERIMENT_TRACKER: _tracker(), StackComponentType.MODEL_REGISTRY: {}}
    components = {kind: _component(client, kind, configuration) for kind, configuration in mlflow.items()}
    if not client.list_stacks(name=STACK):
        default = client.get_stack("default").components
        basics = (StackComponentType.ORCHESTRATOR, StackComponentType.ARTIFACT_STORE)
        client.create_stack(STACK, {kind: default[kind][0].id for kind in basics} | components)
    client.activate_stack(STACK)


def _tracker() -> dict[str, str]:
    """The MLflow tracker's configuration, from MLflow's own variables."""
    uri = os.environ["MLFLOW_TRACKING_URI"]
    credentials = {key: os.environ[name] for key, name in CREDENTIALS.items() if os.environ.get(name)}
    if uri.startswith("http") and not credentials:
        credentials = {"tracking_token": "none"}  # ZenML insists on one; a server without a login ignores it
    return {"tracking_uri": uri, **credentials}


def _component(client: Client, kind: StackComponentType, configuration: dict[str, str]) -> str:
    """Register the MLflow component of this kind, or bring the registered one up to date; its name."""
    name = f"{STACK}-mlflow"
    if client.list_stack_components(type=kind.value, name=name):
        client.update_stack_component(name, kind, configuration=configuration)
    else:
        client.create_stack_component(name, "mlflow", kind, configuration)
    return name


if __name__ == "__main__":
    set_up()
