"""Versions of the segmenter in MLflow's registry: what is in production, what was, and who decided so.

===============  ==========================================================================================
``champion``     the version in use
``challenger``   the newest candidate; it stays when it is refused, until another takes its place
``previous``     what `rollback` would bring back
===============  ==========================================================================================

A version carries the DVC hashes of its run as tags (``dvc.segmenter``, ``dvc.training``, ...) and may carry further
folders (`attach`), such as the drift reference. Nothing is read from a version whose bytes are not those of its tag.

Notes
-----
*Moves.* MLflow sets one alias at a time, so a move is written down first: the tag ``graincast.move`` of the registered
model says what every alias shall be. Then ``previous``, ``champion`` and ``challenger`` are set, then the tag goes. Whoever
takes the lock next completes a move that was cut off. ``champion`` changes in one write, from a version that can be loaded
to one that has been verified.

*Lock.* One move at a time: a file lock beside a SQLite database, else one for this machine; it ends with its process.
Several machines that promote on one MLflow server at once are not kept apart, so let one of them do it.

*Audit.* Every decision is an MLflow run of its own in the experiment ``graincast-decisions``, with ``decision.json``, begun
before anything moves and finished after. One that was killed before its move began is marked so, and moved nothing.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import importlib.metadata
import json
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import imagecodecs
import numpy as np

from graincast.errors import Unavailable, UserError, without_login
from graincast.store.imageset import folder_digest, whole_folder
from graincast.store.tracking import active_run_id, ensure_experiment, first_line, reach

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from graincast.evaluate.promotion import Decision
    from graincast.segment.segmenter import Segmenter

logger = logging.getLogger(__name__)

MODEL = "graincast-segmenter"
CHAMPION, CHALLENGER, PREVIOUS = ALIASES = ("champion", "challenger", "previous")
DIGEST_TAG = "dvc.segmenter"
DECISIONS = "graincast-decisions"
MOVE_TAG = "graincast.move"
ROLLED_BACK_TAG = "graincast.rolled_back"
RECORD_FILE = "decision.json"
ATTACHED = "attached"
LOCK_SECONDS = 120.0
"""How long a decision waits for another one, s."""
NOT_THERE = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
"""What MLflow says of a version, a run or a name that it does not have, and of an alias."""
TRAINED_FIGURE = "/graincast/ap50"
"""How the report calls AP50 of the segmenter on a set among a run's metrics."""
PAGE = 1000
EXAMPLE_PX = 256
"""Side of the corner of an image that is kept as a model's input example, px."""
REASON_LENGTH = 500
"""Characters of a reason that become a tag, which MLflow limits; the record has all of it."""

REQUIREMENTS = (
    "imagecodecs", "numba", "numpy", "pandas", "pillow", "safetensors", "scikit-image", "scipy", "segmentation-models-pytorch", "tifffile", "torch",
    "torchvision",
)
"""Distributions that a served segmenter imports."""

PROMOTE, REFUSE, ROLLBACK = "promote", "refuse", "rollback"
DONE, ABANDONED = "done", "cut off before anything moved"


@dataclass(frozen=True)
class ModelVersion:
    """A registered segmenter.

    Attributes
    ----------
    number : int
        Its version.
    aliases : tuple of str
        Those that point at it.
    created : datetime
        When it was registered, UTC.
    digest : str
        DVC hash of its folder, ``""`` where nobody noted it.
    tags : dict of str to str
        All of its tags; those under ``dvc.`` are hashes of what it was made from and of what it carries.
    run_id : str
        The MLflow run that logged it.
    """

    number: int
    aliases: tuple[str, ...]
    created: datetime
    digest: str
    tags: dict[str, str]
    run_id: str

    @property
    def hashes(self) -> dict[str, str]:
        """DVC hash by name of dataset or model."""
        return {name.removeprefix("dvc."): value for name, value in self.tags.items() if name.startswith("dvc.")}


