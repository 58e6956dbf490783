"""Threads that each compute whole key heads, the operations' own threads shared out among them.

An operation that all cores share ends with all of them waiting for the slowest. A tile takes a
dozen short operations, so that waiting is what a small or busy machine would mostly do. Key heads
are independent: given one thread each, they wait only once. Which thread takes which part changes
no bit, because parts share no output and each is computed in order.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

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


if hasattr(os, "register_at_fork"):
    # A forked process inherits the pools but not their threads.
    os.register_at_fork(after_in_child=_pool.cache_clear)
