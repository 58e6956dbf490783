"""All ranks of a group, and whether they ask for the same thing.

A rank that refuses what it was given while the others wait for its keys would hang them. So each
call begins with a few numbers from every rank: how many rows it has, whether it refuses, and a
digest of what is asked. All ranks then go on, or all raise, and nothing else has been sent. After
a call that named a kernel they tell each other once more whether it took what it got.
"""

from __future__ import annotations

import hashlib
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist

from longspan.errors import InputError


def group_of(group: Any) -> tuple[dist.ProcessGroup | None, int, int]:
    """The process group that was meant, this process's rank in it, and its size.

    Args:
        group: a process group, a device mesh of one dimension, or None for all processes.

    Raises:
        InputError: if there is no such group, or this process is not in it.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise InputError(
            "no process group: start with torchrun and call torch.distributed.init_process_group()"
            " first; one process alone needs longspan.attend only"
        )
    if hasattr(group, "get_group"):
        if group.ndim != 1:
            raise InputError(
                f"the device mesh has {group.ndim} dimensions; give the one of the sequence, "
                f'such as mesh["context"], of {group.mesh_dim_names}'
            )
        group = group.get_group()
    if group is not None and not isinstance(group, dist.ProcessGroup):
        # Outside a group, torch hands out a number in its place.
        if isinstance(group, int):
            raise InputError("this process is not in the group")
        raise InputError(
            f"group must be a process group, a device mesh or None, got {type(group).__name__}"
        )
    rank = dist.get_rank(group)
    if rank < 0:
        raise InputError("this process is not in the group")
    return group, rank, dist.get_world_size(group)


def agree(
    rows: int,
    facts: dict[str, Any],
    complaint: Exception | None,
    group: dist.ProcessGroup | None,
    device: Any,
) -> list[int]:
    """The number of rows of each rank, once none complains and all ask for the same.

    Args:
        rows: of this rank.
        facts: what must be the same on all ranks, by name; compared as text.
        complaint: why this rank refuses.
        group: None for all ranks.
        device: of this rank's tensors, if they are tensors.

    Raises:
        Exception: this rank's own complaint.
        InputError: on all ranks, if others complain or the facts differ.
    """
    words = {name: str(value) for name, value in facts.items()}
    digest = hashlib.blake2b(repr(words).encode(), digest_size=7).digest()
    told = [rows, int(complaint is not None), int.from_bytes(digest, "big")]
    mine = torch.tensor(told, dtype=torch.int64, device=_device(group, device))
    found = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    with _on(mine.device):
        dist.all_gather(found, mine, group=group)
    table = torch.stack(found).tolist()
    refused = any(row[1] for row in table)
    if refused or len({row[2] for row in table}) > 1:
        with _on(mine.device):
            _raise(words, complaint, group, refused=refused)
    return [row[0] for row in table]


def _raise(
    words: dict[str, str],
    complaint: Exception | None,
    group: dist.ProcessGroup | None,
    *,
    refused: bool,
) -> None:
    texts: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(texts, (None if complaint is None else str(complaint), words), group)
    if complaint is not None:
        raise complaint
    if refused:
        rank, (why, _) = next((r, text) for r, text in enumerate(texts) if text[0] is not None)
        raise InputError(f"rank {rank} refused what it was given: {why}")
    differing = [
        f"{name}: " + ", ".join(f"rank {r} {text[1].get(name)}" for r, text in enumerate(texts))
        for name in words
        if len({text[1].get(name) for text in texts}) > 1
    ]
    raise InputError(f"ranks must ask for the same, but differ in {'; '.join(differing)}")


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Objects are sent from the current GPU, which need not be that of the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _device(group: dist.ProcessGroup | None, given: Any) -> torch.device:
    """Where the group can send from: NCCL has GPUs only."""
    if "nccl" not in str(dist.get_backend(group)):
        return torch.device("cpu")
    if isinstance(given, torch.device) and given.type == "cuda":
        return given
    return torch.device("cuda", torch.cuda.current_device())
