"""Every adapter of PEFT: what was trained is what is saved, loaded, resumed and merged, or it is refused."""

from __future__ import annotations

import lightning.pytorch as lightning
import peft
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import LoraConfig, PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora import config as of_lora
from transformers import AutoModelForCausalLM

from datamodules import ArithmeticDataModule
from lightning_modules import SFTModule
from lightning_modules.adapters import PeftAdapter

IDS = torch.arange(1, 41)[None] * 5 % 257
LAYERS = ["q_proj", "up_proj"]

PISSA = {"r": 4, "init_lora_weights": "pissa_niter_2"}

# Class, an option that makes a difference, and its settings.
TRAINED = [
    *(("Lora", start, {"r": 4, "init_lora_weights": start}) for start in (True, False, "gaussian", "orthogonal")),
    *(("Lora", start, {"r": 4, "init_lora_weights": start}) for start in ("mica", "pissa", "pissa_niter_4", "olora")),
    ("Lora", "pissa, rslora", {**PISSA, "use_rslora": True, "lora_alpha": 6}),
    ("Lora", "pissa, patterns", {**PISSA, "rank_pattern": {"up_proj": 2}, "alpha_pattern": {"up_proj": 3}}),
    ("Lora", "pissa, saved modules", {**PISSA, "modules_to_save": ["norm"], "lora_dropout": 0.1}),
    ("Lora", "dora", {"r": 4, "use_dora": True}),
    ("Lora", "bias", {"r": 4, "bias": "all"}),
    ("Lora", "qalora", {"r": 4, "use_qalora": True, "qalora_group_size": 8}),
    ("Lora", "velora", {"r": 4, "velora_config": of_lora.VeloraConfig(init_type="random")}),
    ("Lora", "target_parameters", {"r": 4, "target_parameters": ["mlp.down_proj.weight"]}),
    ("Lora", "tokens", {"r": 4, "trainable_token_indices": [3, 4]}),
    ("Lora", "head saved", {"r": 4, "modules_to_save": ["lm_head"]}),
    ("Lora", "embedding saved", {"r": 4, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    ("Adamss", "", {"r": 8, "num_subspaces": 2}),
    ("AdaptionPrompt", "", {"adapter_len": 4, "adapter_layers": 1, "target_modules": None}),
    ("Beft", "", {"target_modules": ["q_proj"]}),
    ("BOFT", "", {"boft_block_size": 4}),
    *(("C3A", start, {"block_size": 8, "init_weights": start}) for start in (True, "gaussian", "kaiming_uniform")),
    *(("Deft", f"{how} para", {"r": 4, "decomposition_method": how, "para": True}) for how in ("relu", "qr")),
    *(("Deft", how, {"r": 4, "decomposition_method": how}) for how in ("relu", "qr")),
    ("Delora", "", {"r": 4}),
    ("FourierFT", "", {"n_frequency": 50}),
    *(("Frod", saved, {"progressbar": False, "save_projection": saved}) for saved in (True, False)),
    *(("Glora", kind, {"r": 4, "config_A_B": kind}) for kind in ("lora", "vector", "constant")),
    ("Gralora", "", {"r": 4, "alpha": 8, "hybrid_r": 2}),
    *(("Hira", start, {"r": 4, "init_weights": start}) for start in (True, "gaussian")),
    ("HRA", "", {"r": 4}),
    ("IA3", "", {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
    ("LNTuning", "", {"target_modules": ["input_layernorm"]}),
    ("LoHa", "", {"r": 4}),
    *(("LoKr", start, {"r": 4, "init_weights": start}) for start in (True, "lycoris")),
    *(("Miss", start, {"r": 4, "init_weights": start}) for start in (True, "bat")),
    ("Miss", "mini", {"r": 4, "mini_r": 2, "init_weights": "mini"}),
    ("OFT", "", {"oft_block_size": 8}),
    *(("Shira", start, {"r": 4, "init_weights": start}) for start in (True, False)),
    ("OSF", "", {"effective_rank": 8}),
    ("Peanut", "", {"r": 4, "depth": 1}),
    *(("Psoft", how, {"r": 4, "ab_svd_init": how, "psoft_svd": "lowrank"}) for how in ("psoft_init", "pissa_init")),
    *(("Pvera", saved, {"r": 4, "save_projection": saved}) for saved in (True, False)),
    *(("RandLora", saved, {"r": 4, "save_projection": saved}) for saved in (True, False)),
    *(("Road", kind, {"group_size": 8, "variant": kind}) for kind in ("road_1", "road_2", "road_4")),
    ("Supertuning", "", {"sparsity": 0.9}),
    ("Supertuning", "random", {"sparsity": 0.9, "select_top": False, "save_precomputed_indices": False}),
    ("TinyLora", "", {"r": 2, "u": 8}),
    ("TrainableTokens", "", {"token_indices": [3, 4], "target_modules": ["embed_tokens"]}),
    *(("UniLora", saved, {"r": 4, "save_indices": saved}) for saved in (True, False)),
    ("VBLoRA", "", {"r": 4, "num_vectors": 16, "vector_length": 8}),
    *(("Vera", saved, {"r": 4, "save_projection": saved}) for saved in (True, False)),
    ("WaveFT", "", {"n_frequency": 50}),
]  # fmt: skip
# Those that one set of weights cannot replace, whatever PEFT's class for merging says.
UNMERGED = ("AdaptionPrompt", "Beft")

REFUSED = [
    ("Lora", {"init_lora_weights": "eva"}, "LoraConfig with init_lora_weights='eva'.*activations of your data"),
    ("Lora", {"init_lora_weights": "corda"}, "'corda'.*covariances"),
    ("Lora", {"init_lora_weights": "lora_ga", "lora_ga_config": of_lora.LoraGAConfig()}, "'lora_ga'.*gradients"),
    ("Lora", {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4, "loftq_iter": 1}}, "'loftq'.*quantises"),
    ("Lora", {"init_lora_weights": "pissa", "use_dora": True}, "'pissa' does not go with use_dora"),
    ("Lora", {"alora_invocation_tokens": [5]}, r"alora_invocation_tokens=\[5\]"),
    ("Lora", {"arrow_config": of_lora.ArrowConfig()}, "arrow_config.*ArrowRouter"),
    ("Lora", {"kasa_config": of_lora.KasaConfig()}, "kasa_config"),
    ("Lora", {"monteclora_config": of_lora.MontecloraConfig()}, "monteclora_config"),
    ("Lora", {"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
    ("Lora", {"velora_config": of_lora.VeloraConfig(init_type="batch_average_once")}, "batch_average_once"),
    ("AdaLora", {"total_step": 9}, "AdaLoraConfig cannot be trained here: it moves rank"),
    ("Adamss", {"use_asa": True}, "AdamssConfig with use_asa=True"),
    ("Lily", {}, "LilyConfig.*depend on the other rows"),
    ("Poly", {}, "PolyConfig.*PolyRouter"),
    ("Pvera", {"sample_at_inference": True}, "PveraConfig with sample_at_inference=True"),
    ("Shadow", {}, "ShadowConfig"),
    ("VBLoRA", {"save_only_topk_weights": True}, "VBLoRAConfig with save_only_topk_weights=True"),
    ("XLora", {"hidden_size": 32, "adapters": {"a": "x"}}, "XLoraConfig"),
    ("Cartridge", {"num_virtual_tokens": 4}, "CartridgeConfig learns virtual tokens"),
    ("CPT", {"cpt_token_ids": [1], "cpt_mask": [1], "cpt_tokens_type_mask": [1]}, "virtual tokens"),
    ("PromptTuning", {"num_virtual_tokens": 4}, "virtual tokens"),
    ("MultitaskPromptTuning", {"num_virtual_tokens": 4}, "virtual tokens"),
    ("PromptEncoder", {"num_virtual_tokens": 4}, "virtual tokens"),
    ("PrefixTuning", {"num_virtual_tokens": 4}, "virtual tokens"),
]  # fmt: skip
# Refused when the model is known.
REFUSED_BY_MODEL = [
    ("Lora", {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}, "factors of tied layers apart"),
    ("Lora", {"target_modules": ["embed_tokens"], "init_lora_weights": "pissa"}, "starts linear layers alone"),
    ("Lora", {"r": 33, "init_lora_weights": "pissa"}, "r=33 is larger than a side of .*q_proj"),
    ("Lora", {"target_modules": ["nothing"]}, "LoraConfig does not go into this model. Target modules"),
    ("Lora", {"inference_mode": True}, "has nothing to train"),
    ("FourierFT", {"random_loc_seed": None}, "FourierFTConfig does not go into this model"),
    ("Glora", {"config_A_B": "none", "config_C": "none", "config_D_E": "none"}, "has nothing to train"),
]  # fmt: skip


def config_of(kind, settings):
    return getattr(peft, f"{kind}Config")(**{"task_type": "CAUSAL_LM", "target_modules": LAYERS, **settings})


def plain_config(kind, settings):
    """Of one that takes no target_modules."""
    return getattr(peft, f"{kind}Config")(**{"task_type": "CAUSAL_LM", **settings})


@torch.no_grad()
def logits(model, ids=IDS, **kwargs):
    return model.eval()(input_ids=ids, **kwargs).logits


def train(model):
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for _ in range(2):
        optimizer.zero_grad()
        rows = model(input_ids=IDS).logits[0, :-1]
        torch.nn.functional.cross_entropy(rows, IDS[0, 1:]).backward()
        optimizer.step()


def test_every_class_is_known():
    named = {kind for kind, *_ in (*TRAINED, *REFUSED)}
    assert {one.__name__.removesuffix("Config") for one in PEFT_TYPE_TO_CONFIG_MAPPING.values()} == named


@pytest.mark.parametrize(
    ("kind", "settings"),
    [pytest.param(kind, settings, id=f"{kind} {name}".strip()) for kind, name, settings in TRAINED],
)
def test_what_is_trained_is_what_is_saved(tiny_model, tmp_path, kind, settings):
    def load():
        return AutoModelForCausalLM.from_pretrained(tiny_model)

    base = logits(load())
    torch.manual_seed(1)
    adapter = PeftAdapter(config_of(kind, settings))
    model = adapter.attach(load())
    train(model)
    trained = logits(model)
    close = {"atol": 2e-5, "rtol": 0}
    assert (trained - base).abs().max() > 2e-4
    with adapter.disabled():
        torch.testing.assert_close(logits(model), base, **close)
    # A row alone, in pieces with a cache, and padded beside another one.
    with torch.no_grad():
        first = model(input_ids=IDS[:, :20], use_cache=True)
        second = model(input_ids=IDS[:, 20:], past_key_values=first.past_key_values, use_cache=True)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), trained, **close)
    two = torch.cat([IDS, torch.cat([IDS[:, :9] * 0, IDS[:, :31] * 3 % 257], 1)])
    mask = torch.ones_like(two)
    mask[1, :9] = 0
    torch.testing.assert_close(logits(model, two, attention_mask=mask)[:1], trained, **close)
    # Loaded by others, who draw other numbers; resumed.
    adapter.save(tmp_path / "adapter")
    torch.manual_seed(2)
    loaded = PeftModel.from_pretrained(load(), tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded), trained, **close)
    resumed = PeftAdapter(config_of(kind, settings))
    again = resumed.attach(load())
    resumed.load_state_dict({name: tensor.clone() for name, tensor in adapter.state_dict().items()})
    torch.testing.assert_close(logits(again), trained, **close)
    if kind not in UNMERGED:
        torch.testing.assert_close(logits(loaded.merge_and_unload()), trained, atol=2e-4, rtol=0)


@pytest.mark.parametrize(("kind", "settings", "message"), REFUSED)
def test_what_cannot_be_right_is_refused_before_loading(kind, settings, message):
    with pytest.raises(ValueError, match=message):
        PeftAdapter(plain_config(kind, settings))


@pytest.mark.parametrize(("kind", "settings", "message"), REFUSED_BY_MODEL)
def test_what_does_not_fit_the_model_is_refused(tiny_model, kind, settings, message):
    adapter = PeftAdapter(config_of(kind, settings))
    with pytest.raises(ValueError, match=message):
        adapter.attach(AutoModelForCausalLM.from_pretrained(tiny_model))


def test_a_start_in_the_base_weights_is_a_plain_lora_on_disk(tiny_model, tmp_path):
    adapter = PeftAdapter(LoraConfig(r=4, init_lora_weights="pissa", target_modules=LAYERS))
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    expected = logits(base)
    model = adapter.attach(base)
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=0)
    # PiSSA's start: the factors hold the largest singular values of the weight.
    layer = base.model.layers[0].self_attn.q_proj
    product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * layer.scaling["default"]
    values = torch.linalg.svdvals(layer.base_layer.weight.detach())
    torch.testing.assert_close(torch.linalg.svdvals(product.detach())[:4], values[:4])
    assert {name for name, p in model.named_parameters() if p.requires_grad and ".start." in name} == set()
    adapter.save(tmp_path / "adapter")
    config = peft.PeftConfig.from_pretrained(tmp_path / "adapter")
    assert (config.r, config.lora_alpha, config.init_lora_weights) == (8, 16, True)


@pytest.mark.parametrize("start", ["pissa_niter_4", "olora"])
def test_a_start_in_the_base_weights_is_resumed(tiny_model, tmp_path, start):
    """Through Lightning: two epochs at once, and one after the other in a process that draws other numbers."""

    def fit(name, epochs, seed, **resume):
        lightning.seed_everything(seed)
        module = SFTModule(
            model=tiny_model,
            adapter=LoraConfig(r=4, init_lora_weights=start, target_modules=LAYERS),
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        )
        trainer = lightning.Trainer(
            accelerator="cpu",
            max_epochs=epochs,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
            callbacks=[ModelCheckpoint(tmp_path / name, save_last=True)],
        )
        data = ArithmeticDataModule(batch_size=4, train_size=8, val_size=2, max_operand=9)
        trainer.fit(module, data, weights_only=True, **resume)
        return logits(module), trainer.global_step

    whole, steps = fit("whole", 2, 1)
    fit("first", 1, 1)
    parts, resumed_steps = fit("second", 2, 7, ckpt_path=str(tmp_path / "first" / "last.ckpt"))
    assert steps == resumed_steps == 4
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=0)
