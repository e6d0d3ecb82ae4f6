"""How a model's attention keeps the sequences of a packed row apart, and whether it does.

Which implementation computes it, through transformers' attention interface:

| implementation | where | how the sequences are kept apart |
| --- | --- | --- |
| flash_attention_2 | CUDA with flash-attn, half precision, no shared prompts | lengths, for variable-length kernels |
| flash_attention_2 | NPU, the same and no sliding windows | the same, for torch_npu's `npu_fusion_attention` |
| flex_attention | CUDA, all else | a block mask: blocks that see nothing are not computed |
| sdpa | CPU, NPU, models without the others | a boolean mask (1, 1, N, N) |
| eager | where the model was loaded so | a mask that is added, (1, 1, N, N) |

Tried were sdpa and eager on the CPU, and there the forward pass of flex_attention, by hand. Nothing was run on CUDA or
on an NPU; `check_packing` tries it before training.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from transformers import PreTrainedModel

from rlhf_npu.data.packing import Completion, Example, PackedBatch, pack
from rlhf_npu.edges import errors_as
from rlhf_npu.engines.attention import AUTO
from rlhf_npu.engines.rounding import FLOOR, MAX_FACTOR, MEAN_FACTOR, rounding_noise
from rlhf_npu.errors import ModelError
from rlhf_npu.platform import Platform

FLASH, FLEX, SDPA, EAGER = "flash_attention_2", "flex_attention", "sdpa", "eager"
FULL, SLIDING = "full_attention", "sliding_attention"
TRIAL_LENGTHS = ((9, 5, 12), (3, 17, 2), (21, 4, 7), (1, 19, 13))  # prompt, completions
Visible = Callable[[Any, Any, torch.Tensor, torch.Tensor], torch.Tensor]


class PackedAttention:
    """The attention of one model over packed rows.

    Attributes:
        implementation: the one it computes packed rows with.
        shares_prompts: whether completions may share a prompt.
    """

    def __init__(self, model: PreTrainedModel, wanted: str, platform: Platform, *, shares_prompts: bool) -> None:
        """Set `model` to the implementation that suits packed rows.

        Args:
            wanted: `attn_implementation` of the model's configuration here; auto chooses.

        Raises:
            ModelError: the model cannot be packed as far as its configuration tells, or not with `wanted`.
        """
        self._model = model
        self._windows = _windows(model)
        self._loaded = model.config._attn_implementation  # noqa: SLF001
        self.shares_prompts = shares_prompts
        self.implementation = _choose(model, wanted, platform, self._windows, shares_prompts)
        self._set(self.implementation)

    def inputs(self, batch: PackedBatch) -> dict[str, Any]:
        """What the forward pass is told of the row's sequences.

        Raises:
            ModelError: completions share a prompt where it was said that none do.
        """
        if self.implementation == FLASH:
            return _lengths(batch)
        masks = {kind: self._mask(batch, window) for kind, window in self._windows.items()}
        return {"attention_mask": masks.get("", masks)}

    @contextmanager
    def as_loaded(self) -> Iterator[None]:
        """Within it the model computes with the implementation that it was loaded with."""
        self._set(self._loaded)
        try:
            yield
        finally:
            self._set(self.implementation)

    def _mask(self, batch: PackedBatch, window: int | None) -> Any:
        visible, tokens = visibility(batch, window), len(batch.segment)
        if self.implementation == FLEX:
            from torch.nn.attention.flex_attention import create_block_mask

            device = batch.segment.device
            # Compiled, it does not make the (N, N) mask first.
            return create_block_mask(
                visible, None, None, tokens, tokens, device=device.type, _compile=device.type != "cpu"
            )
        places = torch.arange(tokens, device=batch.segment.device)
        mask = visible(None, None, places[:, None], places[None])[None, None]
        if self.implementation == SDPA:
            return mask
        dtype = self._model.dtype
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)

    def _set(self, implementation: str) -> None:
        if implementation == self._model.config._attn_implementation:  # noqa: SLF001
            return
        with errors_as(ModelError, f"{name_of(self._model)} cannot compute with attn_implementation={implementation}"):
            self._model.set_attn_implementation(implementation)
        if self._model.config._attn_implementation != implementation:  # noqa: SLF001
            raise ModelError(
                f"{name_of(self._model)} cannot change to attn_implementation={implementation}; set it to sdpa or eager"
            )


def visibility(batch: PackedBatch, window: int | None) -> Visible:
    """Which tokens see which, as FlexAttention asks: (sequence, head, query, key) -> bool, of places in the row.

    Args:
        window: how many positions back a token sees, itself included; None for all. With shared prompts it counts
            positions, not places: a prompt's end is as near to the second completion as to the first.
    """
    segment, parent, position = batch.segment, batch.parent, batch.position_ids[0]

    def visible(_sequence: Any, _head: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        together = (segment[key] == segment[query]) | (segment[key] == parent[query])
        return (key <= query) & together

    if window is None:
        return visible
    reach = window

    def near(sequence: Any, head: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return visible(sequence, head, query, key) & (position[query] - position[key] < reach)

    return near


class Packed(Protocol):
    """A model over packed rows, as `check_packing` sees it."""

    model: PreTrainedModel
    attention: PackedAttention
    training: bool

    def __call__(self, batch: PackedBatch) -> torch.Tensor: ...

    def alone(self, prompt: torch.Tensor, completion: torch.Tensor) -> torch.Tensor:
        """What a call gives for one completion, by the model's own forward pass over its sequence and nothing else."""

    def train(self, mode: bool = True) -> Any: ...


