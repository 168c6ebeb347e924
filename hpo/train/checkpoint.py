"""Checkpoints of a trial after whole epochs, in a folder or an object store; only whole files of the trial are read."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import re
import stat
import struct
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import fsspec
import torch
from fsspec.implementations.local import LocalFileSystem
from torch import Tensor, nn

from hpo.errors import UserError
from hpo.system.files import replace_file, target_of_temporary
from hpo.train.config import (
    EARLIER_RESIZE,
    LATER_KEYS,
    TRIAL_NEUTRAL_KEYS,
    DataConfig,
    EpochResult,
    ModelConfig,
    TrainingConfig,
    TrialConfig,
)
from hpo.train.weight_files import images_of_weights, weights_digest

MAGIC = b"hpo checkpoint\n"
FORMAT_VERSION = 1
_HEADER = struct.Struct(f">{len(MAGIC)}sI32sQ")  # magic, format version, SHA-256 and length in bytes of the payload
_CHECKPOINT = re.compile(r"epoch-(\d{6,})\.ckpt")
ABANDONED_TEMPORARY_S = 3600.0  # a temporary file that nobody wrote to for so long has lost its writer
_DEFAULTS = {
    "model": dataclasses.asdict(ModelConfig()),
    "data": dataclasses.asdict(DataConfig()),
    "training": dataclasses.asdict(TrainingConfig()),
}
_EXTRAS = {"s3": "hpo[s3]", "s3a": "hpo[s3]", "gs": "hpo[gs]", "gcs": "hpo[gs]"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A trial after a whole number of epochs: all that an engine needs to resume it as if it had never stopped."""

    config_digest: str  # of the trial's TrialConfig
    epoch: int  # how many are finished
    # The engine's own, as `storable_copy` makes it: tensors on the CPU, numbers, strings, lists and dicts of them.
    state: Mapping[str, Any]
    results: Sequence[EpochResult]  # of the epochs 1 to `epoch`


def config_digest(config: TrialConfig) -> str:
    """Return a digest that is the same, on every machine, for configurations whose trials give the same results.

    Weights to start from count by their content. Raises UserError where their file is not found.
    """
    content = dataclasses.asdict(config)
    for key in TRIAL_NEUTRAL_KEYS:
        section, _, name = key.partition(".")
        del content[section][name]
    if content["data"]["resize"] == EARLIER_RESIZE:
        content["data"]["resize"] = None
    for key in LATER_KEYS:
        section, _, name = key.partition(".")
        if json.dumps(content[section][name]) == json.dumps(_DEFAULTS[section][name]):  # a list is as good as a tuple
            del content[section][name]
    if config.model.weights is not None:
        content["model"]["weights"] = [weights_digest(config.model), images_of_weights(config.model)]
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def copy_to_cpu(tensor: Tensor) -> Tensor:
    """Return a copy of a tensor on the CPU, strides kept."""
    return tensor.detach().to("cpu", copy=True)


def storable_copy(
    value: Any, *, setting: str, where: str = "state", copy_tensor: Callable[[Tensor], Tensor] = copy_to_cpu
) -> Any:
    """Return a copy that torch can read again without unpickling objects; tensors are what `copy_tensor` returns.

    Raises UserError, naming `setting` and the place in the state, for a value that cannot be stored so.
    """
    copied = partial(storable_copy, setting=setting, copy_tensor=copy_tensor)
    if type(value) in (Tensor, nn.Parameter):
        return copy_tensor(value)
    if type(value) in (dict, OrderedDict):
        copy = type(value)()
        for key, item in value.items():
            item_where = f"{where}[{key!r}]"
            copy[copied(key, where=item_where)] = copied(item, where=item_where)
        if isinstance(value, OrderedDict):  # state_dict() notes the versions of its modules as an attribute
            vars(copy).update(copied(vars(value), where=where))
        return copy
    if type(value) in (list, tuple):
        return type(value)(copied(item, where=f"{where}[{i}]") for i, item in enumerate(value))
    if value is None or type(value) in (bool, int, float, str):
        return value
    buffer = io.BytesIO()
    try:
        torch.save(value, buffer)
        buffer.seek(0)
        return torch.load(buffer, map_location="cpu", weights_only=True)
    except Exception:  # whatever pickling a user's object does
        raise UserError(
            f"{setting} has a state that cannot be kept in a checkpoint: {where} must be a tensor, a number, a string, "
            f"a list or a dict of them, got {type(value).__name__}"
        ) from None


