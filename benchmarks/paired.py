"""Families of models in several ways that take turns: a training step, an evaluation, a forward of one token.

    python benchmarks/paired.py [--families Llama,Bert,…] [--ways eager,twinkle,compile,liger] [--json FILE]
    python benchmarks/paired.py --device cpu --size tiny --rounds 3      processor time, small models

Models of the middle size (hidden size 1024, 12 layers, bfloat16), where a host is as long at it as a GPU:
training steps of 4 x 512 tokens with fused AdamW, evaluations of 1 x 512, forwards of a single token; of
image models 16 images and one. ``eager`` is the plain program, ``compile`` is
``torch.compile(mode="reduce-overhead", dynamic=False)``; ``liger`` is left out of families that liger-kernel
does not know. With ``--prepare 8`` eight processes at once compile all families before the first is measured.

Each way is a process of its own and they take turns; see turns.py for what a ratio is. Two processes of one
program differ by three percent for as long as they run: with ``--restarts 5`` all families are measured by
as many processes of each way, a ratio is the median of theirs, and each one's stands beside it. On a CPU
pin all of them to one core (``OMP_NUM_THREADS=1 taskset -c 1``). Beside the milliseconds of a call stand
those the host takes to issue it, those the device is busy with it and how many launches it is made of (from
one profiled call). The file of results has the first losses and what Twinkle's report says as well: its
kernels, how many calls of which layers were replayed and why others were not; of each way the peak of
memory. At the end: the geometric mean of the ratios of each mode and the worst family.

A file of results that is there already is added to, family by family.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent))
from turns import (
    Worker,
    ask_all,
    bindings,
    captures,
    in_turns,
    left_alone,
    prepare,
    profiled,
    ratios,
    serve,
    versions,
)

if TYPE_CHECKING:
    from collections.abc import Callable

MODES = {"train": 5, "eval": 8, "one": 12}
"""Calls of each mode in a turn."""
WAYS = ("eager", "twinkle", "compile", "liger")


class Family(NamedTuple):
    """A family of transformers' models.

    Attributes:
        name: Of the configuration, without ``Config``.
        model: The class of the model.
        kind: ``text``, ``image`` or ``encoder-decoder``.
        sizes: Of the configuration, besides those that all of its kind have.
        without: Sizes of its kind that it does not have.
        attention: The implementation.
    """

    name: str
    model: str
    kind: str = "text"
    sizes: dict[str, Any] = {}  # noqa: RUF012
    without: tuple[str, ...] = ()
    attention: str = "sdpa"


_GPT = {"n_embd": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads"}
_ONE_KIND = ("num_key_value_heads",)
FAMILIES = {
    family.name: family
    for family in (
        *(
            Family(name, f"{name}ForCausalLM")
            for name in ("Llama", "Qwen2", "Mistral", "Olmo2", "Granite", "Cohere", "StableLm", "Starcoder2")
        ),
        Family("Qwen3", "Qwen3ForCausalLM", sizes={"head_dim": "head"}),
        Family("Gemma2", "Gemma2ForCausalLM", sizes={"head_dim": "head"}, attention="eager"),
        Family("Gemma3Text", "Gemma3ForCausalLM", sizes={"head_dim": "head"}),
        Family("Glm4", "Glm4ForCausalLM", sizes={"head_dim": "head", "pad_token_id": 0}),
        Family("Phi3", "Phi3ForCausalLM", sizes={"pad_token_id": 0}),
        Family("SmolLM3", "SmolLM3ForCausalLM", sizes={"pad_token_id": 0}),
        Family("GPTNeoX", "GPTNeoXForCausalLM", without=_ONE_KIND),
        Family("GPT2", "GPT2LMHeadModel", sizes={"n_positions": 2048}),
        Family("Bloom", "BloomForCausalLM", attention="eager"),
        Family("OPT", "OPTForCausalLM", sizes={"ffn_dim": "inner", "word_embed_proj_dim": "width"}),
        Family("Mixtral", "MixtralForCausalLM", sizes={"intermediate_size": "half", "num_local_experts": 8}),
        Family("Bert", "BertForMaskedLM", without=_ONE_KIND),
        Family("Roberta", "RobertaForMaskedLM", without=_ONE_KIND, sizes={"max_position_embeddings": 4100}),
        Family("ModernBert", "ModernBertForMaskedLM", without=_ONE_KIND, sizes={"vocab_size": 50368}),
        Family("T5", "T5ForConditionalGeneration", "encoder-decoder", attention="eager"),
        Family("ViT", "ViTForImageClassification", "image"),
        Family("Dinov2", "Dinov2ForImageClassification", "image"),
    )
}


class Size(NamedTuple):
    """How large the models are.

    Attributes:
        width: Of the hidden states.
        inner: Of the MLPs.
        depth: Layers.
        heads: Of 64 channels in the middle size.
        vocab: Tokens there are.
        batch: Samples of a training step.
        length: Tokens of one.
    """

    width: int
    inner: int
    depth: int
    heads: int
    vocab: int
    batch: int
    length: int


SIZES = {
    "mid": Size(1024, 2816, 12, 16, 32000, 4, 512),
    "small": Size(256, 768, 4, 8, 8000, 2, 128),
    "tiny": Size(64, 128, 2, 4, 1000, 2, 16),
}


def configuration(family: Family, size: Size) -> Any:
    """A configuration of a family at a size."""
    import transformers

    head = size.width // size.heads
    numbers: dict[str, Any] = {
        "width": size.width,
        "inner": size.inner,
        "half": size.inner // 2,
        "head": head,
    }
    if family.kind == "encoder-decoder":
        given: dict[str, Any] = {
            "vocab_size": size.vocab,
            "d_model": size.width,
            "d_kv": head,
            "d_ff": size.inner,
            "num_layers": max(2, size.depth * 2 // 3),
            "num_heads": size.heads,
            "feed_forward_proj": "gated-gelu",
            "decoder_start_token_id": 0,
            "pad_token_id": 0,
        }
    else:
        given = {
            "hidden_size": size.width,
            "intermediate_size": size.inner,
            "num_hidden_layers": size.depth,
            "num_attention_heads": size.heads,
        }
    if family.kind == "text":
        given.update(num_key_value_heads=size.heads // 2, vocab_size=size.vocab, max_position_embeddings=4096)
    if family.name in ("GPT2", "Bloom"):
        names = {old: new for new, old in _GPT.items() if family.name == "GPT2" or new != "n_embd"}
        keep = {"hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"}
        given = {names.get(name, name): value for name, value in given.items() if name in keep}
    given.update({name: numbers.get(value, value) for name, value in family.sizes.items()})
    for name in ("bos_token_id", "eos_token_id"):
        if family.kind == "text":
            given[name] = 1
    given.setdefault("pad_token_id", 0 if family.kind == "text" else None)
    config = getattr(transformers, f"{family.name}Config")(
        **{name: value for name, value in given.items() if name not in family.without and value is not None}
    )
    config._attn_implementation = family.attention
    return config


def calls_of(model: Any, family: Family, size: Size, device: str) -> dict[str, Callable[[], Any]]:
    """From the name of a mode to a call of it; that of ``train`` returns the loss."""
    import torch

    generator = torch.Generator(device).manual_seed(1)
    if family.kind == "image":
        side = model.config.image_size
        images = torch.randn(4 * size.batch, 3, side, side, device=device, generator=generator)
        labels = torch.randint(0, 2, (len(images),), device=device, generator=generator)
        train, whole, one = {"pixel_values": images, "labels": labels}, {"pixel_values": images}, {}
        one["pixel_values"] = images[:1]
    else:
        ids = torch.randint(2, size.vocab, (size.batch, size.length), device=device, generator=generator)
        train, whole, one = {"input_ids": ids, "labels": ids}, {"input_ids": ids[:1]}, {}
        one["input_ids"] = ids[:1, :1]
        if family.kind == "encoder-decoder":
            whole["decoder_input_ids"], one["decoder_input_ids"] = ids[:1], ids[:1, :1]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=device != "cpu")

    def step() -> Any:
        loss = model(**train).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    def forward(given: dict[str, Any]) -> Any:
        with torch.no_grad():
            return model(**given)

    return {"train": step, "eval": lambda: forward(whole), "one": lambda: forward(one)}


class Way:
    """A family at a time, built and called in one way, in the process of a worker.

    Args:
        name: Of the way.
        device: ``cuda`` or ``cpu``.
        size: Of the models.
        modes: Those that are called.
    """

    def __init__(self, name: str, device: str, size: Size, modes: tuple[str, ...]) -> None:
        self.name, self.device, self.size, self.modes = name, device, size, modes
        self.model: Any = None
        self.calls: dict[str, Callable[[], Any]] = {}

    def answer(self, what: str, *rest: str) -> dict[str, Any]:
        """The answer to a line of the parent: ``build NAME``, ``turn``, ``profile`` or ``report``."""
        if what == "report":
            found = {"captures": captures(), "left_alone": left_alone()}
            return {"bindings": bindings(), "peak_gb": self.peak(), **found}
        answer: dict[str, Any] = getattr(self, what)(*rest)
        return answer

    def build(self, name: str) -> dict[str, Any]:
        """A family, its first step, and some calls of each mode."""
        import torch
        import transformers

        self.model, self.calls = None, {}
        if self.device != "cpu":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        torch._dynamo.reset()
        family = FAMILIES[name]
        torch.set_default_dtype(torch.float32 if self.device == "cpu" else torch.bfloat16)
        torch.manual_seed(0)
        with torch.device(self.device):
            model = getattr(transformers, family.model)(configuration(family, self.size))
        if self.name == "liger":
            from liger_kernel.transformers import monkey_patch

            if model.config.model_type not in monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN:
                return {"left_out": f"liger-kernel does not know {model.config.model_type}"}
            monkey_patch._apply_liger_kernel_to_instance(model=model)
        if self.name == "compile":
            model.compile(mode="reduce-overhead", dynamic=False)
        self.model, self.calls = model, calls_of(model, family, self.size, self.device)
        self._wait()
        began = time.perf_counter()
        loss = float(self.calls["train"]())
        first = time.perf_counter() - began
        for mode in self.modes:
            model.train(mode == "train")
            for _ in range(4):
                self.calls[mode]()
        self._wait()
        return {"loss": loss, "first_step_s": round(first, 2)}

    def turn(self) -> dict[str, Any]:
        """Milliseconds of a call of each mode: by the clock, of the processor, and to issue it."""
        found: dict[str, Any] = {}
        for mode in self.modes:
            calls = MODES[mode]
            self.model.train(mode == "train")
            call = self.calls[mode]
            self._wait()
            began, processor = time.perf_counter(), time.process_time()
            for _ in range(calls):
                call()
            self._wait()
            ended = time.process_time()
            found[mode] = (time.perf_counter() - began) / calls * 1e3
            found[f"{mode} processor"] = (ended - processor) / calls * 1e3
            began = time.perf_counter()
            call()  # to an idle device, whose queue takes a whole step
            found[f"{mode} host"] = (time.perf_counter() - began) * 1e3
            self._wait()  # the next way's turn is to find the device idle
        return found

    def profile(self) -> dict[str, Any]:
        """What the device does in a call of each mode; nothing on a CPU."""
        found: dict[str, Any] = {}
        for mode in self.modes if self.device != "cpu" else ():
            self.model.train(mode == "train")
            found[mode] = profiled(self.calls[mode])
        return found

    def peak(self) -> float:
        """Gigabytes that tensors took at most since the family was built."""
        import torch

        return 0.0 if self.device == "cpu" else round(torch.cuda.max_memory_allocated() / 1e9, 2)

    def _wait(self) -> None:
        import torch

        if self.device != "cpu":
            torch.cuda.synchronize()


def measure(workers: list[Worker], name: str, rounds: int, *, processor: bool) -> dict[str, Any]:
    """Every way of one family."""
    before: dict[str, dict[str, int]] = {"captures": {}, "left_alone": {}}
    for worker in workers:
        said = worker.ask("report")
        for what, counts in before.items():
            counts.update(said[what])
    built = ask_all(workers, "build", name)
    failed = {way: answer["error"] for way, answer in built.items() if "error" in answer}
    if failed.keys() & {"eager", "twinkle"}:
        return {"family": name, "failed": failed}
    left_out = {**failed, **{way: found["left_out"] for way, found in built.items() if "left_out" in found}}
    taking_part = [worker for worker in workers if worker.way not in left_out]
    found = in_turns(taking_part, rounds, "turn")
    result: dict[str, Any] = {"family": name, "left_out": left_out}
    for worker in taking_part:
        profile, way = worker.ask("profile"), worker.way
        one: dict[str, Any] = {"first_step_s": built[way]["first_step_s"], "loss": built[way]["loss"]}
        for mode in filter(found[0][way].__contains__, MODES):
            key = f"{mode} processor" if processor else mode
            times = [answers[way][key] for answers in found]
            first = [answers[taking_part[0].way][key] for answers in found]
            one[mode] = {
                "ms": round(statistics.median(times), 3),
                "host_ms": round(statistics.median(answers[way][f"{mode} host"] for answers in found), 3),
                **profile.get(mode, {}),
                **ratios(first, times),
            }
            if way == "twinkle" and len(taking_part) > 2:
                others = (worker.way for worker in taking_part[1:] if worker.way != way)
                one[mode]["over"] = {
                    other: ratios([answers[other][key] for answers in found], times) for other in others
                }
        said = worker.ask("report")
        if not processor:
            one["peak_gb"] = said["peak_gb"]
        if way == "twinkle":
            one["kernels"] = said["bindings"]
            for what, counts in before.items():
                new = {text: calls - counts.get(text, 0) for text, calls in said[what].items()}
                one[what] = {text: calls for text, calls in new.items() if calls}
        result[way] = one
    return result


def measure_all(
    workers: list[Worker],
    names: list[str],
    found: dict[str, list[dict[str, Any]]],
    options: argparse.Namespace,
) -> None:
    """Measure families with some workers, which end with that; their results are added to those found."""
    began = time.perf_counter()
    try:
        for name in names:
            if time.perf_counter() - began > options.seconds:
                print(f"{options.seconds:.0f} s are over: {name} and others were left out", flush=True)
                break
            again = found.setdefault(name, [])
            again.append(measure(workers, name, options.rounds, processor=options.device == "cpu"))
            show(again[-1])
            if options.json is not None:
                results = [merged(several) for several in found.values()]
                write(options.json, results, versions(options.device) | {"size": options.size})
    finally:
        for worker in workers:
            worker.end()


def merged(results: list[dict[str, Any]]) -> dict[str, Any]:
    """A family's first result, with the medians of those of all restarts as its ratios."""
    first = next((result for result in results if "failed" in result), results[0])
    if len(results) == 1 or "failed" in first:
        return first
    one = copy.deepcopy(first)
    for way in filter(one.__contains__, WAYS):
        for mode in filter(one[way].__contains__, MODES):
            several = [result[way][mode] for result in results if mode in result.get(way, {})]
            one[way][mode] |= {
                "ratio": round(statistics.median(found["ratio"] for found in several), 3),
                "of_fastest": round(statistics.median(found["of_fastest"] for found in several), 3),
                "smallest": min(found["smallest"] for found in several),
                "largest": max(found["largest"] for found in several),
                "restarts": [found["ratio"] for found in several],
            }
    return one


