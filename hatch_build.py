"""Compile the CPU kernel when longspan is installed, if that can be done.

Without a C compiler, or elsewhere than on x86-64, longspan is installed without it and computes
with PyTorch alone. ``CC`` names the compiler.
"""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FOLDER = Path("src/longspan/ops/native")
LIBRARY = FOLDER / "native.so"


class CompileHook(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if os.name != "posix" or platform.machine() not in ("x86_64", "AMD64"):
            return
        root = Path(self.root)
        compiler = shlex.split(os.environ.get("CC") or "cc")
        sources = sorted(str(path) for path in (root / FOLDER).glob("*.c"))
        target, said = root / LIBRARY, ""
        # A running process may have the old one open, and keeps what it has; another may start
        # meanwhile, and finds none or a whole one.
        target.unlink(missing_ok=True)
        fresh = target.with_suffix(f".{os.getpid()}.so")
        command = [*compiler, "-O3", "-fPIC", "-shared", "-o", str(fresh), *sources, "-lm"]
        # Compilers before gcc 11 and clang 12 do not know AMX.
        for options in ([], ["-DLONGSPAN_WITHOUT_AMX"]):
            try:
                subprocess.run([*command, *options], check=True, capture_output=True, text=True)
                fresh.replace(target)
                break
            except (OSError, subprocess.CalledProcessError) as error:
                said = getattr(error, "stderr", "") or str(error)
        else:
            self.app.display_warning(f"the CPU kernel was not compiled: {said.strip()[:2000]}")
            return
        build_data["artifacts"].append(str(LIBRARY))
        build_data["pure_python"] = False
        build_data["infer_tag"] = True
