"""Calls of the embedded kernels on small tensors, where the host is all they cost; launches that do nothing.

With :func:`stub_launches` the kernels are called on the CPU and reach a function in C where triton's would
be: what is left is what the host does, and it can be counted on any machine.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

__all__ = ["Call", "calls", "stub_launches"]

_LAUNCHING = (
    "rms_norm.triton",
    "layer_norm.triton",
    "modulated_norm.triton",
    "group_norm.triton",
    "rotary.triton",
    "qk_norm_rotary.triton",
    "gated_mlp.triton",
    "activation.triton",
)


@dataclass
class Call:
    """A call of a kernel, and the same in eager torch.

    Attributes:
        kernel: Takes the inputs.
        eager: The same.
        inputs: All of them with gradients, but for those in ``constants``.
    """

    kernel: Callable[..., Any]
    eager: Callable[..., Any]
    inputs: tuple[Tensor, ...]

    def gradients(self) -> list[Tensor]:
        """The inputs with a gradient."""
        return [x for x in self.inputs if x.requires_grad]


def calls(device: str, dtype: torch.dtype = torch.float32) -> dict[str, Call]:
    """A call of each op, by what it is.

    Args:
        device: Where to.
        dtype: Of all tensors.
    """

    def new(*shape: int, gradient: bool = True) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype, requires_grad=gradient)

    x, h, w, b = new(2, 8, 64), new(2, 8, 64), new(64), new(64)
    image, c, d = new(2, 8, 4, 4), new(8), new(8)
    scale, shift = new(2, 1, 64), new(2, 1, 64)
    q, k = (new(2, 8, heads, 16).detach().transpose(1, 2).requires_grad_() for heads in (4, 2))
    joined_q, joined_k, qw, kw = new(2, 8, 64), new(2, 8, 32), new(16), new(16)
    cos, sin = new(2, 8, 16, gradient=False), new(2, 8, 16, gradient=False)

    def op(name: str) -> Any:
        return importlib.import_module(f"twinkle.ops.{name}.triton_backend")

    def definition(name: str) -> Any:
        return importlib.import_module(f"twinkle.ops.{name}.reference")

    def variant(name: str, called: str) -> Any:
        return next(v for v in definition(name).VARIANTS if v.name == called)

    def both(name: str, *rest: Any, **given: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
        def bound(function: Callable[..., Any]) -> Callable[..., Any]:
            return lambda *tensors: function(*tensors, *rest, **given)

        return bound(getattr(op(name), name)), bound(getattr(definition(name), name))

    rms_norm, layer_norm = op("rms_norm").rms_norm, op("layer_norm").layer_norm
    residual_norm, modulated_norm = op("residual_norm").residual_norm, op("modulated_norm").modulated_norm
    group_norm = op("group_norm").group_norm
    gated = importlib.import_module("twinkle.ops.gated_mlp.activation").gated_activation
    layer = variant("layer_norm", "fused")
    sum_layer = definition("residual_norm").ResidualNormVariant("layer_norm_fused", layer)
    made = definition("modulated_norm").ModulatedNormVariant("layer_norm_fused", layer)
    half = variant("rotary", "half")
    groups = next(v for v in definition("group_norm").VARIANTS if v.activation == "none")
    llama = variant("rms_norm", "llama")
    turned = definition("qk_norm_rotary").QKNormRotaryVariant("llama_half_head", llama, half)

    return {
        "rms_norm": Call(
            lambda x, w: rms_norm(x, w, 1e-6, variant=llama),
            lambda x, w: F.rms_norm(x, (64,), w, 1e-6),
            (x, w),
        ),
        "layer_norm": Call(
            lambda x, w, b: layer_norm(x, w, b, 1e-5, variant=layer, normalized_shape=(64,)),
            lambda x, w, b: F.layer_norm(x, (64,), w, b, 1e-5),
            (x, w, b),
        ),
        "residual_norm (RMS)": Call(
            *both("residual_norm", 1e-6, variant=op("residual_norm").LLAMA), (x, h, w)
        ),
        "residual_norm (layer)": Call(
            lambda x, h, w, b: residual_norm(x, h, w, 1e-5, variant=sum_layer, bias=b),
            lambda x, h, w, b: (s := h + x, F.layer_norm(s, (64,), w, b, 1e-5)),
            (x, h, w, b),
        ),
        "modulated_norm": Call(
            lambda x, s, t: modulated_norm(x, None, 1e-5, s, t, variant=made),
            lambda x, s, t: F.layer_norm(x, (64,), None, None, 1e-5) * (1 + s) + t,
            (x, scale, shift),
        ),
        "group_norm": Call(
            lambda x, c, d: group_norm(x, 4, c, d, 1e-5, variant=groups),
            lambda x, c, d: F.group_norm(x, 4, c, d, 1e-5),
            (image, c, d),
        ),
        "rotary": Call(*both("rotary", variant=half), (q, k, cos, sin)),
        "qk_norm_rotary": Call(
            *(
                lambda q, k, qw, kw, cos, sin, f=f: f(
                    q, k, qw, kw, 1e-6, 1e-6, cos, sin, head_dim=16, variant=turned
                )
                for f in (op("qk_norm_rotary").qk_norm_rotary, definition("qk_norm_rotary").qk_norm_rotary)
            ),
            (joined_q, joined_k, qw, kw, cos, sin),
        ),
        "gated activation": Call(gated, lambda g, u: F.silu(g) * u, (x, h)),
        "activation": Call(*both("activation", variant=variant("activation", "gelu_tanh_cubed")), (x,)),
    }


class _Kernel:
    """What triton's compiler gives, as of triton 3.6; its launch is a function in C that does nothing."""

    class Run:
        """As triton's ``CudaLauncher``."""

        global_scratch_size = profile_scratch_size = 0
        launch = "".format

        def __call__(self, x: int, y: int, z: int, stream: int, function: int, *arguments: Any) -> None:
            def scratch(size: int) -> None:
                assert size == 0

            scratch(self.global_scratch_size)
            scratch(self.profile_scratch_size)
            self.launch(x, y, z, stream, function, False, False, None, None, *arguments)

    function, packed_metadata = 1, (4, 1, 0)

    def __init__(self) -> None:
        self.run = self.Run()

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        def runner(*arguments: Any) -> None:
            self.run(*grid, 0, self.function, self.packed_metadata, None, None, None, *arguments)

        return runner


class _Jitted:
    def __init__(self, arg_names: list[str]) -> None:
        self.arg_names = arg_names

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., _Kernel]:
        return functools.partial(_compiled)


def _compiled(*arguments: Any, **constants: Any) -> _Kernel:
    return _Kernel()


@contextlib.contextmanager
def stub_launches() -> Iterator[None]:
    """Let the kernels run on CPU tensors without a launch, for the rest of the process."""
    from twinkle.ops import launch
    from twinkle.ops.plain import at_every_size

    launch.DEVICE_TYPES = frozenset({"cpu"})
    for name in _LAUNCHING:
        module = importlib.import_module(f"twinkle.ops.{name}")
        for value in vars(module).values():
            if isinstance(value, launch.Launcher):
                value.jitted = _Jitted(value.jitted.arg_names)
    with at_every_size():
        yield
