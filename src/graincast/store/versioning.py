"""Versions of folders in DVC: content in, 32 digits out, and back.

A stage's output folder is stored in the DVC cache of the checkout it lies in (and in the default DVC remote,
where one is configured) under the same hash that ``dvc add`` and ``dvc repro`` would give it.

Notes
-----
This goes through DVC's object store rather than through ``.dvc`` files, because what a run makes is named by
the pipeline's own records, not by git: DVC refuses ``.dvc`` files in a git-ignored folder, holds one lock for
the whole checkout while it writes them (two runs at once would wait for each other or fail) and edits git's
index. Objects are written under a temporary name and renamed, so any number of processes may add and fetch at
once without a lock. The price: ``dvc gc`` does not know these versions. It empties the cache of them, as it
does of anything that no ``.dvc`` file names; the folders under ``runs/`` and the remote keep their bytes, and
`fetch` finds them there.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from graincast.errors import Unavailable, UserError, without_login
from graincast.store.imageset import folder_digest, whole_folder


@dataclass(frozen=True)
class Version:
    """A folder's content.

    Attributes
    ----------
    md5 : str
        DVC's hash, 32 hexadecimal digits and ``.dir``.
    size : int
        Bytes of all files together.
    files : int
        Number of files.
    """

    md5: str
    size: int
    files: int


@dataclass(frozen=True)
class Artifact:
    """A folder that is no ImageSet: a model, an evaluation, a report.

    Attributes
    ----------
    path : Path
        The folder.
    kind : str
        What it holds, e.g. ``translator``, ``segmenter``, ``evaluation``, ``report``.
    """

    path: Path
    kind: str

    @cached_property
    def digest(self) -> str:
        """The folder's DVC hash (see `graincast.store.imageset.folder_digest`)."""
        return folder_digest(self.path)


def initialise(root: Path | str) -> None:
    """Make `root` a DVC project if it is none yet, as ``dvc init`` does, in git or outside it."""
    from dvc.config import Config
    from dvc.repo import Repo

    _quieten()
    root = Path(root)
    in_git = (root / ".git").exists()
    if not (root / ".dvc" / "config").exists():
        Repo.init(str(root), no_scm=not in_git).close()
        with Config(str(root / ".dvc")).edit("repo") as config:
            config["core"] |= {"analytics": False, "check_update": False}
            config["cache"]["type"] = ["reflink", "hardlink", "copy"]  # bytes once where possible
    elif not in_git:
        with Config(str(root / ".dvc")).edit("local") as config:
            config["core"]["no_scm"] = True


def add(folder: Path | str) -> Version:
    """Store a folder's content in DVC.

    Parameters
    ----------
    folder : Path
        A whole folder inside a DVC project. Its files become read-only links into the cache where the file
        system has links, so the bytes exist once.

    Returns
    -------
    Version

    Raises
    ------
    UserError
        If the folder is absent or empty, or lies in no DVC project; `Unavailable` if the cache or the default remote cannot be written.
    """
    from dvc_data.hashfile.build import build
    from dvc_data.hashfile.checkout import checkout
    from dvc_data.hashfile.transfer import transfer
    from dvc_objects.fs.generic import test_links

    folder = Path(folder).absolute()
    if not folder.is_dir() or not any(folder.iterdir()):
        raise UserError(f"{folder} is not a folder with files in it, so there is nothing to version")
    with _project(folder) as repo:
        cache = repo.cache.local
        staging, meta, tree = build(cache, str(folder), repo.fs, "md5")
        # DVC takes a plain copy for a reflink: given the whole list, it leaves two copies without reflinks.
        cache.cache_types = test_links(cache.cache_types, cache.fs, cache.path, repo.fs, str(folder))[:1]
        hardlink = cache.cache_types[0] == "hardlink"
        result = transfer(staging, cache, {tree.hash_info}, shallow=False, hardlink=hardlink)
        _complete(result.failed, f"cache {cache.path}")
        checkout(str(folder), repo.fs, tree, cache, relink=True, force=True, state=repo.state, old=tree)
        if remote := repo.config["core"].get("remote"):
            with _readable(f"DVC remote '{remote}' cannot take {tree.hash_info.value}"):
                _complete(repo.cloud.push({tree.hash_info} | _files(tree)).failed, f"remote '{remote}'")
    return Version(str(tree.hash_info.value), meta.size or 0, meta.nfiles or 0)


