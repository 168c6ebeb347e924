"""The GPU day: what it measures is kept whatever happens, and every section runs on a CPU with torch alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import venv
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).parents[2]
ABSENT = ["annotated_types", "optuna", "psutil", "pynvml", "sqlalchemy"]  # on a machine with torch alone
WHOLE_DAY_S = 1800  # on a machine that has much other work

# Sections that do nothing but what the test is about.
SCRIPT = """
import argparse, os, signal, subprocess, sys, time
sys.path[:0] = [{repository!r}]
from pathlib import Path
from scripts.gpu_day.figures import Figures
parser = argparse.ArgumentParser()
parser.add_argument("--out", type=Path)
parser.add_argument("--section")
arguments, _ = parser.parse_known_args()
figures = Figures(arguments.out, arguments.section)
figures.say("before", 1)
if arguments.section == "crashes":
    raise RuntimeError("the device is poisoned")
if arguments.section == "dies":
    os.kill(os.getpid(), signal.SIGKILL)
if arguments.section == "hangs":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
    figures.say("child", child.pid)
    time.sleep(3600)
with figures.trying("part"):
    raise ValueError("of this part alone")
figures.say("after", 2)
"""


@pytest.fixture
def gpu_day(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Return a function that imports a module of the day."""
    monkeypatch.syspath_prepend(REPOSITORY)
    return lambda name: import_module(f"scripts.gpu_day.{name}")


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "sections.py"
    path.write_text(SCRIPT.format(repository=str(REPOSITORY)))
    return path


