"""Mechanisms learn the dense attention of their layers, and go on after a stop."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

import longspan as ls
from longspan.errors import InputError
from longspan.train.distill import OutputErrors, distill
from longspan.train.loop import LoopConfig
from longspan.train.recipe import demo_model

CONFIG = LoopConfig(steps=4, lr=0.05, warmup=0, save_every=2)


def batch_at(number):
    draw = torch.Generator().manual_seed(number)
    return torch.randint(5, 200, (2, 32), generator=draw)


def converted(name="LinearAttention", **options):
    torch.manual_seed(0)
    model, _ = ls.hf.load_model(demo_model())
    ls.hf.convert(model, name, **options)
    return model


def test_outputs_come_nearer_and_a_stopped_run_goes_on(tmp_path):
    model = converted(layers=[0, 2])
    before = {name: p.clone() for name, p in model.named_parameters()}
    asked = {name: p.requires_grad for name, p in model.named_parameters()}
    apart = OutputErrors(model)(batch_at(99))
    assert apart.shape == (2,)
    records = distill(model, batch_at, CONFIG, tmp_path / "whole")
    assert (OutputErrors(model)(batch_at(99)) < 0.97 * apart).all()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) is ("feature_map" not in name)
        assert p.requires_grad == asked[name]
        assert p.grad is None

    def stopping(number):
        if number == 3:
            raise KeyboardInterrupt
        return batch_at(number)

    with pytest.raises(KeyboardInterrupt):
        distill(converted(layers=[0, 2]), stopping, CONFIG, tmp_path / "parts")
    again = distill(converted(layers=[0, 2]), batch_at, CONFIG, tmp_path / "parts")
    assert [r["loss"] for r in again] == [r["loss"] for r in records]

    other, _ = ls.hf.load_model(demo_model())
    ls.hf.load_mechanism(other, tmp_path / "parts")
    with torch.no_grad():
        found, wanted = other(batch_at(7)).logits, model(batch_at(7)).logits
    torch.testing.assert_close(found, wanted)


def test_the_error_is_that_of_the_outputs():
    model = converted("PooledChunkAttention", chunk=32, pool="learned")
    # One chunk is dense attention.
    assert (OutputErrors(model)(batch_at(0)) < 1e-8).all()


def test_a_model_without_new_weights_is_refused(tmp_path):
    model, _ = ls.hf.load_model(demo_model())
    with pytest.raises(InputError, match=r"convert first"):
        distill(model, batch_at, CONFIG, tmp_path)
