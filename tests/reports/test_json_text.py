"""A report as JSON."""

from __future__ import annotations

import json

from hpo.reports.render import render_report
from hpo.reports.study_report import StudyReport


def test_json_has_the_answer_the_curves_of_the_responses_and_every_trial(small: StudyReport) -> None:
    told = json.loads(render_report(small, "json"))
    assert small.best is not None
    assert told["interval"] == list(small.best.interval or ())
    assert [len(response["mean"]) for response in told["responses"]] == [161] * 3
    assert [trial["number"] for trial in told["trials"]] == [trial.number for trial in small.trials]
    assert told["figures"] == {drawn.name: drawn.caption for drawn in small.figures}
    assert told["spec"]["name"] == small.study.name
