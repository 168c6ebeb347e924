"""The dashboard: what its middleware lets through, who may log in, and what a real browser shows of a real study."""

from __future__ import annotations

import base64
import http.client
import json
import os
import pty
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from wsgiref.util import setup_testing_defaults

import bcrypt
import psutil
import pytest

import hpo
from hpo.dashboard.logins import Login, add_login, read_logins
from hpo.dashboard.middleware import MAX_CONTOUR_TRIALS, CapContour, ReadOnly
from hpo.dashboard.server import serve_dashboard
from hpo.errors import UserError

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page, Request

HOST = "127.0.0.1:8080"
SECRET = "corréct horse: battery"

# --- the middleware ---


def call(
    app: Any, path: str, *, method: str = "GET", host: str | None = HOST, authorization: str | None = None
) -> tuple[int, str]:
    """The status and the reason of a refusal, or what the application answered."""
    environ: dict[str, Any] = {"PATH_INFO": path, "REQUEST_METHOD": method}
    if authorization is not None:
        environ["HTTP_AUTHORIZATION"] = authorization
    setup_testing_defaults(environ)
    environ.pop("HTTP_HOST")
    if host is not None:
        environ["HTTP_HOST"] = host
    statuses: list[str] = []
    body = b"".join(app(environ, lambda status, headers: statuses.append(status)))
    return int(statuses[0].split()[0]), body.decode()


def application(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
    start_response("200 OK", [])
    return [b"through"]


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("path", ["/", "/dashboard/studies/1", "/api/studies", "/static/bundle.js", "/csv/1"])
def test_reads_pass(method: str, path: str) -> None:
    assert call(ReadOnly(application, [HOST]), path, method=method) == (200, "through")


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/api/studies"),
        ("POST", "/api/trials/1/tell"),
        ("POST", "/api/trials/1/user-attrs"),
        ("POST", "/api/studies/1/rename"),
        ("POST", "/incompatible-rdb-schema"),
        ("PUT", "/api/studies/1/note"),
        ("DELETE", "/api/studies/1"),
        ("PATCH", "/"),
        ("OPTIONS", "/"),
        ("get", "/api/studies"),
    ],
)
def test_anything_but_a_read_is_refused(method: str, path: str) -> None:
    status, body = call(ReadOnly(application, [HOST]), path, method=method)
    assert status == 405
    assert "read-only" in json.loads(body)["reason"]


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8080", "127.0.0.1.evil.example:8080", "127.0.0.1:9", "127.0.0.1", "", None]
)
def test_a_foreign_host_header_is_refused(host: str | None) -> None:
    status, body = call(ReadOnly(application, [HOST, "localhost:8080"]), "/api/studies", host=host)
    assert status == 403
    assert f"not as {host or ''!r}" in json.loads(body)["reason"]
    assert HOST not in body, "whoever asks has not logged in, and need not know the addresses of this machine"


def test_an_allowed_name_is_answered_at_any_port_and_no_other_name_is() -> None:
    app = ReadOnly(application, ["hpo.example.org", "[2001:db8::1]", HOST])
    for host in ("hpo.example.org", "hpo.example.org:443", "HPO.example.org:8443", "[2001:db8::1]:80", "[2001:DB8::1]"):
        assert call(app, "/", host=host)[0] == 200
    for host in ("evil.hpo.example.org", "hpo.example.org.evil", "hpo.example.org:x", "evil@hpo.example.org", "[::1]"):
        assert call(app, "/", host=host)[0] == 403


def test_the_host_is_compared_without_regard_to_case() -> None:
    assert call(ReadOnly(application, ["localhost:8080"]), "/", host="LocalHost:8080")[0] == 200


