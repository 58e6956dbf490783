"""Threads that each compute whole key heads, the operations' own threads shared out among them.

An operation that all cores share ends with all of them waiting for the slowest. A tile takes a
dozen short operations, so that waiting is what a small or busy machine would mostly do. Key heads
are independent: given one thread each, they wait only once. Which thread takes which part changes
no bit, because parts share no output and each is computed in order.

Compiled code has no operations inside, so that the operations' own threads do it.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch


def run_parts(part: Callable[[int], None], parts: int) -> None:
    """Call ``part`` with 0 to ``parts - 1``, from several threads when there are several parts."""
    workers = min(parts, torch.get_num_threads())
    if workers == 1:
        for i in range(parts):
            part(i)
        return
    # Modes belong to threads, and a tensor made in inference mode is written only there.
    mode = torch.inference_mode if torch.is_inference_mode_enabled() else torch.no_grad
    pool = _pool(workers, torch.get_num_threads())
    for _ in pool.map(mode()(part), range(parts)):
        pass


def run_compiled(function: Any, data: int, threads: int) -> None:
    """Call compiled code, ``void function(void *data)``, from so many threads at once.

    They are those of PyTorch's own operations where these are GNU OpenMP's. Others would wait:
    OpenMP's go on asking for work for milliseconds after an operation, on cores of their own.
    """
    own = ctypes.c_void_p(data)
    if threads == 1:
        function(own)
    elif team := _team():
        team(ctypes.cast(function, ctypes.c_void_p), own, threads, 0)
    else:
        run_parts(lambda _: function(own), threads)


@cache
def _team() -> Any:
    """What GNU's compiler calls for ``#pragma omp parallel``, in the library that torch loaded."""
    if _forked:
        # That library has lost its threads, and would wait for them.
        return None
    try:
        found = ctypes.CDLL(None).GOMP_parallel
    except (OSError, TypeError, AttributeError):
        return None
    found.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    found.restype = None
    return found


@cache
def can_share_threads() -> bool:
    """Whether a thread may take its own number of cores for operations, as OpenMP allows."""
    return "parallel backend: OpenMP" in torch.__config__.parallel_info()


@cache
def _pool(workers: int, threads: int) -> ThreadPoolExecutor:
    ready = threading.Barrier(workers + 1)

    def prepare() -> None:
        # Asking first makes torch initialise this thread, which would otherwise undo the setting.
        torch.get_num_threads()
        torch.set_num_threads(max(1, threads // workers))
        ready.wait()

    pool = ThreadPoolExecutor(workers, thread_name_prefix="longspan-tiled", initializer=prepare)
    for _ in range(workers):
        pool.submit(int)
    ready.wait()
    # The setting counts for the thread that makes it, but also for threads that start later.
    torch.set_num_threads(threads)
    return pool


def _after_fork() -> None:
    """A forked process inherits pools and teams, but not their threads."""
    global _forked
    _forked = True
    _pool.cache_clear()
    _team.cache_clear()


_forked = False
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
