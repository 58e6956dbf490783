"""A report of the form that longspan.train.extend writes."""

from __future__ import annotations

import math
from typing import Any

import pytest

LENGTHS = (512, 1024, 2048, 4096)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


def measured(start: float, growth: float, passkey: float) -> dict[str, Any]:
    """Losses that grow (or fall) with the position beyond 512."""
    edges = [128 * i for i in range(33)]
    nll = [start + growth * max(0.0, math.log2((x + 64) / 512)) for x in edges[:-1]]
    rows = [
        {
            "length": n,
            "nll": start + growth * math.log2(n / 512) / 2,
            "perplexity": math.exp(start + growth * math.log2(n / 512) / 2),
            "windows": 32768 // n,
            "tokens": 32768 - 32768 // n,
        }
        for n in LENGTHS
    ]
    accuracy = [[passkey * d if n > 512 else 1.0 for d in DEPTHS] for n in LENGTHS]
    return {
        "perplexity": {
            "protocol": "blocks",
            "stride": 256,
            "lengths": rows,
            "positions": {"length": 4096, "edges": edges, "nll": nll},
        },
        "passkey": {
            "style": "code",
            "lengths": list(LENGTHS),
            "depths": list(DEPTHS),
            "trials": 4,
            "accuracy": accuracy,
            "nll": accuracy,
        },
    }


def arm(pattern: str | None, seconds: float, start: float) -> dict[str, Any]:
    """One training."""
    losses = [start + 1.2 * math.exp(-i / 15) + 0.1 * math.sin(7 * i) for i in range(120)]
    return {
        "pattern": pattern,
        "trained_parameters": 123_456,
        "losses": losses,
        "seconds": seconds,
        "wall_seconds": seconds,
        "tokens_per_second": 491_520 / seconds,
        "peak_cuda_bytes": None,
        **measured(start, -0.06, 0.9),
    }


@pytest.fixture
def report() -> dict[str, Any]:
    """A whole report with both arms."""
    return {
        "command": 'longspan extend model --length 4096 --pattern "scca.flow(512)" --out run',
        "settings": {
            "model": "models/tiny <llama>",
            "length": 4096,
            "pattern": "scca.flow(512)",
            "loop": {"steps": 120, "lr": 1e-3, "accumulate": 1},
            "suite": {"lengths": LENGTHS, "depths": DEPTHS, "trials": 4},
            "rope": "yarn",
            "batch": 1,
            "data": (),
            "embeddings_and_norms": True,
            "eval_attention": "dense",
        },
        "job": {
            "model": "models/tiny <llama>",
            "parameters": 2_000_000,
            "trained_length": 512,
            "length": 4096,
            "rope": {"rope_type": "yarn", "factor": 8.0},
            "pattern": "scca.flow(512)",
            "pattern_share_of_causal": 0.13,
            "epochs": 0.25,
        },
        "environment": {
            "python": "3.11.2",
            "platform": "Linux",
            "packages": {"torch": "2.13.0", "triton": None},
            "cpu": "A CPU",
            "cores": 2,
            "threads": 2,
            "memory_gib": 23.5,
            "cuda": [],
            "cuda_version": None,
            "mps": False,
        },
        "base": measured(1.6, 2.1, 0.0),
        "scaled": measured(1.75, 0.2, 0.3),
        "trained": arm("scca.flow(512)", 52.0, 1.58),
        "dense": arm(None, 95.0, 1.56),
    }
