"""Tables and figures of docs/retention.md, from the raw numbers of `benchmarks/retention.py`.

Every function takes the records of `retention_fronts.jsonl`: an adapter each, with the nats of every held-out row at every
point. Changes of the task are from the unedited adapter, changes of general text from the backbone, both paired by rows.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from grit_lightning.forgetting.change import mean_of_changes

Array = NDArray[np.float64]
Record = Mapping[str, Any]
GENERAL = ("wikitext", "c4")
PRICE = 0.002
"""Nats of the task per token at which forgetting is compared."""


def read(path: Path) -> list[Record]:
    """Read the records."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def point_of(record: Record, method: str, mu: float | str = 0.0) -> Mapping[str, Array]:
    """Return the nats of every row of one point, by set."""
    point = next(
        p for p in record["points"] if p["method"] == method and (method in ("unedited", "backbone") or p["mu"] == mu)
    )
    return {name: np.array(values) for name, values in point["rows"].items()}


def task_rise(record: Record, rows: Mapping[str, Array], keep: slice = slice(None)) -> float:
    """Change of the task's loss from the unedited adapter, nats per predicted token."""
    tokens = np.array(record["tokens"]["task"])[keep]
    return float((rows["task"] - point_of(record, "unedited")["task"])[keep].sum() / tokens.sum())


def forgotten(
    record: Record, rows: Mapping[str, Array], names: Sequence[str] = GENERAL, keep: slice = slice(None)
) -> float:
    """Loss on general text above the backbone, mean over sources, nats per token."""
    base = point_of(record, "backbone")
    return float(np.mean([(rows[n] - base[n])[keep].sum() / np.array(record["tokens"][n])[keep].sum() for n in names]))


def at_price(record: Record, method: str, price: float = PRICE) -> Mapping[str, Array]:
    """Return a method's rows where the task has risen by `price`, linear between the measured strengths around it."""
    strengths = sorted(p["mu"] for p in record["points"] if p["method"] == method)
    line = [point_of(record, "unedited"), *(point_of(record, method, mu) for mu in strengths)]
    rises = [task_rise(record, rows) for rows in line]
    last = max(index for index, rise in enumerate(rises) if rise <= price)
    if last == len(line) - 1:
        return line[-1]
    share = (price - rises[last]) / (rises[last + 1] - rises[last])
    return {name: (1 - share) * line[last][name] + share * line[last + 1][name] for name in line[last]}


def interval(differences: Iterable[Array], tokens: Iterable[Array]) -> tuple[float, float, float]:
    """Mean over sets of differences over tokens, with its paired 95% bootstrap interval over rows of each set."""
    sets = [
        (torch.zeros(len(d)), torch.from_numpy(d), torch.from_numpy(n))
        for d, n in zip(differences, tokens, strict=True)
    ]
    mean, bounds = mean_of_changes(sets, [1 / len(sets)] * len(sets))
    return mean, *(bounds or (math.nan, math.nan))


