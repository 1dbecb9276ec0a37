"""What this machine has: one question a function, one or more findings an answer. Nothing is left behind."""

from __future__ import annotations

import fcntl
import ipaddress
import json
import os
import platform
import re
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import psutil

from maehpc.progress import human_bytes

OLDEST_PYTHON = (3, 11)
TORCH_LIMIT_S = 120.0
"""Seconds that importing PyTorch may take: from a cold parallel file system it is slow."""

LITTLE_SPACE = 20e9
LITTLE_SHARED_MEMORY = 512e6
FEW_INODES = 20_000
FEW_OPEN_FILES = 1024

NETWORK_FILE_SYSTEMS = frozenset(
    {
        *("nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "fuse.ceph", "fuse.ceph-fuse", "cifs", "smb3", "afs"),
        *("panfs", "wekafs", "orangefs", "pvfs2", "glusterfs", "fuse.glusterfs", "daos", "fuse.daos", "fuse.sshfs"),
        *("quobyte", "fuse.quobyte", "fhgfs", "gfs2", "ocfs2", "vastnfs", "fuse.juicefs", "fuse.mfs"),
    }
)
"""Types of file systems that several hosts see."""

State = Literal["ok", "warning", "problem"]

PACKAGES = (
    *("captum", "click", "h5py", "jinja2", "matplotlib", "medmnist", "nibabel", "numpy", "pandas", "pillow", "psutil"),
    *("pyarrow", "pydantic", "pyyaml", "rich", "safetensors", "scikit-learn", "scipy", "submitit", "tensorboard"),
    *("timm", "torch", "torchvision", "xarray", "zarr"),
)
"""What must be installed; an installed maehpc adds the versions. (That of a checkout may be older than its code.)"""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        topic: groups findings: python, device, machine, network, files, slurm, containers.
        name: what was looked at.
        state: ok; warning (works, or may matter); problem (something will fail).
        text: what was found.
        fix: what to do about it; "" where nothing is to be done.
    """

    topic: str
    name: str
    state: State
    text: str
    fix: str = ""


def python() -> Iterator[Finding]:
    """The interpreter and the packages, by their metadata alone."""
    found = platform.python_version()
    old = sys.version_info < OLDEST_PYTHON
    fix = "use Python 3.11 or newer" if old else ""
    yield Finding("python", "interpreter", "problem" if old else "ok", f"Python {found} at {sys.executable}", fix)
    wanted = _requirements()
    lines, missing = [], []
    for name, least in wanted:
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            missing.append(name)
            continue
        lines.append(f"{name} {version}")
        if least and _numbers(version) < _numbers(least):
            missing.append(f"{name}>={least}")
    if missing:
        text = f"missing or too old: {', '.join(missing)}"
        yield Finding("python", "packages", "problem", text, f"pip install {' '.join(repr(name) for name in missing)}")
    else:
        yield Finding("python", "packages", "ok", ", ".join(lines))


def _requirements() -> list[tuple[str, str]]:
    """Names of packages and their least versions."""
    try:
        lines = metadata.requires("maehpc") or []
    except metadata.PackageNotFoundError:
        lines = []
    found = [re.match(r"([\w.-]+)(?:.*?>=\s*([\d.]+))?", line) for line in lines if "extra" not in line]
    return list((dict.fromkeys(PACKAGES, "") | {match[1]: match[2] or "" for match in found if match}).items())


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])


_TORCH = """
import json, torch, torch.distributed as dist
there = torch.cuda.is_available()
print(json.dumps({
    "version": torch.__version__,
    "cuda": torch.version.cuda,
    "gpus": [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())] if there else [],
    "gloo": dist.is_available() and dist.is_gloo_available(),
    "nccl": ".".join(map(str, torch.cuda.nccl.version())) if there and dist.is_nccl_available() else None,
}))
"""


def devices() -> Iterator[Finding]:
    """GPUs as the driver tells them, and what PyTorch makes of them: in a process of its own, which may break."""
    driver = _driver()
    if driver:
        yield Finding("device", "GPUs", "ok", "; ".join(driver))
    else:
        yield Finding("device", "GPUs", "ok", "none on this host (a login node often has none)")
    facts = _torch()
    if isinstance(facts, str):
        fix = "install PyTorch again in this environment: https://pytorch.org/get-started"
        yield Finding("device", "PyTorch", "problem", f"cannot be imported: {facts}", fix)
        return
    kind = f"CUDA {facts['cuda']}" if facts["cuda"] else "without CUDA"
    seen = f", sees {len(facts['gpus'])} GPU{'s' * (len(facts['gpus']) != 1)}" if facts["cuda"] else ""
    text = f"{facts['version']}, {kind}{seen}"
    if driver and not facts["gpus"]:
        fix = "install a build of PyTorch for this driver's CUDA, or a newer driver"
        yield Finding("device", "PyTorch", "warning", f"{text}, though the driver shows GPUs", fix)
    else:
        yield Finding("device", "PyTorch", "ok", text)
    if not facts["gloo"]:
        fix = "install a build of PyTorch with gloo"
        yield Finding("device", "gloo", "problem", "this PyTorch cannot join ranks over gloo", fix)
    if facts["gpus"] and not facts["nccl"]:
        fix = "install a build of PyTorch with NCCL"
        yield Finding("device", "NCCL", "warning", "this PyTorch cannot join GPUs over NCCL", fix)


def _driver() -> list[str]:
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]


def _torch() -> dict[str, Any] | str:
    """What PyTorch says of itself, or why it says nothing."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            [sys.executable, "-c", _TORCH],
            capture_output=True,
            text=True,
            timeout=TORCH_LIMIT_S,
            check=False,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        return f"it took more than {TORCH_LIMIT_S:.0f} s"
    except OSError as error:
        return str(error)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return lines[-1][:300] if lines else f"its process ended with {done.returncode}"
    facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return facts


