"""What is taken for one spelling is one, bit for bit: results and gradients, in every dtype."""

from __future__ import annotations

import itertools
import linecache

import pytest
import torch

from twinkle.match.symbolic.execute import execute
from twinkle.match.symbolic.terms import Arena, walk
from twinkle.ops.rotary.canonical import canonical

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# Of a tensor x of four dimensions and two tables of half its width.
SAME = {
    "halves": (
        "x.chunk(2, -1)[1] * c",
        "x[..., x.shape[-1] // 2 :] * c",
        "x[:, :, :, x.shape[3] // 2 :] * c",
        "x.split(x.shape[-1] // 2, -1)[1] * c",
        "torch.tensor_split(x, 2, dim=3)[1] * c",
        "x.reshape(*x.shape[:-1], 2, -1).unbind(-2)[1] * c",
        "x.unflatten(-1, (2, -1))[..., 1, :] * c",
    ),
    "pairs": (
        "x[..., 1::2] * c",
        "x.unflatten(-1, (-1, 2))[..., 1] * c",
        "x.view(*x.shape[:-1], -1, 2).unbind(-1)[1] * c",
        "x.reshape(x.shape[0], x.shape[1], x.shape[2], x.shape[3] // 2, 2)[..., 1] * c",
    ),
    "first channels": (
        "x[..., : c.shape[-1]] * c",
        "x.split([c.shape[-1], x.shape[-1] - c.shape[-1]], -1)[0] * c",
    ),
    "last channels": (
        "x[..., c.shape[-1] :] * c",
        "x.split([c.shape[-1], x.shape[-1] - c.shape[-1]], -1)[1] * c",
    ),
    "sign of a factor": ("x.chunk(2, -1)[0] * (-s)", "-(x.chunk(2, -1)[0] * s)", "-x.chunk(2, -1)[0] * s"),
    "sign of an addend": (
        "x.chunk(2, -1)[1] * c - x.chunk(2, -1)[0] * s",
        "-x.chunk(2, -1)[0] * s + x.chunk(2, -1)[1] * c",
        "x.chunk(2, -1)[1] * c + x.chunk(2, -1)[0] * (-s)",
    ),
    "sign of a subtrahend": (
        "x.chunk(2, -1)[1] * c + x.chunk(2, -1)[0] * s",
        "x.chunk(2, -1)[1] * c - x.chunk(2, -1)[0] * -s",
    ),
    "pairs joined": (
        "torch.stack((x[..., ::2] * c, x[..., 1::2] * s), -1).flatten(3)",
        "torch.stack((x[..., ::2] * c, x[..., 1::2] * s), -1).flatten(-2)",
        "torch.stack((x[..., ::2] * c, x[..., 1::2] * s), -1).reshape(x.shape)",
        "torch.stack((x[..., ::2] * c, x[..., 1::2] * s), -1).view(*x.shape)",
    ),
    "halves joined": (
        "torch.cat((x[..., ::2] * c, x[..., 1::2] * s), -1)",
        "torch.cat((x[..., ::2] * c, x[..., 1::2] * s), 3)",
        "torch.stack((x[..., ::2] * c, x[..., 1::2] * s), -2).flatten(-2)",
    ),
    "a cast of the result": (
        "torch.cat((x[..., ::2] * c, x[..., 1::2] * s), -1).type_as(x)",
        "torch.cat(((x[..., ::2] * c).to(x.dtype), (x[..., 1::2] * s).to(x.dtype)), -1)",
    ),
    "a cast of a part": ("x.float().chunk(2, -1)[1] * c", "x.chunk(2, -1)[1].float() * c"),
    "complex numbers": (
        "real(complex_of(x.float().reshape(*x.shape[:-1], -1, 2)) * numbers(c, s)).flatten(3)",
        "real(complex_of(x.float().unflatten(-1, (-1, 2))) * numbers(c, s)).flatten(-2)",
        "real(complex_of(x.float().view(*x.shape[:-1], -1, 2)) * numbers(c, s)).reshape(*x.shape)",
        "real(complex_of(x.float().reshape(*x.shape[:-1], x.shape[-1] // 2, 2)) * numbers(c, s))"
        ".reshape(x.shape)",
    ),
    "sums of matrix products": (
        "(pairs_of(x) * matrices(c, s)).sum(-1).flatten(3)",
        "(pairs_of(x) * matrices(c, s)).sum(dim=5).flatten(-2)",
        "(pairs_of(x) * matrices(c, s)).sum(-1).reshape(*x.shape)",
    ),
    "a filled tensor": ("filled(x, c, s)", "torch.cat((x[..., ::2] * c, x[..., 1::2] * s), -1).type_as(x)"),
}
DIFFERENT = {
    "halves exchanged": ("x.chunk(2, -1)[1] * c", "x.chunk(2, -1)[0] * c"),
    "pairs and halves": ("x[..., 1::2] * c", "x.chunk(2, -1)[1] * c"),
    "sizes of a dimension exchanged": (
        "x.unflatten(-1, (2, -1)).unbind(-2)[1] * c",
        "x.unflatten(-1, (-1, 2)).unbind(-1)[1] * c",
    ),
    "another axis": ("x.chunk(2, -1)[1] * c", "x.chunk(2, 2)[1] * c"),
    "thirds": ("x.chunk(2, -1)[1] * c", "x.chunk(3, -1)[1] * c"),
    "the sign of the whole": (
        "x.chunk(2, -1)[1] * c - x.chunk(2, -1)[0] * s",
        "x.chunk(2, -1)[0] * s - x.chunk(2, -1)[1] * c",
    ),
    "joined as pairs and as halves": (
        "torch.stack((x[..., ::2] * c, x[..., 1::2] * s), -1).flatten(3)",
        "torch.stack((x[..., ::2] * c, x[..., 1::2] * s), -2).flatten(3)",
    ),
    "a tensor cast once, and its copy by itself": (
        "rotated(x.float(), c, s)",
        "x.float() * wide(c) + turned(x).float() * wide(s)",
    ),
    "sums of matrix products over rows and columns": (
        "(pairs_of(x) * matrices(c, s)).sum(-1).flatten(3)",
        "(pairs_of(x) * matrices(c, s)).sum(-2).flatten(3)",
    ),
    "the sum cast, and the products": (
        "(x.chunk(2, -1)[1] * c + x.chunk(2, -1)[0] * s).to(x.dtype)",
        "(x.chunk(2, -1)[1] * c).to(x.dtype) + (x.chunk(2, -1)[0] * s).to(x.dtype)",
    ),
}
HELPERS = """
def filled(x, c, s):
    out = torch.empty_like(x)
    out[..., : x.shape[-1] // 2] = x[..., ::2] * c
    out[..., x.shape[-1] // 2 :] = x[..., 1::2] * s
    return out


def wide(table):
    return torch.cat((table, table), -1)


def turned(x):
    return torch.cat((-x.chunk(2, -1)[1], x.chunk(2, -1)[0]), -1)


def complex_of(x):
    return torch.view_as_complex(x)


def real(x):
    return torch.view_as_real(x)


def numbers(c, s):
    return torch.complex(c.float(), s.float())


def pairs_of(x):
    return x.reshape(*x.shape[:-1], -1, 1, 2)


def matrices(c, s):
    return torch.stack((torch.stack((c, -s), -1), torch.stack((s, c), -1)), -2)


def rotated(x, c, s):
    return x * wide(c) + turned(x) * wide(s)
"""


