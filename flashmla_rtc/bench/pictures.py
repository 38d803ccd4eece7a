"""Pictures of what ``bench`` and ``timeline`` wrote: the roofline, how many times as long the
peers take, and what thread blocks did when.

They need matplotlib, which the extra ``plot`` brings. The roofline model is that of Williams,
Waterman and Patterson, "Roofline: an insightful visual performance model for multicore
architectures", CACM 52(4), 2009: a kernel is as fast as its arithmetic allows, or as the bytes that
it has to move.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from .shapes import Shape, geometric_mean

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Document = Mapping[str, Any]

# Okabe and Ito's colours, which readers with any colour vision tell apart.
_OURS, _PEER, _LINE = "#0072B2", "#E69F00", "#333333"
_BY_ROWS = ("#56B4E9", "#0072B2", "#009E73", "#E69F00", "#D55E00", "#CC79A7")
# A marker for each batch and length of the grid; any other shape gets the last one.
_MARKERS = {
    (1, 4096, False): ("v", "1 request of 4,096 keys"),
    (1, 65536, False): ("^", "1 of 65,536"),
    (8, 8192, False): ("<", "8 of 8,192"),
    (32, 4096, False): (">", "32 of 4,096"),
    (64, 8192, False): ("D", "64 of 8,192"),
    (128, 4096, False): ("s", "128 of 4,096"),
    (128, 8192, False): ("o", "128 of 8,192"),
    (128, 4096, True): ("P", "128 of about 4,096"),
}
_OTHER = ("X", "other shapes")


def shape_of(row: Mapping[str, Any]) -> Shape:
    """The shape that a row of a document measured."""
    return Shape(row["b"], row["s_q"], row["h_q"], row["seqlen"], row["varlen"], row["dtype"])


def _marker(row: Mapping[str, Any]) -> tuple[str, str]:
    return _MARKERS.get((row["b"], row["seqlen"], row["varlen"]), _OTHER)


def _fastest_peer(row: Mapping[str, Any]) -> float:
    """Microseconds, in a burst."""
    return float(min(row["peers"].values()))


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def roofline(document: Document) -> Figure:
    """Operations a second over operations a byte, on a log-log scale, under the measured ceilings.

    A filled marker is ours in a burst, a hollow one the fastest peer. The roof is the smaller of
    the read bandwidth and the matrix product in a burst; the broken line is the product held.

    Raises:
        KeyError: the document has no rows, or not the two ceilings.
    """
    rows: Sequence[Mapping[str, Any]] = document["rows"]
    if not rows:
        raise KeyError("rows")
    ceilings = document["ceilings"]
    bandwidth, peak = ceilings["read_TBps"], ceilings["bf16_matmul_TFLOPS"]
    figure = _figure(8, 5)
    axes = figure.add_subplot()
    shapes = [shape_of(row) for row in rows]
    intensities = [shape.flops / shape.bytes for shape in shapes]

    ridge = peak / bandwidth  # TFLOPS over TB/s: operations a byte
    left, right = min(*intensities, ridge) / 1.5, max(*intensities, ridge) * 1.5
    axes.plot([left, ridge, right], [left * bandwidth, peak, peak], color=_LINE, label="_roof")
    axes.annotate(
        f"read {bandwidth:.2f} TB/s",
        (left * 1.1, left * 1.1 * bandwidth),
        xytext=(0, 14),
        textcoords="offset points",
        rotation=38,
        color=_LINE,
    )
    axes.annotate(
        f"matrix product {peak:.0f} TFLOPS in a burst",
        (right, peak),
        xytext=(0, 5),
        textcoords="offset points",
        ha="right",
        color=_LINE,
    )
    held = ceilings.get("bf16_matmul_held_TFLOPS")
    if held:
        axes.plot([held / bandwidth, right], [held, held], color=_LINE, linestyle="--", linewidth=1)
        axes.annotate(
            f"{held:.0f} held",
            (right, held),
            xytext=(0, -14),
            textcoords="offset points",
            ha="right",
            color=_LINE,
        )

    for row, shape, intensity in zip(rows, shapes, intensities, strict=True):
        marker, label = _marker(row)
        if row["peers"]:
            axes.plot(
                intensity,
                shape.flops / _fastest_peer(row) / 1e6,
                marker,
                color=_PEER,
                fillstyle="none",
                label="_peer",
            )
        axes.plot(intensity, row["TFLOPS"], marker, color=_OURS, label=label)
    handles, labels = axes.get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    axes.legend(once.values(), once.keys(), loc="lower right", fontsize="small", frameon=False)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="operations a byte (2 · rows · (576 + 512) a token of 1,152 bytes)",
        ylabel="TFLOPS",
        title=f"{document['device']}: ours (filled) and the fastest peer (hollow)",
    )
    axes.set_xticks([1, 2, 5, 10, 20, 50, 100, 200, 500, 1000])
    axes.set_xlim(left, right)  # behind set_xticks, which widens them
    axes.set_ylim(top=peak * 1.7)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("")
    axes.grid(alpha=0.25)
    return figure


def speedup(document: Document) -> Figure:
    """The time of the fastest peer over ours in a burst: a column for each batch and length, a
    colour for each number of query rows (heads times queries). Shapes that agree in both share a
    point, their geometric mean.

    Raises:
        KeyError: no row of the document has a peer.
    """
    rows = [row for row in document["rows"] if row["peers"]]
    if not rows:
        raise KeyError("peers")
    names = list(dict.fromkeys(_marker(row)[1] for row in rows))
    points: dict[int, dict[str, list[float]]] = {}
    for row in rows:
        by_name = points.setdefault(row["h_q"] * row["s_q"], {})
        by_name.setdefault(_marker(row)[1], []).append(_fastest_peer(row) / row["us"])
    figure = _figure(8, 4)
    axes = figure.add_subplot()
    for number, (query_rows, by_name) in enumerate(sorted(points.items())):
        axes.plot(
            [names.index(name) for name in by_name],
            [geometric_mean(ratios) for ratios in by_name.values()],
            marker="o",
            linestyle="",
            color=_BY_ROWS[number % len(_BY_ROWS)],
            label=f"{query_rows} rows",
        )
    axes.axhline(1, color=_LINE, linewidth=1)
    axes.set_xticks(range(len(names)), names, rotation=25, ha="right")
    mean = geometric_mean(_fastest_peer(row) / row["us"] for row in rows)
    axes.set(
        ylabel="time of the fastest peer / ours",
        title=f"{document['device']}: geometric mean {mean:.2f}",
    )
    axes.legend(fontsize="small", frameon=False, ncols=2)
    axes.grid(alpha=0.25)
    return figure


# What a role did until the event, and in which colour: Okabe and Ito's, dark grey for their
# black, and a light grey.
_PHASES = {
    "q": ("waits for Q", "#F0E442"),
    "scores": ("S = Q Kᵀ, and the wait for K", "#0072B2"),
    "p": ("softmax", "#E69F00"),
    "output": ("O += P V, and the wait for P", "#009E73"),
    "sums": ("makes, or waits for, the sums of rows", "#333333"),
    "written": ("writes", "#D55E00"),
    "fetched": ("waits for other pieces, adds them", "#CC79A7"),
    "issued": ("asks for K", "#56B4E9"),
    "free": ("waits for room", "#DDDDDD"),
}
# From the keys to the result.
_ROLES = ("loader", "scorer", "left", "right", "left merging", "right merging")


def timeline(document: Document) -> Figure:
    """What the roles of three thread blocks did when: the first to end, the one in the middle, the
    last.

    Raises:
        KeyError: the document has no blocks.
    """
    ends = sorted(
        (max(times[-1][1] for times in block["roles"].values()), block["block"])
        for block in document["blocks"]
        if any(kind != "start" for kind, _ in block["roles"].get("left", ()))  # the others are idle
    )
    if not ends:
        raise KeyError("blocks")
    chosen = dict.fromkeys(ends[index][1] for index in (0, len(ends) // 2, -1))
    blocks = {block["block"]: block["roles"] for block in document["blocks"]}
    rows = [(number, role) for number in chosen for role in _ROLES if role in blocks[number]]
    figure = _figure(10, 1.2 + 0.3 * len(rows))
    axes = figure.add_subplot()
    for at, (number, role) in enumerate(rows):
        for (_, begin), (kind, end) in pairwise(blocks[number][role]):
            text, color = _PHASES[kind]
            axes.barh(at, end - begin, left=begin, color=color, label=text)
    labels = [f"block {number}, {role}" for number, role in rows]
    axes.set_yticks(range(len(labels)), labels, fontsize="small")
    axes.invert_yaxis()
    handles, texts = axes.get_legend_handles_labels()
    once = dict(zip(texts, handles, strict=True))
    figure.legend(
        once.values(),
        once.keys(),
        loc="outside lower center",
        ncols=3,
        fontsize="small",
        frameon=False,
    )
    axes.set(xlabel="µs", title=f"{document['device']}: {Shape(**document['shape']).label}")
    return figure


PICTURES = {"roofline": roofline, "speedup": speedup, "timeline": timeline}
