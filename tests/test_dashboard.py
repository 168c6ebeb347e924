"""The dashboard: what its middleware lets through, and what a real browser shows of a real study."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from wsgiref.util import setup_testing_defaults

import pytest

import hpo
from hpo.dashboard import MAX_CONTOUR_TRIALS, CapContour, ReadOnly, serve
from hpo.errors import UserError

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page, Request

HOST = "127.0.0.1:8080"
CHROMIUM_FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


# --- the middleware ---


def call(app: Any, path: str, *, method: str = "GET", host: str | None = HOST) -> tuple[int, str]:
    """The status and the reason of a refusal, or what the application answered."""
    environ: dict[str, Any] = {"PATH_INFO": path, "REQUEST_METHOD": method}
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
    assert HOST in json.loads(body)["reason"]


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


# --- where it listens ---


def unreachable(url: str) -> None:
    pytest.fail(f"listened at {url}")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.1", "example.org", ""])
def test_a_host_that_is_not_loopback_is_refused(host: str) -> None:
    with pytest.raises(UserError, match=f"--host must be a loopback address .* no login; got '{host}'.*ssh -L"):
        serve(None, host=host, ready=unreachable)  # type: ignore[arg-type]


@pytest.mark.parametrize("port", [-1, 65536])
def test_a_port_out_of_range_is_refused(port: int) -> None:
    with pytest.raises(UserError, match=f"--port must be from 0 .*got {port}"):
        serve(None, port=port, ready=unreachable)  # type: ignore[arg-type]


def test_a_port_in_use_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"--port must be free; got {port} on 127.0.0.1: Address already in use"):
            serve(None, port=port, ready=unreachable)  # type: ignore[arg-type]


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
    result = hpo.run(spec, storage=storage_url, devices="cpu", in_process=True)
    assert result.trials[-1].state == "diverged"
    return Study(storage_url, spec.name, {t.number: list(t.curves["val_accuracy"]) for t in result.trials})


# SIGINT is set because a shell's background job, and all it starts, would ignore it.
SERVER = """
import signal, sys
from hpo.cli import main
signal.signal(signal.SIGINT, signal.default_int_handler)
main(["dashboard", "--port", "0", "--storage", sys.argv[1], "--host", sys.argv[2]])
"""


@contextmanager
def serving(storage_url: str, host: str = "127.0.0.1") -> Iterator[str]:
    """Serves in a process of its own, as `hpo dashboard` does, gives the URL, and ends it with Ctrl-C."""
    arguments = [sys.executable, "-c", SERVER, storage_url, host]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().split()[1]
        finally:
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=30)
        assert process.returncode == 0, errors
        assert "Traceback" not in errors, errors


@pytest.fixture(scope="module")
def url(study: Study) -> Iterator[str]:
    with serving(study.storage_url) as url:
        yield url


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (pip install playwright)")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("there is no Chromium here (apt-get install chromium)")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=CHROMIUM_FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser, url: str) -> Iterator[Page]:
    """A page that must see no script error, no refused request and no request to anything but the dashboard."""
    page = browser.new_page()
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
    with serving(study.storage_url, host) as url:
        assert study_path(url, study)


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True
