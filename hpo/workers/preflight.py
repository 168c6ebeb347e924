"""Checks of a study that need its images, its network or the user's code, made before the study is created."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hpo.config.study_spec import StudySpec
from hpo.errors import UserError
from hpo.system.devices import Device
from hpo.workers.launcher import Proof

if TYPE_CHECKING:
    from torch import Tensor, nn

    from hpo.train.config import DataConfig, ModelConfig, TrialConfig
    from hpo.train.data.loading import SplitDataset

logger = logging.getLogger(__name__)

WEIGHTS_KEYS = ("weights_digest", "weights")  # in the metadata: of the content of model.weights, and what is loaded
RANDOM_IMAGES = "random_images"  # whether a user's data set gives other images when they are read again
LARGEST_TRIED_BATCH = 8  # images of the batch that a network is trained on, unless the search asks for smaller ones


def run_preflight(spec: StudySpec, kinds: Collection[str]) -> dict[str, Any]:
    """Load the data, then build and try every network that the search space can ask for.

    It runs on the CPU, so that a process that only supervises takes no memory of a GPU. Datasets that are absent are
    downloaded here, once, before any worker starts.

    Args:
        spec: The study.
        kinds: The kinds of the devices that will train: "cuda", "mps" or "cpu".

    Returns:
        Metadata of the study, such as the number of training images. Empty where the user's own function trains.

    Raises:
        UserError: Something that would fail in the trials.
    """
    from hpo.search.pruners import build_pruner
    from hpo.search.samplers import build_sampler
    from hpo.workers.own_loop import try_loop

    build_pruner(spec)
    build_sampler(spec, number=0)
    if spec.checkpoints.url is not None and "://" in spec.checkpoints.url:
        _check_readable(spec.checkpoints.url)
    if spec.objective:
        try_loop(spec, spec.objective)
    if not spec.has_recipe:
        return {}
    from hpo.train.seeding import generators_kept  # loads torch, which a loop may do without

    _check_precision(spec, kinds)
    with generators_kept():
        metadata = _try_networks(spec)
    if spec.objective:
        del metadata["has_test"]  # its loop measures the test set while it confirms
    return metadata


def judge_random_images(spec: StudySpec, metadata: Mapping[str, Any], *, is_new: bool) -> None:
    """Refuse a new study whose data set transforms its images at random, and warn of one that an earlier version made.

    Raises:
        UserError: The study is new, and the preflight, whose metadata is given, found such a data set.
    """
    if not metadata.get(RANDOM_IMAGES):
        return
    source = f"data.name = {spec.data.name!r} transforms its images at random"
    if is_new:
        raise UserError(
            f"{source}, but each is read only once, and those to validate on must stay as they are: leave random "
            "transforms out of the data set, and name them in data.augment, which is drawn anew in each epoch, and for "
            "the training images alone"
        )
    logger.warning(
        "%s, those to validate on too. Images that are kept on the device keep their first random version in all "
        "epochs and trials",
        source,
    )


def check_devices(devices: Collection[Device], proofs: Mapping[str, Proof]) -> None:
    """Wait for the proofs of devices, by their names, and log a warning for each device that cannot be used.

    Raises:
        UserError: None of the devices can be used.
    """
    problems = {name: problem for name, proof in proofs.items() if (problem := proof.problem()) is not None}
    if problems and len(problems) == len(devices):
        found = "; ".join(f"{name}: {problem}" for name, problem in problems.items())
        raise UserError(f"--devices must name a device that can be used, and none can: {found}")
    for name, problem in problems.items():
        logger.warning("the device %s cannot be used, so the others train its trials: %s", name, problem)


def _check_readable(url: str) -> None:
    """List an object store's folders, so that a wrong name or missing credentials are found before training."""
    from hpo.train.checkpoint import list_folders

    try:
        list_folders(url)
    except OSError as error:
        raise UserError(f"checkpoints.url must be a place that this machine can read: {error}") from None


def _check_precision(spec: StudySpec, kinds: Collection[str]) -> None:
    import torch

    from hpo.train.engines.lane_state import mixed_precision

    for kind in kinds:
        if kind != "cuda":  # asking a GPU would take memory on it
            mixed_precision(spec.training, device=torch.device(kind))


