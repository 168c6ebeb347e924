"""Any study file gives a spec or one sentence, whatever is in it; and a spec survives the store."""

from __future__ import annotations

import copy
import datetime
import json
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hpo.config.schema import study_schema
from hpo.config.study_file import apply_override, expand_compare
from hpo.config.study_spec import StudySpec
from hpo.errors import UserError
from hpo.search.pruners import PRUNERS
from hpo.search.samplers import SAMPLERS
from hpo.train.optim import OPTIMIZERS
from hpo.train.schedules import SCHEDULES

STUDIES = sorted((Path(__file__).parents[2] / "studies").glob("*.toml"))
VALID: list[dict[str, Any]] = [
    *(tomllib.loads(path.read_text()) for path in STUDIES),
    {"name": "short", "search": {"space": {"lr": {"low": 1e-5, "high": 0.1, "log": True}}}},
    {
        "name": "cases",
        "search": {
            "trials": 9,
            "space": {
                "optimizer": ["adam", "sgd"],
                "lr": {"by": {"optimizer": {"adam": {"low": 1e-4, "high": 0.1, "log": True}, "sgd": [0.1, 1]}}},
                "model": {"width": [0.5, 1.0]},
                "data.train_samples": {"low": 100, "high": 200, "step": 50},
            },
            "try_first": [{"optimizer": "sgd", "lr": 0.1}],
        },
        "data": {"name": "own:data", "color": "red"},
        "pruner": {"name": "percentile", "percentile": 30.0},
        "training": {"schedule": "multistep", "milestones": [2, 4]},
        "engine": {"lanes": 4},
        "checkpoints": {"url": "/checkpoints", "keep_best": 2},
        "confirm": {"top": 2, "seeds": 3},
    },
    {
        "name": "grid",
        "search": {"sampler": "grid", "space": {"lr": {"low": 0.1, "high": 1, "log": True, "points": 3}, "seed": [1]}},
        "compare": [{"name": "other", "training": {"optimizer": "sgd", "momentum": 0.9}}],
    },
    {
        "name": "loop",
        "search": {"space": {"x": {"low": 1, "high": 8}}},
        "objective": {"function": "module:train", "metric": "loss", "direction": "minimize"},
        "training": {"epochs": 3},
    },
]
TABLES = {
    section: table["properties"] for section, table in study_schema()["definitions"].items() if "properties" in table
}
KEYS = sorted({*TABLES, *(key for table in TABLES.values() for key in table), "by", "low", "high", "log", "options"})
NAMES = sorted(
    {*SAMPLERS, *PRUNERS, *OPTIMIZERS, *SCHEDULES, "auto", "own:data", "torchvision:resnet18", "image_folder"}
)

keys = st.one_of(st.sampled_from(KEYS), st.text(max_size=5))
scalars = st.one_of(
    st.booleans(),
    st.integers(-3, 20),
    st.sampled_from([2**31, 2**63, -(2**70), 10**25, 10**400]),
    st.floats(),
    st.sampled_from([1e-320, 1e-5, 0.1, 1e308, -1e308]),
    st.sampled_from(NAMES),
    st.text(max_size=8),
    st.just(datetime.date(2026, 1, 1)),
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(keys, inner, max_size=4),
        st.fixed_dictionaries(
            {"low": scalars, "high": scalars}, optional={"log": inner, "step": inner, "points": inner}
        ),
        st.fixed_dictionaries({"by": st.dictionaries(keys, st.dictionaries(st.sampled_from(NAMES), inner))}),
    ),
    max_leaves=6,
)


def tables(settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield every table within a study's settings, itself first."""
    yield settings
    for value in settings.values():
        for inner in value if isinstance(value, list) else [value]:
            if isinstance(inner, dict):
                yield from tables(inner)


@st.composite
def study_files(draw: st.DrawFn) -> dict[str, Any]:
    """Draw a valid study file with a few of its settings replaced, added or removed."""
    study: dict[str, Any] = copy.deepcopy(draw(st.sampled_from(VALID)))
    for _ in range(draw(st.integers(0, 3))):
        table = draw(st.sampled_from(list(tables(study))))
        key = draw(st.one_of(st.sampled_from(sorted(table)), keys)) if table else draw(keys)
        if draw(st.integers(0, 5)):
            table[key] = draw(values)
        else:
            table.pop(key, None)
    return study


def error_of(call: Callable[[], object]) -> str:
    """Return the message of the UserError that a call raises; the empty text where it raises none."""
    try:
        call()
    except UserError as error:
        return str(error)
    return ""


def specs_or_sentence(settings: dict[str, Any]) -> list[StudySpec] | str:
    try:
        return [StudySpec.from_dict(study, source="s.toml") for study in expand_compare(settings, source="s.toml")]
    except UserError as error:
        return str(error)


@settings(derandomize=True, deadline=None, max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(study=study_files())
def test_a_study_file_gives_specs_that_survive_the_store_or_one_sentence(study: dict[str, Any]) -> None:
    outcome = specs_or_sentence(study)
    if isinstance(outcome, str):
        assert len(outcome.splitlines()) == 1
        assert outcome.endswith("(s.toml)") or "[[compare]]" in outcome
        return
    for spec in outcome:
        stored = json.dumps(spec.frozen())
        again = StudySpec.from_dict(json.loads(stored))
        assert json.dumps(again.frozen()) == stored
        assert again.differences(spec) == []
        assert again.num_trials == spec.num_trials >= 1


@settings(derandomize=True, deadline=None, max_examples=100)
@given(text=st.text(), at=st.floats(0, 1), length=st.integers(0, 40), path=st.sampled_from(STUDIES))
def test_a_torn_file_gives_specs_or_one_sentence(
    text: str, at: float, length: int, path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    whole = path.read_text()
    start = int(at * len(whole))
    torn = tmp_path_factory.getbasetemp() / "torn.toml"
    torn.write_text(whole[:start] + text + whole[start + length :], encoding="utf-8", errors="replace")
    assert len(error_of(lambda: StudySpec.all_from_toml(torn)).splitlines()) <= 1


@pytest.mark.parametrize(
    "text",
    [
        "x = " + "[" * 10_000,
        "x = " + "1" * 5000,
        "x = 0x" + "f" * 5000,
        "\ufeff",
        "name = '\x00'",
        "model.x = " + "[" * 65 + "]" * 65,
        "[[compare]]\nname = 'b'\nmodel." + ".".join("a" * 3000) + " = 1",
        "[[compare]]\nname = 0x" + "f" * 5000,
        f"model.x = {2**64}",
    ],
)
def test_a_file_that_no_reader_of_toml_likes_is_refused_in_one_sentence(text: str, tmp_path: Path) -> None:
    (tmp_path / "s.toml").write_text(f"{text}\n[search.space]\nlr = [0.1]")
    with pytest.raises(UserError) as caught:
        StudySpec.from_toml(tmp_path / "s.toml")
    assert len(str(caught.value).splitlines()) == 1


@settings(derandomize=True, deadline=None, max_examples=200)
@given(override=st.one_of(st.text(), st.builds("{}.{}={}".format, keys, keys, st.one_of(st.text(), scalars))))
def test_an_override_changes_one_setting_or_is_refused_in_one_sentence(override: str) -> None:
    study = copy.deepcopy(VALID[-1])
    assert len(error_of(lambda: apply_override(study, override)).splitlines()) <= 1
    specs_or_sentence(study)
