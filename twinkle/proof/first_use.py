"""The proof of a kernel before it runs for the first time: a kept verdict, else a comparison."""

from __future__ import annotations

import inspect
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from twinkle.match.symbolic.source import function_of_callable
from twinkle.ops.cases import Instance
from twinkle.proof.cache import proofs
from twinkle.proof.cache_key import cache_key
from twinkle.proof.compare import Verdict, compare, dtype_of
from twinkle.proof.inputs import tensors_of
from twinkle.proof.room import NotNow, clean_room, reason_against

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

__all__ = ["Subject", "inputs_for", "proof_tokens", "prove", "prove_ahead", "prove_at_call"]

_TOKENS = 256
"""Tokens of each of at most two sequences: enough for every branch of a kernel but those on the width, and
next to nothing in a first step."""
_TOKENS_ON_CPU = 32
_AHEAD = (2, 64)  # Sequences and tokens of made-up inputs.
_MOST_SHAPES = 4


class Subject(NamedTuple):
    """A kernel in the place of its original: what a proof has to know besides the call.

    Attributes:
        source: Where the kernel comes from.
        original: The function that it replaces, as :func:`twinkle.proof.compare.compare` takes it.
        kernel: The kernel as a function with the same arguments.
        layer_class: The class, without Twinkle, of the layers that it stands in; None for a function.
        layers: Those layers.
        recall: A kept verdict will do.
        chosen_by_twinkle: The kernel is an embedded one, and not the choice of a user.
        every_mode: It runs in training and in inference.
    """

    source: Any
    original: Callable[..., Any]
    kernel: Callable[..., Any]
    layer_class: type | None = None
    layers: Sequence[nn.Module] = ()
    recall: bool = False
    chosen_by_twinkle: bool = False
    every_mode: bool = True


def prove_at_call(subject: Subject, args: Sequence[Any], kwargs: Mapping[str, Any], *, grad: bool) -> Verdict:
    """Compare a kernel with its original on the inputs of a call.

    An embedded kernel may stand in layers of other sizes as well: it is compared there too, on
    made-up inputs. Layers of another dtype, or on another device, are compared when they are called.

    Args:
        subject: The kernel and where it stands.
        args: The arguments of the call, the layer first where there is one.
        kwargs: Its keyword arguments.
        grad: Gradients are recorded.

    Returns:
        The first verdict that is not ok, else that of the call. It is pending where no comparison can be
        made now.
    """
    embedded = subject.chosen_by_twinkle
    module = args[0] if subject.layer_class is not None else None
    inputs = args if module is None else args[1:]
    # A frozen layer gets no gradient today, and one of the same class behind it may.
    backward = grad and (embedded or _needs_gradients(module, (*inputs, *kwargs.values())))
    verdict = _prove(subject, inputs, kwargs, module, backward)
    if not verdict.ok or not embedded or module is None:
        return verdict
    tensor = next(iter(tensors_of((tuple(inputs), dict(kwargs)))), None)
    dtype = tensor.dtype if tensor is not None and tensor.is_floating_point() else None
    alike = [layer for layer in subject.layers if _memory_of(layer) == _memory_of(module)]
    for layer in _of_other_shapes(module, alike):
        there = _prove_made_up(subject, layer, grad, dtype, None)
        if there is not None and not there.ok:
            return there
    return verdict


def prove_ahead(
    subject: Subject, *, grad: bool, dtype: torch.dtype | None, device: str | None
) -> Verdict | None:
    """Compare an embedded kernel with its original on made-up inputs, before a compiler traces it.

    Args:
        subject: The kernel and where it stands.
        grad: Compare the gradients as well.
        dtype: Of the inputs; that of the parameters by default.
        device: Of the inputs, where there are no parameters.

    Returns:
        The first verdict that is not ok, else the first; None where no inputs could be made up.
    """
    if not subject.chosen_by_twinkle:
        return None
    layers: list[Any] = [None]
    if subject.layers:
        # Nothing says which layer is traced; one of another dtype is not called with this one.
        alike = [layer for layer in subject.layers if dtype in (None, dtype_of((), layer))]
        layers = _of_other_shapes(None, alike or subject.layers)
    verdicts = [_prove_made_up(subject, layer, grad, dtype, device, traced=True) for layer in layers]
    made = [verdict for verdict in verdicts if verdict is not None]
    return next((verdict for verdict in made if not verdict.ok), made[0] if made else None)


