"""The words of code: every form of an op has one of its op, and common code that is none has few."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import nn

from twinkle.match.words import words_of
from twinkle.ops.catalog import all_ops


def helper(x: Any) -> Any:
    return torch.rsqrt(x)


@functools.lru_cache
def cached(n: int) -> Any:
    return torch.arange(n)


halved = functools.partial(torch.mul, 0.5)
scaled = functools.partial(helper)


class Base(nn.Module):
    def _norm(self, x: Any) -> Any:
        return x.pow(2).mean(-1)

    @property
    def factor(self) -> Any:
        return self.weight.exp()

    @staticmethod
    def flat(x: Any) -> Any:
        return x.flatten()


class Layer(Base):
    def _norm(self, x: Any) -> Any:
        return super()._norm(x)

    def forward(self, x: Any) -> Any:
        x += 1
        return [helper(part) for part in self._norm(x)], self.factor, cached(3), self.flat(x), scaled(x)


def names(function: Any, owner: Any = None, **options: Any) -> set[str]:
    return words_of(function, owner, **options).names


@pytest.mark.parametrize("word", ["rsqrt", "_norm", "pow", "mean", "exp", "arange", "flatten", "+", "helper"])
def test_it_goes_where_the_code_goes(word: str) -> None:
    assert word in names(Layer.forward, Layer)


def test_it_stays_where_it_is_told_to() -> None:
    assert names(Layer.forward, Layer, follow=False).isdisjoint({"mean", "exp", "arange"})


def test_products_and_sums_are_told_apart() -> None:
    assert {"+", "*"} & names(lambda a, b: a + b) == {"+"}
    assert {"+", "*"} & names(lambda a, b: a * b) == {"*"}
    assert {"+", "*"} & names(lambda a, b: (a - b) / a @ b**2) == set()


def test_nothing_of_torch_is_looked_into() -> None:
    found = words_of(nn.TransformerEncoderLayer.forward, nn.TransformerEncoderLayer)
    assert not found.functions


def test_what_is_no_python_has_no_words() -> None:
    assert not names(len)
    assert not names(torch.relu)
    assert not names(None)


def test_code_without_end_counts_as_code_with_every_word() -> None:
    scope: dict[str, Any] = {}
    for at in range(300):
        exec(f"def f{at}(x):\n    return f{at + 1}(x)", scope)
    assert words_of(scope["f0"]).have(frozenset({"mean"}))


@pytest.mark.parametrize(
    "op", [op for op in all_ops() if op.has("reference") and op.kind != "inside"], ids=repr
)
def test_the_definition_of_every_op_has_a_word_of_it(op: Any) -> None:
    reference = op.module("reference")
    made = [value for name, value in vars(reference).items() if callable(value) and name == op.name]
    for function in made or [reference.causal_lm_loss]:
        assert words_of(function).have(op.words)


def test_every_op_has_words() -> None:
    assert all(op.words for op in all_ops())
