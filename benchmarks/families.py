"""Tiny causal language models of many families, with the embedded kernels and without: loss and gradients.

    python benchmarks/families.py [--dtype bfloat16] [--device cuda] [--families llama gemma3_text ...]

Each family is built from a small configuration; the same weights and tokens run once plainly and once with
``kernels = "auto"``. In half precision both are compared with the plain model in float32.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

SMALL = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 512,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def families() -> list[str]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def build(family: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(family)
    known = config.to_dict()
    config = AutoConfig.for_model(family, **{key: value for key, value in SMALL.items() if key in known})
    config.use_cache = False
    # Depth is read from lists as well; a model that stays large is no check of many.
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > 60_000_000:
        raise ValueError(f"{size / 1e6:.0f} M parameters from the small configuration")
    return AutoModelForCausalLM.from_config(config)


def run(model: Any, tokens: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    gradients = {n: p.grad.float() for n, p in model.named_parameters() if p.grad is not None}
    return loss.detach().float(), gradients


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    if a.keys() != b.keys():
        return float("inf")
    off = sum(float((a[name] - b[name]).square().sum()) for name in a)
    norm = sum(float(b[name].square().sum()) for name in b)
    return (off / norm) ** 0.5 if norm else off**0.5


def check(family: str, dtype: torch.dtype, device: str) -> dict[str, Any]:
    from twinkle.apply.models import kernelize_layers, unkernelize
    from twinkle.apply.options import options
    from twinkle.kernel import unapply_function_kernel
    from twinkle.registry import registry

    options.kernels = "auto"
    plain = build(family).to(device).train()
    for module in plain.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    tokens = torch.randint(3, 500, (2, 48), generator=torch.Generator().manual_seed(1)).to(device)
    exact = copy.deepcopy(plain).float()
    plain.to(dtype)
    ours = copy.deepcopy(plain)
    loss, gradients = run(plain, tokens)
    finer_loss, finer = run(exact, tokens)
    before = len(registry.bindings)
    kernelize_layers(ours)
    our_loss, our_gradients = run(ours, tokens)
    bindings = registry.bindings[before:]
    unkernelize(ours)
    unapply_function_kernel()
    own, off = distance(gradients, finer), distance(our_gradients, finer)
    floor = 1e-5 if dtype == torch.float32 else 2e-2
    good = abs(our_loss - finer_loss) <= 2 * abs(loss - finer_loss) + floor and off <= 2 * own + floor
    return {
        "family": family,
        "ok": bool(good),
        "loss": our_loss.item(),
        "plain_loss": loss.item(),
        "gradients_off": off,
        "plain_gradients_off": own,
        "active": sorted({b.kernel for b in bindings if b.state == "active"}),
        "not_active": sorted({f"{b.kernel}: {b.state}: {b.reason}" for b in bindings if b.state != "active"}),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--families", nargs="+", default=None)
    parser.add_argument("--seconds", type=float, default=1e9, help="stop after so long")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    import warnings

    warnings.simplefilter("ignore")
    started = time.monotonic()
    results, left_out = [], {}
    for family in args.families or families():
        if time.monotonic() - started > args.seconds:
            left_out[family] = "no time left"
            continue
        try:
            result = check(family, getattr(torch, args.dtype), args.device)
        except Exception as error:
            left_out[family] = (
                f"{type(error).__name__}: {str(error).splitlines()[0][:100] if str(error) else ''}"
            )
            continue
        results.append(result)
        if not result["ok"]:
            print("DIFFERS", json.dumps(result))
        elif result["not_active"]:
            print(family, result["active"], result["not_active"])
    wrong = [r["family"] for r in results if not r["ok"]]
    covered = [r for r in results if r["active"]]
    print(f"{len(results)} families ran, {len(covered)} with kernels, {len(wrong)} differ: {wrong}")
    print(f"{len(left_out)} left out")
    if args.json:
        data = {"dtype": args.dtype, "torch": torch.__version__, "results": results, "left_out": left_out}
        Path(args.json).write_text(json.dumps(data, indent=2) + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
