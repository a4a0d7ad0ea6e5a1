"""Norms, activations and gated products that a program writes as functions get their kernels."""

from __future__ import annotations

import gc
import linecache
import sys
import types
import weakref
from typing import TYPE_CHECKING, Any

import pytest
import torch

from twinkle.apply.layers import kernelize_layers
from twinkle.match.structure import recognise
from twinkle.ops import plain
from twinkle.runtime import runtime

if TYPE_CHECKING:
    from collections.abc import Callable

    from twinkle.registry import Registry

OPS = ("rms_norm", "layer_norm", "activation", "gated_mlp")
HEAD = "import math\nimport torch\nfrom torch import nn\nimport torch.nn.functional as F\n"
NET = """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(16, 32, bias=False), nn.Linear({width}, 16, bias=False)
        self.weight, self.bias = nn.Parameter(torch.randn(32)), nn.Parameter(torch.randn(32))
        self.eps = 1e-6

    def forward(self, x):
        return self.last({call})
{methods}
"""
# The function, its call with the result `x` of a linear layer, the width of what comes out, the variant.
FUNCTIONS = {
    "nanochat": ("def norm(x):\n    return F.rms_norm(x, (x.size(-1),))", "norm(x)", 32, "fused_unweighted"),
    "weight and eps": (
        """
def norm(x, weight, eps=1e-6):
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    return weight * h.to(x.dtype)""",
        "norm(x, self.weight, self.eps)",
        32,
        "llama",
    ),
    "weight or none": (
        """
def norm(x, weight=None, eps=1e-6):
    h = x.float()
    h = (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)
    return h if weight is None else weight * h""",
        "norm(norm(x), self.weight)",
        32,
        "llama_nullable",
    ),
    "of the weight's shape": (
        "def norm(x, weight, eps):\n    return F.rms_norm(x, weight.shape, weight, eps)",
        "norm(x, self.weight, self.eps)",
        32,
        "fused",
    ),
    "layer_norm": (
        "def norm(x, w, b, eps=1e-5):\n    return F.layer_norm(x, x.shape[-1:], w, b, eps)",
        "norm(x, self.weight, self.bias)",
        32,
        "fused",
    ),
    "layer_norm that is written out": (
        """
def norm(x, w, b, eps=1e-5):
    h = x.float()
    mean = h.mean(-1, keepdim=True)
    var = (h - mean).pow(2).mean(-1, keepdim=True)
    return ((h - mean) * torch.rsqrt(var + eps) * w + b).to(x.dtype)""",
        "norm(x, self.weight, self.bias)",
        32,
        "out_float32_both_mean_square_rsqrt_after_weight",
    ),
    "gelu_new": (
        """
def gelu_new(x):
    inner = math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))
    return 0.5 * x * (1.0 + torch.tanh(inner))""",
        "gelu_new(x)",
        32,
        "gelu_tanh_cubed",
    ),
    "swiglu": (
        "def swiglu(x):\n    a, b = x.chunk(2, -1)\n    return F.silu(a) * b",
        "swiglu(x)",
        16,
        "activation",
    ),
    "geglu": (
        "def geglu(x):\n    x, gate = x.chunk(2, dim=-1)\n    return x * F.gelu(gate)",
        "geglu(x)",
        16,
        "activation_up_first",
    ),
    "slices": (
        "def act(x):\n    d = x.shape[-1] // 2\n    return F.silu(x[..., :d]) * x[..., d:]",
        "act(x)",
        16,
        "activation",
    ),
    "silu_and_mul": (
        "def silu_and_mul(gate, up):\n    return F.silu(gate) * up",
        "silu_and_mul(x, x.flip(-1))",
        32,
        "given",
    ),
}
METHODS = {
    "norm": (
        """
    def _norm(self, x):
        return F.rms_norm(x, (x.size(-1),), self.weight)""",
        "self._norm(x)",
        "Net._norm",
    ),
    "eps": (
        """
    def _norm(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)""",
        "self._norm(x)",
        "Net._norm",
    ),
    "static": (
        """
    @staticmethod
    def norm(x, weight):
        return weight * F.rms_norm(x, x.shape[-1:], eps=1e-5)""",
        "self.norm(x, self.weight)",
        "Net.norm",
    ),
    "gated": (
        """
    def _act(self, x, gate):
        return F.silu(gate) * x""",
        "self._act(x, x.flip(0))",
        "Net._act",
    ),
}


