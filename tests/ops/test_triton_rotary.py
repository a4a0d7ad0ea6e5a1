"""Rotary embedding in triton against its definition: bit for bit."""

from __future__ import annotations

import pytest
import torch
from rounding import assert_near, terms

from twinkle.ops.rotary import reference
from twinkle.ops.rotary.layer import apply_rotary_pos_emb
from twinkle.ops.rotary.triton_backend import by_kernel, function_for, rotary, supports

VARIANTS = {variant.name: variant for variant in reference.VARIANTS if supports(variant) is None}
HALF = VARIANTS["half"]
BATCH, HEADS, KV, TOKENS, DIM = 2, 3, 2, 5, 24


def example(variant, device, dtype=torch.float32, tables=torch.float32, tokens_first_in_memory=True):
    """Inputs of a variant, in the layout it wants."""
    torch.manual_seed(0)
    turned = width = 16 if variant.part in ("first", "last") else DIM
    width = width // 2 if variant.tables in ("half", "repeated") else width

    def made(heads):
        x = torch.randn(BATCH, TOKENS, heads, DIM, dtype=dtype).transpose(1, 2)
        x = x if tokens_first_in_memory else x.contiguous()
        x = x.transpose(1, 2) if variant.broadcast in ("2", "-2") else x
        x = x[0] if variant.broadcast == "-2" else x
        return x.to(device).requires_grad_()

    lead = {"none": (TOKENS,), "-2": (TOKENS,)}.get(variant.broadcast, (BATCH, TOKENS))
    extra = {}
    if variant.broadcast == "given":
        lead, extra["rotary_dim"] = (1, 1, TOKENS), turned
    if variant.indexed:
        lead, extra["position_ids"] = (9,), torch.randint(0, 9, (BATCH, TOKENS), device=device)
    if variant.sections:
        lead, extra["mrope_section"] = (3, BATCH, TOKENS), [4, 4, 4]
    cos, sin = (torch.randn(*lead, width, dtype=tables).to(device) for _ in range(2))
    if variant.pairs == "complex":
        real = torch.float64 if variant.compute == "float64" else torch.float32
        cos, sin = torch.polar(torch.ones_like(cos, dtype=real), cos.to(real)), None
    elif variant.pairs == "matrix" and variant.broadcast == "given":
        table = torch.randn(*lead, width // 2, 2, 2, dtype=tables).to(device)
        cos, sin = table.unbind(-1) if variant.tables == "columns" else (table, None)
    if variant.scaled:
        extra["scale"] = torch.rand(1, 1, TOKENS, width, dtype=tables).to(device) + 0.5
    q, k, v = made(HEADS), made(KV), made(KV)
    if variant.tensors == 3:
        extra["v"] = v
    return (q, k, cos, sin), extra, [q, k, v][: 2 if variant.broadcast == "given" else variant.tensors]


def as_tuple(results):
    return results if isinstance(results, tuple) else (results,)


def used_kernel(y):
    return "_RotaryBackward" in type(y.grad_fn).__name__


CALLS = [("float32", "heads first"), ("half", "tokens first"), ("half with float32 tables", "heads first")]


@pytest.mark.parametrize(
    ("name", "dtypes", "layout"),
    [
        (name, *call)
        for name, variant in VARIANTS.items()
        for call in CALLS
        # Where the arithmetic is float32 in any case, the rounding to it is what there is to see.
        if variant.pairs in ("complex", "matrix")
        or variant.scaled
        or variant.broadcast != "given"
        or variant.compute == "input"
        or call[0] != "float32"
    ],
)
def test_results_and_gradients_equal_the_definition_bit_for_bit(kernels, half, name, dtypes, layout):
    variant = VARIANTS[name]
    dtype = torch.float32 if dtypes == "float32" else half
    tables = half if dtypes == "half" else torch.float32
    if variant.pairs == "complex" and variant.compute == "input":
        dtype = tables = torch.float32  # torch has no complex numbers of the others that it multiplies
    inputs, extra, wanted = example(variant, kernels, dtype, tables, layout == "tokens first")
    ours = as_tuple(rotary(*inputs, variant=variant, **extra))
    theirs = as_tuple(reference.rotary(*inputs, variant=variant, **extra))
    assert all(used_kernel(y) for y in ours)
    gradients = [torch.randn(y.shape).to(y) for y in theirs]
    found = torch.autograd.grad(ours, wanted, gradients)
    expected = torch.autograd.grad(theirs, wanted, gradients)
    for a, b in zip((*ours, *found), (*theirs, *expected), strict=True):
        assert a.dtype == b.dtype
        if variant.pairs == "complex" and variant.compute != "float64":
            # On a CPU some loops of torch fuse a product with the sum, and others do not: three roundings.
            assert_near(a, b, 3)
        else:
            assert torch.equal(a, b)
    assert [y.stride() for y in ours] == [y.stride() for y in theirs]


@pytest.mark.parametrize("programs", [1, 2 * BATCH, 512])
@pytest.mark.parametrize("name", ["half", "halves_first"])
def test_heads_that_lie_one_after_the_other_may_be_shared_out(kernels, monkeypatch, name, programs):
    """Among one program, two and as many as there are heads, of which the keys have fewer."""
    from twinkle.ops.rotary import triton

    monkeypatch.setattr(triton, "PROGRAMS", programs)
    variant = VARIANTS[name]
    inputs, extra, wanted = example(variant, kernels, tokens_first_in_memory=False)
    ours, theirs = (one(*inputs, variant=variant, **extra) for one in (rotary, reference.rotary))
    gradients = [torch.randn(y.shape).to(y).contiguous() for y in theirs]
    found, expected = (torch.autograd.grad(y, wanted, gradients) for y in (ours, theirs))
    assert all(torch.equal(a, b) for a, b in zip((*ours, *found), (*theirs, *expected), strict=True))
    assert all(map(used_kernel, ours))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["complex_float32", "complex_float64", "complex_head_2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_rounds_a_complex_product_as_the_kernel_does(kernels, name, dtype):
    """Bit for bit: of each part, the second product is rounded and the first one is fused with the sum."""
    if kernels.type != "cuda":
        pytest.skip("there is no GPU")
    inputs, _, wanted = example(VARIANTS[name], kernels, dtype)
    ours, theirs = rotary(*inputs, variant=VARIANTS[name]), reference.rotary(*inputs, variant=VARIANTS[name])
    gradients = [torch.randn_like(y) for y in theirs]
    found, expected = (torch.autograd.grad(y, wanted, gradients) for y in (ours, theirs))
    assert all(torch.equal(a, b) for a, b in zip((*ours, *found), (*theirs, *expected), strict=True))


def test_a_conjugated_table_turns_back(kernels):
    variant = VARIANTS["complex_float32"]
    (q, k, table, _), _, _ = example(variant, kernels)
    ours, back = rotary(q, k, table.conj(), variant=variant)[0], table.conj().resolve_conj()
    assert used_kernel(ours)
    assert torch.equal(ours, rotary(q, k, back, variant=variant)[0])
    assert_near(ours, reference.rotary(q, k, back, None, variant=variant)[0], 3)


@pytest.mark.parametrize("kind", ["real", "one number", "of a gradient", "of another shape"])
def test_tables_that_are_not_one_complex_number_a_pair_go_through_the_definition(kernels, kind):
    variant = VARIANTS["complex_float32"]
    (q, _, table, _), _, _ = example(variant, kernels)
    table, k = (
        {
            "real": lambda: table.real,
            "one number": lambda: table[..., :1],
            "of a gradient": lambda: table.clone().requires_grad_(),
            "of another shape": lambda: table.expand(BATCH, HEADS, TOKENS, DIM // 2),
        }[kind](),
        q,
    )
    ours, theirs = rotary(q, k, table, variant=variant), reference.rotary(q, k, table, None, variant=variant)
    assert not any(used_kernel(y) for y in ours)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_real_tables_in_float64_go_through_the_definition(kernels):
    (q, k, cos, sin), _, _ = example(HALF, kernels)
    ours, theirs = (f(q, k, cos.double(), sin.double(), variant=HALF) for f in (rotary, reference.rotary))
    assert not any(used_kernel(y) for y in ours)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("name", ["complex_head_2", "complex_head_1", "matrix"])
def test_three_dimensions_are_no_rotation_by_products(kernels, name):
    (q, k, table, sin), _, _ = example(VARIANTS[name], kernels)
    assert by_kernel(q[0], k[0], table[0], None if sin is None else sin[0], variant=VARIANTS[name]) is None


def test_a_wide_table_of_a_float32_product(kernels):
    """A table in complex128 makes the whole product one, whatever the inputs are cast to."""
    variant = VARIANTS["complex_float32"]
    (q, k, table, _), _, wanted = example(variant, kernels)
    table = table.to(torch.complex128)
    ours, theirs = (f(q, k, table, None, variant=variant) for f in (rotary, reference.rotary))
    assert used_kernel(ours[0])
    gradients = [torch.randn_like(y) for y in theirs]
    found, expected = (torch.autograd.grad(y, wanted, gradients) for y in (ours, theirs))
    assert all(torch.equal(a, b) for a, b in zip((*ours, *found), (*theirs, *expected), strict=True))
    wide = VARIANTS["complex_float32_wide"]
    assert rotary(q, k, table, None, variant=wide)[0].dtype == torch.float64


@pytest.mark.parametrize("name", ["halves_full_scaled", "pairs_full_scaled_wide_first"])
@pytest.mark.parametrize("scale", [1, 1.0, 0.75, -2, 0.0])
def test_a_factor_that_is_a_number(kernels, half, name, scale):
    variant = VARIANTS[name]
    for dtype in (torch.float32, half):
        inputs, extra, wanted = example(variant, kernels, dtype, dtype)
        extra["scale"] = scale
        ours, theirs = (f(*inputs, variant=variant, **extra) for f in (rotary, reference.rotary))
        assert used_kernel(ours[0])
        gradients = [torch.randn_like(y) for y in theirs]
        found, expected = (torch.autograd.grad(y, wanted, gradients) for y in (ours, theirs))
        for a, b in zip((*ours, *found), (*theirs, *expected), strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    "kind", ["a number as a tensor", "a head each", "wider", "with a gradient", "another width"]
)
def test_factors_that_are_not_one_row_a_token_go_through_the_definition(kernels, half, kind):
    variant = VARIANTS["halves_full_scaled"]
    (q, _, cos, sin), extra, _ = example(variant, kernels, half, half)
    scale = {
        "a number as a tensor": lambda: torch.tensor(0.5, device=kernels),
        "a head each": lambda: torch.rand(1, HEADS, 1, 1).to(kernels, half),
        "wider": lambda: extra["scale"].float(),
        "with a gradient": lambda: extra["scale"].clone().requires_grad_(),
        "another width": lambda: extra["scale"][..., :1],
    }[kind]()
    extra["scale"] = scale
    ours, theirs = (f(q, q, cos, sin, variant=variant, **extra) for f in (rotary, reference.rotary))
    assert not any(used_kernel(y) for y in ours)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("place", [1, 2])
@pytest.mark.parametrize("batch", [1, BATCH])
def test_heads_where_unsqueeze_dim_says(kernels, place, batch):
    (q, k, cos, sin), _, _ = example(HALF, kernels)
    q, k = (x.transpose(1, 2) if place == 2 else x for x in (q, k))
    cos, sin = cos[:batch], sin[:batch]
    for a, b in zip(
        rotary(q, k, cos, sin, place), reference.rotary(q, k, cos, sin, place, variant=HALF), strict=True
    ):
        assert used_kernel(a)
        assert torch.equal(a, b)


@pytest.mark.parametrize("dim", [2, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("heads", [1, 40])
def test_head_dims_and_heads_of_any_number(kernels, dim, heads):
    q, k = (torch.randn(1, h, 3, dim, device=kernels) for h in (heads, 1))
    cos, sin = (torch.randn(1, 3, dim, device=kernels) for _ in range(2))
    for a, b in zip(rotary(q, k, cos, sin), reference.rotary(q, k, cos, sin, variant=HALF), strict=True):
        assert torch.equal(a, b)


def test_inputs_are_left_as_they_were(kernels):
    inputs, _, wanted = example(HALF, kernels)
    kept = [x.detach().clone() for x in inputs]
    ours = rotary(*inputs)
    gradients = [torch.randn_like(y) for y in ours]
    kept_gradients = [g.clone() for g in gradients]
    torch.autograd.grad(ours, wanted, gradients)
    assert all(torch.equal(a, b) for a, b in zip(inputs, kept, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(gradients, kept_gradients, strict=True))


@pytest.mark.parametrize("only", [0, 1])
def test_a_gradient_of_one_of_both(kernels, only):
    inputs, _, wanted = example(HALF, kernels)
    found = torch.autograd.grad(rotary(*inputs)[only].sum(), wanted, allow_unused=True)
    expected = torch.autograd.grad(reference.rotary(*inputs, variant=HALF)[only].sum(), wanted[only])[0]
    assert found[1 - only] is None
    assert torch.equal(found[only], expected)


def test_tables_that_want_a_gradient_go_through_the_definition(kernels):
    (q, k, cos, sin), _, _ = example(HALF, kernels)
    y, _ = rotary(q, k, cos.requires_grad_(), sin)
    assert torch.autograd.grad(y.sum(), cos)[0] is not None


@pytest.mark.parametrize("shape", [(0, 3, 5, 24), (2, 3, 0, 24)])
def test_empty_inputs(kernels, shape):
    q = torch.randn(shape, device=kernels, requires_grad=True)
    cos = torch.randn(shape[0], shape[2], 24, device=kernels)
    y, _ = rotary(q, q, cos, cos)
    y.sum().backward()
    assert q.grad.shape == shape


def test_channels_that_are_not_adjacent(kernels):
    (_, k, cos, sin), _, _ = example(HALF, kernels)
    q = torch.randn(BATCH, HEADS, TOKENS, 2 * DIM, device=kernels)[..., ::2]
    for a, b in zip(rotary(q, k, cos, sin), reference.rotary(q, k, cos, sin, variant=HALF), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "name",
    [
        "half",
        "complex_float32",
        "complex_head_2",
        "matrix_float32",
        "matrix",
        "matrix_sum_cast",
        "halves_full_scaled",
        "pairs_full_scaled_first",
    ],
)
def test_second_derivatives_are_those_of_the_definition(kernels, name):
    inputs, extra, (q, k) = example(VARIANTS[name], kernels)

    def second(function):
        a, b = function(*inputs, variant=VARIANTS[name], **extra)
        g = torch.autograd.grad((a.sin() * b.sum()).sum(), (q, k), create_graph=True)
        return torch.autograd.grad(sum(x.square().sum() for x in g), (q, k))

    for a, b in zip(second(rotary), second(reference.rotary), strict=True):
        assert_near(a, b, 4 * (3 + 4) + 3 * terms(BATCH * HEADS * TOKENS * DIM))


def test_opcheck(kernels):
    (q, k, cos, sin), _, _ = example(HALF, kernels)
    torch.library.opcheck(torch.ops.twinkle.rotary.default, (q, k, cos, sin, "half", False, q.dtype))
    torch.library.opcheck(torch.ops.twinkle.rotary.default, (q, None, cos, sin, "half_one", False, q.dtype))
    torch.library.opcheck(
        torch.ops.twinkle.rotary_backward.default, (q.detach(), None, cos, sin, "half", False, q.dtype)
    )


@pytest.mark.parametrize(
    "name",
    ["half", "partial", "interleaved", "vision", "complex_float32", "complex_float64", "matrix_float32"],
)
def test_compiled_without_a_graph_break(kernels, name):
    torch._dynamo.reset()
    inputs, extra, wanted = example(VARIANTS[name], kernels)
    backend = "inductor" if kernels.type == "cuda" else "aot_eager"
    compiled = torch.compile(
        lambda *a, **more: rotary(*a, variant=VARIANTS[name], **more), fullgraph=True, backend=backend
    )
    ours, theirs = compiled(*inputs, **extra), rotary(*inputs, variant=VARIANTS[name], **extra)
    gradients = [torch.randn_like(y) for y in theirs]
    found, expected = (torch.autograd.grad(y, wanted, gradients) for y in (ours, theirs))
    assert all(torch.equal(a, b) for a, b in zip((*ours, *found), (*theirs, *expected), strict=True))


def test_a_function_with_the_arguments_of_the_one_it_replaces(kernels):
    def original(query, key, c, s, position_ids=None, unsqueeze_dim=1):
        return query, key

    facts = {"q": "query", "k": "key", "cos": "c", "sin": "s", "unsqueeze_dim": "unsqueeze_dim"}
    made = function_for(HALF, facts, original)
    (q, k, cos, sin), _, _ = example(HALF, kernels)
    expected = apply_rotary_pos_emb(q, k, cos, sin)
    assert torch.equal(made(q, k, s=sin, c=cos)[0], expected[0])
    assert made is function_for(HALF, facts, original)
    with pytest.raises(ValueError, match="no argument 'elsewhere'"):
        function_for(HALF, {**facts, "cos": "elsewhere"}, original)
