"""A kernel that a compiler meets before it ever ran is proven first, on made-up inputs."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
from rounding import assert_near, terms
from torch import nn

from twinkle.ops.cases import cases, variants
from twinkle.proof.first_use import inputs_for
from twinkle.records import Binding, FunctionKernel, LayerKernel
from twinkle.sources.embedded import EmbeddedFunction, EmbeddedLayer
from twinkle.swap.candidate import Candidate, FunctionCandidate
from twinkle.swap.functions import dispatcher
from twinkle.swap.layers import plan
from twinkle.targets import own_forward

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def norm(factor: float, widths: tuple[int, ...] = (48,)) -> tuple[list[nn.Module], Binding]:
    """Norms with a kernel that is off by a factor, which a graph shows as a cosine."""
    variant = variants("rms_norm")[0]
    sample = next(iter(cases("rms_norm", variant, torch.float32, CPU)))
    source = EmbeddedLayer("rms_norm", variant, sample.facts)
    kernel: Any = sample.kernel

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return kernel(self, x) * (torch.cos(torch.zeros(())) * (factor if x.shape[-1] == widths[-1] else 1.0))

    source.made = type("Shown", (nn.Module,), {"forward": forward, "can_torch_compile": True})
    binding = Binding("layer", "program:Norm", "rms_norm", source)
    candidate = Candidate(LayerKernel("rms_norm", source, chosen_by="twinkle"), binding, proofs=1)
    modules: list[nn.Module] = [type(sample.module)(variant, width, torch.float32, CPU) for width in widths]
    for module in modules:
        plan(module, [candidate]).commit()
    return modules, binding


def compiled(function: Callable[..., Any], backend: str = "eager") -> tuple[Any, list[str]]:
    """The function compiled into one graph, and the names of what the graph calls."""
    from torch._dynamo.backends.registry import lookup_backend

    seen: list[str] = []
    inner = lookup_backend(backend)

    def keep(graph: Any, inputs: Any) -> Any:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return inner(graph, inputs)

    return torch.compile(function, backend=keep, fullgraph=True), seen


def quietly(call: Callable[..., Any], *args: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call(*args)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_right_kernel_is_proven_and_compiled(backend: str) -> None:
    (module,), binding = norm(1.0)
    run, seen = compiled(module, backend)
    x = torch.randn(2, 5, 48, requires_grad=True)
    run(x).sum().backward()
    assert any("cos" in name for name in seen)
    assert binding.proof.startswith("proven: error")
    assert "gradients" in binding.proof
    assert x.grad is not None


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_wrong_kernel_is_never_compiled(backend: str) -> None:
    (module,), binding = norm(1.01)
    plain = own_forward(type(module))
    run, seen = compiled(module, backend)
    x = torch.randn(2, 5, 48)
    assert_near(quietly(run, x), plain(module, x), 2 * terms(48) + 24)
    assert not any("cos" in name for name in seen)
    assert (binding.state, binding.proof.partition(":")[0]) == ("failed", "rejected")


def test_every_width_of_a_model_is_tried() -> None:
    (first, second), binding = norm(1.01, (48, 24))
    run, _ = compiled(first)
    quietly(run, torch.randn(2, 5, 48))
    assert binding.state == "failed", f"the kernel is wrong for {second} alone"


def test_in_inference_no_gradients_are_compared() -> None:
    (module,), binding = norm(1.0)
    run, _ = compiled(module)
    with torch.no_grad():
        run(torch.randn(2, 5, 48))
    assert binding.proof.startswith("proven: error")
    assert "gradients" not in binding.proof


@pytest.mark.parametrize(("factor", "state"), [(1.0, "active"), (1.01, "failed")])
def test_a_function_is_proven_too(factor: float, state: str) -> None:
    variant = variants("rotary")[0]
    sample = next(iter(cases("rotary", variant, torch.float32, CPU)))
    source = EmbeddedFunction("rotary", variant, sample.facts, sample.original)

    def planted(q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: Any) -> Any:
        q, k = sample.kernel(q, k, cos, sin, unsqueeze_dim)
        return q * factor, k

    source.made = planted
    binding = Binding("function", "program:f", "rotary", source)
    candidate = FunctionCandidate(
        FunctionKernel("f", "program", source, chosen_by="twinkle"), binding, proofs=1
    )
    turn = dispatcher(sample.original, [candidate])
    run, _ = compiled(lambda *args: turn(*args))
    found = quietly(run, *sample.args)
    assert binding.state == state
    assert binding.proof != "unproven"
    for a, b in zip(found, sample.original(*sample.args), strict=True):
        assert_near(a, b, 2 * terms(48) + 24)


def test_random_numbers_of_the_program_are_as_without() -> None:
    (module,), _ = norm(1.0)
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    compiled(module)[0](torch.ones(2, 5, 48))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("op", ["rms_norm", "gated_mlp"])
def test_inputs_can_be_made_up_for_every_variant_of_a_layer(op: str) -> None:
    for variant in variants(op):
        sample = next(iter(cases(op, variant, torch.float32, CPU)))
        source = EmbeddedLayer(op, variant, sample.facts)
        given = inputs_for(source, sample.original, sample.module, dtype=None, device=None)
        if getattr(variant, "gate", "none") == "none":
            assert given is not None
            sample.original(sample.module, *given)


def test_inputs_can_be_made_up_for_every_variant_of_rotary() -> None:
    for variant in variants("rotary"):
        if variant.pairs in ("complex", "matrix"):
            continue
        sample = next(iter(cases("rotary", variant, torch.float32, CPU)))
        source = EmbeddedFunction("rotary", variant, sample.facts, sample.original)
        given = inputs_for(source, sample.original, None, dtype=torch.bfloat16, device="cpu")
        assert given is not None
        sample.original(*given)


def test_arguments_are_made_up_for_what_takes_anything() -> None:
    variant = variants("rotary")[0]
    sample = next(iter(cases("rotary", variant, torch.float32, CPU)))
    source = EmbeddedFunction("rotary", variant, sample.facts, sample.original)

    def anything(*args: Any, **kwargs: Any) -> Any:
        return sample.original(*args, **kwargs)

    assert inputs_for(source, anything, None, dtype=torch.float32, device="cpu") is None


def test_another_dtype_is_proven_before_it_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    from twinkle.proof import first_use

    (module,), _ = norm(1.0)
    module(torch.randn(2, 5, 48))
    made: list[torch.dtype] = []
    real = first_use.compare

    def compare(*given: Any, **options: Any) -> Any:
        made.append(given[2][0].dtype)
        return real(*given, **options)

    monkeypatch.setattr(first_use, "compare", compare)
    run, seen = compiled(module)
    run(torch.randn(2, 5, 48))
    assert made == []
    module.to(torch.bfloat16)
    run(torch.randn(2, 5, 48, dtype=torch.bfloat16))
    assert made == [torch.bfloat16]
    assert sum("cos" in name for name in seen) == 2