class Notebook:
    """A module whose code comes by and by."""

    def __init__(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.module: Any = types.ModuleType(name)
        self.cells = 0
        monkeypatch.setitem(sys.modules, name, self.module)
        self.run(HEAD)

    def run(self, source: str) -> Any:
        self.cells += 1
        path = f"<cell {self.module.__name__} {self.cells}>"
        linecache.cache[path] = (len(source), None, source.splitlines(keepends=True), path)
        exec(compile(source, path, "exec"), vars(self.module))
        return self.module


@pytest.fixture
def notebook(clean_registry: Registry, monkeypatch: pytest.MonkeyPatch) -> Notebook:
    runtime.options.kernels = OPS
    return Notebook("norms_notebook", monkeypatch)


def step(model: Any, x: torch.Tensor) -> list[torch.Tensor]:
    x = x.detach().requires_grad_()
    y = model(x)
    wanted = [p for p in model.parameters() if p.requires_grad]
    made = torch.autograd.grad(y.float().square().sum(), [x, *wanted], allow_unused=True)
    return [y.detach(), *(g for g in made if g is not None)]


def active(registry: Registry) -> list[tuple[str, str, str]]:
    return [(b.target.partition(":")[2], b.state, b.source) for b in registry.bindings if ":" in b.target]


def of_kernels(model: Any, x: torch.Tensor) -> set[str]:
    """The names of Twinkle's nodes in the graph of a result."""
    found, todo = set(), [model(x).grad_fn]
    while todo:
        node = todo.pop()
        if node is not None:
            found.add(type(node).__name__)
            todo += [after for after, _ in node.next_functions]
    return {name for name in found if name.startswith("_")}


NODES = {"_RMSNormBackward", "_LayerNormBackward", "_ActivationBackward", "_GatedBackward", "_FusedBackward"}


def served(model: Any, x: torch.Tensor, registry: Registry, target: str) -> None:
    """A step with the kernel: it is active under that target, and gives what the function gave."""
    expected = step(model, x)
    kernelize_layers(model)
    with plain.at_every_size():
        step(model, x)  # is compared
        found = step(model, x)
        assert of_kernels(model, x) & NODES
    (only,) = active(registry)
    assert (only[0], only[1]) == (target, "active")
    room = 16 * torch.finfo(x.dtype).eps
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        assert (a - b).float().norm() <= room * b.float().norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", FUNCTIONS)
def test_a_function_gets_its_kernel(
    notebook: Notebook, clean_registry: Registry, kernels: torch.device, case: str, dtype: torch.dtype
) -> None:
    function, call, width, variant = FUNCTIONS[case]
    call = f"(lambda x: {call})(self.first(x))"
    module = notebook.run(function + NET.format(call=call, width=width, methods=""))
    name = function.strip().removeprefix("def ").partition("(")[0]
    assert recognise(getattr(module, name)).variant.name == variant
    torch.manual_seed(0)
    model = module.Net().to(kernels, dtype)
    served(model, torch.randn(2, 5, 16).to(kernels, dtype), clean_registry, name)


@pytest.mark.parametrize("case", METHODS)
def test_a_method_gets_its_kernel(
    notebook: Notebook, clean_registry: Registry, kernels: torch.device, case: str
) -> None:
    methods, call, target = METHODS[case]
    call = f"(lambda x: {call})(self.first(x))"
    module = notebook.run(NET.format(call=call, width=32, methods=methods))
    torch.manual_seed(0)
    served(module.Net().to(kernels), torch.randn(2, 5, 16).to(kernels), clean_registry, target)


GIVEN: dict[str, Callable[[Any, torch.Tensor], Any]] = {
    "a weight for each token": lambda f, x: f(x, torch.randn(5, 1, device=x.device)),
    "a weight for each entry": lambda f, x: f(x, torch.randn(2, 5, 16, device=x.device)),
    "a number for a weight": lambda f, x: f(x, 2.0),
    "a tensor for eps": lambda f, x: f(x, torch.ones(16, device=x.device), torch.tensor(0.5)),
    "float64": lambda f, x: f(x.double(), torch.ones(16, device=x.device).double()),
    "no rows": lambda f, x: f(x[:0], torch.ones(16, device=x.device)),
    "one row": lambda f, x: f(x[0, 0], torch.randn(16, device=x.device)),
    "by keyword": lambda f, x: f(eps=0.5, weight=torch.randn(16, device=x.device), x=x),
    "integers": lambda f, x: f(x.to(torch.int64), torch.ones(16, device=x.device)),
    "vmap": lambda f, x: torch.func.vmap(f, in_dims=(0, None))(x, torch.ones(16, device=x.device)),
}


@pytest.mark.parametrize("way", GIVEN)
def test_whatever_a_function_is_given_it_gives_what_it_gave(
    notebook: Notebook, clean_registry: Registry, kernels: torch.device, way: str
) -> None:
    function = FUNCTIONS["weight and eps"][0]
    call = "norm(self.first(x), self.weight)"
    module = notebook.run(function + NET.format(call=call, width=32, methods=""))
    x = torch.randn(2, 5, 16).to(kernels)

    def made() -> Any:
        torch.manual_seed(1)
        try:
            return GIVEN[way](module.norm, x)
        except Exception as error:
            return type(error), str(error)

    expected = made()
    model = module.Net().to(kernels)
    kernelize_layers(model)
    model(x)  # is compared, and active from now on
    assert [state for _, state, _ in active(clean_registry)] == ["active"]
    found = made()
    if isinstance(expected, tuple):
        assert found == expected
    else:
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected)


