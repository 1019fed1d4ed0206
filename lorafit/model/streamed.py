"""A base that holds no weights: each module reads its own from the folder's files when its forward begins, and lets them go
when it ends. What is in memory is then the largest weight, not the model.

It is for what goes through the model a few times, such as merging: each time every file is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lorafit.errors import ModelError
from lorafit.model.shards import Entry, Files


class Gathered(NamedTuple):
    """A tensor of the model that is several in the files, such as the experts of a layer: transformers' rule that makes it,
    and their names, each with the pattern of the rule that it was found by."""

    rule: Any
    parts: list[tuple[str, str]]


class Source:
    """Where each tensor of a transformers model lies in the files of its folder.

    `keys`, by its name in the model, is its name in the files; those that share a weight have one key. A tensor that is
    several in the files has its name in the model for a key.
    """

    def __init__(self, model: Any, files: Files) -> None:
        """Of a model without weights, but for buffers that the files don't hold. ModelError where a tensor is missing or of
        another shape."""
        self.files = files
        self.keys: dict[str, str] = {}
        self._gathered: dict[str, Gathered] = {}
        self._rules = SimpleNamespace(config=model.config, _weight_conversions=[])
        self._buffers = {name for name, _ in model.named_buffers()}
        self._find(model)

    @property
    def names(self) -> list[str]:
        """The first name of each weight, in the model's order."""
        first: dict[str, str] = {}
        for name, key in self.keys.items():
            first.setdefault(key, name)
        return list(first.values())

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor of the model, its numbers in `dtype` or else as they are stored."""
        key = self.keys[name]
        if key not in self._gathered:
            return self.files.read(key, dtype)
        made = self._gather(key, self.files.read)
        return made if dtype is None else made.to(dtype)

    def entries(self, name: str, dtype: torch.dtype) -> list[Entry]:
        """What is written of a tensor: under the names that its folder has it by, its numbers in `dtype`, buffers as they
        are."""
        key = self.keys[name]
        kind = self.read(name).dtype if name in self._buffers else dtype
        parts = [part for part, _ in self._gathered[key].parts] if key in self._gathered else [key]
        return [Entry(part, kind, tuple(self.files.shapes[part])) for part in parts]

    def parts(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """A tensor of the model under those names."""
        key = self.keys[name]
        if key not in self._gathered:
            return {key: tensor}
        from transformers.core_model_loading import revert_weight_conversion

        found: dict[str, Tensor] = revert_weight_conversion(self._rules, {key: tensor})
        return found

    # --- finding them --------------------------------------------------------------------------------------------------

    def _find(self, model: Any) -> None:
        shapes = self.files.shapes
        prefix = f"{model.base_model_prefix}."
        everything = dict(model.named_parameters(remove_duplicate=False))
        everything |= {name: t for name, t in model.named_buffers() if t.is_meta}
        owners: dict[int, list[str]] = {}
        for name, tensor in everything.items():
            owners.setdefault(id(tensor), []).append(name)
        renamed: dict[str, str] | None = None
        wrong = []
        for names in owners.values():
            spellings = [s for name in names for s in (name, name.removeprefix(prefix), prefix + name)]
            key = next((s for s in spellings if s in shapes), None)
            if key is None:
                renamed = self._convert(model) if renamed is None else renamed
                key = next((renamed[name] for name in names if name in renamed), None)
            shape = everything[names[0]].shape
            if key is None:
                wrong.append(f"{names[0]} is missing")
            elif (found := self._shape(key)) != shape:
                wrong.append(f"{key} is {tuple(found)}, expected {tuple(shape)}")
            else:
                self.keys |= dict.fromkeys(names, key)
        if wrong:
            more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise ModelError(f"{self.files.folder} can't be loaded: {'; '.join(wrong[:3])}{more}")

    def _shape(self, key: str) -> torch.Size:
        """ModelError where several tensors of the files can't be made into one and back."""
        if key not in self._gathered:
            return self.files.shapes[key]
        made = self._gather(key, lambda part: torch.empty(self.files.shapes[part], device="meta"))
        self.keys[key] = key
        back = {part: tensor.shape for part, tensor in self.parts(key, made).items()}
        if back != {part: self.files.shapes[part] for part, _ in self._gathered[key].parts}:
            raise ModelError(f"{self.files.folder}: {key} can't be taken apart again")
        return made.shape

    def _convert(self, model: Any) -> dict[str, str]:
        """Keys by name as transformers' rules for this architecture have them, which rename and join tensors of files."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

        rules = get_model_conversion_mapping(model)
        renaming = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        joining = [rule for rule in rules if isinstance(rule, WeightConverter)]
        known = dict.fromkeys(model.state_dict(), True)
        found = {}
        for part in sorted(self.files.shapes, key=dot_natural_key):
            name, pattern = rename_source_key(part, renaming, joining, model.base_model_prefix, known)
            if name not in known:
                continue
            found[name] = part
            if pattern is not None:
                rule = next(rule for rule in joining if pattern in rule.source_patterns)
                if len(rule.target_patterns) > 1:
                    raise ModelError(f"{self.files.folder}: {part} is several tensors of the model")
                found[name] = name
                self._gathered.setdefault(name, Gathered(rule, [])).parts.append((part, pattern))
        self._rules._weight_conversions = [rule for rule in rules if rule.was_used()]
        return found

    def _gather(self, key: str, read: Callable[[str], Tensor]) -> Tensor:
        rule, parts = self._gathered[key]
        made = deepcopy(rule)
        for part, pattern in parts:
            made.add_tensor(key, part, pattern, read(part))
        (tensor,) = made.convert(key, model=None, config=self._rules.config).values()
        whole: Tensor = tensor[0] if isinstance(tensor, list) else tensor
        return whole


# --- modules that read their own ---------------------------------------------------------------------------------------


# What a forward takes in the place of a parameter: of its name in the model, and of what reads it.
Change = Callable[[str, Callable[[], Tensor]], Tensor]


class _Reader:
    """What a module reads: its parameters' names in the model, and what it has in their place between forwards."""

    def __init__(self, source: Source, names: dict[str, str], dtype: torch.dtype, empty: dict[str, Any]) -> None:
        self.source, self.names, self.dtype, self.empty = source, names, dtype, empty
        self.change: Change | None = None

    def read(self, key: str) -> Tensor:
        return self.source.read(self.names[key], self.dtype)

    def enter(self, module: nn.Module, args: Any) -> None:
        for key, name in self.names.items():
            found = self.read(key) if self.change is None else self.change(name, partial(self.read, key))
            module._parameters[key] = nn.Parameter(found, requires_grad=False)

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        module._parameters.update(self.empty)


