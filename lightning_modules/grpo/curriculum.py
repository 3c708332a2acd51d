"""What is known about how hard each prompt is, and what to make of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from lightning_modules.ranges import check_number


def uncertainty(pass_rate: float) -> float:
    """Weigh a prompt by the variance of its outcome, p (1 - p), at least 0.02 so that none is lost for good.

    A pair of completions differs with the probability 2 p (1 - p): prompts that are always, or never, solved teach
    nothing.

    >>> uncertainty(0.5), uncertainty(1.0)
    (0.25, 0.02)
    """
    return max(pass_rate * (1 - pass_rate), 0.02)


class PassRates:
    """Keeps the share of completions that succeeded, by prompt, the latest counting most.

    A prompt starts as `prior`, which counts like one completion.

    Args:
        decay: What an earlier completion weighs after one more visit of its prompt, above 0 and at most 1.
        prior: Pass rate of a prompt that was never seen.
    """

    def __init__(self, decay: float = 0.5, prior: float = 0.5) -> None:
        check_number("decay", decay, above=0, most=1, hint="1 weighs all completions alike.")
        check_number("prior", prior, least=0, most=1, hint="It is a pass rate.")
        self.decay = decay
        self.prior = prior
        self._seen: dict[int, tuple[float, float]] = {}

    def __len__(self) -> int:
        return len(self._seen)

    def observe(self, uid: int, successes: Iterable[float]) -> None:
        """Take note of the completions of a prompt.

        Args:
            uid: Number of the prompt in its data set.
            successes: 0 or 1 of each completion; NaN, where success does not apply, does not count.
        """
        known = [one for one in successes if not math.isnan(one)]
        if known:
            passed, count = self._seen.get(uid, (0.0, 0.0))
            self._seen[uid] = (passed * self.decay + sum(known), count * self.decay + len(known))

    def __getitem__(self, uid: int) -> float:
        """Return the pass rate of a prompt."""
        passed, count = self._seen.get(uid, (0.0, 0.0))
        return (passed + self.prior) / (count + 1)

    def state_dict(self) -> dict[int, tuple[float, float]]:
        """Return what was seen."""
        return dict(self._seen)

    def load_state_dict(self, state: Mapping[int, tuple[float, float]]) -> None:
        """Restore what `state_dict` returned."""
        self._seen = {uid: (passed, count) for uid, (passed, count) in state.items()}
