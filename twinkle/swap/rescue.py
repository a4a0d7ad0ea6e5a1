"""What happens when a kernel fails: the original completes the call, and the kernel is taken out.

That holds at every call. The text of the dispatch function (:mod:`twinkle.swap.dispatch_code`) comes here
where a kernel raises, or gives a result of another shape or dtype than those before. The original runs on
what the call was given where that is as it was: arguments by their versions, random numbers put back. At the
first run of a kernel that nobody compared nothing of it is known: arguments are kept, and put back.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only

from twinkle.errors import KernelError
from twinkle.ops.cuda_graphs import is_capturing
from twinkle.ops.failures import is_failure
from twinkle.proof.compare import dtype_of
from twinkle.proof.results import Parts, taken_apart
from twinkle.proof.room import Generators, clean_room, is_recomputing, reason_against
from twinkle.proof.runs import Given, Result, run
from twinkle.proof.twin import Held
from twinkle.swap.backward import function_behind, guard_backward
from twinkle.swap.candidate import explain
from twinkle.swap.habits import Habits, described
from twinkle.swap.tensors import call_there, version_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from twinkle.swap.dispatch import Dispatch
    from twinkle.swap.entry import Entry

__all__ = ["Failure", "complete", "excuse", "first_run", "guarded_call", "inspect_result", "random_state"]

_NO_MEMORY = (MemoryError, torch.OutOfMemoryError)
_MOST_KEPT = 1 << 26
"""Bytes of weights and buffers that are kept at a first run; those of larger layers are looked at alone."""
_MOST_TRIES = 3
_set_versions: Any = torch._C._autograd._unsafe_set_version_counter


class Failure(NamedTuple):
    """A failure that the original makes up for; it holds no exception, whose frames hold tensors.

    Attributes:
        text: What happened.
        counts: The kernel is to be taken out for it, once the original has done better.
    """

    text: str
    counts: bool


def excuse(
    dispatch: Dispatch,
    entry: Entry,
    error: Exception,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    written: Sequence[str] = (),
    first: bool = False,
) -> Failure:
    """Whether the original may make up for a kernel that raised; raises where it may not.

    Args:
        dispatch: The dispatch.
        entry: The kernel.
        error: What it raised.
        args: The arguments of the call.
        kwargs: Its keyword arguments.
        written: What the kernel had written to before it raised.
        first: It was its first run.

    Raises:
        Exception: ``error``, where it is the program's own affair or the candidate is ``strict``.
        KernelError: Something was written, so that the original would compute something else.
    """
    candidate = entry.candidate
    # What a source lets through whose kernels have guards of their own is the program's affair.
    guarded = getattr(candidate.kernel.source, "guarded", False)
    if candidate.strict or guarded or not is_failure(error):
        raise error
    text = f"raised at its first call: {explain(error)}" if first else f"raised: {explain(error)}"
    if written:
        what = f"{text}; it had written to {', '.join(written)}, so that the original cannot make up for it"
        candidate.reject("quarantined", what)
        if isinstance(error, _NO_MEMORY):
            raise error
        raise KernelError(f"{_name(entry)} {what}") from error
    tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
    # Of a call that has no values in memory, or that a transform sees, nothing follows for real ones.
    return Failure(text, is_recomputing() or reason_against(tensors) is None)


def complete(
    dispatch: Dispatch, entry: Entry, failure: Failure, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    """Run the original in the place of a kernel that failed, and take the kernel out.

    What the original raises is the program's own affair: then the kernel is not to blame.
    """
    result = dispatch.standing_function()(*args, **kwargs)
    if failure.counts:
        entry.candidate.reject("quarantined", failure.text)
    return result


def guarded_call(
    dispatch: Dispatch,
    entry: Entry,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    function: Callable[..., Any] | None = None,
) -> Any:
    """A call of a kernel that ran before, where the text of the dispatch function does not make it.

    Args:
        dispatch: The dispatch.
        entry: The kernel.
        args: The arguments of the call.
        kwargs: Its keyword arguments.
        function: What the kernel is for calls of this size; by default that of the entry.
    """
    function = function or entry.function
    assert function is not None
    written = _Versions(dispatch, args, kwargs)
    state = random_state() if entry.habits is not None and entry.habits.draws else None
    try:
        return call_there(function, args, kwargs)
    except Exception as error:
        failure = excuse(dispatch, entry, error, args, kwargs, written=written.changed())
    put_back(state)
    return complete(dispatch, entry, failure, args, kwargs)


def first_run(dispatch: Dispatch, entry: Entry, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a kernel that never ran: what it does is noted, and where it raises nothing is left of it."""
    assert entry.function is not None
    source = entry.candidate.kernel.source
    failure = None
    if source.kind == "embedded":
        # It writes to nothing of the program's and draws nothing, and its launchers make its results.
        try:
            result = call_there(entry.function, args, kwargs)
        except Exception as error:
            failure = excuse(dispatch, entry, error, args, kwargs, first=True)
        if failure is not None:
            return complete(dispatch, entry, failure, args, kwargs)
        dispatch.ran(entry)
        return result
    tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
    kept = None
    if reason_against(tensors) is None:
        kept = _Kept(dispatch, args, kwargs, copies=not entry.candidate.proofs.number)
    try:
        result = call_there(entry.function, *(kept.given if kept is not None else (args, kwargs)))
    except Exception as error:
        written = kept.put_back() if kept is not None else ()
        failure = excuse(dispatch, entry, error, args, kwargs, written=written, first=True)
    if failure is not None:
        return complete(dispatch, entry, failure, args, kwargs)
    if kept is None:
        entry.candidate.mark_active()
        entry.candidate.binding.has_run()
        return result
    result = kept.handed_over(result)
    entry.habits = kept.habits(result)
    dispatch.ran(entry)
    if entry.habits.own_backward is not None:
        guard_backward(dispatch, entry, result, args, kwargs)
    return result


