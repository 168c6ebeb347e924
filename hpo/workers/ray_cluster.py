"""Workers on a Ray cluster, as seen by the process that asks for them: what they need, connecting, watching, leaving.

Ray places workers and has others take the place of those whose nodes die; the store alone says which trials there are.
What runs on the cluster is in ray_actors.py.
"""

from __future__ import annotations

import logging
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import urlsplit

from sqlalchemy.engine import URL

from hpo._version import __version__
from hpo.config.import_policy import ImportAllowlist
from hpo.config.study_spec import StudySpec
from hpo.errors import StudyStopped, UserError
from hpo.store.database import database_path
from hpo.store.studies import Store
from hpo.study.records import ENDED, StudyRecord
from hpo.system import provenance
from hpo.system.devices import choose_devices, num_cores
from hpo.workers.executors import OWN_RAY, PLACEMENTS, RAY_CLIENT, RUNNING_RAY, Ray
from hpo.workers.launcher import Answer, Launcher, interrupts
from hpo.workers.supervisor import TICK_S, Watch

if TYPE_CHECKING:
    from hpo.workers.ray_actors import PoolSnapshot, WorkerEnvironment, WorkerRequest

logger = logging.getLogger(__name__)

NAMESPACE = "hpo"  # in which a study's supervisor is found again
MAX_CODE_BYTES = 100 * 2**20
NOT_CODE = ("hpo_files", "__pycache__", "node_modules", "*.db", "*.db-*", ".*")
UNANSWERED_S = 60.0  # how long the supervisor may not answer, as it does while its node is replaced
ANSWER_S = 5.0  # within which a cluster takes a connection
NOWHERE = "; no node has that much at once, though one may be added"
RESTART_S = 20.0  # within which a supervisor that has died answers again, or it does not come back
WAITING_S = 10.0  # until it is said that the cluster has no room for a worker
FORWARDED = ("HPO_", "PG")  # begin the names of environment variables that workers are given, where a node has none
NOT_FORWARDED = ("HPO_STORAGE", "HPO_FILES")  # begin those of which they are told otherwise


