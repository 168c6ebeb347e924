"""docs/guides/cluster.md and docs/cluster/ satisfy the schemas, agree with what hpo does, and run where possible.

Kubernetes' schemas come from the package kubernetes-validate. No package has those of KubeRay: the schemas here were
written from its API reference, `ray.io/v1` as of KubeRay 1.3, and leave pods to Kubernetes' schemas.
"""

from __future__ import annotations

import copy
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import click
import psutil
import pytest
import yaml

from hpo.api import reading, running
from hpo.cli.app import main
from hpo.config.study_spec import StudySpec
from hpo.errors import UserError
from hpo.workers.supervisor import KILL_S

kubernetes_validate = pytest.importorskip("kubernetes_validate")
import jsonschema  # noqa: E402  (both come with kubernetes-validate)
from referencing import Registry, Resource  # noqa: E402

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
PAGE = (ROOT / "docs/guides/cluster.md").read_text()
SLURM = ROOT / "docs/cluster/slurm.sh"
TEXTS = {name: (ROOT / "docs/cluster" / name).read_text() for name in ("kubernetes.yaml", "kuberay.yaml", "slurm.sh")}
MANIFESTS = {name: list(yaml.safe_load_all(TEXTS[name])) for name in ("kubernetes.yaml", "kuberay.yaml")}
DOCUMENTS = [
    pytest.param(document, id=f"{name}-{document['kind']}") for name, all_ in MANIFESTS.items() for document in all_
]
VERSIONS = ["1.33", kubernetes_validate.latest_version()]  # the oldest that the guide promises, and the newest
DOCKERFILE = (ROOT / "Dockerfile").read_text()

# What sbatch knows, by its manual page (Slurm 22.05): the long options that a script may set.
SBATCH_OPTIONS = frozenset(
    re.findall(
        r"\S+",
        """
    account acctg-freq array batch bb bbf begin chdir cluster-constraint clusters comment constraint container
    contiguous core-spec cores-per-socket cpu-freq cpus-per-gpu cpus-per-task deadline delay-boot dependency
    distribution error exclude exclusive export export-file extra-node-info get-user-env gid gpu-bind gpu-freq gpus
    gpus-per-node gpus-per-socket gpus-per-task gres gres-flags hint hold ignore-pbs input job-name kill-on-invalid-dep
    licenses mail-type mail-user mcs-label mem mem-bind mem-per-cpu mem-per-gpu mincpus network nice no-kill no-requeue
    nodefile nodelist nodes ntasks ntasks-per-core ntasks-per-gpu ntasks-per-node ntasks-per-socket open-mode output
    overcommit oversubscribe parsable partition power prefer priority profile propagate qos quiet reboot requeue
    reservation signal sockets-per-node spread-job switches test-only thread-spec threads-per-core time time-min tmp uid
    use-min-nodes verbose wait wait-all-nodes wckey wrap
    """,
    )
)


