"""Reward functions change neither each other, nor training, nor the process."""

from __future__ import annotations

import asyncio
import math
import sys
from decimal import Decimal
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lightning_modules.grpo.scoring import RewardError, Scoring, score_completions, weighted_total


def score(functions, completions=("a", "bb"), scoring=None, **columns):
    return score_completions(
        functions,
        scoring or Scoring(),
        prompts=["question"] * len(completions),
        completions=list(completions),
        completion_ids=[[1, 2] for _ in completions],
        columns=columns,
        trainer_state=SimpleNamespace(global_step=3),
    )


@pytest.mark.parametrize(
    "values",
    [
        [np.float32(1), np.float16(0)],
        [np.int64(1), np.uint8(0)],
        [np.bool_(True), np.bool_(False)],
        [True, False],
        np.array([True, False]),
        np.array([1, 0], dtype=object),
        [np.array(1.0), np.array(0)],
        [torch.tensor(True), torch.tensor(0, dtype=torch.bfloat16)],
        torch.tensor([True, False]),
        torch.tensor([1, 0], dtype=torch.bfloat16),
        [Fraction(1), Decimal(0)],
    ],
)
def test_scalars_of_numpy_and_torch_and_booleans_are_numbers(values):
    assert score([lambda completions, **_: values]).tolist() == [[1], [0]]


@pytest.mark.parametrize("value", ["1", 1j, np.complex64(1), np.str_("1"), [1], np.array([1.0]), object()])
def test_anything_else_is_refused(value):
    with pytest.raises(RewardError, match=r"'odd' returned .* for row 1: expected a number, or None"):
        score([named("odd", lambda **_: [1.0, value])])


def named(name, function):
    function.__name__ = name
    return function


@pytest.mark.parametrize("nan", ["error", "ignore"])
@pytest.mark.parametrize(
    "value",
    [
        10**400,
        -(10**400),
        pytest.param(10**5000, id="endless"),
        1e39,
        -1e200,
        Decimal("1e60"),
        np.float64(1e39),
        Fraction(10**400),
    ],
)
def test_rewards_too_large_for_float32_get_one_line(value, nan):
    with pytest.raises(
        RewardError, match=r"^reward function 'vast' returned .* for row 1 \(.*too large"
    ) as caught:
        score([named("vast", lambda **_: [1.0, value])], scoring=Scoring(nan=nan))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_sums_too_large_for_float32_are_refused():
    assert weighted_total(torch.tensor([[1e17, 1e17]])).tolist() == [pytest.approx(2e17)]
    with pytest.raises(ValueError, match=r"weighted sum of the rewards is .* at row 1"):
        weighted_total(torch.tensor([[1.0], [1e10]]), [1e10])


def test_each_function_gets_copies_of_its_own():
    shared = {"tags": ["x"]}
    columns = {"info": [shared, shared], "ids": [[1], [2]], "lock": [asyncio.Lock()] * 2}
    seen = []

    def rude(prompts, completions, completion_ids, info, ids, trainer_state, **_):
        seen.append(
            (
                [dict(one, tags=list(one["tags"])) for one in info],
                [list(one) for one in ids],
                len(completions),
            )
        )
        seen[-1] += ([list(one) for one in completion_ids], trainer_state.global_step, list(prompts))
        info[0]["tags"].append("rude")
        ids[0].clear()
        completion_ids[0].append(99)
        trainer_state.global_step = 99
        for one in (prompts, completions, completion_ids, info, ids):
            one.clear()
        return [0.0, 0.0]

    async def rude_async(**arguments):
        return rude(**arguments)

    for timeout in (None, 60):
        score([rude, rude_async, rude], scoring=Scoring(timeout=timeout), **columns)
    assert len(seen) == 6
    assert all(one == seen[0] for one in seen)
    assert columns["info"] == [{"tags": ["x"]}] * 2
    assert columns["ids"] == [[1], [2]]

    def aliased(info, **_):  # rows of one prompt are the same object in the batch
        info[0]["tags"].append("x")
        return [len(one["tags"]) for one in info]

    assert score([aliased], **columns).tolist() == [[2], [1]]


@pytest.mark.parametrize("timeout", [None, 60.0])
@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize(
    "ending", [lambda: sys.exit(0), lambda: sys.exit("bye"), asyncio.CancelledError, GeneratorExit]
)
def test_a_function_that_ends_the_process_is_an_error_of_its_own(ending, asynchronous, timeout):
    def quits(completions, **_):
        raise (ending() or AssertionError)

    async def quits_async(completions, **_):
        await asyncio.sleep(0)
        return quits(completions)

    async def bystander(completions, **_):
        await asyncio.sleep(0.01)
        return [1.0] * len(completions)

    function = named("quits", quits_async if asynchronous else quits)
    with pytest.raises(
        RewardError, match=r"'quits' raised (SystemExit: (0|bye)|CancelledError|GeneratorExit)"
    ):
        score([function, bystander], scoring=Scoring(timeout=timeout))


def test_ctrl_c_stays_what_it_is():
    def interrupted(**_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score([interrupted])


def test_nan_stays_an_error_or_none():
    with pytest.raises(RewardError, match="returned nan for row 0"):
        score([lambda **_: [np.float32("nan"), 1]])
    found = score([lambda **_: [np.float32("nan"), Decimal("sNaN")]], scoring=Scoring(nan="ignore"))
    assert all(map(math.isnan, found[:, 0].tolist()))


def test_patience_is_checked():
    with pytest.raises(ValueError, match=r"scoring\.patience=0: must be"):
        Scoring(patience=0)
