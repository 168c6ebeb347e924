"""The command line as a user types it: answers, JSON, exit codes, and one sentence for every mistake."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import re
import sqlite3
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest
from click.testing import CliRunner

from hpo.cli.app import main
from hpo.cli.stores import storage_command
from hpo.store.store import Store
from tests.rows import slow_except

NETS = """
import sys
from torch import nn

def lazy(width):
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(10))

def frozen(width):
    return nn.Sequential(nn.Flatten(), nn.Linear(1024, 10)).requires_grad_(False)

def norm(width):
    return nn.Sequential(nn.Flatten(), nn.Linear(1024, 8), nn.BatchNorm1d(8), nn.Linear(8, 10))

def leaves(width):
    sys.exit(0)
"""


class Result(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


TINY = """
name = "tiny"
[search]
sampler = "grid"
[search.space]
lr = [1e-3, 1e-2, 3.0]
[model]
name = "article_cnn"
width = 0.05
[data]
name = "digits"
train_samples = 200
validation_fraction = 0.2
[training]
epochs = 2
batch_size = 50
[engine]
lanes = 1
"""


class Hpo:
    """`hpo ARGUMENTS` in a folder that holds tiny.toml and, after the first run of it, hpo.db.

    It runs in this process, which has torch and Optuna loaded already.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, *arguments: str) -> Result:
        with contextlib.chdir(self.folder), pytest.MonkeyPatch.context() as patch:
            patch.delenv("HPO_DATA", raising=False)
            patch.delenv("HPO_STORAGE", raising=False)
            result = CliRunner().invoke(main, arguments, prog_name="hpo", catch_exceptions=False)
        return Result(result.exit_code, result.stdout, result.stderr)


@pytest.fixture(scope="module")
def hpo(tmp_path_factory: pytest.TempPathFactory) -> Hpo:
    folder = tmp_path_factory.mktemp("cli")
    (folder / "tiny.toml").write_text(TINY)
    (folder / "nets.py").write_text(NETS)
    return Hpo(folder)


@pytest.fixture(scope="module")
def ran(hpo: Hpo) -> Result:
    """tiny.toml, run to its end."""
    result = hpo("run", "tiny.toml", "--devices", "cpu")
    assert result.returncode == 0, result.stderr
    return result


def test_run_ends_with_the_table_the_winner_and_what_to_type_next(ran: Result) -> None:
    assert re.search(r"\nbest learning rate: 0\.01, the best of those tried\n  best trial: +#1, lr=0\.01", ran.stdout)
    assert re.search(r"\n  study: +tiny in sqlite:////\S+hpo.db \(2 complete, 1 diverged\)\n", ran.stdout)
    assert "marked: 1 trial with the recommended learning rate, 0.01" in ran.stdout
    (marked,) = re.findall(r"► .*", ran.stdout)
    assert marked.split()[1] == "0.01"
    assert "learning rate" in ran.stdout
    assert "hpo dashboard" in ran.stdout
    assert "hpo export tiny --output" in ran.stdout
    assert re.search(r"trial 2 diverged: lr=3, .*in epoch 1", ran.stdout)
    for number in (0, 1):
        assert f"trial {number} complete" in ran.stdout
    assert "\x1b" not in ran.stdout, "no escape sequences where the output is no terminal"