@torch.no_grad()
def check_packing(packed: Packed) -> None:
    """Refuse a model that scores random sequences differently when they are packed; all ranks call this together.

    What may differ is what rounding explains, which is measured. Sequences are a few tens of tokens long, so a window
    that is longer is not tried.

    Raises:
        ModelError: the scores differ; says where and by how much.
    """
    model, device = packed.model, next(packed.model.parameters()).device
    examples = _trial(model, packed.attention.shares_prompts)
    sequences = [(example.prompt, completion.input_ids) for example in examples for completion in example.completions]
    tensors = [tuple(torch.from_numpy(ids).to(device) for ids in sequence) for sequence in sequences]
    was_training = packed.training
    packed.train(False)
    try:
        with errors_as(ModelError, f"{name_of(model)} cannot compute packed sequences"):
            together = packed(pack(examples, device))
        with packed.attention.as_loaded():
            alone = torch.cat([packed.alone(*ids) for ids in tensors])
            with rounding_noise(model):
                disturbed = torch.cat([packed.alone(*ids) for ids in tensors])
    finally:
        packed.train(was_training)
    _compare(name_of(model), together.double(), alone.double(), disturbed.double())


def _compare(name: str, together: torch.Tensor, alone: torch.Tensor, disturbed: torch.Tensor) -> None:
    differences, explained = (together - alone).abs().nan_to_num(nan=torch.inf), (disturbed - alone).abs()
    mean, largest = float(differences.mean()), float(differences.max())
    if mean <= FLOOR + MEAN_FACTOR * float(explained.mean()) and largest <= FLOOR + MAX_FACTOR * float(explained.max()):
        return
    place = int(differences.argmax())
    raise ModelError(
        f"{name} computes something else where sequences are packed: {float(together[place]):.4f} instead of "
        f"{float(alone[place]):.4f} for one of {len(alone)} scores; they differ by {mean:.1e} on average and "
        f"{largest:.1e} at most, of which rounding explains {float(explained.mean()):.1e} and "
        f"{float(explained.max()):.1e}. Packing needs a decoder whose tokens meet in attention alone, with positions "
        "from position_ids"
    )


