"""Whose code may run is decided before anything is downloaded or imported, offline as well."""

from __future__ import annotations

import json
import sys

import pytest
from loopback_hub import Repo, kernel_files

from twinkle.errors import ConfigError, SourceError
from twinkle.sources.hub.faults import Unreachable
from twinkle.sources.hub.trust import Trust

TRIPWIRE = {"__init__.py": "import sys\nsys.twinkle_tripwire = True\n"}


@pytest.fixture(autouse=True)
def tripwire():
    """No code of a refused kernel has run."""
    yield
    assert not hasattr(sys, "twinkle_tripwire")


@pytest.fixture
def untrusted(hub):
    hub.repos["evil/my-kernel"] = Repo({"v1": kernel_files(files=TRIPWIRE)})
    return hub


def test_untrusted_publisher_is_refused_online_and_nothing_is_fetched(untrusted, source, cache):
    with pytest.raises(SourceError, match="evil/my-kernel is not trusted") as raised:
        source(repo_id="evil/my-kernel", version=1).load()
    assert 'trust_remote_code = ["evil/my-kernel"]' in str(raised.value)
    assert untrusted.count("resolve") == 0
    assert not cache.exists()


def test_a_user_is_no_trusted_publisher(hub, source):
    hub.repos["someone/my-kernel"] = Repo({"v1": kernel_files(files=TRIPWIRE)})
    hub.fault("organizations/someone", "status", 404)
    with pytest.raises(SourceError, match="does not list someone as a trusted publisher"):
        source(repo_id="someone/my-kernel", version=1).load()


def test_untrusted_kernel_in_the_cache_is_refused_offline(hand_made, go_offline, source):
    hand_made(kernel_files(files=TRIPWIRE), repo_id="evil/my-kernel")
    go_offline()
    with pytest.raises(Unreachable, match="nobody could say whether evil/my-kernel is trusted") as raised:
        source(repo_id="evil/my-kernel", version=1).load()
    assert "twinkle download" in str(raised.value)
    assert "trust_remote_code" not in str(raised.value).lower()


def test_network_that_is_down_is_no_reason_to_trust(hub, source):
    hub.fault(".", "drop")
    with pytest.raises(Unreachable) as raised:
        source(version=1).load()
    assert "the Hub cannot be reached" in str(raised.value)
    assert "check the network" in str(raised.value.fix)
    assert "trust_remote_code" not in str(raised.value).lower()


def test_untrusted_kernel_that_another_program_fetched_is_refused_offline(untrusted, source, go_offline):
    from huggingface_hub import constants, hf_hub_download

    kernels = untrusted.repos["evil/my-kernel"]
    for path in kernels.commits[kernels.branches["v1"]]:
        hf_hub_download(
            "evil/my-kernel", path, repo_type="kernel", revision="v1", cache_dir=constants.HF_HUB_CACHE
        )
    with pytest.raises(SourceError):
        source(repo_id="evil/my-kernel", revision="v1").load()
    go_offline()
    with pytest.raises(SourceError, match="did not list evil as a trusted publisher on"):
        source(repo_id="evil/my-kernel", revision="v1").load()


@pytest.mark.parametrize("trust", [True, ["evil/other", "evil/my-kernel"], ("evil/my-kernel",)])
def test_trust_remote_code_allows(hub, source, trust):
    hub.repos["evil/my-kernel"] = Repo({"v1": kernel_files("evil")})
    assert source(repo_id="evil/my-kernel", version=1, trust_remote_code=trust).load().label == "evil"
    assert hub.count("organizations") == 0


def test_trust_in_another_repository_does_not_allow(untrusted, source):
    with pytest.raises(SourceError, match="not trusted"):
        source(repo_id="evil/my-kernel", version=1, trust_remote_code=["evil/other"]).load()


def test_trust_of_one_registration_does_not_serve_another(hub, source):
    hub.repos["evil/my-kernel"] = Repo({"v1": kernel_files("evil")})
    source(repo_id="evil/my-kernel", version=1, trust_remote_code=True).load()
    with pytest.raises(SourceError, match="not trusted"):
        source(repo_id="evil/my-kernel", version=1).load()


def test_trust_seen_online_holds_offline(hub, source, go_offline):
    source(version=1).load()
    go_offline()
    kernel = source(version=1)
    kernel.load()
    assert any("was trusted by the Hub on" in note for note in kernel.notes)


def test_trust_seen_at_one_hub_does_not_hold_for_another(hub, source, go_offline, monkeypatch):
    from huggingface_hub import constants

    source(version=1).load()
    go_offline()
    monkeypatch.setattr(constants, "ENDPOINT", "https://huggingface.example")
    with pytest.raises(Unreachable, match="nobody could say"):
        source(version=1).load()


def test_trust_that_was_withdrawn_refuses_what_is_in_the_cache(hub, source, cache, go_offline):
    source(version=1).load()
    hub.trusted.clear()
    go_offline()
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = False
    with pytest.raises(SourceError, match="does not list acme"):
        source(version=1).load()
    record = json.loads((cache / "kernels--acme--my-kernel" / "twinkle" / "publisher.json").read_text())
    assert record["trusted"] is False


def test_hub_that_does_not_say_refuses_what_is_new(hub, source):
    hub.fault("organizations", "status", 500)
    with pytest.raises(SourceError, match="the Hub could not be asked"):
        source(version=1).load()
    assert hub.count("resolve") == 0


def test_dependency_of_an_untrusted_publisher_is_refused(hub, source):
    pytest.importorskip("kernels.validate")
    dependency = [{"repo-id": "evil/needed", "version": 1}]
    hub.repos["acme/my-kernel"] = Repo({"v1": kernel_files(**{"kernel-depends": dependency})})
    hub.repos["evil/needed"] = Repo({"v1": kernel_files(files=TRIPWIRE)})
    with pytest.raises(SourceError, match="evil/needed is not trusted"):
        source(version=1).load()


@pytest.mark.parametrize(
    ("value", "allowed"),
    [
        (None, False),
        (False, False),
        (True, True),
        ("1", True),
        ("true", True),
        ("0", False),
        ("", False),
        ("acme/my-kernel", True),
        ("acme/other, acme/my-kernel", True),
        (("acme/my-kernel",), True),
        ([], False),
    ],
)
def test_values_of_trust_remote_code(value, allowed):
    assert Trust.parse(value).allows("acme/my-kernel") is allowed


@pytest.mark.parametrize("value", [1.5, ["acme"], [1], {"acme/my-kernel": True}, "acme", ["a/b/c"]])
def test_malformed_trust_remote_code_fails_at_registration(source, value):
    with pytest.raises(ConfigError, match="malformed trust_remote_code"):
        source(version=1, trust_remote_code=value)
