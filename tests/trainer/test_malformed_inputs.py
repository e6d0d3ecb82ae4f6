"""300 generated inputs that are broken in some way: one line and status 2, no traceback, nothing written, no Ray.

Each mutation knows whether a run may begin with it. Ray's start is the line that must not be crossed: a run that
gets there would have begun. The folder is claimed just before, and no refused input may come that far.
"""

from __future__ import annotations

import json
import math
import random
import shutil
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
import ray
from omegaconf import OmegaConf

from rlhf_npu import main_ppo
from rlhf_npu.config import PPOConfig
from rlhf_npu.config.schema import PPO
from rlhf_npu.trainer import interruption
from rlhf_npu.trainer.output import OutputFolder, claim_folder
from tests.tiny_model import save_tiny_model

pytestmark = pytest.mark.slow

SEED = 20261125
T = TypeVar("T")
REWARD = "def score(response, finished, sample):\n    return float(finished)\n"
RECORD = {"prompt": "1,2,3:", "data_source": "count", "reward_model": {"ground_truth": "4"}}


class Draw(random.Random):
    """What a case is made of: drawn at random, or in turn where each of a few is to come up."""

    def __init__(self, number: int) -> None:
        super().__init__(SEED + number)
        self._number = number

    def in_turn(self, options: Sequence[T]) -> T:
        return options[self._number % len(options)]


Mutation = Callable[[Path, Draw], "list[str] | None"]


class RayStarted(BaseException):
    """A run got as far as starting Ray."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, data and a reward function that are right."""
    folder = tmp_path_factory.mktemp("whole")
    save_tiny_model(folder / "model")
    (folder / "train.jsonl").write_text("".join(json.dumps(RECORD) + "\n" for _ in range(4)))
    (folder / "rewards.py").write_text(REWARD)
    (folder / "mine" / "recipe").mkdir(parents=True)
    (folder / "mine" / "recipe" / "own.yaml").write_text("# @package _global_\ntrainer: {seed: 5}\n")
    return folder


@pytest.fixture
def attempt(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[[Mutation, int], tuple[bool, str]]:
    """Runs the program on a mutated copy; returns whether it reached Ray, and what it printed."""

    claimed: list[Path] = []

    def crossed(*_: Any, **__: Any) -> None:
        raise RayStarted

    @contextmanager
    def watched(config: PPOConfig) -> Iterator[OutputFolder]:
        with claim_folder(config) as output:
            claimed.append(output.path)
            yield output

    monkeypatch.setattr(ray, "init", crossed)
    monkeypatch.setattr(interruption, "claim_folder", watched)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)

    def run(mutate: Mutation, number: int) -> tuple[bool, str]:
        folder = tmp_path / str(number)
        shutil.copytree(whole, folder)
        monkeypatch.chdir(folder)
        argv = ["main_ppo", *arguments(folder), *(mutate(folder, Draw(number)) or [])]
        monkeypatch.setattr(sys, "argv", argv)
        before = contents(folder)
        capfd.readouterr()
        with pytest.raises((SystemExit, RayStarted)) as end:
            main_ppo.main()
        printed = capfd.readouterr()
        text = printed.out + printed.err
        assert "Traceback" not in text
        assert "internal error" not in text
        if isinstance(end.value, RayStarted):
            assert claimed
            claimed.clear()
            return True, text
        assert not claimed, text
        assert isinstance(end.value, SystemExit)
        assert end.value.code == 2, text
        assert printed.err.startswith("error: "), text
        assert printed.err.replace("\n", "").isprintable(), text
        assert contents(folder) == before, "a refused run has written something"
        shutil.rmtree(folder)
        return False, printed.err

    return run


