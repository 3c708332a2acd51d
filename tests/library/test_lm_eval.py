"""lm-eval reads a routed model as the live model that it is."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_modules import ArrowRouter, RoutedAdapter, TaskRouter
from lightning_modules.library.store import AdapterLibrary


def test_loglikelihoods_are_the_routed_model_s(tiny_model, tmp_path):
    pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    torch.manual_seed(0)
    first = RoutedAdapter(TaskRouter(), experts=["a", "b", "c"], rank=2)
    first.attach(AutoModelForCausalLM.from_pretrained(tiny_model))
    for layer in first.layers.values():
        torch.nn.init.normal_(layer.experts.B)
    first.publish(AdapterLibrary(tmp_path / "library", create=True))
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    adapter = RoutedAdapter(ArrowRouter(2), library=str(tmp_path / "library"))
    adapter.attach(model).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2, max_length=64)
    requests = [
        Instance("loglikelihood", {}, pair, i) for i, pair in enumerate([("2 + 2 =", " 4"), ("Say", " hi")])
    ]
    routed = [value for value, _ in harness.loglikelihood(requests)]
    with adapter.disabled():
        base = [value for value, _ in harness.loglikelihood(requests)]
    ids, answer = (tokenizer(text)["input_ids"] for text in ("2 + 2 =", " 4"))
    with torch.no_grad():
        logprobs = model(torch.tensor([ids + answer])).logits[0].log_softmax(-1)
    expected = sum(float(logprobs[len(ids) - 1 + i, token]) for i, token in enumerate(answer))
    assert routed[0] == pytest.approx(expected, abs=1e-3)
    assert abs(routed[0] - base[0]) > 1e-2
