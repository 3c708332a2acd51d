"""The policy that a KL term holds the trained one to, and how the term is computed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_modules.causal_lm import CausalLMModule
from lightning_modules.ranges import check_number, check_whole
from lightning_modules.ranks import sum_over_ranks
from lightning_modules.sharding import copy_rows, local, read, sharded_like, sharded_modules

MOVES = (
    "Use a schedule that chooses before anything is trained (Static), a copy that is never renewed (every: null), or "
    "the base policy (kl.reference: null)."
)


class Reference(ABC):
    """Which policy the KL term compares with."""

    def start(self, module: CausalLMModule) -> None:  # noqa: B027
        """Hear that the model is there and trained from now on; before a checkpoint is read.

        Args:
            module: With its model.
        """

    @abstractmethod
    def context(self, module: CausalLMModule) -> AbstractContextManager[Any]:
        """Return a context in which the model of `module` is the reference policy."""

    def after_update(self, module: CausalLMModule) -> None:  # noqa: B027
        """Hear that an update was made; `module.global_step` counts it."""

    def tensors(self) -> dict[str, Tensor]:
        """Return what a checkpoint must hold, by name."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Restore what `tensors` returned."""


class BasePolicy(Reference):
    """The base model, which is there while the adapter is disabled: no memory, one more forward pass."""

    def context(self, module: CausalLMModule) -> AbstractContextManager[Any]:
        """Return the adapter's own context."""
        return module.adapter.disabled()


