"""What the Kubernetes backend prints is what Kubernetes takes, in every version, and says what was meant."""

import copy
import functools
import itertools
import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from launcher.kubernetes import backend
from launcher.kubernetes.options import KubernetesOptions, Mount, Toleration
from launcher.kubernetes.plan import plan
from launcher.spec import job_spec
from prefix_ds.errors import LaunchError
from tests.kubelet import expanded
from tests.kubernetes_schemas import VERSIONS, validate, validate_custom
from tests.pod_security import violations

ROOT = Path(__file__).resolve().parent.parent
K8S = ROOT / "k8s"
GOLDEN = Path(__file__).parent / "manifests"
KINDS = ("job", "jobset", "trainjob")
CUSTOM = {"JobSet", "TrainJob", "TrainingRuntime"}
IMAGE = "registry.example/prefix-ds:0.1.0-cuda"
EXAMPLE = KubernetesOptions(IMAGE, namespace="training", runs_claim="runs")

RUN = """\
model: {name: /models/base}
prefix: {text: "Summarise:"}
data: {train: /data/train.jsonl, target: " {summary}"}
run: {folder: runs/dialogsum}
mlflow: {uri: "http://mlflow:5000"}
"""
EVERYTHING = KubernetesOptions(
    IMAGE,
    namespace="training",
    gpus_per_node=8,
    memory="512Gi",
    shm="64Gi",
    resource=(("rdma/hca", "8"),),
    annotation=(("k8s.v1.cni.cncf.io/networks", "ib-0, ib-1"),),
    set_env=(("NCCL_DEBUG", "INFO"), ("PRICE", "$(HOME)")),
    node_selector=(("example.com/gpu", "h100"),),
    toleration=(Toleration("nvidia.com/gpu", effect="NoSchedule"), Toleration("team", "llm")),
    runs_claim="runs",
    mount=(Mount("models", "/models", read_only=True), Mount("data", "/data")),
    env_secret="hub",
    image_pull_secret="registry",
    queue="training",
    ttl_seconds=86400,
    deadline_seconds=172800,
)


@pytest.fixture
def run_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(RUN)
    return path


def full_spec(run_file):
    return job_spec(
        run_file,
        ["train.epochs=3"],
        num_nodes=4,
        ranks_per_node=8,
        variables=["HF_TOKEN", "MLFLOW_TRACKING_PASSWORD"],
    )


def options(**changes):
    return KubernetesOptions(**({"image": IMAGE, "namespace": "training"} | changes))


def objects(text):
    return list(yaml.load_all(text, yaml.CSafeLoader))


def planned(spec, **changes):
    return objects(plan(spec, options(**changes)).text())


def everything(run_file, kind):
    changes = {"kind": kind} | ({"ttl_seconds": None} if kind == "trainjob" else {})
    return plan(full_spec(run_file), KubernetesOptions(**(vars(EVERYTHING) | changes)))


def check_objects(manifests):
    """Each as its schema wants it."""
    for manifest in manifests:
        if manifest["kind"] in CUSTOM:
            validate_custom(manifest)
        else:
            for version in VERSIONS:
                validate(manifest, version)


def found(tree, key):
    """The values of a key, wherever it stands."""
    if isinstance(tree, dict):
        yield from (value for name, value in tree.items() if name == key)
        yield from itertools.chain(*(found(value, key) for value in tree.values()))
    elif isinstance(tree, list):
        yield from itertools.chain(*(found(value, key) for value in tree))


def pods(manifests):
    alone = [m for m in manifests if isinstance(m, dict) and m.get("kind") == "Pod"]
    templates = [*found(manifests, "template"), *alone]
    return [template["spec"] for template in templates if "containers" in template.get("spec", {})]


def the_pod(manifests):
    (pod,) = pods(manifests)
    return pod


# Manifests


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_manifest_is_as_it_was_read_and_approved(run_file, kind):
    assert everything(run_file, kind).text() == (GOLDEN / f"{kind}.yaml").read_text()


@pytest.mark.parametrize("kind", KINDS)
def test_every_version_of_kubernetes_takes_it(run_file, kind):
    assert len(VERSIONS) >= 5
    check_objects(objects(everything(run_file, kind).text()))
    check_objects(planned(job_spec(run_file), kind=kind))


@pytest.mark.parametrize("field", ["restartPolicyy", "containers"])
def test_the_schemas_notice_a_mistake(run_file, field):
    job = planned(job_spec(run_file))[-1]
    the_pod(job)[field] = "Never"
    with pytest.raises(Exception, match=r"Never|restartPolicyy"):
        validate(job, VERSIONS[0])