def show(result: dict[str, Any]) -> None:
    """A family as lines."""
    if "failed" in result:
        print(f"{result['family']}: failed: {result['failed']}", flush=True)
        return
    print(result["family"], *(f"({way}: {why})" for way, why in result["left_out"].items()), flush=True)
    for way in filter(result.__contains__, WAYS):
        one = result[way]
        for mode in filter(one.__contains__, MODES):
            found = one[mode]
            device = (
                f"  device {found['device_ms']:7.2f}  {found['launches']:5} launches"
                if "launches" in found
                else ""
            )
            spread = f"({found['smallest']:.2f} to {found['largest']:.2f}, fastest {found['of_fastest']:.3f})"
            text = f"{found['ms']:8.2f} ms  x{found['ratio']:.3f} {spread}  host {found['host_ms']:7.2f}"
            print(f"   {way:8} {mode:5} {text}{device}", flush=True)


def summary(results: list[dict[str, Any]]) -> list[str]:
    """Geometric means and worst families, a line for each way and mode."""
    lines = []
    for way in WAYS[1:]:
        for mode in MODES:
            ratios_of = {r["family"]: r[way][mode]["ratio"] for r in results if mode in r.get(way, {})}
            lines += one_line(f"{way} {mode}", "eager", ratios_of)
            fastest = {r["family"]: r[way][mode]["of_fastest"] for r in results if mode in r.get(way, {})}
            lines += one_line(f"{way} {mode}, fastest turns", "eager", fastest)
    for other in WAYS[2:]:
        for mode in MODES:
            ratios_of = {
                r["family"]: r["twinkle"][mode]["over"][other]["ratio"]
                for r in results
                if other in r.get("twinkle", {}).get(mode, {}).get("over", {})
            }
            lines += one_line(f"twinkle {mode}", other, ratios_of)
    return lines


