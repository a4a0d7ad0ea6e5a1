"""What others registered stays theirs: the mapping of transformers, and its use_kernels=True."""

from __future__ import annotations

import pytest
from loopback_hub import Repo, kernel_files

transformers = pytest.importorskip("transformers")
pytest.importorskip("kernels.validate")

OTHERS = """
import torch.nn as nn

class RMSNorm(nn.Module):
    can_torch_compile = True
    has_backward = True

    def forward(self, hidden_states):
        return hidden_states * 0 + 7
"""


def tiny_llama():
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            vocab_size=64,
        )
    ).eval()


def mapping():
    from kernels.layer.globals import _KERNEL_MAPPING

    return {name: dict(devices) for name, devices in _KERNEL_MAPPING.get().items()}


@pytest.fixture
def others(hub):
    """A repository that somebody else registered for RMSNorm on the CPU, through ``kernels``."""
    import kernels
    import transformers.integrations.hub_kernels  # registers its own mapping

    assert transformers
    hub.repos["acme/others"] = Repo({"v1": kernel_files("others", files={"layers.py": OTHERS})})
    repository = kernels.LayerRepository(repo_id="acme/others", layer_name="RMSNorm", version=1)
    with kernels.use_kernel_mapping({"RMSNorm": {"cpu": repository}}, inherit_mapping=True):
        yield repository


def test_mapping_of_others_is_the_same_after_loading(others, source):
    before = mapping()
    source(version=1).load()
    after = mapping()
    assert before
    assert after.keys() == before.keys()
    assert all(after[name].keys() == before[name].keys() for name in before)


def test_kernelize_of_others_takes_their_kernel_after_loading(others, source):
    import kernels
    import torch

    source(version=1).load()
    model = tiny_llama()
    kernels.kernelize(model, mode=kernels.Mode.INFERENCE, device="cpu")
    norm = model.model.layers[0].input_layernorm
    assert float(norm(torch.ones(1, 2, 32)).mean()) == 7


def test_use_kernels_still_works_after_loading(others, source):
    import torch

    source(version=1).load()
    model = tiny_llama()
    model.use_kernels = True
    assert model.use_kernels
    assert float(model.model.norm(torch.ones(1, 2, 32)).mean()) == 7
