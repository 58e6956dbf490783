"""Passes of a plan side by side on a GPU, each on a stream of its own.

When the last programs of a kernel run, most processors wait; and copies of rows wait for memory
while a kernel before them computes. Passes do not depend on each other: on streams of their own
the copies of one hide behind the kernel of another, and one kernel begins where another ends.
Autograd runs a backward on the stream of its forward, so that it gains as much.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Self
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from longspan.ops.capability import needs_grad

# Beyond that kernels run so long that their ends do not count, and memory does.
_MOST_BYTES = 1 << 30
_MOST_LANES = 4

# By the stream that they start from, so that two of those never share a lane.
_streams: dict[tuple[torch.device, int], list[torch.cuda.Stream]] = {}
# What has run before, and how: a first run makes what later ones on any stream read.
_known: WeakKeyDictionary[object, set[tuple[object, ...]]] = WeakKeyDictionary()


class Lanes:
    """Streams for several passes; leaving the context waits for all of them.

    It may be entered again, as for a backward that runs all passes.

    Args:
        passes: what will run, compared by identity.
        inputs: queries, keys and values.
        impl: what is asked to compute them.
    """

    def __init__(self, passes: Sequence[object], inputs: Sequence[Tensor], impl: str) -> None:
        self.side: list[torch.cuda.Stream] = []
        if len(passes) < 2 or not _worth(inputs):
            return
        self.home = torch.cuda.current_stream(inputs[0].device)
        how = (impl, needs_grad(*inputs), *((x.shape[:2], x.dtype) for x in inputs))
        known = [how in _known.setdefault(one, set()) for one in passes]
        for one in passes:
            _known[one].add(how)
        if all(known):
            self.side = _side(self.home, min(len(passes), _MOST_LANES) - 1)

    def __enter__(self) -> Self:
        for stream in self.side:
            stream.wait_stream(self.home)
        return self

    def __exit__(self, *_: object) -> None:
        for stream in self.side:
            self.home.wait_stream(stream)

    @contextmanager
    def lane(self, index: int) -> Iterator[torch.cuda.Stream | None]:
        """Run a pass on its stream; None where that is the caller's, as for the first one."""
        turn = index % (len(self.side) + 1)
        if turn:
            with torch.cuda.stream(self.side[turn - 1]):
                yield self.side[turn - 1]
        else:
            yield None

    def keep(
        self, lane: torch.cuda.Stream | None, taken: Iterable[Tensor], given: Iterable[Tensor]
    ) -> None:
        """Memory of what a pass reads and writes is not used again before both sides are done."""
        if lane is not None:
            for x in taken:
                x.record_stream(lane)
            for x in given:
                x.record_stream(self.home)


def _worth(inputs: Sequence[Tensor]) -> bool:
    if inputs[0].device.type != "cuda" or inputs[0].nbytes > _MOST_BYTES:
        return False
    # A graph that is captured may own the memory of one stream only.
    return not torch.cuda.is_current_stream_capturing()


def _side(home: torch.cuda.Stream, count: int) -> list[torch.cuda.Stream]:
    found = _streams.setdefault((home.device, home.cuda_stream), [])
    while len(found) < count:
        found.append(torch.cuda.Stream(home.device))
    return found[:count]
