"""The errors a user can meet. Each message names what was wrong, its value, and what would be right."""


class RlhfNpuError(Exception):
    """Base of every error this package raises on purpose."""


class InstallationError(RlhfNpuError, ImportError):
    """A package that is needed is missing, or one that is there breaks another."""


class ConfigError(RlhfNpuError, ValueError):
    """A configuration key has a value that cannot work."""


class DataError(RlhfNpuError, ValueError):
    """A data file is missing, malformed or empty."""


class ModelError(RlhfNpuError, ValueError):
    """A model folder is missing or holds something that cannot be trained or served."""


class SaveError(RlhfNpuError, OSError):
    """A trained model could not be written; names the folder that holds what was written of it."""


class RewardError(RlhfNpuError, RuntimeError):
    """A reward function is missing, raised, or returned something that is not a finite number."""


class ExtensionBuildError(RlhfNpuError, RuntimeError):
    """DeepSpeed's collectives of the CPU could not be built."""


class DeviceError(RlhfNpuError, RuntimeError):
    """The devices asked for are not there."""


class ClusterError(RlhfNpuError, RuntimeError):
    """Ray could not be started, or the cluster that RAY_ADDRESS names could not be joined."""


class WorkerError(RlhfNpuError, RuntimeError):
    """A worker died or did not answer."""


class SwitchError(RlhfNpuError, RuntimeError):
    """A phase of the switch between generating and training failed; names the phase and the tags."""


class PlanError(RlhfNpuError, ValueError):
    """What is configured does not fit on a device.

    Attributes:
        stage, tag: the stage that bursts it, and the largest tag that is awake in it.
        missing: bytes that are missing there.
    """

    def __init__(self, message: str, *, stage: str, tag: str, missing: int) -> None:
        super().__init__(message)
        self.stage, self.tag, self.missing = stage, tag, missing

    def __reduce__(self) -> tuple[object, ...]:
        return _plan_error, (str(self), self.stage, self.tag, self.missing)


def _plan_error(message: str, stage: str, tag: str, missing: int) -> PlanError:
    return PlanError(message, stage=stage, tag=tag, missing=missing)


class ReshardError(RlhfNpuError, RuntimeError):
    """The rollout's weights are not the trainer's weights after a reshard."""


class SharingError(RlhfNpuError, RuntimeError):
    """Trainer and rollout were to keep their weights in one storage, and one of them does not do so."""


class NoWeightsError(RlhfNpuError, RuntimeError):
    """A rollout engine was to generate with weights that are nobody's: never sent, dropped, or sent in part."""


class EngineMismatchError(RlhfNpuError, RuntimeError):
    """Trainer and rollout engine compute different functions on the same weights."""
