"""Results of a call, taken apart into tensors, and made anew of those of a replay."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

from torch import Tensor

from twinkle.capture.caches import is_of_caches
from twinkle.capture.signature import PLAIN, Unservable
from twinkle.deferred.forward import made_of
from twinkle.deferred.logits import DeferredLogits

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Rebuild = Callable[[Sequence[Tensor], Sequence[Tensor]], Any]

__all__ = ["flattened"]


def flattened(result: Any, tensors: list[Tensor], given: dict[int, int]) -> Rebuild:
    """Take a result apart: a function that makes one like it of other tensors and other inputs.

    Args:
        result: A tensor, or tuples, lists, dictionaries, outputs of transformers and caches of them, None and
            plain values.
        tensors: Is added to, but for inputs that come out as they went in.
        given: From the id of an input to its number.

    Raises:
        Unservable: It holds something else.
    """
    kind: Any = type(result)
    if id(result) in given:
        number = given[id(result)]
        return lambda made, inputs: inputs[number]
    if kind is Tensor:
        at = len(tensors)
        tensors.append(result)
        return lambda made, inputs: made[at]
    if kind is tuple or kind is list:
        parts = [flattened(part, tensors, given) for part in result]
        return lambda made, inputs: kind(part(made, inputs) for part in parts)
    if kind in PLAIN:
        return lambda made, inputs: result
    if kind is dict:
        return _dictionary(result, tensors, given)
    if kind is DeferredLogits:
        return _deferred(result, tensors, given)
    if _is_output(kind):
        fields = {name: getattr(result, name) for name in kind.__dataclass_fields__}
        if vars(result).keys() <= fields.keys():
            named = _dictionary(fields, tensors, given)
            return lambda made, inputs: kind(**named(made, inputs))
    if is_of_caches(kind):
        numbers = {name: _number(value) for name, value in vars(result).items() if _is_number(value)}
        others = {name: value for name, value in vars(result).items() if name not in numbers}
        attributes = _dictionary(others, tensors, given)

        def cache(made: Sequence[Tensor], inputs: Sequence[Tensor]) -> Any:
            one = kind.__new__(kind)
            vars(one).update(attributes(made, inputs))
            vars(one).update({name: number(made) for name, number in numbers.items()})
            return one

        return cache
    if kind is type and is_of_caches(result):
        return lambda made, inputs: result
    raise Unservable(f"its result is a {kind.__qualname__}")


def _deferred(logits: DeferredLogits, tensors: list[Tensor], given: dict[int, int]) -> Rebuild:
    """Logits that are computed when they are read: each replay has some of its own hidden states."""
    found = made_of(logits)
    if found is None:
        raise Unservable("its result is logits that are not computed yet")
    rows = flattened(found.hidden, tensors, given)
    return lambda made, inputs: found.again(rows(made, inputs))


def _dictionary(values: dict[Any, Any], tensors: list[Tensor], given: dict[int, int]) -> Rebuild:
    parts = {name: flattened(value, tensors, given) for name, value in values.items()}
    return lambda made, inputs: {name: part(made, inputs) for name, part in parts.items()}


def _is_number(value: Any) -> bool:
    """Whether a cache has a number on the CPU, as those with a window do."""
    if type(value) is not Tensor or value.device.type != "cpu":
        return False
    return not value.dim() and not value.requires_grad


def _number(value: Tensor) -> Callable[[Sequence[Tensor]], Tensor]:
    """A constant of a cache, beside the tensors that are made: it is brought to their device once."""
    moved: list[Tensor] = []

    def number(made: Sequence[Tensor]) -> Tensor:
        if not moved:
            moved.append(value.to(made[0].device) if made else value)
        return moved[0]

    return number


@functools.lru_cache(maxsize=64)
def _is_output(kind: type) -> bool:
    """Whether a class is one of the results that models of transformers give."""
    return dataclasses.is_dataclass(kind) and any(
        (base.__module__, base.__qualname__) == ("transformers.utils.generic", "ModelOutput")
        for base in kind.__mro__
    )
