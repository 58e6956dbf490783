"""Policies as text, how they add up and what is refused."""

from __future__ import annotations

import pytest

import longspan.kv as kv
from longspan.errors import PolicyError

TEXTS = [
    "sinks(4) + recent(256) + heavy(256)",
    "heavy(coverage(0.95), true)",
    "heavy(0.25, streaming=false)",
    "every(64, sinks(0) + tova(16))",
    "each_step(snapkv(64, 8, pool=max))",
    "after_prefill(pyramidkv(0.1, beta=3.0))",
    "adakv(snapkv(256, kernel=7, pool=max))",
    "adakv(keydiff(0.25), 0.5) + recent(8)",
    "keynorm(9) + recent(0.1)",
    "embeddingnorm(0.25) + recent(8)",
    "embeddingnorm(9, false)",
    "expected_attention(128, epsilon=0.01)",
    "duo([[0.1, 0.9], [0.2, 0.3]], sinks=2)",
    "recent(128) + quest(256)",
    "everything()",
]


@pytest.mark.parametrize("text", TEXTS)
def test_text_round_trips(text):
    policy = kv.parse(text)
    assert str(policy) == text
    assert kv.parse(str(policy)) == policy
    assert hash(policy) == hash(kv.parse(text))


def test_operators_are_the_text():
    policy = kv.Sinks(4) | kv.Recent(256) | kv.Heavy(256)
    assert policy == kv.Sinks(4) + kv.Recent(256) + kv.Heavy(256)
    assert policy == kv.parse("sinks(4)|recent(256) + HEAVY(256)")
    assert kv.every(8, policy) == kv.parse("every(8, sinks(4)+recent(256)+heavy(256))")
    assert kv.AdaKV(256) == kv.AdaKV(kv.SnapKV(256, kernel=7, pool="max"))


def test_when():
    assert kv.parse("snapkv(9) + recent(4)").when == 0
    assert kv.parse("snapkv(9) + heavy(4)").when == 1
    assert kv.parse("recent(4)").when == 1
    assert kv.parse("adakv(expected_attention(9))").when == 0
    assert kv.parse("after_prefill(heavy(4))").when == 0
    assert kv.parse("every(7, heavy(4))").when == 7
    assert not kv.parse("quest(64)").evicts


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the cache policy is empty"),
        ("heavy", r"heavy\(budget\)"),
        ("hevy(3)", "did you mean 'heavy'"),
        ("heavy(-1)", "whole number from 0"),
        ("heavy(3)+", "expected a cache policy"),
        ("heavy(3) heavy(3)", "expected an operator"),
        ("heavy(0.5, ages=true)", "did you mean 'age'"),
        ("heavy(tova(3))", "expected a budget"),
        ("sinks(4)+sinks(2)", "given twice"),
        ("keydiff(coverage(0.5))", "attention mass"),
        ("embeddingnorm(coverage(0.5))", "attention mass"),
        ("embeddingnorm(3, large=2)", "true or false, got 2"),
        ("coverage(0.5)", "is a budget"),
        ("heavy(3) + coverage(0.4)", "only parts"),
        ("each_step(heavy(3)) + recent(4)", "say when for the whole"),
        ("each_step(each_step(heavy(3)))", "already when"),
        ("every(0, heavy(3))", "from 1"),
        ("quest(47)", "at least three pages of 16, 48 tokens, got 47"),
        ("quest(11, page=4)", "at least three pages of 4, 12 tokens, got 11"),
        ("recent(1.5)", "at most 1"),
        ("recent(coverage(0.5))", "coverage could count"),
        ("snapkv(9, kernel=4)", "odd kernel"),
        ("snapkv(9, pool=sum)", "avg or max"),
        ("pyramidkv(9, beta=0)", "beta"),
        ("pyramidkv(coverage(0.5))", "not coverage"),
        ("adakv(9, 2)", "floor"),
        ("adakv(adakv(9))", "expected a scorer"),
        ("duo([[1, 2], [3]])", "one list of numbers"),
        ("duo([[1, 2]], 2)", "sparsity"),
        ("expected_attention(9, 0)", "future"),
        ("window(3)", "no cache policy is called"),
    ],
)
def test_errors_say_what_is_wrong(text, message):
    with pytest.raises(PolicyError, match=message):
        kv.parse(text)


def test_other_values_are_refused():
    with pytest.raises(PolicyError, match="as text"):
        kv.parse(3)  # pyright: ignore[reportArgumentType]
    with pytest.raises(PolicyError, match="or its text"):
        kv.Heavy(3) + 4


def test_a_share_needs_no_zero_before_the_point():
    assert kv.parse("recent(.5) + heavy(.25)") == kv.parse("recent(0.5) + heavy(0.25)")
