"""optuna-dashboard for our store, read-only and on loopback, because it has no login and its API can delete studies."""

from __future__ import annotations

import ipaddress
import json
import os
import re
import socket
from collections.abc import Callable, Collection, Iterable
from typing import TYPE_CHECKING
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

from hpo.errors import UserError

if TYPE_CHECKING:
    from optuna.storages import BaseStorage

MAX_CONTOUR_TRIALS = 500


def serve(storage: BaseStorage, *, host: str = "127.0.0.1", port: int = 8080, ready: Callable[[str], None]) -> None:
    """Serves the dashboard until Ctrl-C; `ready` is called with its URL once it listens. Port 0 takes any free port.

    Raises UserError for a host that is not loopback and for a port that cannot be had.
    """
    import optuna_dashboard  # type: ignore[import-untyped, unused-ignore]
    import waitress  # type: ignore[import-untyped, unused-ignore]

    with _listen(host, port) as listener:
        port = listener.getsockname()[1]
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        hosts = dict.fromkeys([address, f"127.0.0.1:{port}", f"localhost:{port}", f"[::1]:{port}"])
        app = CapContour(optuna_dashboard.wsgi(storage), storage.get_n_trials)
        server = waitress.create_server(ReadOnly(app, hosts), sockets=[listener], threads=8)
        ready(f"http://{address}/")
        server.run()  # waitress returns at Ctrl-C


class ReadOnly:
    """Lets through only reads, and only those addressed to one of `hosts`.

    The second rule is against DNS rebinding: a web page elsewhere may point its own name at 127.0.0.1 and so have the
    browser read our answers, but the browser then sends that name as the Host.
    """

    def __init__(self, app: WSGIApplication, hosts: Collection[str]) -> None:
        self.app = app
        self.hosts = hosts

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        host = environ.get("HTTP_HOST", "")
        if host.lower() not in self.hosts:
            reason = f"The dashboard answers only as {' or '.join(self.hosts)}, not as {host!r}."
            return _refuse(start_response, "403 Forbidden", reason)
        if environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            return _refuse(start_response, "405 Method Not Allowed", "This dashboard is read-only.")
        return self.app(environ, start_response)


class CapContour:
    """Refuses the contour plot of a large study: at 5,000 trials it took 34 s and made an answer of 941 MB."""

    def __init__(self, app: WSGIApplication, num_trials: Callable[[int], int]) -> None:
        self.app = app
        self.num_trials = num_trials

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        contour = re.fullmatch(r"/api/studies/(\d+)/plot/contour/*", environ["PATH_INFO"])
        if contour and (num_trials := self.num_trials(int(contour[1]))) > MAX_CONTOUR_TRIALS:
            reason = f"The contour plot is drawn for at most {MAX_CONTOUR_TRIALS} trials; this study has {num_trials}."
            return _refuse(start_response, "413 Content Too Large", reason)
        return self.app(environ, start_response)


def _refuse(start_response: StartResponse, status: str, reason: str) -> Iterable[bytes]:
    """An answer in the shape of optuna-dashboard's own errors, so that its page shows the sentence."""
    body = json.dumps({"reason": reason}).encode()
    headers = [("Content-Type", "application/json"), ("Content-Length", str(len(body)))]
    if status.startswith("405"):
        headers.append(("Allow", "GET, HEAD"))
    start_response(status, headers)
    return [body]


def _listen(host: str, port: int) -> socket.socket:
    if not _is_loopback(host):
        raise UserError(
            f"--host must be a loopback address (127.0.0.1, localhost or ::1), as the dashboard has no login;"
            f" got {host!r}. From another machine, forward the port: ssh -L {port}:127.0.0.1:{port} THIS_MACHINE"
        )
    if not 0 <= port <= 65535:
        raise UserError(f"--port must be from 0 (any free port) to 65535; got {port}")
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise UserError(f"--port must be free; got {port} on {host}: {reason} (0 takes any free port)") from error


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
