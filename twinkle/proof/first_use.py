"""A kernel before it runs for the first time: what is known of it from before, else a comparison."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from twinkle.match.symbolic.source import function_of
from twinkle.ops.cases import Instance
from twinkle.proof.cache import proofs
from twinkle.proof.cache_key import cache_key
from twinkle.proof.compare import Verdict, compare, dtype_of
from twinkle.proof.inputs import tensors_of

__all__ = ["inputs_for", "others_like", "proof_tokens", "prove"]

_TOKENS = 256
"""Tokens of each of at most two sequences: enough for every branch of a kernel but those on the width, and
next to nothing in a first step."""
_TOKENS_ON_CPU = 32
_AHEAD = (2, 64)  # Sequences and tokens of made-up inputs.
_MOST_OTHERS = 4


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
) -> Verdict:
    """Whether a kernel may stand in for its original at a call.

    Verdicts on embedded kernels are kept from one process to the next; code of the user has no version
    that they could be kept by.

    Args:
        source: Where the kernel comes from.
        original: As for :func:`twinkle.proof.compare.compare`, with all that follows.
        kernel: ...
        args: ...
        kwargs: ...
        module: ...
        plain_class: ...
        backward: ...
        recall: Take a verdict from before.

    Returns:
        The verdict, with its date when it is one from before.
    """
    asked = None
    if _is_ours(source):
        asked = cache_key(source, args, kwargs, module=module, backward=backward)
    if recall and asked is not None:
        # With gradients is the stricter question.
        known = proofs().find({**asked, "gradients": True}) or proofs().find(asked)
        if known is not None:
            return known
    verdict = compare(
        original,
        kernel,
        args,
        kwargs,
        module=module,
        plain_class=plain_class,
        backward=backward,
        rows=_tokens((tuple(args), dict(kwargs)), module) if source.kind == "embedded" else None,
    )
    if asked is not None:
        proofs().keep(asked, verdict)
    return verdict


def _tokens(inputs: Any, module: nn.Module | None) -> int:
    return proof_tokens(tensors_of(inputs) or (list(module.parameters()) if module is not None else []))


def proof_tokens(tensors: Iterable[torch.Tensor]) -> int:
    """How many tokens are compared: fewer on a CPU, where each one costs as much as one of the step."""
    return _TOKENS if any(tensor.device.type != "cpu" for tensor in tensors) else _TOKENS_ON_CPU


def inputs_for(
    source: Any,
    original: Callable[..., Any],
    module: nn.Module | None,
    *,
    dtype: torch.dtype | None,
    device: str | torch.device | None,
) -> tuple[Any, ...] | None:
    """Arguments for an embedded kernel that was never called, made up from what its instance is.

    Args:
        source: Where the kernel comes from.
        original: Its arguments are those of this function.
        module: The layer, which comes first, for a layer.
        dtype: Of the inputs; that of the parameters by default.
        device: Of the inputs, where there are no parameters.

    Returns:
        The arguments without the module, or None where nobody knows how to make them up.
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
    values = make(Instance(source.form, source.facts, module, _AHEAD, dtype, generator))
    if values is None:
        return None
    named = {source.facts[role]: value for role, value in values.items() if role in source.facts}
    if module is None:
        # `kernels` puts a layer that takes anything in the place of the functions it decorates.
        original = function_of(original) or original
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


def others_like(module: nn.Module | None, among: Iterable[nn.Module]) -> list[nn.Module]:
    """Layers of other shapes or dtypes than ``module`` (or than any before), one of each kind.

    A class may stand in a model in several sizes: norms of the hidden states and of the heads, say.
    """
    seen = {_shape_of(module)} if module is not None else set()
    found: list[nn.Module] = []
    for other in among:
        shape = _shape_of(other)
        if shape in seen or len(found) == _MOST_OTHERS:
            continue
        seen.add(shape)
        if _is_whole(other):
            found.append(other)
    return found


def _shape_of(module: nn.Module) -> tuple[Any, ...]:
    return tuple((p.shape, p.dtype, p.device) for p in module.parameters())


def _is_whole(module: nn.Module) -> bool:
    """Its parameters are at hand: not sharded, nor on ``meta``."""
    return all(
        type(p) in (nn.Parameter, torch.Tensor)
        and p.device.type != "meta"
        and not (p.numel() and p.untyped_storage().size() == 0)
        for p in tensors_of(list(module.parameters()))
    )
