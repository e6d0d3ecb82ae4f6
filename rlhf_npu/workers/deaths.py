"""Why a worker's process ended, in a line, from what Ray says in many."""

from __future__ import annotations

import re

from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError, RayError, RuntimeEnvSetupError

END_OF_FILE = "connection error code 2"
DETAIL = re.compile(r"Worker exit detail: (?P<detail>.*?)(?: Some common causes.*)?$", re.MULTILINE)


def cause_of_death(error: RayError) -> str:
    """The likely cause of `error`, which a call to a worker that has died raises."""
    text = str(error).strip()
    if isinstance(error, OutOfMemoryError):
        return f"Ray ended it since its node ran out of memory: {text.splitlines()[0]}"
    if isinstance(error, NodeDiedError):
        return f"its node was lost: {text.splitlines()[0]}"
    if isinstance(error, RuntimeEnvSetupError):
        return f"its environment could not be set up: {text.splitlines()[-1]}"
    if isinstance(error, RayActorError) and error.actor_init_failed:
        return f"it could not be created: {text.splitlines()[-1]}"
    if END_OF_FILE in text:
        return (
            "its process ended without a word: killed with SIGKILL, most often by the kernel when memory ran out "
            "(dmesg tells), or crashed, or stopped in a reward function's call that cannot be interrupted (its log "
            "then ends with `Timeout` and the stacks)"
        )
    detail = DETAIL.search(text)
    return detail["detail"] if detail else text.splitlines()[-1] if text else type(error).__name__