def inspect_result(
    dispatch: Dispatch,
    entry: Entry,
    result: Any,
    written: Sequence[str],
    state: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Decide on a result that is not as those before it: the original is asked, on copies.

    Args:
        dispatch: The dispatch.
        entry: The kernel.
        result: What it gave.
        written: The arguments that it wrote to, where it never did before.
        state: The random numbers before the call, where it draws some.
        args: The arguments of the call.
        kwargs: Its keyword arguments.

    Returns:
        The result, where the original gives one of that form; else what the original gives.

    Raises:
        KernelError: The kernel wrote to an argument that the original leaves alone.
    """
    habits = entry.habits
    assert habits is not None
    theirs = _original_on_copies(dispatch, args, kwargs)
    given = dispatch.given(args, kwargs)
    if theirs is None:
        entry.unsettled += 1
        if entry.unsettled >= _MOST_TRIES and habits.learn(result, given):
            dispatch.rebuild()
        return result
    candidate = entry.candidate
    if written and not any(theirs.wrote[: theirs.arguments]):
        what = f"wrote to {', '.join(written)}, which the original leaves as it is"
        candidate.reject("quarantined", what)
        raise KernelError(f"{_name(entry)} {what}; the call cannot be made good")
    if _form(taken_apart(result)) == _form(theirs.parts):
        habits.writes = habits.writes or bool(written)
        habits.learn(result, given)
        dispatch.rebuild()
        return result
    what = f"gave {described(result)} where the original gives {_described_parts(theirs)}"
    if candidate.strict:
        candidate.reject("quarantined", what)
        raise KernelError(f"{_name(entry)} {what}")
    del result
    put_back(state)
    return complete(dispatch, entry, Failure(what, True), args, kwargs)


def random_state() -> list[tuple[torch.Generator, Tensor]]:
    """The random numbers of torch as they are, for kernels that draw some: 1.2 us on a CPU."""
    generators = [torch.default_generator]
    if torch.cuda.is_initialized() and not is_capturing():
        generators.append(torch.cuda.default_generators[torch.cuda.current_device()])
    return [(generator, generator.get_state()) for generator in generators]


def put_back(state: list[tuple[torch.Generator, Tensor]] | None) -> None:
    """Bring random numbers back to a state."""
    for generator, numbers in state or ():
        generator.set_state(numbers)


class _Versions:
    """How often the tensors of a call were written to when this was made."""

    def __init__(self, dispatch: Dispatch, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = dispatch.given(args, kwargs)
        self._tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
        if dispatch.target is not None:
            self._tensors.update(_state_of(args[0]))
        self._versions = {name: version_of(tensor) for name, tensor in self._tensors.items()}

    def changed(self) -> list[str]:
        """The names of those that were written to since."""
        return [name for name, tensor in self._tensors.items() if version_of(tensor) != self._versions[name]]


class _Kept:
    """What a kernel may change at its first run, so that it can be put back.

    An argument with a history is given to it as a copy: autograd would go through what is written to it, and
    no such step can be taken back. Of others the values are kept, and those of small layers.

    Attributes:
        given: The arguments for the kernel.
    """

    def __init__(
        self, dispatch: Dispatch, args: tuple[Any, ...], kwargs: dict[str, Any], *, copies: bool
    ) -> None:
        self._dispatch = dispatch
        self._call = (args, kwargs)
        self._generators = Generators()
        self._versions = _Versions(dispatch, args, kwargs)
        self._twins: dict[int, tuple[Tensor, Tensor]] = {}
        self._values: list[tuple[Tensor, Tensor, int | None]] = []
        self.given: tuple[tuple[Any, ...], dict[str, Any]] = self._call
        if copies:
            try:
                self._copy(args)
            except _NO_MEMORY:  # what was written to is seen by its version, and cannot be put back
                self._twins, self._values, self.given = {}, [], self._call

    def _copy(self, args: tuple[Any, ...]) -> None:
        tensors = {id(t): t for t in tree_flatten(self._call)[0] if isinstance(t, Tensor)}
        for tensor in tensors.values():
            if tensor.grad_fn is not None and torch.is_grad_enabled():
                self._twins[id(tensor)] = tensor, tensor.clone()
        layer = [*_state_of(args[0]).values()] if self._dispatch.target is not None else []
        if sum(tensor.nbytes for tensor in layer) > _MOST_KEPT:
            layer = []
        plain = {id(t): t for t in (*tensors.values(), *layer) if id(t) not in self._twins}
        with torch.no_grad():
            self._values = [(t, t.detach().clone(), version_of(t)) for t in plain.values()]
        if self._twins:
            self.given = tree_map_only(Tensor, self._twin_of, self._call)

    def put_back(self) -> list[str]:
        """Put values and random numbers back; returns the names of what was written to and is not."""
        self._generators.rewind()
        for tensor, values, version in self._values:
            with contextlib.suppress(
                RuntimeError
            ):  # of a layout without strides, which is named if it changed
                if version_of(tensor) == version and torch.equal(tensor, values):
                    continue
                if tensor.grad_fn is not None:
                    tensor.detach_()
                with torch.no_grad():
                    _once(tensor.data).copy_(_once(values, like=tensor))
                if version is not None:
                    _set_version(tensor, version)
        return self._versions.changed()

    def handed_over(self, result: Any) -> Any:
        """The result, after what the kernel did to copies was done to the arguments as well."""
        for tensor, twin in self._twins.values():
            if twin._version:
                tensor.copy_(twin)
        own = {id(twin): tensor for tensor, twin in self._twins.values()}
        if isinstance(result, Tensor):
            return own.get(id(result), result)
        if type(result) in (tuple, list) and any(id(part) in own for part in result):
            return type(result)(own.get(id(part), part) for part in result)
        return result

    def habits(self, result: Any) -> Habits:
        """What the run shows of the kernel."""
        args, kwargs = self._call
        given = self._dispatch.given(args, kwargs)
        habits = Habits()
        changed = self._versions.changed()
        habits.tensors = tuple(name for name, value in given.items() if isinstance(value, Tensor))
        habits.inference = any(given[name].is_inference() for name in habits.tensors)
        habits.writes = any(name in changed for name in habits.tensors)
        first = self._dispatch.first
        habits.state = tuple(
            f"{first}{name.removeprefix('self')}"
            for name in changed
            if name not in given and all(map(str.isidentifier, name.split(".")))
        )
        habits.draws = self._generators.moved()
        habits.learn(result, given)
        habits.own_backward = function_behind(result)
        return habits

    def _twin_of(self, tensor: Tensor) -> Tensor:
        return self._twins[id(tensor)][1] if id(tensor) in self._twins else tensor


def _state_of(layer: Any) -> dict[str, Tensor]:
    """The parameters and buffers of a layer, by their expressions."""
    if not isinstance(layer, nn.Module):
        return {}
    return {f"self.{name}": tensor for name, tensor in (*layer.named_parameters(), *layer.named_buffers())}


def _set_version(tensor: Tensor, version: int) -> None:
    try:
        _set_versions((tensor,), (version,))
    except TypeError:  # torch before 2.7
        _set_versions(tensor, version)


def _once(tensor: Tensor, like: Tensor | None = None) -> Tensor:
    """A view in which each element of an expanded tensor (or of one ``like`` it) comes once."""
    strides = tensor.stride() if like is None else like.stride()
    return tensor[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in strides)]


def _original_on_copies(dispatch: Dispatch, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Result | None:
    """What the original gives for a call, on copies; None where that cannot be found out now."""
    tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
    module = args[0] if dispatch.target is not None else None
    inputs = (args if module is None else args[1:], kwargs)
    device = next((tensor.device.type for tensor in tensors), "cpu")
    try:
        with clean_room(tensors) as generators:
            given = Given(
                inputs, module, dispatch.target, dtype_of(inputs, module), device, False, generators
            )
            return run(dispatch.original, given, Held(module))
    except Exception:
        return None


def _form(parts: Parts) -> Any:
    """All that a program could go wrong on but numbers."""
    leaves = [(v.shape, v.dtype) if isinstance(v, Tensor) else type(v) for v in parts.leaves]
    return parts.containers, leaves


def _name(entry: Entry) -> str:
    return f"kernel {entry.candidate.binding.kernel!r} of {entry.candidate.binding.target}"


def _described_parts(result: Result) -> str:
    return ", ".join(map(described, result.outputs)) or "nothing"
