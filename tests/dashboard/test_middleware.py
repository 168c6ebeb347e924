"""What the dashboard's middleware lets through."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import pytest

from hpo.dashboard.middleware import MAX_CONTOUR_TRIALS, SAFE_HEADERS, CapContour, FillGaps, ReadOnly, SafeHeaders
from tests.dashboard.examples import HOST, application, call


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


@pytest.mark.parametrize("app", [application, ReadOnly(application, [])])
def test_every_answer_has_the_headers_of_a_safe_one(app: Any) -> None:
    answered: list[list[tuple[str, str]]] = []
    environ = {"REQUEST_METHOD": "GET", "PATH_INFO": "/"}
    list(SafeHeaders(app)(environ, lambda status, headers: answered.append(headers)))  # type: ignore[arg-type]
    assert set(SAFE_HEADERS) <= set(answered[0])
    assert ("X-Content-Type-Options", "nosniff") in SAFE_HEADERS
    assert ("Content-Security-Policy", "frame-ancestors 'none'") in SAFE_HEADERS


@pytest.mark.parametrize("study", ["2", "-1", "0", str(2**31), str(10**30), "9" * 5000])
@pytest.mark.parametrize("path", ["/api/studies/{}/plot/contour", "/api/studies/{}", "/csv/{}", "/csv/{}/"])
def test_a_study_that_is_not_there_is_not_found(path: str, study: str) -> None:
    app = FillGaps(application, {1: "s"}.__getitem__)
    assert call(app, path.format(study)) == (404, '{"reason": "There is no such study."}')
    assert call(app, path.format(1)) == (200, "through")


def test_a_client_need_not_say_which_encodings_it_takes() -> None:
    asked: list[str] = []

    def app(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        asked.append(environ["HTTP_ACCEPT_ENCODING"])
        return application(environ, start_response)

    call(FillGaps(app, str), "/favicon.ico")
    assert asked == ["identity"]
