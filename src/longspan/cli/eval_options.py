"""Options that all commands of ``longspan eval`` share, said once."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

if TYPE_CHECKING:
    from longspan.eval.subject import Subject

Model = Annotated[str, typer.Argument(help="Local folder of a causal language model.")]
Lengths = Annotated[str, typer.Option(help="Context lengths in tokens, e.g. 512,4096.")]
Data = Annotated[list[str] | None, typer.Option(help="File or folder with text; may be repeated.")]
PythonStdlib = Annotated[
    bool, typer.Option("--python-stdlib", help="Held-out modules of the standard library.")
]
KV = Annotated[
    str | None,
    typer.Option(help='What the cache keeps, e.g. "sinks(4) + recent(256) + heavy(256)".'),
]
Prefill = Annotated[
    str | None, typer.Option(help='Sparse prefill, e.g. "vertical_slash(1000, 6096)".')
]
DenseBelow = Annotated[
    int | None, typer.Option(help="Tokens below which prefill is dense; default: measured here.")
]
RopeFactors = Annotated[
    str | None,
    typer.Option(
        help="For longrope: JSON file or model folder with short_factor and long_factor; default: "
        "those that the model has already."
    ),
]


@dataclass(frozen=True, kw_only=True)
class Shared:
    """Values of the shared options."""

    pattern: Annotated[
        str | None,
        typer.Option(help='Attention pattern, e.g. "window(1024) | sink(4)"; default: dense.'),
    ] = None
    rope: Annotated[
        str | None,
        typer.Option(
            help="Scale positions to the longest length: linear, ntk, dynamic, yarn, llama3, "
            "longrope."
        ),
    ] = None
    rope_factors: RopeFactors = None
    adapter: Annotated[
        Path | None,
        typer.Option(help="Adapter folder of longspan extend; sets its position scaling."),
    ] = None
    out: Annotated[
        Path | None,
        typer.Option(help="Record file (.jsonl): what it already holds is not measured again."),
    ] = None
    limit: Annotated[int | None, typer.Option(help="Measure only so many, for a quick look.")] = (
        None
    )
    dtype: Annotated[str, typer.Option(help="Of the weights.")] = "float32"
    device: Annotated[str | None, typer.Option(help="Default: cuda if there is one.")] = None
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False

    def subject(self, model: str, length: int) -> Subject:
        """What is measured, up to a length."""
        from longspan.cli.values import pick_device, read_rope_factors
        from longspan.eval.output import check_record_file
        from longspan.eval.perplexity import check_limit
        from longspan.eval.subject import Subject

        check_limit(self.limit)
        if self.out is not None:
            check_record_file(self.out)
        return Subject(
            model=model,
            length=length,
            pattern=self.pattern,
            rope=self.rope,
            rope_factors=read_rope_factors(self.rope_factors),
            adapter=self.adapter,
            dtype=self.dtype,
            device=pick_device(self.device),
        )


def shared(command: Callable[..., None]) -> Callable[..., None]:
    """A command that takes the shared options behind its own, as one argument ``given``.

    An option of its own takes the place of a shared one of that name.
    """
    own, hints = inspect.signature(command), get_type_hints(command, include_extras=True)
    kinds = get_type_hints(Shared, include_extras=True)
    others = [option for option in fields(Shared) if option.name not in own.parameters]
    options = [
        inspect.Parameter(
            option.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=option.default,
            annotation=kinds[option.name],
        )
        for option in others
    ]
    mine = [
        parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY)
        for name, parameter in own.parameters.items()
        if name != "given"
    ]

    @wraps(command)
    def run(**values: Any) -> None:
        common = {option.name: values.pop(option.name) for option in others}
        command(**values, given=Shared(**common))

    described: Any = run
    described.__signature__ = inspect.Signature([*mine, *options])
    described.__annotations__ = {each.name: each.annotation for each in (*mine, *options)}
    # typer would read the wrapped command's own signature.
    del described.__wrapped__
    return run


def table(title: str, columns: tuple[str, ...], rows: list[tuple[Any, ...]]) -> None:
    """Print a table on standard output."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    # As a title of the table it would wrap at the table's width.
    console.print(title, style="italic", highlight=False, markup=False)
    table = Table()
    for column in columns:
        # In a narrow terminal two names that begin alike would be cut to one.
        table.add_column(column, justify="right", overflow="fold")
    for row in rows:
        # Names of files and datasets may hold brackets.
        table.add_row(*(escape(cell) if isinstance(cell, str) else cell for cell in row))
    console.print(table)