@dataclass(frozen=True)
class Record:
    """A decision, as it is kept.

    Attributes
    ----------
    action : str
        ``promote``, ``refuse`` or ``rollback``.
    version, champion : int or None
        The version it is about, and the one that was champion before.
    by : str
        Who or what decided: a command, a pipeline's run.
    reasons : tuple of str
        Sentences.
    decided_by : str
        Which evidence decided; ``by hand`` where a person did.
    before, after : dict
        Aliases to versions, before and after.
    figures : dict
        Scores of both on every set of the benchmark, with its DVC hash.
    hashes : dict
        ``version`` and ``champion``: the DVC hashes that these carry.
    when : str
        ISO 8601, UTC.
    status : str
        ``done``, or that it was cut off.
    id : str
        Its MLflow run.
    """

    action: str
    version: int
    champion: int | None
    by: str
    reasons: tuple[str, ...]
    decided_by: str
    before: dict[str, int]
    after: dict[str, int]
    figures: dict[str, Any] = field(default_factory=dict)
    hashes: dict[str, dict[str, str]] = field(default_factory=dict)
    when: str = ""
    status: str = DONE
    id: str = ""

    @property
    def promoted(self) -> bool:
        """Whether the version became champion by it."""
        return self.action == PROMOTE and self.status == DONE


# Registering and loading


def ensure_registered(folder: Path, example: np.ndarray, tags: Mapping[str, str | None] | None = None) -> int:
    """Have a segmenter registered as a version of ``graincast-segmenter``.

    The version whose tag ``dvc.segmenter`` is the folder's hash is kept where the registry has one; else the segmenter
    is logged in the active run and becomes the next version. It gets no alias: see `promote`.

    Parameters
    ----------
    folder : Path
        What `Segmenter.save` wrote.
    example : ndarray
        A prepared image, uint8 (height, width); a corner of it is kept as the input example.
    tags : Mapping of str to str, optional
        Further tags of a new version: git commit, hashes of the data and the like; None is left out.

    Returns
    -------
    int
        The version.

    Raises
    ------
    UserError
        If the registry cannot be reached or written.

    Notes
    -----
    The model is data and this package's code, no pickle; it serves where graincast is not installed.
    """
    import mlflow

    active_run_id()
    digest = folder_digest(folder)
    with _store() as client:
        known = _version_of(client, digest)
        if known is not None:
            return known
        uri = _log_model(folder, example)
    with _locked() as client:
        known = _version_of(client, digest)  # another process may have been quicker
        if known is not None:
            return known
        labels = {name: value for name, value in {**(tags or {}), DIGEST_TAG: digest}.items() if value is not None}
        return int(mlflow.register_model(uri, MODEL, tags=labels).version)  # tags and version appear together


def _version_of(client: MlflowClient, digest: str) -> int | None:
    known = client.search_model_versions(f"name = '{MODEL}' and tags.`{DIGEST_TAG}` = '{digest}'", max_results=1)
    return int(known[0].version) if known else None


def _log_model(folder: Path, example: np.ndarray) -> str:
    import mlflow
    import pandas as pd
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema
    from mlflow.types.schema import AnyType, Array

    import graincast
    from graincast.store.pyfunc import GRAINS, IMAGE, LABELS, PIXEL_SIZE

    # an image may be bytes or an array, for which MLflow has no type of its own
    inputs = Schema([ColSpec(AnyType(), IMAGE), ColSpec(DataType.double, PIXEL_SIZE, required=False)])
    outputs = Schema([ColSpec(Array(Array(DataType.integer)), LABELS), ColSpec(AnyType(), GRAINS),
                      ColSpec(DataType.double, PIXEL_SIZE, required=False)])
    corner = imagecodecs.png_encode(np.ascontiguousarray(example[:EXAMPLE_PX, :EXAMPLE_PX]))
    logged = mlflow.pyfunc.log_model(
        name="segmenter",
        loader_module="graincast.store.pyfunc",
        data_path=str(folder),
        code_paths=[str(Path(graincast.__file__).parent)],
        signature=ModelSignature(inputs, outputs),
        input_example=pd.DataFrame({IMAGE: [base64.b64encode(corner).decode()]}),
        pip_requirements=[f"{name}=={importlib.metadata.version(name)}" for name in REQUIREMENTS],
    )
    return str(logged.model_uri)


