"""The JSON schema of study files, for editors: `python -m hpo.config.schema > study.schema.json`.

It is generated from the types, bounds and descriptions beside the fields. The checks between two settings, in
`hpo.config.checks`, are not in it.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from typing import Any

from pydantic import TypeAdapter

from hpo.config.checks import REFERENCE_PATTERN
from hpo.config.study_spec import StudySpec
from hpo.config.trial_settings import PLUG_INS
from hpo.search.pruners import PRUNERS
from hpo.search.samplers import SAMPLERS
from hpo.search.space import AUTO, GROUPS, NESTED, Range

Schema = dict[str, Any]

# Keys whose value is the name of an entry of a table.
NAMES: dict[tuple[str, str], Iterable[str]] = {
    ("search", "sampler"): SAMPLERS,
    ("pruner", "name"): PRUNERS,
}
VALUES: Schema = {
    "type": "array",
    "items": {"type": ["number", "string", "boolean"]},
    "minItems": 1,
    "uniqueItems": True,
    "description": "A list of values.",
}


def study_schema() -> Schema:
    """Return the JSON schema of a study file."""
    schema = StudySpec.model_json_schema()
    sections = {key: _resolved(section, schema["$defs"]) for key, section in schema["properties"].items()}
    name = sections.pop("name")
    for (section, key), table in NAMES.items():
        sections[section]["properties"][key]["enum"] = [*table]
    for key, table in PLUG_INS.items():  # by name, or as package.module:name
        sections["training"]["properties"][key]["anyOf"] = [{"enum": [*table]}, {"pattern": f"^{REFERENCE_PATTERN}$"}]
    for section in ("model", "data"):  # further keys go to a network or data set of a user's own
        sections[section]["properties"].pop("options")
        sections[section]["additionalProperties"] = True
    parameter = {"$ref": "#/definitions/parameter"}
    nested = {"anyOf": [parameter, {"type": "object", "additionalProperties": parameter}]}  # model.width = ...
    space = sections["search"]["properties"]["space"]
    groups = {"type": "object", "additionalProperties": nested}  # groups.head.lr = ...
    tables = dict.fromkeys(NESTED, nested) | {GROUPS: groups}
    space |= {"properties": tables, "additionalProperties": parameter}
    changes = {section: {"$ref": f"#/definitions/{section}"} for section in sections}
    tables = dict(changes)
    for section, definition in sections.items():  # a table of [[compare]] changes some keys, and need not have these
        if required := definition.pop("required", None):
            tables[section] = {"allOf": [changes[section]], "required": required}
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "A study of hpo",
        "type": "object",
        "properties": {"name": name, **tables, "compare": _compare(changes)},
        "required": schema["required"],
        "additionalProperties": False,
        "definitions": {**sections, "parameter": _parameter(), "case": _case()},
    }


def _resolved(schema: Schema, definitions: Schema) -> Schema:
    """Return a field's schema with what it refers to, and without titles and null, which TOML does not have."""
    alternatives = [alternative for alternative in schema.get("anyOf", []) if alternative != {"type": "null"}]
    if len(alternatives) == 1:
        schema = {**alternatives[0], **{key: value for key, value in schema.items() if key != "anyOf"}}
    if "$ref" in schema:
        schema = copy.deepcopy(definitions[schema["$ref"].rpartition("/")[2]])
        schema["description"] = " ".join(schema["description"].split("\n\n")[0].split())
    schema = {key: value for key, value in schema.items() if key != "title"}
    if schema.get("default", 0) is None:
        del schema["default"]
    if "properties" in schema:
        schema["properties"] = {key: _resolved(field, definitions) for key, field in schema["properties"].items()}
    return schema


def _case() -> Schema:
    """Return the schema of a range or a list."""
    range_schema = _resolved(TypeAdapter(Range).json_schema(), {})
    range_schema |= {"description": "A range, of integers where both ends are.", "additionalProperties": False}
    auto = {"const": AUTO, "description": "For lr: a range that a range test finds."}
    return {"anyOf": [range_schema, VALUES, auto]}


def _parameter() -> Schema:
    """Return the schema of a key of [search.space]."""
    case = {"$ref": "#/definitions/case"}
    cases = {"type": "object", "additionalProperties": case, "minProperties": 1}
    by = {"type": "object", "additionalProperties": cases, "minProperties": 1, "maxProperties": 1}
    conditional = {
        "type": "object",
        "properties": {"by": by},
        "required": ["by"],
        "additionalProperties": False,
        "description": "A range or a list for each value of another parameter: by.optimizer.adam = ...",
    }
    return {"anyOf": [case, conditional]}


def _compare(changes: Schema) -> Schema:
    """Return the schema of [[compare]]: tables with a name and any other settings."""
    return {
        "type": "array",
        "description": "The study once more for each table, with the settings of the table.",
        "items": {
            "type": "object",
            "properties": {"name": {"type": "string", "pattern": "^[A-Za-z0-9._-]+$"}, **changes},
            "required": ["name"],
            "additionalProperties": False,
        },
    }


if __name__ == "__main__":
    print(json.dumps(study_schema(), indent=2))
