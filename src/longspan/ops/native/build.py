"""Compile the CPU kernel.

    python -m longspan.ops.native.build

Installing longspan does it; this does it again, when a compiler has come later or sources have
changed. ``CC`` names the compiler, ``cc`` without it. Needs nothing but the standard library.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
LIBRARY = FOLDER / "native.so"


def fingerprint() -> int:
    """A number of the sources, which the library brings along: others are not used."""
    text = hashlib.sha256()
    for path in sorted(FOLDER.iterdir()):
        if path.suffix in (".c", ".h", ".inc"):
            text.update(path.name.encode() + path.read_bytes())
    # 63 bits, a signed number in C.
    return int.from_bytes(text.digest()[:8], "big") >> 1


def supported() -> bool:
    """Whether the kernel is written for such a machine."""
    return os.name == "posix" and platform.machine() in ("x86_64", "AMD64")


def build() -> str:
    """Compile the library; why it could not be done, or nothing."""
    if not supported():
        return f"it is written for x86-64 under Linux or macOS, this is {platform.platform()}"
    compiler = shlex.split(os.environ.get("CC") or "cc")
    sources = sorted(str(path) for path in FOLDER.glob("*.c"))
    # Made elsewhere and moved: whoever has the old one open keeps it, nobody sees half of one.
    made = LIBRARY.with_name(f"native-{os.getpid()}.so")
    command = [*compiler, "-O3", "-fPIC", "-shared", f"-DLONGSPAN_SOURCES={fingerprint()}LL"]
    command += ["-o", str(made), *sources, "-lm"]
    said = ""
    # Compilers before gcc 11 and clang 12 do not know AMX, those before gcc 10 and clang 9 no
    # products of bfloat16 either.
    without = ["-DLONGSPAN_WITHOUT_AMX", "-DLONGSPAN_WITHOUT_BF16"]
    for options in ([], without[:1], without):
        try:
            subprocess.run([*command, *options], check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            said = (getattr(error, "stderr", "") or str(error)).strip()[:2000]
        else:
            made.replace(LIBRARY)
            return ""
    made.unlink(missing_ok=True)
    return said


if __name__ == "__main__":
    if problem := build():
        sys.exit(f"the CPU kernel was not compiled: {problem}")
    print(f"compiled {LIBRARY}")
