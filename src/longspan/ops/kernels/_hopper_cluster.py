"""Programs of ``hopper`` that read the same keys together: clusters, by editing machine code.

At the power limit of a GPU energy decides how fast it is, and a tenth of that goes to keys and
values on their way from the L2 cache to the processors. Query heads that share a key head read the
same ones. The programs of a cluster (CUDA C++ Programming Guide, "Thread Block Clusters") run at
the same time on neighbouring processors, with one of these heads each, and one copy of a tile
arrives in all of them ("multicast"): in about as many cycles, at a higher clock.

Gluon of Triton 3.6 has no name for either. What the kernel says in place of it stands in its PTX:

    a copy of keys or values         goes to all programs of the cluster: ``.multicast::cluster``
    an arrival that counts N         is one at this barrier and one at that of each other program

with N programs in a cluster. Both name shared memory by its place, which is the same in all of
them. The kernel makes sure that only one program copies each tile, and that none ends too early
(see ``_hopper_load``). Needs no Triton to edit a text.

Only versions of Triton are taken whose code has run, and a code is launched only once it was
edited in every place: an arrival that is missing would be waited for forever.
"""

from __future__ import annotations

import functools
import importlib
import re
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Programs of a cluster.
PROGRAMS = 2
_TRITON = ("3.6.",)
_KERNEL = "forward"
_ARRIVAL = re.compile(
    r"^\s*(@%p\d+ )mbarrier\.arrive\.shared::cta\.b64 _, \[(%r\d+)\](, \d+)?;$", re.M
)
_COPY = re.compile(
    r"^\s*(@%p\d+ )(cp\.async\.bulk\.tensor\.4d\.shared::cluster\.global"
    r"\.mbarrier::complete_tx::bytes)( \[%r\d+\], \[(%rd\d+), \{[^}]*\}\], \[%r\d+\]);$",
    re.M,
)
_lock = threading.Lock()
_failed = threading.Event()


class Unknown(Exception):
    """The machine code is not what clusters expect."""


def available() -> bool:
    """Whether Triton is one whose code is known, and has been so far."""
    return not _failed.is_set() and edition() != 0


@functools.cache
def edition() -> int:
    """What is compiled depends on this text, too, and Triton knows that of the kernel alone.

    0 where there is no such Triton, or no text.
    """
    try:
        triton = importlib.import_module("triton")
        text = Path(__file__).read_bytes()
    except (ImportError, OSError):
        return 0
    return (zlib.crc32(text) & 0x3FFFFFFF) + 1 if triton.__version__.startswith(_TRITON) else 0


def give_up(error: Unknown) -> None:
    """Go on without clusters."""
    if not _failed.is_set():
        _failed.set()
        warnings.warn(
            f"{error}; hopper goes on without them, which takes a few percent longer",
            RuntimeWarning,
            stacklevel=2,
        )


def compiled(
    kernel: Any, grid: tuple[int, int, int], args: Sequence[Any], *, programs: int, copies: int
) -> Any:
    """The kernel for such arguments, whose grid counts clusters.

    Args:
        kernel: ``_hopper_forward.forward``.
        grid: clusters.
        args: all arguments in their order.
        programs: of a cluster, a power of two.
        copies: what brings the queries of a task.

    Raises:
        Unknown: its machine code is not as expected.
    """
    with _edited_here(programs, copies):
        found = kernel.warmup(*args, grid=grid)
    # Also if it comes from a cache, or another hook was in the way.
    if found is None or found.metadata.num_ctas != programs:
        raise Unknown("hopper's forward was compiled without clusters")
    return found


@contextmanager
def _edited_here(programs: int, copies: int) -> Iterator[None]:
    """What this thread compiles meanwhile is edited."""
    runtime = importlib.import_module("triton").knobs.runtime
    with _lock:
        before = runtime.add_stages_inspection_hook
        thread = threading.get_ident()
        hook = functools.partial(_change_stages, thread, programs, copies, before)
        runtime.add_stages_inspection_hook = hook
        try:
            yield
        finally:
            if runtime.add_stages_inspection_hook is hook:
                runtime.add_stages_inspection_hook = before


def _change_stages(
    thread: int, programs: int, copies: int, before: Any, backend: Any, stages: Any, *about: Any
) -> None:
    if before is not None:
        before(backend, stages, *about)
    if threading.get_ident() != thread:
        return
    make: Callable[[Any, Any], str] = stages["ptx"]

    def ptx(source: Any, metadata: dict[str, Any]) -> str:
        found = make(source, metadata)
        if metadata.get("name") == _KERNEL:
            found = edited(found, programs, copies)
            metadata["num_ctas"] = programs
        return found

    stages["ptx"] = ptx


def edited(ptx: str, programs: int, copies: int) -> str:
    """The machine code of the kernel for clusters.

    Args:
        ptx: as Triton made it, with arrivals that count ``programs``.
        programs: of a cluster, a power of two.
        copies: what brings the queries of a task.

    Raises:
        Unknown: it is not as expected.
    """
    first = re.search(r"\.param \.align 64 \.b8 (\w+)\[128\]", ptx)
    names = re.findall(rf"mov\.b64\s+(%rd\d+), {first[1]};", ptx) if first else []
    # Queries, the first tensor, are of one head each.
    queries = {
        address
        for address, name in re.findall(r"cvta\.param\.u64\s+(%rd\d+), (%rd\d+);", ptx)
        if name in names
    }
    seen = {"queries": 0, "keys or values": 0, "arrivals": 0, "barriers": 0}

    def copy(found: re.Match[str]) -> str:
        pred, name, what, tensor = found.groups()
        if tensor in queries:
            seen["queries"] += 1
            return found[0]
        seen["keys or values"] += 1
        return (
            f"\t{{ .reg .b16 all; mov.b16 all, {(1 << programs) - 1}; "
            f"{pred}{name}.multicast::cluster{what}, all; }}"
        )

    def arrival(found: re.Match[str]) -> str:
        pred, barrier, count = found.groups()
        if count is None:
            seen["barriers"] += 1
            return found[0]
        if count != f", {programs}":
            return found[0]
        seen["arrivals"] += 1
        others = "".join(
            f"xor.b32 other, own, {k}; mapa.shared::cluster.u32 other, {barrier}, other; "
            f"{pred}mbarrier.arrive.shared::cluster.b64 _, [other]; "
            for k in range(1, programs)
        )
        return (
            f"\t{pred}mbarrier.arrive.shared::cta.b64 _, [{barrier}]; "
            f"{{ .reg .b32 own, other; mov.u32 own, %cluster_ctarank; {others}}}"
        )

    found = _ARRIVAL.sub(arrival, _COPY.sub(copy, ptx))
    # But stores of outputs, and what is expected of copies.
    counted = (
        ptx.count("cp.async.bulk.tensor")
        - ptx.count("cp.async.bulk.tensor.4d.global.shared::cta"),
        ptx.count("mbarrier.arrive") - ptx.count("mbarrier.arrive.expect_tx."),
    )
    known = (seen["queries"] + seen["keys or values"], seen["arrivals"] + seen["barriers"])
    every = seen["queries"] == copies and seen["keys or values"] and seen["arrivals"]
    if counted != known or not every:
        raise Unknown(
            "the machine code of hopper's forward is not what clusters of programs expect: of "
            f"{counted[0]} copies {seen['queries']} were found of queries, where {copies} bring "
            f"them, and {seen['keys or values']} of keys or values; of {counted[1]} arrivals "
            f"{seen['arrivals']} for {programs} programs and {seen['barriers']} for one"
        )
    return found
