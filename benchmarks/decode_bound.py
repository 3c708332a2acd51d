"""The speed that this machine's memory and arithmetic allow for decoding, for `decode.py`.

A pass over tokens needs at least the time of its multiplications at the speed of a large matrix product, and the time
of reading weights and cache at the speed of reading memory. The bound adds up the larger of both over the passes: one
over the prompts, each read once, then one for each further token of the rows. A prompt's cache is read once in a pass,
not once for each of its rows. Everything else (softmax, normalisation, the draw) counts as free.

`bound` takes the speed of a large product for all passes; `products` takes, for the passes over single tokens, the
speed that torch reaches with so few rows and weights that are not in a cache.

    python benchmarks/decode_bound.py OPTIONS

OPTIONS is a JSON object. `decode.py` calls it.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

from decode_ways import SETTINGS, load, prompts_of


@dataclass(frozen=True)
class Machine:
    """What was measured.

    Attributes:
        bandwidth: Bytes read per second.
        peak: Operations per second of a large matrix product.
        step: The same of the product that most of a decoding step consists of: all rows by one layer's weights.
    """

    bandwidth: float
    peak: float
    step: float


@dataclass(frozen=True)
class Work:
    """What passes over a model cost.

    Attributes:
        body: Weights of all linear layers but the head.
        head: Weights of the head.
        layers: Number of layers.
        width: Query heads x their size.
        cached: Key heads x their size x 2, of one position of one layer.
        itemsize: Bytes of a number.
    """

    body: int
    head: int
    layers: int
    width: int
    cached: int
    itemsize: int

    @classmethod
    def of(cls, model: Any) -> Work:
        """Count those of a model of transformers."""
        import torch

        config = model.config
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        head = model.get_output_embeddings()
        linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
        return cls(
            sum(module.weight.numel() for module in linear),
            head.weight.numel(),
            config.num_hidden_layers,
            config.num_attention_heads * size,
            2 * config.num_key_value_heads * size,
            head.weight.element_size(),
        )

    def pass_seconds(
        self, tokens: int, pairs: int, read: int, scored: int, speed: float, bandwidth: float
    ) -> float:
        """Return the least time of a pass.

        Args:
            tokens: Input tokens.
            pairs: Pairs of a token and a position that it attends to, over all tokens.
            read: Cached positions that are read.
            scored: Positions that the head is applied to.
            speed: Operations per second.
            bandwidth: Bytes per second.
        """
        operations = 2 * tokens * self.body + 2 * scored * self.head + 4 * pairs * self.layers * self.width
        data = (self.body + self.head + read * self.layers * self.cached) * self.itemsize
        return max(operations / speed, data / bandwidth)

    def seconds(self, lengths: Sequence[int], group_size: int, new_tokens: int, machine: Machine) -> float:
        """Return the least time for `group_size` completions of `new_tokens` of prompts with these lengths."""
        rows, total = len(lengths) * group_size, sum(lengths)
        pairs = sum(length * (length + 1) // 2 for length in lengths)
        seconds = self.pass_seconds(total, pairs, 0, len(lengths), machine.peak, machine.bandwidth)
        for step in range(1, new_tokens):
            pairs = group_size * total + rows * step
            read = total + rows * step
            seconds += self.pass_seconds(rows, pairs, read, rows, machine.step, machine.bandwidth)
        return seconds


def fastest(work: Callable[[], Any], device: str, repeats: int = 7) -> float:
    """Return the shortest time of some runs, seconds."""
    import torch

    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def measure(rows: int, hidden: int, intermediate: int, dtype: Any, device: str) -> Machine:
    """Measure a machine with matrices (intermediate, hidden), all different, as the layers of a model are."""
    import torch
    from torch.nn import functional

    large = torch.ones(1 << 28, dtype=torch.float32, device=device)  # 1 GB
    bandwidth = large.numel() * 4 / fastest(large.sum, device)
    del large
    side = 2048 if device == "cpu" else 8192
    left = torch.randn(side, side, device=device).to(dtype)
    peak = 2 * side**3 / fastest(lambda: left @ left, device)
    layers = [torch.randn(intermediate, hidden, device=device).to(dtype) for _ in range(100)]
    inputs = torch.randn(rows, hidden, device=device).to(dtype)
    seconds = fastest(lambda: [functional.linear(inputs, weights) for weights in layers], device)
    return Machine(bandwidth, peak, 2 * rows * hidden * intermediate * len(layers) / seconds)


def main(options: Any) -> None:
    model, tokenizer = load(options)
    group_size = SETTINGS[options.setting][0]
    lengths = list(map(len, prompts_of(options, tokenizer)))
    config, work = model.config, Work.of(model)
    del model
    rows = group_size * len(lengths)
    machine = measure(rows, config.hidden_size, config.intermediate_size, config.dtype, options.device)
    tokens = rows * options.new_tokens
    found = {
        "gigabytes_per_second": round(machine.bandwidth / 1e9, 1),
        "peak_gigaflops": round(machine.peak / 1e9),
        "step_gigaflops": round(machine.step / 1e9),
    }
    for name, speeds in (("bound", replace(machine, step=machine.peak)), ("products", machine)):
        found[name] = round(tokens / work.seconds(lengths, group_size, options.new_tokens, speeds), 1)
    print(json.dumps(found))


if __name__ == "__main__":
    main(SimpleNamespace(**json.loads(sys.argv[1])))