class Snapshot(Reference):
    """A copy of what is trained, taken at the start and, if wanted, brought up to date now and then.

    Never brought up to date it is the frozen reference of full fine-tuning, or of an adapter that training started
    from. With `every` it is TR-DPO's soft or hard update (arXiv 2404.09656, section 3), which TRL calls
    `sync_ref_model`: reference = mix x policy + (1 - mix) x reference. Costs the memory of the trained weights once
    more, twice while the reference runs; a copy that is mixed is float32, since small shares of a step vanish in
    bfloat16.

    A sparse adapter may choose its weights during the run as long as the copy changes nothing, which is the base
    policy whatever is trained; a copy of learned values belongs to the entries of its time.

    Args:
        every: Updates after which the copy is renewed; None never renews it.
        mix: Share of the policy in the renewed copy, above 0 and at most 1.
    """

    def __init__(self, every: int | None = None, mix: float = 1.0) -> None:
        check_whole("every", every, none=True, hint="null keeps the copy as it is.")
        check_number("mix", mix, above=0, most=1, hint="1 copies the policy.")
        self.every = every
        self.mix = mix
        self._copies: dict[str, Tensor] = {}
        self._choices = 0

    def start(self, module: CausalLMModule) -> None:
        """Copy what is trained."""
        self._copies = {name: self._copy(one) for name, one in _trained(module).items()}
        self._choices = module.adapter.choices

    def _copy(self, trained: Tensor) -> Tensor:
        mixes = self.every is not None and self.mix < 1
        kind = torch.promote_types(trained.dtype, torch.float32) if mixes else trained.dtype
        return trained.detach().to(kind, copy=True)

    @contextmanager
    def context(self, module: CausalLMModule) -> Iterator[None]:
        """Put the copy in the place of what is trained, and that back afterwards."""
        trained = self._matching(module)
        own = {name: one.detach().clone() for name, one in trained.items()}
        _put(module, trained, self._copies)
        try:
            yield
        finally:
            _put(module, trained, own)

    def after_update(self, module: CausalLMModule) -> None:
        """Renew the copy where it is due."""
        if self.every is None or module.global_step % self.every:
            return
        with torch.no_grad():
            for name, one in self._matching(module).items():
                self._copies[name].lerp_(one.to(self._copies[name].dtype), self.mix)

    def tensors(self) -> dict[str, Tensor]:
        """Return the copy."""
        return dict(self._copies)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the copy.

        Raises:
            ValueError: If it belongs to other weights.
        """
        if state.keys() != self._copies.keys():
            raise ValueError(
                "The checkpoint holds another reference policy than this run has. Resume with the kl.reference of the "
                "run that wrote it."
            )
        for name, copy in self._copies.items():
            if copy.shape == state[name].shape:
                copy_rows(copy, state[name])
            else:  # of another number of entries than those before the first choice
                self._copies[name] = read(state[name]).to(copy.dtype)

    def _matching(self, module: CausalLMModule) -> dict[str, Tensor]:
        """Return what is trained; the copy moves to its device, and to other entries where it changes none."""
        trained = _trained(module)
        moved = self._choices != module.adapter.choices
        if moved or any(one.shape != self._copies[name].shape for name, one in trained.items()):
            changes = torch.stack([local(one).count_nonzero().float() for one in self._copies.values()]).sum()
            if float(sum_over_ranks(changes.to(module.device))):
                raise ValueError(
                    f"kl.reference=Snapshot: the adapter has chosen other entries to train, and the copy holds values "
                    f"of those before. {MOVES}"
                )
            self._copies = {name: torch.zeros_like(self._copy(one)) for name, one in trained.items()}
            self._choices = module.adapter.choices
        self._copies = {
            name: copy.to(trained[name].device)
            if isinstance(copy, DTensor)
            else sharded_like(copy, trained[name])
            for name, copy in self._copies.items()
        }
        return trained


def _trained(module: CausalLMModule) -> dict[str, Tensor]:
    """What the optimiser trains, by name."""
    wanted = {id(parameter) for parameter in module.trained_parameters()}
    return {name: one for name, one in module.named_parameters() if id(one) in wanted}


@torch.no_grad()
def _put(module: CausalLMModule, trained: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, one in trained.items():
        one.copy_(values[name])
    assert module.model is not None
    for part in sharded_modules(module.model):  # gather the changed rows anew
        part.reshard()


@dataclass(frozen=True)
class KL:
    """The KL term to a reference policy.

    Args:
        coef: Its weight, TRL's beta. 0 computes none.
        kind: Estimator, see `kl.kl_estimate`: `k1`, `k2` or `k3`.
        in_reward: Subtract coef x the completion's summed k1 estimate from its reward, as RLOO and PPO do, instead of
            adding coef x the estimate to the loss of each token. Uses the sampler's log-probabilities.
        unbiased: Weigh the estimate in the loss by the probability ratio: the gradient of k3 is then that of the
            reverse KL (TRL's `use_bias_correction_kl`).
        reference: The policy to compare with; None is the base model without adapter (`BasePolicy`).
    """

    coef: float = 0.0
    kind: Literal["k1", "k2", "k3"] = "k3"
    in_reward: bool = False
    unbiased: bool = False
    reference: Reference | None = None

    def __post_init__(self) -> None:
        check_number("kl.coef", self.coef, least=0, hint="Below 0 it would reward drifting away; 0 is off.")
        if self.kind not in ("k1", "k2", "k3"):
            raise ValueError(f"kl.kind={self.kind!r} is unknown: use k1, k2 or k3.")
        if self.kind == "k1" and not self.in_reward:
            raise ValueError(
                "kl.kind=k1 in the loss: its gradient is zero in expectation, so it holds the policy to nothing. Set "
                "kl.kind: k2 or k3, or kl.in_reward: true."
            )
        if self.in_reward and self.unbiased:
            raise ValueError(
                "kl.unbiased weighs the estimate in the loss, but kl.in_reward puts it into the reward, where k1 is "
                "unbiased already. Set one of them to false."
            )

    @property
    def in_loss(self) -> bool:
        """Whether the loss has the term."""
        return self.coef > 0 and not self.in_reward

    @property
    def policy(self) -> Reference:
        """The policy to compare with."""
        return self.reference or BasePolicy()
