from __future__ import annotations

import asyncio
import functools
import json
import math
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from lightning_modules.grpo.rewards import (
    AnyOf,
    LengthReward,
    MathVerify,
    NumericAnswer,
    ReasoningGymScore,
    RegexFormat,
    text_of,
)
from lightning_modules.grpo.scoring import (
    RewardError,
    Scoring,
    reward_names,
    score_completions,
    weighted_total,
)

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"
NAN = math.nan


def chat(*texts):
    return [[{"role": "assistant", "content": text}] for text in texts]


def score(functions, completions, scoring=None, *, columns=None, **extra):
    """Call as GRPOModule does."""
    chatty = bool(completions) and not isinstance(completions[0], str)
    prompt = [{"role": "user", "content": "question"}] if chatty else "question"
    arguments = {"trainer_state": None, "log_extra": {}.__setitem__, "log_metric": {}.__setitem__} | extra
    return score_completions(
        functions,
        scoring or Scoring(),
        prompts=[prompt] * len(completions),
        completions=completions,
        completion_ids=[list(range(len(text_of(one)))) for one in completions],
        columns=columns or {},
        **arguments,
    )


def column(rewards):
    return rewards[:, 0].tolist()


# ---------------------------------------------------------------- the built-in rewards


@pytest.mark.parametrize(
    ("completion", "gold", "expected"),
    [
        ("The answer is 72.", "48/2 = <<48/2=24>>24\n#### 72", 1.0),
        ("#### 1,234", "1234", 1.0),
        ("$1,234.50", "1234.5", 1.0),
        ("-$5", "$-5", 1.0),
        ("it is \N{MINUS SIGN}3", -3, 1.0),
        ("3", "-3", 0.0),
        ("10-20", "20", 1.0),
        ("5-3=2", "2", 1.0),
        (".5", 0.5, 1.0),
        ("0.50", "1/2", 0.0),
        ("1e3", "1000", 1.0),
        ("12, 13", "13", 1.0),
        ("1,2345", "2345", 1.0),
        ("12345678901234567890123456789012", "12345678901234567890123456789013", 0.0),
        ("no number", "7", 0.0),
        ("7", "no number", NAN),
        ("7", None, NAN),
        ("9e99999999999", "7", 0.0),
    ],
)
def test_numeric_answer(completion, gold, expected):
    rewards = score([NumericAnswer()], [completion], columns={"answer": [gold]})
    assert column(rewards) == pytest.approx([expected], nan_ok=True)


def test_numeric_answer_tolerance():
    columns = {"total": ["3.14", "3.14"]}
    assert column(score([NumericAnswer("total", tolerance=0.01)], ["3.15", "3.16"], columns=columns)) == [
        1,
        0,
    ]


@pytest.mark.parametrize(
    ("reward", "completion", "gold", "expected"),
    [
        (AnyOf(), " Big!\n", ["dig", "big"], 1.0),
        (AnyOf(), "big", "big", 1.0),
        (AnyOf(), "a big one", ["big"], 0.0),
        (AnyOf(contained=True), "a Big, one", ["big"], 1.0),
        (AnyOf(contained=True), "bigger", ["big"], 0.0),
        (AnyOf(), "the cat", ["cat"], 0.0),
        (AnyOf(drop_articles=True), "the cat", ["A cat"], 1.0),
        (AnyOf(), "5", ["-5"], 0.0),
        (AnyOf(), "(-5)", ["-5"], 1.0),
        (AnyOf(), "3.14.", ["3.14"], 1.0),
        (AnyOf(), "314", ["3.14"], 0.0),
        (AnyOf(), "?", ["!"], 0.0),
        (AnyOf(), "", ["!"], 0.0),
        (AnyOf(), "chronome\u0301trer", ["CHRONOM\u00c9TRER"], 1.0),
        (AnyOf(), "anything", [], NAN),
        (AnyOf(), "anything", None, NAN),
    ],
)
def test_any_of(reward, completion, gold, expected):
    rewards = score([reward], chat(completion), columns={"answers": [gold]})
    assert column(rewards) == pytest.approx([expected], nan_ok=True)


@pytest.mark.parametrize("timeout", [None, 60.0])
def test_math_verify_in_the_main_thread_and_outside(timeout):
    completions = ["so $x = \\boxed{\\frac{1}{2}}$", "0.5", "\\boxed{3}", "72", "no idea"]
    golds = ["$\\frac{1}{2}$", "1/2", "$\\frac{1}{2}$", "24 + 48\n#### 72", "no formula"]
    rewards = score([MathVerify()], completions, Scoring(timeout=timeout), columns={"answer": golds})
    assert column(rewards) == pytest.approx([1, 1, 0, 1, NAN], nan_ok=True)