@pytest.mark.parametrize(
    ("path", "num_trials", "status"),
    [
        ("/api/studies/1/plot/contour", MAX_CONTOUR_TRIALS, 200),
        ("/api/studies/1/plot/contour", MAX_CONTOUR_TRIALS + 1, 413),
        ("/api/studies/1/plot/contour//", MAX_CONTOUR_TRIALS + 1, 413),
        ("/api/studies/1/plot/slice", MAX_CONTOUR_TRIALS + 1, 200),
        ("/api/studies/1", MAX_CONTOUR_TRIALS + 1, 200),
    ],
)
def test_the_contour_plot_of_a_large_study_is_refused(path: str, num_trials: int, status: int) -> None:
    assert call(CapContour(application, {1: num_trials}.__getitem__), path)[0] == status


# --- the login ---


def basic(name: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{name}:{password}".encode()).decode()


def hashed(password: str, *, kind: str = "2b") -> str:
    return f"${kind}" + bcrypt.hashpw(password.encode(), bcrypt.gensalt(4)).decode().removeprefix("$2b")


@pytest.fixture
def login() -> Login:
    return Login(application, {"ada": hashed(SECRET).encode(), "bob": hashed("other").encode()})


@pytest.mark.parametrize("path", ["/", "/api/studies", "/static/bundle.js"])
def test_the_right_password_passes_and_none_does_not(login: Login, path: str) -> None:
    assert call(login, path, authorization=basic("ada", SECRET)) == (200, "through")
    assert call(login, path)[0] == 401
    assert call(login, path, authorization=basic("ada", SECRET).replace("Basic", "bASIC"))[0] == 200


@pytest.mark.parametrize(
    "authorization",
    [
        "",
        "Basic",
        "Basic !",
        "Basic " + base64.b64encode(b"\xff:\xff").decode(),
        "Basic " + base64.b64encode(b"ada").decode(),
        "Bearer " + basic("ada", SECRET).removeprefix("Basic "),
        basic("ada", ""),
        basic("ada", "other"),
        basic("ada", SECRET + " "),
        basic("ada", SECRET + "\0"),
        basic("Ada", SECRET),
        basic("", SECRET),
        basic("nobody", SECRET),
        basic("ada", SECRET * 9),
    ],
)
def test_any_other_login_is_asked_again(login: Login, authorization: str) -> None:
    for _ in range(2):
        status, body = call(login, "/", authorization=authorization)
        assert status == 401
        assert json.loads(body)["reason"] == "The dashboard asks for a name and a password."
    assert call(login, "/", authorization=basic("ada", SECRET))[0] == 200


def test_a_refused_login_says_how_to_log_in() -> None:
    answered: list[list[tuple[str, str]]] = []
    b"".join(Login(application, {"ada": b"$2b$04$"})({}, lambda status, headers: answered.append(headers)))  # type: ignore[arg-type, func-returns-value]
    assert ("WWW-Authenticate", 'Basic realm="hpo", charset="UTF-8"') in answered[0]


def test_a_name_that_is_not_there_costs_what_a_wrong_password_costs(
    login: Login, monkeypatch: pytest.MonkeyPatch
) -> None:
    costs: list[bytes] = []
    monkeypatch.setattr(bcrypt, "checkpw", lambda password, hashed: costs.append(hashed[:7]))
    for name in ("ada", "nobody"):
        call(login, "/", authorization=basic(name, "wrong"))
    assert costs == [b"$2b$04$"] * 2


def test_a_password_that_was_right_is_not_hashed_again_nor_kept(login: Login, monkeypatch: pytest.MonkeyPatch) -> None:
    assert call(login, "/", authorization=basic("ada", SECRET))[0] == 200
    kept = repr(vars(login)).encode()
    assert SECRET.encode() not in kept
    assert basic("ada", SECRET).encode() not in kept
    monkeypatch.setattr(bcrypt, "checkpw", lambda password, hashed: False)
    assert call(login, "/", authorization=basic("ada", SECRET))[0] == 200
    assert call(login, "/", authorization=basic("bob", "other"))[0] == 401


def test_a_file_of_bcrypt_hashes_is_read_whatever_wrote_it(tmp_path: Path) -> None:
    lines = ["# who may look", "", f"ada:{hashed(SECRET, kind='2y')}\r", f"bob:{hashed('b', kind='2a')}", " "]
    lines += [f"eve d'or:{hashed('c')}"]
    (tmp_path / "logins").write_text("\n".join(lines))
    login = Login(application, read_logins(tmp_path / "logins"))
    for name, password in {"ada": SECRET, "bob": "b", "eve d'or": "c"}.items():
        assert call(login, "/", authorization=basic(name, password))[0] == 200


@pytest.mark.parametrize(
    "line",
    [
        "eve:$apr1$r31xnYk0$0SYSnkMSuBGJu8nBxHVPv/",
        "eve:{SHA}W6ph5Mm5Pz8GgiULbPgzG37mj9g=",
        "eve:plain text",
        "eve:rqXexS6ZhobKA",
        "eve:$6$rounds=5000$salt$0123456789",
        "eve:$2x$05$abcdefghijklmnopqrstuOZ3bTk4l2T8P5kFRMrbC4P2L9V7dC0Sm",
        "eve:$2y$05$abcdefghijklmnopqrstuAZ3bTk4l2T8P5kFRMrbC4P2L9V7dC0Sm",
        "eve:$2y$05$abcdefghijklmnopqrstuOZ3bTk4l2T8P5kFRMrbC4P2L9V7dC0",
        "eve:",
        "a secret alone",
        pytest.param(f":{hashed('x')}", id="no name"),
    ],
)
def test_any_other_line_is_refused_by_its_number_and_not_shown(tmp_path: Path, line: str) -> None:
    (tmp_path / "logins").write_text(f"ada:{hashed(SECRET)}\n{line}\n")
    with pytest.raises(UserError, match=r"logins, line 2: .* must be NAME:HASH, and the hash bcrypt's") as refused:
        read_logins(tmp_path / "logins")
    assert line not in str(refused.value)
    assert (line.partition(":")[2] or line)[-5:] not in str(refused.value)


def test_a_file_without_a_login_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "logins"
    for content, message in {
        None: "there is no --auth-file .*logins; .*--add-user NAME makes it",
        b"": "holds no login; .*--add-user NAME adds one",
        b"# none\n": "holds no login",
        b"ada:\xff": "cannot be read: it is not UTF-8 text",
        f"ada:{hashed('a')}\nada:{hashed('b')}\n".encode(): "line 2: every name must be there once",
    }.items():
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(UserError, match=message):
            serve_dashboard(None, auth_file=str(file), ready=unreachable)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        read_logins(tmp_path)


def test_a_login_is_added_or_replaced_and_the_other_lines_stay(tmp_path: Path) -> None:
    file = tmp_path / "logins"
    add_login(file, "ada", "old")
    assert file.stat().st_mode & 0o777 == 0o600
    (tmp_path / "link").symlink_to(file)
    file.write_text(f"# who may look\neve:$apr1$x\n\n{file.read_text()}")
    file.chmod(0o640)
    add_login(tmp_path / "link", "ada", SECRET)
    *others, last = file.read_text().splitlines()
    assert others == ["# who may look", "eve:$apr1$x", ""]
    assert bcrypt.checkpw(SECRET.encode(), last.removeprefix("ada:").encode())
    assert file.stat().st_mode & 0o777 == 0o640
    assert sorted(tmp_path.iterdir()) == [tmp_path / "link", file]


@pytest.mark.parametrize("name", ["", "a:b", "a\nb", "a\x7f", " a", "a ", "#a"])
def test_a_name_that_the_file_cannot_hold_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="--add-user must be a name without ':'"):
        add_login(tmp_path / "logins", name, SECRET)


