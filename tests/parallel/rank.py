"""One rank: ``python -m tests.parallel.rank RANK RANKS FOLDER BACKEND`` writes what it found."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

# Imported before the ranks meet: its default arguments would keep the group, whose threads then
# run on while the interpreter ends.
import torch.distributed.nn.functional
from tests.parallel import models
from tests.parallel.cases import CASES, VALUE_WIDTH, WIDTH, graded

import longspan as ls

# What was handed to the one collective that carries rows: numbers for each rank, sent and got.
sent: list[tuple[list[int], list[int], int]] = []


def counted(real: Any) -> Any:
    """The collective, with notes of what it moves."""

    def all_to_all_single(output, input, output_splits, input_splits, group=None):
        assert output.dtype == input.dtype
        sent.append((list(output_splits), list(input_splits), input.shape[1]))
        return real(output, input, output_splits, input_splits, group=group)

    return all_to_all_single


def run(rank: int, ranks: int, device: torch.device) -> dict[str, Any]:
    """All cases: results, and what moved."""
    found: dict[str, Any] = {}
    for name, case in CASES.items():
        lie = case.lie(ranks)
        own = [lie.take(t, rank, 2).to(device) for t in case.tensors()]
        sent.clear()

        def attend(q, k, v, case=case, lie=lie):
            # Neighbouring rows of any numbers need no shards; the others are known by name too.
            shards = "even" if case.shards == "uneven" else case.shards
            return ls.parallel.attend(
                q,
                k,
                v,
                case.pattern,
                shards=lie if case.batch == 3 else shards,
                segments=case.segments,
                return_lse=True,
            )

        found[name] = [t.cpu() for t in graded(attend, own)], list(sent)
    return found


def refusals(rank: int, ranks: int) -> dict[str, str]:
    """What each rank is told of bad calls, most of which only one of them makes."""
    q, k, v = torch.randn(3, 1, 2, 8, WIDTH, dtype=torch.float64)
    last = rank == ranks - 1
    attend, of_sizes = ls.parallel.attend, ls.parallel.Shards.of_sizes
    calls = {
        "no pattern": lambda: attend(q, k, v, "window("),
        "a plan": lambda: attend(q, k, v, ls.plan(ls.Causal(), 8, 2)),  # pyright: ignore
        "depends on the end": lambda: attend(q, k, v, ls.Neighborhood(3) & ls.Causal()),
        "heads": lambda: attend(q, k, v, ls.PerHead(*[ls.Window(n) for n in (1, 2, 3)])),
        "kernel": lambda: attend(q, k, v, "causal()", impl="fastest"),
        "shards": lambda: attend(q, k, v, "causal()", shards="odd"),
        "rows": lambda: attend(q[:, :, last:], k, v, "causal()"),
        "shard": lambda: attend(
            *(t[:, :, last:] for t in (q, k, v)), "causal()", shards=of_sizes([8] * ranks)
        ),
        "zigzag": lambda: attend(
            *(t[:, :, 3 * last :] for t in (q, k, v)), "causal()", shards="zigzag"
        ),
        "dtype": lambda: attend(q, k.float() if last else k, v, "causal()"),
        "other dtype": lambda: attend(*(t.float() if last else t for t in (q, k, v)), "causal()"),
        "other pattern": lambda: attend(q, k, v, ls.Window(3 + last)),
        "gradients": lambda: attend(q, k.clone().requires_grad_(last), v, "causal()"),
        "segments": lambda: attend(
            q, k, v, "causal()", segments=torch.zeros(8 * ranks + last).int()
        ),
        "wrong segments": lambda: attend(q, k, v, "causal()", segments=torch.zeros(7).int()),
        "ragged": lambda: attend(q, k, v, "causal()", positions=[[1], [1, 2]]),
        "fractions": lambda: attend(q, k, v, "causal()", segments=torch.zeros(8 * ranks)),
        "scale": lambda: attend(q, k, v, "causal()", scale=float("nan") if last else 1.0),
        "no tensor": lambda: attend("q" if last else q, k, v, "causal()"),  # pyright: ignore
        "longer number": lambda: attend(q, k, v, f"window({'1' * 5000})" if last else "causal()"),
        "named kernel": lambda: attend(
            *(t if last else t[:, :, :0] for t in (q, k, v)), "causal()", impl="flash"
        ),
        "after it": lambda: attend(q[:, :, 1:], k, v, "causal()"),
        "group": lambda: attend(q, k, v, "causal()", group="all"),
        "not in the group": lambda: attend(q, k, v, "causal()", group=first),
        "batch": lambda: attend(q, k, v, "causal()", segments=torch.zeros(2, 8 * ranks).int()),
    }
    # Outside it, the group is a number.
    first = dist.new_group([0])
    told = {}
    for name, call in calls.items():
        try:
            call()
            told[name] = ""
        except (ls.LongspanError, ValueError) as error:
            told[name] = f"{type(error).__name__}: {error}"
    return told


def groups(rank: int, ranks: int) -> list[torch.Tensor]:
    """The same rows in a mesh's dimension, a group, a compiled function and without agreement."""
    torch.manual_seed(0)
    whole = torch.randn(3, 1, 2, 8 * ranks, WIDTH, dtype=torch.float64)
    own = ls.parallel.Shards.even(8 * ranks, ranks).take(whole, rank, 3)
    mesh = dist.device_mesh.init_device_mesh("cpu", (1, ranks), mesh_dim_names=("data", "context"))
    pattern = ls.Window(11)

    found = [
        ls.parallel.attend(*own, pattern, group=mesh["context"]),
        ls.parallel.attend(*own, pattern, group=mesh.get_group("context")),
        ls.parallel.attend(*own, pattern, agreed=True),
        ls.parallel.attend(*own, "window(11)", impl="reference"),
    ]
    with torch.inference_mode():
        found.append(ls.parallel.attend(*own, pattern, shards="even", scale=WIDTH**-0.5).clone())
    if ranks == 2:
        # The compiler alone takes seconds to start.
        found.append(torch.compile(ls.parallel.attend, backend="eager")(*own, pattern))
    with pytest.raises(ls.LongspanError, match="the device mesh has 2 dimensions"):
        ls.parallel.attend(*own, pattern, group=mesh)
    alone = dist.new_group([ranks - 1])
    if rank == ranks - 1:
        # One process of a group of its own holds the whole sequence.
        alone = ls.parallel.attend(*whole, pattern, group=alone)
        found.append(alone[:, :, -8:])
    return found


def main(rank: int, ranks: int, folder: Path, backend: str) -> None:
    """Meet the other ranks, run everything; on GPUs the cases alone."""
    torch.set_num_threads(1)
    device = torch.device("cpu")
    if backend == "nccl":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend, init_method=f"file://{folder}/meet", rank=rank, world_size=ranks
    )
    dist.all_to_all_single = counted(dist.all_to_all_single)
    found: dict[str, Any] = {"width": WIDTH + VALUE_WIDTH, "cases": run(rank, ranks, device)}
    if backend == "gloo":
        found["told"], found["groups"] = refusals(rank, ranks), groups(rank, ranks)
        if ranks == 2 and importlib.util.find_spec("transformers"):
            found["models"] = {name: models.across(name) for name in models.RUNS}
            found["models told"] = models.refusals(rank)
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
