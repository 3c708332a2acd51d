"""What a plan says, as a text and as plain data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from lightning_modules.planning.communication import Traffic
from lightning_modules.planning.gpus import GIB, MIB, Gpu
from lightning_modules.planning.phases import Phase
from lightning_modules.planning.ranks import Ranks
from lightning_modules.planning.shapes import StepShape
from lightning_modules.planning.tracker import Kind


@dataclass(frozen=True)
class RunPlan:
    """One run, planned.

    Attributes:
        module: Class of the module.
        model: The model, as the user named it.
        trained: Parameters that are learned, all ranks together.
        frozen: Parameters that are not.
        ranks: Where it runs.
        shape: A step of a rank.
        generates: Whether a step draws its completions.
        phases: Peaks of the parts of a step.
        traffic: What a rank sends in a step.
        gpu: What the peak is compared with.
    """

    module: str
    model: str
    trained: int
    frozen: int
    ranks: Ranks
    shape: StepShape
    generates: bool
    phases: list[Phase]
    traffic: Traffic
    gpu: Gpu

    @property
    def highest(self) -> Phase:
        """The phase that needs most."""
        return max(self.phases, key=lambda phase: phase.peak)

    @property
    def verdict(self) -> str:
        """Whether it fits, with what is needed and what is there."""
        peak = self.highest.peak
        return (
            f"{self.gpu.verdict(peak)} on {self.gpu.name} ({peak / GIB:.2f} of {self.gpu.memory / GIB:.2f} GiB, "
            f"in {self.highest.name})"
        )

    def data(self) -> dict[str, Any]:
        """Return the plan in numbers: bytes and counts."""
        return {
            "module": self.module,
            "model": self.model,
            "strategy": self.ranks.strategy,
            "devices": self.ranks.devices,
            "shards": self.ranks.shards,
            "trained": self.trained,
            "frozen": self.frozen,
            "rows_per_rank": self.shape.rows,
            "tokens_per_step": self.shape.rows * self.shape.width * self.ranks.devices,
            "phases": {
                phase.name: {"peak": phase.peak, "host": phase.host}
                | {kind.value: size for kind, size in phase.kinds.items() if size}
                for phase in self.phases
            },
            "peak": self.highest.peak,
            "sent_per_step": asdict(self.traffic) | {"total": self.traffic.total},
            "gpu": self.gpu.name,
            "verdict": self.gpu.verdict(self.highest.peak),
            "advice": advice(self),
        }

    def __str__(self) -> str:
        return "\n".join([*_facts(self), "", *_table(self.phases), "", *_conclusion(self)])


def _facts(plan: RunPlan) -> list[str]:
    ranks, shape = plan.ranks, plan.shape
    where = {
        "single": "one rank",
        "ddp": f"{ranks.devices:,} ranks, each with the whole model (ddp)",
        "fsdp2": f"{ranks.devices:,} ranks, sharded over {ranks.shards:,} (fsdp2)"
        + (f", {ranks.replicas:,} copies" if ranks.replicas > 1 else ""),
    }[ranks.strategy]
    prompts = shape.prompts * ranks.devices
    each = f"{shape.prompts:,} x {ranks.devices:,} ranks"
    if plan.generates:
        step = f"{prompts:,} prompts ({each}) x {shape.group_size} completions"
    else:
        step = f"{prompts:,} rows ({each})"
    tokens = shape.rows * ranks.devices
    what = "completion" if plan.generates else "answer"
    return [
        f"Plan of {plan.module} for {plan.model}",
        f"  runs on       {where}",
        f"  parameters    {plan.trained:,} trained, {plan.frozen:,} frozen",
        f"  a step        {step}, {shape.updates} update{'s' if shape.updates > 1 else ''}",
        f"  tokens        up to {tokens * shape.width:,} a step, {tokens * shape.completion_tokens:,} of {what}s",
        f"  a rank        {shape.passes:,} forward passes an update, {shape.rows_per_pass:,} rows each",
        f"  assumed       prompts of {shape.prompt_tokens:,} and {what}s of {shape.completion_tokens:,} tokens",
    ]


def _unit(sizes: Iterable[int]) -> tuple[str, int]:
    """The unit in which the largest of some sizes reads well."""
    largest = max(sizes, default=0)
    return ("GiB", GIB) if largest >= GIB else ("MiB", MIB)


def _table(phases: list[Phase]) -> list[str]:
    name, unit = _unit(phase.peak for phase in phases)
    rows = {kind.value: [phase.kinds.get(kind, 0) for phase in phases] for kind in Kind}
    rows = {kind: sizes for kind, sizes in rows.items() if any(sizes)}
    rows["peak"] = [phase.peak for phase in phases]
    if any(phase.host for phase in phases):
        rows["on the host"] = [phase.host for phase in phases]
    lines = [f"  {name} on a rank       " + "".join(f"{phase.name:>12}" for phase in phases)]
    return lines + [
        f"    {kind:18}" + "".join(f"{size / unit:12.2f}" for size in sizes) for kind, sizes in rows.items()
    ]


def _conclusion(plan: RunPlan) -> list[str]:
    sent = plan.traffic
    parts = {
        "gathered weights": sent.gathers,
        "scattered gradients": sent.scatters,
        "reduced gradients": sent.reduces,
        "gathered to generate": sent.generation,
    }
    name, unit = _unit([sent.total])
    listed = ", ".join(f"{part} {size / unit:.2f}" for part, size in parts.items() if size)
    lines = []
    if sent.total:
        lines.append(f"  sent          {sent.total / unit:.2f} {name} a step from each rank: {listed}")
    lines.append(f"  verdict       {plan.verdict}")
    return lines + [f"  {'try' if i == 0 else '':13} {one}" for i, one in enumerate(advice(plan))]


def advice(plan: RunPlan) -> list[str]:
    """Say what to change where a plan does not fit well, what helps most first.

    Args:
        plan: The plan.

    Returns:
        Nothing where it fits.
    """
    phase, ranks = plan.highest, plan.ranks
    if plan.gpu.verdict(phase.peak) == "fits":
        return []
    size = phase.kinds
    state = size[Kind.WEIGHTS] + size[Kind.GRADIENTS] + size[Kind.MOMENTS] + size[Kind.EXCHANGE]
    sharding = "--devices more" if ranks.strategy == "fsdp2" else "--strategy fsdp2"
    options = [(state, f"{sharding}: weights, gradients and moments are divided over ranks")]
    if plan.frozen == 0:
        learned = size[Kind.GRADIENTS] + size[Kind.MOMENTS]
        options.append((learned, "adapter: peft.LoraConfig: gradients and moments of the adapter alone"))
    if phase.name in ("prefill", "decode"):
        options.append(
            (size[Kind.GATHERED], "whole_for_generation: false in the strategy: gathers layer by layer")
        )
        drawn = size[Kind.CACHE] + size[Kind.LOGITS] + size[Kind.ACTIVATIONS]
        options.append((drawn, "a smaller max_rows of the sampler: fewer rows are decoded together"))
    else:
        passing = size[Kind.ACTIVATIONS] + size[Kind.LOGITS]
        if plan.shape.rows_per_pass > 1:
            options.append((passing, "a smaller max_tokens_per_microbatch: the gradients stay the same"))
        options.append((size[Kind.ACTIVATIONS], "gradient_checkpointing: true: about a third slower"))
    worth = [(gain, text) for gain, text in options if gain > 0.1 * phase.peak]
    return [text for _, text in sorted(worth, key=lambda one: -one[0])]
