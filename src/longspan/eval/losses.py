"""Next-token losses of a causal language model without an [N, vocab] tensor of logits.

A context of 32768 tokens and a vocabulary of 128256 words make 8.6 GB of bfloat16 logits, and
several times that in the backward. Here the model body runs once and its head runs on pieces of
the sequence; with gradients each piece is recomputed in the backward. Memory O(chunk * vocab), one
extra product with the head in training.

Axes: B batch, N tokens, E hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint


class TokenLoss:
    """Cross entropy of every token given those before it, for any Hugging Face causal language
    model.

    Args:
        model: a causal language model, or a PEFT model around one.
        chunk: tokens whose logits exist at a time.

    On CUDA the model runs under bfloat16 autocast; elsewhere in the dtype of its weights.
    """

    def __init__(self, model: nn.Module, chunk: int = 1024) -> None:
        self.model = model
        self.chunk = chunk
        self.device = next(model.parameters()).device
        self._lm = _causal_lm(model)
        self._finish = _finish_logits(self._lm.config.get_text_config())
        self._split = self._body_and_head_reproduce_logits()

    def __call__(self, ids_BN: Tensor) -> Tensor:
        """Losses in nats, float32 [B, N - 1]: entry ``i`` is how badly token ``i + 1`` was
        predicted.

        Args:
            ids_BN: int64 token ids on the model's device, N >= 2.
        """
        with self._autocast():
            return self._losses(ids_BN)

    def _losses(self, ids_BN: Tensor) -> Tensor:
        target_BN = ids_BN[:, 1:]
        if not self._split:
            logits = self._lm(input_ids=ids_BN, use_cache=False).logits[:, :-1]
            return _cross_entropy(logits, target_BN)
        hidden_BNE = self._hidden(ids_BN)[:, :-1]
        pieces = []
        step = max(1, self.chunk // ids_BN.shape[0])
        for start in range(0, target_BN.shape[1], step):
            piece = slice(start, start + step)
            arguments = (hidden_BNE[:, piece], target_BN[:, piece])
            if torch.is_grad_enabled():
                pieces.append(checkpoint(self._piece, *arguments, use_reentrant=False))
            else:
                pieces.append(self._piece(*arguments))
        return torch.cat(pieces, dim=1)

    @torch.no_grad()
    def predictions(self, ids_BN: Tensor, last: int) -> tuple[Tensor, Tensor]:
        """What is expected in the last places: best ids int64 and losses float32, [B, last]."""
        asked = slice(-last - 1, -1)
        with self._autocast():
            if self._split:
                logits = self._logits(self._hidden(ids_BN)[:, asked])
            else:
                logits = self._lm(input_ids=ids_BN, use_cache=False).logits[:, asked]
        return logits.argmax(-1), _cross_entropy(logits, ids_BN[:, -last:])

    def _autocast(self) -> torch.autocast:
        return torch.autocast("cuda", torch.bfloat16, enabled=self.device.type == "cuda")

    def _hidden(self, ids_BN: Tensor) -> Tensor:
        return self._lm.base_model(input_ids=ids_BN, use_cache=False).last_hidden_state

    def _logits(self, hidden_BNE: Tensor) -> Tensor:
        return self._finish(self._lm.get_output_embeddings()(hidden_BNE))

    def _piece(self, hidden_BNE: Tensor, target_BN: Tensor) -> Tensor:
        return _cross_entropy(self._logits(hidden_BNE), target_BN)

    @torch.no_grad()
    def _body_and_head_reproduce_logits(self) -> bool:
        # Models add their own last steps (scales, caps, norms between body and head). Eight tokens
        # tell whether ours are the same; if not, whole logits are computed, which is right and
        # only costs memory.
        if self._lm.get_output_embeddings() is None or self._lm.base_model is self._lm:
            return False
        training = self._lm.training
        self._lm.eval()
        try:
            vocabulary = self._lm.get_input_embeddings().weight.shape[0]
            ids_BN = torch.arange(8, device=self.device)[None] % vocabulary
            whole = self._lm(input_ids=ids_BN, use_cache=False).logits.float()
            ours = self._logits(self._hidden(ids_BN)).float()
            return torch.allclose(whole, ours, rtol=1e-2, atol=1e-3)
        finally:
            self._lm.train(training)


def _causal_lm(model: nn.Module) -> Any:
    inner = getattr(model, "get_base_model", None)
    return inner() if inner is not None else model


def _finish_logits(config: Any) -> Callable[[Tensor], Tensor]:
    scale = getattr(config, "logit_scale", None) or 1.0
    divisor = getattr(config, "logits_scaling", None) or 1.0
    cap = getattr(config, "final_logit_softcapping", None)

    def finish(logits: Tensor) -> Tensor:
        logits = logits * (scale / divisor) if scale != divisor else logits
        return cap * torch.tanh(logits / cap) if cap else logits

    return finish


def _cross_entropy(logits: Tensor, target_BN: Tensor) -> Tensor:
    flat = functional.cross_entropy(
        logits.float().flatten(0, 1), target_BN.flatten(), reduction="none"
    )
    return flat.view(target_BN.shape)
