"""Comparison of a kernel with its original on the same inputs, measured by the original in higher precision.

The measure is the original's own rounding (:mod:`twinkle.proof.measure`): a kernel that is off by one percent
is caught in bfloat16 as well. Besides numbers, all that a program can tell results apart by is compared
(:mod:`twinkle.proof.results`), and what a run leaves behind in arguments, weights and buffers.

All runs are made on copies, in a room apart from the program (:mod:`twinkle.proof.room`). The call itself is
followed by small ones that are derived from it (:mod:`twinkle.proof.trials`).

Between its forward and its backward the kernel is called twice more, with its first input negated and as it
was: results or saved tensors that live in a buffer shared by all calls are overwritten then, and that shows.
"""

from __future__ import annotations

import contextlib
import math
from typing import TYPE_CHECKING, Any

import torch

from twinkle.ops.plain import at_every_size
from twinkle.proof.inputs import fewer, fewer_sequences, tensors_of
from twinkle.proof.measure import HIGHER_PRECISION, SLACK, row_norms, worst
from twinkle.proof.results import Parts, check_alike, check_memory, detached, equal, taken_apart
from twinkle.proof.room import NotNow, clean_room
from twinkle.proof.runs import Exactly, Given, Result, copied, exactly, on_another_stream, run
from twinkle.proof.trials import Trial, nudged, trials
from twinkle.proof.twin import Held, Twin
from twinkle.proof.verdict import Rejected, Undecided, Verdict, in_a_line

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import nn

__all__ = ["HIGHER_PRECISION", "Verdict", "compare", "dtype_of"]

_MOST_OUT_OF_MEMORY = (MemoryError, torch.OutOfMemoryError)


def compare(
    original: Callable[..., Any],
    kernel: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    module: nn.Module | None = None,
    plain_class: type | None = None,
    backward: bool = False,
    rows: int | None = None,
    traced: bool = False,
    extent: str = "full",
    flips: bool = True,
) -> Verdict:
    """Run a kernel and its original on copies of the same inputs.

    Args:
        original: The function that the kernel replaces; with ``module`` it takes that first.
        kernel: The same for the kernel.
        args: The arguments of the call at hand, without the module.
        kwargs: Its keyword arguments.
        module: The layer, when they are ``forward`` functions.
        plain_class: The class of the layer without Twinkle, for the upcast copy.
        backward: Compare the gradients of the inputs and parameters as well.
        rows: At most so many tokens of at most two sequences, where that can be told from the inputs
            (:func:`twinkle.proof.inputs.fewer`); two sequences as they are where the original does not take
            fewer tokens.
        traced: A compiler's trace asks: see :func:`twinkle.proof.room.reason_against`.
        extent: How much is derived from the call: see :func:`twinkle.proof.trials.trials`.
        flips: The kernel is to be right in training and in inference.

    Returns:
        The verdict; a pending one where the comparison cannot be made.
    """
    tensors = [*tensors_of((tuple(args), dict(kwargs)))]
    try:
        with clean_room(tensors, traced=traced) as generators, at_every_size():
            with torch._C.DisableTorchFunctionSubclass():
                whole = (tuple(args), dict(kwargs))
                dtype, device = dtype_of(whole, module), _device_type(whole)

            def compared(inputs: Any) -> Verdict:
                given = Given(inputs, module, plain_class, dtype, device, backward, generators)
                with torch._C.DisableTorchFunctionSubclass():
                    more = [*trials(inputs, module, backward=backward, extent=extent, flips=flips)]
                return _compare(original, kernel, given, more)

            if rows is None:
                return compared(whole)
            with torch._C.DisableTorchFunctionSubclass():
                cut = fewer(whole, rows)
            try:
                return compared(cut)
            except _NotTaken:
                with torch._C.DisableTorchFunctionSubclass():
                    cut = fewer_sequences(whole)
                return compared(cut)
    except _NotTaken as refused:
        return Verdict(False, in_a_line(refused.error), pending=True)
    except NotNow as reason:
        return Verdict.not_yet(reason)
    except Rejected as rejected:
        return Verdict(False, str(rejected), conclusive=rejected.conclusive)
    except Exception as error:
        return Verdict(False, in_a_line(error), pending=True)