def test_regex_format():
    completions = ["<think>a\nb</think> c", "x <think>a</think>", "none"]
    pattern = r"<think>.*</think>\s*\S.*"
    assert column(score([RegexFormat(pattern)], completions)) == [1, 0, 0]
    assert column(score([RegexFormat("<think>", full=False)], chat(*completions))) == [1, 1, 0]
    with pytest.raises(ValueError, match=r"pattern='\(' is not a regular expression: missing \)"):
        RegexFormat("(")


def test_length_reward():
    completions = ["x" * length for length in (0, 4, 6, 8, 20)]
    for unit in ("tokens", "characters"):
        assert column(score([LengthReward(4, 8, unit=unit)], completions)) == [0, 0, -0.5, -1, -1]
    with pytest.raises(ValueError, match="target=8 and maximum=8: need 0 <= target < maximum"):
        LengthReward(8, 8)
    with pytest.raises(ValueError, match=r"needs completion_ids"):
        LengthReward(4, 8)(completions=completions)


def test_length_reward_equals_trls_overlong_punishment():
    from trl.rewards import get_soft_overlong_punishment

    completions = ["x" * length for length in range(0, 130, 7)]
    rewards = score([LengthReward(80, 100), get_soft_overlong_punishment(100, 20)], completions)
    torch.testing.assert_close(rewards[:, 0], rewards[:, 1])


@pytest.mark.parametrize(
    ("reward", "name"),
    [(NumericAnswer("gold"), "gold"), (AnyOf(), "answers"), (ReasoningGymScore(), "task")],
)
def test_missing_column_names_it_and_those_present(reward, name):
    message = (
        f"{type(reward).__name__} reads the column '{name}', which is missing; columns present: answer, uid"
    )
    with pytest.raises(ValueError, match=message):
        score([reward], ["x"], columns={"uid": [1], "answer": ["x"]})
    with pytest.raises(ValueError, match="columns present: none"):
        score([reward], ["x"])


def test_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(
        RewardError, match=r"MathVerify needs math-verify: pip install 'lightning-quiver\[math\]'"
    ):
        score([MathVerify()], ["1"], columns={"answer": ["1"]})
    columns = {"task": ["not imported before"], "options": [{}], "entry": [{}]}
    with pytest.raises(RewardError, match=r"needs reasoning.gym: pip install 'lightning-quiver\[tasks\]'"):
        score([ReasoningGymScore()], ["a"], columns=columns)


# ---------------------------------------------------------------- gold answers earn the full reward


def jsonl(*parts):
    path = DATA.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"{'/'.join(parts)} is not beside the checkout: ../shared/data")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_gsm8k_gold():
    golds = [row["answer"] for row in jsonl("gsm8k", "train.jsonl")]
    assert score([NumericAnswer()], golds, columns={"answer": golds}).eq(1).all()
    finals = [f"The answer is {gold.rsplit('#### ', 1)[1]}." for gold in golds]
    assert score([NumericAnswer()], finals, columns={"answer": golds}).eq(1).all()
    wrong = finals[1:] + finals[:1]
    assert score([NumericAnswer()], wrong, columns={"answer": golds}).mean() < 0.05
    few = slice(0, None, 100)
    assert score([MathVerify()], golds[few], columns={"answer": golds[few]}).eq(1).all()
    assert score([MathVerify()], finals[few], columns={"answer": golds[few]}).eq(1).all()


@pytest.mark.parametrize("split", ["train", "test"])
def test_instruction_induction_gold(split):
    folder = DATA / "instruction_induction" / split
    if not folder.exists():
        pytest.skip("instruction_induction is not beside the checkout: ../shared/data")
    for path in sorted(folder.glob("*.jsonl")):
        rows = jsonl("instruction_induction", split, path.name)
        pairs = [(answer, row["answers"]) for row in rows for answer in row["answers"]]
        columns = {"answers": [golds for _, golds in pairs]}
        assert score([AnyOf()], [answer for answer, _ in pairs], columns=columns).eq(1).all(), path.name
        outputs = [row["output"] for row in rows]
        golds = [row["answers"] for row in rows]
        assert score([AnyOf()], chat(*outputs), columns={"answers": golds}).eq(1).all(), path.name


