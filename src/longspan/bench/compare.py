"""Compare patterns and mechanisms on one model: work, sight, memory, time, error; all computed.

Every entry becomes a layer beside each attention module of the embedded model, with the module's
own projections, and reads what that module reads on held-out text. Work, sight, state and error
are computed on a CPU in float32, whatever the device; time and memory are measured on the device.

    work    operations of the attention, without projections: of a pattern its pairs, of a
            mechanism all matrix products that it really computes; and their growth
    sight   pairs that rows read: of a pattern its mask, of a mechanism its gradients
    state   what decoding keeps, in keys and values of so many tokens
    error   |out - dense| / |out of dense| of the layer's output, for each layer
    time    one layer, projections included, in turns with dense causal attention

A record per entry; a run that was stopped goes on where it was.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longspan.bench import compare_reach as sight
from longspan.bench import memory, tally
from longspan.bench.compare_entries import DenseLayer, Entry, PatternLayer
from longspan.bench.setting import DTYPES, WAYS
from longspan.bench.timing import in_turns, summary
from longspan.errors import InputError, LongspanError
from longspan.eval.environment import environment
from longspan.eval.records import Records
from longspan.hf.beside import attention_inputs, layers_beside
from longspan.hf.models import load_model
from longspan.mechanism.layer import MechanismLayer
from longspan.pattern import Dense
from longspan.planning import plan
from longspan.train.data import python_sources, tokenize_documents
from longspan.train.recipe import demo_model

Progress = Callable[[str, int, int, str], None]
# Tokens of the two measurements of the state, in the middle of chunks, which are empty at their
# borders.
_STATE = (248, 504)
# Seconds for the rounds of one entry at one length.
_PATIENCE = 0.2


@dataclass(frozen=True, kw_only=True)
class Compare:
    """What is asked.

    Attributes:
        entries: what is compared.
        lengths: tokens at which work is counted, and time and memory are measured.
        tokens: length for sight; pairs are followed one by one.
        followed: rows whose sight is followed through a mechanism; of a pattern, all are.
        near: keys that count as near.
        text: tokens of held-out text for the error.
        device: of time and memory.
        dtype: of time and memory.
        rounds: rounds that count, fewer for what takes long; 0: neither time nor memory.
        threads: of the CPU; with more, layers as small as these mostly wait for each other.
        seed: of what mechanisms draw at random.
    """

    entries: tuple[Entry, ...]
    lengths: tuple[int, ...] = (256, 512)
    tokens: int = 256
    followed: int = 4
    near: int = 32
    text: int = 512
    device: str = "cpu"
    dtype: str = "float32"
    rounds: int = 3
    threads: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.entries:
            raise InputError("expected at least one pattern or mechanism")
        sizes = {name: getattr(self, name) for name in ("tokens", "followed", "near", "text")}
        if not self.lengths or min(*self.lengths, *sizes.values()) < 2:
            given = ", ".join(f"{name}={value}" for name, value in sizes.items())
            raise InputError(
                "expected lengths and sizes of at least 2, got "
                f"lengths={','.join(map(str, self.lengths))}, {given}"
            )
        if self.rounds < 0:
            raise InputError(f"rounds must be at least 0, got {self.rounds}")
        if self.threads < 1:
            raise InputError(f"threads must be at least 1, got {self.threads}")
        if self.dtype not in DTYPES:
            raise InputError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        kind = self.device.split(":")[0]
        if kind not in ("cpu", "cuda"):
            raise InputError(f"device must be cpu or cuda, got {self.device!r}")
        if kind == "cuda" and not torch.cuda.is_available():
            raise InputError("device is cuda, and torch sees none; leave --device out, or cpu")

    def settings(self) -> dict[str, Any]:
        """What a record depends on besides its entry; versions and machine."""
        sizes = {key: value for key, value in vars(self).items() if key != "entries"}
        return {**sizes, "model": "the embedded model", "environment": environment()}


def run(
    asked: Compare, records: Records, progress: Progress = lambda *_: None
) -> list[dict[str, Any]]:
    """Measure what is asked and not in the records yet; returns all records asked for."""
    total = len(asked.entries)
    todo = any(one.text not in records for one in asked.entries)
    threads = torch.get_num_threads()
    torch.set_num_threads(asked.threads)
    try:
        bench = _Bench(asked) if todo else None
        for done, one in enumerate(asked.entries):
            progress("compare", done, total, one.text)
            if bench is not None and one.text not in records:
                records.add(one.text, bench.measure(one))
    finally:
        torch.set_num_threads(threads)
    progress("compare", total, total, "")
    return [{"entry": one.text, **records[one.text]} for one in asked.entries]


class _Bench:
    """The model and its text, and what is measured with them."""

    def __init__(self, asked: Compare) -> None:
        self.asked = asked
        self.model, tokenizer = load_model(demo_model())
        longest = max(*asked.lengths, asked.text, asked.tokens, *_STATE)
        ids = _text(tokenizer, longest)
        # Longer runs than there is text read it again: nothing but time depends on that.
        self.ids = ids.repeat(-(-longest // len(ids)))[:longest][None]
        self.text = attention_inputs(self.model, self.ids[:, : asked.text])
        self.short = attention_inputs(self.model, self.ids[:, : asked.tokens])
        self.longest = longest
        self.exact = {
            True: self._outputs(Entry(text="", kind=DenseLayer)),
            False: self._outputs(Entry(text="", kind=PatternLayer, options={"pattern": Dense()})),
        }
        self.timed: Any = None
        # Bytes of the dense layer at each length.
        self.dense_peaks: dict[int, int] = {}

    def measure(self, one: Entry) -> dict[str, Any]:
        """One record; of an entry that refuses, the reason."""
        try:
            layers = self._layers(self.model, one)
            return {
                "group": one.group,
                "causal": one.causal,
                "formula": one.formula,
                **self._sight(one, layers),
                **self._state(one, layers[0]),
                **self._error(one, layers),
                **self._lengths(one, layers[0]),
            }
        except (LongspanError, torch.OutOfMemoryError) as error:
            why = str(error).split("\n", 1)[0]
            return {"group": one.group, "causal": one.causal, "refused": why}

    def _layers(self, model: Any, one: Entry) -> list[MechanismLayer]:
        torch.manual_seed(self.asked.seed)
        found = layers_beside(model, one.kind, one.at(self.longest))
        for number, layer in enumerate(found):
            if isinstance(layer, PatternLayer):
                layer.layer = number
        return found

    @torch.no_grad()
    def _outputs(self, one: Entry) -> list[Tensor]:
        return [
            layer(x) for layer, x in zip(self._layers(self.model, one), self.text, strict=True)
        ]

    def _sight(self, one: Entry, layers: list[MechanismLayer]) -> dict[str, Any]:
        if one.pattern is not None:
            rows = sight.starts(self.asked.tokens, self.asked.tokens)
            pairs = sight.pattern_layers(
                one.pattern, self.asked.tokens, layers[0].heads, len(layers)
            )
            seen = sight.follow(pairs, rows)
        else:
            rows = sight.starts(self.asked.tokens, self.asked.followed)
            seen = sight.walk(layers, self.short, rows)
        found = sight.shares(seen, rows, self.asked.near, one.causal)
        leaks = None
        if one.causal:
            leaks = max(sight.leak(a, x) for a, x in zip(layers, self.short, strict=True))
        return {**found, "leak": leaks}

    def _state(self, one: Entry, layer: MechanismLayer) -> dict[str, Any]:
        sizes: list[tuple[int, float]] = []
        x = self._first(_STATE[-1])
        for n in _STATE if one.causal else ():
            if one.pattern is not None:
                size = sight.pattern_state(one.pattern, n, layer.heads, layer.kv_heads)
            else:
                size = sight.mechanism_state(layer, x[:, :n])
            if size is not None:
                sizes.append((n, size))
        return {
            "state": sizes[-1][1] if sizes else None,
            "state_growth": sight.growth(sizes),
        }

    @torch.no_grad()
    def _error(self, one: Entry, layers: list[MechanismLayer]) -> dict[str, Any]:
        each = [
            float((layer(x) - exact).norm() / exact.norm())
            for layer, x, exact in zip(layers, self.text, self.exact[one.causal], strict=True)
        ]
        return {"error": sum(each) / len(each), "errors": each}

    def _lengths(self, one: Entry, layer: MechanismLayer) -> dict[str, Any]:
        rows: list[dict[str, Any]] = []
        for n in self.asked.lengths:
            dense = 2 * layer.heads * layer.head_dim * n * (n + 1)
            if one.pattern is not None:
                pairs = plan(one.pattern.at_layer(0), n, layer.heads).pairs
                work = 4 * layer.head_dim * pairs
            else:
                work = tally.products(layer, self._first(n))
            rows.append({"n": n, "operations": work, "of_dense": work / dense})
            if self.asked.rounds:
                rows[-1] |= self._clock(one, n)
        counted = [(row["n"], row["operations"]) for row in rows]
        return {"exponent": sight.growth(counted), "lengths": rows}

    def _clock(self, one: Entry, n: int) -> dict[str, Any]:
        asked = self.asked
        if self.timed is None:
            self.timed, _ = load_model(demo_model(), dtype=asked.dtype, device=asked.device)
        ours, dense = (
            self._layers(self.timed, which)[0]
            for which in (one, Entry(text="dense", kind=DenseLayer))
        )
        x = self._first(n).to(device=asked.device, dtype=getattr(torch, asked.dtype))
        steps = {
            (name, way): _step(layer, x, way)
            for way in WAYS
            for name, layer in (("ours", ours), ("dense", dense))
        }
        # Memory comes first: it warms up.
        peak = memory.on_gpu if x.is_cuda else tally.peak_bytes
        own_peak = peak(steps["ours", "forward+backward"])
        if n not in self.dense_peaks:
            self.dense_peaks[n] = peak(steps["dense", "forward+backward"])
        begin = time.perf_counter()
        steps["ours", "forward+backward"]()
        once = time.perf_counter() - begin
        keys = {" ".join(key): key for key in steps}
        taken = in_turns(
            {name: steps[key] for name, key in keys.items()},
            rounds=min(asked.rounds, max(1, int(_PATIENCE / once))),
            device=asked.device,
            warm_up=int(x.is_cuda),
        )
        found: dict[str, Any] = {}
        for way in WAYS:
            own, other = (summary(taken[f"{name} {way}"]) for name in ("ours", "dense"))
            found[way] = {
                "seconds": own["seconds"],
                "spread": own["spread"],
                "rounds": own["rounds"],
                "dense_seconds": other["seconds"],
                "of_dense": own["seconds"] / other["seconds"],
            }
        return {
            **found,
            "memory_bytes": own_peak,
            "dense_memory_bytes": self.dense_peaks[n],
        }

    @torch.no_grad()
    def _first(self, n: int) -> Tensor:
        """What the first attention module reads, without running the others [1, N, d_model]."""
        return self.model.model.layers[0].input_layernorm(
            self.model.model.embed_tokens(self.ids[:, :n])
        )


def _text(tokenizer: Any, count: int) -> Tensor:
    """Held-out tokens [M], at least ``count`` if there are as many."""
    found: list[Tensor] = []
    for document in python_sources("heldout"):
        found += tokenize_documents(tokenizer, [document])
        if sum(map(len, found)) >= count:
            break
    return torch.cat(found)


def _step(layer: MechanismLayer, x: Tensor, way: str) -> Callable[[], object]:
    leaf = x.detach().clone().requires_grad_()
    slope = torch.ones_like(x)

    def forward() -> object:
        with torch.no_grad():
            return layer(x)

    if way == "forward":
        return forward
    return lambda: torch.autograd.grad(layer(leaf), leaf, slope)
