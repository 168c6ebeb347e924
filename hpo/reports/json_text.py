"""A report as JSON."""

from __future__ import annotations

import json

from hpo.reports.study_report import StudyReport, provenance_rows
from hpo.study.records import trial_as_dict


def render_json(report: StudyReport, _figure: str) -> bytes:
    """Return the report as JSON: the answer, the curves of its responses, the captions of the figures, every trial."""
    best = report.best
    answer = best.as_dict() if best else {"trial": None, "warnings": []}
    responses = [{"params": dict(params), **response.as_dict()} for params, response in best.responses] if best else []
    content = {
        "what": f"hpo report of study {report.study.name}",
        "study": report.study.name,
        "answer": report.answer.sentences,
        **answer,
        "responses": responses,
        "figures": {figure.name: figure.caption for figure in report.figures},
        "trials": [trial_as_dict(trial) for trial in report.trials],
        "facts": dict(report.study.metadata),
        "provenance": dict(provenance_rows(report)),
        "spec": report.study.spec.frozen(),
    }
    return (json.dumps(content, indent=1, allow_nan=False) + "\n").encode()