def load_segmenter(reference: str | None = None, device: str = "auto") -> Segmenter:
    """Load a segmenter, after its bytes have been verified.

    Parameters
    ----------
    reference : str, optional
        A version (``3``) or alias (``challenger``) of ``graincast-segmenter``, a ``models:/NAME/VERSION``,
        ``models:/NAME@ALIAS`` or ``runs:/`` URI, or the folder of a saved segmenter, which is taken as it is. None: the
        alias ``champion``, or the newest version while there is none.
    device : str
        See `graincast.compute.pick_device`.

    Raises
    ------
    UserError
        If there is no such model, its bytes are not those of its tag ``dvc.segmenter``, or it has no such tag; `Unavailable`
        if the registry does not answer or its files cannot be read.
    """
    from graincast.segment.segmenter import Segmenter

    if reference and Path(reference).is_dir():
        return Segmenter.load(Path(reference), device)
    with tempfile.TemporaryDirectory(prefix="graincast-") as scratch:
        return Segmenter.load(fetch(reference, Path(scratch) / "segmenter"), device)


def fetch(reference: str | int | None, into: Path) -> Path:
    """Put a verified copy of a registered segmenter's folder at `into`; `reference` and errors are `load_segmenter`'s."""
    name = str(reference) if reference is not None else None
    with _store() as client:
        uri = _model_uri(client, name)
        with _asked_for(f"model '{name or uri}'"):
            digest = _noted_digest(client, uri)
            _download_model(uri, digest, Path(into), _called(uri))
    return Path(into)


def _model_uri(client: MlflowClient, reference: str | None) -> str:
    if reference is None:
        newest = client.search_model_versions(f"name = '{MODEL}'", max_results=1, order_by=["version_number DESC"])
        if not newest:
            raise UserError(
                f"no model '{MODEL}' is registered in {without_login(client.tracking_uri)}; "
                "train one (make demo) or set MLFLOW_TRACKING_URI (source env.sh)"
            )
        aliases = _aliases(client)
        if CHAMPION not in aliases:
            logger.warning("no version of %s is the champion; the newest, %s, is taken, which nobody promoted (graincast models --history says why)",
                           MODEL, newest[0].version)
        reference = str(aliases.get(CHAMPION, newest[0].version))
    if ":/" in reference:
        return reference
    return f"models:/{MODEL}/{reference}" if reference.isdecimal() else f"models:/{MODEL}@{reference}"


def _noted_digest(client: MlflowClient, uri: str) -> str:
    """The hash that the registry, or the run that logged it, has of a model."""
    kind, _, path = uri.partition(":/")
    path = path.lstrip("/")
    if kind == "runs":
        tags = client.get_run(path.split("/")[0]).data.tags
    elif kind == "models" and "@" in path:
        tags = client.get_model_version_by_alias(*path.split("@", 1)).tags
    elif kind == "models" and path.count("/") == 1 and path.split("/")[1].isdecimal():
        tags = client.get_model_version(*path.split("/")).tags
    else:
        raise UserError(f"model '{uri}' cannot be verified; a version (3), an alias (champion), or the folder of a segmenter would be right")
    if DIGEST_TAG not in tags:
        raise UserError(f"model '{uri}' has no tag {DIGEST_TAG}, so its bytes cannot be verified; a version that graincast registered would be right")
    return str(tags[DIGEST_TAG])


def _download_model(uri: str, digest: str, into: Path, called: str) -> None:
    """Copy a model's data first and verify the copy, so that nothing can change between the check and the use."""
    from mlflow.artifacts import download_artifacts
    from mlflow.models import Model

    with tempfile.TemporaryDirectory(prefix="graincast-") as scratch:
        folder = Path(download_artifacts(uri, dst_path=scratch)).resolve()
        data = (folder / str(Model.load(str(folder)).flavors["python_function"]["data"])).resolve()
        if not data.is_relative_to(folder):
            raise UserError(f"{called} has been tampered with: its data lie outside of it; train it anew or roll back")
        _put(data, digest, into, called)


def _put(source: Path, digest: str, into: Path, called: str) -> None:
    """Copy a folder to `into` if it has this hash."""
    import shutil

    with whole_folder(into) as partial:
        shutil.copytree(source, partial, dirs_exist_ok=True)
        found = folder_digest(partial)
        if found != digest:
            raise UserError(f"{called} has been tampered with or damaged: its bytes have the DVC hash {found}, its tag says {digest}; "
                            "nothing of it was read; another version (graincast models, graincast rollback) would be right")


