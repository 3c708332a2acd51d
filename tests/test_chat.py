"""Chat templates: what SFT trains, what the model reads, and what is refused because it would be lost."""

from __future__ import annotations

import json
import shutil
import warnings

import pytest
import torch
from conftest import CHAT_TEMPLATE
from peft import LoraConfig
from small_runs import spread, write_rows, write_run
from test_sft import build, loader, trainer
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from datamodules import JsonlDataModule
from lightning_modules import AdapterLibraryModule, GRPOModule, SFTModule, SparseAdapterModule
from lightning_modules.chat import ChatTemplate
from lightning_modules.cli import main
from lightning_modules.library.routers.fixed import UniformRouter
from lightning_modules.text import encode_answers, encode_prompts

TURN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
OPEN = "{% if add_generation_prompt %}<assistant>{% endif %}"
TEMPLATES = {
    "plain": TURN + OPEN,
    "own end of turn": (TURN + OPEN).replace("</s>", "<|end|>\n"),
    "no end of turn": (TURN + OPEN).replace("</s>", "\n"),
    "trims": (TURN + OPEN).replace("m.content", "m.content | trim"),
    "no header": "{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }} </s>{% else %}"
    "[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}",
    "empty block": TURN.replace(
        "{{ m.content }}",
        "{% if m.role == 'assistant' and '</think>' not in m.content %}<think>\n\n</think>\n\n{% endif %}"
        "{{ m.content }}",
    )
    + OPEN,
    "default system prompt": "{% if messages[0].role != 'system' %}<system>Be kind.</s>{% endif %}"
    + TURN
    + OPEN,
    "drops earlier reasoning": TURN.replace(
        "{{ m.content }}", "{{ m.content if loop.last else m.content.split('</think>')[-1].lstrip() }}"
    )
    + OPEN,
}
USER = {"role": "user", "content": "What is 2+2?"}
SYSTEM = {"role": "system", "content": "Answer briefly."}
TURNS = [
    USER,
    {"role": "assistant", "content": "<think>2 and 2</think>4"},
    {"role": "user", "content": "And 3+3?"},
]
CALL = {"type": "function", "function": {"name": "clock", "arguments": {"zone": "UTC"}}}
CLOCK = {
    "type": "function",
    "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}},
}
READS_ALL = (
    "{% if tools %}[tools:{% for t in tools %}{{ t.function.name }};{% endfor %}]{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}"
    "{{ m.content or '' }}{% for c in m.tool_calls or [] %}[call {{ c.function.name }} "
    "{{ c.function.arguments | tojson }}]{% endfor %}</s>{% endfor %}" + OPEN
)
SWITCH = "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
SWITCHED = TURN + "{% if add_generation_prompt %}<assistant>" + SWITCH + "{% endif %}"


@pytest.fixture
def tokenizer(tiny_model):
    return AutoTokenizer.from_pretrained(tiny_model)


def chat(tokenizer, template, **settings) -> ChatTemplate:
    tokenizer.chat_template = template
    return ChatTemplate(tokenizer, settings, "tiny")


