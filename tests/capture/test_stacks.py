"""The blocks of a model are found by its structure."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

from twinkle.capture.slot import Slot, fill
from twinkle.capture.stacks import Stack, stacks_of
from twinkle.hooks.first_use import first_uses, watch_first_use
from twinkle.kernel import kernelize_model, register_external_layer, register_layer_kernel

from .families import EXPECTED, LISTS_OF_KINDS
from .nets import GPT, Block, Flux, Mixture, UNet, VisionTransformer

transformers = pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import tiny_models  # noqa: E402


def found(model: nn.Module) -> list[tuple[str, str, int]]:
    return [(stack.container, stack.class_name, len(stack.blocks)) for stack in stacks_of(model)]


def test_there_are_more_than_forty_families() -> None:
    assert len(EXPECTED) > 60


of_this_release = pytest.mark.skipif(
    tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 22),
    reason="the table has the lists and classes of transformers 5.22, some of which had other names",
)


@of_this_release
@pytest.mark.parametrize("name", EXPECTED)
def test_the_blocks_of_a_family(name: str) -> None:
    cls = getattr(transformers, name)
    with torch.device("meta"):
        model = cls(tiny_models.tiny_config(name, cls.config_class.model_type))
    assert {stack.container: (stack.class_name, len(stack.blocks)) for stack in stacks_of(model)} == (
        EXPECTED[name]
    )
    assert len(stacks_of(model)) == len(EXPECTED[name])
    for stack in stacks_of(model):
        assert all(type(block) is stack.cls for block in stack.blocks)
        assert model.get_submodule(stack.container)


@of_this_release
@pytest.mark.parametrize("name", LISTS_OF_KINDS)
def test_layers_of_several_kinds_in_one_list(name: str) -> None:
    cls = getattr(transformers, name)
    data = tiny_models.tiny_config(name, cls.config_class.model_type).to_dict()
    for key in ("layer_types", "layers_block_type", "attn_layer_indices", "full_attn_idxs"):
        data.pop(key, None)
    with torch.device("meta"):
        model = cls(cls.config_class(**{**data, "num_hidden_layers": 8}))
    container, kinds = LISTS_OF_KINDS[name]
    assert found(model) == [(container, kind, number) for kind, number in kinds]


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (GPT, [("transformer.h", "Block", 3)]),
        (VisionTransformer, [("blocks", "Block", 4)]),
        (Flux, [("transformer_blocks", "Mixture", 2), ("single_transformer_blocks", "Block", 5)]),
        (UNet, [("down_blocks", "_Down", 3), ("down_blocks", "_Last", 1)]),
        (
            lambda: nn.TransformerEncoder(
                nn.TransformerEncoderLayer(8, 2, 16), 6, enable_nested_tensor=False
            ),
            [("layers", "TransformerEncoderLayer", 6)],
        ),
        (
            lambda: nn.Transformer(8, 2, 2, 3, 16),
            [
                ("encoder.layers", "TransformerEncoderLayer", 2),
                ("decoder.layers", "TransformerDecoderLayer", 3),
            ],
        ),
        (lambda: nn.Sequential(Block(), Block()), [("", "Block", 2)]),
        (lambda: nn.Sequential(nn.Embedding(4, 8), Block(), Block(), nn.Linear(8, 4)), [("", "Block", 2)]),
        (lambda: nn.ModuleDict({"layer_0": Block(), "layer_1": Block()}), [("", "Block", 2)]),
        (
            lambda: nn.ModuleDict(
                {"encoder": nn.ModuleList([Block(), Block()]), "decoder": nn.ModuleList([Block(), Block()])}
            ),
            [("encoder", "Block", 2), ("decoder", "Block", 2)],
        ),
        (lambda: nn.ModuleList([nn.ModuleList([Block()]) for _ in range(3)]), [("", "Block", 3)]),
        (lambda: nn.Sequential(nn.Sequential(Block()), nn.Sequential(Block(), Block())), [("", "Block", 3)]),
        (
            lambda: nn.ModuleList(
                [nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU()) for _ in range(3)]
            ),
            [("", "Sequential", 3)],
        ),
        (
            lambda: nn.ModuleList([nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))] * 1 * 2),
            [],
        ),
        (
            lambda: nn.ModuleList(
                [nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)) for _ in range(2)]
            ),
            [("", "Sequential", 2)],
        ),
    ],
    ids=lambda value: "" if callable(value) else None,
)
def test_the_blocks_of_a_plain_model(make: Any, expected: list[tuple[str, str, int]]) -> None:
    assert found(make()) == expected


@pytest.mark.parametrize(
    "entries",
    [
        [nn.Linear(8, 8) for _ in range(3)],
        [nn.LayerNorm(8) for _ in range(3)],
        [nn.Embedding(8, 8) for _ in range(3)],
        [nn.Conv1d(8, 8, 3) for _ in range(3)],
        [nn.Sequential(nn.Conv1d(8, 8, 3), nn.ReLU()) for _ in range(3)],
        [nn.Sequential(weight_norm(nn.Conv1d(8, 8, 3))) for _ in range(3)],
        [nn.Sequential(nn.Embedding(8, 8), nn.Embedding(8, 8)) for _ in range(3)],
        [nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)) for _ in range(3)],
        [nn.Sequential(nn.Dropout(), nn.ReLU()) for _ in range(3)],
        [Block()],
    ],
    ids=[
        "products",
        "norms",
        "embeddings",
        "convolutions",
        "a convolution and an activation",
        "convolutions with a normed weight",
        "pairs of embeddings",
        "heads",
        "no weights",
        "one block",
    ],
)
def test_what_is_no_stack(entries: list[nn.Module]) -> None:
    assert found(nn.ModuleList(entries)) == []


@pytest.mark.parametrize(
    "name", ["experts", "quantizers", "codebooks", "lm_heads", "classifiers", "patch_embeddings"]
)
def test_lists_that_hold_no_layers_by_their_name(name: str) -> None:
    model = nn.Module()
    model.add_module(name, nn.ModuleList([Block(), Block()]))
    assert found(model) == []


def test_what_is_inside_a_block_is_part_of_it() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.ModuleList([Block(), Block()])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner[1](self.inner[0](x))  # type: ignore[no-any-return]

    assert found(nn.ModuleList([Twice(), Twice()])) == [("", "Twice", 2)]
    assert found(nn.ModuleList([Twice()])) == [("0.inner", "Block", 2)]


def test_whole_models_in_a_list_are_no_blocks() -> None:
    assert found(nn.ModuleList([GPT(2), GPT(3)])) == [
        ("0.transformer.h", "Block", 2),
        ("1.transformer.h", "Block", 3),
    ]
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8, image_size=32
    )
    assert [
        entry[:2] for entry in found(nn.ModuleList([transformers.ViTModel(config) for _ in range(2)]))
    ] == [
        ("0.layers", "ViTLayer"),
        ("1.layers", "ViTLayer"),
    ]


def test_a_block_that_stands_in_a_list_twice_counts_once() -> None:
    one, other = Block(), Block()
    assert found(nn.ModuleList([one, one])) == []
    [stack] = stacks_of(nn.ModuleList([one, other, one]))
    assert stack.blocks == [one, other]


def test_the_order_is_that_of_the_list() -> None:
    model = GPT(12)
    [stack] = stacks_of(model)
    assert stack.blocks == list(model.transformer["h"])  # type: ignore[call-overload]


def test_what_the_program_has_compiled_is_left_out() -> None:
    model = Flux()
    for block in model.transformer_blocks:
        block.compile()
    model.single_transformer_blocks[2] = torch.compile(model.single_transformer_blocks[2])  # type: ignore[assignment]
    assert found(model) == [("single_transformer_blocks", "Block", 4)]
    model.compile()
    assert found(model) == []
    assert found(torch.compile(Flux())) == []  # type: ignore[arg-type]


def test_what_twinkle_has_put_into_a_slot_is_no_compiled_call() -> None:
    model = nn.ModuleList([Block(), Block()])
    fill(model[0], Slot())
    assert found(model) == [("", "Block", 2)]


def test_scripted_blocks_are_left_out() -> None:
    assert found(nn.ModuleList([torch.jit.script(Block()), torch.jit.script(Block())])) == []


def test_wrappers_of_checkpointing_are_looked_through() -> None:
    [stack] = stacks_of(nn.ModuleList([checkpoint_wrapper(Block()) for _ in range(3)]))
    assert [type(block) for block in stack.blocks] == [Block] * 3


def test_blocks_with_a_parametrized_weight_stay_alike() -> None:
    model = GPT(3)
    block: Any = model.transformer["h"][1]  # type: ignore[index]
    parametrize.register_parametrization(block.up, "weight", nn.Identity())
    generated = type("FSDPBlock", (Block,), {"__module__": "torch.distributed.fsdp"})
    block.__class__ = generated
    assert found(model) == [("transformer.h", "Block", 3)]


@pytest.mark.usefixtures("clean_registry")
def test_blocks_with_a_kernel_stay_alike() -> None:
    class Faster(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    model = GPT(3)
    register_layer_kernel("Fast", layer_impl=Faster)
    register_external_layer(Block, "Fast")
    first = model.transformer["h"][0]  # type: ignore[index]
    kernelize_model(first)
    assert found(model) == [("transformer.h", "Block", 3)]


@pytest.mark.usefixtures("clean_hooks")
def test_no_class_is_woken() -> None:
    class Asleep(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    woken: list[type] = []
    watch_first_use(Asleep, woken.append)
    assert found(nn.ModuleList([Asleep(), Asleep()])) == [("", "Asleep", 2)]
    assert woken == []
    assert Asleep in first_uses().owners


def test_lists_with_a_forward_of_their_own_are_blocks() -> None:
    class Stage(nn.ModuleList):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self:
                x = block(x)
            return x

    class Chain(nn.Sequential):
        pass

    assert found(nn.ModuleList([Stage([Block()]), Stage([Block()])])) == [("", "Stage", 2)]
    assert found(nn.ModuleList([Chain(Block()), Chain(Block())])) == [("", "Block", 2)]


def test_an_instance_may_have_a_forward_of_its_own() -> None:
    model = GPT(2)
    block: Any = model.transformer["h"][0]  # type: ignore[index]
    block.forward = types.MethodType(lambda self, x: x, block)
    assert found(model) == [("transformer.h", "Block", 2)]


def test_a_mixture_of_experts_is_one_block() -> None:
    assert found(nn.ModuleList([Mixture(), Mixture()])) == [("", "Mixture", 2)]


def test_a_stack_shows_what_it_is() -> None:
    assert repr(Stack("h", [Block()], Block, None)) == "Stack('h', 1 x Block)"
