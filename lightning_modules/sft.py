"""SFTModule: supervised fine-tuning on answers.

Shapes: B rows of a batch, T answer tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional.text import rouge_score

from datamodules.batches import TextBatch
from lightning_modules.causal_lm import CausalLMModule
from lightning_modules.distributed import all_sum
from lightning_modules.logprobs import completion_logits, token_logprobs
from lightning_modules.microbatches import pad_pairs, plan_micro_batches
from lightning_modules.sampling import GenerateSampler, Sampler, Sampling
from lightning_modules.text import prediction_rows


class SFTModule(CausalLMModule):
    """Cross-entropy on answer tokens, the end token included; prompts are read, not learned.

    The loss is the mean over all answer tokens of the optimiser step, over micro-batches and ranks, so
    neither the split nor the padding changes the gradient. Validation logs `val/loss`, and over rows without
    `choices` the greedy answer's `val/exact_match` and `val/rouge_l`; over rows with `choices`
    `val/choice_accuracy`, where the choice of the highest mean log-probability per token is the answer.

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
        if max_tokens_per_microbatch < 1:
            raise ValueError(f"max_tokens_per_microbatch={max_tokens_per_microbatch}: must be at least 1.")
        self.automatic_optimization = False
        self.max_tokens_per_microbatch = max_tokens_per_microbatch
        self.sampling = sampling
        self.sampler = sampler or GenerateSampler()

    def configure_model(self) -> None:
        """Load the model and hand it to the sampler."""
        super().configure_model()
        assert self.model is not None
        self.sampler.bind(self.model, self.tokenizer)

    def encode_answers(self, answers: Sequence[str]) -> list[list[int]]:
        """Tokenise answers and end each with the end token.

        Raises:
            ValueError: If an answer is empty.
        """
        if "" in answers:
            raise ValueError(
                f"Row {answers.index('')} of the batch has an empty answer, so there is nothing to learn "
                "from it. Check answer_column, or drop the row."
            )
        encoded = self.tokenizer(list(answers), add_special_tokens=False)["input_ids"]
        return [[*ids, self.tokenizer.eos_token_id] for ids in encoded]

    def _logprobs(self, prompts: Sequence[list[int]], answers: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
        """Log-probabilities and mask of answer tokens (b, T)."""
        input_ids, attention_mask, mask_BT = pad_pairs(
            prompts, answers, pad_token_id=self.pad_token_id, device=self.device
        )
        T = mask_BT.shape[1]
        logits_BTV = completion_logits(self, input_ids, attention_mask, T, temperature=1.0)
        return token_logprobs(logits_BTV, input_ids[:, -T:]), mask_BT

    def _micro_batches(self, batch: TextBatch) -> list[tuple[list[list[int]], list[list[int]]]]:
        """Tokenised prompts and answers, grouped within the token budget."""
        answers = self.encode_answers(batch.answers)
        prompts = self.encode_prompts(batch.prompts, room=max(map(len, answers)), uids=batch.uids)
        lengths = [len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True)]
        return [
            ([prompts[i] for i in rows], [answers[i] for i in rows])
            for rows in plan_micro_batches(lengths, self.max_tokens_per_microbatch)
        ]

    def training_step(self, batch: TextBatch, batch_idx: int) -> None:
        """One update from one batch."""
        micro_batches = self._micro_batches(batch)
        tokens = sum(len(answer) for _, answers in micro_batches for answer in answers)
        count = all_sum(self.trainer.strategy, torch.tensor(tokens)).item()
        shares: list[Tensor] = []

        def share(prompts: list[list[int]], answers: list[list[int]]) -> Tensor:
            logprobs_BT, mask_BT = self._logprobs(prompts, answers)
            loss = -(logprobs_BT * mask_BT).sum() * self.trainer.world_size / count
            shares.append(loss.detach())
            return loss

        norm = self.update([partial(share, *micro_batch) for micro_batch in micro_batches])
        loss = all_sum(self.trainer.strategy, torch.stack(shares).sum()) / self.trainer.world_size
        self.log("train/loss", loss, prog_bar=True, batch_size=1)
        self.log("train/grad_norm", norm, batch_size=1)
        self.log("train/answer_tokens", float(count), batch_size=1)

    def evaluation_metrics(self) -> Sequence[str]:
        """Name the metrics of validation."""
        return ("loss", "exact_match", "rouge_l", "choice_accuracy")

    def validation_step(self, batch: TextBatch, batch_idx: int) -> Mapping[str, Any]:
        """Add a batch to the epoch's loss and metrics.

        Returns:
            `predictions`: the greedy answer of each row without choices, else the chosen one (B).
        """
        for micro_batch in self._micro_batches(batch):
            logprobs_BT, mask_BT = self._logprobs(*micro_batch)
            self.evaluation_means.add("loss", -logprobs_BT, mask_BT)
        free = [i for i, choices in enumerate(batch.choices) if not choices]
        texts = self._generate([batch.prompts[i] for i in free]) if free else []
        predictions = dict(zip(free, texts, strict=True))
        for i, text in predictions.items():
            self.evaluation_means.add("exact_match", torch.tensor(float(text == batch.answers[i].strip())))
            rouge = rouge_score(text, batch.answers[i], rouge_keys="rougeL")
            self.evaluation_means.add("rouge_l", torch.as_tensor(rouge["rougeL_fmeasure"]))
        for i, choices in enumerate(batch.choices):
            if choices:
                predictions[i] = self.choose(batch.prompts[i], choices)
                correct = float(predictions[i] == batch.answers[i])
                self.evaluation_means.add("choice_accuracy", torch.tensor(correct))
        return {"predictions": [predictions[i] for i in range(len(batch))]}

    def predict_step(self, batch: TextBatch, batch_idx: int) -> list[dict[str, Any]]:
        """Return `uid`, `prompt` and the `completion` of each row."""
        return prediction_rows(batch, self._generate(batch.prompts))

    def _generate(self, prompts: Sequence[Any]) -> list[str]:
        ids = self.encode_prompts(prompts, room=self.sampling.max_new_tokens)
        return [text.strip() for text in self.sampler.generate(ids, self.sampling).texts]

    @torch.no_grad()
    def choose(self, prompt: Any, choices: list[str]) -> str:
        """Pick the choice with the highest mean log-probability per token, the end token included.

        Args:
            prompt: The question.
            choices: Candidate answers.

        Returns:
            One of `choices`.
        """
        answers = self.encode_answers(choices)
        [prompt_ids] = self.encode_prompts([prompt], room=max(map(len, answers)))
        logprobs_BT, mask_BT = self._logprobs([prompt_ids] * len(choices), answers)
        means_B = (logprobs_BT * mask_BT).sum(1) / mask_BT.sum(1)
        return choices[int(means_B.argmax())]
