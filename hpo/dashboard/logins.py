"""Logins of the dashboard: HTTP Basic against bcrypt hashes, in a file of the format of Apache's htpasswd."""

from __future__ import annotations

import base64
import hmac
import logging
import os
import re
import secrets
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

import bcrypt

from hpo.dashboard.middleware import refuse
from hpo.errors import UserError
from hpo.system.files import read_text, replace_file

logger = logging.getLogger(__name__)

# Requests that may wait for bcrypt at once: as many as a browser sends at once, and fewer than the server has threads.
MAX_WAITING_CHECKS = 6
MAX_PASSWORD_BYTES = 72  # bcrypt looks at no more
# $2y$COST$SALT and digest; the last character of the salt has four bits that must be zero.
_BCRYPT = re.compile(r"\$2[aby]\$(0[4-9]|[12]\d|3[01])\$[./A-Za-z0-9]{21}[.Oeu][./A-Za-z0-9]{31}", re.ASCII)
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


class Login:
    """Middleware that lets through only requests with a name of `logins` and the password of its bcrypt hash.

    An unknown name costs the same check as a known one, so that the time tells nothing; where costs differ, as the
    dearest. A login that was right once is remembered, hashed under a key of this process: a page makes many requests,
    and bcrypt takes 0.2 s. One check runs at a time, so that a flood of guesses takes one core from the training, and
    MAX_WAITING_CHECKS wait or run, so that threads are left for who has logged in. More are answered with 429.
    """

    def __init__(self, app: WSGIApplication, logins: Mapping[str, bytes]) -> None:
        self.app = app
        self._logins = logins
        cost = max(int(hashed.split(b"$")[2]) for hashed in logins.values())
        self._nobody = bcrypt.gensalt(cost) + b"." * 31  # the hash of no known password
        self._key = secrets.token_bytes(32)
        self._right: set[bytes] = set()
        self._checking = threading.Lock()
        self._places = threading.Semaphore(MAX_WAITING_CHECKS)

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Answer a request, or ask for a login."""
        try:
            is_right = self._is_right(environ.get("HTTP_AUTHORIZATION", ""), address=environ.get("REMOTE_ADDR", "?"))
        except _TooManyChecksError:
            reason = "Too many logins are being checked; try again in a moment."
            return refuse(start_response, "429 Too Many Requests", reason)
        if not is_right:
            return refuse(start_response, "401 Unauthorized", "The dashboard asks for a name and a password.")
        return self.app(environ, start_response)

    def _is_right(self, authorization: str, *, address: str) -> bool:
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
        if not self._places.acquire(blocking=False):
            raise _TooManyChecksError
        try:
            with self._checking:
                if digest in self._right:  # a page makes many requests at once, and the first was checked meanwhile
                    return True
                is_right = bcrypt.checkpw(password, self._logins.get(name, self._nobody)) and name in self._logins
        finally:
            self._places.release()
        if is_right:
            self._right.add(digest)
        else:
            logger.warning("wrong login as %.80r from %s", name, address)
        return is_right


class _TooManyChecksError(Exception):
    """As many requests wait for their login to be checked as may wait."""


def read_logins(path: Path) -> dict[str, bytes]:
    """Return the bcrypt hash of each name in an htpasswd file.

    Raises:
        UserError: The file cannot be read, or a line is wrong; the message shows nothing of the line.
    """
    try:
        text = read_text(path)
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
            raise UserError(f"--auth-file {path}, line {number}: every name must occur once, and this one occurs twice")
        logins[name] = hashed.encode()
    if not logins:
        raise UserError(f"--auth-file {path} holds no login; --auth-file {path} --add-user NAME adds one")
    return logins


def check_login_name(name: str) -> None:
    """Raise UserError for a name that an htpasswd file or a login cannot carry."""
    if name != name.strip() or not name or name.startswith("#") or ":" in name or _CONTROL.search(name):
        raise UserError(
            "--add-user must be a name without ':' and control characters, without '#' at its beginning and without"
            f" blanks around it; got {name!r}"
        )


def add_login(path: Path, name: str, password: str) -> None:
    """Add a name's line to the file, or replace its old one; the other lines stay as they are.

    Only its owner can read a new file.

    Raises:
        UserError: The name or the password cannot be used, or the file cannot be written. It never shows the password.
    """
    check_login_name(name)
    try:
        given = password.encode()
    except UnicodeEncodeError:
        raise UserError("the password must be UTF-8 text") from None
    if not 0 < len(given) <= MAX_PASSWORD_BYTES or _CONTROL.search(password):
        raise UserError(
            f"the password must have 1 to {MAX_PASSWORD_BYTES} bytes, as bcrypt ignores the rest, and no control"
            f" characters; got {len(given)} bytes"
        )
    line = f"{name}:{bcrypt.hashpw(given, bcrypt.gensalt()).decode()}"
    try:
        path = path.resolve()  # replace the target of a link, not the link
        old = read_text(path).rstrip("\n") if path.exists() else ""
        kept = [other for other in old.split("\n") if old and other.strip().partition(":")[0] != name]
        # A server that starts meanwhile must find the old file or the new one, whole.
        replace_file(path, "\n".join([*kept, line, ""]).encode(), is_private=True)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--auth-file {path} cannot be written: {_why(error)}") from None


def _why(error: OSError | UnicodeDecodeError) -> str:
    return os.strerror(error.errno or 0) if isinstance(error, OSError) else "it is not UTF-8 text"