def by_recipe(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Group records of the same recipe over seeds."""
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        groups[record["recipe"]].append(record)
    return groups


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Write a table in Markdown."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, ["---", *["---:"] * (len(header) - 1)], *rows])


def front_table(records: Sequence[Record]) -> str:
    """Write all points of one recipe, means over seeds, with intervals over rows of all seeds."""
    names = [name for name in records[0]["tokens"] if name != "task"]
    has_metric = "metric" in records[0]["points"][0]["rows"]
    lines = []
    for point in records[0]["points"]:
        method, mu = point["method"], point["mu"]
        rows = [point_of(record, method, mu) for record in records]
        start = [point_of(record, "unedited") for record in records]
        base = [point_of(record, "backbone") for record in records]
        counts = {name: [np.array(r["tokens"][name]) for r in records] for name in ("task", *names)}
        loss = np.mean([r["task"].sum() / c.sum() for r, c in zip(rows, counts["task"], strict=True)])
        cells = [
            label(method, mu),
            f"{loss:.4f}",
            shown(*interval([r["task"] - s["task"] for r, s in zip(rows, start, strict=True)], counts["task"])),
        ]
        if has_metric:
            cells.append(f"{np.mean([r['metric'].mean() for r in rows]):.3f}")
        cells += [
            shown(*interval([r[name] - b[name] for r, b in zip(rows, base, strict=True)], counts[name]))
            for name in names
        ]
        lines.append(cells)
    head = ["", "task loss", "change", *(["accuracy"] if has_metric else []), *(f"Δ {name}" for name in names)]
    return table(head, lines)


def price_table(groups: Mapping[str, Sequence[Record]], price: float = PRICE) -> str:
    """Write what is forgotten where the task has paid `price`: unedited, scaled, retained, and how the last two differ."""
    lines = []
    for recipe, records in groups.items():
        if len(records[0]["points"]) <= 2:
            continue
        kept = {m: [at_price(r, m, price) for r in records] for m in ("retention", "scaling")}
        unedited = [forgotten(r, point_of(r, "unedited")) for r in records]
        values = {m: [forgotten(r, rows) for r, rows in zip(records, found, strict=True)] for m, found in kept.items()}
        pairs = [(r, a, b) for r, a, b in zip(records, kept["retention"], kept["scaling"], strict=True)]
        differences = [a[name] - b[name] for _, a, b in pairs for name in GENERAL]
        counts = [np.array(r["tokens"][name]) for r, _, _ in pairs for name in GENERAL]
        ranges = [spread(unedited), spread(values["scaling"]), spread(values["retention"])]
        lines.append([recipe, str(len(records)), *ranges, shown(*interval(differences, counts))])
    head = ["adapter", "seeds", "unedited", "scaled", "retained", "retained − scaled"]
    return table(head, lines)


def peer_table(records: Sequence[Record], groups: Mapping[str, Sequence[Record]]) -> str:
    """Write every peer that was trained another way, and what retention forgets where its task loss is the peer's.

    Args:
        records: Of the adapter that is retained, one a seed.
        groups: All records; peers are those of the same task and without edits.
    """
    task = records[0]["recipe"].partition("-")[0]
    lines = []
    for recipe, peers in groups.items():
        if recipe == records[0]["recipe"] or recipe.partition("-")[0] != task:
            continue
        for peer in peers:
            ours = next((r for r in records if r["seed"] == peer["seed"]), None)
            if ours is None:
                continue
            theirs = point_of(peer, "unedited")
            tokens = np.array(peer["tokens"]["task"])
            rise = float((theirs["task"] - point_of(ours, "unedited")["task"]).sum() / tokens.sum())
            same = at_price(ours, "retention", rise) if rise >= 0 else None
            cells = [
                recipe,
                str(peer["seed"]),
                f"{theirs['task'].sum() / tokens.sum():.4f}",
                f"{rise:+.4f}",
                f"{forgotten(peer, theirs):+.4f}",
            ]
            if same is None:
                lines.append([*cells, "none is as good", ""])
                continue
            differences = [same[name] - theirs[name] for name in GENERAL]
            counts = [np.array(peer["tokens"][name]) for name in GENERAL]
            lines.append([*cells, f"{forgotten(ours, same):+.4f}", shown(*interval(differences, counts))])
    head = [
        "trained another way",
        "seed",
        "task loss",
        "change",
        "forgets",
        "retained, same task loss",
        "retained − peer",
    ]
    return table(head, lines)


def honest_choice(records: Sequence[Record], tolerance: float = PRICE) -> list[tuple[float, float, float]]:
    """Choose the strength on every other held-out row, and report it on the rest: (task rise, forgotten, unedited) a seed."""
    first, second = slice(0, None, 2), slice(1, None, 2)
    found = []
    for record in records:
        line = [
            point_of(record, "unedited"),
            *(point_of(record, p["method"], p["mu"]) for p in record["points"] if p["method"] == "retention"),
        ]
        fits = [rows for rows in line if task_rise(record, rows, first) <= tolerance]
        chosen = min(fits, key=lambda rows: forgotten(record, rows, keep=first))
        found.append(
            (
                task_rise(record, chosen, second),
                forgotten(record, chosen, keep=second),
                forgotten(record, line[0], keep=second),
            )
        )
    return found


def sensitivity_table(records: Iterable[Record], price: float = PRICE) -> str:
    """Write what is forgotten at a price with another method, or with other statistics."""
    lines = []
    for record in records:
        rows = at_price(record, record["method"], price)
        base = point_of(record, "backbone")
        counts = [np.array(record["tokens"][name]) for name in GENERAL]
        found = interval([rows[name] - base[name] for name in GENERAL], counts)
        start = forgotten(record, point_of(record, "unedited"))
        lines.append([record["variant"], f"{start:+.4f}", shown(*found), f"{task_rise(record, rows):+.4f}"])
    return table(["", "unedited", "forgotten at the price", "task paid"], lines)


def draw(groups: Mapping[str, Sequence[Record]], path: Path) -> None:
    """Draw forgetting against the task's loss: a panel a task, retention, scaling, and every peer as a point."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    mains = {recipe: records for recipe, records in groups.items() if len(records[0]["points"]) > 2}
    figure = Figure(figsize=(4.2 * len(mains), 3.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    for number, (recipe, records) in enumerate(mains.items()):
        axes = figure.add_subplot(1, len(mains), number + 1)
        for method, color in (("scaling", "tab:gray"), ("retention", "tab:blue")):
            for record in records:
                mus = sorted(p["mu"] for p in record["points"] if p["method"] == method)
                line = [point_of(record, "unedited"), *(point_of(record, method, mu) for mu in mus)]
                axes.plot(
                    [forgotten(record, r) for r in line],
                    [loss(record, r) for r in line],
                    "o-",
                    color=color,
                    markersize=3,
                    linewidth=1.2,
                    label={"scaling": "scaled (WiSE-FT)", "retention": "retained"}[method]
                    if record is records[0]
                    else None,
                )
        for record in records:
            start = point_of(record, "unedited")
            axes.plot(
                forgotten(record, start),
                loss(record, start),
                "s",
                color="black",
                markersize=5,
                label="trained adapter" if record is records[0] else None,
            )
        task = recipe.partition("-")[0]
        for peer, others in groups.items():
            if peer != recipe and peer not in mains and peer.partition("-")[0] == task:
                for other in others:
                    rows = point_of(other, "unedited")
                    axes.plot(forgotten(other, rows), loss(other, rows), "x", color="tab:red", markersize=5)
                    axes.annotate(
                        peer.removeprefix(f"{task}-lr"),
                        (forgotten(other, rows), loss(other, rows)),
                        fontsize=5,
                        xytext=(3, 2),
                        textcoords="offset points",
                    )
        axes.tick_params(labelsize=7)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.axvline(0.0, color="gray", linewidth=0.8, linestyle=":")
        axes.set_title(recipe, fontsize=9)
        axes.set_xlabel("forgotten: general text above the backbone (nats)", fontsize=8)
        axes.set_ylabel("held-out task loss (nats)", fontsize=8)
        axes.legend(frameon=False, fontsize=7)
    figure.savefig(path)


def loss(record: Record, rows: Mapping[str, Array]) -> float:
    """Held-out task loss, nats per predicted token."""
    return float(rows["task"].sum() / np.array(record["tokens"]["task"]).sum())


def label(method: str, mu: float | str) -> str:
    """Name a point."""
    if method in ("unedited", "backbone"):
        return {"unedited": "trained adapter", "backbone": "backbone"}[method]
    return f"scaled by {1 / (1 + float(mu)):.2f}" if method == "scaling" else f"{method}, μ {float(mu):g}"


def shown(value: float, low: float = math.nan, high: float = math.nan) -> str:
    """Write a change with its interval."""
    return f"{value:+.4f}" if not low < high else f"{value:+.4f} ({low:+.4f} … {high:+.4f})"


def spread(values: Sequence[float]) -> str:
    """Write a mean over seeds with the least and the largest."""
    return (
        f"{np.mean(values):+.4f}"
        if len(values) == 1
        else f"{np.mean(values):+.4f} ({min(values):+.4f} … {max(values):+.4f})"
    )
