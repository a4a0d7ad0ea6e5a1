"""``my_kernels.functions.apply_rotary_pos_emb`` against transformers' own."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb as original

if TYPE_CHECKING:
    from types import ModuleType

# batch, tokens, query heads, key heads, head size
SHAPES = [(2, 9, 4, 2, 16), (1, 1, 2, 2, 8), (3, 33, 8, 1, 64), (2, 0, 2, 2, 8)]


def angles(tokens: int, size: int, dtype: torch.dtype, batch: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    turn = torch.arange(tokens)[:, None] / 10 ** (torch.arange(size // 2) / size)
    both = torch.cat((turn, turn), -1).expand(batch, tokens, size)
    return both.cos().to(dtype), both.sin().to(dtype)


def call(function: Any, q: torch.Tensor, k: torch.Tensor, *rest: Any) -> list[torch.Tensor]:
    """The two results, and the gradients of both inputs for some fixed gradients of the results."""
    q, k = q.detach().requires_grad_(), k.detach().requires_grad_()
    out = function(q, k, *rest)
    generator = torch.Generator().manual_seed(5)
    grads = [torch.randn(y.shape, generator=generator).to(y.dtype) for y in out]
    return [*(y.detach() for y in out), *torch.autograd.grad(out, (q, k), grads)]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_results_and_gradients_are_bit_exact(
    kernels: ModuleType, shape: tuple[int, int, int, int, int], dtype: torch.dtype
) -> None:
    batch, tokens, heads, key_heads, size = shape
    torch.manual_seed(0)
    q = torch.randn(batch, heads, tokens, size).to(dtype)
    k = torch.randn(batch, key_heads, tokens, size).to(dtype)
    rest = angles(tokens, size, dtype)
    assert same(call(kernels.functions.apply_rotary_pos_emb, q, k, *rest), call(original, q, k, *rest))


def test_transposed_inputs_are_bit_exact_and_keep_their_layout(kernels: ModuleType) -> None:
    q, k = torch.randn(2, 9, 4, 16).transpose(1, 2), torch.randn(2, 9, 2, 16).transpose(1, 2)
    rest = angles(9, 16, torch.float32)
    ours, theirs = (call(f, q, k, *rest) for f in (kernels.functions.apply_rotary_pos_emb, original))
    assert same(ours, theirs)
    assert [y.stride() for y in ours[:2]] == [y.stride() for y in theirs[:2]]


def test_heads_after_tokens(kernels: ModuleType) -> None:
    q, k = torch.randn(2, 9, 4, 16), torch.randn(2, 9, 2, 16)
    rest = (*angles(9, 16, torch.float32, batch=2), 2)
    assert same(call(kernels.functions.apply_rotary_pos_emb, q, k, *rest), call(original, q, k, *rest))


def test_one_query_for_many_angles_gets_the_summed_gradient(kernels: ModuleType) -> None:
    q, k = torch.randn(1, 4, 9, 16), torch.randn(1, 2, 9, 16)
    cos, sin = angles(9, 16, torch.float32, batch=3)
    ours, theirs = (call(f, q, k, cos, sin) for f in (kernels.functions.apply_rotary_pos_emb, original))
    for mine, true in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, true)


def test_mixed_dtypes_promote_as_the_original_does(kernels: ModuleType) -> None:
    q, k = torch.randn(2, 4, 9, 16).bfloat16(), torch.randn(2, 2, 9, 16).bfloat16()
    rest = angles(9, 16, torch.float32)
    assert same(call(kernels.functions.apply_rotary_pos_emb, q, k, *rest), call(original, q, k, *rest))


def test_learned_angles_get_their_gradient(kernels: ModuleType) -> None:
    q, k = torch.randn(2, 4, 9, 16), torch.randn(2, 2, 9, 16)
    grads = []
    for function in (kernels.functions.apply_rotary_pos_emb, original):
        cos, sin = (angle.requires_grad_() for angle in angles(9, 16, torch.float32))
        sum(y.square().sum() for y in function(q, k, cos, sin * 1)).backward()
        grads.append(cos.grad)
    torch.testing.assert_close(*grads)


def test_frozen_keys_get_no_gradient(kernels: ModuleType) -> None:
    q, k = torch.randn(2, 4, 9, 16, requires_grad=True), torch.randn(2, 2, 9, 16)
    sum(
        y.sum() for y in kernels.functions.apply_rotary_pos_emb(q, k, *angles(9, 16, torch.float32))
    ).backward()
    assert q.grad is not None
    assert k.grad is None


def test_argument_names_are_the_originals(kernels: ModuleType) -> None:
    ours = inspect.signature(kernels.functions.apply_rotary_pos_emb)
    assert list(ours.parameters) == ["q", "k", "cos", "sin", "unsqueeze_dim"]


def test_compiles_in_one_graph(kernels: ModuleType) -> None:
    q, k = torch.randn(2, 4, 9, 16, requires_grad=True), torch.randn(2, 2, 9, 16, requires_grad=True)
    cos, sin = angles(9, 16, torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(kernels.functions.apply_rotary_pos_emb, fullgraph=True, backend="aot_eager")
    for mine, true in zip(compiled(q, k, cos, sin), original(q, k, cos, sin), strict=True):
        torch.testing.assert_close(mine, true)
