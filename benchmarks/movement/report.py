"""From measured numbers to a table, verdicts on the targets, JSON and a plot."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import machine
from .measure import WITHOUT, Loop, Saves

OURS = "roll_ckpt"
MILLI = 1e3


@dataclass
class Results:
    """Everything one run measured, filled in as it goes."""

    nbytes: int = 0
    saves: Saves = field(default_factory=Saves)
    loops: dict[str, Loop] = field(default_factory=dict)
    steps_s: dict[str, float] = field(default_factory=dict)
    """The arithmetic of one step of each kind of loop, in seconds."""
    many: list[float] = field(default_factory=list)
    firsts: list[dict[str, Any]] = field(default_factory=list)
    """Fresh processes of ours with the cap at the whole state."""
    memory: dict[str, dict[str, Any]] = field(default_factory=dict)
    """One fresh process of each contestant; ours with the cap at a quarter of the state."""
    cap_bytes: int = 0
    digests: dict[str, list[float]] = field(default_factory=dict)
    """Seconds until durable with our digests "on" and "off"."""
    leased: dict[str, Any] = field(default_factory=dict)
    """A fresh process of ours that saves offloaded state."""
    missing: dict[str, str] = field(default_factory=dict)
    loop_missing: dict[str, str] = field(default_factory=dict)
    background: frozenset[str] = frozenset()
    interrupted: bool = False
    about: dict[str, Any] = field(default_factory=dict)


def median(values: Sequence[float]) -> float:
    return statistics.median(values) if values else float("nan")


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else float("nan")


def best_write(saves: Saves) -> float:
    """Seconds of a raw direct write at the queue depth that did best."""
    return min(median(values) for key, values in saves.raw.items() if key.startswith("write"))


class Figures:
    """The medians that the table and the verdicts speak of."""

    def __init__(self, results: Results) -> None:
        self.results = results
        saves = results.saves
        self.memcpy = median(saves.memcpy)
        self.names = [name for name in results.about["contestants"] if name in saves.systems]
        self.raw = {key: median(values) for key, values in saves.raw.items()}
        self.raw_write = best_write(saves)
        self.raw_read = min(s for key, s in self.raw.items() if key.startswith("read"))

    def of(self, name: str, key: str) -> float:
        return median(self.results.saves.systems[name][key])

    def loss(self, kind: str, name: str) -> float | None:
        """Seconds a loop loses for each save; None where it was not measured."""
        loop = self.results.loops.get(kind)
        if loop is None or name not in loop.seconds:
            return None
        return (median(loop.seconds[name]) - median(loop.seconds[WITHOUT])) / loop.saves

    def pause(self, name: str) -> float | None:
        """The 99.9th percentile of the ticker's pauses while something was written."""
        pauses = [late for loop in self.results.loops.values() for late in loop.pauses.get(name, [])]
        return percentile(pauses, 0.999) if pauses else None

    def rate(self, seconds: float) -> float:
        return self.results.nbytes / seconds / 1e9


# --- the targets ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    figure: str
    target: str
    value: str
    met: bool | None
    """None: not measured; `value` says why."""


def verdicts(figures: Figures) -> list[Verdict]:
    found = [*_blocked(figures), *_loop(figures), *_disk(figures), *_process(figures)]
    return [*found, Verdict("on one GPU", "", "make bench-gpu", None)]


def _at_most(figure: str, value: float | None, limit: float, unit: str, scale: float = 1, digits: int = 2) -> Verdict:
    if value is None or value != value:
        return Verdict(figure, f"<= {limit * scale:.{digits}f} {unit}", "not measured", None)
    told = f"{value * scale:.{digits}f} {unit}"
    return Verdict(figure, f"<= {limit * scale:.{digits}f} {unit}", told, value <= limit)


def _at_least(figure: str, value: float | None, limit: float, unit: str) -> Verdict:
    if value is None or value != value:
        return Verdict(figure, f">= {limit:.2f} {unit}", "not measured", None)
    return Verdict(figure, f">= {limit:.2f} {unit}", f"{value:.2f} {unit}", value >= limit)


def _peers(figures: Figures) -> list[str]:
    return [name for name in figures.names if name != OURS]


