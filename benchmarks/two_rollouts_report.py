"""Makes the page and the figure of the study of group sizes from its records; see two_rollouts.py."""

from __future__ import annotations

import itertools
import math
import statistics
from pathlib import Path

# 97.5th percentile of Student's t by degrees of freedom.
T_975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
AXES = {"updates": 0, "prompts": 1, "rollouts": 2, "seconds": 3}
COMMAND = "python benchmarks/two_rollouts.py --out docs/results/two_rollouts.jsonl"
ORDER = ["16", "8", "4", "2", "2 + resampling"]


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half width of its 95% interval over seeds."""
    half = (
        T_975[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))
        if len(values) > 1
        else math.nan
    )
    return statistics.fmean(values), half


def at(curve: list[list[float]], axis: str, where: float, column: int = 4) -> float:
    """Value of a learning curve at a place on an axis, on a straight line between two measurements."""
    k = AXES[axis]
    for before, after in itertools.pairwise(curve):
        if after[k] >= where:
            share = (where - before[k]) / (after[k] - before[k])
            return before[column] + share * (after[column] - before[column])
    return curve[-1][column]


def write_report(records: list[dict], page: Path) -> None:
    """Write the page and, beside it, the figure."""
    trials = [one for one in records if one["seed"] == 0]
    timed = {one["arm"]: one["curve"] for one in records if one["seed"] < 0}
    runs = {arm: [one for one in records if one["arm"] == arm and one["seed"] > 0] for arm in ORDER}
    for arm in ORDER:
        for one in runs[arm]:  # time of an update as in the run in which it was measured
            for point in one["curve"]:
                point[3] = at(timed[arm], "updates", point[0], 3)
    rollouts = min(one["curve"][-1][2] for one in runs["16"])
    prompts = min(one["curve"][-1][1] for one in runs["16"])
    seconds = min(statistics.fmean(one["curve"][-1][3] for one in runs[arm]) for arm in ORDER)
    first = runs["16"][0]
    lines = [
        "# Two rollouts against sixteen, on a small model",
        "",
        "A Llama of 0.1 million parameters adds two numbers; before training it is right in "
        f"{first['curve'][0][4]:.1%} of its",
        "samples (mean@8 on 250 prompts that no run trains on). An update has 128",
        f"rollouts. {len(runs['16'])} seeds; intervals are 95%, Student's t over seeds. The task and the method are",
        "described in `benchmarks/two_rollouts.py`; records with versions, seeds and machine are in",
        "`docs/results/two_rollouts.jsonl`. Seconds are processor time of training, without evaluation, in one run",
        "of each group size with one thread.",
        "",
        f"    OMP_NUM_THREADS=1 {COMMAND} --report docs/results/two_rollouts.md",
        "",
        "![Learning curves](../images/two_rollouts.png)",
        "",
        f"| rollouts per prompt | learning rate | at {rollouts:,.0f} rollouts | at {prompts:,.0f} prompts | at "
        f"{seconds:.0f} s of training | updates, rollouts, seconds for {prompts:,.0f} prompts |",
        "|---|---|---|---|---|---|",
    ]
    for arm in ORDER:
        cells = []
        for axis, where in (("rollouts", rollouts), ("prompts", prompts), ("seconds", seconds)):
            mean, half = interval([at(one["curve"], axis, where) for one in runs[arm]])
            cells.append(f"{mean:.3f} +- {half:.3f}")
        spent = [
            statistics.fmean(at(one["curve"], "prompts", prompts, k) for one in runs[arm]) for k in (0, 2, 3)
        ]
        lines.append(
            f"| {arm} | {runs[arm][0]['lr']:g} | {' | '.join(cells)} | "
            f"{spent[0]:.0f}, {spent[1]:,.0f}, {spent[2]:.1f} |"
        )
    lines += ["", "## The paper's claim at this scale", "", claim(runs, prompts), ""]
    lines += ["## Learning rates tried", "", trial_table(trials), ""]
    page.write_text("\n".join(lines), encoding="utf-8")
    draw(runs, page.parent.parent / "images" / "two_rollouts.png")


def claim(runs: dict[str, list[dict]], prompts: float) -> str:
    """The sentence that the study is about."""
    parts = [
        "The paper keeps 97.6% of the quality of 16 rollouts at 12.5% of the rollouts and 21% of the time, at equal "
        "prompts; with resampling it is as good as 16. Here, at equal prompts, relative to 16 rollouts:",
        "",
    ]
    sixteen = {one["seed"]: one["curve"] for one in runs["16"]}
    for arm in ORDER[1:]:
        ratios, work, time = [], [], []
        for one in runs[arm]:
            other = sixteen[one["seed"]]
            ratios.append(at(one["curve"], "prompts", prompts) / at(other, "prompts", prompts))
            work.append(at(one["curve"], "prompts", prompts, 2) / at(other, "prompts", prompts, 2))
            time.append(at(one["curve"], "prompts", prompts, 3) / at(other, "prompts", prompts, 3))
        mean, half = interval(ratios)
        parts.append(
            f"- {arm}: {mean:.1%} +- {half:.1%} of the accuracy, {statistics.fmean(work):.1%} of the rollouts, "
            f"{statistics.fmean(time):.1%} of the time."
        )
    equal = [
        at(one["curve"], "rollouts", sixteen[one["seed"]][-1][2]) / sixteen[one["seed"]][-1][4]
        for one in runs["2 + resampling"]
    ]
    mean, half = interval(equal)
    parts += [
        "",
        "Resampling draws prompts that it does not learn from, so the paper gives it the rollouts of 16. At equal "
        f"rollouts 2 + resampling has {mean:.1%} +- {half:.1%} of the accuracy of 16.",
    ]
    return "\n".join(parts)


def trial_table(trials: list[dict]) -> str:
    """Accuracy of each learning rate at the seed of the trials."""
    rates = sorted({one["lr"] for one in trials})
    lines = [
        f"Mean accuracy over the last quarter of {trials[0]['updates']} updates, one seed that is in no other table.",
        "",
        "| rollouts per prompt | " + " | ".join(f"{rate:g}" for rate in rates) + " |",
        "|---|" + "---|" * len(rates),
    ]
    for arm in ORDER:
        cells = []
        for rate in rates:
            [one] = [one for one in trials if one["arm"] == arm and one["lr"] == rate]
            late = one["curve"][-len(one["curve"]) // 4 :]
            cells.append(f"{statistics.fmean(point[4] for point in late):.3f}")
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(runs: dict[str, list[dict]], file: Path) -> None:
    """Learning curves over rollouts, prompts and seconds, with bands of 95%."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 3, figsize=(12, 4), sharey=True)
    for panel, axis in zip(panels, ("rollouts", "prompts", "seconds"), strict=True):
        for number, arm in enumerate(ORDER):
            curves = [one["curve"] for one in runs[arm]]
            places = [
                statistics.fmean(points)
                for points in zip(*([p[AXES[axis]] for p in c] for c in curves), strict=False)
            ]
            values = [interval([at(c, axis, place) for c in curves]) for place in places]
            low, high = [m - h for m, h in values], [min(m + h, 1.0) for m, h in values]
            style = {"color": f"C{number}", "linestyle": "--" if "resampling" in arm else "-"}
            panel.plot(places, [m for m, _ in values], label=arm, linewidth=1.5, **style)
            panel.fill_between(places, low, high, color=f"C{number}", alpha=0.15, linewidth=0)
        panel.set_xlabel(axis if axis != "seconds" else "seconds of training")
        panel.grid(alpha=0.3)
    panels[1].set_xscale("symlog", linthresh=256)
    panels[1].set_xlim(left=0)
    for panel, axis in ((panels[0], "rollouts"), (panels[2], "seconds")):  # resampling goes on far beyond
        panel.set_xlim(0, 1.3 * statistics.fmean(one["curve"][-1][AXES[axis]] for one in runs["16"]))
    panels[0].set_ylabel("held-out accuracy of a sample")
    panels[0].legend(title="rollouts per prompt", fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=110, metadata={"Software": None})
