"""The job of pods that the three kinds share, and the plain kind: an Indexed Job and a headless Service.

Which ends of a pod count. A pod that the cluster takes away (drained, preempted, its node lost) has the
condition DisruptionTarget, and one that ends with 75 has a checkpoint because somebody asked for it: neither
counts, since both need an event from outside. A pod that fills its node's disk would go round in circles with
that: it is taken away with the same condition. So what a pod may take of the disk is limited as memory is:
one that takes more is ended without the condition, and counts. A bug and a user's mistake (1 and 2) end the
job at once, for another try would end the same. Everything else counts: a device that broke (77), for the
next node may have one that works, and a lost peer (76), for where the network between pods is broken every
pod ends so, and nothing else would ever count. One crash thus costs up to a count for each pod, and the limit
is that many times the restarts.

Knows nothing of operators.
"""

from launcher.kubernetes.options import KubernetesOptions
from launcher.kubernetes.pod import CONTAINER, JobPlace, Manifest, labels, pod_template, selector
from launcher.spec import JobSpec
from prefix_ds.errors import EXIT_BUG, EXIT_STOPPED, EXIT_USER


def job_spec_of_pods(spec: JobSpec, options: KubernetesOptions, place: JobPlace) -> Manifest:
    """The `spec` of a batch/v1 Job. Raises LaunchError."""
    job = {
        "completionMode": "Indexed",
        "completions": spec.num_nodes,
        "parallelism": spec.num_nodes,
        "backoffLimit": options.restarts * spec.num_nodes,
        "activeDeadlineSeconds": options.deadline_seconds,
        "podFailurePolicy": {"rules": _rules()},
        "template": pod_template(spec, options, place),
    }
    return {key: value for key, value in job.items() if value is not None}


def _rules() -> list[Manifest]:
    return [
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        {"action": "Ignore", "onExitCodes": _codes(EXIT_STOPPED)},
        {"action": "FailJob", "onExitCodes": _codes(EXIT_BUG, EXIT_USER)},
    ]


def _codes(*codes: int) -> Manifest:
    return {"containerName": CONTAINER, "operator": "In", "values": list(codes)}


def metadata(name: str, options: KubernetesOptions, *, is_queued: bool = False) -> Manifest:
    """With Kueue's label on the object that waits for its turn."""
    queue = {"kueue.x-k8s.io/queue-name": options.queue} if is_queued and options.queue else {}
    return {"name": name, "namespace": options.namespace, "labels": labels(name) | queue}


def suspended(options: KubernetesOptions) -> Manifest:
    """Kueue starts the job when it is its turn."""
    return {"suspend": True} if options.queue else {}


def finished(options: KubernetesOptions) -> Manifest:
    """How long the job is kept after its end."""
    return {} if options.ttl_seconds is None else {"ttlSecondsAfterFinished": options.ttl_seconds}


def indexed_job(spec: JobSpec, options: KubernetesOptions, place: JobPlace) -> list[Manifest]:
    """Needs no operator. Raises LaunchError."""
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": metadata(place.name, options, is_queued=True),
        "spec": suspended(options) | finished(options) | job_spec_of_pods(spec, options, place),
    }
    return [_service(options, place.name), job]


def _service(options: KubernetesOptions, name: str) -> Manifest:
    """Gives the pods' host names to DNS, before the pods are ready too."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata(name, options),
        "spec": {"clusterIP": "None", "publishNotReadyAddresses": True, "selector": selector(name)},
    }
