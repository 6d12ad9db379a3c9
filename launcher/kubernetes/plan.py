"""A job's manifests as one frozen value: what `--dry-run` prints is what is applied, to the letter.

Knows nothing of kubectl.
"""

from dataclasses import dataclass

from launcher.kubernetes.around import config_map, config_map_name, network_policy, service_account
from launcher.kubernetes.job import indexed_job
from launcher.kubernetes.jobset import jobset
from launcher.kubernetes.names import job_name
from launcher.kubernetes.options import KubernetesOptions, check_options
from launcher.kubernetes.pod import CONTAINER, JobPlace
from launcher.kubernetes.text import yaml_text
from launcher.kubernetes.trainjob import trainjob
from launcher.spec import JobSpec
from prefix_ds.errors import LaunchError

_KINDS = {"job": indexed_job, "jobset": jobset, "trainjob": trainjob}


@dataclass(frozen=True)
class KubernetesPlan:
    """All manifests of a job, and what tells it from others."""

    name: str
    namespace: str
    kind: str
    manifests: str

    def text(self) -> str:
        """YAML, a document an object."""
        return self.manifests


def plan(spec: JobSpec, options: KubernetesOptions) -> KubernetesPlan:
    """Reads the run file and nothing else. Raises LaunchError."""
    check_options(options)
    _check_nodes(spec, options)
    run_text = spec.run_file.read_bytes().decode()  # line ends as they are
    place = _place(spec, options, run_text)
    objects = [
        *service_account(place.name, options),
        config_map(place.name, run_text, options),
        network_policy(place.name, options),
        *_KINDS[options.kind](spec, options, place),
    ]
    return KubernetesPlan(place.name, options.namespace, options.kind, yaml_text(objects))


def _check_nodes(spec: JobSpec, options: KubernetesOptions) -> None:
    if spec.num_nodes > 1 and not options.runs_claim:
        raise LaunchError(
            f"--runs-claim: needed with {spec.num_nodes} nodes, which share the run folder: a "
            "PersistentVolumeClaim that all of them can mount (ReadWriteMany)"
        )


def _place(spec: JobSpec, options: KubernetesOptions, run_text: str) -> JobPlace:
    is_plain = options.kind == "job"
    middle = (
        "-" if is_plain else f"-{CONTAINER}-0-"
    )  # the operators' JobSet puts this between name and number
    last = f"{middle}{spec.num_nodes - 1}" + ("" if is_plain else "-abcde")  # with which JobSet validates it
    name = job_name(options.name or spec.name, last, is_given=options.name is not None)
    return JobPlace(
        name,
        config_map_name(name, run_text),
        master=f"{name}{middle}0.{name}",
        subdomain=name if is_plain else None,
    )
