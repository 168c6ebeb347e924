"""The launcher for a Ray cluster: connect to it, start a supervisor there, watch it, take the study's code along.

Ray places the workers and replaces those whose nodes die; only the store knows which trials there are. What runs on
the cluster is in ray_actors.py.
"""

from __future__ import annotations

import logging
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import urlsplit

from sqlalchemy.engine import URL

from hpo._version import __version__
from hpo.config.study_spec import StudySpec
from hpo.errors import StudyStopped, UserError
from hpo.store.store import Store
from hpo.store.urls import database_path
from hpo.study.records import ENDED, StudyRecord
from hpo.system import provenance
from hpo.system.devices import choose_devices, num_cores
from hpo.train.imports import ImportAllowlist
from hpo.workers.executors import OWN_RAY, PLACEMENTS, RAY_CLIENT, RUNNING_RAY, Ray
from hpo.workers.launcher import Launcher, Returned, interrupts
from hpo.workers.supervisor import LEAVING, TICK_S, OnTick

if TYPE_CHECKING:
    from hpo.workers.ray_actors import PoolSnapshot, WorkerEnvironment, WorkerRequest

logger = logging.getLogger(__name__)

NAMESPACE = "hpo"  # of Ray, where a later command finds the supervisor of a study
MAX_CODE_BYTES = 100 * 2**20
NOT_CODE = ("hpo_files", "__pycache__", "node_modules", "*.db", "*.db-*", ".*")
MAX_SILENCE_S = 60.0  # of the supervisor, which does not answer while its node is replaced
CONNECT_TIMEOUT_S = 5.0
NO_NODE_FITS = "; no node has that much at once, though one may be added"
RESTART_S = 20.0  # a supervisor that has died and does not answer within that time does not come back
ROOM_WARNING_S = 10.0  # after so long without room for a worker, a warning says what it needs
FORWARDED = ("HPO_", "PG")  # prefixes of environment variables that workers get where their node has none
NOT_FORWARDED = ("HPO_STORAGE", "HPO_FILES")  # prefixes of those that the request itself holds


