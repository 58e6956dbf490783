"""Compile the CPU kernel when longspan is installed, if that can be done.

Without a C compiler, or elsewhere than on x86-64, longspan is installed without it and computes
with PyTorch alone.
"""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FOLDER = Path("src/longspan/ops/native")


class CompileHook(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        # Not imported: longspan needs torch, which is not there when it is installed.
        if problem := runpy.run_path(str(Path(self.root) / FOLDER / "build.py"))["build"]():
            self.app.display_warning(f"the CPU kernel was not compiled: {problem}")
            return
        build_data["artifacts"].append(str(FOLDER / "native.so"))
        build_data["pure_python"] = False
        build_data["infer_tag"] = True
