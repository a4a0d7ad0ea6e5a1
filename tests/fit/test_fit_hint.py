"""A kernel of an installed package that lacks an attribute: the message has what to write."""

from __future__ import annotations

import sys
import textwrap
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from twinkle.errors import TwinkleWarning
from twinkle.kernel import kernelize_model, register_external_layer, register_kernels

if TYPE_CHECKING:
    from pathlib import Path

    from twinkle.registry import Registry


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


@pytest.fixture
def _package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = """
        import torch
        from torch import nn

        class OffsetNorm(nn.Module):
            def __init__(self, size, offset=0.5):
                super().__init__()
                self.weight = nn.Parameter(torch.ones(size))
                self.offset = offset

            def forward(self, x):
                return x * (self.weight + self.offset)
    """
    (tmp_path / "offset_kernels.py").write_text(textwrap.dedent(source))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "offset_kernels", raising=False)


@pytest.mark.usefixtures("_package")
@pytest.mark.parametrize("given", [{}, {"offset": 0.5}], ids=["not given", "given"])
def test_the_reason_says_which_attributes_to_give(given: dict[str, object], clean_registry: Registry) -> None:
    spec = {"package_name": "offset_kernels:OffsetNorm", "attributes": given}
    register_kernels({"layers": {"Offset": spec}})
    register_external_layer(Norm, "Offset")
    x = torch.ones(2)
    if given:
        assert torch.equal(kernelize_model(Norm())(x), x * 1.5)
        return
    with pytest.warns(TwinkleWarning, match="offset"):
        kernelize_model(Norm())
    assert "attributes = { offset = 0.5 }" in clean_registry.bindings[0].reason
