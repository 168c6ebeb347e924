"""The answer first on a study's page in optuna-dashboard, and no buttons that a read-only dashboard refuses.

optuna-dashboard has no extensions, so its page gets a stylesheet and a script of ours. Both look for its elements by
their ids and labels; where a later version has others, its page is as it would be without them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from importlib.resources import files
from typing import Any
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

FILES = {
    "/static/hpo.css": ("dashboard.css", "text/css; charset=utf-8"),
    "/static/hpo.js": ("dashboard.js", "text/javascript; charset=utf-8"),
}
ADDED = b'<link rel="stylesheet" href="/static/hpo.css"><script defer src="/static/hpo.js"></script></head>'
# A page that the browser has kept is one without ADDED, or with that of an earlier version.
CONDITIONS = ("HTTP_IF_MODIFIED_SINCE", "HTTP_IF_NONE_MATCH", "HTTP_RANGE")
VALIDATORS = ("last-modified", "etag", "accept-ranges", "content-length")


class FrontPage:
    """Middleware that adds to optuna-dashboard's page, and serves what is added.

    `read_note` returns the note of the study with an id. It is served as /api/studies/ID/note, where optuna-dashboard
    itself answers to writes alone.
    """

    def __init__(self, app: WSGIApplication, read_note: Callable[[int], str]) -> None:
        self.app = app
        self.read_note = read_note

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Answer a request."""
        path = environ["PATH_INFO"]
        if path in FILES:
            name, kind = FILES[path]
            return _answer(start_response, (files("hpo.dashboard") / "static" / name).read_bytes(), kind)
        if asked := re.fullmatch(r"/api/studies/(\d+)/note", path):
            return _answer(start_response, self.read_note(int(asked[1])).encode(), "text/plain; charset=utf-8")
        if environ["REQUEST_METHOD"] != "GET" or not re.fullmatch(r"/dashboard(/.*)?", path):
            return self.app(environ, start_response)
        answered: list[Any] = []
        asked_anew = {key: value for key, value in environ.items() if key not in CONDITIONS}
        body = self.app(asked_anew, lambda *answer: answered.extend(answer))  # type: ignore[arg-type]
        page = b"".join(body).replace(b"</head>", ADDED, 1)
        headers = [(key, value) for key, value in answered[1] if key.lower() not in VALIDATORS]
        start_response(answered[0], [*headers, ("Content-Length", str(len(page)))])
        return [page]


def note_of(attributes: Mapping[str, Any]) -> str:
    """Return the note among the attributes of a study, as optuna-dashboard puts it together."""
    from hpo.store.dashboard_attributes import NOTE_PREFIX

    pieces = sorted((int(key.rpartition(":")[2]), key) for key in attributes if key.startswith(f"{NOTE_PREFIX}str:"))
    return "".join(attributes[key] for _, key in pieces)


def _answer(start_response: StartResponse, body: bytes, kind: str) -> Iterable[bytes]:
    start_response(
        "200 OK", [("Content-Type", kind), ("Content-Length", str(len(body))), ("Cache-Control", "no-cache")]
    )
    return [body]
