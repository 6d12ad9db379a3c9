"""What a cluster is asked for beside the job itself, checked before anything is sent.

Knows nothing of manifests.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from launcher.kubernetes.names import check_name
from prefix_ds.errors import LaunchError

KINDS = ("job", "jobset", "trainjob")

_QUANTITY = re.compile(r"(?P<number>[0-9]+(\.[0-9]+)?)(?P<unit>m|k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei)?")
_UNITS = {None: 1.0, "m": 1e-3, "k": 1e3} | {unit: 1000.0**n for n, unit in enumerate("MGTPE", 2)}
_UNITS |= {f"{unit}i": 1024.0**n for n, unit in enumerate("KMGTPE", 1)}
_MOST = 2**31 - 1  # of a user, and of what Kubernetes counts
_LABEL = re.compile(r"([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_TAINT = re.compile(
    r"(?P<key>[^=:]+)(=(?P<value>[^=:]*))?(:(?P<effect>NoSchedule|PreferNoSchedule|NoExecute))?"
)


@dataclass(frozen=True)
class Mount:
    """A PersistentVolumeClaim and the folder at which pods see it."""

    claim: str
    path: str
    read_only: bool = False


@dataclass(frozen=True)
class Toleration:
    """Of a taint; without a value any will do, without an effect each."""

    key: str
    value: str | None = None
    effect: str | None = None


def mounts_of(words: Sequence[str]) -> tuple[Mount, ...]:
    """Of `CLAIM:/FOLDER` or `CLAIM:/FOLDER:ro`. Raises LaunchError."""
    return tuple(_mount(word) for word in words)


def _mount(word: str) -> Mount:
    claim, _, rest = word.partition(":")
    path, _, mode = rest.partition(":")
    if not path.startswith("/") or mode not in ("", "ro"):
        raise LaunchError(f"--mount: {word!r}: expected CLAIM:/FOLDER or CLAIM:/FOLDER:ro")
    return Mount(claim, path, mode == "ro")


def tolerations_of(words: Sequence[str]) -> tuple[Toleration, ...]:
    """Of taints as kubectl writes them: `KEY`, `KEY=VALUE`, `KEY=VALUE:EFFECT`. Raises LaunchError."""
    return tuple(_toleration(word) for word in words)


def _toleration(word: str) -> Toleration:
    found = _TAINT.fullmatch(word)
    if found is None:
        raise LaunchError(f"--toleration: {word!r}: expected a taint: KEY, KEY=VALUE or KEY=VALUE:NoSchedule")
    return Toleration(found["key"], found["value"], found["effect"])


Pairs = tuple[tuple[str, str], ...]


def pairs_of(option: str) -> Callable[[Sequence[str]], Pairs]:
    """Reads words of `KEY=VALUE`. What it returns raises LaunchError, with the option's name."""

    def read(words: Sequence[str]) -> Pairs:
        for word in words:
            if "=" not in word:
                raise LaunchError(f"{option}: {word!r}: expected KEY=VALUE")
        pairs = (word.partition("=") for word in words)
        return tuple((key, value) for key, _, value in pairs)

    return read


selector_of, resources_of = pairs_of("--node-selector"), pairs_of("--resource")
annotations_of, variables_of = pairs_of("--annotation"), pairs_of("--set-env")


def option(doc: str, default: Any = None, *, parse: Callable[[Sequence[str]], Any] | None = None) -> Any:
    """A field with its line of `--help`; `parse` makes the value of an option given several times."""
    return field(default=() if parse else default, metadata={"doc": doc, "parse": parse})


