"""Which build fits which machine."""

from __future__ import annotations

import builtins
import sys
import types

import pytest

from twinkle.sources import variants
from twinkle.sources.variants import System, choose, is_variant, read

LINUX_CPU = System((2, 13), "cxx11", "cpu", None, "x86_64", "linux")
LINUX_CUDA = LINUX_CPU._replace(backend="cuda", version=(13, 0))


@pytest.mark.parametrize(
    "name",
    [
        "torch-cpu",
        "torch-universal",
        "torch213-cxx11-cpu-x86_64-linux",
        "torch213-cxx11-cu130-x86_64-linux",
        "torch213-metal-aarch64-darwin",
        "torch-stable-abi211-cu130-x86_64-linux",
        "tvm-ffi01-cpu-x86_64-linux",
    ],
)
def test_the_name_of_a_build_is_known(name):
    assert is_variant(name)


@pytest.mark.parametrize("name", ["lib", "bdist.linux-x86_64", "torch", "my_kernels", "torch-ext", "temp"])
def test_other_directories_are_no_builds(name):
    assert not is_variant(name)


def fitting(names, system):
    return [name for name, accepted, _ in read(names, system) if accepted]


def test_builds_in_the_order_of_preference():
    names = [
        "torch-universal",
        "torch-cuda",
        "torch213-cxx11-cu128-x86_64-linux",
        "torch213-cxx11-cu130-x86_64-linux",
        "torch213-cu130-x86_64-linux",
        "torch-stable-abi210-cu130-x86_64-linux",
        "torch-stable-abi211-cu130-x86_64-linux",
    ]
    assert fitting(names, LINUX_CUDA) == [
        "torch-stable-abi211-cu130-x86_64-linux",
        "torch-stable-abi210-cu130-x86_64-linux",
        "torch213-cu130-x86_64-linux",
        "torch213-cxx11-cu130-x86_64-linux",
        "torch-cuda",
        "torch-universal",
    ]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("torch-cuda", "built for cuda, this is cpu"),
        ("torch212-cxx11-cpu-x86_64-linux", "built for torch 2.12, this is 2.13"),
        ("torch-stable-abi214-cpu-x86_64-linux", "needs torch 2.14 or newer, this is 2.13"),
        ("torch213-cxx98-cpu-x86_64-linux", "built for the cxx98 ABI, this is cxx11"),
        ("torch213-cxx11-cpu-aarch64-linux", "built for aarch64-linux, this is x86_64-linux"),
        ("torch213-cxx11-cu130-x86_64-linux", "built for cuda, this is cpu"),
        ("tvm-ffi01-cpu-x86_64-linux", "needs the kernels package to be read"),
    ],
)
def test_a_build_that_does_not_fit_has_its_reason(name, reason):
    assert read([name], LINUX_CPU) == [(name, False, reason)]


@pytest.mark.parametrize(("build", "fits"), [("cu130", True), ("cu131", False), ("cu128", False)])
def test_a_cuda_build_runs_on_its_major_version_from_its_minor_on(build, fits):
    assert bool(fitting([f"torch213-cxx11-{build}-x86_64-linux"], LINUX_CUDA)) is fits


def test_an_npu_runs_cann_builds():
    npu = LINUX_CPU._replace(backend="npu", version=None)
    assert fitting(["torch213-cxx11-cann83-x86_64-linux", "torch-npu"], npu) == [
        "torch213-cxx11-cann83-x86_64-linux",
        "torch-npu",
    ]


NAMES = ["torch-cpu", "torch-cuda", "torch-rocm", "torch-universal", "torch13-cxx11-cpu-x86_64-linux"]


def test_the_reading_agrees_with_the_kernels_package():
    pytest.importorskip("kernels")
    system = System.here()
    torch = "".join(map(str, system.torch))
    names = [*NAMES, f"torch{torch}-cxx11-cpu-{system.cpu}-{system.os}", f"torch{torch}-cpu-aarch64-darwin"]
    theirs, ours = choose(names), read(names, system)
    assert [name for name, accepted, _ in theirs if accepted] == [
        name for name, accepted, _ in ours if accepted
    ]


def test_the_reasons_of_the_kernels_package_are_kept():
    pytest.importorskip("kernels.variants")
    reasons = {name: reason for name, accepted, reason in choose(NAMES) if not accepted}
    assert reasons["torch-rocm"]
    assert set(reasons) >= {"torch-rocm", "torch13-cxx11-cpu-x86_64-linux"}


def test_an_older_kernels_package_has_a_list_of_names(monkeypatch):
    utils = types.ModuleType("kernels.utils")
    utils.build_variants = lambda: ["torch-universal", "torch-cpu"]
    monkeypatch.setitem(sys.modules, "kernels", types.ModuleType("kernels"))
    monkeypatch.setitem(sys.modules, "kernels.utils", utils)
    monkeypatch.setitem(sys.modules, "kernels.variants", None)
    decided = choose(NAMES)
    assert [name for name, accepted, _ in decided if accepted] == ["torch-universal", "torch-cpu"]
    assert all(reason for _, _, reason in decided)


def test_without_the_kernels_package_the_reading_decides(monkeypatch):
    real = builtins.__import__

    def without(name, *rest, **more):
        if name.partition(".")[0] == "kernels":
            raise RuntimeError("int('true')")
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    assert choose(NAMES) == read(sorted(NAMES), System.here())


def test_a_kernel_for_the_cpu_gets_a_cpu_build_on_any_machine(monkeypatch):
    monkeypatch.setattr(variants, "torch_backend", lambda torch: ("cuda", (13, 0)))
    names = ["torch-cpu", "torch-cuda"]
    assert fitting(names, System.here("cpu")) == ["torch-cpu"]
    assert fitting(names, System.here("cuda")) == ["torch-cuda"]


def test_what_would_fit_is_said():
    assert "torch-universal" in variants.wanted()
