"""Models and tokenizers that differ from the usual: what they lack, and what of them is refused."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from conftest import build_tiny_model
from small_runs import quiet_line, write_rows, write_run
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from lightning_modules import GRPOModule
from lightning_modules.cli import main
from lightning_modules.model_checks import check_rows, context_length, pad_token

SHAPE = {
    "vocab_size": 257, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "eos_token_id": 0, "bos_token_id": 1, "pad_token_id": None,
}  # fmt: skip
SMALL = {
    "Mamba": {
        "vocab_size": 257,
        "hidden_size": 32,
        "state_size": 8,
        "num_hidden_layers": 2,
        "pad_token_id": 0,
    },
    "Bloom": {"vocab_size": 257, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "Mpt": {"vocab_size": 257, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64},
    "Rwkv": {"vocab_size": 257, "hidden_size": 32, "attention_hidden_size": 32, "num_hidden_layers": 2},
    "Bert": SHAPE | {"pad_token_id": 0},
    "Bart": {
        **{
            "vocab_size": 257,
            "d_model": 32,
            "decoder_layers": 2,
            "decoder_attention_heads": 4,
            "decoder_ffn_dim": 64,
        },
        **{"max_position_embeddings": 64, "pad_token_id": 0, "is_encoder_decoder": False},
    },
    "Llama": SHAPE,
    "GPT2": {"vocab_size": 257, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
}


def build(kind, **settings):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**SMALL.get(kind, SHAPE), **settings})
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    return model


def folder_of(model, tiny_model, folder) -> str:
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("kind", "context"),
    [("Mamba", None), ("Bloom", None), ("Mpt", 64), ("Llama", 64), ("GPT2", 64)],
)
def test_rows_that_can_be_padded_pass(kind, context):
    model = build(kind)
    check_rows(model, kind)
    assert context_length(model.config) == context


@pytest.mark.parametrize(
    ("kind", "says"),
    [("Rwkv", "padding beside it"), ("Bart", "padding beside it"), ("Bert", "reads tokens that come later")],
)
def test_models_whose_numbers_would_be_wrong_are_refused(kind, says):
    model = build(kind).train()
    with pytest.raises(ValueError, match=f"model='some': {type(model).__name__} .*{says}"):
        check_rows(model, "some")


def test_a_nested_configuration_has_a_context():
    config = AutoConfig.for_model("gemma3", text_config={"max_position_embeddings": 77})
    assert context_length(config) == 77


@pytest.mark.parametrize("module", ["SFTModule", "GRPOModule"])
@pytest.mark.parametrize("kind", ["Mamba", "Bloom", "Mpt"])
def test_models_without_a_table_of_positions_train(kind, module, tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = folder_of(build(kind), tiny_model, tmp_path / "model")
    own = {"attn_implementation": "eager", "adapter": None, "max_tokens_per_microbatch": 64}
    assert main(["fit", "-c", write_run(model, module=module, init_args=own, max_steps=1)]) == 0


def test_an_encoder_and_decoder_is_refused_before_its_weights_are_read(
    tiny_model, tmp_path, monkeypatch, capfd
):
    monkeypatch.chdir(tmp_path)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "model")
    AutoConfig.for_model("t5", vocab_size=257).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_text("no weights")
    assert main(["fit", "-c", write_run(str(tmp_path / "model"))]) == 1
    assert "has an encoder and a decoder (t5)" in quiet_line(capfd)


def test_tokens_beyond_the_embeddings_are_refused_before_the_weights_are_read(
    tiny_model, tmp_path, monkeypatch, capfd
):
    monkeypatch.chdir(tmp_path)
    model = build_tiny_model(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<tool>", "</tool>"]})
    tokenizer.save_pretrained(model)
    (model / "model.safetensors").write_text("no weights")
    assert main(["fit", "-c", write_run(str(model), module="SFTModule")]) == 1
    said = quiet_line(capfd)
    assert (
        "2 tokens without an embedding, '<tool>' with id 257 first: the model's embeddings end at 256" in said
    )


def test_a_tokenizer_without_end_token_draws_and_learns(tiny_model, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    model = build_tiny_model(tmp_path / "model")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (model / name).is_file():
            values = json.loads((model / name).read_text())
            values.pop("eos_token", None)
            (model / name).write_text(json.dumps(values))
    for name in ("config.json", "generation_config.json"):
        values = json.loads((model / name).read_text())
        values["eos_token_id"] = None
        (model / name).write_text(json.dumps(values))
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert (tokenizer.eos_token, tokenizer.pad_token, pad_token(tokenizer)) == (None, None, 0)
    assert main(["fit", "-c", write_run(str(model))]) == 0
    own = {"chat_template": False}
    capfd.readouterr()
    assert main(["fit", "-c", write_run(str(model), module="SFTModule", init_args=own)]) == 1
    assert "eos_token" in quiet_line(capfd)


def test_router_logits_and_other_outputs_of_a_configuration_change_nothing(tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    moe = {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    found = []
    for outputs in ({}, {"output_router_logits": True, "output_hidden_states": True, "return_dict": False}):
        model = folder_of(build("Qwen3Moe", **moe, **outputs), tiny_model, tmp_path / f"model{len(outputs)}")
        run = write_run(model, init_args={"adapter": None, "sampling": {"max_new_tokens": 8}})
        seen = []
        monkeypatch.setattr(
            GRPOModule, "on_train_batch_end", lambda *a, seen=seen: seen.append(a[1]["rollout"])
        )
        if outputs:
            with pytest.warns(UserWarning, match="output_router_logits: true.*trained without it"):
                assert main(["fit", "-c", run]) == 0
        else:
            assert main(["fit", "-c", run]) == 0
        found.append([rollout.completions for rollout in seen])
    assert found[0] == found[1]
    assert len(found[0]) == 2


# ---------------------------------------------------------------------- room


ROWS = [{"prompt": "p" * 80, "answer": "b"}, {"prompt": "p", "answer": "b" * 80}]


@pytest.fixture
def narrow(tmp_path, monkeypatch):
    """The tiny model with a context of 128 tokens."""
    monkeypatch.chdir(tmp_path)
    return str(build_tiny_model(tmp_path / "model", context=128))


def run_on(rows, model, *, module="SFTModule", **init_args):
    name = write_run(model, module=module, init_args=init_args, data={"val_file": None, "test_file": None})
    write_rows("train.jsonl", rows)
    return main(["fit", "-c", name])


def test_rows_that_fit_alone_fit_together(narrow):
    assert run_on(ROWS, narrow) == 0


def test_models_that_compute_nothing_wider_than_their_context_get_no_wider_padding(
    tiny_model, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    model = folder_of(build("Mpt", max_seq_len=128), tiny_model, tmp_path / "model")
    assert run_on(ROWS, model, adapter=None, attn_implementation="eager") == 0


def test_a_row_beyond_the_context_is_named_before_the_first_step(narrow, capfd):
    rows = [*ROWS, {"prompt": "p" * 90, "answer": "b" * 40}]
    assert run_on(rows, narrow) == 1
    said = quiet_line(capfd)
    assert "train.jsonl:3: its prompt has 108 tokens and its completion up to" in said
    assert "over the 128 of the model's context" in said
    assert "overlong_rows: drop" in said
    # What is drawn needs room too.
    own = {"module": "GRPOModule", "rewards": ["small_runs.spread"]}
    assert run_on(ROWS, narrow, **own, sampling={"max_new_tokens": 31}) == 1
    assert "train.jsonl:1: its prompt has 98 tokens and its completion up to 31: 129" in quiet_line(capfd)
    assert run_on(ROWS, narrow, **own, sampling={"max_new_tokens": 30}) == 0


def test_such_rows_are_dropped_and_counted(narrow, capfd):
    rows = [ROWS[0], {"prompt": "p" * 90, "answer": "b" * 40}, ROWS[1], {"prompt": "q" * 200, "answer": "b"}]
    with pytest.warns(
        UserWarning, match="2 of 4 rows of the train split are left out.*first is train.jsonl:2"
    ):
        assert run_on(rows, narrow, overlong_rows="drop") == 0
    capfd.readouterr()
    assert run_on(rows[1:2], narrow, overlong_rows="drop") == 1
    assert "All 1 rows of the train split are longer than the model's context of 128" in quiet_line(capfd)
