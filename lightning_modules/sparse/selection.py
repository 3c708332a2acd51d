"""Selection: lets a schedule choose weights by their scores, and optimiser moments follow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_modules.ranks import from_rank_zero, mean_over_ranks
from lightning_modules.sharding import whole
from lightning_modules.sparse.draws import draws_of
from lightning_modules.sparse.masks import Structure, budget, count_units, replace, select, select_across
from lightning_modules.sparse.moments import carry_moments, positions, taken
from lightning_modules.sparse.schedules import Schedule
from lightning_modules.sparse.scores import Score
from lightning_modules.sparse.weight import SparseWeight


@dataclass(frozen=True)
class Rule:
    """How weights are chosen; the arguments of `SparseAdapter`."""

    density: float
    score: Score
    structure: Structure
    block: int
    budget: Literal["layer", "global"]
    schedule: Schedule


class Selection:
    """Follows training steps and changes which entries of the weights are trained.

    Args:
        weights: The target weights.
        rule: How to choose.
        seeds: What random scores depend on, beside the weight's name and the step.

    Attributes:
        step: Optimiser steps made.
        epoch: Epoch of the last one, from 0.
        was_chosen: Whether the schedule has made a choice.
        choices: How often weights were chosen since the start.
        resized: Whether values became new parameters since this was last set to False.
        sums: Scores that have added up for the next choice, by weight.
        examples: Scores of the single examples of the step that runs, of this rank, by weight.
        dropped: Last value of each entry that was ever trained, by weight, where the schedule keeps them (N).
    """

    def __init__(
        self, weights: Sequence[SparseWeight], rule: Rule, seeds: tuple[int | str, ...] = ()
    ) -> None:
        self.weights = weights
        self.rule = rule
        self.seeds = seeds
        self.step = 0
        self.epoch = 0
        self.was_chosen = False
        self.choices = 0
        self.resized = False
        self.sums: dict[str, Tensor] = {}
        self.examples: dict[str, Tensor] = {}
        self.dropped: dict[str, Tensor] = {}

    def start(self) -> None:
        """Train what the schedule wants before the first step.

        Raises:
            ValueError: If scores that need no gradient are NaN, or zero everywhere.
        """
        if self.rule.schedule.dense:
            for weight in self.weights:
                weight.put(None, torch.zeros(weight.shape.numel()))
        else:
            for weight in self.weights:  # entries that hold the place of those to come
                zeros = torch.zeros(weight.shape, device=weight.device)
                first = select(zeros, self.rule.density, self.rule.structure, self.rule.block)
                weight.put(first, torch.zeros(len(first)))
            if self.rule.schedule.due(0, 0):
                # One by one where weights do not compete: scores of a whole model are as large as the model.
                together = self.rule.budget == "global"
                for group in [self.weights] if together else [[weight] for weight in self.weights]:
                    self.sums = {
                        w.name: w.keep(self._score(w, torch.zeros(w.shape, device=w.device))) for w in group
                    }
                    self._choose(self._take_scores(), None)
                self.was_chosen = True
        self.resized = False  # nothing knows the parameters yet
        self.prepare(0)

    @property
    def is_over(self) -> bool:
        """Whether no choice is due any more."""
        return self.rule.schedule.over(self.step, self.epoch)

    @property
    def of_examples(self) -> bool:
        """Whether the next choice scores the gradient of each example by itself."""
        return getattr(self._next_score, "per_example", False)

    def observes_examples(self, steps: int = 1) -> bool:
        """Return whether one of the next optimiser steps needs the gradients of single examples."""
        schedule = self.rule.schedule
        later = range(self.step + 1, self.step + 1 + steps)
        return self.of_examples and any(
            schedule.observes(step, self.epoch) and not schedule.over(step - 1, self.epoch) for step in later
        )

    def take_example(self) -> None:
        """Score the gradients of one example, whose backward pass is over."""
        for weight in self.weights:
            if weight.observing and (gradient := weight.take_observed()) is not None:
                score = self._score(weight, gradient)
                if weight.name in self.examples:
                    score += self.examples[weight.name]
                self.examples[weight.name] = score

    def forget_examples(self) -> None:
        """Drop what was scored of a step that was not made."""
        self.examples = {}

    def before_step(self, epoch: int) -> None:
        """Score the gradients of the step that is about to be made, if a choice needs them."""
        schedule = self.rule.schedule
        if schedule.over(self.step, epoch) or not schedule.observes(self.step + 1, epoch):
            return
        if self.of_examples:
            self.take_example()
        for weight in self.weights:
            score = weight.keep(self._step_score(weight))
            if weight.name in self.sums:
                score += self.sums[weight.name]
            self.sums[weight.name] = score

    def after_step(self, optimizer: Optimizer, epoch: int) -> None:
        """Count a step, and choose if it is due.

        Raises:
            ValueError: If scores are NaN, or zero everywhere.
        """
        self.step += 1
        if self.rule.schedule.due(self.step, epoch):
            self._choose(self._take_scores(), optimizer)
            self.was_chosen = True
            self.choices += 1
        self.prepare(epoch)

    def prepare(self, epoch: int) -> None:
        """Get the weights ready for the next step."""
        self.epoch = epoch
        schedule = self.rule.schedule
        over = schedule.over(self.step, epoch)
        if over:
            self.sums, self.dropped = {}, {}
        for weight in self.weights:
            weight.idle = not (self.was_chosen or schedule.dense)
            weight.observing = not over and schedule.observes(self.step + 1, epoch)
            weight.of_examples = self.of_examples
            weight.observed = None
        self.examples = {}

    def check(
        self, parts: dict[SparseWeight, tuple[Tensor, Tensor | None]], step: int, was_chosen: bool, epoch: int
    ) -> None:
        """Check that a saved state is one that this schedule and this budget can be in.

        Args:
            parts: Values and indices of each weight.
            step: Optimiser steps made.
            was_chosen: Whether its schedule had made a choice.
            epoch: Of the last step.

        Raises:
            ValueError: If it is not.
        """
        rule = self.rule
        remedy = "Use the settings of the run that wrote it."
        is_dense = any(indices is None for _, indices in parts.values())
        if was_chosen and is_dense:
            raise ValueError(
                "The checkpoint lacks the indices of a choice that it says was made. It is damaged."
            )
        if not was_chosen and (is_dense != rule.schedule.dense or rule.schedule.over(step, epoch)):
            raise ValueError(
                f"The checkpoint was written at step {step}, before its schedule chose weights; {rule.schedule} "
                f"would never choose any from there. {remedy}"
            )
        if rule.budget == "global" or not was_chosen:
            return
        for weight, (_, indices) in parts.items():
            assert indices is not None
            shape = weight.shape
            count, units = count_units(indices, shape, rule.structure, rule.block)
            if count != budget(rule.density, units):
                raise ValueError(
                    f"The checkpoint trains {count} units of {weight.name}, but density={rule.density} with "
                    f"structure={rule.structure!r} gives {budget(rule.density, units)}. {remedy}"
                )

    def _step_score(self, weight: SparseWeight) -> Tensor:
        """Score the gradient of a step, over all ranks; of examples, return their mean over ranks."""
        if not self.of_examples:
            return self._score(weight, weight.gradient())
        found = self.examples.get(weight.name)
        return mean_over_ranks(torch.zeros(weight.shape, device=weight.device) if found is None else found)

    @property
    def _next_score(self) -> Score:
        first = self.rule.schedule.first_score
        return self.rule.score if self.was_chosen or first is None else first

    def _score(self, weight: SparseWeight, gradient: Tensor) -> Tensor:
        adapted = weight.weight.float()
        if weight.indices is None:
            change = whole(weight.values.detach()).view(adapted.shape)
            if weight.adds_in_forward:
                adapted = adapted + change
        elif weight.name in self.dropped:
            change = self._last_values(weight).view(adapted.shape)
        else:
            change = weight.delta.dense()
        with draws_of(weight.device, *self.seeds, weight.name, self.step):
            return self._next_score(adapted, change, gradient.float()).detach()

    def _take_scores(self) -> dict[str, Tensor]:
        """Return the scores that have added up, rank 0's on every rank."""
        scores = {name: from_rank_zero(whole(score).contiguous()) for name, score in self.sums.items()}
        self.sums = {}
        zero = [name for name, score in scores.items() if not score.any()]
        if zero and (self.rule.budget == "layer" or len(zero) == len(scores)):
            name = getattr(self.rule.score, "__name__", type(self.rule.score).__name__)
            raise ValueError(
                f"score={name} is zero everywhere in {len(zero)} of {len(scores)} weights, {zero[0]} first: "
                "there is nothing to choose by. Scores that multiply with the learned change need a dense "
                "phase (OneShot, FirstEpochs) of two steps or more with a learning rate; scores of gradients need "
                "batches with a gradient (schedule batches of at least 1)."
            )
        return scores

    def _chosen(self, scores: dict[str, Tensor]) -> dict[str, Tensor]:
        rule = self.rule
        share = rule.schedule.replaced(self.step) if self.was_chosen else 1.0
        units = (rule.structure, rule.block)
        if share < 1:
            return {
                w.name: replace(w.delta.indices, w.delta.dense().abs(), scores[w.name], share, *units)
                for w in self.weights
            }
        if rule.budget == "global":
            return select_across(scores, rule.density, *units)
        return {name: select(score, rule.density, *units) for name, score in scores.items()}

    def _choose(self, scores: dict[str, Tensor], optimizer: Optimizer | None) -> None:
        """Train other entries of the scored weights. All is decided before anything is changed."""
        chosen = self._chosen(scores)
        for weight in self.weights:
            new = chosen.get(weight.name)
            if new is None:
                continue
            source = positions(weight.indices, new)
            values = taken(whole(weight.values.detach()), source)
            if self.rule.schedule.keeps:
                last = self._last_values(weight)
                self.dropped[weight.name] = weight.keep(last)
                values = last[new]
            old = weight.values
            self.resized |= weight.put(new, values)
            if optimizer is not None:
                carry_moments(optimizer, old, weight.values, None if weight.idle else source)

    def _last_values(self, weight: SparseWeight) -> Tensor:
        """Return the last value of each entry that was ever trained, zero elsewhere (N)."""
        values = whole(weight.values.detach())
        indices = weight.indices
        if indices is None:
            return values.clone()
        known = torch.zeros(weight.shape.numel(), device=weight.device)
        if weight.name in self.dropped:
            known = whole(self.dropped[weight.name]).flatten()
        return known.index_copy(0, indices.long(), values)