class RayLauncher(Launcher):
    """A launcher of workers on a Ray cluster, under a supervisor there that can do without this process."""

    def __init__(self, executor: Ray, spec: StudySpec, *, allowed: ImportAllowlist, url: URL) -> None:
        address, devices, share = executor.address, executor.devices, executor.resources.get("num_gpus", 1)
        if address != OWN_RAY and database_path(url) is not None:
            raise UserError(
                f"--on {address} needs a Postgres store, got {url}: SQLite is a file of one machine, whose locks do "
                "not reach the others; name one with --storage, and take a study along with hpo copy"
            )
        if 0 < share < 1 and spec.engine.lanes == "auto":
            raise UserError(
                f"--resource num_gpus={share:g} shares a GPU, for which the study must say how many "
                'trials train in each share: engine.lanes = N (with "auto", a worker measures what a whole GPU can do)'
            )
        self._own_devices = choose_devices(devices) if address == OWN_RAY else []
        if self._own_devices and self._own_devices[0].kind == "mps":
            raise UserError("--devices mps cannot be given to workers by Ray; leave out --on, or take --devices cpu")
        if not self._own_devices and devices not in ("auto", "cpu", "cuda"):
            raise UserError(f"--devices must be auto, cpu or cuda with --on {address}, got {devices!r}")
        super().__init__(devices, device_kinds={device.kind for device in self._own_devices})
        self._executor, self._allowed, self._study_name = executor, allowed, spec.name
        self._code_folders = find_code_folders(spec, allowed)
        self.can_be_left = address != OWN_RAY

    def __enter__(self) -> Self:
        ray = _import_ray()
        self._address = find_cluster(self._executor.address)
        self._is_client = self._address.startswith(RAY_CLIENT)
        self._has_connected = not ray.is_initialized()
        # A Ray of its own finds the code on this machine; whoever called ray.init() before has taken care of the code.
        self._packs_code = self._has_connected and not self._own_devices
        if self._has_connected:
            self._connect(ray)
        if not self._own_devices:
            has_gpus = ray.cluster_resources().get("GPU", 0) > 0 or self._executor.resources.get("num_gpus", 0) > 0
            self.devices = "cuda" if self.devices == "cuda" or (self.devices == "auto" and has_gpus) else "cpu"
            self.device_kinds = {self.devices}
        elif self.devices != "cpu":
            self.devices = self._own_devices[0].kind
        return self

    def __exit__(self, *_: object) -> None:
        if self._has_connected:
            _import_ray().shutdown()

    def run(self, store: Store, study: StudyRecord, *, on_tick: OnTick) -> None:
        """Run workers on the cluster, as `Launcher.run` says; attach to a supervisor that is there already."""
        ray = _import_ray()
        with interrupts() as interrupted:
            controller, is_new = self._controller(store, study)
            try:
                end = self._follow(ray, controller, interrupted, partial(on_tick, store))
            except (ray.exceptions.RayError, ConnectionError, *_grpc_errors()) as error:
                raise _as_our_error(error) from None
            if is_new:  # a detached one ends by itself, once others that watch it have seen its end
                ray.kill(controller)
        on_tick(store)
        if end.problem is not None:
            raise StudyStopped(end.problem, can_resume=True)
        if interrupted:
            raise StudyStopped("interrupted", can_resume=True, interrupted=True)

    def _follow(self, ray: Any, controller: Any, interrupted: list[int], on_tick: Callable[[], None]) -> PoolSnapshot:
        """Wait for the end of the study's supervisor, and pass interruptions on to it."""
        num_passed_on, has_warned = 0, False
        began = answered = time.monotonic()
        asked = controller.look.remote()
        while True:
            for _ in interrupted[num_passed_on:]:
                controller.leave.remote()
            if interrupted and not num_passed_on:
                logger.warning("%s", LEAVING)
            num_passed_on = len(interrupted)
            on_tick()
            if not ray.wait([asked], timeout=TICK_S)[0]:
                if time.monotonic() - answered > MAX_SILENCE_S:
                    raise StudyStopped("the study's supervisor on the cluster does not answer", can_resume=True)
                continue
            try:
                look: PoolSnapshot = ray.get(asked)
            except ray.exceptions.RayActorError:  # Ray starts it again, on another node if its node has died
                if time.monotonic() - answered > RESTART_S:
                    raise
            else:
                answered = time.monotonic()
                if look.has_ended:
                    return look
                if not (has_warned or look.num_placed) and answered - began > ROOM_WARNING_S:
                    has_warned = True
                    logger.warning("waiting for room in the cluster: %s", self._shortage(ray))
            time.sleep(TICK_S)
            asked = controller.look.remote()

    def submit(self, store: Store, study: StudyRecord) -> None:
        """Start a detached supervisor, which ends with the study."""
        ray = _import_ray()
        try:
            controller, _ = self._controller(store, study, is_detached=True)
            look: PoolSnapshot = ray.get(controller.look.remote())
        except (ray.exceptions.RayError, ConnectionError, *_grpc_errors()) as error:
            raise _as_our_error(error) from None
        if NO_NODE_FITS in (shortage := self._shortage(ray)):
            logger.warning("waiting for room in the cluster: %s", shortage)
        if look.problem is not None:
            raise StudyStopped(look.problem, can_resume=True)

    def call(self, function: Callable[..., Returned], *args: Any, on_device: bool = False) -> Returned:
        """Call a function on a node, as `Launcher.call` says; here, where this machine is a node and no device needed.

        Raises:
            StudyStopped: The node is lost.
        """
        ray = _import_ray()
        from hpo.workers.ray_actors import call_on_node

        if not (on_device or self._is_client):
            return function(*args)
        needed = self._options() if on_device else {"num_cpus": 0}  # without a device it need not wait for room
        name = f"{function.__name__} for study {self._study_name}"
        task = ray.remote(max_calls=1)(call_on_node).options(**needed, name=name)
        reference = task.remote(self._environment(), function, args)
        began, has_warned = time.monotonic(), not on_device
        while not ray.wait([reference], timeout=TICK_S)[0]:
            if not has_warned and time.monotonic() - began > ROOM_WARNING_S:
                has_warned = True
                logger.warning("the range test runs on a node, or waits for room: %s", self._shortage(ray))
        try:
            return ray.get(reference)  # type: ignore[no-any-return]
        except ray.exceptions.RayTaskError as error:
            raise error.cause or error from None
        except ray.exceptions.RayError as error:
            raise _as_our_error(error) from None

    def _connect(self, ray: Any) -> None:
        """Connect to the cluster.

        Raises:
            UserError: There is no such cluster, it has another version of Ray or Python, or does not start.
        """
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a Ray that we start reports to nobody
        where: dict[str, Any] = {"address": self._address}
        if self._own_devices:
            # Otherwise Ray writes a token into the home folder, which all later ones would then use.
            os.environ.setdefault("RAY_AUTH_MODE", "disabled")
            gpus = [device for device in self._own_devices if device.uuid is not None]
            where |= {"num_cpus": num_cores(), "num_gpus": len(gpus)}
            if gpus:
                os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(str(device.uuid) for device in gpus)
        if not self._is_client:
            where["job_config"] = _job_config(ray)
        with packed(self._code_folders if self._packs_code else []) as folder:
            init = partial(
                ray.init,
                **where,
                namespace=NAMESPACE,
                runtime_env={} if folder is None else {"working_dir": folder},
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
            try:
                try:
                    init()
                except ConnectionError:  # on a busy head, the server of Ray Client may start more slowly than Ray waits
                    if not self._is_client:
                        raise
                    init()
            except Exception as error:  # Ray raises that type itself, where a node has not started in half a minute
                raise UserError(
                    f"--on {self._executor.address}: {_first_line(error)}{connection_hint(error)}"
                ) from None

    def _controller(self, store: Store, study: StudyRecord, *, is_detached: bool = False) -> tuple[Any, bool]:
        """Return the study's supervisor on the cluster, one that was left there or a new one, and whether it is new."""
        ray = _import_ray()
        from hpo.workers.ray_actors import StudyController

        name = f"study {study.name} ({study.key})"
        if (running := _find_supervisor(ray, name)) is not None:
            return running, False
        detached = {"name": name, "namespace": NAMESPACE, "lifetime": "detached", "get_if_exists": True}
        options = {"num_cpus": 0, "max_concurrency": 8, "max_restarts": -1, **(detached if is_detached else {})}
        request = self._request(store, study, publishes=is_detached)
        return ray.remote(StudyController).options(**options).remote(request), True

    def _request(self, store: Store, study: StudyRecord, *, publishes: bool) -> WorkerRequest:
        from hpo.workers.ray_actors import WorkerRequest

        return WorkerRequest(
            version=__version__,
            storage=store.url.render_as_string(hide_password=False),
            study=study.name,
            devices=self.devices,
            threads=max(1, int(self._executor.resources.get("num_cpus", 1))),
            files=str(store.folder(study).parent),
            environment=self._environment(),
            options=self._options(),
            max_workers=self._executor.workers,
            num_open=sum(count for state, count in store.trials.counts(study.study_id).items() if state not in ENDED),
            publishes=publishes,
        )

    def _options(self) -> dict[str, Any]:
        """Return what a worker needs, as Ray's options of an actor or a task."""
        given = dict(self._executor.resources)
        options: dict[str, Any] = {"num_cpus": given.pop("num_cpus", 1)}
        options["num_gpus"] = given.pop("num_gpus", float("cuda" in self.device_kinds))
        if memory := given.pop("memory", None):
            options["memory"] = memory
        return {**options, "resources": given, "scheduling_strategy": PLACEMENTS[self._executor.placement]}

    def _environment(self) -> WorkerEnvironment:
        from hpo.workers.ray_actors import WorkerEnvironment

        variables = {
            key: value
            for key, value in os.environ.items()
            if key.startswith(FORWARDED) and not key.startswith(NOT_FORWARDED)
        }
        if revision := provenance.git_revision():
            variables["HPO_GIT_REVISION"] = revision
        folders = [str(index) if self._packs_code else str(folder) for index, folder in enumerate(self._code_folders)]
        return WorkerEnvironment(variables, self._allowed, folders)

    def _shortage(self, ray: Any) -> str:
        """Describe what a worker needs and what of it is free."""
        from hpo.workers.ray_actors import resources_of

        free, wanted = ray.available_resources(), resources_of(self._options())
        listed = ", ".join(f"{amount:g} {name} ({free.get(name, 0):g} free)" for name, amount in wanted.items())
        fits = any(
            all(node["Resources"].get(name, 0) >= amount for name, amount in wanted.items())
            for node in ray.nodes()
            if node["Alive"]
        )
        return f"a worker needs {listed}" if fits else f"a worker needs {listed}{NO_NODE_FITS}"


def _import_ray() -> Any:
    try:
        import ray
    except ImportError:
        raise UserError("--on needs Ray: pip install 'hpo-studies[ray]'") from None
    return ray


class _NoFolders(list[str]):
    """A list that stays empty."""

    def extend(self, folders: Iterable[str]) -> None:
        """Add nothing."""


def _job_config(ray: Any) -> Any:
    """Return Ray's settings of a job, without the working directory of this process first on the path of its workers.

    Ray would put it there, and a file that is called like a library's module would be imported in its place.
    """
    config = ray.job_config.JobConfig()
    config._py_driver_sys_path = _NoFolders()
    return config


def _grpc_errors() -> tuple[type[BaseException], ...]:
    """Return the exceptions that Ray Client lets through when it has lost its server."""
    return (sys.modules["grpc"].RpcError,) if "grpc" in sys.modules else ()


def find_cluster(asked: str) -> str:
    """Return the address to connect Ray to, at which something listens.

    "auto" is resolved here: for "auto", unlike for an address, Ray would use any token that is in the home folder.

    Raises:
        UserError: Nothing listens there.
    """
    if asked == OWN_RAY:
        return "local"
    address, name = asked, "--on"
    if asked == RUNNING_RAY:
        address, name = os.environ.get("RAY_ADDRESS", ""), "--on auto: RAY_ADDRESS"
        if address in ("", RUNNING_RAY):
            running = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray" / "ray_current_cluster"  # written by Ray
            address = running.read_text().strip() if running.exists() else ""
            name = "--on auto: the Ray of this machine"
    if not address:
        raise UserError(
            "--on auto: RAY_ADDRESS is not set and no Ray runs on this machine; start one: ray start --head"
        )
    try:
        at = urlsplit(address if "://" in address else f"//{address}")
        socket.create_connection((at.hostname or "", at.port or 10001), timeout=CONNECT_TIMEOUT_S).close()
    except (OSError, ValueError) as error:
        raise UserError(f"{name} {address} does not answer: {error}") from None
    return address


def _find_supervisor(ray: Any, name: str) -> Any | None:
    """Return the detached supervisor of this name; if it has ended, wait until it is gone and return None."""
    while True:
        try:
            found = ray.get_actor(name, namespace=NAMESPACE)
            if not ray.get(found.look.remote(), timeout=MAX_SILENCE_S).has_ended:
                return found
        except ray.exceptions.ActorUnavailableError:
            pass  # Ray is starting it again
        except (ValueError, ray.exceptions.RayActorError):
            return None
        time.sleep(TICK_S)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def connection_hint(error: BaseException | None) -> str:
    """Return what to do about a cluster that refuses the connection, to append to the message."""
    while error is not None:
        if "InvalidAuthToken" in str(error):
            return "; it needs a token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH unless it is ~/.ray/auth_token"
        error = error.__cause__ or error.__context__
    return ""


def _as_our_error(error: Exception) -> Exception:
    """Return the UserError or StudyStopped that says in a sentence what an error of Ray means."""
    if "No module named 'hpo" in str(error):
        return UserError(f"the nodes of the cluster have no hpo {__version__}: pip install it there, too")
    if isinstance(error, _grpc_errors()):
        return StudyStopped("the connection to the cluster broke", can_resume=True)
    message = " ".join(line for line in str(error).splitlines() if line and not line[0].isspace())  # without Ray's ids
    return StudyStopped(
        f"the study's supervisor on the cluster was lost: {message[:500] or type(error).__name__}", can_resume=True
    )


def find_code_folders(spec: StudySpec, allowed: ImportAllowlist) -> list[Path]:
    """Return the folders of the study's own modules, the study file's folder first; installed packages do not count."""
    modules = [name.partition(":")[0] for name in spec.names_of_code()]
    found = [folder for module in modules if (folder := allowed.folder_of(module)) is not None]
    first = [Path(folder) for folder in allowed.path[:1]]
    return sorted(dict.fromkeys(found), key=lambda folder: folder not in first)


@contextmanager
def packed(folders: list[Path]) -> Iterator[str | None]:
    """Copy folders to 0, 1... in a temporary folder, for Ray to take along, and give its path; None without folders.

    Raises:
        UserError: They are too large for code.
    """
    if not folders:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="hpo-code-") as target_folder:
        num_bytes_left = MAX_CODE_BYTES
        for index, folder in enumerate(folders):

            def copy_counted(source: str, target: str, folder: Path = folder) -> None:
                nonlocal num_bytes_left
                if not Path(source).is_file():
                    return  # sockets, pipes, links to nowhere
                num_bytes_left -= Path(source).stat().st_size
                if num_bytes_left < 0:
                    raise UserError(
                        f"the folder {folder}, whose modules the study names, holds more than "
                        f"{MAX_CODE_BYTES >> 20} MiB to take to the cluster; give the code a folder of its own"
                    )
                shutil.copyfile(source, target)

            shutil.copytree(
                folder,
                Path(target_folder) / str(index),
                copy_function=copy_counted,
                symlinks=False,
                ignore_dangling_symlinks=True,
                ignore=_not_code,
            )
        yield target_folder


def _not_code(folder: str, names: list[str]) -> set[str]:
    """Return which of these names in a folder are no code, as shutil.copytree asks."""
    ignored = shutil.ignore_patterns(*NOT_CODE)(folder, names)
    here = Path(folder).resolve()
    others = [  # virtual environments, and links to a folder that holds this one
        name for name in names if (here / name / "pyvenv.cfg").exists() or here.is_relative_to((here / name).resolve())
    ]
    return {*ignored, *others}
