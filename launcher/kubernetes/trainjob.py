"""A TrainJob (trainer.kubeflow.org) and the TrainingRuntime that it takes its JobSet from.

The runtimes that Kubeflow brings start torchrun and leave a pod's failure policy to nobody, and the patches a
TrainJob may carry cannot set one. So the job has a runtime of its own, in its namespace.

Knows nothing of how a JobSet is made.
"""

from dataclasses import replace

from launcher.kubernetes.job import metadata, suspended
from launcher.kubernetes.jobset import jobset_spec
from launcher.kubernetes.options import KubernetesOptions
from launcher.kubernetes.pod import JobPlace, Manifest
from launcher.spec import JobSpec

_API = "trainer.kubeflow.org/v1alpha1"


def trainjob(spec: JobSpec, options: KubernetesOptions, place: JobPlace) -> list[Manifest]:
    """Raises LaunchError."""
    runtime = {
        "apiVersion": _API,
        "kind": "TrainingRuntime",
        "metadata": metadata(place.name, options),
        "spec": {
            "mlPolicy": {"numNodes": spec.num_nodes},
            "template": {"spec": jobset_spec(spec, replace(options, deadline_seconds=None), place)},
        },
    }
    limit = {} if options.deadline_seconds is None else {"activeDeadlineSeconds": options.deadline_seconds}
    job = {
        "apiVersion": _API,
        "kind": "TrainJob",
        "metadata": metadata(place.name, options, is_queued=True),
        "spec": suspended(options)
        | limit
        | {
            "runtimeRef": {"kind": "TrainingRuntime", "name": place.name},
            "trainer": {"numNodes": spec.num_nodes},
        },
    }
    return [runtime, job]
