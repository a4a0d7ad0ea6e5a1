"""One kind of call of one block, recorded: inputs are copied in, a graph is replayed, results copied out."""

from __future__ import annotations

import contextlib
import copy
import functools
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from twinkle.capture.aliases import Aliases
from twinkle.capture.answers import NOTHING, answered
from twinkle.capture.backward import Backward
from twinkle.capture.biases import biases_by_kernel
from twinkle.capture.buffers import Input, Shared, alias, copies_of
from twinkle.capture.caches import CacheUses, empty_caches, kind_of_cache
from twinkle.capture.guard import Draws, Makeup, Traces, draw_again, hooks_on
from twinkle.capture.results import flattened
from twinkle.capture.signature import (
    BUSY,
    IN_USE,
    Drawing,
    Passing,
    Unservable,
    containers_in,
    holds_other,
    template,
)
from twinkle.capture.surroundings import as_if_run, every_size_on
from twinkle.capture.weights import is_taken
from twinkle.deferred.forward import taken_apart

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import nn

    from twinkle.capture.answers import Followed
    from twinkle.capture.chains import Chains
    from twinkle.capture.pool import Pool
    from twinkle.capture.signature import Call
    from twinkle.capture.state import StackRecord
    from twinkle.capture.weights import Calls, Weights

__all__ = ["BUSY", "FILLED", "GIVEN", "NO_ROOM", "SHORT", "Recording"]

NO_ROOM = "no room: recordings may hold no more memory"
SHORT = "given back: the device ran out of memory"
FILLED = "its cache holds tokens already"
GIVEN = "a cache is given to it"
_SAME: Any = contextlib.nullcontext()
_FEW = 4  # results whose copies cost less one by one
_GIVEN = 64  # the share of the device that all results may have, which each replay copies
_MOST_READ = 4  # results that others may read where they are: those of a cache come after them
_MOST_REPEATS = 2  # backwards that are computed by calling the block once more, before it is left alone