@contextlib.contextmanager
def _asked_for(called: str) -> Iterator[None]:
    """That a registry which answers has no such thing is its asker's mistake; whatever else fails is the store's (`reach`)."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        if error.error_code not in NOT_THERE:
            raise
        raise UserError(f"{called} cannot be loaded: {first_line(error)}") from error


def _called(uri: str) -> str:
    return f"model '{uri}'"


# What the registry holds


def versions() -> list[ModelVersion]:
    """All versions of ``graincast-segmenter``, newest first; a UserError where the registry cannot be reached."""
    with _store() as client:
        pointing: dict[int, list[str]] = {}
        for alias, number in _aliases(client).items():
            pointing.setdefault(number, []).append(alias)
        return [_as_version(found, tuple(sorted(pointing.get(int(found.version), [])))) for found in _search(client)]


def version(number: int) -> ModelVersion:
    """One version.

    Raises
    ------
    UserError
        If the registry has none of that number, or cannot be reached.
    """
    known = versions()
    for candidate in known:
        if candidate.number == number:
            return candidate
    numbers = ", ".join(str(candidate.number) for candidate in known) or "none yet"
    raise UserError(f"there is no version {number} of {MODEL} in {without_login(_uri())}; registered: {numbers}")


def champion() -> ModelVersion | None:
    """The version in use; None while there is none."""
    return _pointed_at(CHAMPION)


def previous() -> ModelVersion | None:
    """What `rollback` would bring back; None where there is nothing."""
    return _pointed_at(PREVIOUS)


def _pointed_at(alias: str) -> ModelVersion | None:
    return next((candidate for candidate in versions() if alias in candidate.aliases), None)


def _search(client: MlflowClient) -> list[Any]:
    found: list[Any] = []
    token: str | None = None
    while True:
        page = client.search_model_versions(f"name = '{MODEL}'", max_results=PAGE, order_by=["version_number DESC"], page_token=token)
        found += page
        token = page.token
        if not token:
            return found


def _as_version(found: Any, aliases: tuple[str, ...]) -> ModelVersion:
    created = datetime.fromtimestamp(found.creation_timestamp / 1000, UTC)
    return ModelVersion(int(found.version), aliases, created, found.tags.get(DIGEST_TAG, ""), dict(found.tags), found.run_id or "")


def _registered(client: MlflowClient) -> Any:
    """MLflow's registered model; None while nothing is registered."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_registered_model(MODEL)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None


def _aliases(client: MlflowClient) -> dict[str, int]:
    model = _registered(client)
    return {alias: int(number) for alias, number in model.aliases.items() if alias in ALIASES} if model else {}


def figures(which: ModelVersion, records: Sequence[Record]) -> dict[str, float]:
    """AP50 (of unlabelled sets the label-free score) by set: of the version's newest decision, else of the run that trained it."""
    decided = next((record.figures for record in records if record.version == which.number and record.figures), None)
    if decided is not None:
        return {name: found["challenger"].get("ap50", found["challenger"].get("score", float("nan"))) for name, found in decided.items()}
    with _store() as client:
        logged = client.get_run(which.run_id).data.metrics if which.run_id else {}
    return {name.removesuffix(TRAINED_FIGURE): value for name, value in sorted(logged.items()) if name.endswith(TRAINED_FIGURE)}


# Further folders of a version


def attach(number: int, name: str, folder: Path) -> str:
    """Keep a folder with a version.

    Parameters
    ----------
    number : int
        The version.
    name : str
        Such as ``reference``; a folder attached earlier under that name is replaced by this one.
    folder : Path
        A whole folder.

    Returns
    -------
    str
        Its DVC hash, which becomes the version's tag ``dvc.NAME``.

    Raises
    ------
    UserError
        If there is no such version or folder, `name` is that of the segmenter itself, or the registry cannot be written.
    """
    if not name.isidentifier() or name == "segmenter":
        raise UserError(f"a folder cannot be attached as '{name}'; a word such as 'reference' would be right")
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder, so it cannot be attached to version {number}")
    run_id, digest = version(number).run_id, folder_digest(folder)
    with _store() as client:
        client.log_artifacts(run_id, str(folder), _attached(name, digest))
        client.set_model_version_tag(MODEL, str(number), f"dvc.{name}", digest)  # last: what the tag names is there
    return digest


