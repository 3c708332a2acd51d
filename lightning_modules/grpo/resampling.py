"""Resampling: draw fresh prompts in place of dead groups, and keep what is left over for the next update."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from datamodules.batches import TextBatch
from lightning_modules.grpo.groups import Group
from lightning_modules.ranges import check_number, check_whole

# Weight of a draw's share of live groups in the running one.
_NEWEST = 0.3


@dataclass(frozen=True)
class Resampling:
    """Dynamic sampling (DAPO, arXiv 2503.14476, section 3.2), and the "2-GRPO+RS" of arXiv 2510.00977.

    A group whose completions earn the same reward teaches nothing: prompts are drawn until enough groups do, or the
    cap is reached. Each batch of the DataModule is a draw, or waits for others where the share of live groups so far
    says that one will not do, so that fewer and larger draws are made. Live groups beyond those of an update wait for
    the next one; there the sampler's log-probabilities are the old ones of the probability ratio, which corrects for
    the updates in between.

    Deviation from DAPO: rewards alone say what is dead (`advantages` that are all 0), not the accuracy of the answers;
    and left over groups are used, not thrown away.

    Args:
        live_groups: Groups of an update, over all ranks.
        max_rollouts: The most rollouts that are drawn for an update, over all ranks. When the next draw would exceed
            it, the update is made of the live groups that there are.
        max_oversampling: The most prompts that are drawn at once, relative to the groups still wanted.
    """

    live_groups: int
    max_rollouts: int
    max_oversampling: float = 4.0

    def __post_init__(self) -> None:
        check_whole("resampling.live_groups", self.live_groups)
        check_whole("resampling.max_rollouts", self.max_rollouts)
        check_number("resampling.max_oversampling", self.max_oversampling, least=1)

    def check(self, group_size: int, prompts: int | None = None) -> None:
        """Check the cap.

        Args:
            group_size: G.
            prompts: Prompts of one draw over all ranks, where it is known.

        Raises:
            ValueError: If the cap does not allow what it is a cap of.
        """
        if self.max_rollouts < self.live_groups * group_size:
            raise ValueError(
                f"resampling.max_rollouts={self.max_rollouts} does not allow {self.live_groups} live groups of "
                f"num_generations={group_size}, which are {self.live_groups * group_size} rollouts even if none is "
                "dead. Raise the cap, to about four times as many, or lower live_groups."
            )
        if prompts is not None and self.max_rollouts < prompts * group_size:
            raise ValueError(
                f"resampling.max_rollouts={self.max_rollouts} is below one draw: data.batch_size over all ranks makes "
                f"{prompts} prompts of {group_size} rollouts each. Raise the cap or lower data.batch_size."
            )

    def draws(self, wanted: int, live_share: float, prompts: int, drawn: int, group_size: int) -> int:
        """Return how many batches to draw at once: enough for the groups wanted, within both bounds.

        Args:
            wanted: Live groups still to be found.
            live_share: Share of prompts whose groups are live, as far as known.
            prompts: Prompts of a batch over all ranks.
            drawn: Rollouts drawn for this update so far.
            group_size: G.

        Returns:
            At least 1.

        >>> Resampling(64, 1024).draws(wanted=64, live_share=0.25, prompts=32, drawn=0, group_size=2)
        8
        """
        expected = wanted / max(live_share, 1 / self.max_oversampling)
        allowed = (self.max_rollouts - drawn) // (prompts * group_size)
        return max(1, min(math.ceil(expected / prompts - 1e-9), allowed))


@dataclass
class Pool:
    """What one update leaves for the next, on one rank.

    Attributes:
        waiting: Batches of prompts that have not been drawn yet.
        groups: Live groups that no update has used, the oldest first.
        drawn: Rollouts drawn over all ranks since the last update.
        live_share: Running share of live groups among those drawn; None before the first draw.
    """

    waiting: list[TextBatch] = field(default_factory=list)
    groups: list[Group] = field(default_factory=list)
    drawn: int = 0
    live_share: float | None = None

    def observe(self, live: int, prompts: int) -> None:
        """Take note of a draw.

        Args:
            live: Live groups over all ranks.
            prompts: Prompts over all ranks.
        """
        share = live / prompts
        old = share if self.live_share is None else self.live_share
        self.live_share = old + _NEWEST * (share - old)

    def state_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {
            "waiting": [asdict(batch) for batch in self.waiting],
            "groups": [group.as_dict() for group in self.groups],
            "drawn": self.drawn,
            "live_share": self.live_share,
        }

    @classmethod
    def merged(cls, states: Sequence[Mapping[str, Any]], rank: int, world_size: int) -> Pool:
        """Rebuild a rank's part from what all ranks of the run before saved.

        Args:
            states: What `state_dict` returned on each rank.
            rank: Number of this rank.
            world_size: Ranks there are now; as many as before get back their own.
        """
        batches = [TextBatch(**batch) for state in states for batch in state["waiting"]]
        groups = [Group(**group) for state in states for group in state["groups"]]
        if len(states) == world_size:
            own = states[rank]
            batches = [TextBatch(**batch) for batch in own["waiting"]]
            groups = [Group(**group) for group in own["groups"]]
        else:
            batches, groups = _dealt(batches, rank, world_size), groups[rank::world_size]
        return cls(batches, groups, states[0]["drawn"], states[0]["live_share"])


def shares(ages: Sequence[Sequence[int]], number: int) -> list[int]:
    """Say how many groups each rank gives, so that the oldest of all ranks go first.

    Args:
        ages: When each group of each rank was drawn, ascending on a rank.
        number: How many groups are taken; at most all.

    Returns:
        One number per rank: its first so many groups.

    >>> shares([[0, 5, 5], [5, 5]], 3)
    [2, 1]
    """
    queue = sorted((age, i, rank) for rank, own in enumerate(ages) for i, age in enumerate(own))
    taken = [rank for _, _, rank in queue[:number]]
    return [taken.count(rank) for rank in range(len(ages))]


def _dealt(batches: Sequence[TextBatch], rank: int, world_size: int) -> list[TextBatch]:
    """Deal the rows of batches out to ranks as one batch each, with at least one row."""
    if not batches:
        return []
    joined = TextBatch.joined(batches)
    rows = range(rank, max(len(joined), world_size), world_size)
    return [joined.take(row % len(joined) for row in rows)]
