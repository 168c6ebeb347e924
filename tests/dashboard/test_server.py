"""The dashboard: what its middleware lets through, who may log in, and what a real browser shows of a real study."""

from __future__ import annotations

import http.client
import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import bcrypt
import psutil
import pytest
from click.testing import CliRunner, Result

import hpo
from hpo.cli.app import main
from hpo.dashboard.logins import add_login, read_logins
from hpo.dashboard.server import serve_dashboard
from hpo.errors import UserError

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page, Request
from tests.dashboard.examples import SECRET, basic, unreachable
from tests.rows import slow_except


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.1", "example.org", ""])
def test_a_host_that_is_not_loopback_is_refused(host: str) -> None:
    with pytest.raises(
        UserError, match=f"--host must be a loopback .* no login without --auth-file FILE; got '{host}'.* -L"
    ):
        serve_dashboard(None, host=host, ready=unreachable)  # type: ignore[arg-type]


def test_a_name_from_elsewhere_is_not_allowed_without_a_login() -> None:
    with pytest.raises(UserError, match=r"--allow-host needs --auth-file FILE, .* by hpo\.example\.org must log in"):
        serve_dashboard(None, allow_hosts=["HPO.example.org"], ready=unreachable)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["", "*", "*.example.org", "hpo.example.org:8080", "https://hpo", "a b", "é.org"])
def test_an_allowed_host_is_a_name_without_a_port(name: str) -> None:
    with pytest.raises(UserError, match="--allow-host must be a name or an address without a port; got"):
        serve_dashboard(None, allow_hosts=[name], ready=unreachable)  # type: ignore[arg-type]


@pytest.mark.parametrize("host", ["203.0.113.7", "nowhere.invalid", "localhost:8080", "a..b"])
def test_a_host_that_is_not_of_this_machine_is_refused(tmp_path: Path, host: str) -> None:
    add_login(tmp_path / "logins", "ada", SECRET)
    with pytest.raises(UserError, match=f"--host must be an address or a name of this machine; got '{host}'"):
        serve_dashboard(None, host=host, auth_file=str(tmp_path / "logins"), ready=unreachable)  # type: ignore[arg-type]


@pytest.mark.parametrize("port", [-1, 65536])
def test_a_port_out_of_range_is_refused(port: int) -> None:
    with pytest.raises(UserError, match=f"--port must be from 0 .*got {port}"):
        serve_dashboard(None, port=port, ready=unreachable)  # type: ignore[arg-type]


def test_a_port_in_use_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"--port must be free; got {port} on 127.0.0.1: Address already in use"):
            serve_dashboard(None, port=port, ready=unreachable)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Study:
    """A study that `hpo run` made, and what the page must show of it."""

    storage_url: str
    name: str
    curves: dict[int, list[float | None]]
    """Trial number -> validation accuracy, epoch by epoch."""


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    storage_url = f"sqlite:///{tmp_path_factory.mktemp('dashboard') / 'study.db'}"
    spec = hpo.StudySpec.from_dict(
        {
            "name": "digits-lr",
            "search": {"sampler": "grid", "space": {"lr": [1e-3, 1e-2, 3.0]}},
            "model": {"width": 0.05},
            "data": {"train_samples": 100},
            "training": {"epochs": 3, "batch_size": 50},
        }
    )
    result = hpo.run(spec, storage=storage_url, executor=hpo.InProcess("cpu"))
    assert result.trials[-1].state == "diverged"
    return Study(storage_url, spec.name, {t.number: list(t.curves["val_accuracy"]) for t in result.trials})


# SIGINT is set because a shell's background job, and all it starts, would ignore it.
SERVER = """
import signal, sys
from hpo.cli.app import main
signal.signal(signal.SIGINT, signal.default_int_handler)
main(["dashboard", "--port", "0", "--storage", *sys.argv[1:]])
"""


