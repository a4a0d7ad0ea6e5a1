"""The implementations in plain torch for the CPU against the definitions: same results, gradients as near."""

from __future__ import annotations

import pytest
import torch
from rounding import assert_near, rounding_bound

from twinkle.ops import machine, plain
from twinkle.ops.rms_norm import cpu_backend as norm_cpu
from twinkle.ops.rms_norm import reference as norm_reference
from twinkle.ops.rotary import cpu_backend as rotary_cpu
from twinkle.ops.rotary import reference as rotary_reference
from twinkle.proof.compare import compare

NORMS = {variant.name: variant for variant in norm_reference.VARIANTS if norm_cpu.supports(variant) is None}
ROTATIONS = {
    variant.name: variant for variant in rotary_reference.VARIANTS if rotary_cpu.supports(variant) is None
}
LLAMA, HALF = NORMS["llama"], ROTATIONS["half"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BATCH, HEADS, KV, TOKENS, DIM = 2, 3, 2, 5, 24


@pytest.fixture(autouse=True)
def small_chunks_at_any_size(monkeypatch):
    monkeypatch.setattr(norm_cpu, "LEAST", 1)
    monkeypatch.setattr(norm_cpu, "LEAST_INFERENCE", 1)
    monkeypatch.setattr(rotary_cpu, "LEAST", 1)
    monkeypatch.setattr(rotary_cpu, "LEAST_INFERENCE", 1)
    monkeypatch.setattr(plain, "CHUNK", 500)
    monkeypatch.setattr(plain, "SHARED_CHUNK", 700)


def ours(y):
    return type(y.grad_fn).__name__ in ("_RMSNormBackward", "_RotaryBackward")


def as_near(found, other, exact, operations):
    """Results are as near to the exact ones as others, but for one rounding, or float32's in another order.

    ``operations`` are those behind a number of the result: elementwise ones and the terms of its sums.
    """
    for a, b, c in zip(found, other, exact, strict=True):
        count = operations if a.dtype == torch.float32 else 1
        norm = c.detach().norm().item()
        room = rounding_bound(a.dtype, count, norm) + rounding_bound(torch.float32, operations, norm)
        assert a.dtype == b.dtype
        assert (a.double() - c).norm() <= (b.double() - c).norm() + room


@pytest.fixture(params=[True, False], ids=["one thread", "threads"])
def threads(request, monkeypatch):
    """Chunks follow the number of threads: both ways of them, wherever the test runs."""
    monkeypatch.setattr(machine, "one_thread", lambda: request.param)


def differentiate(function, inputs, wanted, **options):
    y = function(*inputs, **options)
    results = y if isinstance(y, tuple) else (y,)
    # Not the numbers of the inputs, from seed 0: a norm has no gradient along its input but rounding.
    pushes = [
        torch.randn(r.shape, generator=torch.Generator().manual_seed(1 + i)).to(r)
        for i, r in enumerate(results)
    ]
    return results, torch.autograd.grad(results, wanted, pushes)


def normed(variant, dtype, weight=None, shape=(3, 7, 60)):
    torch.manual_seed(0)
    x = torch.randn(shape).to(dtype).requires_grad_()
    if variant.weight == "none":
        return x, None
    return x, torch.randn(shape[-1]).to(weight or dtype).requires_grad_()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NORMS)
def test_a_norm_equals_its_definition_bit_for_bit(monkeypatch, name, dtype):
    variant = NORMS[name]
    for weight in {dtype, torch.float32}:
        x, w = normed(variant, dtype, weight)
        y = norm_cpu.rms_norm(x, w, 1e-6, variant=variant)
        expected = norm_reference.rms_norm(x, w, 1e-6, variant=variant)
        assert ours(y)
        assert (y.dtype, y.stride()) == (expected.dtype, expected.stride())
        assert torch.equal(y, expected)
        monkeypatch.setattr(machine, "one_thread", lambda: True)
        with torch.no_grad():
            assert torch.equal(norm_cpu.rms_norm(x, w, 1e-6, variant=variant), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [name for name, variant in NORMS.items() if variant.nullable != "no"])
