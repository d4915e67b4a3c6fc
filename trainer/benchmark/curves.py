"""Curves of time against size, and the size from which another device is faster."""

from typing import Any

from matplotlib.axes import Axes

_STYLES = ("-", "--", "-.", ":")

Row = dict[str, Any]


def group_curves(rows: list[Row]) -> dict[tuple[str, str], list[Row]]:
    """Groups rows, which are in ascending size, by "device" and "label"."""
    curves: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        curves.setdefault((row["device"], row["label"]), []).append(row)
    return curves


def find_crossovers(rows: list[Row], size: str, *, first: str) -> dict[str, Row]:
    """Finds the size from which each other device is faster than the first one.

    A device is faster at a size if its third quartile is below the first quartile of the other.

    Args:
        rows: Measured rows with a "label", in ascending size.
        size: The column of the size.
        first: The first device.

    Returns:
        By label, first and other device: "size" is the first measured size from which the other
        device is faster at every larger size too, and "reason" describes it. The size is None if
        there is none, or if the other device is faster at every size.
    """
    curves, found = group_curves(rows), {}
    for (device, label), other in curves.items():
        # Only GPUs have TF32. It is compared with the CPU's float32.
        baseline = curves.get((first, label.replace("tf32", "float32")), [])
        by_size = {row[size]: row["timing"]["quartiles_seconds"] for row in baseline}
        both = [row for row in other if row[size] in by_size]
        if not both or device == first:
            continue
        faster = [r["timing"]["quartiles_seconds"][1] < by_size[r[size]][0] for r in both]
        last = max((i for i, each in enumerate(faster) if not each), default=-1)
        crossover = None if last + 1 in (0, len(both)) else both[last + 1][size]
        if crossover:
            name = size.replace("_", " ")
            reason = f"faster from {name} {crossover:,}, not yet reliably at {both[last][size]:,}"
        elif last == -1:
            reason = "faster at every size"
        elif both[-1]["timing"]["quartiles_seconds"][0] > by_size[both[-1][size]][1]:
            reason = "not faster at the largest size"
        else:
            reason = "neither is reliably faster: the quartiles overlap"
        found[f"{label}/{first}/{device}"] = {"size": crossover, "reason": reason}
    return found


def crossover_notes(crossovers: dict[str, Row]) -> list[str]:
    """Returns a line for each crossover."""
    lines = []
    for key, crossover in crossovers.items():
        *label, first, device = key.split("/")
        lines.append(f"{', '.join(label)}: {device} compared with {first}: {crossover['reason']}")
    return lines


def draw_curves(axes: Axes, rows: list[Row], size: str, crossovers: dict[str, Row]) -> None:
    """Draws medians with a band between the quartiles, and a line for each crossover.

    Args:
        axes: An empty panel.
        rows: Measured rows with a "label", in ascending size.
        size: The column of the size.
        crossovers: See `find_crossovers`.
    """
    curves = group_curves(rows)
    devices = list(dict.fromkeys(device for device, _ in curves))
    labels = list(dict.fromkeys(label for _, label in curves))
    for (device, label), curve in curves.items():
        sizes = [row[size] for row in curve]
        low, high = zip(*(row["timing"]["quartiles_seconds"] for row in curve), strict=True)
        colour = f"C{devices.index(device)}"
        look = {"color": colour, "linestyle": _STYLES[labels.index(label) % len(_STYLES)]}
        medians = [row["timing"]["median_seconds"] for row in curve]
        axes.loglog(sizes, medians, marker=".", label=f"{device} {label}", **look)
        axes.fill_between(sizes, low, high, color=colour, alpha=0.2, linewidth=0)
    for key, crossover in crossovers.items():
        if crossover["size"]:
            axes.axvline(crossover["size"], color="grey", linestyle=":")
            text = f" {key.rpartition('/')[2]} is faster from {crossover['size']:,}"
            axes.text(crossover["size"], axes.get_ylim()[0], text, rotation=90, va="bottom")
    axes.set(xlabel=size.replace("_", " "), ylabel="seconds: median and quartiles")
    axes.grid(visible=True, which="major", alpha=0.3)
    axes.legend(fontsize=9)
