"""What stands in the slot for the calls of a block: the block itself, or what was recorded of it."""

from __future__ import annotations

import contextlib
import itertools
import weakref
from types import NoneType
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd import forward_ad
from torch.utils._device import DeviceContext

from twinkle.capture.answers import NOTHING, followed, is_wait
from twinkle.capture.caches import holds_tokens, layers_of
from twinkle.capture.chains import Chains
from twinkle.capture.kinds import MOST_KINDS, WARM, Kind, Stack
from twinkle.capture.pool import pool_of
from twinkle.capture.recording import BUSY, FILLED, GIVEN, NO_ROOM, SHORT, Recording
from twinkle.capture.signature import (
    IN_USE,
    Drawing,
    Passing,
    Undecided,
    Unservable,
    call_of,
    settings,
    words_of,
)
from twinkle.capture.slot import Slot
from twinkle.capture.surroundings import every_size_on
from twinkle.capture.weights import Calls, is_awaited
from twinkle.ops.cuda_graphs import is_capturing
from twinkle.ops.failures import is_failure
from twinkle.proof.room import comparing
from twinkle.runtime import runtime

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import nn

    from twinkle.capture.answers import Followed
    from twinkle.capture.pool import Pool
    from twinkle.capture.signature import Call
    from twinkle.capture.state import StackRecord

__all__ = ["BlockCall", "calls_for"]

_MOST_RECORDINGS = 8
_MOST_ATTEMPTS = 3
_MOST_STRAYED = 4
"""Calls out of the order of the recordings, which others have been made behind, or given anything but the
results of the recording whose memory is read: then it is made anew."""
_MISSES = 8
"""Calls in a row that could not be replayed, after which as many as there were are not looked at."""
_MOST_SKIPPED = 32
_EARLY = "before it was recorded"


def calls_for(blocks: Sequence[nn.Module], record: StackRecord) -> list[BlockCall]:
    """What stands in the slots of alike blocks of one model, one for each.

    Args:
        blocks: The blocks.
        record: What the report knows of them.
    """
    stack = Stack(record)
    return [BlockCall(block, stack) for block in blocks]


