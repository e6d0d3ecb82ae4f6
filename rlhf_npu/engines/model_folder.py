"""Whether a model folder is whole: its files are there, complete and readable. Reads headers, never weights."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from safetensors import safe_open

from rlhf_npu.edges import errors_as
from rlhf_npu.errors import ModelError

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def check_model(path: str) -> Path:
    """The folder of a model, if its files are whole.

    Raises:
        ModelError: there is no such folder, or a file in it is missing, cut off or malformed; names the file.
    """
    folder = Path(os.path.expanduser(path))  # noqa: PTH111  # Path's raises where there is no such user
    if not os.path.isdir(folder):  # noqa: PTH112  # Path's raises where the name is too long
        raise ModelError(f"model folder {path!r} does not exist; give a local folder in Hugging Face format")
    if not (folder / CONFIG).is_file():
        raise ModelError(f"model folder {path!r} has no {CONFIG}; is it a Hugging Face model?")
    _check_config(folder / CONFIG)
    for file, names in _weight_files(folder).items():
        _check_weights(file, names)
    declared_stop_ids(folder)
    return folder


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in `file`.

    Raises:
        ModelError: it cannot be read, or holds something else.
    """
    with errors_as(ModelError, f"{file}: not readable JSON"):
        content = json.loads(file.read_bytes())
    if not isinstance(content, dict):
        raise ModelError(f"{file}: is no JSON object; it must hold one")
    return content


def declared_stop_ids(folder: Path) -> list[int]:
    """The token ids that the generation config ends a text with; none without that file.

    Raises:
        ModelError: the file is no JSON object, or `eos_token_id` is neither a token id nor a list of them.
    """
    file = folder / GENERATION_CONFIG
    if not file.is_file():
        return []
    declared = read_object(file).get("eos_token_id")
    ids = [] if declared is None else declared if isinstance(declared, list) else [declared]
    if any(isinstance(token, bool) or not isinstance(token, int) or token < 0 for token in ids):
        raise ModelError(f"{file}: eos_token_id is {declared!r}; it must be a token id, a list of them, or null")
    return ids


def stored_tensors(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor in the folder's safetensors files, by name."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in _weight_files(folder):
        with safe_open(file, framework="pt") as tensors:
            shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    return shapes


def _check_config(file: Path) -> None:
    config = read_object(file)
    kind = config.get("model_type")
    if not isinstance(kind, str) or not kind:
        raise ModelError(f"{file}: model_type is {kind!r}; it must name the kind of model, for example qwen2")
    if config.get("quantization_config") is not None:
        raise ModelError(
            f"{file}: has a quantization_config, and quantized weights cannot be trained; "
            "use the model in its original precision, or save a dequantized copy"
        )


def _weight_files(folder: Path) -> dict[Path, set[str]]:
    """Safetensors files to the names of the tensors that the index says are in them (empty without an index)."""
    present = {file for file in folder.glob("*.safetensors") if file.name != "adapter_model.safetensors"}
    single, index = folder / WEIGHTS, folder / INDEX
    if index.is_file():
        files = _indexed_files(index)
        if single in present and single not in files:
            raise ModelError(
                f"model folder {str(folder)!r} has both {WEIGHTS} and {INDEX}, which does not list it: two sets of "
                "weights; move one of the two away"
            )
        return files
    if single not in present:
        raise ModelError(_no_weights(folder))
    others = sorted(file.name for file in present - {single})
    if others:
        raise ModelError(
            f"model folder {str(folder)!r} has {', '.join(others)} beside {WEIGHTS}, and no {INDEX} that says which "
            "belongs to the model; move what does not belong to it away"
        )
    return {single: set()}


def _indexed_files(index: Path) -> dict[Path, set[str]]:
    places = read_object(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ModelError(f"{index}: has no weight_map; it must map the name of each tensor to its file")
    files: dict[Path, set[str]] = {}
    for name, file in places.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise ModelError(f"{index}: {name} is in {file!r}; it must be a safetensors file of the same folder")
        files.setdefault(index.parent / file, set()).add(name)
    return files


def _no_weights(folder: Path) -> str:
    whole = f"model folder {str(folder)!r} has no {WEIGHTS} and no {INDEX}"
    if (folder / "adapter_config.json").is_file():
        return f"{whole}, but adapter_config.json: an adapter; merge it into its base model and save that"
    if list(folder.glob("*.bin")) + list(folder.glob("*.pt")) + list(folder.glob("*.pth")):
        return f"{whole}, only weights in PyTorch's old format; save them anew with save_pretrained (*.safetensors)"
    return f"{whole} (*.safetensors); save the model with save_pretrained"


def _check_weights(file: Path, names: set[str]) -> None:
    """Open one safetensors file, which reads its header and compares it with the file's length."""
    if not file.is_file():
        raise ModelError(f"{file}: no such file, but {INDEX} names it; download or save the model again")
    damaged = f"{file} ({file.stat().st_size} bytes) is cut off or damaged; download or save it again"
    with errors_as(ModelError, damaged), safe_open(file, framework="pt") as tensors:
        stored = set(tensors.keys())
    if not stored:
        raise ModelError(f"{file}: holds no tensors")
    missing = sorted(names - stored)
    if missing:
        raise ModelError(f"{file}: has no tensor {missing[0]}, but {INDEX} says it has; save the model again")
