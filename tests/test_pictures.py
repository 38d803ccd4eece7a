"""``plot``: the pictures show what the results say, and the one in the docs is of these results."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from flashmla_rtc import __main__ as program
from flashmla_rtc.bench.shapes import Shape, geometric_mean

pytest.importorskip("matplotlib", reason="needs the extra plot")

from flashmla_rtc.bench import pictures

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


@pytest.mark.parametrize("picture", list(pictures.PICTURES))
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
    bad = str(tmp_path / "out.nothing")
    assert "could not be written" in fails(capsys, "roofline", str(RESULTS), bad)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install 'flashmla_rtc[plot]'" in fails(capsys, "roofline", str(RESULTS), out)
