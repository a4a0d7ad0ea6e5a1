"""Which blocks of a model are alike: the layers of its lists, found by structure, never by a model's name.

A block is an entry of a ``ModuleList``, ``Sequential`` or ``ModuleDict`` that has a ``forward`` of its own
and holds several layers with weights. Two of one class in one list are a stack, and then the odd block
between them counts as well. Lists of lists count as one list. What stands inside a block is part of it: its
experts, its heads, the layers of a stage. Nothing is called, and no class is woken for it.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from twinkle.capture.slot import slot_of
from twinkle.hooks.first_use import standing
from twinkle.swap.class_tree import core_of
from twinkle.swap.generated import original_of

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator

    Place = tuple[str, nn.Module]
    Entries = Iterator[Place]

__all__ = ["FEWEST", "Stack", "class_of", "stacks_of"]

FEWEST = 2
"""So many alike blocks are a stack. Each pays for itself; the second says that it is a layer of many."""

_FEWEST_PARTS = 2
"""So many layers with weights make a block: fewer launch little more than a replay does."""

_OTHER_LISTS = ("expert", "quantiz", "codebook", "head", "classif", "embed")
"""Lists of these, by the name of their attribute, hold alternatives or ends of a model, not its layers."""

_WRAPPERS = ("_checkpoint_wrapped_module", "_fsdp_wrapped_module")
"""What torch's wrappers of a block call the block."""

_PARAMETRIZED = "parametrizations"
"""Where ``parametrize`` keeps what a weight is made of: it is no layer."""


class Stack:
    """Alike blocks of a model.

    The module whose ``forward`` goes through the list that they are in is their *trunk*.

    Attributes:
        container: The qualified name of the list that holds them; empty where it is the model itself.
        blocks: In the order in which they stand there, each once.
        cls: Their class, below what Twinkle and torch have generated on top of it.
        trunk: Its qualified name, empty for the model itself, and the module; None for a list alone.
    """

    __slots__ = ("blocks", "cls", "container", "trunk")

    def __init__(
        self, container: str, blocks: list[nn.Module], cls: type[nn.Module], trunk: Place | None
    ) -> None:
        self.trunk = trunk
        self.container = container
        self.blocks = blocks
        self.cls = cls

    @property
    def class_name(self) -> str:
        """The name of the blocks' class."""
        return self.cls.__name__

    def __repr__(self) -> str:
        return f"Stack({self.container!r}, {len(self.blocks)} x {self.class_name})"


def stacks_of(model: nn.Module) -> list[Stack]:
    """The stacks of a model, in the order in which it holds them.

    A list with blocks of several classes, as hybrid models have, is a stack for each of them.
    What the program has compiled or scripted is left out, with all that is in it.

    Args:
        model: Any module, which may be a list itself; on any device, also ``meta``.
    """
    found: list[Stack] = []
    _visit(model, "", None, found, set())
    return found


def class_of(module: nn.Module) -> type[nn.Module]:
    """The class that the program gave a module, below those of Twinkle, FSDP2 and ``parametrize``."""
    return core_of(original_of(type(module)))[0]


def _visit(module: nn.Module, path: str, trunk: Place | None, found: list[Stack], seen: set[int]) -> None:
    if id(module) in seen or _is_compiled(module):
        return
    seen.add(id(module))
    if not _is_container(module):
        trunk = (path, module)
        for name, child in module.named_children():
            _visit(child, _joined(path, name), trunk, found, seen)
        return
    entries = {id(entry): (place, entry) for place, entry in reversed(list(_flat(module, path)))}
    groups: dict[Hashable, list[tuple[str, nn.Module]]] = {}
    if not _is_other_list(path):
        for place, entry in reversed(entries.values()):
            if _is_block(entry):
                groups.setdefault(_kind(entry), []).append((place, entry))
    many = any(len(alike) >= FEWEST for alike in groups.values())
    for alike in groups.values():
        # In a chain the odd one may be its stem or its head.
        if len(alike) >= FEWEST or (many and not _is_chain(module)):
            blocks = [entry for _, entry in alike]
            found.append(Stack(_common([place for place, _ in alike]), blocks, class_of(blocks[0]), trunk))
            seen.update(map(id, blocks))
    for place, entry in reversed(entries.values()):
        _visit(entry, place, trunk, found, seen)


