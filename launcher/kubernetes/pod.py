"""One node of the job: a pod that runs `launcher.node` and what it may touch.

It keeps to the *restricted* Pod Security Standard, and its root file system is read-only: the runs volume,
/tmp, the home folder and /dev/shm are what it writes to. /dev/shm is memory, of which a pod has 64 MB by
default: too little for NCCL. /tmp and the home folder are on the node's disk, of which a pod has a limit.

The runs volume lies where `run.folder` does and is the working folder, so relative paths of run.yaml, also
that of MLflow's database, are on it.

Knows nothing of what starts pods.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from posixpath import normpath
from typing import Any

from launcher.kubernetes.options import KubernetesOptions, Mount, Toleration
from launcher.spec import DEFAULT_PORT, JobSpec
from prefix_ds.errors import LaunchError

Manifest = dict[str, Any]

CONTAINER = "node"  # Kubeflow's runtimes expect this name
CONFIG_FOLDER, RUN_FILE = "/config", "run.yaml"
_HOME, _RELATIVE_RUNS = "/home/prefix", "/work"
_HUB = ".huggingface"  # on the runs volume: what comes from the hub is fetched once, and fills no node's disk
_TAKEN = (CONFIG_FOLDER, _HOME, "/tmp", "/dev/shm")
_IMAGES = frozenset(["", "bin", "dev", "etc", "lib", "lib64", "proc", "sbin", "src", "sys", "usr"])  # below /


@dataclass(frozen=True)
class JobPlace:
    """The job's names: its own, that of its ConfigMap, and of the first pod's host."""

    name: str
    config_map: str
    master: str
    subdomain: str | None = None  # None: whoever makes the pods names their network


def labels(name: str) -> Manifest:
    """Of every object of the job."""
    return {
        "app.kubernetes.io/name": "prefix-ds",
        "app.kubernetes.io/instance": name,
        "app.kubernetes.io/managed-by": "prefix-launch",
    }


def selector(name: str) -> Manifest:
    """The labels that pick out the pods of a job."""
    return {key: value for key, value in labels(name).items() if not key.endswith("managed-by")}


def pod_template(spec: JobSpec, options: KubernetesOptions, place: JobPlace) -> Manifest:
    """The same for every node: its number is in the environment. Raises LaunchError."""
    notes = {"annotations": dict(options.annotation)} if options.annotation else {}
    return {"metadata": {"labels": labels(place.name)} | notes, "spec": _pod(spec, options, place)}


def _pod(spec: JobSpec, options: KubernetesOptions, place: JobPlace) -> Manifest:
    pod = {
        "restartPolicy": "Never",  # a pod's failure policy sees each end
        "terminationGracePeriodSeconds": options.grace_seconds,
        "subdomain": place.subdomain,
        "serviceAccountName": options.service_account or place.name,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,  # a Service named `master` would set MASTER_PORT
        "securityContext": _pod_security(options),
        "imagePullSecrets": [{"name": options.image_pull_secret}] if options.image_pull_secret else None,
        "nodeSelector": dict(options.node_selector),
        "tolerations": [_toleration(each) for each in options.toleration],
        "topologySpreadConstraints": _spread(options, place.name),
        "containers": [_container(spec, options, place)],
        "volumes": [*_volumes(options, place)],
    }
    return {key: value for key, value in pod.items() if value not in (None, [], {})}


def _pod_security(options: KubernetesOptions) -> Manifest:
    return {
        "runAsNonRoot": True,
        "runAsUser": options.user_id,
        "runAsGroup": options.user_id,
        "fsGroup": options.user_id,
        "fsGroupChangePolicy": "OnRootMismatch",  # a large volume is not walked at every start
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def _toleration(toleration: Toleration) -> Manifest:
    operator = "Exists" if toleration.value is None else "Equal"
    fields = {
        "key": toleration.key,
        "operator": operator,
        "value": toleration.value,
        "effect": toleration.effect,
    }
    return {key: value for key, value in fields.items() if value is not None}


def _spread(options: KubernetesOptions, name: str) -> list[Manifest]:
    constraint = {
        "maxSkew": 1,
        "topologyKey": options.spread,
        "whenUnsatisfiable": "ScheduleAnyway",
        "labelSelector": {"matchLabels": selector(name)},
    }
    return [constraint] if options.spread else []


def _container(spec: JobSpec, options: KubernetesOptions, place: JobPlace) -> Manifest:
    secret = options.env_secret
    container = {
        "name": CONTAINER,
        "image": options.image,
        "command": ["python", "-P", "-m", "launcher.node"],
        "args": [literal(word) for word in _agent_words(spec, options, place)],
        "workingDir": runs_path(spec),
        "env": [*_environment(spec, options)],
        "envFrom": [{"secretRef": {"name": secret}}] if secret and not spec.variables else [],
        "resources": _resources(options),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "terminationMessagePolicy": "FallbackToLogsOnError",  # `kubectl describe` shows the last lines
        "volumeMounts": [*_volume_mounts(spec, options)],
    }
    return {key: value for key, value in container.items() if value != []}


def literal(text: str) -> str:
    """Escaped from Kubernetes, which replaces `$(NAME)` in arguments and values and halves every `$$`."""
    return text.replace("$", "$$")


def _agent_words(spec: JobSpec, options: KubernetesOptions, place: JobPlace) -> list[str]:
    return [
        *("--nodes", str(spec.num_nodes)),
        *("--ranks", str(spec.ranks_per_node)),
        *(("--gpus", str(options.gpus_per_node)) if options.gpus_per_node else ()),
        *("--master", f"{place.master}:{spec.port or DEFAULT_PORT}"),
        *("--", "train", f"{CONFIG_FOLDER}/{RUN_FILE}", *spec.overrides),
    ]


def _environment(spec: JobSpec, options: KubernetesOptions) -> Iterator[Manifest]:
    """Values of --env come from a Secret and are never seen here."""
    given = {
        "HOME": _HOME,
        "USER": "prefix",  # torch asks for it, and the user's number has no name
        "HF_HOME": f"{runs_path(spec)}/{_HUB}",
    } | dict(options.set_env)
    for name, value in given.items():
        yield {"name": name, "value": literal(value)}
    for name in spec.variables:
        if name in given:
            raise LaunchError(f"--env: {name}: is set already; see --set-env")
    if spec.variables and not options.env_secret:
        names = ", ".join(spec.variables)
        raise LaunchError(f"--env: {names}: values come from a Secret here: name it with --env-secret")
    for name in spec.variables:
        yield {"name": name, "valueFrom": {"secretKeyRef": {"name": options.env_secret, "key": name}}}


def _resources(options: KubernetesOptions) -> Manifest:
    """CPUs are a least amount, not a limit; all else is both. Raises LaunchError."""
    gpus = {options.gpu_resource: options.gpus_per_node} if options.gpus_per_node else {}
    limits = {"memory": options.memory, "ephemeral-storage": options.ephemeral_storage} | gpus
    for name, amount in options.resource:
        if name in limits:
            raise LaunchError(f"--resource: {name}: is asked for already, by an option of its own or twice")
        limits[name] = int(amount) if amount.isdecimal() else amount
    return {"requests": {"cpu": options.cpu} | limits, "limits": limits}


def runs_path(spec: JobSpec) -> str:
    """Where the runs volume is mounted: what holds the run folder. Raises LaunchError."""
    folder = PurePosixPath(spec.config.run.folder)
    if ".." in folder.parts or not folder.name:
        raise LaunchError(
            f"run.folder: {folder}: expected a folder of the pods, such as runs/NAME, without '..'"
        )
    if not folder.is_absolute():
        return _RELATIVE_RUNS
    if folder.parent == PurePosixPath("/"):
        raise LaunchError(f"run.folder: {folder}: expected a folder in one that a volume can be mounted at")
    return str(folder.parent)


def _volume_mounts(spec: JobSpec, options: KubernetesOptions) -> Iterator[Manifest]:
    """Raises LaunchError if two volumes would lie at one place, or one where the image's own files do."""
    taken = [*_TAKEN, runs_path(spec), *(mount.path.rstrip("/") for mount in options.mount)]
    for path in taken:
        if taken.count(path) > 1:
            raise LaunchError(f"{path}: two volumes would be mounted there; see --mount and run.folder")
    for path in taken[len(_TAKEN) :]:
        if normpath(f"/{path.strip('/')}").split("/")[1] in _IMAGES:
            raise LaunchError(
                f"{path or '/'}: a volume there would hide the image's own files; see --mount and run.folder"
            )
    for name, path in zip(("config", "home", "tmp", "shm", "runs"), taken, strict=False):
        yield {"name": name, "mountPath": path} | ({"readOnly": True} if name == "config" else {})
    for number, mount in enumerate(options.mount):
        read_only = {"readOnly": True} if mount.read_only else {}
        yield {"name": f"mount-{number}", "mountPath": mount.path} | read_only


def _volumes(options: KubernetesOptions, place: JobPlace) -> Iterator[Manifest]:
    yield {"name": "config", "configMap": {"name": place.config_map}}
    yield {"name": "home", "emptyDir": {}}
    yield {"name": "tmp", "emptyDir": {}}
    yield {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": options.shm}}
    yield {"name": "runs"} | (
        _claim(Mount(options.runs_claim, "")) if options.runs_claim else {"emptyDir": {}}
    )
    for number, mount in enumerate(options.mount):
        yield {"name": f"mount-{number}"} | _claim(mount)


def _claim(mount: Mount) -> Manifest:
    read_only = {"readOnly": True} if mount.read_only else {}
    return {"persistentVolumeClaim": {"claimName": mount.claim} | read_only}