def _blocked(figures: Figures) -> list[Verdict]:
    save, blocked = figures.of(OURS, "save"), figures.of(OURS, "blocked")
    found = [
        _at_most("(a) save() alone", save / figures.memcpy, 0.15, "memcpy"),
        _at_most("(a) save() alone", save, 0.015, "ms", MILLI, 1),
    ]
    tensors = figures.results.about.get("many_tensors")
    if figures.results.many:
        found.append(
            _at_most(f"(a) save() alone, {tensors} tensors", median(figures.results.many), 0.040, "ms", MILLI, 1)
        )
    found.append(_at_most("(b) save() and fence() at once", blocked / figures.memcpy, 1.2, "memcpy"))
    if _peers(figures):
        best = min(_peers(figures), key=lambda name: figures.of(name, "blocked"))
        found.append(
            _at_most(f"(b) against the best peer, {best}", blocked / figures.of(best, "blocked"), 0.9, "of its time")
        )
    return found


def _loop(figures: Figures) -> list[Verdict]:
    found = []
    for kind in figures.results.loops:
        ours = figures.loss(kind, OURS)
        losses = {name: loss for name in _peers(figures) if (loss := figures.loss(kind, name)) is not None}
        if ours is None or not losses:
            continue
        best = min(losses, key=lambda name: losses[name])
        # A peer may come out at nothing or less on a noisy machine: then no share of it can be met.
        found.append(
            _at_most(f"(c) lost per save, {kind}: of {best}", ours, 0.5 * losses[best], "ms", MILLI, 1),
        )
        if "torch.save" in losses:
            limit = 0.2 * losses["torch.save"]
            found.append(_at_most(f"(c) lost per save, {kind}: of torch.save", ours, limit, "ms", MILLI, 1))
    return found


def _disk(figures: Figures) -> list[Verdict]:
    durable, load = figures.of(OURS, "durable"), figures.of(OURS, "load")
    found = [_at_least("durable: share of raw direct write", figures.raw_write / durable, 0.9, "of its rate")]
    for peer, factor in (("torch.save", 2.5), ("dcp.save", 2.5), ("torchsnapshot.take", 1.25)):
        if peer in figures.names:
            ratio = figures.of(peer, "durable") / durable
            found.append(_at_least(f"durable: against {peer}, durable", ratio, factor, "x"))
    if "torchsnapshot.async_take" in figures.names:
        ratio = figures.of("torchsnapshot.async_take", "durable") / durable
        found.append(_at_least("durable: against torchsnapshot.async_take, durable", ratio, 1.25, "x"))
    on, off = (median(figures.results.digests.get(key, [])) for key in ("on", "off"))
    found.append(_at_least("rate with all digests against none", off / on, 0.95, "of its rate"))
    found.append(_at_least("load: share of raw direct read", figures.raw_read / load, 0.9, "of its rate"))
    if "torch.save" in figures.names:
        found.append(_at_least("load: against torch.load", figures.of("torch.save", "load") / load, 1.3, "x"))
    return found


def _process(figures: Figures) -> list[Verdict]:
    results, found = figures.results, []
    small = results.memory.get(OURS)
    if small:
        limit = 1.05 * results.cap_bytes
        found.append(_at_most("peak memory, cap a quarter of the state", small["peak"], limit, "MiB", 2**-20, 0))
        if results.firsts:
            same = all(first["crc"] == small["crc"] for first in results.firsts)
            found.append(Verdict("the same bytes on disk with that cap", "yes", "yes" if same else "no", same))
    if results.leased:
        copied, above = float(results.leased["copied"]), results.leased["peak"]
        found.append(_at_most("offloaded state: copied by the training thread", copied, 0.0, "bytes", 1, 0))
        found.append(_at_most("offloaded state: host memory above it", above, 256 << 20, "MiB", 2**-20, 0))
    for key, told in (("blocked", "save() and fence()"), ("durable", "durable")):
        ratios = [first["rows"][0][key] / median([row[key] for row in first["rows"][1:]]) for first in results.firsts]
        found.append(_at_most(f"first save against later ones, {told}", median(ratios), 1.5, "x"))
    ours, idle = figures.pause(OURS), figures.pause(WITHOUT)
    if ours is not None and idle is not None:
        found.append(_at_most("99.9th percentile pause of a ticker", ours, idle + 0.005, "ms", MILLI, 1))
    return found


