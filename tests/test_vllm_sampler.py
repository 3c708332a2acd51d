"""What VLLMSampler does by itself: versions, names, checks and messages. The engine's part is in tests/real_vllm."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
from small_runs import quiver, write_run
from standin_server import StandIn
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_modules import RoutedAdapter, SparseAdapter, TaskRouter, VLLMEngineSampler, VLLMSampler
from lightning_modules.adapters import FullFineTuning, PeftAdapter
from lightning_modules.cli import main
from lightning_modules.sampling import Sampling
from lightning_modules.sampling.vllm_policy import saved_policy, tied_layers
from lightning_modules.sampling.vllm_requests import row_seeds_or_drawn
from lightning_modules.sampling.vllm_server import VLLMServer

SAMPLING = Sampling(
    max_new_tokens=7, temperature=0.7, top_p=0.8, top_k=3, min_p=0.1, repetition_penalty=1.2, stop=["x"]
)


def lora(**options) -> PeftAdapter:
    return PeftAdapter(peft.LoraConfig(r=4, target_modules="all-linear", **options))


@pytest.fixture
def standin(tiny_model):
    server = StandIn(base=tiny_model)
    yield server
    server.stop()


def bound(server, tiny_model, adapter=None, **options):
    """A sampler of a server, and the adapter that it serves."""
    adapter = adapter or lora()
    model = adapter.attach(AutoModelForCausalLM.from_pretrained(tiny_model))
    sampler = VLLMSampler(server.url, **{"max_retries": 0, **options})
    sampler.bind(model, AutoTokenizer.from_pretrained(tiny_model))
    return sampler, adapter


def test_sends_all_settings_and_returns_rows_in_order(standin, tiny_model):
    sampler, adapter = bound(standin, tiny_model)
    sampler.sync(0, adapter.save)
    prompts = [[10 + row] * 3 for row in range(9)]
    ids_of = {}

    def own_ids(usual):
        content = standin.asked("/v1/completions")[-1]
        if "allowed_token_ids" not in content:
            ids_of[content["prompt"][0]] = content
        return usual

    standin.changed["/v1/completions"] = own_ids
    got = sampler.generate(prompts, SAMPLING, seeds=range(9))
    assert got.token_ids == [[5, 6]] * 9
    assert got.logprobs == [pytest.approx([-0.6931472, -0.6931472])] * 9
    assert got.finish == ["length"] * 9
    assert got.texts == [sampler._tokenizer.decode([5, 6])] * 9
    sent = [one for one in standin.asked("/v1/completions") if "allowed_token_ids" not in one]
    for row, one in enumerate(sorted(sent, key=lambda one: one["prompt"])):
        assert one == {
            **{
                "model": sampler._policy,
                "prompt": prompts[row],
                "seed": row,
                "max_tokens": 7,
                "temperature": 0.7,
            },
            **{"top_p": 0.8, "top_k": 3, "min_p": 0.1, "repetition_penalty": 1.2, "stop": ["x"]},
            **{"presence_penalty": 0.0, "frequency_penalty": 0.0, "stop_token_ids": [0], "logprobs": 0},
            **{"return_token_ids": True, "include_stop_str_in_output": True, "skip_special_tokens": True},
        }


def test_rows_come_back_in_order_whichever_is_answered_first(standin, tiny_model):
    sampler, adapter = bound(standin, tiny_model, max_concurrency=4)
    sampler.sync(0, adapter.save)

    def by_prompt(path, content, own=standin.own):
        status, body = own(path, content)
        if path == "/v1/completions":
            body["choices"][0]["token_ids"] = [content["prompt"][0]] * 2
        return status, body

    standin.own = by_prompt
    got = sampler.generate([[10 + row] for row in range(30)], SAMPLING)
    assert got.token_ids == [[10 + row] * 2 for row in range(30)]


def test_seeds_that_nobody_gave_come_from_torch():
    torch.manual_seed(1)
    first = row_seeds_or_drawn(None, 5)
    torch.manual_seed(1)
    assert row_seeds_or_drawn(None, 5) == first
    assert len(set(first)) == 5
    assert row_seeds_or_drawn(range(3), 3) == [0, 1, 2]


# ---------------------------------------------------------------------- versions


def test_each_version_is_loaded_once_and_replaces_the_one_before(standin, tiny_model, tmp_path):
    sampler, adapter = bound(standin, tiny_model, sync_folder=str(tmp_path / "shared"))
    for version in (0, 0, 3, 3, 4):
        sampler.sync(version, adapter.save)
        [(name, folder)] = standin.adapters.items()
        assert name.endswith(f"-v{version}")
        assert Path(folder) == tmp_path / "shared" / name
        assert sorted(path.name for path in (tmp_path / "shared").iterdir()) == [name]
        assert (Path(folder) / "adapter_model.safetensors").is_file()
        assert sampler.generate([[1]], SAMPLING).token_ids == [[5, 6]]
    assert [one["lora_name"][-1] for one in standin.asked("/v1/load_lora_adapter")] == ["0", "3", "4"]
    sampler.close()
    assert not standin.adapters
    assert not list((tmp_path / "shared").iterdir())


def test_a_run_that_starts_anew_trusts_nothing_from_before(standin, tiny_model):
    sampler, adapter = bound(standin, tiny_model)
    sampler.sync(5, adapter.save)
    first = sampler._policy
    sampler.bind(sampler._model, sampler._tokenizer)
    with pytest.raises(
        ValueError, match=r"generate before sync.*sampler\.sync\(global_step, adapter\.save\)"
    ):
        sampler.generate([[1]], SAMPLING)
    sampler.sync(5, adapter.save)
    assert sampler._policy != first
    assert list(standin.adapters) == [sampler._policy]


def test_all_weights_are_reloaded_while_nothing_runs(standin, tiny_model):
    sampler, adapter = bound(standin, tiny_model, FullFineTuning())
    sampler.sync(2, adapter.save)
    started = [path for path, _ in standin.calls]
    order = [
        "/pause?mode=wait",
        "/collective_rpc",
        "/reset_prefix_cache",
        "/update_weight_version",
        "/resume",
    ]
    assert [path for path in started if path in order] == order
    [call] = standin.asked("/collective_rpc")
    assert call["method"] == "reload_weights"
    assert list(Path(call["kwargs"]["weights_path"]).glob("*.safetensors"))
    sampler.generate([[1]], SAMPLING)
    assert standin.asked("/v1/completions")[-1]["model"] == tiny_model
    standin.weights = "default"  # the server was started anew
    with pytest.raises(
        ValueError, match=r"Row 0 was drawn by \"weights \['default'\]\", but the policy is 'quiver-"
    ):
        sampler.generate([[1]], SAMPLING)


def test_weights_that_change_during_a_rollout_are_noticed(standin, tiny_model):
    sampler, adapter = bound(standin, tiny_model, FullFineTuning())
    sampler.sync(0, adapter.save)

    def replaced(usual):
        standin.weights = "another"
        return usual

    standin.changed["/v1/completions"] = replaced
    with pytest.raises(ValueError, match=r"Row 0 was drawn by .*another.*stale"):
        sampler.generate([[1]], SAMPLING)


def test_tied_embeddings_on_a_cpu_are_not_reloaded(standin, tiny_model):
    sampler, adapter = bound(standin, tiny_model, FullFineTuning())
    standin.changed["/server_info"] = lambda _: (200, {"vllm_config": {"device_config": {"device": "cpu"}}})
    with pytest.raises(ValueError, match=r"on a CPU cannot replace .* tied embeddings.*peft\.LoraConfig"):
        sampler.sync(0, adapter.save)


# ---------------------------------------------------------------------- what it refuses


def answer_with(**changes):
    """A change of the answer to a completion."""

    def change(usual):
        status, body = usual
        choice = {**body["choices"][0], **{k: v for k, v in changes.items() if k != "model"}}
        return status, {"model": changes.get("model", body["model"]), "choices": [choice]}

    return change


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model": "quiver-0-v1"},
            r"Row 0 was drawn by 'quiver-0-v1', but the policy is 'quiver-\w+-v0'.*stale",
        ),
        (
            {"token_ids": []},
            r"no token for row 0 \(finish reason 'length'\).*--max-num-seqs.*last checkpoint",
        ),
        ({"finish_reason": "abort"}, r"ended row 0 with 'abort'.*last checkpoint"),
        ({"logprobs": None}, r"2 tokens for row 0, but 0 log-probabilities"),
        ({"logprobs": {"token_logprobs": [None, -1.0]}}, r"2 tokens for row 0, but 1 log-probabilities"),
    ],
)
def test_refuses_answers_that_are_not_what_was_asked_for(standin, tiny_model, changes, message):
    sampler, adapter = bound(standin, tiny_model)
    sampler.sync(0, adapter.save)
    standin.changed["/v1/completions"] = answer_with(**changes)
    with pytest.raises(ValueError, match=message):
        sampler.generate([[1]], SAMPLING)


def test_refuses_rows_that_do_not_fit_and_draws_none(standin, tiny_model):
    sampler, adapter = bound(standin, tiny_model)
    sampler.sync(0, adapter.save)
    drawn = len(standin.asked("/v1/completions"))
    with pytest.raises(
        ValueError,
        match=r"prompts\[1\] has 60 tokens, and max_new_tokens=7: 67 .* context of vLLM, 64 tokens",
    ):
        sampler.generate([[1], [1] * 60], SAMPLING)
    with pytest.raises(ValueError, match=r"prompts\[0\] is empty"):
        sampler.generate([[]], SAMPLING)
    assert sampler.generate([], SAMPLING).token_ids == []
    assert len(standin.asked("/v1/completions")) == drawn


def test_a_server_that_forgot_the_policy(standin, tiny_model):
    sampler, adapter = bound(standin, tiny_model)
    sampler.sync(0, adapter.save)
    standin.adapters.clear()
    with pytest.raises(ValueError, match=r"no longer has the policy 'quiver-.*started anew.*--ckpt_path"):
        sampler.generate([[1]], SAMPLING)


@pytest.mark.parametrize(
    ("status", "said", "remedy"),
    [
        (404, "Not Found", "It loads no adapters. Start it with --enable-lora, and VLLM_ALLOW_RUNTIME"),
        (500, "LoRA rank 4 is greater than max_lora_rank 2.", "Start it with --max-lora-rank 8."),
        (404, "No adapter found for /x", "read .*: set sync_folder to a folder that both machines see"),
    ],
)
def test_an_adapter_that_the_server_rejects(standin, tiny_model, status, said, remedy):
    sampler, adapter = bound(standin, tiny_model)
    standin.changed["/v1/load_lora_adapter"] = lambda _: (status, {"error": {"message": said}})
    with pytest.raises(ValueError, match=rf"refuses the policy \({status}\): .*{remedy}"):
        sampler.sync(0, adapter.save)
    with pytest.raises(ValueError, match="generate before sync"):
        sampler.generate([[1]], SAMPLING)


def test_a_server_without_reload(standin, tiny_model):
    sampler, adapter = bound(standin, tiny_model, FullFineTuning())
    standin.changed["/pause"] = lambda _: (404, {"detail": "Not Found"})
    with pytest.raises(
        ValueError, match=r"\(404\): Not Found\..*no reload of weights.*VLLM_SERVER_DEV_MODE=1"
    ):
        sampler.sync(0, adapter.save)


def test_a_server_with_raw_logprobs(standin, tiny_model):
    sampler, adapter = bound(standin, tiny_model)
    standin.changed["/v1/completions"] = answer_with(logprobs={"token_logprobs": [-9.5]})
    with pytest.raises(ValueError, match="Start it with --logprobs-mode processed_logprobs"):
        sampler.sync(0, adapter.save)


def test_a_server_of_another_model(standin, tiny_model):
    sampler, adapter = bound(standin, tiny_model)
    standin.base = "org/other"
    with pytest.warns(UserWarning, match=r"serves 'org/other' .* base model is '.*tiny"):
        sampler.sync(0, adapter.save)


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (lora(use_dora=True), "LoRA adapter with use_dora: vLLM does not implement that"),
        (lora(bias="all"), "bias='all'.*Set bias: none"),
        (PeftAdapter(peft.IA3Config()), "of the kind IA3: vLLM loads LoRA alone. Use NativeSampler"),
        (SparseAdapter(density=0.1), "of the kind QUIVER_SPARSE: vLLM loads LoRA alone"),
        (RoutedAdapter(TaskRouter(), experts=["a", "b"], rank=2), "routed library: vLLM applies one adapter"),
    ],
)
def test_adapters_that_vllm_cannot_serve(tiny_model, tmp_path, adapter, message):
    adapter.attach(AutoModelForCausalLM.from_pretrained(tiny_model))
    adapter.save(tmp_path / "saved")
    with pytest.raises(ValueError, match=message):
        saved_policy("name", tmp_path / "saved")


def test_the_room_that_an_adapter_needs(tiny_model, tmp_path):
    for rank, pattern, room in ((4, {}, 8), (16, {}, 16), (4, {"q_proj": 20}, 32)):
        config = {"peft_type": "LORA", "r": rank, "rank_pattern": pattern}
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        assert saved_policy("name", tmp_path).room == room
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 600}))
    with pytest.raises(ValueError, match="rank 600: vLLM takes at most 512"):
        saved_policy("name", tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "127.0.0.1:8000"}, "url: must be like http://127"),
        ({"url": "http://me:pass@host:8000"}, "without user and password.*VLLM_API_KEY"),
        ({"url": "http://host:8000", "server_args": ["--seed", "1"]}, "Leave one of the two out"),
        ({"timeout": 0}, "timeout=0: must be above 0"),
        ({"max_retries": -1}, "max_retries=-1"),
        ({"max_concurrency": 0}, "max_concurrency=0"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message) as found:
        VLLMSampler(**options)
    assert "pass@" not in str(found.value)


def test_wrong_arguments_of_the_engine():
    with pytest.raises(ValueError, match=r"gpu_memory_utilization=1\.5: must be above 0 and at most 1"):
        VLLMEngineSampler(1.5)


# ---------------------------------------------------------------------- what engines are started with


OF_A_LAUNCHER = {
    **{"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "NODE_RANK": "0"},
    **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "GROUP_RANK": "0", "GROUP_WORLD_SIZE": "1"},
    **{"ROLE_RANK": "1", "ROLE_NAME": "default", "ROLE_WORLD_SIZE": "2"},
    **{"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": "a", "TORCHELASTIC_RESTART_COUNT": "0"},
}
SAY_ENVIRONMENT = "import json, os; print(json.dumps(dict(os.environ)))"


@pytest.fixture
def launched(monkeypatch):
    """An environment such as torchrun makes."""
    for name, value in {**OF_A_LAUNCHER, "KEPT": "yes"}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("launched")
def test_a_server_is_no_rank_of_the_training_job(tmp_path):
    """Else its process groups would wait for a store that nobody serves."""
    server = VLLMServer([sys.executable, "-c", SAY_ENVIRONMENT], tmp_path / "log")
    server._process.wait(60)
    seen = json.loads(server.log.read_text())
    server.stop()
    assert seen.keys() & OF_A_LAUNCHER.keys() == set()
    assert (seen["KEPT"], seen["VLLM_SERVER_DEV_MODE"]) == ("yes", "1")
    assert os.environ["RANK"] == "1"


@pytest.mark.usefixtures("launched")
def test_an_engine_in_the_process_is_no_rank_either(tiny_model, tmp_path, monkeypatch):
    seen = {}

    class LLM:
        """Starts a process, as vLLM's engine does."""

        def __init__(self, **arguments):
            said = subprocess.run([sys.executable, "-c", SAY_ENVIRONMENT], capture_output=True, check=True)
            seen.update(json.loads(said.stdout), dtype=arguments["dtype"])

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=LLM))
    sampler, adapter = VLLMEngineSampler(), lora()
    sampler.compute_dtype = torch.bfloat16
    sampler.bind(
        adapter.attach(AutoModelForCausalLM.from_pretrained(tiny_model)), SimpleNamespace(name_or_path="")
    )
    adapter.save(tmp_path / "policy")
    sampler._start(saved_policy("policy", tmp_path / "policy"))
    assert seen.keys() & OF_A_LAUNCHER.keys() == set()
    assert seen["KEPT"] == "yes"
    assert seen["dtype"] == "bfloat16"
    assert {name: os.environ[name] for name in OF_A_LAUNCHER} == OF_A_LAUNCHER


