"""Caches of keys and values among the arguments of a block.

A block of transformers' language models adds its keys and values to the cache that it is given, in a plain
forward as in training. Where the cache is empty at the block's layer the attention sees what was computed and
nothing else: a recording hands out the new keys and values, and each replay gives them to the cache of its
call in the block's place. A cache that holds tokens already is left to the block itself.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

__all__ = [
    "CacheUses",
    "empty_caches",
    "holds_tokens",
    "is_cache",
    "is_of_caches",
    "kind_of_cache",
    "layers_of",
    "without_copies",
]

_MODULE = "transformers.cache_utils"
_LAYERS = frozenset({"DynamicLayer", "DynamicSlidingWindowLayer"})
_OBJECTS = frozenset({"DynamicCache", "EncoderDecoderCache", *_LAYERS})
_PARTS = ("self_attention_cache", "cross_attention_cache")


def is_cache(kind: type) -> bool:
    """Whether a class is that of a cache that grows with its tokens, or of a pair of them."""
    return kind.__module__ == _MODULE and kind.__qualname__ in ("DynamicCache", "EncoderDecoderCache")


def is_of_caches(kind: type) -> bool:
    """Whether a class is that of such a cache or of one of its layers: all they have are their attributes."""
    return kind.__module__ == _MODULE and kind.__qualname__ in _OBJECTS


def kind_of_cache(cache: Any) -> tuple[Any, ...] | None:
    """What of a cache is part of the kind of a call; None where it does more than to join tensors.

    Args:
        cache: Of a class that :func:`is_cache` knows.
    """
    if type(cache).__qualname__ == "EncoderDecoderCache":
        parts = [getattr(cache, part) for part in _PARTS]
        if not all(type(part).__qualname__ == "DynamicCache" and is_cache(type(part)) for part in parts):
            return None
        return "caches", *(bool(part.layers) for part in parts)
    return None if getattr(cache, "offloading", False) else ("cache", bool(cache.layers))


class CacheUses:
    """What a block does with its caches, to be repeated at each replay.

    Attributes:
        updates: The keys and values that it gives out of hand: cache, layer and further arguments of each.
        empty: What must be empty: caches and layers.
        flags: The layers of pairs of caches that are marked as filled.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget what an earlier run did."""
        self.updates: list[tuple[Any, int, tuple[Any, ...], dict[str, Any]]] = []
        self.empty: set[tuple[Any, int]] = set()
        self.flags: list[tuple[int, int]] = []

    def may_repeat(self, caches: list[Any]) -> bool:
        """Whether the caches of a call hold nothing yet of what the block was recorded without."""
        for place, layer in self.empty:
            if not _is_empty_at(_at(caches, place), layer):
                return False
        return not any(caches[at].is_updated.get(layer) for at, layer in self.flags)

    def repeat(self, caches: list[Any], made: Sequence[Tensor]) -> None:
        """Give the keys and values of a replay to the caches of its call.

        Args:
            caches: Of the call.
            made: Keys and values of each update, which are nobody else's.
        """
        for number, (place, layer, args, kwargs) in enumerate(self.updates):
            keys, values = made[2 * number : 2 * number + 2]
            cache = _at(caches, place)
            there = cache.layers[layer] if layer < len(cache.layers) else None
            if there is not None and _only_keeps(there.__class__, there.update.__func__):
                there.keys, there.values = keys, values
                there.dtype, there.device = keys.dtype, keys.device
                there.is_initialized = True
            else:
                cache.update(keys, values, layer, *args, **kwargs)
        for at, layer in self.flags:
            caches[at].is_updated[layer] = True


def empty_caches(kinds: list[tuple[Any, ...]], uses: CacheUses, made: list[Tensor]) -> list[Any]:
    """What stands for empty caches while a block is recorded.

    Args:
        kinds: Of the caches of the call.
        uses: Is filled with what the block does to them.
        made: Is added to: the keys and values that they are given.
    """
    found = []
    for at, kind in enumerate(kinds):
        if kind[0] == "cache":
            found.append(_classes()[0](at, kind[1], uses, made))
        else:
            parts = [
                _classes()[0]((at, part), filled, uses, made)
                for part, filled in zip(_PARTS, kind[1:], strict=True)
            ]
            found.append(_classes()[1](at, parts, uses))
    return found


def layers_of(parts: Iterable[Any]) -> frozenset[int]:
    """The layers of a cache that a block is, as far as its parts say so."""
    return frozenset(index for part in parts if type(index := getattr(part, "layer_idx", None)) is int)


def holds_tokens(caches: list[Any], layers: frozenset[int]) -> bool:
    """Whether caches hold something already of some layers."""
    for cache in caches:
        for one in (getattr(cache, part) for part in _PARTS) if hasattr(cache, _PARTS[0]) else (cache,):
            if not all(_is_empty_at(one, layer) for layer in layers):
                return True
    return False


def _at(caches: list[Any], place: Any) -> Any:
    return caches[place] if isinstance(place, int) else getattr(caches[place[0]], place[1])


def _is_empty_at(cache: Any, layer: int) -> bool:
    layers = cache.layers
    if layer >= len(layers):
        made = getattr(cache, "layer_class_to_replicate", None)
        return made is not None and made.__name__ in _LAYERS
    there = layers[layer]
    return (
        type(there).__name__ in _LAYERS
        and type(there).__module__ == _MODULE
        and not there.is_initialized
        and not getattr(there, "record_past", False)
    )


@functools.lru_cache(maxsize=16)
def _only_keeps(kind: Any, update: Any) -> bool:
    """Whether an empty layer of a cache keeps what it is given first and does nothing else: it is tried.

    Args:
        kind: Of layers.
        update: Its method.
    """
    try:
        layer, fresh = kind(), vars(kind())
        with torch.inference_mode(False), torch.no_grad():
            keys = torch.arange(12.0, device="cpu").view(1, 2, 3, 2)
            given = update(layer, keys, keys + 12)
            found = dict(vars(layer))
            kept = (found.pop("keys"), found.pop("values"))
            if not all(map(torch.equal, (*given, *kept), (keys, keys + 12) * 2)):
                return False
        expected = {
            **{name: value for name, value in fresh.items() if name not in ("keys", "values")},
            "dtype": keys.dtype,
            "device": keys.device,
            "is_initialized": True,
        }
        return found == expected
    except Exception:  # of another version, or with arguments: it does the work itself
        return False


def without_copies(layers: Any) -> Any:
    """The ``update`` of a class of layers, but for what an empty one is given: that is kept where it lies.

    It would be joined to nothing, which copies it. What is not contiguous is copied, as it would be.

    Args:
        layers: The class.

    Returns:
        The method; None where an update does more than that.
    """
    theirs = vars(layers)["update"]
    if not _only_keeps(layers, theirs):
        return None

    def update(self: Any, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.is_initialized or key_states is value_states:
            return theirs(self, key_states, value_states, *args, **kwargs)
        self.lazy_initialization(key_states, value_states)
        self.keys, self.values = key_states.contiguous(), value_states.contiguous()
        return self.keys, self.values

    return update


@functools.cache
def _classes() -> tuple[Any, Any]:
    # transformers is there: a call has a cache of its.
    from transformers.cache_utils import DynamicCache, EncoderDecoderCache  # noqa: PLC0415

    class Recorded(DynamicCache):
        """Takes one update a layer; what else a cache has it lacks, so that a block that asks fails."""

        def __init__(self, place: Any, filled: bool, uses: CacheUses, made: list[Tensor]) -> None:
            self._place, self._filled, self._uses, self._made = place, filled, uses, made
            self._seen: dict[int, int] = {}

        def __len__(self) -> int:
            return int(self._filled)

        def get_seq_length(self, layer_idx: int | None = None) -> int:
            if layer_idx is None:
                raise TypeError("the block asks its cache for more than its own layer")
            self._uses.empty.add((self._place, layer_idx))
            return self._seen.get(layer_idx, 0)

        def update(
            self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
        ) -> tuple[Tensor, Tensor]:
            if layer_idx in self._seen or any(isinstance(v, torch.Tensor) for v in (*args, *kwargs.values())):
                raise TypeError("the block updates its cache in a way that cannot be repeated")
            self._seen[layer_idx] = key_states.shape[-2]
            # The cache joins them to what it holds, which is nothing: they are contiguous after that.
            keys, values = key_states.contiguous(), value_states.contiguous()
            self._uses.empty.add((self._place, layer_idx))
            self._uses.updates.append((self._place, layer_idx, args, kwargs))
            self._made += (keys, values)
            return keys, values

    class Flags(dict):  # type: ignore[type-arg]
        """Which layers of the second cache are filled: none, until the block says so of its own."""

        def __init__(self, at: int, uses: CacheUses) -> None:
            self._at, self._uses = at, uses

        def __setitem__(self, layer: int, filled: Any) -> None:
            if filled is not True:
                raise TypeError("the block marks its cache in a way that cannot be repeated")
            self._uses.flags.append((self._at, layer))
            super().__setitem__(layer, filled)

    class RecordedPair(EncoderDecoderCache):
        """Two of them."""

        def __init__(self, at: int, parts: list[Any], uses: CacheUses) -> None:
            self.self_attention_cache, self.cross_attention_cache = parts
            self.is_updated = Flags(at, uses)

    return Recorded, RecordedPair