class Recording:
    """A call of a block as a graph, and that of its backward from the first backward on.

    Args:
        block: The block.
        call: A call.
        pool: Of the device.
        calls: Counts those of the block.
        followed: What the block reads from the device and draws on the CPU, the same at every call.

    Raises:
        Unservable: It is nothing that can be replayed.
        Exception: What the device or the block says to being recorded.
    """

    def __init__(
        self, block: nn.Module, call: Call, pool: Pool, calls: Calls, followed: Followed = NOTHING
    ) -> None:
        if hooks_on(block):
            raise Unservable("hooks are called inside")
        self.pool, self.calls = pool, calls
        self.broken: str | None = None
        self._repeats = 0
        self.makeup = Makeup(block)
        if any(one.device != pool.device for one in self.makeup.weights):
            raise Unservable("a part of it is on another device")
        self._autocast = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
        wanted = call.grad and any(t.requires_grad for t in (*call.tensors, *self.makeup.parameters))
        self._ordered = wanted
        self.weights = [one for one in self.makeup.parameters if one.requires_grad] if wanted else []
        self.graphs, self.order = pool.graphs(training=wanted), pool.order(training=wanted)
        self._age = pool.age
        before = self.graphs.held()
        self.inputs = [Input(tensor, pool, grad=wanted) for tensor in call.tensors]
        self._fill = template(call.args, call.kwargs)
        self._caches: list[Any] = [kind_of_cache(one) for one in call.caches]
        self._uses = CacheUses()
        self.aliases = Aliases(block) if wanted else None
        run = self._run_of(block, [one.leaf for one in self.inputs], self._uses, self.aliases)
        self._draws = followed.draws or ()
        self._replay, results = self._record(block, run, followed)
        self._uses_random: bool | None = None
        self._generators = self.graphs.generators()
        self._rebuild, self.kept = results
        self._check_results()
        self.grad = wanted and any(one.requires_grad for one in self.kept)
        self._static = [one.detach() for one in self.kept]
        self._results = len(self._static) - 2 * len(self._uses.updates)
        if not self.grad:
            self.kept = []
        self._link()
        self.index = pool.next_index()
        self._backward: Backward | None = None
        self.bytes = self.graphs.held() - before
        self._record_of: StackRecord | None = None
        self._holds(self.bytes)

    def _link(self) -> None:
        """Sort the inputs, and let later recordings read the results where they are."""
        self._own = [(at, one) for at, one in enumerate(self.inputs) if one.shared is None]
        self._common = [(at, one, one.shared) for at, one in enumerate(self.inputs) if one.shared is not None]
        self._stale: list[tuple[int, Input, Shared]] = []
        self.where = [at for at, one in enumerate(self.inputs) if one.leaf.requires_grad]
        self._others = [at for at, one in enumerate(self.inputs) if not one.leaf.requires_grad]
        self._constants = [at for at, one in enumerate(self.kept) if not one.requires_grad]
        self._links = {id(self.inputs[at].shared) for at in self.where}
        self.strayed = 0
        self.outputs = [Shared(alias(one), self.order) for one in self._static[: self._results][:_MOST_READ]]
        for output in self.outputs:
            self.pool.offer(output)
        self.shared = [*(shared for _, _, shared in self._common), *self.outputs]

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

    def _record(self, block: nn.Module, run: Callable[[], Any], followed: Followed) -> Any:
        versions = [one.buffer._version for one in self.inputs]
        self._biases()  # proven and compiled before, not while it is recorded
        traces, draws = Traces(block), Draws()
        try:
            with answered(followed.answers, self.pool.device):
                made = self.graphs.record(run)
        except BaseException:
            traces.wipe()
            draws.put_back()
            raise
        if not self.makeup.has_kept(block):
            traces.wipe()
            draws.put_back()
            raise Passing("its forward changes the block")
        if draws.put_back(self._draws):
            raise Drawing("its forward draws random numbers on the CPU")
        if versions != [one.buffer._version for one in self.inputs]:
            raise Unservable("its forward writes to its arguments")
        return made

    def _run_of(
        self, block: nn.Module, tensors: Sequence[Tensor], uses: CacheUses, aliases: Aliases | None = None
    ) -> Callable[[], Any]:
        """A function that calls the block with other tensors, and gives all tensors that come out of it."""
        sizes = functools.partial(every_size_on, self.pool.device)

        def run() -> Any:
            made: list[Tensor] = []
            uses.clear()
            args, kwargs = self._fill(tensors, empty_caches(self._caches, uses, made))
            held = [(one, copy.copy(one)) for one in containers_in((args, kwargs))]
            with self._casting(), aliases or _SAME, as_if_run(), taken_apart(), sizes(), self._biases():
                result = block._call_impl(*args, **kwargs)
            if any(holds_other(one, before) for one, before in held):
                raise Unservable("its forward changes a list or dictionary that it is given")
            out: list[Tensor] = []
            rebuild = flattened(result, out, {id(one): at for at, one in enumerate(tensors)})
            return rebuild, [*out, *made]

        return run

    def _biases(self) -> Any:
        return biases_by_kernel(self.weights, self.pool.device, self._autocast)

    def _casting(self) -> Any:
        if self._autocast is None:
            return contextlib.nullcontext()
        # What the cache of casts holds is freed at the end of the program's context.
        return torch.autocast("cuda", dtype=self._autocast, cache_enabled=False)

    def _check_results(self) -> None:
        taken = {one.buffer.untyped_storage().data_ptr() for one in self.inputs}
        taken |= {one.untyped_storage().data_ptr() for one in self.makeup.parameters}
        if sum(int(one.nbytes) for one in self.kept) > self.graphs.total() // _GIVEN:
            raise Unservable("its results are too large to be copied")
        for one in self.kept:
            if one.device != self.pool.device:
                raise Unservable("a result is on another device than the block")
            if one.numel() and one.untyped_storage().data_ptr() in taken:
                raise Unservable("a result is a part of what it was given")

    def obstacle(self, call: Call) -> str | None:
        """Why a call of this kind cannot be replayed now; None where it can."""
        pool = self.pool
        if self._uses_random is not False and self._generators != self.graphs.generators():
            self.broken = "a recording that failed has taken the generator of random numbers with it"
            return self.broken
        if self._ordered and not pool.may_run(self.index):
            self.strayed += not pool.is_waiting(self.index)
            return BUSY
        if self.index > self.order.last:
            self.order.last = self.index
        elif not pool.rewind(self.order, self.index):
            return IN_USE
        self._stale = stale = []
        for at, one, shared in self._common:
            if not shared.has(call.tensors[at], pool.passed):
                if pool.pending() and pool.is_needed(shared):
                    self.strayed += id(shared) in self._links
                    return BUSY
                stale.append((at, one, shared))
        return None if self._uses.may_repeat(call.caches) else FILLED

    def replay(self, block: nn.Module, call: Call, chains: Chains) -> Any:
        """What the block gives for a call of this kind.

        Args:
            block: The block.
            call: A call without an obstacle.
            chains: Of the stack.
        """
        tensors = call.tensors
        if self._draws:
            draw_again(self._draws)
        if self.grad:
            weights, at, token = chains.token(self, tensors) if self.weights else _NO_WEIGHTS
            out = _apply(self, block, weights, at, token, *tensors)
            if weights is not None:
                chains.note(self)
        else:
            with torch.no_grad() if torch.is_grad_enabled() else _SAME:
                out = self._forward(tensors)
        passed = self.pool.passed
        for shared, one in zip(self.outputs, out, strict=False):
            shared.note(one, passed)
        if call.caches:
            self._uses.repeat(call.caches, out[self._results :])
        return self._rebuild(out, tensors)

    def _forward(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        for at, one in self._own:
            one.copy(tensors[at])
        for at, one, shared in self._stale:
            one.copy(tensors[at])
            shared.note(tensors[at], self.pool.passed)
        before = self.graphs.random() if self._uses_random is None else None
        self._replay()
        if before is not None:
            self._uses_random = self.graphs.random() != before
        if len(self._static) > _FEW:
            return tuple(copies_of(self._static))
        return tuple([one.clone() for one in self._static])

    def forward(
        self, context: Any, block: nn.Module, weights: Weights | None, at: int, tensors: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        """Replay a call whose gradients may be wanted.

        Args:
            context: Of the node.
            block: The block.
            weights: Takes the gradients of the weights.
            at: The place for them.
            tensors: The inputs.
        """
        context.recording, context.block = self, block
        context.weights, context.at = weights, at
        context.random = None if self._uses_random is False else self.graphs.random()
        # What asks for no gradient may be written to before the backward, as far as autograd is concerned.
        context.save_for_backward(
            *[tensors[at] for at in self.where], *[tensors[at].data for at in self._others]
        )
        context.set_materialize_grads(False)
        out = self._forward(tensors)
        if self._constants:
            context.mark_non_differentiable(*[out[at] for at in self._constants])
        self.pool.waits(self.index, context, self.shared)
        return out

    def backward(self, context: Any, grads: tuple[Tensor | None, ...]) -> list[Tensor | None]:
        """The gradients of the token and the inputs of a replayed call."""
        saved = context.saved_tensors  # says what autograd says: freed, or written to
        twice = torch.is_grad_enabled()
        weights = context.weights
        with self.pool.lock:
            waits = self.pool.ends(context)
            try:
                found = self._by_graph(grads, weights, context.at, again=twice or not waits)
            except Unservable as why:
                found = None
                self._missed(str(why))
        if found is None:
            all_found = self._again(context, saved, grads, twice=twice)
            found = all_found[: len(self.where)]
            # What is differentiable itself and nobody takes would be held for ever: it holds the node.
            if weights is not None and (not twice or is_taken(context)):
                weights.give(context.at, all_found[len(self.where) :])
        made: list[Tensor | None] = [None] * (1 + len(self.inputs))
        if weights is not None:
            made[0] = weights.nothing
        for at, grad in zip(self.where, found, strict=True):
            made[1 + at] = grad
        return made

    def _missed(self, why: str) -> None:
        """Count a backward that is computed by calling the block once more."""
        if self._record_of is not None:
            self._record_of.eager(why)
        if why != IN_USE:  # the next one gets copies
            self._repeats += 1
            if self._repeats > _MOST_REPEATS and self.broken is None:
                self.broken = "its backward is not the same again and again"

    def _by_graph(
        self, grads: tuple[Tensor | None, ...], weights: Weights | None, at: int, *, again: bool
    ) -> Sequence[Tensor | None]:
        """The gradients of the inputs by replay; the first time by recording it.

        Raises:
            Unservable: They must be computed.
        """
        if again:
            raise Unservable("its backward came a second time, or is differentiated itself")
        if not self.pool.is_home():
            raise Unservable("another stream is current in its backward")
        if self._age != self.pool.age:
            raise Unservable(IN_USE)
        if self._backward is None:
            if not self.pool.has_room():
                self.broken = NO_ROOM
                raise Unservable(NO_ROOM)
            before = self.graphs.held()
            try:
                self._backward = Backward(self, grads)
            except Exception as error:
                self.broken = f"its backward: {error}".partition("\n")[0]
                raise Unservable(self.broken) from error
            finally:
                self._holds(self.graphs.held() - before)
        return self._backward.replay(grads, weights, at)

    def _again(
        self, context: Any, saved: Sequence[Tensor], grads: tuple[Tensor | None, ...], *, twice: bool
    ) -> Sequence[Tensor | None]:
        """The gradients by calling the block once more, with the random numbers of the call."""
        count, weights = len(self.where), self.weights
        inputs = list(saved[:count])
        if not twice:
            inputs = [one.detach().requires_grad_() for one in inputs]
        wanted, others = iter(inputs), iter(saved[count:])
        tensors = [next(wanted if at in self.where else others) for at in range(len(self.inputs))]
        now, draws = self.graphs.random(), Draws() if self._draws else None
        if context.random is not None:
            self.graphs.set_random(context.random)
        try:
            with torch.enable_grad(), self.pool.deciding():
                _, out = self._run_of(context.block, tensors, CacheUses())()
        finally:
            if draws is not None:
                draws.put_back()
            if context.random is not None:
                self.graphs.set_random(now)
        given = [(one, grad) for one, grad in zip(out, grads, strict=True) if grad is not None]
        made: Sequence[Tensor | None] = torch.autograd.grad(
            [one for one, _ in given],
            [*inputs, *weights],
            [grad for _, grad in given],
            create_graph=twice,
            allow_unused=True,
        )
        return made


class _Replay(torch.autograd.Function):
    """A replayed call with gradients."""

    @staticmethod
    def forward(
        ctx: Any, recording: Recording, block: Any, weights: Any, at: int, token: Any, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        return recording.forward(ctx, block, weights, at, tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return None, None, None, None, *ctx.recording.backward(ctx, grads)


_apply: Callable[..., Any] = super(torch.autograd.Function, _Replay).apply
"""Of the class below torch's: that one looks for tensors of transforms, in which nothing is replayed."""
_NO_WEIGHTS: tuple[None, int, None] = (None, 0, None)


def _leave(pool: weakref.ref[Pool], count: int) -> None:
    known = pool()
    if known is not None:
        known.used -= count
        known.look_after()