class RayLauncher(Launcher):
    """Workers on a Ray cluster, under a supervisor there, which can be left to itself."""

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
        self._own = choose_devices(devices) if address == OWN_RAY else []
        if self._own and self._own[0].kind == "mps":
            raise UserError("--devices mps cannot be given to workers by Ray; leave out --on, or take --devices cpu")
        if not self._own and devices not in ("auto", "cpu", "cuda"):
            raise UserError(f"--devices must be auto, cpu or cuda with --on {address}, got {devices!r}")
        super().__init__(devices, kinds={device.kind for device in self._own})
        self._executor, self._allowed, self._study = executor, allowed, spec.name
        self._code = _code_folders(spec, allowed)
        self.can_be_left = address != OWN_RAY

    def __enter__(self) -> Self:
        ray = _import_ray()
        self._address = _address(self._executor.address)
        self._is_client = self._address.startswith(RAY_CLIENT)
        self._is_ours = not ray.is_initialized()
        self._packs = self._is_ours and not self._own  # else the code is there, or whoever started Ray has seen to that
        if self._is_ours:
            self._connect(ray)
        if not self._own:
            has_gpus = ray.cluster_resources().get("GPU", 0) > 0 or self._executor.resources.get("num_gpus", 0) > 0
            self.request = "cuda" if self.request == "cuda" or (self.request == "auto" and has_gpus) else "cpu"
            self.kinds = {self.request}
        elif self.request != "cpu":
            self.request = self._own[0].kind
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_ours:
            _import_ray().shutdown()

    def run(self, store: Store, study: StudyRecord, *, watch: Watch) -> None:
        ray = _import_ray()
        with interrupts() as interrupted:
            controller, is_new = self._controller(store, study)
            try:
                end = self._follow(ray, controller, interrupted, watch)
            except (ray.exceptions.RayError, ConnectionError, *_grpc_errors()) as error:
                raise _explained(error) from None
            if is_new:  # one that was detached ends by itself, when whoever else watches it has seen its end
                ray.kill(controller)
        watch()
        if end.problem is not None:
            raise StudyStopped(end.problem, can_resume=True)
        if interrupted:
            raise StudyStopped("interrupted", can_resume=True, interrupted=True)

    def _follow(self, ray: Any, controller: Any, interrupted: list[int], watch: Watch) -> PoolSnapshot:
        """Waits for the end of a study's supervisor, and passes interruptions on to it."""
        told, answered, began, said = 0, time.monotonic(), time.monotonic(), False
        asked = controller.look.remote()
        while True:
            for _ in interrupted[told:]:
                controller.leave.remote()
            if interrupted and not told:
                logger.warning(
                    "workers save their trials and leave, which may take half a minute; again ends them at once"
                )
            told = len(interrupted)
            watch()
            if not ray.wait([asked], timeout=TICK_S)[0]:
                if time.monotonic() - answered > UNANSWERED_S:
                    raise StudyStopped("the study's supervisor on the cluster does not answer", can_resume=True)
                continue
            try:
                look: PoolSnapshot = ray.get(asked)
            except ray.exceptions.RayActorError:  # Ray starts it again, elsewhere where its node has died
                if time.monotonic() - answered > RESTART_S:
                    raise
            else:
                answered = time.monotonic()
                if look.has_ended:
                    return look
                if not (said or look.num_placed) and answered - began > WAITING_S:
                    said = True
                    logger.warning("waiting for room in the cluster: %s", self._shortage(ray))
            time.sleep(TICK_S)
            asked = controller.look.remote()

    def submit(self, store: Store, study: StudyRecord) -> None:
        ray = _import_ray()
        try:
            controller, _ = self._controller(store, study, is_detached=True)
            look: PoolSnapshot = ray.get(controller.look.remote())
        except (ray.exceptions.RayError, ConnectionError, *_grpc_errors()) as error:
            raise _explained(error) from None
        if NOWHERE in (shortage := self._shortage(ray)):
            logger.warning("it waits for room in the cluster: %s", shortage)
        if look.problem is not None:
            raise StudyStopped(look.problem, can_resume=True)

    def ask(self, question: Callable[..., Answer], *args: Any, on_device: bool = False) -> Answer:
        ray = _import_ray()
        from hpo.workers.ray_actors import answer

        if not (on_device or self._is_client):
            return question(*args)  # this machine is one of the cluster's
        needed = self._options() if on_device else {"num_cpus": 0}  # what only looks need not wait for room
        asked = ray.remote(max_calls=1)(answer).options(**needed, name=f"{question.__name__} for study {self._study}")
        reference = asked.remote(self._luggage(), question, args)
        began, said = time.monotonic(), not on_device
        while not ray.wait([reference], timeout=TICK_S)[0]:
            if not said and time.monotonic() - began > WAITING_S:
                said = True
                logger.warning("a node makes the range test, or has no room for it yet: %s", self._shortage(ray))
        try:
            return ray.get(reference)  # type: ignore[no-any-return]
        except ray.exceptions.RayTaskError as error:
            raise error.cause or error from None
        except ray.exceptions.RayError as error:
            raise _explained(error) from None

    def _connect(self, ray: Any) -> None:
        """Raises UserError where there is no such cluster, or it is of another version of Ray or Python."""
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a Ray that we start reports to nobody
        where: dict[str, Any] = {"address": self._address}
        if self._own:
            os.environ.setdefault(
                "RAY_AUTH_MODE", "disabled"
            )  # or Ray puts a token into the home folder, for all later ones
            gpus = [device for device in self._own if device.uuid is not None]
            where |= {"num_cpus": num_cores(), "num_gpus": len(gpus)}
            if gpus:
                os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(str(device.uuid) for device in gpus)
        try:
            with _packed(self._code if self._packs else []) as folder:
                environment = {} if folder is None else {"working_dir": folder}
                init = partial(
                    ray.init,
                    **where,
                    namespace=NAMESPACE,
                    runtime_env=environment,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                )
                try:
                    init()
                except ConnectionError:  # Ray Client's server on a busy head may take longer than it waits for itself
                    if not self._is_client:
                        raise
                    init()
        except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
            raise UserError(f"--on {self._executor.address}: {_first_line(error)}{_hint(error)}") from None

    def _controller(self, store: Store, study: StudyRecord, *, is_detached: bool = False) -> tuple[Any, bool]:
        """The supervisor of this study that was left on the cluster, or a new one, and which of the two it is."""
        ray = _import_ray()
        from hpo.workers.ray_actors import StudyController

        name = f"study {study.name} ({study.key})"
        if (left := _left_behind(ray, name)) is not None:
            return left, False
        stays = {"name": name, "namespace": NAMESPACE, "lifetime": "detached", "get_if_exists": True}
        options = {"num_cpus": 0, "max_concurrency": 8, "max_restarts": -1, **(stays if is_detached else {})}
        plan = self._plan(store, study, publishes=is_detached)
        return ray.remote(StudyController).options(**options).remote(plan), True

    def _plan(self, store: Store, study: StudyRecord, *, publishes: bool) -> WorkerRequest:
        from hpo.workers.ray_actors import WorkerRequest

        return WorkerRequest(
            version=__version__,
            storage=store.url.render_as_string(hide_password=False),
            study=study.name,
            devices=self.request,
            threads=max(1, int(self._executor.resources.get("num_cpus", 1))),
            files=str(store.folder(study).parent),
            luggage=self._luggage(),
            options=self._options(),
            limit=self._executor.workers,
            num_open=sum(count for state, count in store.counts(study.study_id).items() if state not in ENDED),
            publishes=publishes,
        )

    def _options(self) -> dict[str, Any]:
        """What Ray is asked for a worker, as options of an actor or a task."""
        given = dict(self._executor.resources)
        options: dict[str, Any] = {"num_cpus": given.pop("num_cpus", 1)}
        options["num_gpus"] = given.pop("num_gpus", float("cuda" in self.kinds))
        if memory := given.pop("memory", None):
            options["memory"] = memory
        return {**options, "resources": given, "scheduling_strategy": PLACEMENTS[self._executor.placement]}

    def _luggage(self) -> WorkerEnvironment:
        from hpo.workers.ray_actors import WorkerEnvironment

        environment = {
            key: value
            for key, value in os.environ.items()
            if key.startswith(FORWARDED) and not key.startswith(NOT_FORWARDED)
        }
        if revision := provenance.git_revision():
            environment["HPO_GIT_REVISION"] = revision
        folders = [str(index) if self._packs else str(folder) for index, folder in enumerate(self._code)]
        return WorkerEnvironment(environment, self._allowed.modules, folders)

    def _shortage(self, ray: Any) -> str:
        from hpo.workers.ray_actors import needs

        free, wanted = ray.available_resources(), needs(self._options())
        listed = ", ".join(f"{amount:g} {name} ({free.get(name, 0):g} free)" for name, amount in wanted.items())
        fits = any(
            all(node["Resources"].get(name, 0) >= amount for name, amount in wanted.items())
            for node in ray.nodes()
            if node["Alive"]
        )
        return f"a worker needs {listed}{'' if fits else NOWHERE}"