def test_an_odd_width_is_the_function_s_own(
    notebook: Notebook, clean_registry: Registry, kernels: torch.device
) -> None:
    function = FUNCTIONS["slices"][0]
    module = notebook.run(function + NET.format(call="act(self.first(x))", width=16, methods=""))
    x = torch.randn(2, 3).to(kernels)
    expected = module.act(x)  # one entry beside two: they are spread
    model = module.Net().to(kernels)
    kernelize_layers(model)
    model(torch.randn(2, 5, 16).to(kernels))
    assert torch.equal(module.act(x), expected)


def test_a_method_that_no_forward_leads_to_is_left_alone(
    notebook: Notebook, clean_registry: Registry, kernels: torch.device
) -> None:
    methods, _, _ = METHODS["norm"]
    module = notebook.run(NET.format(call="self.first(x)", width=32, methods=methods))
    kernelize_layers(module.Net().to(kernels))
    assert active(clean_registry) == []


@pytest.mark.parametrize("case", ["nanochat", "of the weight's shape", "layer_norm"])
def test_a_small_call_of_one_kernel_of_torch_is_torch_s(
    notebook: Notebook, clean_registry: Registry, kernels: torch.device, case: str
) -> None:
    function, call, width, _ = FUNCTIONS[case]
    call = f"(lambda x: {call})(self.first(x))"
    model = notebook.run(function + NET.format(call=call, width=width, methods="")).Net().to(kernels)
    x = torch.randn(2, 5, 16).to(kernels)
    expected = model(x)
    kernelize_layers(model)
    model(x)
    assert torch.equal(model(x), expected)
    assert not of_kernels(model, x) & NODES


def test_nothing_is_held_of_a_function_that_is_gone(
    notebook: Notebook, clean_registry: Registry, kernels: torch.device
) -> None:
    methods, _, _ = METHODS["norm"]
    text = NET.format(call="self._norm(self.first(x))", width=32, methods=methods)
    first = notebook.run(text).Net().to(kernels)
    kernelize_layers(first)
    gone = weakref.ref(type(first))
    again = notebook.run(text).Net().to(kernels)
    kernelize_layers(again)
    del first
    for _ in range(3):
        gc.collect()
    assert gone() is None


ONE_KERNEL = """
def act(x):
    return F.gelu(x)

def gate(x):
    return F.glu(x, dim=-1)
"""


def test_what_is_one_kernel_of_torch_is_left_alone(notebook: Notebook, clean_registry: Registry) -> None:
    net = NET.format(call="gate(act(self.first(x)))", width=16, methods="")
    kernelize_layers(notebook.run(ONE_KERNEL + net).Net())
    assert active(clean_registry) == []


def test_a_function_of_a_variant_without_a_kernel_is_left_alone(
    notebook: Notebook, clean_registry: Registry
) -> None:
    function = """
def norm(x, weight):
    h = weight * x
    return h * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)"""
    net = NET.format(call="norm(self.first(x), self.weight)", width=32, methods="")
    module = notebook.run(function + net)
    assert recognise(module.norm).variant.name == "scaled_first"
    kernelize_layers(module.Net())
    assert active(clean_registry) == []


def test_a_shape_of_two_dimensions_is_the_function_s_own(
    notebook: Notebook, clean_registry: Registry, kernels: torch.device
) -> None:
    function = "def norm(x, weight):\n    return F.rms_norm(x, weight.shape, weight, 1e-6)"
    module = notebook.run(
        function + NET.format(call="norm(self.first(x), self.weight)", width=32, methods="")
    )
    x, weight = torch.randn(2, 5, 32).to(kernels), torch.randn(5, 32).to(kernels)
    expected = module.norm(x, weight)
    model = module.Net().to(kernels)
    kernelize_layers(model)
    model(torch.randn(2, 5, 16).to(kernels))
    assert torch.equal(module.norm(x, weight), expected)


LAYER = """
class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(32)), 1e-6

    def forward(self, x):
        return norm(x, self.weight, self.eps)
"""


