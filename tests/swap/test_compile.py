"""Under ``torch.compile`` the kernel is in the graph: no break, also when it was not loaded before."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from twinkle.swap.layers import swap_out


class Graphs:
    """A backend that keeps what it is given."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Any:
        self.graphs.append(graph)
        return graph

    def __contains__(self, name: str) -> bool:
        """Whether the newest graph calls a function of that name."""
        return any(name in str(node.target) for node in self.graphs[-1].graph.nodes)

    def compile(self, module: nn.Module, **options: Any) -> Any:
        return torch.compile(module, backend=self, fullgraph=True, **options)


@pytest.fixture
def graphs() -> Any:
    torch._dynamo.reset()
    yield Graphs()
    torch._dynamo.reset()


class Tanh(nn.Module):
    """A kernel that a graph shows: the original has no tanh."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.proj(x))


class Cosine(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cos(self.proj(x))


def swapped(kit: Any, *candidates: Any) -> Any:
    model = kit.Model()
    for gate in model.children():
        kit.swap_in(gate, candidates)
    return model


@pytest.mark.parametrize("device", [None, "cpu"])
@pytest.mark.parametrize("ran", [True, False], ids=["ran before", "not loaded yet"])
def test_the_kernel_is_in_the_graph(kit: Any, graphs: Any, device: str | None, ran: bool) -> None:
    model = swapped(kit, kit.candidate(Tanh, device=device))
    if ran:
        model(kit.x)
    compiled = graphs.compile(model)
    out = compiled(kit.x)
    assert "tanh" in graphs
    torch.testing.assert_close(out, model(kit.x))
    assert len(graphs.graphs) == 1


def test_a_single_layer_compiles(kit: Any, graphs: Any) -> None:
    gate = kit.Gate()
    kit.swap_in(gate, [kit.candidate(Tanh, device="cpu")])
    compiled = graphs.compile(gate)
    compiled(kit.x)
    assert "tanh" in graphs


def test_a_builtin_layer_compiles(kit: Any, graphs: Any) -> None:
    class Kernel(nn.Module):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return torch.tanh(nn.functional.linear(input, self.weight, self.bias))

    linear = nn.Linear(4, 4)
    kit.swap_in(linear, [kit.candidate(Kernel, device="cpu")])
    graphs.compile(nn.Sequential(linear))(kit.x)
    assert "tanh" in graphs


def test_the_first_eager_call_after_compiling_recompiles_nothing(kit: Any, graphs: Any) -> None:
    model = swapped(kit, kit.candidate(Tanh, device="cpu"))
    compiled = graphs.compile(model)
    compiled(kit.x)
    model(kit.x)
    compiled(kit.x)
    assert len(graphs.graphs) == 1


def test_many_layers_and_shapes_stay_below_the_recompilation_limit(kit: Any, graphs: Any) -> None:
    wanted = kit.candidate(Tanh, device="cpu")
    model = nn.Sequential(*(kit.Gate() for _ in range(12)))
    for gate in model:
        kit.swap_in(gate, [wanted])
    compiled = graphs.compile(model)
    for rows in (2, 3, 5, 7):
        compiled(torch.ones(rows, 4))
    assert len(graphs.graphs) == 2  # the first shape, then any


def test_swapping_in_and_out_is_seen_by_a_compiled_model(kit: Any, graphs: Any) -> None:
    model = kit.Model()
    compiled = graphs.compile(model)
    before = compiled(kit.x)
    assert "tanh" not in graphs
    for gate in model.children():
        kit.swap_in(gate, [kit.candidate(Tanh)])
    compiled(kit.x)
    assert "tanh" in graphs
    for gate in model.children():
        swap_out(gate)
    assert torch.equal(compiled(kit.x), before)
    assert len(graphs.graphs) == 2  # the first graph holds again


def test_modes_are_followed_by_a_compiled_model(kit: Any, graphs: Any) -> None:
    model = swapped(kit, kit.candidate(Tanh, mode="train"), kit.candidate(Cosine, mode="inference"))
    compiled = graphs.compile(model)
    compiled(kit.x)
    assert "tanh" in graphs
    model.eval()
    compiled(kit.x)
    assert "cos" in graphs
    model.train()
    compiled(kit.x)
    assert len(graphs.graphs) == 2


def test_a_kernel_for_compile_runs_under_a_compiler_only(kit: Any, graphs: Any) -> None:
    model = swapped(kit, kit.candidate(Tanh, mode="compile"))
    eager = model(kit.x)
    graphs.compile(model)(kit.x)
    assert "tanh" in graphs
    plain = kit.Model()
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(eager, plain(kit.x))


@pytest.mark.parametrize("ran", [True, False], ids=["ran before", "not loaded yet"])
def test_a_kernel_that_cannot_be_compiled_is_not(kit: Any, graphs: Any, ran: bool) -> None:
    class Eager(Tanh):
        can_torch_compile = False

    model = swapped(kit, kit.candidate(Eager, device="cpu"))
    if ran:
        torch.testing.assert_close(model.first(kit.x), Tanh.forward(model.first, kit.x))
    graphs.compile(model)(kit.x)
    assert "tanh" not in graphs
    torch.testing.assert_close(model.first(kit.x), Tanh.forward(model.first, kit.x))


def test_a_kernel_that_raises_while_traced_leaves_the_original_in_the_graph(kit: Any, graphs: Any) -> None:
    class Raises(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise ValueError("no")

    wanted = kit.candidate(Raises)
    model = swapped(kit, wanted)
    plain = kit.Model()
    plain.load_state_dict(model.state_dict())
    with pytest.warns(UserWarning, match="quarantined"):
        out = graphs.compile(model)(kit.x)
    torch.testing.assert_close(out, plain(kit.x))
    assert wanted.binding.state == "quarantined"


def test_a_kernel_that_cannot_be_loaded_leaves_the_original_in_the_graph(kit: Any, graphs: Any) -> None:
    model = swapped(kit, kit.candidate(ImportError("gone")))
    with pytest.warns(UserWarning, match="gone"):
        graphs.compile(model)(kit.x)
    assert "sigmoid" in graphs


def test_another_device_is_not_loaded_while_tracing(kit: Any, graphs: Any) -> None:
    wanted = kit.candidate(Tanh, device="cuda")
    model = swapped(kit, wanted)
    graphs.compile(model)(kit.x)
    assert wanted.kernel.source.loads == 0


def test_a_kernel_without_backward_is_in_the_graph_without_gradients_only(kit: Any, graphs: Any) -> None:
    class Forward(Tanh):
        has_backward = False

    model = swapped(kit, kit.candidate(Forward, device="cpu"))
    compiled = graphs.compile(model)
    compiled(kit.x)
    assert "tanh" not in graphs
    with torch.no_grad():
        compiled(kit.x)
    assert "tanh" in graphs


def test_gradients_of_a_compiled_swapped_model(kit: Any) -> None:
    torch._dynamo.reset()
    model = swapped(kit, kit.candidate(Tanh, device="cpu"))
    torch.compile(model, backend="aot_eager", fullgraph=True)(kit.x).sum().backward()
    compiled = model.first.proj.weight.grad.clone()
    model.zero_grad()
    model(kit.x).sum().backward()
    torch.testing.assert_close(compiled, model.first.proj.weight.grad)


def test_super_in_a_kernel_is_traced(kit: Any, graphs: Any) -> None:
    class Around(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tanh(super().forward(x))

    model = swapped(kit, kit.candidate(Around, device="cpu"))
    graphs.compile(model)(kit.x)
    assert "tanh" in graphs
    assert "sigmoid" in graphs


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("ran", [True, False])
def test_gradient_checkpointing(kit: Any, reentrant: bool, ran: bool) -> None:
    model = swapped(kit, kit.candidate(Tanh, device="cpu"))
    if ran:
        model(kit.x)
    x = kit.x.clone().requires_grad_()
    checkpoint(model, x, use_reentrant=reentrant).sum().backward()
    recomputed = model.first.proj.weight.grad.clone()
    model.zero_grad()
    model(kit.x).sum().backward()
    torch.testing.assert_close(recomputed, model.first.proj.weight.grad)


def test_autocast_reaches_the_kernel(kit: Any) -> None:
    model = swapped(kit, kit.candidate(Tanh))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(kit.x).dtype is torch.bfloat16
        assert model(kit.x).dtype is torch.bfloat16


def test_export_sees_the_kernel(kit: Any) -> None:
    model = swapped(kit, kit.candidate(Tanh, device="cpu"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.export.export(model, (kit.x,), strict=False)
    assert "tanh" in exported.graph_module.code


@pytest.mark.parametrize("device", [None, "cpu"])
@pytest.mark.parametrize("ran", [True, False])
def test_fx_traces_the_kernel(kit: Any, device: str | None, ran: bool) -> None:
    model = swapped(kit, kit.candidate(Tanh, device=device))
    if ran:
        model(kit.x)
    assert "tanh" in torch.fx.symbolic_trace(model).code


def test_jit_traces_the_kernel(kit: Any) -> None:
    model = swapped(kit, kit.candidate(Tanh, device="cpu"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model, (kit.x,))
    torch.testing.assert_close(traced(kit.x), model(kit.x))