def function_of(text: str):
    """The function of an expression, with a source."""
    source = f"{HELPERS}\n\ndef spelling(x, c, s):\n    return {text}\n"
    name = f"<spelling {text}>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    scope = {"torch": torch}
    exec(compile(source, name, "exec"), scope)
    return scope["spelling"]


def form_of(text, arena):
    term, run = execute(function_of(text), arena, keep_casts=True)
    assert not run.effects
    x = next(part for part in walk(term) if part.op == "input" and part.args == ("x",))
    return canonical(term, x, arena.term)[0]


def results(text, dtype, tables):
    """What it gives on random numbers with zeros of both signs among them, and the gradients."""
    found, function = [], function_of(text)
    generator = torch.Generator().manual_seed(0)
    for shape in ((2, 3, 5, 8), (1, 1, 7, 2), (3, 2, 1, 30)):
        x = (torch.randn(shape, generator=generator) * torch.logspace(-3, 3, shape[-1])).to(dtype)
        x[..., 0, ::3], x[..., 0, 1::5] = 0.0, -0.0
        c, s = (torch.randn(shape[-2], shape[-1] // 2, generator=generator).to(tables or dtype) for _ in "cs")
        y = function(x.requires_grad_(), c, s)
        push = torch.randn(y.shape, generator=generator).to(y.dtype)
        found += [y.detach(), *torch.autograd.grad(y, x, push)]
    return found


def equal(one, other, dtype, tables):
    pairs = zip(results(one, dtype, tables), results(other, dtype, tables), strict=True)
    return all(a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("name", SAME)
def test_spellings_of_one_form_are_equal_bit_for_bit(name):
    first, *others = SAME[name]
    arena = Arena()
    for other in others:
        assert form_of(first, arena) is form_of(other, arena)
        for dtype, tables in itertools.product(DTYPES, (None, torch.float32)):
            assert equal(first, other, dtype, tables)


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_differs_has_another_form(name):
    one, other = DIFFERENT[name]
    arena = Arena()
    assert form_of(one, arena) is not form_of(other, arena)


def test_the_forms_of_casts_differ_where_their_gradients_do():
    one, other = DIFFERENT["a tensor cast once, and its copy by itself"]
    assert equal(one, other, torch.float32, torch.float32)
    assert not equal(one, other, torch.bfloat16, torch.float32)
