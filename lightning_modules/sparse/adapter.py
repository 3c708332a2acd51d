"""SparseAdapter: trains a chosen subset of the base weights, in place (arXiv 2507.07140)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_modules.adapters import Adapter
from lightning_modules.ranges import check_whole
from lightning_modules.ranks import several_ranks
from lightning_modules.sharding import gathered_dtype, read, sharded_modules, whole
from lightning_modules.sparse.delta import SparseDelta
from lightning_modules.sparse.masks import Structure, check_density, unit_sums
from lightning_modules.sparse.rounding_watch import RoundingWatch
from lightning_modules.sparse.schedules import Schedule, Static
from lightning_modules.sparse.scores import Score, snip
from lightning_modules.sparse.selection import Rule, Selection
from lightning_modules.sparse.sharded_weight import ShardedSparseWeight
from lightning_modules.sparse.storage import check_delta, fingerprint, write_sparse
from lightning_modules.sparse.targets import find_targets, find_users
from lightning_modules.sparse.weight import SparseWeight

_SCHEDULE = "schedule"


class SparseAdapter(Adapter):
    """A sparse change of base weights: y = (W + dW)x, where dW is zero but for chosen entries.

    What is learned is one float32 vector of values for each weight; indices are buffers. Values are written
    into the base weight after each optimiser step, so a forward pass costs what it costs without adapter, and
    optimiser moments have the size of the values (see `SparseWeight`). Under a bfloat16 base, or where the model
    computes in bfloat16, what it computes with is rounded, what is learned is not: small changes of large weights
    vanish. What is lost is measured after the first update, and there is a warning if it is more than 5%.

    A score that draws random numbers draws others for each weight, and for each expert: they depend on the run's
    seed, the weight's name, the step and the training data (tasks, number of rows, some prompts), which modules of
    ours read from their datamodule. The same configuration on the same data chooses the same weights.

    Weights are chosen by a score, from gradients that ordinary training steps make anyway: there is no extra
    pass. Gradients are averaged over ranks before they are scored, and rank 0's scores count, so that every
    rank chooses the same.

    Deviations from the paper's code: exact budgets, where ties there inflate the mask; entries that were not
    chosen do not move, where momentum moves them there; no bias is trained; see also
    `lightning_modules.sparse.schedules.FirstEpochs`.

    Args:
        target_modules: Modules whose weights are trained: `all-linear` for every `nn.Linear` except the
            output head, a list of names or ends of names, or a regular expression for the whole name. Weights
            that are tied are trained together.
        density: Share of the entries that is trained, in (0, 1]; see `masks.select` for the exact count.
        score: A function of `lightning_modules.sparse.scores`, or one of that kind.
        structure: What is chosen as a whole: `element`, `row`, `column` or `block`.
        block: Side of a block.
        budget: `layer` gives each weight its share, `global` lets the weights compete. With `GrowAndDrop`
            they compete at the start only.
        schedule: When weights are chosen, from `lightning_modules.sparse.schedules`.

    Raises:
        ValueError: If `density` is not in (0, 1], or `structure` or `budget` is unknown.
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
    ) -> None:
        check_density(density)
        check_whole("block", block)
        unit_sums(torch.zeros(1, 1), structure, block)  # refuses what it does not know
        if budget not in ("layer", "global"):
            raise ValueError(f"budget={budget!r}: must be layer or global.")
        self.target_modules = target_modules
        self.density = density
        self.score = score
        self.structure: Structure = structure
        self.block = block
        self.budget: Literal["layer", "global"] = budget
        self.schedule = schedule
        self.joins_shards = True
        self.draws_by_purpose = True
        self.moves_entries = not schedule.once
        self.weights: list[SparseWeight] = []
        self.rounding = RoundingWatch()
        self._is_watched = False
        self._has_warned = False

    # ------------------------------------------------------------------ the seam

    @torch.inference_mode(False)
    def attach(self, model: nn.Module) -> nn.Module:
        """Freeze `model` and make the chosen entries of its target weights trainable.

        Raises:
            ValueError: If `target_modules` matches nothing, or something else than linear layers and
                embeddings, or a score without gradient is NaN or zero everywhere.
        """
        users = find_users(model, find_targets(model, self.target_modules))
        self._model = model
        self._frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
        model.requires_grad_(False)
        self._fingerprint = {name: fingerprint(model.get_parameter(name)) for name in users}
        # The rest of a sharded model stays sharded; a weight that is not (a plain model) is trained where it is.
        self.weights = [
            _sparse_weight(name, model.get_parameter(name), found) for name, found in users.items()
        ]
        rule = Rule(self.density, self.score, self.structure, self.block, self.budget, self.schedule)
        seed = int(torch.randint(2**62, ()))
        self.selection = Selection(self.weights, rule, (seed, self.purpose))
        self._hook = model.register_forward_pre_hook(self._before_forward, with_kwargs=True)
        try:
            self._check_examples()
            self.selection.start()
        except Exception:
            self.remove()
            raise
        return model

    def disabled(self) -> AbstractContextManager[Any]:
        """Return a context in which the base weights are back, bit for bit."""
        return self._disabled()

    @contextmanager
    def _disabled(self) -> Iterator[None]:
        self.synchronize()
        for weight in self.weights:
            weight.switch_off()
        self._forget_gathered()
        try:
            yield
        finally:
            for weight in self.weights:
                weight.switch_on()
            self._forget_gathered()

    def _forget_gathered(self) -> None:
        """Let sharded layers gather their weights anew: rows have changed."""
        for module in sharded_modules(self._model):
            module.reshard()

    def wants_single_rows(self, steps: int = 1) -> bool:
        """Return whether scores need the gradient of each row by itself in one of the next steps."""
        return self.selection.observes_examples(steps)

    def backward_ready(self) -> None:
        """Score the row whose backward pass is over, where scores are of single rows."""
        if self.selection.observes_examples():
            self.selection.take_example()

    def _check_examples(self) -> None:
        """Refuse scores of single rows where ranks exchange gradients before anybody sees them."""
        if getattr(self.score, "per_example", False) and any(
            isinstance(weight, ShardedSparseWeight) for weight in self.weights
        ):
            raise ValueError(
                f"score={_name(self.score)} needs the gradient of each row, but FSDP2 averages those of all ranks "
                "first. Choose the weights on one device or under DDP, or take another score, such as snip."
            )

    def gradients_ready(self) -> None:
        """Give values the gradient of the step that is about to be made; a collective under sharding."""
        for weight in self.weights:
            weight.hand_out_gradient()

    def parameter_groups(self, parameters: list[nn.Parameter]) -> list[nn.Parameter]:
        """Leave out sharded weights, which require a gradient without being trained as a whole."""
        shards = {id(weight.shard) for weight in self.weights if isinstance(weight, ShardedSparseWeight)}
        return [parameter for parameter in parameters if id(parameter) not in shards]

    def synchronize(self) -> None:
        """Write values that have changed into the weights; each forward pass of the model begins with it.

        What was written to `values.data` outside of an optimiser step is not noticed.
        """
        for weight in self.weights:
            weight.write()

    def _before_forward(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.synchronize()
        if not torch.is_grad_enabled():
            return
        if self.selection.observes_examples():
            self.selection.take_example()  # of the pass before, in a loop that does not tell
            _check_single(args, kwargs)
        self.rounding.before_forward(self.weights[0].device.type, gathered_dtype(self._model))
        for weight in self.weights:
            weight.forget_unmade_step()
        if all(weight.values.grad is None for weight in self.weights):
            self.selection.forget_examples()  # of a step that was not made
        if module.training and not (self._is_watched or self._has_warned or self.selection.is_over):
            self._has_warned = True
            rank_zero_warn(
                "No optimiser is watched, so this sparse adapter never chooses its weights. Call "
                "adapter.watch(optimizer); CausalLMModule.configure_optimizers does it."
            )

    def remove(self) -> None:
        """Restore the base model bit for bit and let go of it; what was trainable before is so again."""
        self._hook.remove()
        for weight in self.weights:
            weight.remove()
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self.weights = []

    @property
    def deltas(self) -> dict[str, SparseDelta]:
        """What was learned, by parameter name."""
        return {weight.name: weight.delta for weight in self.weights}

    # ------------------------------------------------------------------ training

    def watch(self, optimizer: Optimizer, epoch: Callable[[], int] = lambda: 0) -> None:
        """Follow an optimiser: write after its steps, and choose weights when the schedule says so.

        Args:
            optimizer: Trains the values of all weights.
            epoch: Returns the number of the running epoch, from 0.

        Raises:
            ValueError: If it does not train all of them, or values are not float32.
        """

        def before(_: Optimizer, args: Any, kwargs: Any) -> Any:
            # torch hands over what `step` was called with, the optimiser first.
            closure = args[1] if len(args) > 1 else kwargs.get("closure")
            if closure is None:
                self._before_step(epoch())
                return None

            def closure_then_score() -> Any:
                result = closure()
                self._before_step(epoch())
                return result

            rest = {name: value for name, value in kwargs.items() if name != "closure"}
            return (args[0], closure_then_score), rest

        trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if missing := [weight.name for weight in self.weights if id(weight.values) not in trained]:
            raise ValueError(
                f"This optimiser does not train {len(missing)} of {len(self.weights)} weights of the sparse "
                f"adapter, {missing[0]} first. Give it all parameters that require gradients."
            )
        self._check_precision()
        self._is_watched = True
        optimizer.register_step_pre_hook(before)
        optimizer.register_step_post_hook(lambda *_: self._after_step(optimizer, epoch()))

    def take_resized(self) -> bool:
        """Return, once, whether values became new parameters since the last call."""
        resized, self.selection.resized = self.selection.resized, False
        return resized

    def _check_precision(self) -> None:
        if any(weight.values.dtype != torch.float32 for weight in self.weights):
            raise ValueError(
                "The values of a sparse adapter must stay float32. Set trainer.precision: 32-true and "
                "model.dtype: bfloat16 for a bfloat16 base model."
            )

    def _before_step(self, epoch: int) -> None:
        self._check_precision()
        if self.selection.resized and several_ranks():
            raise RuntimeError(
                "The choice of weights changed their number, and DDP does not exchange the gradients of the "
                "new parameters. Train through CausalLMModule.update, which tells it."
            )
        self.selection.before_step(epoch)

    def _after_step(self, optimizer: Optimizer, epoch: int) -> None:
        for weight in self.weights:
            weight.write(always=True)
        self.rounding.after_step(self.weights)  # before other entries are chosen
        self.selection.after_step(optimizer, epoch)
        self.choices = self.selection.choices
        self._forget_gathered()

    # ------------------------------------------------------------------ state and files

    def tensors(self) -> dict[str, Tensor]:
        """Return values and indices, and where the schedule stands.

        Returns:
            `<parameter>.values` float32 (K); `<parameter>.indices` int32 (K), absent in a dense phase; what
            the next choice needs: `<parameter>.scores`, `<parameter>.dropped`; and `schedule`: step, whether
            a choice was made, epoch.
        """
        selection = self.selection
        state = {_SCHEDULE: torch.tensor([selection.step, int(selection.was_chosen), selection.epoch])}
        for weight in self.weights:
            state[f"{weight.name}.values"] = weight.values.detach()
            if (indices := weight.indices) is not None:
                state[f"{weight.name}.indices"] = indices
        state |= {f"{name}.scores": score for name, score in selection.sums.items()}
        return state | {f"{name}.dropped": whole(last).flatten() for name, last in selection.dropped.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned; values and indices may have other lengths than now.

        Raises:
            ValueError: If it does not fit the model. Nothing is changed then.
        """
        found = {name.removesuffix(".values") for name in state if name.endswith(".values")}
        mine = {weight.name for weight in self.weights}
        if found != mine or _SCHEDULE not in state:
            raise ValueError(
                f"The checkpoint does not fit this adapter: {len(mine - found)} weights are missing "
                f"{sorted(mine - found)[:3]}, {len(found - mine)} are unknown {sorted(found - mine)[:3]}. "
                "Use the model and target_modules of the run that wrote it."
            )
        state = {name: read(source) for name, source in state.items()}
        parts = {
            weight: (state[f"{weight.name}.values"], state.get(f"{weight.name}.indices"))
            for weight in self.weights
        }
        for weight, (values, indices) in parts.items():
            size = weight.shape.numel()
            if indices is not None:
                check_delta(weight.name, indices, values, size)
            elif len(values) != size:
                raise ValueError(f"{weight.name}: {len(values)} values for a weight of {size} entries.")
        step, was_chosen, epoch = state[_SCHEDULE].tolist()
        self.selection.check(parts, step, bool(was_chosen), epoch)
        for weight, (values, indices) in parts.items():
            weight.put(indices, values)
        self._forget_gathered()
        self.selection.step, self.selection.was_chosen = step, bool(was_chosen)
        self.selection.prepare(epoch)
        self.selection.sums = self._per_weight(state, "scores")
        self.selection.dropped = self._per_weight(state, "dropped")

    def _per_weight(self, state: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
        found = {weight: state.get(f"{weight.name}.{kind}") for weight in self.weights}
        return {
            weight.name: weight.keep(tensor.to(weight.device, copy=True))
            for weight, tensor in found.items()
            if tensor is not None
        }

    def write(self, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
        """Write `adapter_config.json` and `adapter_model.safetensors`."""
        state = self.state_dict() if state is None else state
        if not self.selection.was_chosen:
            is_dense = any(weight.trains_all for weight in self.weights)
            what = "the change of all target weights" if is_dense else "an adapter that changes nothing"
            rank_zero_warn(f"The schedule has not chosen weights yet: {what} is written.")
        targets = self.target_modules
        config = {
            "base_model_name_or_path": getattr(getattr(self._model, "config", None), "_name_or_path", None),
            "density": self.density,
            "structure": self.structure,
            "block": self.block,
            "target_modules": targets if isinstance(targets, str) else sorted(targets),
            "fingerprint": self._fingerprint,
        }
        write_sparse(folder, [(weight.name, _delta(weight, state)) for weight in self.weights], config)


def _name(score: Score) -> str:
    return getattr(score, "__name__", type(score).__name__)


def _check_single(args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Check that a forward pass is of one row, whose gradient is scored by itself."""
    inputs = [one for one in (*args, *kwargs.values()) if isinstance(one, Tensor) and one.dim()]
    if inputs and len(inputs[0]) > 1:
        raise ValueError(
            f"A score of single examples, such as fisher, needs the gradient of each row by itself, and this forward "
            f"pass has {len(inputs[0])} rows. Run one row in each forward and backward pass in the steps before a "
            "choice, or train through SFTModule, SparseAdapterModule or GRPOModule, which do so."
        )


def _sparse_weight(name: str, weight: nn.Parameter, users: Sequence[nn.Module]) -> SparseWeight:
    if isinstance(weight, DTensor):
        return ShardedSparseWeight(name, weight, users)
    return SparseWeight(name, weight, users)


def _delta(weight: SparseWeight, state: Mapping[str, Tensor]) -> SparseDelta:
    """What was learned of a weight, as a whole state has it."""
    indices = state.get(f"{weight.name}.indices")
    if indices is None:
        indices = torch.arange(weight.shape.numel(), dtype=torch.int32)
    return SparseDelta(indices, state[f"{weight.name}.values"], tuple(weight.shape))
