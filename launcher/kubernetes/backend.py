"""kubectl: submits a plan, shows a job's state and its pods' lines, takes it away.

Knows nothing of what is in a manifest.
"""

import subprocess
from collections.abc import Sequence

from launcher.kubernetes.names import job_name
from launcher.kubernetes.plan import KubernetesPlan
from prefix_ds.errors import LaunchError

_OF_A_JOB = (  # owners first
    "trainjobs.trainer.kubeflow.org",
    "trainingruntimes.trainer.kubeflow.org",
    "jobsets.jobset.x-k8s.io",
    "jobs.batch",
    "services",
    "networkpolicies.networking.k8s.io",
    "configmaps",
    "serviceaccounts",
)
_NOT_TO_BE_TAKEN = "services,networkpolicies,serviceaccounts"  # a run named `mlflow` would change MLflow's
_SHOWN = (*_OF_A_JOB[:4], "pods")
_RUNNING = "--field-selector=status.phase!=Succeeded,status.phase!=Failed"


def submit(plan: KubernetesPlan) -> str:
    """Applies the manifests; what kubectl says. Raises LaunchError, also for a name that is taken."""
    where = f"--namespace={plan.namespace}"
    if _kubectl("get", plan.kind, plan.name, where, "--ignore-not-found", "--output=name").strip():
        raise LaunchError(
            f"{plan.kind} {plan.name}: is in namespace {plan.namespace} already: cancel it first (its run "
            "folder stays, and the new one goes on from its checkpoint), or give this one another --name"
        )
    words = [f"--field-selector=metadata.name={plan.name}", "--selector=app.kubernetes.io/name!=prefix-ds"]
    pods = _kubectl("get", "pods", *_picked(plan.name, plan.namespace), _RUNNING, "--output=name").split()
    if pods:
        raise LaunchError(
            f"{plan.name}: its pods still write their checkpoint: {', '.join(pods)}; wait until they are gone"
        )
    others = _kubectl("get", _NOT_TO_BE_TAKEN, where, *words, "--output=name").split()
    if others:
        raise LaunchError(f"{others[0]}: is not a job's of ours: give this one another --name")
    return _kubectl("apply", where, "--filename=-", given=plan.text())


def status(name: str, namespace: str) -> str:
    """The job and its pods, as kubectl shows them. Raises LaunchError."""
    said = _kubectl("get", _known(_SHOWN), *_picked(name, namespace), "--output=wide")
    return _found(said, name, namespace)


def logs(name: str, namespace: str, *, follow: bool = False) -> int:
    """Every pod's lines on this process's output, each with its pod's name; kubectl's exit code."""
    words = ["logs", *_picked(name, namespace), "--prefix", "--tail=-1", "--max-log-requests=1000"]
    try:
        return subprocess.run(["kubectl", *words, f"--follow={str(follow).lower()}"], check=False).returncode
    except FileNotFoundError:
        raise _no_kubectl() from None


def cancel(name: str, namespace: str) -> str:
    """Deletes all objects of the job; its pods get their time for a checkpoint. Raises LaunchError."""
    said = _kubectl("delete", _known(_OF_A_JOB), *_picked(name, namespace), "--wait=false")
    return _found(said, name, namespace)


def _found(said: str, name: str, namespace: str) -> str:
    if not said.strip() or said.startswith("No resources found"):
        raise LaunchError(f"{name}: no such job in namespace {namespace}")
    return said


def _picked(name: str, namespace: str) -> tuple[str, ...]:
    label = f"app.kubernetes.io/name=prefix-ds,app.kubernetes.io/instance={job_name(name, '', is_given=True)}"
    return f"--namespace={namespace}", f"--selector={label}"


def _known(resources: Sequence[str]) -> str:
    """Those that the cluster has: of the operators' kinds it may know none.

    Where some API is down, that of metrics for instance, kubectl prints what the others have, and fails.
    """
    known = set(_kubectl("api-resources", "--output=name", may_lack=True).split())
    return ",".join(name for name in resources if name in known)


def _kubectl(*words: str, given: str | None = None, may_lack: bool = False) -> str:
    """Its output; `may_lack`: also if it failed to get all of it. Raises LaunchError with its last line."""
    try:
        done = subprocess.run(
            ["kubectl", *words], input=given, capture_output=True, encoding="utf-8", check=False
        )
    except FileNotFoundError:
        raise _no_kubectl() from None
    if done.returncode and not (may_lack and done.stdout):
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise LaunchError(f"kubectl {words[0]}: {lines[-1]}")
    return done.stdout


def _no_kubectl() -> LaunchError:
    return LaunchError("kubectl: not found: install it, and let it know the cluster (`kubectl cluster-info`)")
