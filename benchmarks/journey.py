"""The journey of a model through the rooms: which files one ``kernelize_layers(model)`` goes through.

    python benchmarks/journey.py [--steps]

Every function of Twinkle that is entered is a step, in the order of time. A *stay* is a run of steps in one
file (or room). A *climb* leads from a stay in one room to a stay in a higher one, by the order in
``tests/test_layering.py``: mostly a return and the next call. A *call up* is a function that calls one of a
higher room, which no import allows: an object of that room was handed down.

The model is a Llama of two layers on the CPU: its MLP is bound by name, its norms by ``match``, and the
embedded kernels are on. Everything is imported before; recognised code is forgotten (``first``) or known from
a model before (``again``). The symbolic executor counts as one file.
"""

from __future__ import annotations

import argparse
import sys
from itertools import groupby, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from test_layering import ORDER  # noqa: E402

import twinkle  # noqa: E402
from twinkle.apply.layers import kernelize_layers  # noqa: E402
from twinkle.kernel import register_kernels  # noqa: E402
from twinkle.runtime import runtime  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from types import FrameType

PACKAGE = str(Path(twinkle.__file__).parent) + "/"


class NamedMLP(nn.Module):
    """A kernel for the MLP of a Llama, which is never called here."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As the original."""
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]


class MatchedNorm(nn.Module):
    """A kernel for whatever is an RMSNorm, which is never called here."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """No norm at all."""
        return hidden_states


def model() -> nn.Module:
    """A Llama of two layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    made: nn.Module = LlamaForCausalLM(config)
    return made


def register() -> None:
    """One kernel bound by name, one by structure, and the embedded ones."""
    runtime.reset()
    runtime.options.kernels = "auto"
    register_kernels(
        {
            "layers": {
                "MLP": {
                    "target": "transformers.models.llama.modeling_llama:LlamaMLP",
                    "layer_impl": NamedMLP,
                },
                "Norm": {"match": "rms_norm", "layer_impl": MatchedNorm},
            }
        }
    )


class Step(NamedTuple):
    """A function of Twinkle that is entered.

    Attributes:
        file: Its file, relative to the package.
        caller: The file of the nearest function of Twinkle up the stack; empty where there is none.
    """

    file: str
    caller: str


def steps_of(call: Callable[[], Any]) -> list[Step]:
    """The functions of Twinkle that are entered during a call, in the order of time."""
    steps: list[Step] = []

    def entered(frame: FrameType, event: str, _: Any) -> None:
        if event != "call" or not is_ours(frame) or frame.f_code.co_name == "<module>":
            return
        caller = frame.f_back
        while caller is not None and not is_ours(caller):
            caller = caller.f_back
        steps.append(Step(file_of(frame), "" if caller is None else file_of(caller)))

    sys.setprofile(entered)
    try:
        call()
    finally:
        sys.setprofile(None)
    return steps


def is_ours(frame: FrameType) -> bool:
    """Whether a function of Twinkle runs in that frame."""
    return frame.f_code.co_filename.startswith(PACKAGE)


def file_of(frame: FrameType) -> str:
    """The file of a frame, relative to the package; the symbolic executor is one."""
    name = frame.f_code.co_filename[len(PACKAGE) :]
    return "match/symbolic" if name.startswith("match/symbolic/") else name


def runs_of(names: Iterable[str]) -> list[str]:
    """The names without repetitions in a row."""
    return [name for name, _ in groupby(names)]


def room_of(file: str) -> int:
    """The place of a file's room in the order."""
    return ORDER.index(file.partition("/")[0].removesuffix(".py"))


def figures(steps: Sequence[Step]) -> dict[str, int]:
    """The figures that the head of this file explains."""
    stays = runs_of(step.file for step in steps)
    return {
        "steps": len(steps),
        "stays": len(stays),
        "files": len(set(stays)),
        "climbs": sum(room_of(there) > room_of(here) for here, there in pairwise(stays)),
        "stays in rooms": len(runs_of(str(room_of(step.file)) for step in steps)),
        "calls up": sum(bool(one.caller) and room_of(one.file) > room_of(one.caller) for one in steps),
    }


def main() -> None:
    """Print the figures of a first model and of a second of the same class."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", action="store_true", help="print the files in the order of the visits")
    options = parser.parse_args()
    register()
    kernelize_layers(model())  # everything that is imported late is there now
    register()
    for title in ("first", "again"):
        made = model()
        steps = steps_of(lambda made=made: kernelize_layers(made))  # type: ignore[misc]
        print(f"{title}: " + ", ".join(f"{value} {name}" for name, value in figures(steps).items()))
        if options.steps:
            print("\n".join(f"  {file}" for file in runs_of(step.file for step in steps)))


if __name__ == "__main__":
    main()