@pytest.mark.parametrize(
    ("module", "precision", "expected"),
    [("GRPOModule", "bf16-mixed", torch.bfloat16), ("GRPOModule", "32-true", torch.float32),
     ("SFTModule", "bf16-mixed", torch.bfloat16)],
)  # fmt: skip
def test_all_weights_are_served_and_exported_in_the_type_that_the_run_computes_in(
    standin, tiny_model, tmp_path, monkeypatch, module, precision, expected
):
    """The trained weights stay float32, in the run and in its checkpoints."""
    monkeypatch.chdir(tmp_path)
    served = []

    def look(usual):
        folder = standin.asked("/collective_rpc")[-1]["kwargs"]["weights_path"]
        served.append(AutoModelForCausalLM.from_pretrained(folder))
        return usual

    standin.changed["/collective_rpc"] = look
    arguments = {"url": standin.url, "max_retries": 0, "sync_folder": "sync"}
    sampler = {"class_path": "VLLMSampler", "init_args": arguments}
    options = {"adapter": None, "chat_template": False, "sampler": sampler}
    if module == "GRPOModule":
        options["objective"] = {"max_sampler_gap": None}
    saver = {
        "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
        "init_args": {"dirpath": "checkpoints"},
    }
    name = write_run(
        tiny_model, module=module, init_args=options, precision=precision, max_steps=1,
        limit_val_batches=1, val_check_interval=1, enable_checkpointing=True,
        callbacks=[{"class_path": "AdapterExport"}, saver],
    )  # fmt: skip
    assert main(["fit", "-c", name]) == 0
    exported = AutoModelForCausalLM.from_pretrained("run/adapter")
    for model in (*served, exported):
        assert {p.dtype for p in model.parameters()} == {expected}
    assert served
    [checkpoint] = Path("checkpoints").glob("*.ckpt")
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    for key, parameter in exported.named_parameters():
        torch.testing.assert_close(parameter.data, state[f"{key}"].to(expected), rtol=0, atol=0)


