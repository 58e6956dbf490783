"""LoRA by peft, as context extension needs it.

Paper: LongLoRA (arXiv 2309.12307), section 3.3: low-rank updates of the attention projections
learn long contexts poorly unless embeddings and norms are trained with them.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longspan.errors import DataError, InputError
from longspan.hf.quiet import first_line, saving
from longspan.hf.routes import routed
from longspan.hf.unwrap import base_model

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


def add_lora(
    model: PreTrainedModel,
    *,
    rank: int,
    alpha: float,
    targets: Sequence[str] | None = None,
    embeddings_and_norms: bool = False,
) -> Any:
    """Wrap a model so that only low-rank updates are trained.

    Args:
        model: a transformers model; its weights are frozen.
        rank: rank of the updates, at least 1.
        alpha: updates are scaled by ``alpha / rank``.
        targets: names of the linear layers to update; default: all projections of the attention.
        embeddings_and_norms: train copies of the input embeddings and all norms in full as well.

    Returns:
        A ``PeftModel``. Which pattern is applied to ``model`` makes no difference.

    Raises:
        InputError: for a rank below 1, targets that the model does not have or peft does not
            take, or a model that has an adapter already.
    """
    from peft import LoraConfig, get_peft_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    base = base_model(model)
    if rank < 1:
        raise InputError(f"A LoRA rank is at least 1, got {rank}.")
    if any(isinstance(module, BaseTunerLayer) for module in base.modules()):
        raise InputError(
            f"{type(base).__name__} has an adapter already: train that one, or fold it in with "
            "longspan.hf.merge_and_save."
        )
    wanted = list(targets) if targets is not None else attention_projections(base)
    names = [name for name, _ in base.named_modules()]
    absent = [
        target
        for target in wanted
        if not any(name == target or name.endswith(f".{target}") for name in names)
    ]
    if not wanted:
        raise InputError(
            f"{type(base).__name__} has no attention of the kind that longspan looks for: give "
            "targets, the names of the layers that get an adapter."
        )
    if absent:
        raise InputError(
            f"{type(base).__name__} has no layers named {', '.join(absent)}; "
            f"its attention projections are {', '.join(attention_projections(base))}."
        )
    extra = embedding_and_norm_names(base) if embeddings_and_norms else []
    tied = bool(extra) and bool(getattr(base.config.get_text_config(), "tie_word_embeddings", 0))
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # pyright: ignore[reportArgumentType]
        target_modules=wanted,
        modules_to_save=extra or None,
        ensure_weight_tying=tied,
        task_type="CAUSAL_LM",
    )
    try:
        with _peft_is_behind():
            return get_peft_model(base, config)
    except ValueError as error:
        # Peft takes AFMoE's gate of the attention for one of its experts.
        raise InputError(
            f"peft does not put an adapter into {', '.join(wanted)} of {type(base).__name__}: "
            f"{first_line(error)} Give targets without those that it names."
        ) from error


def attention_projections(model: nn.Module) -> list[str]:
    """Names of the linear layers inside the attention modules, such as q_proj and o_proj.

    With the name of their attention in front where layers elsewhere have the same, such as
    attn.c_proj beside mlp.c_proj.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    inside = {
        f"{path}.{name}": f"{path.rpartition('.')[2]}.{name}"
        for path, attention in routed(model)
        for name, part in attention.named_modules()
        if isinstance(part, nn.Linear | Conv1D)
    }
    elsewhere = {
        path.rpartition(".")[2] for path, _ in model.named_modules() if path not in inside
    }
    names = ((longer, longer.rpartition(".")[2]) for longer in inside.values())
    return sorted({longer if short in elsewhere else short for longer, short in names})


def embedding_and_norm_names(model: PreTrainedModel) -> list[str]:
    """Names of the input embeddings and of every norm."""
    embeddings = model.get_input_embeddings()
    names = {
        name.rpartition(".")[2]
        for name, part in model.named_modules()
        if part is embeddings or "Norm" in type(part).__name__
    }
    return sorted(names)


