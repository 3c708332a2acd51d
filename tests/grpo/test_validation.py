"""RolloutEvaluation in real validation runs, on one and two ranks."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from statistics import fmean

import lightning.pytorch as lightning
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from validation_worker import (
    CASES,
    build,
    by_kind,
    length_of,
    make_trainer,
    one_loader,
    success_of,
    text_batch,
    texts_of,
)

from lightning_modules.grpo.evaluation import PromptRecord, mean_interval
from lightning_modules.grpo.validation import AnswerOf, RolloutEvaluation

WORKER = Path(__file__).with_name("validation_worker.py")


def strip(text):
    return text.strip() or None


def expected_of(uids, k, answer=strip) -> dict[str, float]:
    """The metrics of some rows, by loops over their completions."""
    columns: dict[str, list[float]] = {}

    def add(name, value):
        columns.setdefault(name, []).append(value)

    for uid in uids:
        lengths = [length_of(uid, number) for number in range(k)]
        add("completion_length", sum(lengths) / k)
        add("truncated", sum(length >= 3 for length in lengths) / k)
        applies = [s for s in success_of(uid, k) if not math.isnan(s)]
        add("no_reward", 1 - len(applies) / k)
        if not applies:
            continue
        add("reward", fmean(3 * s - 1 for s in applies))
        add(f"mean@{k}", fmean(applies))
        if k == 1 or len(applies) < k:
            continue
        for j in {j for j in (2, 4, 8) if j <= k} | {k}:
            add(f"pass@{j}", fmean(map(max, itertools.combinations(applies, j))))
        answers = [answer(text) for text in texts_of(uid, k)]
        named = Counter(a for a in answers if a is not None) or Counter(answers)
        ranked = named.most_common()
        tied = [a for a, count in ranked if count == ranked[0][1]]
        add(f"maj@{k}", fmean(s for a, s in zip(answers, applies, strict=True) if a in tied))
    found = {}
    for name, column in columns.items():
        found[name] = fmean(column)
        if name in (f"mean@{k}", f"pass@{k}", f"maj@{k}"):
            _, found[f"{name}/low"], found[f"{name}/high"] = mean_interval(column)
    return found


def under(prefix, metrics):
    return {f"{prefix}/{name}": pytest.approx(value, abs=1e-6) for name, value in metrics.items()}


def validate(model, batches, task_of=lambda uid: "default", **arguments):
    loader = one_loader(batches, task_of)
    [found] = make_trainer().validate(build(model, **arguments), loader, verbose=False)
    return found


@pytest.mark.parametrize("k", [1, 2, 4, 5])
def test_one_task(tiny_model, k):
    found = validate(tiny_model, [range(5), range(5, 12)], num_val_generations=k)
    assert found == under("val", expected_of(range(12), k))
    assert len(found) == {1: 7, 2: 13, 4: 14, 5: 15}[k]
    if k == 4:
        assert 0 < found["val/mean@4"] < found["val/pass@2"] < found["val/pass@4"] < 1
        assert 0 < found["val/maj@4/low"] < found["val/maj@4"] < found["val/maj@4/high"] < 1


def test_each_of_several_tasks(tiny_model):
    found = validate(tiny_model, [range(5), range(5, 12)], by_kind)
    expected = under("val", expected_of(range(12), 4))
    for task, label in {"even": "even", "glue/odd": "glue_odd", "third": "third"}.items():
        uids = [uid for uid in range(12) if by_kind(uid) == task]
        assert len(uids) == 4
        expected |= under(f"val/{label}", expected_of(uids, 4))
    assert found == expected


def test_rows_without_reward_have_lengths_only(tiny_model):
    found = validate(tiny_model, [[4, 9]])
    assert found.keys() == {"val/completion_length", "val/truncated", "val/no_reward"}
    assert found["val/no_reward"] == 1
    # One completion of uid 6 cannot be judged: its mean is over the others, and nothing can be drawn from four.
    assert found.keys() < validate(tiny_model, [[6]]).keys()
    assert validate(tiny_model, [[6]]) == under("val", expected_of([6], 4))
    assert "val/pass@2" not in validate(tiny_model, [[6]])


def test_a_row_that_comes_twice_counts_once(tiny_model):
    once = validate(tiny_model, [[0, 1, 2, 3]])
    assert validate(tiny_model, [[0, 1, 1], [2, 0], [3, 3, 3]]) == once
    assert validate(tiny_model, [[3], [2], [1], [0]]) == once


def test_the_test_set_logs_under_test_and_each_run_starts_anew(tiny_model):
    trainer, module = make_trainer(), build(tiny_model)
    trainer.validate(module, one_loader([range(12)]), verbose=False)
    [found] = trainer.test(module, one_loader([[1, 2, 3]], by_kind), verbose=False)
    assert {name for name in found if name.count("/") == 1} == {f"test/{n}" for n in METRICS}
    assert found.items() >= under("test", expected_of([1, 2, 3], 4)).items()
    [again] = trainer.validate(module, one_loader([[1, 2, 3]]), verbose=False)
    assert again == under("val", expected_of([1, 2, 3], 4))


METRICS = ("reward", "no_reward", "completion_length", "truncated", "mean@4", "pass@2", "pass@4", "maj@4")


class Coarse:
    """A reward that takes answers of one length for equal."""

    def __call__(self, completions, **columns):
        raise AssertionError("scores are fixed")

    def answer_of(self, text):
        return len(text.strip()) or None


def no_answer(completions, **columns):
    raise AssertionError("scores are fixed")


def test_what_counts_as_an_answer(tiny_model):
    majority = {}
    for name, arguments, answer in (
        ("text", {"reward_functions": [no_answer, Coarse()]}, strip),
        ("reward", {"reward_functions": [Coarse(), no_answer]}, Coarse().answer_of),
        ("given", {"reward_functions": [Coarse()], "answer": lambda text: text[:1]}, lambda text: text[:1]),
        ("none", {"answer": lambda text: None}, lambda text: None),
    ):
        found = validate(tiny_model, [range(12)], **arguments)
        assert found == under("val", expected_of(range(12), 4, answer))
        majority[name] = found["val/maj@4"]
    assert len(set(majority.values())) == 4
    assert isinstance(Coarse(), AnswerOf)
    assert not isinstance(no_answer, AnswerOf)


def test_what_a_step_returns_and_what_is_kept(tiny_model):
    class Keep(lightning.Callback):
        def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.outputs, self.records = outputs, dict(pl_module._records)

    keep, module = Keep(), build(tiny_model)
    make_trainer(callbacks=[keep]).validate(module, one_loader([[6, 4, 2]]), verbose=False)
    assert keep.outputs.keys() == {"rollout", "scores", "success"}
    expected = torch.tensor([success_of(uid, 4) for uid in (6, 4, 2)])
    torch.testing.assert_close(keep.outputs["success"], expected, equal_nan=True)
    assert keep.outputs["rollout"].batch.uids[::4] == [6, 4, 2]
    torch.testing.assert_close(keep.outputs["scores"].total, expected.flatten() * 3 - 1, equal_nan=True)
    assert keep.records.keys() == {2, 4, 6}
    for record in keep.records.values():
        assert isinstance(record, PromptRecord)
        assert all(isinstance(value, float) and math.isfinite(value) for value in record.values.values())
    assert module._records == {}


def test_a_subclass_adds_a_mean_of_its_own(tiny_model, tmp_path):
    class More(type(build(tiny_model))):
        def evaluation_metrics(self):
            return [*super().evaluation_metrics(), "uid"]

        def validation_step(self, batch, batch_idx):
            self.evaluation_means.add("uid", torch.tensor(batch.uids).float())
            return super().validation_step(batch, batch_idx)

    logger = CSVLogger(tmp_path, name="", version="")
    trainer = lightning.Trainer(
        accelerator="cpu", logger=logger, enable_progress_bar=False, enable_model_summary=False
    )
    [found] = trainer.validate(More(model=tiny_model), one_loader([[1, 2]]), verbose=False)
    assert found == under("val", {**expected_of([1, 2], 4), "uid": 1.5})
    header, values = (tmp_path / "metrics.csv").read_text().splitlines()
    written = dict(zip(header.split(","), values.split(","), strict=True))
    assert float(written["val/maj@4/high"]) == pytest.approx(found["val/maj@4/high"])


def test_predictions_have_one_completion_a_row(tiny_model):
    [rows] = make_trainer().predict(build(tiny_model), one_loader([[3, 5]]))
    assert rows == [
        {"uid": uid, "prompt": f"prompt {uid}", "completion": texts_of(uid, 1)[0]} for uid in (3, 5)
    ]


@pytest.mark.slow
def test_two_ranks_say_what_one_says(tiny_model, tmp_path):
    out = tmp_path / "found"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(WORKER), tiny_model, str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads(Path(f"{out}.{rank}").read_text()) for rank in range(2))
    assert first == second
    for name, batches in CASES.items():
        uids = sorted({uid for rank in batches for batch in rank for uid in batch})
        assert first[name] == validate(tiny_model, [uids], by_kind), name
    assert len(first["even"]) > 40
    assert not any("@" in metric for metric in first["nothing applies"])


def test_a_subclass_defines_how_to_draw_and_to_score(tiny_model):
    module = RolloutEvaluation(model=tiny_model)
    with pytest.raises(NotImplementedError, match="RolloutEvaluation must define rollout"):
        module.rollout(text_batch([0]), 2, None)
    with pytest.raises(NotImplementedError, match="RolloutEvaluation must define score"):
        module.score(None)
