"""optuna-dashboard for a store: read-only, because its API can delete studies, and behind a login, as it has none.

Without `--auth-file` it is served on loopback only. The login is HTTP Basic (RFC 7617). It assumes a TLS proxy in front
wherever the network is not trusted.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import re
import socket
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING
from wsgiref.types import WSGIApplication

import psutil

from hpo.dashboard.front_page import FrontPage, note_of
from hpo.dashboard.logins import Login, read_logins
from hpo.dashboard.middleware import CapContour, FillGaps, ReadOnly, RedirectByPath, SafeHeaders
from hpo.errors import UserError

if TYPE_CHECKING:
    from optuna.storages import BaseStorage

_HOST_NAME = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*")


def serve_dashboard(
    storage: BaseStorage,
    *,
    host: str = "127.0.0.1",
    port: int = 8080,
    auth_file: str | None = None,
    allow_hosts: Iterable[str] = (),
    ready: Callable[[str], None],
) -> None:
    """Serve the dashboard until Ctrl-C.

    Args:
        storage: The storage of the studies.
        host: The address or name to listen at.
        port: The port to listen at; 0 takes any free port.
        auth_file: The file of logins. With it, nothing is shown without a login, on loopback either.
        allow_hosts: Names, with any port, by which the dashboard is reached from elsewhere.
        ready: Called with the dashboard's URL once it listens.

    Raises:
        UserError: The host is not loopback, or a name is allowed, without an `auth_file`; that file holds anything but
            bcrypt hashes; or the host or the port cannot be had.
    """
    import optuna_dashboard  # type: ignore[import-untyped, unused-ignore]

    from hpo.dashboard.connections import make_server

    names = [_host_name(name) for name in allow_hosts]
    if names and auth_file is None:
        raise UserError(f"--allow-host needs --auth-file FILE, so that whoever comes by {names[0]} must log in")
    logins = None if auth_file is None else read_logins(Path(auth_file))
    with _listen(host, port, has_login=logins is not None) as listener:
        port = listener.getsockname()[1]
        app: WSGIApplication = CapContour(optuna_dashboard.wsgi(storage), storage.get_n_trials)
        app = FrontPage(app, lambda study_id: note_of(storage.get_study_system_attrs(study_id)))
        app = RedirectByPath(FillGaps(app, storage.get_study_name_from_id))
        if logins is not None:
            app = Login(app, logins)
        own = ["127.0.0.1", "localhost", "::1", host]
        shown = host
        if _is_unspecified(host):  # no browser can open it
            shown = "::1" if ":" in host else "127.0.0.1"
            if not names:
                shown = socket.gethostname()
                own += _names_of_this_machine()
        hosts = {*names, *(_host_and_port(name, port) for name in own)}
        if port == 80:  # browsers leave it out
            hosts |= {_bracketed(name) for name in own}
        server = make_server(SafeHeaders(ReadOnly(app, hosts)), listener)
        ready(f"http://{_host_and_port(shown, port)}/")
        server.run()  # waitress returns at Ctrl-C


def _listen(host: str, port: int, *, has_login: bool) -> socket.socket:
    if not host or not (has_login or _is_loopback(host)):
        raise UserError(
            "--host must be a loopback address (127.0.0.1, localhost or ::1), as the dashboard has no login without"
            f" --auth-file FILE; got {host!r}. Or forward the port: ssh -L {port}:127.0.0.1:{port} THIS_MACHINE"
        )
    if not 0 <= port <= 65535:
        raise UserError(f"--port must be from 0 (any free port) to 65535; got {port}")
    try:
        socket.getaddrinfo(host, port)  # create_server would raise an OSError without a reason
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, UnicodeError) as error:
        if not isinstance(error, OSError) or isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
            raise UserError(f"--host must be an address or a name of this machine; got {host!r}") from None
        raise UserError(
            f"--port must be free; got {port} on {host}: {os.strerror(error.errno or 0)} (0 takes any free port)"
        ) from error


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _is_unspecified(host: str) -> bool:
    """Return whether the host stands for every address of this machine."""
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False


def _names_of_this_machine() -> list[str]:
    families = (socket.AF_INET, socket.AF_INET6)
    entries = [entry for entries in psutil.net_if_addrs().values() for entry in entries if entry.family in families]
    return [socket.gethostname(), socket.getfqdn(), *(entry.address.partition("%")[0] for entry in entries)]


def _host_name(name: str) -> str:
    """Return the name as the Host header has it, without a port."""
    try:
        return _bracketed(str(ipaddress.ip_address(name.strip("[]"))))
    except ValueError:
        if not _HOST_NAME.fullmatch(name.lower()):
            raise UserError(f"--allow-host must be a name or an address without a port; got {name!r}") from None
        return name.lower()


def _host_and_port(name: str, port: int) -> str:
    return f"{_bracketed(name)}:{port}"


def _bracketed(name: str) -> str:
    return f"[{name}]".lower() if ":" in name else name.lower()
