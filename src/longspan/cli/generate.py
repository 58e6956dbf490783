"""``longspan generate``: continue a prompt with a cache that forgets."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longspan.eval.plain import to_json

if TYPE_CHECKING:
    from longspan.hf.generate import Generated


def generate(
    model: Annotated[str, typer.Argument(help="Local folder of a causal language model.")],
    prompt_file: Annotated[
        str | None, typer.Option(help="File with the prompt; - reads standard input.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="The prompt itself.")] = None,
    kv: Annotated[
        str,
        typer.Option(help='What the cache keeps, e.g. "sinks(4) + recent(256) + heavy(256)".'),
    ] = "everything()",
    positions: Annotated[
        str, typer.Option(help="Of kept keys: original, or packed side by side.")
    ] = "original",
    pattern: Annotated[
        str | None,
        typer.Option(help='Attention pattern, e.g. "window(1024) | sink(4)"; default: dense.'),
    ] = None,
    prefill: Annotated[
        str | None,
        typer.Option(help='Sparse attention for the prompt, e.g. "vertical_slash(1000, 6096)".'),
    ] = None,
    dense_below: Annotated[
        int | None,
        typer.Option(
            help="Prompts shorter than this attend exactly; default: measured on this machine."
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Most new tokens.")] = 128,
    temperature: Annotated[
        float, typer.Option(help="0 takes the likeliest token; above, tokens are drawn.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the drawing.")] = 0,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")
    ] = False,
    dtype: Annotated[str, typer.Option(help="Of the weights.")] = "float32",
    device: Annotated[str | None, typer.Option(help="Default: cuda if there is one.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Continue a prompt; say how fast it was and what the cache kept.

    The text goes to standard output as it comes, the figures to standard error.
    """
    from longspan.cli.values import pick_device
    from longspan.errors import InputError
    from longspan.eval.answers import reading
    from longspan.eval.seed import check_seed
    from longspan.kv import cache

    how = reading(prefill, dense_below, kv, pattern)
    method, policy = how.prefill, how.kv
    assert policy is not None
    if tokens < 1 or not temperature >= 0:
        raise InputError(
            f"Expected at least 1 token and a temperature from 0, got --tokens {tokens} and "
            f"--temperature {temperature:g}."
        )
    check_seed(seed)
    text = _prompt(prompt, prompt_file)

    import torch

    from longspan import hf
    from longspan.hf.generate import generate as run
    from longspan.hf.generate import read_prompt

    loaded, tokenizer = hf.load_model(model, dtype=dtype, device=pick_device(device))
    if pattern is not None:
        hf.apply(loaded, pattern)
    sparse = None if method is None else hf.prefill(loaded, method, dense_below=dense_below)
    ids = read_prompt(tokenizer, text, chat)
    trained = getattr(loaded.config.get_text_config(), "max_position_embeddings", None)
    if trained is not None and ids.shape[1] + tokens > trained:
        typer.echo(
            f"longspan: {ids.shape[1]:,} tokens of prompt and {tokens:,} new ones are more than "
            f"the {trained:,} positions that the model says it knows.",
            err=True,
        )
    loaded.register_forward_hook(_refuse_nan)
    torch.manual_seed(seed)
    made = run(
        loaded,
        tokenizer,
        ids,
        cache(loaded, policy, positions=positions),
        tokens=tokens,
        temperature=temperature,
        write=(lambda _: None) if as_json else _write,
    )
    if as_json:
        read: dict[str, Any] = {}
        if sparse is not None:
            least = sparse.dense_below
            read = {
                "prefill": {
                    "method": str(method),
                    "dense_below": least,
                    "sparse": least is not None and made.prompt_tokens >= least,
                }
            }
        typer.echo(to_json({**made.to_dict(), **read}))
        return
    _write("\n")
    for line in figures(made):
        typer.echo(line, err=True)
    if sparse is not None:
        least = sparse.dense_below
        said = _prefilled(str(method), made.prompt_tokens, least, given=dense_below is not None)
        typer.echo(said, err=True)


def _refuse_nan(model: Any, given: Any, output: Any) -> None:
    """End where the next token cannot be chosen: greedily it would be the first one, silently."""
    from longspan.errors import RunError

    if not output.logits[:, -1].amax(-1).isfinite().all():
        raise RunError(
            "The model's logits are not finite, so no token can be chosen. Its weights are "
            "broken, or they overflow in this --dtype: try float32."
        )


def figures(made: Generated) -> list[str]:
    """What a run took, in lines."""
    held = made.cache
    least = min(row.least for row in held.layers)
    most = max(row.most for row in held.layers)
    kept = f"{most:,}" if least == most else f"{least:,} to {most:,}"
    share = held.bytes / held.dense_bytes
    return [
        f"prompt   {made.prompt_tokens:,} tokens in {made.prefill_seconds:.2f} s",
        f"decoding {made.new_tokens:,} tokens, {made.tokens_per_second:.1f} tokens/s",
        f"cache    {held.policy}",
        f"kept     {kept} of {held.seen:,} tokens a head",
        f"memory   {held.dense_bytes / 2**20:.2f} MiB before, {held.bytes / 2**20:.2f} MiB after "
        f"({share:.1%})",
    ]


def _prefilled(method: str, tokens: int, least: int | None, *, given: bool) -> str:
    """Whether a prompt was long enough for its method, in a line."""
    if least is None:
        return f"prefill  exact: too short for {method}"
    how = "exact" if tokens < least else "sparse"
    since = "as asked" if given else "where it pays"
    return f"prefill  {how}: {method} from {least:,} tokens on, {since}"


def _prompt(text: str | None, file: str | None) -> str:
    from longspan.errors import DataError, InputError

    if (text is None) == (file is None):
        raise InputError("Give the prompt either as --prompt-file or as --prompt.")
    if file is None:
        assert text is not None
        return text
    try:
        if file == "-":
            return sys.stdin.read().removeprefix("\ufeff")
        return Path(file).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"The prompt {file} cannot be read: {error}.") from error


def _write(text: str) -> None:
    # Flushes, and goes without a standard output.
    typer.echo(text, nl=False)
