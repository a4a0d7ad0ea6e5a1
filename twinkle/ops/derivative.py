"""One differentiable function of a forward and a backward: eager, and as an op of ``torch.library``.

An op of ``torch.library`` with a derivative costs four to six times the host time of a bare
``autograd.Function`` (150 us against 26 us on one loaded core, torch 2.13), which is more than a small
kernel takes on the device. So eager calls launch from a ``Function``; compilers and tracers see the op.
:func:`define_op` makes both.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch

from twinkle.codegen import compile_source
from twinkle.ops.failures import Failures, is_failure, made_good
from twinkle.ops.plans import Planned
from twinkle.runtime import runtime

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from torch import Tensor

__all__ = ["Derivative", "apply_of", "define_op", "through_definition"]

_library = torch.library.Library("twinkle", "FRAGMENT")


def apply_of(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """``function.apply`` for plain tensors outside every transform, as `EAGER` says they are.

    Torch's own first looks at each argument for what a transform of ``torch.func`` may have left in it.
    """
    apply: Callable[..., Any] = super(torch.autograd.Function, function).apply
    return apply


class Derivative:
    """How an op is differentiated: what is kept from the forward, and the gradients that follow from it.

    By default the first ``tensors`` inputs are saved, all the others are ``ctx.rest``, and each of the saved
    ones has a gradient. ``ctx`` is that of an autograd ``Function``.

    Args:
        schema: Of the op that computes the gradients, as for ``torch.library.define``.
        backward: Launches its kernel; may return None for a gradient that is not wanted.
        fake: Makes empty gradients of the same shapes, dtypes and strides.
        op_backward: As ``backward`` with results that share no memory, where those of ``backward`` do.
        tensors: How many inputs, from the first one on, are tensors with gradients.
        auxiliary: All results of the forward but the first one are for backward alone.
        keep: ``keep(ctx, inputs, results)`` saves what backward wants, in the place of the default.
        gradients: ``gradients(ctx, backward, *cotangents)`` gives one gradient an input; ``backward`` is the
            function itself or the op, whose absent gradients are empty tensors.
        reference: The definition, of the saved inputs and ``ctx.rest``: for gradients with a graph.
        again: ``again(ctx, *cotangents)`` gives gradients with a graph, in the place of the default.
    """

    def __init__(
        self,
        schema: str,
        backward: Callable[..., Any],
        fake: Callable[..., Any],
        *,
        op_backward: Callable[..., Any] | None = None,
        tensors: int = 0,
        auxiliary: bool = False,
        keep: Callable[[Any, tuple[Any, ...], Any], None] | None = None,
        gradients: Callable[..., tuple[Tensor | None, ...]] | None = None,
        reference: Callable[..., Any] | None = None,
        again: Callable[..., tuple[Tensor | None, ...]] | None = None,
    ) -> None:
        self.schema = schema
        self.backward = backward
        self.op = _define(schema, _without_none(op_backward or backward), _without_none(fake))
        self.auxiliary = auxiliary
        self.keep = keep or self._keep_inputs
        self.keeps_inputs = keep is None
        self.gradients = gradients or _gradients_of_inputs
        self.again = again or self._again_by_reference
        self.tensors = tensors
        self._reference = reference

    def _keep_inputs(self, ctx: Any, inputs: tuple[Any, ...], results: Any) -> None:
        ctx.save_for_backward(*inputs[: self.tensors], *(results[1:] if self.auxiliary else ()))
        ctx.rest = inputs[self.tensors :]

    def _again_by_reference(self, ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        assert self._reference is not None
        definition = functools.partial(_with_rest, self._reference, ctx.rest)
        found = through_definition(definition, ctx.saved_tensors[: self.tensors], cotangents)
        return (*found, *[None] * len(ctx.rest))

    def set_up(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """The op's part of ``keep``."""
        if self.auxiliary:
            ctx.set_materialize_grads(False)
            ctx.mark_non_differentiable(*output[1:])
        self.keep(ctx, inputs, output)

    def of_op(self, ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradients, computed by the op."""
        if self.auxiliary:
            if cotangents[0] is None:
                return (None,) * len(ctx.needs_input_grad)
            cotangents = cotangents[:1]
        return self.gradients(ctx, self.op, *cotangents)


def define_op(
    name: str,
    schema: str,
    forward: Callable[..., Any],
    fake: Callable[..., Any],
    derivative: Derivative,
    *,
    planned: bool = True,
) -> tuple[Callable[..., Any], Any, Callable[..., Any]]:
    """Make one differentiable function of a forward and a backward: eager, and as an op of ``twinkle``.

    Args:
        name: Of the step in a graph of autograd.
        schema: Of the op, as for ``torch.library.define``.
        forward: Launches the kernel.
        fake: Makes empty results of the same shapes, dtypes and strides.
        derivative: How it is differentiated.
        planned: Forward and backward are functions as :class:`twinkle.ops.plans.Planned` takes them.

    Returns:
        The function for plain tensors outside every transform (see :func:`apply_of`), which returns the
        first result alone where the others are auxiliary; the op; and the forward alone, for such tensors
        where nothing is to be differentiated.
    """
    gradients, again = derivative.gradients, derivative.again
    ready = Planned(forward, schema, planned=planned)
    backward = Planned(derivative.backward, derivative.schema, planned=planned).call
    folder = forward.__module__.split(".")[2]
    op = _define(schema, forward, fake, setup=derivative.set_up, backward=derivative.of_op)

    def eager_backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            return again(ctx, *cotangents)
        try:
            return gradients(ctx, backward, *cotangents)
        except Exception as error:
            if not is_failure(error):
                raise
            runtime.of(Failures).tell(folder, error)
        return made_good(again, ctx, *cotangents)

    members = {
        "forward": staticmethod(_eager_forward(ready, derivative)),
        "backward": staticmethod(eager_backward),
    }
    function = type(torch.autograd.Function)(name, (torch.autograd.Function,), members)
    return apply_of(function), op, ready.call


def _eager_forward(ready: Planned, derivative: Derivative) -> Callable[..., Any]:
    """The forward of the autograd ``Function``, written in one piece: calls cost most of it."""
    names = [*ready.parameters]
    scope = {**ready.scope, "_tw_keep": derivative.keep}
    kept = [f"_tw_keep(ctx, ({', '.join(names)},), results)"]
    if derivative.keeps_inputs:
        count = derivative.tensors
        saved = [*names[:count], *(["*results[1:]"] if derivative.auxiliary else [])]
        rest = "".join(f"{name}, " for name in names[count:])
        kept = [f"ctx.save_for_backward({', '.join(saved)})", f"ctx.rest = ({rest})"]
    lines = [
        f"def forward(ctx, {', '.join(names)}):",
        f"    results = {ready.result}",
        *[f"    {line}" for line in kept],
        f"    return results{'[0]' if derivative.auxiliary else ''}",
        "",
    ]
    compile_source("\n".join(lines), f"forward of {ready.function.__name__}", scope)
    return scope["forward"]  # type: ignore[no-any-return]


def _gradients_of_inputs(ctx: Any, function: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
    found = function(*cotangents, *ctx.saved_tensors, *ctx.rest)
    return (*(found if isinstance(found, tuple) else (found,)), *[None] * len(ctx.rest))


def _with_rest(reference: Callable[..., Any], rest: tuple[Any, ...], *tensors: Tensor | None) -> Any:
    return reference(*tensors, *rest)


def _without_none(backward: Callable[..., Any]) -> Callable[..., Any]:
    """The same with an empty tensor for every None: an op returns tensors."""

    def call(*inputs: Any) -> Any:
        found = backward(*inputs)
        if not isinstance(found, tuple):
            return found
        like = next(x for x in inputs if isinstance(x, torch.Tensor))
        return tuple(like.new_empty(0) if x is None else x for x in found)

    return call


def _define(
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    setup: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Any:
    """Register an op for the devices that Triton serves; without ``backward`` its derivative is refused."""
    name = schema.split("(", 1)[0]
    full = f"twinkle::{name}"
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for kind in ("cuda", "cpu"):
        torch.library.impl(full, kind, implementation, lib=_library)
    torch.library.register_fake(full, fake, lib=_library)

    def refuse(ctx: Any, *gradients: Tensor) -> None:
        raise NotImplementedError(
            f"twinkle::{name} has no derivative: as ops, embedded kernels can be differentiated once. "
            "For second derivatives under a compiler run with TWINKLE_KERNELS=off."
        )

    torch.library.register_autograd(
        full, backward if backward is not None else refuse, setup_context=setup, lib=_library
    )
    return getattr(torch.ops.twinkle, name).default


def through_definition(
    function: Callable[..., Any], inputs: tuple[Tensor | None, ...], gradients: tuple[Tensor | None, ...]
) -> list[Tensor | None]:
    """Gradients that can be differentiated again: autograd's own, of the definition.

    Backward of a `Function` calls this when its caller asked for a graph of it (``create_graph=True``).

    Args:
        function: The definition, of these inputs alone.
        inputs: What the forward was given; None stays None.
        gradients: Of the results; None for a result without.

    Returns:
        One gradient an input, None where none is wanted.
    """
    # Aliases, so that an input that depends on another one is not followed any further.
    aliases = [None if x is None else x.view_as(x) for x in inputs]
    wanted = [x for x in aliases if x is not None and x.requires_grad]
    results = function(*aliases)
    results = results if isinstance(results, tuple) else (results,)
    pairs = [(y, g) for y, g in zip(results, gradients, strict=True) if g is not None and y.requires_grad]
    found: Any = (None,) * len(wanted)
    if pairs and wanted:
        outs, grads = zip(*pairs, strict=True)
        found = torch.autograd.grad(outs, wanted, grads, create_graph=True, allow_unused=True)
    left = iter(found)
    return [next(left) if x is not None and x.requires_grad else None for x in aliases]