def test_a_norm_without_its_weight_equals_its_definition_bit_for_bit(name, dtype):
    x, _ = normed(NORMS[name], dtype)
    y = norm_cpu.rms_norm(x, None, 1e-6, variant=NORMS[name])
    expected = norm_reference.rms_norm(x, None, 1e-6, variant=NORMS[name])
    assert ours(y)
    assert y.dtype == expected.dtype
    assert torch.equal(y, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NORMS)
def test_gradients_of_a_norm_are_as_near_to_the_exact_ones(threads, name, dtype):
    variant = NORMS[name]
    x, w = normed(variant, dtype)
    wanted = [t for t in (x, w) if t is not None]
    _, found = differentiate(norm_cpu.rms_norm, (x, w, 1e-6), wanted, variant=variant)
    _, other = differentiate(norm_reference.rms_norm, (x, w, 1e-6), wanted, variant=variant)
    wide = [None if t is None else t.detach().double().requires_grad_() for t in (x, w)]
    plain_variant = norm_reference.RMSNormVariant(
        "", inverse=variant.inverse, weight=variant.weight, compute="input"
    )
    leaves = [t for t in wide if t is not None]
    _, exact = differentiate(norm_reference.rms_norm, (*wide, 1e-6), leaves, variant=plain_variant)
    # A dozen elementwise operations, a sum over the width, and one over the rows.
    as_near(found, other, exact, 12 + 60 + 3 * 7)


def test_a_norm_of_a_transposed_input_keeps_its_strides():
    x = torch.randn(2, 5, 4, 32).transpose(1, 2).requires_grad_()
    w = torch.randn(32, requires_grad=True)
    y, expected = (f(x, w, 1e-6, variant=LLAMA) for f in (norm_cpu.rms_norm, norm_reference.rms_norm))
    assert ours(y)
    assert y.stride() == expected.stride()
    assert torch.equal(y, expected)


def test_a_frozen_weight_gets_no_gradient():
    x, w = normed(LLAMA, torch.float32)
    w.requires_grad_(False)
    norm_cpu.rms_norm(x, w, 1e-6, variant=LLAMA).sum().backward()
    assert w.grad is None
    assert x.grad is not None


def test_a_norm_below_the_size_that_pays_is_the_definition(monkeypatch):
    monkeypatch.setattr(norm_cpu, "LEAST", 10**6)
    x, w = normed(LLAMA, torch.float32)
    assert not ours(norm_cpu.rms_norm(x, w, 1e-6, variant=LLAMA))


def test_a_proof_is_about_the_way_of_large_inputs(monkeypatch):
    monkeypatch.setattr(norm_cpu, "LEAST", 10**6)
    monkeypatch.setattr(norm_cpu, "normalise", lambda x, *rest: (x.detach() * 2, x.new_ones(x.numel(), 1)))
    x, w = normed(LLAMA, torch.float32)
    options = {"eps": 1e-6, "variant": LLAMA}
    # With gradients: without, several threads leave it to the definition.
    assert not compare(norm_reference.rms_norm, norm_cpu.rms_norm, (x, w), options, backward=True).ok


