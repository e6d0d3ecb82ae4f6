"""Keep the classes of transformers as they are where vLLM generates with them.

vLLM serves models that it has no code of its own for through the classes of transformers. It decorates these in place,
for its compiler, and a trainer in the same process could then no longer build its model from them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class _Undecorated:
    cls: type
    bases: tuple[type, ...]
    attributes: dict[str, Any]


@contextmanager
def own_classes() -> Iterator[None]:
    """Within it an engine of this process loads its model, whose decorated classes become its own."""
    from vllm.model_executor.model_loader import base_loader
    from vllm.model_executor.models.transformers import base

    decorated: list[_Undecorated] = []
    decorate, initialize = base.support_torch_compile, base_loader.initialize_model

    def remembering(*arguments: Any, **named: Any) -> Callable[[type], type]:
        def apply(cls: type) -> type:
            decorated.append(_Undecorated(cls, cls.__bases__, dict(vars(cls))))
            return decorate(*arguments, **named)(cls)

        return apply

    def separating(*arguments: Any, **named: Any) -> torch.nn.Module:
        model = initialize(*arguments, **named)
        while decorated:
            _separate(decorated.pop(), model)
        return model

    base.support_torch_compile, base_loader.initialize_model = remembering, separating
    try:
        yield
    finally:
        base.support_torch_compile, base_loader.initialize_model = decorate, initialize


def _separate(before: _Undecorated, model: torch.nn.Module) -> None:
    """Give the class back as it was; the parts of `model` that are of it get a decorated subclass instead."""
    cls, attributes = before.cls, before.attributes
    added = {name: value for name, value in vars(cls).items() if attributes.get(name) is not value}
    added_bases = tuple(base for base in cls.__bases__ if base not in before.bases)
    cls.__bases__ = before.bases
    for name in added:
        if name in attributes:
            setattr(cls, name, attributes[name])
        else:
            delattr(cls, name)
    decorated = type(cls.__name__, (cls, *added_bases), {"__module__": cls.__module__, **added})
    for module in model.modules():
        if type(module) is cls:
            module.__class__ = decorated