class CheckpointFolder:
    """The folder of one trial's checkpoints, local or in an object store; it holds nothing else.

    At most one process trains the trial, yet another that lost its claim without noticing may still write here. It
    replaces a file only by a whole checkpoint of the same trial and epoch, and removes only what is older than its
    own. All calls raise OSError where the folder, the disk or the network fails.
    """

    def __init__(self, url: str, *, identity: Mapping[str, str | int]) -> None:
        """Open a folder, which need not exist yet.

        Args:
            url: A folder, or an fsspec URL of an object store. An s3:// URL takes its credentials and its server from
                where the AWS command line does: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_DEFAULT_REGION,
                AWS_ENDPOINT_URL, ~/.aws.
            identity: What tells this trial from every other one; it is stored in each checkpoint.

        Raises:
            UserError: The URL cannot be used; the message names checkpoints.url.
        """
        self.url, self.identity = url, dict(identity)
        self._filesystem, self._path = _open(self.url)

    def save(self, checkpoint: Checkpoint) -> None:
        """Store a checkpoint, then remove all older ones but one, which stays in case this one is torn later.

        After an exception the earlier checkpoints are still there, whole, and no temporary file is left.
        """
        content = {field.name: getattr(checkpoint, field.name) for field in dataclasses.fields(checkpoint)}
        content |= {"identity": self.identity, "results": [dataclasses.asdict(result) for result in checkpoint.results]}
        buffer = io.BytesIO(bytes(_HEADER.size))
        buffer.seek(_HEADER.size)
        torch.save(content, buffer)
        data = buffer.getbuffer()
        payload = data[_HEADER.size :]
        _HEADER.pack_into(data, 0, MAGIC, FORMAT_VERSION, hashlib.sha256(payload).digest(), len(payload))
        with _raises_os_error(self.url):
            if isinstance(self._filesystem, LocalFileSystem):
                _write_local(self._path_of(checkpoint.epoch), data=data)
            else:  # an upload is visible whole or not at all, and an object store needs no folder made
                self._filesystem.pipe_file(self._path_of(checkpoint.epoch), bytes(data))
        # Kept are this epoch and the one below it, not the two highest: those may be torn, and the trial back at an
        # earlier epoch for that reason.
        for epoch in sorted(epoch for epoch in self._epochs() if epoch < checkpoint.epoch)[:-1]:
            with suppress(FileNotFoundError), _raises_os_error(self.url):  # another process removed it
                self._filesystem.rm_file(self._path_of(epoch))

    def load(self, config: TrialConfig | None) -> tuple[Checkpoint | None, list[str]]:
        """Return the newest whole checkpoint of this trial and configuration, or None; without one, of any.

        Also return a sentence for each newer file that was skipped; none where there is no folder.
        """
        passed_over: list[str] = []
        for epoch in sorted(self._epochs(), reverse=True):
            try:
                with _raises_os_error(self.url):
                    data = self._read(self._path_of(epoch))
                return self._parse(data, epoch=epoch, config=config), passed_over
            except FileNotFoundError:
                reason = "it was removed before it was read"
            except OSError as error:
                reason = f"it could not be read: {error}"
            except _Unusable as error:
                reason = str(error)
            passed_over.append(f"the checkpoint {self.url.rstrip('/')}/{_file_name(epoch)} was skipped: {reason}")
        return None, passed_over

    def remove(self) -> None:
        """Delete the checkpoints, and the folder if it is then empty: a wrong URL costs nobody their files."""
        with _raises_os_error(self.url):
            for name in _names_in(self._filesystem, self._path):
                if _CHECKPOINT.fullmatch(name) or _is_temporary(name):
                    with suppress(FileNotFoundError):  # another process removed it
                        self._filesystem.rm_file(f"{self._path}/{name}")
            if isinstance(self._filesystem, LocalFileSystem):
                with suppress(OSError):
                    os.rmdir(self._path)

    def _path_of(self, epoch: int) -> str:
        return f"{self._path}/{_file_name(epoch)}"

    def _epochs(self) -> list[int]:
        with _raises_os_error(self.url):
            return [
                int(match[1])
                for name in _names_in(self._filesystem, self._path)
                if (match := _CHECKPOINT.fullmatch(name))
            ]

    def _read(self, path: str) -> bytes:
        return _read_local(path) if isinstance(self._filesystem, LocalFileSystem) else self._filesystem.cat_file(path)

    def _parse(self, data: bytes, *, epoch: int, config: TrialConfig | None) -> Checkpoint:
        checkpoint, identity = _parsed(data)
        if identity != self.identity:
            whose = ", ".join(f"{key} {value}" for key, value in identity.items())
            raise _Unusable(f"it belongs to another trial ({whose})")
        if config is not None and checkpoint.config_digest != config_digest(config):
            raise _Unusable("it belongs to another configuration of the trial")
        if not checkpoint.epoch == len(checkpoint.results) == epoch:
            raise _Unusable(f"it is of epoch {checkpoint.epoch}")
        return checkpoint