def test_the_operators_schemas_notice_a_mistake(run_file):
    jobset = planned(job_spec(run_file), kind="jobset")[-1]
    jobset["spec"]["failurePolicyy"] = {}
    with pytest.raises(Exception, match="failurePolicyy"):
        validate_custom(jobset)


@pytest.mark.parametrize("kind", KINDS)
def test_pods_are_restricted(run_file, kind):
    for manifests in (objects(everything(run_file, kind).text()), planned(job_spec(run_file), kind=kind)):
        assert violations(the_pod(manifests)) == []
        assert set(found(manifests, "automountServiceAccountToken")) == {False}
        assert set(found(manifests, "readOnlyRootFilesystem")) == {True}


def test_each_rule_of_the_restricted_standard_is_looked_at(run_file):
    pod = the_pod(planned(job_spec(run_file)))
    for broken, complaint in broken_pods(pod):
        assert any(complaint in line for line in violations(broken)), complaint


def broken_pods(pod):
    """Pods that break one rule each, with what is to be said of them."""
    container = ("containers", 0)
    security, own = ("securityContext",), (*container, "securityContext")
    for path, value, complaint in [
        (("hostNetwork",), True, "hostNetwork"),
        (("hostPID",), True, "hostPID"),
        (("hostIPC",), True, "hostIPC"),
        (("volumes",), [{"name": "host", "hostPath": {"path": "/"}}], "volume host"),
        ((*security, "sysctls"), [{"name": "kernel.msgmax", "value": "1"}], "sysctl"),
        ((*security, "windowsOptions"), {"hostProcess": True}, "hostProcess"),
        ((*security, "appArmorProfile"), {"type": "Unconfined"}, "AppArmor"),
        ((*security, "seLinuxOptions"), {"type": "spc_t"}, "SELinux"),
        ((*own, "seLinuxOptions"), {"role": "system_r"}, "SELinux"),
        ((*security, "seccompProfile"), {"type": "Unconfined"}, "no seccomp"),
        ((*security, "seccompProfile"), None, "seccomp is not set"),
        ((*security, "runAsNonRoot"), None, "runAsNonRoot is not set"),
        ((*own, "runAsNonRoot"), False, "may run as root"),
        ((*security, "runAsUser"), 0, "runs as root"),
        ((*own, "privileged"), True, "privileged"),
        ((*own, "procMount"), "Unmasked", "procMount"),
        ((*own, "allowPrivilegeEscalation"), None, "privileges"),
        ((*own, "capabilities"), {"drop": ["NET_RAW"]}, "capabilities"),
        ((*own, "capabilities"), {"drop": ["ALL"], "add": ["SYS_PTRACE"]}, "capabilities"),
        ((*container, "ports"), [{"containerPort": 1, "hostPort": 1}], "port of the host"),
        ((*container, "livenessProbe"), {"httpGet": {"port": 1, "host": "1.1.1.1"}}, "probe"),
        (("initContainers",), [{"name": "early"}], "early"),
    ]:
        broken = copy.deepcopy(pod)
        place = functools.reduce(lambda tree, key: tree[key], path[:-1], broken)
        place[path[-1]] = value
        if value is None:
            del place[path[-1]]
        yield broken, complaint


@pytest.mark.parametrize(("kind", "first_host"), [("job", "dialogsum-0"), ("jobset", "dialogsum-node-0-0")])
def test_pods_meet_at_the_first_ones_name(run_file, kind, first_host):
    manifests = planned(job_spec(run_file, num_nodes=2), kind=kind, runs_claim="runs")
    assert f"{first_host}.dialogsum:29500" in the_pod(manifests)["containers"][0]["args"]
    policy = next(m for m in manifests if m["kind"] == "NetworkPolicy")
    (template,) = [t for t in found(manifests, "template") if "containers" in t["spec"]]
    for chosen in [
        policy["spec"]["podSelector"]["matchLabels"],
        *found(policy["spec"]["ingress"], "matchLabels"),
    ]:
        assert chosen.items() <= template["metadata"]["labels"].items()


def test_a_headless_service_names_the_pods_of_a_plain_job(run_file):
    manifests = planned(job_spec(run_file))
    service = next(m for m in manifests if m["kind"] == "Service")
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"]
    assert the_pod(manifests)["subdomain"] == service["metadata"]["name"]


