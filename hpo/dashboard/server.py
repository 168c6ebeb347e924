"""optuna-dashboard for our store: read-only, as its API can delete studies, and behind a login, as it has none.

Without `--auth-file` it is served on loopback only. The login is HTTP Basic (RFC 7617) against bcrypt hashes in the
format of Apache's htpasswd; it assumes a TLS proxy in front wherever the network is not trusted.
"""

from __future__ import annotations

import base64
import errno
import hmac
import ipaddress
import json
import os
import re
import secrets
import socket
import tempfile
import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

import bcrypt
import psutil

from hpo.errors import UserError

if TYPE_CHECKING:
    from optuna.storages import BaseStorage

MAX_CONTOUR_TRIALS = 500
MAX_PASSWORD_BYTES = 72  # bcrypt looks at no more
# $2y$COST$SALT and digest; the last character of the salt has four bits that must be zero.
_BCRYPT = re.compile(r"\$2[aby]\$(0[4-9]|[12]\d|3[01])\$[./A-Za-z0-9]{21}[.Oeu][./A-Za-z0-9]{31}", re.ASCII)
_HOST_NAME = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def serve(
    storage: BaseStorage,
    *,
    host: str = "127.0.0.1",
    port: int = 8080,
    auth_file: str | None = None,
    allow_hosts: Iterable[str] = (),
    ready: Callable[[str], None],
) -> None:
    """Serves the dashboard until Ctrl-C; `ready` is called with its URL once it listens. Port 0 takes any free port.

    With an `auth_file` nothing is shown without a login, on loopback too. `allow_hosts` are names, with any port, that
    the dashboard is reached by from elsewhere. Raises UserError for an address or a name beyond loopback without an
    `auth_file`, for one that holds anything but bcrypt hashes, and for a host or a port that cannot be had.
    """
    import optuna_dashboard  # type: ignore[import-untyped, unused-ignore]
    import waitress  # type: ignore[import-untyped, unused-ignore]

    names = [_host_name(name) for name in allow_hosts]
    if names and auth_file is None:
        raise UserError(f"--allow-host needs --auth-file FILE, so that whoever comes by {names[0]} must log in")
    logins = None if auth_file is None else read_logins(Path(auth_file))
    with _listen(host, port, has_login=logins is not None) as listener:
        port = listener.getsockname()[1]
        app: WSGIApplication = RedirectByPath(CapContour(optuna_dashboard.wsgi(storage), storage.get_n_trials))
        if logins is not None:
            app = Login(app, logins)
        own = ["127.0.0.1", "localhost", "::1", host]
        shown = host
        if _is_unspecified(host):  # it is no address to go to
            shown = "::1" if ":" in host else "127.0.0.1"
            if not names:
                shown = socket.gethostname()
                own += _names_of_this_machine()
        hosts = {*names, *(_address(name, port) for name in own)}
        if port == 80:  # which browsers leave out
            hosts |= {_bracketed(name) for name in own}
        server = waitress.create_server(ReadOnly(app, hosts), sockets=[listener], threads=8)
        ready(f"http://{_address(shown, port)}/")
        server.run()  # waitress returns at Ctrl-C


class ReadOnly:
    """Lets through only reads, and only those addressed to one of `hosts`: NAME:PORT, or NAME for any port of it.

    The second rule is against DNS rebinding: a web page elsewhere may point its own name at 127.0.0.1 and so have the
    browser read our answers, but the browser then sends that name as the Host.
    """

    def __init__(self, app: WSGIApplication, hosts: Collection[str]) -> None:
        self.app = app
        self.hosts = hosts

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        host = environ.get("HTTP_HOST", "").lower()
        if host not in self.hosts and re.sub(r":\d+$", "", host) not in self.hosts:
            # It does not list those that it accepts: whoever asks has not logged in.
            reason = f"The dashboard answers as the address it printed and as each --allow-host, not as {host!r}."
            return _refuse(start_response, "403 Forbidden", reason)
        if environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            return _refuse(start_response, "405 Method Not Allowed", "This dashboard is read-only.")
        return self.app(environ, start_response)


class Login:
    """Lets through only requests with a name of `logins` and the password that its bcrypt hash was made from.

    A name that is not there costs the same check as one that is (as the dearest, where costs differ). What was right
    once is remembered, hashed under a key of this process: a page makes many requests, and bcrypt takes 0.2 s.
    """

    def __init__(self, app: WSGIApplication, logins: Mapping[str, bytes]) -> None:
        self.app = app
        self._logins = logins
        cost = max(int(hashed.split(b"$")[2]) for hashed in logins.values())
        self._nobody = bcrypt.gensalt(cost) + b"." * 31  # the hash of no known password
        self._key = secrets.token_bytes(32)
        self._right: set[bytes] = set()
        self._checking = threading.Lock()  # a flood of guesses takes one core from the training, not one a thread

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        if not self._is_right(environ.get("HTTP_AUTHORIZATION", "")):
            return _refuse(start_response, "401 Unauthorized", "The dashboard asks for a name and a password.")
        return self.app(environ, start_response)

    def _is_right(self, authorization: str) -> bool:
        scheme, _, encoded = authorization.partition(" ")
        try:
            given = base64.b64decode(encoded.strip(), validate=True)
            name_bytes, _, password = given.partition(b":")
            name = name_bytes.decode()
        except ValueError:
            return False
        if scheme.lower() != "basic" or len(password) > MAX_PASSWORD_BYTES:
            return False
        digest = hmac.digest(self._key, given, "sha256")
        if digest in self._right:
            return True
        with self._checking:
            if digest in self._right:  # a page asks for much at once: the first of its requests has been checked
                return True
            is_right = bcrypt.checkpw(password, self._logins.get(name, self._nobody)) and name in self._logins
            if is_right:
                self._right.add(digest)
            return is_right


