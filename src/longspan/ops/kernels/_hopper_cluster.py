"""Programs of ``hopper`` that read the same keys together: clusters, by editing machine code.

At the power limit of a GPU energy decides how fast it is, and a tenth of that goes to keys and
values on their way from the L2 cache to the processors. Query heads that share a key head read the
same ones. The programs of a cluster (CUDA C++ Programming Guide, "Thread Block Clusters") run at
the same time on neighbouring processors, with one of these heads each, and one copy of a tile
arrives in all of them ("multicast"): as many cycles, at a higher clock.

Gluon of Triton 3.6 has no name for either. What the kernel says in place of it stands in its PTX:

    a copy of keys or values         goes to all programs of the cluster: ``.multicast::cluster``
    an arrival that counts N         is one at this barrier and one at that of each other program

with N programs in a cluster. Both name shared memory by its place, which is the same in all of
them. The kernel makes sure that only one program copies each tile, and that none ends too early
(see ``_hopper_load``). Needs no Triton to edit a text.

Only versions of Triton are taken whose code has run: a wrong arrival would be waited for forever.
"""

from __future__ import annotations

import functools
import importlib
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import RLock
from typing import Any

# Programs of a cluster.
PROGRAMS = 2
# What is compiled depends on this text, too; Triton knows that of the kernel alone.
EDITION = zlib.crc32(Path(__file__).read_bytes()) & 0x7FFFFFFF
_TRITON = ("3.6.",)
_KERNEL = "forward"
_ARRIVAL = re.compile(r"(@%p\d+ )?mbarrier\.arrive\.shared::cta\.b64 _, \[(%r\d+)\], (\d+);")
_COPY = re.compile(
    r"(@%p\d+ )?(cp\.async\.bulk\.tensor\.4d\.shared::cluster\.global"
    r"\.mbarrier::complete_tx::bytes)( \[%r\d+\], \[(%rd\d+), \{[^}]*\}\], \[%r\d+\]);"
)
_compiling = RLock()


@functools.cache
def available() -> bool:
    """Whether Triton is one whose code is known."""
    try:
        triton = importlib.import_module("triton")
    except ImportError:
        return False
    return triton.__version__.startswith(_TRITON)


@contextmanager
def compiled(programs: int) -> Iterator[None]:
    """Whatever Triton compiles for clusters of the kernel meanwhile is edited.

    Args:
        programs: of a cluster; nothing is edited where it is one.
    """
    if programs == 1:
        yield
        return
    runtime = importlib.import_module("triton").knobs.runtime
    with _compiling:
        before = runtime.add_stages_inspection_hook
        runtime.add_stages_inspection_hook = functools.partial(_change_stages, programs, before)
        try:
            yield
        finally:
            runtime.add_stages_inspection_hook = before


def _change_stages(programs: int, before: Any, backend: Any, stages: Any, *about: Any) -> None:
    if before is not None:
        before(backend, stages, *about)
    make: Callable[[Any, Any], str] = stages["ptx"]

    def ptx(source: Any, metadata: dict[str, Any]) -> str:
        found = make(source, metadata)
        # Another thread may compile another kernel.
        if metadata.get("name") == _KERNEL:
            found = edited(found, programs)
            metadata["num_ctas"] = programs
        return found

    stages["ptx"] = ptx


def edited(ptx: str, programs: int) -> str:
    """The machine code of the kernel for clusters.

    Args:
        ptx: as Triton made it, with arrivals that count ``programs``.
        programs: of a cluster, a power of two.

    Raises:
        RuntimeError: it is not as expected.
    """
    first = re.search(r"\.param \.align 64 \.b8 (\w+)\[128\]", ptx)
    names = re.findall(rf"mov\.b64\s+(%rd\d+), {first[1]};", ptx) if first else []
    # Queries, the first tensor, are of one head each.
    queries = {
        address
        for address, name in re.findall(r"cvta\.param\.u64\s+(%rd\d+), (%rd\d+);", ptx)
        if name in names
    }
    copies, arrivals = 0, 0

    def copy(found: re.Match[str]) -> str:
        nonlocal copies
        pred, name, what, tensor = found.groups(default="")
        if tensor in queries:
            return found[0]
        copies += 1
        return (
            f"{{ .reg .b16 all; mov.b16 all, {(1 << programs) - 1}; "
            f"{pred}{name}.multicast::cluster{what}, all; }}"
        )

    def arrival(found: re.Match[str]) -> str:
        nonlocal arrivals
        pred, barrier, count = found.groups(default="")
        if int(count) != programs:
            return found[0]
        arrivals += 1
        others = "".join(
            f"xor.b32 other, own, {k}; mapa.shared::cluster.u32 other, {barrier}, other; "
            f"{pred}mbarrier.arrive.shared::cluster.b64 _, [other]; "
            for k in range(1, programs)
        )
        return (
            f"{pred}mbarrier.arrive.shared::cta.b64 _, [{barrier}]; "
            f"{{ .reg .b32 own, other; mov.u32 own, %cluster_ctarank; {others}}}"
        )

    found = _ARRIVAL.sub(arrival, _COPY.sub(copy, ptx))
    all_copies = ptx.count("cp.async.bulk.tensor.4d.shared::cluster.global")
    read = [tensor for *_, tensor in _COPY.findall(ptx)]
    own = sum(tensor in queries for tensor in read)
    if not (own and copies and arrivals) or own + copies != all_copies:
        raise RuntimeError(
            "the machine code of hopper's forward is not what clusters expect: "
            f"{all_copies} copies, of which {own} of queries and {copies} of keys or values were "
            f"found, and {arrivals} arrivals for {programs} programs"
        )
    return found