@contextmanager
def serving(storage_url: str, *options: str) -> Iterator[str]:
    """Serve in a process of its own, as `hpo dashboard` does; give the URL, and end the process with Ctrl-C."""
    arguments = [sys.executable, "-c", SERVER, storage_url, *options]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            url = process.stdout.readline().split()[1]
            assert "--auth-file" not in options or "travels unencrypted" in process.stdout.readline()
            yield url
        finally:
            process.send_signal(signal.SIGINT)
            output, errors = process.communicate(timeout=500)
        assert process.returncode == 0, errors
        assert "Traceback" not in errors, errors
        assert SECRET not in output + errors


@pytest.fixture(scope="module")
def url(study: Study) -> Iterator[str]:
    with serving(study.storage_url) as url:
        yield url


@pytest.fixture
def page(browser: Browser, url: str) -> Iterator[Page]:
    """Open a page that must see no script error, no refused request and no request to anything but the dashboard."""
    page = browser.new_page()
    page.set_default_timeout(500_000)
    errors: list[str] = []
    requests: list[Request] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.extend([message.text] if message.type == "error" else []))
    page.on("request", lambda request: requests.append(request))  # noqa: PLW0108 - it cannot wrap a built-in
    yield page
    assert errors == []
    assert [request.url for request in requests if not request.url.startswith((url, "data:", "blob:"))] == []
    assert {request.method for request in requests} == {"GET"}
    page.close()


def study_path(url: str, study: Study) -> str:
    with urllib.request.urlopen(f"{url}api/studies") as answer:
        (found,) = (s for s in json.load(answer)["study_summaries"] if s["study_name"] == study.name)
    return f"{url}dashboard/studies/{found['study_id']}"


def test_the_first_page_lists_the_study(page: Page, url: str, study: Study) -> None:
    page.goto(url)
    page.get_by_text(study.name).first.wait_for()


def test_the_study_page_draws_the_learning_curve_of_every_trial(page: Page, url: str, study: Study) -> None:
    page.goto(study_path(url, study))
    page.wait_for_selector(".js-plotly-plot#graph-intermediate-values .scatterlayer .trace")
    traces = page.evaluate(
        """() => document.querySelector("#graph-intermediate-values").data.map(({name, x, y}) => ({name, x, y}))"""
    )
    assert {int(trace["name"].split("#")[1]): trace["y"] for trace in traces} == study.curves
    assert all(trace["x"] == list(range(1, len(trace["y"]) + 1)) for trace in traces)
    assert study.name in page.inner_text("body")


def test_the_study_page_begins_with_the_answer_and_our_figures(page: Page, url: str, study: Study) -> None:
    page.goto(study_path(url, study))
    page.wait_for_selector(".hpo-answer h2")
    for selector in ('[id="user-defined-plot:response"]', '[id="user-defined-plot:curves"]', "#plot-history"):
        page.wait_for_selector(f"{selector} .main-svg")
    assert "best learning rate" in page.inner_text(".hpo-answer h2")
    figures = [f'[id="user-defined-plot:{name}"]' for name in ("response", "curves", "timeline")]
    top = "(selector) => document.querySelector(selector).getBoundingClientRect().y"
    tops = [page.evaluate(top, selector) for selector in (".hpo-answer", *figures, "#plot-history")]
    assert tops == sorted(tops)
    cut = """[...document.querySelectorAll('[id^="user-defined-plot:"]')].filter((box) =>
        box.querySelector(".main-svg").getBoundingClientRect().height > box.getBoundingClientRect().height + 1)"""
    assert page.evaluate(f"{cut}.length") == 0


def test_no_page_has_a_button_that_would_be_refused(page: Page, url: str, study: Study) -> None:
    page.goto(url)
    page.get_by_text(study.name).first.wait_for()
    page.get_by_role("button", name="Reload").wait_for()
    assert page.get_by_role("button", name=re.compile("create|rename|delete", re.IGNORECASE)).count() == 0
    for path in ("note", "trials"):
        page.goto(f"{study_path(url, study)}/{path}")
        page.get_by_text("Note", exact=True).last.wait_for()
        page.wait_for_selector("[data-testid=EditIcon]", state="attached")
        assert not page.is_visible("[data-testid=EditIcon]")


