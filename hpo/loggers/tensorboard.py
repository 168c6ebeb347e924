"""TensorBoard: a folder for each study, and in it one for each run, with a single file of events.

The bytes of that file follow from the run alone. So what a file has already, be it half an event, is the beginning of
what it should have, and the rest is appended; a file that begins in another way is replaced by one of a later name,
which a TensorBoard that is open reads in its place.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams import api_pb2, metadata
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo
from tensorboard.plugins.hparams.summary_v2 import hparams_pb
from tensorboard.plugins.text.metadata import create_summary_metadata
from tensorboard.summary.writer.record_writer import RecordWriter
from tensorboard.util.tensor_util import make_tensor_proto

from hpo.loggers.runs import Run
from hpo.study.records import ENDED

DEFAULT_FOLDER = "runs"  # as that of torch.utils.tensorboard
RECOMMENDED = "recommended"  # the tag that marks a run of the recommended values, with 1
PREFIX, SUFFIX = "events.out.tfevents.", ".hpo"  # of file names; TensorBoard reads a folder's files by their names


class TensorBoardLogger:
    """Event files below a folder."""

    def __init__(self, target: str) -> None:
        self._folder = Path(target or DEFAULT_FOLDER).expanduser()

    def write(self, runs: Sequence[Run]) -> int:
        """Write what is not there yet of some runs; see `Logger`."""
        return sum(self._write(run) for run in runs)

    def _write(self, run: Run) -> bool:
        folder = self._folder / run.study_id / run.name
        folder.mkdir(parents=True, exist_ok=True)
        content = event_file(run)
        paths = sorted(folder.glob(f"{PREFIX}*{SUFFIX}"))
        there = paths[-1].read_bytes() if paths else None
        if there is not None and content.startswith(there):
            path = paths.pop()
        else:
            number = int(paths[-1].name.removeprefix(PREFIX).removesuffix(SUFFIX)) + 1 if paths else 0
            path, there = folder / f"{PREFIX}{number:010d}{SUFFIX}", b""
        if is_new := len(there) < len(content):
            with path.open("ab") as file:
                file.write(content[len(there) :])
        for earlier in paths:
            earlier.unlink()
        return is_new


def event_file(run: Run) -> bytes:
    """Return the bytes of a run's file of events."""
    file = io.BytesIO()
    writer = RecordWriter(file)
    for event in _events(run):
        writer.write(event.SerializeToString(deterministic=True))
    return file.getvalue()


def _events(run: Run) -> Iterator[Event]:
    """Yield the events of a run, those first that stay when more is known of it."""
    yield Event(wall_time=run.began, file_version="brain.Event:2")
    # Whatever an open TensorBoard has of an earlier file it then forgets.
    yield Event(wall_time=run.began, session_log=SessionLog(status=SessionLog.START))
    params = {key: value if isinstance(value, bool | int | float) else str(value) for key, value in run.params.items()}
    yield Event(wall_time=run.began, summary=_session_start(run, params))
    for point in run.points:
        yield _scalar(point.metric, point.value, step=point.epoch, time=point.time)
    if run.state in ENDED:
        ended = run.ended or run.began
        yield Event(wall_time=ended, summary=_session_end(ended, is_failed=run.state == "failed"))
        notes = "\n".join([run.text, "", *(f"- {key}: {value}" for key, value in run.tags.items())])
        value = Summary.Value(
            tag="notes", tensor=make_tensor_proto(notes), metadata=create_summary_metadata("notes", "")
        )
        yield Event(wall_time=ended, summary=Summary(value=[value]))
        if run.is_recommended:
            yield _scalar(RECOMMENDED, 1.0, step=max((point.epoch for point in run.points), default=0), time=ended)


def _scalar(tag: str, value: float, *, step: int, time: float) -> Event:
    return Event(wall_time=time, step=step, summary=Summary(value=[Summary.Value(tag=tag, simple_value=value)]))


def _session_start(run: Run, params: Mapping[str, Any]) -> Summary:
    """Return what the HParams table shows of a run; the package's own bytes for a map differ in each process."""
    summary = hparams_pb(dict(params), trial_id=run.run_id, start_time_secs=run.began)
    plugin_data = summary.value[0].metadata.plugin_data
    data = HParamsPluginData.FromString(plugin_data.content)
    plugin_data.content = data.SerializeToString(deterministic=True)
    return summary


def _session_end(ended: float, *, is_failed: bool) -> Summary:
    """Return what the HParams table shows of a run's end; the package's own function for it needs TensorFlow."""
    status = api_pb2.Status.Value("STATUS_FAILURE" if is_failed else "STATUS_SUCCESS")
    data = HParamsPluginData(session_end_info=SessionEndInfo(status=status, end_time_secs=ended))
    of_table = metadata.create_summary_metadata(data)
    value = Summary.Value(tag=metadata.SESSION_END_INFO_TAG, metadata=of_table, tensor=metadata.NULL_TENSOR)
    return Summary(value=[value])
