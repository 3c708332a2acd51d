"""SFTModule: supervised fine-tuning on answers.

Shapes: B rows of a batch, T answer tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torchmetrics.functional.text import rouge_score

from datamodules.batches import Answer, Prompt, TextBatch
from lightning_modules.causal_lm import CausalLMModule
from lightning_modules.distributed import all_sum
from lightning_modules.headless import chunked_logprobs, try_chunked
from lightning_modules.logprobs import completion_logits, token_logprobs
from lightning_modules.microbatches import pad_rows, plan_micro_batches, sent, within_width
from lightning_modules.ranges import check_whole
from lightning_modules.sampling import GenerateSampler, Sampler, Sampling
from lightning_modules.sampling.stops import end_tokens
from lightning_modules.sharding import is_whole
from lightning_modules.text import encode_answers, prediction_rows


class MicroBatch(NamedTuple):
    """Rows that go through the model together.

    Attributes:
        rows: Their positions in the batch (b).
        prompts: Token ids (b).
        answers: Token ids of what they add to their prompts, the end of the turn included (b).
        counts: Whether it does; else it only takes part in what all ranks do together.
    """

    rows: list[int]
    prompts: list[list[int]]
    answers: list[list[int]]
    counts: bool = True

    def as_filler(self) -> MicroBatch:
        """Return its last row, counting nothing."""
        return MicroBatch(self.rows[-1:], self.prompts[-1:], self.answers[-1:], counts=False)


class SFTModule(CausalLMModule):
    """Cross-entropy on answer tokens, the end of the turn included; prompts are read, not learned.

    With a chat template, answer tokens are all that the template writes for the answered conversation after what it
    writes for the prompt: its own end of a turn, and an empty block of reasoning where it puts one. The loss is the
    mean over all answer tokens of the optimiser step, over micro-batches and ranks, so neither the split nor the
    padding changes the gradient. Validation logs `val/loss`, and over rows without `choices` the greedy answer's
    `val/exact_match` and `val/rouge_l`, compared with the gold answer as the data has it or as the template writes it,
    whichever is nearer; over rows with `choices` `val/choice_accuracy`, where the choice of the highest mean
    log-probability per token is the answer.

    Args:
        max_tokens_per_microbatch: Token budget of one forward and backward pass. Does not change gradients.
        sampling: How validation generates.
        sampler: Who generates; default `GenerateSampler`.
        **kwargs: Arguments of `CausalLMModule`.
    """

    def __init__(
        self,
        max_tokens_per_microbatch: int = 4096,
        sampling: Sampling = Sampling(max_new_tokens=64, temperature=0.0),  # noqa: B008  frozen
        sampler: Sampler | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_whole("max_tokens_per_microbatch", max_tokens_per_microbatch)
        self.automatic_optimization = False
        self.max_tokens_per_microbatch = max_tokens_per_microbatch
        self.sampling = sampling
        self.sampler = sampler or GenerateSampler()
        self._logits_are_kept: dict[bool, bool] = {}

    def configure_model(self) -> None:
        """Load the model and hand it to the sampler."""
        super().configure_model()
        self.bind_sampler(self.sampler)
        self._warn_of_open_ends()

    def _warn_of_open_ends(self) -> None:
        """Say so where the template ends a turn with something at which generation does not stop."""
        assert self.model is not None
        try:
            [ids] = self.encode_answers(["4"])
        except ValueError:  # the template asks more of an answer
            return
        ends = end_tokens(self.model, self.tokenizer)
        written = self.tokenizer.decode(ids)
        if (
            self.chat is not None
            and not set(ids) & set(ends)
            and not any(s in written for s in self.sampling.stop)
        ):
            rank_zero_warn(
                f"The chat template writes the answer '4' as {written!r}, without a token at which generation stops "
                f"({self.tokenizer.convert_ids_to_tokens(ends)}), so validation generates past the answer. Set "
                "sampling.stop, or eos_token_id in the model's generation_config.json."
            )

    def on_validation_start(self) -> None:
        """Bring the sampler up to date here, where all ranks are: they may have different numbers of batches."""
        self.sampler.sync(self.global_step, self.adapter.save)
        super().on_validation_start()

    def encode_answers(
        self,
        answers: Sequence[Answer],
        prompts: Sequence[Prompt] | None = None,
        *,
        uids: Sequence[int] | None = None,
    ) -> list[list[int]]:
        """Tokenise what answers add to their prompts, the end of the turn included, as the chat template writes it.

        Args:
            answers: Texts, or assistants' messages.
            prompts: The prompt of each; None takes one user turn for all, which is the same for templates that write
                an answer alike after any prompt.
            uids: Numbers of the rows in their data set, for messages.

        Raises:
            ValueError: If an answer is empty, or the template does not write it after its prompt.
        """
        return encode_answers(self.tokenizer, answers, prompts, chat=self.chat, uids=uids)

    def _logprobs(self, prompts: Sequence[list[int]], answers: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
        """Log-probabilities and mask of answer tokens (b, T), of rows that the adapter has heard of."""
        assert self.model is not None
        rows = pad_rows(prompts, answers, pad_token_id=self.pad_token_id, device=self.device)
        # What a rank finds out while it has the whole model for itself, the others need not know: they run it in step.
        whole = is_whole(self.model)
        if whole not in self._logits_are_kept:
            found = try_chunked(self, rows, temperature=1.0)
            self._logits_are_kept[whole] = isinstance(found, str)
            if not isinstance(found, str):
                return found[0], rows.completion_mask
        if not self._logits_are_kept[whole]:
            return chunked_logprobs(self, rows, temperature=1.0)[0], rows.completion_mask
        T = rows.completion_mask.shape[1]
        logits_BTV = completion_logits(self, rows.input_ids, rows.attention_mask, T, temperature=1.0)
        return token_logprobs(logits_BTV, rows.input_ids[:, -T:]), rows.completion_mask

    def tokens_needed(self, batch: TextBatch, split: str) -> list[tuple[int, int]]:
        """Return the tokens of each row's prompt, and of its longest answer; in validation, also of a drawn one."""
        needed = []
        for i, prompt in enumerate(self._lengths(batch)):
            answers = [batch.answers[i], *(batch.choices[i] if split == "val" else [])]
            rest = self.encode_answers(
                answers, [batch.prompts[i]] * len(answers), uids=[batch.uids[i]] * len(answers)
            )
            drawn = self.sampling.max_new_tokens if split == "val" and not batch.choices[i] else 0
            needed.append((prompt, max(*map(len, rest), drawn)))
        return needed

    def _micro_batches(self, batch: TextBatch, *, single: bool = False) -> list[MicroBatch]:
        """Tokenised prompts and answers, grouped within the token budget, or one by one."""
        answers = self.encode_answers(batch.answers, batch.prompts, uids=batch.uids)
        prompts = self.encode_prompts(batch.prompts, room=[*map(len, answers)], uids=batch.uids)
        pairs = [(len(prompt), len(answer)) for prompt, answer in zip(prompts, answers, strict=True)]
        context = self.context_length
        budget = 1 if single else self.max_tokens_per_microbatch
        return [
            MicroBatch(rows, [prompts[i] for i in rows], [answers[i] for i in rows])
            for group in plan_micro_batches([sum(pair) for pair in pairs], budget)
            for rows in ([group] if context is None else within_width(group, pairs, context))
        ]

    def training_step(self, batch: TextBatch, batch_idx: int) -> None:
        """One update from one batch."""
        own = self._micro_batches(batch, single=self.adapter.wants_single_rows())
        tokens_B = torch.zeros(len(batch))
        for rows, _, answers, _ in own:
            tokens_B[rows] = torch.tensor([float(len(answer)) for answer in answers])
        count = all_sum(self.trainer.strategy, tokens_B.sum())
        weights_B = self.row_weights(batch, tokens_B) * self.trainer.world_size
        losses: list[Tensor] = []

        def share(micro_batch: MicroBatch) -> Tensor:
            self.route(batch, micro_batch.rows)
            logprobs_BT, mask_BT = self._logprobs(micro_batch.prompts, micro_batch.answers)
            losses_B = -(logprobs_BT * mask_BT).sum(1) * micro_batch.counts
            losses.append(losses_B.detach().sum())
            return (losses_B * sent(weights_B[micro_batch.rows].to(losses_B.dtype), losses_B.device)).sum()

        micro_batches = self.in_step(own, own[-1].as_filler)
        norm = self.update([partial(share, micro_batch) for micro_batch in micro_batches])
        loss = all_sum(self.trainer.strategy, torch.stack(losses).sum()) / count
        self.log("train/loss", loss, prog_bar=True, batch_size=1)
        self.log("train/grad_norm", norm, batch_size=1)
        self.log("train/answer_tokens", float(count), batch_size=1)

    def row_weights(self, batch: TextBatch, tokens_B: Tensor) -> Tensor:
        """Return the weight of each row's summed cross-entropy in the loss of the update.

        The same for all rows here, so that the loss is the mean over all answer tokens of all ranks. A subclass
        may weigh rows differently.

        Args:
            batch: The rows of this rank (B).
            tokens_B: Answer tokens of each row (B).

        Returns:
            (B).
        """
        return (1 / all_sum(self.trainer.strategy, tokens_B.sum()).cpu()).expand(len(batch))

    def evaluation_metrics(self) -> Sequence[str]:
        """Name the metrics of validation."""
        return ("loss", "exact_match", "rouge_l", "choice_accuracy")

    def validation_step(self, batch: TextBatch, batch_idx: int) -> Mapping[str, Any]:
        """Add a batch to the epoch's loss and metrics.

        Returns:
            `predictions`: the greedy answer of each row without choices, else the chosen one (B).
        """
        own = self._micro_batches(batch)
        written = {
            row: self._text(ids) for part in own for row, ids in zip(part.rows, part.answers, strict=True)
        }
        for micro_batch in self.in_step(own, own[-1].as_filler):
            self.route(batch, micro_batch.rows)
            logprobs_BT, mask_BT = self._logprobs(micro_batch.prompts, micro_batch.answers)
            if not micro_batch.counts:
                continue
            for row, logprobs_T, mask_T in zip(micro_batch.rows, logprobs_BT, mask_BT, strict=True):
                self.add_metric("loss", -logprobs_T, batch.tasks[row], mask_T)
        free = [i for i, choices in enumerate(batch.choices) if not choices]
        predictions: dict[int, str] = {}
        for rows in self.in_step([free] if free else [], lambda: [0]):
            texts = self._generate(batch, rows)
            predictions |= zip(rows, texts, strict=True) if free else ()
        for i, text in predictions.items():
            golds = [gold for gold in {batch.answer_texts()[i].strip(), written[i]} if gold]
            self.add_metric("exact_match", torch.tensor(float(text in golds)), batch.tasks[i])
            rouge = rouge_score(text, [golds], accumulate="best", rouge_keys="rougeL")
            self.add_metric("rouge_l", torch.as_tensor(rouge["rougeL_fmeasure"]), batch.tasks[i])
        asked = [i for i, choices in enumerate(batch.choices) if choices]
        for number, i in enumerate(self.in_step(asked, lambda: 0)):
            choices = batch.choices[i] or ["filler"]
            self.route(batch, [i] * len(choices))
            chosen = self.choose(batch.prompts[i], choices)
            if number < len(asked):
                predictions[i] = chosen
                correct = torch.tensor(float(chosen == batch.answers[i]))
                self.add_metric("choice_accuracy", correct, batch.tasks[i])
        return {"predictions": [predictions[i] for i in range(len(batch))]}

    def add_metric(self, name: str, value: Tensor, task: str, mask: Tensor | None = None) -> None:
        """Add a row to the mean of a metric. A subclass may keep means of its own.

        Args:
            name: One of `evaluation_metrics`.
            value: Any shape.
            task: The row's task.
            mask: 1 on what counts; None counts all.
        """
        self.evaluation_means.add(name, value, mask)

    def predict_step(self, batch: TextBatch, batch_idx: int) -> list[dict[str, Any]]:
        """Return `uid`, `prompt` and the `completion` of each row."""
        return prediction_rows(batch, self._generate(batch, range(len(batch))))

    def _generate(self, batch: TextBatch, rows: Sequence[int]) -> list[str]:
        part = batch.take(rows)
        ids = self.encode_prompts(part.prompts, room=self.sampling.max_new_tokens, uids=part.uids)
        with self.generating():
            completions = self.sampler.generate(
                ids,
                self.sampling,
                lambda drawn: self.route(batch, [rows[position] for position in drawn]),
                groups=rows,
            )
        return [text.strip() for text in completions.texts]

    def _text(self, ids: Sequence[int]) -> str:
        """Return an answer's tokens as text, as samplers do with completions."""
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text.strip()

    @torch.no_grad()
    def choose(self, prompt: Any, choices: list[str]) -> str:
        """Pick the choice with the highest mean log-probability per token, the end of the turn included.

        Args:
            prompt: The question.
            choices: Candidate answers.

        Returns:
            One of `choices`.
        """
        answers = self.encode_answers(choices, [prompt] * len(choices))
        [prompt_ids] = self.encode_prompts([prompt], room=max(map(len, answers)))
        logprobs_BT, mask_BT = self._logprobs([prompt_ids] * len(choices), answers)
        means_B = (logprobs_BT * mask_BT).sum(1) / mask_BT.sum(1)
        return choices[int(means_B.argmax())]
