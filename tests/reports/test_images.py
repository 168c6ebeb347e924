"""A figure of a report as an image."""

from __future__ import annotations

import shutil
import struct

import pytest

from hpo.errors import UserError
from hpo.reports.images import IMAGE_WIDTH
from hpo.reports.output_file import is_report
from hpo.reports.render import render_report
from hpo.reports.study_report import StudyReport
from tests.analysis.examples import complete, make_study, numbered
from tests.reports.examples import reported


@pytest.mark.parametrize(("form", "start"), [("png", b"\x89PNG"), ("svg", b"<svg")])
def test_an_image_is_of_one_figure(small: StudyReport, form: str, start: bytes) -> None:
    pytest.importorskip("kaleido", reason="kaleido is not installed (pip install 'hpo-studies[images]')")
    if not any(map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))):
        pytest.skip("there is no Chromium here (apt-get install chromium)")
    content = render_report(small, form, figure="history")
    assert content.startswith(start)
    assert is_report(content)
    if form == "png":
        assert struct.unpack(">II", content[16:24]) == (2 * IMAGE_WIDTH, 2 * 360)


def test_without_kaleido_an_image_is_refused_in_a_sentence(small: StudyReport, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "kaleido", None)
    with pytest.raises(UserError, match=r"--format png needs the package kaleido: pip install 'hpo-studies\[images\]'"):
        render_report(small, "png")


def test_a_figure_that_there_is_not_is_refused_with_those_that_there_are() -> None:
    plain = reported(make_study(), numbered(*complete()))
    with pytest.raises(UserError, match="--figure importance has nothing to show in study 's'; there are: response, "):
        render_report(plain, "svg", figure="importance")
