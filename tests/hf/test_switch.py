"""Patterns in models: every result is held against the model's own, masked attention."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import longspan as ls
from longspan.errors import InputError, PatternError, Refusal
from longspan.hf.recompute import recompute_layers

PATTERNS = [
    ls.Causal(),
    ls.Window(5),
    ls.Window(6) | ls.Sink(2),
    ls.ShiftedChunk(8),
    ls.SCCA.flow(4),
    ls.PerHead(ls.Window(4), ls.Causal()),
    ls.PerLayer(ls.Window(3), ls.Chunk(8)),
    ls.Chunk(8, causal=False),
]
N = 29


def close(got, expected):
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.fixture(autouse=True)
def without_gradients(request):
    with torch.set_grad_enabled("gradients" in request.node.name):
        yield


def logits(model, ids, **kwargs):
    return model(ids, use_cache=False, **kwargs).logits


def test_causal_equals_the_models_own_attention(model, tiny):
    ids = tiny.tokens(2, N)
    for own in ("sdpa", "eager"):
        model.set_attn_implementation(own)
        expected = logits(model, ids)
        with ls.hf.apply(model, ls.Causal()):
            close(logits(model, ids), expected)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_pattern_equals_an_explicit_mask(model, tiny, pattern):
    ids = tiny.tokens(2, N)
    expected = logits(tiny.oracle(model, pattern), ids)
    ls.hf.apply(model, pattern)
    close(logits(model, ids), expected)


@pytest.mark.parametrize("impl", ["reference", "tiled"])
def test_named_kernels_agree(tiny, impl):
    model, ids = tiny.build("llama"), tiny.tokens(2, N)
    expected = logits(tiny.oracle(model, PATTERNS[2]), ids)
    ls.hf.apply(model, PATTERNS[2], impl=impl)
    close(logits(model, ids), expected)


@pytest.mark.parametrize("pattern", PATTERNS[:5], ids=str)
@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_padded_rows_equal_each_text_alone(model, tiny, pattern, side):
    ls.hf.apply(model, pattern)
    lengths, longest = (N, 17, 1), N + (4 if side == "both" else 0)
    ids = torch.zeros(len(lengths), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        start = {"left": longest - length, "right": 0, "both": 2}[side]
        ids[row, start : start + length] = tiny.tokens(1, length, seed=row)[0]
        mask[row, start : start + length] = 1
    got = logits(model, ids, attention_mask=mask)
    for row in range(len(lengths)):
        real = mask[row].bool()
        close(got[row, real], logits(model, ids[row, real][None])[0])


def test_padding_would_matter(tiny):
    """The tests above can fail: without the mask, padding changes the result."""
    model = tiny.build("llama")
    ls.hf.apply(model, ls.Causal())
    ids = tiny.tokens(1, N)
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), ids], dim=1)
    assert (logits(model, padded)[:, 5:] - logits(model, ids)).abs().max() > 0.01


@pytest.mark.parametrize("pattern", PATTERNS[:5], ids=str)
def test_packed_documents_equal_each_document_alone(model, tiny, pattern):
    ls.hf.apply(model, pattern)
    documents = [tiny.tokens(1, length, seed=length) for length in (11, 1, 17)]
    positions = torch.cat([torch.arange(d.shape[1]) for d in documents])[None]
    got = logits(model, torch.cat(documents, dim=1), position_ids=positions)
    alone = torch.cat([logits(model, document) for document in documents], dim=1)
    close(got, alone)


def test_documents_that_only_flash_attention_is_told_of_are_refused(tiny):
    """As DataCollatorWithFlattening says them; other attentions of transformers pass them over."""
    model = tiny.build("llama")
    ls.hf.apply(model, ls.Causal())
    ends = torch.tensor([0, 11, 18], dtype=torch.int32)
    told = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 11, "max_length_k": 11}
    ids, places = tiny.tokens(1, 18), torch.cat([torch.arange(11), torch.arange(7)])[None]
    expected = logits(model, ids, position_ids=places)
    close(logits(model, ids, position_ids=places, **told), expected)
    for more in ({}, {"attention_mask": torch.ones_like(ids)}):
        with pytest.raises(InputError, match="cu_seq_lens_q of 2 packed documents"):
            logits(model, ids, **told, **more)
    one = {**told, "cu_seq_lens_q": torch.tensor([0, 18])}
    close(logits(model, ids, **one), logits(model, ids))


def test_packed_documents_with_a_cache_are_refused(tiny):
    model = tiny.build("llama")
    ls.hf.apply(model, ls.Causal())
    positions = torch.cat([torch.arange(9), torch.arange(9)])[None]
    with pytest.raises(InputError, match="use_cache=False"):
        model(tiny.tokens(1, 18), position_ids=positions, use_cache=True)


def test_families_that_pack_no_documents_are_said(tiny):
    model = tiny.build("gpt-oss")
    ls.hf.apply(model, "causal()")
    packed = torch.cat([torch.arange(9), torch.arange(9)])[None]
    with pytest.raises(InputError, match=r"passed already, this family .* its own row"):
        model(tiny.tokens(1, 18), position_ids=packed, use_cache=False)


def test_packed_documents_beside_a_mask_are_refused(tiny):
    model = tiny.build("llama")
    ls.hf.apply(model, ls.Causal())
    ids = tiny.tokens(2, 18)
    mask = torch.ones_like(ids)
    packed = torch.cat([torch.arange(9), torch.arange(9)]).expand(2, -1)
    with pytest.raises(InputError, match="start again within a row"):
        model(ids, attention_mask=mask, position_ids=packed, use_cache=False)
    mask[0, -4:] = mask[1, :5] = 0
    with pytest.raises(InputError, match="start again within a row"):
        model(ids, attention_mask=mask, position_ids=packed[:1])
    # What padding is said to be at does not matter, and positions may leave gaps.
    counted = mask.cumsum(1) - 1
    for positions in (counted.clamp(min=0), counted.masked_fill(mask == 0, 1), counted * 3):
        logits(model, ids, attention_mask=mask, position_ids=positions)


@pytest.mark.parametrize("pattern", PATTERNS[:7], ids=str)
@pytest.mark.parametrize("split", [[24] + [1] * 5, [1, 9, 19]], ids=["decode", "chunked"])
def test_prefill_and_decode_equal_one_forward(model, tiny, pattern, split):
    ids = tiny.tokens(2, N)
    ls.hf.apply(model, pattern)
    expected = logits(model, ids)
    cache, parts = transformers_cache(model), []
    for part in ids.split(split, dim=1):
        parts.append(model(part, past_key_values=cache, use_cache=True).logits)
    close(torch.cat(parts, dim=1), expected)


def transformers_cache(model):
    from transformers import DynamicCache

    return DynamicCache(config=model.config)


@pytest.mark.parametrize("pattern", [PATTERNS[2], PATTERNS[4]], ids=str)
@pytest.mark.parametrize("cache", [None, "static"])
def test_generate_equals_full_forwards(model, tiny, pattern, cache):
    ls.hf.apply(model, pattern)
    lengths = (13, 8)
    ids = torch.zeros(2, 13, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, -length:] = tiny.tokens(1, length, seed=row)[0]
        mask[row, -length:] = 1
    got = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=6,
        do_sample=False,
        **({} if cache is None else {"cache_implementation": cache}),
    )
    for row, length in enumerate(lengths):
        alone = ids[row : row + 1, -length:]
        for _ in range(6):
            alone = torch.cat([alone, logits(model, alone)[:, -1:].argmax(dim=-1)], dim=1)
        assert got[row, -length - 6 :].tolist() == alone[0].tolist()


@pytest.mark.parametrize("pattern", [PATTERNS[2], PATTERNS[4], PATTERNS[6]], ids=str)
def test_training_gradients_equal_an_explicit_mask(model, tiny, pattern):
    ids = tiny.tokens(2, N)
    oracle = tiny.oracle(model, pattern).train()
    oracle(ids, labels=ids, use_cache=False).loss.backward()
    ls.hf.apply(model.train(), pattern)
    model(ids, labels=ids, use_cache=False).loss.backward()
    wanted = dict(oracle.named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        torch.testing.assert_close(parameter.grad, wanted[name].grad, atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(model, tiny, reentrant):
    ids = tiny.tokens(2, N)
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    ls.hf.apply(model.train(), PATTERNS[2])

    def gradients():
        model.zero_grad()
        model(ids, attention_mask=mask, labels=ids, use_cache=False).loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    expected = gradients()
    recompute_layers(model, reentrant=reentrant)
    for got, wanted in zip(gradients(), expected, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("then", [None, ls.Window(3)], ids=str)
def test_recomputing_gradients_after_removal_is_refused(tiny, then):
    model, ids = tiny.build("llama").train(), tiny.tokens(1, N)
    recompute_layers(model)
    with ls.hf.apply(model, PATTERNS[2]):
        loss = model(ids, labels=ids, use_cache=False).loss
    if then is not None:
        ls.hf.apply(model, then)
    with pytest.raises(Refusal, match="checkpointing"):
        loss.backward()


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_the_future_never_reaches_the_past(model, tiny, pattern):
    ls.hf.apply(model, pattern)
    ids, at = tiny.tokens(2, N), 13
    changed = torch.cat([ids[:, :at], tiny.tokens(2, N - at, seed=9)], dim=1)
    assert torch.equal(logits(model, ids)[:, :at], logits(model, changed)[:, :at])
    assert not torch.equal(logits(model, ids)[:, at:], logits(model, changed)[:, at:])


def test_remove_restores_exactly(model, tiny):
    ids = tiny.tokens(2, N)
    expected, before = logits(model, ids), model.config._attn_implementation
    first = ls.hf.apply(model, ls.Window(3))
    assert not torch.equal(logits(model, ids), expected)
    second = ls.hf.apply(model, "window(4) | sink(1)")
    second.remove()
    assert model.config._attn_implementation == first.name
    # The first handle restores what was there before it; the second has nothing left to do.
    second.remove()
    first.remove()
    assert model.config._attn_implementation == before
    assert torch.equal(logits(model, ids), expected)


def test_remove_without_the_handle(tiny):
    model = tiny.build("llama")
    model.set_attn_implementation("eager")
    ls.hf.apply(model, ls.Window(3))
    ls.hf.apply(model, ls.Window(4))
    ls.hf.remove(model)
    assert model.config._attn_implementation == "eager"
    ls.hf.remove(model)
    assert model.config._attn_implementation == "eager"


def test_the_block_ends_after_an_error(tiny):
    model = tiny.build("llama")
    with pytest.raises(RuntimeError, match="inside"), ls.hf.apply(model, ls.Window(3)):
        raise RuntimeError("inside")
    assert model.config._attn_implementation == "sdpa"


def test_a_copy_keeps_its_own_pattern(tiny):
    model, ids = tiny.build("llama"), tiny.tokens(1, N)
    ls.hf.apply(model, ls.Window(3))
    twin = copy.deepcopy(model)
    expected = logits(model, ids)
    ls.hf.remove(model)
    close(logits(twin, ids), expected)
    ls.hf.remove(twin)
    assert twin.config._attn_implementation == "sdpa"


def test_saved_models_do_not_name_longspan(tiny, tmp_path):
    from transformers import AutoModelForCausalLM

    model, ids = tiny.build("llama"), tiny.tokens(1, N)
    expected = logits(model, ids)
    ls.hf.apply(model, ls.Window(3))
    model.save_pretrained(tmp_path)
    assert "longspan" not in (tmp_path / "config.json").read_text()
    close(logits(AutoModelForCausalLM.from_pretrained(tmp_path), ids), expected)


def test_a_pattern_with_sinks_keeps_the_learned_sinks(tiny):
    """gpt-oss gives each head a learned logit that takes weight away."""
    model, ids = tiny.build("gpt-oss"), tiny.tokens(2, N)
    for _, module in model.named_parameters():
        module.normal_(std=0.3)
    model.set_attn_implementation("eager")
    expected = logits(model, ids)
    ls.hf.apply(model, ls.Causal())
    close(logits(model, ids), expected)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_autocast(tiny, family):
    model, ids = tiny.build(family), tiny.tokens(2, N)
    expected = logits(model, ids)
    ls.hf.apply(model, ls.Causal())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = logits(model, ids)
    assert got.dtype == torch.bfloat16
    error = (got.float() - expected).norm() / expected.norm()
    assert 1e-4 < error < 3e-2


def test_beam_search(tiny):
    """Beams reorder the cache and repeat the padding mask."""
    model = tiny.build("llama")
    ids, mask = tiny.tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    options = {"attention_mask": mask, "max_new_tokens": 6, "num_beams": 3, "do_sample": False}
    expected = model.generate(ids, **options)
    ls.hf.apply(model, ls.Causal())
    assert torch.equal(model.generate(ids, **options), expected)


@pytest.mark.filterwarnings("default")
def test_gradients_of_a_compiled_model(tiny):
    """The compiler steps out at the attention; its own warnings are not ours."""
    model, ids = tiny.build("llama").train(), tiny.tokens(2, N)
    ls.hf.apply(model, PATTERNS[2])

    def gradients(run):
        model.zero_grad()
        run(ids, labels=ids, use_cache=False).loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    expected = gradients(model)
    for got, wanted in zip(
        gradients(torch.compile(model, backend="eager")), expected, strict=True
    ):
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)
    torch.compiler.reset()


@pytest.mark.filterwarnings("default")
def test_generate_compiles_with_a_static_cache(tiny):
    """On accelerators transformers compiles the forward of a static cache by itself."""
    from transformers import CompileConfig

    model, ids = tiny.build("llama"), tiny.tokens(1, 20)
    ls.hf.apply(model, PATTERNS[2])
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 5, "do_sample": False}
    expected = model.generate(ids, **options)
    compiled = CompileConfig(backend="eager", mode=None)
    compiled._compile_all_devices = True
    got = model.generate(ids, cache_implementation="static", compile_config=compiled, **options)
    assert torch.equal(got, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    torch.compiler.reset()


def test_masks_of_pairs_are_refused(tiny):
    model, ids = tiny.build("llama"), tiny.tokens(1, N)
    ls.hf.apply(model, ls.Causal())
    with pytest.raises(InputError, match=r"shape \[1, 1, 29, 29\]"):
        logits(model, ids, attention_mask=torch.ones(1, 1, N, N, dtype=torch.bool))


@pytest.mark.parametrize("shape", [(2, N, N), (3, N), (2, N - 1), (N,)])
def test_masks_that_do_not_fit_the_tokens_are_refused(tiny, shape):
    # A short one would make padding of the last tokens, without a word.
    model, ids = tiny.build("llama"), tiny.tokens(2, N)
    ls.hf.apply(model, ls.Causal())
    mask = torch.ones(shape, dtype=torch.int64)
    mask[..., 0] = 0
    with pytest.raises(InputError, match=r"attention_mask.*\[2, 29\]"):
        logits(model, ids, attention_mask=mask)


def test_a_mask_may_speak_for_all_rows(tiny):
    model, ids = tiny.build("llama"), tiny.tokens(2, N)
    ls.hf.apply(model, ls.Window(5))
    mask = torch.ones(2, N, dtype=torch.int64)
    mask[:, 0] = 0
    expected = logits(model, ids, attention_mask=mask)
    assert torch.equal(logits(model, ids, attention_mask=mask[:1]), expected)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("MoBa", 'apply(model, "MoBA"'),
        ("topk(keep=3)", 'apply(model, "TopK"'),
        (ls.Window, "Window itself"),
        (ls.mechanism.TopK(32, 4, keep=3), "TopK layer"),
    ],
)
def test_what_is_nearly_a_pattern_or_a_mechanism_is_named(tiny, what, words):
    with pytest.raises(PatternError) as caught:
        ls.hf.apply(tiny.build("llama"), what)
    assert words in str(caught.value)


def test_dropout_is_refused(tiny):
    model, ids = tiny.build("llama", attention_dropout=0.1), tiny.tokens(1, N)
    ls.hf.apply(model, ls.Causal())
    logits(model, ids)
    with pytest.raises(InputError, match="attention_dropout"):
        logits(model.train(), ids)


def test_masks_composed_of_unknown_parts_are_refused(tiny):
    from transformers.masking_utils import create_causal_mask

    model, ids = tiny.build("llama"), tiny.tokens(1, N)
    ls.hf.apply(model, ls.Causal())
    with pytest.raises(Refusal, match="or_masks"):
        create_causal_mask(
            config=model.config,
            inputs_embeds=model.get_input_embeddings()(ids),
            attention_mask=None,
            past_key_values=None,
            or_mask_function=lambda batch, head, query, key: key < 3,
        )


def test_wrong_arguments_leave_the_model_alone(tiny):
    model = tiny.build("llama")
    for pattern, impl, error in [
        ("windw(4)", "auto", PatternError),
        (ls.PerHead(*[ls.Window(3)] * 3), "auto", PatternError),
        (4096, "auto", PatternError),
        (ls.Window(4), "fast", Refusal),
    ]:
        with pytest.raises(error):
            ls.hf.apply(model, pattern, impl=impl)
        assert model.config._attn_implementation == "sdpa"
    with pytest.raises(InputError, match="transformers model"):
        ls.hf.apply(torch.nn.Linear(2, 2), ls.Window(4))


def test_handles_go_in_any_order(tiny):
    model = tiny.build("llama")
    first, second = ls.hf.apply(model, ls.Window(3)), ls.hf.apply(model, ls.Window(4))
    first.remove()
    assert model.config._attn_implementation == second.name
    second.remove()
    assert model.config._attn_implementation == "sdpa"
    # The same pattern twice is two entries.
    outer, inner = ls.hf.apply(model, ls.Window(3)), ls.hf.apply(model, ls.Window(3))
    outer.remove()
    outer.remove()
    assert model.config._attn_implementation == inner.name
    inner.remove()
    assert model.config._attn_implementation == "sdpa"
    # What another hand chose in the meantime stays.
    third = ls.hf.apply(model, ls.Window(3))
    model.set_attn_implementation("eager")
    third.remove()
    assert model.config._attn_implementation == "eager"


def test_nothing_stays_on_a_model_or_inside_of_it(tiny):
    model = tiny.build("llama")
    before = {id(module): set(module.__dict__) for module in model.modules()}
    ls.hf.apply(model, ls.Window(3)).remove()
    assert {id(module): set(module.__dict__) for module in model.modules()} == before


@pytest.mark.parametrize(
    ("what", "options"),
    [
        (ls.Window(3), {}),
        (ls.DualChunk.for_length(20), {}),
        (ls.mechanism.MoBA, {"block": 4, "top": 2}),
    ],
)
def test_the_model_inside_can_be_asked_to_remove(tiny, what, options):
    model, ids = tiny.build("llama"), tiny.tokens(2, N)
    before = {id(module): set(module.__dict__) for module in model.modules()}
    plain = logits(model, ids)
    handle = ls.hf.apply(model, what, **options)
    assert ls.hf.inspect(model.model).changes == ls.hf.inspect(model).changes
    ls.hf.remove(model.model)
    assert torch.equal(logits(model, ids), plain)
    # The model around it has nothing left to undo.
    assert not ls.hf.inspect(model).changes
    handle.remove()
    ls.hf.remove(model)
    assert torch.equal(logits(model, ids), plain)
    assert {id(module): set(module.__dict__) for module in model.modules()} == before


FRESH = """
import sys, torch
folder = sys.argv[1]
ids = torch.load(folder + "/ids.pt")
for name in sys.argv[2:]:
    model = torch.load(f"{folder}/{name}.pt", weights_only=False)
    with torch.no_grad():
        torch.save(model(ids)[0], f"{folder}/{name}.found.pt")
    import longspan as ls
    ls.hf.remove(model)
    assert model.config._attn_implementation == "sdpa", model.config._attn_implementation
    with torch.no_grad():
        torch.save(model(ids)[0], f"{folder}/{name}.plain.pt")