def test_the_trials_page_lists_every_trial(page: Page, url: str, study: Study) -> None:
    page.goto(f"{study_path(url, study)}/trials")
    page.get_by_text(f"{len(study.curves)} Trials").wait_for()
    for number in study.curves:
        page.get_by_text(f"Trial {number}", exact=True).first.wait_for()


def test_a_write_is_refused_and_the_study_stays(url: str, study: Study) -> None:
    request = urllib.request.Request(study_path(url, study).replace("/dashboard/", "/api/"), method="DELETE")
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request)
    assert refused.value.code == 405
    assert refused.value.headers["Allow"] == "GET, HEAD"
    assert study_path(url, study)


@pytest.mark.parametrize("path", ["api/studies/9/plot/slice", "api/studies/9", f"csv/{10**20}", "api/studies/-1"])
def test_a_study_that_is_not_there_is_not_found_and_is_no_error(url: str, path: str) -> None:
    assert status_of(url + path) == 404


@pytest.mark.parametrize("path", ["favicon.ico", "static/bundle.js", "none", "dashboard"])
def test_every_answer_forbids_frames_and_guessing_its_type(url: str, path: str) -> None:
    connection = http.client.HTTPConnection(url.split("/")[2])
    connection.putrequest("GET", f"/{path}", skip_accept_encoding=True)
    connection.endheaders()
    answer = connection.getresponse()
    assert answer.status == (404 if path == "none" else 200)
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert "frame-ancestors 'none'" in (answer.headers.get_all("Content-Security-Policy") or [])
    connection.close()


def test_a_request_by_a_foreign_name_is_refused(url: str) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(urllib.request.Request(f"{url}api/studies", headers={"Host": "evil.example"}))
    assert refused.value.code == 403


@pytest.mark.parametrize("host", slow_except(["localhost", "127.0.0.2", "::1"], "localhost"))
def test_a_login_is_asked_for_at_every_loopback_address_too_where_there_is_one(
    study: Study, auth_file: Path, host: str
) -> None:
    if host == "::1" and not has_ipv6():
        pytest.skip("there is no IPv6 here")
    with serving(study.storage_url, "--host", host, "--auth-file", str(auth_file)) as url:
        assert status_of(url) == 401
        assert status_of(f"{url}api/studies", login=basic("ada", SECRET)) == 200


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


def dashboard(*arguments: str, typed: str = "") -> Result:
    return CliRunner().invoke(main, ["dashboard", *arguments], input=typed, prog_name="hpo", catch_exceptions=False)


def add_user(auth_file: Path, name: str, password: str) -> Result:
    return dashboard("--auth-file", str(auth_file), "--add-user", name, typed=f"{password}\n")


@pytest.fixture(scope="module")
def auth_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("login") / "logins"
    result = add_user(path, "ada", SECRET)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith(f"{path}: ada can log in")
    assert SECRET not in result.stdout + result.stderr + path.read_text()
    return path


@pytest.fixture(scope="module")
def open_url(study: Study, auth_file: Path) -> Iterator[str]:
    """Of a dashboard at every address of this machine, as it is reached by loopback."""
    with serving(study.storage_url, "--host", "0.0.0.0", "--auth-file", str(auth_file)) as url:
        assert url.startswith(f"http://{socket.gethostname().lower()}:")
        yield f"http://127.0.0.1:{url.rstrip('/').rpartition(':')[2]}/"


def status_of(url: str, *, login: str | None = None, host: str | None = None, method: str = "GET") -> int:
    headers = {"Authorization": login, "Host": host}
    request = urllib.request.Request(url, headers={k: v for k, v in headers.items() if v is not None}, method=method)
    try:
        with urllib.request.urlopen(request) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.parametrize("path", ["", "dashboard", "api/studies", "static/bundle.js", "favicon.ico", "csv/1", "none"])
def test_nothing_is_shown_without_the_right_login(open_url: str, path: str) -> None:
    assert status_of(open_url + path) == 401
    assert status_of(open_url + path, login=basic("ada", "wrong")) == 401
    assert status_of(open_url + path, login=basic("nobody", SECRET)) == 401


@pytest.mark.parametrize("path", ["", "dashboard", "api/studies", "static/bundle.js"])
def test_all_is_shown_with_the_right_login(open_url: str, path: str) -> None:
    assert status_of(open_url + path, login=basic("ada", SECRET)) == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
