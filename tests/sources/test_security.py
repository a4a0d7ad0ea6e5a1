"""The threat model of docs/security.md: a test for each row of its tables.

Another user of the machine is one who owns or may write a file, a directory, or one above it. Each kind of
thing that Twinkle believes is set up whole, believed, then touched as that user could, and believed no more.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from twinkle.config.files import read
from twinkle.errors import TwinkleError
from twinkle.runtime import runtime
from twinkle.sources import permissions, plugins
from twinkle.sources.local import LocalSource

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.skipif(os.name != "posix", reason="owners and modes are of POSIX")

LAYERS = "import torch\nclass Layer(torch.nn.Module):\n    def forward(self, x):\n        return x\n"
DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "security.md"


class Believed:
    """One thing that Twinkle believes.

    Attributes:
        file: The file that says it.
        ask: Reads it as Twinkle does; raises where it is not believed.
    """

    def __init__(self, file: Path, ask: Callable[[], object]) -> None:
        self.file = file
        self.ask = ask

    def is_believed(self) -> bool:
        """Whether it is."""
        runtime.reset()
        try:
            return self.ask() is not None
        except TwinkleError:
            return False


def _write(file: Path, text: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


def configuration(root: Path, monkeypatch: pytest.MonkeyPatch) -> Believed:
    file = _write(root / "below" / "twinkle.toml", "[twinkle]\n")
    return Believed(file, lambda: read(str(file)))


def lock(root: Path, monkeypatch: pytest.MonkeyPatch) -> Believed:
    from twinkle.sources.hub.lockfile import in_force

    file = _write(root / "below" / "twinkle.lock", '{"format": 1, "kernels": []}')
    return Believed(file, lambda: in_force(str(file.parent)))


def repo_path(root: Path, monkeypatch: pytest.MonkeyPatch) -> Believed:
    file = _write(root / "below" / "mine" / "layers.py", LAYERS)
    _write(file.parent / "__init__.py", "")

    def ask() -> object:
        for name in [name for name in sys.modules if name.startswith("twinkle.sources.packages.")]:
            del sys.modules[name]
        return LocalSource(str(root / "below"), "mine", "Layer", kind="layer").load()

    return Believed(file, ask)


def local_kernels(root: Path, monkeypatch: pytest.MonkeyPatch) -> Believed:
    pytest.importorskip("kernels")
    from twinkle.sources.hub.request import HubRequest
    from twinkle.sources.hub.resolve import local_override

    file = _write(root / "below" / "torch-cpu" / "__init__.py", "")
    monkeypatch.setenv("LOCAL_KERNELS", f"acme/k={root / 'below'}")
    return Believed(file, lambda: local_override(HubRequest("acme/k", version=1)))


def plugin(root: Path, monkeypatch: pytest.MonkeyPatch) -> Believed:
    package = root / "below" / "plug_secure"
    _write(package / "__init__.py", "")
    file = _write(package / "twinkle.toml", "[twinkle]\n")
    _write(
        root / "below" / "plug-1.dist-info" / "METADATA", "Metadata-Version: 2.1\nName: plug\nVersion: 1\n"
    )
    entry = "[twinkle.kernels]\nsecure = plug_secure:twinkle.toml\n"
    _write(root / "below" / "plug-1.dist-info" / "entry_points.txt", entry)
    monkeypatch.syspath_prepend(str(root / "below"))
    return Believed(file, lambda: plugins.load("secure"))


def plugin_code(root: Path, monkeypatch: pytest.MonkeyPatch) -> Believed:
    file = _write(root / "below" / "plug_coded.py", "document = {}\n")
    _write(
        root / "below" / "plug-1.dist-info" / "METADATA", "Metadata-Version: 2.1\nName: plug\nVersion: 1\n"
    )
    entry = "[twinkle.kernels]\ncoded = plug_coded:document\n"
    _write(root / "below" / "plug-1.dist-info" / "entry_points.txt", entry)
    monkeypatch.syspath_prepend(str(root / "below"))

    def ask() -> object:
        sys.modules.pop("plug_coded", None)
        return plugins.load("coded")

    return Believed(file, ask)


def kept_proof(root: Path, monkeypatch: pytest.MonkeyPatch) -> Believed:
    from twinkle.proof.cache import ProofCache
    from twinkle.proof.compare import Verdict

    cache = ProofCache(root / "below" / "proofs")
    cache.keep({"op": "x"}, Verdict(True, "right", errors=(0.0, 0.0, 0.0, 0.0)))
    (file,) = (root / "below" / "proofs").glob("*.json")
    return Believed(file, lambda: ProofCache(cache.path).verdict_of({"op": "x"}))


THINGS = [configuration, lock, repo_path, local_kernels, plugin, plugin_code, kept_proof]


def _give(path: Path) -> None:
    if os.geteuid():
        pytest.skip("only root can give a file away")
    os.chown(path, 4242, -1, follow_symlinks=False)


def _through_a_link(file: Path, folder: Path) -> None:
    """Replace a directory by a link to itself elsewhere, which lies in ``folder``."""
    shutil.move(str(file.parent), folder / "moved")
    file.parent.symlink_to(folder / "moved")


def _link_in_an_open_folder(file: Path, folder: Path) -> None:
    _through_a_link(file, folder)
    file.parent.parent.chmod(0o777)


def _destination_in_an_open_folder(file: Path, folder: Path) -> None:
    (folder / "open").mkdir()
    _through_a_link(file, folder / "open")
    (folder / "open").chmod(0o777)


def _foreign_link(file: Path, folder: Path) -> None:
    _through_a_link(file, folder)
    _give(file.parent)


WAYS: dict[str, Callable[[Path, Path], object]] = {
    "owns the file": lambda file, folder: _give(file),
    "owns its directory": lambda file, folder: _give(file.parent),
    "owns a directory above": lambda file, folder: _give(file.parents[2]),
    "may write the file": lambda file, folder: file.chmod(0o666),
    "may write its directory": lambda file, folder: file.parent.chmod(0o777),
    "may write a directory above": lambda file, folder: file.parents[2].chmod(0o777),
    "is in a group that may write a directory above": lambda file, folder: file.parents[2].chmod(0o775),
    "may write where a link on the way lies": _link_in_an_open_folder,
    "may write where a link on the way leads": _destination_in_an_open_folder,
    "owns a link on the way": _foreign_link,
}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(permissions, "is_private_group", lambda user, group: False)
    for name in ("TWINKLE_TRUST_FILES", "TWINKLE_LOCK"):
        monkeypatch.delenv(name, raising=False)
    root = tmp_path / "top" / "root"
    root.mkdir(parents=True)
    for folder in (tmp_path, tmp_path / "top", root):
        folder.chmod(0o755)
    return root


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("thing", THINGS)
def test_what_another_user_could_have_written_is_not_believed(
    thing: Any, way: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    believed = thing(root, monkeypatch)
    assert believed.is_believed()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o755)
    WAYS[way](believed.file, elsewhere)
    assert not believed.is_believed()


@pytest.mark.parametrize("thing", [t for t in THINGS if t is not kept_proof])
def test_a_link_whose_places_are_closed_is_followed(
    thing: Any, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    believed = thing(root, monkeypatch)
    (tmp_path / "elsewhere").mkdir(mode=0o755)
    _through_a_link(believed.file, tmp_path / "elsewhere")
    assert believed.is_believed()


@pytest.mark.parametrize("thing", THINGS)
def test_a_sticky_directory_above_is_as_good_as_a_closed_one(
    thing: Any, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    believed = thing(root, monkeypatch)
    root.parent.chmod(0o1777)
    assert believed.is_believed()


@pytest.mark.parametrize("thing", [t for t in THINGS if t is not kept_proof])
def test_the_user_may_vouch_for_a_directory(thing: Any, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    believed = thing(root, monkeypatch)
    believed.file.chmod(0o666)
    assert not believed.is_believed()
    monkeypatch.setenv("TWINKLE_TRUST_FILES", str(root))
    assert believed.is_believed()


@pytest.mark.parametrize("owner", ["the program", "nobody of these"])
def test_whose_code_runs_anyway_is_believed(
    owner: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    believed = configuration(root, monkeypatch)
    _give(believed.file)
    program = _write(tmp_path / "program.py", "")
    if owner == "the program":
        _give(program)
    monkeypatch.setattr(sys, "orig_argv", [sys.executable, "-X", "dev", "-u", str(program)])
    assert believed.is_believed() is (owner == "the program")


def test_a_link_inside_a_local_package_is_asked_for_its_destination(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    believed = repo_path(root, monkeypatch)
    there = _write(tmp_path / "elsewhere" / "inner" / "__init__.py", "")
    (believed.file.parent / "inner").symlink_to(there.parent)
    assert believed.is_believed()
    there.chmod(0o666)
    assert not believed.is_believed()


def test_users_named_one_by_one_count_as_others(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an access list the bits of the group stand for all who are named in it."""
    believed = configuration(root, monkeypatch)
    believed.file.chmod(0o664)
    monkeypatch.setattr(permissions, "is_private_group", lambda user, group: True)
    assert believed.is_believed()
    monkeypatch.setattr(os, "getxattr", lambda path, name: b"\2", raising=False)
    assert not believed.is_believed()


def test_every_test_that_the_threat_model_names_is_there() -> None:
    tests = DOCUMENT.parent.parent / "tests"
    named = re.findall(r"`([\w/]+\.py)::(test_\w+)`", DOCUMENT.read_text(encoding="utf-8"))
    assert len(named) >= 15
    missing = [
        f"{file}::{name}" for file, name in named if f"def {name}(" not in (tests / file).read_text("utf-8")
    ]
    assert missing == []
