"""``longspan doctor``: versions, hardware and what is missing, for oneself and bug reports."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from longspan.eval.plain import to_json


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Report versions, hardware, and which parts of longspan work on this machine."""
    from longspan.eval.environment import environment

    found = environment()
    problems = _problems(found)
    if as_json:
        typer.echo(to_json({**found, "problems": problems}))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in found["packages"].items():
        table.add_row(name, value or "[dim]not installed[/dim]")
    table.add_row("python", found["python"])
    table.add_row("platform", found["platform"])
    memory = f", {found['memory_gib']} GiB" if found["memory_gib"] else ""
    table.add_row("cpu", f"{found['cpu']}, {found['cores']} cores{memory}")
    for gpu in found["cuda"]:
        table.add_row(
            "gpu", f"{gpu['name']}, {gpu['memory_gib']} GiB, CUDA {found['cuda_version']}"
        )
    if not found["cuda"]:
        table.add_row("gpu", "none that torch sees")
    table.add_row("cpu kernel", found["cpu_kernel"] or "not compiled")
    console = Console()
    console.print(table)
    for problem in problems:
        console.print(f"! {problem}", style="yellow", highlight=False)
    if not problems:
        console.print("Everything that longspan needs is here.", highlight=False)


def _problems(found: dict[str, Any]) -> list[str]:
    from longspan.ops.kernels.hopper import why_no_hopper
    from longspan.ops.native.build import supported

    packages = found["packages"]
    missing = [
        name for name in ("transformers", "safetensors", "tokenizers") if not packages[name]
    ]
    problems = []
    if missing:
        problems.append(
            f"{', '.join(missing)} missing: models and `longspan eval` need `pip install "
            "longspan[hf]`"
        )
    elif tuple(map(int, packages["transformers"].split(".")[:2])) < (5, 4):
        problems.append(
            f"transformers {packages['transformers']} is too old: 5.4 or newer is needed"
        )
    if not packages["peft"]:
        problems.append("peft missing: `longspan extend` needs `pip install longspan[train]`")
    if found["cuda"] and not packages["triton"]:
        problems.append("triton missing: the CUDA kernels need it (it comes with torch for CUDA)")
    elif found["cuda"] and (why := why_no_hopper()):
        problems.append(f"the kernel for Hopper cannot be used: {why}")
    if not found["cpu_kernel"] and supported():
        problems.append(
            "the CPU kernel is not compiled (there was no C compiler when longspan was installed, "
            "or it is another version's): attention on the CPU takes about twice as long; have "
            "gcc or clang, then run `python -m longspan.ops.native.build`"
        )
    return problems
