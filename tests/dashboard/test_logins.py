"""Who may log in to the dashboard."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bcrypt
import pytest

from hpo.dashboard.connections import NUM_THREADS
from hpo.dashboard.logins import MAX_WAITING_CHECKS, Login, add_login, read_logins
from hpo.dashboard.server import serve_dashboard
from hpo.errors import UserError
from tests.dashboard.examples import SECRET, application, basic, call, hashed, unreachable


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
    b"".join(Login(application, {"ada": b"$2b$04$"})({}, lambda status, headers: answered.append(headers)))  # type: ignore[arg-type]
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
        f"ada:{hashed('a')}\nada:{hashed('b')}\n".encode(): "line 2: every name must occur once",
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


@pytest.fixture
def slow_check(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Make every check of a password last until the event is set, and refuse."""
    go = threading.Event()
    monkeypatch.setattr(bcrypt, "checkpw", lambda password, hashed: go.wait(500) and False)
    yield go
    go.set()


def test_guesses_wait_in_a_bounded_line_and_keep_nobody_out_who_has_logged_in(
    login: Login, wait_for: Callable[..., Any], request: pytest.FixtureRequest
) -> None:
    assert call(login, "/", authorization=basic("ada", SECRET))[0] == 200
    go: threading.Event = request.getfixturevalue("slow_check")
    statuses: list[int] = []

    def guess(password: str) -> None:
        statuses.append(call(login, "/", authorization=basic("ada", password))[0])

    guessers = [threading.Thread(target=guess, args=[str(index)]) for index in range(MAX_WAITING_CHECKS)]
    for guesser in guessers:
        guesser.start()
    wait_for(lambda: login._places._value == 0)
    answered: list[list[tuple[str, str]]] = []
    environ = {"HTTP_AUTHORIZATION": basic("ada", "one more")}
    start: Any = lambda status, headers: answered.append([(status, ""), *headers])  # noqa: E731
    body = b"".join(login(environ, start))
    assert answered[0][0][0] == "429 Too Many Requests"
    assert ("Retry-After", "1") in answered[0]
    assert b"try again" in body
    assert call(login, "/", authorization=basic("ada", SECRET)) == (200, "through")
    assert call(login, "/")[0] == 401
    go.set()
    for guesser in guessers:
        guesser.join(500)
    guess("and again")
    assert statuses == [401] * (MAX_WAITING_CHECKS + 1)


def test_a_line_of_guesses_leaves_threads_of_the_server_free() -> None:
    assert MAX_WAITING_CHECKS < NUM_THREADS


def test_a_wrong_login_is_logged_with_its_name_and_address_and_without_the_password(
    login: Login, caplog: pytest.LogCaptureFixture
) -> None:
    call(login, "/", authorization=basic("ada", SECRET))
    call(login, "/")
    assert caplog.messages == []
    call(login, "/", authorization=basic("eve\x1b]0;\n" + "x" * 5000, "a guess"))
    (message,) = caplog.messages
    assert message.startswith("wrong login as 'eve\\x1b]0;\\nxxx")
    assert message.endswith(" from 127.0.0.1")
    assert len(message) < 150
    assert "guess" not in message