def test_reasoning_gym_gold():
    import reasoning_gym

    families = ["basic_arithmetic", "chain_sum", "countdown", "leg_counting", "spell_backward", "syllogism"]
    rows = [
        (task, entry) for task in families for entry in reasoning_gym.create_dataset(task, size=8, seed=1)
    ]
    columns = {
        "task": [task for task, _ in rows],
        "options": [{} for _ in rows],
        "entry": [entry for _, entry in rows],
    }
    golds = [entry["answer"] for _, entry in rows]
    assert score([ReasoningGymScore()], golds, columns=columns).eq(1).all()
    assert score([ReasoningGymScore()], ["wrong" for _ in golds], columns=columns).lt(0.2).all()
    tagged = [f"<answer>guess</answer> no: <answer> {gold}\n</answer> done" for gold in golds]
    tag = ReasoningGymScore(pattern="<answer>(.*?)</answer>")
    assert score([tag], chat(*tagged), columns=columns).eq(1).all()
    assert score([tag], golds, columns=columns).eq(0).all()
    columns["entry"] = [None] * len(golds)
    assert score([tag], golds, columns=columns).isnan().all()


def test_reasoning_gym_errors():
    columns = {"task": ["no_such_task"], "options": [{}], "entry": [{}]}
    with pytest.raises(RewardError, match="no_such_task"):
        score([ReasoningGymScore()], ["a"], columns=columns)
    with pytest.raises(ValueError, match="pattern='answer' needs a group, as in"):
        ReasoningGymScore(pattern="answer")
    with pytest.raises(ValueError, match="is not a regular expression"):
        ReasoningGymScore(pattern="(")


# ---------------------------------------------------------------- TRL's functions, unchanged


def test_trl_functions_run_unchanged():
    from trl.rewards import (
        accuracy_reward,
        get_cosine_scaled_reward,
        get_repetition_penalty_reward,
        think_format_reward,
    )

    async def judge(prompts, completions, completion_ids, trainer_state, log_metric, answer, **kwargs):
        await asyncio.sleep(0)
        log_metric("judged", len(completions))
        assert "prompt" not in kwargs
        return [float(trainer_state) if one else None for one in answer]

    logged, metrics = {}, {}
    completions = chat("<think>half</think> \\boxed{\\frac{1}{2}}", "\\boxed{3}")
    rewards = score(
        [
            accuracy_reward,
            think_format_reward,
            get_cosine_scaled_reward(100),
            get_repetition_penalty_reward(),
            judge,
        ],
        completions,
        columns={"solution": ["$\\frac{1}{2}$", "$4$"], "answer": [1, 0], "prompt": ["p", "p"]},
        trainer_state=7,
        log_extra=logged.__setitem__,
        log_metric=metrics.__setitem__,
    )
    assert rewards[:, 0].tolist() == [1, 0]
    assert rewards[:, 1].tolist() == [1, 0]
    assert rewards[0, 2] > 0 > rewards[1, 2]
    assert rewards[:, 3].tolist() == [0, 0]
    assert rewards[:, 4].tolist() == pytest.approx([7, NAN], nan_ok=True)
    assert logged["solution"] == ["$\\frac{1}{2}$", "$4$"]
    assert metrics == {"judged": 2}


# ---------------------------------------------------------------- the caller


def plain(completions, **_):
    return [float(len(one)) for one in completions]


class Judge:
    """An async callable object."""

    async def __call__(self, completions, **_):
        await asyncio.sleep(0.2)
        return [0.5] * len(completions)


def test_kinds_of_functions_and_of_results():
    functions = [
        plain,
        functools.partial(plain),
        Judge(),
        functools.partial(Judge()),
        lambda completions, **_: torch.tensor([1.0, 2.0]),
        lambda completions, **_: (True, None),
        lambda completions, **_: [torch.tensor(3.0), 4],
        lambda completions, **_: torch.tensor([5.0, 6.0]).numpy(),
    ]
    rewards = score(functions, ["a", "bb"])
    assert rewards.dtype == torch.float32
    expected = torch.tensor([[1, 1, 0.5, 0.5, 1, 1, 3, 5], [2, 2, 0.5, 0.5, 2, NAN, 4, 6]])
    torch.testing.assert_close(rewards, expected, equal_nan=True)
    names = ["plain", "plain_2", "Judge", "Judge_2", "<lambda>", "<lambda>_2", "<lambda>_3", "<lambda>_4"]
    assert reward_names(functions) == names


def test_plain_functions_keep_to_the_calling_thread_without_timeout():
    def where(completions, **_):
        return [float(threading.current_thread() is threading.main_thread())]

    assert column(score([where], ["a"])) == [1]
    assert column(score([where], ["a"], Scoring(timeout=60))) == [0]


def test_async_functions_run_together_also_inside_a_running_loop():
    # Each waits for the others, so they would hang if they ran one after the other.
    arrived = []

    async def waits_for_the_others(completions, **_):
        arrived.append(None)
        while len(arrived) < 10:
            await asyncio.sleep(0.01)
        return [1.0] * len(completions)

    assert score([waits_for_the_others] * 10, ["a"], Scoring(timeout=60)).eq(1).all()

    async def notebook():
        return score([Judge(), plain], ["a"])

    assert asyncio.run(notebook()).tolist() == [[0.5, 1.0]]


