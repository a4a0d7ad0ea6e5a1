"""What only a GPU shows: the swap follows ``.to()``, and launches on the GPU of the tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from twinkle.swap.functions import dispatcher
from twinkle.swap.layers import placed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine"),
]
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs on this machine")


def ratio(kit: Any, gate: Any) -> float:
    x = kit.x.to(gate.proj.weight.device)
    # Not `Gate.forward`, in whose place the function stands that asks for the mark.
    return round((gate(x) / (torch.sigmoid(gate.proj(x)) * x)).mean().item(), 3)


def test_a_module_is_followed_to_the_gpu_and_back(kit: Any) -> None:
    gate = kit.Gate()
    on_gpu, on_cpu = (
        kit.candidate(kit.kernel_times(3), device="cuda"),
        kit.candidate(kit.kernel_times(5), device="cpu"),
    )
    kit.swap_in(gate, [on_gpu, on_cpu])
    assert ratio(kit, gate) == 5
    assert on_gpu.kernel.source.loads == 0
    gate.to("cuda")
    assert ratio(kit, gate) == 3
    gate.cpu()
    assert ratio(kit, gate) == 5
    gate.cuda()
    assert ratio(kit, gate) == 3


def test_rocm_and_cuda_kernels_are_told_apart(kit: Any) -> None:
    gate = kit.Gate().cuda()
    own, other = ("rocm", "cuda") if torch.version.hip else ("cuda", "rocm")
    kit.swap_in(
        gate,
        [kit.candidate(kit.kernel_times(3), device=other), kit.candidate(kit.kernel_times(5), device=own)],
    )
    assert ratio(kit, gate) == 5


def test_modes_are_followed_on_the_gpu(kit: Any) -> None:
    gate = kit.Gate().cuda()
    kit.swap_in(
        gate,
        [
            kit.candidate(kit.kernel_times(3), device="cuda", mode="train"),
            kit.candidate(kit.kernel_times(5), device="cuda", mode="inference"),
        ],
    )
    assert [ratio(kit, gate.train()), ratio(kit, gate.eval()), ratio(kit, gate.train())] == [3, 5, 3]


def test_compiled_on_the_gpu(kit: Any) -> None:
    torch._dynamo.reset()
    gate = kit.Gate().cuda()
    kit.swap_in(gate, [kit.candidate(kit.GateKernel, device="cuda")])
    x = kit.x.cuda()
    out = torch.compile(gate, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(out, kit.GateKernel.forward(gate, x))


class Launched(nn.Module):
    """Says on which GPU a raw launch would go."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x) * 0 + torch.cuda.current_device()


@two_gpus
@pytest.mark.parametrize("device", [None, "cuda"])
def test_a_kernel_is_launched_on_the_gpu_of_its_tensors(kit: Any, device: str | None) -> None:
    gates = [kit.Gate().to(f"cuda:{index}") for index in (0, 1)]
    wanted = kit.candidate(Launched, device=device)
    for gate in gates:
        kit.swap_in(gate, [wanted])
    for current in (0, 1):
        with torch.cuda.device(current):
            for index in (0, 1, 0, 1):
                out = gates[index](kit.x.to(f"cuda:{index}"))
                assert out.flatten()[0].item() == index
            assert torch.cuda.current_device() == current


@two_gpus
def test_a_function_kernel_is_launched_on_the_gpu_of_its_tensors(kit: Any) -> None:
    def original(x: torch.Tensor) -> Any:
        return -1

    made = dispatcher(
        original, [kit.function_candidate(lambda x: torch.cuda.current_device(), device="cuda")]
    )
    assert [made(kit.x.to(f"cuda:{i}")) for i in (1, 0, 1, 1)] == [1, 0, 1, 1]


@two_gpus
def test_layers_of_one_model_on_two_gpus(kit: Any) -> None:
    model = kit.Model()
    model.first.to("cuda:0")
    model.second.to("cuda:1")
    model.second.register_forward_pre_hook(lambda m, a: (a[0].to("cuda:1"),))
    wanted = kit.candidate(kit.GateKernel, device="cuda")
    expected = kit.GateKernel.forward(
        model.second, kit.GateKernel.forward(model.first, kit.x.to("cuda:0")).to("cuda:1")
    )
    for gate in model.children():
        kit.swap_in(gate, [wanted])
    for _ in range(2):
        torch.testing.assert_close(model(kit.x.to("cuda:0")), expected)
    assert placed(model.first) is placed(model.second)
    model(kit.x.to("cuda:0")).sum().backward()
    assert model.first.proj.weight.grad.device.index == 0