def _prove_made_up(
    subject: Subject,
    module: nn.Module | None,
    grad: bool,
    dtype: torch.dtype | None,
    device: str | None,
    *,
    traced: bool = False,
) -> Verdict | None:
    try:
        with clean_room(traced=traced):
            inputs = inputs_for(subject.source, subject.original, module, dtype=dtype, device=device)
    except NotNow as reason:
        return Verdict.not_yet(reason)
    return None if inputs is None else _prove(subject, inputs, {}, module, grad, traced=traced)


def _prove(
    subject: Subject,
    inputs: Sequence[Any],
    kwargs: Mapping[str, Any],
    module: nn.Module | None,
    backward: bool,
    *,
    traced: bool = False,
) -> Verdict:
    return prove(
        subject.source,
        subject.original,
        subject.kernel,
        inputs,
        kwargs,
        module=module,
        plain_class=subject.layer_class,
        backward=backward,
        recall=subject.recall,
        traced=traced,
        flips=subject.every_mode,
    )


def _needs_gradients(module: nn.Module | None, values: Iterable[Any]) -> bool:
    """Whether a parameter or an input requires a gradient."""
    if module is not None and any(parameter.requires_grad for parameter in module.parameters()):
        return True
    return any(isinstance(value, torch.Tensor) and value.requires_grad for value in values)


def prove(
    source: Any,
    original: Callable[..., Any],
    kernel: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    module: nn.Module | None = None,
    plain_class: type | None = None,
    backward: bool = False,
    recall: bool = False,
    traced: bool = False,
    flips: bool = True,
) -> Verdict:
    """Compare a kernel with its original on given inputs, or recall a verdict.

    Verdicts on embedded kernels are kept from one process to the next; code of the user has no version
    that they could be kept by.

    Args:
        source: Where the kernel comes from.
        original: The function that it replaces; with ``module`` it takes that first.
        kernel: The same for the kernel.
        args: The arguments, without the module.
        kwargs: The keyword arguments.
        module: The layer, when they are ``forward`` functions.
        plain_class: The class of the layer without Twinkle.
        backward: Compare the gradients of the inputs and parameters as well.
        recall: Take a kept verdict where there is one.
        traced: The inputs are made up for a compiler's trace.
        flips: The kernel is to be right in training and in inference.

    Returns:
        The verdict, with its date when it is a kept one; a pending one where no comparison can be made now.
    """
    # Before a kept verdict is looked for: what a transform shows of a tensor is not what the kernel gets.
    reason = reason_against(tensors_of((tuple(args), dict(kwargs))), traced=traced)
    if reason is not None:
        return Verdict.not_yet(reason)
    key = None
    if _is_ours(source):
        with torch._C.DisableTorchFunctionSubclass():  # a tensor of a class of its own may count these looks
            key = cache_key(source, args, kwargs, module=module, backward=backward)
    if recall and key is not None:
        known = proofs().recall(key)
        if known is not None:
            return known
    embedded = source.kind == "embedded"
    verdict = compare(
        original,
        kernel,
        args,
        kwargs,
        module=module,
        plain_class=plain_class,
        backward=backward,
        rows=_tokens((tuple(args), dict(kwargs)), module) if embedded else None,
        traced=traced,
        extent=_extent((tuple(args), dict(kwargs)), module) if embedded else "full",
        flips=flips,
    )
    if key is not None:
        proofs().keep(key, verdict)
    return verdict


def _tokens(inputs: Any, module: nn.Module | None) -> int:
    return proof_tokens(_tensors_at_hand(inputs, module))


