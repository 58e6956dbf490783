"""What a result was measured on: versions, machine, devices."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    "longspan",
    "torch",
    "numpy",
    "transformers",
    "peft",
    "safetensors",
    "tokenizers",
    "lm-eval",
    "triton",
    "matplotlib",
    "typer",
    "rich",
)


def environment() -> dict[str, Any]:
    """Versions of packages (None: not installed) and the hardware, as plain JSON values."""
    import torch

    from longspan.ops.kernels.native import instructions

    cuda = []
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        cuda.append({"name": found.name, "memory_gib": round(found.total_memory / 2**30, 1)})
    mps = torch.backends.mps.is_available()
    return {
        "python": platform.python_version(),
        "platform": platform.platform(terse=True),
        "packages": {name: version(name) for name in PACKAGES},
        "cpu": _cpu_name(),
        "cpu_kernel": instructions(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": _memory_gib(),
        "cuda": cuda,
        "cuda_version": torch.version.cuda,
        "mps": mps,
    }


def version(package: str) -> str | None:
    """Installed version of a package, read without importing it."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        return None