def pod_of(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the specs of the pods that a document starts."""
    if document["kind"] == "Job":
        yield document["spec"]["template"]["spec"]
    if document["kind"] == "RayCluster":
        for group in [document["spec"]["headGroupSpec"], *document["spec"]["workerGroupSpecs"]]:
            yield group["template"]["spec"]


PODS = [
    pytest.param(pod, MANIFESTS[name], id=f"{name}-{pod['containers'][0]['name']}")
    for name in MANIFESTS
    for document in MANIFESTS[name]
    for pod in pod_of(document)
]
(JOB,) = [document for document in MANIFESTS["kubernetes.yaml"] if document["kind"] == "Job"]
(CLUSTER,) = [document for document in MANIFESTS["kuberay.yaml"] if document["kind"] == "RayCluster"]
(RAY_JOB,) = [document for document in MANIFESTS["kuberay.yaml"] if document["kind"] == "RayJob"]


# Schemas


TEXT, SWITCH, COUNT, NUMBER = (
    {"type": "string"},
    {"type": "boolean"},
    {"type": "integer", "minimum": 0},
    {"type": "number"},
)
TEXTS_BY_NAME = {"type": "object", "additionalProperties": TEXT}


def table(required: str = "", **properties: Any) -> dict[str, Any]:
    """Return the schema of a table with these keys and no others."""
    return {"type": "object", "properties": properties, "required": required.split(), "additionalProperties": False}


def kubernetes(name: str) -> dict[str, Any]:
    """Return a reference to one of Kubernetes' own types; `ray_schema` says in which file it is."""
    return {"$ref": f"#/$defs/io.k8s.{name}"}


POD = kubernetes("api.core.v1.PodTemplateSpec")
AUTOSCALER = table(
    resources=kubernetes("api.core.v1.ResourceRequirements"),
    image=TEXT,
    env={"type": "array", "items": kubernetes("api.core.v1.EnvVar")},
    imagePullPolicy={"enum": ["Always", "IfNotPresent", "Never"]},
    idleTimeoutSeconds=COUNT,
    upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
    securityContext=kubernetes("api.core.v1.SecurityContext"),
)
HEAD_GROUP = table(
    "rayStartParams template", rayStartParams=TEXTS_BY_NAME, template=POD, serviceType=TEXT, enableIngress=SWITCH
)
WORKER_GROUP = table(
    "groupName minReplicas maxReplicas rayStartParams template",
    groupName=TEXT,
    replicas=COUNT,
    minReplicas=COUNT,
    maxReplicas=COUNT,
    idleTimeoutSeconds=COUNT,
    numOfHosts=COUNT,
    rayStartParams=TEXTS_BY_NAME,
    template=POD,
)
RAY_CLUSTER = table(
    "headGroupSpec",
    rayVersion=TEXT,
    enableInTreeAutoscaling=SWITCH,
    autoscalerOptions=AUTOSCALER,
    headGroupSpec=HEAD_GROUP,
    workerGroupSpecs={"type": "array", "items": WORKER_GROUP},
    suspend=SWITCH,
    headServiceAnnotations=TEXTS_BY_NAME,
)
RAY_JOB_SPEC = table(
    "entrypoint",
    entrypoint=TEXT,
    clusterSelector=TEXTS_BY_NAME,
    rayClusterSpec=RAY_CLUSTER,
    runtimeEnvYAML=TEXT,
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode"]},
    submitterPodTemplate=POD,
    submitterConfig=table(backoffLimit=COUNT),
    shutdownAfterJobFinishes=SWITCH,
    ttlSecondsAfterFinished=COUNT,
    activeDeadlineSeconds=COUNT,
    backoffLimit=COUNT,
    suspend=SWITCH,
    jobId=TEXT,
    metadata=TEXTS_BY_NAME,
    entrypointNumCpus=NUMBER,
    entrypointNumGpus=NUMBER,
    entrypointResources=TEXT,
)
# Exactly one of the two. A cluster that is not the job's own is not shut down with it, nor made again for a retry.
RAY_JOB_SPEC["oneOf"] = [
    {"required": ["rayClusterSpec"]},
    {
        "required": ["clusterSelector"],
        "properties": {"shutdownAfterJobFinishes": {"const": False}, "backoffLimit": {"const": 0}},
    },
]


def ray_schema(kind: str, definitions: str) -> dict[str, Any]:
    """Return the schema of a RayCluster or a RayJob; `definitions` names the file of Kubernetes' own types."""
    schema = table(
        "apiVersion kind metadata spec",
        apiVersion={"const": "ray.io/v1"},
        kind={"const": kind},
        metadata=kubernetes("apimachinery.pkg.apis.meta.v1.ObjectMeta"),
        spec={"RayCluster": RAY_CLUSTER, "RayJob": RAY_JOB_SPEC}[kind],
    )
    in_file = json.dumps(schema).replace('"#/$defs/', f'"{definitions}#/$defs/')
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **json.loads(in_file)}