def _extent(inputs: Any, module: nn.Module | None) -> str:
    """How much is derived from the call of an embedded kernel: `twinkle verify` and its tests do the rest."""
    on_cpu = all(tensor.device.type == "cpu" for tensor in _tensors_at_hand(inputs, module))
    return "light" if on_cpu else "brief"


def _tensors_at_hand(inputs: Any, module: nn.Module | None) -> list[torch.Tensor]:
    return tensors_of(inputs) or (list(module.parameters()) if module is not None else [])


def proof_tokens(tensors: Iterable[torch.Tensor]) -> int:
    """How many tokens a proof compares: fewer on a CPU, where each one costs as much as one of the step."""
    return _TOKENS if any(tensor.device.type != "cpu" for tensor in tensors) else _TOKENS_ON_CPU


def inputs_for(
    source: Any,
    original: Callable[..., Any],
    module: nn.Module | None,
    *,
    dtype: torch.dtype | None,
    device: str | torch.device | None,
) -> tuple[Any, ...] | None:
    """Make up arguments for an embedded kernel that was never called, from the facts of its source.

    Args:
        source: Where the kernel comes from.
        original: Its arguments are those of this function.
        module: The layer, which comes first, for a layer.
        dtype: Of the inputs; that of the parameters by default.
        device: Of the inputs, where there are no parameters.

    Returns:
        The arguments without the module, or None where the op does not say how they are made.
    """
    name = f"twinkle.ops.{getattr(source, 'op', '')}.samples"
    if not _is_ours(source) or find_spec(name) is None:
        return None
    parameters = [*module.parameters()] if module is not None else []
    if parameters:
        device = parameters[0].device
    device = torch.device(device or "cpu")
    generator = torch.Generator(device).manual_seed(0)
    make = getattr(import_module(name), "inputs", None)
    if make is None:
        return None
    dtype = dtype or dtype_of((), module)
    values = make(Instance(source.variant, source.facts, module, _AHEAD, dtype, generator))
    if values is None:
        return None
    named = {source.facts[role]: value for role, value in values.items() if role in source.facts}
    if module is None:
        # `kernels` puts a layer that takes anything in the place of the functions it decorates.
        original = function_of_callable(original) or original
    parameters_of = list(inspect.signature(original).parameters.values())[0 if module is None else 1 :]
    if not named.keys() <= {parameter.name for parameter in parameters_of}:
        return None
    given: list[Any] = []
    for parameter in parameters_of:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if parameter.name in named:
            given.append(named[parameter.name])
        elif parameter.default is not parameter.empty:
            given.append(parameter.default)
        else:
            return None
    return tuple(given)


def _is_ours(source: Any) -> bool:
    return source.kind == "embedded" and hasattr(source, "op")


def _of_other_shapes(module: nn.Module | None, among: Iterable[nn.Module]) -> list[nn.Module]:
    """Layers whose parameters have other shapes or dtypes than those of ``module``, one for each of these.

    A class may stand in a model in several sizes: norms of the hidden states and of the heads, say.
    """
    seen = {_shape_of(module)} if module is not None else set()
    found: list[nn.Module] = []
    for other in among:
        shape = _shape_of(other)
        if shape in seen or len(found) == _MOST_SHAPES:
            continue
        seen.add(shape)
        if _is_whole(other):
            found.append(other)
    return found


def _memory_of(module: nn.Module) -> set[tuple[torch.dtype, torch.device]]:
    """The dtypes and devices of the parameters of a layer."""
    return {(p.dtype, p.device) for p in module.parameters()}


def _shape_of(module: nn.Module) -> tuple[Any, ...]:
    return tuple((p.shape, p.dtype, p.device) for p in module.parameters())


def _is_whole(module: nn.Module) -> bool:
    """Whether the parameters of a layer are at hand: neither sharded nor on ``meta``."""
    return all(
        type(p) in (nn.Parameter, torch.Tensor)
        and p.device.type != "meta"
        and not (p.numel() and p.untyped_storage().size() == 0)
        for p in tensors_of(list(module.parameters()))
    )
