"""Shows on the terminal what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median

from rich.box import SIMPLE_HEAD
from rich.table import Table

from benchmarks.results import OURS, Metric, Result, Verdict

__all__ = ["results_table", "verdicts_table"]


def results_table(title: str, results: Sequence[Result], metrics: Sequence[Metric]) -> Table:
    """@return: one row's results; medians of the rounds, and the range of the first number."""
    shown = Table(title=title, box=SIMPLE_HEAD, title_justify="left")
    for column in ("case", "link", "relay"):
        shown.add_column(column)
    present = [metric for metric in metrics if any(metric.name in result.values for result in results)]
    for metric in present:
        shown.add_column(metric.title, justify="right")
    groups: dict[tuple[str, str, str], list[Mapping[str, float]]] = {}
    cases, links = (list(dict.fromkeys(getattr(r, field) for r in results)) for field in ("case", "link"))
    for result in sorted(results, key=lambda result: (cases.index(result.case), links.index(result.link))):
        groups.setdefault((result.case, result.link, result.tool), []).append(result.values)
    keys = list(groups)
    for place, (case, link, tool) in enumerate(keys):
        same = groups[case, link, tool]
        cells = [
            _spread([values[metric.name] for values in same if metric.name in values], metric)
            for metric in present
        ]
        last = place + 1 == len(keys) or keys[place + 1][:2] != (case, link)
        style = "bold" if tool == OURS else None
        shown.add_row(case, link, tool, *cells, end_section=last, style=style)
    return shown


def _spread(values: Sequence[float], metric: Metric) -> str:
    if not values:
        return "-"
    low, middle, high = (
        f"{value * metric.scale:.{metric.digits}f}" for value in (min(values), median(values), max(values))
    )
    return middle if low == high else f"{middle} ({low}-{high})"


def verdicts_table(verdicts: Sequence[Verdict]) -> Table:
    """@return: what relaymux has to reach, and whether it does."""
    shown = Table(title="relaymux beside the best of the others", box=SIMPLE_HEAD, title_justify="left")
    for column in ("row", "case", "link", "what", "compared with"):
        shown.add_column(column)
    for column in ("ratio", "wanted"):
        shown.add_column(column, justify="right")
    shown.add_column("")
    for verdict in verdicts:
        target = verdict.target
        low, high = min(verdict.ratios), max(verdict.ratios)
        shown.add_row(
            target.row,
            target.case,
            verdict.link,
            target.metric,
            "-"
            if target.absolute
            else verdict.rival + (f" ({target.yardstick})" if target.yardstick else ""),
            f"{verdict.ratio:.2f} ({low:.2f}-{high:.2f})",
            f"{'at most' if target.at_most is not None else 'at least'} {target.limit:g}",
            "[green]met[/]" if verdict.met else "[red]missed[/]",
        )
    return shown
