"""The file of a report: never written over another kind of file, and whole or not at all."""

from __future__ import annotations

import json
import sqlite3
import stat
from contextlib import closing
from pathlib import Path

import pytest

from hpo.api import exporting
from hpo.errors import UserError
from hpo.reports.output_file import write_report_file
from hpo.reports.render import FORMATS, render_report
from hpo.reports.study_report import StudyReport
from hpo.store.store import Store


def test_only_a_report_of_ours_is_written_over_and_all_of_it_or_nothing(small: StudyReport, tmp_path: Path) -> None:
    path = tmp_path / "report.md"
    write_report_file(path, render_report(small, "md"))
    path.chmod(0o640)
    write_report_file(path, render_report(small, "json"))
    assert json.loads(path.read_text())["study"] == small.study.name
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.md"]
    for foreign in (b"mine", b"", b"<!doctype html>\n<p>about hpo report</p>", b"# hpo report\n<!-- hpo report -->"):
        path.write_bytes(foreign)
        with pytest.raises(UserError, match="exists and was not written by hpo report"):
            write_report_file(path, b"x")
        assert path.read_bytes() == foreign
    with pytest.raises(UserError, match="cannot be written: No such file or directory"):
        write_report_file(tmp_path / "none" / "report.md", b"x")
    with pytest.raises(UserError, match="cannot be written: Is a directory"):
        write_report_file(tmp_path, b"x")


def test_a_store_that_a_report_was_published_in_is_no_report(trained: Store, tmp_path: Path) -> None:
    exporting.report("s", tmp_path / "s.html", storage=str(trained.url))
    database = tmp_path / "copy.db"  # which nothing has open, so that no checkpoint of SQLite's changes it meanwhile
    with closing(sqlite3.connect(trained.url.database or "")) as source, closing(sqlite3.connect(database)) as copy:
        source.backup(copy)
    before = database.read_bytes()
    for form in FORMATS.keys() - {"png", "svg"}:
        with pytest.raises(UserError, match="was not written by hpo report"):
            exporting.report("s", database, form=form, storage=str(trained.url))
    assert database.read_bytes() == before
