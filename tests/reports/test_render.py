"""The report: a page that a real browser draws from disk without a network, the other formats, and the dashboard."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hpo.api import exporting
from hpo.errors import UserError
from hpo.reports.output_file import is_report
from hpo.reports.render import render_report
from hpo.store.store import Store
from tests.reports.examples import reported, unusual


@pytest.mark.parametrize("name", unusual())
@pytest.mark.parametrize("form", ["html", "md", "json"])
def test_whatever_a_study_is_like_it_can_be_reported(name: str, form: str) -> None:
    made = reported(*unusual()[name])
    content = render_report(made, form)
    assert is_report(content)
    if form == "json":
        told = json.loads(content)
        assert told["answer"] == made.answer.sentences
        assert len(told["trials"]) == len(made.trials)


def test_the_command_writes_a_page_that_says_what_best_says(hpo: Any, trained: Store, tmp_path: Path) -> None:
    assert hpo.here("report", "s") == (0, "wrote s.html\n")
    page = (tmp_path / "s.html").read_text()
    headline, *lines = hpo.here("best", "s", "--verbose")[1].splitlines()
    assert headline[1:] in page
    for line in lines:
        label, _, text = line.strip().partition(":")
        if label == "study":
            assert "answered from the store, nothing trained" in text
        else:
            assert text.strip().removesuffix(")").rpartition(" (")[2] in page, "a card has the fact and its note apart"


def test_the_format_is_what_the_file_ends_in_or_as_said(trained: Store, tmp_path: Path) -> None:
    def written(name: str, **options: Any) -> bytes:
        return exporting.report("s", tmp_path / name, storage=str(trained.url), **options).read_bytes()

    assert json.loads(written("s.json"))["study"] == "s"
    assert written("s.txt", form="md").startswith(b"<!-- hpo report -->\n# Study s")
    for name, options, said in [
        ("s.gif", {}, r"--output must end in \.html, \.png, \.svg, \.md, \.json, got '.*s\.gif'"),
        ("s.md", {"form": "pdf"}, "--format must be one of html, json, md, png, svg; got 'pdf'"),
        ("s.svg", {"figure": "respones"}, r"--figure must be one of .* \(did you mean 'response'\?\)"),
    ]:
        with pytest.raises(UserError, match=said):
            written(name, **options)
        assert not (tmp_path / name).exists()


def test_a_store_that_can_only_be_read_is_reported_on(trained: Store, tmp_path: Path) -> None:
    url = f"sqlite:///file:{tmp_path}/hpo.db?mode=ro&uri=true"
    assert is_report(exporting.report("s", tmp_path / "s.md", storage=url).read_bytes())
