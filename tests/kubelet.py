"""Plays what of Kubernetes runs an Indexed Job: the Job's controller, kubelet and DNS, on this machine.

    with Cluster(folder, {"runs": a_folder}) as cluster:
        job = cluster.submit(manifests)
        while job.is_running(): ...

A pod is real processes: in a network, process, mount and UTS namespace of its own, with the volumes of the
manifest at their mount paths on a read-only root, as the manifest's user without capabilities, with the
command, environment and host name that Kubernetes would give it. The *image* is this machine's system with
the virtual environment and the sources of this checkout. A pod that is replaced gets a new address, and its
name is known only while it lives. Which ends count is decided by the manifest's own policy.

Not played: scheduling, the NetworkPolicy, limits of memory, images, and the delay before a pod is replaced (a
second here, ten and more there). Needs root.

Knows nothing of training.
"""

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BRIDGE, NETWORK, PREFIX = "pds-pods", "10.214.78", "pds-pod-"
TOOLS = ("ip", "unshare", "setpriv", "chroot", "mount")
SYSTEM = ("bin", "etc", "lib", "lib64", "opt", "sbin", "sys", "usr", "dev")
UNITS = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30}
REPLACED_AFTER_SECONDS = 1.0


def missing():
    """Why pods cannot be played here; empty: they can."""
    if os.geteuid() != 0:
        return "pods need root, for namespaces and mounts"
    lacking = [tool for tool in TOOLS if shutil.which(tool) is None]
    if lacking:
        return f"pods need {', '.join(lacking)}: apt-get install iproute2 util-linux"
    tried = subprocess.run(
        ["unshare", "-m", "-n", "-p", "-u", "-f", "true"], capture_output=True, check=False
    )
    return "" if tried.returncode == 0 else "namespaces cannot be made here"


def expanded(text, variables):
    """`$$` is a dollar, `$(NAME)` the variable's value, and left as it is if there is none."""
    done, rest = "", text
    while "$" in rest:
        before, _, rest = rest.partition("$")
        done += before
        if rest.startswith("$"):
            done, rest = done + "$", rest[1:]
        elif rest.startswith("(") and ")" in rest:
            name, _, rest = rest[1:].partition(")")
            done += variables.get(name, f"$({name})")
        else:
            done += "$"
    return done + rest


def bytes_of(quantity):
    """Of `2Gi` and the like."""
    return int(quantity[:-2]) * UNITS[quantity[-2:]]


def run(*words):
    subprocess.run([*map(str, words)], check=True, capture_output=True)


@dataclass
class Pod:
    """One try of one index."""

    index: int
    number: int
    address: str
    host: str
    process: subprocess.Popen
    log: Path
    hosts_file: Path
    is_disrupted: bool = False
    is_killed: bool = False
    kill_at: float = float("inf")

    @property
    def name(self):
        return f"{PREFIX}{self.number}"

    @property
    def code(self):
        """The container's exit code, None while it runs. (unshare has no code for a child that is killed.)"""
        code = self.process.poll()
        if code is None:
            return None
        return 128 + signal.SIGKILL if self.is_killed and code == 1 else code if code >= 0 else 128 - code

    def signal(self, number):
        """To the container's first process."""
        self.is_killed |= number == signal.SIGKILL
        for pid in self.first_process():
            os.kill(pid, number)

    def first_process(self):
        """Its pid on this machine; nothing when it has ended."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(child) for child in children.read_text().split()] if self.code is None else []

    def told(self, file):
        """What the kernel tells of the first process in /proc."""
        (pid,) = self.first_process()
        return Path(f"/proc/{pid}/{file}").read_text()


@dataclass
class Job:
    """What the controller knows of a Job."""

    manifest: dict
    config_maps: dict
    cluster: "Cluster"
    pods: list = field(default_factory=list)
    done: set = field(default_factory=set)
    ended: list = field(default_factory=list)  # (index, exit code, what the policy said)
    failures: int = 0
    is_failed: bool = False
    not_before: float = 0.0

    @property
    def spec(self):
        return self.manifest["spec"]

    @property
    def pod_spec(self):
        return self.spec["template"]["spec"]

    @property
    def name(self):
        return self.manifest["metadata"]["name"]

    def is_running(self):
        """Does what the controller does now and then; whether there is more to do."""
        self._see_ends()
        self._kill_late_ones()
        if self.is_failed:
            return bool(self.pods)
        missing_ = set(range(self.spec["completions"])) - self.done - {pod.index for pod in self.pods}
        if time.monotonic() > self.not_before:
            for index in sorted(missing_):
                self.pods.append(self.cluster.start(self, index))
        return len(self.done) < self.spec["completions"]

    def disrupt(self, index, grace_seconds=None):
        """Takes a pod away as a drained node does; with a grace of 0, as one that is lost."""
        pod = next(pod for pod in self.pods if pod.index == index)
        pod.is_disrupted = True
        self._stop(
            pod, self.pod_spec["terminationGracePeriodSeconds"] if grace_seconds is None else grace_seconds
        )

    def _stop(self, pod, grace_seconds):
        pod.signal(signal.SIGTERM if grace_seconds else signal.SIGKILL)
        pod.kill_at = time.monotonic() + grace_seconds

    def _kill_late_ones(self):
        for pod in self.pods:
            if time.monotonic() > pod.kill_at and pod.code is None:
                pod.signal(signal.SIGKILL)

    def _see_ends(self):
        for pod in [pod for pod in self.pods if pod.code is not None]:
            self.pods.remove(pod)
            self.cluster.forget(pod)
            self._judge(pod)

    def _judge(self, pod):
        action = "Complete" if pod.code == 0 else action_for(self.spec, pod.code, pod.is_disrupted)
        self.ended.append((pod.index, pod.code, action))
        self.not_before = time.monotonic() + REPLACED_AFTER_SECONDS
        if action == "Complete":
            self.done.add(pod.index)
        self.failures += action == "Count"
        if (action == "FailJob" or self.failures > self.spec["backoffLimit"]) and not self.is_failed:
            self.is_failed = True
            for other in self.pods:
                self._stop(other, self.pod_spec["terminationGracePeriodSeconds"])


def action_for(spec, code, is_disrupted):
    """What the Job's podFailurePolicy says of an end: the first rule that fits, or Count."""
    for rule in spec["podFailurePolicy"]["rules"]:
        conditions = {"DisruptionTarget": "True"} if is_disrupted else {}
        if any(conditions.get(each["type"]) == each["status"] for each in rule.get("onPodConditions", [])):
            return rule["action"]
        codes = rule.get("onExitCodes")
        if codes and (code in codes["values"]) == (codes["operator"] == "In"):
            return rule["action"]
    return "Count"