def test_a_norm_can_be_differentiated_twice():
    x, w = normed(LLAMA, torch.float32, shape=(4, 16))

    def twice(function):
        y = function(x, w, 1e-6, variant=LLAMA)
        (first,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(first.pow(2).sum(), (x, w))

    for a, b in zip(twice(norm_cpu.rms_norm), twice(norm_reference.rms_norm), strict=True):
        # Each derivative of each of two passes: sums over 16 columns and 4 rows, some twenty operations.
        assert_near(a, b, 4 * (20 + 16 + 4))


def test_backward_under_autocast_is_in_float32():
    x, w = normed(LLAMA, torch.float32)
    g = torch.randn_like(x)
    outside = torch.autograd.grad(norm_cpu.rms_norm(x, w, 1e-6, variant=LLAMA), (x, w), g)
    with torch.autocast("cpu"):
        inside = torch.autograd.grad(norm_cpu.rms_norm(x, w, 1e-6, variant=LLAMA), (x, w), g)
    assert all(torch.equal(a, b) for a, b in zip(outside, inside, strict=True))


def rotated(variant, dtype, tables, tokens_first_in_memory=True):
    torch.manual_seed(0)
    turned = width = 16 if variant.part in ("first", "last") else DIM
    width = width // 2 if variant.tables in ("half", "repeated") else width

    def made(heads):
        x = torch.randn(BATCH, TOKENS, heads, DIM, dtype=dtype).transpose(1, 2)
        x = x if tokens_first_in_memory else x.contiguous()
        x = x.transpose(1, 2) if variant.broadcast in ("2", "-2") else x
        return (x[0] if variant.broadcast == "-2" else x).detach().requires_grad_()

    lead = {"none": (TOKENS,), "-2": (TOKENS,)}.get(variant.broadcast, (BATCH, TOKENS))
    extra = {}
    if variant.broadcast == "given":
        lead, extra["rotary_dim"] = (1, 1, TOKENS), turned
    if variant.indexed:
        lead, extra["position_ids"] = (9,), torch.randint(0, 9, (BATCH, TOKENS))
    if variant.sections:
        lead, extra["mrope_section"] = (3, BATCH, TOKENS), [4, 4, 4]
    cos, sin = (torch.randn(*lead, width, dtype=tables) for _ in range(2))
    if variant.pairs == "complex":
        real = torch.float64 if variant.compute == "float64" else torch.float32
        cos, sin = torch.polar(torch.ones_like(cos, dtype=real), cos.to(real)), None
    elif variant.pairs == "matrix" and variant.broadcast == "given":
        table = torch.randn(*lead, width // 2, 2, 2, dtype=tables)
        cos, sin = table.unbind(-1) if variant.tables == "columns" else (table, None)
    if variant.scaled:
        extra["scale"] = 1.0
    q, k, v = made(HEADS), made(KV), made(KV)
    if variant.tensors == 3:
        extra["v"] = v
    return (q, k, cos, sin), extra, [q, k, v][: 2 if variant.broadcast == "given" else variant.tensors]


@pytest.mark.parametrize("memory", ["tokens first", "heads first"])
@pytest.mark.parametrize(
    ("dtype", "tables"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)],
)
@pytest.mark.parametrize("name", ROTATIONS)
def test_a_rotation_and_its_gradients_are_as_near_as_the_definition(name, dtype, tables, memory):
    variant = ROTATIONS[name]
    inputs, extra, wanted = rotated(variant, dtype, tables, memory == "tokens first")
    results, found = differentiate(rotary_cpu.rotary, inputs, wanted, variant=variant, **extra)
    expected, other = differentiate(rotary_reference.rotary, inputs, wanted, variant=variant, **extra)
    if variant.pairs == "complex" and dtype == torch.float32 and variant.compute != "float64":
        assert not any(ours(y) for y in results)  # one product without a cast
    else:
        assert all(ours(y) for y in results)
    assert [(y.dtype, y.stride()) for y in results] == [(y.dtype, y.stride()) for y in expected]
    exact_variant = rotary_reference.RotaryVariant(
        "",
        variant.pairs,
        variant.inverse,
        variant.tables,
        part=variant.part,
        broadcast=variant.broadcast,
        indexed=variant.indexed,
        sections=variant.sections,
        tensors=variant.tensors,
    )
    wide, more, leaves = rotated(variant, dtype, tables, memory == "tokens first")
    leaves = [x.detach().double().requires_grad_() for x in leaves]
    tables = (x if x is None or x.is_complex() else x.double() for x in wide[2:])
    wide = (leaves[0], leaves[1] if len(leaves) > 1 else wide[1], *tables)
    if variant.tensors == 3:
        more["v"] = leaves[2]
    exact = differentiate(rotary_reference.rotary, wide, leaves, variant=exact_variant, **more)
    # Two products and their sum, each behind a cast of its own.
    as_near((*results, *found), (*expected, *other), (*exact[0], *exact[1]), 6)


@pytest.mark.parametrize("tokens_first", [True, False])
@pytest.mark.parametrize("shape", [(2, 1, 3, 8), (1, 3, 1, 8), (2, 3, 4, 8), (2, 1, 1, 8), (3, 1, 300, 8)])
@pytest.mark.parametrize("kind", ["complex_float64", "matrix_float32"])
def test_few_heads_and_few_tokens_are_told_apart(kind, shape, tokens_first):
    x = torch.randn(shape, requires_grad=True)
    tokens = shape[1] if tokens_first else shape[2]
    for batch in {1, shape[0]}:
        if kind == "complex_float64":
            tables = (
                torch.randn(batch, tokens, 4, dtype=torch.complex128).unsqueeze(2 if tokens_first else 1),
            )
        else:
            tables = torch.randn(batch, tokens, 4, 2, 2).unsqueeze(2 if tokens_first else 1).unbind(-1)
        given = (x, None, *tables) if len(tables) == 2 else (x, None, *tables, None)
        (y,), (g,) = differentiate(rotary_cpu.rotary, given, (x,), variant=ROTATIONS[kind])
        (z,), (h,) = differentiate(rotary_reference.rotary, given, (x,), variant=ROTATIONS[kind])
        assert ours(y)
        assert_near(y, z, 6)
        assert_near(g, h, 6)


def test_a_rotation_leaves_its_inputs_as_they_were():
    inputs, _, wanted = rotated(HALF, torch.float32, torch.float32)
    kept = [x.detach().clone() for x in inputs]
    differentiate(rotary_cpu.rotary, inputs, wanted)
    assert all(torch.equal(a, b) for a, b in zip(inputs, kept, strict=True))


def test_tables_that_want_a_gradient_go_through_the_definition():
    (q, k, cos, sin), _, _ = rotated(HALF, torch.float32, torch.float32)
    assert not ours(rotary_cpu.rotary(q, k, cos.requires_grad_(), sin)[0])


def test_a_rotation_can_be_differentiated_twice():
    (q, k, cos, sin), _, _ = rotated(HALF, torch.float32, torch.float32)

    def twice(function):
        (first,) = torch.autograd.grad(
            function(q, k, cos, sin, variant=HALF)[0].pow(3).sum(), q, create_graph=True
        )
        return torch.autograd.grad(first.pow(2).sum(), q)[0]

    # A rotation there and one back, twice, and two powers.
    assert_near(twice(rotary_cpu.rotary), twice(rotary_reference.rotary), 4 * 3 + 8)


@pytest.mark.parametrize("function", ["norm", "rotation"])
def test_transforms_of_torch_func_follow_the_definition(function):
    x, w = normed(LLAMA, torch.float32, shape=(4, 8))
    (q, k, cos, sin), _, _ = rotated(HALF, torch.float32, torch.float32)
    rooms, at, call = {
        "norm": ((norm_cpu, norm_reference), x, lambda room, t: room.rms_norm(t, w, 1e-6, variant=LLAMA)),
        "rotation": (
            (rotary_cpu, rotary_reference),
            q,
            lambda room, t: room.rotary(t, k, cos, sin, variant=HALF)[0],
        ),
    }[function]
    mine, theirs = (
        torch.func.grad(lambda t, room=room: call(room, t).pow(3).sum())(at.detach()) for room in rooms
    )
    assert torch.equal(mine, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("function", ["norm", "rotation"])
def test_a_compiler_sees_the_definition_without_a_break(function):
    x, w = normed(LLAMA, torch.float32)
    (q, k, cos, sin), _, _ = rotated(HALF, torch.float32, torch.float32)
    call = {
        "norm": lambda: norm_cpu.rms_norm(x, w, 1e-6, variant=LLAMA),
        "rotation": lambda: rotary_cpu.rotary(q, k, cos, sin)[0],
    }[function]
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")()
    assert_near(compiled, call(), 60 + 12)
