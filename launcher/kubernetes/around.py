"""The objects beside the job: its run.yaml, its account without rights, and a wall around its network.

Knows nothing of the kinds of jobs.
"""

import hashlib

from launcher.kubernetes.job import metadata
from launcher.kubernetes.options import KubernetesOptions
from launcher.kubernetes.pod import RUN_FILE, Manifest, selector


def config_map_name(name: str, run_text: str) -> str:
    """Carries the content's hash: a job never finds another's run.yaml."""
    return f"{name}-{hashlib.sha256(run_text.encode()).hexdigest()[:10]}"


def config_map(name: str, run_text: str, options: KubernetesOptions) -> Manifest:
    """The run.yaml, as the user wrote it."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": metadata(name, options) | {"name": config_map_name(name, run_text)},
        "immutable": True,
        "data": {RUN_FILE: run_text},
    }


def service_account(name: str, options: KubernetesOptions) -> list[Manifest]:
    """One for the job, unless it uses another's."""
    account = {
        "apiVersion": "v1",
        "kind": "ServiceAccount",
        "metadata": metadata(name, options),
        "automountServiceAccountToken": False,
    }
    return [] if options.service_account else [account]


def network_policy(name: str, options: KubernetesOptions) -> Manifest:
    """Only the job's own pods reach its pods, at any port: ranks talk over ports that the kernel chooses."""
    pods = {"matchLabels": selector(name)}
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": metadata(name, options),
        "spec": {
            "podSelector": pods,
            "policyTypes": ["Ingress"],
            "ingress": [{"from": [{"podSelector": pods}]}],
        },
    }
