"""The URL of a store: what may be a secret is shown nowhere, in whatever place it stands."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import sqlalchemy as sa
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from hpo.cli.app import main
from hpo.errors import UserError
from hpo.store.store import Store
from hpo.store.urls import PASSWORD_FILE, StoreURL, may_hold_secret, parse_url

SECRET = "hunter2"
WITH_A_SECRET = [
    "host=localhost dbname=hpo password=hunter2",
    "password='hunter2'",
    "jdbc:postgresql://h/db?user=u&password=hunter2",
    "Server=h;Database=db;Pwd=hunter2",
    "redis://:hunter2@",
    "redis://:hunter2@h/0",
    "redis://hunter2",
    "mssql://server;PWD=hunter2",
    "mysql://h/db;password=hunter2",
    "mysql://u:hunter2@h/db",
    "postgres://u:hunter2@h/db",
    "postgresql://h/db?sslpassword=hunter2",
    "postgresql+psycopg://u:p@hunter2@h/db",
    "postgresql+psycopg://u@h:hunter2/db",
    "postgresql+psycopg://u%3Ahunter2@h/db",
    "postgresql+psycopg:///host=h password=hunter2",
    "postgresql+psycopg://h/u:hunter2@db",
    "postgresql+psycopg://u:hunter2@h",
    *(
        f"{store}?{key}=hunter2"
        for store in ("postgresql+psycopg://u@h/db", "sqlite:////nowhere/hpo.db")
        for key in (
            "password",
            "PASSWORD",
            "oauth_client_secret",
            "passfile",
            "scram_client_key",
            "access_token",
            "pwd",
        )
    ),
]


@pytest.mark.parametrize("url", WITH_A_SECRET)
def test_no_secret_in_a_url_is_echoed(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"^--storage must") as refused:
        parse_url(url)
    assert SECRET not in str(refused.value)
    monkeypatch.setenv("HPO_STORAGE", url)
    for arguments in (
        ["list"],
        ["list", "--storage", url],
        ["copy", "s", "--to", url, "--storage", "sqlite:///hpo.db"],
    ):
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 2, result.output
        assert SECRET not in result.output


@pytest.mark.parametrize("key", ["key", "options", "X", "krbsrvname"])
def test_the_values_of_unknown_settings_are_hidden(key: str) -> None:
    for url in (f"postgresql+psycopg://u:{SECRET}@h/db?{key}={SECRET}", f"sqlite:////x.db?{key}={SECRET}"):
        parsed = parse_url(url)
        assert SECRET not in f"{parsed} {parsed!r} {parsed.set(port=5)} {sa.create_engine(parsed).url}"
        assert f"{key}=***" in str(parsed)
        assert SECRET in parsed.render_as_string(hide_password=False)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("sqlite:////x/a b.db?timeout=3", "sqlite:////x/a b.db?timeout=3"),
        ("sqlite:///file:/x/hpo.db?mode=ro&uri=true", "sqlite:///file%3A/x/hpo.db?mode=ro&uri=true"),
        ("postgresql+psycopg://u:p@h:5/db?sslmode=require", "postgresql+psycopg://u:***@h:5/db?sslmode=require"),
        ("postgresql+psycopg://u@[::1]/db", "postgresql+psycopg://u@[::1]/db"),
        ("postgresql+psycopg://u:p%40q@h1,h2/db", "postgresql+psycopg://u:***@h1,h2/db"),
        ("postgresql+psycopg:///db?host=/var/run", "postgresql+psycopg:///db?host=%2Fvar%2Frun"),
    ],
)
def test_what_is_no_secret_is_shown(url: str, shown: str) -> None:
    assert str(parse_url(url)) == shown


@settings(derandomize=True, deadline=None, max_examples=300)
@given(
    st.sampled_from(["{}", "mysql://{}:{}@h", "postgresql+psycopg://u:{}@h/db", "x://h/d?{}={}", "a={};b={}"]),
    st.text(st.sampled_from("@:/?#=;&% x"), max_size=6).map(lambda odd: f"{odd}hunter2{odd}"),
)
def test_no_password_is_shown_however_it_is_written(form: str, password: str) -> None:
    url = form.format(*[password] * form.count("{}"))
    try:
        text = str(parse_url(url))
    except UserError as error:
        text = str(error)
    assert SECRET not in text or form == "{}"  # a lone word is no password


def test_a_password_file_that_is_the_password_is_not_echoed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PASSWORD_FILE, SECRET)
    with pytest.raises(UserError, match=f"^{PASSWORD_FILE} must name a file that can be read: No such file") as refused:
        parse_url("postgresql+psycopg://u@h/db")
    assert SECRET not in str(refused.value)


@pytest.mark.parametrize("url", ["sqlite:////a@b/hpo.db", "postgresql+psycopg://u@h/db?sslmode=require", "postgres"])
def test_a_url_without_a_secret_may_stand_on_the_command_line(url: str) -> None:
    assert not may_hold_secret(url)


def test_the_url_of_a_store_is_one_that_hides(store: Store) -> None:
    assert isinstance(store.url, StoreURL)


def test_a_path_that_is_no_text_is_refused_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    monkeypatch.chdir(folder)
    with pytest.raises(UserError, match=r"must be a file whose path is UTF-8 text.*caf.udce9/hpo\.db'"):
        parse_url("sqlite:///hpo.db")
