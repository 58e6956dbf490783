"""Which attention modules of a model rotate queries and keys at all.

Some families leave layers without positions, each by a condition of its own: SmolLM3 asks
``use_rope``, Cohere 2 ``sliding_window``, EXAONE 4 ``is_sliding``, AFMoE ``is_local_attention``.
Only ``forward`` itself says which, so its source is read: the conditions around its calls of
``apply_rotary_pos_emb`` are taken out and evaluated for the module. One that depends on more than
the module (an argument, a local variable) is not guessed, but for the angles: models that have any
hand them to all layers.
"""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from collections.abc import Iterator
from functools import cache
from types import CodeType

from torch import nn

ROTATE = "apply_rotary_pos_emb"

# A condition, and what it has to be.
_Path = tuple[tuple[CodeType, bool], ...]


def rotates(module: nn.Module) -> bool | None:
    """Whether an attention module rotates; None if its ``forward`` does not say."""
    try:
        known = vars(sys.modules[type(module).__module__])
        names = {**known, "self": module, "position_embeddings": ...}
        found = [
            all(bool(eval(code, names)) is wanted for code, wanted in path)
            for path in _calls(type(module))
        ]
    except Exception:
        # Whatever a condition needs beside the module is not there.
        return None
    return any(found) if found else None


@cache
def _calls(kind: type[nn.Module]) -> tuple[_Path, ...]:
    """The conditions under which ``forward`` comes to each of its calls that rotate."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind.forward)))
    except (OSError, TypeError, SyntaxError):
        return ()
    return tuple(_walk(tree, ()))


def _walk(node: ast.AST, path: _Path) -> Iterator[_Path]:
    if isinstance(node, ast.If | ast.IfExp):
        code = compile(ast.Expression(node.test), "<condition>", "eval")
        for part, wanted in ((node.body, True), (node.orelse, False)):
            for child in part if isinstance(part, list) else [part]:
                yield from _walk(child, (*path, (code, wanted)))
        return
    if isinstance(node, ast.Call) and getattr(node.func, "id", None) == ROTATE:
        yield path
    for child in ast.iter_child_nodes(node):
        yield from _walk(child, path)
