"""Versions and revisions: what registers, what is chosen, and what is said when there is none."""

from __future__ import annotations

import pytest
from loopback_hub import Repo, kernel_files

from twinkle.errors import ConfigError, SourceError
from twinkle.sources import from_spec


@pytest.fixture
def versions(hub):
    """Branches v1 and v2 and main, tags v0.1.0 and v0.2.0."""
    hub.repos["acme/my-kernel"] = Repo(
        {"main": kernel_files("main"), "v1": kernel_files("v1"), "v2": kernel_files("v2")},
        tags={"v0.1.0": kernel_files("v0.1.0"), "v0.2.0": kernel_files("v0.2.0")},
    )
    return hub


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        (1, "v1"),
        ("1", "v1"),
        ("v1", "v1"),
        ("2.0", "v2"),
        ("0.1.0", "v0.1.0"),
        (">=1", "v2"),
        (">=1,<2", "v1"),
        ("~=0.1", "v0.2.0"),
        ("==0.*", "v0.2.0"),
        ("!=2", "v1"),
        (None, "v2"),
    ],
)
def test_version_chooses(versions, source, version, expected):
    assert source(version=version).load().label == expected


@pytest.mark.parametrize(
    "version",
    [
        "",
        "one",
        "1..2",
        "^1",
        "1.*",
        "latest",
        1.0,
        True,
        -1,
        [1],
        ">=1;<2",
        "v",
        "~=1",
        ">=1.*",
        "²",
        "1rc",
        "=1",
        "==",
        "1.0.dev",
    ],
)
def test_malformed_version_fails_at_registration(source, version):
    with pytest.raises(ConfigError, match="malformed version") as raised:
        source(version=version)
    assert repr(version) in str(raised.value)


@pytest.mark.parametrize(
    "version",
    [0, "1.0rc1", "1.0.post1.dev2", "~=1.0", "== 1.*", "!=1.2.*, >=1", ">1,<=2.0a1", "v0.1.0", "<v3"],
)
def test_whatever_registers_can_be_compared(source, version):
    from packaging.specifiers import SpecifierSet
    from packaging.version import InvalidVersion, Version

    text = source(version=version).request.version
    try:
        assert Version(text)
    except InvalidVersion:
        assert SpecifierSet(text)


@pytest.mark.parametrize("revision", ["", "a b", "../main", "a//b", 1, "v1:x"])
def test_malformed_revision_fails_at_registration(source, revision):
    with pytest.raises(ConfigError, match="malformed revision"):
        source(revision=revision)


@pytest.mark.parametrize(
    "repo_id", ["acme", "a/b/c", "../etc/passwd", "acme/..", "/acme/k", "", None, "acme/"]
)
def test_malformed_repo_id_fails_at_registration(source, repo_id):
    with pytest.raises(ConfigError, match="malformed repo_id"):
        source(repo_id=repo_id)


def test_version_with_a_revision_fails_at_registration(source):
    with pytest.raises(ConfigError, match="not both"):
        source(version=1, revision="main")


@pytest.mark.parametrize("spec", [{"version": "0.1.0"}, {}], ids=["a version", "no version"])
def test_the_registrations_of_the_documents_register_without_a_network(spec):
    source = from_spec(
        {"repo_id": "kernels-community/linear", "layer_name": "Linear", **spec},
        kind="layer",
        default_name="linear",
        base_dir=None,
        trust_remote_code=False,
        where="here",
    )
    assert source.kind == "hub"


def test_version_that_the_repository_lacks_lists_what_there_is(hub, source):
    with pytest.raises(SourceError) as raised:
        source(version="0.1.0").load()
    assert "versions 1 in the Hub" in str(raised.value)
    assert raised.value.where == "twinkle.toml:3 (layers.norm)"


def test_version_of_a_repository_without_versions_names_its_branches(hub, source):
    hub.repos["acme/my-kernel"] = Repo({"main": kernel_files("main")})
    with pytest.raises(SourceError, match=r"no versions in the Hub, only main"):
        source(version=1).load()


def test_version_that_the_cache_lacks_lists_what_there_is(hand_made, go_offline, source):
    hand_made(kernel_files(), refs=("v1", "v3"))
    go_offline()
    with pytest.raises(SourceError, match=r"versions 3, 1 in the cache"):
        source(version=2, trust_remote_code=True).load()


def test_revision_that_the_repository_lacks_is_a_reason(hub, source):
    with pytest.raises(SourceError, match="no such repository, revision or file"):
        source(revision="nowhere").load()


def test_revision_that_the_cache_lacks_lists_what_there_is(hand_made, go_offline, source):
    hand_made(kernel_files())
    go_offline()
    with pytest.raises(SourceError, match="the cache has main, v1"):
        source(revision="dev", trust_remote_code=True).load()


def test_nothing_in_the_cache_says_how_to_fill_it(cache, go_offline, source):
    go_offline()
    with pytest.raises(SourceError, match="not in the cache") as raised:
        source(version=1, trust_remote_code=True).load()
    assert "twinkle download" in str(raised.value)


def test_newest_is_said(versions, source):
    newest = source()
    newest.load()
    assert "v2 at" in newest.describe()
    assert any("no version was given: the newest was taken, v2" in note for note in newest.notes)


def test_without_version_branches_the_newest_is_main(hub, source):
    hub.repos["acme/my-kernel"] = Repo({"main": kernel_files("main")})
    assert source().load().label == "main"


def test_description_before_loading_says_what_was_asked_for(source):
    assert source(version=1).describe() == "Hub acme/my-kernel version 1: RMSNorm"
    assert source().describe() == "Hub acme/my-kernel, newest version: RMSNorm"


@pytest.mark.parametrize("pick", ["branch", "tag", "commit"])
def test_revision_chooses(versions, source, pick):
    repo = versions.repos["acme/my-kernel"]
    revision = {"branch": "v1", "tag": "v0.1.0", "commit": repo.branches["v2"]}[pick]
    expected = {"branch": "v1", "tag": "v0.1.0", "commit": "v2"}[pick]
    assert source(revision=revision).load().label == expected


def test_two_versions_of_one_repository_live_side_by_side(versions, source):
    first, second = source(version=1).load(), source(version=2).load()
    assert (first.label, second.label) == ("v1", "v2")


def test_a_commit_that_is_no_commit_never_becomes_a_path(hub, source):
    hub.repos["acme/my-kernel"].branches["v1"] = "../../outside"
    with pytest.raises(SourceError, match="gives no commit"):
        source(version=1).load()
