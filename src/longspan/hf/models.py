"""Load a causal language model from a local folder, saying first what is wrong with the folder."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longspan.errors import DataError, InputError
from longspan.hf.quiet import first_line, no_bars

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

DTYPES = ("float32", "bfloat16", "float16", "float64")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
# Of a model or an adapter: all that its results depend on, but for the tokenizer.
_CONTENTS = (*_WEIGHTS, "adapter_model.bin", "config.json", "adapter_config.json", "longspan.json")
_SAMPLES, _SAMPLE_BYTES = 256, 4096
_TOKENIZER = ("tokenizer*", "vocab*", "*.model", "spiece*", "*.tiktoken")


def load_model(
    path: str | Path, *, dtype: str = "float32", device: str | torch.device | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer in evaluation mode. The hub is never reached.

    Args:
        path: folder with config.json, weights and tokenizer, as ``save_pretrained`` writes it.
        dtype: float32, bfloat16, float16 or float64.
        device: where to put the model; default: the CPU.

    Raises:
        DataError: if the folder is missing, is a hub name, or holds no complete causal language
            model with its tokenizer.
        InputError: for an unknown dtype, or a device that this machine does not have.
    """
    import torch
    from transformers import AutoModelForCausalLM

    place = check_device(device or "cpu")
    folder, config = check_model(path, dtype)
    try:
        with no_bars():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype=getattr(torch, dtype),
                local_files_only=True,
                output_loading_info=True,
            )
    except Exception as error:
        raise DataError(
            f"The weights in {folder} cannot be loaded: {first_line(error)}"
        ) from error
    model, found = loaded
    missing = sorted(found["missing_keys"])
    if missing:
        raise DataError(
            f"The weights in {folder} lack {len(missing)} tensors, first {missing[0]}; "
            "they would be random. Copy the folder again."
        )
    return model.to(place).eval(), tokenizer_of(folder)


def check_model(path: str | Path, dtype: str = "float32") -> tuple[Path, PreTrainedConfig]:
    """Folder and configuration of a saved model; raises what ``load_model`` would, as far as it
    can be told without reading weights.
    """
    if dtype not in DTYPES:
        raise InputError(f"Unknown dtype {dtype!r}; choose one of {', '.join(DTYPES)}.")
    folder = check_folder(path)
    config = config_of(folder)
    _check_causal(folder, config)
    if not any(next(folder.glob(pattern), None) for pattern in _WEIGHTS):
        raise DataError(f"{folder} has a config.json but no weights ({', '.join(_WEIGHTS)}).")
    _check_tokenizer(folder)
    return folder, config


def contents_hash(path: str | Path) -> str:
    """Short hash that changes when a model or adapter in a folder is replaced or trained further.

    Of large files it reads their size and 256 samples; a copy elsewhere has the same hash.
    """
    digest = hashlib.sha256()
    folder = Path(path).expanduser()
    for file in sorted({file for pattern in _CONTENTS for file in folder.glob(pattern)}):
        size = file.stat().st_size
        digest.update(f"{file.name} {size} ".encode())
        with file.open("rb") as opened:
            if size <= _SAMPLES * _SAMPLE_BYTES:
                digest.update(opened.read())
                continue
            for sample in range(_SAMPLES):
                opened.seek(sample * (size - _SAMPLE_BYTES) // (_SAMPLES - 1))
                digest.update(opened.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:16]


def tokenizer_of(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a saved model alone.

    Raises:
        DataError: as ``load_model``.
    """
    from transformers import AutoTokenizer

    folder = check_folder(path)
    _check_tokenizer(folder)
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise DataError(
            f"The tokenizer in {folder} cannot be loaded: {first_line(error)}"
        ) from error


def _check_tokenizer(folder: Path) -> None:
    # Some releases make an empty tokenizer where there is none.
    if not any(next(folder.glob(pattern), None) for pattern in _TOKENIZER):
        raise DataError(f"{folder} has no tokenizer ({', '.join(_TOKENIZER)}).")


def check_device(name: str | torch.device) -> torch.device:
    """The device, if tensors can be made on it.

    Raises:
        InputError: an unknown name, or a device that torch does not find on this machine.
    """
    import torch

    try:
        device = torch.device(name)
        torch.zeros(1, device=device).tolist()
    # Builds without a backend fail in ways of their own: AssertionError, NotImplementedError.
    except Exception as error:
        raise InputError(
            f"Device {str(name)!r} cannot be used here: {first_line(error).rstrip('.')}. "
            "Give cpu, or cuda where torch sees a GPU."
        ) from error
    return device


def check_folder(path: str | Path) -> Path:
    """The folder, if it can be a saved model.

    Raises:
        DataError: if it is missing, is a hub name, or has no config.json.
    """
    folder = Path(path).expanduser()
    if not folder.exists():
        if _HUB_NAME.fullmatch(str(path)):
            raise DataError(
                f"{path} is no local folder. It looks like a name on the Hugging Face hub, which "
                f"is not reached: download it first (hf download {path} --local-dir FOLDER) and "
                "give that folder."
            )
        raise DataError(f"The model folder {folder} does not exist.")
    if not folder.is_dir():
        raise DataError(f"{folder} is a file; give the folder that holds its config.json.")
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise DataError(
                f"{folder} is an adapter, not a model: load the model it was trained from, then "
                "the adapter."
            )
        inside = sorted(entry.name for entry in folder.iterdir())[:5]
        raise DataError(
            f"{folder} has no config.json, so it is no saved model; it holds "
            f"{', '.join(inside) or 'nothing'}."
        )
    return folder


def config_of(path: str | Path) -> PreTrainedConfig:
    """The configuration of a saved model alone.

    Raises:
        DataError: as ``load_model``.
    """
    from transformers import AutoConfig

    folder = check_folder(path)
    try:
        json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise DataError(f"{folder / 'config.json'} cannot be read: {first_line(error)}") from error


def _check_causal(folder: Path, config: Any) -> None:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    kind = type(config)
    if getattr(config, "is_encoder_decoder", False) or kind not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise DataError(
            f"{folder} holds a {config.model_type} model, which is not a causal language model."
        )
    known: Any = MODEL_FOR_CAUSAL_LM_MAPPING[kind]
    expected = {cls.__name__ for cls in (known if isinstance(known, tuple) else (known,))}
    saved = set(getattr(config, "architectures", None) or expected)
    if not saved & expected:
        raise DataError(
            f"{folder} holds {', '.join(sorted(saved))}, not a causal language model "
            f"({', '.join(sorted(expected))})."
        )