def machine() -> Iterator[Finding]:
    """Cores, memory, shared memory, open files."""
    cores, all_cores = len(os.sched_getaffinity(0)), psutil.cpu_count() or 0
    text = f"{cores} cores" + (f" of {all_cores}" if cores < all_cores else "")
    yield Finding("machine", "CPU", "ok", f"{text} ({platform.machine()})")
    memory = psutil.virtual_memory()
    limit = _memory_limit()
    total = min(memory.total, limit or memory.total)
    yield Finding("machine", "memory", "ok", f"{human_bytes(total)}, {human_bytes(memory.available)} free")
    shared = Path("/dev/shm")
    if shared.is_dir():
        room = os.statvfs(shared)
        size = room.f_blocks * room.f_frsize
        fix = "mount it larger (in a container: --shm-size, or --ipc=host)" if size < LITTLE_SHARED_MEMORY else ""
        text = f"{human_bytes(size)}" + (", which NCCL may find too little" if fix else "")
        yield Finding("machine", "/dev/shm", "warning" if fix else "ok", text, fix)
    else:
        yield Finding("machine", "/dev/shm", "warning", "there is none", "mount a tmpfs there: NCCL needs it")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < FEW_OPEN_FILES:
        fix = f"ulimit -n {FEW_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, 65536)}"
        yield Finding("machine", "open files", "warning", f"at most {soft}", f"add `{fix}` to the profile's setup")
    else:
        yield Finding(
            "machine", "open files", "ok", "unlimited" if soft == resource.RLIM_INFINITY else f"at most {soft}"
        )


def _memory_limit() -> int | None:
    """Bytes that this process's control group may use."""
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            return int(Path(path).read_text())
        except (OSError, ValueError):
            continue
    return None


@dataclass(frozen=True)
class Interface:
    """A network interface that is up and has an IPv4 address; speed in Mb/s, 0 where not told."""

    name: str
    address: str
    speed: int


def interfaces() -> list[Interface]:
    """Those that other hosts might reach, the fastest first."""
    states = psutil.net_if_stats()
    found = []
    for name, addresses in psutil.net_if_addrs().items():
        for each in addresses:
            if each.family != socket.AF_INET or not states[name].isup:
                continue
            if not ipaddress.ip_address(each.address).is_loopback:
                found.append(Interface(name, each.address, states[name].speed))
    return sorted(found, key=lambda each: (not each.name.startswith("ib"), -each.speed, each.name))


def network() -> Iterator[Finding]:
    """Interfaces, and what the host's name means."""
    found = interfaces()
    if found:
        words = [f"{each.name} {each.address}" + (f" ({each.speed} Mb/s)" if each.speed else "") for each in found]
        yield Finding("network", "interfaces", "ok", ", ".join(words))
    else:
        fix = "jobs on several hosts need a network; on one host they do not"
        yield Finding("network", "interfaces", "warning", "loopback alone", fix)
    fabric = Path("/sys/class/infiniband")
    if fabric.is_dir() and any(fabric.iterdir()):
        yield Finding("network", "InfiniBand", "ok", ", ".join(sorted(path.name for path in fabric.iterdir())))
    name = socket.gethostname()
    try:
        addresses = sorted({str(entry[4][0]) for entry in socket.getaddrinfo(name, None, socket.AF_INET)})
    except OSError:
        addresses = []
    far = [address for address in addresses if not ipaddress.ip_address(address).is_loopback]
    fix = "harmless to maehpc, which uses interfaces' addresses; other tools may need a line in /etc/hosts"
    if far:
        yield Finding("network", "host name", "ok", f"{name} is {', '.join(far)}")
    elif addresses:
        yield Finding(
            "network", "host name", "warning", f"{name} is {', '.join(addresses)}, which no other host reaches", fix
        )
    else:
        yield Finding("network", "host name", "warning", f"{name} cannot be resolved", fix)


@dataclass(frozen=True)
class Mount:
    """What a folder lies on."""

    point: Path
    kind: str
    options: tuple[str, ...]

    @property
    def is_shared(self) -> bool:
        """Whether other hosts can see it, by its type."""
        return self.kind in NETWORK_FILE_SYSTEMS


