"""Every command, key and plug-in is in the documents, and what the documents show exists."""

from __future__ import annotations

import dataclasses
import json
import re
import tomllib
from pathlib import Path

import pytest

from hpo.cli.app import main
from hpo.config.schema import study_schema
from hpo.config.sections import CheckpointsSpec, ConfirmSpec, EngineSpec, ObjectiveSpec
from hpo.config.study_file import expand_compare
from hpo.config.study_spec import StudySpec
from hpo.reports.figures.table import FIGURES
from hpo.reports.render import FORMATS
from hpo.search.config import PrunerSpec, SearchSpec
from hpo.search.pruners import PRUNERS
from hpo.search.samplers import SAMPLERS
from hpo.search.space import Range
from hpo.train.config import DataConfig, ModelConfig, TrainingConfig
from hpo.train.data.datasets import DATASETS
from hpo.train.losses import LOSSES
from hpo.train.metrics import METRICS
from hpo.train.models import MODELS
from hpo.train.optim import OPTIMIZERS
from hpo.train.schedules import SCHEDULES

ROOT = Path(__file__).parents[2]
DOCUMENTS = ["README.md", "CONTRIBUTING.md", *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/**/*.md"))]
TEXTS = {document: (ROOT / document).read_text() for document in DOCUMENTS}


def section(place: str) -> str:
    """Return the text of PAGE, or of `PAGE#TITLE` from that heading to the next of its level or above."""
    page, _, title = place.partition("#")
    text = TEXTS[f"docs/{page}.md"]
    if not title:
        return text
    start = text.index(f"\n## {title}\n")
    end = text.find("\n## ", start + 1)
    return text[start : None if end < 0 else end]


def fields(config: type) -> list[str]:
    return [field.name for field in dataclasses.fields(config) if field.name not in ("options", "name")]


DOCUMENTED = {
    "reference/commands": [f"hpo {command}" for command in main.commands],
    "reference/study-file": [f"[{name}]" if name != "name" else name for name in StudySpec.model_fields],
    "guides/report": [*FIGURES, *FORMATS],
    "reference/study-file#`[search]`": [*SearchSpec.model_fields, *SAMPLERS, *fields(Range)],
    "reference/study-file#`[pruner]`": [*(key for key in PrunerSpec.model_fields if key != "name"), *PRUNERS],
    "reference/study-file#`[model]`": ["name", *MODELS, *fields(ModelConfig)],
    "reference/study-file#`[data]`": ["name", *DATASETS, *fields(DataConfig)],
    "reference/study-file#`[training]`": [*fields(TrainingConfig), *OPTIMIZERS, *SCHEDULES, *LOSSES, *METRICS],
    "reference/study-file#`[objective]`": list(ObjectiveSpec.model_fields),
    "reference/study-file#`[engine]`": list(EngineSpec.model_fields),
    "reference/study-file#`[checkpoints]`": list(CheckpointsSpec.model_fields),
    "reference/study-file#`[confirm]`": list(ConfirmSpec.model_fields),
}


@pytest.mark.parametrize(("title", "name"), [(title, name) for title, names in DOCUMENTED.items() for name in names])
def test_it_is_documented_in_its_section(title: str, name: str) -> None:
    assert re.search(rf"(?<![\w.]){re.escape(name)}(?![\w])", section(title)), f"{name} is not in {title}"


@pytest.mark.parametrize(
    "option", sorted({o for c in main.commands.values() for p in c.params for o in p.opts if "--" in o})
)
def test_every_option_is_documented_or_speaks_for_itself(option: str) -> None:
    assert option in "".join(TEXTS.values())


def reference_rows(place: str) -> dict[str, str]:
    """Return the keys of a section's reference table with the texts of their defaults."""
    table = section(place).partition("| key | default | meaning |\n")[2].partition("\n\n")[0]
    defaults: dict[str, str] = {}
    for line in table.splitlines()[1:]:
        keys, texts = (cell.strip() for cell in line.split("|")[1:3])
        names = re.findall(r"`(\w+)`", keys)
        defaults |= zip(names, texts.split(", ") if texts else [""] * len(names), strict=True)
    return defaults


@pytest.mark.parametrize("name", ["search", "data", "training", "objective", "engine", "checkpoints", "confirm"])
def test_the_reference_table_has_the_keys_and_defaults_of_the_schema(name: str) -> None:
    schema = study_schema()["definitions"][name]["properties"]
    rows = reference_rows(f"reference/study-file#`[{name}]`")
    assert rows.keys() == schema.keys()
    for key, field in schema.items():
        if "default" in field:
            assert rows[key].strip("`") == json.dumps(field["default"]), key


def test_every_key_of_the_schema_is_in_its_section() -> None:
    for name, table in study_schema()["definitions"].items():
        for key in table.get("properties", {}):
            is_row = (name, key) == ("pruner", "name")  # the first column of the table of pruners
            assert is_row or f"`{key}`" in section(f"reference/study-file#`[{name}]`"), f"{name}.{key}"


def test_defaults_of_pruners_are_those_documented() -> None:
    text = section("reference/study-file#`[pruner]`")
    for name, pruner in PRUNERS.items():
        row = next(line for line in text.splitlines() if line.startswith(f"| `{name}`"))
        for option, default in pruner.defaults.items():
            assert f"`{option}`" in row if default is None else f"`{option}` {default}" in row


def test_options_of_optimizers_and_schedules_are_those_documented() -> None:
    text = section("reference/study-file#`[training]`")
    known = {name: [entry.keys, entry.options.keys()] for name, entry in OPTIMIZERS.items()}
    known |= {name: [entry.keys] for name, entry in SCHEDULES.items()}
    known |= {name: [entry.keys] for name, entry in LOSSES.items()}
    for name, columns in known.items():
        row = next(line for line in text.splitlines() if line.startswith("| `") and f"`{name}`" in line.split("|")[1])
        for names, cell in zip(columns, row.split("|")[2:-1], strict=True):
            assert set(re.findall(r"`(\w+)`", cell)) == set(names), name


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", TEXTS[document])
    for link, anchor in links:
        path = (ROOT / document).parent / link if link else ROOT / document
        assert path.exists(), link
        if anchor and path.suffix == ".md":
            assert anchor in anchors(path.read_text()), f"{link}#{anchor}"


def anchors(text: str) -> list[str]:
    """Return the anchors of a page's headings, as mkdocs and GitHub make them."""
    titles = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_that_are_named_exist(document: str) -> None:
    named = re.findall(r"(?<![\w/.])(?:hpo|tests|scripts)/[\w/.-]*\w", TEXTS[document])
    for name in named:
        assert (ROOT / name).exists(), name


def test_every_study_is_in_the_tutorial() -> None:
    for path in sorted((ROOT / "studies").glob("*.toml")):
        assert f"studies/{path.name}" in TEXTS["docs/getting-started.md"]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_the_studies_in_a_document_are_valid(document: str) -> None:
    for block in re.findall(r"```toml\n(.*?)```", TEXTS[document], flags=re.DOTALL):
        settings = tomllib.loads(block)
        search = {"space": {"lr": {"low": 1e-5, "high": 0.1, "log": True}}, **settings.get("search", {})}
        for one in expand_compare({"name": "fragment", **settings, "search": search}, source=document):
            StudySpec.from_dict(one)


def test_the_readme_is_short() -> None:
    assert len(TEXTS["README.md"].splitlines()) <= 150
