"""Rotations whose tables any code may have made: when a kernel computes them, and a function that does.

They are recognised by a form (``canonical.py``) that all spellings have on tensors of four dimensions with an
even number of channels. On all other inputs, and wherever the tables are not one row a token, the original
runs.
"""

from __future__ import annotations

import inspect
from importlib import import_module
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from twinkle.codegen import compile_source, def_line

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from twinkle.ops.rotary.reference import RotaryVariant

__all__ = ["columns_of", "flat_columns", "guarded_function", "plan", "real_and_imaginary", "scale_of"]

_TURNED = ("q", "k", "v")
_STATES = {"given": "is not None", "absent": "is None"}


def real_and_imaginary(q: Any, table: Tensor, variant: RotaryVariant) -> tuple[Tensor, Tensor] | None:
    """The parts of a complex table, which are its cosines and sines; None where the product is not computed.

    Args:
        q: The turned tensor.
        table: ``complex64`` or ``complex128``.
        variant: A complex one.
    """
    if table.dtype not in (torch.complex64, torch.complex128) or not isinstance(q, Tensor):
        return None
    result = torch.promote_types(q.dtype, torch.float32) if variant.cast == "none" else None
    if variant.compute == "input" and q.dtype != torch.float32:
        return None  # torch has no complex numbers of bfloat16
    if result is not None and table.dtype == torch.complex128:
        return None  # a result in float64
    pairs = torch.view_as_real(table.resolve_conj())
    return pairs[..., 0], pairs[..., 1]


def columns_of(matrices: Tensor) -> tuple[Any, Any]:
    """Both columns of matrices, ``[..., channels / 2, 2, 2]``; None for others."""
    if matrices.dim() < 4 or matrices.shape[-1] != 2:
        return None, None
    return matrices[..., 0], matrices[..., 1]


def flat_columns(first: Any, second: Any) -> tuple[Tensor, Tensor] | None:
    """The columns of matrices, ``[..., channels / 2, 2]``, as tables of an entry a channel; or None."""
    for column in (first, second):
        if not isinstance(column, Tensor) or column.dim() < 3 or column.shape[-1] != 2:
            return None
    return first.flatten(-2), second.flatten(-2)


def plan(
    q: Tensor, k: Tensor | None, v: Tensor | None, cos: Any, sin: Any, rotary_dim: Any, variant: RotaryVariant
) -> tuple[Tensor, Tensor, bool] | None:
    """The tables as ``[batch or 1, tokens, width]``, and whether tokens stand before heads; else None.

    Args:
        q: ``[batch, heads, tokens, channels]``, or heads and tokens exchanged: the shape of the tables says.
        k: As ``q`` with another number of heads, or None.
        v: As ``k``.
        cos: Anything; a tensor of at most four dimensions that the shape of ``q`` covers makes a plan.
        sin: As ``cos``.
        rotary_dim: How many channels are turned, of a variant that turns the first ones.
        variant: A variant whose tables are given.
    """
    if not isinstance(cos, Tensor) or not isinstance(sin, Tensor) or not isinstance(q, Tensor):
        return None
    if q.dim() != 4 or not 1 < cos.dim() <= 4 or cos.shape != sin.shape or cos.dtype != sin.dtype:
        return None
    if not cos.is_floating_point() or not q.is_floating_point():
        return None
    width, channels = cos.shape[-1], q.shape[-1]
    turned = 2 * width if variant.tables == "half" else width
    if turned % 2 or turned != (channels if variant.part == "all" else rotary_dim) or turned > channels:
        return None
    batch, first, second = (1,) * (4 - cos.dim()) + tuple(cos.shape[:-1])
    if batch not in (1, q.shape[0]) or first not in (1, q.shape[1]) or second not in (1, q.shape[2]):
        return None
    tokens_first = second == 1 and (first != 1 or (q.shape[1] == 1 and q.shape[2] != 1))
    if first != 1 and second != 1:
        return None
    tokens = q.shape[1] if tokens_first else q.shape[2]
    for other in (k, v):
        if other is not None and not _is_like(other, q, 1 if tokens_first else 2):
            return None
    shape = (batch, first if tokens_first else second, width)
    cos, sin = cos.reshape(shape), sin.reshape(shape)
    if shape[1] != tokens:
        cos, sin = cos.expand(-1, tokens, -1), sin.expand(-1, tokens, -1)
    return cos, sin, tokens_first


