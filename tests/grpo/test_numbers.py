"""Digit separators as LaTeX, SI and spreadsheets write them, in gold answers and completions."""

from __future__ import annotations

from decimal import Decimal

import pytest

from lightning_modules.grpo.numbers import join_digit_groups, last_number
from lightning_modules.grpo.rewards import NumericAnswer

SEPARATORS = [
    ",", "{,}", r",\!", r",\! ", r"{,}\!", r"\text{,}", r"\,", r"\ ", r"\;", r"\:", r"\>", "~", r"{\,}", "{~}",
    r"\thinspace ", r"\thinspace{}", "\u00a0", "\u202f", "\u2009", "\u2007", "'", "\u2019", "{'}",
]  # fmt: skip


@pytest.mark.parametrize("separator", SEPARATORS)
def test_separators_join_groups_of_three(separator):
    one, two, wrong = f"48{separator}000", f"-1{separator}048{separator}250.5", f"48{separator}00"
    assert last_number(f"Altogether {one} people.") == 48000
    assert last_number(rf"\boxed{{\${two}}}") == Decimal("-1048250.5") or last_number(two) == Decimal(
        "-1048250.5"
    )
    assert last_number(wrong) != 4800
    assert last_number(f"1234{separator}567") != 1234567
    reward = NumericAnswer()
    assert reward([f"It is {one}.", "It is 48000.", "It is 0.", "It is 48."], answer=["48000", one, one, one]) == [
        1, 1, 0, 0,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("7{,}25", "7.25"),
        ("1,2345", "2345"),
        ("12, 13", "13"),
        ("12 345", "345"),
        (r"1,234\,567", "567"),
        ("3,800,8", "8"),
        (r"3.141\,592\,65", "3.14159265"),
        (r"-\$5", "-5"),
        (r"\$-5", "-5"),
        (r"2.5 \times 10^{4}", "25000"),
        (r"2.5\cdot10^-3", "0.0025"),
        ("2.5 \u00d7 10^4 m", "25000"),
        ("6*10", "10"),
        ("2.5e4", "25000"),
        ("10-20", "20"),
        ("no number", None),
    ],
)
def test_last_number(text, number):
    assert last_number(text) == (None if number is None else Decimal(number))


def test_commas_of_a_pair_stay():
    assert join_digit_groups(r"(1,100) and 48{,}000", commas=False) == "(1,100) and 48000"