def test_only_the_latest_trials_of_a_large_study_are_listed_unless_all_are_asked_for(
    hpo: Hpo, ran: Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    everything = hpo("trials", "tiny").stdout
    assert everything == hpo("trials", "tiny", "--all").stdout
    monkeypatch.setattr("hpo.cli.reading.MAX_TRIALS", 2)
    *listed, last = hpo("trials", "tiny", "--storage", "sqlite:///hpo.db").stdout.splitlines()
    assert [line.split()[0] for line in listed if line.strip()[:1].isdigit()] == ["1", "2"]
    assert last == "trials 1 to 2 of 3; all of them: hpo trials tiny --all --storage sqlite:///hpo.db"
    assert hpo("trials", "tiny", "--all").stdout == everything
    assert len(json.loads(hpo("trials", "tiny", "--json").stdout)) == 3


def test_a_command_that_reads_and_ends_collects_no_garbage(
    hpo: Hpo, ran: Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    collects = list[bool]()
    for name in ("print_json", "print_json_list"):
        monkeypatch.setattr(f"hpo.cli.reading.{name}", lambda _: collects.append(gc.isenabled()))
    for command in (["list"], ["status", "tiny"], ["trials", "tiny"], ["best", "tiny"], ["compare", "tiny"]):
        assert hpo(*command, "--json").returncode == 0
        assert gc.isenabled()  # in a process that goes on
    assert collects == [False] * 5


def test_a_finished_study_is_answered_without_training(hpo: Hpo, ran: Result) -> None:
    again = hpo("run", "tiny.toml")
    assert again.returncode == 0
    assert "epoch 1:" not in again.stdout
    assert "(2 complete, 1 diverged; answered from the store, nothing trained)" in again.stdout
    for line in (line for line in again.stdout.splitlines() if "study:" not in line):
        assert line in ran.stdout


def test_trials_as_json_have_the_keys_of_the_contract(hpo: Hpo, ran: Result) -> None:
    trials = json.loads(hpo("trials", "tiny", "--json").stdout)
    assert [trial["number"] for trial in trials] == [0, 1, 2]
    assert [trial["state"] for trial in trials] == ["complete", "complete", "diverged"]
    assert [trial["params"]["lr"] for trial in trials] == [1e-3, 1e-2, 3.0]
    assert [trial["attempt"] for trial in trials] == [1, 1, 1]
    for trial in trials[:2]:
        assert trial["epochs"] == [1, 2]
        assert len(trial["train_loss"]) == len(trial["val_accuracy"]) == 2
        assert trial["value"] == trial["val_accuracy"][-1]
    assert trials[2]["value"] is None
    for key in ("seed", "device", "host", "pid", "threads", "git_revision", "versions", "duration_s", "reason"):
        assert key in trials[0]


def test_best_as_json_and_in_words(hpo: Hpo, ran: Result) -> None:
    best = json.loads(hpo("best", "tiny", "--json").stdout)
    assert (best["trial"], best["params"]) == (1, {"lr": 0.01})
    low, high = best["interval"]
    assert low <= 0.01 <= high < 3.0
    assert hpo("best", "tiny").stdout.startswith("best learning rate: 0.01")


def test_list_and_status(hpo: Hpo, ran: Result) -> None:
    assert json.loads(hpo("list", "--json").stdout) == [
        {"study": "tiny", "trials": {"complete": 2, "diverged": 1}, "stop": None, "damaged": None}
    ]
    status = json.loads(hpo("status", "tiny", "--json").stdout)
    assert (status["trials"], status["workers"]) == ({"complete": 2, "diverged": 1}, [])
    assert status["best"]["trial"] == 1
    assert "2 complete, 1 diverged" in hpo("status", "tiny").stdout
    assert "tiny" in hpo("list").stdout
    assert "diverged" in hpo("trials", "tiny").stdout


def test_export_writes_a_study_that_trains_what_is_recommended_alone(hpo: Hpo, ran: Result) -> None:
    assert hpo("export", "tiny", "--output", "best.toml").returncode == 0
    assert hpo("export", "tiny", "--output", "best.json").returncode == 0
    exported = json.loads((hpo.folder / "best.json").read_text())
    assert exported["params"] == {"lr": 0.01}
    assert exported["spec"] == tomllib.loads((hpo.folder / "best.toml").read_text())
    best = ["run", "best.toml", "--devices", "cpu", "--in-process", "--storage", "sqlite:///best.db"]
    result = hpo(*best)
    assert result.returncode == 0, result.stderr
    assert "best learning rate: 0.01" in result.stdout
    (again,) = json.loads(hpo("trials", "tiny-best", "--json", "--storage", "sqlite:///best.db").stdout)
    once = json.loads(hpo("trials", "tiny", "--json").stdout)[1]
    for curve in ("train_loss", "val_loss", "val_accuracy"):
        assert again[curve] == once[curve], "the same trial, digit for digit"


def test_joining_with_other_settings_is_refused_with_the_difference(hpo: Hpo, ran: Result) -> None:
    result = hpo("run", "tiny.toml", "--set", "training.batch_size=20")
    assert result.returncode == 2
    assert "training.batch_size: 50 in the study, 20 here" in result.stderr


@pytest.mark.slow
def test_resume_enlarges_what_is_sampled_and_refuses_a_grid(hpo: Hpo, ran: Result) -> None:
    assert hpo("resume", "tiny", "--trials", "9").returncode == 2
    sampled = [
        "run",
        "tiny.toml",
        "--set",
        "name=sampled",
        "--set",
        "search.sampler=random",
        "--set",
        "search.trials=1",
    ]
    assert hpo(*sampled, "--in-process", "--devices", "cpu").returncode == 0
    result = hpo("resume", "sampled", "--trials", "2", "--devices", "cpu")
    assert result.returncode == 0, result.stderr
    assert "resuming: 1 of 2 trials are done already" in result.stdout
    trials = json.loads(hpo("trials", "sampled", "--json").stdout)
    assert [trial["attempt"] for trial in trials] == [1, 1]
    assert hpo("resume", "sampled", "--trials", "1").returncode == 2
    assert hpo("worker", "sampled", "--devices", "cpu").returncode == 0


def test_status_names_the_devices_that_failed(hpo: Hpo, ran: Result) -> None:
    store = Store(f"sqlite:///{hpo.folder}/hpo.db")
    study = store.studies.get("tiny")
    store.workers.count_device_failure(study, device="cuda:0", host="box", reason="RuntimeError: no GPU")
    expected = {"host": "box", "device": "cuda:0", "failures": 1, "reason": "RuntimeError: no GPU"}
    assert json.loads(hpo("status", "tiny", "--json").stdout)["failed_devices"] == [expected]
    assert "failed device: cuda:0 of box (1x): RuntimeError: no GPU\n" in hpo("status", "tiny").stdout
    store.studies.start(study)


def test_doctor_says_what_is_here(hpo: Hpo, ran: Result) -> None:
    findings = {finding["subject"]: finding for finding in json.loads(hpo("doctor", "--json").stdout)}
    assert {"python", "torch", "optuna", "cpu", "data", "store"} <= findings.keys()
    assert "tiny" in findings["store"]["found"]
    assert "nowhere" in hpo("doctor", "--storage", "sqlite:////nowhere/x.db").stdout


REQUESTS = {
    # arguments: the parts of the one message
    ("run", "absent.toml"): ["absent.toml cannot be read"],
    ("run", "quickstrt"): ["quickstrt cannot be read", "neither here", "(article_", "did you mean 'quickstart'"],
    ("run", "tiny.toml", "--fresh"): ["hpo run --fresh needs --yes where nobody can be asked"],
    ("run", "tiny.toml", "--set", "name=n", "--set", "model.name=resnet18"): ["did you mean 'torchvision:resnet18'"],
    ("run", "tiny.toml", "--set", "name=n", "--set", "model.name=nets.lazy"): ["did you mean 'nets:lazy'"],
    ("init", "tiny"): ["tiny.toml exists, and hpo init overwrites no file"],
    ("init", "--loop", "--data"): ["leave out --model and --data"],
    ("run", "tiny.toml", "--set", "training.epochs=0"): ["training.epochs must be at least 1, got 0", "tiny.toml"],
    ("run", "tiny.toml", "--set", "name=n", "--set", "model.name=nonsense"): [
        "model.name must be one of",
        "article_cnn",
    ],
    ("run", "tiny.toml", "--set", "name=n", "--set", "model.depth=3"): ["model.depth", "width"],
    ("run", "tiny.toml", "--set", "name=n", "--set", "model.name=torchvision:resnet81"): ["resnet18"],
    ("run", "tiny.toml", "--set", "name=n", "--set", "model.name=nowhere:net"): ["nowhere:net", "no module"],
    ("run", "tiny.toml", "--set", "name=n", "--set", "data.name=cifar11"): ["data.name must be one of", "cifar10"],
    ("run", "tiny.toml", "--set", "name=n", "--set", "data.name=image_folder"): ["data.root"],
    ("run", "tiny.toml", "--set", "name=n", "--set", "data.name=mnist", "--set", "data.root=empty"): ["mnist", "empty"],
    ("run", "tiny.toml", "--set", "name=n", "--set", "data.train_samples=3"): ["data.train_samples", "class"],
    ("run", "tiny.toml", "--set", "name=n", "--set", "data.validation_fraction=0.001"): ["data.validation_fraction"],
    ("run", "tiny.toml", "--set", "name=n", "--set", "training.precision=bf16", "--devices", "cpu"): ["bf16", "cpu"],
    ("run", "tiny.toml", "--set", "name=n", "--devices", "cuda:9"): ["--devices", "cuda:9"],
    ("run", "tiny.toml", "--set", "name=n", "--workers", "0"): ["--workers must be at least 1, got 0"],
    ("run", "tiny.toml", "--set", "name=n", "--threads", "99999"): ["--threads must be at most 1024, got 99999"],
    ("run", "tiny.toml", "--set", "name=n", "--storage", "hpo.db"): ["--storage must be", "sqlite:///hpo.db"],
    ("run", "tiny.toml", "--set", "name=n", "--storage", "sqlite:///no/such/x.db"): ["does not exist"],
    ("run", "tiny.toml", "--set", "name=n", "--storage", "sqlite:///tiny.toml"): ["not a database"],
    ("run", "tiny.toml", "--set", "name=n", "--storage", "mysql://u:secret@h/d"): ["must not hold a password"],
    ("run", "tiny.toml", "--set", "name=n", "--storage", "mysql://h/d"): ["must be an SQLite or Postgres URL"],
    ("run", "tiny.toml", "--set", "name=n", "--storage", "postgresql://h/d"): ["must name the driver"],
    ("copy", "tiny", "--to", "postgresql+psycopg://u:secret@h/d"): ["--to must not hold a password"],
    ("copy", "nonesuch", "--to", "sqlite:///other.db"): ["there is no study 'nonesuch'"],
    ("run", "tiny.toml", "--set", "name=n", "--set", "checkpoints.url=s3://key:secret@b/x"): ["checkpoints.url", "***"],
    ("run", "tiny.toml", "--set", "name=n", "--set", "checkpoints.url=foo://b/x"): ["checkpoints.url"],
    ("run", "tiny.toml", "--set", "name=n", "--set", "checkpoints.url=relative"): [
        "checkpoints.url",
        "absolute folder",
    ],
    ("worker",): ["the name of a study, or --stay"],
    ("worker", "--stay", "--workers", "0"): ["--workers must be at least 1, got 0"],
    ("worker", "--stay", "--devices", "tpu"): ["--devices"],
    ("worker", "--stay", "--allow", "no/such"): ["--allow must be the name of a module or a folder"],
    ("resume", "tiny", "--trials", "9", "--allow", "no/such"): ["--allow must be the name of a module or a folder"],
    ("run", "tiny.toml", "--set", "name=n", "--set", "model.name=nets:lazy"): ["layers", "lazy"],
    ("run", "tiny.toml", "--set", "name=n", "--set", "model.name=nets:frozen"): [
        "can be trained",
        "does not require grad",
    ],
    ("run", "tiny.toml", "--set", "name=n", "--set", "model.name=nets:leaves"): ["nets:leaves", "SystemExit"],
    ("run", "tiny.toml", "--set", "name=n", "--set", "training.batch_size=1", "--set", "model.name=nets:norm"): [
        "can be trained on a batch of 1 images"
    ],
    ("run", "tiny.toml", "--set", "search.space.lr={low=1e-5, high=1, points=1000000000}"): ["at most 10,000 points"],
    ("run", "tiny.toml", "--set", "name=n", "--storage", "sqlite+aiosqlite:///x.db"): [
        "must be an SQLite or Postgres URL"
    ],
    ("run", "tiny.toml", "--set", "name=n", "--storage", "sqlite:///x.db?timeout=abc"): ["--storage"],
    ("run", "tiny.toml", "--set", "name=n", "--in-process", "--workers", "2"): ["--workers cannot be used with"],
    ("best", "nonesuch"): ["there is no study 'nonesuch'", "tiny"],
    ("status", "nonesuch"): ["there is no study 'nonesuch'", "tiny"],
    ("stop", "nonesuch"): ["there is no study 'nonesuch'", "tiny"],
    ("resume", "nonesuch"): ["there is no study 'nonesuch'", "tiny"],
    ("worker", "nonesuch"): ["there is no study 'nonesuch'", "tiny"],
    ("trials", "tiny", "--storage", "sqlite:///absent.db"): ["there is no store at", "absent.db"],
    ("export", "tiny", "--output", "best.yaml"): ["--output must end in .toml or .json", "best.yaml"],
    ("export", "tiny", "--output", "no/such/best.toml"): ["no/such/best.toml cannot be written"],
    ("dashboard", "--host", "0.0.0.0"): ["--host"],
    ("dashboard", "--port", "99999"): ["--port"],
    ("nonsense",): ["No such command"],
}


@pytest.mark.parametrize("arguments", REQUESTS, ids=" ".join)
def test_a_wrong_request_is_one_message_exit_code_2_and_nothing_written(
    arguments: tuple[str, ...], hpo: Hpo, ran: Result
) -> None:
    def content() -> tuple[list[tuple[object, ...]], list[str]]:
        with sqlite3.connect(hpo.folder / "hpo.db") as connection:
            rows = connection.execute("SELECT study_name FROM studies").fetchall()
        names = {path.name for path in hpo.folder.iterdir() if "db-" not in path.name}
        return rows, sorted(names - {"__pycache__"})  # Python's, of nets.py

    before = content()
    result = hpo(*arguments)
    assert result.returncode == 2, result.stdout + result.stderr
    for part in REQUESTS[arguments]:
        assert part in result.stderr
    assert "Traceback" not in result.stderr
    assert "secret" not in result.stderr
    assert len(result.stderr.strip().splitlines()) <= 4  # click's own usage message has more than one line
    assert content() == before


@pytest.mark.parametrize("command", sorted(main.commands))
def test_every_command_has_help_with_an_example(command: str, hpo: Hpo) -> None:
    result = hpo(command, "--help")
    assert result.returncode == 0
    assert f"  hpo {command}" in result.stdout.partition("Options:")[0].partition("\n\n")[2]


def test_the_commands_are_those_of_the_contract() -> None:
    assert sorted(main.commands) == [
        "best",
        "compare",
        "copy",
        "dashboard",
        "delete",
        "doctor",
        "export",
        "init",
        "list",
        "log",
        "range-test",
        "report",
        "resume",
        "run",
        "status",
        "stop",
        "storage",
        "trials",
        "worker",
    ]


SUMMARIES = {  # the arguments of a help, and the commands that it lists
    (): main.commands,
    ("storage",): storage_command.commands,
}


@pytest.mark.parametrize("arguments", SUMMARIES, ids=["hpo", "hpo storage"])
def test_every_summary_of_a_command_is_whole_at_80_columns_and_has_at_most_six_words(
    arguments: tuple[str, ...],
) -> None:
    shown = CliRunner().invoke(main, [*arguments, "--help"], terminal_width=80).output
    _, _, listed = shown.partition("Commands:\n")
    assert max(map(len, shown.splitlines())) <= 80
    for name, command in SUMMARIES[arguments].items():
        summary = command.short_help
        assert summary is not None, f"hpo {name} has no short_help"
        assert re.search(rf"^  {name} +{re.escape(summary)}$", listed, re.MULTILINE), listed
        assert len(summary.split()) <= 6, summary


@pytest.mark.parametrize("value", slow_except(["soon", "0", "nan", "1e9"], "nan"))
def test_a_lease_that_is_no_length_of_time_is_one_message(tmp_path: Path, value: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "hpo", "list"],
        cwd=tmp_path,
        env={**os.environ, "HPO_LEASE_S": value},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    expected = f"hpo: HPO_LEASE_S must be a number of seconds between 1 and 86400, got '{value}'\n"
    assert (result.returncode, result.stderr) == (2, expected)


def test_a_range_test_prints_and_plots_what_it_found_and_stores_nothing(hpo: Hpo, tmp_path: Path) -> None:
    free = ["tiny.toml", "--devices", "cpu", "--set", "search.space.optimizer=['adam', 'sgd']"]
    result = hpo("range-test", *free, "--output", str(tmp_path / "ramp.html"))
    assert result.returncode == 0
    assert result.stdout.count("the loss starts to fall at") == 2
    for message in ("with optimizer adam:", "with optimizer sgd:", "explodes", "times below", "epochs in batches of 4"):
        assert message in result.stdout
    assert "█" in result.stdout
    assert "plotly" in (tmp_path / "ramp.html").read_text()[:10_000]
    found = json.loads(hpo("range-test", "tiny.toml", "--devices", "cpu", "--json").stdout)
    assert [one["params"] for one in found] == [{}]
    assert 0 < found[0]["low"] < found[0]["high"]
    assert found[0]["epochs"] < 1
    assert (
        f"low = {found[0]['low']:.2g}, high = {found[0]['high']:.2g}, log = true"
        in hpo("range-test", "tiny.toml", "--devices", "cpu").stdout
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "ramp.png"], "--output must end in .html, got 'ramp.png'"),
        (["--output", "nowhere/ramp.html"], "--output must be in a folder that exists, got 'nowhere/ramp.html'"),
        (["--set", "model.name=nothing"], "model.name must be"),
        (["--set", "search.space.weight_decay=[0, 1, 2, 3, 4, 5, 6, 7, 8]"], "at most 8 combinations"),
    ],
)
def test_a_mistake_in_a_range_test_is_one_sentence(hpo: Hpo, arguments: list[str], message: str) -> None:
    result = hpo("range-test", "tiny.toml", "--devices", "cpu", *arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(("loaded", "frozen"), [("json", True), ("torch", False)])
def test_the_end_of_a_command_looks_through_memory_only_where_torch_wants_it(
    loaded: str, frozen: bool, tmp_path: Path
) -> None:
    (tmp_path / "torch.py").touch()  # the command asks by its name, and the real one takes seconds to load
    code = (
        f"import atexit, gc, {loaded}; atexit.register(lambda: print('frozen:', gc.get_freeze_count() > 0))\n"
        "from hpo.cli.app import main; main(['status', 'nothing'])"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (2, f"frozen: {frozen}\n"), ended.stderr