# --- what is printed -----------------------------------------------------------------------------------------


def table(figures: Figures) -> list[str]:
    results = figures.results
    loops = list(results.loops)
    heads = ["save()", "blocked", "blocked", "durable", "of raw", "load", "of raw", *["lost/save"] * len(loops)]
    heads += ["peak", "pause"]
    units = ["ms", "ms", "memcpy", "GB/s", "write", "GB/s", "read", *(f"{kind.split()[0]}, ms" for kind in loops)]
    units += ["MiB", "ms"]
    lines = [_line("", heads), _line("medians", units)]
    for name in figures.names:
        cells = [
            f"{figures.of(name, 'save') * MILLI:.1f}",
            _ranged(results.saves.systems[name]["blocked"]),
            f"{figures.of(name, 'blocked') / figures.memcpy:.2f}",
            f"{figures.rate(figures.of(name, 'durable')):.2f}",
            f"{figures.raw_write / figures.of(name, 'durable'):.2f}",
            f"{figures.rate(figures.of(name, 'load')):.2f}",
            f"{figures.raw_read / figures.of(name, 'load'):.2f}",
        ]
        for kind in loops:
            loss = figures.loss(kind, name)
            cells.append("" if loss is None else f"{loss * MILLI:.0f}")
        peak = results.memory.get(name)
        cells.append("" if peak is None else f"{peak['peak'] / 2**20:.0f}")
        pause = figures.pause(name)
        cells.append("" if pause is None else f"{pause * MILLI:.1f}")
        lines.append(_line(name, cells))
    return lines + [f"  {name}: no row: {reason}" for name, reason in results.missing.items()] + _blanks(figures)


def _blanks(figures: Figures) -> list[str]:
    lines = [f"  {name}: not in the loop: {reason}" for name, reason in figures.results.loop_missing.items()]
    silent = [name for name in figures.names if name not in figures.results.background]
    if silent and figures.results.loops:
        lines.append(f"  {', '.join(silent)}: no pause: nothing is written in the background")
    return lines


_FIRST, _CELL = 31, 14


def _line(name: str, cells: Sequence[str]) -> str:
    return f"{name:<{_FIRST}}" + "".join(f"{cell:>{_CELL if i == 1 else 10}}" for i, cell in enumerate(cells))


def _ranged(values: Sequence[float]) -> str:
    found = machine.spread(values)
    return f"{found['median'] * MILLI:.0f} ({found['q1'] * MILLI:.0f}-{found['q3'] * MILLI:.0f})"


def machine_lines(figures: Figures) -> list[str]:
    results = figures.results
    rate = figures.rate
    lines = [
        f"memcpy, {machine.cores()} cores, warm huge pages: {figures.memcpy * MILLI:.1f} ms, {rate(figures.memcpy):.1f}"
        f" GB/s, noise {machine.noise(results.saves.memcpy):.0%}"
    ]
    for kind in ("write", "read"):
        told = []
        for depth in machine.DEPTHS:
            values = results.saves.raw[f"{kind} {depth}"]
            told.append(f"{depth} in flight {rate(median(values)):.2f} GB/s (noise {machine.noise(values):.0%})")
        lines.append(f"raw direct {kind}: " + ", ".join(told))
    for name, loop in results.loops.items():
        without = loop.seconds[WITHOUT]
        step = median(without) / loop.steps
        lines.append(
            f"{name}: {loop.steps} steps of {step * MILLI:.0f} ms ({step / figures.memcpy:.1f} memcpy), {loop.saves} "
            f"saves; without saves {min(without):.2f} to {max(without):.2f} s, noise {machine.noise(without):.1%}, "
            f"that is {machine.noise(without) * median(without) / loop.saves * MILLI:.0f} ms of each loss"
        )
    idle = figures.pause(WITHOUT)
    if idle is not None:
        lines.append(f"99.9th percentile pause of a 1 ms ticker in a loop without saves: {idle * MILLI:.1f} ms")
    cached = max((max(rows["cached"]) for rows in results.saves.systems.values()), default=0.0)
    verb = "works" if cached < 0.01 else "does not work"
    lines.append(f"dropping the page cache by POSIX_FADV_DONTNEED {verb} here: at most {cached:.1%} of a file stayed")
    about = results.about
    lines.append(
        f"load average {about['load_averages'][0]:.1f} at the start and {about['load_averages'][1]:.1f} at the end; "
        f"processor time taken by other guests {about['stolen']:.1%}"
    )
    return lines


