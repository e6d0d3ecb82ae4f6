"""Watch vLLM's own `load_weights`: which element of a trainer's tensor becomes which element of the rollout's.

The watch sees each operation of torch. Views share their tensor's storage, so a copy into a parameter tells by its
offset, sizes and strides what was copied where, however the model's code names, cuts and fuses. What is not a copy of
plain elements (a sum, a change of sign) is seen as well, and told apart.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rlhf_npu.hybrid.resharding.strided_copies import Place

aten = torch.ops.aten
FILLS = (aten.fill_.Scalar, aten.zero_.default)
DUPLICATES = (aten.clone.default, aten._to_copy.default)  # noqa: SLF001


@dataclass(frozen=True)
class Write:
    """Elements of one of the rollout's tensors were written.

    Attributes:
        target, to: its name, and which of its elements.
        source: the trainer's tensor that they were copied from, with what was done to it before; None for a constant.
        taken: which of the source's elements.
        exact: they are the source's elements themselves.
        value: the constant.
    """

    target: str
    to: Place
    source: str | None
    taken: Place | None
    exact: bool
    value: float = 0.0


@dataclass(frozen=True)
class _Origin:
    name: str
    roots: frozenset[str]
    exact: bool
    start: int


class _Origins:
    """What each storage holds, as far as it comes from the trainer; storages may die meanwhile."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[StorageWeakRef, list[_Origin]]] = {}

    def of(self, tensor: torch.Tensor) -> _Origin | None:
        if (key := storage_key(tensor)) not in self._known:
            return None
        offset = tensor.storage_offset()
        return [origin for origin in self._known[key][1] if origin.start <= offset][-1]

    def add(self, tensor: torch.Tensor, origin: _Origin) -> None:
        """A storage may hold several of the trainer's tensors, one after the other."""
        storage = tensor.untyped_storage()
        # The weak reference keeps the key from being used for another storage.
        _, parts = self._known.setdefault(storage_key(tensor), (StorageWeakRef(storage), []))
        parts.append(origin)
        parts.sort(key=lambda part: part.start)


class LoadWatch(TorchDispatchMode):
    """Records what is written to the rollout's tensors while it is entered.

    Attributes:
        writes: in their order.
        taken: the names of the trainer's tensors from which anything was written.

    Args:
        target_of: the name of the rollout's tensor whose storage a tensor has, if any.
        runs: False lets no element move: the trainer's tensors are on the meta device then, and duplicates of them are
            the tensors themselves, so that what is copied can be followed to where it came from.
    """

    def __init__(self, target_of: Callable[[torch.Tensor], str | None], *, runs: bool) -> None:
        super().__init__()
        self.writes: list[Write] = []
        self.taken: set[str] = set()
        self._target_of = target_of
        self._runs = runs
        self._origins = _Origins()

    def give(self, name: str, tensor: torch.Tensor) -> None:
        """From now on `tensor` is the trainer's tensor of that name."""
        self._origins.add(tensor, _Origin(name, frozenset([name]), exact=True, start=int(tensor.storage_offset())))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called by torch for each operation."""
        kwargs = kwargs or {}
        if func.is_view:
            return func(*args, **kwargs)
        origins = [origin for leaf in tree_leaves((args, kwargs)) if (origin := self._origin(leaf)) is not None]
        if func._schema.is_mutable and isinstance(args[0], torch.Tensor):  # noqa: SLF001
            return self._write(func, args, kwargs, origins)
        if not origins:
            return func(*args, **kwargs)
        if not self._runs and _is_duplicate(func, kwargs):
            return aten.alias.default(args[0])
        return self._derive(func, args, kwargs, origins)

    def _origin(self, leaf: Any) -> _Origin | None:
        return self._origins.of(leaf) if isinstance(leaf, torch.Tensor) else None

    def _write(self, func: Any, args: Any, kwargs: Any, origins: list[_Origin]) -> Any:
        written = args[0]
        target = None if written.is_meta or (self._runs and not origins) else self._target_of(written)
        if target is None:
            if not origins:
                return func(*args, **kwargs)
            if not (written.is_meta and self._runs):  # as which vLLM first counts what it will load
                self._origins.add(written, self._mixed(func, args, origins))
            return func(*args, **kwargs) if self._runs or written.is_meta else written
        if written.numel():
            self._record(func, args, target, origins)
        return func(*args, **kwargs) if self._runs else written

    def _record(self, func: Any, args: Any, target: str, origins: list[_Origin]) -> None:
        self.taken.update(*(origin.roots for origin in origins))
        to = Place.of(args[0])
        if func is aten.copy_.default and origins:
            origin, taken = origins[-1], Place.of(args[1].expand(args[0].shape))
            taken = replace(taken, offset=taken.offset - origin.start)
            self.writes.append(Write(target, to, origin.name, taken, origin.exact))
        elif func in FILLS:
            value = float(args[1]) if len(args) > 1 else 0.0
            self.writes.append(Write(target, to, None, None, exact=True, value=value))
        elif origins or not self._runs:
            self.writes.append(Write(target, to, self._mixed(func, args, origins).name, None, exact=False))

    def _derive(self, func: Any, args: Any, kwargs: Any, origins: list[_Origin]) -> Any:
        results = func(*args, **kwargs)
        origin = self._mixed(func, args, origins)
        for result in tree_leaves(results):
            if isinstance(result, torch.Tensor) and self._origins.of(result) is None:
                self._origins.add(result, origin)
        return results

    def _mixed(self, func: Any, args: Any, origins: list[_Origin]) -> _Origin:
        """Of what an operation computes: it has the same name wherever the trainer's tensors are in their storages."""
        names = " and ".join(dict.fromkeys(origin.name for origin in origins))
        roots = frozenset().union(*(origin.roots for origin in origins))
        return _Origin(f"{names} by {func} of {self._place(args[0])}", roots, exact=False, start=0)

    def _place(self, leaf: Any) -> Place | str:
        if not isinstance(leaf, torch.Tensor):
            return "several"
        place, origin = Place.of(leaf), self._origin(leaf)
        return place if origin is None else replace(place, offset=place.offset - origin.start)


def storage_key(tensor: torch.Tensor) -> int:
    """The same for all views of one storage, while it lives."""
    return int(tensor.untyped_storage()._cdata)  # noqa: SLF001


class TensorNames:
    """Finds the name of the tensor that a view is of; of several that begin at one element the first."""

    def __init__(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        names: dict[int, dict[int, str]] = {}
        for name, tensor in tensors:
            names.setdefault(storage_key(tensor), {}).setdefault(int(tensor.storage_offset()), name)
        self._names = {key: sorted(of_storage.items()) for key, of_storage in names.items()}

    def __call__(self, view: torch.Tensor) -> str | None:
        """None if it is a view of none of them."""
        of_storage = self._names.get(storage_key(view), [])
        place = bisect_right(of_storage, int(view.storage_offset()), key=lambda begin: begin[0])
        return of_storage[place - 1][1] if place else None


@contextmanager
def nothing_moves(tensors: Mapping[str, torch.Tensor]) -> Iterator[list[str]]:
    """Within it vLLM's code may give a tensor other memory, which is undone; the list then names those tensors."""
    memory = {name: tensor.data for name, tensor in tensors.items()}
    moved: list[str] = []
    yield moved
    for name, data in memory.items():
        tensor = tensors[name]
        if tensor.is_meta or tensor.data_ptr() != data.data_ptr():
            tensor.data = data
            moved.append(name)


def _is_duplicate(func: Any, kwargs: Mapping[str, Any]) -> bool:
    return func in DUPLICATES and kwargs.get("dtype") is None
