"""Rotations whose tables any code may have made: their own functions, and where these run the original."""

from __future__ import annotations

import pytest
import torch

from twinkle.match.structure import recognise
from twinkle.ops import plain
from twinkle.ops.rotary import cpu_backend, triton_backend
from twinkle.ops.rotary.call import maker_of

BATCH, TOKENS, HEADS, WIDTH = 2, 5, 3, 8


def turned_back(x, cos, sin):
    assert x.ndim == 4
    d = x.shape[3] // 2
    x1, x2 = x[..., :d], x[..., d:]
    return torch.cat([x1 * cos + x2 * sin, x1 * (-sin) + x2 * cos], 3)


def by_chunk(x, cos, sin):
    x1, x2 = x.chunk(2, dim=-1)
    turned = torch.cat((-x2, x1), dim=-1)
    return x * cos + turned * sin


def by_choice(x, freqs, use_real=True, *, dim=-1):
    if use_real:
        cos, sin = freqs
        if dim == -1:
            a, b = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
            turned = torch.stack([-b, a], dim=-1).flatten(3)
        else:
            a, b = x.reshape(*x.shape[:-1], 2, -1).unbind(-2)
            turned = torch.cat([-b, a], dim=-1)
        return (x.float() * cos + turned.float() * sin).to(x.dtype)
    return x * freqs[0]


def filled(x, cos, sin):
    out = torch.empty_like(x)
    out[..., 0::2] = x[..., 0::2] * cos - x[..., 1::2] * sin
    out[..., 1::2] = x[..., 0::2] * sin + x[..., 1::2] * cos
    return out


def partly(x, cos, sin, rotary_dim=4):
    a, b = x[..., :rotary_dim].chunk(2, dim=-1)
    return torch.cat((torch.cat((a * cos - b * sin, a * sin + b * cos), -1), x[..., rotary_dim:]), -1)


def kernel_of(original, backend=triton_backend):
    """The function for an original, and a list of the calls that its kernel took."""
    found = recognise(original)
    calls = []

    def attempt(*args, **named):
        made = backend.by_kernel(*args, **named)
        calls.append(made is not None)
        return made

    return maker_of(backend.rotary, attempt)(found.variant, found.facts, original), calls


def tensors(*table, dtype=torch.float32, shape=(BATCH, TOKENS, HEADS, WIDTH)):
    torch.manual_seed(0)
    x = torch.randn(shape).to(dtype)
    return x, *(torch.randn(table) for _ in range(2))


@pytest.fixture
def any_size(monkeypatch):
    monkeypatch.setattr(cpu_backend, "LEAST", 1)
    monkeypatch.setattr(cpu_backend, "LEAST_INFERENCE", 1)
    monkeypatch.setattr(plain, "CHUNK", 500)


@pytest.mark.parametrize("wide", [True, False])
def test_the_kernel_turns_along_the_tokens_that_the_tables_say(kernels, half, wide):
    dtype = torch.float32 if wide else half
    made, calls = kernel_of(turned_back)
    for table in ((1, TOKENS, 1, 4), (TOKENS, 1, 4), (BATCH, TOKENS, 1, 4), (1, 1, HEADS, 4), (1, 1, 1, 4)):
        x, cos, sin = (t.to(kernels) for t in tensors(*table, dtype=dtype))
        assert torch.equal(
            made(x, cos.to(dtype), sin.to(dtype)), turned_back(x, cos.to(dtype), sin.to(dtype))
        )
    assert calls == [True] * 5


def test_gradients_are_those_of_the_original(kernels):
    made, calls = kernel_of(turned_back)
    x, cos, sin = (t.to(kernels) for t in tensors(1, TOKENS, 1, 4))
    x.requires_grad_()
    push = torch.randn(x.shape).to(kernels)
    found, expected = (torch.autograd.grad(f(x, cos, sin), x, push)[0] for f in (made, turned_back))
    assert calls == [True]
    assert torch.equal(found, expected)


def test_an_odd_number_of_channels_is_left_to_the_original(kernels):
    made, calls = kernel_of(by_chunk)
    x, cos, sin = (t.to(kernels) for t in tensors(1, TOKENS, 1, 7, shape=(BATCH, TOKENS, HEADS, 7)))
    assert torch.equal(made(x, cos, sin), by_chunk(x, cos, sin))
    assert calls == []


