"""``watch = "nan"``: results are looked at now and then for numbers that are none.

A kernel whose result has a NaN where its arguments and weights are finite is taken out. Every n-th call is
looked at. On a CPU the answer is there at once, and the original gives that call's result. On another device
nobody waits: the answer is fetched to host memory behind the program's back and read when the next call is
looked at.
"""

from __future__ import annotations

from itertools import cycle
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

if TYPE_CHECKING:
    from collections.abc import Callable

    from twinkle.swap.dispatch import Dispatch
    from twinkle.swap.entry import Entry

__all__ = ["Watch"]


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

    def look(
        self, dispatch: Dispatch, entry: Entry, result: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Look at a result.

        Returns:
            The result; that of the original where the kernel's has a NaN, and where this is known at once.
        """
        self._calls += self.every
        if self._told_before(entry) or torch._C._are_functorch_transforms_active():
            return result
        results = _floating(result)
        if not results or any(t.is_meta or type(t) not in (Tensor, torch.nn.Parameter) for t in results):
            return result
        with torch.no_grad():
            bad = _bad(results, args, kwargs)
            if bad.device.type == "cpu":
                if not bool(bad):
                    return result
                self._take_out(entry, self._calls)
                return dispatch.standing_function()(*args, **kwargs)
            if not (bad.is_cuda and torch.cuda.is_current_stream_capturing()):
                self._answer = (*_on_its_way(bad), self._calls)
        return result

    def _told_before(self, entry: Entry) -> bool:
        """Whether the answer on an earlier call has come, and says that there was a NaN."""
        if self._answer is None:
            return False
        answer, arrived, call = self._answer
        if arrived is not None and not arrived.query():
            return False
        self._answer = None
        if not bool(answer):
            return False
        self._take_out(entry, call)
        return True

    def _take_out(self, entry: Entry, call: int) -> None:
        what = f"gave NaN at about call {call}, where its arguments and weights are finite"
        since = f" (watched every {self.every} calls: those since the last one may have some as well)"
        entry.candidate.reject("quarantined", what + (since if self.every > 1 else ""))


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
