"""`quiver merge`: folders in, a folder out that others load; whatever is wrong is said before anything is written."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from lightning_modules.cli import main
from lightning_modules.merging import average, overlap_average, task_arithmetic, ties
from lightning_modules.sparse.delta import SparseDelta
from lightning_modules.sparse.storage import SparseFolder, fingerprint, write_sparse

IDS = torch.arange(1, 41)[None] * 5 % 257


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits


def assert_logits(model, expected, atol=2e-4):
    torch.testing.assert_close(logits(model), expected, atol=atol, rtol=1e-4)


def weights(base):
    return {name: weight.detach().clone() for name, weight in load(base).named_parameters()}


@torch.no_grad()
def added(base, change):
    """Logits of the base model with a task vector added by hand."""
    model = load(base)
    for name, delta in change.items():
        model.get_parameter(name).add_(delta.dense() if isinstance(delta, SparseDelta) else delta)
    return logits(model)


def make_lora(base, folder, seed, **settings):
    """A LoRA adapter with random factors, and its change as PEFT computes it."""
    torch.manual_seed(seed)
    settings = {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]} | settings
    model = get_peft_model(load(base), LoraConfig(task_type="CAUSAL_LM", **settings))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(folder)
    return {
        f"{name.removeprefix('base_model.model.')}.weight": module.get_delta_weight("default").detach()
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }


def make_model(base, folder, seed, **settings):
    """A fully fine-tuned model, and its change."""
    torch.manual_seed(seed)
    model = load(base)
    old = weights(base)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05 * parameter.std())
    model.save_pretrained(folder, **settings)
    return {name: parameter.detach() - old[name] for name, parameter in model.named_parameters()}


def make_sparse(base, folder, seed, density=0.2, fingerprints=True):
    """A sparse adapter, and its change."""
    generator = torch.Generator().manual_seed(seed)
    change = {}
    for name, weight in weights(base).items():
        if "q_proj" in name or "up_proj" in name:
            chosen = (torch.rand(weight.numel(), generator=generator) < density).nonzero().flatten().int()
            values = torch.randn(len(chosen), generator=generator) * 0.1
            change[name] = SparseDelta(chosen, values, tuple(weight.shape))
    config = {"base_model_name_or_path": base}
    if fingerprints:
        config["fingerprint"] = {name: fingerprint(weights(base)[name]) for name in change}
    folder.mkdir()
    write_sparse(folder, change.items(), config)
    return change


MAKERS = {"lora": make_lora, "model": make_model, "sparse": make_sparse}


@pytest.fixture
def made(tiny_model, tmp_path, monkeypatch):
    """Experts of the given kinds in the current folder, named by their number, and their changes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def make(*kinds):
        return [MAKERS[kind](tiny_model, Path(str(number)), number) for number, kind in enumerate(kinds)]

    return make


def merge(*arguments):
    return main(["merge", *arguments])


# ---------------------------------------------------------------- what comes out


@pytest.mark.parametrize(
    ("kinds", "method", "options", "function"),
    [
        (["lora", "lora"], "average", [], average),
        (["sparse", "sparse", "sparse"], "overlap_average", [], overlap_average),
        (
            ["model", "model"],
            "task_arithmetic",
            ["--options.scale", "0.7"],
            lambda e: task_arithmetic(e, scale=0.7),
        ),
        (["model", "lora", "sparse"], "ties", ["--options.density=0.3"], lambda e: ties(e, density=0.3)),
    ],
)
def test_a_merged_model_is_the_base_plus_the_merged_change(
    made, tiny_model, kinds, method, options, function, capsys
):
    changes = made(*kinds)
    names = [str(number) for number in range(len(kinds))]
    base = ["--base", tiny_model] if set(kinds) == {"model"} else []
    assert merge("--method", method, "--experts", *names, "--output", "merged", *options, *base) == 0
    expected = function(changes)
    assert (added(tiny_model, expected) - logits(load(tiny_model))).abs().max() > 0.05
    assert_logits(load("merged"), added(tiny_model, expected))
    assert AutoTokenizer.from_pretrained("merged").chat_template is not None
    out = capsys.readouterr().out
    assert f"Merged {len(kinds)} experts with {method}: {len(expected)} parameters changed." in out
    assert out.endswith("Wrote merged\n")
    assert ("several touch" in out) == (set(kinds) == {"sparse"})
    assert f"--method {method}" in Path("merged/README.md").read_text()