def test_a_write_is_refused_with_a_login_too(open_url: str, method: str) -> None:
    assert status_of(f"{open_url}api/studies/1", login=basic("ada", SECRET), method=method) == 405


def test_it_answers_as_any_address_of_this_machine_and_as_no_other(open_url: str) -> None:
    port = open_url.rstrip("/").rpartition(":")[2]
    addresses = [entry.address for entries in psutil.net_if_addrs().values() for entry in entries]
    own = [address for address in addresses if address.count(".") == 3]
    for host in [socket.gethostname(), socket.getfqdn(), "localhost", *own]:
        assert status_of(f"{open_url}dashboard", login=basic("ada", SECRET), host=f"{host}:{port}") == 200
    for host in ("evil.example", f"evil.example:{port}", f"{socket.gethostname()}:1"):
        assert status_of(open_url, login=basic("ada", SECRET), host=host) == 403


def test_with_an_allowed_name_it_answers_as_that_and_on_loopback_only(study: Study, auth_file: Path) -> None:
    options = ["--host", "0.0.0.0", "--auth-file", str(auth_file), "--allow-host", "hpo.example.org"]
    with serving(study.storage_url, *options) as url:
        port = url.rstrip("/").rpartition(":")[2]
        assert url == f"http://127.0.0.1:{port}/"
        for host in (None, "hpo.example.org", "hpo.example.org:443"):
            assert status_of(f"{url}dashboard", login=basic("ada", SECRET), host=host) == 200
            assert status_of(f"{url}dashboard", host=host) == 401
        assert status_of(url, login=basic("ada", SECRET), host=f"{socket.gethostname()}:{port}") == 403


def test_a_redirect_keeps_the_scheme_that_a_proxy_was_asked_by(open_url: str) -> None:
    connection = http.client.HTTPConnection(open_url.split("/")[2])
    headers = {"Authorization": basic("ada", SECRET), "X-Forwarded-Proto": "https"}
    connection.request("GET", "/", headers=headers)
    assert connection.getresponse().headers["Location"] == "/dashboard"
    connection.close()


def test_without_a_login_it_does_not_start_beyond_loopback(study: Study) -> None:
    result = dashboard("--host", "0.0.0.0", "--storage", study.storage_url)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("hpo: --host must be a loopback address")
    assert "--auth-file" in result.stderr


def test_a_login_that_cannot_be_is_one_sentence(tmp_path: Path) -> None:
    for name, password, reason in [("a:b", SECRET, "--add-user must be a name"), ("ada", "", "the password must have")]:
        result = add_user(tmp_path / "logins", name, password)
        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr.startswith(f"hpo: {reason}")
        assert result.stderr.count("\n") == 1


def test_on_a_terminal_the_password_is_asked_for_twice_and_not_echoed(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hpo", "dashboard", "--auth-file", "logins", "--add-user", "ada"]
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, cwd=tmp_path, start_new_session=True
    ) as process:
        os.close(theirs)
        shown = b""
        for num_prompts in (1, 2):
            while shown.count(b": ") < num_prompts:
                shown += os.read(ours, 1000)
            os.write(ours, f"{SECRET}\n".encode())
        assert process.wait(timeout=500) == 0
        shown += os.read(ours, 1000)
    os.close(ours)
    assert b"ada can log in" in shown
    assert SECRET.encode() not in shown
    assert bcrypt.checkpw(SECRET.encode(), read_logins(tmp_path / "logins")["ada"])


def test_a_browser_that_logs_in_shows_the_study_and_one_that_does_not_shows_nothing(
    browser: Browser, open_url: str, study: Study
) -> None:
    with browser.new_context(http_credentials={"username": "ada", "password": SECRET}) as context:
        page = context.new_page()
        page.goto(open_url)
        page.get_by_text(study.name).first.wait_for()
    with browser.new_context(http_credentials={"username": "ada", "password": "wrong"}) as context:
        answer = context.new_page().goto(open_url)
        assert answer is not None
        assert answer.status == 401
