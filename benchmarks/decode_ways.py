"""The ways of decoding that `decode.py` compares, each in a process of its own.

    PYTHON benchmarks/decode_ways.py WAY OPTIONS

OPTIONS is a JSON object. Loads the model and prints an empty JSON object; then reads the number of a run a line, draws,
and prints what it took. A way that cannot run here prints why, and ends. vLLM has an environment of its own, so this
file imports what a way needs only where it needs it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# name: (completions of a prompt, prompts, tokens of a prompt)
SETTINGS = {"S1": (8, 4, 44), "S2": (16, 2, 445), "S3": (2, 16, 445), "S4": (2, 64, 44)}
TEXT = (
    "The harbour was quiet in the morning, and only a few boats had left before the fog came in from the sea. "
    "Mara counted the crates on the pier, wrote their numbers into her book, and wondered where the rest was. "
)
# The shape of SmolLM2-135M.
SHAPE = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192, "tie_word_embeddings": True,
}  # fmt: skip

Run = Callable[[int], int]  # number of a run -> tokens drawn


def load(options: Any) -> tuple[Any, Any]:
    """Load model and tokenizer; `random` has random weights and one word for each id, and needs no file."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

    dtype = getattr(torch, options.dtype)
    if options.model == "random":
        from tokenizers import Tokenizer, models, pre_tokenizers

        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE, eos_token_id=0), dtype=dtype)
        words = TEXT.split() + [str(number) for number in range(SHAPE["vocab_size"])]
        vocabulary = {word: number for number, word in enumerate(dict.fromkeys(words[: SHAPE["vocab_size"]]))}
        backend = Tokenizer(models.WordLevel(vocabulary, unk_token="0"))
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=words[0])
    else:
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(options.model)
    # What CausalLMModule does: without it a head that reads a slice copies its weights once per row.
    model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    if options.lengths == "forced":
        tokenizer.eos_token = model.generation_config.eos_token_id = model.config.eos_token_id = None
    return model.eval().to(options.device), tokenizer


def prompts_of(options: Any, tokenizer: Any) -> list[list[int]]:
    """Return the prompts of a setting; their lengths differ a little, as those of prompts do."""
    _, count, length = SETTINGS[options.setting]
    ids = tokenizer(TEXT * 40)["input_ids"]
    return [ids[7 * i : 7 * i + length + 3 * (i % 4) - 3] for i in range(count)]


def sampler(name: str) -> Callable[[Any], Run]:
    """One of ours, with a seed for each row."""

    def prepare(options: Any) -> Run:
        from lightning_modules import sampling
        from lightning_modules.attention import prefer_blocks

        model, tokenizer = load(options)
        prefer_blocks(model)  # as CausalLMModule does
        group_size = SETTINGS[options.setting][0]
        rows = [ids for ids in prompts_of(options, tokenizer) for _ in range(group_size)]
        own = getattr(sampling, name)()
        own.bind(model, tokenizer)
        settings = sampling.Sampling(max_new_tokens=options.new_tokens)

        def run(number: int) -> int:
            got = own.generate(rows, settings, seeds=[1000 * number + row for row in range(len(rows))])
            return sum(map(len, got.token_ids))

        return run

    return prepare


def generate(options: Any, **settings: Any) -> Run:
    """The `generate` of transformers as it is: padded rows, a copy of the prompt for each completion."""
    import torch

    model, tokenizer = load(options)
    group_size = SETTINGS[options.setting][0]
    rows = [ids for ids in prompts_of(options, tokenizer) for _ in range(group_size)]
    padded = tokenizer.pad({"input_ids": rows}, padding_side="left", return_tensors="pt").to(options.device)
    width, end = padded["input_ids"].shape[1], model.generation_config.eos_token_id

    def run(number: int) -> int:
        torch.manual_seed(number)
        output = model.generate(
            input_ids=padded["input_ids"], attention_mask=padded["attention_mask"], do_sample=True, top_k=0,
            temperature=1.0, top_p=1.0, max_new_tokens=options.new_tokens, pad_token_id=tokenizer.pad_token_id,
            **settings,
        )  # fmt: skip
        new = output[:, width:].tolist()
        return sum(ids.index(end) + 1 if end in ids else len(ids) for ids in new)

    return run