def test_which_ends_of_a_pod_count(run_file):
    job = planned(job_spec(run_file, num_nodes=3), runs_claim="runs", restarts=2)[-1]["spec"]
    assert job["backoffLimit"] == 6
    rules = job["podFailurePolicy"]["rules"]
    assert [rule["action"] for rule in rules] == ["Ignore", "Ignore", "FailJob"]
    assert rules[0]["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert [rule["onExitCodes"]["values"] for rule in rules[1:]] == [[75], [1, 2]]


def test_the_run_files_text_is_named_by_its_content(run_file):
    first = planned(job_spec(run_file))
    run_file.write_text(RUN + "# changed\n")
    second = planned(job_spec(run_file))
    names = [
        next(m["metadata"]["name"] for m in each if m["kind"] == "ConfigMap") for each in (first, second)
    ]
    assert names[0] != names[1]
    assert [*found(the_pod(second), "configMap")] == [{"name": names[1]}]
    assert [*found(second, "run.yaml")] == [RUN + "# changed\n"]


@pytest.mark.parametrize(
    ("folder", "mounted"), [("runs/x", "/work"), ("/data/runs/x", "/data/runs"), ("x", "/work")]
)
def test_the_runs_volume_is_where_the_run_folder_lies(run_file, folder, mounted):
    container = the_pod(planned(job_spec(run_file, [f"run.folder={folder}"])))["containers"][0]
    assert container["workingDir"] == mounted
    assert {"name": "runs", "mountPath": mounted} in container["volumeMounts"]


@pytest.mark.parametrize(("folder", "place"), [("runs/x", "/work"), ("/data/runs/x", "/data/runs")])
def test_what_comes_from_the_hub_is_kept_on_the_runs_volume(run_file, folder, place):
    container = the_pod(planned(job_spec(run_file, [f"run.folder={folder}"])))["containers"][0]
    assert {"name": "HF_HOME", "value": f"{place}/.huggingface"} in container["env"]
    assert {"name": "runs", "mountPath": place} in container["volumeMounts"]


def test_a_pod_cannot_fill_its_nodes_disk(run_file):
    """A full node evicts with DisruptionTarget, which does not count: it would go on for ever."""
    resources = the_pod(planned(job_spec(run_file), ephemeral_storage="3Gi"))["containers"][0]["resources"]
    assert resources["limits"]["ephemeral-storage"] == resources["requests"]["ephemeral-storage"] == "3Gi"


def test_ranks_must_find_the_gpus_that_were_asked_for(run_file):
    words = the_pod(planned(job_spec(run_file, ranks_per_node=8), gpus_per_node=8))["containers"][0]["args"]
    assert words[words.index("--gpus") + 1] == "8"


def test_cpus_ask_for_no_gpu(run_file):
    text = plan(job_spec(run_file, ranks_per_node=4), options(gpus_per_node=0)).text()
    assert "nvidia" not in text
    assert "--gpus" not in text
    assert the_pod(objects(text))["containers"][0]["args"][3] == "4"


# Hostile values


HOSTILE = [
    "plain",
    "two  spaces ",
    'it\'s "quoted" \\ and `ticks`',
    "$HOME $(HOME) $$(HOME) $$ $(",
    "a\nb\n\n c\t\r\n",
    "naïve 漢字 🙂 \u2028 \x85 \ufeff \xa0",
    "- a: {b} # c",
    *("yes", "null", "1e3", "0o7", "0x1f", "1_000", "12:30:45", "~", "=", ".inf", "2024-01-01", "<<", "*a"),
]


def as_kubectl_reads(text):
    """kubectl's own parser on a manifest, without a cluster."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed")
    words = ["kubectl", "label", "--local", "--filename=-", "read=yes", "--output=json"]
    done = subprocess.run(words, input=text, capture_output=True, encoding="utf-8", check=True)
    decoder, rest = json.JSONDecoder(), done.stdout.strip()
    while rest:
        manifest, end = decoder.raw_decode(rest)
        yield manifest
        rest = rest[end:].lstrip()


@pytest.mark.parametrize("value", HOSTILE)
def test_any_value_arrives_as_it_was_written(run_file, value):
    run_file.write_text(RUN + f"# {value.splitlines()[0]}\n", newline="")
    spec = job_spec(run_file, [f"mlflow.experiment={value}", f"data.prompt={value}"])
    manifests = list(as_kubectl_reads(plan(spec, options()).text()))
    words = [expanded(word, {"HOME": "WRONG"}) for word in the_pod(manifests)["containers"][0]["args"]]
    assert words[-4:] == ["train", "/config/run.yaml", f"mlflow.experiment={value}", f"data.prompt={value}"]
    assert [*found(manifests, "run.yaml")] == [run_file.read_bytes().decode()]


def test_a_run_file_with_any_name_and_line_ends(tmp_path):
    path = tmp_path / 'it\'s a "run" $(HOME) 漢字\n.yaml'
    path.write_bytes(RUN.replace("\n", "\r\n").encode() + b"# trailing   \r\n\r\n")
    manifests = list(as_kubectl_reads(plan(job_spec(path), options()).text()))
    assert [*found(manifests, "run.yaml")] == [path.read_bytes().decode()]
    assert "HOME)" not in str(the_pod(manifests))


# Secrets


@pytest.mark.parametrize("kind", KINDS)
def test_no_value_of_a_variable_is_in_a_manifest(run_file, kind, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_very-secret")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "also-secret")
    text = everything(run_file, kind).text()
    assert "secret-" not in text
    assert "very-secret" not in text
    assert "also-secret" not in text
    assert [*found(objects(text), "secretKeyRef")] == [
        {"name": "hub", "key": "HF_TOKEN"},
        {"name": "hub", "key": "MLFLOW_TRACKING_PASSWORD"},
    ]


def test_a_secret_without_names_is_given_whole(run_file):
    container = the_pod(planned(job_spec(run_file), env_secret="hub"))["containers"][0]
    assert container["envFrom"] == [{"secretRef": {"name": "hub"}}]


# What is refused


@pytest.mark.parametrize(("wish", "name"), [("My_Run", "my-run"), ("a", "a"), ("run-7", "run-7")])
def test_a_name_that_differs_in_case_and_underscores_is_taken(run_file, wish, name):
    assert plan(job_spec(run_file, [f"run.folder=runs/{wish}"]), options()).name == name


@pytest.mark.parametrize("wish", ["a b", "7b", "-a", "a-", "a.b", "naïve", "$(HOME)", "a\nb", "x" * 62])
@pytest.mark.parametrize("kind", KINDS)
def test_other_names_are_refused(run_file, wish, kind):
    spec = job_spec(run_file, [f"run.folder=runs/{wish}"])
    with pytest.raises(LaunchError, match=r"Kubernetes expects .*--name") as refused:
        plan(spec, options(kind=kind))
    assert len(str(refused.value).splitlines()) == 1


def test_the_longest_name_counts_what_the_pods_add(run_file):
    spec = job_spec(run_file, num_nodes=12)
    for kind, longest in (("job", 60), ("jobset", 47), ("trainjob", 47)):
        assert plan(spec, options(kind=kind, name="x" * longest, runs_claim="r")).name == "x" * longest
        with pytest.raises(LaunchError, match=f"at most {longest}"):
            plan(spec, options(kind=kind, name="x" * (longest + 1), runs_claim="r"))


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"image": ""}, "--image: ''"),
        ({"image": "a b"}, "--image: 'a b'"),
        ({"kind": "pod"}, "--kind: pod: expected job, jobset, trainjob"),
        ({"namespace": "Bad_One"}, "--namespace: 'Bad_One'"),
        ({"namespace": "a.b"}, "--namespace: 'a.b'"),
        ({"memory": "16 GB"}, "--memory: '16 GB'"),
        ({"memory": "0Gi"}, "--memory: '0Gi'"),
        ({"cpu": "-1"}, "--cpu: '-1'"),
        ({"shm": "2GB"}, "--shm: '2GB'"),
        ({"memory": "1Gi"}, "--shm: 2Gi: expected at most --memory, 1Gi, a part of which it is"),
        ({"memory": "1.5G", "shm": "1536Mi"}, "--shm: 1536Mi: expected at most --memory, 1.5G, a part"),
        ({"restarts": -1}, "--restarts: -1"),
        ({"kind": "trainjob", "ttl_seconds": 5}, "--ttl-seconds: a TrainJob cannot be deleted by itself"),
        ({"gpus_per_node": -1}, "--gpus-per-node: -1"),
        ({"user_id": 0}, "--user-id: 0"),
        ({"env_secret": "a/b"}, "--env-secret: 'a/b'"),
        ({"mount": (Mount("A", "/a"),)}, "--mount: 'A'"),
        ({"mount": (Mount("a", "/tmp"),)}, "/tmp: two volumes"),
        ({"mount": (Mount("a", "/work/"),)}, "/work: two volumes"),
        ({"node_selector": (("a b", "c"),)}, "--node-selector: 'a b'"),
        ({"node_selector": (("a", "c d"),)}, "--node-selector: 'c d'"),
        ({"toleration": (Toleration("a\nb"),)}, "--toleration: 'a\\\\nb'"),
        ({"spread": "a b"}, "--spread: 'a b'"),
        ({"ephemeral_storage": "8 GB"}, "--ephemeral-storage: '8 GB'"),
        ({"resource": (("rdma/hca", "some"),)}, "--resource: 'some'"),
        ({"resource": (("rdma hca", "1"),)}, "--resource: 'rdma hca'"),
        ({"resource": (("nvidia.com/gpu", "1"),)}, "--resource: nvidia.com/gpu: is asked for already"),
        ({"resource": (("rdma/hca", "1.5"),)}, "--resource: rdma/hca=1.5: expected a whole number"),
        ({"resource": (("rdma/hca", "1500m"),)}, "--resource: rdma/hca=1500m: expected a whole number"),
        ({"resource": (("foo", "1"),)}, "--resource: 'foo': expected DOMAIN/NAME, such as rdma/hca"),
        ({"gpu_resource": "gpu"}, "--gpu-resource: 'gpu': expected DOMAIN/NAME"),
        ({"user_id": 2**31}, "--user-id: 2147483648: expected at most 2147483647"),
        ({"set_env": (("A", "1"), ("A", "2"))}, "--set-env: A: is given twice"),
        ({"node_selector": (("a", "1"), ("a", "2"))}, "--node-selector: a: is given twice"),
        ({"annotation": (("a", "1"), ("a", "2"))}, "--annotation: a: is given twice"),
        *(
            ({"mount": (Mount("a", path),)}, f"^{path.rstrip('/') or '/'}: a volume there would hide")
            for path in ("/", "//", "/etc", "/usr/", "/usr/local/lib/x", "/dev/x", "/a/../sys", "/src")
        ),
        ({"annotation": (("a b", ""),)}, "--annotation: 'a b'"),
        ({"set_env": (("a-b", ""),)}, "--set-env: 'a-b': expected the name"),
        ({"set_env": (("HF_TOKEN", "x"),)}, "--set-env: HF_TOKEN: its value belongs into a Secret"),
        ({"set_env": (("DB_PASS", "x"),)}, "--set-env: DB_PASS: its value belongs into a Secret"),
        ({"set_env": (("URI", "postgresql://db/x?password=y"),)}, "--set-env: URI: its value belongs into"),
        ({"set_env": (("HTTPS_PROXY", "http://me:pw@x"),)}, "--set-env: HTTPS_PROXY: its value belongs into"),
    ],
)
def test_what_kubernetes_would_refuse_is_refused_in_one_line(run_file, changes, line):
    with pytest.raises(LaunchError, match=line) as refused:
        plan(job_spec(run_file), options(**changes))
    assert len(str(refused.value).splitlines()) == 1


def test_all_mistakes_are_told_at_once(run_file):
    with pytest.raises(LaunchError) as refused:
        plan(job_spec(run_file), options(image="", namespace="A", cpu="x"))
    assert len(str(refused.value).splitlines()) == 3


@pytest.mark.parametrize("folder", ["/x", "../x", "/", "runs/../../x", "/etc/x", "/usr/local/runs/x"])
def test_a_run_folder_that_no_volume_can_hold_is_refused(run_file, folder):
    with pytest.raises(LaunchError, match="run"):
        plan(job_spec(run_file, [f"run.folder={folder}"]), options(name="x"))


def test_several_nodes_need_a_volume_that_they_share(run_file):
    with pytest.raises(LaunchError, match="--runs-claim: needed with 2 nodes"):
        plan(job_spec(run_file, num_nodes=2), options())


def test_a_variable_has_one_value(run_file):
    spec = job_spec(run_file, variables=["HF_HOME"])
    with pytest.raises(LaunchError, match="--env: HF_HOME: is set already"):
        plan(spec, options(env_secret="hub"))


def test_a_variable_that_is_named_twice_is_given_once(run_file):
    manifests = planned(job_spec(run_file, variables=["A", "B", "A"]), env_secret="hub")
    assert [each["key"] for each in found(manifests, "secretKeyRef")] == ["A", "B"]


def test_all_of_a_pods_memory_may_be_shared(run_file):
    plan(job_spec(run_file), options(memory="1.5Gi", shm="1536Mi"))


def test_huge_pages_are_an_amount_of_memory(run_file):
    resources = the_pod(planned(job_spec(run_file), resource=(("hugepages-2Mi", "1.5Gi"),)))["containers"][0]
    assert resources["resources"]["limits"]["hugepages-2Mi"] == "1.5Gi"


def test_values_of_variables_need_a_secret(run_file):
    with pytest.raises(LaunchError, match=r"--env: HF_TOKEN: .*--env-secret"):
        plan(job_spec(run_file, variables=["HF_TOKEN"]), options())


# The command, and kubectl


@pytest.fixture
def app():
    import typer

    from launcher.kubernetes.cli import add_to

    app = typer.Typer()
    add_to(app)
    app.command("other")(lambda: None)
    return app


@pytest.fixture
def kubectl(tmp_path, monkeypatch):
    """A kubectl that notes its words and input, and says what a test wants for its first word."""
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / "kubectl"
    program.write_text(
        "#!/bin/sh\n"
        f'cd {folder}; printf "%s\\n" "$*" >> words\n'
        'if [ "$1" = apply ]; then cat > applied; fi\n'
        'if [ -f "$1.says" ]; then cat "$1.says"; fi\n'
        'if [ -f "$1.fails" ]; then cat "$1.fails" >&2; exit 1; fi\n'
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


def test_dry_run_prints_what_is_applied(app, run_file, kubectl):
    words = ["k8s", str(run_file), "train.epochs=3", "--image", IMAGE, "--nodes", "2", "--runs-claim", "runs"]
    words += ["--gpus-per-node", "8", "--mount", "data:/data:ro", "--toleration", "a=b:NoSchedule"]
    words += ["--node-selector", "c=d", "--kind", "jobset", "--resource", "rdma/hca=1"]
    words += ["--annotation", "a=b=c", "--set-env", "NCCL_DEBUG=INFO", "--set-env", "HF_HOME=/data/hub"]
    printed = CliRunner().invoke(app, [*words, "--dry-run"], catch_exceptions=False)
    assert not (kubectl / "words").exists()
    (kubectl / "apply.says").write_text("jobset created\n")
    assert CliRunner().invoke(app, words, catch_exceptions=False).output == "jobset created\n"
    assert (kubectl / "applied").read_text() == printed.output
    pod = the_pod(objects(printed.output))
    assert pod["tolerations"] == [{"key": "a", "operator": "Equal", "value": "b", "effect": "NoSchedule"}]
    assert pod["nodeSelector"] == {"c": "d"}
    assert [*found(objects(printed.output), "annotations")] == [{"a": "b=c"}]
    (container,) = pod["containers"]
    assert container["resources"]["requests"]["rdma/hca"] == container["resources"]["limits"]["rdma/hca"] == 1
    given = {each["name"]: each["value"] for each in container["env"]}
    assert (given["NCCL_DEBUG"], given["HF_HOME"]) == ("INFO", "/data/hub")
    assert pod["volumes"][-1]["persistentVolumeClaim"] == {"claimName": "data", "readOnly": True}


@pytest.mark.parametrize(
    "word",
    ["--mount=data", "--mount=a:b", "--toleration=:x", "--node-selector=a", "--set-env=A", "--resource=a"],
)
def test_an_option_that_is_no_option_is_refused(app, run_file, word):
    ended = CliRunner().invoke(app, ["k8s", str(run_file), "--image", IMAGE, word])
    assert isinstance(ended.exception, LaunchError)
    assert str(ended.exception).startswith(word.partition("=")[0])


@pytest.mark.parametrize(("words", "said"), [([], 1), (["--runs-claim=runs"], 0)])
def test_a_run_folder_that_is_lost_with_its_pod_is_told_of(app, run_file, words, said):
    words = ["k8s", str(run_file), "--image", IMAGE, "--dry-run", *words]
    printed = CliRunner().invoke(app, words, catch_exceptions=False)
    assert printed.stderr.count("no --runs-claim: the run folder and its checkpoints are lost") == said
    assert len(printed.stderr.splitlines()) == said
    check_objects(objects(printed.stdout))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--ranks-per-node=4"], "--ranks-per-node: 4: a node's 1 GPUs have a rank each; on CPUs say"),
        (["--ranks-per-node=4", "--gpus-per-node=8"], "--ranks-per-node: 4: a node's 8 GPUs"),
        (["--ranks-per-node=0"], "--ranks-per-node: 0: a node's 1 GPUs"),
        (["--ranks-per-node=0", "--gpus-per-node=0"], "--ranks-per-node: 0: expected at least 1"),
        (["--gpus-per-node=-1"], "--gpus-per-node: -1: expected at least 0"),
    ],
)
def test_ranks_that_contradict_the_gpus_are_refused(app, run_file, words, said):
    ended = CliRunner().invoke(app, ["k8s", str(run_file), "--image", IMAGE, *words])
    assert isinstance(ended.exception, LaunchError)
    assert str(ended.exception).startswith(said)
    assert len(str(ended.exception).splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "ranks"), [([], "1"), (["--ranks-per-node=4"], "4"), (["--ranks-per-node=1"], "1")]
)
def test_without_gpus_a_pod_has_the_ranks_that_were_asked_for(app, run_file, words, ranks):
    words = ["k8s", str(run_file), "--image", IMAGE, "--gpus-per-node=0", "--dry-run", *words]
    printed = CliRunner().invoke(app, words, catch_exceptions=False).stdout
    assert the_pod(objects(printed))["containers"][0]["args"][3] == ranks


def test_a_job_that_is_there_is_not_submitted_again(run_file, kubectl):
    (kubectl / "get.says").write_text("job.batch/dialogsum\n")
    with pytest.raises(LaunchError, match="dialogsum: is in namespace training already"):
        backend.submit(plan(job_spec(run_file), options()))
    assert not (kubectl / "applied").exists()


def test_a_job_is_not_submitted_while_pods_of_a_cancelled_one_write_their_checkpoint(run_file, kubectl):
    program = kubectl / "kubectl"
    program.write_text(program.read_text() + '[ "$2" != pods ] || echo pod/dialogsum-0-abcde\n')
    with pytest.raises(
        LaunchError, match="its pods still write their checkpoint: pod/dialogsum-0-a"
    ) as refused:
        backend.submit(plan(job_spec(run_file), options()))
    assert len(str(refused.value).splitlines()) == 1
    assert not (kubectl / "applied").exists()
    asked = (kubectl / "words").read_text().splitlines()[-1]
    assert (
        "--namespace=training --selector=app.kubernetes.io/name=prefix-ds,app.kubernetes.io/instance="
        in asked
    )
    assert asked.endswith("--field-selector=status.phase!=Succeeded,status.phase!=Failed --output=name")


def test_anothers_service_of_the_same_name_is_left_alone(run_file, kubectl):
    program = kubectl / "kubectl"
    program.write_text(
        program.read_text() + '[ "$2" != services,networkpolicies,serviceaccounts ] || echo service/x\n'
    )
    with pytest.raises(LaunchError, match="service/x: is not a job's of ours"):
        backend.submit(plan(job_spec(run_file), options()))
    assert not (kubectl / "applied").exists()


def test_what_kubectl_complains_about_is_told(run_file, kubectl):
    (kubectl / "apply.fails").write_text("a warning\nerror: connection refused\n")
    with pytest.raises(LaunchError, match="kubectl apply: error: connection refused"):
        backend.submit(plan(job_spec(run_file), options()))


def test_status_and_cancel_ask_for_kinds_that_the_cluster_knows(kubectl):
    (kubectl / "api-resources.says").write_text("configmaps\npods\njobs.batch\nservices\n")
    (kubectl / "delete.says").write_text("job deleted\n")
    (kubectl / "get.says").write_text("my-run Running\n")
    assert backend.status("my-run", "training") == "my-run Running\n"
    assert backend.cancel("my-run", "training") == "job deleted\n"
    picked = (
        "--namespace=training --selector=app.kubernetes.io/name=prefix-ds,app.kubernetes.io/instance=my-run"
    )
    assert (kubectl / "words").read_text().splitlines()[1::2] == [
        f"get jobs.batch,pods {picked} --output=wide",
        f"delete jobs.batch,services,configmaps {picked} --wait=false",
    ]


@pytest.mark.parametrize(("ask", "word"), [(backend.status, "get"), (backend.cancel, "delete")])
def test_an_api_that_is_down_keeps_nobody_from_status_and_cancel(kubectl, ask, word):
    """kubectl tells of all the others, and ends with 1."""
    (kubectl / "api-resources.fails").write_text("error: unable to retrieve ...: metrics.k8s.io/v1beta1\n")
    with pytest.raises(LaunchError, match=r"kubectl api-resources: error: .*metrics\.k8s\.io"):
        ask("my-run", "training")
    (kubectl / "api-resources.says").write_text("jobs.batch\n")
    (kubectl / f"{word}.says").write_text("my-run\n")
    assert ask("my-run", "training") == "my-run\n"


def test_how_long_a_trainjob_may_take_is_said_to_it(run_file):
    *_, runtime, job = planned(job_spec(run_file), kind="trainjob", deadline_seconds=60)
    assert job["spec"]["activeDeadlineSeconds"] == 60
    assert not [*found(runtime, "activeDeadlineSeconds")]


@pytest.mark.parametrize("ask", [backend.status, backend.cancel])
def test_a_job_that_is_not_there_is_told(kubectl, ask):
    (kubectl / "delete.says").write_text("No resources found\n")
    with pytest.raises(LaunchError, match="my-run: no such job in namespace training"):
        ask("my-run", "training")


def test_logs_name_their_pod(kubectl, capfd):
    (kubectl / "logs.says").write_text("[pod/my-run-0-abcde/node] [my-run-0:0] step 1\n")
    assert backend.logs("my-run", "training", follow=True) == 0
    assert "step 1" in capfd.readouterr().out
    assert "--prefix" in (kubectl / "words").read_text()


def test_without_kubectl_one_line_says_so(monkeypatch):
    monkeypatch.setenv("PATH", "")
    for ask in (backend.status, backend.logs):
        with pytest.raises(LaunchError, match="kubectl: not found"):
            ask("my-run", "training")


# The folder k8s/


def rendered(folder):
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed")
    done = subprocess.run(
        ["kubectl", "kustomize", folder], capture_output=True, encoding="utf-8", check=False
    )
    assert done.returncode == 0, done.stderr
    return objects(done.stdout)


def by_kind(manifests):
    return {(m["kind"], m["metadata"]["name"]): m for m in manifests}


def example(num_nodes=1, ranks_per_node=1, overrides=(), **changes):
    spec = job_spec(K8S / "run.yaml", overrides, num_nodes=num_nodes, ranks_per_node=ranks_per_node)
    changes = {"gpus_per_node": ranks_per_node} | changes
    return plan(spec, KubernetesOptions(**(vars(EXAMPLE) | changes)))


def test_base_is_what_the_launcher_prints_for_the_readmes_example(app, monkeypatch):
    assert (K8S / "base/train.yaml").read_text() == example().text()
    readme = (K8S / "README.md").read_text()
    command = readme.partition("```\nprefix-launch k8s k8s/run.yaml")[2].partition("```")[0]
    words = command.replace("\\\n", " ").partition("--dry-run")[0].split()
    monkeypatch.chdir(ROOT)
    printed = CliRunner().invoke(app, ["k8s", "k8s/run.yaml", *words, "--dry-run"], catch_exceptions=False)
    assert printed.output == example().text()


BIG = {"ranks_per_node": 8, "memory": "128Gi", "shm": "16Gi"}
SPOT = {
    "node_selector": (("example.com/capacity", "spot"),),
    "toleration": (Toleration("example.com/spot", effect="NoSchedule"),),
    "restarts": 100,
    "grace_seconds": 25,
    "overrides": ["run.save_every=5"],
}


@pytest.mark.parametrize(
    ("overlay", "same"),
    [
        ("single-node", BIG),
        ("multi-node", BIG | {"num_nodes": 4}),
        ("spot", BIG | SPOT | {"num_nodes": 4}),
    ],
)
def test_an_overlay_is_what_the_launcher_prints_with_its_options(overlay, same):
    assert by_kind(rendered(K8S / "overlays" / overlay)) == by_kind(objects(example(**same).text()))


@pytest.mark.parametrize(
    "path",
    [*sorted(K8S.glob("overlays/*")), K8S / "base", K8S / "mlflow", K8S / "shell"],
    ids=lambda p: p.name,
)
def test_what_kustomize_renders_is_valid_and_restricted(path):
    manifests = rendered(path)
    check_objects(manifests)
    assert violations(the_pod(manifests)) == []
    assert set(found(manifests, "readOnlyRootFilesystem")) == {True}
    names = {(m["kind"], m["metadata"]["name"]) for m in manifests}
    for config_map in found(the_pod(manifests), "configMap"):
        assert ("ConfigMap", config_map["name"]) in names
    for account in found(manifests, "serviceAccountName"):
        assert ("ServiceAccount", account) in names


def test_the_readme_names_every_manifest_with_the_registry_in_it():
    files = [path for path in K8S.rglob("*.yaml") if "registry.example" in path.read_text()]
    told = (K8S / "README.md").read_text().partition("sed -i ")[2].partition("```")[0]
    assert {str(path.relative_to(ROOT)) for path in files} == {
        word for word in told.split() if "/" in word and word.endswith(".yaml")
    }


def test_the_image_has_what_nccl_loads_for_infiniband():
    assert "libibverbs1 ibverbs-providers" in (K8S / "Dockerfile").read_text()


def test_the_cluster_folder_is_valid():
    check_objects(rendered(K8S / "cluster"))
    assert (
        rendered(K8S / "cluster")[0]["metadata"]["labels"]["pod-security.kubernetes.io/enforce"]
        == "restricted"
    )


def test_help_loads_nothing_heavy():
    program = (
        "import sys, typer; from launcher.kubernetes.cli import add_to\n"
        "app = typer.Typer(); add_to(app)\n"
        "app(['--help'], standalone_mode=False)\n"
        "print('LOADED', [n for n in ('torch', 'yaml', 'pydantic') if n in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout.strip().splitlines()[-1] == "LOADED []", done.stdout