def _flat(container: nn.Module, path: str) -> Entries:
    """The entries of a container, those of the lists in it among them."""
    named = isinstance(container, nn.ModuleDict)  # its entries have names: they are no one list
    for name, child in container.named_children():
        place, entry = _unwrapped(_joined(path, name), child)
        inside = [] if named or not _is_container(entry) else list(_flat(entry, place))
        # A small chain of layers of torch is a block itself, and so is any that has no blocks in it.
        if inside and (not _is_chain(entry) or any(_is_block(one) for _, one in inside)):
            yield from inside
        else:
            yield place, entry


def _unwrapped(place: str, module: nn.Module) -> tuple[str, nn.Module]:
    while type(module).__module__.startswith("torch."):
        name = next((name for name in _WRAPPERS if name in module._modules), None)
        inner = module._modules[name] if name else None
        if name is None or inner is None:
            break
        place, module = _joined(place, name), inner
    return place, module


def _is_compiled(module: nn.Module) -> bool:
    """Whether a compiler of the program has a module, and all that is in it."""
    if isinstance(module, torch.jit.ScriptModule) or "_orig_mod" in module._modules:
        return True
    return module._compiled_call_impl is not None and slot_of(module) is None


def _is_container(module: nn.Module) -> bool:
    """Whether a module has no ``forward`` of its own: a list, a dictionary, or a chain."""
    if isinstance(module, nn.ModuleList | nn.ModuleDict) and not _has_forward(class_of(module)):
        return True
    return _is_chain(module)


def _is_chain(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) and standing(class_of(module)) is standing(nn.Sequential)


def _has_forward(cls: type[nn.Module]) -> bool:
    return standing(cls) is not standing(nn.Module)


def _is_other_list(path: str) -> bool:
    name = next((part for part in reversed(path.split(".")) if not part.isdigit()), "").lower()
    return any(word in name for word in _OTHER_LISTS)


def _is_block(module: nn.Module) -> bool:
    """Whether a module is a layer of a model: several layers with weights, and a width that it keeps."""
    if not _has_forward(class_of(module)) or _is_compiled(module) or _is_model(module):
        return False
    parts = [part for name, part in module.named_modules() if name and _has_weights(part, name)]
    if len(parts) < _FEWEST_PARTS:
        return False
    widths = [(getattr(part, "in_features", None), getattr(part, "out_features", None)) for part in parts]
    if all(None not in width for width in widths):
        # Products alone are a head, unless each width that they make is one that they take.
        return {made for _, made in widths} <= {taken for taken, _ in widths}
    return True


def _has_weights(module: nn.Module, name: str) -> bool:
    if isinstance(module, nn.Embedding | nn.EmbeddingBag) or _PARAMETRIZED in name.split("."):
        return False
    weights = any(parameter is not None for parameter in module._parameters.values())
    # A quantised product keeps its weights in buffers.
    return weights or _PARAMETRIZED in module._modules or hasattr(module, "in_features")


def _is_model(module: nn.Module) -> bool:
    """Whether an entry is a whole model, whose layers are inside: it has an embedding and stacks."""
    transformers: Any = sys.modules.get("transformers.modeling_utils")
    if transformers is not None and isinstance(module, transformers.PreTrainedModel):
        return True
    if not any(isinstance(part, nn.Embedding) for part in module.modules()):
        return False
    inside: list[Stack] = []
    for name, child in module.named_children():
        _visit(child, name, None, inside, {id(module)})
    return bool(inside)


def _kind(module: nn.Module) -> Hashable:
    """What alike blocks have in common: their class, or for chains the classes of what they hold."""
    cls = class_of(module)
    return tuple(map(class_of, module.modules())) if _is_chain(module) else (cls,)


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _common(places: list[str]) -> str:
    """The longest path that all of these are below."""
    paths = [place.split(".")[:-1] for place in places]
    shared = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)
