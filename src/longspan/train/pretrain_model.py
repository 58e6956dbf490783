"""The model of a pretraining run: how it is built, takes a step, and is measured.

Axes: B sequences of a batch, L tokens of a sequence, V vocabulary, n sequences of evaluation text.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from longspan.hf.build import build_llama
from longspan.train.pretrain_config import PretrainConfig


def build(config: PretrainConfig, vocabulary: int) -> Any:
    """A Llama of the shape of a run, with random weights."""
    return build_llama(
        vocab_size=vocabulary,
        hidden=config.hidden,
        layers=config.layers,
        heads=config.heads,
        kv_heads=config.kv_heads,
        intermediate=config.intermediate,
        context=config.context,
        rope_theta=config.rope_theta,
    )


def add_dropout(model: Any, share: float) -> list[Any]:
    """Dropout on what each attention and MLP block adds; hooks whose ``remove`` takes it out."""
    if not share:
        return []
    added = [
        module for name, module in model.named_modules() if name.endswith(("o_proj", "down_proj"))
    ]
    return [
        module.register_forward_hook(
            lambda module, _, output: F.dropout(output, share, training=module.training)
        )
        for module in added
    ]


def make_optimizer(model: Any, config: PretrainConfig) -> torch.optim.AdamW:
    """AdamW whose weight decay leaves the norms alone."""
    # Norm weights are scales around one: decaying them towards zero only fights the next layer.
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    scales = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    return torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": config.weight_decay},
            {"params": scales, "weight_decay": 0.0},
        ],
        lr=config.lr,
        betas=(0.9, 0.95),
    )


def train_step(
    model: Any, optimizer: torch.optim.AdamW, batch_BL: Tensor, lr: float
) -> tuple[Tensor, Tensor]:
    """One optimizer step; its loss and gradient norm, which nobody has waited for."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    loss = sequence_loss(model, batch_BL)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach(), norm


def sequence_loss(model: Any, batch_BL: Tensor) -> Tensor:
    """Mean next-token cross-entropy of int64 [B, L] in nats; bfloat16 autocast on CUDA."""
    cuda = batch_BL.device.type == "cuda"
    with torch.autocast("cuda", torch.bfloat16) if cuda else nullcontext():
        logits_BLV = model(input_ids=batch_BL[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits_BLV.float().flatten(0, 1), batch_BL[:, 1:].flatten())


@torch.no_grad()
def mean_loss(model: Any, sequences_nL: Tensor | None, batch: int) -> float | None:
    """Loss over all sequences without dropout, ``batch`` at a time; None where there are none."""
    if sequences_nL is None:
        return None
    device = next(model.parameters()).device
    model.eval()
    total = 0.0
    for part_BL in sequences_nL.split(batch):
        total += sequence_loss(model, part_BL.to(device)).item() * len(part_BL)
    model.train()
    return total / len(sequences_nL)


@torch.no_grad()
def round_weights(model: Any, dtype: torch.dtype) -> None:
    """Give the weights the values that they have in another type, and leave theirs."""
    for parameter in model.parameters():
        parameter.copy_(parameter.to(dtype))