class _NotTaken(Exception):
    """The original raises on the inputs; ``error`` is what it raises."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


def _compare(
    original: Callable[..., Any], kernel: Callable[..., Any], given: Given, more: list[Trial]
) -> Verdict:
    held = Held(given.module)
    try:
        theirs = run(original, given, held)
    except (NotNow, Rejected, *_MOST_OUT_OF_MEMORY):
        raise
    except Exception as error:
        raise _NotTaken(error) from error
    again: list[Any] = []
    try:
        ours = run(
            kernel,
            given,
            held,
            then=lambda *made: again.extend(_called_again(kernel, original, given, held, *made)),
        )
    except (NotNow, Rejected, *_MOST_OUT_OF_MEMORY):
        raise
    except Exception as error:
        raise Rejected(f"it raises {in_a_line(error)}", conclusive=False) from error
    for passed_by, called in zip(ours.hooked, theirs.hooked, strict=True):
        if passed_by != called:
            raise Undecided(
                f"it passes by the hooks, or a forward of its own, of a {called[0]} within the layer"
            )
    _check_writes(ours, theirs)
    if ours.random and not theirs.random:
        raise Rejected("it draws random numbers, and the original does not")
    tried = [_tried(original, kernel, given, trial, held) for trial in more]
    del held
    dtype, backward = given.dtype, given.backward
    with torch.autocast(given.device_type, enabled=False):
        held = Held(given.module, HIGHER_PRECISION[dtype])
        exact, way = _in_higher_precision(original, given, held)
        outputs = _compared("result", ours, theirs, exact, SLACK[dtype])
        gradients = (math.nan, math.nan)
        text = f"error {outputs[0]:.1e} (original {outputs[1]:.1e})"
        if backward:
            gradients = _gradients(ours, theirs, exact, SLACK[dtype])
            text += f", gradients {gradients[0]:.1e} ({gradients[1]:.1e})"
        with torch._C.DisableTorchFunctionSubclass():
            dense = all(tensor.is_contiguous() for tensor in tensors_of(given.inputs))
        check_memory(ours, theirs, dense=dense)
        _compared("second run", ours._replace(parts=Parts([], again)), theirs, exact, SLACK[dtype])
        for trial, pair in zip(more, tried, strict=True):
            if pair is not None:
                _judge(trial, *pair, way, given, held)
    text += f" in {str(dtype).removeprefix('torch.')}"
    return Verdict(True, text, errors=(*outputs, *gradients))


def _in_higher_precision(original: Callable[..., Any], given: Given, held: Held) -> tuple[Result, Exactly]:
    """The original's run in higher precision, and the way in which it was made."""
    error: Exception | None = None
    for way in exactly(original, given.dtype):
        try:
            return way(given, held), way
        except RuntimeError as raised:
            error = raised
    raise error or AssertionError("there is a way")


def _compared(what: str, ours: Result, theirs: Result, exact: Result, slack: float) -> tuple[float, float]:
    containers = theirs.parts.containers
    mine = ours.parts if what == "result" else Parts(containers, ours.outputs)
    check_alike(what, mine, theirs.parts)
    return worst(what, ours.outputs, theirs.outputs, exact.outputs, slack)


def _gradients(ours: Result, theirs: Result, exact: Result, slack: float) -> tuple[float, float]:
    check_alike("gradient", Parts([], ours.gradients), Parts([], theirs.gradients))
    return worst("gradient", ours.gradients, theirs.gradients, exact.gradients, slack)


def _check_writes(ours: Result, theirs: Result) -> None:
    """Compare what the runs wrote to: by number of the tensor, as each may have been written."""
    for number, (mine, other) in enumerate(zip(ours.wrote, theirs.wrote, strict=False)):
        if mine != other:
            writes = "writes" if mine else "does not write"
            what = "its input" if number < theirs.arguments else "a parameter or buffer"
            raise Rejected(f"it {writes} to {what}{'' if mine else ', as the original does'}")
    if (ours.held is None) != (theirs.held is None):
        raise Rejected("it leaves other tensors in its arguments than the original")


def _check_written(ours: Result, theirs: Result, exact: Result, slack: float) -> None:
    """Compare what the runs wrote."""
    wrote = [number for number, written in enumerate(theirs.wrote[: len(exact.state)]) if written]
    if wrote:
        states = [[result.state[number] for number in wrote] for result in (ours, theirs, exact)]
        check_alike("tensor it writes to", Parts([], states[0]), Parts([], states[1]))
        worst("tensor it writes to", states[0], states[1], states[2], slack)
    if ours.held is not None and theirs.held is not None and exact.held is not None:
        check_alike("tensor in its arguments", ours.held, theirs.held)
        worst("tensor in its arguments", ours.held.leaves, theirs.held.leaves, exact.held.leaves, slack)


def _tried(
    original: Callable[..., Any], kernel: Callable[..., Any], given: Given, trial: Trial, held: Held
) -> tuple[Result, Result] | None:
    """Run both on derived inputs; None where one of them does not take these.

    A kernel that raises gives no wrong number: the original makes up for it when it comes to that.
    """
    derived = given._replace(inputs=trial.inputs, how=trial.how)
    stream = on_another_stream if trial.how.aside else contextlib.nullcontext
    try:
        with stream():
            theirs = run(original, derived, held)
    except Exception:
        return None
    try:
        with stream():
            ours = run(kernel, derived, held)
        if trial.how.flipped and theirs.random and ours.random:
            return None  # each has random numbers of its own
        _check_writes(ours, theirs)
    except Rejected as rejected:
        raise Rejected(f"{trial.name}: {rejected}") from None
    except Exception:
        return None
    return ours, theirs