"""


def test_pickled_models_run_in_a_new_process(tiny, tmp_path):
    ids = tiny.tokens(2, N)
    torch.save(ids, tmp_path / "ids.pt")
    plain, expected = {}, {}
    for name, what, options in [
        ("pattern", "window(4) | sink(1)", {}),
        ("dual", ls.DualChunk.for_length(20), {}),
        ("mechanism", ls.mechanism.MoBA, {"block": 4, "top": 2}),
    ]:
        whole = tiny.build("llama")
        # A model without its head is a model too.
        models = {name: whole, f"{name}-inside": whole.model}
        with torch.no_grad():
            plain |= {at: model(ids)[0] for at, model in models.items()}
            ls.hf.apply(whole, what, **options)
            expected |= {at: model(ids)[0] for at, model in models.items()}
        for at, model in models.items():
            assert not torch.allclose(expected[at], plain[at])
            torch.save(model, tmp_path / f"{at}.pt")
    subprocess.run([sys.executable, "-c", FRESH, tmp_path, *expected], check=True)
    for name, wanted in expected.items():
        torch.testing.assert_close(torch.load(tmp_path / f"{name}.found.pt"), wanted)
        torch.testing.assert_close(torch.load(tmp_path / f"{name}.plain.pt"), plain[name])


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("what", ["window(4)", ls.DualChunk(chunk=6, local=4)])
def test_what_computes_nothing_is_refused(tiny, what):
    model, ids = tiny.build("llama").requires_grad_(False), tiny.tokens(1, 13)
    ls.hf.apply(model, what)

    def run(tokens):
        return model(tokens, use_cache=False).logits

    with pytest.raises(Refusal, match=r"write down as constants.*hf\.remove"):
        torch.export.export(model, (ids,), {"use_cache": False}, strict=False)
    with pytest.raises(Refusal, match=r"write down as constants.*hf\.remove"):
        torch.jit.trace(run, (ids,))
    with pytest.raises(Exception, match="compile without fullgraph=True"):
        torch.compile(model, backend="eager", fullgraph=True)(ids, use_cache=False)
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(InputError, match="with data"):
        model(torch.ones(1, 13, dtype=torch.int64), use_cache=False)
    model.to("meta")
    mask = torch.ones(1, 13, dtype=torch.int64, device="meta")
    with pytest.raises(InputError, match="device meta"):
        model(ids.to("meta"), attention_mask=mask, use_cache=False)


@pytest.mark.parametrize(
    ("what", "options"), [("window(3)", {}), ("MoBA", {"block": 4, "top": 2})]
)
def test_continuous_batching_is_refused(tiny, what, options):
    """It attends densely, and leaves for flash attention without asking where there is one."""
    model, ids = tiny.build("llama"), tiny.tokens(1, 13)
    with ls.hf.apply(model, what, **options):
        for one in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            with pytest.raises(Refusal, match="Continuous batching"):
                one.generate_batch(inputs=ids.tolist(), progress_bar=False)
            with pytest.raises(Refusal, match="Continuous batching"):
                one.generate(ids, cache_implementation="paged")
            assert "init_continuous_batching" in one.__dict__
    assert "init_continuous_batching" not in model.__dict__
