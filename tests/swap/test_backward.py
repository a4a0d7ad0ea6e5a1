"""The backward of kernels that come with an ``autograd.Function``: where it raises, the original's is run."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from twinkle.errors import TwinkleWarning

FAILS_AT = 6


class Scale(nn.Module):
    """The layer."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.linspace(0.5, 2, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.w


def own_function(fails_at: int) -> type[torch.autograd.Function]:
    calls = [0]

    class Own(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
            ctx.save_for_backward(x, w)
            return x * w

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
            x, w = ctx.saved_tensors
            calls[0] += 1
            if calls[0] >= fails_at:
                raise torch.OutOfMemoryError("out of memory in backward")
            return dy * w, (dy * x).sum(0)

    return Own


def straight(own: Any, self: Any, x: Tensor) -> Tensor:
    made: Tensor = own.apply(x, self.w)
    return made


def reshaped(own: Any, self: Any, x: Tensor) -> Tensor:
    made: Tensor = own.apply(x.reshape(-1, 8), self.w)
    return made.view(x.shape)


def stretched(own: Any, self: Any, x: Tensor) -> Tensor:
    """Steps that are no mere changes of shape lie between the arguments and the function."""
    made: Tensor = own.apply(x * 1 + 0, (self.w * 2) / 2)
    return made


@pytest.mark.parametrize("way", [straight, reshaped, stretched])
@pytest.mark.parametrize("at", [1, 2, FAILS_AT])
def test_a_backward_that_raises_is_made_good(kit: Any, way: Any, at: int) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return way(own, self, x)

    own = own_function(at)
    kernel = type("Kernel", (nn.Module,), {"forward": forward})

    def train(wanted: Any) -> list[Tensor]:
        torch.manual_seed(0)
        layer = Scale()
        net = nn.Sequential(nn.Linear(8, 8), layer, nn.Linear(8, 8))
        if wanted is not None:
            kit.swap_in(layer, [wanted])
        optimizer = torch.optim.SGD(net.parameters(), 0.05)
        for step in range(10):
            optimizer.zero_grad()
            torch.manual_seed(step)
            hidden = net[0](torch.randn(2, 4, 8))
            (net[2](net[1](hidden) + hidden) - 1).square().mean().backward()
            optimizer.step()
        return [*net.parameters()]

    wanted = kit.candidate(kernel)
    with pytest.warns(TwinkleWarning, match="raised in its backward: OutOfMemoryError"):
        ours = train(wanted)
    for mine, other in zip(ours, train(None), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-7)
    assert wanted.binding.state == "quarantined"


def test_a_backward_that_cannot_be_made_good_names_the_kernel(kit: Any) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return straight(own, self, x)

    own = own_function(2)
    layer, wanted = Scale().eval(), kit.candidate(type("Kernel", (nn.Module,), {"forward": forward}))
    kit.swap_in(layer, [wanted])
    source = torch.randn(4, 8, requires_grad=True)
    layer(source).sum().backward()
    y = layer(source * 1)
    with (
        pytest.warns(TwinkleWarning, match="a graph of the gradients was asked for"),
        pytest.raises(torch.OutOfMemoryError),
    ):
        torch.autograd.grad(y.sum(), source, create_graph=True)
    assert wanted.binding.state == "quarantined"


def test_a_node_lets_the_arguments_go_with_its_backward(kit: Any) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return straight(own, self, x)

    own = own_function(10**9)
    layer = Scale().eval()
    kit.swap_in(layer, [kit.candidate(type("Kernel", (nn.Module,), {"forward": forward}))])
    source = torch.randn(4, 8, requires_grad=True)
    layer(source * 1).sum().backward()
    x = source * 1
    gone = weakref.ref(x)
    loss = layer(x).sum()
    del x
    loss.backward()
    assert gone() is None
    assert loss.grad_fn is not None
