"""Which files of the library make a stage's output, found by following the imports from `graincast.stages`."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = ROOT / "src"
STAGES = "graincast.stages"
NOT_FOLLOWED = (STAGES, "graincast.config")
"""What all stages share: of the former, a stage follows its own functions; the latter's values are in its parameters."""


def source_files(*functions: str) -> list[str]:
    """The Python files that the given functions of `graincast.stages` run, relative to the checkout, sorted.

    That module itself is among them; `graincast.config` is not, since the parameters say what matters of it.

    Parameters
    ----------
    *functions : str
        Names such as ``run_simulate``. None: no files.

    Raises
    ------
    LookupError
        If there is no such function.
    """
    if not functions:
        return []
    files, pending = {_file(STAGES)}, set().union(*map(_entry_modules, functions))
    while pending:
        module = pending.pop()
        if module not in NOT_FOLLOWED and _file(module) not in files:
            files.add(_file(module))
            pending |= _imported_modules(module)
    return sorted(str(file.relative_to(ROOT)) for file in files if file)


def _entry_modules(function: str) -> set[str]:
    """The modules whose names a function of `graincast.stages` uses, itself or through others of that file."""
    tree = _tree(STAGES)
    local = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    if function not in local:
        raise LookupError(f"{STAGES} has no function '{function}'")
    imported: dict[str, set[str]] = {}
    for module, name in _imports(tree):
        imported.setdefault(name, set()).add(module)
    modules: set[str] = set()
    seen, pending = set(), {function}
    while pending:
        node = local[pending.pop()]
        seen.add(node.name)
        modules |= {module for module, _ in _imports(node)}
        names = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
        modules = modules.union(*(imported[name] for name in names & imported.keys()))
        pending |= (names & local.keys()) - seen
    return modules


def _imports(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Every module of the library that is imported somewhere in `tree` at run time, with the name it is known by there."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, alias.asname or alias.name.partition(".")[0]) for alias in node.names if _file(alias.name))
        elif isinstance(node, ast.ImportFrom) and node.module and _file(node.module):
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                yield submodule if _file(submodule) else node.module, alias.asname or alias.name
        elif isinstance(node, ast.stmt | ast.excepthandler):
            yield from _imports(node)


@cache
def _imported_modules(module: str) -> frozenset[str]:
    return frozenset(imported for imported, _ in _imports(_tree(module)))


@cache
def _tree(module: str) -> ast.Module:
    file = _file(module)
    assert file, module
    return ast.parse(file.read_text(), str(file))


@cache
def _file(module: str) -> Path | None:
    """The file of a module of the library; None for others'."""
    path = LIBRARY.joinpath(*module.split("."))
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)