def fetch_attached(number: int, name: str, into: Path) -> Path:
    """Put a verified copy of a folder that `attach` kept with a version at `into`.

    Raises
    ------
    UserError
        If the version has no such folder, or its bytes are not those that were attached; `Unavailable` if the registry does
        not answer or its files cannot be read.
    """
    from mlflow.artifacts import download_artifacts

    carrier = version(number)
    digest = carrier.tags.get(f"dvc.{name}")
    if digest is None:
        raise UserError(f"version {number} of {MODEL} carries no '{name}'; it has {', '.join(carrier.hashes) or 'nothing'}")
    called = f"'{name}' of version {number} of {MODEL}"
    with _store(), tempfile.TemporaryDirectory(prefix="graincast-") as scratch:
        with _asked_for(called):
            source = Path(download_artifacts(run_id=carrier.run_id, artifact_path=_attached(name, digest), dst_path=scratch))
        _put(source, digest, Path(into), called)
    return Path(into)


def _attached(name: str, digest: str) -> str:
    """Place among the run's artifacts: by content, so that a copy that was cut off is never taken for whole."""
    return f"{ATTACHED}/{name}/{digest.removesuffix('.dir')}"


# Decisions


def promote(number: int, decision: Decision, *, by: str) -> Record:
    """Carry out what `graincast.evaluate.promotion.decide` decided, and keep it on record.

    Parameters
    ----------
    number : int
        The challenger's version.
    decision : graincast.evaluate.promotion.Decision
        For or against it, with its reasons and figures.
    by : str
        Who or what asks: a pipeline's run, for example.

    Returns
    -------
    Record
        Its `action` is ``promote``, or ``refuse``: where the decision is against it, where the champion is no longer the
        one that it was compared with, and where it was rolled back before (only `promote_by_hand` brings it back).

    Raises
    ------
    UserError
        If the decision is about another segmenter, the version cannot be loaded, or the registry cannot be reached; then
        nothing moves.
    """
    wanted = version(number)
    if decision.challenger != wanted.digest:
        raise UserError(f"the decision is about a segmenter with the DVC hash {decision.challenger}, "
                        f"but version {number} of {MODEL} has {wanted.digest}")
    if decision.promote:
        load_segmenter(str(number), "cpu")
    with _locked() as client:
        objection = _objection(client, number, decision) if decision.promote else None
        action = PROMOTE if decision.promote and not objection else REFUSE
        reasons = (objection, *decision.reasons) if objection else tuple(decision.reasons)
        record = _draft(client, action, number, by, reasons, "state of the registry" if objection else decision.decided_by, decision.figures)
        return _carry_out(client, record)


def promote_by_hand(number: int, reason: str, *, by: str) -> Record:
    """Make a version the champion because a person says so; as `promote`, without evidence.

    Raises
    ------
    UserError
        As `promote`, and if the version is champion already or no reason is given.
    """
    _require(reason)
    version(number)
    load_segmenter(str(number), "cpu")
    with _locked() as client:
        if _aliases(client).get(CHAMPION) == number:
            raise UserError(f"version {number} of {MODEL} is the champion already")
        return _carry_out(client, _draft(client, PROMOTE, number, by, (reason,), "by hand"))


def rollback(reason: str, *, by: str) -> Record:
    """Make the ``previous`` version the champion again.

    ``previous`` becomes what it was when that version was champion before, so that a second rollback goes one further back;
    the version that is taken out of use keeps a tag and is not promoted again but by hand.

    Raises
    ------
    UserError
        If there is nothing to go back to, no reason is given, the previous version cannot be loaded, or the registry
        cannot be reached.
    """
    _require(reason)
    target = previous()
    if target is None:
        raise UserError(f"there is no previous version of {MODEL} to go back to; graincast models lists the versions that can be promoted")
    load_segmenter(str(target.number), "cpu")
    with _locked() as client:
        now = _aliases(client)
        if now.get(PREVIOUS) != target.number:
            raise UserError("the champion changed while rolling back; graincast models shows the present state")
        return _carry_out(client, _draft(client, ROLLBACK, target.number, by, (reason,), "by hand"))


def repair() -> None:
    """Complete a move of aliases that was cut off, if there is one; `promote` and `rollback` do so by themselves."""
    with _locked():
        pass


def history(limit: int = 100) -> list[Record]:
    """The audit records, newest first."""
    with _store() as client:
        return _history(client, limit)