# ---------------------------------------------------------------------- from the command line


def test_a_run_advances_its_versions_and_stops_with_a_message(
    standin, tiny_model, tmp_path, monkeypatch, capfd
):
    monkeypatch.chdir(tmp_path)
    sampler = {"class_path": "VLLMSampler", "init_args": {"url": "http://127.0.0.1:9", "max_retries": 0}}
    name = write_run(
        tiny_model,
        init_args={"sampler": sampler, "chat_template": False, "objective": {"max_sampler_gap": None}},
        max_steps=3,
    )

    def by_seed(path, content, own=standin.own):
        status, body = own(path, content)
        if path == "/v1/completions" and "seed" in content:  # rows that differ, so that there is an update
            body["choices"][0]["token_ids"] = [50 + content["seed"] % 40, 51]
        return status, body

    standin.own = by_seed
    here = ["fit", "-c", name, f"--model.sampler.init_args.url={standin.url}"]
    assert main(here) == 0
    loaded = [one["lora_name"].rsplit("-", 1)[1] for one in standin.asked("/v1/load_lora_adapter")]
    assert loaded[:3] == ["v0", "v1", "v2"]
    assert len({one["seed"] for one in standin.asked("/v1/completions") if "seed" in one}) > 6
    # Its log-probabilities are not the model's, which the audit finds before the first update.
    capfd.readouterr()
    assert main([*here, "--model.objective.max_sampler_gap=0.2"]) == 1
    assert "VLLMSampler says other log-probabilities" in capfd.readouterr().err
    assert main(["fit", "-c", name]) == 1
    err = capfd.readouterr().err
    assert "quiver: error: The vLLM server at http://127.0.0.1:9 cannot be reached, after 1 attempts" in err
    assert "Traceback" not in err


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_one_rank_loads_and_every_rank_draws(standin, tiny_model, tmp_path, monkeypatch, strategy):
    monkeypatch.chdir(tmp_path)
    arguments = {"url": standin.url, "max_retries": 0, "sync_folder": str(tmp_path / "sync")}
    sampler = {"class_path": "VLLMSampler", "init_args": arguments}
    objective = {"max_sampler_gap": None}
    options = {"sampler": sampler, "objective": objective, "chat_template": False}
    name = write_run(
        tiny_model, init_args=options, data={"batch_size": 1}, max_steps=2, devices=2, strategy=strategy
    )
    code, _, err = quiver("fit", "-c", name)
    assert code == 0, err[-3000:]
    loaded = [one["lora_name"] for one in standin.asked("/v1/load_lora_adapter")]
    versions = [one.rsplit("-", 1)[1] for one in loaded]
    assert versions == sorted(set(versions))
    assert versions[:2] == ["v0", "v1"]
    drawn = [one for one in standin.asked("/v1/completions") if "seed" in one]
    assert {one["model"] for one in drawn} == set(loaded)
    trained = [one["seed"] for one in drawn if one["model"] == loaded[0]]
    assert len(trained) >= 4  # 2 ranks x 1 prompt x 2 completions
    # The server is down for the next run, which all ranks end with one message.
    standin.stop()
    code, _, err = quiver("fit", "-c", name)
    assert code == 1
    assert "cannot be reached, after 1 attempts" in err


def test_importing_quiver_imports_no_vllm():
    code = "import sys, lightning_modules.training_cli; sys.exit('vllm' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("layer", ["lm_head", "embed_tokens"])
def test_a_tied_layer_that_vllm_has_once(tiny_model, tmp_path, layer):
    adapter = PeftAdapter(peft.LoraConfig(r=2, target_modules=["q_proj", layer]))
    model = adapter.attach(AutoModelForCausalLM.from_pretrained(tiny_model))
    adapter.save(tmp_path / "saved")
    with pytest.raises(ValueError, match=f"LoRA adapter of .*{layer}, which shares its weight"):
        saved_policy("name", tmp_path / "saved", tied_layers(model))
    untied = AutoModelForCausalLM.from_pretrained(tiny_model)
    untied.lm_head.weight = torch.nn.Parameter(untied.lm_head.weight.detach().clone())
    assert tied_layers(untied) == []
    assert saved_policy("name", tmp_path / "saved", tied_layers(untied)).rank == 2
