"""The keys of JSON output, the warnings and the public names of Python, from docstrings."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Mapping

import hpo
from hpo.analysis.answer import Best
from hpo.analysis.comparison import ComparedStudy, Comparison
from hpo.analysis.confirmation import Candidate, Confirmation, RunnerUp
from hpo.analysis.peak import Peak
from hpo.analysis.response import CURVES, JSON_KEYS, Response
from hpo.analysis.warnings import WARNINGS
from hpo.doctor import Finding
from hpo.study.records import Attempt, TrialRecord
from hpo.train.lr_ramp import RangeTest
from scripts.reference.markdown import code, summary, table, unwrapped

__all__ = [
    "answer",
    "list_of_studies",
    "python_entries",
    "python_names",
    "record",
    "response",
    "status",
    "trial",
    "warnings",
]

RECORDS: dict[str, type] = {
    one.__name__: one
    for one in (Attempt, Candidate, ComparedStudy, Comparison, Confirmation, Finding, Peak, RangeTest, RunnerUp)
}


def record(name: str, *, renamed: Mapping[str, str] | None = None, **others: str) -> str:
    """Return the table of a dataclass's fields, some under the names that they have in JSON, after other keys."""
    fields = attributes_of(RECORDS[name])
    return keys(others | {(renamed or {}).get(field, field): text for field, text in fields.items()})


def answer() -> str:
    fields = attributes_of(Best)
    first = {name: fields.pop(name) for name in ("trial", "params", "value")}
    own = {
        "best_trial": "The same three, as `number`, `params` and `value`.",
        "lr": "The learning rate to train with: that of `recommended`.",
        "recommended": "The values to train with: the confirmed ones, else the best trial's with the best rate.",
        "determined": "Whether the interval says which learning rate is best; None without a response.",
    }
    warned = {"warnings": "What to be careful about: objects with `kind` ([all kinds](warnings.md)) and `text`."}
    return keys(first | own | fields | warned)


def response() -> str:
    fields = {JSON_KEYS.get(name, name): text for name, text in attributes_of(Response).items()}
    return keys({name: text for name, text in fields.items() if name not in CURVES})


def trial() -> str:
    fields = attributes_of(TrialRecord)
    not_printed = {"worker_id", "attributes", "started", "ended", "replicate", "tested"}
    own = {
        "train_loss, val_accuracy": "Two of the curves, always there.",
        "duration_s": "Seconds of the latest attempt, once the trial has ended.",
    }
    return keys({name: text for name, text in fields.items() if name not in not_printed} | own)


def status() -> str:
    """Return the table of what `hpo.status` returns: a list of `- key: text` in its docstring."""
    items = re.split(r"^- ", returned(hpo.status), flags=re.MULTILINE)[1:]
    pairs = [item.partition(": ") for item in items]
    return keys({name: " ".join(text.split()) for name, _, text in pairs})


def list_of_studies() -> str:
    return in_json(unwrapped(returned(hpo.studies)))


def keys(fields: Mapping[str, str]) -> str:
    return table(["key", "meaning"], [(code(name.split(", ")), in_json(text)) for name, text in fields.items()])


def in_json(text: str) -> str:
    return re.sub(r"\bNone\b", "null", text)


def warnings() -> str:
    rows = []
    for kind, check in WARNINGS.items():
        when = unwrapped(inspect.getdoc(check) or "").replace("\n\n", " ").removeprefix("Warn if ").removesuffix(".")
        rows.append((f"`{kind}`", when))
    return table(["kind", "when"], rows)


def python_names() -> str:
    rows = [(f"[`hpo.{name}`](#hpo.{name})", summary(getattr(hpo, name))) for name in hpo.__all__]
    return table(["name", "what it is or does"], rows)


def python_entries() -> str:
    return "\n".join(f"::: hpo.{name}\n" for name in hpo.__all__)


def attributes_of(one: type) -> dict[str, str]:
    """Return what a dataclass's docstring says of each field, in its section Attributes."""
    described = items_of("Attributes", one)
    names = [field.name for field in dataclasses.fields(one)]
    missing = [name for name in names if name not in described]
    assert not missing, f"the docstring of {one.__name__} describes no {', '.join(missing)}"
    return {name: described[name] for name in names}


def items_of(title: str, thing: object) -> dict[str, str]:
    """Return the items of a section of a Google-style docstring."""
    items = re.split(r"\n(?=\S)", section_of(title, thing))
    return {name: " ".join(text.split()) for name, _, text in (item.partition(": ") for item in items)}


def returned(function: object) -> str:
    return section_of("Returns", function)


def section_of(title: str, thing: object) -> str:
    """Return the text of a section of a Google-style docstring, without its indentation."""
    text = (inspect.getdoc(thing) or "").partition(f"\n{title}:\n")[2]
    return inspect.cleandoc("\n" + re.split(r"\n\n(?=\S)", text)[0])
