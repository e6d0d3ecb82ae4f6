"""The end of a run, tried at the start: folder, room, trackers, picture; and trackers that fail on the way."""

from __future__ import annotations

import collections
import io
import json
import shutil
from pathlib import Path

import pytest
import wandb
from rich.console import Console

from rlhf_npu.config import PPOConfig, compose_config
from rlhf_npu.engines.model_fit import POLICY, check_fit
from rlhf_npu.errors import ConfigError
from rlhf_npu.trainer.driver_log import logged_traceback
from rlhf_npu.trainer.learning_curve import draw_learning_curve
from rlhf_npu.trainer.output import OutputFolder
from rlhf_npu.trainer.rehearsal import check_home, check_host_memory, check_output_folder, rehearse_end
from rlhf_npu.trainer.terminal import PPO_LINE, Terminal
from rlhf_npu.trainer.trackers import Trackers, check_trackers
from tests.tiny_model import save_tiny_model

Usage = collections.namedtuple("Usage", ["total", "used", "free"])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "model")


def configured(model: Path, *overrides: str) -> PPOConfig:
    return compose_config([f"actor_rollout_ref.model.path={model}", "algorithm.adv_estimator=grpo", *overrides])


def rehearse(config: PPOConfig, steps: int = 10) -> list[str]:
    policy, tokenizer = check_fit(config)
    check_host_memory(config)
    return rehearse_end(config, config.actor_rollout_ref.model, POLICY, policy, tokenizer, steps)


def test_a_rehearsal_leaves_nothing_behind(model: Path, tmp_path: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in model.iterdir()}
    assert rehearse(configured(model, f"trainer.default_local_dir={tmp_path / 'a' / 'run'}")) == []
    assert list(tmp_path.iterdir()) == []
    assert {path.name: path.stat().st_mtime_ns for path in model.iterdir()} == before


@pytest.mark.parametrize("place", ["file/run", "dangling/run", "x" * 256])
def test_an_output_folder_that_cannot_be_made_is_refused(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"^trainer\.default_local_dir=.*: cannot be made: "):
        check_output_folder(str(tmp_path / place))


def test_a_home_folder_is_needed_and_one_that_can_be_written_is_advised(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_home() == []
    monkeypatch.setenv("HOME", "/proc/nowhere")
    with pytest.raises(ConfigError, match=r"HOME=/proc/nowhere: .* cannot be written: "):
        check_home()
    monkeypatch.setenv("HOME", "/proc")
    (warning,) = check_home()
    assert warning.startswith("HOME=/proc: Ray, torch and vLLM keep files there, and it cannot be written: ")


def test_room_for_one_model_is_needed_and_for_all_is_advised(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(model, f"trainer.default_local_dir={tmp_path / 'run'}", "trainer.save_freq=1")
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, size * 4))
    (warning,) = rehearse(config, steps=10)
    assert "10 models of 0.0 GB will be saved (trainer.save_freq=1)" in warning
    assert rehearse(config, steps=3) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, size // 2))
    with pytest.raises(ConfigError, match=r"the model takes 0\.0 GB, and 0\.0 GB are free"):
        rehearse(config)


def test_wandb_without_a_key_is_refused_and_offline_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    trainer = compose_config(["trainer.logger=[wandb]"]).trainer
    with pytest.raises(ConfigError, match=r"^trainer\.logger=wandb: cannot be opened; run `wandb login`"):
        check_trackers(trainer)
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_trackers(trainer)
    named = compose_config(["trainer.logger=[wandb]", "trainer.project_name=a/b"]).trainer
    with pytest.raises(ConfigError, match=r"trainer\.project_name=a/b"):
        check_trackers(named)


def test_wandb_offline_keeps_its_run_in_the_output_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb.teardown()  # which read the environment when it was first asked
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    with Trackers(compose_config(["trainer.logger=[wandb]"]), OutputFolder(str(tmp_path)), terminal()) as trackers:
        trackers.log({"critic/score/mean": 1.0}, 1)
    assert list((tmp_path / "wandb").glob("offline-run-*"))


def terminal() -> Terminal:
    return Terminal(1, PPO_LINE, Console(file=io.StringIO(), width=200))


def shown(terminal: Terminal) -> str:
    page = terminal.console.file
    assert isinstance(page, io.StringIO)
    return page.getvalue()


def test_a_tracker_that_fails_is_left_out_and_the_others_go_on(tmp_path: Path) -> None:
    screen = terminal()
    config = compose_config(["trainer.logger=[tensorboard,jsonl]"])
    with Trackers(config, OutputFolder(str(tmp_path)), screen) as trackers:
        trackers.log({"a": 1.0}, 0)
        trackers.log({"a": "no number"}, 1)  # type: ignore[dict-item]
        trackers.log({"a": 3.0}, 2)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert shown(screen).count("trainer.logger=tensorboard does not take step 1 and is left out from now on") == 1


def test_a_tracker_that_cannot_be_opened_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").touch()
    with pytest.raises(ConfigError, match=r"^trainer\.logger=tensorboard: cannot be opened: "):
        Trackers(compose_config(["trainer.logger=[tensorboard]"]), OutputFolder(str(tmp_path)), terminal())


def test_a_curve_is_drawn_whatever_a_data_source_is_called(tmp_path: Path) -> None:
    names = ["val-core/$x^{/reward/mean@1", "val-core/漢字/reward/mean@1", "val-core/_hidden/reward/mean@1"]
    draw_learning_curve([(step, dict.fromkeys(names, float(step))) for step in range(3)], tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_the_traceback_of_a_failed_run_is_in_its_folder(tmp_path: Path) -> None:
    file = tmp_path / "logs" / "driver.log"
    with pytest.raises(ZeroDivisionError) as caught, logged_traceback(file):
        print(1 / 0)
    assert caught.value.__notes__ == [f"the traceback is in {file}"]
    assert "Traceback" in file.read_text()
    assert "ZeroDivisionError" in file.read_text()