def model_with(template, tiny_model, folder) -> str:
    """The tiny model with another template."""
    shutil.copytree(tiny_model, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return str(folder)


def trained_text(tokenizer, template, prompt, answer, *, alone=False, **settings) -> str:
    one = chat(tokenizer, template, **settings)
    [before] = encode_prompts(tokenizer, [prompt], chat=one)
    [after] = encode_answers(tokenizer, [answer], None if alone else [prompt], chat=one)
    return tokenizer.decode(before + after)


# ------------------------------------------------------------------ what SFT trains


@pytest.mark.parametrize("alone", [False, True], ids=["with prompts", "answers alone"])
@pytest.mark.parametrize("answer", ["4", " 4 \n", "<think>well</think>\n\n4"])
@pytest.mark.parametrize("prompt", [[USER], [SYSTEM, USER], TURNS], ids=["user", "system", "turns"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_answered_conversation_is_trained_as_the_template_writes_it(
    tokenizer, name, prompt, answer, alone
):
    trained = trained_text(tokenizer, TEMPLATES[name], prompt, answer, alone=alone)
    conversation = [*prompt, {"role": "assistant", "content": answer}]
    assert trained == tokenizer.apply_chat_template(conversation, tokenize=False)


def test_an_opened_block_is_part_of_the_prompt(tokenizer):
    template = TEMPLATES["plain"].replace("<assistant>{% endif", "<assistant><think>\n{% endif")
    one = chat(tokenizer, template)
    assert one.answer("2+2?", "<think>\nwell</think>4") == (
        "<user>2+2?</s><assistant><think>\n",
        "well</think>4</s>",
    )
    with pytest.raises(
        ValueError, match=r"model='tiny'. Row 7 of the data: .* ends the prompt with '<think>"
    ) as error:
        encode_answers(tokenizer, ["4"], ["2+2?"], chat=one, uids=[7])
    assert "Give answers that begin as the prompt ends, or set chat_template_kwargs" in str(error.value)
    assert "\n" not in str(error.value)


def test_an_empty_block_that_history_leaves_out_stays_in_front_of_the_answer(tokenizer):
    assert trained_text(tokenizer, SWITCHED, "2+2?", "<b>4", enable_thinking=False) == (
        "<user>2+2?</s><assistant><think>\n\n</think>\n\n<b>4</s>"
    )


def test_an_answer_that_depends_on_its_prompt(tokenizer):
    """A template that repeats the system prompt's switch before the answer; without the prompt it cannot be known."""
    template = "{% set off = '/no_think' in messages[0].content %}" + TURN.replace(
        "{{ m.content }}", "{% if off and m.role == 'assistant' %}<think></think>{% endif %}{{ m.content }}"
    )
    prompt = [{"role": "system", "content": "/no_think"}, USER]
    assert trained_text(tokenizer, template + OPEN, prompt, "4").endswith("<assistant><think></think>4</s>")
    assert trained_text(tokenizer, template + OPEN, [USER], "4").endswith("<assistant>4</s>")


def test_the_tokens_of_the_prompt_stay_those_of_the_prompt_alone(tokenizer):
    """Where the tokenizer joins the end of the prompt with the start of the answer, the answer stands alone."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["model"]["vocab"]["xy"] = 257
    state["model"]["merges"] = [["x", "y"]]
    joining = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token="</s>"
    )
    one = chat(joining, TURN.replace("{{ m.content", "x{{ m.content") + OPEN.replace("tant>", "tant>x"))
    [before] = encode_prompts(joining, ["hi"], chat=one)
    [joined, apart] = encode_answers(joining, ["yes", "no"], ["hi", "hi"], chat=one)
    assert joining.decode(before + joined) == "<user>xhi</s><assistant>xyes</s>"
    assert joining.decode(before + apart) == "<user>xhi</s><assistant>xno</s>"
    assert 257 in joining("xyes")["input_ids"]
    assert 257 not in before + joined


def test_without_a_template_an_answer_ends_with_the_end_token(tokenizer):
    assert tokenizer.decode(encode_answers(tokenizer, ["4"], chat=None)[0]) == "4</s>"
    with pytest.raises(
        ValueError, match="answers with tool calls or reasoning, which need chat_template: true"
    ):
        encode_answers(tokenizer, [{"role": "assistant", "content": "", "tool_calls": [CALL]}], chat=None)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"no end token \(eos_token\)"):
        encode_answers(tokenizer, ["4"], chat=None)


@pytest.mark.parametrize("answer", ["", " \n"])
def test_an_empty_answer_teaches_nothing(tokenizer, answer):
    with pytest.raises(ValueError, match="Row 1 of the batch has an empty answer"):
        encode_answers(tokenizer, ["4", answer], chat=chat(tokenizer, TEMPLATES["trims"]))


@pytest.fixture(scope="module")
def blocks_model(tiny_model, tmp_path_factory):
    return model_with(TEMPLATES["empty block"], tiny_model, tmp_path_factory.mktemp("blocks") / "model")


def test_validation_knows_what_training_writes(blocks_model):
    """A model that has learned its rows by heart is right, and the block it writes first is no mistake."""
    rows = [("a?", "yes"), ("b?", "no no")]
    module = build(
        blocks_model, adapter=None, gradient_clip_val=1.0, optimizer=lambda p: torch.optim.AdamW(p, lr=5e-3)
    )
    run = trainer(max_epochs=80)
    run.fit(module, loader(rows))
    block = "<think>\n\n</think>\n\n"
    expected = sum(len(block + answer) + 1 for _, answer in rows)  # a byte is a token, and so is the end
    assert run.callback_metrics["train/answer_tokens"] == expected
    outputs = []
    module.on_validation_batch_end = lambda out, *_: outputs.append(out)
    [metrics] = trainer().validate(module, loader(rows), verbose=False)
    assert outputs[0]["predictions"] == [block + "yes", block + "no no"]
    assert metrics["val/exact_match"] == metrics["val/rouge_l"] == 1
    assert module.choose("b?", ["yes", "no no", "maybe"]) == "no no"


def test_choices_are_scored_as_the_template_writes_them(blocks_model):
    module = build(blocks_model)
    module.configure_model()
    choices = ["4", "five", "a six"]
    [prompt] = module.encode_prompts(["2+2?"], room=0)
    means = []
    with torch.no_grad():
        for choice in choices:
            whole = f"<user>2+2?</s><assistant><think>\n\n</think>\n\n{choice}</s>"
            ids = module.tokenizer(whole)["input_ids"]
            assert ids[: len(prompt)] == prompt
            logprobs = module.model(torch.tensor([ids])).logits[0].log_softmax(-1)
            means.append(
                sum(logprobs[i - 1, ids[i]] for i in range(len(prompt), len(ids))) / (len(ids) - len(prompt))
            )
    assert module.choose("2+2?", choices) == choices[int(torch.stack(means).argmax())]


def test_a_turn_that_generation_cannot_end_is_said(tiny_model, tmp_path):
    folder = model_with(TEMPLATES["own end of turn"], tiny_model, tmp_path / "model")
    with pytest.warns(
        UserWarning, match=r"writes the answer '4' as '4<\|end\|>\\n', without a token at which"
    ):
        SFTModule(model=folder).configure_model()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The chat template writes")
        SFTModule(model=tiny_model).configure_model()


# ------------------------------------------------------------------ tools, calls, reasoning


def test_tools_calls_and_reasoning_reach_the_template(tiny_model, tmp_path, monkeypatch):
    """From a file, through the batch, to what is trained; a tools column may be JSON text, and a call an answer."""
    monkeypatch.chdir(tmp_path)
    folder = model_with(READS_ALL, tiny_model, tmp_path / "model")
    asked = {"role": "assistant", "content": None, "tool_calls": [CALL], "name": None}
    said = {"role": "assistant", "content": "Half past nine.", "reasoning_content": "the tool said so"}
    talk = [USER, asked, {"role": "tool", "name": "clock", "content": "09:30"}, said]
    rows = [
        {"messages": talk, "tools": [CLOCK]},
        {"messages": talk[:2], "tools": json.dumps([CLOCK])},
        {"messages": [SYSTEM, USER, {"role": "assistant", "content": "4"}]},
    ]
    write_rows("train.jsonl", rows)
    data = JsonlDataModule(
        "train.jsonl", messages_column="messages", batch_size=3, shuffle=False, system_prompt="Hm."
    )
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    module = SFTModule(model=folder)
    module.configure_model()
    prompts, answers = (
        module.encode_prompts(batch.prompts, room=1),
        module.encode_answers(batch.answers, batch.prompts),
    )
    trained = [module.tokenizer.decode(a + b) for a, b in zip(prompts, answers, strict=True)]
    first = "[tools:clock;]<system>Hm.</s><user>What is 2+2?</s><assistant>"
    call = '[call clock {"zone": "UTC"}]</s>'
    assert trained == [
        f"{first}{call}<tool>09:30</s><assistant>(the tool said so)Half past nine.</s>",
        first + call,
        "<system>Answer briefly.</s><user>What is 2+2?</s><assistant>4</s>",
    ]
    assert module.encode_answers(batch.answers) == answers
    assert batch.columns["answer"] == [
        "Half past nine.",
        {k: v for k, v in asked.items() if k != "name"},
        "4",
    ]
    assert batch.answer_texts() == ["Half past nine.", "", "4"]


SKIPS_TOOLS = (
    "{% for m in messages if m.role != 'tool' %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}" + OPEN
)
SKIPS_SYSTEM = SKIPS_TOOLS.replace("'tool'", "'system'")
BARE_CALLS = READS_ALL.replace("{{ c.function.name }} {{ c.function.arguments | tojson }}", "")


@pytest.mark.parametrize(
    ("template", "prompt", "message"),
    [
        (TEMPLATES["plain"], [{**USER, "tools": [CLOCK]}], "does not read 'tools', so .* tools_column: null"),
        (
            TEMPLATES["plain"],
            [
                USER,
                {"role": "assistant", "content": "", "tool_calls": [CALL]},
                {"role": "tool", "content": "9"},
            ],
            r"does not read 'tool_calls' of message 2 \(assistant\)",
        ),
        (
            TEMPLATES["plain"],
            [USER, {"role": "assistant", "content": "", "function_call": CALL["function"]}, USER],
            "does not read 'function_call' of message 2",
        ),
        *(
            (
                TEMPLATES["plain"],
                [USER, {"role": "assistant", "content": "4", key: "hm"}, USER],
                f"not read '{key}'",
            )
            for key in ("reasoning_content", "reasoning", "thinking")
        ),
        (SKIPS_TOOLS, [USER, {"role": "tool", "content": "s"}], "leaves out message 2, of role 'tool'"),
        (SKIPS_SYSTEM, [SYSTEM, USER], "leaves out message 1, of role 'system'.*data.system_prompt"),
        (
            "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
            + TEMPLATES["plain"],
            [SYSTEM, USER],
            r"refuses a conversation with the roles \['system', 'user'\]: no system",
        ),
    ],
)
def test_what_the_template_would_lose_is_refused_by_name(tokenizer, template, prompt, message):
    with pytest.raises(ValueError, match=message) as error:
        encode_prompts(tokenizer, [prompt], chat=chat(tokenizer, template), uids=[3])
    assert str(error.value).startswith("model='tiny'. Row 3 of the data: ")
    with pytest.raises(ValueError, match=message):
        encode_answers(tokenizer, ["4"], [prompt], chat=chat(tokenizer, template))


@pytest.mark.parametrize(
    ("template", "answer", "message"),
    [
        (TEMPLATES["plain"], {"content": "", "tool_calls": [CALL]}, "does not read 'tool_calls'"),
        (BARE_CALLS, {"content": "", "tool_calls": [CALL]}, "does not write the answer's call of 'clock'"),
        (
            TEMPLATES["plain"],
            {"content": "4", "reasoning_content": "hm"},
            "does not read 'reasoning_content'",
        ),
        (
            SKIPS_TOOLS.replace("'tool'", "'assistant'"),
            {"content": "4"},
            "does not write|ends the prompt with",
        ),
        (
            SKIPS_TOOLS.replace("'tool'", "'assistant'").removesuffix(OPEN),
            {"content": "4"},
            "writes nothing of",
        ),
    ],
)
def test_an_answer_of_which_the_template_writes_nothing_is_refused(tokenizer, template, answer, message):
    with pytest.raises(ValueError, match=message):
        encode_answers(tokenizer, [{"role": "assistant", **answer}], [[USER]], chat=chat(tokenizer, template))


def test_an_answer_that_is_all_reasoning_is_refused_where_reasoning_is_dropped(tokenizer):
    one = chat(tokenizer, TURN.replace("m.content", "m.content.split('</think>')[-1]") + OPEN)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match="writes nothing of the answer"):
            one.answer([USER], "<think>well</think>")


def test_a_template_that_writes_all_of_a_message_reads_every_key(tokenizer):
    one = chat(tokenizer, "{% for m in messages %}{{ m | tojson }}{% endfor %}")
    asked = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    assert '"arguments": {"zone": "UTC"}' in one.prompt([USER, asked, {"role": "tool", "content": "9"}])


def test_what_an_answer_loses_is_said_once(tokenizer):
    one = chat(tokenizer, TURN.replace("m.content", "m.content.split('</think>')[-1]") + OPEN)
    with pytest.warns(UserWarning, match="leaves out a part of answers, such as of '<think>well"):
        assert one.answer([USER], "<think>well</think>4")[1] == "4</s>"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one.answer([USER], "<think>again</think>5")
    with pytest.warns(UserWarning, match="does not read 'mood' of messages"):
        one.prompt([{**USER, "mood": "good"}])


# ------------------------------------------------------------------ a prompt that ends within a turn


@pytest.mark.parametrize(
    ("name", "opened", "read", "trained"),
    [
        ("plain", "The sum is", "<assistant>The sum is", " 4</s>"),
        ("plain", "The sum is ", "<assistant>The sum is ", " 4</s>"),
        ("trims", "The sum is ", "<assistant>The sum is", "  4</s>"),
        ("own end of turn", "So", "<assistant>So", " 4<|end|>\n"),
        ("empty block", "So", "<assistant><think>\n\n</think>\n\nSo", " 4</s>"),
        ("no header", "So", "[/INST] So", " 4 </s>"),
    ],
)
def test_a_prefilled_answer_is_continued(tokenizer, name, opened, read, trained):
    one = chat(tokenizer, TEMPLATES[name])
    prompt = [*TURNS, {"role": "assistant", "content": opened}]
    assert one.prompt(prompt).endswith(read)
    before, rest = one.answer(prompt, " 4")
    assert (before, rest) == (one.prompt(prompt), trained)
    [ids] = encode_prompts(tokenizer, [prompt], chat=one)
    assert tokenizer.decode(ids) == before


@pytest.mark.parametrize("last", [{"content": ""}, {"tool_calls": [CALL]}])
def test_nothing_to_continue_is_refused(tokenizer, last):
    with pytest.raises(ValueError, match="has tool calls or no text, so there is nothing to go on with"):
        chat(tokenizer, READS_ALL).prompt([USER, {"role": "assistant", **last}])
    with pytest.raises(ValueError, match="so there is nothing to go on with"):
        chat(tokenizer, READS_ALL).answer([USER, {"role": "assistant", **last}], "4")


def test_rollouts_go_on_with_the_prefilled_answer(tiny_model):
    module = GRPOModule(model=tiny_model, rewards=[spread])
    module.configure_model()
    [ids] = module.encode_prompts([[USER, {"role": "assistant", "content": "It is"}]], room=1)
    assert module.tokenizer.decode(ids) == "<user>What is 2+2?</s><assistant>It is"


# ------------------------------------------------------------------ chat_template_kwargs


@pytest.fixture(scope="module")
def switched_model(tiny_model, tmp_path_factory):
    return model_with(SWITCHED, tiny_model, tmp_path_factory.mktemp("switched") / "model")


@pytest.mark.parametrize(
    "make",
    [
        SFTModule,
        SparseAdapterModule,
        lambda **options: GRPOModule(rewards=[spread], adapter=LoraConfig(r=2), **options),
        lambda **options: AdapterLibraryModule(UniformRouter(), experts=2, **options),
    ],
    ids=["sft", "sparse", "grpo", "library"],
)
def test_every_module_hands_settings_to_the_template(switched_model, make):
    for settings, end in (
        ({"enable_thinking": False}, "<think>\n\n</think>\n\n"),
        ({"enable_thinking": True}, ""),
    ):
        module = make(model=switched_model, chat_template_kwargs=settings)
        module.configure_model()
        [ids] = module.encode_prompts(["hi"], room=1)
        assert module.tokenizer.decode(ids) == "<user>hi</s><assistant>" + end
        assert module.hparams["chat_template_kwargs"] == settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"enable_thought": False}, r"chat_template_kwargs.enable_thought: .* It reads: enable_thinking\."),
        ({"tools": []}, "chat_template_kwargs.tools: the data says that"),
        ({"add_generation_prompt": False}, "chat_template_kwargs.add_generation_prompt"),
        ({"tokenize": True}, "chat_template_kwargs.tokenize"),
    ],
)
def test_a_setting_that_the_template_does_not_read_is_refused_before_weights(
    switched_model, tmp_path, settings, message
):
    folder = shutil.copytree(
        switched_model, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors")
    )
    (folder / "model.safetensors").write_bytes(b"none")
    with pytest.raises(ValueError, match=message):
        SFTModule(model=str(folder), chat_template_kwargs=settings).configure_model()


def test_settings_need_a_template(tiny_model):
    with pytest.raises(ValueError, match=r"need the chat template\. Set chat_template: true"):
        SFTModule(model=tiny_model, chat_template=False, chat_template_kwargs={"enable_thinking": False})


def test_a_setting_with_a_default_of_the_template_is_read(tokenizer):
    """The forms in which templates give a setting a default."""
    for default in (
        "{% if enable_thinking is not defined %}{% set enable_thinking = true %}{% endif %}",
        "{% set enable_thinking = enable_thinking | default(true) %}",
        "{%- generation -%}{{ enable_thinking }}{%- endgeneration -%}",
    ):
        chat(tokenizer, default + CHAT_TEMPLATE, enable_thinking=False)


@pytest.mark.parametrize("module", ["SFTModule", "GRPOModule"])
def test_the_command_line_sets_it_for_training_and_validation(
    switched_model, tmp_path, monkeypatch, module, capfd
):
    monkeypatch.chdir(tmp_path)
    config = write_run(switched_model, module=module, max_steps=1)
    option = ("--model.chat_template_kwargs.enable_thinking", "false")
    seen = []
    monkeypatch.setattr(ChatTemplate, "prompt", recording(ChatTemplate.prompt, seen))
    for command in ("fit", "validate", "predict"):
        seen.clear()
        assert main([command, "-c", config, *option]) == 0
        assert seen
        assert all(text.endswith("<think>\n\n</think>\n\n") for text in seen)
    assert main(["fit", "-c", config, "--model.chat_template_kwargs.thinking", "false"]) == 1
    assert "chat_template_kwargs.thinking: the chat template of model=" in capfd.readouterr().err


def recording(render, seen):
    def wrapped(self, prompt):
        seen.append(render(self, prompt))
        return seen[-1]

    return wrapped
