"""The JSON schema of study files is the committed one, and agrees with what a study file is held to."""

from __future__ import annotations

import copy
import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

from hpo.config.schema import study_schema
from hpo.config.study_file import expand_compare
from hpo.config.study_spec import StudySpec
from hpo.errors import UserError

jsonschema = pytest.importorskip("jsonschema")
ROOT = Path(__file__).parents[2]
COMMITTED = ROOT / "docs" / "study.schema.json"
STUDIES = sorted((ROOT / "studies").glob("*.toml"))
SAMPLED: dict[str, Any] = {"name": "s", "search": {"space": {"lr": {"low": 1e-5, "high": 0.1, "log": True}}}}
CONDITIONAL: dict[str, Any] = {
    "name": "s",
    "search": {"space": {"optimizer": ["adam", "sgd"], "lr": {"by": {"optimizer": {"adam": "auto", "sgd": [0.1]}}}}},
}


def is_valid(settings: dict[str, Any]) -> bool:
    return not list(jsonschema.Draft7Validator(study_schema()).iter_errors(settings))


def changed(settings: dict[str, Any], section: str, key: str, value: object) -> dict[str, Any]:
    settings = copy.deepcopy(settings)
    settings.setdefault(section, {})[key] = value
    return settings


def is_accepted(settings: dict[str, Any]) -> bool:
    try:
        for study in expand_compare(settings, source="test"):
            StudySpec.from_dict(study)
    except UserError:
        return False
    return True


def test_the_committed_schema_is_that_of_the_code() -> None:
    message = "run: python -m hpo.config.schema > docs/study.schema.json"
    assert json.loads(COMMITTED.read_text()) == study_schema(), message
    jsonschema.Draft7Validator.check_schema(study_schema())


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_study_fits_the_schema_and_names_it(path: Path) -> None:
    text = path.read_text()
    assert is_valid(tomllib.loads(text))
    schema = text.partition("\n")[0].removeprefix("#:schema ")
    assert (path.parent / schema).resolve() == COMMITTED


def test_every_key_has_a_description() -> None:
    schema = study_schema()
    tables = {section: table for section, table in schema["definitions"].items() if "properties" in table}
    for section, table in tables.items():
        for key, field in table["properties"].items():
            assert field.get("description"), f"{section}.{key}"


@pytest.mark.parametrize("settings", [SAMPLED, CONDITIONAL], ids=["range", "cases"])
def test_what_is_accepted_fits_the_schema(settings: dict[str, Any]) -> None:
    assert is_accepted(settings)
    assert is_valid(settings)
    assert is_valid(StudySpec.from_dict(settings).frozen())


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("search", "trials", 0),
        ("search", "trials", 2.5),
        ("search", "smapler", "tpe"),
        ("search", "sampler", "bayes"),
        ("search", "space", {"lr": 0.1}),
        ("search", "space", {"lr": {"low": 0.1, "hihg": 1.0}}),
        ("search", "space", {"lr": []}),
        ("search", "space", {"lr": {"by": {}}}),
        ("pruner", "name", "hyperbrand"),
        ("data", "validation_fraction", 1.0),
        ("data", "crop", 65),
        ("training", "lr", 0.0),
        ("training", "epochs", True),
        ("training", "checkpoint_epochs", 0),
        ("training", "checkpoint_epochs", "often"),
        ("training", "precision", "fp8"),
        ("training", "epoch", 3),
        ("training", "optimizer", "adm"),
        ("engine", "lanes", 0),
        ("engine", "lanes", "all"),
        ("checkpoints", "url", "relative/folder"),
        ("confirm", "seeds", 1),
        ("objective", "direction", "up"),
        ("trainings", "lr", 0.1),
    ],
)
def test_a_mistake_in_one_setting_fits_neither_the_schema_nor_the_checks(section: str, key: str, value: object) -> None:
    settings = changed(SAMPLED, section, key, value)
    assert not is_valid(settings)
    assert not is_accepted(settings)
