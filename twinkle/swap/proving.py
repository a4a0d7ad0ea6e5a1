"""A candidate is proven where it stands: at its first call, or before a compiler traces it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from twinkle.swap.tensors import first_tensor

if TYPE_CHECKING:
    from twinkle.proof.compare import Verdict
    from twinkle.swap.dispatch import Dispatch
    from twinkle.swap.entry import Entry, Moment

__all__ = ["prove_ahead", "prove_call"]


def prove_call(
    dispatch: Dispatch, entry: Entry, args: tuple[Any, ...], kwargs: dict[str, Any], moment: Moment
) -> bool:
    """Compare a kernel with the original on the inputs of a call; false when it is out.

    An embedded kernel may stand in layers of other sizes as well: it is compared there too, on
    made-up inputs.
    """
    module, plain_class = dispatch.subject(args)
    values = (*args, *kwargs.values())
    ours = entry.candidate.kernel.chosen_by == "twinkle"
    verdict = _prove(
        dispatch,
        entry,
        args if module is None else args[1:],
        kwargs,
        module,
        plain_class,
        # A frozen layer gets no gradient today, and one of the same kind behind it may.
        moment.grad and (ours or _flows(module, values)),
    )
    if verdict.ok and ours and module is not None:
        from twinkle.proof.first_use import others_like

        tensor = first_tensor(values[1:])
        dtype = tensor.dtype if tensor is not None and tensor.is_floating_point() else None
        for other in others_like(module, dispatch.alike()):
            there = _prove_made_up(dispatch, entry, other, moment, dtype, None)
            if there is not None and not there.ok:
                verdict = there
                break
    entry.candidate.judged(verdict, grad=moment.grad, kind=moment.kind)
    return entry.candidate.rejected is None


def prove_ahead(dispatch: Dispatch, entry: Entry, moment: Moment, dtype: torch.dtype | None) -> bool:
    """Compare a kernel with the original on made-up inputs, where they can be made up; false when it is out.

    Args:
        dispatch: Where it stands.
        entry: Loaded.
        moment: The one it is about to be traced for.
        dtype: Of the first input.
    """
    from torch.utils._python_dispatch import _disable_current_modes

    from twinkle.proof.first_use import others_like

    if entry.function is None or entry.candidate.kernel.chosen_by != "twinkle":
        return True
    modules: list[nn.Module] = others_like(None, dispatch.alike())
    with torch.inference_mode(False), _disable_current_modes():
        verdicts = [
            _prove_made_up(dispatch, entry, module, moment, dtype, moment.device)
            for module in (modules if dispatch.trace_arguments() else [None])
        ]
    made = [verdict for verdict in verdicts if verdict is not None]
    if made:
        worst = next((verdict for verdict in made if not verdict.ok), made[0])
        entry.candidate.judged(worst, grad=moment.grad, kind=moment.kind)
    return entry.candidate.rejected is None


def _prove_made_up(
    dispatch: Dispatch,
    entry: Entry,
    module: nn.Module | None,
    moment: Moment,
    dtype: torch.dtype | None,
    device: str | None,
) -> Verdict | None:
    from twinkle.proof.first_use import inputs_for

    source = entry.candidate.kernel.source
    given = inputs_for(source, dispatch.original, module, dtype=dtype, device=device)
    if given is None:
        return None
    plain_class = dispatch.subject((module,))[1]
    return _prove(dispatch, entry, given, {}, module, plain_class, moment.grad)


def _prove(
    dispatch: Dispatch,
    entry: Entry,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    module: nn.Module | None,
    plain_class: type | None,
    backward: bool,
) -> Verdict:
    from twinkle.proof.first_use import prove

    assert entry.function is not None
    return prove(
        entry.candidate.kernel.source,
        dispatch.original,
        entry.function,
        args,
        kwargs,
        module=module,
        plain_class=plain_class,
        backward=backward,
        recall=entry.candidate.recall,
    )


def _flows(module: nn.Module | None, values: tuple[Any, ...]) -> bool:
    """A gradient is recorded for the call."""
    if module is not None and any(parameter.requires_grad for parameter in module.parameters()):
        return True
    return any(isinstance(value, torch.Tensor) and value.requires_grad for value in values)