def _require(reason: str) -> None:
    if not reason.strip():
        raise UserError("a decision needs a reason; a sentence for whoever reads the records would be right")


def _objection(client: MlflowClient, number: int, decision: Decision) -> str | None:
    """Why a challenger that won does not become champion after all."""
    in_use = _aliases(client).get(CHAMPION)
    if in_use == number:
        return f"version {number} is the champion already"
    found = client.get_model_version(MODEL, str(in_use)).tags.get(DIGEST_TAG, "") if in_use else None
    if found != decision.champion:
        there = f"version {in_use}" if in_use else "none"
        return f"the champion is {there} now, not the one it was compared with; compare again"
    told = client.get_model_version(MODEL, str(number)).tags.get(ROLLED_BACK_TAG)
    return f"it was rolled back before ({told}); graincast promote {number} brings it back nevertheless" if told else None


def _draft(client: MlflowClient, action: str, number: int, by: str, reasons: Sequence[str], decided_by: str,
           figures: Mapping[str, Any] | None = None) -> Record:
    before = _aliases(client)
    in_use = before.get(CHAMPION)
    tags = {name: dict(client.get_model_version(MODEL, str(which)).tags) for name, which in (("version", number), ("champion", in_use)) if which}
    hashes = {name: {key: value for key, value in found.items() if key.startswith("dvc.")} for name, found in tags.items()}
    return Record(action, number, in_use, by, tuple(reasons), decided_by, before, _after(client, action, number, before), dict(figures or {}), hashes,
                  datetime.now(UTC).isoformat(timespec="seconds"))


def _after(client: MlflowClient, action: str, number: int, before: Mapping[str, int]) -> dict[str, int]:
    after = dict(before)
    if action == REFUSE:
        if before.get(CHAMPION) != number:
            after[CHALLENGER] = number
        return after
    after[CHAMPION] = number
    if after.get(CHALLENGER) == number:
        del after[CHALLENGER]
    earlier = before.get(CHAMPION) if action == PROMOTE else _before(client, number)
    after.pop(PREVIOUS, None)
    return {**after, PREVIOUS: earlier} if earlier and earlier != number else after


def _before(client: MlflowClient, number: int) -> int | None:
    """The champion before version `number` was promoted to champion, if that still exists and was not rolled back itself."""
    promoted = next((record for record in _history(client, PAGE) if record.promoted and record.version == number), None)
    if promoted is None or promoted.champion is None:
        return None
    known = {int(found.version): found.tags for found in _search(client)}
    there = promoted.champion in known and ROLLED_BACK_TAG not in known[promoted.champion]
    return promoted.champion if there else None


def _carry_out(client: MlflowClient, record: Record) -> Record:
    """Write the record, then move the aliases, then finish it; the order is explained at the top of this module."""
    record = _begin(client, record)
    if record.after != record.before:
        out = {str(record.champion): record.reasons[0][:REASON_LENGTH]} if record.action == ROLLBACK and record.champion else {}
        move = {"record": record.id, "after": record.after, "rolled_back": out}
        client.set_registered_model_tag(MODEL, MOVE_TAG, json.dumps(move, sort_keys=True))
        _move(client, move)
    else:
        _finish(client, record.id)
    return record


def _move(client: MlflowClient, move: Mapping[str, Any]) -> None:
    """Do what a move says, from its beginning; done twice it gives the same."""
    after = move["after"]
    for alias in (PREVIOUS, CHAMPION, CHALLENGER):
        if alias in after:
            client.set_registered_model_alias(MODEL, alias, str(after[alias]))
    for alias in _aliases(client).keys() - after.keys():
        client.delete_registered_model_alias(MODEL, alias)
    for number, reason in move["rolled_back"].items():
        client.set_model_version_tag(MODEL, number, ROLLED_BACK_TAG, reason)
    if CHAMPION in after:
        client.delete_model_version_tag(MODEL, str(after[CHAMPION]), ROLLED_BACK_TAG)
    _finish(client, move["record"])
    client.delete_registered_model_tag(MODEL, MOVE_TAG)


def _complete(client: MlflowClient) -> None:
    """Finish what a killed process left: its move, and its record."""
    model = _registered(client)
    if model is None:
        return
    if MOVE_TAG in model.tags:
        _move(client, json.loads(model.tags[MOVE_TAG]))
    for run in _decision_runs(client, "attributes.status = 'RUNNING'", PAGE):
        client.set_tag(run.info.run_id, "status", ABANDONED)
        client.set_terminated(run.info.run_id, "KILLED")


