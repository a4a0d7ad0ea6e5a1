"""A rewritten forward computes what the original does, whichever way its conditions go."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from twinkle.fuse.places import LayerThenActivation, SumThenLayer
from twinkle.fuse.rewrite import Draft


def rotate(q: Any, k: Any, cos: Any, sin: Any) -> Any:
    return q * cos - k * sin, k * cos + q * sin


class Base(nn.Module):
    def __init__(self, **settings: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mix, self.grow = nn.Linear(4, 4), nn.Linear(4, 4)
        self.norm, self.other = nn.RMSNorm(4), nn.RMSNorm(4)
        self.norms = nn.ModuleList([nn.RMSNorm(4), nn.RMSNorm(4)])
        for name, value in settings.items():
            setattr(self, name, value)


class Inside(Base):
    def forward(self, x: Any, r: Any) -> Any:
        return self.norm(x + self.mix(self.other(r + x * 0.5)))


class Listed(Base):
    def forward(self, x: Any, r: Any) -> Any:
        total = r + self.mix(x)
        return total, self.norms[1](total)


class Bent(Base):
    """A layer and then a function of what it gives, in every form, the second one in two branches."""

    def forward(self, x: Any, r: Any) -> Any:
        h = self.norm(x)
        h = self.grow(h)
        if self.kind == "plain":
            h = h + r
            h = self.other(h)
        elif self.kind == "scaled":
            h = self.other(h)
            h = h * 2
        else:
            h = self.other(h)
        h = nn.functional.silu(h)
        a = self.norm(h)
        a *= torch.sigmoid(a)
        b = self.norm(a)
        b = b * b.sigmoid() + r
        return h, a, b, self.norms[1](nn.functional.silu(self.norms[0](x)))


class Sometimes(Base):
    def forward(self, x: Any, r: Any) -> Any:
        x = r = r + self.mix(x)
        if not self.last:
            x = self.norm(x)
        else:
            r = self.other(r)
        return self.grow(x) + r


class Skipped(Base):
    """As a decoder's layer: its second attention is between the sum and the norm, where there is one."""

    def forward(self, x: Any, r: Any) -> Any:
        other = self.attended
        total = r + self.mix(x)
        if other is not None:
            x = total
            total = self.other(total)
            total = x + total * other
        x = total
        total = self.norm(total)
        return x + self.grow(total)


class Clipped(Base):
    def forward(self, x: Any, r: Any) -> Any:
        q = self.norm(self.mix(x))
        k = self.other(self.grow(r))
        if self.clip is not None:
            q.clamp_(-self.clip, self.clip)
            k.clamp_(-self.clip, self.clip)
        if self.window is None or self.slides:
            q, k = rotate(q, k, x.cos(), r.sin())
        return q, k


class Twice(Base):
    """Two pairs under one condition."""

    def forward(self, x: Any, r: Any) -> Any:
        q = self.norm(x)
        k = self.other(r)
        a = self.norms[0](x)
        b = self.norms[1](r)
        if self.turn:
            q, k = rotate(q, k, x, r)
            a, b = rotate(a, b, r, x)
        return q, k, a, b


def steps(place: Any, done: list[str]) -> tuple[Any, ...]:
    """What stands for the kernels: the definitions."""
    if isinstance(place, SumThenLayer):

        def both(owner: Any, left: Any, right: Any, layer: Any, factor: float = 1.0) -> Any:
            done.append("sum")
            total = left + right * factor
            return total, layer(total)

        def normed(owner: Any, left: Any, right: Any, layer: Any, factor: float = 1.0) -> Any:
            done.append("normed")
            return layer(left + right * factor)

        return both, normed
    if isinstance(place, LayerThenActivation):

        def begin(owner: Any, x: Any, layer: Any, function: Any) -> tuple[Any, bool]:
            if not getattr(owner, "bends", False):
                return layer(x), False
            done.append("begin")
            h = layer(x)
            return (h * torch.sigmoid(h) if function in (None, torch.sigmoid) else function(h)), True

        def whole(owner: Any, x: Any, layer: Any, function: Any) -> Any:
            return function(layer(x))

        return begin, whole

    def ready(owner: Any, q_layer: Any, k_layer: Any, function: Any) -> bool:
        done.append("ready")
        return True

    def fused(owner: Any, q: Any, k: Any, q_layer: Any, k_layer: Any, function: Any, c: Any, s: Any) -> Any:
        done.append("pair")
        return function(q_layer(q), k_layer(k), c, s)

    return ready, fused


CASES = [
    (Inside, {}, ["normed", "normed"]),
    (Listed, {}, ["sum"]),
    (Sometimes, {"last": False}, ["sum"]),
    (Sometimes, {"last": True}, []),
    (Skipped, {"attended": None}, ["sum"]),
    (Skipped, {"attended": 2.0}, []),
    (Clipped, {"clip": None, "window": None, "slides": False}, ["ready", "pair"]),
    (Clipped, {"clip": 0.1, "window": None, "slides": False}, []),
    (Clipped, {"clip": None, "window": 3, "slides": True}, ["ready", "pair"]),
    (Clipped, {"clip": None, "window": 3, "slides": False}, []),
    *[
        (Bent, {"kind": kind, "bends": bends}, ["begin"] * bends * (4 if kind != "scaled" else 3))
        for kind in ("plain", "scaled", "other")
        for bends in (False, True)
    ],
    (Twice, {"turn": True}, ["ready", "ready", "pair", "pair"]),
    (Twice, {"turn": False}, []),
]


@pytest.mark.parametrize(("cls", "settings", "expected"), CASES)
def test_the_same_results_from_other_steps(cls: type, settings: Any, expected: list[str]) -> None:
    draft, done = Draft(cls.forward), []  # type: ignore[attr-defined]
    # Which layer it is tells whether the place is behind a sum or before a function.
    wanted = {
        at: steps(place, done)
        for at, place in enumerate(draft.places)
        if isinstance(place, LayerThenActivation) == (cls is Bent)
    }
    made = draft.build(wanted)
    module = cls(**settings)
    x, r = torch.randn(2, 4), torch.randn(2, 4)
    for ours, theirs in zip(made(module, x, r), module(x, r), strict=True):
        assert torch.equal(ours, theirs)
    assert done == expected


def test_what_was_asked_ahead_holds_if_the_answer_changes() -> None:
    """A layer between that turns the condition around must not make queries that no norm was applied to."""
    draft, done = Draft(Clipped.forward), []
    made = draft.build({0: steps(draft.places[0], done)})
    module = Clipped(clip=None, window=None, slides=False)
    module.grow.register_forward_hook(lambda *_: setattr(module, "clip", 0.01))
    x, r = torch.randn(2, 4), torch.randn(2, 4)
    found = made(module, x, r)
    module.grow._forward_hooks.clear()
    module.clip = None
    assert torch.equal(found[0], module(x, r)[0])
    assert done == ["ready", "pair"]


def test_a_norm_that_was_not_applied_is_applied_where_it_is_asked_for_after_all() -> None:
    class Turned(Base):
        def forward(self, x: Any, r: Any) -> Any:
            h = x + r
            if self.on:
                h = self.norm(h)
            return h

    class Answers:
        given = iter([False, True])

        def __bool__(self) -> bool:
            return next(self.given)

    draft, done = Draft(Turned.forward), []
    made = draft.build({0: steps(draft.places[0], done)})
    x, r = torch.randn(2, 4), torch.randn(2, 4)
    assert torch.equal(made(Turned(on=Answers()), x, r), Turned(on=True)(x, r))
    assert done == []
