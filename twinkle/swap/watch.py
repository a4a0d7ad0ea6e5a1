"""``watch = "nan"``: results are looked at now and then for numbers that are none.

A kernel whose result has a NaN where its arguments and weights are finite is taken out. Every n-th call is
looked at. On a CPU the answer is there at once, and the original gives that call's result. On another device
nobody waits: the answer is fetched to host memory behind the program's back and read when the next call is
looked at.
"""

from __future__ import annotations

from itertools import cycle
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from twinkle.ops.cuda_graphs import is_capturing

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Found", "Watch"]


class Found(NamedTuple):
    """A NaN that a kernel gave.

    Attributes:
        text: What and where.
        of_an_earlier_call: The result at hand is not the one that has it.
    """

    text: str
    of_an_earlier_call: bool


class Watch:
    """Looks at the results of one kernel in one place.

    Args:
        every: Of so many calls one is looked at.

    Attributes:
        tick: Says at each call whether it is one of these.
    """

    def __init__(self, every: int) -> None:
        self.tick: Callable[[], bool] = cycle([False] * (every - 1) + [True]).__next__
        self.every = every
        self._calls = 0
        self._answer: tuple[Tensor, Any, int] | None = None

    def look(self, result: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Found | None:
        """Look at a result.

        Returns:
            What was found in it, or in an earlier one whose answer has come; None for nothing.
        """
        self._calls += self.every
        found = self._told_before()
        if found is not None or torch._C._are_functorch_transforms_active():
            return found
        results = _floating(result)
        if not results or any(t.is_meta or type(t) not in (Tensor, torch.nn.Parameter) for t in results):
            return None
        with torch.no_grad():
            bad = _bad(results, args, kwargs)
        if bad.device.type == "cpu":
            return Found(self._text(self._calls), False) if bool(bad) else None
        if not (bad.is_cuda and is_capturing()):
            self._answer = (*_on_its_way(bad), self._calls)
        return None

    def _told_before(self) -> Found | None:
        """What the answer on an earlier call says, once it has come."""
        if self._answer is None:
            return None
        answer, arrived, call = self._answer
        if arrived is not None and not arrived.query():
            return None
        self._answer = None
        return Found(self._text(call), True) if bool(answer) else None

    def _text(self, call: int) -> str:
        what = f"gave NaN at about call {call}, where its arguments and weights are finite"
        since = f" (watched every {self.every} calls: those since the last one may have some as well)"
        return what + (since if self.every > 1 else "")


def _floating(values: Any) -> list[Tensor]:
    return [v for v in tree_flatten(values)[0] if isinstance(v, Tensor) and v.is_floating_point()]


def _bad(results: list[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Whether some result has a NaN and all that it was made of is finite, as a tensor of one element."""
    device = results[0].device
    given = _floating((args, kwargs))
    if args and isinstance(args[0], torch.nn.Module):
        given += [p for p in args[0].parameters() if p.is_floating_point()]
    nan = _any(results, torch.isnan, device)
    return nan & ~_any([t for t in given if t.device == device], _not_finite, device)


def _any(tensors: list[Tensor], test: Callable[[Tensor], Tensor], device: torch.device) -> Tensor:
    # A sum or a maximum would do in one pass, but for overflow: `any` of a mask is right for every dtype.
    found = [test(t.detach()).any() for t in tensors if t.device == device and t.numel()]
    return torch.stack(found).any() if found else torch.zeros((), dtype=torch.bool, device=device)


def _not_finite(tensor: Tensor) -> Tensor:
    return ~torch.isfinite(tensor)


def _on_its_way(answer: Tensor) -> tuple[Tensor, Any]:
    """A copy in host memory, and the event after which it is there; None for one that is there at once."""
    if not answer.is_cuda:
        return answer.cpu(), None
    home = torch.empty((), dtype=torch.bool, pin_memory=True)
    home.copy_(answer, non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(answer.device))
    return home, event
