"""One sequence on several processes: attention, and a model, equal those of a single one.

    torchrun --nproc_per_node 2 examples/context_parallel.py     on CPUs (Gloo)
    python examples/context_parallel.py                          starts itself in two processes

On GPUs the same code runs with ``init_process_group("nccl")`` and tensors on
``torch.device("cuda", local_rank)``.
"""

from __future__ import annotations

import os
import subprocess
import sys

import torch
import torch.distributed as dist

import longspan as ls

N, HEADS, KEY_HEADS, WIDTH = 1024, 8, 2, 32
PATTERN = ls.Window(64) | ls.Sink(4)


def attention(rank: int, ranks: int) -> None:
    """Each rank computes its rows; rank 0 checks them against the whole."""
    torch.manual_seed(0)
    q = torch.randn(1, HEADS, N, WIDTH)
    k, v = torch.randn(2, 1, KEY_HEADS, N, WIDTH)
    lie = ls.parallel.Shards.even(N, ranks)
    own = [lie.take(t, rank, dim=2).requires_grad_() for t in (q, k, v)]

    out = ls.parallel.attend(*own, PATTERN)
    out.square().sum().backward()

    parts = [torch.empty(1, HEADS, size, WIDTH) for size in lie.sizes]
    dist.all_gather(parts, out.detach())
    if rank == 0:
        whole = ls.attend(q, k, v, PATTERN)
        print(ls.parallel.explain(PATTERN, N, ranks, heads=HEADS, key_heads=KEY_HEADS))
        print(f"attention: largest difference {(lie.join(parts, 2) - whole).abs().max():.1e}")


def small_llama() -> torch.nn.Module:
    """The same one on all ranks."""
    torch.manual_seed(0)
    return ls.hf.build_llama(
        vocab_size=300, hidden=64, layers=2, heads=4, kv_heads=2, intermediate=128, context=N
    )


def model(llama: torch.nn.Module, rank: int) -> None:
    """One training step over a zig-zag of the tokens."""
    optimizer = torch.optim.AdamW(llama.parameters(), lr=1e-3)
    ids = torch.randint(300, (1, N))
    with ls.hf.apply(llama, PATTERN), torch.no_grad():
        alone = llama(ids, labels=ids, use_cache=False).loss

    with ls.hf.parallel(llama, PATTERN, shards="zigzag") as handle:
        loss = llama(**handle.shard(ids, labels=ids)).loss
        loss.backward()
    # What a rank returns is its share of the loss: the sum over ranks is that of the batch.
    for weight in llama.parameters():
        dist.all_reduce(weight.grad)
    optimizer.step()
    total = loss.detach().clone()
    dist.all_reduce(total)
    if rank == 0:
        print(f"model: loss {total:.6f} on all ranks, {alone:.6f} on one")


def main() -> None:
    """Run both, in the processes that torchrun started."""
    torch.set_num_threads(1)
    # Before the processes meet: modules of torch that are imported afterwards keep the group in
    # their default arguments, and its threads then run on while the interpreter ends.
    llama = small_llama()
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    attention(rank, ranks)
    model(llama, rank)
    dist.destroy_process_group()


if __name__ == "__main__":
    if "RANK" in os.environ:
        main()
    else:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        raise SystemExit(subprocess.call([*command, "--nproc_per_node", "2", __file__]))