def validator(document: dict[str, Any], version: str) -> jsonschema.Draft202012Validator:
    """Return a strict validator for documents of this kind: a key that is not in the schema is an error."""
    folder = resources.files("kubernetes_validate") / "kubernetes-json-schema" / f"v{version}.0-local-strict"
    definitions = Resource.from_contents(json.loads((folder / "_definitions.json").read_text()))
    if document["apiVersion"] == "ray.io/v1":
        schema = ray_schema(document["kind"], str(definitions.id()))
    else:
        api = document["apiVersion"].replace("/", "-")
        schema = json.loads((folder / f"{document['kind'].lower()}-{api}.json").read_text())
    return jsonschema.Draft202012Validator(schema, registry=definitions @ Registry())


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_document_satisfies_its_schema(document: dict[str, Any], version: str) -> None:
    version = ".".join(version.split(".")[:2])
    validator(document, version).validate(document)
    if document["apiVersion"] != "ray.io/v1":
        kubernetes_validate.validate(document, version, strict=True)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of everything in a document."""
    yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(inner, (*path, key))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_an_unknown_key_and_a_wrong_type_are_found_wherever_they_stand(document: dict[str, Any]) -> None:
    check = validator(document, VERSIONS[0])
    for path in places(document):
        wrong = copy.deepcopy({"document": document})  # not shared with another place, as YAML's aliases are
        at: Any = wrong
        for key in ("document", *path)[:-1]:
            at[key] = copy.deepcopy(at[key])
            at = at[key]
        last = ("document", *path)[-1]
        if isinstance(at[last], dict):
            at[last] = {**at[last], "surplus": [{}]}  # of a type, too, that no label and no quantity has
        else:
            at[last] = {"wrong": [{}]}
        assert not check.is_valid(wrong["document"]), path


def test_what_kuberay_demands_is_demanded() -> None:
    for document, path, key in [
        (CLUSTER, ("spec",), "headGroupSpec"),
        (CLUSTER, ("spec", "workerGroupSpecs", 0), "minReplicas"),
        (CLUSTER, ("spec", "workerGroupSpecs", 0), "groupName"),
        (RAY_JOB, ("spec",), "clusterSelector"),
    ]:
        wrong = copy.deepcopy(document)
        at: Any = wrong
        for step in path:
            at = at[step]
        del at[key]
        assert not validator(wrong, VERSIONS[0]).is_valid(wrong), (path, key)
    wrong = copy.deepcopy(RAY_JOB)
    wrong["spec"]["shutdownAfterJobFinishes"] = True
    assert not validator(wrong, VERSIONS[0]).is_valid(wrong)


# The manifests in themselves


@pytest.mark.parametrize(("pod", "documents"), PODS)
def test_what_a_pod_mounts_is_there(pod: dict[str, Any], documents: list[dict[str, Any]]) -> None:
    named = {(document["kind"], document["metadata"]["name"]) for document in documents}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    (container,) = pod["containers"]
    assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)
    assert ("ConfigMap", volumes["study"]["configMap"]["name"]) in named if "study" in volumes else True
    assert ("PersistentVolumeClaim", volumes["files"]["persistentVolumeClaim"]["claimName"]) in named
    for text in (TEXTS["kubernetes.yaml"], TEXTS["kuberay.yaml"]):
        secret, key = re.findall(r"kubectl create secret generic (\S+) --from-file=(\w+)=", text)[0]
        (mounted,) = [mount["mountPath"] for mount in container["volumeMounts"] if mount["name"] == "password"]
        given = {entry["name"]: entry.get("value") for entry in container["env"]}
        assert volumes["password"]["secret"]["secretName"] == secret
        assert given["HPO_STORAGE_PASSWORD_FILE"] == f"{mounted}/{key}"


@pytest.mark.parametrize(("pod", "documents"), PODS)
def test_pods_run_without_rights_as_the_user_of_the_image(pod: dict[str, Any], documents: list[dict[str, Any]]) -> None:
    (user,) = re.findall(r"^USER (\d+):\d+", DOCKERFILE, re.M)
    assert pod["securityContext"]["runAsUser"] == int(user)
    assert pod["securityContext"]["runAsNonRoot"]
    rights = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    assert all(container["securityContext"] == rights for container in pod["containers"])


def test_no_password_stands_in_a_manifest() -> None:
    for text in [PAGE, *TEXTS.values()]:
        assert not re.search(r"://[^/@\s]*:[^/@\s]+@", text)


def test_what_both_manifests_of_kubernetes_make_is_the_same() -> None:
    made = [
        {(document["kind"], document["metadata"]["name"]): document for document in documents}
        for documents in MANIFESTS.values()
    ]
    shared = made[0].keys() & made[1].keys()
    assert {kind for kind, _ in shared} == {"ConfigMap", "PersistentVolumeClaim"}
    assert all(made[0][key] == made[1][key] for key in shared)


@pytest.mark.parametrize("manifest", MANIFESTS)
def test_the_study_in_the_config_map_is_valid_and_its_checkpoints_are_where_all_pods_see_them(manifest: str) -> None:
    (study,) = [document for document in MANIFESTS[manifest] if document["kind"] == "ConfigMap"]
    assert study["immutable"]
    ((name, text),) = study["data"].items()
    spec = StudySpec.from_dict(tomllib.loads(text))
    assert spec.name == study["metadata"]["name"]
    assert f"/study/{name}" in TEXTS[manifest]
    for document in MANIFESTS[manifest]:
        for pod in pod_of(document):
            (mount,) = [m["mountPath"] for m in pod["containers"][0]["volumeMounts"] if m["name"] == "files"]
            assert str(spec.checkpoints.url).startswith(f"{mount}/")
    assert "ENV HOME=/tmp HPO_FILES=/files HPO_DATA=/files/data" in DOCKERFILE  # so the data set is there, too


def test_workers_have_the_time_to_save_their_trials() -> None:
    pods = [JOB["spec"]["template"]["spec"]]
    pods += [group["template"]["spec"] for group in CLUSTER["spec"]["workerGroupSpecs"]]
    assert all(pod["terminationGracePeriodSeconds"] >= KILL_S + 10 for pod in pods)
    head = CLUSTER["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    assert {"name": "RAY_JOB_STOP_WAIT_TIME_S", "value": "60"} in head["env"]
    name, seconds = re.findall(r"^#SBATCH --signal=(\w+)@(\d+)$", TEXTS["slurm.sh"], re.M)[0]  # the steps, not "B:"
    assert name == "TERM"
    assert int(seconds) >= KILL_S + 10


def test_the_job_ends_for_a_wrong_request_and_only_then() -> None:
    spec, pod = JOB["spec"], JOB["spec"]["template"]["spec"]
    disrupted, refused = spec["podFailurePolicy"]["rules"]
    assert disrupted == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    assert refused["action"] == "FailJob"
    assert refused["onExitCodes"]["values"] == [UserError.exit_code]
    assert refused["onExitCodes"]["containerName"] in {container["name"] for container in pod["containers"]}
    assert pod["restartPolicy"] == "Never"  # which a podFailurePolicy asks for
    assert spec["completionMode"] == "Indexed"  # which backoffLimitPerIndex asks for
    assert spec["completions"] == spec["parallelism"]


def test_the_ray_job_runs_on_the_cluster_of_its_file_and_asks_for_no_more_than_a_pod_has() -> None:
    assert RAY_JOB["spec"]["clusterSelector"] == {"ray.io/cluster": CLUSTER["metadata"]["name"]}
    asked = dict(re.findall(r"--resource (\w+)=(\S+)", RAY_JOB["spec"]["entrypoint"]))
    (group,) = CLUSTER["spec"]["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert asked == {"num_gpus": str(limits["nvidia.com/gpu"]), "num_cpus": limits["cpu"]}
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extras["ray"][0].startswith("ray[client,default]")  # it has the dashboard, and serves clients
    assert "wget" in DOCKERFILE
    assert re.search(r"docker build --build-arg EXTRAS=postgres,s3,ray\b", TEXTS["kuberay.yaml"])
    assert "ARG EXTRAS=postgres,s3\n" in DOCKERFILE


# Commands


def commands() -> Iterator[tuple[str, bool]]:
    """Yield each `hpo ...` of page and manifests, and whether it must be complete; in running text it need not."""
    for block in re.findall(r"^```\w*\n(.*?)^```", PAGE, re.M | re.S):
        for line in re.sub(r" +#.*", "", block.replace("\\\n", " "), flags=re.M).splitlines():
            yield from ((found, True) for found in re.findall(r"(?:^|-- |\$\()(hpo [a-z].*)", line))
    for found in re.findall(r"`(hpo [a-z][^`]*)`", re.sub(r"^```.*?^```", "", PAGE, flags=re.M | re.S)):
        yield found, False
    for text in TEXTS.values():
        code = re.sub(r"^\s*# .*", "", text, flags=re.M)
        yield from ((found, True) for found in re.findall(r"(?<![\w/.:-])(hpo [a-z][^;|)\n]*)", code))
        for line in re.findall(r"^#  .*-- (hpo .*)", text, re.M):
            yield line, True


COMMANDS = sorted(set(commands()))


def test_there_are_commands_to_check() -> None:
    assert {"run", "worker", "status"} <= {command.split()[1] for command, complete in COMMANDS if complete}


@pytest.mark.parametrize(("command", "complete"), COMMANDS, ids=[command for command, _ in COMMANDS])
def test_every_command_is_one_that_hpo_understands(command: str, complete: bool) -> None:
    _, name, *arguments = shlex.split(command, comments=True)
    assert name in main.commands
    try:
        main.commands[name].make_context(name, arguments)
    except click.MissingParameter:
        assert not complete


def test_the_check_of_commands_finds_an_option_that_does_not_exist() -> None:
    with pytest.raises(click.NoSuchOption):
        main.commands["run"].make_context("run", ["study.toml", "--one", "auto"])


# The manifests' scripts, run


def test_the_slurm_script_is_one() -> None:
    subprocess.run(["bash", "-n", SLURM], check=True)
    subprocess.run([BIN / "shellcheck", SLURM], check=True)
    options = re.findall(r"^#SBATCH --([a-z-]+)(?:=\S+)?$", TEXTS["slurm.sh"], re.M)
    assert len(options) == TEXTS["slurm.sh"].count("\n#SBATCH")
    assert set(options) <= SBATCH_OPTIONS
    first_command = next(n for n, line in enumerate(TEXTS["slurm.sh"].splitlines()) if re.match(r"[^#\s]", line))
    assert not any(line.startswith("#SBATCH") for line in TEXTS["slurm.sh"].splitlines()[first_command:])  # not read


HELD_STUDY = """
name = "my-study"
search = {trials = 2, sampler = "random", space.lr = {low = 0.1, high = 1.0}}
training.epochs = 2
objective.function = "held:train"
checkpoints.url = "FOLDER/checkpoints"
"""


class Scripts:
    """Starts the scripts as Kubernetes and Slurm would: each with the variables that these set, and no others."""

    def __init__(self, folder: Path, url: str, held_loop: str) -> None:
        self.folder, self.url = folder, url
        self.started: list[subprocess.Popen[str]] = []
        (folder / "study").mkdir()
        (folder / "study/held.py").write_text(held_loop)
        (folder / "study/my_study.toml").write_text(HELD_STUDY.replace("FOLDER", str(folder)))
        (folder / "password").write_text("unused: this server trusts its users\n")
        (folder / "bin").mkdir()
        self.tool(
            "srun", 'shift; exec "$@"'
        )  # drops its first argument, an option; scontrol only notes what it is told
        self.tool("scontrol", f'echo "$@" >> {folder}/scontrol.txt')

    def tool(self, name: str, script: str) -> None:
        (self.folder / "bin" / name).write_text(f"#!/bin/bash\n{script}\n")
        (self.folder / "bin" / name).chmod(0o755)

    def start(self, command: list[str], **variables: str) -> subprocess.Popen[str]:
        given = {
            "PATH": f"{self.folder}/bin:{BIN}:{os.defpath}",
            "HOME": str(self.folder),
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
            "HPO_STORAGE": self.url,
            "HPO_STORAGE_PASSWORD_FILE": f"{self.folder}/password",
            **variables,
        }
        process = subprocess.Popen(
            command,
            cwd=self.folder,
            env=given,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.started.append(process)
        return process

    def pod(self, index: int) -> subprocess.Popen[str]:
        (container,) = JOB["spec"]["template"]["spec"]["containers"]
        (script,) = container["args"]
        inside = script.replace("/study/", f"{self.folder}/study/").replace("sleep 10", "sleep 2")
        files = {"HPO_FILES": f"{self.folder}/logs/{index}"}
        return self.start([*container["command"], inside], JOB_COMPLETION_INDEX=str(index), **files)

    def task(self, index: int, *arguments: str, restarts: int = 0) -> subprocess.Popen[str]:
        script = self.folder / "slurm.sh"
        script.write_text(TEXTS["slurm.sh"].replace("sleep 10", "sleep 2"))
        return self.start(
            ["bash", str(script), *(arguments or ("study/my_study.toml", "my-study"))],
            SLURM_ARRAY_TASK_ID=str(index),
            SLURM_ARRAY_TASK_MIN="0",
            SLURM_JOB_ID=f"10{index}",
            SLURM_CPUS_PER_TASK="1",
            SLURM_RESTART_COUNT=str(restarts),
        )

    def num_workers(self) -> int:
        """Return how many workers train; 0 while there is no store or study."""
        try:
            return len([worker for worker in self.status()["workers"] if worker["trial"] is not None])
        except UserError:
            return 0

    def status(self) -> dict[str, Any]:
        return reading.status("my-study", storage=self.url)

    def requeued(self) -> list[str]:
        heard = self.folder / "scontrol.txt"
        return heard.read_text().splitlines() if heard.exists() else []

    def end(self) -> None:
        for process in self.started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # its workers end with it
            process.communicate()


@pytest.fixture
def scripts(tmp_path: Path, postgres: Any, held_loop: str) -> Iterator[Scripts]:
    with postgres.database() as url:
        started = Scripts(tmp_path, url, held_loop)
        try:
            yield started
        finally:
            started.end()


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    output, _ = process.communicate(timeout=500)
    return process.returncode, output


def interrupt(task: subprocess.Popen[str]) -> None:
    """Send SIGTERM to the hpo of a task alone: Slurm's signal goes to the step, and not to the script."""
    (step,) = [child for child in psutil.Process(task.pid).children() if f"{BIN}/hpo" in child.cmdline()]
    step.terminate()


