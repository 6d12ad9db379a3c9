"""The rules of the *restricted* Pod Security Standard, as kubernetes.io lists them, over a pod's spec.

Knows nothing of what the pods are for.
"""

VOLUMES = {
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "persistentVolumeClaim",
    "projected",
    "secret",
}
SYSCTLS = {
    "kernel.shm_rmid_forced",
    "net.ipv4.ip_local_port_range",
    "net.ipv4.ip_unprivileged_port_start",
    "net.ipv4.tcp_syncookies",
    "net.ipv4.ping_group_range",
    "net.ipv4.ip_local_reserved_ports",
    "net.ipv4.tcp_keepalive_time",
    "net.ipv4.tcp_fin_timeout",
    "net.ipv4.tcp_keepalive_intvl",
    "net.ipv4.tcp_keepalive_probes",
}
SELINUX_TYPES = {"", "container_t", "container_init_t", "container_kvm_t", "container_engine_t"}
PROFILES = {"RuntimeDefault", "Localhost"}


def violations(pod):
    """A line for each rule that the pod breaks."""
    containers = [
        container
        for kind in ("initContainers", "containers", "ephemeralContainers")
        for container in pod.get(kind, [])
    ]
    return [
        *_of_pod(pod),
        *_of_security(pod.get("securityContext", {}), "pod"),
        *(line for container in containers for line in _of_container(container, pod)),
    ]


def _of_pod(pod):
    for namespace in ("hostNetwork", "hostPID", "hostIPC"):
        if pod.get(namespace):
            yield f"{namespace} is shared"
    for volume in pod.get("volumes", []):
        if not set(volume) - {"name"} <= VOLUMES:
            yield f"volume {volume['name']} is of a kind that is not allowed"
    for sysctl in pod.get("securityContext", {}).get("sysctls", []):
        if sysctl["name"] not in SYSCTLS:
            yield f"sysctl {sysctl['name']}"


def _of_security(security, who):
    """What pods and containers may say alike."""
    if security.get("windowsOptions", {}).get("hostProcess"):
        yield f"{who}: hostProcess"
    if security.get("appArmorProfile", {"type": "RuntimeDefault"})["type"] not in PROFILES:
        yield f"{who}: no AppArmor"
    selinux = security.get("seLinuxOptions", {})
    if selinux.get("type", "") not in SELINUX_TYPES or selinux.get("user") or selinux.get("role"):
        yield f"{who}: SELinux options"
    if security.get("seccompProfile", {"type": "RuntimeDefault"})["type"] not in PROFILES:
        yield f"{who}: no seccomp"
    if security.get("runAsUser") == 0:
        yield f"{who}: runs as root"
    if security.get("runAsNonRoot") is False:
        yield f"{who}: may run as root"


def _of_container(container, pod):
    own, shared = container.get("securityContext", {}), pod.get("securityContext", {})
    who, capabilities = container["name"], own.get("capabilities", {})
    yield from _of_security(own, who)
    if own.get("privileged"):
        yield f"{who}: privileged"
    if own.get("procMount", "Default") != "Default":
        yield f"{who}: procMount"
    if own.get("allowPrivilegeEscalation") is not False:
        yield f"{who}: may gain privileges"
    if "ALL" not in capabilities.get("drop", []) or set(capabilities.get("add", [])) - {"NET_BIND_SERVICE"}:
        yield f"{who}: capabilities"
    if "seccompProfile" not in own | shared:
        yield f"{who}: seccomp is not set"
    if not (own | shared).get("runAsNonRoot"):
        yield f"{who}: runAsNonRoot is not set"
    if any(port.get("hostPort") for port in container.get("ports", [])):
        yield f"{who}: a port of the host"
    yield from _of_probes(container, who)


def _of_probes(container, who):
    hooks = container.get("lifecycle", {})
    probes = [container.get(kind, {}) for kind in ("livenessProbe", "readinessProbe", "startupProbe")]
    for action in [*probes, hooks.get("postStart", {}), hooks.get("preStop", {})]:
        if any(action.get(kind, {}).get("host") for kind in ("httpGet", "tcpSocket")):
            yield f"{who}: a probe of another host"