class BlockCall(Slot):
    """The calls of one block.

    Args:
        block: Is not held.
        stack: The block is one of.
    """

    __slots__ = (
        "__weakref__",
        "_block",
        "_calls",
        "_known",
        "_layers",
        "_masks",
        "_misses",
        "_pass",
        "_skip",
        "_stack",
        "_why",
    )

    def __init__(self, block: nn.Module, stack: Stack) -> None:
        self._block = weakref.ref(block)
        self._stack = stack
        self._known: dict[Any, Any] = {}
        self._calls = Calls()
        self._pass = -1
        self._layers: frozenset[int] | None = None
        self._masks: tuple[str, ...] = ()
        self._misses = 0
        self._skip = 0
        self._why = ""
        stack.blocks.add(self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the block gives."""
        block: Any = self._block()
        stack = self._stack
        self._calls.count += torch.is_grad_enabled()
        if self._skip:
            # The last calls were nothing to be replayed, and looking at each takes time as well.
            self._skip -= 1
            stack.record.calls[self._why] += 1
            return block._call_impl(*args, **kwargs)
        if not _is_plain():
            return block._call_impl(*args, **kwargs)
        try:
            pool = stack.pool or self._pool(block)
            with pool.lock:
                if self._pass == pool.passed:
                    pool.next_pass()
                self._pass = pool.passed
                call = call_of(args, kwargs, pool.device, training=block.training)
                if self._masks:
                    call.key = (*call.key, *[pool.contents(kwargs.get(name)) for name in self._masks])
                recording = self._recording(block, call, (call.key, settings()), pool)
                if type(recording) is Recording:
                    self._misses = 0
                    result = recording.replay(block, call, stack.chains)
                    stack.record.replays += 1
                    return result
        except Undecided as why:
            stack.record.eager(str(why))
            with self._undecided(pool):
                return block._call_impl(*args, **kwargs)
        except Unservable as why:
            self._missed(str(why))
            if why.of_recorded:
                with every_size_on(pool.device):  # the kernels of a replay
                    return block._call_impl(*args, **kwargs)
            if why.of_device and self.is_of_trunk:
                with pool.at_the_wall(str(why)):
                    return block._call_impl(*args, **kwargs)
        else:  # without the lock: a backward within the call may want it, in another thread
            assert isinstance(recording, Kind)
            with self._undecided(pool):
                return recording.timed(block, args, kwargs, pool)
        return block._call_impl(*args, **kwargs)

    @contextlib.contextmanager
    def _undecided(self, pool: Pool) -> Iterator[None]:
        """A call that runs as it is until those of its kind are captured, or found not to be worth it.

        Kernels take small inputs for large ones, as they do in a replay: there the host costs nothing. Of a
        trunk nothing inside is captured by itself meanwhile.
        """
        with pool.deciding() if self.is_of_trunk else contextlib.nullcontext(), every_size_on(pool.device):
            yield

    def _missed(self, why: str) -> None:
        self._stack.record.eager(why)
        if why != BUSY:
            self._misses += 1
            if self._misses > _MISSES:
                self._why, self._skip = why, min(self._misses, _MOST_SKIPPED)

    @property
    def is_of_trunk(self) -> bool:
        """Whether it calls blocks, which have recordings of their own where this one has none."""
        return self._stack.record.is_trunk

    def close(self) -> None:
        """Drop all recordings."""
        self._known.clear()
        self._stack.chains = Chains()

    def _recording(self, block: nn.Module, call: Call, key: Any, pool: Pool) -> Recording | Kind:
        """The recording for a call, made now where it is time; or a kind that is timed.

        Raises:
            Undecided: It is not time yet.
            Unservable: The call runs as it is.
        """
        known = self._known.get(key, 0)
        if type(known) is int:
            known = self._counted(block, call, key, known, pool)
            if type(known) is Kind:
                return known
        if known.broken is not None:
            self._known[key] = 0
            self._refuse(key, known.broken)
            raise Unservable(known.broken)
        if not known.makeup.holds(block):
            self._forget(key)
            raise Unservable("the block has changed since it was recorded")
        if not pool.is_home():
            raise Unservable("another stream is current")
        why = known.obstacle(call)
        if why is not None:
            if why == IN_USE:
                self._known[key] = 1  # as of the others that were dropped: they are made anew in one pass
            elif known.strayed > _MOST_STRAYED:
                self._forget(key)
            refusal = Unservable(why)
            refusal.of_recorded = True
            raise refusal
        return known  # type: ignore[no-any-return]

    def _counted(self, block: nn.Module, call: Call, key: Any, count: int, pool: Pool) -> Any:
        """The recording for a call of a kind that has none yet, or the kind where the call is timed.

        Args:
            block: The block.
            call: Of it.
            key: The kind.
            count: How often calls of the kind ran as they are.
            pool: Of the device.

        Raises:
            Undecided: It is not time yet.
            Unservable: The call runs as it is.
        """
        if call.caches and (self.is_of_trunk or self._is_filled(block, call)):
            raise Unservable(GIVEN if self.is_of_trunk else FILLED)
        kind = self._stack.kind(key)
        if kind is None:
            raise Unservable("calls are of too many kinds")
        if not kind.elements:
            elements = sum(one.numel() for one in call.tensors)
            pool.make_way(self._stack.needs(elements))
            kind.elements = elements
        if pool.walls and not kind.chosen and kind.refused is None:
            kind.leave_to_device(pool.walls[-1])
        if kind.refused is not None:
            raise _refusal(kind)
        if count < WARM:
            if len(self._known) > 2 * MOST_KINDS:
                self._known = {one: made for one, made in self._known.items() if type(made) is not int}
            self._known[key] = count + 1
            if count == WARM - 1 and pool.device.type == "cuda":
                self._stack.record.eager(_EARLY)
                return kind
            raise Undecided(_EARLY)
        if pool.undecided:
            raise Undecided(_EARLY)
        why = kind.decide()
        if why is not None:
            raise _refusal(kind) if kind.refused is not None else Undecided(why)
        try:
            made = self._known[key] = self._record(block, call, kind, pool)
        except Undecided:
            self._divide(key, kind)
            raise
        return made

    def _divide(self, key: Any, kind: Kind) -> None:
        """Tell kinds of calls apart by what their masks hold; recordings of calls without masks stay."""
        none = ("else",) * len(self._masks)
        self._known = {
            ((*call, *none), state): known
            for (call, state), known in self._known.items()
            if not any(_gives(call, name) for name in self._masks)
        }
        for contents in itertools.product(("ones", "zeros"), repeat=len(self._masks)):
            now = (*key[0], *contents), key[1]
            self._known[now] = WARM
            self._stack.kinds[now] = kind.another()

    def _is_filled(self, block: nn.Module, call: Call) -> bool:
        """Whether a cache is one that the block adds to, as in the steps of a generation."""
        if self._layers is None:
            self._layers = layers_of(block.modules())
        return holds_tokens(call.caches, self._layers)

    def _record(self, block: nn.Module, call: Call, kind: Kind, pool: Pool) -> Recording:
        if not pool.is_home():
            raise Unservable("another stream is current")
        mode = "train" if call.grad else "inference"
        if not runtime.options.captures(gradients=call.grad):
            raise Unservable(f"capture is {runtime.options.capture!r}")
        if _watches():
            raise Unservable("kernels are watched for NaN")
        if sum(type(one) is Recording for one in self._known.values()) >= _MOST_RECORDINGS:
            raise Unservable("calls are of too many kinds")
        if self.is_of_trunk and call.grad and is_awaited([*block.parameters()]):
            raise Unservable("gradients are waited for while the backward is under way")
        if not pool.has_room(self._needs(block, call, kind)):
            raise Unservable(SHORT if pool.is_short else NO_ROOM)
        try:
            made = self._made(block, call, pool)
        except Undecided:
            raise
        except Passing as why:
            self._failed(kind, str(why))
            raise
        except Unservable as why:
            kind.refused = str(why)
            raise
        except Exception as error:
            if not is_failure(error):
                raise
            said = f"{type(error).__name__}: {error}".partition("\n")[0]
            text = f"it cannot be recorded: {said}{_place_of(error)}"
            if self.is_of_trunk:
                kind.refused = text  # what is inside has an attempt of its own
            else:
                self._failed(kind, text)
            raise Unservable(text) from error
        pool.holders.add(self)
        made.belongs_to(self._stack.record, words_of(call.tensors), mode)
        return made

    def _made(self, block: nn.Module, call: Call, pool: Pool) -> Recording:
        """The recording of a call, told what it would wait for or draw where that is alike at every call."""
        try:
            return Recording(block, call, pool, self._calls)
        except Exception as error:
            is_followed = isinstance(error, Drawing) or (is_wait(error) and is_failure(error))
            if not self.is_of_trunk or not is_followed:
                raise
            found = self._followed(block, call, pool)
            if found is None or found == NOTHING:
                raise
            return Recording(block, call, pool, self._calls, found)

    def _followed(self, block: nn.Module, call: Call, pool: Pool) -> Followed | None:
        """What a call reads from the device and draws on the CPU; None where that is not always alike.

        Raises:
            Undecided: It is by what masks hold, which is a part of the kind from now on.
        """
        graphs = pool.graphs(training=call.grad)
        if not self._masks:
            found = followed(block, call, graphs)
            if found.is_alike:
                return found
        named = {name: call.kwargs[name] for name in self._masks or call.kwargs if "mask" in name}
        ones = {name: one for name, one in named.items() if pool.contents(one) == "ones"}
        zeros = {name: one for name, one in named.items() if pool.contents(one) == "zeros"}
        if not ones and not zeros:
            return None
        found = followed(block, call, graphs, ones.values(), zeros.values())
        if not found.is_alike:
            return None
        if not self._masks:
            self._masks = (*ones, *zeros)
            raise Undecided(_EARLY)
        return found

    def _needs(self, block: nn.Module, call: Call, kind: Kind) -> int:
        """Bytes that a recording will hold, as far as that is known: nothing for a block."""
        if not self.is_of_trunk:
            return 0
        gradients = sum(int(one.nbytes) for one in block.parameters() if one.requires_grad)
        return kind.kept + (gradients if call.grad else 0)

    def _forget(self, key: Any) -> None:
        """Drop a recording of a block that has changed; it is recorded anew like the first."""
        kind = self._stack.kind(key)
        if kind is not None:
            self._failed(kind, "the blocks change again and again")
        self._known[key] = 0

    def _refuse(self, key: Any, why: str) -> None:
        """Leave a kind of call alone, but for the blocks that have a recording that works."""
        kind = self._stack.kind(key)
        if kind is not None:
            kind.refused = why

    def _failed(self, kind: Kind, why: str) -> None:
        """Count what went wrong; after as many as all blocks may have a few of, the kind is left alone."""
        kind.attempts += 1
        if kind.attempts >= _MOST_ATTEMPTS * max(1, len(self._stack.blocks)):
            kind.refused = why

    def _pool(self, block: nn.Module) -> Pool:
        for one in block.parameters():
            if one.device.type != "cuda":
                raise Unservable("the block is on no GPU")
            self._stack.pool = pool_of(one.device)
            return self._stack.pool
        raise Unservable("the block has no parameters")


def _gives(key: tuple[Any, ...], name: str) -> bool:
    """Whether calls of a kind have an argument of a name that is not None."""
    return name in key and key[key.index(name) + 1] != (NoneType, None)


def _refusal(kind: Kind) -> Unservable:
    refusal = Unservable(str(kind.refused))
    refusal.of_device = kind.device_is_wall
    return refusal


def _watches() -> bool:
    """Whether the results of kernels are looked at, which a replay would leave out."""
    registry = runtime.registry
    chosen = {kernel.watch for kernel in (*registry.layer_kernels, *registry.function_kernels)}
    return bool(chosen - {None, "off"}) or runtime.options.watch != "off"


def _place_of(error: Exception) -> str:
    """Where the program was: the last line of it that is neither torch's nor Twinkle's."""
    found, step = "", error.__traceback__
    while step is not None:
        name = str(step.tb_frame.f_globals.get("__name__", ""))
        if name.partition(".")[0] not in ("torch", "twinkle"):
            found = f" (at {name}:{step.tb_lineno})"
        step = step.tb_next
    return found


def _is_plain() -> bool:
    """Whether nobody follows the operators of a call: no compiler, tracer, mode, transform or hook."""
    c = torch._C
    if (
        torch.compiler.is_compiling()
        or c._len_torch_dispatch_stack()
        or c._are_functorch_transforms_active()
        or c._get_tracing_state() is not None
        or torch.is_anomaly_enabled()
        or forward_ad._current_level >= 0
        or c._autograd._top_saved_tensors_default_hooks(True) is not None
        or comparing()
    ):
        return False
    for at in range(c._len_torch_function_stack()):
        if type(c._get_function_stack_at(at)) is not DeviceContext:
            return False
    return not is_capturing()