def _begin(client: MlflowClient, record: Record) -> Record:
    kept = asdict(record)
    tags = {"action": record.action, "version": str(record.version), "by": record.by, "decided_by": record.decided_by, "when": record.when,
            "reasons": "; ".join(record.reasons)[: 10 * REASON_LENGTH]}
    # the name MLflow shows; no user's name is kept unless `by` has one
    run = client.create_run(ensure_experiment(DECISIONS), tags=tags, run_name=f"{record.action} version {record.version}")
    client.log_text(run.info.run_id, json.dumps(kept, indent=1, sort_keys=True), RECORD_FILE)
    client.log_batch(run.info.run_id, params=[], metrics=_metrics(record.figures))
    return replace(record, id=run.info.run_id)


def _finish(client: MlflowClient, run_id: str) -> None:
    client.set_tag(run_id, "status", DONE)
    client.set_terminated(run_id, "FINISHED")


def _metrics(figures: Mapping[str, Any], prefix: str = "") -> list[Any]:
    """The numbers of nested figures, as MLflow's metrics."""
    from mlflow.entities import Metric

    found = []
    for name, value in figures.items():
        path = f"{prefix}{name}"
        if isinstance(value, Mapping):
            found += _metrics(value, f"{path}/")
        elif isinstance(value, int | float) and not isinstance(value, bool) and np.isfinite(value):
            found.append(Metric("".join(c if c.isalnum() or c in "_-./ " else "_" for c in path), float(value), 0, 0))
    return found


def _history(client: MlflowClient, limit: int) -> list[Record]:
    return [_read(client, run) for run in _decision_runs(client, "", limit)]


def _decision_runs(client: MlflowClient, condition: str, limit: int) -> list[Any]:
    experiment = client.get_experiment_by_name(DECISIONS)
    if experiment is None:
        return []
    return list(client.search_runs([experiment.experiment_id], condition, max_results=limit, order_by=["attributes.start_time DESC"]))


def _read(client: MlflowClient, run: Any) -> Record:
    """A record; of one that was cut off before its file was there, what its tags say."""
    from mlflow.exceptions import MlflowException

    tags = run.data.tags
    state = {"status": tags.get("status", "under way"), "id": run.info.run_id}
    try:
        with tempfile.TemporaryDirectory(prefix="graincast-") as scratch:
            kept = json.loads(Path(client.download_artifacts(run.info.run_id, RECORD_FILE, scratch)).read_text())
    except (MlflowException, OSError):
        number = int(tags.get("version", 0))
        return Record(tags.get("action", ""), number, None, tags.get("by", ""), (tags.get("reasons", ""),), tags.get("decided_by", ""), {}, {},
                      when=tags.get("when", ""), **state)
    return Record(**{**kept, "reasons": tuple(kept["reasons"]), **state})


# Reaching it


@contextlib.contextmanager
def _locked() -> Iterator[MlflowClient]:
    """The registry for one process alone, after what an earlier one left half done is completed."""
    from filelock import FileLock, Timeout

    path = _lock_file()
    lock = FileLock(path, timeout=LOCK_SECONDS, mode=0o666)
    try:
        lock.acquire()
    except Timeout:
        raise Unavailable(f"another promotion holds {path} since {LOCK_SECONDS:.0f} s; try again when it is through") from None
    except OSError as error:
        raise UserError(f"the registry cannot be locked, {path}: {error.strerror or error}") from error
    try:
        with _store() as client:
            _complete(client)
            yield client
    finally:
        lock.release()


def _lock_file() -> Path:
    uri = _uri()
    scheme, _, database = uri.partition(":///")
    if scheme == "sqlite" and database:
        file = Path(database).absolute()
        return file.with_name(f"{file.name}.graincast-lock")
    return Path(tempfile.gettempdir()) / f"graincast-registry-{hashlib.sha256(uri.encode()).hexdigest()[:12]}.lock"


def _uri() -> str:
    import mlflow

    return str(mlflow.get_tracking_uri())


def _store() -> contextlib.AbstractContextManager[MlflowClient]:
    return reach("the model registry")