@dataclass(frozen=True)
class KubernetesOptions:
    """Where and how the pods run; a pod is a node of the job. Each field is an option of the command line."""

    image: str = option("container image that has prefix-ds in it", "")
    kind: str = option("job, jobset or trainjob", "job")
    namespace: str = option("of the cluster", "default")
    name: str | None = option("of the job; left out: the run's")
    gpus_per_node: int = option("GPUs of a pod, a rank for each; 0: CPUs", 1)
    gpu_resource: str = option("what the cluster calls a GPU", "nvidia.com/gpu")
    cpu: str = option("CPUs that a pod asks for", "4")
    memory: str = option("memory of a pod, /dev/shm included", "16Gi")
    shm: str = option("largest /dev/shm of a pod", "2Gi")
    ephemeral_storage: str = option("disk of a node that a pod may use: /tmp, home folder, output", "8Gi")
    resource: tuple[tuple[str, str], ...] = option(
        "another resource, such as rdma/hca=1: NAME=N", parse=resources_of
    )
    annotation: tuple[tuple[str, str], ...] = option(
        "annotation of the pods: KEY=VALUE", parse=annotations_of
    )
    set_env: tuple[tuple[str, str], ...] = option(
        "variable that is no secret: NAME=VALUE", parse=variables_of
    )
    node_selector: tuple[tuple[str, str], ...] = option("label of nodes: KEY=VALUE", parse=selector_of)
    toleration: tuple[Toleration, ...] = option(
        "taint to bear: KEY, KEY=VALUE or KEY=VALUE:EFFECT", parse=tolerations_of
    )
    spread: str = option("label of nodes to spread pods over; empty: anywhere", "kubernetes.io/hostname")
    runs_claim: str | None = option("PersistentVolumeClaim of the run folder; left out: lost with the pod")
    mount: tuple[Mount, ...] = option(
        "another claim, for data or a base: CLAIM:/FOLDER or CLAIM:/FOLDER:ro", parse=mounts_of
    )
    env_secret: str | None = option("Secret with the values of --env; without --env, all that is in it")
    service_account: str | None = option("left out: one of the job's own, without any right")
    image_pull_secret: str | None = option("Secret for the image's registry")
    user_id: int = option("user and group that the pods run as", 10001)
    grace_seconds: int = option("for a checkpoint when a pod is stopped", 300)
    restarts: int = option("failures a pod may have, on average, before the job is given up", 3)
    queue: str | None = option("Kueue's queue to wait in")
    ttl_seconds: int | None = option("how long the ended job is kept; left out: until it is cancelled")
    deadline_seconds: int | None = option("longest time of the job")


def check_options(options: KubernetesOptions) -> None:
    """Raises LaunchError with a line for each mistake."""
    mistakes = [
        *_mistakes_of_text(options),
        *_mistakes_of_names(options),
        *_mistakes_of_numbers(options),
        *_mistakes_of_resources(options),
        *_mistakes_of_labels(options),
        *_mistakes_of_repeats(options),
        *_mistakes_of_variables(options),
    ]
    if mistakes:
        raise LaunchError(*mistakes)


def _mistakes_of_text(options: KubernetesOptions) -> Iterator[str]:
    if not options.image or any(c.isspace() or not c.isprintable() for c in options.image):
        yield f"--image: {options.image!r}: expected a container image, such as registry/prefix-ds:TAG"
    if options.kind not in KINDS:
        yield f"--kind: {options.kind}: expected {', '.join(KINDS)}"
    asked = [("--cpu", options.cpu), ("--memory", options.memory), ("--shm", options.shm)]
    asked += [("--ephemeral-storage", options.ephemeral_storage)]
    asked += [("--resource", amount) for _, amount in options.resource]
    for option, quantity in asked:
        if not _QUANTITY.fullmatch(quantity) or not quantity.strip("0.mkMGTPEi"):
            yield f"{option}: {quantity!r}: expected an amount such as 4, 500m or 16Gi"
    if _amount(options.shm) > _amount(options.memory) > 0:
        yield f"--shm: {options.shm}: expected at most --memory, {options.memory}, a part of which it is"


def _amount(quantity: str) -> float:
    """0 for what is none."""
    found = _QUANTITY.fullmatch(quantity)
    return float(found["number"]) * _UNITS[found["unit"]] if found else 0.0


