"""Which settings of a GRPO run contradict each other, and which only surprise."""

from __future__ import annotations

from lightning.pytorch.utilities import rank_zero_warn

from lightning_modules.grpo.audit import cuts_off
from lightning_modules.grpo.estimators import GDPO
from lightning_modules.grpo.reference import MOVES, Snapshot
from lightning_modules.grpo.steps import RolloutSteps
from lightning_modules.ranges import check_whole


def check_settings(module: RolloutSteps, *, trains_base: bool) -> None:
    """Refuse settings that cannot work together.

    Args:
        module: With its attributes set.
        trains_base: Whether the base weights themselves are trained.

    Raises:
        ValueError: Naming the argument, what is wrong with it, and the remedy.
    """
    check_whole(
        "num_generations",
        module.num_generations,
        least=2,
        hint="A completion is compared with the others of its group, so a group of one teaches nothing.",
    )
    if module.sampling.temperature == 0:
        raise ValueError(
            "sampling.temperature=0: greedy completions of a group are all equal, so there is nothing to "
            "compare. Set a positive temperature; val_sampling may be greedy."
        )
    for name in ("updates_per_rollout", "max_tokens_per_microbatch", "num_val_generations"):
        check_whole(name, getattr(module, name))
    if module.kl.coef and trains_base and not isinstance(module.kl.reference, Snapshot):
        raise ValueError(
            f"kl.coef={module.kl.coef} with adapter=None: full fine-tuning leaves no base policy to compare "
            "with. Set kl.coef: 0, keep a copy with kl.reference: lightning_modules.grpo.reference.Snapshot, or train "
            "an adapter such as peft.LoraConfig."
        )
    reference = module.kl.reference
    if (
        module.kl.coef
        and isinstance(reference, Snapshot)
        and reference.every
        and module.adapter.moves_entries
    ):
        raise ValueError(
            f"kl.reference=Snapshot with every={reference.every}: a renewed copy holds values of the entries of its "
            f"time, and this adapter chooses others during the run. {MOVES}"
        )
    if module.kl.coef and module.kl.in_reward and isinstance(module.advantage, GDPO):
        raise ValueError(
            "kl.in_reward=true lowers the sum of the rewards, but advantage=GDPO normalises each reward function by "
            "itself. Set kl.in_reward: false, or another advantage."
        )
    if module.policy_loss.of_sequences and module.objective.over == "tokens":
        raise ValueError(
            f"policy_loss={type(module.policy_loss).__name__} of whole sequences with objective.over=tokens: each "
            "completion's loss would count as often as it has tokens. Set objective.over: sequences."
        )
    if module.resampling is not None:
        module.resampling.check(module.num_generations)


def warn_of_settings(module: RolloutSteps) -> None:
    """Say which settings bias the gradient."""
    if cuts_off(module.sampling):
        rank_zero_warn(
            "sampling changes the distribution beyond its temperature (top_p, top_k, min_p or repetition_penalty), but "
            "training takes log-probabilities of the whole one: a biased gradient. Set top_p: 1, top_k: 0, min_p: 0 "
            "and repetition_penalty: 1."
        )
