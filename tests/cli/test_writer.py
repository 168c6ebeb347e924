"""Any text in any field of a study: every command shows it whole, none obeys it, and none fails."""

from __future__ import annotations

import ast
import html
import io
import json
import re
import tempfile
import tomllib
from pathlib import Path

import pytest
from hypothesis import example, given, settings

import hpo
from hpo.analysis.answer import find_best
from hpo.display.console import PlainConsole
from hpo.display.terminal import LiveDisplay, print_answer
from hpo.reports.render import render_report
from hpo.reports.study_report import make_report
from hpo.store.ledger import storable_text
from hpo.system.readable import one_line
from tests.cli.texts import TRAPS, TURNS, Texts, texts

EVERYTHING = "".join((*TRAPS, *TURNS))
STYLES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")  # what rich writes itself


def is_readable(output: str) -> bool:
    return output.replace("\n", "").replace("\t", "").isprintable()


def check_text(made: Texts) -> None:
    """Check all that reads a study."""
    shown, stored = one_line(made.spec_text).strip(), one_line(storable_text(made.text)).strip()
    check_commands(made, shown, stored)
    check_files(made, shown, stored)
    check_terminal(made, shown, stored)


def check_commands(made: Texts, shown: str, stored: str) -> None:
    raw = one_line(made.text)
    for arguments, parts in {
        ("list",): ["failure"],
        ("status", "s"): [one_line(made.key), shown, f"failed device: {raw} of {raw} (1x): {stored}"],
        ("trials", "s"): [one_line(made.key), shown, stored],
        ("best", "s"): [f"{one_line(made.key)} {shown}", f"m{shown}"],
        ("compare", "s"): [f"m{shown}"],
        ("storage", "check"): ["no problem found"],
    }.items():
        result = made.hpo(*arguments)
        assert (result.exit_code, result.exception) == (0, None), arguments
        assert is_readable(result.output)
        for part in parts:
            assert part in result.output, arguments
    trials = json.loads(made.hpo("trials", "s", "--json").output)
    assert trials[1]["error"] == trials[1]["reason"] == storable_text(made.text)
    assert trials[0]["curves"] == {f"m{made.spec_text}": [0.5], made.text: [0.25]}
    assert trials[0]["params"] == {"lr": 0.1, made.key: made.spec_text}


def check_files(made: Texts, shown: str, stored: str) -> None:
    trials = made.store.trials.get_all(made.study)
    report = make_report(made.study, trials, find_best(made.study, trials), storage=made.url)
    page, markdown, as_json = (render_report(report, form).decode() for form in ("html", "md", "json"))
    cells = [html.unescape(cell).strip() for cell in re.findall("<td[^>]*>([^<]*)", page)]
    assert {shown, stored} <= set(cells)
    assert is_readable(markdown)
    plain = re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", markdown)
    assert shown in plain
    assert stored in plain
    assert json.loads(as_json)["trials"][1]["reason"] == storable_text(made.text)
    assert made.hpo("export", "s", "--output", f"{made.folder}/best.toml").exit_code == 0
    exported = tomllib.loads((made.folder / "best.toml").read_text(encoding="utf-8"))
    assert exported["search"]["space"][made.key] == [made.spec_text]


def check_terminal(made: Texts, shown: str, stored: str) -> None:
    trials = made.store.trials.get_all(made.study)
    found = find_best(made.study, trials)
    assert found is not None
    for width, is_terminal in ((1000, True), (1000, False), (30, True)):
        file = io.StringIO()
        console = PlainConsole(file=file, width=width, force_terminal=is_terminal, height=50)
        with LiveDisplay(console) as display:
            display.watch(made.store, made.study)(made.store)
        print_answer(console, made.study, trials, found, storage=made.url, is_trained=True, verbose=True, next_steps=[])
        output = STYLES.sub("", file.getvalue()).replace("\r", "")
        assert is_readable(output)
        if width > 30:
            assert all(part in output for part in (one_line(made.key), shown, stored))


def test_every_command_shows_a_text_whole_that_is_full_of_traps(tmp_path: Path) -> None:
    check_text(Texts(tmp_path, EVERYTHING))


@pytest.mark.slow
@settings(derandomize=True, deadline=None, max_examples=8)
@example("[/conv]")
@example("\ud800")
@given(text=texts)
def test_every_command_shows_any_text_whole(text: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        check_text(Texts(Path(folder), text))


@pytest.mark.parametrize("charset", ["ascii", "latin-1", "cp1252"])
def test_an_answer_is_printed_in_any_encoding(charset: str, tmp_path: Path) -> None:
    made = Texts(tmp_path, "►±é\u4e2d")
    for command in ("best", "trials", "compare"):
        result = made.hpo(command, "s", charset=charset)
        assert (result.exit_code, result.exception) == (0, None)
        assert "\\u4e2d" in result.output


def test_a_text_of_several_lines_cannot_pass_for_a_line_of_ours(tmp_path: Path) -> None:
    output = Texts(tmp_path, "first\nbest so far: lr=9").hpo("status", "s").output
    assert "stopped (first); resume with: hpo resume s\n  best so far: lr=9\n" in output
    assert "\nbest so far: lr=9" not in output


def test_only_the_writer_and_the_console_print() -> None:
    for path in (Path(hpo.__file__).parent / "cli").glob("*.py"):
        tree = ast.parse(path.read_text())
        calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        assert path.name in ("writer.py", "streams.py") or not calls & {"print", "click.echo", "click.secho"}, path
        assert path.name == "console.py" or not calls & {"Console", "Progress", "Text"}, path
