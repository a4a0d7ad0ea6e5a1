"""Rotations by complex numbers and by matrices get their kernels in plain programs, with no configuration."""

from __future__ import annotations

import importlib.util
import json
import textwrap
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from .conftest import Program

PROGRAMS = {
    "llama": """
        import torch
        from torch import nn
        import torch.nn.functional as F

        def reshape_for_broadcast(freqs_cis, x):
            assert freqs_cis.shape == (x.shape[1], x.shape[-1])
            shape = [d if i == 1 or i == x.ndim - 1 else 1 for i, d in enumerate(x.shape)]
            return freqs_cis.view(*shape)

        def apply_rotary_emb(xq, xk, freqs_cis):
            q = torch.view_as_complex(xq.float().reshape(*xq.shape[:-1], -1, 2))
            k = torch.view_as_complex(xk.float().reshape(*xk.shape[:-1], -1, 2))
            freqs_cis = reshape_for_broadcast(freqs_cis, q)
            q = torch.view_as_real(q * freqs_cis).flatten(3)
            k = torch.view_as_real(k * freqs_cis).flatten(3)
            return q.type_as(xq), k.type_as(xk)

        class Attention(nn.Module):
            def __init__(self):
                super().__init__()
                self.wq, self.wk = nn.Linear(32, 32), nn.Linear(32, 16)

            def forward(self, x, freqs_cis):
                q, k = self.wq(x).view(2, 8, 4, 8), self.wk(x).view(2, 8, 2, 8)
                q, k = apply_rotary_emb(q, k, freqs_cis)
                k = k.repeat_interleave(2, dim=2).transpose(1, 2)
                return F.scaled_dot_product_attention(q.transpose(1, 2), k, k)

        def table():
            return torch.polar(torch.ones(8, 4), torch.arange(32).view(8, 4) / 7)
    """,
    "flux": """
        import torch
        from torch import nn
        import torch.nn.functional as F

        def apply_rope(xq, xk, freqs_cis):
            q = xq.float().reshape(*xq.shape[:-1], -1, 1, 2)
            k = xk.float().reshape(*xk.shape[:-1], -1, 1, 2)
            q = freqs_cis[..., 0] * q[..., 0] + freqs_cis[..., 1] * q[..., 1]
            k = freqs_cis[..., 0] * k[..., 0] + freqs_cis[..., 1] * k[..., 1]
            return q.reshape(*xq.shape).type_as(xq), k.reshape(*xk.shape).type_as(xk)

        class Attention(nn.Module):
            def __init__(self):
                super().__init__()
                self.qkv = nn.Linear(32, 96)

            def forward(self, x, pe):
                q, k, v = self.qkv(x).view(2, 8, 3, 4, 8).permute(2, 0, 3, 1, 4)
                q, k = apply_rope(q, k, pe)
                return F.scaled_dot_product_attention(q, k, v)

        def table():
            angle = torch.arange(32).view(1, 1, 8, 4) / 7
            rows = (torch.cos(angle), -torch.sin(angle), torch.sin(angle), torch.cos(angle))
            return torch.stack(rows, dim=-1).unflatten(-1, (2, 2))
    """,
    "wan": """
        import torch
        from torch import nn
        import torch.nn.functional as F

        def apply_rotary_emb(hidden_states, freqs):
            turned = torch.view_as_complex(hidden_states.to(torch.float64).unflatten(3, (-1, 2)))
            return torch.view_as_real(turned * freqs).flatten(3, 4).type_as(hidden_states)

        class Attention(nn.Module):
            def __init__(self):
                super().__init__()
                self.q, self.k = nn.Linear(32, 32), nn.Linear(32, 32)

            def forward(self, x, freqs):
                q, k = (f(x).unflatten(2, (4, -1)).transpose(1, 2) for f in (self.q, self.k))
                q, k = apply_rotary_emb(q, freqs), apply_rotary_emb(k, freqs)
                return F.scaled_dot_product_attention(q, k, k)

        def table():
            angle = torch.arange(32, dtype=torch.float64).view(1, 1, 8, 4) / 7
            return torch.polar(torch.ones_like(angle), angle)
    """,
}
STEP = """
import importlib, json, sys, torch
from twinkle.report import snapshot
dtype, names = getattr(torch, sys.argv[1]), sys.argv[2].split(",")
numbers = {}
for name in names:
    torch.manual_seed(0)
    program = importlib.import_module(name)
    model = program.Attention().to(dtype)
    x = torch.randn(2, 8, 32).to(dtype).requires_grad_()
    out = model(x, program.table())
    out.float().square().sum().backward()
    numbers[name] = [out.double().norm().item(), x.grad.double().norm().item()]
print(json.dumps({"numbers": numbers, "bindings": snapshot()["bindings"]}))
"""
AUTO = {"TWINKLE_CONFIG": "auto", "TWINKLE_SIZES": "all"}
OFF = {"TWINKLE_KERNELS": "off"}


@pytest.mark.parametrize(
    ("backend", "dtype"), [("triton", "float32"), ("triton", "float16"), ("cpu", "bfloat16")]
)
def test_plain_programs_get_the_kernels_of_their_rotations(
    program: Program, backend: str, dtype: str
) -> None:
    if backend == "triton" and importlib.util.find_spec("triton") is None:
        pytest.skip("its interpreter is used")
    for name, text in PROGRAMS.items():
        (program.root / "site" / f"{name}.py").write_text(textwrap.dedent(text))
    machine = {"TRITON_INTERPRET": "1" if backend == "triton" else "0", "CUDA_VISIBLE_DEVICES": ""}

    def said(**variables: str) -> Any:
        code = f"import sys\nsys.argv = ['', {dtype!r}, {','.join(PROGRAMS)!r}]\n{STEP}"
        return json.loads(program.run(code, **machine, **variables).stdout.splitlines()[-1])

    served, plain = said(**AUTO), said(**OFF)
    states = {binding["target"]: binding["state"] for binding in served["bindings"]}
    assert states == {
        "llama:apply_rotary_emb": "active",
        "flux:apply_rope": "active",
        "wan:apply_rotary_emb": "active",
    }
    assert all(binding["proof"].startswith("proven") for binding in served["bindings"])
    near = 1e-5 if dtype == "float32" else 1e-2
    for name in PROGRAMS:
        assert served["numbers"][name] == pytest.approx(plain["numbers"][name], rel=near)