def read_checkpoint_weights(path: str | os.PathLike[str]) -> Mapping[str, Any]:
    """Return the state of the network in a file that `CheckpointFolder` wrote, whichever trial it belongs to.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is no whole checkpoint; the message says why.
    """
    try:
        return dict(_parsed(_read_local(os.fspath(path)))[0].state["model"])
    except _Unusable as error:
        raise ValueError(str(error)) from None


def list_folders(url: str) -> list[str]:
    """Return the names of the folders, each a trial's, below a folder or a URL; none where that does not exist.

    Raises OSError where it cannot be read.
    """
    filesystem, path = _open(url)
    with _raises_os_error(url):
        return _names_in(filesystem, path)


class _Unusable(Exception):
    """A file is not this trial's whole checkpoint; the message says why."""


def _parsed(data: bytes) -> tuple[Checkpoint, dict[str, str | int]]:
    """Return the checkpoint in a file, and the identity of its trial; raise _Unusable where it is not whole."""
    if data[: len(MAGIC)] != MAGIC[: len(data)]:
        raise _Unusable("it is not a checkpoint of hpo's")
    if len(data) < _HEADER.size:
        raise _Unusable(f"it is torn, {len(data)} bytes long and shorter than its header")
    _, version, digest, length = _HEADER.unpack_from(data)
    if version != FORMAT_VERSION:
        raise _Unusable(f"it has format version {version}, and this hpo reads version {FORMAT_VERSION}")
    payload = data[_HEADER.size :]
    if len(payload) != length:
        raise _Unusable(f"it is torn, with {len(payload)} bytes of content in place of {length}")
    if hashlib.sha256(payload).digest() != digest:
        raise _Unusable("it is damaged: its checksum differs from that of its content")
    try:
        content = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
        identity = dict(content.pop("identity"))
        content["results"] = [EpochResult(**result) for result in content["results"]]
        return Checkpoint(**content), identity
    except MemoryError:
        raise
    except Exception as error:  # torch's messages advise to switch its safeguard off
        raise _Unusable(f"its content is not that of a checkpoint ({type(error).__name__})") from error


def _file_name(epoch: int) -> str:
    return f"epoch-{epoch:06d}.ckpt"


def _open(url: str) -> tuple[Any, str]:
    """Return the file system of a URL, and the path in it."""
    protocol, separator, rest = url.partition("://")
    if not separator:
        return LocalFileSystem(), os.path.abspath(url)
    if re.search(r":.*@|\?", rest):
        raise UserError(
            "checkpoints.url must hold no password, key or query: they belong into the environment; "
            f"got '{protocol}://***'"
        )
    try:
        filesystem, path = fsspec.url_to_fs(url)
    except ImportError as error:
        package = _EXTRAS.get(protocol, f"the package for {protocol}")
        raise UserError(f"checkpoints.url needs {package} to be installed ({error}); got {url!r}") from error
    except Exception as error:  # whatever the file system says of its URL
        raise UserError(
            f"checkpoints.url must be a folder or a URL of an object store ({error}); got {url!r}"
        ) from error
    return filesystem, path.rstrip("/")


@contextmanager
def _raises_os_error(url: str) -> Iterator[None]:
    """Turn the exceptions of object stores' libraries, for missing credentials for instance, into OSError."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{url} failed with {type(error).__name__}: {error}") from error


def _names_in(filesystem: Any, path: str) -> list[str]:
    """Return the names in a folder; none where there is no folder."""
    filesystem.invalidate_cache()  # drops old listings: another process may have written
    try:
        return [name.rstrip("/").rpartition("/")[2] for name in filesystem.ls(path, detail=False)]
    except FileNotFoundError:
        return []


def _read_local(path: str) -> bytes:
    """Read a file; refuse a pipe, which would be waited for without end, and a device, which may have none."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError("it is no regular file")
        with open(descriptor, "rb", closefd=False) as file:
            return file.read()
    finally:
        os.close(descriptor)


def _write_local(path: str, *, data: memoryview) -> None:
    """Write a local file so that it is there whole or not at all, whatever is killed or fails."""
    folder = os.path.dirname(path)
    os.makedirs(folder, exist_ok=True)
    _remove_abandoned(folder)
    # The folder too is flushed, or a power cut could undo the rename after the older checkpoints are gone.
    replace_file(path, data, sync_folder=True)


def _is_temporary(name: str) -> bool:
    """Return whether a file name is that of a checkpoint that is being written."""
    target = target_of_temporary(name)
    return target is not None and bool(_CHECKPOINT.fullmatch(target))


def _remove_abandoned(folder: str) -> None:
    """Remove what killed writers left; a file that somebody still writes to is not touched."""
    for entry in os.scandir(folder):
        if _is_temporary(entry.name):
            with suppress(FileNotFoundError):
                if time.time() - entry.stat().st_mtime > ABANDONED_TEMPORARY_S:
                    os.unlink(entry)
