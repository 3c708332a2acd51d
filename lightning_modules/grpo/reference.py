"""The policy that a KL term holds the trained one to, and how the term is computed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_modules.causal_lm import CausalLMModule
from lightning_modules.ranges import check_number, check_whole
from lightning_modules.sharding import copy_rows, sharded_modules


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
    more, twice while the reference runs.

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

    def start(self, module: CausalLMModule) -> None:
        """Copy what is trained."""
        self._copies = {name: one.detach().clone() for name, one in _trained(module).items()}

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
                self._copies[name].lerp_(one, self.mix)

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
            copy_rows(copy, state[name])

    def _matching(self, module: CausalLMModule) -> dict[str, Tensor]:
        """What is trained; the copy moves to where it is."""
        trained = _trained(module)
        if {name: one.shape for name, one in trained.items()} != {
            name: one.shape for name, one in self._copies.items()
        }:
            raise ValueError(
                "kl.reference=Snapshot cannot follow an adapter whose trained entries change during the run. Use a "
                "schedule that chooses them once, or the base policy (kl.reference: null)."
            )
        self._copies = {name: copy.to(trained[name].device) for name, copy in self._copies.items()}
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
