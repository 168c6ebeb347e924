"""The documents: links lead somewhere, examples are valid or run, and the reference is what the code says."""

from __future__ import annotations

import re
import shlex
import tomllib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import optuna
import pytest

import hpo
from hpo.api.trained_weights import write_weights
from hpo.cli.app import main as hpo_command
from hpo.config.study_file import expand_compare, find_study_file
from hpo.config.study_spec import StudySpec
from hpo.reports.figures.table import FIGURES
from hpo.reports.render import FORMATS
from hpo.study.records import trial_as_dict
from scripts.reference.render import FOLDER, render_pages

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted(str(path.relative_to(ROOT)) for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
TEXTS = {document: (ROOT / document).read_text() for document in DOCUMENTS}
# Of their time: what they name may be gone.
RECORDS = ("docs/contributing/decisions/0", "CHANGELOG.md")
CURRENT = [document for document in DOCUMENTS if not document.startswith(RECORDS)]
TINY: dict[str, dict[str, Any]] = {
    "search": {"trials": 3},
    "data": {"name": "digits", "train_samples": 60, "validation_fraction": 0.2},
    "training": {"epochs": 1},
}


def blocks(document: str, *languages: str) -> list[str]:
    """Return the code blocks of a document in these languages; "" is none."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", TEXTS[document], flags=re.MULTILINE | re.DOTALL)
    return [text for language, text in found if language in languages]


def command_lines(document: str) -> list[list[str]]:
    """Return the arguments of each `hpo ...` that a code block shows."""
    lines = "".join(blocks(document, "", "sh", "bash")).replace("\\\n", " ").splitlines()
    found = [re.match(r"(?:\$ )?(?:\w+=\S+ )*hpo (.+)", line) for line in lines]
    return [shlex.split(match.group(1), comments=True) for match in found if match]


def test_the_reference_is_what_the_code_says() -> None:
    for name, text in render_pages().items():
        assert (FOLDER / name).read_text() == text, f"{name}: run python -m scripts.reference"


def test_figures_and_formats_of_reports_are_in_their_guide() -> None:
    for name in [*FIGURES, *FORMATS]:
        assert f"`{name}`" in TEXTS["docs/guides/report.md"]


def test_links_lead_somewhere() -> None:
    broken = []
    for document, text in TEXTS.items():
        for link, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", text):
            path = (ROOT / document).parent / link if link else ROOT / document
            is_checked = anchor and path.suffix == ".md" and not anchor.startswith("hpo.")  # those of mkdocstrings
            if not path.exists() or (is_checked and anchor not in anchors(path.read_text())):
                broken.append(f"{document}: {link}#{anchor}")
    assert not broken


def anchors(text: str) -> list[str]:
    """Return the anchors of a page's headings, as mkdocs and GitHub make them."""
    titles = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]


def test_files_that_are_named_exist() -> None:
    named = {
        name for text in TEXTS.values() for name in re.findall(r"(?<![\w/.])(?:hpo|tests|scripts)/[\w/.-]*\w", text)
    }
    assert {name for name in named if not (ROOT / name).exists()} == set()


def test_decisions_are_numbered_and_in_their_index() -> None:
    records = sorted((ROOT / "docs/contributing/decisions").glob("0*.md"))
    index = TEXTS["docs/contributing/decisions/index.md"]
    assert [int(path.name[:4]) for path in records] == list(range(1, len(records) + 1))
    for path in records:
        title = path.read_text().splitlines()[0].removeprefix("# ")
        assert f"- [{title}]({path.name})" in index


def test_every_study_is_in_the_tutorial() -> None:
    for path in sorted((ROOT / "studies").glob("*.toml")):
        assert f"studies/{path.name}" in TEXTS["docs/getting-started.md"]


def test_every_page_can_be_reached() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text()
    for document in DOCUMENTS:
        if document.startswith("docs/") and not document.startswith(RECORDS):
            assert document.removeprefix("docs/") in navigation, document


@pytest.mark.parametrize("document", CURRENT)
def test_the_studies_in_a_document_are_valid(document: str) -> None:
    for block in blocks(document, "toml"):
        settings = tomllib.loads(block)
        search = {"space": {"lr": {"low": 1e-5, "high": 0.1, "log": True}}, **settings.get("search", {})}
        for one in expand_compare({"name": "fragment", **settings, "search": search}, source=document):
            StudySpec.from_dict(one)


