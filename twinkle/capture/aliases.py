"""Stand-ins for the weights of a block while it is recorded: the same memory, and a graph of their own.

A parameter has one node that takes its gradients, and keeps the stream that it was made on. A node that
the program's last loss keeps alive would draw the program's stream into a recording, and one that a
recording keeps alive would draw the recording's stream into every step of the program.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from twinkle.capture.signature import Unservable

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Aliases"]


class Aliases:
    """The weights of a block that want gradients, as other parameters with their memory.

    Within the context the block has these. Their versions are their own: what is written to a weight after a
    forward was recorded is nothing to its backward, which is recorded later.

    Args:
        block: The block.

    Raises:
        Unservable: A weight is no plain tensor, or is kept in more places than in the table of its module.
    """

    def __init__(self, block: nn.Module) -> None:
        self._by_id: dict[int, nn.Parameter] = {}
        self._places: list[tuple[dict[str, Any], str, Tensor, nn.Parameter]] = []
        for part in block.modules():
            for value in part.__dict__.values():
                if any(isinstance(one, nn.Parameter) for one in _within(value)):
                    raise Unservable("a part keeps its weights in a second place")
            for name, weight in part._parameters.items():
                if weight is None or not weight.requires_grad:
                    continue
                if type(weight) not in (nn.Parameter, Tensor):
                    raise Unservable(f"a weight is a {type(weight).__qualname__}")
                alias = self._by_id.get(id(weight))
                if alias is None:
                    alias = self._by_id[id(weight)] = nn.Parameter(weight.data)
                self._places.append((part._parameters, name, weight, alias))

    def of(self, weight: Tensor) -> nn.Parameter:
        """What stands for a weight."""
        return self._by_id[id(weight)]

    def __enter__(self) -> None:
        for table, name, _, alias in self._places:
            table[name] = alias

    def __exit__(self, *exception: object) -> None:
        for table, name, weight, _ in self._places:
            table[name] = weight


def _within(value: Any) -> Iterator[Any]:
    if type(value) in (list, tuple):
        yield from value
    elif isinstance(value, Tensor):
        yield value
