"""A file is replaced whole or not at all, and its permissions never widen on the way."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpo.system.files import read_text, replace_file, target_of_temporary


@pytest.fixture(autouse=True)
def usual_umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])  # the last two as Windows writes them
def test_a_users_text_is_read_whatever_editor_wrote_it(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "file").write_bytes("name = 'größe'\r\nlr = 1\r\n".encode(encoding))
    assert read_text(tmp_path / "file") == "name = 'größe'\nlr = 1\n"


def test_what_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"\xfc")
    with pytest.raises(UnicodeDecodeError):
        read_text(tmp_path / "file")


@pytest.mark.parametrize("sync_folder", [False, True])
def test_a_new_file_and_a_replaced_one_hold_the_content(tmp_path: Path, sync_folder: bool) -> None:
    file = tmp_path / "file"
    for content in (b"old", b"new and longer", b""):
        replace_file(file, content, sync_folder=sync_folder)
        assert file.read_bytes() == content
    assert list(tmp_path.iterdir()) == [file]


def test_a_relative_path_is_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    replace_file("file", b"here", sync_folder=True)
    assert (tmp_path / "file").read_bytes() == b"here"


def test_a_new_file_follows_the_umask_unless_it_is_private(tmp_path: Path) -> None:
    replace_file(tmp_path / "public", b"")
    replace_file(tmp_path / "private", b"", is_private=True)
    assert (mode(tmp_path / "public"), mode(tmp_path / "private")) == (0o644, 0o600)


@pytest.mark.parametrize("kept", [0o600, 0o640, 0o666])
@pytest.mark.parametrize("is_private", [False, True])
def test_an_existing_file_keeps_its_permissions(tmp_path: Path, kept: int, is_private: bool) -> None:
    file = tmp_path / "file"
    file.touch()
    file.chmod(kept)
    replace_file(file, b"new", is_private=is_private)
    assert mode(file) == kept


def test_the_temporary_file_is_never_wider_than_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.touch()
    file.chmod(0o600)
    seen: list[int] = []
    sync = os.fsync

    def watched(descriptor: int) -> None:
        seen.append(os.fstat(descriptor).st_mode & 0o777)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    replace_file(file, b"secret")
    assert seen == [0o600]


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failure_leaves_the_old_content_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    file = tmp_path / "file"
    file.write_bytes(b"old")
    monkeypatch.setattr(os, failing, full)
    with pytest.raises(OSError, match="No space left"):
        replace_file(file, b"new")
    assert file.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [file]


def test_the_name_of_a_temporary_file_tells_its_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    targets: list[str | None] = []
    rename = os.replace

    def watched(source: str, target: str | Path) -> None:
        targets.append(target_of_temporary(os.path.basename(source)))
        rename(source, target)

    monkeypatch.setattr(os, "replace", watched)
    replace_file(tmp_path / "epoch-000002.ckpt", b"")
    assert targets == ["epoch-000002.ckpt"]
    for other in ("epoch-000002.ckpt", ".notes.tmp", f".notes.{'g' * 16}.tmp", f"notes.{'0' * 16}.tmp"):
        assert target_of_temporary(other) is None
