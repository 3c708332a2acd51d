"""CausalLMModule: a language model, its tokenizer and an adapter, ready for any objective."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from peft import PeftConfig
from torch import Tensor, nn

from datamodules.batches import Prompt, TextBatch
from lightning_modules.adapters import Adapter, as_adapter
from lightning_modules.attention import prefer_blocks
from lightning_modules.chat import ChatTemplate
from lightning_modules.checkpoints import AdapterCheckpoints
from lightning_modules.distributed import gradient_exchange, rewrap
from lightning_modules.foreign_ranges import check_optimizer, check_trainer_of, rehearse
from lightning_modules.half_precision import watch_half_precision
from lightning_modules.hparams import plain_hparams
from lightning_modules.mapped_weights import cast, map_model
from lightning_modules.model_checks import (
    check_rows,
    check_vocabulary,
    context_length,
    pad_token,
    plain_outputs,
)
from lightning_modules.norms import make_norms_lean
from lightning_modules.precision import check_precision
from lightning_modules.ranges import check_number, check_whole
from lightning_modules.rope import see_rows_alone
from lightning_modules.row_lengths import check_lengths
from lightning_modules.sampling.base import Sampler
from lightning_modules.sharded_passes import ShardedPasses
from lightning_modules.sharding import norm_of
from lightning_modules.sources import (
    CHOOSING,
    check_choice,
    choose_model,
    load_config,
    load_model,
    load_tokenizer,
    written_choice,
)
from lightning_modules.text import encode_prompts

# Its one message here, that GGUF or adapter loading took place, repeats for every layer.
logging.getLogger("transformers.modeling_utils").setLevel(logging.ERROR)
logging.getLogger("transformers.distributed.tensor_parallel").setLevel(logging.ERROR)  # norms "not sharded"


class CausalLMModule(AdapterCheckpoints, ShardedPasses):
    """Base of all our modules: model source, tokenizer, adapter, optimiser, adapter-only checkpoints.

    Weights are loaded in `configure_model`, never in the constructor, so that a strategy can shard them and
    a configuration can be checked without them.

    Args:
        model: A hub id, a Hugging Face folder, a `.gguf` file, or `package:NAME` (a GGUF file inside an
            installed Python package).
        adapter: What is learned: None for every weight, any `peft.PeftConfig`, or an `Adapter`.
        optimizer: Callable that takes the trainable parameters and returns the optimiser.
        lr_scheduler: Callable that takes the optimiser and returns a scheduler, stepped after each update.
        dtype: Precision of the base weights. Adapters of PEFT stay in float32. Weights that are trained
            themselves (`adapter: null`) should be float32: a small update vanishes in bfloat16. How many weights of
            half precision stand still is measured at the first update, and there is a warning above 10%.
        attn_implementation: Attention of transformers (`sdpa`, `eager`, `flash_attention_2`, ...).
        gradient_checkpointing: Recompute activations in the backward pass: less memory, about a third slower.
        chat_template: Put string prompts into the tokenizer's chat template as one user turn. False feeds
            them as they are.
        chat_template_kwargs: Further variables of the chat template, such as `{"enable_thinking": False}`, wherever
            text is rendered: in training, validation and prediction.
        gradient_clip_val: Largest gradient norm of an update; None does not clip.
        model_kwargs: Further arguments of `AutoModelForCausalLM.from_pretrained`. Those that choose the model
            (`revision`, `subfolder`, `trust_remote_code`, `token`, ...) hold for configuration and tokenizer too.
        max_skipped_updates: How many updates in a row may be left out because a loss or gradient is NaN or infinite;
            they are counted as `train/nonfinite_updates`. One more stops the run; 0 stops at the first.
        overlong_rows: What becomes of rows that do not fit the model's context with their completion: `refuse` the
            first before training starts, or `drop` them and say how many.
    """

    def __init__(
        self,
        model: str,
        adapter: PeftConfig | Adapter | None = None,
        optimizer: OptimizerCallable = lambda parameters: torch.optim.AdamW(parameters, lr=1e-6),
        lr_scheduler: LRSchedulerCallable | None = None,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        attn_implementation: str = "sdpa",
        gradient_checkpointing: bool = False,
        chat_template: bool = True,
        chat_template_kwargs: dict[str, Any] | None = None,
        gradient_clip_val: float | None = 1.0,
        model_kwargs: dict[str, Any] | None = None,
        max_skipped_updates: int = 0,
        overlong_rows: Literal["refuse", "drop"] = "refuse",
    ) -> None:
        super().__init__()
        check_number("gradient_clip_val", gradient_clip_val, above=0, none=True, hint="null does not clip.")
        check_whole("max_skipped_updates", max_skipped_updates, least=0, hint="0 stops at the first.")
        rehearse(optimizer, lr_scheduler)
        self.save_hyperparameters(logger=False)
        if "_instantiator" not in self.hparams:
            self._make_hparams_plain()
        self.source = model
        self.adapter = as_adapter(adapter)
        self._optimizer = optimizer
        self._lr_scheduler = lr_scheduler
        self.weights_dtype: torch.dtype = getattr(torch, dtype)
        self._attn_implementation = attn_implementation
        self._gradient_checkpointing = gradient_checkpointing
        self._chat_template = chat_template
        self._chat_template_kwargs = chat_template_kwargs or {}
        if self._chat_template_kwargs and not chat_template:
            raise ValueError(
                f"chat_template_kwargs={chat_template_kwargs} need the chat template. Set chat_template: true, or "
                "leave them out."
            )
        self.chat: ChatTemplate | None = None
        self.gradient_clip_val = gradient_clip_val
        self._model_kwargs = model_kwargs or {}
        self.max_skipped_updates = max_skipped_updates
        self.overlong_rows = overlong_rows
        self.nonfinite_updates = 0
        self._nonfinite_in_a_row = 0
        self.model: nn.Module | None = None
        self.tokenizer: Any = None

    def _make_hparams_plain(self) -> None:
        """Keep what a checkpoint can hold, in the form from which LightningCLI rebuilds the module."""
        hparams, self.left_out = plain_hparams(self.hparams)
        self.hparams.clear()
        self.hparams.update(
            hparams,
            _class_path=f"{type(self).__module__}.{type(self).__qualname__}",
            _instantiator="lightning.pytorch.cli.instantiate_module",
        )

    def setup(self, stage: str) -> None:
        """Check the Trainer's numbers, before anything is loaded.

        Raises:
            ValueError: If one is out of range.
        """
        check_trainer_of(self.trainer)
        super().setup(stage)

    # ------------------------------------------------------------------ model

    def configure_model(self) -> None:
        """Load tokenizer and weights and attach the adapter. Does nothing when they are there already.

        Raises:
            ValueError: If the model source lacks weights or a tokenizer, a chat template is asked for that the
                tokenizer does not have, it does not read one of `chat_template_kwargs`, or the precision of the Trainer
                is not supported.
        """
        if self.model is not None:
            return
        compute_dtype = self.compute_dtype  # before anything is loaded: it checks the Trainer's
        self.tokenizer = load_tokenizer(self.source, self._model_kwargs)
        config = load_config(self.source, self._model_kwargs)
        if config.is_encoder_decoder:
            raise ValueError(
                f"model={self.source!r} has an encoder and a decoder ({config.model_type}), and what is trained here "
                "are causal language models. Take a decoder-only model."
            )
        check_vocabulary(self.tokenizer, config, self.source)
        self.chat = self._make_chat()
        base = self._load_base()
        plain_outputs(base.config)
        if self.sharding is None:  # else weights may not be in memory yet
            check_rows(base, self.source)
        # Without this a head that reads a slice of positions multiplies in batches, which on CPU copies the
        # weights of the head once per row: half the time of a short rollout.
        base.get_output_embeddings().register_forward_pre_hook(_contiguous)
        prefer_blocks(base)
        make_norms_lean(base)
        see_rows_alone(base)
        self.adapter.source, self.adapter.choice = written_choice(self.source, self._model_kwargs)
        if self.adapter.draws_by_purpose and self._trainer is not None and self.trainer.training:
            self.adapter.purpose = purpose_of(getattr(self.trainer, "datamodule", None))
        self.adapter.compute_dtype = compute_dtype
        self.model = self._attach(base)
        # No buffer changes in training unless all ranks change it alike; DDP would send them at each forward.
        self._ddp_params_and_buffers_to_ignore = [name for name, _ in self.named_buffers()]
        if self._gradient_checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": False})
        self.model.train()

    def _make_chat(self) -> ChatTemplate | None:
        if not self._chat_template:
            return None
        if self.tokenizer.chat_template is None:
            raise ValueError(
                f"model={self.source!r}: the tokenizer has no chat template. Set chat_template: false to "
                "feed prompts as they are, or use an instruction-tuned model."
            )
        return ChatTemplate(self.tokenizer, self._chat_template_kwargs, self.source)

    def _load_base(self) -> Any:
        """Load the base model; for sharding, and where its files allow it, only where they are."""
        options: dict[str, Any] = {
            "dtype": self.weights_dtype,
            "attn_implementation": self._attn_implementation,
        }
        if self.sharding is not None:
            place, choice = choose_model(self.source, self._model_kwargs)
            others = {name: value for name, value in self._model_kwargs.items() if name not in CHOOSING}
            base = map_model(place, **options, model_kwargs={**others, **choice})
            if base is not None:
                return base
        return load_model(self.source, self._model_kwargs, **options)

    def _attach(self, base: nn.Module) -> nn.Module:
        """Attach the adapter, and shard where the strategy does."""
        if self.sharding is None:
            return self.adapter.attach(base)
        prepare = cast({id(parameter): parameter for parameter in base.parameters()}, self.weights_dtype)
        if self.adapter.joins_shards:
            self.sharding.shard(base, prepare)
            return self.adapter.attach(base)
        if self.adapter.reads_weights:
            prepare(base)
        model = self.adapter.attach(base)
        self.sharding.shard(base, prepare)
        return model

    def check_source(self) -> None:
        """Check that the model source is usable, without loading it.

        Raises:
            ValueError: If a folder, file or package is missing or lacks weights or a tokenizer.
        """
        check_choice(self.source, self._model_kwargs)

    @property
    def context_length(self) -> int | None:
        """The most tokens that prompt and completion may have together; None where the model sets no limit."""
        return context_length(self.text_config)

    @property
    def compute_dtype(self) -> torch.dtype:
        """Type in which the base model computes: that of mixed precision, or else of its weights.

        Raises:
            ValueError: If the precision of the Trainer is not supported.
        """
        if self._trainer is not None and check_precision(self.trainer.precision):
            return torch.bfloat16
        sharded = None if self.sharding is None else self.sharding.mp_policy.param_dtype
        return sharded or self.weights_dtype

    def bind_sampler(self, sampler: Sampler) -> None:
        """Hand the model to a sampler."""
        assert self.model is not None, "configure_model has not run"
        sampler.compute_dtype = self.compute_dtype
        sampler.bind(self.model, self.tokenizer)

    @property
    def text_config(self) -> Any:
        """The transformers configuration of the language model."""
        assert self.model is not None, "configure_model has not run"
        return self.model.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]

    @property
    def pad_token_id(self) -> int:
        """The id that fills unused positions. Masks, not ids, say what counts."""
        return pad_token(self.tokenizer)

    # ------------------------------------------------------------------ text

    def encode_prompts(
        self, prompts: Sequence[Prompt], *, room: int | Sequence[int], uids: Sequence[int] | None = None
    ) -> list[list[int]]:
        """Tokenise prompts, through the chat template where it is on.

        Args:
            prompts: Strings or conversations.
            room: Tokens that must stay free after a prompt for its completion; the same for all, or one for each.
            uids: Numbers of the rows in their data set, for messages.

        Returns:
            Token ids of each prompt, unpadded.

        Raises:
            ValueError: If a prompt is empty, does not fit the context, is refused by the template, or is a
                conversation while `chat_template` is off.
        """
        context = self.context_length
        rooms = [room] * len(prompts) if isinstance(room, int) else room
        limits = None if context is None else [context - own for own in rooms]
        return encode_prompts(self.tokenizer, prompts, chat=self.chat, limits=limits, uids=uids)

    def tokens_needed(self, batch: TextBatch, split: str) -> list[tuple[int, int]]:
        """Return the tokens of each row's prompt, and those that may come after it; a subclass knows its own.

        Args:
            batch: Rows (B).
            split: `train` or `val`.

        Returns:
            (B); by default nothing comes after a prompt.
        """
        return [(length, 0) for length in self._lengths(batch)]

    def _lengths(self, batch: TextBatch) -> list[int]:
        """Tokens of each prompt, whatever the context."""
        encoded = encode_prompts(self.tokenizer, batch.prompts, chat=self.chat, uids=batch.uids)
        return [len(ids) for ids in encoded]

    def _check_lengths(self) -> None:
        """Find rows beyond the context before the first step, where the DataModule can tell all of them."""
        data: Any = getattr(self.trainer, "datamodule", None)
        limit = self.context_length
        if limit is None or not hasattr(data, "leave_out"):
            return
        settings = (getattr(self, name, None) for name in ("sampling", "val_sampling"))
        room = max((one.max_new_tokens for one in settings if one is not None), default=0)
        splits = ("train",) if self.trainer.limit_val_batches == 0 else ("train", "val")
        for split in splits:
            needed = partial(self.tokens_needed, split=split)
            check_lengths(data, split, needed, limit, room=room, drops=self.overlong_rows == "drop")

    # ------------------------------------------------------------------ training

    def configure_optimizers(self) -> Any:
        """Build optimiser and scheduler over the trainable parameters.

        Raises:
            ValueError: If the scheduler needs a metric, which an update does not have.
        """
        optimizer = self._optimizer(self._groups())
        check_optimizer(optimizer)
        self.adapter.watch(optimizer, lambda: self.current_epoch)
        if self._lr_scheduler is None:
            return optimizer
        scheduler = self._lr_scheduler(optimizer)
        if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            raise ValueError(
                "lr_scheduler=ReduceLROnPlateau needs a metric at each step, but is stepped after each "
                "update. Use a schedule over steps, such as torch.optim.lr_scheduler.LinearLR."
            )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _groups(self) -> list[nn.Parameter] | list[dict[str, Any]]:
        return self.adapter.parameter_groups([p for p in self.parameters() if p.requires_grad])

    def trained_parameters(self) -> list[nn.Parameter]:
        """Return what the optimiser trains."""
        return [
            p for group in self._groups() for p in (group["params"] if isinstance(group, dict) else [group])
        ]

    def update(self, losses: Sequence[Callable[[], Tensor]]) -> Tensor:
        """Make one optimiser update from several micro-batches, for modules with manual optimisation.

        Every rank must call this the same number of times, with at least one loss; the numbers of losses may
        differ, except under sharding, where `in_step` makes them equal. Gradients are exchanged once.

        Args:
            losses: Each runs a forward pass and returns the micro-batch's share of the loss. Ranks average
                their gradients, so a share is divided by (denominator of the whole update / world size).

        Returns:
            The gradient norm before clipping; NaN or infinite where the update was left out.

        Raises:
            RuntimeError: If it is not finite more than `max_skipped_updates` times in a row. The weights are as
                before.
        """
        for i, loss in enumerate(losses):
            share = loss()
            with gradient_exchange(self.trainer.strategy, enabled=i == len(losses) - 1):
                self.manual_backward(share)
            self.adapter.backward_ready()
        self.adapter.gradients_ready()
        norm = self.clip_gradients_in_place().detach()
        optimizer, scheduler = self.optimizers(), self.lr_schedulers()
        if not bool(norm.isfinite()):
            self._leave_out(norm)
        else:
            self._nonfinite_in_a_row = 0
            optimizer.step()  # type: ignore[union-attr]
            if scheduler is not None:
                scheduler.step()  # type: ignore[union-attr, call-arg]
                check_optimizer(optimizer)  # a negative learning rate would ascend
        optimizer.zero_grad()  # type: ignore[union-attr]
        if self.adapter.take_resized():
            rewrap(self.trainer.strategy)
        return norm

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log how many updates were left out, also in steps without any."""
        self.log("train/nonfinite_updates", float(self.nonfinite_updates), batch_size=1)

    def _leave_out(self, norm: Tensor) -> None:
        """Count an update without a usable gradient, the same on every rank, or stop."""
        self.nonfinite_updates += 1
        self._nonfinite_in_a_row += 1
        if self._nonfinite_in_a_row > self.max_skipped_updates:
            raise RuntimeError(
                f"The gradient is not finite (its norm is {float(norm)}{self.nonfinite_source()}) for the "
                f"{self._nonfinite_in_a_row}. time in a row. The weights are as before. Lower the learning rate, "
                "look at the rows of this step, or set max_skipped_updates to leave such updates out."
            )
        rank_zero_warn(f"An update is left out: its gradient norm is {float(norm)}{self.nonfinite_source()}.")
        self.count_step_without_update()

    def nonfinite_source(self) -> str:
        """Say where a gradient that is not finite comes from, as far as a subclass knows."""
        return ""

    def count_step_without_update(self) -> None:
        """Advance Lightning's step counter, so that `max_steps` ends a run that updates nothing."""
        progress = self.trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
        progress.increment_ready()
        progress.increment_completed()

    def counters(self) -> Mapping[str, int]:
        """Return the running counts."""
        return {"nonfinite_updates": self.nonfinite_updates}

    def load_counters(self, counters: Mapping[str, int]) -> None:
        """Continue the running counts."""
        self.nonfinite_updates = counters.get("nonfinite_updates", 0)

    def clip_gradients_in_place(self) -> Tensor:
        """Scale the gradients of an update down to `gradient_clip_val`.

        Returns:
            Their norm before, over all ranks.
        """
        trained = [p for p in self.parameters() if p.grad is not None]
        norm = norm_of([p.grad for p in trained if p.grad is not None])
        if self.gradient_clip_val is not None:
            torch.nn.utils.clip_grads_with_norm_(trained, self.gradient_clip_val, norm)
        return norm

    def route(self, batch: TextBatch, rows: Sequence[int]) -> None:
        """Tell the adapter which rows come next, for adapters that treat tasks or prompts differently.

        Args:
            batch: A batch.
            rows: Positions in it.
        """
        self.adapter.route([batch.tasks[row] for row in rows], [batch.prompts[row] for row in rows])

    def on_train_start(self) -> None:
        """Watch what half precision takes from the first update."""
        super().on_train_start()
        for optimizer in self.trainer.optimizers:
            watch_half_precision(optimizer)

    def on_fit_start(self) -> None:
        """Look at the lengths of rows, and write the hyper-parameters to the loggers.

        Raises:
            ValueError: If a row does not fit the context.
        """
        self._check_lengths()
        hparams = {name: value for name, value in self.hparams.items() if not name.startswith("_")}
        for logger in self.loggers:
            logger.log_hyperparams({"model": hparams})

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
        """Call the model with its adapter.

        Args:
            input_ids: Token ids (B, S).
            **kwargs: Further arguments of the transformers model.

        Returns:
            The output of the transformers model.
        """
        assert self.model is not None, "configure_model has not run"
        return self.model(input_ids=input_ids, **kwargs)


def purpose_of(datamodule: Any) -> str:
    """Tell training data apart: by the names of their tasks, their number and some of their prompts.

    Args:
        datamodule: One of ours; of any other making nothing is known.
    """
    if not all(hasattr(datamodule, name) for name in ("task_names", "num_rows", "examples")):
        return ""
    tasks = datamodule.task_names("train")
    return repr((tasks, datamodule.num_rows("train"), datamodule.examples(tasks, 8)))


def _contiguous(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:  # noqa: ARG001
    """Forward pre-hook: hand contiguous inputs to a module."""
    return (arguments[0].contiguous(), *arguments[1:])