class RedirectByPath:
    """Sends nobody to another scheme: the full address that is given for a redirect says http, behind a TLS proxy too,
    where the browser would then ask for the password again and send it in the clear."""

    def __init__(self, app: WSGIApplication) -> None:
        self.app = app

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        def start(status: str, headers: list[tuple[str, str]], *error: Any) -> Callable[[bytes], object]:
            paths = [
                (key, urlsplit(value)._replace(scheme="", netloc="").geturl() if key.lower() == "location" else value)
                for key, value in headers
            ]
            return start_response(status, paths, *error)

        return self.app(environ, start)


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
    if status.startswith("401"):
        headers.append(("WWW-Authenticate", 'Basic realm="hpo", charset="UTF-8"'))
    if status.startswith("405"):
        headers.append(("Allow", "GET, HEAD"))
    start_response(status, headers)
    return [body]


# The file of logins


def read_logins(path: Path) -> dict[str, bytes]:
    """Name -> bcrypt hash, from an htpasswd file. Raises UserError, naming a line but showing nothing of it."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"there is no --auth-file {path}; --auth-file {path} --add-user NAME makes it") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--auth-file {path} cannot be read: {_why(error)}") from None
    logins: dict[str, bytes] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        name, _, hashed = line.strip().partition(":")
        if not line.strip() or name.startswith("#"):
            continue
        if not name or not _BCRYPT.fullmatch(hashed):
            raise UserError(
                f"--auth-file {path}, line {number}: every line must be NAME:HASH, and the hash bcrypt's ($2y$...), as"
                " `htpasswd -B` and --add-user write it; other kinds are too easily guessed"
            )
        if name in logins:
            raise UserError(f"--auth-file {path}, line {number}: every name must be there once, and this one is twice")
        logins[name] = hashed.encode()
    if not logins:
        raise UserError(f"--auth-file {path} holds no login; --auth-file {path} --add-user NAME adds one")
    return logins


def check_login_name(name: str) -> None:
    """Raises UserError for a name that an htpasswd file or a login cannot carry."""
    if name != name.strip() or not name or name.startswith("#") or ":" in name or _CONTROL.search(name):
        raise UserError(
            "--add-user must be a name without ':' and control characters, without '#' at its beginning and without"
            f" blanks around it; got {name!r}"
        )


def add_login(path: Path, name: str, password: str) -> None:
    """Writes the name's line, new or in place of its old one, and leaves the other lines as they are.

    A new file can be read by its owner only. Raises UserError, which never shows the password.
    """
    check_login_name(name)
    try:
        given = password.encode()
    except UnicodeEncodeError:
        raise UserError("the password must be UTF-8 text") from None
    if not 0 < len(given) <= MAX_PASSWORD_BYTES or _CONTROL.search(password):
        raise UserError(
            f"the password must have 1 to {MAX_PASSWORD_BYTES} bytes, as bcrypt looks at no more, and no control"
            f" characters; got {len(given)} bytes"
        )
    line = f"{name}:{bcrypt.hashpw(given, bcrypt.gensalt()).decode()}"
    try:
        path = path.resolve()  # what a link leads to is replaced, not the link
        old = path.read_text(encoding="utf-8").rstrip("\n") if path.exists() else ""
        kept = [other for other in old.split("\n") if old and other.strip().partition(":")[0] != name]
        _replace(path, "\n".join([*kept, line, ""]))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--auth-file {path} cannot be written: {_why(error)}") from None


def _replace(path: Path, text: str) -> None:
    """Writes it aside and renames it: a server that starts meanwhile finds the old file or the new one, whole."""
    descriptor, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # for its owner only
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(descriptor)
            if path.exists():
                found = path.stat()
                with suppress(PermissionError):  # root may add a login to a file that is another's
                    os.fchown(descriptor, found.st_uid, found.st_gid)
                os.fchmod(descriptor, found.st_mode & 0o777)
        os.replace(aside, path)
    except BaseException:
        os.unlink(aside)
        raise


def _why(error: OSError | UnicodeDecodeError) -> str:
    return os.strerror(error.errno or 0) if isinstance(error, OSError) else "it is not UTF-8 text"


# Where it listens, and the names it answers to


def _listen(host: str, port: int, *, has_login: bool) -> socket.socket:
    if not host or not (has_login or _is_loopback(host)):
        raise UserError(
            "--host must be a loopback address (127.0.0.1, localhost or ::1), as the dashboard has no login without"
            f" --auth-file FILE; got {host!r}. Or forward the port: ssh -L {port}:127.0.0.1:{port} THIS_MACHINE"
        )
    if not 0 <= port <= 65535:
        raise UserError(f"--port must be from 0 (any free port) to 65535; got {port}")
    try:
        socket.getaddrinfo(host, port)  # create_server would make an OSError without a reason of it
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
    """Whether it stands for every address of this machine."""
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False


def _names_of_this_machine() -> list[str]:
    families = (socket.AF_INET, socket.AF_INET6)
    found = [entry for entries in psutil.net_if_addrs().values() for entry in entries if entry.family in families]
    return [socket.gethostname(), socket.getfqdn(), *(entry.address.partition("%")[0] for entry in found)]


def _host_name(name: str) -> str:
    """The name as the Host header has it, without a port."""
    try:
        return _bracketed(str(ipaddress.ip_address(name.strip("[]"))))
    except ValueError:
        if not _HOST_NAME.fullmatch(name.lower()):
            raise UserError(f"--allow-host must be a name or an address without a port; got {name!r}") from None
        return name.lower()


def _address(name: str, port: int) -> str:
    return f"{_bracketed(name)}:{port}"


def _bracketed(name: str) -> str:
    return f"[{name}]".lower() if ":" in name else name.lower()