def one_line(what: str, other: str, found: dict[str, float]) -> list[str]:
    """The geometric mean and the least of the ratios of families, if there are any."""
    if not found:
        return []
    mean = math.exp(statistics.fmean(math.log(ratio) for ratio in found.values()))
    worst = min(found, key=lambda name: found[name])
    return [
        f"{what}: {mean:.3f} x {other}, the mean of {len(found)} families; "
        f"the least {found[worst]:.3f}, {worst}"
    ]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--families", default=",".join(FAMILIES), help="names, with commas between them")
    parser.add_argument(
        "--ways", default="eager,twinkle", help=f"of {', '.join(WAYS)}; ratios are to the first"
    )
    parser.add_argument("--size", choices=SIZES, default="mid")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--restarts", type=int, default=1, help="processes of each way, one after the other")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--modes", default=",".join(MODES), help="what is called")
    parser.add_argument("--prepare", type=int, default=0, help="processes that compile the families first")
    parser.add_argument(
        "--seconds", type=float, default=1e9, help="of each restart, after which no family begins"
    )
    parser.add_argument("--json", type=Path, help="results are added to it")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        serve(
            Way(options.worker, options.device, SIZES[options.size], tuple(options.modes.split(","))).answer
        )
        return 0
    names = options.families.split(",")
    unknown = [name for name in names if name not in FAMILIES]
    if unknown:
        parser.error(f"no families: {', '.join(unknown)}; there are {', '.join(FAMILIES)}")
    began = time.perf_counter()
    shared = ("--device", options.device, "--size", options.size, "--modes", options.modes)
    ways = options.ways.split(",")
    if options.prepare and "compile" in ways:
        prepare(lambda: Worker(__file__, "compile", ("--worker", "compile", *shared)), names, options.prepare)
        print(f"compiled in {time.perf_counter() - began:.0f} s", flush=True)
    found: dict[str, list[dict[str, Any]]] = {}
    for _ in range(options.restarts):
        measure_all(
            [Worker(__file__, way, ("--worker", way, *shared)) for way in ways], names, found, options
        )
    results = [merged(several) for several in found.values()]
    done = [result for result in results if "failed" not in result]
    print(*summary(done), sep="\n")
    return 0 if len(done) == len(results) else 1


def write(path: Path, results: list[dict[str, Any]], about: dict[str, Any]) -> None:
    """Put results into a file, in the place of earlier ones of the same families."""
    old = json.loads(path.read_text())["results"] if path.exists() else []
    new = {result["family"] for result in results}
    kept = [result for result in old if result["family"] not in new]
    text = json.dumps({"versions": about, "results": [*kept, *results]}, indent=1)
    path.write_text(text + "\n")


if __name__ == "__main__":
    sys.exit(main())
