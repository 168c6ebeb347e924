"""One name stands for one thing in the whole package."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import hpo

PACKAGE = Path(hpo.__file__).parent
IN_EVERY_MODULE = {"logger"}


def top_level_names(module: ast.Module) -> Iterator[str]:
    """Yield what a module defines: classes, functions and variables, but not what it imports."""
    for statement in module.body:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield statement.name
        targets = statement.targets if isinstance(statement, ast.Assign) else []
        if isinstance(statement, ast.AnnAssign):
            targets = [statement.target]
        for target in targets:
            yield from (node.id for node in ast.walk(target) if isinstance(node, ast.Name))


def test_no_name_is_defined_in_two_modules() -> None:
    modules = defaultdict(set)
    for path in PACKAGE.rglob("*.py"):
        if path.name == "__init__.py":  # it repeats names, to make them public
            continue
        for name in top_level_names(ast.parse(path.read_text())):
            modules[name].add(str(path.relative_to(PACKAGE)))
    twice = {name: sorted(places) for name, places in modules.items() if len(places) > 1}
    assert twice.keys() <= IN_EVERY_MODULE, twice
