"""Sample calls of rotary kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from twinkle.ops.cases import Case, Instance, implementation, random, seeded
from twinkle.ops.rotary import reference

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    from twinkle.ops.rotary.reference import RotaryVariant

__all__ = ["cases", "inputs", "variants"]

# Batch, heads of the queries and of the keys, tokens, channels of a head.
_SHAPES = {
    "plain": (2, 4, 2, 48, 64),
    "one row": (1, 2, 1, 1, 32),
    "ragged": (3, 3, 1, 7, 40),
    "wide": (1, 2, 2, 5, 256),
    "strided": (2, 4, 4, 9, 64),
    "one table": (3, 2, 2, 7, 32),
}


def variants() -> tuple[RotaryVariant, ...]:
    """Every variant of the definition."""
    return reference.VARIANTS


def inputs(instance: Instance) -> dict[str, Any] | None:
    """Queries, keys and tables of a model with heads of 64 channels.

    None where the tables are made of arguments that only the code knows the shapes of.
    """
    if instance.variant.broadcast == "given" and not all(
        isinstance(fact, str) and fact.isidentifier()
        for role, fact in instance.facts.items()
        if role not in ("requires", "dense")
    ):
        return None
    (batch, tokens), dtype = instance.lead, instance.dtype
    return _values(instance.variant, (batch, 4, 2, tokens, 64), dtype, dtype, instance.generator)


def _values(
    variant: RotaryVariant,
    shape: tuple[int, int, int, int, int],
    dtype: torch.dtype,
    table_dtype: torch.dtype,
    generator: torch.Generator,
) -> dict[str, Any]:
    batch, heads, kv_heads, tokens, width = shape
    turned = width // 2 if variant.part in ("first", "last") else width
    columns = turned // 2 if variant.tables in ("half", "repeated") else turned
    table: tuple[int, ...] = (batch, tokens, columns)

    def projected(count: int) -> torch.Tensor:
        """As a projection gives it: tokens before heads in memory."""
        if variant.broadcast == "-2":
            return random((tokens, count, width), dtype, generator)
        made = random((batch, tokens, count, width), dtype, generator)
        return made if variant.broadcast == "2" else made.transpose(1, 2)

    if variant.broadcast in ("-2", "none"):
        table = (tokens, columns)
    if variant.broadcast == "given":
        table = (batch, 1, tokens, columns)
    if variant.indexed:
        table = (tokens + 6, columns)
    if variant.sections:
        table = (3, batch, tokens, columns)
    angle = random((*table[:-1], table[-1] // 2 or 1), torch.float32, generator, scale=3)
    angle = torch.cat((angle, angle), -1)[..., : table[-1]]
    if variant.tables in ("half", "repeated"):
        angle = random(table, torch.float32, generator, scale=3)
    positions = torch.arange(batch * tokens, device=generator.device).view(batch, tokens)
    values: dict[str, Any] = {
        "q": projected(heads),
        "k": projected(kv_heads),
        "v": projected(kv_heads),
        "cos": angle.cos().to(table_dtype),
        "sin": angle.sin().to(table_dtype),
        "unsqueeze_dim": 1,
        "position_ids": positions % (tokens + 6),
        "rotary_dim": turned,
        "scale": 1.2,
        "mrope_section": [columns // 8, columns // 8, columns // 2 - 2 * (columns // 8)],
    }
    if variant.pairs == "complex":
        real = torch.float64 if variant.compute == "float64" else torch.float32
        values["cos"] = torch.polar(torch.ones_like(angle, dtype=real), angle.to(real))
    elif variant.pairs == "matrix" and variant.broadcast == "given":
        cos, sin = (values[name][..., : columns // 2] for name in ("cos", "sin"))
        columns_of = torch.stack((cos, sin), -1), torch.stack((-sin, cos), -1)
        both = columns_of if variant.tables == "columns" else (torch.stack(columns_of, -1), None)
        values |= dict(zip(("cos", "sin"), both, strict=True))
    return {role: value for role, value in values.items() if role in _roles(variant)}


def _roles(variant: RotaryVariant) -> tuple[str, ...]:
    tables = ("cos",) if variant.pairs == "complex" or variant.tables == "matrices" else ("cos", "sin")
    if variant.broadcast == "given":
        more = (("rotary_dim",) if variant.part == "first" else ()) + (("scale",) if variant.scaled else ())
        return ("q", "k", *tables, *more)
    roles: tuple[str, ...] = (*("q", "k", "v")[: variant.tensors], *tables)
    roles += ("unsqueeze_dim",) if variant.broadcast == "argument" else ()
    roles += ("position_ids",) if variant.indexed else ()
    return roles + (("mrope_section",) if variant.sections else ())


def _definition(variant: RotaryVariant) -> Callable[..., Any]:
    """With the arguments of the variant in the order of its roles."""
    roles = _roles(variant)
    scope: dict[str, Any] = {"rotary": reference.rotary, "variant": variant}
    absent = [f"{role}=None" for role in ("k", "sin") if role not in roles]
    handed = ", ".join([*(f"{role}={role}" for role in roles), *absent])
    exec(f"def definition({', '.join(roles)}):\n    return rotary({handed}, variant=variant)\n", scope)
    made: Callable[..., Any] = scope["definition"]
    return made


def cases(
    variant: RotaryVariant, dtype: torch.dtype, device: torch.device, backend: str = "triton_backend"
) -> Iterator[Case]:
    """A call of each shape, and tables in float32 beside inputs in half precision."""
    generator = seeded(device)
    original = _definition(variant)
    facts = {role: role for role in _roles(variant)}
    kernel = implementation("rotary", backend).function_for(variant, facts, original)
    shapes = dict(_SHAPES)
    if dtype != torch.float32:
        shapes["float32 tables"] = _SHAPES["plain"]
    for shape, sizes in shapes.items():
        table = torch.float32 if shape == "float32 tables" else dtype
        values = _values(variant, sizes, dtype, table, generator)
        if shape == "one table":
            if values["cos"].dim() < 3 or variant.indexed:
                continue
            values |= {name: values[name][:1] for name in ("cos", "sin") if name in values}
        if shape == "plain":  # heads before tokens in memory as well
            values |= {name: values[name].contiguous() for name in ("q", "k", "v") if name in values}
        yield Case(shape, original, kernel, tuple(values.values()), None, facts)
