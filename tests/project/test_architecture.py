"""No class and no function of the package is larger than can be read at a sitting, and each module is in the map.

The linter holds the rest: complexity, statements and public methods (ruff), and who imports whom (import-linter).
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import hpo

PACKAGE = Path(hpo.__file__).parent
MAX_LINES_OF_A_CLASS, MAX_LINES_OF_A_FUNCTION = 250, 60


def too_long(kinds: tuple[type[ast.AST], ...], *, max_lines: int) -> list[str]:
    """Return the definitions of these kinds that have more lines, with their modules."""
    return [
        f"{path.relative_to(PACKAGE)}: {node.name} has {lines} lines"
        for path in sorted(PACKAGE.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and isinstance(node, kinds)
        for lines in [(node.end_lineno or node.lineno) - node.lineno + 1]
        if lines > max_lines
    ]


def test_no_class_is_longer_than_can_be_read_at_a_sitting() -> None:
    assert too_long((ast.ClassDef,), max_lines=MAX_LINES_OF_A_CLASS) == []


def test_no_function_is_longer_than_a_screen() -> None:
    assert too_long((ast.FunctionDef, ast.AsyncFunctionDef), max_lines=MAX_LINES_OF_A_FUNCTION) == []


def test_the_map_of_the_package_names_every_module() -> None:
    """Figures have a table of their own."""
    named = set(re.findall(r"\w+", (PACKAGE.parent / "docs" / "contributing" / "architecture.md").read_text()))
    modules = [path for path in PACKAGE.rglob("*.py") if path.parent.name != "figures" and path.stem[0] != "_"]
    assert sorted(str(path.relative_to(PACKAGE)) for path in modules if path.stem not in named) == []