def _import_ray() -> Any:
    try:
        import ray
    except ImportError:
        raise UserError("--on needs Ray: pip install 'hpo-studies[ray]'") from None
    return ray


def _grpc_errors() -> tuple[type[BaseException], ...]:
    """What Ray Client lets through where it has lost its server."""
    return (sys.modules["grpc"].RpcError,) if "grpc" in sys.modules else ()


def _address(asked: str) -> str:
    """What to have Ray connect to, where something listens. Raises UserError where there is nothing.

    "auto" is resolved here: Ray would, unlike for an address, take up any token that is found in the home folder.
    """
    if asked == OWN_RAY:
        return "local"
    address, name = asked, "--on"
    if asked == RUNNING_RAY:
        address, name = os.environ.get("RAY_ADDRESS", ""), "--on auto: RAY_ADDRESS"
        if address in ("", RUNNING_RAY):
            running = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray" / "ray_current_cluster"  # as Ray has it
            address = running.read_text().strip() if running.exists() else ""
            name = "--on auto: the Ray of this machine"
    if not address:
        raise UserError(
            "--on auto: RAY_ADDRESS is not set and no Ray runs on this machine; start one: ray start --head"
        )
    try:
        at = urlsplit(address if "://" in address else f"//{address}")
        socket.create_connection((at.hostname or "", at.port or 10001), timeout=ANSWER_S).close()
    except (OSError, ValueError) as error:
        raise UserError(f"{name} {address} does not answer: {error}") from None
    return address


