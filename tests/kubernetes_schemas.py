"""Whether Kubernetes would take a manifest: its own schemas, and those of the operators' kinds.

Knows nothing of how manifests are made.
"""

import functools
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml
from kubernetes_validate.utils import all_versions, major_minor

ROOT = Path(__file__).resolve().parent.parent
CRDS = ROOT.parent / "shared" / "k8s-crds"
VERSIONS = sorted({v for v in map(major_minor, all_versions()) if int(v.split(".")[1]) >= 29})
_FILES = {
    "JobSet": "jobset.x-k8s.io_jobsets.yaml",
    "TrainJob": "trainer.kubeflow.org_trainjobs.yaml",
}


def validate(manifest, version):
    """Raises for a manifest that this version's schema of its kind refuses, unknown fields included."""
    kubernetes_validate.validate(manifest, version, strict=True)


def validate_custom(manifest):
    """The same for an operator's kind; a TrainingRuntime's JobSet is validated as one."""
    kind, group = manifest["kind"], manifest["apiVersion"]
    if kind == "TrainingRuntime":
        jsonschema.validate(manifest["spec"]["template"]["spec"], _schema("JobSet")["properties"]["spec"])
        return
    assert group in _api_versions(kind)
    jsonschema.validate(manifest, _schema(kind))


@functools.cache
def _definition(kind):
    path = CRDS / _FILES[kind]
    if not path.exists():
        pytest.skip(f"the schema of {kind} is not at {path}")
    return yaml.load(path.read_text(), yaml.CSafeLoader)["spec"]


def _api_versions(kind):
    definition = _definition(kind)
    return [f"{definition['group']}/{v['name']}" for v in definition["versions"] if v["served"]]


@functools.cache
def _schema(kind):
    return _closed(_definition(kind)["versions"][0]["schema"]["openAPIV3Schema"])


def _closed(schema):
    """A cluster drops fields it does not know, and kubectl refuses them: so do we."""
    if isinstance(schema, list):
        return [_closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: _closed(value) for key, value in schema.items()}
    if isinstance(closed.get("properties"), dict) and closed.get("type") == "object":
        closed.setdefault("additionalProperties", False)
    return closed
