"""Plots of the reports of the calibration commands and of `bench`. They need the extra ``plot``."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cllm_export.bundle.storage import output_error, whole_file, why_unwritable
from cllm_export.errors import OutputError
from cllm_export.extras import missing_extra, require_floors

SENSITIVITY, TRADE_OFF = "sensitivity.png", "trade_off.png"
_BAR_INCHES, _WIDTH, _MIN_HEIGHT = 0.18, 8.0, 3.0


def check_plots(directory: Path | None, *names: str, force: bool) -> None:
    """Check, before any work, that plots of these file names can be written to a directory.

    Raises:
        MissingExtraError: matplotlib is not installed.
        OutputError: the path is no directory, the directory cannot be created, or it holds such a plot and ``force`` is
            not set.
    """
    if directory is None:
        return
    above = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    reason = why_unwritable(above) if above.is_dir() else "it is no directory"
    if reason:
        raise OutputError(
            f"cannot write plots to {directory}: {above} cannot be written to ({reason}); choose another directory",
            fields=("plots",),
        )
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise missing_extra("matplotlib", extra="plot") from None
    require_floors("matplotlib")
    for name in names:
        if os.path.lexists(directory / name) and not force:
            raise OutputError(
                f"{directory / name} exists; replace it with force=True or choose another directory", fields=("plots",)
            )


def plot_sensitivity(layers: Sequence[Mapping[str, Any]], kept: Sequence[str], directory: Path) -> Path:
    """Plot the share of block-state predictions that each layer flips alone, in model order. Kept layers stand out.

    Args:
        layers: ``sensitivity`` of a report.
        kept: names of layers that keep their precision.
    """
    ordered = sorted(layers, key=lambda entry: _order(entry["layer"]))
    names = [entry["layer"] for entry in ordered]
    with _figure(directory / SENSITIVITY, height=max(_MIN_HEIGHT, _BAR_INCHES * len(names))) as axes:
        colours = ["tab:orange" if name in kept else "tab:blue" for name in names]
        axes.barh(names, [entry["flips"]["all"]["rate"] for entry in ordered], color=colours)
        axes.invert_yaxis()
        axes.tick_params(axis="y", labelsize=6)
        axes.set_xlabel("flipped predictions on block states, this layer alone quantised (orange: kept)")
    return directory / SENSITIVITY


def plot_choice(report: Mapping[str, Any], directory: Path) -> None:
    """Plot a report of ``quantize``: the layers of the chosen precision, and the times if there are any."""
    chosen = next((each for each in report["candidates"] if each["scheme"] == report["chosen"]), None)
    if chosen:
        plot_sensitivity(chosen["sensitivity"], [entry["layer"] for entry in chosen["kept"]], directory)
    if report["timings"]:
        plot_trade_off(report["timings"]["settings"], directory)


def plot_trade_off(settings: Sequence[Mapping[str, Any]], directory: Path) -> Path:
    """Plot tokens per forward against the time of a forward: a line for each bundle and method, a point for each n.

    Args:
        settings: ``settings`` of a report of ``bench``. Settings without a T(n) are left out. The size of a mark shows
            the size of the bundle's weights.
    """
    settings = [entry for entry in settings if entry["milliseconds"] is not None]
    lines = list(dict.fromkeys((entry["name"], entry["method"]) for entry in settings))
    has_methods = len({method for _, method in lines}) > 1
    largest = max((entry["weight_bytes"] for entry in settings), default=0)
    with _figure(directory / TRADE_OFF, height=5.0) as axes:
        for key in lines:
            own = [entry for entry in settings if (entry["name"], entry["method"]) == key]
            own.sort(key=lambda entry: int(entry["block_size"]))
            label = f"{own[0]['precision']}, {own[0]['weight_bytes'] / 1e6:.1f} MB"
            label += f", {key[1]}" if has_methods else ""
            times, tokens = [[entry[key] for entry in own] for key in ("milliseconds", "tokens_per_forward")]
            line = axes.plot(times, tokens, label=label)[0]
            axes.scatter(times, tokens, s=120 * own[0]["weight_bytes"] / largest, color=line.get_color())
            for entry, x, y in zip(own, times, tokens, strict=True):
                axes.annotate(f"n={entry['block_size']}", (x, y), fontsize=7)
        axes.set_xlabel("milliseconds a forward, T(n)")
        axes.set_ylabel("tokens per forward, TPF(n)")
        if lines:
            axes.legend()
    return directory / TRADE_OFF


@contextmanager
def _figure(path: Path, *, height: float) -> Iterator[Any]:
    """Axes of a figure that is written when the block ends. No display is opened."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    yield figure.subplots()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as scratch:
            figure.savefig(scratch, dpi=150, format=path.suffix[1:])
    except OSError as error:
        raise output_error(error, path) from error


def _order(layer: str) -> tuple[int, str]:
    """Sort key of a layer. It compares layer numbers as numbers, not as text."""
    numbers = [int(part) for part in layer.split(".") if part.isdigit()]
    return (numbers[0] if numbers else -1, layer)