def test_the_share_of_shared_entries_is_printed(made, capsys):
    masks = [
        {name: delta.dense() != 0 for name, delta in change.items()} for change in made("sparse", "sparse")
    ]
    both = sum(int((masks[0][name] & masks[1][name]).sum()) for name in masks[0])
    any_ = sum(int((masks[0][name] | masks[1][name]).sum()) for name in masks[0])
    merge("--method", "average", "--experts", "0", "1", "--output", "merged")
    assert f"Of the entries that experts touch, several touch {both / any_:.1%}." in capsys.readouterr().out


def test_a_sparse_result_is_a_sparse_adapter(made, tiny_model):
    changes = made("sparse", "sparse")
    assert merge("--method", "ties", "--experts", "0", "1", "--output", "merged", "--to", "sparse") == 0
    folder = SparseFolder("merged")
    folder.check_base(load(tiny_model))
    assert folder.config["base_model_name_or_path"] == tiny_model
    expected = ties(changes)
    assert set(folder.names) == set(expected)
    for name in folder.names:
        assert folder.delta(name).dense().equal(expected[name].dense())
    assert merge("--method", "average", "--experts", "merged", "--output", "again", "--to", "sparse") == 0
    for name in folder.names:
        assert SparseFolder("again").delta(name).dense().equal(expected[name].dense())


