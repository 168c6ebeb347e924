"""A report as JSON."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from hpo.study.records import trial_as_dict

if TYPE_CHECKING:
    pass
from hpo.report.study_report import StudyReport, provenance_rows


def render_json(report: StudyReport, _figure: str) -> bytes:
    found = report.best
    answer = found.as_dict() if found else {"trial": None, "warnings": []}
    curves = [{"params": dict(params), **curve.as_dict()} for params, curve in found.responses] if found else []
    told = {
        "what": f"hpo report of study {report.study.name}",
        "study": report.study.name,
        "answer": report.answer,
        **answer,
        "responses": curves,
        "figures": {entry.name: entry.text for entry in report.drawn},
        "trials": [trial_as_dict(trial) for trial in report.trials],
        "facts": dict(report.study.metadata),
        "provenance": dict(provenance_rows(report)),
        "spec": report.study.spec.frozen(),
    }
    return (json.dumps(told, indent=1, allow_nan=False) + "\n").encode()
