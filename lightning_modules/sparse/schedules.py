"""When weights are chosen. Steps count optimiser steps, from 1; step 0 is before training. Torch alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from lightning_modules.ranges import check_number, check_whole
from lightning_modules.sparse.scores import Score, random


class Schedule(ABC):
    """When a choice of weights is due, and what is trained before the first one.

    Attributes:
        dense: Before the first choice all target weights are trained; else none, and these steps only
            observe gradients.
        batches: A choice rests on the gradients of this many steps, the last ones before it.
        once: The only choice comes before anything is trained.
        keeps: Values of dropped entries come back when they are chosen again; else entries start at zero.
        first_score: Score of the first choice; None takes the adapter's.
    """

    dense: ClassVar[bool] = False
    once: ClassVar[bool] = False
    batches: int = 1
    keeps: bool = False
    first_score: Score | None = None

    @abstractmethod
    def due(self, step: int, epoch: int) -> bool:
        """Return whether weights are chosen after this step of this epoch (from 0)."""

    @abstractmethod
    def over(self, step: int, epoch: int) -> bool:
        """Return whether no choice comes after this step any more."""

    def replaced(self, step: int) -> float:
        """Return the share of the present choice that a later one replaces; 1 chooses anew."""
        return 1.0

    def observes(self, step: int, epoch: int) -> bool:
        """Return whether the gradients of this step are needed."""
        return any(self.due(later, epoch) for later in range(max(step, 1), step + self.batches))


def _check(**counts: int) -> None:
    for name, count in counts.items():
        check_whole(f"schedule.{name}", count)


@dataclass(frozen=True)
class Static(Schedule):
    """Choose once, before training.

    Args:
        batches: Gradients of the first so many batches are observed, and nothing is trained on them. 0
            chooses before the first batch, for scores without gradient.
    """

    once: ClassVar[bool] = True
    batches: int = 1

    def __post_init__(self) -> None:
        check_whole("schedule.batches", self.batches, least=0, hint="0 is for scores without gradient.")

    def due(self, step: int, epoch: int) -> bool:
        """Return whether all batches were observed."""
        return step == self.batches

    def over(self, step: int, epoch: int) -> bool:
        """Return whether the choice was made."""
        return step >= self.batches


@dataclass(frozen=True)
class OneShot(Schedule):
    """Train all target weights for some steps, then choose once.

    Args:
        steps: Length of the dense phase.
        batches: The choice rests on the gradients of the last so many of them.
    """

    dense: ClassVar[bool] = True
    steps: int = 100
    batches: int = 1

    def __post_init__(self) -> None:
        _check(steps=self.steps, batches=self.batches)

    def due(self, step: int, epoch: int) -> bool:
        """Return whether the dense phase ends."""
        return step == self.steps

    def over(self, step: int, epoch: int) -> bool:
        """Return whether the choice was made."""
        return step >= self.steps


@dataclass(frozen=True)
class FirstEpochs(Schedule):
    """The schedule of arXiv 2507.07140 (Alg. 1): dense at first, then chosen anew every n steps of epoch 1.

    Deviations: a step is an optimiser step, where the paper's code counts micro-batches of one example; the
    gradient is that of the step's own training pass, not of a second pass with all changes unmasked. In an
    epoch shorter than `every` the first choice comes after `every` steps all the same.

    Args:
        every: Length of the dense phase, and steps between choices.
        epochs: Choices are made in the first so many epochs, then the last one stays.
        batches: Each choice rests on the gradients of so many steps.
        keeps: Entries that were dropped come back with their last value when chosen again, as in the paper.
            It costs 4 bytes for each target weight until the last choice. False forgets it.
    """

    dense: ClassVar[bool] = True
    every: int = 100
    epochs: int = 1
    batches: int = 1
    keeps: bool = True

    def __post_init__(self) -> None:
        _check(every=self.every, epochs=self.epochs, batches=self.batches)

    def due(self, step: int, epoch: int) -> bool:
        """Return whether n steps have passed since the last choice."""
        return step == self.every or (step > 0 and step % self.every == 0 and epoch < self.epochs)

    def over(self, step: int, epoch: int) -> bool:
        """Return whether the first choice was made and the first epochs are over."""
        return step >= self.every and epoch >= self.epochs


@dataclass(frozen=True)
class GrowAndDrop(Schedule):
    """Replace a falling share of the chosen weights every n steps (RigL, arXiv 1911.11134).

    The smallest learned changes are dropped, and as many weights with the highest score grow, from zero. The
    share falls linearly, fraction x (1 - step / steps), as in the code of arXiv 2507.07140; RigL's falls with
    a cosine. SpIEL (arXiv 2401.16405) scores by `gradient_magnitude`.

    Args:
        every: Steps between replacements.
        steps: No replacement from this step on.
        fraction: Share that is replaced at step 0.
        batches: Each replacement rests on the gradients of so many steps.
        first_score: Score of the choice before training; it sees no gradient.
    """

    every: int = 100
    steps: int = 1000
    fraction: float = 0.2
    batches: int = 1
    first_score: Score = random

    def __post_init__(self) -> None:
        _check(every=self.every, steps=self.steps, batches=self.batches)
        check_number("schedule.fraction", self.fraction, above=0, most=1)

    def due(self, step: int, epoch: int) -> bool:
        """Return whether this is the start, or n steps have passed."""
        return step % self.every == 0 and step < self.steps

    def over(self, step: int, epoch: int) -> bool:
        """Return whether no replacement is left."""
        return step >= (self.steps - 1) // self.every * self.every

    def replaced(self, step: int) -> float:
        """Return the share at this step."""
        return self.fraction * (1 - step / self.steps)
