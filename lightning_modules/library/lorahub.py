"""LoraHubModule: one weight per expert of a library, found from a few examples without gradients.

Shapes: B rows of a batch, E experts.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from datamodules.batches import TextBatch
from lightning_modules.distributed import rng_state, set_rng_state
from lightning_modules.library.mixing import Mixing, factor_mixing
from lightning_modules.library.module import AdapterLibraryModule
from lightning_modules.library.routers.fixed import WeightsRouter
from lightning_modules.ranges import check_number

_WORST = 1e9


class WeightSearch:
    """Nevergrad's NGOpt over one weight per expert, from 0, within bounds.

    Its state is what it has asked for and been told, from which it is made again.

    Args:
        num_experts: E.
        bound: Largest absolute value of a weight.
        budget: How many candidates it may ask for; NGOpt picks its algorithm by it.
        seed: Of its random numbers.

    Attributes:
        candidates: What was tried, float64 (E) each.
        losses: The loss of each.

    Raises:
        ImportError: If nevergrad is missing.
    """

    def __init__(self, num_experts: int, bound: float, budget: int, seed: int) -> None:
        try:
            import nevergrad
        except ImportError as error:
            raise ImportError(
                "LoraHubModule searches with nevergrad, which is not installed: pip install "
                "'lightning-quiver[lorahub]'."
            ) from error
        self.budget = budget
        self.seed = seed
        space = nevergrad.p.Array(init=np.zeros(num_experts), lower=-bound, upper=bound)
        space.random_state = np.random.RandomState(seed)
        self._optimizer = nevergrad.optimizers.NGOpt(parametrization=space, budget=budget)
        self._asked: Any = None
        self.candidates: list[NDArray[np.float64]] = []
        self.losses: list[float] = []

    def ask(self) -> NDArray[np.float64]:
        """Return the next candidate (E)."""
        with _apart():
            self._asked = self._optimizer.ask()
        return np.array(self._asked.value, dtype=np.float64)

    def tell(self, loss: float) -> None:
        """Say how good the candidate was that `ask` returned last; what is not finite counts as very bad."""
        loss = min(loss, _WORST) if math.isfinite(loss) else _WORST
        with _apart():
            self._optimizer.tell(self._asked, loss)
        self.candidates.append(np.array(self._asked.value, dtype=np.float64))
        self.losses.append(loss)

    @property
    def best(self) -> tuple[NDArray[np.float64], float]:
        """The candidate of the smallest loss, and that loss; of equal ones the first."""
        number = int(np.argmin(self.losses))
        return self.candidates[number], self.losses[number]

    def state(self) -> dict[str, Any]:
        """Return what `replay` needs."""
        return {
            "budget": self.budget,
            "seed": self.seed,
            "candidates": torch.tensor(np.array(self.candidates)),
            "losses": torch.tensor(self.losses, dtype=torch.float64),
        }

    def replay(self, candidates: Tensor, losses: Tensor) -> None:
        """Ask and tell what another search did, so that this one goes on like it.

        Args:
            candidates: (n, E).
            losses: (n).

        Raises:
            ValueError: If this search asks for other candidates.
        """
        for candidate, loss in zip(candidates.numpy(), losses.tolist(), strict=True):
            if not np.allclose(self.ask(), candidate, rtol=0, atol=1e-9):
                raise ValueError(
                    "The search of the checkpoint cannot go on: nevergrad asks for other candidates than then. "
                    "Install the version of that run, or start anew without ckpt_path."
                )
            self.tell(loss)


class LoraHubModule(AdapterLibraryModule):
    """LoraHub (arXiv 2307.13269): weights of frozen experts for a new task, by gradient-free search.

    A training step asks the search for weights in [-bound, bound], and tells it the mean cross-entropy of the
    batch's answer tokens plus `l1_coef` times the mean absolute weight. So `max_steps` is the number of
    candidates, and a batch should hold all examples: losses on different rows are hard to compare. In validation,
    checkpoints and exports the experts have the best weights so far.

    Deviations from the paper's code: the best candidate is kept, not the optimiser's recommendation; prompts are
    not part of the loss, as everywhere in Quiver.

    Args:
        library: Folder of an `AdapterLibrary`.
        experts: Names of the experts to weigh; None takes all. The paper draws 20.
        mixing: LoraHub adds factors up; `output_mixing` adds changes up.
        l1_coef: Weight of the mean absolute weight.
        bound: Largest absolute weight.
        **kwargs: Arguments of `AdapterLibraryModule` about evaluation and the base model.

    Raises:
        ValueError: If `l1_coef` is negative or `bound` not positive, or experts shall be trained.
    """

    def __init__(
        self,
        library: str,
        experts: list[str] | None = None,
        mixing: Mixing = factor_mixing,
        l1_coef: float = 0.05,
        bound: float = 1.5,
        **kwargs: Any,
    ) -> None:
        check_number("l1_coef", l1_coef, least=0)
        check_number("bound", bound, above=0)
        if kwargs.get("train_experts"):
            raise ValueError(
                "train_experts: LoraHub weighs experts that stay as they are. Train them with AdapterLibraryModule."
            )
        super().__init__(router=WeightsRouter({}), library=library, experts=experts, mixing=mixing, **kwargs)
        # As with `adapter`: it is made here.
        self.hparams.pop("router", None)
        self.left_out = [name for name in self.left_out if name != "router"]
        self.l1_coef = l1_coef
        self.bound = bound
        self.search: WeightSearch | None = None
        self._saved: dict[str, Any] | None = None

    def setup(self, stage: str) -> None:
        """Refuse several processes, whose module would have nothing to exchange gradients of.

        Raises:
            ValueError: If there are several.
        """
        super().setup(stage)
        if stage == "fit" and self.trainer.world_size > 1:
            raise ValueError(
                "trainer.devices: LoraHub searches without gradients, in one process. Set devices: 1."
            )

    def configure_model(self) -> None:
        """Load the model and the experts, without dropout."""
        super().configure_model()
        assert self.model is not None
        self.model.eval()

    def configure_optimizers(self) -> None:
        """Return none: there are no gradients."""

    # ------------------------------------------------------------------ the search

    def on_fit_start(self) -> None:
        """Start the search, or replay that of the checkpoint.

        Raises:
            ValueError: If there is no limit of steps, or the search of the checkpoint cannot go on.
            ImportError: If nevergrad is missing.
        """
        super().on_fit_start()
        names = self.adapter.stacked.names
        if self._saved is not None:
            saved, self._saved = self._saved, None
            self.search = WeightSearch(len(names), self.bound, int(saved["budget"]), int(saved["seed"]))
            self.search.replay(saved["candidates"], saved["losses"])
            return
        budget = self.trainer.estimated_stepping_batches
        if not math.isfinite(budget):
            raise ValueError("trainer.max_steps: say how many candidates LoraHub shall try, such as 40.")
        self.search = WeightSearch(len(names), self.bound, int(budget), torch.initial_seed() % 2**32)

    @torch.no_grad()
    def training_step(self, batch: TextBatch, batch_idx: int) -> None:
        """Try one candidate on a batch."""
        assert self.search is not None, "on_fit_start has not run"
        candidate = self.search.ask()
        self.set_weights(candidate)
        loss = float(self._mean_loss(batch)) + self.l1_coef * float(np.abs(candidate).mean())
        self.search.tell(loss)
        best, best_loss = self.search.best
        self.set_weights(best)
        # Nothing steps an optimiser, and `max_steps` must end the run.
        progress = self.trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
        progress.increment_ready()
        progress.increment_completed()
        self.log("train/loss", loss, prog_bar=True, batch_size=1)
        self.log("train/best_loss", best_loss, prog_bar=True, batch_size=1)

    def on_train_end(self) -> None:
        """Print the best weights, the largest first."""
        super().on_train_end()
        if self.search is None or not self.search.losses:
            return
        weights, loss = self.search.best
        lines = [
            f"{weight:+.3f}  {name}"
            for weight, name in sorted(zip(weights, self.adapter.stacked.names, strict=True), reverse=True)
        ]
        tried = len(self.search.losses)
        self.print(f"Weights with the smallest loss, {loss:.4g}, of {tried} candidates:", *lines, sep="\n")

    def set_weights(self, weights: Sequence[float] | NDArray[np.float64]) -> None:
        """Weigh the experts so in all layers.

        Args:
            weights: (E), in the order of `adapter.stacked.names`.
        """
        for layer in self.adapter.layers.values():
            values = layer.router.get_parameter("values")
            values.data.copy_(torch.as_tensor(weights, dtype=values.dtype))

    def _mean_loss(self, batch: TextBatch) -> Tensor:
        """Mean cross-entropy of the answer tokens of a batch."""
        total, count = torch.zeros((), device=self.device), torch.zeros((), device=self.device)
        for micro_batch in self._micro_batches(batch):
            self.route(batch, micro_batch.rows)
            logprobs_BT, mask_BT = self._logprobs(micro_batch.prompts, micro_batch.answers)
            total -= (logprobs_BT * mask_BT).sum()
            count += mask_BT.sum()
        return total / count

    # ------------------------------------------------------------------ checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the search."""
        super().on_save_checkpoint(checkpoint)
        if self.search is not None:
            checkpoint["lorahub"] = self.search.state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the search until the run starts."""
        super().on_load_checkpoint(checkpoint)
        self._saved = checkpoint.get("lorahub")


@contextmanager
def _apart() -> Iterator[None]:
    """Keep nevergrad from global random numbers, and from warnings about the optimisers that it wraps."""
    before = rng_state()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        set_rng_state(before)
