"""The installed ``kernels`` package: missing, too old, broken, and its variables."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from loopback_hub import Repo, kernel_files

from twinkle.errors import MissingDependencyError, SourceError
from twinkle.runtime import runtime
from twinkle.sources.hub import kernels_package as hub_kernels
from twinkle.sources.hub import signature as hub_signature


@pytest.fixture
def fresh_package():
    """``kernels`` is looked for anew."""
    runtime.reset()
    yield
    runtime.reset()


def test_package_that_is_not_installed_is_asked_for(cache, source, monkeypatch, fresh_package):
    monkeypatch.setitem(sys.modules, "kernels", None)
    with pytest.raises(MissingDependencyError, match="need the package `kernels`") as raised:
        source(version=1).load()
    assert "twinkle-kernel[hub]" in str(raised.value)
    assert raised.value.where == "twinkle.toml:3 (layers.norm)"


def test_package_whose_version_does_not_fit_is_named(cache, source, monkeypatch, fresh_package):
    old = ModuleType("kernels")
    old.__version__ = "0.5.0"
    for name in [name for name in sys.modules if name.startswith("kernels.")]:
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("variants", "utils"):
        monkeypatch.setitem(sys.modules, f"kernels.{name}", None)
    monkeypatch.setitem(sys.modules, "kernels", old)
    with pytest.raises(MissingDependencyError, match="does not fit") as raised:
        source(version=1).load()
    assert raised.value.found == "kernels 0.5.0"
    assert raised.value.expected == "kernels 0.12 to 0.17"


def test_package_that_a_variable_breaks_says_which(cache, source, monkeypatch, fresh_package):
    if not hasattr(importlib.import_module("kernels.layer"), "__path__"):
        pytest.skip("this version of kernels reads the variable differently")
    code = (
        "from twinkle.errors import MissingDependencyError\n"
        "from twinkle.sources.hub.kernels_package import kernels_package\n"
        "try:\n    kernels_package()\nexcept MissingDependencyError as error:\n    print(error.fix)\n"
    )
    environ = {**os.environ, "DISABLE_KERNEL_MAPPING": "true", "PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environ, capture_output=True, text=True, timeout=240
    )
    assert done.stdout.startswith("set DISABLE_KERNEL_MAPPING to 0 or 1"), done.stderr


def test_registering_needs_no_kernels_package(monkeypatch, source):
    monkeypatch.setitem(sys.modules, "kernels", None)
    assert source(version=1).describe()


def test_chosen_variant_is_the_one_the_package_chooses(cache):
    names = ["torch-cpu", "torch-universal", "torch-cuda"]
    chosen, reasons = hub_kernels.kernels_package().choose(names)
    assert chosen == "torch-cpu"
    assert "torch-cuda" in reasons


def test_no_variants_at_all(cache):
    assert hub_kernels.kernels_package().choose([]) == (None, {})


@pytest.fixture
def local(tmp_path, monkeypatch):
    """``local(files)`` makes a repository in a directory and names it in ``LOCAL_KERNELS``."""

    def make(files, *, value="acme/my-kernel={path}"):
        path = tmp_path / "local"
        for name, body in files.items():
            target = path / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(body)
        monkeypatch.setenv("LOCAL_KERNELS", value.format(path=path))
        return path

    return make


@pytest.mark.parametrize("options", [{"version": 1}, {"version": "0.1.0"}, {"revision": "main"}, {}], ids=str)
def test_local_kernels_is_honoured_whatever_the_version(cache, source, go_offline, local, options):
    local(kernel_files("local"))
    go_offline()
    kernel = source(**options)
    assert kernel.load().label == "local"
    assert any("LOCAL_KERNELS" in note for note in kernel.notes)


@pytest.mark.parametrize(
    "value", ["acme/my-kernel={path}:", ":acme/my-kernel={path}", "a/b=/c:acme/my-kernel={path}"]
)
def test_local_kernels_of_several_entries(cache, source, go_offline, local, value):
    local(kernel_files("local"), value=value)
    go_offline()
    assert source(version=1).load().label == "local"


def test_local_kernels_of_another_repository_changes_nothing(hub, source, local):
    local(kernel_files("local"), value="acme/other={path}")
    assert source(version=1).load().label == "v1"


@pytest.mark.parametrize("value", ["{path}", "acme/my-kernel", "=/x", "acme/my-kernel="])
def test_malformed_local_kernels_is_named(cache, source, local, value):
    local(kernel_files("local"), value=value)
    with pytest.raises(SourceError, match="LOCAL_KERNELS is malformed"):
        source(version=1).load()


@pytest.mark.parametrize("layout", ["build/torch-cpu", "torch-cpu", "."])
def test_layouts_of_local_kernels(cache, source, go_offline, local, layout):
    files = {path.replace("build/torch-cpu", layout): body for path, body in kernel_files("local").items()}
    local(files)
    go_offline()
    assert source(version=1).load().label == "local"


def test_local_kernels_without_a_fitting_variant_gives_the_reasons(cache, source, local):
    local(kernel_files("local", variant="torch-cuda"))
    with pytest.raises(SourceError, match="no build for this machine") as raised:
        source(version=1).load()
    assert "torch-cuda" in str(raised.value)


@pytest.fixture
def signed(hub, monkeypatch):
    """``signed(result)``: the kernel is signed, and ``kernels.verify`` finds this."""
    files = kernel_files(files={"metadata.json.sigstore": "{}"})
    hub.repos["acme/my-kernel"] = Repo({"v1": files})
    asked = []

    def finds(*results):
        verify = ModuleType("kernels.verify")
        answers = list(results)

        def verify_variant(path, policies=None):
            asked.append(policies)
            answer = answers.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return answer

        verify.verify_variant = verify_variant
        real = importlib.import_module

        def import_module(name, package=None):
            if name == "kernels.verify":
                return verify
            if name == "sigstore.verify.policy":
                policy = ModuleType(name)
                policy.UnsafeNoOp = object
                return policy
            return real(name, package)

        monkeypatch.setattr(hub_signature.importlib, "import_module", import_module)
        return asked

    return finds


def result(kind, **facts):
    return type(kind, (), facts)()


def test_signature_that_is_right_is_noted(signed, source):
    signed(result("Success"))
    kernel = source(version=1)
    kernel.load()
    assert "signed, and the signature is right" in kernel.notes


@pytest.mark.parametrize(
    "kind", ["DigestVerificationFailure", "SignatureBundleInvalid", "MetadataInvalid", "DigestMissing"]
)
def test_wrong_signature_is_refused(signed, source, kind):
    signed(result(kind, reason="tampered"))
    with pytest.raises(SourceError, match="wrong signature") as raised:
        source(version=1).load()
    assert kind in str(raised.value)


def test_kernel_with_a_wrong_signature_is_not_left_in_the_cache(hub, signed, source, go_offline):
    signed(result("SignatureBundleInvalid", reason="tampered"))
    with pytest.raises(SourceError):
        source(version=1).load()
    go_offline()
    commit = hub.repos["acme/my-kernel"].branches["v1"]
    with pytest.raises(SourceError, match="damaged in the cache"):
        source(revision=commit, trust_remote_code=True).load()


def test_signature_of_somebody_else_is_noted(signed, source):
    asked = signed(result("SignatureVerificationFailure", reason="another signer"), result("Success"))
    kernel = source(version=1)
    kernel.load()
    assert any("not by one of the signers" in note for note in kernel.notes)
    assert asked[0] is None
    assert asked[1] is not None


def test_signature_of_nobody_is_refused(signed, source):
    failure = result("SignatureVerificationFailure", reason="no valid certificate")
    signed(failure, failure)
    with pytest.raises(SourceError, match="no valid certificate"):
        source(version=1).load()


def test_signature_that_cannot_be_checked_is_noted(signed, source):
    signed(ConnectionError("no network to the key server"))
    kernel = source(version=1)
    kernel.load()
    assert any("could not be checked" in note for note in kernel.notes)


def test_unsigned_kernel_has_no_remark(hub, source):
    kernel = source(version=1)
    kernel.load()
    assert not any("sign" in note for note in kernel.notes)


def test_real_verification_refuses_a_bundle_that_is_none(hub, source):
    pytest.importorskip("kernels.verify")
    hub.repos["acme/my-kernel"] = Repo({"v1": kernel_files(files={"metadata.json.sigstore": "{}"})})
    with pytest.raises(SourceError, match="SignatureBundleInvalid"):
        source(version=1).load()
