"""Tokens that tiny models generate, as JSON: run plain and under Twinkle, to be compared.

python tests/apply/generating.py LlamaForCausalLM T5ForConditionalGeneration …
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import torch
import transformers
from tiny_models import classes, tiny_model

NEW, PROMPT = 10, 7


def calls(model: Any) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Inputs and arguments of ``generate``: greedy, padded on the left, sampled, by beams, with an end."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, 250, (3, PROMPT), generator=generator)
    mask = torch.ones_like(tokens)
    mask[1, :3] = mask[2, :1] = 0
    one = {"input_ids": tokens[:1], "attention_mask": mask[:1]}
    padded = {"input_ids": tokens.masked_fill(mask == 0, 0), "attention_mask": mask}
    longer = {
        "input_ids": torch.cat([tokens, tokens, tokens], 1),
        "attention_mask": mask.new_ones(3, 3 * PROMPT),
    }
    return {
        "greedy": (one, {}),
        "greedy, padded": (padded, {}),
        "greedy, a longer prompt": (longer, {}),
        "sampled": (padded, {"do_sample": True, "top_k": 20, "temperature": 0.8}),
        "beams": (one, {"num_beams": 3}),
        "without a cache": (one, {"use_cache": False, "max_new_tokens": 4}),
    }


def generated(name: str, family: str) -> dict[str, Any]:
    """What one class generates, by call; the error where it cannot."""
    model = tiny_model(name, family).eval()
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    found: dict[str, Any] = {}
    for what, (given, arguments) in calls(model).items():
        torch.manual_seed(2)
        wanted = {"max_new_tokens": NEW, "use_cache": True, "do_sample": False, **arguments}
        try:
            found[what] = model.generate(**given, **wanted).tolist()
        except Exception as error:
            found[what] = f"{type(error).__name__}: {error}"[:200]
    if isinstance(found["greedy, padded"], list):
        # The token of the first row's fifth step ends rows, at different steps or never.
        given, _ = calls(model)["greedy, padded"]
        end = found["greedy, padded"][0][-NEW + 4]
        ended = model.generate(**given, max_new_tokens=NEW, do_sample=False, use_cache=True, eos_token_id=end)
        found["greedy, with an end"] = ended.tolist()
    return found


def main() -> None:
    transformers.logging.set_verbosity(60)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    families = classes()
    for name in sys.argv[1:]:
        try:
            found = generated(name, families[name])
        except Exception as error:
            found = {"built": f"{type(error).__name__}: {error}"[:200]}
        print(json.dumps([name, found]), flush=True)
    report: Any = sys.modules.get("twinkle.report")
    bindings = [] if report is None else report.snapshot()["bindings"]
    states = sorted({(one["kernel"], one["state"]) for one in bindings})
    print(json.dumps(["bindings", states]), flush=True)


if __name__ == "__main__":
    main()
