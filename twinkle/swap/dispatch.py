"""The function that stands in a target's place: it picks the kernel for a call, or the original.

It is generated: arguments go through by name (no ``*args``), and only the circumstances are looked at
on which the choice depends. The code is replaced in place (``__code__``), so that whoever took the
function (a wrapper, a bound method) has the newest, and what ``torch.compile`` guards on stays.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.fx import _symbolic_trace

from twinkle import forks
from twinkle.codegen import compile_source
from twinkle.match.reads import CHANGED, KEPT
from twinkle.ops.failures import is_failure
from twinkle.ops.plain import FORCED
from twinkle.proof.first_use import Subject, prove_ahead, prove_at_call
from twinkle.proof.room import comparing
from twinkle.proof.speed import size_of
from twinkle.swap import rescue
from twinkle.swap.backward import guard_backward
from twinkle.swap.candidate import explain
from twinkle.swap.code import CallForm, set_code
from twinkle.swap.dispatch_code import DispatchCode
from twinkle.swap.dtype_keys import autocasting, dtype_key, dtype_key_of
from twinkle.swap.entry import Entry, Leaf, Moment, Split, grow, is_checked
from twinkle.swap.graphs import begin_again, called_by_dynamo
from twinkle.swap.kinds import GUARDED_RUNS, PLAIN
from twinkle.swap.scope import Scope
from twinkle.swap.tensors import (
    call_there,
    constant,
    current_gpu,
    device_number,
    device_of,
    fits_this_build,
    on_another_gpu,
    several_gpus,
)
from twinkle.swap.ways import tell_speed
from twinkle.targets import own_forward

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import FunctionType

    from twinkle.swap.candidate import BaseCandidate

__all__ = ["Dispatch"]


class Dispatch:
    """A generated function and the candidates it chooses from.

    Subclasses say where the mode is read (``training_text``) and how an entry becomes a function
    (:meth:`prepare`).

    Args:
        original: What runs when no candidate suits.
        candidates: In order of registration.
        training: A fixed answer to "in training?", or ``None`` to look each time.
        compiling: Take every call for one under a compiler.
        skip: Leading arguments that never tell the device (``self``).

    Attributes:
        training_text: The expression that says in the generated code whether a call is one in training, with
            ``{}`` for the first argument.
        standing: The expressions of what would run without Twinkle, and of the test that it is the original;
            no text for a test that is not needed.
        target: The class of the layers whose ``forward`` the original is; None for a function.
        successor: What took its place when a kernel was loaded that it cannot run.
        kind: Whether what the function gives is a result, or to be awaited or iterated
            (:mod:`twinkle.swap.kinds`).
    """

    training_text = "False"
    standing = ("_tw_original", "")
    target: type[nn.Module] | None = None
    successor: Dispatch | None = None
    kind = PLAIN

    def __init__(
        self,
        original: Callable[..., Any],
        candidates: tuple[BaseCandidate, ...],
        *,
        training: bool | None = None,
        compiling: bool = False,
        skip: int = 0,
    ) -> None:
        self.original = original
        self.fixed_training = training
        self.fixed_compiling = compiling
        self.lock = forks.lock()
        self.entries = [
            Entry(candidate, index, self.target)
            for index, candidate in enumerate(candidates)
            if fits_this_build(candidate.device)
        ]
        self._call = CallForm(original, skip)
        self.names = Scope(original, self._hot_names(), self)
        self._set(
            original=original,
            target=self.target,
            front=original,
            pending=self.first_call,
            failed=self._failed,
            instead=self._instead,
            odd=self._odd,
            unversioned=self._unversioned,
            look=self._look,
            decide=self._decide,
            guard_backward=self._guard_backward,
            again=self._run_again,
            load=_constant(self._load_for_trace),
            changed=_constant(self._changed),
            **_FIXED_NAMES,
        )
        for entry in self.entries:
            if entry.ways is not None:
                ways = entry.ways
                self._set(**{f"ways{entry.index}": ways.known.get, f"small{entry.index}": ways.small})
        self._text = ""
        self._traced_texts: dict[str, str] = {}
        self._code = DispatchCode(
            self._call,
            training=self.training_text.format(self._call.first) if training is None else repr(training),
            standing=self.standing,
            always_compiling=compiling,
            with_dtype=any(entry.candidate.proofs.number for entry in self.entries),
            kind=self.kind,
        )
        for entry in self.entries:
            if entry.guard is not None:
                for name, value in self._code.inlined(entry, entry.guard)[1].items():
                    self.names[name] = value
        self.function = self._new_function()
        for candidate in candidates:
            candidate.used_by(self)
        self.rebuild()

    def _hot_names(self) -> list[str]:
        """The names that the function is likely to read at every call."""
        names = ["original", *(f"k{entry.index}" for entry in self.entries)]
        candidates = [entry.candidate for entry in self.entries]
        if any(candidate.mode is not None for candidate in candidates):
            names.append("grad")
        if any(candidate.mode is not None and candidate.mode.compile for candidate in candidates):
            names.append("compiling")
        if any(map(is_checked, candidates)) or any(entry.ways is not None for entry in self.entries):
            names.append("by_dynamo")
        if any(entry.ways is not None for entry in self.entries):
            names += ["grad", "any_autocast", "type"]
        if any(candidate.proofs.number for candidate in candidates):
            names += ["getattr", "autocast", "bfloat16", "float16", "float32"]
        if self._minds_the_gpu():
            names.append("current")
        # A function that is pickled by value takes its cells along: they hold nothing of the program then.
        if any(entry.guard is not None for entry in self.entries):
            names += ["target", "type"] if self.standing[1] else ["type"]
        return [f"_tw_{name}" for name in dict.fromkeys(names)]

    def _set(self, **values: Any) -> None:
        for name, value in values.items():
            self.names[f"_tw_{name}"] = value

    # What subclasses answer.

    def prepare(self, entry: Entry, args: tuple[Any, ...]) -> bool:
        """Load an entry and fill in its function; false when it cannot take the call at hand.

        Args:
            entry: One that is not loaded yet.
            args: Of the call; where none is at hand, some module of :meth:`modules`.
        """
        raise NotImplementedError

    def is_training(self, args: tuple[Any, ...]) -> bool:
        """Whether the call counts as one in training."""
        raise NotImplementedError

    def modules(self) -> list[nn.Module]:
        """The layers that the function stands in now; none for a function."""
        return []

    def copies(self) -> list[nn.Module]:
        """The layers that the function stands in now, those included that came as copies of others."""
        return self.modules()

    def hand_over(self, modules: Sequence[Any]) -> int:
        """Give layers to the successor; returns how many of them were still here."""
        return 0

    def succeeded(self, args: tuple[Any, ...]) -> Callable[..., Any]:
        """What runs in the place of this function since there is a successor.

        Args:
            args: Of the call.
        """
        return self.original

    def rebuilt(self) -> None:
        """Called after the code changed."""

    # The choice.

    def choose(self, moment: Moment) -> Entry | None:
        """The best entry for a moment, or ``None`` for the original."""
        best: tuple[tuple[int, int, int], Entry] | None = None
        for entry in self.entries:
            place = entry.suits(moment)
            if place is not None and (best is None or place < best[0]):
                best = (place, entry)
        return best[1] if best else None

    def load(self, moment: Moment, args: tuple[Any, ...]) -> Entry | None:
        """The entry for a moment, loaded and checked; the next best where one drops out."""
        while self.successor is None:
            entry = self.choose(moment)
            if entry is None or entry.state != "new":
                return entry
            if not self.prepare(entry, args) and entry.candidate.rejected is None:
                return None
            # Only now is it known what it says of itself, so choose again.
        return None

    # Calls that find their entry not loaded, never run, or unproven.

    def first_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Load, prove and run the kernel for a call; run the original where one of the three fails."""
        if comparing():
            # A layer within one that is compared: its turn is when the program calls it.
            return self.original(*args, **kwargs)
        if self._call.look_for(args, kwargs):
            self.rebuild()
        moment = self._moment(args, kwargs)
        if moment.device == "meta":
            # Shapes are being worked out: no reason to load anything.
            return self.original(*args, **kwargs)
        entry = self.load(moment, args)
        if self.successor is not None:
            return self.succeeded(args)(*args, **kwargs)
        if entry is None or entry.function is None or self._guard_fails(entry, args[:1]):
            self.rebuild()
            return self.original(*args, **kwargs)
        if entry.is_pending(moment) and not self._prove(entry, moment, args, kwargs):
            return self.original(*args, **kwargs)
        if entry.ways is not None and not self.fixed_compiling and not entry.is_pending(moment):
            entry.state = "live"  # as the text has it: whether it ever runs is decided by size
            self.rebuild()
            key = self._size_key(args, kwargs)
            if key is None:
                entry.candidate.record_unmeasured()
            way = entry.function if key is None else self._decide(entry.index, key, args, kwargs)
            if way is False:
                return self.original(*args, **kwargs)
            return rescue.guarded_call(self, entry, args, kwargs, function=way)
        if entry.is_live(moment):
            self.rebuild()
        return self._run(entry, args, kwargs)

    def _size_key(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The key by which the text finds the way of a call; None for one without a tensor in front."""
        named = self._call.probe is not None
        rest = (*args, *kwargs.values())[self._call.skip :]
        first = self._call.probed(args, kwargs) if named else next(iter(rest), None)
        if not isinstance(first, torch.Tensor):
            return None
        key = first.dtype if named and not autocasting() else dtype_key_of(first)
        return key, size_of(first), torch.is_grad_enabled()

    def _decide(self, index: int, key: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The way of a call whose size was not met yet: a function, or False for the original."""
        entry = self.entry(index)
        assert entry.ways is not None
        if FORCED:
            entry.candidate.record_unmeasured()
            return entry.function
        known = entry.ways.known.get(key)
        if known is not None:
            return known
        return entry.ways.decide(entry.candidate, self._subject(entry), key, args, kwargs)

    def _moment(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Moment:
        return Moment(
            device_of((*args, *kwargs.values())),
            training=self.is_training(args) if self.fixed_training is None else self.fixed_training,
            compiling=self.fixed_compiling or torch.compiler.is_compiling(),
            grad=torch.is_grad_enabled(),
            dtype_key=dtype_key_of(self._call.probed(args, kwargs)),
        )

    def _prove(self, entry: Entry, moment: Moment, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Compare a kernel with the original on the inputs of a call; false where the original is to run."""
        proofs, key = entry.candidate.proofs, moment.dtype_key
        if proofs.given_up(key):
            return False
        verdict = prove_at_call(self._subject(entry), args, kwargs, grad=moment.grad)
        entry.candidate.record_verdict(verdict, grad=moment.grad, key=key)
        if verdict.ok and entry.candidate.kernel.chosen_by == "user" and self.kind == PLAIN:
            tell_speed(entry.candidate, self._subject(entry), args, kwargs, grad=moment.grad)
        return verdict.ok or (verdict.pending and proofs.passed(key, grad=moment.grad))

    def _prove_ahead(self, entry: Entry, moment: Moment, dtype: torch.dtype | None) -> bool:
        """Compare a kernel with the original on made-up inputs; false where the original is to be traced."""
        if entry.function is None:
            return True
        verdict = prove_ahead(self._subject(entry), grad=moment.grad, dtype=dtype, device=moment.device)
        if verdict is not None:
            entry.candidate.record_verdict(verdict, grad=moment.grad, key=moment.dtype_key)
        return verdict is None or verdict.ok

    def _subject(self, entry: Entry) -> Subject:
        """All that a proof of an entry has to know besides the call."""
        assert entry.function is not None
        candidate = entry.candidate
        return Subject(
            source=candidate.kernel.source,
            original=self.original,
            kernel=entry.function,
            layer_class=self.target,
            layers=self.modules(),
            recall=candidate.recall,
            chosen_by_twinkle=candidate.kernel.chosen_by == "twinkle",
            every_mode=candidate.mode is None,
        )

    def _run(self, entry: Entry, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a kernel; the original, where it raises."""
        if self.kind != PLAIN:
            return GUARDED_RUNS[self.kind](self, entry, args, kwargs)
        run = rescue.guarded_call if entry.state == "live" else rescue.first_run
        return run(self, entry, args, kwargs)

    # What the text comes to where a kernel that ran before fails (see twinkle.swap.rescue).

    def _failed(
        self,
        index: int,
        error: Exception,
        before: Any,
        after: Any,
        state: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> rescue.Failure:
        """Excuse a kernel that raised, and put random numbers back; raises where the original cannot run."""
        entry = self.entry(index)
        written = entry.habits.written(before, after) if entry.habits is not None else ()
        failure = rescue.excuse(self, entry, error, args, kwargs, written=written)
        rescue.put_back(state)
        return failure

    def _instead(
        self, index: int, failure: rescue.Failure, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        return rescue.complete(self, self.entry(index), failure, args, kwargs)

    def _odd(
        self,
        index: int,
        result: Any,
        before: Any,
        state: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Decide on a result that is not as those before it."""
        entry = self.entry(index)
        assert entry.habits is not None
        written = entry.habits.written(before, entry.habits.versions(self.given(args, kwargs)))
        return rescue.inspect_result(self, entry, result, written, state, args, kwargs)

    def _unversioned(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Have the text written anew, which could not read the versions of the arguments of a call."""
        habits = self.entry(index).habits
        assert habits is not None
        habits.read_otherwise(self.given(args, kwargs))
        self.rebuild()

    def _look(
        self, index: int, result: Any, state: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Look at a result for NaN; that of the original where it has some."""
        entry = self.entry(index)
        assert entry.watch is not None
        what = entry.watch.look(result, args, kwargs)
        if what is None:
            return result
        entry.candidate.reject("quarantined", what.text)
        if what.of_an_earlier_call:
            return result
        rescue.put_back(state)
        return self.standing_function()(*args, **kwargs)

    def _guard_backward(self, index: int, result: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        guard_backward(self, self.entry(index), result, args, kwargs)

    def excused(self, entry: Entry, error: Exception) -> Exception:
        """The error of a kernel that is awaited or iterated, where the original may make up for it."""
        if entry.candidate.strict or not is_failure(error):
            raise error
        return error

    def turn_off(self, entry: Entry, failure: Exception) -> None:
        """Reject a kernel that raised."""
        when = "" if entry.state == "live" else " at its first call"
        entry.candidate.reject("quarantined", f"raised{when}: {explain(failure)}")

    def _run_again(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._run(self.entry(index), args, kwargs)

    def entry(self, index: int) -> Entry:
        """The entry of a number in the text."""
        return next(entry for entry in self.entries if entry.index == index)

    def given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call by the expressions that name them in the text, without the layer."""
        return self._call.given(args, kwargs)

    @property
    def first(self) -> str:
        """The expression of the first argument in the text."""
        return self._call.first

    def standing_function(self) -> Callable[..., Any]:
        """What would run without Twinkle."""
        if self.target is not None and self.standing[1]:
            return cast("Callable[..., Any]", self.target.forward)
        return self.original

    def ran(self, entry: Entry) -> None:
        """Take note that a kernel ran to its end."""
        if entry.state == "live":
            return
        entry.state = "live"
        entry.candidate.mark_active()
        entry.candidate.binding.has_run()
        self.rebuild()

    def _load_for_trace(
        self, name: str, device: str | None, training: bool, grad: bool, dtype: torch.dtype | None = None
    ) -> int:
        """Load the kernel while a compiler traces, and put it where the trace goes next.

        One that never ran is proven first, on made-up inputs: those at hand are none but shapes.
        """
        key = dtype_key(dtype, device)
        moment = Moment(device, training=training, compiling=True, grad=grad, dtype_key=key)
        some = tuple(self.modules()[:1])  # so that its attributes can be checked
        before = self.successor
        entry = self.load(moment, some)
        if self.successor is not None:
            return self._trace_successor(name, anew=before is None)
        while entry is not None and entry.is_pending(moment):
            if self._prove_ahead(entry, moment, dtype):
                break
            entry = None if entry.candidate.rejected is None else self.load(moment, some)
        function = self.original if entry is None or entry.function is None else entry.function
        if entry is not None:
            entry.candidate.binding.has_run()
        self._go_on_with(name, function, entry)
        return 0

    def _trace_successor(self, name: str, *, anew: bool) -> int:
        """Have a compiler trace the successor: the layers that it has met have changed.

        Args:
            name: Of the function that is traced next.
            anew: The successor took the layers in this very trace.
        """
        if _traces.by_dynamo and (self.hand_over(self.copies()) or anew):
            begin_again("a kernel needs a class of its own")
        self._go_on_with(name, self.original if _traces.by_dynamo else self._call_successor, None)
        return 0

    def _call_successor(self, *args: Any, **kwargs: Any) -> Any:
        return self.succeeded(args)(*args, **kwargs)

    def _go_on_with(self, name: str, function: Callable[..., Any], entry: Entry | None) -> None:
        """Make a function what is traced next; with the original behind a kernel that never ran."""
        traced = self.names[f"_tw_traced_{name}"]
        traced.__globals__["_tw_kernel"] = function
        traced.__globals__["_tw_entry"] = entry.index if entry is not None else -1
        text = self._code.traced_text(entry is not None and entry.state != "live")
        if text != self._traced_texts.get(name):
            set_code(traced, text, f"{self._title()} under a compiler")
            self._traced_texts[name] = text

    def _guard_fails(self, entry: Entry, layers: Sequence[Any]) -> bool:
        """Whether a call finds something else than the kernel was made for; the report says so."""
        if entry.guard is None:
            return False
        asked = layers if self.target is not None else (None,)
        what = next(filter(None, map(entry.guard.changed, asked)), None)
        if self.target is not None and self.standing[1] and own_forward(self.target) is not self.original:
            what = what or "its forward"
        if what is not None:
            entry.candidate.binding.note(f"{what} {CHANGED}")
        return what is not None

    def _changed(self, index: int) -> int:
        for entry in self.entries:
            if entry.index == index and not entry.guard_failed:
                entry.guard_failed = self._guard_fails(entry, self.modules())
        return 0

    def _blame(self, index: int) -> int:
        for entry in self.entries:
            if entry.index == index:
                entry.candidate.reject("quarantined", "raised while torch.compile traced it")
        return 0

    # The code.

    def rebuild(self) -> None:
        """Write the function anew if what it has to look at has changed."""
        with self.lock:
            for entry in self.entries:
                if entry.function is not None:
                    self._set(**{f"k{entry.index}": entry.function})
                if entry.habits is not None:
                    self._set(**entry.habits.constants, **{f"tick{entry.index}": entry.habits.tick})
                if entry.watch is not None:
                    self._set(**{f"watch{entry.index}": entry.watch.tick})
            tree = self._tree()
            code = self._code
            code.devices, code.several_gpus = self._devices(), self._minds_the_gpu()
            code.holds_layers = any(True for layer in self.modules()[:1] for _ in layer.children())
            text = code.text(tree)
            self._set(**code.constants)
            for variable in (f"_tw_traced_{name}" for name in code.traced):
                if variable not in self.names:
                    self._add_traced(variable)
            if text != self._text:
                self.function.__code__ = self.names.code(text, self._title())
                self._text = text
        self.rebuilt()

    @property
    def text(self) -> str:
        """The source of the function as it stands."""
        return self._text

    def _title(self) -> str:
        return getattr(self.original, "__qualname__", "function")

    def _new_function(self) -> FunctionType:
        function = self.names.function(self._code.text(None), self._title())
        self._call.dress(function, self.original)
        return function

    def _devices(self) -> list[str]:
        alive = (e.device for e in self.entries if e.candidate.rejected is None)
        return sorted({d for d in alive if d is not None}, reverse=True)

    def _tree(self) -> Split | Leaf | None:
        alive = [e for e in self.entries if e.candidate.rejected is None]
        attributes: list[Any] = [("device", (*self._devices(), None))]
        if any(e.minds_gradients for e in alive):
            attributes.append(("grad", (True, False)))
        attributes.append(
            ("training", (True, False) if self.fixed_training is None else (self.fixed_training,))
        )
        attributes.append(("compiling", (True,) if self.fixed_compiling else (True, False)))
        return grow(self.choose, attributes)

    def _minds_the_gpu(self) -> bool:
        """Whether a tensor may lie on another GPU than the current one, where a kernel would be launched."""
        devices = [e.device for e in self.entries if e.candidate.rejected is None]
        return any(d in (None, "cuda") for d in devices) and several_gpus()

    def _add_traced(self, variable: str) -> None:
        """Make a function for calls under a compiler; what it runs is set by :meth:`_load_for_trace`."""
        # No `__name__` in these globals: dynamo would look the kernel up in the module of that name.
        scope: dict[str, Any] = {
            "_tw_original": self.original,
            "_tw_kernel": self.original,
            "_tw_entry": -1,
            "_tw_blame": _constant(self._blame),
        }
        compile_source(self._code.traced_text(False), self._title(), scope)
        function = scope.pop("forward")
        self._call.dress(function, self.original)
        self.names[variable] = function


class _Traces(threading.local):
    """Whether this thread is in a function that dynamo runs while it traces."""

    by_dynamo = False


_traces = _Traces()


def _constant(function: Callable[..., int]) -> Callable[..., int]:
    """A function the compiler runs while it traces, and takes the result for a constant."""

    def run(*args: Any) -> int:
        before, _traces.by_dynamo = _traces.by_dynamo, called_by_dynamo(1)
        try:
            return function(*args)
        finally:
            _traces.by_dynamo = before

    return constant(run)


_FIXED_NAMES: dict[str, Any] = {
    "own": own_forward,
    "random": rescue.random_state,
    "where": device_number,
    "compiling": torch.compiler.is_compiling,
    # True for dynamo alone, in half the time of the one above.
    "by_dynamo": torch.compiler.is_dynamo_compiling,
    "jit": torch._C._get_tracing_state,
    "fx": _symbolic_trace,
    "grad": torch.is_grad_enabled,
    "autocast": autocasting,
    # The same without a frame of Python.
    "any_autocast": torch._C._is_any_autocast_enabled,
    "dtype_key": dtype_key_of,
    "current": current_gpu,
    "there": call_there,
    "astray": on_another_gpu,
    # The globals are the original's, where these may be something else.
    "getattr": getattr,
    "Exception": Exception,
    "type": type,
    "kept": KEPT,
}
"""What the text of every dispatch function names, without ``_tw_``."""