def mount_of(folder: Path, table: str | None = None) -> Mount:
    """The mount that a folder, which need not exist yet, lies on.

    Args:
        folder: absolute.
        table: text of /proc/mounts.
    """
    lines = (table if table is not None else Path("/proc/self/mounts").read_text()).splitlines()
    best = Mount(Path("/"), "unknown", ())
    for line in lines:
        _, point, kind, options, *_ = [*line.split(), "", "", "", ""]
        path = Path(re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), point))
        # The last line wins: a later mount hides an earlier one at the same place.
        if (path == folder or path in folder.parents) and len(path.parts) >= len(best.point.parts):
            best = Mount(path, kind, tuple(options.split(",")))
    return best


def nearest_folder(path: Path) -> Path:
    """The folder itself, or the closest one above it that exists."""
    path = path.absolute()
    return next((folder.resolve() for folder in (path, *path.parents) if folder.is_dir()), Path("/"))


def results_folder(results: Path, several_hosts: bool) -> Iterator[Finding]:
    """Whether results can be kept there: type of file system, what it can do, room.

    Args:
        results: the folder, which need not exist.
        several_hosts: whether there is a cluster whose hosts must see it.
    """
    folder = nearest_folder(results)
    mount = mount_of(folder)
    text = f"{folder} is on {mount.kind} ({mount.point})"
    no_locks = {"localflock", "nolock", "local_lock=all", "local_lock=flock"} & set(mount.options)
    if mount.kind in ("tmpfs", "ramfs"):
        fix = "choose --results on a disk: what lies here is gone with the machine's power"
        yield Finding("files", "results", "warning", f"{text}, which is memory", fix)
    elif mount.is_shared or not several_hosts:
        yield Finding("files", "results", "ok", text + (", which other hosts can see" if mount.is_shared else ""))
    else:
        fix = "choose --results on a file system that all hosts share, unless all of them mount this one"
        yield Finding("files", "results", "warning", f"{text}, which looks local to this host", fix)
    if no_locks and several_hosts:
        fix = (
            "locks hold on one host alone: attempts still fence each other, but run one job at a time on an experiment"
        )
        yield Finding("files", "locks", "warning", f"mounted with {', '.join(sorted(no_locks))}", fix)
    try:
        with tempfile.TemporaryDirectory(prefix=".maehpc-doctor-", dir=folder) as trial:
            failures = list(_tried(Path(trial)))
    except OSError as error:
        fix = "choose another --results, or make it writable"
        yield Finding("files", "writing", "problem", f"{folder} cannot be written: {error.strerror or error}", fix)
        return
    if failures:
        fix = "choose another file system for --results"
        yield Finding("files", "writing", "problem", f"{folder}: {'; '.join(failures)}", fix)
    else:
        yield Finding("files", "writing", "ok", "locks, exclusive links, renames and flushes work")
    yield from _room(folder)


def _tried(trial: Path) -> Iterator[str]:
    """What of the things that results rest on does not work in an empty folder."""
    one, two, gone = trial / "one", trial / "two", trial / "gone"
    one.write_bytes(b"1")
    two.write_bytes(b"2")
    with one.open("rb") as first, one.open("rb") as second:
        os.fsync(first.fileno())
        try:
            fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            yield f"flock fails ({error.strerror})"
        else:
            try:
                fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
                yield "flock lets two owners in"
            except BlockingIOError:
                pass
    try:
        os.link(one, trial / "link")
        try:
            os.link(two, trial / "link")
            yield "a hard link replaces another"
        except FileExistsError:
            pass
    except OSError as error:
        yield f"hard links fail ({error.strerror})"
    two.replace(one)
    if one.read_bytes() != b"2":
        yield "a rename does not replace"
    (trial / "folder").mkdir()
    (trial / "folder").rename(gone)
    descriptor = os.open(trial, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        yield f"a folder cannot be flushed ({error.strerror})"
    finally:
        os.close(descriptor)


def _room(folder: Path) -> Iterator[Finding]:
    room = os.statvfs(folder)
    free = room.f_bavail * room.f_frsize
    fix = "free some space: a checkpoint of a large encoder takes gigabytes" if free < LITTLE_SPACE else ""
    yield Finding("files", "free space", "warning" if fix else "ok", human_bytes(free), fix)
    if room.f_files:  # 0 where the file system counts none
        fix = "delete files: a store takes some twenty a shard" if room.f_favail < FEW_INODES else ""
        yield Finding("files", "free inodes", "warning" if fix else "ok", f"{room.f_favail}", fix)


def containers() -> Iterator[Finding]:
    """What could run an image."""
    found = [name for name in ("apptainer", "singularity", "enroot") if shutil.which(name)]
    try:
        told = subprocess.run(["srun", "--help"], capture_output=True, text=True, timeout=30, check=False).stdout
        found += ["pyxis"] if "--container-image" in told else []
    except (OSError, subprocess.SubprocessError):
        pass
    yield Finding("containers", "containers", "ok", ", ".join(found) or "none here (none is needed)")
