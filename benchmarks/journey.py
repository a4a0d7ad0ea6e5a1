"""The journey of a model through the rooms: which files one ``kernelize_layers(model)`` goes through.

    python benchmarks/journey.py [--steps]

Every function of Twinkle that is entered is a step, in the order of time. A *stay* is a run of steps in one
file; a *climb* is a step from a room to a higher one (by the order in ``tests/test_layering.py``). The model
is a Llama of two layers on the CPU: its MLP is bound by name, its norms by ``match``, and the embedded
kernels are on. Everything is imported before, and recognised code is forgotten (``first``) or known from a
model before (``again``). The symbolic executor counts as one file.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    from collections.abc import Callable, Sequence
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


def steps_of(call: Callable[[], Any]) -> list[str]:
    """The file of each function of Twinkle that is entered during a call, relative to the package."""
    files: list[str] = []

    def entered(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(PACKAGE) or code.co_name == "<module>":
            return
        name = code.co_filename[len(PACKAGE) :]
        files.append("match/symbolic" if name.startswith("match/symbolic/") else name)

    sys.setprofile(entered)
    try:
        call()
    finally:
        sys.setprofile(None)
    return files


def stays_of(steps: Sequence[str]) -> list[str]:
    """The files in the order of the visits."""
    return [file for at, file in enumerate(steps) if at == 0 or file != steps[at - 1]]


def room_of(file: str) -> int:
    """The place of a file's room in the order."""
    return ORDER.index(file.partition("/")[0].removesuffix(".py"))


def figures(steps: Sequence[str]) -> dict[str, int]:
    """Steps, stays, distinct files and climbs, and the same for the different ways between files."""
    stays = stays_of(steps)
    ways = Counter(pairwise(stays))
    climbs = [way for way in ways if room_of(way[1]) > room_of(way[0])]
    return {
        "steps": len(steps),
        "stays": len(stays),
        "files": len(set(stays)),
        "climbs": sum(ways[way] for way in climbs),
        "ways": len(ways),
        "climbing ways": len(climbs),
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
            print("\n".join(f"  {file}" for file in stays_of(steps)))


if __name__ == "__main__":
    main()
