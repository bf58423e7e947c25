"""What this machine is: its processor, cores and memory, and the limits a container sets."""

from __future__ import annotations

import hashlib
import math
import os
import platform
from dataclasses import dataclass
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
_ARM = ("aarch64", "arm64", "armv8l")
_X86 = ("x86_64", "amd64", "i386", "i686")
_UNLIMITED = 1 << 60  # cgroup v1 writes a huge number for "no limit"


@dataclass(frozen=True)
class Machine:
    """Sizes in bytes; ``features`` in Linux's names, such as avx2 or asimddp."""

    system: str
    architecture: str
    processor: str
    features: frozenset[str]
    physical_cores: int | None
    logical_cores: int | None
    usable_cores: int  # this process may run on
    cpu_limit: float | None  # cores a container may use on average
    memory: int
    memory_available: int
    memory_limit: int | None  # of a container

    @property
    def family(self) -> str:
        """x86, arm, or the architecture's own name."""
        return family(self.architecture)


def family(architecture: str) -> str:
    """The family of an architecture as ``platform.machine()`` names it."""
    name = architecture.lower()
    return "arm" if name in _ARM else "x86" if name in _X86 else name


def this_machine() -> Machine:
    """Look at the machine this runs on."""
    import psutil

    processor, features = _processor()
    memory = psutil.virtual_memory()
    return Machine(
        system=f"{platform.system()} {platform.release()}",
        architecture=platform.machine(),
        processor=processor,
        features=features,
        physical_cores=psutil.cpu_count(logical=False),
        logical_cores=psutil.cpu_count(),
        usable_cores=usable_cores(),
        cpu_limit=cpu_limit(),
        memory=int(memory.total),
        memory_available=int(memory.available),
        memory_limit=memory_limit(),
    )


def default_threads(root: Path = CGROUP) -> int:
    """Physical cores this process may use, or as many as a container's limit allows."""
    import psutil

    usable, limit = usable_cores(), cpu_limit(root)
    physical: int | None = psutil.cpu_count(logical=False)
    allowed = math.ceil(limit) if limit else usable
    return max(1, min(usable, physical or usable, allowed))


def fingerprint() -> str:
    """Identifies a machine for stored measurements: processor, cores and memory, no names."""
    machine = this_machine()
    parts = (
        machine.architecture,
        machine.processor,
        ",".join(sorted(machine.features)),
        machine.physical_cores,
        machine.usable_cores,
        machine.cpu_limit,
        machine.memory >> 28,
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def cpu_limit(root: Path = CGROUP) -> float | None:
    """Cores a container may use on average; None without a limit."""
    quota, _, period = _read(root / "cpu.max").partition(" ")
    if not quota:
        quota = _read(root / "cpu" / "cpu.cfs_quota_us")
        period = _read(root / "cpu" / "cpu.cfs_period_us")
    if not (quota.isdecimal() and period.isdecimal() and int(period)):
        return None  # no limit is "max" or -1
    return int(quota) / int(period)


def memory_limit(root: Path = CGROUP) -> int | None:
    """Bytes a container may use; None without a limit."""
    text = _read(root / "memory.max") or _read(root / "memory" / "memory.limit_in_bytes")
    return int(text) if text.isdecimal() and int(text) < _UNLIMITED else None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""


def usable_cores() -> int:
    """Logical cores, of which a physical one may have two, that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _processor() -> tuple[str, frozenset[str]]:
    import archspec.cpu
    from archspec.cpu.detect import detected_info

    host, found = archspec.cpu.host(), detected_info()
    # Apple's features are known from the model, other processors' from what they report.
    features = frozenset(host.features) | frozenset(found.features)
    name = archspec.cpu.brand_string() or _board() or platform.processor() or host.name
    return name, features


def _board() -> str:
    """A single-board computer's name, such as Raspberry Pi 5 Model B Rev 1.0."""
    return _read(Path("/proc/device-tree/model")).strip("\0")
