"""Function kernels: choosing, putting in place, and the way back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from twinkle.errors import ApplyError, TwinkleWarning
from twinkle.kernel import (
    FuncRepositoryProtocol,
    apply_function_kernel,
    function_kernels,
    register_function_kernel,
    unapply_function_kernel,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from twinkle.registry import Registry

pytestmark = pytest.mark.usefixtures("clean_registry", "my_pkg")
OPS = "my_pkg.math_ops"


def plus_one(x: Any, y: Any) -> Any:
    return x + y + 1


def plus_two(x: Any, y: Any) -> Any:
    return x + y + 2


def ops() -> Any:
    from my_pkg import math_ops

    return math_ops


def test_the_implementation_itself_stands_in_place() -> None:
    register_function_kernel("add", OPS, func_impl=plus_one)
    assert apply_function_kernel(OPS, mode="train") == [f"{OPS}.add"]
    assert ops().add is plus_one


def test_names_come_in_registration_order() -> None:
    register_function_kernel("mul", OPS, func_impl=plus_one)
    register_function_kernel("add", OPS, func_impl=plus_two)
    assert apply_function_kernel(OPS) == [f"{OPS}.mul", f"{OPS}.add"]


def test_unapply_restores_the_very_original_and_every_name_of_it(registry_aliases: Any) -> None:
    before = ops().add
    register_function_kernel("add", OPS, func_impl=plus_one)
    apply_function_kernel(OPS, mode="train")
    assert registry_aliases.taken is plus_one
    assert unapply_function_kernel() == [f"{OPS}.add"]
    assert ops().add is before
    assert registry_aliases.taken is before


@pytest.fixture
def registry_aliases(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module that took ``add`` by name before the patch."""
    import sys
    import types

    module = types.ModuleType("took_by_name")
    module.taken = ops().add  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "took_by_name", module)
    return module


def test_applying_twice_is_applying_once(clean_registry: Registry) -> None:
    register_function_kernel("add", OPS, func_impl=plus_one)
    assert apply_function_kernel(OPS, mode="train") == apply_function_kernel(OPS, mode="train")
    assert clean_registry.bindings[0].instances == 1
    unapply_function_kernel()
    assert ops().add(1, 2) == 3


def test_another_mode_takes_the_kernel_of_that_mode() -> None:
    register_function_kernel("add", OPS, func_impl=plus_one, mode="train")
    register_function_kernel("add", OPS, func_impl=plus_two, mode="inference")
    apply_function_kernel(OPS, mode="train")
    assert ops().add(1, 2) == 4
    apply_function_kernel(OPS, mode="inference")
    assert ops().add(1, 2) == 5


def test_inference_may_use_a_training_kernel_but_never_the_reverse() -> None:
    register_function_kernel("add", OPS, func_impl=plus_one, mode="train")
    register_function_kernel("mul", OPS, func_impl=plus_one, mode="inference")
    assert apply_function_kernel(OPS, mode="inference") == [f"{OPS}.add", f"{OPS}.mul"]
    assert apply_function_kernel(OPS, mode="train") == [f"{OPS}.add"]
    assert ops().mul(1, 2) == 2000


def test_with_neither_device_nor_mode_the_moment_decides() -> None:
    register_function_kernel("add", OPS, func_impl=plus_one, mode="train")
    register_function_kernel("add", OPS, func_impl=plus_two, mode="inference")
    apply_function_kernel(OPS)
    x = torch.zeros(())
    assert ops().add(x, x) == 1
    with torch.no_grad():
        assert ops().add(x, x) == 2


@pytest.mark.parametrize(
    "repo",
    [lambda: plus_one, lambda: _Module],
    ids=["a callable", "an nn.Module class"],
)
def test_a_repo_is_any_object_with_load(repo: Callable[[], Any]) -> None:
    class Repo:
        def load(self) -> Any:
            return repo()

    assert isinstance(Repo(), FuncRepositoryProtocol)
    register_function_kernel("add", OPS, repo=Repo())
    apply_function_kernel(OPS, mode="train")
    assert ops().add(1, 2) == 4


class _Module(nn.Module):
    def forward(self, x: Any, y: Any) -> Any:
        return x + y + 1


def test_strict_raises_when_nothing_is_registered() -> None:
    with pytest.raises(ApplyError, match="none is registered"):
        apply_function_kernel(OPS, strict=True)


def test_strict_raises_when_nothing_suits() -> None:
    register_function_kernel("add", OPS, func_impl=plus_one, mode="inference")
    with pytest.raises(ApplyError, match="registered for mode inference"):
        apply_function_kernel(OPS, mode="train", strict=True)


@pytest.mark.filterwarnings("ignore::twinkle.errors.TwinkleWarning")
@pytest.mark.parametrize(
    ("name", "implementation", "reason"),
    [
        ("add", lambda a, b: a, "argument"),
        ("nothing", plus_one, "does not exist"),
        ("add", "no_such_module:f", "no_such_module"),
    ],
    ids=["signature", "name", "module"],
)
def test_strict_raises_on_the_first_failure_and_undoes_the_rest(
    name: str, implementation: Any, reason: str
) -> None:
    register_function_kernel("mul", OPS, func_impl=plus_two)
    register_function_kernel(name, OPS, func_impl=implementation)
    with pytest.raises(ApplyError, match=reason):
        apply_function_kernel(OPS, mode="train", strict=True)
    assert ops().mul(1, 2) == 2000
    assert ops().add(1, 2) == 3


@pytest.mark.parametrize(
    ("name", "implementation"), [("add", lambda a, b: a), ("nothing", plus_one), ("add", "no_such_module:f")]
)
def test_without_strict_the_rest_is_applied_and_the_reason_kept(
    name: str, implementation: Any, clean_registry: Registry
) -> None:
    register_function_kernel("mul", OPS, func_impl=plus_two)
    register_function_kernel(name, OPS, func_impl=implementation)
    with pytest.warns(TwinkleWarning):
        applied = apply_function_kernel(OPS, mode="train")
    assert applied == [f"{OPS}.mul"]
    assert [(b.state, bool(b.reason)) for b in clean_registry.bindings] == [
        ("active", False),
        ("failed", True),
    ]


def test_a_module_that_cannot_be_imported_is_a_reason(clean_registry: Registry) -> None:
    register_function_kernel("f", "no_such_package.ops", func_impl=plus_one)
    assert apply_function_kernel("no_such_package.ops", mode="train") == []
    assert "no_such_package" in clean_registry.bindings[0].reason


def test_a_replacement_by_someone_else_stays_when_ours_is_taken_out(clean_registry: Registry) -> None:
    register_function_kernel("add", OPS, func_impl=plus_one)
    apply_function_kernel(OPS, mode="train")
    ops().add = max
    unapply_function_kernel()
    assert ops().add is max
    assert clean_registry.bindings[0].state == "displaced"


def test_the_context_manager_restores() -> None:
    register_function_kernel("add", OPS, func_impl=plus_one)
    with function_kernels(OPS, mode="train") as applied:
        assert applied == [f"{OPS}.add"]
        assert ops().add(1, 2) == 4
    assert ops().add(1, 2) == 3


def test_an_absent_device_keeps_the_original(clean_registry: Registry) -> None:
    register_function_kernel("add", OPS, func_impl=plus_one, device="npu")
    assert apply_function_kernel(OPS, device="npu") == []
    assert ops().add(1, 2) == 3
    assert "npu" in clean_registry.bindings[0].reason