@pytest.mark.parametrize("kind", ["lora", "sparse"])
def test_a_lora_result_is_a_peft_adapter(made, tiny_model, kind, capsys):
    changes = made(kind, kind)
    rank = (
        4 if kind == "lora" else 32
    )  # what the sum of two adapters of rank 2 needs, or any matrix of this model
    arguments = ["--method", "average", "--experts", "0", "1", "--to", "lora", "--rank", str(rank)]
    assert merge(*arguments, "--output", "merged") == 0
    assert f"Rank {rank} holds 100.0% of the squared norm" in capsys.readouterr().out
    config = json.loads(Path("merged/adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == rank
    assert config["base_model_name_or_path"] == tiny_model
    assert_logits(PeftModel.from_pretrained(load(tiny_model), "merged"), added(tiny_model, average(changes)))


def test_a_low_rank_says_what_it_loses(made, capsys):
    made("sparse", "sparse")
    merge("--method", "average", "--experts", "0", "1", "--to", "lora", "--rank", "1", "--output", "merged")
    printed = capsys.readouterr().out
    share = float(printed.split("Rank 1 holds ")[1].split("%")[0])
    assert 5 < share < 50


def test_a_bfloat16_model(made, tiny_model):
    changes = made("sparse")
    merge("--method", "average", "--experts", "0", "--output", "merged", "--dtype", "bfloat16")
    assert {tensor.dtype for tensor in load_file("merged/model.safetensors").values()} == {torch.bfloat16}
    name, delta = next(iter(changes[0].items()))
    expected = (weights(tiny_model)[name] + delta.dense()).bfloat16()
    assert load_file("merged/model.safetensors")[name].equal(expected)


KEEPS = re.compile(r"(\w+) keeps ([\d.]+)% of the norm of the change \(relative error (\S+)\)\.")


@pytest.mark.parametrize("kind", ["sparse", "lora", "model"])
def test_what_the_type_keeps_of_the_change_is_printed(made, tiny_model, kind, capsys):
    """Changes of one size are kept in float32, and rounded away in bfloat16 the more the smaller they are."""
    [change] = made(kind)
    before = weights(tiny_model)
    printed = {}
    for dtype, scale in [("float32", 1e-4), ("bfloat16", 10.0), ("bfloat16", 1e-4)]:
        output = f"{dtype}_{scale}"
        options = ["--method", "task_arithmetic", f"--options.scale={scale}", "--experts", "0"]
        options += ["--base", tiny_model]
        merge(*options, "--output", output, "--dtype", dtype)
        out = capsys.readouterr().out
        [(name, share, error)] = KEEPS.findall(out)
        assert name == dtype
        assert ("--dtype float32" in out) == ("Warning:" in out) == (float(share) < 90)
        after = load_file(f"{output}/model.safetensors")
        wanted, kept, lost = 0.0, 0.0, 0.0
        for place, delta in change.items():
            dense = scale * (delta.dense() if isinstance(delta, SparseDelta) else delta).double()
            arrives = after[place].double() - before[place].to(getattr(torch, dtype)).double()
            wanted += float(dense.square().sum())
            kept += float((arrives * dense.sign()).clamp(min=0).minimum(dense.abs()).square().sum())
            lost += float((arrives - dense).square().sum())
        assert float(share) == pytest.approx(100 * (kept / wanted) ** 0.5, abs=0.06)
        assert float(error) == pytest.approx((lost / wanted) ** 0.5, rel=0.06)
        printed[output] = float(share)
    assert printed["float32_0.0001"] > 99
    assert printed["bfloat16_10.0"] > 90
    assert printed["bfloat16_0.0001"] < 90


def test_a_function_of_the_user(made, tiny_model):
    made("lora", "lora")
    Path("my_merging.py").write_text(
        "def first(experts, *, scale):\n"
        "    return {name: scale * delta for name, delta in experts[0].items()}\n"
    )
    arguments = ["--method", "my_merging.first", "--experts", "0", "1", "--output", "merged"]
    assert merge(*arguments, "--options.scale", "0.5") == 0
    expected = {name: 0.5 * delta for name, delta in make_lora(tiny_model, "same", 0).items()}
    assert_logits(load("merged"), added(tiny_model, expected))


@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"layers.1.self_attn.q_proj": 5}},
        {"target_modules": "all-linear"},
    ],
)
def test_lora_settings(made, tiny_model, settings):
    made()
    change = make_lora(tiny_model, "a", 0, **settings)
    assert merge("--method", "average", "--experts", "a", "--output", "merged") == 0
    assert_logits(load("merged"), added(tiny_model, change))
    assert_logits(load("merged"), logits(PeftModel.from_pretrained(load(tiny_model), "a")))


