"""Requests, logins and applications for the tests of the dashboard."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from typing import Any
from wsgiref.util import setup_testing_defaults

import bcrypt
import pytest

HOST = "127.0.0.1:8080"
SECRET = "corréct horse: battery"


def call(
    app: Any, path: str, *, method: str = "GET", host: str | None = HOST, authorization: str | None = None
) -> tuple[int, str]:
    """Send a request; return the status and the body, which is the reason of a refusal or the application's answer."""
    environ: dict[str, Any] = {"PATH_INFO": path, "REQUEST_METHOD": method, "REMOTE_ADDR": "127.0.0.1"}
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


def basic(name: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{name}:{password}".encode()).decode()


def hashed(password: str, *, kind: str = "2b") -> str:
    return f"${kind}" + bcrypt.hashpw(password.encode(), bcrypt.gensalt(4)).decode().removeprefix("$2b")


def unreachable(url: str) -> None:
    pytest.fail(f"listened at {url}")
