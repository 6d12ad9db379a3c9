"""What a node has: versions, files, addresses, a free port. Asked before any process starts.

Knows nothing of jobs.
"""

import glob
import hashlib
import ipaddress
import itertools
import os
import platform
import re
import shutil
import socket
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from prefix_ds.errors import LaunchError

_DEVICE = re.compile(r"\d+|(GPU|MIG)-.+")  # as CUDA names one
_OUTSIDE = (
    "192.0.2.1",
    "2001:db8::1",
)  # nobody's, by RFC 5737 and 3849: what is sent there takes the way out
_PACKAGES = ("torch", "deepspeed", "transformers", "prefix-ds")


def versions() -> dict[str, str]:
    """Of Python and the packages that must be alike on all nodes. Nothing is imported."""
    return {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def digest(file: Path) -> str | None:
    """Of a file's bytes; None: it cannot be read."""
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError:
        return None


def differences(
    hello: Mapping[str, Any], first: Mapping[str, Any], first_name: str, run_file: str, mine: str | None
) -> Iterator[str]:
    """In what a node's hello is not like the first node's; `mine`: the digest of the run file here."""
    if hello["run_file"] != mine:
        what = "is not there" if hello["run_file"] is None else "is another file than here"
        yield f"{run_file}: {what}"
    for package, found in hello["versions"].items():
        expected = first["versions"][package]
        if found != expected:
            yield f"{package} {found}, but {first_name} has {expected}"


def files(paths: list[str]) -> dict[str, str | None]:
    """For each path or glob a hash of the names and sizes of files there and below; None: there is none."""
    return {path: _names_and_sizes(Path(path).expanduser()) for path in paths}


def _names_and_sizes(path: Path) -> str | None:
    found = [path] if path.exists() else sorted(map(Path, glob.glob(str(path), recursive=True)))  # noqa: PTH207
    if not found:
        return None
    lines = [f"{p.relative_to(top.parent)} {p.stat().st_size}\n" for top in found for p in _files_of(top)]
    return hashlib.sha256("".join(lines).encode(errors="surrogateescape")).hexdigest()


def _files_of(path: Path) -> list[Path]:
    return sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]


def free_gib(folder: Path) -> float:
    """Of the disk a folder is on, or will be."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free / 2**30


def gpus() -> list[str]:
    """Their names, as NVIDIA's driver gives them; no library is asked."""
    texts = [path.read_text() for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))]
    return [text.partition("Model:")[2].partition("\n")[0].strip() for text in texts]


def usable_gpus(environment: Mapping[str, str]) -> int:
    """How many a program may use: all, or those that CUDA_VISIBLE_DEVICES names, until one that is none."""
    named = environment.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return len(gpus())
    return len(list(itertools.takewhile(_DEVICE.fullmatch, map(str.strip, named.split(",")))))


def own_address() -> str:
    """The one at which the other side of an ssh connection reaches this node; without one, the loopback."""
    parts = os.environ.get("SSH_CONNECTION", "").split()
    return parts[2] if len(parts) == 4 else "127.0.0.1"


def free_port(port: int | None) -> int:
    """The port, or one that is free. Raises LaunchError if it is not."""
    with socket.socket(socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET) as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind(("", port or 0))
        except OSError as error:
            raise LaunchError(f"--port: {port}: {error.strerror} on {socket.gethostname()}") from None
        return int(s.getsockname()[1])


def check_address(host: str) -> None:
    """Raises LaunchError for a name that means nothing on this node."""
    try:
        socket.getaddrinfo(host, None)
    except UnicodeError:
        raise LaunchError(f"--master: {host}: expected a name or an address") from None
    except OSError as error:
        raise LaunchError(f"--master: {host}: {error.strerror} on {socket.gethostname()}") from None


def is_loopback(host: str) -> bool:
    """Whether a name or address means every machine itself."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower().partition(".")[0] == "localhost"


def interface_towards(host: str) -> str | None:
    """The network interface through which other nodes are reached; None: it cannot be told.

    Debian gives a machine's own name the address 127.0.1.1: the way to it says nothing, so it is that to the
    outside.
    """
    mine = _address_towards(host)
    if mine is not None and is_loopback(mine):
        mine = next(filter(None, map(_address_towards, _OUTSIDE)), None)
    return None if mine is None else _interface_with(mine)


def _address_towards(host: str) -> str | None:
    """This machine's own, as the other one would see it."""
    try:
        family, *_, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as s:
            s.connect(address)  # sends nothing
            return str(s.getsockname()[0])
    except OSError:
        return None


def _interface_with(address: str) -> str | None:
    for name, addresses in psutil.net_if_addrs().items():
        if any(a.address.partition("%")[0] == address for a in addresses):
            return name
    return None