class Cluster:
    """A network of pods, and the volumes that they may claim."""

    def __init__(self, folder, claims, secrets=None, image=None):
        self.folder, self.claims, self.secrets, self.image = folder, claims, secrets or {}, image or {}
        self.jobs = []
        self._count = 0

    def __enter__(self):
        self._take_down()
        run("ip", "link", "add", BRIDGE, "type", "bridge")
        run("ip", "link", "set", BRIDGE, "up")
        return self

    def __exit__(self, *_):
        for pod in [pod for job in self.jobs for pod in job.pods]:
            pod.signal(signal.SIGKILL)  # and with it ends all in its namespace
            pod.process.wait()
        self._take_down()

    def _take_down(self):
        """Also what a killed test has left."""
        listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
        for name in [line.split()[0] for line in listed.splitlines() if line.startswith(PREFIX)]:
            run("ip", "netns", "del", name)
        subprocess.run(["ip", "link", "del", BRIDGE], capture_output=True, check=False)

    def submit(self, manifests):
        """Takes what `kubectl apply` would."""
        (manifest,) = [m for m in manifests if m["kind"] == "Job"]
        assert manifest["spec"]["completionMode"] == "Indexed"
        assert manifest["spec"]["parallelism"] == manifest["spec"]["completions"]
        assert manifest["spec"]["template"]["spec"]["restartPolicy"] == "Never"
        services = [m for m in manifests if m["kind"] == "Service"]
        assert manifest["spec"]["template"]["spec"]["subdomain"] in {m["metadata"]["name"] for m in services}
        config_maps = {m["metadata"]["name"]: m["data"] for m in manifests if m["kind"] == "ConfigMap"}
        self.jobs.append(Job(manifest, config_maps, self))
        return self.jobs[-1]

    def start(self, job, index):
        """A pod for this index, with a new address."""
        self._count += 1
        name, address = f"{PREFIX}{self._count}", f"{NETWORK}.{self._count}"
        self._cable(name, f"pdspod{self._count}", address)
        folder = self.folder / name
        folder.mkdir(parents=True)
        log, hosts_file = folder / "log", folder / "hosts"
        hosts_file.touch()
        script = _script(job, index, folder, self)
        words = [
            "ip",
            "netns",
            "exec",
            name,
            "unshare",
            "--mount",
            "--uts",
            "--pid",
            "--fork",
            "--kill-child",
        ]
        with log.open("wb") as output:
            process = subprocess.Popen([*words, "sh", "-euc", script], stdout=output, stderr=output)
        pod = Pod(index, self._count, address, f"{job.name}-{index}", process, log, hosts_file)
        self._tell_names(job, [*job.pods, pod])
        return pod

    def forget(self, pod):
        """Its name and its network are gone."""
        run("ip", "netns", "del", pod.name)
        for job in self.jobs:
            self._tell_names(job, job.pods)

    def _cable(self, name, link, address):
        subprocess.run(
            ["ip", "link", "del", link], capture_output=True, check=False
        )  # of a namespace that lingers
        run("ip", "netns", "add", name)
        run("ip", "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", name)
        run("ip", "link", "set", link, "master", BRIDGE, "up")
        run("ip", "-n", name, "address", "add", f"{address}/24", "dev", "eth0")
        run("ip", "-n", name, "link", "set", "eth0", "up")
        run("ip", "-n", name, "link", "set", "lo", "up")

    def _tell_names(self, job, pods):
        """The headless Service's records, and each pod's own name as kubelet writes it, in the same file."""
        service, namespace = job.pod_spec["subdomain"], job.manifest["metadata"]["namespace"]
        records = [
            f"{pod.address} {pod.host}.{service}.{namespace}.svc.cluster.local {pod.host}.{service}"
            for pod in pods
        ]
        for pod in pods:
            lines = ["127.0.0.1 localhost", *records, f"{pod.address} {pod.host}"]
            pod.hosts_file.write_text("\n".join(lines) + "\n")  # in place: it is mounted


