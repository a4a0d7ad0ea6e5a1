"""Verdicts that are kept: found again for the same question, and never in the way of a program."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from twinkle.ops.cases import cases, variants
from twinkle.proof.cache import DAYS, ProofCache, cache_folder, proofs
from twinkle.proof.cache_key import cache_key, kernel_version
from twinkle.proof.compare import Verdict
from twinkle.proof.first_use import prove
from twinkle.runtime import runtime
from twinkle.sources.embedded import EmbeddedLayer

KEY = {"op": "rms_norm", "variant": "llama", "dtype": "bfloat16", "device": "cpu", "gradients": True}
RIGHT = Verdict(True, "error 1e-3", errors=(1e-3, 2e-3, float("nan"), float("nan")))


@pytest.fixture
def cache(tmp_path: Path) -> ProofCache:
    return ProofCache(tmp_path / "below" / "proofs")


def again(cache: ProofCache) -> ProofCache:
    return ProofCache(cache.path)


def test_a_verdict_is_found_again_with_its_date(cache: ProofCache) -> None:
    cache.keep(KEY, RIGHT)
    found = again(cache).verdict_of(KEY)
    assert found is not None
    assert found.ok
    assert found.errors[:2] == RIGHT.errors[:2]
    assert str(found).startswith(f"proven (cached, {found.date}): error")


def test_another_key_has_no_verdict(cache: ProofCache) -> None:
    cache.keep(KEY, RIGHT)
    assert again(cache).verdict_of({**KEY, "dtype": "float16"}) is None


def test_a_verdict_with_gradients_is_recalled_where_none_are_compared(cache: ProofCache) -> None:
    cache.keep(KEY, RIGHT)
    forward_alone = {**KEY, "gradients": False}
    assert cache.verdict_of(forward_alone) is None
    assert cache.recall(forward_alone) is not None


def test_a_verdict_without_gradients_is_not_recalled_for_a_call_with_them(cache: ProofCache) -> None:
    cache.keep({**KEY, "gradients": False}, RIGHT)
    assert cache.recall(KEY) is None


def test_a_comparison_that_broke_off_is_not_kept(cache: ProofCache) -> None:
    cache.keep(KEY, Verdict(False, "out of memory", conclusive=False))
    assert again(cache).verdict_of(KEY) is None


def file_of(cache: ProofCache) -> Path:
    """The one verdict that is kept."""
    assert cache.path is not None
    (file,) = cache.path.glob("*.json")
    return file


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": 99}', "\0\0", "[" * 100_000, "1" * 5000])
def test_a_damaged_file_is_one_line_in_the_log(
    cache: ProofCache, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    cache.keep(KEY, RIGHT)
    file_of(cache).write_text(text)
    cache = again(cache)
    with caplog.at_level(logging.WARNING, "twinkle"):
        assert cache.verdict_of(KEY) is None
        cache.keep(KEY, RIGHT)
    assert len(caplog.records) == 1
    assert again(cache).verdict_of(KEY) is not None, "and a good one takes its place"


CHANGES: dict[str, Any] = {
    "another text": {"text": "error 0"},
    "another error": {"errors": [0.0, 0.0, None, None]},
    "a huge error": {"errors": [10**400, 0.0, None, None]},
    "another date": {"date": "2020-01-01"},
    "another key": {"key": "0" * 64},
    "another format": {"schema": 1},
    "a field more": {"ok": False},
    "a wrong type": {"errors": "none"},
    "another signature": {"mac": "0" * 64},
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_was_changed_means_proving_again(cache: ProofCache, change: str) -> None:
    cache.keep(KEY, RIGHT)
    file = file_of(cache)
    file.write_text(json.dumps({**json.loads(file.read_text()), **CHANGES[change]}))
    assert again(cache).verdict_of(KEY) is None


def test_a_verdict_under_the_name_of_another_is_none(cache: ProofCache) -> None:
    cache.keep({**KEY, "kernel": "right"}, RIGHT)
    right = file_of(cache)
    cache.keep(KEY, RIGHT)
    (name,) = {path.name for path in right.parent.glob("*.json")} - {right.name}
    shutil.copy(right, right.parent / name)
    assert again(cache).verdict_of(KEY) is None


def test_a_verdict_that_another_user_signed_is_none(cache: ProofCache, tmp_path: Path) -> None:
    other = ProofCache(tmp_path / "other")
    other.keep(KEY, RIGHT)
    cache.keep({"n": 1}, RIGHT)
    assert cache.path is not None
    shutil.copy(file_of(other), cache.path)
    assert again(cache).verdict_of(KEY) is None


@pytest.mark.parametrize("change", [lambda file: file.write_bytes(b"1"), lambda file: _fifo(file)])
def test_a_damaged_secret_is_another_after_clearing(cache: ProofCache, change: Any) -> None:
    cache.keep(KEY, RIGHT)
    assert cache.path is not None
    change(cache.path / "secret")
    cache = again(cache)
    assert cache.verdict_of(KEY) is None
    assert cache.clear() == 1
    cache.keep(KEY, RIGHT)
    assert again(cache).verdict_of(KEY) is not None


def test_a_disk_without_hard_links_keeps_verdicts_too(
    cache: ProofCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*places: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.link", refuse)
    cache.keep(KEY, RIGHT)
    assert again(cache).verdict_of(KEY) is not None


def test_a_rejection_is_no_file(cache: ProofCache) -> None:
    cache.keep(KEY, Verdict(False, "error 1", errors=(1.0, 1.0, 1.0, 1.0)))
    assert cache.verdict_of(KEY) is not None, "this process knows"
    assert again(cache).verdict_of(KEY) is None


def test_an_old_verdict_is_proven_again(cache: ProofCache, monkeypatch: pytest.MonkeyPatch) -> None:
    import datetime

    class Later(datetime.date):
        @classmethod
        def today(cls) -> Any:
            return datetime.date.fromordinal(datetime.date.toordinal(real()) + DAYS + 1)

    real = datetime.date.today
    cache.keep(KEY, RIGHT)
    monkeypatch.setattr("twinkle.proof.cache.datetime.date", Later)
    assert again(cache).verdict_of(KEY) is None


def _fifo(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def _zero(file: Path) -> None:
    file.unlink()
    file.symlink_to("/dev/zero")


def _link(file: Path) -> None:
    file.rename(file.parent / "elsewhere")
    file.symlink_to("elsewhere")


def _folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def _huge(file: Path) -> None:
    os.truncate(file, 1 << 40)


def _foreign(file: Path) -> None:
    if os.geteuid():
        pytest.skip("only root can give a file away")
    os.chown(file, 4242, -1)


ODD = [
    _fifo,
    _zero,
    _link,
    _folder,
    _huge,
    _foreign,
    lambda file: file.chmod(0o666),
    lambda file: file.chmod(0o660),
    lambda file: file.parent.chmod(0o777),
    lambda file: file.parent.chmod(0o1777),
    lambda file: file.parent.parent.chmod(0o777),
    lambda file: _foreign(file.parent),
    lambda file: _foreign(file.parent.parent),
    lambda file: _fifo(file.parent / "secret"),
    lambda file: _foreign(file.parent / "secret"),
    lambda file: (file.parent / "secret").write_bytes(b""),
    lambda file: (file.parent / "secret").unlink(),
]


@pytest.mark.parametrize("change", ODD)
def test_a_file_that_others_could_have_written_is_none(cache: ProofCache, change: Any) -> None:
    cache.keep(KEY, RIGHT)
    assert again(cache).verdict_of(KEY) is not None
    change(file_of(cache))
    cache = again(cache)
    assert cache.verdict_of(KEY) is None
    cache.keep(KEY, RIGHT)
    cache.clear()
    len(cache)


def test_a_directory_that_cannot_be_written_is_one_line_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    cache = ProofCache(tmp_path / "file" / "proofs")
    with caplog.at_level(logging.WARNING, "twinkle"):
        cache.keep(KEY, RIGHT)
        cache.keep(KEY, RIGHT)
    assert len(caplog.records) == 1


def test_a_full_disk_is_one_line_in_the_log(
    cache: ProofCache, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    with caplog.at_level(logging.WARNING, "twinkle"), monkeypatch.context() as patch:
        patch.setattr("os.write", full)
        for number in range(3):
            cache.keep({"n": number}, RIGHT)
    assert len(caplog.records) == 1
    assert cache.path is not None
    assert list(cache.path.iterdir()) == []


def test_sixteen_processes_that_write_at_once_lose_nothing(cache: ProofCache) -> None:
    # Without torch, which sixteen processes would load: the cache takes of a verdict what a tuple has.
    program = (
        "import sys, types, pathlib, collections\n"
        "compare = types.ModuleType('twinkle.proof.compare')\n"
        "compare.Verdict = collections.namedtuple('Verdict', 'ok text errors date conclusive',"
        " defaults=[None, None, True])\n"
        "sys.modules['twinkle.proof.compare'] = compare\n"
        "from twinkle.proof.cache import ProofCache\n"
        "cache = ProofCache(pathlib.Path(sys.argv[1]))\n"
        "right = compare.Verdict(True, 'x' * 500, (1.0,) * 4)\n"
        "for n in range(25): cache.keep({'n': n, 'by': sys.argv[2]}, right)\n"
        "print(cache._complained)\n"
    )
    children = [
        subprocess.Popen([sys.executable, "-c", program, str(cache.path), str(n)], stdout=subprocess.PIPE)
        for n in range(16)
    ]
    assert [child.communicate()[0] for child in children] == [b"False\n"] * 16
    assert len(cache) == 16 * 25
    assert all(cache.verdict_of({"n": n, "by": str(by)}) for n in range(25) for by in range(16))
    assert cache.path is not None
    assert {path.suffix for path in cache.path.iterdir()} == {".json", ""}, "nothing is left lying about"


def test_the_oldest_go_when_there_are_too_many(cache: ProofCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("twinkle.proof.cache.MOST", 3)
    monkeypatch.setattr("twinkle.proof.cache.LOOK_EVERY", 1)
    for number in range(5):
        cache.keep({"n": number}, RIGHT)
        assert cache.path is not None
        for file in cache.path.glob("*.json"):
            os.utime(file, (file.stat().st_mtime - 10,) * 2)
    assert len(again(cache)) == 3
    assert [number for number in range(5) if again(cache).verdict_of({"n": number})] == [2, 3, 4]


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"TWINKLE_CACHE": "off"}, None),
        ({"TWINKLE_CACHE": "1"}, None),
        ({"TWINKLE_CACHE": "~nosuchuser/x"}, None),
        ({"TWINKLE_CACHE": "/c"}, Path("/c/proofs")),
        ({"XDG_CACHE_HOME": "/x"}, Path("/x/twinkle/proofs")),
        ({"XDG_CACHE_HOME": "relative"}, Path("~/.cache/twinkle/proofs").expanduser()),
        ({}, Path("~/.cache/twinkle/proofs").expanduser()),
    ],
)
def test_where_the_file_is(environ: dict[str, str], expected: Path | None) -> None:
    assert cache_folder(environ) == expected


def test_without_a_file_nothing_is_kept() -> None:
    cache = ProofCache(None)
    cache.keep(KEY, RIGHT)
    assert cache.verdict_of(KEY) is None
    assert cache.clear() == 0


# -- at first calls -----------------------------------------------------------------------------


def sample(width: int = 48) -> tuple[Any, Any, torch.Tensor]:
    variant = variants("rms_norm")[0]
    made = next(iter(cases("rms_norm", variant, torch.float32, torch.device("cpu"))))
    module = type(made.module)(variant, width, torch.float32, torch.device("cpu"))
    return made, module, torch.randn(2, 8, width)


class Counted:
    """A kernel that counts its calls."""

    def __init__(self, kernel: Any, factor: float = 1.0) -> None:
        self.kernel = kernel
        self.factor = factor
        self.calls = 0

    def __call__(self, module: Any, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.kernel(module, x) * self.factor


def asked(
    kernel: Counted, made: Any, module: Any, x: torch.Tensor, *, source: Any = None, **options: Any
) -> Verdict:
    source = source or EmbeddedLayer("rms_norm", variants("rms_norm")[0], made.facts)
    options = {"backward": True, "recall": True, **options}
    return prove(source, made.original, kernel, (x,), {}, module=module, **options)


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TWINKLE_CACHE", str(tmp_path))
    return tmp_path / "proofs"


def test_the_second_process_does_not_compare_again(kept: Path) -> None:
    made, module, x = sample()
    first, second = Counted(made.kernel), Counted(made.kernel)
    assert asked(first, made, module, x).date is None
    verdict = asked(second, made, module, x)
    assert (second.calls, verdict.ok) == (0, True)
    assert "cached" in str(verdict)


def test_a_rejection_is_known_to_this_process(kept: Path) -> None:
    made, module, x = sample()
    asked(Counted(made.kernel, 1.01), made, module, x)
    verdict = asked(Counted(made.kernel), made, module, x)
    assert not verdict.ok
    assert str(verdict).startswith("rejected (cached, ")


@pytest.mark.parametrize(
    "change", ["width", "dtype", "rank", "strides", "frozen weight", "number", "autocast"]
)
def test_what_could_change_the_answer_is_another_question(kept: Path, change: str) -> None:
    made, module, x = sample()
    asked(Counted(made.kernel), made, module, x)
    source = None
    if change == "width":
        _, module, x = sample(64)
    elif change == "dtype":
        module, x = module.bfloat16(), x.bfloat16()
    elif change == "rank":
        x = x[0]
    elif change == "strides":
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    elif change == "frozen weight":
        module.requires_grad_(False)
    elif change == "number":
        source = EmbeddedLayer("rms_norm", variants("rms_norm")[0], {**made.facts, "eps": 1e-5})
    kernel = Counted(made.kernel)
    with torch.autocast("cpu", enabled=change == "autocast"):
        asked(kernel, made, module, x, source=source)
    assert kernel.calls


@pytest.mark.parametrize("rows", [1, 9])
def test_how_many_rows_there_are_is_not(kept: Path, rows: int) -> None:
    made, module, x = sample()
    asked(Counted(made.kernel), made, module, x)
    kernel = Counted(made.kernel)
    asked(kernel, made, module, torch.randn(2, rows, 48))
    assert bool(kernel.calls) == (rows == 1), "but one row alone is something special"


def test_a_proof_with_gradients_holds_without_and_not_the_other_way(kept: Path) -> None:
    made, module, x = sample()
    asked(Counted(made.kernel), made, module, x, backward=False)
    training = Counted(made.kernel)
    asked(training, made, module, x)
    assert training.calls
    inference = Counted(made.kernel)
    asked(inference, made, module, x, backward=False)
    assert inference.calls == 0


def test_a_users_own_kernel_is_compared_each_time(kept: Path) -> None:
    class Mine:
        kind = "function"
        op, variant, facts, backend = "rms_norm", variants("rms_norm")[0], {}, "triton_backend"

    made, module, x = sample()
    for _ in range(2):
        kernel = Counted(made.kernel)
        asked(kernel, made, module, x, source=Mine())
        assert kernel.calls
    assert not kept.exists()


def test_who_asks_for_a_comparison_by_name_gets_a_new_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {v: runtime.options.recalls(v) for v in (None, "auto", "first-use", "always")} == {
        None: True,
        "auto": True,
        "first-use": False,
        "always": False,
    }
    monkeypatch.setattr(runtime.options, "verify", "first-use")
    assert not runtime.options.recalls(None)


def test_the_version_of_a_kernel_is_that_of_its_files(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import twinkle.proof.cache_key as module

    package = Path(module.__file__).parent.parent
    for room in ("ops", "proof"):
        shutil.copytree(package / room, tmp_path / room)
    shutil.copy(package / "codegen.py", tmp_path)
    monkeypatch.setattr(module, "PACKAGE", tmp_path)

    def versions() -> tuple[str | None, ...]:
        kernel_version.cache_clear()
        return tuple(kernel_version(op) for op in ("rms_norm", "residual_norm", "rotary"))

    before = versions()
    with (tmp_path / "ops" / "rms_norm" / "triton.py").open("a") as file:
        file.write("# changed\n")
    after = versions()
    assert before[0] != after[0]
    assert before[1] != after[1], "it is made of the norm's kernels"
    assert before[2] == after[2]
    with (tmp_path / "codegen.py").open("a") as file:
        file.write("# changed\n")
    dressed = versions()
    assert all(one != other for one, other in zip(after, dressed, strict=True)), (
        "every kernel is dressed by it"
    )
    kernel_version.cache_clear()


def test_no_source_no_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import twinkle.proof.cache_key as module

    monkeypatch.setattr(module, "PACKAGE", tmp_path)
    kernel_version.cache_clear()
    made, nn_module, x = sample()
    source = EmbeddedLayer("rms_norm", variants("rms_norm")[0], made.facts)
    assert cache_key(source, (x,), {}, module=nn_module, backward=True) is None
    kernel_version.cache_clear()


def test_the_report_says_that_a_verdict_is_from_before(kept: Path, clean_registry: Any) -> None:
    from twinkle.records import Binding, LayerKernel
    from twinkle.swap.candidate import Candidate
    from twinkle.swap.layers import plan

    for _ in range(2):
        made, module, x = sample()
        source = EmbeddedLayer("rms_norm", variants("rms_norm")[0], made.facts)
        binding = Binding("layer", "program:Norm", "rms_norm", source)
        kernel = LayerKernel("rms_norm", source, chosen_by="twinkle")
        plan(module, [Candidate(kernel, binding, proofs=1, recall=True)]).commit()
        module(x)
    assert binding.state == "active"
    assert binding.proof.startswith("proven (cached, ")
    assert proofs().clear() == 1