_readers: WeakKeyDictionary[nn.Module, _Reader] = WeakKeyDictionary()


def stream(model: Any, source: Source, dtype: torch.dtype) -> None:
    """Have each module with parameters that aren't there read them for its forward, in `dtype`."""
    for path, module in model.named_modules():
        empty = {key: p for key, p in module._parameters.items() if p is not None and p.is_meta}
        if empty:
            reader = _Reader(source, {key: f"{path}.{key}" if path else key for key in empty}, dtype, empty)
            _readers[module] = reader
            module.register_forward_pre_hook(reader.enter)
            # Before the hooks of adapters, which read again what they need: most need nothing.
            module.register_forward_hook(reader.leave, always_call=True)


def present(module: nn.Module, key: str) -> Tensor:
    """A module's parameter: as it holds it, or read now for whoever asks."""
    held: Tensor = getattr(module, key)
    reader = _readers.get(module)
    return reader.read(key) if held.is_meta and reader is not None else held


@contextmanager
def changed(model: Any, change: Change) -> Iterator[None]:
    """Within it modules that read their parameters compute with what `change` makes of them. `present` still gives what the
    files hold."""
    readers = [_readers[module] for module in model.modules() if module in _readers]
    for reader in readers:
        reader.change = change
    try:
        yield
    finally:
        for reader in readers:
            reader.change = None


class _Watch(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(isinstance(t, Tensor) and t.is_meta for t in tree_leaves((args, kwargs or {}))):
            raise RuntimeError("a module reads a weight outside of its owner's forward")
        return func(*args, **(kwargs or {}))


def watched() -> AbstractContextManager[object]:
    """RuntimeError, inside `with`, for an operation on a weight that isn't there: one that is read outside of its module's
    forward. Torch itself doesn't mind, its product with such a weight is whatever lay in memory (measured, torch 2.13)."""
    made: AbstractContextManager[object] = _Watch()  # type: ignore[no-untyped-call]
    return made