def _judge(trial: Trial, ours: Result, theirs: Result, way: Exactly, given: Given, held: Held) -> None:
    """Compare what both gave for derived inputs."""
    derived = given._replace(inputs=trial.inputs, how=trial.how)
    slack = SLACK[given.dtype]
    try:
        exact = way(derived, held)
    except Exception:
        return  # the original is no measure here
    try:
        check_alike("result", ours.parts, theirs.parts, tied=trial.uneven)
        if trial.uneven:
            _judge_uneven(derived, ours, theirs, exact, way, held)
        else:
            worst("result", ours.outputs, theirs.outputs, exact.outputs, slack)
        _check_written(ours, theirs, exact, slack)
        if trial.how.gradients and given.backward:
            _gradients(ours, theirs, exact, slack)
    except Rejected as rejected:
        raise Rejected(f"{trial.name}: {rejected}") from None


def _judge_uneven(
    given: Given, ours: Result, theirs: Result, exact: Result, way: Exactly, held: Held
) -> None:
    """Compare row by row; what a change by a rounding error changes in the exact result is not counted."""
    slack = SLACK[given.dtype]
    leaves = ours.outputs, theirs.outputs, exact.outputs
    try:
        worst("result", *leaves, slack, [0.0] * len(exact.outputs))
    except Rejected:
        near = given._replace(inputs=nudged(given.inputs, HIGHER_PRECISION[given.dtype]))
        worst("result", *leaves, slack, _noise(way(near, held), exact))


def _noise(nudged_result: Result, exact: Result) -> list[Any]:
    pairs = zip(nudged_result.outputs, exact.outputs, strict=True)
    return [
        row_norms(torch.nan_to_num(a - b, 0.0, 0.0, 0.0))
        if isinstance(b, torch.Tensor) and b.is_floating_point() and b.ndim
        else None
        for a, b in pairs
    ]


def _called_again(
    kernel: Callable[..., Any],
    original: Callable[..., Any],
    given: Given,
    held: Held,
    lead: tuple[nn.Module, ...],
    outputs: list[Any],
) -> list[Any]:
    """Call a kernel again, with its first input negated, and then as the first time.

    Args:
        kernel: The kernel, which gave ``outputs`` for the inputs before.
        original: The function that it replaces.
        given: What both are run on.
        held: The tensors of the layer.
        lead: The copy of the layer that the kernel was called with, for a layer.
        outputs: The results of the first call.

    Returns:
        The results of the last call.

    Raises:
        Rejected: A later call overwrites the results of the first, or the second's own are stale.
    """
    before = [out.detach().clone() if isinstance(out, torch.Tensor) else out for out in outputs]
    args, kwargs = Twin(held, grad=given.backward, negated=True).arguments(given.inputs)
    after = detached(taken_apart(kernel(*lead, *args, **kwargs)).leaves)
    if not equal(detached(outputs), before):
        raise Rejected("a second call overwrites the results of the first: they share a buffer")
    stale = [_close(now, then) for now, then in zip(after, before, strict=False)]
    if any(stale):
        # There are functions that do not see a sign, or not in each result: then the original's are the same.
        theirs = []
        for negated in (True, False):
            _, lead_of_theirs, (args, kwargs) = copied(given, held, negated=negated)
            theirs.append(detached(taken_apart(original(*lead_of_theirs, *args, **kwargs)).leaves))
        if any(is_stale and not _close(*pair) for is_stale, *pair in zip(stale, *theirs, strict=False)):
            raise Rejected("a second call, with other inputs, returns the results of the first")
    given.generators.rewind()
    _, fresh, (args, kwargs) = copied(given, held)
    with torch.no_grad():
        third = detached(taken_apart(kernel(*fresh, *args, **kwargs)).leaves)
    if not equal(detached(outputs), before):
        raise Rejected("a third call overwrites the results of the first: they share a buffer")
    return third


def _close(some: Any, other: Any) -> bool:
    """Whether two tensors differ by no more than a thousandth of their norm; negating an input does more."""
    if not (isinstance(some, torch.Tensor) and isinstance(other, torch.Tensor) and some.is_floating_point()):
        return False
    return some.shape == other.shape and bool((some - other).float().norm() <= 1e-3 * other.float().norm())


def _device_type(inputs: Any) -> str:
    tensors = tensors_of(inputs)
    return tensors[0].device.type if tensors else "cpu"


def dtype_of(inputs: Any, module: nn.Module | None) -> torch.dtype:
    """The dtype that a call computes in: of the first floating input, or parameter where there is none."""
    candidates = [*tensors_of(inputs), *(module.parameters() if module is not None else ())]
    return next((t.dtype for t in candidates if t.dtype in HIGHER_PRECISION), torch.float32)