def arguments(folder: Path) -> list[str]:
    """A small run as a YAML file, since Hydra takes its time over each override."""
    keys = [
        f"actor_rollout_ref.model.path={folder / 'model'}",
        f"data.train_files=[{folder / 'train.jsonl'}]",
        "data.val_files=[]",
        f"reward.function={folder / 'rewards.py'}:score",
        "algorithm.adv_estimator=grpo",
        "data.train_batch_size=4",
        "actor_rollout_ref.actor.ppo_mini_batch_size=4",
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_device=4",
        "actor_rollout_ref.rollout.n=2",
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_device=4",
        "trainer.device=cpu",
        "trainer.n_devices_per_node=1",
        "trainer.logger=[jsonl]",
        f"trainer.default_local_dir={folder / 'run'}",
    ]
    file = folder / "mine" / "base" / "small.yaml"
    file.parent.mkdir()
    file.write_text(f"# @package _global_\n{OmegaConf.to_yaml(OmegaConf.from_dotlist(keys))}")
    return ["--config-dir", str(folder / "mine"), "+base=small"]


def contents(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if "__pycache__" not in path.parts}


def edit_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


NOT_OBJECTS = ["", "[]", "3", '"text"', "null", "{", '{"model_type": "llama"', "[" * 5000, "\x00\x01", "NaN", "{}{}"]


# --- model folders that must be refused


def config_is_no_object(folder: Path, rng: random.Random) -> None:
    (folder / "model" / "config.json").write_text(rng.choice(NOT_OBJECTS))


def config_is_cut_off(folder: Path, rng: random.Random) -> None:
    file = folder / "model" / "config.json"
    text = file.read_bytes()
    file.write_bytes(text[: rng.randrange(len(text) - 2)])


def config_is_not_utf8(folder: Path, rng: random.Random) -> None:
    file = folder / "model" / "config.json"
    file.write_bytes(file.read_bytes() + bytes(rng.randrange(128, 256) for _ in range(8)))