def _script(job, index, folder, cluster):
    """What makes the pod's root, as root, and then runs the container's command as its user."""
    pod, (container,) = job.pod_spec, job.pod_spec["containers"]
    root, quote = folder / "root", lambda path: shlex.quote(str(path))
    root.mkdir()
    security = pod["securityContext"]
    user, group = security["runAsUser"], security["runAsGroup"]
    environment = _environment(job, container, index, cluster)
    words = [expanded(word, environment) for word in [*container["command"], *container.get("args", [])]]
    setpriv = ["setpriv", f"--reuid={user}", f"--regid={group}", "--clear-groups", "--no-new-privs"]
    setpriv += ["--bounding-set=-all", "--inh-caps=-all"]
    inside = [
        "env",
        "-i",
        f"--chdir={container['workingDir']}",
        *(f"{k}={v}" for k, v in environment.items()),
    ]
    return "\n".join(
        [
            f"hostname {job.name}-{index}",
            f"mount -t tmpfs -o mode=755 tmpfs {quote(root)}",
            *_image_mounts(root, folder / "hosts"),
            *_volume_mounts(job, container, folder, root, cluster),
            f"mkdir {quote(root)}/proc && mount -t proc proc {quote(root)}/proc",
            f"mount -o remount,ro {quote(root)}"
            if container["securityContext"]["readOnlyRootFilesystem"]
            else "",
            f"exec chroot {quote(root)} {shlex.join([*setpriv, *inside, *words])}",
        ]
    )


def _environment(job, container, index, cluster):
    """The image's, the manifest's, and what Kubernetes adds."""
    environment = {"PATH": "/image/venv/bin:/usr/sbin:/usr/bin:/sbin:/bin", "PYTHONPATH": "/image/source"}
    environment |= cluster.image | {"HOSTNAME": f"{job.name}-{index}", "JOB_COMPLETION_INDEX": str(index)}
    for each in container["env"]:
        reference = each.get("valueFrom", {}).get("secretKeyRef")
        value = cluster.secrets[reference["name"]][reference["key"]] if reference else each["value"]
        environment[each["name"]] = value if reference else expanded(value, environment)
    return environment


def _image_mounts(root, hosts_file):
    bound = {f"/{name}": f"/{name}" for name in SYSTEM}
    bound |= {sys.prefix: "/image/venv", str(ROOT): "/image/source"}
    if not sys.base_prefix.startswith("/usr"):
        bound[sys.base_prefix] = sys.base_prefix
    for source, target in bound.items():
        if Path(source).exists():
            yield _bound(source, f"{root}{target}", "rbind" if source in ("/dev", "/sys") else "bind,ro")
    yield f"mount -o bind {shlex.quote(str(hosts_file))} {shlex.quote(str(root))}/etc/hosts"


def _bound(source, target, how):
    target = shlex.quote(str(target))
    return f"mkdir -p {target} && mount -o {how} {shlex.quote(str(source))} {target}"


def _volume_mounts(job, container, folder, root, cluster):
    volumes = {volume["name"]: volume for volume in job.pod_spec["volumes"]}
    for mount in container["volumeMounts"]:
        volume, target = volumes[mount["name"]], f"{root}{mount['mountPath']}"
        if volume.get("emptyDir", {}).get("medium") == "Memory":
            size = bytes_of(volume["emptyDir"]["sizeLimit"])
            place = shlex.quote(target)
            yield f"mkdir -p {place} && mount -t tmpfs -o size={size},mode=1777 tmpfs {place}"
        else:
            source = _volume_folder(job, volume, folder, cluster)
            yield _bound(source, target, "bind,ro" if mount.get("readOnly") else "bind")


def _volume_folder(job, volume, folder, cluster):
    """On this machine; it belongs to the pod's group, as fsGroup asks."""
    if "configMap" in volume:
        source = folder / volume["name"]
        source.mkdir()
        for name, text in job.config_maps[volume["configMap"]["name"]].items():
            (source / name).write_bytes(text.encode())
        return source
    if "persistentVolumeClaim" in volume:
        source = cluster.claims[volume["persistentVolumeClaim"]["claimName"]]
    else:
        source = folder / volume["name"]
        source.mkdir()
    run("chgrp", "-R", job.pod_spec["securityContext"]["fsGroup"], source)
    run("chmod", "-R", "g+rwX", source)
    return source


@contextlib.contextmanager
def showing_logs(job, folder):
    """Adds what the pods have said to an error."""
    try:
        yield
    except AssertionError as error:
        told = [f"{path}:\n{path.read_text()[-2500:]}" for path in sorted(folder.glob(f"{PREFIX}*/log"))]
        raise AssertionError("\n".join([str(error), str(job.ended), *told])) from error
