"""SparseAdapterModule: supervised fine-tuning of a sparse adapter."""

from __future__ import annotations

from typing import Any, Literal

from lightning_modules.sft import SFTModule
from lightning_modules.sparse.adapter import SparseAdapter
from lightning_modules.sparse.masks import Structure
from lightning_modules.sparse.schedules import Schedule, Static
from lightning_modules.sparse.scores import Score, snip


class SparseAdapterModule(SFTModule):
    """Trains a sparse adapter on answers ("Exploring Sparse Adapters for Scalable Merging", arXiv 2507.07140).

    The same as `SFTModule` with `adapter: SparseAdapter`; any other module takes that adapter too. The defaults
    are not the paper's: they choose by SNIP before training, which needs no dense phase. The paper's own recipe
    is `configs/sparse/paper.yaml`.

    Args:
        target_modules: Modules whose weights are trained.
        density: Share of their entries that is trained, in (0, 1].
        score: A function of `lightning_modules.sparse.scores`.
        structure: `element`, `row`, `column` or `block`.
        block: Side of a block.
        budget: `layer` or `global`.
        schedule: When weights are chosen, from `lightning_modules.sparse.schedules`.
        **kwargs: Arguments of `SFTModule`, without `adapter`.

    Raises:
        ValueError: If an argument is out of range, or `adapter` is given.
    """

    def __init__(
        self,
        target_modules: list[str] | str = "all-linear",
        density: float = 0.05,
        score: Score = snip,
        structure: Structure = "element",
        block: int = 16,
        budget: Literal["layer", "global"] = "layer",
        schedule: Schedule = Static(),  # noqa: B008  frozen
        **kwargs: Any,
    ) -> None:
        if kwargs.pop("adapter", None) is not None:
            raise ValueError(
                "SparseAdapterModule makes its own adapter. Use SFTModule to train another one, or set the "
                "arguments density, score, structure and schedule here."
            )
        super().__init__(
            adapter=SparseAdapter(target_modules, density, score, structure, block, budget, schedule),
            **kwargs,
        )
        # A checkpoint rebuilds it from the arguments above; it is none of its own.
        self.hparams.pop("adapter", None)
        self.left_out = [name for name in self.left_out if name != "adapter"]
