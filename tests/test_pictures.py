"""``plot``: the pictures show what the results say, and the one in the docs is of these results."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashmla_rtc import __main__ as program
from flashmla_rtc.bench.shapes import Shape, geometric_mean

pytest.importorskip("matplotlib", reason="needs the extra plot")

from flashmla_rtc.bench import pictures, timeline

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "h100.json"


@pytest.fixture
def document() -> dict[str, Any]:
    return json.loads(RESULTS.read_text(encoding="utf-8"))


def markers(axes: Any, color: str, fillstyle: str) -> list[tuple[float, float]]:
    """The single points of one kind."""
    return [
        (float(line.get_xdata()[0]), float(line.get_ydata()[0]))
        for line in axes.lines
        if len(line.get_xdata()) == 1
        and line.get_color() == color
        and line.get_fillstyle() == fillstyle
    ]


def test_every_shape_is_a_point_under_the_roof(document: dict[str, Any]) -> None:
    axes = pictures.roofline(document).axes[0]
    ours = markers(axes, pictures._OURS, "full")
    assert len(ours) == len(document["rows"]) == 64
    bandwidth = document["ceilings"]["read_TBps"]
    peak = document["ceilings"]["bf16_matmul_TFLOPS"]
    for (intensity, tflops), row in zip(ours, document["rows"], strict=True):
        shape = pictures.shape_of(row)
        assert intensity == pytest.approx(shape.flops / shape.bytes)
        assert tflops == pytest.approx(shape.flops / row["us"] / 1e6, rel=1e-2)
        assert tflops < min(intensity * bandwidth, peak)


def test_the_roof_is_the_smaller_ceiling(document: dict[str, Any]) -> None:
    axes = pictures.roofline(document).axes[0]
    roof = next(line for line in axes.lines if line.get_label() == "_roof")
    for x, y in zip(roof.get_xdata(), roof.get_ydata(), strict=True):
        bandwidth = document["ceilings"]["read_TBps"]
        assert y == pytest.approx(min(x * bandwidth, document["ceilings"]["bf16_matmul_TFLOPS"]))


def test_the_hollow_points_are_the_fastest_peer(document: dict[str, Any]) -> None:
    axes = pictures.roofline(document).axes[0]
    hollow = markers(axes, pictures._PEER, "none")
    for (_, tflops), row in zip(hollow, document["rows"], strict=True):
        fastest = min(row["peers"].values())
        assert tflops == pytest.approx(pictures.shape_of(row).flops / fastest / 1e6)


def test_a_row_gives_back_its_shape() -> None:
    row = {"b": 3, "s_q": 2, "h_q": 7, "seqlen": 99, "varlen": True, "dtype": "float16"}
    assert pictures.shape_of(row) == Shape(3, 2, 7, 99, True, "float16")


def test_speedup_is_the_fastest_peer_over_ours(document: dict[str, Any]) -> None:
    figure = pictures.speedup(document)
    ratios = [min(row["peers"].values()) / row["us"] for row in document["rows"]]
    assert f"geometric mean {geometric_mean(ratios):.2f}" in figure.axes[0].get_title()
    expected: dict[tuple[int, str], list[float]] = {}
    for row, ratio in zip(document["rows"], ratios, strict=True):
        column = pictures._marker(row)[1]
        expected.setdefault((row["h_q"] * row["s_q"], column), []).append(ratio)
    columns = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    drawn = {
        (int(line.get_label().split()[0]), columns[int(x)]): y
        for line in figure.axes[0].lines
        if line.get_marker() == "o"
        for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)
    }
    assert drawn == pytest.approx({key: geometric_mean(at) for key, at in expected.items()})


def test_shapes_outside_the_grid_and_missing_peers_are_drawn(document: dict[str, Any]) -> None:
    row = {**document["rows"][0], "b": 5, "peers": {}}
    figure = pictures.roofline({**document, "rows": [row]})
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["other shapes"]
    with pytest.raises(KeyError, match="peers"):
        pictures.speedup({**document, "rows": [row]})


@pytest.mark.parametrize("picture", ["roofline", "speedup"])
def test_the_command_draws_the_same_twice(picture: str, tmp_path: Path) -> None:
    files = [tmp_path / "a.svg", tmp_path / "b.svg"]
    for file in files:
        assert program.main(["plot", picture, str(RESULTS), str(file)]) == 0
    assert files[0].read_bytes() == files[1].read_bytes()
    assert "NVIDIA H100" in files[0].read_text(encoding="utf-8")


def test_the_picture_in_the_docs_is_of_the_committed_results(document: dict[str, Any]) -> None:
    """It names the results that it was drawn from. (Its lines differ between versions of
    matplotlib.)
    """
    text = (ROOT / "docs" / "images" / "roofline.svg").read_text(encoding="utf-8")
    assert hashlib.sha256(RESULTS.read_text(encoding="utf-8").encode()).hexdigest() in text
    ceilings = document["ceilings"]
    assert f"read {ceilings['read_TBps']:.2f} TB/s" in text
    assert f"matrix product {ceilings['bf16_matmul_TFLOPS']:.0f} TFLOPS in a burst" in text
    assert f"{ceilings['bf16_matmul_held_TFLOPS']:.0f} held" in text
    assert document["device"] in text


def test_the_timeline_in_the_docs_is_of_the_committed_recording() -> None:
    text = (ROOT / "docs" / "images" / "timeline.svg").read_text(encoding="utf-8")
    recording = RESULTS.with_name("timeline-1x4096x128.json").read_text(encoding="utf-8")
    assert hashlib.sha256(recording.encode()).hexdigest() in text
    assert json.loads(recording)["digest"] == json.loads(RESULTS.read_text())["digest"]
    drawn = {kind for block in json.loads(recording)["blocks"] for kind in kinds_of(block)}
    assert {pictures._PHASES[kind][1].lower() for kind in drawn} <= set(
        re.findall("#[0-9a-f]{6}", text)
    )


def kinds_of(block: dict[str, Any]) -> set[str]:
    """What the roles of a block did, besides starting."""
    return {kind for events in block["roles"].values() for kind, _ in events} - {"start"}


def test_no_two_kinds_of_a_timeline_look_the_same() -> None:
    colors = [color.upper() for _, color in pictures._PHASES.values()]
    assert len(set(colors)) == len(colors)


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert program.main(["plot", *arguments]) == 1
    return capsys.readouterr().err


def test_what_can_t_be_drawn_is_said(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = str(tmp_path / "out.svg")
    assert "could not be read" in fails(capsys, "roofline", str(tmp_path / "absent.json"), out)
    other = tmp_path / "other.json"
    other.write_text("no json")
    assert "is not JSON" in fails(capsys, "roofline", str(other), out)
    for text, problem in (
        ("{}", "has no rows"),
        ('{"rows": []}', "has no rows"),
        ('{"rows": [{}]}', "has no ceilings"),
        ("[]", "can't be drawn"),
        (
            '{"rows": [7], "ceilings": {"read_TBps": 3, "bf16_matmul_TFLOPS": 9}}',
            "can't be drawn",
        ),
    ):
        other.write_text(text)
        message = fails(capsys, "roofline", str(other), out)
        assert problem in message
        assert "roofline needs what bench --json writes." in message
    bad = str(tmp_path / "absent" / "out.svg")
    assert "could not be written" in fails(capsys, "roofline", str(RESULTS), bad)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install 'flashmla_rtc[plot]'" in fails(capsys, "roofline", str(RESULTS), out)


@pytest.mark.parametrize("name", ["out.foo", "out.jpg", "out", ".svg"])
def test_only_the_promised_formats_are_written(
    name: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(pictures.PICTURES, "roofline", lambda _: pytest.fail("it was drawn"))
    said = fails(capsys, "roofline", str(RESULTS), str(tmp_path / name))
    assert said == (
        f"flashmla_rtc: {tmp_path / name} can't be written: "
        "plot writes files that end in .svg, .png or .pdf.\n"
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name, beginning", [("a.SVG", b"<?xml"), ("a.png", b"\x89PNG"), ("a.pdf", b"%PDF")]
)
def test_the_promised_formats_are_written(name: str, beginning: bytes, tmp_path: Path) -> None:
    assert program.main(["plot", "roofline", str(RESULTS), str(tmp_path / name)]) == 0
    assert (tmp_path / name).read_bytes().startswith(beginning)


# -- the timeline ---------------------------------------------------------------------------------


def event(kind: str, cycles: int, nanoseconds: int = 0) -> int:
    return nanoseconds << 32 | (cycles % (1 << 26)) << 6 | timeline.KINDS.index(kind)


def log_of(blocks: dict[int, dict[str, list[int]]]) -> np.ndarray:
    log = np.zeros((max(blocks) + 1, len(timeline.ROLES), timeline.EVENTS), np.uint64)
    for block, roles in blocks.items():
        for role, events in roles.items():
            log[block, timeline.ROLES.index(role), : len(events)] = events
    return log.reshape(-1)


WORK = [
    event("start", (1 << 26) - 100, 5_000),
    event("q", 1900, 6_000),  # the cycle counter has come round
    event("scores", 3900),
    event("p", 4900),
    event("output", 5900),
    event("sums", 9900, 10_000),
    event("written", 11_900, 11_000),
]


def test_a_role_that_knows_one_time_goes_by_the_longest_role_s_clock() -> None:
    short = [event("start", 0, 5_000), event("q", 300, 5_300)]  # another rate, and not for long
    loader = [event("start", 700, 5_000), event("free", 2_700), event("issued", 4_700)]
    roles = {"left": WORK, "right": short, "loader": loader}
    (block,) = timeline.decode_log(log_of({0: roles}))
    assert block["roles"]["loader"] == [["start", 0.0], ["free", 1.0], ["issued", 2.0]]


def test_events_without_the_device_s_time_are_placed_by_cycles() -> None:
    late = [event("start", 0, 5_500)]
    blocks = timeline.decode_log(log_of({1: {"left": WORK, "right": late}, 3: {"left": late}}))
    assert [block["block"] for block in blocks] == [1, 3]
    assert blocks[0]["roles"]["left"] == [
        ["start", 0.0],
        ["q", 1.0],
        ["scores", 2.0],
        ["p", 2.5],
        ["output", 3.0],
        ["sums", 5.0],
        ["written", 6.0],
    ]
    assert blocks[0]["roles"]["right"] == [["start", 0.5]]
    assert timeline.decode_log(np.zeros(len(timeline.ROLES) * timeline.EVENTS, np.uint64)) == []


def test_the_kernel_has_the_same_kinds_and_roles() -> None:
    text = (ROOT / "kernels" / "mla_decode_trace.cuh").read_text(encoding="utf-8")
    assert tuple(name.lower() for name in re.findall(r"^    TRACE_(\w+),", text, re.M)) == (
        timeline.KINDS
    )
    for name, number in (
        ("ROLES", len(timeline.ROLES)),
        ("LOADER", timeline.ROLES.index("loader")),
        ("MERGING", timeline.ROLES.index("left merging")),
        ("SCORER", timeline.ROLES.index("scorer")),
    ):
        assert re.search(rf"\bTRACE_{name} = {number}[,;]", text), name
    # The side of a warpgroup is its role, and its role when it merges is that many further.
    assert timeline.ROLES[:2] == ("left", "right")
    assert timeline.ROLES.index("right merging") == timeline.ROLES.index("left merging") + 1
    assert set(pictures._PHASES) == set(timeline.KINDS) - {"none", "start"}
    assert sorted(pictures._ROLES) == sorted(timeline.ROLES)


def test_a_foreign_document_is_told_which_command_it_takes(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = str(tmp_path / "out.svg")
    assert "timeline needs what timeline writes" in fails(capsys, "timeline", str(RESULTS), out)
    recording = tmp_path / "timeline.json"
    recording.write_text(json.dumps({"device": "a device", "digest": "0", "blocks": []}))
    said = fails(capsys, "roofline", str(recording), out)
    assert "roofline needs what bench --json writes" in said


def test_the_timeline_shows_first_middle_and_last_and_leaves_out_the_idle() -> None:
    longer = [*WORK, event("written", 20_000, 15_000)]
    idle = [event("start", 0, 5_000)]
    log = log_of({n: {"left": WORK} for n in range(4)} | {7: {"left": longer}, 8: {"left": idle}})
    document = {
        "device": "a device",
        "shape": {"batch": 1, "seq_len_q": 1, "heads_q": 16, "seqlen": 64},
        "blocks": timeline.decode_log(log),
    }
    axes = pictures.timeline(document).axes[0]
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == ["block 0, left", "block 2, left", "block 7, left"]
    assert "keys 64" in axes.get_title()
    with pytest.raises(KeyError, match="blocks"):
        pictures.timeline({**document, "blocks": []})


def test_the_timeline_shows_roles_from_the_keys_to_the_result() -> None:
    start = event("start", 0, 5_000)
    log = log_of(
        {
            0: {
                "left": [start, event("output", 4_000), event("sums", 5_000, 10_000)],
                "loader": [start, event("free", 1_000, 6_000), event("issued", 2_000, 7_000)],
                "left merging": [event("start", 5_000, 10_000), event("fetched", 7_000, 12_000)],
                "scorer": [
                    start,
                    event("q", 1_000, 6_000),
                    event("scores", 2_000),
                    event("p", 3_000, 8_000),
                ],
            }
        }
    )
    document = {
        "device": "a device",
        "shape": {"batch": 1, "seq_len_q": 1, "heads_q": 16, "seqlen": 64},
        "blocks": timeline.decode_log(log),
    }
    figure = pictures.timeline(document)
    axes = figure.axes[0]
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == [f"block 0, {role}" for role in ("loader", "scorer", "left", "left merging")]
    drawn: dict[int, list[tuple[str, float, float]]] = {}
    for bars in axes.containers:
        (bar,) = bars.patches
        row = round(bar.get_y() + bar.get_height() / 2)
        drawn.setdefault(row, []).append((bars.get_label(), bar.get_x(), bar.get_width()))
    said = {kind: text for kind, (text, _) in pictures._PHASES.items()}
    assert drawn == {
        0: [(said["free"], 0, 1), (said["issued"], 1, 1)],
        1: [(said["q"], 0, 1), (said["scores"], 1, 1), (said["p"], 2, 1)],
        2: [(said["output"], 0, 4), (said["sums"], 4, 1)],
        3: [(said["fetched"], 5, 2)],
    }
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert sorted(legend) == sorted({text for row in drawn.values() for text, *_ in row})


def test_without_a_gpu_the_timeline_says_what_it_needs(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit):
        program.main(["timeline", "1,1,*,64", str(tmp_path / "out.json")])
    assert "one shape, without stars" in capsys.readouterr().err
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert program.main(["timeline", "1,1,16,64", str(tmp_path / "out.json")]) == 1
    assert "timeline needs a Hopper GPU" in capsys.readouterr().err