def test_a_function_in_a_layer_that_has_a_kernel_is_left_to_it(
    notebook: Notebook, clean_registry: Registry, kernels: torch.device
) -> None:
    net = NET.format(call="self.norm(self.first(x))", width=32, methods="")
    net = net.replace("self.eps = 1e-6", "self.norm = Norm()")
    model = notebook.run(FUNCTIONS["weight and eps"][0] + LAYER + net).Net().to(kernels)
    x = torch.randn(2, 5, 16).to(kernels)
    expected = model(x)
    kernelize_layers(model)
    model(x)
    torch.testing.assert_close(model(x), expected)
    assert [(name, state) for name, state, _ in active(clean_registry)] == [("Norm", "active")]


GATES = """
class Gate(nn.Module):
    def forward(self, {arguments}):
        return F.silu(gate) * up
"""


@pytest.mark.parametrize("arguments", ["gate, up", "up, gate"])
def test_a_layer_of_two_inputs_takes_them_in_its_own_order(
    notebook: Notebook, clean_registry: Registry, kernels: torch.device, arguments: str
) -> None:
    layer = notebook.run(GATES.format(arguments=arguments)).Gate().to(kernels)
    first, second = torch.randn(2, 3, 5, 16).to(kernels)
    expected = layer(first, second), layer(gate=first, up=second)
    kernelize_layers(layer)
    for _ in range(2):
        torch.testing.assert_close((layer(first, second), layer(gate=first, up=second)), expected)


# Cells of a notebook.

USER = NET.replace("class Net", "class {name}").replace("{call}", "norm(self.first(x))")


def net(name: str) -> str:
    return USER.format(name=name, width=32, methods="")


def test_a_function_of_a_later_cell_gets_its_kernel(
    notebook: Notebook, clean_registry: Registry, kernels: torch.device
) -> None:
    first = notebook.run(
        "class Plain(nn.Linear):\n    def forward(self, x):\n        return super().forward(x)"
    )
    kernelize_layers(first.Plain(4, 4))
    assert active(clean_registry) == []
    notebook.run(FUNCTIONS["nanochat"][0])
    model = notebook.run(net("Net")).Net().to(kernels)
    served(model, torch.randn(2, 5, 16).to(kernels), clean_registry, "norm")


def test_a_function_that_is_defined_again_has_the_kernel_of_its_new_code(
    notebook: Notebook, clean_registry: Registry, kernels: torch.device
) -> None:
    x = torch.randn(2, 5, 16).to(kernels)
    first = notebook.run(FUNCTIONS["nanochat"][0] + net("Net")).Net().to(kernels)
    served(first, x, clean_registry, "norm")
    notebook.run("def norm(x):\n    return F.rms_norm(x, (x.size(-1),), eps=0.5)")
    again = notebook.run(net("Net")).Net().to(kernels)
    plain_norm = torch.nn.functional.rms_norm
    expected = again.last(plain_norm(again.first(x), (32,), eps=0.5))
    torch.testing.assert_close(first.last(plain_norm(first.first(x), (32,), eps=0.5)), first(x))
    kernelize_layers(again)
    again(x)
    torch.testing.assert_close(again(x), expected)
    with plain.at_every_size():
        assert of_kernels(again, x) & NODES
    torch.testing.assert_close(first.last(plain_norm(first.first(x), (32,), eps=0.5)), first(x))
    assert {state for _, state, _ in active(clean_registry)} <= {"active", "displaced"}
    assert "active" in {state for _, state, _ in active(clean_registry)}


def test_a_function_that_is_no_norm_any_more_is_left_alone(
    notebook: Notebook, clean_registry: Registry, kernels: torch.device
) -> None:
    x = torch.randn(2, 5, 16).to(kernels)
    model = notebook.run(FUNCTIONS["nanochat"][0] + net("Net")).Net().to(kernels)
    served(model, x, clean_registry, "norm")
    notebook.run("def norm(x):\n    return x * 2")
    again = notebook.run(net("Net")).Net().to(kernels)
    kernelize_layers(again)
    assert torch.equal(again(x), again.last(again.first(x) * 2))
    with plain.at_every_size():
        assert not of_kernels(again, x) & NODES


def test_nothing_is_read_again_where_nothing_is_new(
    notebook: Notebook, clean_registry: Registry, kernels: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from twinkle.apply import functions_beside

    model = notebook.run(FUNCTIONS["nanochat"][0] + net("Net")).Net().to(kernels)
    kernelize_layers(model)
    model(torch.randn(2, 5, 16).to(kernels))
    kernelize_layers(notebook.module.Net())  # the kernel stands there now
    asked = []
    monkeypatch.setattr(functions_beside, "recognise", lambda obj: asked.append(obj) or recognise(obj))
    found = functions_beside.functions_of("norms_notebook")
    version = functions_beside.version_of("norms_notebook")
    assert functions_beside.functions_of("norms_notebook") is found
    assert functions_beside.version_of("norms_notebook") == version
    assert asked == []
    assert [one.name for one in found] == ["norm"]
