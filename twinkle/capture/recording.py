"""One kind of call of one block, recorded: inputs are copied in, a graph is replayed, results copied out."""

from __future__ import annotations

import contextlib
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from twinkle.capture.aliases import Aliases
from twinkle.capture.caches import CacheUses, empty_caches, kind_of_cache
from twinkle.capture.guard import Draws, Makeup, Traces, hooks_on
from twinkle.capture.signature import Passing, Unservable, flattened, overlaps, template

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import nn

    from twinkle.capture.pool import Pool, Shared
    from twinkle.capture.signature import Call
    from twinkle.capture.state import StackRecord

__all__ = ["BUSY", "FILLED", "NO_ROOM", "Recording"]

BUSY = "the call before waits for its backward"
NO_ROOM = "no room: recordings may hold no more memory"
FILLED = "its cache holds tokens already"
_SAME: Any = contextlib.nullcontext()
_MOST_REPEATS = 2  # backwards that are computed by calling the block once more, before it is left alone


class _Input:
    """Where a recording reads one input.

    Args:
        tensor: Of the call that is recorded.
        pool: Of the device.
        grad: Whether gradients of inputs are wanted.
    """

    __slots__ = ("_at", "_raw", "buffer", "leaf", "shared")

    def __init__(self, tensor: Tensor, pool: Pool, *, grad: bool) -> None:
        if overlaps(tensor):
            raise Unservable("an argument overlaps itself in memory")
        repeated = [
            size > 1 and not stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
        ]
        self._at = tuple(slice(0, 1) if one else slice(None) for one in repeated) if any(repeated) else None
        self.shared: Shared | None = None
        wants = grad and tensor.requires_grad
        if not wants:
            self.shared = pool.shared_with(tensor)
        with torch.inference_mode(False), torch.no_grad():
            if self.shared is not None:
                self.buffer = self.shared.buffer
            else:
                self.buffer = torch.empty_strided(
                    tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
                )
                if not wants:
                    self.shared = pool.share(tensor, self.buffer)
            # Written to with no new version: to autograd, what a forward kept is what a backward may read.
            self._raw = self.buffer.data
            self.copy(tensor)
            self.leaf = self.buffer.detach().requires_grad_() if wants else self.buffer

    def copy(self, tensor: Tensor) -> None:
        """Copy the contents of a tensor in."""
        if self._at is None:
            self._raw.copy_(tensor)
        else:
            self._raw[self._at].copy_(tensor[self._at])


