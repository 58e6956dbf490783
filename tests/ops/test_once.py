"""Backward passes that cannot be differentiated again, of the kernels that run here."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tests.ops.cases import CASES, make_qkv
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from longspan.errors import Refusal
from longspan.ops.kernels import native as native_module
from longspan.ops.kernels.native import native
from longspan.ops.kernels.tiled import tiled

COMPILED = pytest.mark.skipif(
    native_module.library() is None,
    reason="the CPU kernel was not compiled: no C compiler, or not x86-64",
)
KERNELS = pytest.mark.parametrize(
    ("kernel", "dtype"),
    [
        pytest.param(native, torch.float32, marks=COMPILED, id="native"),
        pytest.param(tiled, torch.float64, id="tiled"),
    ],
)
CASE = next(case for case in CASES if case.name == "one-token")
Kernel = Callable[..., tuple[Tensor, Tensor]]


def inputs(dtype: torch.dtype) -> list[Tensor]:
    return [x.requires_grad_() for x in make_qkv(CASE, dtype)]


@KERNELS
@pytest.mark.parametrize("loss", [torch.sum, lambda out: out.square().sum()])
def test_second_derivative_is_refused(
    loss: Callable[[Tensor], Tensor], kernel: Kernel, dtype: torch.dtype
) -> None:
    q, k, v = inputs(dtype)
    out, _ = kernel(q, k, v, CASE.ranges(), 0.25)
    (dq,) = torch.autograd.grad(loss(out), q, create_graph=True)
    further = dq.square().sum() + q.square().sum()
    for again in (
        lambda: dq.sum().backward(retain_graph=True),
        lambda: further.backward(inputs=[k], retain_graph=True),
        *(lambda x=x: torch.autograd.grad(further, x, retain_graph=True) for x in (q, k, v)),
    ):
        with pytest.raises(Refusal, match="no second derivative; impl='reference' has"):
            again()
    # What attention does not depend on has one.
    other = torch.ones(3, dtype=dtype, requires_grad=True)
    (found,) = torch.autograd.grad((dq.sum() * other).sum(), other)
    assert torch.equal(found, dq.sum().detach().expand(3))


@KERNELS
def test_graphs_of_gradients_under_gradient_checkpointing(
    kernel: Kernel, dtype: torch.dtype
) -> None:
    qkv = inputs(dtype)

    def attend(*qkv: Tensor) -> Tensor:
        return kernel(*qkv, CASE.ranges(), 0.25)[0]

    found, wanted = (
        torch.autograd.grad(out.square().sum(), qkv, create_graph=True)
        for out in (checkpoint(attend, *qkv, use_reentrant=False), attend(*qkv))
    )
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x, y)


@KERNELS
def test_a_batch_of_gradients_is_refused(kernel: Kernel, dtype: torch.dtype) -> None:
    out, _ = kernel(*(qkv := inputs(dtype)), CASE.ranges(), 0.25)
    batch = torch.ones(2, *out.shape, dtype=dtype)
    with pytest.raises(Refusal, match="no batch of gradients"):
        torch.autograd.grad(out, qkv[0], batch, is_grads_batched=True)