def _left_behind(ray: Any, name: str) -> Any | None:
    """The supervisor of that name that was detached; where it has ended, it is waited for to be gone."""
    while True:
        try:
            found = ray.get_actor(name, namespace=NAMESPACE)
            if not ray.get(found.look.remote(), timeout=UNANSWERED_S).has_ended:
                return found
        except ray.exceptions.ActorUnavailableError:
            pass  # it is being started again
        except (ValueError, ray.exceptions.RayActorError):
            return None  # there is none
        time.sleep(TICK_S)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _hint(error: BaseException | None) -> str:
    """What to do about a cluster that cannot be connected to."""
    while error is not None:
        if "InvalidAuthToken" in str(error):
            return "; it wants a token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH unless it is ~/.ray/auth_token"
        error = error.__cause__ or error.__context__
    return ""


def _explained(error: Exception) -> Exception:
    if "No module named 'hpo" in str(error):
        return UserError(f"the nodes of the cluster have no hpo {__version__}: pip install it there, too")
    if isinstance(error, _grpc_errors()):
        return StudyStopped("the connection to the cluster broke", can_resume=True)
    said = " ".join(line for line in str(error).splitlines() if line and not line[0].isspace())  # without Ray's ids
    return StudyStopped(
        f"what runs the study on the cluster is lost: {said[:500] or type(error).__name__}", can_resume=True
    )


def _code_folders(spec: StudySpec, allowed: ImportAllowlist) -> list[Path]:
    """The folders that the study's own modules are in, the study's own first; what is installed stays where it is."""
    found = [folder for module in spec.modules() if (folder := allowed.folder_of(module)) is not None]
    own = [Path(folder) for folder in allowed.folders]
    return sorted(dict.fromkeys(found), key=lambda folder: folder not in own)


@contextmanager
def _packed(folders: list[Path]) -> Iterator[str | None]:
    """A folder with copies of these folders, named 0, 1..., for Ray to take along; None where there are none.

    Raises UserError where they are too large for code.
    """
    if not folders:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="hpo-code-") as packed:
        left = MAX_CODE_BYTES
        for index, folder in enumerate(folders):

            def copy(source: str, target: str, folder: Path = folder) -> None:
                nonlocal left
                if not Path(source).is_file():
                    return  # sockets, pipes, links to nowhere
                left -= Path(source).stat().st_size
                if left < 0:
                    raise UserError(
                        f"the folder {folder}, whose modules the study names, holds more than "
                        f"{MAX_CODE_BYTES >> 20} MiB to take to the cluster; give the code a folder of its own"
                    )
                shutil.copyfile(source, target)

            shutil.copytree(
                folder,
                Path(packed) / str(index),
                copy_function=copy,
                symlinks=False,
                ignore_dangling_symlinks=True,
                ignore=_not_code,
            )
        yield packed


def _not_code(folder: str, names: list[str]) -> set[str]:
    ignored = shutil.ignore_patterns(*NOT_CODE)(folder, names)
    here = Path(folder).resolve()
    others = [  # virtual environments, and links to what the folder is in
        name for name in names if (here / name / "pyvenv.cfg").exists() or here.is_relative_to((here / name).resolve())
    ]
    return {*ignored, *others}
