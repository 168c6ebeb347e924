"""Keys of the study file with their values, defaults and meanings, from its JSON schema."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from hpo.config.schema import study_schema
from scripts.reference.markdown import table

__all__ = ["compare", "range_keys", "section"]

SCHEMA = study_schema()
KINDS = {"string": "text", "boolean": "true or false", "array": "list", "object": "table"}
BOUNDS = {"exclusiveMinimum": "&gt;", "minimum": "≥", "exclusiveMaximum": "&lt;", "maximum": "≤"}


def section(name: str) -> str:
    """Return the description of a section and the table of its keys."""
    schema = SCHEMA["definitions"][name]
    return f"{schema['description']}\n\n{keys(schema['properties'])}"


def range_keys() -> str:
    return keys(SCHEMA["definitions"]["case"]["anyOf"][0]["properties"])


def compare() -> str:
    return str(SCHEMA["properties"]["compare"]["description"])


def keys(properties: Mapping[str, Mapping[str, Any]]) -> str:
    rows = [
        (f"`{key}`", values(field), f"`{json.dumps(field['default'])}`" if "default" in field else "", meaning(field))
        for key, field in properties.items()
    ]
    return table(["key", "values", "default", "meaning"], rows)


def meaning(field: Mapping[str, Any]) -> str:
    return str(field["description"]).replace("*", "\\*").replace("<", "&lt;")


def values(field: Mapping[str, Any]) -> str:
    """Return which values a field takes, in words."""
    if "anyOf" in field:
        return " or ".join(dict.fromkeys(values(one) for one in field["anyOf"] if one != {"type": "null"}))
    if "const" in field:
        return f"`{json.dumps(field['const'])}`"
    if "enum" in field:
        return ", ".join(f"`{json.dumps(value)}`" for value in field["enum"])
    kind = field.get("type", "string")
    bounds = [f"{sign} {field[key]:,}" for key, sign in BOUNDS.items() if key in field]
    return f"{KINDS.get(kind, kind)} {', '.join(bounds)}".strip()
