"""The URL of a store: read from text, checked, and shown to people without what may be a secret.

Secrets stand in odd places: in the query under many names, in what was meant for another program (libpq's `password=x`,
ODBC's `;PWD=x`), and in a password whose `@` makes its end a host. Only what is known to be harmless is shown.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from hpo.errors import UserError
from hpo.system.files import read_text

POSTGRES = "postgresql+psycopg"
PASSWORD_FILE = "HPO_STORAGE_PASSWORD_FILE"  # environment variable: a file with the password of a Postgres URL
SECRET = re.compile("pass|pwd|secret|token|credential|scram", re.IGNORECASE)  # in the name of a setting
# Settings of a query, of SQLite and of libpq, whose values may be shown.
SHOWN_SETTINGS = {"timeout", "uri", "mode", "vfs", "cache", "immutable", "nolock"} | {
    *("host", "hostaddr", "port", "connect_timeout", "application_name", "sslmode", "sslrootcert", "sslcert", "sslkey"),
    *("target_session_attrs", "channel_binding", "gssencmode", "service"),
}
_WORD, _USER = re.compile(r"[\w./~ -]*"), re.compile("[^:;=]*")
_HOST, _DATABASE = re.compile(r"[\w.,:%/-]*"), re.compile("[^:;=@]*")


class StoreURL(URL):
    """SQLAlchemy's URL, whose text hides what may be a secret; `render_as_string(hide_password=False)` has it all."""

    def __str__(self) -> str:
        """Return the URL as people may see it."""
        if not (is_sqlite(self) or _is_plain(self)):
            return f"{self.drivername}://***"
        query = {key: value if key in SHOWN_SETTINGS else "***" for key, value in self.query.items()}
        return self.set(query=query).render_as_string().replace("%2A%2A%2A", "***")

    __repr__ = __str__


def parse_url(text: str) -> URL:
    """Return the URL of a store, with an SQLite path made absolute and a Postgres password read from its file.

    Raises:
        UserError: The text is no URL of a store, or holds a secret in its query.
    """
    try:
        parsed = StoreURL._make(make_url(text))
    except (ArgumentError, ValueError):
        raise UserError(
            "--storage must be a URL such as sqlite:///hpo.db or postgresql+psycopg://user@host/database"
            + (f", got {text!r}" if _WORD.fullmatch(text) else "")
        ) from None
    if any(SECRET.search(key) for key in parsed.query):
        raise UserError(
            f"--storage must not hold a password in its query; {PASSWORD_FILE}, PGPASSFILE and PGPASSWORD are read"
        )
    if is_sqlite(parsed):
        return _parse_sqlite(parsed)
    # A password with an @ ends in the host, which errors show; libpq takes a database with a = for settings.
    if text.count("@") > 1 or not _is_plain(parsed):
        raise UserError(
            f"--storage must be {POSTGRES}://user@host/database, with an @ or : of a password written as %40 or %3A; "
            "it is not shown, as it may hold a password"
        )
    if parsed.drivername == POSTGRES:
        return _parse_postgres(parsed)
    if parsed.drivername.startswith("postgres"):
        raise UserError(f"--storage must name the driver, as {POSTGRES}://..., got {parsed}")
    got = f"{parsed.drivername}://***"
    raise UserError(f"--storage must be an SQLite or Postgres URL (sqlite:///..., {POSTGRES}://...), got {got}")


def is_sqlite(url: URL) -> bool:
    """Return whether the URL is one of an SQLite database."""
    return url.drivername in ("sqlite", "sqlite+pysqlite")


def database_path(url: URL) -> Path | None:
    """Return the file of an SQLite database, whose URL may hold a URI: sqlite:///file:/x/hpo.db?mode=ro&uri=true."""
    return None if url.drivername == POSTGRES else Path((url.database or "").removeprefix("file:"))


def may_hold_secret(text: str) -> bool:
    """Return whether a text that should be the URL of a store may hold a password."""
    try:
        parsed = make_url(text)
    except (ArgumentError, ValueError):
        return "@" in text or bool(SECRET.search(text))  # what stands before the @ may be a password
    return bool(parsed.password) or any(SECRET.search(key) for key in parsed.query)


def _is_plain(url: URL) -> bool:
    """Return whether each part holds only what such a part should, so that no secret has slipped into it."""
    parts = ((_USER, url.username), (_HOST, url.host), (_DATABASE, url.database))
    return all(letters.fullmatch(part or "") for letters, part in parts)


def _parse_sqlite(parsed: URL) -> URL:
    if not parsed.database or parsed.database == ":memory:":
        raise UserError(f"--storage must name a file, which workers can share, got {parsed}")
    if parsed.database.startswith("file:"):
        return parsed
    path = str(Path(parsed.database).expanduser().absolute())
    try:
        path.encode()
    except UnicodeEncodeError:  # a URL cannot hold the bytes of such a path
        raise UserError(
            f"--storage must be a file whose path is UTF-8 text, in a locale that is (LC_ALL=C.UTF-8), got {path!r}"
        ) from None
    return parsed.set(database=path)


def _parse_postgres(parsed: URL) -> URL:
    if not parsed.database:
        raise UserError(f"--storage must name a database, as {POSTGRES}://user@host/database, got {parsed}")
    path = os.environ.get(PASSWORD_FILE)
    if not path or parsed.password:
        return parsed
    try:
        return parsed.set(password=read_text(path).strip("\r\n"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(f"{PASSWORD_FILE} must name a file that can be read: {reason}") from None