def _try_networks(spec: StudySpec) -> dict[str, Any]:
    """Load the data and try the network for each extreme point of the space; return the metadata of the first."""
    from hpo.train.data.loading import fit_to_weights
    from hpo.train.weight_files import images_of_weights

    tried, loaded = [], None
    of_training = next(spec.extreme_points(sections=("training",)))  # with the patterns of searched multipliers
    for values in spec.extreme_points(sections=("data", "model")):
        config = spec.trial_config({**of_training, **values}, seed=0)
        if loaded is None or loaded[0] != config.data:
            loaded = None  # frees its memory
            loaded = config.data, *_load_checked(config.data, with_test=spec.confirm is not None)
        _, data, described = loaded
        if (images := images_of_weights(config.model)) is not None:
            data = fit_to_weights(data, images)
        tried.append(_try_network(spec, config, data) | described)
        if len(tried) == 1:
            _try_recipes(spec, values, data)
            tried[0] |= _guess(spec, config, data)
    return tried[0] | _joined_weights(tried)


def _guess(spec: StudySpec, config: TrialConfig, data: SplitDataset) -> dict[str, float]:
    """Return what guessing is worth in the study's metric, where that is known and no accuracy."""
    from hpo.train.losses import LOSSES, build_loss, class_shares
    from hpo.train.metrics import guess

    if spec.metric == "val_loss" and config.training.loss in LOSSES and "loss" not in spec.search.parameters:
        return {"guess_value": round(build_loss(config.training, data=data).best_constant(data), 4)}
    return guess(config.training.metric, priors_L=class_shares(data), labels_N=data.val.labels_N)


