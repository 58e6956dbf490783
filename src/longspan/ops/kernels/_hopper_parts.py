"""Tasks of ``hopper`` cut by keys, where there are too few of them for the processors.

A few queries that see very many keys, as global tokens or one query of a decoding step, are a task
for each head. Split by keys ("flash-decoding", Dao et al. 2023,
https://pytorch.org/blog/flash-decoding) they are several, with an output and a log-sum-exp each,
which are joined afterwards (``merge_stacked``). A task gives the batch row of its output: that of
part s of batch row b is ``s B + b``.

A part takes consecutive entries of its task, so that those before whole ones stay there; what it
begins with counts as one of them and may have a mask, which the kernel reads in any case. All
tasks have as many parts as the longest one, but each as many with entries as its length asks for.
The others have an entry behind all keys that anybody sees, and give 0 and -inf.

O(S T) time and memory; on the device of the tasks, with one wait where there are few of them.

Axes: S parts, T tasks, E entries.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Programs of an H100 or H200: what is a long task, and what are few of them, need be no exact
# count, and plans are the same everywhere.
PROGRAMS = 132
MOST_PARTS = 32
# Tiles of keys that a part of the longest task has at least.
_LEAST = 16
# Tiles that take as long as what happens once for a task, its partial output included, and once
# for joining them.
_ONCE, _JOINED = 3, 6
# What splitting takes at most, as a share of the time without it.
_WORTH = 0.8
# Both halves of the queries masked, by both of their bounds: ranges that are empty may lie behind
# all keys that anybody sees.
_HIDDEN = 1 + (1 << 2) + 32


def parts_of(count_T: Tensor, entries: int) -> int:
    """Parts into which tasks are best split; 1 to leave them.

    Args:
        count_T: entries of each task, at least one.
        entries: at least the greatest of them.
    """
    if len(count_T) >= PROGRAMS or entries < 2 * _LEAST:
        return 1
    longest, total = torch.stack([count_T.amax(), count_T.sum()]).tolist()
    # As many of the longest ones.
    tasks = -(-total // longest)

    def time(parts: int) -> float:
        turns = -(-tasks * parts // PROGRAMS)
        return turns * (longest / parts + _ONCE) + _JOINED * (parts > 1)

    best = min(range(1, min(MOST_PARTS, max(longest // _LEAST, 1)) + 1), key=time)
    return best if time(best) <= _WORTH * time(1) else 1


def split(tasks_T8: Tensor, parts: int, batch: int, entries_E2: Tensor, unseen: Tensor) -> Tensor:
    """The parts of all tasks, the longest ones first, int32 [S T, 8].

    Args:
        tasks_T8: the tasks, as ``HopperPlan`` has them.
        parts: of each.
        batch: batch rows.
        entries_E2: the entries of all tasks.
        unseen: a key behind all that anybody sees, int32 of one number.
    """
    count_T = tasks_T8[:, 5].long()
    # Parts that have entries.
    used_T = torch.minimum(-(-count_T * parts // count_T.amax()), count_T)
    part_S1 = torch.arange(parts, device=tasks_T8.device)[:, None]
    some_ST = part_S1 < used_T
    begin_ST = torch.where(some_ST, part_S1 * count_T // used_T, 0)
    size_ST = torch.where(some_ST, (part_S1 + 1) * count_T // used_T - begin_ST, 1)
    found_ST8 = tasks_T8.repeat(parts, 1, 1)
    found_ST8[..., 2] += (batch * part_S1).int()
    found_ST8[..., 3] += begin_ST.int()
    found_ST8[..., 4] = (tasks_T8[:, 4] - begin_ST).clamp(min=1).minimum(size_ST)
    found_ST8[..., 5] = size_ST
    hidden_2 = torch.stack([unseen, torch.full_like(unseen, _HIDDEN)])
    own_ST2 = entries_E2[found_ST8[..., 3].long()]
    found_ST8[..., 6:] = torch.where(some_ST[..., None], own_ST2, hidden_2)
    # Tasks that read the same keys stay together.
    order = size_ST.flatten().argsort(descending=True, stable=True)
    return found_ST8.flatten(0, 1)[order]
