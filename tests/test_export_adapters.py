"""`quiver export` of adapters from elsewhere: the merged folder computes and says what the adapter was trained to."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from lightning_modules.cli import main
from lightning_modules.merging.merge import merge_experts

IDS = torch.arange(1, 41)[None] * 5 % 257
TEMPLATE = "{% for m in messages %}{{ m['content'] }}<|end|>{% endfor %}"


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def trained(base, config, *, scale=0.05):
    """A PEFT model whose every trained tensor has moved."""
    torch.manual_seed(1)
    model = get_peft_model(base, config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn_like(parameter))
    return model


def lora(**settings):
    return LoraConfig(**{"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **settings})


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


TIED = {
    "head": lora(target_modules=["q_proj", "lm_head"]),
    "embedding": lora(target_modules=["q_proj", "embed_tokens"]),
    "both": lora(target_modules=["lm_head", "embed_tokens"]),
    "both-tied": lora(target_modules=["embed_tokens"], ensure_weight_tying=True),
    "dora-head": lora(target_modules=["lm_head"], use_dora=True),
    "loha-head": peft.LoHaConfig(r=4, target_modules=["lm_head"], task_type="CAUSAL_LM"),
    "oft-head": peft.OFTConfig(oft_block_size=8, target_modules=["lm_head"], task_type="CAUSAL_LM"),
    "saved-head": lora(modules_to_save=["lm_head"]),
    "saved-embedding": lora(modules_to_save=["embed_tokens"]),
    "saved-both": lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    "tokens": lora(trainable_token_indices=[5, 10, 15]),
    "tokens-alone": peft.TrainableTokensConfig(
        token_indices=[5, 10], target_modules=["embed_tokens"], task_type="CAUSAL_LM"
    ),
}


@pytest.mark.parametrize("name", TIED)
def test_a_tied_layer_is_merged_for_itself_alone(tiny_model, here, name):
    model = trained(load(tiny_model), TIED[name])
    expected = logits(model)
    assert (expected - logits(load(tiny_model))).abs().max() > 1e-3
    model.save_pretrained("adapter")
    assert main(["export", "adapter", "merged", "--base", tiny_model]) == 0
    torch.testing.assert_close(logits(load("merged")), expected, atol=1e-3, rtol=0)
    same_weight = name in ("both-tied", "saved-both", "tokens", "tokens-alone")
    assert load("merged").config.tie_word_embeddings is same_weight


def test_a_tied_layer_of_the_other_kind_of_linear_layer(here, tiny_model):
    """GPT-2: transposed weights, and the head tied to `wte`."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=257, n_embd=32, n_layer=2, n_head=4, n_positions=64, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained("base")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained("base")
    model = trained(
        load("base"), lora(target_modules=["c_attn", "wte", "lm_head"], fan_in_fan_out=True), scale=0.2
    )
    expected = logits(model)
    model.save_pretrained("adapter")
    assert main(["export", "adapter", "merged", "--base", "base"]) == 0
    torch.testing.assert_close(logits(load("merged")), expected, atol=1e-3, rtol=0)


def test_quiver_merge_refuses_a_tied_layer(tiny_model, here, capsys):
    for number, name in enumerate(("head", "embedding", "saved-head", "tokens")):
        trained(load(tiny_model), TIED[name]).save_pretrained(name)
        arguments = [
            "merge",
            "--method",
            "average",
            "--experts",
            name,
            "--output",
            "out",
            "--base",
            tiny_model,
        ]
        assert main(arguments) == 1, number
    err = capsys.readouterr().err
    assert "one weight under the names" in err
    assert "no pair of LoRA factors of a linear layer" in err
    assert "modules_to_save" in err
    assert not Path("out").exists()


def own_tokenizer(base, folder, *, template=TEMPLATE, end="<|end|>"):
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<tool>"], "eos_token": end, "pad_token": "<tool>"}
    )
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return tokenizer