def is_running(pid: int) -> bool:
    """Return whether a process runs; one that has ended and waits for its parent does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# What happens to a section


def test_what_a_section_does_costs_that_section_alone(
    gpu_day: Any,
    script: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    wait_for: Any,
) -> None:
    day, figures = gpu_day("day"), gpu_day("figures")
    monkeypatch.setattr(day, "SCRIPT", script)
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # this process keeps its own
    limits = {"hangs": 8, "crashes": 60, "dies": 60, "ends": 60}
    day.run_day(day.Day(folder=tmp_path / "out", sections=[*limits], limits=limits, budget_s=188.0))

    found = figures.read_figures(tmp_path / "out")
    codes = {name: found[f"day.{name}"]["code"] for name in limits}
    assert codes == {"crashes": 1, "dies": -signal.SIGKILL, "hangs": "out of time", "ends": 0}
    assert all(found[f"{name}.before"] == 1 for name in limits)
    assert "the device is poisoned" in found["day.crashes.end"]
    assert "of this part alone" in found["ends.part.error"]
    assert found["ends.after"] == 2
    wait_for(lambda: not is_running(found["hangs.child"]))
    table = capsys.readouterr().out
    assert "ends.after" in table
    assert json.loads((tmp_path / "out" / "gpu_day.json").read_text())["figures"] == found


def test_a_day_that_is_told_to_stop_prints_what_it_has(script: Path, tmp_path: Path, wait_for: Any) -> None:
    code = (
        f"from pathlib import Path; from scripts.gpu_day import day; day.SCRIPT = Path({str(script)!r}); "
        f"day.run_day(day.Day(folder=Path({str(tmp_path)!r}), sections=['hangs'], limits={{'hangs': 3600}}))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY, text=True, stdout=subprocess.PIPE)
    file = tmp_path / "figures.jsonl"
    wait_for(lambda: file.exists() and "hangs.child" in file.read_text())
    process.terminate()
    output, _ = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM
    assert "hangs.before" in output.partition("=== goals ===")[2]
    child = json.loads((tmp_path / "gpu_day.json").read_text())["figures"]["hangs.child"]
    wait_for(lambda: not is_running(child))


def test_sections_that_find_no_time_are_named(gpu_day: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    day, figures = gpu_day("day"), gpu_day("figures")
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    day.run_day(day.Day(folder=tmp_path, sections=["facts", "rates"], budget_s=1.0))
    assert {value["code"] for value in figures.read_figures(tmp_path).values()} == {"no time was left"}


def test_the_limits_of_all_sections_fit_into_eight_minutes(gpu_day: Any) -> None:
    day = gpu_day("day")
    assert sum(day.SECTIONS.values()) <= day.BUDGET_S < 480
    modules = {path.stem for path in (REPOSITORY / "scripts/gpu_day/sections").glob("*.py")} - {"__init__"}
    assert modules == {*day.SECTIONS}


# Figures


def test_a_figure_is_on_disk_when_its_process_is_killed(gpu_day: Any, tmp_path: Path) -> None:
    code = (
        "import os, signal; from pathlib import Path; from scripts.gpu_day.figures import Figures; "
        f"Figures(Path({str(tmp_path)!r}), 'rates').say('plain', {{'images_per_s': float('nan')}}); "
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False)
    assert run.returncode == -signal.SIGKILL
    assert gpu_day("figures").read_figures(tmp_path) == {"rates.plain": {"images_per_s": "nan"}}


def test_a_torn_line_is_passed_over_and_a_second_run_of_a_section_replaces_the_first(
    gpu_day: Any, tmp_path: Path
) -> None:
    module = gpu_day("figures")
    figures = module.Figures(tmp_path, "rates")
    figures.say("plain.error", "what has been mended since")
    module.Figures(tmp_path, "plain").say("cpu", 1)
    with module.file_of(tmp_path).open("a") as file:
        file.write('{"key": "rates.torn", "val\n')
    figures.say(module.BEGAN, "again")
    figures.say("plain", 2)
    assert module.read_figures(tmp_path) == {"plain.cpu": 1, "rates.began": "again", "rates.plain": 2}


RATES = {
    "facts.gpu": "a GPU",
    "facts.matmul_flops": 6e14,
    "facts.flops_per_image": 525e6,
    "rates.plain": {"images_per_s": 60_000.0},
    "rates.captured.16": {"images_per_s": 500_000.0},
    "processes.4": {"images_per_s": 200_000.0},
    "processes.8": {"images_per_s": 260_000.0},
    "article.captured": {"total_s": 14.0, "is_whole": True},
    "captured.one_seed.dropout": {"num_results": 1},
    "captured.same.dropout.adam": {"weights": 1e-4},
    "captured.same.batch_norm.adam": {"weights": "nan"},
    "resume.plain.adam": {"weights": 1e-4},
    "waits.plain": {"num_waiting": 0},
    "waits.stack": {"num_waiting": 1},
}
VERDICTS = {
    "at least 8 times": "reached: 8.33",
    "at least 2 times the best": "missed: 1.92",
    "40 %": "reached: 0.438",
    "15 s": "reached: 14",
    "bit for bit": "reached: 1",
    "captured lanes against": "missed: inf",
    "trials that move": "reached: 0.0001",
    "wait for the GPU": "missed: 1",
}


@pytest.mark.parametrize("words", VERDICTS)
def test_a_goal_is_judged_from_figures(gpu_day: Any, words: str) -> None:
    (goal,) = (goal for goal in gpu_day("table").GOALS if words in goal.text)
    assert goal.verdict(RATES) == VERDICTS[words]
    assert goal.verdict({}) == "open"
    assert goal.verdict({**RATES, "facts.gpu": None}) == "open", "the figures of a CPU decide nothing"


def test_every_goal_has_a_row_above(gpu_day: Any) -> None:
    assert len(gpu_day("table").GOALS) == len(VERDICTS)


def test_the_article_counts_from_the_command_where_that_was_measured(gpu_day: Any) -> None:
    goal = gpu_day("table").GOALS[-1]
    assert goal.verdict({**RATES, "product.article": {"total_s": 20.0, "is_whole": True}}) == "missed: 20"
    assert goal.verdict({**RATES, "product.article": {"total_s": 20.0, "is_whole": False}}) == "reached: 14"
    assert goal.verdict({**RATES, "product.article": "not run"}) == "reached: 14"


def test_what_hpo_run_needs_is_known_and_torch_is_not_carried(gpu_day: Any) -> None:
    packages = gpu_day("packages")
    assert {"optuna", "pynvml", "sklearn", "tomli_w"} <= {*packages.modules_needed()}
    assert not {"torch", "torchvision"} & {*map(packages.name_of, packages.requirements_needed())}


# A machine with torch alone


def required(distribution: str) -> set[str]:
    """Return the canonical names of a distribution and of all that it requires, as far as they are installed."""
    names, waiting = set[str](), [distribution]
    while waiting:
        name = canonicalize_name(waiting.pop())
        with suppress(metadata.PackageNotFoundError):
            requirements = [Requirement(text) for text in metadata.requires(name) or []]
            if name not in names:
                names.add(name)
                waiting += [
                    one.name for one in requirements if one.marker is None or one.marker.evaluate({"extra": ""})
                ]
    return names


def link_packages(folder: Path, is_wanted: Callable[[str], bool]) -> Path:
    """Link what the distributions with these canonical names installed into a folder, and return it."""
    folder.mkdir()
    for distribution in metadata.distributions():
        if not is_wanted(canonicalize_name(distribution.metadata["Name"])):
            continue
        for top in {file.parts[0] for file in distribution.files or []}:
            place = Path(str(distribution.locate_file(top)))
            if top not in ("..", "__pycache__") and not top.endswith(".pth") and place.exists():
                with suppress(FileExistsError):
                    (folder / top).symlink_to(place)
    return folder


Machine = tuple[str, Mapping[str, str]]


@pytest.fixture(scope="module")
def bare_machine(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    """Return an interpreter, and an environment in which it finds torch, NumPy and what they require, alone."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder / "venv", with_pip=False, symlinks=True)
    names = required("torch") | required("numpy")
    packages = link_packages(
        folder / "packages", lambda name: name in names or (name.startswith("nvidia-") and name != "nvidia-ml-py")
    )
    return str(folder / "venv/bin/python"), {**os.environ, "PYTHONPATH": str(packages)}


