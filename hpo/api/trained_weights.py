"""The public functions for trained networks: write a study's weights to a file, and build the network from it again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpo.analysis.answer import trial_of_weights
from hpo.api.exporting import HEADER, find_trial
from hpo.api.reading import answer_of
from hpo.api.stores import open_study
from hpo.config.import_policy import parse_allow
from hpo.errors import UserError
from hpo.store.store import Store
from hpo.study.records import StudyRecord, TrialRecord
from hpo.system.files import replace_file

if TYPE_CHECKING:
    from torch import nn

    from hpo.train.checkpoint import Checkpoint

DESCRIPTION_KEY = "hpo"  # of the metadata of a file of weights: how to build its network, as JSON


def write_weights(
    name: str, output: str | Path, *, trial: int | None = None, storage: str | None = None
) -> dict[str, Any]:
    """Write the weights that a trial of a study ended with, and beside them a JSON file that says how to build them.

    Args:
        name: The study.
        output: The file, which ends in .safetensors. The JSON has the same name with that ending.
        trial: The number of the trial. Default: the best one of the learning rate that won the confirmation, or else
            the best trial.
        storage: URL of the store. Default: HPO_STORAGE, else sqlite:///hpo.db.

    Returns:
        The content of the JSON: the study, the trial with its values, the network and its options, the number of
        classes and of channels, the size of images and their mean and deviation (pixels from 0 to 1).

    Raises:
        UserError: There is no such study or trial, its weights were not kept, or `output` has another ending, cannot be
            written or is no earlier export.
        StudyStopped: No trial has completed.
    """
    from safetensors.torch import save

    path = Path(output)
    if path.suffix != ".safetensors":
        raise UserError(f"--weights must end in .safetensors, got {str(output)!r}")
    beside = path.with_suffix(".json")
    for file in (path, beside):
        if file.exists() and HEADER.encode() not in file.read_bytes():
            raise UserError(f"--weights {path}: {file} exists and was not written by hpo export; name another file")
    store, study = open_study(name, storage=storage)
    all_trials = store.trials.get_all(study)
    record = find_trial(all_trials, trial_of_weights(study, answer_of(study, all_trials)) if trial is None else trial)
    checkpoint = _last_checkpoint(store, study, record)
    description = _description(study, record, checkpoint)
    text = json.dumps(description, indent=2)
    tensors = {}
    for key, tensor in checkpoint.state["model"].items():
        if not hasattr(tensor, "untyped_storage"):
            raise UserError(f"--weights cannot hold the state of {key} of trial {record.number}, which is not a tensor")
        tensors[key] = tensor.clone().contiguous()  # tied weights are stored twice
    try:
        replace_file(path, save(tensors, metadata={DESCRIPTION_KEY: text}))
        replace_file(beside, f"{text}\n".encode())
    except OSError as error:
        raise UserError(f"--weights {path} cannot be written: {error.strerror}") from None
    return description


def load_model(path: str | Path, *, allow: Sequence[str] = ()) -> nn.Module:
    """Build the network of a file that `hpo export STUDY --weights FILE` wrote, with its weights.

    It takes images (B, C, H, W) of the size, and with the mean and the deviation, that the JSON beside the file has.

    Args:
        path: The .safetensors file; the JSON beside it is not read.
        allow: Code of your own that the file may name: modules by their names, or folders of modules. A file may come
            from anybody, so any other code is refused.

    Returns:
        The network, on the CPU and in evaluation mode.

    Raises:
        UserError: The file cannot be read or was not written by hpo, its code is not allowed, or the network that its
            code builds has other tensors.
    """
    from safetensors import safe_open

    from hpo.train.config import ModelConfig
    from hpo.train.imports import is_import_path
    from hpo.train.models import build_model
    from hpo.train.seeding import generators_kept

    try:
        with safe_open(path, framework="pt") as file:
            description = json.loads((file.metadata() or {})[DESCRIPTION_KEY])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (it is no dictionary)
        section, data = description["model"], description["data"]
        config = ModelConfig(name=section["name"], options=section["options"])
        shape = {key: int(data[key]) for key in ("channels", "num_classes", "image_size")}
    except Exception as error:  # whatever safetensors says of a file that is none
        raise UserError(
            f"{path} must be a file that hpo export --weights wrote ({type(error).__name__}: {error})"
        ) from None
    allowed = parse_allow(allow)
    module = config.name.partition(":")[0]
    if is_import_path(config.name) and not config.name.startswith("torchvision:") and not allowed.allows(config.name):
        raise UserError(
            f"{path} needs code from the module {module!r}; if you trust it, allow it: "
            f"hpo.load_model(..., allow=[{module!r}])"
        )
    with allowed.importable(), generators_kept():
        model = build_model(config, **shape)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} has other tensors than the network that {config.name} builds: {reason}") from None
    return model.eval()


def _last_checkpoint(store: Store, study: StudyRecord, record: TrialRecord) -> Checkpoint:
    """Return the checkpoint of a trial after its last epoch; raise UserError where there is none."""
    from hpo.workers.checkpoints import checkpoint_folder

    if study.spec.objective is not None:
        raise UserError(f"study {study.name!r} trains by a loop of your own, which keeps its own weights")
    url = store.checkpoints_url(study)
    try:
        checkpoint, notes = checkpoint_folder(url, study, record.number).load(None)
    except OSError as error:
        raise UserError(f"the checkpoints of study {study.name!r} in {url} cannot be read: {error}") from None
    if checkpoint is None or checkpoint.epoch < max(record.epochs, default=0) or "data" not in checkpoint.state:
        reason = notes[0] if notes else f"its last checkpoint is not in {url} on this machine"
        raise UserError(
            f"the weights of trial {record.number} of study {study.name!r} were not kept ({reason}); the best "
            f"{study.spec.checkpoints.keep_best} (checkpoints.keep_best) and those of confirmed rates are. To train it "
            f"again: hpo export {study.name} --trial {record.number} --output again.toml && hpo run again.toml"
        )
    return checkpoint


def _description(study: StudyRecord, record: TrialRecord, checkpoint: Checkpoint) -> dict[str, Any]:
    """Return how to build the network of a trial, and where its weights are from."""
    config = study.spec.trial_config(record.params, seed=0)
    resize = {} if config.data.resize is None else {"resize": config.data.resize}
    return {
        "what": f"{HEADER} {study.name}: the weights of trial {record.number}",
        "study": study.name,
        "trial": record.number,
        "epoch": checkpoint.epoch,
        "params": dict(record.params),
        study.spec.metric: record.value,
        "model": {"name": config.model.name, "options": dict(config.model.options)},
        "data": {"name": config.data.name, **resize, **checkpoint.state["data"]},
    }