def compiled(options: Any) -> Run:
    """The same with a static cache and steps that torch compiles, in the run that does not count."""
    from transformers import CompileConfig

    everywhere = CompileConfig()
    everywhere._compile_all_devices = True  # transformers compiles on accelerators alone
    return generate(options, cache_implementation="static", compile_config=everywhere)


def continuous_batching(options: Any) -> Run:
    """The `generate_batch` of transformers, which reads each prompt once and forks it."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    model, tokenizer = load(options)
    prompts = prompts_of(options, tokenizer)
    # -1 is no token; without an end, transformers asks for one.
    end = model.generation_config.eos_token_id
    config = GenerationConfig(
        do_sample=True, top_k=0, temperature=1.0, top_p=1.0, max_new_tokens=options.new_tokens,
        num_return_sequences=SETTINGS[options.setting][0], pad_token_id=tokenizer.pad_token_id,
        eos_token_id=-1 if end is None else end,
    )  # fmt: skip
    # On a CPU it would take six tenths of the memory.
    cache = {"max_memory_percent": 0.1} if options.device == "cpu" else {}

    def run(_: int) -> int:
        outputs = model.generate_batch(
            prompts, generation_config=config, continuous_batching_config=ContinuousBatchingConfig(**cache)
        )
        if failed := [output.error for output in outputs.values() if output.error]:
            raise RuntimeError(failed[0])
        return sum(len(output.generated_tokens) for output in outputs.values())

    return run


def vllm(options: Any) -> Run:
    """The engine with its defaults, but for the context, and on a CPU the share of memory."""
    from vllm import LLM, SamplingParams

    share = {"gpu_memory_utilization": 0.2} if options.device == "cpu" else {}
    engine = LLM(model=options.model, dtype=options.dtype, max_model_len=1024, seed=0, **share)
    prompts = [{"prompt_token_ids": ids} for ids in prompts_of(options, engine.get_tokenizer())]

    def run(number: int) -> int:
        settings = SamplingParams(
            n=SETTINGS[options.setting][0], temperature=1.0, max_tokens=options.new_tokens,
            ignore_eos=options.lengths == "forced", seed=number, detokenize=False,
        )  # fmt: skip
        outputs = engine.generate(prompts, settings, use_tqdm=False)
        return sum(len(one.token_ids) for output in outputs for one in output.outputs)

    return run


WAYS = {
    "generate": generate,
    "compiled": compiled,
    "continuous": continuous_batching,
    "GenerateSampler": sampler("GenerateSampler"),
    "NativeSampler": sampler("NativeSampler"),
    "vllm": vllm,
}


def memory(device: str, *, reset: bool = False) -> float:
    """Return the peak of this process in MB; with `reset`, let it start anew first."""
    if device == "cuda":
        import torch

        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated() / 1e6
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmHWM"].split()[0]) * 1024 / 1e6


def timed(run: Run, number: int, device: str) -> dict[str, float]:
    start = time.perf_counter()
    tokens = run(number)
    if device == "cuda":
        import torch

        torch.cuda.synchronize()
    return {"seconds": time.perf_counter() - start, "tokens": tokens}


def main(way: str, options: Any) -> None:
    # Libraries print too: what they print goes to stderr.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def answer(values: dict[str, Any]) -> None:
        print(json.dumps(values), file=answers, flush=True)

    try:
        run = WAYS[way](options)
        before = memory(options.device, reset=True)
        answer({})
        for line in sys.stdin:
            found = timed(run, int(line), options.device)
            answer(found | {"peak_mb": memory(options.device) - before})
    except Exception as error:  # any reason why another project's code does not run here is a finding
        answer({"error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"})


if __name__ == "__main__":
    # Found as the installed package is, also where another interpreter has none.
    sys.path.append(str(Path(__file__).resolve().parent.parent))
    main(sys.argv[1], SimpleNamespace(**json.loads(sys.argv[2])))
