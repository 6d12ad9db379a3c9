"""A JobSet (jobset.x-k8s.io) of one job: its operator makes the Service.

The job's own failure policy decides about pods; when it gives the job up, so does the set.

Knows nothing of Kubeflow.
"""

from launcher.kubernetes.job import finished, job_spec_of_pods, metadata, suspended
from launcher.kubernetes.options import KubernetesOptions
from launcher.kubernetes.pod import CONTAINER, JobPlace, Manifest, labels
from launcher.spec import JobSpec

ANCESTOR = "trainer.kubeflow.org/trainjob-ancestor-step"


def jobset_spec(spec: JobSpec, options: KubernetesOptions, place: JobPlace) -> Manifest:
    """The `spec` of a JobSet, which a TrainingRuntime holds too. Raises LaunchError."""
    step = {ANCESTOR: "trainer"} if options.kind == "trainjob" else {}
    nodes = {
        "name": CONTAINER,
        "replicas": 1,
        "template": {
            "metadata": {"labels": labels(place.name) | step},
            "spec": job_spec_of_pods(spec, options, place),
        },
    }
    return finished(options) | {
        "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
        "failurePolicy": {"maxRestarts": 0},
        "replicatedJobs": [nodes],
    }


def jobset(spec: JobSpec, options: KubernetesOptions, place: JobPlace) -> list[Manifest]:
    """Raises LaunchError."""
    return [
        {
            "apiVersion": "jobset.x-k8s.io/v1alpha2",
            "kind": "JobSet",
            "metadata": metadata(place.name, options, is_queued=True),
            "spec": suspended(options) | jobset_spec(spec, options, place),
        }
    ]