def test_pods_wait_for_the_study_leave_when_evicted_and_do_not_undo_a_stop(
    scripts: Scripts, wait_for: Callable[..., Any]
) -> None:
    other = scripts.pod(1)
    assert other.stdout is not None
    assert "no study" in other.stdout.readline()
    first = scripts.pod(0)
    wait_for(lambda: scripts.num_workers() == 2)
    other.send_signal(signal.SIGTERM)  # `exec` has made the shell that Kubernetes signals into hpo
    code, output = finish(other)
    assert code == 1, output
    assert "interrupted" in output
    assert running.stop("my-study", storage=scripts.url)
    code, output = finish(first)
    assert code == 1, output
    code, output = finish(scripts.pod(0))
    assert code == 1, output
    assert scripts.status()["stop"] == "requested"
    assert {path.name for path in (scripts.folder / "logs").iterdir()} == {"0", "1"}


def test_a_task_that_slurm_signals_is_put_back_into_the_queue_and_goes_on(
    scripts: Scripts, wait_for: Callable[..., Any]
) -> None:
    first, other = scripts.task(0), scripts.task(1)
    wait_for(lambda: scripts.num_workers() == 2)
    interrupt(other)
    code, output = finish(other)
    assert (code, scripts.requeued()) == (1, ["requeue 101"]), output
    again = scripts.task(1, restarts=1)
    wait_for(lambda: scripts.num_workers() == 2)
    (scripts.folder / "study/go").touch()
    for task in (first, again):
        code, output = finish(task)
        assert code == 0, output
    assert (scripts.status()["trials"], scripts.requeued()) == ({"complete": 2}, ["requeue 101"])


@pytest.mark.parametrize(
    ("code", "stop", "restarts", "requeued"),
    [
        (1, None, 0, True),
        (1, None, 49, True),
        (1, None, 50, False),  # not for ever
        (1, "requested", 0, False),  # `hpo stop`
        (1, "failure", 0, False),  # three trials failed alike
        (2, None, 0, False),  # a wrong request
        (0, None, 0, False),
    ],
)
def test_a_task_is_put_back_only_where_its_study_goes_on(
    scripts: Scripts, code: int, stop: str | None, restarts: int, requeued: bool
) -> None:
    status = json.dumps({"stop": stop}, indent=2)  # as `hpo status --json` prints it
    scripts.tool("hpo", f"case $1 in status) echo '{status}' ;; *) exit {code} ;; esac")
    assert finish(scripts.task(1, restarts=restarts)) == (code, f"{status}\n")
    assert scripts.requeued() == ["requeue 101"] * requeued
