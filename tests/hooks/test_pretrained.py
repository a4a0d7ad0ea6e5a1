"""watch_pretrained: the outermost transformers model, once, whichever way it is built."""

from __future__ import annotations

import inspect
import pickle
import threading

import pytest
import torch
from torch import nn

from twinkle.hooks import construction
from twinkle.hooks.construction import watch_pretrained

transformers = pytest.importorskip("transformers")


@pytest.fixture
def config():
    return transformers.Qwen3Config(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        vocab_size=32,
    )


@pytest.fixture
def seen():
    models = []
    watch = watch_pretrained(models.append)
    yield models
    watch.cancel()
    assert construction.watched_classes() == ()


def test_model_of_config(seen, config):
    model = transformers.Qwen3ForCausalLM(config)
    assert seen == [model]


def test_from_config(seen, config):
    model = transformers.AutoModelForCausalLM.from_config(config)
    assert seen == [model]


def test_from_pretrained(seen, config, tmp_path):
    transformers.Qwen3ForCausalLM(config).save_pretrained(tmp_path)
    seen.clear()
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert seen == [model]


def test_pipeline(seen, config, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")
    transformers.Qwen3ForCausalLM(config).save_pretrained(tmp_path)
    seen.clear()
    pipeline = transformers.pipeline("text-generation", model=str(tmp_path), tokenizer=tokenizer)
    assert seen == [pipeline.model]


def test_on_meta(seen, config):
    with torch.device("meta"):
        model = transformers.Qwen3ForCausalLM(config)
    assert seen == [model]
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_a_users_subclass_is_reported_when_its_own_init_is_done(config):
    finished = []
    watch = watch_pretrained(lambda model: finished.append(hasattr(model, "head")))

    class Mine(transformers.Qwen3ForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            self.post_init()
            self.head = nn.Linear(2, 2)

    Mine(config)
    watch.cancel()
    assert finished == [True]


def test_inside_a_plain_module_the_model_is_reported(seen, config):
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = transformers.Qwen3Model(config)
            self.second = transformers.Qwen3Model(config)

    outer = Outer()
    assert seen == [outer.first, outer.second]


def test_models_of_several_families_inside_one_are_not_reported_on_their_own(seen, config):
    class Two(transformers.PreTrainedModel):
        config_class = transformers.Qwen3Config

        def __init__(self, config):
            super().__init__(config)
            self.text = transformers.AutoModel.from_config(config)
            self.other = transformers.BertModel(
                transformers.BertConfig(
                    hidden_size=8,
                    num_hidden_layers=1,
                    num_attention_heads=1,
                    intermediate_size=8,
                    vocab_size=8,
                )
            )
            self.post_init()

    model = Two(config)
    assert seen == [model]


def test_classes_that_were_there_before_the_watch_are_observed(config):
    class Early(transformers.Qwen3Model):
        def __init__(self, config):
            super().__init__(config)
            self.early = True

    finished = []
    watch = watch_pretrained(lambda model: finished.append(model.early))
    Early(config)
    watch.cancel()
    assert finished == [True]


def test_a_model_that_fails_leaves_the_next_one_right(seen, config):
    class Fails(transformers.Qwen3Model):
        def __init__(self, config):
            super().__init__(config)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Fails(config)
    assert seen == []
    model = transformers.Qwen3Model(config)
    assert seen == [model]


def test_threads_that_construct_at_once_report_their_own(seen, config):
    barrier = threading.Barrier(4)

    class Waits(transformers.Qwen3Model):
        def __init__(self, config):
            barrier.wait(10)
            super().__init__(config)
            barrier.wait(10)

    threads = [threading.Thread(target=Waits, args=(config,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(seen) == len({id(model) for model in seen}) == 4


def test_two_watches_are_both_called(seen, config):
    others = []
    watch = watch_pretrained(others.append)
    model = transformers.Qwen3Model(config)
    watch.cancel()
    transformers.Qwen3Model(config)
    assert others == [model]
    assert len(seen) == 2


def test_constructors_read_and_pickle_as_before(config):
    cls = transformers.Qwen3ForCausalLM

    def facts():
        init = cls.__init__
        return str(inspect.signature(cls)), str(inspect.signature(init)), inspect.getsource(init), cls.__doc__

    plain = facts()
    watch = watch_pretrained(lambda model: None)
    assert facts() == plain
    assert pickle.loads(pickle.dumps(cls)) is cls
    small = transformers.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8)
    assert b"twinkle" not in pickle.dumps(transformers.BertModel(small))
    watch.cancel()
    assert type(cls.__init__) is type(lambda: None)


def test_transformers_is_not_imported_by_the_watch(python):
    out = python("""
        import sys
        from twinkle.hooks.construction import watch_pretrained
        watch_pretrained(print)
        print("transformers" in sys.modules, "torch" in sys.modules)
    """)
    assert out == "False False\n"


DOCUMENTED = """
import inspect
def documented(module):
    return "".join(
        f"{name} {inspect.signature(cls)} {cls.__doc__} {cls.__init__.__doc__} {inspect.getsource(cls)}"
        for name, cls in sorted(vars(module).items())
        if isinstance(cls, type) and cls.__module__ == module.__name__
    )
"""


@pytest.mark.slow
def test_a_watch_from_before_the_import_leaves_the_documentation_alone(python):
    """transformers rewrites docstrings when it defines a class, out of the signatures it finds."""
    shown = "from transformers.models.qwen3 import modeling_qwen3\nprint(documented(modeling_qwen3))\n"
    expected = python(DOCUMENTED + shown)
    observed = python(
        DOCUMENTED
        + "from twinkle.hooks.construction import watch_pretrained\n"
        + "watch_pretrained(lambda model: None)\n"
        + shown
    )
    assert observed == expected
    assert "Qwen3ForCausalLM" in expected


@pytest.mark.slow
def test_remote_code(python, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "modeling_far.py").write_text(
        "from transformers import PretrainedConfig, PreTrainedModel\n"
        "from torch import nn\n"
        "class FarConfig(PretrainedConfig):\n"
        "    model_type = 'far'\n"
        "class FarModel(PreTrainedModel):\n"
        "    config_class = FarConfig\n"
        "    def __init__(self, config):\n"
        "        super().__init__(config)\n"
        "        self.post_init()\n"
        "        self.last = nn.Linear(2, 2)\n"
    )
    (tmp_path / "model" / "config.json").write_text(
        '{"model_type": "far", "auto_map": {"AutoConfig": "modeling_far.FarConfig",'
        ' "AutoModel": "modeling_far.FarModel"}}'
    )
    out = python(f"""
        import os
        os.environ["HF_HOME"] = {str(tmp_path)!r}
        os.environ["HF_HUB_OFFLINE"] = "1"
        from twinkle.hooks.construction import watch_pretrained
        watch_pretrained(lambda model: print(type(model).__name__, hasattr(model, "last")))
        from transformers import AutoConfig, AutoModel
        folder = {str(tmp_path / "model")!r}
        config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        AutoModel.from_config(config, trust_remote_code=True)
    """)
    assert out == "FarModel True\n"