def fetch(version: Version, path: Path | str) -> Path:
    """Make a version's folder stand at `path`.

    Parameters
    ----------
    version : Version
        What `add` returned, here or on another machine.
    path : Path
        Where it shall stand, inside a DVC project. What is there already is kept if it is this version, else
        replaced.

    Returns
    -------
    Path
        `path`.

    Raises
    ------
    UserError
        If neither `path`, nor the cache, nor the default remote has the content; `Unavailable` if the remote does not answer.
    """
    path = Path(path).absolute()
    if path.is_dir() and folder_digest(path) == version.md5:
        return path
    with _project(path) as repo:
        tree = _load(repo, version.md5)
        with whole_folder(path) as partial:
            from dvc_data.hashfile.checkout import checkout

            checkout(str(partial), repo.fs, tree, repo.cache.local, force=True)
    return path


def _load(repo: Any, md5: str) -> Any:
    """The listing of folder `md5`, with all of it in the cache; what the cache lacks is pulled first."""
    from dvc_data.hashfile.hash_info import HashInfo
    from dvc_data.hashfile.tree import Tree

    listing, cache = HashInfo("md5", md5), repo.cache.local
    _complete_cache(repo, md5, {listing})
    tree = Tree.load(cache, listing)
    _complete_cache(repo, md5, _files(tree))
    return tree


def _files(tree: Any) -> set[Any]:
    """The hashes of a listing's files."""
    return {info for _, _, info in tree}


def _complete_cache(repo: Any, md5: str, objects: set[Any]) -> None:
    """Pull those of folder `md5`'s objects that the cache lacks."""
    cache, remote = repo.cache.local, repo.config["core"].get("remote")
    lacking = {info for info in objects if not _sound(cache, info.value)}
    if lacking and remote:
        with _readable(f"version {md5} cannot be pulled from DVC remote '{remote}'"):
            repo.cloud.pull(lacking)
        lacking = {info for info in lacking if not _sound(cache, info.value)}
    if lacking:
        other = f"nor in DVC remote '{remote}'" if remote else "and no DVC remote is configured"
        missing = min(info.value for info in lacking)
        remedy = "delete nothing; pull from a remote that has it, or run once with `enable_cache: false` in the configuration"
        raise UserError(f"version {md5} is lost: object {missing} is not in {cache.path}, {other}; {remedy}")


def _sound(cache: Any, md5: str) -> bool:
    """Whether the cache holds object `md5` unharmed; one that was written to is removed, to be pulled again.

    DVC trusts a read-only cache file without looking, but a process with root's rights writes through links.
    """
    file = Path(cache.oid_to_path(md5))
    if not file.exists():
        return False
    with file.open("rb") as stream:
        sound = hashlib.file_digest(stream, "md5").hexdigest() == md5.removesuffix(".dir")
    if not sound:
        file.unlink(missing_ok=True)
    return sound


@contextlib.contextmanager
def _project(path: Path) -> Iterator[Any]:
    """The DVC project around `path`, wherever the process stands; git plays no part in it."""
    from dvc.exceptions import NotDvcRepoError
    from dvc.repo import Repo

    _quieten()
    existing = next(p for p in (path, *path.parents) if p.is_dir())
    try:
        repo = Repo(Repo.find_root(str(existing)), config={"core": {"no_scm": True}})
    except NotDvcRepoError:
        raise UserError(f"{path} lies in no DVC project; run `make setup` or `dvc init` first") from None
    with repo:
        yield repo


def _quieten() -> None:
    """Silence DVC's remarks for its command line; what fails is raised here."""
    logging.getLogger("dvc").setLevel(logging.ERROR)


@contextlib.contextmanager
def _readable(message: str) -> Iterator[None]:
    """What a remote says when it fails, in one sentence; remotes raise their libraries' own exceptions."""
    from dvc.exceptions import DvcException
    from dvc_objects.errors import ObjectDBError

    try:
        yield
    except (DvcException, ObjectDBError, OSError) as error:
        raise Unavailable(f"{message}: {without_login(str(error))}") from error


def _complete(failed: set[Any], where: str) -> None:
    if failed:
        raise Unavailable(f"{len(failed)} objects could not be written to the DVC {where}; is it full?")
