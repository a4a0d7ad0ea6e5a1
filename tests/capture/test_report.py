"""What the report says of captured layers."""

from __future__ import annotations

import json
import subprocess
import sys
import threading

import pytest

from twinkle import report
from twinkle.capture.state import captured
from twinkle.registry import Registry
from twinkle.report.records import snapshot
from twinkle.report.text import render

pytestmark = pytest.mark.usefixtures("clean_registry")


def example() -> None:
    record = captured().stack("Net", "model.layers", "Layer", 28)
    for _ in range(28):
        record.captures("bfloat16[4, 512, 1024]", "train")
        record.holds(1 << 20)
        record.eager("before it was recorded")
    record.captures("bfloat16[1, 1, 1024]", "inference")
    record.drops("bfloat16[1, 1, 1024]", "inference")
    record.eager("another stream is current")
    record.holds(-(1 << 20))
    for _ in range(300):
        record.replayed()


def test_the_data_has_everything() -> None:
    example()
    [found] = snapshot(Registry())["captures"]
    assert found == {
        "model": "Net",
        "container": "model.layers",
        "block": "Layer",
        "blocks": 28,
        "is_trunk": False,
        "models": 1,
        "signatures": [
            {"shapes": "bfloat16[4, 512, 1024]", "mode": "train", "blocks": 28, "most_blocks": 28},
            {"shapes": "bfloat16[1, 1, 1024]", "mode": "inference", "blocks": 0, "most_blocks": 1},
        ],
        "replays": 300,
        "eager": {"before it was recorded": 28, "another stream is current": 1},
        "bytes": 27 << 20,
        "most_bytes": 28 << 20,
    }
    assert json.loads(json.dumps(found)) == found


def test_the_text_has_a_section_after_the_bindings() -> None:
    example()
    text = render(snapshot(Registry()), width=120)
    assert text.partition("captured layers\n")[2].partition("\n\n")[0].splitlines() == [
        "  Net model.layers: 28 x Layer: 300 calls replayed, 27.0 MiB held, 28.0 MiB at most",
        "    train bfloat16[4, 512, 1024]: 28 blocks",
        "    inference bfloat16[1, 1, 1024]: 0 blocks, 1 at most",
        "    as it is, 28 calls: before it was recorded",
        "    as it is, 1 call: another stream is current",
    ]


def test_a_stack_of_which_nothing_is_captured_says_why() -> None:
    record = captured().stack("Net", "", "Layer", 2)
    captured().stack("Net", "", "Layer", 2)
    record.eager("the block is on no GPU")
    assert render(snapshot(Registry()), width=120).partition("captured layers\n")[2].splitlines()[:2] == [
        "  Net: 2 x Layer in each of 2 models: nothing is captured",
        "    as it is, 1 call: the block is on no GPU",
    ]


def test_many_reasons_are_cut_and_rows_are_wrapped() -> None:
    record = captured().stack("Net" * 20, "layers", "Layer", 2)
    for number in range(20):
        record.captures(f"float32[{number}]", "train")
        for _ in range(number + 1):
            record.eager(f"reason {number}")
    text = render(snapshot(Registry()), width=60)
    assert "    and 14 more kinds of calls\n" in text
    assert "    and 14 more reasons\n" in text
    assert text.index("reason 19") < text.index("reason 18")
    section = text.partition("captured layers\n")[2].partition("\n\n")[0]
    assert max(map(len, section.splitlines())) <= 62  # one word is longer


def test_without_stacks_there_is_no_section() -> None:
    assert snapshot(Registry())["captures"] == []
    assert "captured" not in render(snapshot(Registry()))
    older = snapshot(Registry())
    del older["captures"]
    assert render(older)


def test_a_report_imports_nothing_for_it() -> None:
    code = (
        "import sys; from twinkle import report; report.text(); print('twinkle.capture.state' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_the_records_are_those_of_this_runtime() -> None:
    example()
    from twinkle.runtime import runtime

    runtime.reset()
    assert report.snapshot()["captures"] == []
    assert captured().held == 0


def test_threads_count_what_is_captured_exactly() -> None:
    record = captured().stack("Net", "layers", "Layer", 2)

    def work() -> None:
        for _ in range(500):
            record.captures("float32[1]", "train")
            record.holds(3)
            record.drops("float32[1]", "train")
            record.holds(-3)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    [signature] = record.as_data()["signatures"]
    assert (signature["blocks"], record.held, captured().held) == (0, 0, 0)
    assert record.most_held <= 12