@pytest.mark.slow
def test_every_section_can_be_imported_with_torch_alone(bare_machine: Machine, gpu_day: Any) -> None:
    python, environment = bare_machine
    modules = [f"scripts.gpu_day.sections.{name}" for name in gpu_day("day").SECTIONS]
    code = f"import {', '.join(modules)}\nfrom scripts.gpu_day.stand_in import is_here\n"
    code += f"print([*filter(is_here, {ABSENT})])"
    run = subprocess.run(
        [python, "-c", code], cwd=REPOSITORY, env=environment, text=True, capture_output=True, check=False
    )
    assert run.stdout == "[]\n", run.stderr


# All sections in one process: that each has one of its own is held above, and to load torch for each takes longest.
ALL_SECTIONS = """
import sys, time
sys.path[:0] = [{repository!r}]
from pathlib import Path
from scripts.gpu_day.common import Section, run_section
from scripts.gpu_day.day import SECTIONS
from scripts.gpu_day.figures import Figures
out = Path({out!r})
for name in SECTIONS:
    figures = Figures(out, name)
    run_section(
        Section(
            figures=figures, is_tiny=True, folder=out, packages=None, started_at=time.time(), limit_s={limit_s}
        )
    )
    figures.say("has_ended", True)
"""


@dataclass(frozen=True)
class TinyDay:
    """The figures of the smallest day with torch alone; those where packages were carried; and the table of both."""

    alone: dict[str, Any]
    carried: dict[str, Any]
    table: str


@pytest.fixture(scope="module")
def tiny_day(bare_machine: Machine, tmp_path_factory: pytest.TempPathFactory) -> TinyDay:
    """Run every section with torch alone, then, by the command, those that do more with packages that were carried."""
    python, environment = bare_machine
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(REPOSITORY)
        needed = import_module("scripts.gpu_day.packages").requirements_needed()
        read_figures = import_module("scripts.gpu_day.figures").read_figures
    names = set().union(*(required(Requirement(requirement).name) for requirement in needed))
    out, packages = tmp_path_factory.mktemp("day"), tmp_path_factory.mktemp("carried")
    carried = link_packages(packages / "packages", lambda name: name in names)

    def run(*arguments: str) -> str:
        run = subprocess.run(
            [python, *arguments], cwd=out, env=environment, text=True, capture_output=True, check=False
        )
        assert run.returncode == 0, run.stderr
        return run.stdout

    run("-c", ALL_SECTIONS.format(repository=str(REPOSITORY), out=str(out), limit_s=WHOLE_DAY_S))
    alone = read_figures(out)
    command = [str(REPOSITORY / "scripts/gpu_day"), "--out", str(out), "--tiny", "--budget", str(WHOLE_DAY_S)]
    table = run(*command, "--only", "product", "proof", "memory", "--packages", str(carried))
    return TinyDay(alone, read_figures(out), table)


@pytest.mark.slow
@pytest.mark.timeout(2 * WHOLE_DAY_S)
def test_every_section_ends_on_a_cpu_with_torch_alone(tiny_day: TinyDay, gpu_day: Any) -> None:
    figures, sections = tiny_day.alone, gpu_day("day").SECTIONS
    assert all(figures[f"{name}.has_ended"] for name in sections)
    assert {key: value for key, value in figures.items() if key.endswith(".error")} == {}
    assert all(any(key.startswith(f"{name}.") and key != f"{name}.has_ended" for key in figures) for name in sections)
    assert {key for key, value in figures.items() if value == "nothing to do on a CPU"} >= {
        "facts.cuda",
        "memory.gpu",
        "pinning.worker",
        "queues.16_lanes",
        "rates.benchmark",
    }


@pytest.mark.slow
@pytest.mark.timeout(2 * WHOLE_DAY_S)
def test_hpo_run_is_measured_where_its_packages_are_carried(tiny_day: TinyDay) -> None:
    assert "optuna" in tiny_day.alone["product.article"], "the first time they were not there"
    figures = tiny_day.carried
    assert {figures[f"day.{name}"]["code"] for name in ("product", "proof", "memory")} == {0}
    assert figures["product.article"]["code"] == 0
    assert figures["proof.process"]["problem"] is None
    assert figures["memory.host"]["classified"] == "memory"
    assert "trial 0 complete" in figures["product.answer"]
    assert "=== goals ===" in tiny_day.table
    assert all(f"{key} " in tiny_day.table for key in ("rates.plain", "rates.captured.1", "processes.2"))


@pytest.mark.slow
@pytest.mark.timeout(2 * WHOLE_DAY_S)
def test_results_on_a_cpu_are_those_of_the_plain_engine(tiny_day: TinyDay) -> None:
    figures = tiny_day.alone
    values = {key: value for key, value in figures.items() if isinstance(value, dict)}
    compared = {key: value["weights"] for key, value in values.items() if "weights" in value}
    assert len(compared) > 20
    assert {key: weights for key, weights in compared.items() if not weights <= 1e-3} == {}
    assert {figures[f"captured.one_seed.{name}"]["num_results"] for name in ("article_cnn", "dropout")} == {1}