def save_adapter(model: Any, folder: str | Path) -> None:
    """Write the adapter as peft does; ``PeftModel.from_pretrained`` reads it without longspan.

    Raises:
        OSError: the folder cannot be made or written.
    """
    # Peft has an error of its own for a file that lies there.
    Path(folder).mkdir(parents=True, exist_ok=True)
    with saving():
        model.save_pretrained(str(folder), save_embedding_layers=False)


def load_adapter(base: PreTrainedModel, folder: str | Path, *, trainable: bool = False) -> Any:
    """Put a saved adapter around its base model.

    Args:
        base: the model the adapter was trained from, with the same RoPE scaling.
        folder: folder that ``save_adapter`` wrote.
        trainable: whether to go on training it.

    Raises:
        DataError: if the folder holds no whole adapter, or one for another model.
    """
    from peft import PeftModel
    from peft.utils import get_peft_model_state_dict

    check_adapter(folder)
    trained = {name: x.requires_grad for name, x in base.named_parameters()}
    try:
        held = _tensors(Path(folder))
        with _peft_is_behind():
            # Tensors that are lacking would be a warning.
            warnings.filterwarnings("error", "Found missing adapter keys")
            loaded = PeftModel.from_pretrained(base, str(folder), is_trainable=trainable)
    # What a damaged file does to peft has no error of its own.
    except Exception as error:
        said = first_line(error)
        _take_out(base, trained)
        raise DataError(f"The adapter in {folder} does not fit this model: {said}") from error
    # And those that this model has no place for are passed over without a word.
    over = sorted(held - get_peft_model_state_dict(loaded, save_embedding_layers=True).keys())
    if over:
        _take_out(base, trained)
        raise DataError(
            f"The adapter in {folder} does not fit this model, which has no place for "
            f"{len(over)} of its {len(held)} tensors, first {over[0]}."
        )
    return loaded


def _tensors(folder: Path) -> set[str]:
    """Names of the tensors of an adapter; of safetensors without reading these."""
    from peft.utils import load_peft_weights
    from safetensors import safe_open

    path = folder / _WEIGHTS[0]
    if not path.is_file():
        return set(load_peft_weights(str(folder), device="cpu"))
    with safe_open(path, "pt") as file:
        return set(file.keys())


def _take_out(base: PreTrainedModel, trained: dict[str, bool]) -> None:
    """Make a model what it was before an adapter was put in, as far as that went."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    for path, module in list(base.named_modules()):
        own = None
        if isinstance(module, BaseTunerLayer):
            own = module.get_base_layer()
        elif isinstance(module, ModulesToSaveWrapper):
            own = module.original_module
        if own is not None:
            parent, _, name = path.rpartition(".")
            setattr(base.get_submodule(parent), name, own)
    if hasattr(base, "peft_config"):
        del base.peft_config
    for name, x in base.named_parameters():
        x.requires_grad_(trained.get(name, x.requires_grad))


def check_adapter(folder: str | Path) -> None:
    """Raise DataError for a folder that holds no adapter, as far as its weights need not be read.

    Peft would look for what is missing on the hub.
    """
    from peft import PeftConfig

    if not (Path(folder) / "adapter_config.json").is_file():
        raise DataError(f"{folder} has no adapter_config.json, so it is no saved adapter.")
    if not any((Path(folder) / name).is_file() for name in _WEIGHTS):
        raise DataError(f"{folder} has no weights of an adapter ({', '.join(_WEIGHTS)}).")
    try:
        PeftConfig.from_pretrained(str(folder))
    except Exception as error:
        raise DataError(
            f"{folder}/adapter_config.json describes no adapter of peft: {first_line(error)}"
        ) from error


def merge_and_save(model: Any, tokenizer: Any, folder: str | Path) -> PreTrainedModel:
    """Add the updates into the weights and write a folder that plain transformers loads.

    Args:
        model: a PEFT model; used up, as by peft's ``merge_and_unload``.
        tokenizer: saved beside it; None to leave it out.
        folder: where to write.

    Returns:
        The merged model.
    """
    merged = model.merge_and_unload()
    Path(folder).mkdir(parents=True, exist_ok=True)
    with saving():
        merged.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    return merged


@contextmanager
def _peft_is_behind() -> Iterator[None]:
    # peft reads a property that transformers renamed; nothing a caller could do about it.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        yield