def config_has_an_odd_number(folder: Path, rng: random.Random) -> None:
    name = rng.choice(
        ["vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "head_dim"]
    )
    odd: Any = rng.choice(["64", -1, 0, 1.5, [], {}, 10**12, 10**30, True, 7, [64], "\ud800"])
    edit_json(folder / "model" / "config.json", **{name: odd})


def config_has_an_odd_word(folder: Path, rng: random.Random) -> None:
    odd: list[tuple[str, Any]] = [
        ("hidden_act", "nope"),
        ("hidden_act", 3),
        ("dtype", "float12"),
        ("rope_parameters", {"rope_type": "nope"}),
        ("rope_parameters", "default"),
        ("pad_token_id", 4000),
        ("quantization_config", {"quant_method": "gptq", "bits": 4}),
        ("auto_map", {"AutoConfig": "other.Config", "AutoModelForCausalLM": "other.Model"}),
        ("max_position_embeddings", "128"),
        ("max_position_embeddings", 0),
        ("max_position_embeddings", 31),
        ("num_key_value_heads", 3),
    ]
    name, value = rng.choice(odd)
    edit_json(folder / "model" / "config.json", **{name: value} | ({"model_type": "own"} if name == "auto_map" else {}))


def model_type_is_unknown(folder: Path, rng: random.Random) -> None:
    kinds: list[Any] = ["nope", "", None, 3, ["llama"], {}, "t5", "clip", "bert", "whisper", "\ud800", "llama\x00"]
    edit_json(folder / "model" / "config.json", model_type=rng.choice(kinds))


def weights_are_cut_off(folder: Path, rng: random.Random) -> None:
    file = folder / "model" / "model.safetensors"
    with file.open("rb+") as weights:
        weights.truncate(rng.choice([0, 1, 7, 8, 9, rng.randrange(file.stat().st_size), file.stat().st_size - 1]))


def weights_have_more_bytes(folder: Path, rng: random.Random) -> None:
    with (folder / "model" / "model.safetensors").open("ab") as weights:
        weights.write(rng.randbytes(rng.randrange(1, 100)))


def weights_have_an_odd_header(folder: Path, rng: random.Random) -> None:
    file = folder / "model" / "model.safetensors"
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    name = rng.choice([key for key in header if key != "__metadata__"])
    tensor = header.pop(name)
    kind = rng.randrange(6)
    if kind == 0:
        header[name] = tensor | {"dtype": "X99"}
    elif kind == 1:
        header[name] = tensor | {"shape": [size + 1 for size in tensor["shape"]]}
    elif kind == 2:
        header[name + "x"] = tensor
    elif kind == 3:
        header[name] = tensor | {"data_offsets": [-1, "x"]}
    elif kind == 4:
        header[name] = tensor | {"shape": [2**62, 4]}
    text = rng.randbytes(length) if kind == 5 else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def weights_have_an_endless_header(folder: Path, rng: random.Random) -> None:
    with (folder / "model" / "model.safetensors").open("rb+") as weights:
        weights.write(struct.pack("<Q", rng.choice([2**63, 2**64 - 1, 10**9])))


def index_is_odd(folder: Path, rng: random.Random) -> None:
    model = folder / "model"
    (model / "model.safetensors").rename(model / "part.safetensors")
    places: Any = {"model.norm.weight": rng.choice(["part.safetensors", "other.safetensors", "../part.safetensors", 3])}
    text = json.dumps({"weight_map": rng.choice([places | {"x": "part.safetensors"}, None, [], {}, 3])})
    (model / "model.safetensors.index.json").write_text(rng.choice([text, text, text[:-1], "[]"]))


def a_file_is_missing(folder: Path, rng: random.Random) -> None:
    file = folder / "model" / rng.choice(["config.json", "model.safetensors"])
    file.unlink()
    replacement = rng.choice([None, "folder", "dangling", "bin"])
    if replacement == "folder":
        file.mkdir()
    elif replacement == "dangling":
        file.symlink_to(folder / "nowhere")
    elif replacement == "bin":
        (folder / "model" / "pytorch_model.bin").write_bytes(b"weights")


def two_sets_of_weights(folder: Path, _: random.Random) -> None:
    shutil.copy(folder / "model" / "model.safetensors", folder / "model" / "consolidated.safetensors")


def the_folder_is_none(folder: Path, rng: random.Random) -> list[str]:
    path = rng.choice(
        [str(folder / "rewards.py"), str(folder / "nowhere"), "x" * 300, "a/" * 3000, "~nobodyhere/model"]
    )
    return [f"actor_rollout_ref.model.path={path}"]


def generation_config_is_odd(folder: Path, rng: random.Random) -> None:
    stops: list[Any] = ["2", True, -1, [2, None], 10**30, 15, {}]
    odd = [*NOT_OBJECTS, *(json.dumps({"eos_token_id": stop}) for stop in stops)]
    (folder / "model" / "generation_config.json").write_text(rng.choice([text for text in odd if text != "{}"]))


def tokenizer_is_broken(folder: Path, rng: random.Random) -> None:
    file = folder / "model" / "tokenizer.json"
    content = json.loads(file.read_text())
    kind = rng.randrange(5)
    if kind == 0:
        file.write_text(rng.choice(NOT_OBJECTS))
    elif kind == 1:
        text = file.read_text()
        file.write_text(text[: rng.randrange(1, len(text) - 2)])
    elif kind == 2:
        content["model"]["vocab"] |= {"z": rng.choice([-1, 2**40, "3"])}
        file.write_text(json.dumps(content))
    elif kind == 3:
        content["model"] = rng.choice([None, {}, {"type": "Nope"}, []])
        file.write_text(json.dumps(content))
    else:
        content["pre_tokenizer"] = {"type": "Nope"}
        file.write_text(json.dumps(content))


def tokenizer_does_not_belong_to_the_model(folder: Path, rng: random.Random) -> None:
    file = folder / "model" / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["vocab"] |= {chr(0x4E00 + place): 15 + place for place in range(rng.randrange(1, 50))}
    file.write_text(json.dumps(content))


def tokenizer_has_no_end(folder: Path, _: random.Random) -> None:
    edit_json(folder / "model" / "tokenizer_config.json", eos_token=None)


CHAT = RECORD | {"prompt": [{"role": "user", "content": "1,2,3:"}]}
NESTED_LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
ENDLESS_TEMPLATES = [
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    NESTED_LOOPS,
    "{% if messages[0].content == '1,2,3:' %}" + NESTED_LOOPS + "{% endif %}1",
]
RAISING_TEMPLATES = [
    "{{ messages[0].content + 1 }}",
    "{{ 1 // (messages | length - 1) }}",
    "{{ 2.0 ** (9999 + messages | length) }}",
    "{{ '%c' | format(2 ** 31 + messages | length) }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() if messages[0].content == '1,2,3:' }}1",
    "{{ messages[3].content.x }}",
    r"{{ raise_exception('\x1b[31mno\ud800') }}",
    "{% for m in messages %}",
    "{{ messages | nope }}",
    "{% include 'other' %}",
    "",
]


def template_never_ends(folder: Path, draw: Draw) -> None:
    write_template(folder, draw.in_turn(ENDLESS_TEMPLATES))


def template_raises(folder: Path, draw: Draw) -> None:
    write_template(folder, draw.in_turn(RAISING_TEMPLATES))


def write_template(folder: Path, template: str) -> None:
    (folder / "model" / "chat_template.jinja").write_text(template)
    (folder / "train.jsonl").write_text((json.dumps(CHAT) + "\n") * 4)


# --- configurations that must be refused


def value_of_another_type(folder: Path, rng: random.Random) -> list[str]:
    # There is no critic, and any text may name its model.
    leaf = PPO.leaves[
        rng.choice(sorted(name for name in PPO.leaves if not name.startswith(("reward.", "critic.model."))))
    ]
    odd: dict[Any, list[str]] = {
        int: ["x", "1.5", "[1]", "{a:1}", "-5", "1e400", "nan", "true", "9" * 30, "", "2147483648000000000000"],
        float: ["x", "nan", "inf", "-inf", "1e400", "[1]", "{a:1}", "-1e9", "null", ""],
        bool: ["perhaps", "null", "[true]", "1.5", "{a:1}", ""],
        str: ["[a]", "{a:1}", '"a\0b"', '"\udcff"', "null"],
        float | None: ["x", "{a:1}", "-1", "nan", "inf"],
    }
    values = odd.get(leaf.type, ["x", "{a:1}", "-1", "1.5"])
    return [f"{leaf.key}={rng.choice([value for value in values if not (value == 'null' and leaf.default is None)])}"]


def key_is_misspelt(folder: Path, rng: random.Random) -> list[str]:
    key = rng.choice(sorted(PPO.leaves))
    place = rng.randrange(1, len(key) - 1)
    letter = rng.choice("qxz")
    return [rng.choice(["", "+", "++", "~"]) + key[:place] + letter + key[place:] + rng.choice(["=1", "=x", "=[a]"])]


NO_OVERRIDES = """
=3 trainer.seed a=b=c trainer.seed={ trainer.seed=[1 trainer.seed='1 trainer=3 trainer=null trainer..seed=1 nope@x=3
~trainer.seed=2 ~trainer.default_local_dir ~reward.kwargs ~reward.kwargs.x ~nope +trainer.seed=3 hydra.nope=3
algorithm=nope recipe=nope recipe=[own,nope] trainer.seed=choice(1,2) trainer.seed=1,2 reward.kwargs.x=1 reward.kwargs=3
"""


def override_is_no_override(folder: Path, rng: random.Random) -> list[str]:
    return [rng.choice(NO_OVERRIDES.split())]


def interpolation_is_odd(folder: Path, rng: random.Random) -> list[str]:
    key = rng.choice(["trainer.experiment_name", "trainer.seed", "algorithm.gamma", "data.prompt_key"])
    return rng.choice(
        [
            [f"{key}=${{nope}}"],
            [f"{key}=${{oc.env:RLHF_NPU_NOT_SET}}"],
            [f"{key}=${{nope:1}}"],
            [f"{key}=${{{key}}}"],
            ["trainer.experiment_name=${trainer.project_name}", "trainer.project_name=${trainer.experiment_name}"],
            [f"{key}=${{trainer"],
            ["+reward.kwargs.x=${nope}"],
            [f"{key}=${{oc.decode:'[1'}}"],
        ]
    )


def yaml_is_odd(folder: Path, rng: random.Random) -> list[str]:
    head = "# @package _global_\n"
    contents: list[bytes | str] = [
        head + "trainer:\n\tseed: 5\n",
        head + "trainer: {seed: 5, seed: 6}\n",
        head + "trainer: [\n",
        head + "trainer: {sed: 5}\n",
        head + "trainer: {seed: five}\n",
        head + "trainer: null\n",
        head + "- a\n- b\n",
        head + "just text\n",
        head + "trainer: &a {experiment_name: *a}\n",
        head + "trainer: {seed: !!python/object/apply:os.system [true]}\n",
        head + "trainer: {experiment_name: '${a}'}\na: '${b}'\nb: '${a}'\n",
        head + "trainer: {experiment_name: '${nope:1}'}\n",
        head + 'trainer: {experiment_name: "a\\0b"}\n',
        head + "trainer: {seed: .inf}\n",
        head + "trainer: {seed: 1e400}\n",
        head + "trainer: {seed: " + "9" * 5000 + "}\n",
        head + "trainer: " + "[" * 900 + "\n",
        head + "defaults: [nope]\n",
        head.encode() + b"trainer: {experiment_name: \xff\xfe}\n",
        b"\x00\x01\x02",
        "# @package nope.nope\ntrainer: 3\n",
    ]
    content = rng.choice(contents)
    file = folder / "mine" / "recipe" / "own.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return ["recipe=own"]


def yaml_cannot_be_read(folder: Path, rng: random.Random) -> list[str]:
    file = folder / "mine" / "recipe" / "own.yaml"
    file.unlink()
    if rng.random() < 0.5:
        file.mkdir()
    return ["recipe=own"]


def output_cannot_be_written(folder: Path, rng: random.Random) -> list[str]:
    (folder / "old").mkdir()
    (folder / "old" / "metrics.jsonl").write_text("{}\n")
    (folder / "dangling").symlink_to(folder / "nowhere" / "at" / "all")
    places = [folder / "rewards.py", folder / "rewards.py" / "run", folder / ("x" * 300), folder / "old"]
    names = [*map(str, places), "/proc/run", "/dev/null/run", "~nobodyhere/run", '""', "y/" * 3000 + "run"]
    return [f"trainer.default_local_dir={rng.choice(names)}"]


def limits_do_not_fit(folder: Path, rng: random.Random) -> list[str]:
    return [
        rng.choice(
            [
                "data.max_prompt_length=113",
                "data.max_response_length=2147483647",
                "trainer.n_devices_per_node=100000",
                "trainer.nnodes=2",
                "data.train_batch_size=2147483647",
                "actor_rollout_ref.rollout.n=2147483647",
                "actor_rollout_ref.rollout.kv_cache_memory_gb=1e300",
                "actor_rollout_ref.rollout.kv_cache_memory_gb=100000",
                "actor_rollout_ref.rollout.tensor_model_parallel_size=3",
                "data.max_prompt_length=5",
                "trainer.logger=[wandb]",
                "trainer.logger=[jsonl,nope]",
            ]
        )
    ]


# --- records that must be refused


def record_is_odd(folder: Path, rng: random.Random) -> None:
    odd: list[Any] = [
        3,
        None,
        [],
        "text",
        {},
        {name: value for name, value in RECORD.items() if name != rng.choice(sorted(RECORD))},
        RECORD | {"prompt": rng.choice([3, None, [], {}, "", [[]], [{}], [{"role": "user"}], True, 1e308, [None]])},
        RECORD | {"reward_model": rng.choice([3, None, [], "x", {}])},
        RECORD | {"extra_info": rng.choice([3, "x", [1]])},
    ]
    lines = [json.dumps(RECORD) for _ in range(4)]
    lines[rng.randrange(4)] = json.dumps(rng.choice(odd))
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")


def line_is_no_json(folder: Path, rng: random.Random) -> None:
    whole = json.dumps(RECORD)
    lines = [whole.encode() for _ in range(4)]
    lines[rng.randrange(4)] = rng.choice([whole[:-1].encode(), b"\xff\xfe", b"\x00", whole.encode() * 2, b"{'a': 1}"])
    (folder / "train.jsonl").write_bytes(b"\n".join(lines) + b"\n")


ODD_LINES = [
    "[" * 100_000,
    '{"prompt":' * 100_000,
    "9" * 5000,
    json.dumps(RECORD | {"prompt": "1\ud800"}),
    json.dumps(CHAT | {"prompt": [{"role": "user", "content": "1\ud800"}]}),
    json.dumps(RECORD | {"reward_model": {"ground_truth": "\udfff"}}),
    json.dumps(RECORD | {"reward_model": {"ground_truth": math.nan}}),
    json.dumps(RECORD).replace('"4"', "1e400"),
    json.dumps(RECORD).replace('"4"', "-1e400"),
    json.dumps(RECORD).replace('"4"', "[" * 70 + "]" * 70),
    json.dumps(RECORD | {"extra_info": {"level": -math.inf}}),
    json.dumps(RECORD | {"data_source": ["count"]}),
    json.dumps(RECORD | {"data_source": "\ud800"}),
    json.dumps(RECORD | {"data_source": "a\x1b[31m"}),
    json.dumps(RECORD | {"data_source": 1.5}),
    json.dumps(RECORD)[:-1] + ', "prompt": "4"}',
    json.dumps(RECORD).replace('"4"', '"4", "ground_truth": "4"'),
    json.dumps(RECORD | {"prompt": json.dumps(CHAT["prompt"])}),
]


def record_holds_what_none_may(folder: Path, draw: Draw) -> None:
    lines = [json.dumps(RECORD) for _ in range(4)]
    lines[draw.randrange(4)] = draw.in_turn(ODD_LINES)
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")


ODD_REWARDS = [
    "import sys\nsys.exit(3)\n",
    "raise KeyboardInterrupt\n",
    "import os\nos._exit(0)\n",
    "import os\ndef score(response):\n    os._exit(0)\n",
    "def score(response:\n",
    "score = 3\n",
    "def score(completions):\n    return 1.0\n",
    "def score(response):\n    raise KeyboardInterrupt\n",
    "def score(response):\n    return 10 ** 400\n",
    "import nowhere_to_be_found\n",
]


def reward_is_broken(folder: Path, draw: Draw) -> None:
    (folder / "rewards.py").write_text(draw.in_turn(ODD_REWARDS))


def file_is_none(folder: Path, draw: Draw) -> list[str]:
    (folder / "empty.jsonl").touch()
    (folder / "half.parquet").write_bytes(b"PAR1" + draw.randbytes(50))
    (folder / "folder.jsonl").mkdir()
    (folder / "train.csv").write_text("prompt\n1,2\n")
    names = ["empty.jsonl", "half.parquet", "folder.jsonl", "train.csv", "nowhere.jsonl", "builtin:nope/x"]
    name = draw.in_turn(
        [*names, "x" * 300 + ".jsonl", "y/" * 3000 + "z.jsonl", "~nobodyhere/x.jsonl", "'a\x1b[31m\x07.jsonl'"]
    )
    return [f"data.train_files=[{name}]"]


# --- what looks odd and is right


def generation_config_contradicts_itself(folder: Path, rng: random.Random) -> None:
    odd = {
        "do_sample": False,
        "temperature": rng.choice([0.6, 1e308]),
        "top_p": 0.9,
        "eos_token_id": rng.choice([2, [2]]),
    }
    (folder / "model" / "generation_config.json").write_text(json.dumps(odd))


def nothing_is_wrong(folder: Path, rng: random.Random) -> list[str]:
    return rng.choice(
        [
            [],
            ["recipe=own"],
            ["trainer.seed=9", "~trainer.seed"],
            ["++trainer.seed=3", "~critic.model", "~recipe"],
            ["+reward.kwargs={}", "trainer.experiment_name='a b, c = $ ü'"],
            ["data.max_prompt_length=64", "data.max_response_length=64"],
            ["trainer.default_local_dir=deep/er/run", "trainer.logger=[]"],
            ["trainer.total_training_steps=null", "trainer.project_name=null__"],
        ]
    )


REFUSED: list[tuple[Mutation, int]] = [
    (config_is_no_object, 8),
    (config_is_cut_off, 5),
    (config_is_not_utf8, 3),
    (config_has_an_odd_number, 18),
    (config_has_an_odd_word, 16),
    (model_type_is_unknown, 12),
    (weights_are_cut_off, 10),
    (weights_have_more_bytes, 3),
    (weights_have_an_odd_header, 10),
    (weights_have_an_endless_header, 3),
    (index_is_odd, 9),
    (a_file_is_missing, 8),
    (two_sets_of_weights, 1),
    (the_folder_is_none, 6),
    (generation_config_is_odd, 12),
    (tokenizer_is_broken, 12),
    (tokenizer_does_not_belong_to_the_model, 3),
    (tokenizer_has_no_end, 1),
    (template_never_ends, len(ENDLESS_TEMPLATES)),
    (template_raises, len(RAISING_TEMPLATES)),
    (value_of_another_type, 22),
    (key_is_misspelt, 9),
    (override_is_no_override, 18),
    (interpolation_is_odd, 9),
    (yaml_is_odd, 22),
    (yaml_cannot_be_read, 2),
    (output_cannot_be_written, 9),
    (limits_do_not_fit, 11),
    (record_is_odd, 12),
    (line_is_no_json, 5),
    (file_is_none, 10),
    (record_holds_what_none_may, len(ODD_LINES)),
    (reward_is_broken, len(ODD_REWARDS)),
]
STARTS: list[tuple[Mutation, int]] = [(generation_config_contradicts_itself, 3), (nothing_is_wrong, 6)]


def test_there_are_three_hundred() -> None:
    assert sum(count for _, count in REFUSED) + sum(count for _, count in STARTS) >= 300


@pytest.mark.parametrize(("mutate", "count"), REFUSED, ids=[mutate.__name__ for mutate, _ in REFUSED])
def test_broken_input_is_refused_in_words(
    attempt: Callable[[Mutation, int], tuple[bool, str]],
    monkeypatch: pytest.MonkeyPatch,
    mutate: Mutation,
    count: int,
) -> None:
    monkeypatch.setattr("rlhf_npu.data.chats.TEMPLATE_SECONDS", 0.5)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    for number in range(count):
        started, text = attempt(mutate, number)
        assert not started, f"case {number} of {mutate.__name__} would have begun: {text}"


@pytest.mark.parametrize(("mutate", "count"), STARTS, ids=[mutate.__name__ for mutate, _ in STARTS])
def test_input_that_only_looks_odd_is_taken(
    attempt: Callable[[Mutation, int], tuple[bool, str]], mutate: Mutation, count: int
) -> None:
    for number in range(count):
        started, text = attempt(mutate, number)
        assert started, text