@pytest.mark.parametrize("document", CURRENT)
def test_the_command_lines_in_a_document_are_valid(document: str) -> None:
    for arguments in command_lines(document):
        context = click.Context(hpo_command)
        command: click.Command | None = hpo_command
        while isinstance(command, click.Group) and arguments[0] not in ("--help", "--version"):
            command = command.get_command(context, arguments.pop(0))
        assert command is not None, arguments
        command.make_context("hpo", arguments, resilient_parsing="--help" in arguments)


@pytest.mark.parametrize("document", CURRENT)
def test_the_commands_and_options_in_the_prose_exist(document: str) -> None:
    for text in re.findall(r"`hpo ([a-z][^`]*)`", TEXTS[document]):
        command: click.Command | None = hpo_command
        words = text.split()
        while isinstance(command, click.Group) and words:
            command = command.commands.get(words.pop(0))
        assert command is not None, text
        known = {name for parameter in command.params for name in parameter.opts}
        assert {word.partition("=")[0] for word in words if word.startswith("--")} <= {*known, "--help"}, text


@pytest.mark.parametrize("document", CURRENT)
def test_the_targets_and_scripts_in_a_document_exist(document: str) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:`|^)make ([a-z][a-z-]*)", TEXTS[document], flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
    for module in re.findall(r"python3? -m ((?:scripts|hpo)[\w.]*)", TEXTS[document]):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module


def test_the_python_in_the_documents_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each block runs as it stands, beside a finished study `quickstart`. Studies train in this process, and little.

    What the README defines is trained, too.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HPO_STORAGE", "sqlite:///hpo.db")
    run = hpo.run

    def run_little(spec: Any, *, storage: str | None = None, **_: Any) -> hpo.Result:
        settings = tomllib.loads(find_study_file(Path(spec).stem).read_text()) if isinstance(spec, str) else dict(spec)
        settings.pop("confirm", None)
        for section, values in TINY.items() if "objective" not in settings else ():
            settings[section] = {**settings.get(section, {}), **values}
        return run(settings, storage=storage, executor=hpo.InProcess("cpu"))

    monkeypatch.setattr(hpo, "run", run_little, raising=False)
    if find_spec("pandas") is None:  # the documents say that it is needed
        monkeypatch.setattr(optuna.Study, "trials_dataframe", lambda study: study.trials)
    run_little("quickstart")
    write_weights("quickstart", "best.safetensors")
    defined: dict[str, Any] = {}
    monkeypatch.syspath_prepend(tmp_path)
    for document in CURRENT:
        for block in blocks(document, "python"):
            if (module := re.match(r"# (\w+\.py)\n", block)) is not None:
                (tmp_path / module[1]).write_text(block)
            exec(compile(block, document, "exec"), namespace := {"__name__": "example"})
            if document == "README.md":
                defined |= namespace
    space = {"lr": {"low": 1e-3, "high": 1e-1, "log": True}}
    images = {"model": {"name": defined["small_cnn"]}, "data": {"name": defined["stripes"]}, "training": {"epochs": 1}}
    loop = {"objective": {"function": defined["train"]}, "training": {"epochs": 3}}
    for name, settings in {"own-images": images, "own-loop": loop}.items():
        result = run({"name": name, "search": {"trials": 2, "space": space}, **settings}, executor=hpo.InProcess("cpu"))
        assert [trial.state for trial in result.trials] == ["complete", "complete"]


def test_json_has_the_keys_of_its_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = TEXTS["docs/reference/json.md"].partition("## `hpo trials --json`")[2].partition("Each of")[0]
    documented = set(re.findall(r"`(\w+)`", names))
    spec = StudySpec.from_toml(ROOT / "studies/own_loop.toml")
    result = hpo.run(
        StudySpec.from_dict(
            spec.frozen() | {"search": {**spec.frozen()["search"], "trials": 1}, "training": {"epochs": 1}}
        ),
        storage=f"sqlite:///{tmp_path}/hpo.db",
        executor=hpo.InProcess("cpu"),
        code_folder=ROOT / "studies",
    )
    own = trial_as_dict(result.trials[0]).keys() - result.trials[0].attributes.keys() - result.trials[0].curves.keys()
    assert own <= documented, own - documented


def test_the_readme_is_short() -> None:
    assert len(TEXTS["README.md"].splitlines()) <= 150