def verdict_lines(found: Sequence[Verdict]) -> list[str]:
    words = {True: "met", False: "MISSED", None: "blank"}
    return [f"{words[one.met]:<8}{one.figure:<62}{one.target:>24}   {one.value}" for one in found]


def as_json(figures: Figures, found: Sequence[Verdict]) -> dict[str, Any]:
    results = figures.results
    spread = machine.spread
    return {
        **results.about,
        "interrupted": results.interrupted,
        "state_bytes": results.nbytes,
        "cap_bytes_for_memory": results.cap_bytes,
        "seconds": {
            "memcpy": spread(results.saves.memcpy),
            "raw": {key: spread(values) for key, values in results.saves.raw.items()},
            "systems": {
                name: {key: spread(values) for key, values in rows.items()}
                for name, rows in results.saves.systems.items()
            },
            "many_tensors_save": spread(results.many),
            "digests": {key: spread(values) for key, values in results.digests.items()},
        },
        "noise": {
            "memcpy": machine.noise(results.saves.memcpy),
            **{key: machine.noise(values) for key, values in results.saves.raw.items()},
            **{kind: machine.noise(loop.seconds[WITHOUT]) for kind, loop in results.loops.items()},
        },
        "loops": {
            kind: {
                "steps": loop.steps,
                "saves": loop.saves,
                "arithmetic_s": results.steps_s[kind],
                "memcpy": spread(loop.memcpy),
                "seconds": {name: spread(values) for name, values in loop.seconds.items()},
                "lost_per_save_s": {name: figures.loss(kind, name) for name in loop.seconds if name != WITHOUT},
                "pause_p999_s": {name: percentile(values, 0.999) for name, values in loop.pauses.items() if values},
            }
            for kind, loop in results.loops.items()
        },
        "first_saves": results.firsts,
        "memory": results.memory,
        "offloaded": results.leased,
        "blank": {**results.missing, **results.loop_missing},
        "targets": [vars(one) for one in found],
        "samples": {
            "systems": results.saves.systems,
            "raw": results.saves.raw,
            "memcpy": results.saves.memcpy,
            "loops": {kind: loop.seconds for kind, loop in results.loops.items()},
            "many_tensors_save": results.many,
        },
    }


def plot(figures: Figures, path: Path) -> str:
    """Draw the comparison; returns what to tell about it."""
    try:
        import matplotlib
    except ImportError:
        return "no plot: matplotlib is not installed; pip install '.[bench]'"
    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = figures.names[::-1]
    panels: list[tuple[str, dict[str, float | None], float | None]] = [
        ("blocked, memcpys", {n: figures.of(n, "blocked") / figures.memcpy for n in names}, 1.0),
        ("durable, GB/s", {n: figures.rate(figures.of(n, "durable")) for n in names}, figures.rate(figures.raw_write)),
        ("load, GB/s", {n: figures.rate(figures.of(n, "load")) for n in names}, figures.rate(figures.raw_read)),
    ]
    for kind in figures.results.loops:
        losses = {n: figures.loss(kind, n) for n in names}
        panels.append((f"lost per save, ms\n{kind}", {n: s and s * MILLI for n, s in losses.items()}, None))
    figure, axes = pyplot.subplots(1, len(panels), figsize=(3.6 * len(panels), 0.4 * len(names) + 1.6), sharey=True)
    for axis, (title, values, line) in zip(axes, panels, strict=True):
        colours = ["#c03a2b" if name == OURS else "#7a8a99" for name in names]
        bars = axis.barh(names, [values[name] or 0.0 for name in names], color=colours)
        axis.bar_label(bars, [_label(values[name]) for name in names], padding=2, fontsize=7)
        axis.margins(x=0.2)
        axis.set_title(title, fontsize=9)
        axis.tick_params(labelsize=8)
        if line is not None:
            axis.axvline(line, color="black", linewidth=0.8, linestyle=":")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)
    pyplot.close(figure)
    return f"plot in {path}"


def _label(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