def _joined_weights(tried: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the digests and the descriptions of the weights that the networks start from; nothing without any."""
    keys = [key for key in WEIGHTS_KEYS if any(key in found for found in tried)]
    return {key: "; ".join(dict.fromkeys(found[key] for found in tried if key in found)) for key in keys}


def _load_checked(config: DataConfig, *, with_test: bool) -> tuple[SplitDataset, dict[str, Any]]:
    """Open a dataset twice where it is the user's, read each of its images once, and return it with its metadata.

    The test set is read only `with_test`: a study that never measures it does not touch it. Raises UserError where the
    second one is another dataset, or an image cannot be read.
    """
    from hpo.train.data.datasets import open_dataset
    from hpo.train.data.folders import describe_images
    from hpo.train.data.groups import groups_digest
    from hpo.train.data.images import FileImages
    from hpo.train.data.loading import is_random, load_data
    from hpo.train.data.sources import read_all
    from hpo.train.imports import is_import_path
    from hpo.train.seeding import seed_generators

    seed_generators(config.split_seed, "data")
    dataset = open_dataset(config)
    if is_import_path(config.name):
        seed_generators(config.split_seed, "data")
        again = open_dataset(config)
        if not dataset.train.equals(again.train) or (dataset.val and again.val and not dataset.val.equals(again.val)):
            raise UserError(
                f"data.name = {config.name!r} must give the same images and labels whenever it is called; "
                "called twice, with torch's, numpy's and random's generators seeded alike, it gave others"
            )
    described: dict[str, Any] = {}
    if isinstance(dataset.train, FileImages):
        described["images"] = describe_images(dataset.train)
    if isinstance(dataset.val, FileImages):
        described["images"] += f"; for validation: {describe_images(dataset.val)}"
    if (digest := groups_digest(config.groups)) is not None:
        described["groups_digest"] = digest
    if is_random(dataset):
        described[RANDOM_IMAGES] = True
    data = load_data(config, device="cpu", dataset=dataset)
    if with_test and dataset.open_test is not None and data.test is not None:
        deque(read_all(data.test.source, len(data.test)), maxlen=0)
        if isinstance(dataset.train, FileImages) and isinstance(test := dataset.open_test(), FileImages):
            described["images"] += f"; for the test: {describe_images(test)}"
    return data, described


def _try_network(spec: StudySpec, config: TrialConfig, data: SplitDataset) -> dict[str, Any]:
    """Build the network of a trial, train it on a small batch, build it again, and return the metadata."""
    import torch

    from hpo.train.data.labels import num_correct_at_best
    from hpo.train.engines.lane_state import check_test_set, initial_model
    from hpo.train.engines.recomputation_proof import check_recomputation
    from hpo.train.models import check_fresh, check_model, named_tensors
    from hpo.train.modules import named_network
    from hpo.train.parameter_groups import multipliers_of, set_trained
    from hpo.train.weight_files import weights_digest
    from hpo.train.weights import fit_weights

    cpu = torch.device("cpu")
    check_test_set(config, data=data)
    model = initial_model(config, data=data, device=cpu)
    begun = {name: tensor.clone() for name, tensor in named_tensors(model).items()}
    images, _ = next(data.val.batches(2))
    check_model(model, batch=images, num_classes=data.num_classes)
    weights: dict[str, Any] = {}
    if config.model.weights is not None:
        fitted = fit_weights(named_network(model), config.model, num_classes=data.num_classes)
        text = f"{fitted.text}{_input_text(config.model, data)}"
        weights = dict(zip(WEIGHTS_KEYS, (weights_digest(config.model), text), strict=True))
    multipliers_of(model, config.training, num_classes=data.num_classes)
    set_trained(model, config.training, epoch=0, num_classes=data.num_classes)
    batch = next(data.train.batches(_tried_batch_size(spec)))
    _check_trainable(model, *batch)
    check_fresh(initial_model(config, data=data, device=cpu), begun, trained=model, name=config.model.name)
    if spec.training.activation_checkpointing or True in _extreme_values(spec, "activation_checkpointing"):
        check_recomputation(config, data=data, batch=batch)
    return {
        "num_train": len(data.train),
        "num_val": len(data.val),
        "num_classes": data.num_classes,
        "guess_accuracy": num_correct_at_best(data.val.labels_N) / len(data.val),
        **({"has_several_labels": True} if data.has_several_labels else {}),
        "channels": data.channels,
        "image_size": data.image_size,
        "has_test": data.open_test is not None,
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        **weights,
    }


def _try_recipes(spec: StudySpec, values: Mapping[str, Any], data: SplitDataset) -> None:
    """Build the optimizer of each extreme point of the space, for a network with these values.

    Optimizers, schedules, losses and metrics of users' own are tried.
    """
    import torch

    from hpo.train.engines.lane_state import initial_model
    from hpo.train.engines.optimizer_proof import check_optimizer_resumes
    from hpo.train.losses import LOSSES, build_loss, check_own_loss
    from hpo.train.metrics import check_metric
    from hpo.train.optim import OPTIMIZERS, build_optimizer
    from hpo.train.parameter_groups import multipliers_of, parameter_groups
    from hpo.train.schedules import SCHEDULES, check_own_schedule

    batch = next(data.train.batches(_tried_batch_size(spec)))
    model = initial_model(spec.trial_config(values, seed=0), data=data, device=torch.device("cpu"))
    tried: set[str] = set()
    for point in spec.extreme_points(sections=("training",)):
        config = spec.trial_config({**values, **point}, seed=0)
        multipliers = multipliers_of(model, config.training, num_classes=data.num_classes)
        build_optimizer(parameter_groups(model, config.training, multipliers), config.training, device_type="cpu")
        optimizer, schedule = config.training.optimizer, config.training.schedule
        if optimizer not in tried | OPTIMIZERS.keys():
            check_optimizer_resumes(config, data=data, batch=batch)
        if schedule not in tried | SCHEDULES.keys():
            check_own_schedule(schedule)
        loss = config.training.loss
        build_loss(config.training, data=data)
        if loss not in tried | LOSSES.keys():
            check_own_loss(config.training, data=data)
        tried |= {optimizer, schedule, loss}
    check_metric(spec.training.metric, num_classes=data.num_classes, labels_N=data.val.labels_N)


def _tried_batch_size(spec: StudySpec) -> int:
    return min(map(int, [LARGEST_TRIED_BATCH, spec.training.batch_size, *_extreme_values(spec, "batch_size")]))


def _input_text(config: ModelConfig, data: SplitDataset) -> str:
    """Return how images are normalised for weights that say so, and whether they have the size of theirs."""
    from hpo.train.weight_files import images_of_weights

    images = images_of_weights(config)
    if images is None:
        return ""
    mean, std = (", ".join(f"{value:.3g}" for value in values) for values in (data.mean, data.std))
    text = f"; images are normalised as theirs (mean {mean}, deviation {std})"
    if images.size != data.image_size:
        text += f"; they were trained on images of {images.size}x{images.size}, "
        text += f"and these are {data.image_size}x{data.image_size}"
    return text


def _extreme_values(spec: StudySpec, key: str) -> list[Any]:
    parameter = spec.search.parameters.get(key)
    return list(parameter.extreme_values()) if parameter else []


def _check_trainable(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    """Train a network for a step; some can be evaluated but not trained."""
    import torch
    from torch.nn import functional

    from hpo.train.imports import describe_error

    try:
        functional.cross_entropy(model(images), labels).backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(1)  # a step of any kind, but one that no parameter is left out of
    except Exception as error:
        raise UserError(
            f"model.name must name a network that can be trained on a batch of {len(images)} images; "
            f"it raised {describe_error(error)}"
        ) from error