def scale_of(
    scale: Any,
    q: Tensor,
    tables: tuple[Tensor, Tensor, bool],
    rotary_dim: Any,
    variant: RotaryVariant,
) -> Tensor | None:
    """A factor as ``[batch or 1, tokens, width]``, channels adjacent; None where it is no such factor.

    Args:
        scale: A number, or a tensor as the tables are.
        q: What is turned.
        tables: As `plan` gives them.
        rotary_dim: As for `plan`.
        variant: A scaled one.
    """
    cos, _, tokens_first = tables
    if isinstance(scale, int | float) and not isinstance(scale, bool):
        # Torch multiplies with a number in float32 and rounds once.
        return torch.full((1, 1, cos.shape[-1]), scale, dtype=torch.float32, device=q.device).expand(
            1, cos.shape[1], -1
        )
    if not isinstance(scale, Tensor) or scale.device != q.device:
        return None
    if type(scale) is not Tensor or (torch.is_grad_enabled() and scale.requires_grad):
        return None
    products = torch.promote_types(q.dtype, cos.dtype)
    found = plan(q, None, None, scale, scale, rotary_dim, variant)
    if (
        found is None
        or found[2] is not tokens_first
        or torch.promote_types(products, scale.dtype) != products
    ):
        return None
    return found[0] if found[0].stride(-1) == 1 else found[0].contiguous()


def _is_like(x: Any, q: Tensor, tokens: int) -> bool:
    if not isinstance(x, Tensor) or x.dim() != 4 or x.dtype != q.dtype:
        return False
    return all(x.shape[at] == q.shape[at] for at in (0, tokens, 3))


def guarded_function(
    original: Callable[..., Any],
    facts: Mapping[str, Any],
    variant: RotaryVariant,
    attempt: Callable[..., Any],
) -> Callable[..., Any]:
    """A function with the arguments of ``original`` that runs it wherever ``attempt`` gives None.

    Args:
        original: The function that is replaced.
        facts: From an argument of the definition to Python text over the parameters of ``original``;
            ``requires`` holds conditions on them, and ``dense`` says that results have the strides of the
            turned tensor.
        variant: Handed to ``attempt``.
        attempt: Takes the arguments of the definition by keyword.

    Raises:
        ValueError: ``original`` takes any number of arguments.
    """
    signature = inspect.signature(original.forward if isinstance(original, nn.Module) else original)
    parameters = list(signature.parameters.values())
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        raise ValueError(f"{getattr(original, '__qualname__', original)} takes any number of arguments")
    scope: dict[str, Any] = {
        "_tw_torch": torch,
        "_tw_variant": variant,
        "_tw_turn": attempt,
        "_tw_original": original,
        "_tw_Tensor": Tensor,
        "_tw_isinstance": isinstance,
    }
    if any("_tw_einops." in text for text in facts.values() if isinstance(text, str)):
        scope["_tw_einops"] = import_module("einops")  # the program has it
    defaults = {}
    for parameter in parameters:
        if parameter.default is not parameter.empty:
            defaults[parameter.name] = f"_tw_default_{parameter.name}"
            scope[defaults[parameter.name]] = parameter.default
    name = original.__name__
    handed = [f"{role}={text}" for role, text in facts.items() if role not in ("requires", "dense")]
    same = [f"{p.name}={p.name}" if p.kind is p.KEYWORD_ONLY else p.name for p in parameters]
    lines = [
        def_line(name, parameters, defaults),
        f"    if {' and '.join(_conditions(facts, variant))}:",
        f"        _tw_made = _tw_turn({', '.join(handed)}, variant=_tw_variant)",
        "        if _tw_made is not None:",
        "            return _tw_made",
        f"    return _tw_original({', '.join(same)})",
    ]
    compile_source("\n".join(lines) + "\n", name, scope)
    made: Callable[..., Any] = scope[name]
    made.__module__ = __name__
    return made


def _conditions(facts: Mapping[str, Any], variant: RotaryVariant) -> list[str]:
    """When the path that was recognised is the one that the code takes, and all spellings agree."""
    found = []
    for condition in facts.get("requires", ()):
        name, _, state = condition.partition(" ")
        found.append(f"{name} {_STATES.get(state, state)}")
    if variant.broadcast != "given":
        return found
    for role in _TURNED:
        if role in facts:
            x = facts[role]
            found.append(f"_tw_isinstance({x}, _tw_Tensor) and {x}.dim() == 4 and {x}.shape[-1] % 2 == 0")
            if facts.get("dense"):
                found.append(f"{x}.is_contiguous()")
    return found
