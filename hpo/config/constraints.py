"""From the constraints beside a field to the sentence that a user reads when a value breaks them.

Pydantic enforces the constraints of all tables: those of its own models, and the `annotated_types` of the dataclasses
in `hpo.train.config`. It names only the bound that was broken; our sentences name the whole rule.
"""

from __future__ import annotations

import types
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from hpo.errors import Rule, UserError

# Pydantic's error types, and a study file's words for the type that it asks for.
TYPE_WORDS = {
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "string_type": "a text",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "a table",
    "mapping_type": "a table",
    "model_type": "a table",
    "dataclass_type": "a table",
}
# Pydantic's error types for a value of the right type that breaks its field's constraints.
CONSTRAINT_ERRORS = frozenset(
    {
        "greater_than",
        "greater_than_equal",
        "less_than",
        "less_than_equal",
        "finite_number",
        "predicate_failed",
        "string_pattern_mismatch",
    }
)


def explain(error: ValidationError, spec: type[BaseModel]) -> str:
    """Return what is wrong with a study's settings: all wrong types, or else the first rule that is broken."""
    wrong_types, broken_rules = [], []
    for complaint in error.errors():
        metadata = _metadata(spec, complaint["loc"][:2])
        if _breaks_rule(complaint) or _is_told_by_rule(complaint, metadata):
            setting = ".".join(map(str, complaint["loc"][:2]))
            broken_rules.append(f"{setting} must be {rule_in_words(metadata)}, got {complaint['input']!r}")
        else:
            wrong_types.append(_type_sentence(complaint))
    return "; ".join(wrong_types) or broken_rules[0]


def check_value(setting: str, value: object, config: type, field: str) -> None:
    """Raise UserError, naming `setting`, for a value that this field of a config dataclass cannot have."""
    try:
        _adapter(config, field).validate_python(value, strict=True)
    except ValidationError as error:
        complaint = error.errors()[0]
        metadata = _dataclass_metadata(config, field)
        if _breaks_rule(complaint):
            raise UserError(f"{setting} must be {rule_in_words(metadata)}, got {value!r}") from None
        raise UserError(f"{setting} is wrong: {complaint['msg'].lower()}, got {value!r}") from None


def rule_in_words(metadata: Iterable[object]) -> str:
    """Return the rule that a field's constraints make, as in "greater than 0 and at most 1"."""
    bounds: dict[type, float] = {}
    for constraint in metadata:
        match constraint:
            case Rule():
                return constraint.words
            case Ge(bound) | Gt(bound) | Le(bound) | Lt(bound):
                bounds[type(constraint)] = bound  # type: ignore[assignment]
    if bounds.keys() == {Ge, Le}:
        return f"between {_number(bounds[Ge])} and {_number(bounds[Le])}"
    words = {Ge: "at least", Gt: "greater than", Le: "at most", Lt: "less than"}
    return " and ".join(f"{word} {_number(bounds[kind])}" for kind, word in words.items() if kind in bounds) or (
        "a finite number"
    )


def _number(bound: float) -> str:
    # Counts are written with separators, 1,000,000; powers of two, such as pixels, as they are set: 4096.
    return f"{bound:,}" if bound % 1000 == 0 else f"{bound}"


def _breaks_rule(complaint: ErrorDetails) -> bool:
    return complaint["type"] in CONSTRAINT_ERRORS


def _is_told_by_rule(complaint: ErrorDetails, metadata: Sequence[object]) -> bool:
    # Of a union pydantic complains about each alternative, by its name; one rule of ours tells them all.
    has_rule, inner = any(isinstance(rule, Rule) for rule in metadata), complaint["loc"][2:]
    return has_rule and (not inner or isinstance(inner[0], str))


def _type_sentence(complaint: ErrorDetails) -> str:
    setting = ".".join(map(str, complaint["loc"]))
    if complaint["type"] == "missing":
        return f"{setting} must be set"
    rule = TYPE_WORDS.get(complaint["type"]) or complaint["msg"].removeprefix("Input should be ")
    return f"{setting} must be {rule}, got {complaint['input']!r}"


def _metadata(spec: type[BaseModel], loc: Sequence[str | int]) -> Sequence[object]:
    """Return the constraints of the field at (section, key); none for a section itself."""
    field = spec.model_fields.get(str(loc[0])) if len(loc) == 2 else None
    if field is None:
        return ()
    section, key = _without_none(field.annotation), str(loc[1])
    if isinstance(section, type) and issubclass(section, BaseModel):
        return section.model_fields[key].metadata if key in section.model_fields else ()
    return _dataclass_metadata(section, key)


@cache
def _dataclass_metadata(config: type, field: str) -> Sequence[object]:
    hints = get_type_hints(config, include_extras=True)
    return FieldInfo.from_annotation(hints[field]).metadata if field in hints else ()


@cache
def _adapter(config: type, field: str) -> TypeAdapter[Any]:
    return TypeAdapter(get_type_hints(config, include_extras=True)[field])


def _without_none(annotation: Any) -> Any:
    if get_origin(annotation) in (Union, types.UnionType):
        (annotation,) = (kind for kind in get_args(annotation) if kind is not type(None))
    return annotation
