"""Render the pages of docs/reference/ from their templates and the tables of the code."""

from __future__ import annotations

import re
from pathlib import Path

import jinja2

from hpo.errors import UserError
from scripts.reference import commands, plug_ins, records, study_file

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs/reference"
NOTE = "<!-- Written by `python -m scripts.reference`: change the code, or scripts/reference/pages/. -->\n\n"


def render_pages() -> dict[str, str]:
    """Return the text of each page by the name of its file."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "pages"), undefined=jinja2.StrictUndefined
    )
    for module in (commands, plug_ins, records, study_file):
        environment.globals.update({name: getattr(module, name) for name in module.__all__})
    environment.globals["wrong_request"] = UserError.exit_code
    names = sorted(environment.list_templates())
    pages = {name: NOTE + environment.get_template(name).render() + "\n" for name in names}
    check_variables(pages["environment.md"])
    return pages


def check_variables(page: str) -> None:
    """Check that the page has the environment variables that the code reads, and no others."""
    pattern = r"\bHPO_[A-Z_]*[A-Z]\b"
    read = {name for path in (ROOT / "hpo").rglob("*.py") for name in re.findall(pattern, path.read_text())}
    described = set(re.findall(pattern, page))
    assert read == described, f"read but not described, or the other way round: {read ^ described}"