def test_layers_that_store_the_transpose(tmp_path, tiny_model):
    base = tmp_path / "gpt2"
    torch.manual_seed(0)
    sizes = {"vocab_size": 257, "n_positions": 64, "n_embd": 8, "n_layer": 1, "n_head": 2}
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).save_pretrained(base)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(base)
    make_lora(str(base), tmp_path / "a", 0, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    expected = logits(PeftModel.from_pretrained(load(base), tmp_path / "a"))
    for to in ("model", "lora"):
        output = str(tmp_path / to)
        assert (
            merge("--method", "average", "--experts", str(tmp_path / "a"), "--output", output, "--to", to)
            == 0
        )
    assert_logits(load(tmp_path / "model"), expected)
    assert_logits(PeftModel.from_pretrained(load(base), tmp_path / "lora"), expected)


def test_a_model_in_several_files(made, tiny_model):
    made()
    change = make_model(tiny_model, Path("a"), 0, max_shard_size="20KB")
    assert Path("a/model.safetensors.index.json").exists()
    arguments = ["--method", "average", "--experts", "a", "--base", tiny_model]
    assert merge(*arguments, "--output", "merged") == 0
    assert_logits(load("merged"), added(tiny_model, change))
    next(Path("a").glob("model-00002-*")).unlink()
    assert merge(*arguments, "--output", "other") == 1


# ---------------------------------------------------------------- what is refused, and in which words


@pytest.fixture
def refused(made, capsys, tmp_path):
    """Run a merge that must fail, check its message, and that it left nothing."""

    def run(message, *arguments, experts=("0", "1")):
        before = sorted(tmp_path.rglob("*"))
        defaults = {"--method": "average", "--output": "merged"}
        given = dict(zip(arguments[::2], arguments[1::2], strict=True))
        pairs = [word for pair in (defaults | given).items() for word in pair]
        capsys.readouterr()
        assert merge("--experts", *experts, *pairs) == 1
        error = capsys.readouterr().err
        assert "Traceback" not in error
        for part in message if isinstance(message, list) else [message]:
            assert part in error
        after = [file for file in sorted(tmp_path.rglob("*")) if "__pycache__" not in file.parts]
        assert after == before

    return run


def test_methods_and_options(made, refused):
    made("sparse", "sparse")
    refused(["method='tie' is unknown. Did you mean ties?", "There are average, overlap"], "--method", "tie")
    refused("no module 'nowhere' is installed or in this folder", "--method", "nowhere.median")
    refused("the module 'math' has no function 'median'", "--method", "math.median")
    refused("options: average has no option 'density'. average takes none.", "--options.density", "0.5")
    refused(
        "ties has no option 'desnity'. ties takes density, scale.",
        "--method",
        "ties",
        "--options.desnity",
        "1",
    )
    refused(
        "options.density='x': must be a finite number. 0.2 is usual.",
        "--method",
        "ties",
        "--options.density",
        "x",
    )
    refused("options.agree=1.5: must be a whole number", "--method", "consensus", "--options.agree", "1.5")
    refused("density=2: must be above 0", "--method", "ties", "--options.density", "2")
    refused("rank=0", "--to", "lora", "--rank", "0")
    refused("dtype='bfloat16' is for --to model", "--to", "lora", "--dtype", "bfloat16")


def test_functions_of_the_user(made, refused):
    made("sparse", "sparse")
    Path("bad_merging.py").write_text(
        "import torch\n"
        "def needs(experts, *, scale): pass\n"
        "def nothing(experts): return None\n"
        "def short(experts): return {name: torch.ones(2) for name in experts[0]}\n"
        "def missing(experts): return {name: delta.dense() * float('nan') for name, delta in experts[0].items()}\n"
    )
    refused("needs needs scale. Give --options.scale VALUE.", "--method", "bad_merging.needs")
    refused("its result has no change of model.layers.0", "--method", "bad_merging.nothing")
    refused("has shape (2,); the parameter has (32, 32)", "--method", "bad_merging.short")
    refused("has NaN or infinite values", "--method", "bad_merging.missing")


def test_outputs(made, refused):
    made("sparse", "lora")
    refused("output='0' exists already", "--output", "0")
    refused("to='sparse': 1 changes weights densely", "--to", "sparse")
    refused(
        "result for model.layers.0.self_attn.q_proj.weight is dense. Take --to model",
        *("--to", "sparse", "--method", "iso_c"),
        experts=["0"],
    )


def test_a_lora_cannot_hold_every_change(made, refused, tiny_model):
    made("model")
    message = (
        "the merge changes model.embed_tokens.weight, which belongs to no linear layer. Take --to model."
    )
    refused(message, "--to", "lora", "--base", tiny_model, experts=["0"])


def test_folders_that_are_no_experts(made, refused):
    made("sparse")
    refused("there is no folder 'gone'", experts=["0", "gone"])
    Path("empty").mkdir()
    refused(["empty is no expert: it holds nothing", "Expected adapter_config.json"], experts=["0", "empty"])
    for name, content, message in (
        ("other", '{"peft_type": "IA3"}', "other holds an adapter of kind IA3"),
        ("list", "[]", "holds no JSON object"),
        ("broken", "{", "is no JSON"),
        ("alone", '{"peft_type": "LORA", "lora_alpha": 8, "r": 2}', "adapter_model.safetensors is missing"),
        ("alpha", '{"peft_type": "LORA"}', "names no lora_alpha"),
    ):
        Path(name).mkdir()
        Path(name, "adapter_config.json").write_text(content)
        refused(message, experts=["0", name])
    Path("bare").mkdir()
    Path("bare", "config.json").write_text("{}")
    refused("has a config.json, but no weights", experts=["0", "bare"])


@pytest.mark.parametrize(
    ("kind", "file"),
    [("lora", "adapter_model"), ("sparse", "adapter_model"), ("model", "model")],
)
def test_truncated_files(made, refused, tiny_model, kind, file):
    made("sparse", kind)
    path = Path("1", f"{file}.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    refused(f"{path} is broken or cut off", "--base", tiny_model)


@pytest.mark.parametrize("kind", ["lora", "model", "sparse"])
def test_values_that_are_not_finite(made, refused, tiny_model, kind):
    made(kind)
    path = next(Path("0").glob("*.safetensors"))
    tensors = load_file(path)
    key = next(key for key in tensors if "q_proj" in key and tensors[key].is_floating_point())
    tensors[key].view(-1)[3] = float("inf")
    save_file(tensors, path, metadata={"format": "pt"})
    refused([str(path), "NaN or infinite"], "--base", tiny_model, experts=["0"])


def test_other_bases(made, refused, tiny_model, tmp_path):
    made("lora", "sparse", "model")
    refused("No expert names its base model. Give it with --base.", experts=["2"])
    shutil.copytree(tiny_model, tmp_path / "base2")
    make_lora("base2", Path("3"), 3)
    refused(["0 names ", "3 names base2", "say which with --base"], experts=["0", "3"])
    assert (
        merge("--method", "average", "--experts", "0", "3", "--base", tiny_model, "--output", "merged") == 0
    )

    model = load("base2")
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.mul_(1.5)
    model.save_pretrained("base2")
    refused(
        "1 was trained on other weights: model.layers.0",
        "--base",
        "base2",
        "--output",
        "x",
        experts=["0", "1"],
    )


def test_clashing_shapes(made, refused, tiny_model):
    made("lora", "sparse", "model")
    for folder, name in (("0", "adapter_model"), ("2", "model")):
        path = Path(folder, f"{name}.safetensors")
        tensors = load_file(path)
        key = next(key for key in tensors if "layers.1.self_attn.q_proj" in key and "lora_A" not in key)
        tensors[key] = torch.zeros(16, tensors[key].shape[1])
        save_file(tensors, path, metadata={"format": "pt"})
        message = (
            f"{folder} has model.layers.1.self_attn.q_proj.weight of shape (16, 32); in the base model it is"
        )
        refused(message, "--base", tiny_model, experts=["1", folder])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "use_dora=True"),
        ({"bias": "all"}, "bias='all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save=['lm_head']"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
    ],
)
def test_adapters_that_are_more_than_lora(made, refused, tiny_model, settings, message):
    made()
    make_lora(tiny_model, Path("a"), 0, **settings)
    refused([f"a was trained with {message}", "quiver export"], experts=["a"])


def test_adapters_of_embeddings_and_tied_layers(made, refused, tiny_model):
    made()
    make_lora(tiny_model, Path("a"), 0, target_modules=["embed_tokens"])
    refused("which is no pair of LoRA factors of a linear layer", experts=["a"])
    make_lora(tiny_model, Path("b"), 0, target_modules=["lm_head"])
    refused("b changes lm_head.weight, which is one weight under the names", experts=["b"])


def test_a_model_of_another_kind(made, refused, tiny_model):
    made("model", "sparse")
    path = Path("0/model.safetensors")
    tensors = load_file(path)
    save_file(tensors | {"lm_head.weight": torch.zeros(257, 32)}, path, metadata={"format": "pt"})
    refused("holds lm_head.weight apart from model.embed_tokens.weight", "--base", tiny_model)
    save_file({"model.norm.weight": tensors["model.norm.weight"]}, path, metadata={"format": "pt"})
    refused("0 lacks model.embed_tokens.weight of the base model", "--base", tiny_model)