class Recording:
    """A call of a block as a graph, and that of its backward from the first backward on.

    Args:
        block: The block.
        call: A call.
        pool: Of the device.

    Raises:
        Unservable: It is nothing that can be replayed.
        Exception: What the device or the block says to being recorded.
    """

    def __init__(self, block: nn.Module, call: Call, pool: Pool) -> None:
        if hooks_on(block):
            raise Unservable("hooks are called inside")
        self.pool = pool
        self.broken: str | None = None
        self._repeats = 0
        self.makeup = Makeup(block)
        if any(one.device != pool.device for one in self.makeup.weights):
            raise Unservable("a part of it is on another device")
        self._autocast = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
        wanted = call.grad and any(t.requires_grad for t in (*call.tensors, *self.makeup.parameters))
        self._ordered = wanted
        self._trained = [one.requires_grad for one in self.makeup.parameters]
        self._graphs = pool.graphs(training=wanted)
        before = self._graphs.held()
        self._inputs = [_Input(tensor, pool, grad=wanted) for tensor in call.tensors]
        self.shared = [one.shared for one in self._inputs if one.shared is not None]
        self._own = [(at, one) for at, one in enumerate(self._inputs) if one.shared is None]
        self._common = [(at, one) for at, one in enumerate(self._inputs) if one.shared is not None]
        self._fill = template(call.args, call.kwargs)
        self._caches: list[Any] = [kind_of_cache(one) for one in call.caches]
        self._uses = CacheUses()
        self._weights = Aliases(block) if wanted else None
        run = self._run_of(block, [one.leaf for one in self._inputs], self._uses, self._weights)
        self._replay, results = self._record(block, run)
        self._uses_random: bool | None = None
        self._generators = self._graphs.generators()
        self._rebuild, self._kept = results
        self._check_results()
        self.grad = wanted and any(one.requires_grad for one in self._kept)
        self._static = [one.detach() for one in self._kept]
        self._results = len(self._static) - 2 * len(self._uses.updates)
        if not self.grad:
            self._kept = []
        self._where = [at for at, one in enumerate(self._inputs) if one.leaf.requires_grad]
        self.index = pool.next_index()
        self._backward: _Backward | None = None
        self.bytes = self._graphs.held() - before
        self._record_of: StackRecord | None = None
        self._holds(self.bytes)

    def belongs_to(self, record: StackRecord, words: str, mode: str) -> None:
        """Have the report say what is held, here and from now on.

        Args:
            record: Of the stack.
            words: The inputs.
            mode: ``train`` or ``inference``.
        """
        record.captures(words, mode)
        record.holds(self.bytes)
        weakref.finalize(self, record.drops, words, mode)
        weakref.finalize(self, record.holds, -self.bytes)
        self._record_of = record

    def _holds(self, count: int) -> None:
        """Count bytes that are held until this goes."""
        self.pool.used += count
        weakref.finalize(self, _leave, weakref.ref(self.pool), count)
        if self._record_of is not None:
            self._record_of.holds(count)
            weakref.finalize(self, self._record_of.holds, -count)

    def _record(self, block: nn.Module, run: Callable[[], Any]) -> Any:
        versions = [one.buffer._version for one in self._inputs]
        traces, draws = Traces(block), Draws()
        try:
            made = self._graphs.record(run)
        except BaseException:
            traces.wipe()
            draws.put_back()
            raise
        if not self.makeup.has_kept(block):
            traces.wipe()
            draws.put_back()
            raise Passing("its forward changes the block")
        if draws.put_back():
            raise Unservable("its forward draws random numbers on the CPU")
        if versions != [one.buffer._version for one in self._inputs]:
            raise Unservable("its forward writes to its arguments")
        return made

    def _run_of(
        self, block: nn.Module, tensors: Sequence[Tensor], uses: CacheUses, weights: Aliases | None = None
    ) -> Callable[[], Any]:
        """A function that calls the block with other tensors, and gives all tensors that come out of it."""

        def run() -> Any:
            made: list[Tensor] = []
            uses.clear()
            args, kwargs = self._fill(tensors, empty_caches(self._caches, uses, made))
            with self._casting(), weights or _SAME:
                result = block._call_impl(*args, **kwargs)
            out: list[Tensor] = []
            rebuild = flattened(result, out, {id(one): at for at, one in enumerate(tensors)})
            return rebuild, [*out, *made]

        return run

    def _casting(self) -> Any:
        if self._autocast is None:
            return contextlib.nullcontext()
        # What the cache of casts holds is freed at the end of the program's context.
        return torch.autocast("cuda", dtype=self._autocast, cache_enabled=False)

    def _check_results(self) -> None:
        taken = {one.buffer.untyped_storage().data_ptr() for one in self._inputs}
        taken |= {one.untyped_storage().data_ptr() for one in self.makeup.parameters}
        for one in self._kept:
            if one.device != self.pool.device:
                raise Unservable("a result is on another device than the block")
            if one.numel() and one.untyped_storage().data_ptr() in taken:
                raise Unservable("a result is a part of what it was given")

    def weights(self) -> list[Tensor]:
        """The parameters that wanted gradients when this was recorded."""
        return [one for one, wants in zip(self.makeup.parameters, self._trained, strict=True) if wants]

    def obstacle(self, call: Call) -> str | None:
        """Why a call of this kind cannot be replayed now; None where it can."""
        pool = self.pool
        if self._uses_random is not False and self._generators != self._graphs.generators():
            self.broken = "a recording that failed has taken the generator of random numbers with it"
            return self.broken
        if self._ordered and not pool.may_run(self.index):
            return BUSY
        for at, one in self._common:
            shared: Any = one.shared
            if not shared.has(call.tensors[at], pool.passed) and pool.pending() and pool.is_needed(shared):
                return BUSY
        return None if self._uses.may_repeat(call.caches) else FILLED

    def replay(self, block: nn.Module, call: Call) -> Any:
        """What the block gives for a call of this kind.

        Args:
            block: The block.
            call: A call without an obstacle.
        """
        if self.grad:
            out = _Replay.apply(self, block, *call.tensors, *self.makeup.parameters)
        else:
            with torch.no_grad() if torch.is_grad_enabled() else _SAME:
                out = self._forward(call.tensors)
        if call.caches:
            self._uses.repeat(call.caches, [*out[self._results :]])
        return self._rebuild(out, call.tensors)

    def _forward(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        for at, one in self._own:
            one.copy(tensors[at])
        passed = self.pool.passed
        for at, one in self._common:
            shared: Any = one.shared
            tensor = tensors[at]
            if not shared.has(tensor, passed):
                one.copy(tensor)
                shared.note(tensor, passed)
        before = self._graphs.random() if self._uses_random is None else None
        self._replay()
        if before is not None:
            self._uses_random = self._graphs.random() != before
        static, own = self._static, self._results
        # A cache copies what it is given.
        return (*[one.clone() for one in static[:own]], *[one.detach() for one in static[own:]])

    def forward(self, context: Any, block: nn.Module, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Replay a call whose gradients may be wanted.

        Args:
            context: Of the node.
            block: The block.
            tensors: The inputs and the parameters.
        """
        context.recording, context.block = self, block
        context.random = None if self._uses_random is False else self._graphs.random()
        inputs = tensors[: len(self._inputs)]
        wanted = [inputs[at] for at in self._where]
        weights = self.weights()
        # What asks for no gradient may be written to before the backward, as far as autograd is concerned.
        others = [one.data for at, one in enumerate(inputs) if at not in self._where]
        context.save_for_backward(*wanted, *weights, *others)
        context.set_materialize_grads(False)
        out = self._forward(inputs)
        context.mark_non_differentiable(
            *[one for one, kept in zip(out, self._kept, strict=True) if not kept.requires_grad]
        )
        self.pool.waits(self.index, context, self.shared)
        return out

    def backward(self, context: Any, grads: tuple[Tensor | None, ...]) -> list[Tensor | None]:
        """The gradients of the inputs and the parameters of a replayed call."""
        saved = context.saved_tensors  # says what autograd says: freed, or written to
        twice = torch.is_grad_enabled()
        found = None
        with self.pool.lock:
            waits = self.pool.ends(context)
            if waits and not twice and self.pool.is_home():
                found = self._by_graph(grads)
        if found is None:
            self._repeats += 1
            if self._repeats > _MOST_REPEATS and self.broken is None:
                self.broken = "its backward is not the same again and again"
            found = self._again(context, saved, grads, twice=twice)
        made = iter(found)
        wants = [*(at in self._where for at in range(len(self._inputs))), *self._trained]
        return [next(made) if one else None for one in wants]

    def _by_graph(self, grads: tuple[Tensor | None, ...]) -> Sequence[Tensor | None] | None:
        """The gradients by replay; the first time by recording it. None where they must be computed."""
        if self._backward is None:
            if not self.pool.has_room():
                self.broken = NO_ROOM
                return None
            before = self._graphs.held()
            try:
                self._backward = _Backward(self, grads)
            except Exception as error:
                self.broken = f"its backward: {error}".partition("\n")[0]
                return None
            finally:
                self._holds(self._graphs.held() - before)
        return self._backward.replay(grads)

    def _again(
        self, context: Any, saved: Sequence[Tensor], grads: tuple[Tensor | None, ...], *, twice: bool
    ) -> Sequence[Tensor | None]:
        """The gradients by calling the block once more, with the random numbers of the call."""
        count = len(self._where)
        inputs = list(saved[:count])
        if not twice:
            inputs = [one.detach().requires_grad_() for one in inputs]
        weights = self.weights()
        wanted, others = iter(inputs), iter(saved[count + len(weights) :])
        tensors = [next(wanted if at in self._where else others) for at in range(len(self._inputs))]
        now = self._graphs.random()
        if context.random is not None:
            self._graphs.set_random(context.random)
        try:
            with torch.enable_grad():
                _, out = self._run_of(context.block, tensors, CacheUses())()
        finally:
            if context.random is not None:
                self._graphs.set_random(now)
        given = [(one, grad) for one, grad in zip(out, grads, strict=True) if grad is not None]
        made: Sequence[Tensor | None] = torch.autograd.grad(
            [one for one, _ in given],
            [*inputs, *weights],
            [grad for _, grad in given],
            create_graph=twice,
            allow_unused=True,
        )
        return made


class _Backward:
    """The graph of a recording's backward.

    Args:
        recording: Its forward was replayed and keeps what this needs.
        grads: Of its results, in the call at hand; those of later calls must be given in the same places.
    """

    def __init__(self, recording: Recording, grads: tuple[Tensor | None, ...]) -> None:
        self._pattern = [grad is not None for grad in grads]
        kept, places = recording._kept, [at for at, grad in enumerate(grads) if grad is not None]
        self._given = []
        with torch.no_grad():
            for at in places:
                self._given.append(torch.empty_like(kept[at]).copy_(grads[at]))
        wanted = [recording._inputs[at].leaf for at in recording._where]
        assert recording._weights is not None
        wanted += [recording._weights.of(one) for one in recording.weights()]

        def run() -> Any:
            results = [kept[at] for at in places]
            return torch.autograd.grad(results, wanted, self._given, retain_graph=True, allow_unused=True)

        with torch.enable_grad():
            self._replay, found = recording._graphs.record(run)
        self._pool = recording.pool
        self._index = self._pool.next_index()
        self._found = [None if one is None else one.detach() for one in found]
        self._fresh = True

    def replay(self, grads: tuple[Tensor | None, ...]) -> Sequence[Tensor | None] | None:
        """The gradients; None where these are given in other places, or a later forward waits."""
        if [grad is not None for grad in grads] != self._pattern or not self._pool.may_run(self._index):
            return None
        if not self._fresh:
            at = 0
            for grad in grads:
                if grad is not None:
                    self._given[at].copy_(grad)
                    at += 1
        self._fresh = False
        self._replay()
        present = [one for one in self._found if one is not None]
        copies = iter(torch._foreach_mul(present, 1.0) if present else ())
        return [None if one is None else next(copies) for one in self._found]


class _Replay(torch.autograd.Function):
    """A replayed call with gradients."""

    @staticmethod
    def forward(ctx: Any, recording: Recording, block: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        return recording.forward(ctx, block, tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return None, None, *ctx.recording.backward(ctx, grads)


def _leave(pool: weakref.ref[Pool], count: int) -> None:
    known = pool()
    if known is not None:
        known.used -= count