def test_three_dimensions_are_left_to_the_original(kernels):
    made, calls = kernel_of(by_chunk)
    x, cos, sin = (t.to(kernels) for t in tensors(TOKENS, 1, WIDTH, shape=(TOKENS, HEADS, WIDTH)))
    assert torch.equal(made(x, cos, sin), by_chunk(x, cos, sin))
    with pytest.raises(AssertionError):
        kernel_of(turned_back)[0](x, cos, sin)
    assert calls == []


@pytest.mark.parametrize("table", [(BATCH, TOKENS, HEADS, WIDTH), (4, 1, TOKENS, 1, WIDTH), (1,), (WIDTH,)])
def test_tables_that_are_not_one_row_a_token_are_left_to_the_original(kernels, table):
    made, calls = kernel_of(by_chunk)
    x, cos, sin = (t.to(kernels) for t in tensors(*table))
    assert torch.equal(made(x, cos, sin), by_chunk(x, cos, sin))
    assert calls == [False]


def test_tables_that_enlarge_the_result_are_left_to_the_original(kernels):
    made, calls = kernel_of(by_chunk)
    x, cos, sin = (t.to(kernels) for t in tensors(3, TOKENS, 1, WIDTH, shape=(1, TOKENS, HEADS, WIDTH)))
    assert made(x, cos, sin).shape == (3, TOKENS, HEADS, WIDTH)
    assert calls == [False]


def test_tables_that_want_a_gradient_are_left_to_the_original(kernels):
    made, calls = kernel_of(by_chunk)
    x, cos, sin = (t.to(kernels) for t in tensors(1, TOKENS, 1, WIDTH))
    cos.requires_grad_()
    assert torch.autograd.grad(made(x, cos, sin).sum(), cos)[0] is not None
    assert calls == [False]


def test_another_path_of_the_code_is_left_to_the_original(kernels, half):
    made, calls = kernel_of(by_choice)
    x, cos, sin = (t.to(kernels) for t in tensors(1, TOKENS, 1, WIDTH, dtype=half))
    assert torch.equal(made(x, (cos, sin)), by_choice(x, (cos, sin)))
    assert calls == [True]
    for options in ({"dim": -2}, {"use_real": False}, {"use_real": 1}):
        assert torch.equal(made(x, (cos, sin), **options), by_choice(x, (cos, sin), **options))
    assert calls == [True]


def test_a_filled_tensor_has_the_strides_of_the_turned_one(kernels):
    made, calls = kernel_of(filled)
    x, cos, sin = (t.to(kernels) for t in tensors(1, TOKENS, 1, 4))
    assert torch.equal(made(x, cos, sin), filled(x, cos, sin))
    assert calls == [True]
    x = x.transpose(1, 2).contiguous().transpose(1, 2)
    assert made(x, cos, sin).stride() == filled(x, cos, sin).stride()
    assert calls == [True]


def test_as_many_channels_as_an_argument_says(kernels):
    made, calls = kernel_of(partly)
    x, cos, sin = (t.to(kernels) for t in tensors(1, TOKENS, 1, 2))
    assert torch.equal(made(x, cos, sin), partly(x, cos, sin))
    assert calls == [True]
    with pytest.raises(RuntimeError):
        made(x, cos, sin, 6)  # as the original does
    assert calls == [True, False]


def test_in_plain_torch_on_a_cpu(any_size):
    made, calls = kernel_of(turned_back, cpu_backend)
    x, cos, sin = tensors(1, TOKENS, 1, 4)
    assert torch.allclose(made(x, cos, sin), turned_back(x, cos, sin), atol=1e-6)
    assert calls == [True]


def test_what_the_code_reads_of_a_parameter_may_be_given_or_absent(kernels):
    def indexed(q, k, cos, sin, position_ids=None):
        if position_ids is None:
            return q, k
        cos, sin = cos[position_ids].unsqueeze(1), sin[position_ids].unsqueeze(1)
        return q * cos + _rotated(q) * sin, k * cos + _rotated(k) * sin

    found = recognise(indexed)
    assert found.facts["requires"] == ("position_ids given",)
    made = triton_backend.function_for(found.variant, found.facts, indexed)
    q, cos, sin = (t.to(kernels) for t in tensors(9, WIDTH, shape=(BATCH, HEADS, TOKENS, WIDTH)))
    positions = torch.randint(0, 9, (BATCH, TOKENS), device=kernels)
    assert torch.equal(made(q, q, cos, sin, positions)[0], indexed(q, q, cos, sin, positions)[0])
    assert made(q, q, cos, sin)[0] is q


def _rotated(x):
    x1, x2 = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return torch.cat((-x2, x1), dim=-1)