def _trial(model: PreTrainedModel, shares_prompts: bool) -> list[Example]:
    generator = np.random.default_rng(0)
    config = model.config.get_text_config()

    def ids(size: int) -> np.ndarray:
        drawn = generator.integers(0, config.vocab_size, size)
        return np.where(drawn == config.pad_token_id, (drawn + 1) % config.vocab_size, drawn)

    examples = []
    for prompt, *completions in TRIAL_LENGTHS:
        made = [Completion(ids(size), np.ones(size, dtype=bool)) for size in completions]
        shared = [tuple(made)] if shares_prompts else [(completion,) for completion in made]
        examples += [Example(ids(prompt), together) for together in shared]
    return examples


def _windows(model: PreTrainedModel) -> dict[str, int | None]:
    """The sliding window of each kind of layer, None for full attention; "" where all layers are of one kind.

    Raises:
        ModelError: there are layers whose tokens meet elsewhere, or that see what this module does not know.
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    other = kinds - {FULL, SLIDING}
    if other or model.config.is_encoder_decoder or getattr(model, "_is_stateful", False):
        what = f"layers of the kinds {', '.join(sorted(other))}" if other else "more than a decoder's attention"
        raise ModelError(f"{name_of(model)} has {what}: its sequences cannot be kept apart when they are packed")
    window = getattr(config, "sliding_window", None)
    if SLIDING in kinds and window is None:
        raise ModelError(
            f"{name_of(model)} has layers of the kind {SLIDING}, but its config.json has no sliding_window"
        )
    return {kind: window if kind == SLIDING else None for kind in sorted(kinds)} or {"": window}


def _choose(
    model: PreTrainedModel, wanted: str, platform: Platform, windows: dict[str, int | None], shares_prompts: bool
) -> str:
    loaded: str = model.config._attn_implementation  # noqa: SLF001
    if wanted == AUTO and loaded != EAGER:
        return _fastest(model, platform, windows, shares_prompts)
    if loaded == FLASH and shares_prompts:
        raise ModelError(
            f"attn_implementation={FLASH}: its kernels cannot let two completions share a prompt; use {AUTO}, {FLEX} "
            f"or {SDPA}"
        )
    if loaded == FLEX and platform.name == "cpu":
        raise ModelError(
            f"attn_implementation={FLEX}: on the CPU torch has no backward pass for it; use {AUTO} or {SDPA}"
        )
    if loaded not in (FLASH, FLEX, SDPA, EAGER):
        raise ModelError(
            f"{name_of(model)}: attn_implementation={loaded} is not known to keep packed sequences apart; use {AUTO}"
        )
    return loaded


def _fastest(model: PreTrainedModel, platform: Platform, windows: dict[str, int | None], shares_prompts: bool) -> str:
    cuda = platform.name == "cuda"
    # transformers' adapter for NPUs drops the window that it is given.
    installed = cuda and importlib.util.find_spec("flash_attn") is not None
    installed |= platform.name == "npu" and not any(windows.values())
    half = model.dtype in (torch.bfloat16, torch.float16)
    if installed and half and not shares_prompts and getattr(model, "_supports_flash_attn", False):
        return FLASH
    return FLEX if cuda and getattr(model, "_supports_flex_attn", False) else SDPA


def _lengths(batch: PackedBatch) -> dict[str, Any]:
    """What variable-length kernels take: where sequences begin, and the longest."""
    positions = batch.position_ids[0]
    starts = (positions == 0).nonzero().flatten()
    jumps = positions.diff() != 1
    if (positions[1:][jumps] != 0).any():
        raise ModelError(
            f"completions share a prompt, which {FLASH} cannot compute: build the model for shared prompts"
        )
    bounds = torch.cat([starts, starts.new_tensor([len(positions)])]).int()
    longest = int(bounds.diff().max())
    return {
        "attention_mask": None,
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def name_of(model: PreTrainedModel) -> str:
    """A model as errors call it."""
    return f"the model in {model.name_or_path!r} (model_type {model.config.model_type})"
