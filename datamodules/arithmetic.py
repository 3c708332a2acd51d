"""Generated sums: a task without files or downloads, small enough to learn in minutes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from datamodules.base import Split, TextDataModule
from datamodules.splits import check_sizes, permutation
from lightning_modules.ranges import check_whole


class ArithmeticDataModule(TextDataModule):
    """Questions "What is a + b? Answer with just the number." with columns `question` and `answer`.

    The unordered pairs {a, b} are dealt out by `seed`: validation and test get theirs first and ask each
    once, so training never sees a held-out sum, in neither order. The training rows go through both orders
    of all other pairs in rounds, each round in another order, until there are `train_size` of them.

    Args:
        max_operand: Operands go from 0 to this number.
        train_size: Number of training rows; rows repeat when there are fewer distinct ones.
        val_size: Number of validation rows.
        test_size: Number of test rows.
        **kwargs: Arguments of `TextDataModule`: template, system prompt, batch sizes, seed.

    Raises:
        ValueError: The held-out rows leave no pair to train on.
    """

    def __init__(
        self,
        max_operand: int = 50,
        train_size: int = 640,
        val_size: int = 256,
        test_size: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(prompt_column="question", answer_column="answer", **kwargs)
        check_whole("max_operand", max_operand)
        check_sizes(train_size=train_size, val_size=val_size, test_size=test_size)
        num_pairs = (max_operand + 1) * (max_operand + 2) // 2
        if val_size + test_size >= num_pairs:
            raise ValueError(
                f"val_size={val_size} and test_size={test_size} leave nothing to train on: max_operand="
                f"{max_operand} gives {num_pairs} pairs; raise max_operand or hold out fewer"
            )
        self.max_operand = max_operand
        self.sizes: dict[Split, int] = {"train": train_size, "val": val_size, "test": test_size}

    def rows(self, split: Split) -> list[Mapping[str, Any]]:
        """Generate a split; see `TextDataModule.rows`."""
        pairs = [(a, b) for a in range(self.max_operand + 1) for b in range(a + 1)]
        pairs = [pairs[index] for index in permutation(len(pairs), self.seed, "pairs").tolist()]
        num_val, num_test = self.sizes["val"], self.sizes["test"]
        if split == "val":
            return [_row(*pair) for pair in self._in_some_order(pairs[:num_val])]
        if split == "test":
            return [_row(*pair) for pair in self._in_some_order(pairs[num_val : num_val + num_test])]
        ordered = [order for a, b in pairs[num_val + num_test :] for order in dict.fromkeys([(a, b), (b, a)])]
        rows: list[Mapping[str, Any]] = []
        while len(rows) < self.sizes["train"]:
            order = permutation(len(ordered), self.seed, "train", len(rows)).tolist()
            rows += [_row(*ordered[index]) for index in order[: self.sizes["train"] - len(rows)]]
        return rows

    def _in_some_order(self, pairs: list[tuple[int, int]]) -> list[tuple[int, int]]:
        # Pairs come with a >= b; half of them are turned round, or every held-out sum would look alike.
        turned = permutation(len(pairs), self.seed, "turned").tolist()
        return [(b, a) if flag % 2 else (a, b) for (a, b), flag in zip(pairs, turned, strict=True)]


def _row(a: int, b: int) -> Mapping[str, Any]:
    return {"question": f"What is {a} + {b}? Answer with just the number.", "answer": str(a + b)}