def _mistakes_of_names(options: KubernetesOptions) -> Iterator[str]:
    named = {
        "--namespace": options.namespace,
        "--runs-claim": options.runs_claim,
        "--env-secret": options.env_secret,
        "--service-account": options.service_account,
        "--image-pull-secret": options.image_pull_secret,
        "--queue": options.queue,
    }
    for option, name in [*named.items(), *(("--mount", mount.claim) for mount in options.mount)]:
        if name is not None:
            yield from check_name(option, name)


def _mistakes_of_numbers(options: KubernetesOptions) -> Iterator[str]:
    least = {
        "gpus_per_node": 0,
        "restarts": 0,
        "grace_seconds": 1,
        "user_id": 1,
        "ttl_seconds": 0,
        "deadline_seconds": 1,
    }
    for name, smallest in least.items():
        number = getattr(options, name)
        if number is not None and number < smallest:
            yield f"--{name.replace('_', '-')}: {number}: expected at least {smallest}"
        if number is not None and number > _MOST:
            yield f"--{name.replace('_', '-')}: {number}: expected at most {_MOST}"
    if options.kind == "trainjob" and options.ttl_seconds is not None:
        yield (
            "--ttl-seconds: a TrainJob cannot be deleted by itself, for Kubeflow would train again; "
            "`prefix-launch cancel` it when it is done"
        )


def _mistakes_of_resources(options: KubernetesOptions) -> Iterator[str]:
    """Pages of memory are an amount of it; all else that a maker has named is counted."""
    named = [("--resource", name, amount) for name, amount in options.resource]
    for option, name, amount in [*named, ("--gpu-resource", options.gpu_resource, "1")]:
        is_memory = name.startswith("hugepages-")
        if _LABEL.fullmatch(name) and "/" not in name and not is_memory:
            yield f"{option}: {name!r}: expected DOMAIN/NAME, such as rdma/hca, or hugepages-SIZE"
        if _QUANTITY.fullmatch(amount) and not is_memory and ("." in amount or amount.endswith("m")):
            yield f"{option}: {name}={amount}: expected a whole number"


def _mistakes_of_labels(options: KubernetesOptions) -> Iterator[str]:
    pairs = [("--node-selector", *pair) for pair in options.node_selector]
    pairs += [("--toleration", each.key, each.value or "") for each in options.toleration]
    pairs += [("--gpu-resource", options.gpu_resource, "")]
    pairs += [("--resource", name, "") for name, _ in options.resource]
    pairs += [("--annotation", key, "") for key, _ in options.annotation]
    pairs += [("--spread", options.spread, "")] if options.spread else []
    for option, key, value in pairs:
        if not _LABEL.fullmatch(key):
            yield f"{option}: {key!r}: expected a label's key, such as cloud.example/accelerator"
        if not _VALUE.fullmatch(value):
            yield f"{option}: {value!r}: expected at most 63 letters, digits, '-', '_' and '.'"


def _mistakes_of_repeats(options: KubernetesOptions) -> Iterator[str]:
    pairs = {
        "--set-env": options.set_env,
        "--node-selector": options.node_selector,
        "--annotation": options.annotation,
    }
    for option, given in pairs.items():
        names = [name for name, _ in given]
        for name in dict.fromkeys(names):
            if names.count(name) > 1:
                yield f"{option}: {name}: is given twice"


def _mistakes_of_variables(options: KubernetesOptions) -> Iterator[str]:
    """A manifest is read by many, and kept."""
    from prefix_ds.config.secrets import has_login, is_secret

    for name, value in options.set_env:
        if not _VARIABLE.fullmatch(name):
            yield f"--set-env: {name!r}: expected the name of a variable"
        if is_secret(name) or has_login(value):
            yield f"--set-env: {name}: its value belongs into a Secret: --env {name} --env-secret SECRET"