def hung(completions, **_):
    threading.Event().wait()


async def hung_async(completions, **_):
    await asyncio.Event().wait()


async def blocks_the_loop(completions, **_):
    threading.Event().wait()


@pytest.mark.parametrize("function", [hung, hung_async, blocks_the_loop])
def test_hung_function_raises(function):
    message = (
        rf"'{function.__name__}' did not return within scoring.timeout=0.2 s for 2 rows: raise the timeout"
    )
    with pytest.raises(RewardError, match=message):
        score([plain, function], ["a", "b"], Scoring(timeout=0.2))


def test_hung_function_does_not_keep_the_interpreter_from_exiting():
    code = """
import threading
from lightning_modules.grpo.scoring import Scoring, score_completions
def hung(**_):
    threading.Event().wait()
async def hung_async(**_):
    threading.Event().wait()
for function in (hung, hung_async):
    try:
        score_completions(
            [function], Scoring(timeout=0.1), prompts=[""], completions=[""], completion_ids=[[]], columns={}
        )
    except ValueError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("did not return") == 2


@pytest.mark.parametrize("timeout", [None, 60.0])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_raising_function_is_named_with_the_first_row_and_the_cause(timeout, asynchronous):
    def broken(completions, **_):
        raise TimeoutError("judge is away")

    async def broken_async(completions, **_):
        broken(completions)

    function = broken_async if asynchronous else broken
    message = (
        rf"'{function.__name__}' raised TimeoutError: judge is away; first row: prompt 'question', "
        r"completion 'aaa.*\.\.\.a+'$"
    )
    with pytest.raises(RewardError, match=message) as caught:
        score([function], ["a" * 500], Scoring(timeout=timeout))
    assert isinstance(caught.value.__cause__, TimeoutError)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (1.0, r"returned 1.0 of type float: expected a list with one number or None per completion"),
        (None, r"returned None of type NoneType: expected a list"),
        ("ab", r"returned 'ab' of type str: expected a list"),
        ({"a": 1, "b": 2}, r".*of type dict: expected a list"),
        ({1.0, 2.0}, r".*of type set: expected a list"),
        (torch.tensor(1.0), r".*of type float: expected a list"),
        ([1.0], r"returned 1 rewards for 2 completions"),
        ([1.0, "2"], r"returned '2' of type str for row 1: expected a number, or None for 'not applicable'"),
        (torch.ones(2, 2), r".*of type list for row 0: expected a number"),
        ([1.0, NAN], r"returned nan for row 1 \(prompt 'question', completion 'bb'\): return None for 'not"),
        ([-math.inf, 1.0], r"returned -inf for row 0 .*or set scoring.nan='ignore'"),
    ],
)
def test_wrong_results_are_refused(returned, message):
    def odd(completions, **_):
        return returned

    async def odd_async(completions, **_):
        return returned

    with pytest.raises(RewardError, match=f"'odd' {message}"):
        score([odd], ["a", "bb"])
    with pytest.raises(RewardError, match=f"'odd_async' {message}"):
        score([odd_async], ["a", "bb"])


def test_nan_may_count_as_not_applicable():
    def odd(completions, **_):
        return [NAN, math.inf, None, 1.0]

    rewards = score([odd], ["a"] * 4, Scoring(nan="ignore"))
    assert column(rewards) == pytest.approx([NAN, NAN, NAN, 1], nan_ok=True)


def test_weighted_total():
    rewards = torch.tensor([[1.0, 2.0], [NAN, 2.0], [NAN, NAN]])
    assert weighted_total(rewards).tolist() == pytest.approx([3, 2, NAN], nan_ok=True)
    assert weighted_total(rewards, [1.0, -0.5]).tolist() == pytest.approx([0, -1, NAN], nan_ok=True)
    message = "scoring.weights has 1 weights for 2 reward functions: give one each"
    with pytest.raises(ValueError, match=message):
        weighted_total(rewards, [1.0])
    with pytest.raises(ValueError, match=message):
        score([plain, plain], ["a"], Scoring(weights=[1.0]))


def test_settings_are_checked():
    with pytest.raises(ValueError, match=r"scoring\.timeout=0: must be above 0, or null"):
        Scoring(timeout=0)
    with pytest.raises(ValueError, match="nan='skip' is unknown: use error or ignore"):
        Scoring(nan="skip")
    with pytest.raises(ValueError, match="rewards is empty: give at least one reward function"):
        score([], ["a"])


def test_text_of_both_forms():
    assert text_of("a") == "a"
    assert text_of([{"role": "assistant", "content": "a"}, {"role": "tool", "content": "b"}]) == "a\nb"
