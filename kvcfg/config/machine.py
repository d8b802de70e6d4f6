"""What this machine has free right now: GPUs as the driver reports them, and memory as the kernel lets us use it."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from kvcfg.units import MIB

CGROUP_ROOT = Path("/sys/fs/cgroup")
CGROUP_MEMBERSHIP = Path("/proc/self/cgroup")
SMI_QUERY = ("--query-gpu=index,uuid,memory.free,name", "--format=csv,noheader,nounits")
SMI_PATIENCE = 10  # seconds


@dataclass(frozen=True, slots=True)
class GPU:
    """One GPU of this machine.

    Attributes:
        name: what the driver calls it.
        free_bytes: memory that no program holds now.
    """

    name: str
    free_bytes: int


def visible_gpus() -> list[GPU]:
    """GPUs that a CUDA program started here would see, in its order; empty without a driver that answers."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    try:
        answer = subprocess.run([program, *SMI_QUERY], capture_output=True, text=True, timeout=SMI_PATIENCE, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return _parse_gpus(answer.stdout, os.environ.get("CUDA_VISIBLE_DEVICES"))


def available_memory() -> int:
    """Bytes this process can take without swapping, within the limit of its container if that is lower."""
    import psutil

    free = int(psutil.virtual_memory().available)
    return min([free, *_cgroup_headrooms(CGROUP_ROOT, CGROUP_MEMBERSHIP)])


def _parse_gpus(table: str, visible: str | None) -> list[GPU]:
    """The rows of nvidia-smi that CUDA_VISIBLE_DEVICES lets through."""
    by_id: dict[str, GPU] = {}
    for line in table.splitlines():
        cells = [cell.strip() for cell in line.split(",", 3)]
        if len(cells) == 4 and cells[2].isdigit():
            index, uuid, free_mib, name = cells
            by_id[index] = by_id[uuid] = GPU(name, int(free_mib) * MIB)
    if visible is None:
        return [gpu for key, gpu in by_id.items() if key.isdigit()]
    chosen = []
    for wanted in visible.split(","):
        matches = [gpu for key, gpu in by_id.items() if key == wanted.strip() or _abbreviates(wanted.strip(), key)]
        if not matches:  # CUDA ignores everything from the first name it does not know
            break
        chosen.append(matches[0])
    return chosen


def _abbreviates(wanted: str, uuid: str) -> bool:
    return wanted.startswith("GPU-") and uuid.startswith(wanted)


def _cgroup_headrooms(root: Path, membership: Path) -> Iterator[int]:
    """Bytes left under each memory limit that holds for this process; nothing where there are no cgroups.

    `membership` holds lines `number:controllers:/path`; a limit on any parent of that path counts too.
    """
    for line in _read_text(membership).splitlines():
        _, controllers, own = line.split(":", 2)
        if controllers == "":
            top, limit_file, used_file = root, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            top, limit_file, used_file = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        group = PurePosixPath(own.strip("/"))
        for folder in (top / group, *(top / parent for parent in group.parents)):
            limit, used = _read_text(folder / limit_file).strip(), _read_text(folder / used_file).strip()
            if limit.isdigit() and used.isdigit():
                yield max(int(limit) - int(used) + _reclaimable(folder / "memory.stat"), 0)


def _reclaimable(stat: Path) -> int:
    """Bytes of file cache that the kernel gives back when they are needed."""
    counts = dict(line.split(maxsplit=1) for line in _read_text(stat).splitlines() if " " in line)
    return int(counts.get("inactive_file", 0))


def _read_text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
