"""CausalLMModule: a language model, its tokenizer and an adapter, ready for any objective."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import lightning.pytorch as lightning
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from peft import PeftConfig
from torch import Tensor, nn

from datamodules.batches import Prompt, TextBatch
from lightning_modules.adapters import Adapter, as_adapter
from lightning_modules.distributed import gathered, gradient_exchange, rng_state, set_rng_state
from lightning_modules.hparams import plain_hparams
from lightning_modules.optimizers import override_restored, settings
from lightning_modules.sources import check_model, resolve_model

# Its one message here, that GGUF or adapter loading took place, repeats for every layer.
logging.getLogger("transformers.modeling_utils").setLevel(logging.ERROR)
logging.getLogger("transformers.distributed.tensor_parallel").setLevel(logging.ERROR)  # norms "not sharded"


class CausalLMModule(lightning.LightningModule):
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
            themselves (`adapter: null`) should be float32: a small update vanishes in bfloat16.
        attn_implementation: Attention of transformers (`sdpa`, `eager`, `flash_attention_2`, ...).
        gradient_checkpointing: Recompute activations in the backward pass: less memory, about a third slower.
        chat_template: Put string prompts into the tokenizer's chat template as one user turn. False feeds
            them as they are.
        gradient_clip_val: Largest gradient norm of an update; None does not clip.
        model_kwargs: Further arguments of `AutoModelForCausalLM.from_pretrained`.
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
        gradient_clip_val: float | None = 1.0,
        model_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        if "_instantiator" not in self.hparams:
            self._make_hparams_plain()
        self.strict_loading = False  # checkpoints hold the adapter only; `on_load_checkpoint` checks it
        self.source = model
        self.adapter = as_adapter(adapter)
        self._optimizer = optimizer
        self._lr_scheduler = lr_scheduler
        self.weights_dtype: torch.dtype = getattr(torch, dtype)
        self._attn_implementation = attn_implementation
        self._gradient_checkpointing = gradient_checkpointing
        self._chat_template = chat_template
        self.gradient_clip_val = gradient_clip_val
        self._model_kwargs = model_kwargs or {}
        self._pending_rng: list[dict[str, Any]] | None = None
        self._saved_settings: list[dict[str, Any]] = []
        self.model: nn.Module | None = None
        self.tokenizer: Any = None

    def _make_hparams_plain(self) -> None:
        """Keep what a checkpoint can hold, in the form from which LightningCLI rebuilds the module."""
        hparams = plain_hparams(self.hparams)
        self.hparams.clear()
        self.hparams.update(
            hparams,
            _class_path=f"{type(self).__module__}.{type(self).__qualname__}",
            _instantiator="lightning.pytorch.cli.instantiate_module",
        )

    # ------------------------------------------------------------------ model

    def configure_model(self) -> None:
        """Load tokenizer and weights and attach the adapter. Does nothing when they are there already.

        Raises:
            ValueError: If the model source lacks weights or a tokenizer, or a chat template is asked for
                that the tokenizer does not have.
        """
        if self.model is not None:
            return
        from transformers import AutoModelForCausalLM, AutoTokenizer

        place = resolve_model(self.source)
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(place)
            base = AutoModelForCausalLM.from_pretrained(
                place,
                dtype=self.weights_dtype,
                attn_implementation=self._attn_implementation,
                **self._model_kwargs,
            )
        except OSError as error:
            raise ValueError(f"model={self.source!r} cannot be loaded. {error}") from error
        if self._chat_template and self.tokenizer.chat_template is None:
            raise ValueError(
                f"model={self.source!r}: the tokenizer has no chat template. Set chat_template: false to "
                "feed prompts as they are, or use an instruction-tuned model."
            )
        # Without this a head that reads a slice of positions multiplies in batches, which on CPU copies the
        # weights of the head once per row: half the time of a short rollout.
        base.get_output_embeddings().register_forward_pre_hook(_contiguous)
        self.model = self.adapter.attach(base)
        if self._gradient_checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": False})
        self.model.train()

    def check_source(self) -> None:
        """Check that the model source is usable, without loading it.

        Raises:
            ValueError: If a folder, file or package is missing or lacks weights or a tokenizer.
        """
        check_model(self.source)

    @property
    def context_length(self) -> int:
        """The most tokens that prompt and completion may have together."""
        return int(self.text_config.max_position_embeddings)

    @property
    def text_config(self) -> Any:
        """The transformers configuration of the language model."""
        assert self.model is not None, "configure_model has not run"
        return self.model.config.get_text_config()  # type: ignore[union-attr, operator]

    @property
    def pad_token_id(self) -> int:
        """The id that fills unused positions. Masks, not ids, say what counts."""
        pad, end = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        return int(end if pad is None else pad)

    # ------------------------------------------------------------------ text

    def encode_prompts(
        self, prompts: Sequence[Prompt], *, room: int, uids: Sequence[int] | None = None
    ) -> list[list[int]]:
        """Tokenise prompts, through the chat template where it is on.

        Args:
            prompts: Strings or conversations.
            room: Tokens that must stay free after the prompt for its completion.
            uids: Numbers of the rows in their data set, for messages.

        Returns:
            Token ids of each prompt, unpadded.

        Raises:
            ValueError: If a prompt is empty, does not fit the context, or is a conversation while
                `chat_template` is off.
        """
        texts = [self._prompt_text(prompt) for prompt in prompts]
        # A chat template writes the special tokens itself.
        encoded = self.tokenizer(texts, add_special_tokens=not self._chat_template)["input_ids"]
        for i, (text, ids) in enumerate(zip(texts, encoded, strict=True)):
            row = "A row's prompt" if uids is None else f"Row {uids[i]} of the data: its prompt"
            if not ids:
                raise ValueError(f"{row} has no tokens. Remove empty prompts from the data.")
            if len(ids) + room > self.context_length:
                raise ValueError(
                    f"{row} has {len(ids)} tokens; with {room} new tokens it does not fit the context of "
                    f"{self.context_length} tokens: {text[:60]!r}... Shorten or drop it, or lower "
                    "max_new_tokens."
                )
        return list(encoded)

    def _prompt_text(self, prompt: Prompt) -> str:
        if self._chat_template:
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            text: str = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
            return text
        if not isinstance(prompt, str):
            raise ValueError(
                "The data holds conversations but chat_template is false. Set chat_template: true, or give "
                "plain string prompts."
            )
        return prompt

    # ------------------------------------------------------------------ training

    def configure_optimizers(self) -> Any:
        """Build optimiser and scheduler over the trainable parameters."""
        optimizer = self._optimizer([p for p in self.parameters() if p.requires_grad])
        if self._lr_scheduler is None:
            return optimizer
        scheduler = {"scheduler": self._lr_scheduler(optimizer), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def update(self, losses: Sequence[Callable[[], Tensor]]) -> Tensor:
        """Make one optimiser update from several micro-batches, for modules with manual optimisation.

        Every rank must call this the same number of times, with at least one loss; the numbers of losses may
        differ. Gradients are exchanged once.

        Args:
            losses: Each runs a forward pass and returns the micro-batch's share of the loss. Ranks average
                their gradients, so a share is divided by (denominator of the whole update / world size).

        Returns:
            The gradient norm before clipping.

        Raises:
            RuntimeError: If the norm is not finite. The weights are as before.
        """
        for i, loss in enumerate(losses):
            share = loss()
            with gradient_exchange(self.trainer.strategy, enabled=i == len(losses) - 1):
                self.manual_backward(share)
        limit = float("inf") if self.gradient_clip_val is None else self.gradient_clip_val
        trained = [p for p in self.parameters() if p.requires_grad]
        norm = torch.nn.utils.clip_grad_norm_(trained, limit, error_if_nonfinite=True)
        optimizer, scheduler = self.optimizers(), self.lr_schedulers()
        optimizer.step()  # type: ignore[union-attr]
        optimizer.zero_grad()  # type: ignore[union-attr]
        if scheduler is not None:
            scheduler.step()  # type: ignore[union-attr, call-arg]
        return norm.detach()

    def on_fit_start(self) -> None:
        """Write the hyper-parameters to the loggers."""
        hparams = {name: value for name, value in self.hparams.items() if not name.startswith("_")}
        for logger in self.loggers:
            logger.log_hyperparams({"model": hparams})

    def on_train_start(self) -> None:
        """Finish a resume: the configuration's optimiser settings win, then random states come back.

        Random states last, after everything that draws at start-up.
        """
        for optimizer, saved in zip(self.trainer.optimizers, self._saved_settings, strict=False):
            for change in override_restored(optimizer, saved, self.lr_schedulers()):
                rank_zero_warn(f"{change}: going on with the configuration's.")
        self._saved_settings = []
        # A rank that the earlier run did not have keeps its seeded state.
        if self._pending_rng is not None and self.global_rank < len(self._pending_rng):
            set_rng_state(self._pending_rng[self.global_rank])
        self._pending_rng = None

    def on_validation_start(self) -> None:
        """Give validation random numbers of its own.

        So it neither changes the course of training, however often it runs, nor differs between runs for
        another reason than the policy.
        """
        self._training_rng = rng_state()
        torch.manual_seed(self.global_rank)

    def on_validation_end(self) -> None:
        """Give training its random numbers back."""
        set_rng_state(self._training_rng)

    # ------------------------------------------------------------------ checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep only what was learned, and add what an exact resume needs."""
        checkpoint["state_dict"] = self.adapter.state_dict()
        checkpoint["optimizer_settings"] = [settings(one) for one in self.trainer.optimizers]
        checkpoint["rng_states"] = gathered(rng_state())
        checkpoint["counters"] = dict(self.counters())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore what `on_save_checkpoint` kept.

        Raises:
            ValueError: If the checkpoint does not fit model and adapter.
        """
        self.adapter.load_state_dict(checkpoint["state_dict"])
        checkpoint["state_dict"] = {}  # done; nothing is left for Lightning to load
        self._saved_settings = checkpoint.get("optimizer_settings", [])
        self._pending_rng = checkpoint.get("rng_states")
        self.load_counters(checkpoint.get("counters", {}))

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load weights by name; the empty dict that `on_load_checkpoint` leaves loads nothing."""
        if not state_dict:
            return nn.modules.module._IncompatibleKeys([], [])
        return super().load_state_dict(state_dict, strict, assign)

    def counters(self) -> Mapping[str, int]:
        """Return counts that a resumed run must continue from. A subclass with counts overrides this."""
        return {}

    def load_counters(self, counters: Mapping[str, int]) -> None:
        """Restore what `counters` returned."""

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


def _contiguous(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:  # noqa: ARG001
    """Forward pre-hook: hand contiguous inputs to a module."""
    return (arguments[0].contiguous(), *arguments[1:])


def prediction_rows(batch: TextBatch, completions: Sequence[str]) -> list[dict[str, Any]]:
    """Return what `predict` gives for a batch: one dict of `uid`, `prompt` and `completion` per row."""
    rows = zip(batch.uids, batch.prompts, completions, strict=True)
    return [{"uid": uid, "prompt": prompt, "completion": text} for uid, prompt, text in rows]