@pytest.mark.parametrize("password", ["", "x" * 73, "é" * 37, "a\tb", "\udcff"])
def test_a_password_that_bcrypt_or_a_login_cannot_hold_is_refused(tmp_path: Path, password: str) -> None:
    with pytest.raises(UserError, match=r"the password must (have 1 to 72 bytes|be UTF-8)") as refused:
        add_login(tmp_path / "logins", "ada", password)
    assert not password or password not in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    for path, reason in {tmp_path: "Is a directory", tmp_path / "none" / "logins": "No such file or directory"}.items():
        with pytest.raises(UserError, match=f"--auth-file .* cannot be written: {reason}"):
            add_login(path, "ada", SECRET)


# --- where it listens ---


def unreachable(url: str) -> None:
    pytest.fail(f"listened at {url}")


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


# --- a real study in a real browser ---


@dataclass(frozen=True)
class Study:
    """A study that `hpo run` made, and what the page must show of it."""

    storage_url: str
    name: str
    curves: dict[int, list[float]]
    """Trial number -> validation accuracy, epoch by epoch."""


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    storage_url = f"sqlite:///{tmp_path_factory.mktemp('dashboard') / 'study.db'}"
    spec = hpo.StudySpec.from_dict(
        {
            "name": "digits-lr",
            "search": {"sampler": "grid", "space": {"lr": [1e-3, 3e-3, 1e-2, 3e-2, 3.0]}},
            "model": {"width": 0.05},
            "data": {"train_samples": 200},
            "training": {"epochs": 4, "batch_size": 50},
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
    """Serves in a process of its own, as `hpo dashboard` does, gives the URL, and ends it with Ctrl-C."""
    arguments = [sys.executable, "-c", SERVER, storage_url, *options]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            url = process.stdout.readline().split()[1]
            assert "--auth-file" not in options or "travels unencrypted" in process.stdout.readline()
            yield url
        finally:
            process.send_signal(signal.SIGINT)
            output, errors = process.communicate(timeout=180)
        assert process.returncode == 0, errors
        assert "Traceback" not in errors, errors
        assert SECRET not in output + errors


@pytest.fixture(scope="module")
def url(study: Study) -> Iterator[str]:
    with serving(study.storage_url) as url:
        yield url


@pytest.fixture
def page(browser: Browser, url: str) -> Iterator[Page]:
    """A page that must see no script error, no refused request and no request to anything but the dashboard."""
    page = browser.new_page()
    page.set_default_timeout(180_000)
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


def test_a_request_by_a_foreign_name_is_refused(url: str) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(urllib.request.Request(f"{url}api/studies", headers={"Host": "evil.example"}))
    assert refused.value.code == 403


@pytest.mark.parametrize("host", ["localhost", "127.0.0.2", "::1"])
def test_every_loopback_address_can_be_listened_on(study: Study, host: str) -> None:
    if host == "::1" and not has_ipv6():
        pytest.skip("there is no IPv6 here")
    with serving(study.storage_url, "--host", host) as url:
        assert study_path(url, study)


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


# --- beyond loopback, with a login ---


def add_user(auth_file: Path, name: str, password: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "hpo", "dashboard", "--auth-file", str(auth_file), "--add-user", name],
        input=f"{password}\n", capture_output=True, text=True, check=False, timeout=180,
    )  # fmt: skip


@pytest.fixture(scope="module")
def auth_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("login") / "logins"
    result = add_user(path, "ada", SECRET)
    assert result.returncode == 0, result.stderr
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


def test_a_login_is_asked_for_on_loopback_too_where_there_is_one(study: Study, auth_file: Path) -> None:
    with serving(study.storage_url, "--auth-file", str(auth_file)) as url:
        assert status_of(url) == 401
        assert status_of(url, login=basic("ada", SECRET)) == 200


def test_without_a_login_it_does_not_start_beyond_loopback(study: Study) -> None:
    command = [sys.executable, "-m", "hpo", "dashboard", "--host", "0.0.0.0", "--storage", study.storage_url]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=180)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("hpo: --host must be a loopback address")
    assert "--auth-file" in result.stderr


def test_a_login_that_cannot_be_is_one_sentence(tmp_path: Path) -> None:
    for name, password, reason in [("a:b", SECRET, "--add-user must be a name"), ("ada", "", "the password must have")]:
        result = add_user(tmp_path / "logins", name, password)
        assert (result.returncode, result.stdout) == (2, "")
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
        assert process.wait(timeout=180) == 0
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