def test_the_adapters_own_tokenizer_and_vocabulary(tiny_model, here):
    base = load(tiny_model)
    tokenizer = own_tokenizer(tiny_model, "adapter")
    assert len(tokenizer) == 259
    base.resize_token_embeddings(264)
    model = trained(base, lora(modules_to_save=["embed_tokens", "lm_head"]))
    expected = logits(model)
    model.save_pretrained("adapter")
    assert main(["export", "adapter", "merged", "--base", tiny_model]) == 0
    merged, found = load("merged"), AutoTokenizer.from_pretrained("merged")
    assert merged.config.vocab_size == 264
    torch.testing.assert_close(logits(merged), expected, atol=1e-3, rtol=0)
    assert (found.chat_template, len(found), found.eos_token) == (TEMPLATE, 259, "<|end|>")
    settings = GenerationConfig.from_pretrained("merged")
    assert (settings.eos_token_id, settings.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert merged.config.eos_token_id == tokenizer.eos_token_id


@pytest.mark.parametrize(
    "config",
    [
        lora(),
        lora(trainable_token_indices=[257, 258]),
        lora(target_modules=["lm_head"]),
        lora(target_modules=["embed_tokens"]),
        lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    ],
    ids=["frozen", "tokens", "head", "embedding", "tied"],
)
def test_a_resized_vocabulary_as_peft_saves_it(tiny_model, here, config):
    base = load(tiny_model)
    torch.manual_seed(3)  # what the new rows are drawn from
    base.resize_token_embeddings(264)
    model = trained(base, config)
    ids = torch.arange(250, 264)[None]
    with torch.no_grad():
        expected = model.eval()(input_ids=ids).logits
    model.save_pretrained("adapter")
    assert main(["export", "adapter", "merged", "--base", tiny_model]) == 0
    with torch.no_grad():
        torch.testing.assert_close(load("merged").eval()(input_ids=ids).logits, expected, atol=1e-3, rtol=0)


def test_other_end_tokens_stay(tiny_model, here):
    shutil.copytree(tiny_model, "base")
    GenerationConfig(eos_token_id=[7, 0], temperature=0.5, do_sample=True).save_pretrained("base")
    trained(load("base"), lora()).save_pretrained("adapter")
    tokenizer = AutoTokenizer.from_pretrained("base")
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(9)
    tokenizer.save_pretrained("adapter")
    assert main(["export", "adapter", "merged", "--base", "base"]) == 0
    settings = GenerationConfig.from_pretrained("merged")
    assert (settings.eos_token_id, settings.temperature) == ([7, 9], 0.5)


def test_a_chat_template_alone(tiny_model, here):
    trained(load(tiny_model), lora()).save_pretrained("adapter")
    Path("adapter/chat_template.jinja").write_text(TEMPLATE)
    assert main(["export", "adapter", "merged", "--base", tiny_model]) == 0
    assert AutoTokenizer.from_pretrained("merged").chat_template == TEMPLATE


def test_a_vocabulary_without_weights_is_refused(tiny_model, here, capsys):
    trained(load(tiny_model), lora()).save_pretrained("small")
    own_tokenizer(tiny_model, "small")
    assert main(["export", "small", "out", "--base", tiny_model]) == 1
    assert "tokenizer has 259 tokens and the model 257 embeddings" in capsys.readouterr().err
    base = load(tiny_model)
    base.resize_token_embeddings(264)
    model = trained(base, lora(modules_to_save=["embed_tokens"]))
    model.save_pretrained("half", save_embedding_layers=False)
    assert main(["export", "half", "out", "--base", tiny_model]) == 1
    assert "needs both input and output embeddings" in capsys.readouterr().err
    Path("small/tokenizer.json").write_text("{}")
    assert main(["export", "small", "out", "--base", tiny_model]) == 1
    assert "of which transformers makes no tokenizer" in capsys.readouterr().err
    assert not Path("out").exists()


def test_quiver_merge_takes_the_experts_tokenizer(tiny_model, here, capsys):
    for name in ("one", "two"):
        trained(load(tiny_model), lora()).save_pretrained(name)
        tokenizer = AutoTokenizer.from_pretrained(tiny_model)
        tokenizer.chat_template, tokenizer.eos_token = TEMPLATE, tokenizer.convert_ids_to_tokens(9)
        tokenizer.save_pretrained(name)
    merge_experts(method="average", experts=["one", "two"], output="same", base=tiny_model)
    assert AutoTokenizer.from_pretrained("same").chat_template == TEMPLATE
    assert GenerationConfig.from_pretrained("same").eos_token_id == 9
    assert "tokenizers" not in capsys.readouterr().out
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained("two")
    merge_experts(method="average", experts=["one", "two"], output="other", base=tiny_model)
    assert AutoTokenizer.from_pretrained("other").chat_template != TEMPLATE
    assert "The tokenizers of one and two differ" in capsys.readouterr().out


def spoil(folder, value):
    """Put a value into one tensor, or for a dict into the configuration."""
    if isinstance(value, dict):
        file = Path(folder, "adapter_config.json")
        file.write_text(json.dumps(json.loads(file.read_text()) | value))
        return
    tensors = load_file(Path(folder, "adapter_model.safetensors"))
    tensors[max(tensors)][1, 2] = value
    save_file(tensors, Path(folder, "adapter_model.safetensors"), metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), "layers.1.self_attn.q_proj.lora_B.weight: 1 values are NaN or infinite"),
        (float("-inf"), "layers.1.self_attn.q_proj.lora_B.weight: 1 values are NaN or infinite"),
        ({"lora_alpha": -1e300}, "self_attn.q_proj.weight"),
        ({"lora_alpha": float("nan")}, "self_attn.q_proj.weight"),
    ],
)
def test_values_that_are_not_finite_are_not_written(tiny_model, here, capsys, value, message):
    trained(load(tiny_model), lora()).save_pretrained("adapter")
    spoil("adapter", value)
    for arguments in (
        ["export", "adapter", "out", "--base", tiny_model],
        ["merge", "--method", "average", "--experts", "adapter", "--output", "out", "--base", tiny_model],
        ["library", "add", "lib", "adapter", "--base", tiny_model],
    ):
        assert main(arguments) == 1, arguments
        err = capsys.readouterr().err
        assert "q_proj" in err
        assert re.search("NaN or infinite|alpha", err)
        if arguments[0] == "export":
            assert message in err
    assert not Path("out").exists()
    assert not list(Path("lib/experts").glob("*"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"init_lora_weights": "pissa_niter_4"},
            "init_lora_weights='pissa_niter_4'.*taken out of the base weights",
        ),
        ({"init_lora_weights": "corda"}, "init_lora_weights='corda'"),
        ({"init_lora_weights": "lora_ga"}, "init_lora_weights='lora_ga'"),
        ({"init_lora_weights": "loftq"}, "quantised"),
        ({"alora_invocation_tokens": [5]}, "applies only after these tokens"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "more layers"),
        ({"peft_type": "POLY"}, "of the kind POLY"),
        ({"peft_type": "LILY"}, "of the kind LILY"),
    ],
)
def test_what_peft_cannot_load_again_is_refused_before_the_base_is_loaded(
    tiny_model, here, capsys, config, message
):
    trained(load(tiny_model), lora()).save_pretrained("adapter")
    spoil("adapter", config)
    assert main(["export", "adapter", "out", "--base", tiny_model]) == 1
    [line] = [line for line in capsys.readouterr().err.splitlines() if "quiver: error" in line]
    assert re.search(message, line)


@pytest.mark.parametrize(
    "config",
    [
        peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=1, task_type="CAUSAL_LM"),
        peft.BeftConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"),
        lora(lora_bias=True),
        peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    ],
    ids=lambda config: type(config).__name__,
)
def test_what_is_no_change_of_weights_is_refused_in_one_line(tiny_model, here, capsys, config):
    trained(load(tiny_model), config).save_pretrained("adapter")
    assert main(["export", "adapter", "out", "--base", tiny_model]) == 1
    err = capsys.readouterr().err
    assert "PEFT cannot merge it into this model" in err
    assert "Traceback" not in err
    assert not Path("out").exists()


def test_pissa_and_olora_of_peft_are_merged(tiny_model, here):
    for start in ("pissa", "olora"):
        model = trained(load(tiny_model), lora(init_lora_weights=start))
        expected = logits(model)
        model.save_pretrained(start)
        assert main(["export", start, f"{start}_merged", "--base", tiny_model]) == 0
        torch.testing.assert_close(logits(load(f"{start}_merged")), expected, atol=1e-4, rtol=0)
    assert isinstance(PeftModel.from_pretrained(load(tiny_model), "pissa"), PeftModel)
