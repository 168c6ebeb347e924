"""WSGI middleware of the dashboard: what requests pass, and what answers are changed on their way back."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable
from typing import Any
from urllib.parse import urlsplit
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

MAX_CONTOUR_TRIALS = 500  # a contour plot of 5,000 took 34 s and made an answer of 941 MB
MAX_STUDY_ID = 2**31 - 1  # of the column in a database
# For every answer: the type is as said, and no page elsewhere shows the dashboard in a frame, to have it clicked on.
SAFE_HEADERS = [("X-Content-Type-Options", "nosniff"), ("Content-Security-Policy", "frame-ancestors 'none'")]


class ReadOnly:
    """Middleware that lets through only reads, and only those addressed to one of `hosts`.

    An entry of `hosts` is NAME:PORT, or NAME for any port. The second rule is against DNS rebinding: a web page
    elsewhere may point its own name at 127.0.0.1 and have the browser read the dashboard's answers, but the browser
    then sends that name as the Host.
    """

    def __init__(self, app: WSGIApplication, hosts: Collection[str]) -> None:
        self.app = app
        self.hosts = hosts

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Answer a request, or refuse it."""
        host = environ.get("HTTP_HOST", "").lower()
        if host not in self.hosts and re.sub(r":\d+$", "", host) not in self.hosts:
            # Do not list the accepted names: whoever asks has not logged in.
            reason = f"The dashboard answers as the address it printed and as each --allow-host, not as {host!r}."
            return refuse(start_response, "403 Forbidden", reason)
        if environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            return refuse(start_response, "405 Method Not Allowed", "This dashboard is read-only.")
        return self.app(environ, start_response)


class RedirectByPath:
    """Middleware that makes redirects relative, so that they keep the scheme.

    The full address of a redirect says http even behind a TLS proxy. The browser would then ask for the password again
    and send it in the clear.
    """

    def __init__(self, app: WSGIApplication) -> None:
        self.app = app

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Answer a request."""

        def start(status: str, headers: list[tuple[str, str]], *error: Any) -> Callable[[bytes], object]:
            relative = [
                (key, urlsplit(value)._replace(scheme="", netloc="").geturl() if key.lower() == "location" else value)
                for key, value in headers
            ]
            return start_response(status, relative, *error)

        return self.app(environ, start)


class SafeHeaders:
    """Middleware that adds SAFE_HEADERS to every answer; those of other middleware too, where it encloses them."""

    def __init__(self, app: WSGIApplication) -> None:
        self.app = app

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Answer a request."""

        def start(status: str, headers: list[tuple[str, str]], *error: Any) -> Callable[[bytes], object]:
            return start_response(status, [*headers, *SAFE_HEADERS], *error)

        return self.app(environ, start)


class FillGaps:
    """Middleware for what optuna-dashboard answers with 500: a study that is not there, and no Accept-Encoding.

    `study_name` returns the name of the study with an id; it raises KeyError where there is none.
    """

    def __init__(self, app: WSGIApplication, study_name: Callable[[int], str]) -> None:
        self.app = app
        self.study_name = study_name

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Answer a request, or say that there is no such study."""
        environ.setdefault("HTTP_ACCEPT_ENCODING", "identity")
        if asked := re.match(r"/(?:api/studies|csv)/(-?\d+)(?:/|$)", environ["PATH_INFO"]):
            try:
                if abs(int(asked[1])) > MAX_STUDY_ID:
                    raise KeyError
                self.study_name(int(asked[1]))
            except (KeyError, ValueError):  # ValueError: thousands of digits
                return refuse(start_response, "404 Not Found", "There is no such study.")
        return self.app(environ, start_response)


class CapContour:
    """Middleware that refuses the contour plot of a study with more than MAX_CONTOUR_TRIALS."""

    def __init__(self, app: WSGIApplication, num_trials: Callable[[int], int]) -> None:
        self.app = app
        self.num_trials = num_trials

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Answer a request, or refuse it."""
        contour = re.fullmatch(r"/api/studies/(\d+)/plot/contour/*", environ["PATH_INFO"])
        if contour and (num_trials := self.num_trials(int(contour[1]))) > MAX_CONTOUR_TRIALS:
            reason = f"The contour plot is drawn for at most {MAX_CONTOUR_TRIALS} trials; this study has {num_trials}."
            return refuse(start_response, "413 Content Too Large", reason)
        return self.app(environ, start_response)


def refuse(start_response: StartResponse, status: str, reason: str) -> Iterable[bytes]:
    """Answer in the shape of optuna-dashboard's own errors, so that its page shows the reason."""
    body = json.dumps({"reason": reason}).encode()
    headers = [("Content-Type", "application/json"), ("Content-Length", str(len(body)))]
    if status.startswith("401"):
        headers.append(("WWW-Authenticate", 'Basic realm="hpo", charset="UTF-8"'))
    if status.startswith("405"):
        headers.append(("Allow", "GET, HEAD"))
    if status.startswith("429"):
        headers.append(("Retry-After", "1"))
    start_response(status, headers)
    return [body]
