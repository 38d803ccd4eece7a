"""Pictures of plans: every block is drawn once, where it is computed, and every word is inside."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import flashmla_rtc
from flashmla_rtc import FlashMLASchedMeta, draw_plan, geometry, plan_for, plan_picture, schedule
from flashmla_rtc.plan_reading import ReadPlan

SVG = "{http://www.w3.org/2000/svg}"

lengths_of_batches = st.lists(
    st.integers(0, 300) | st.integers(0, 20_000) | st.just(65_536), min_size=0, max_size=80
)


def blocks_of(lengths: Any) -> list[int]:
    return [-(-int(length) // 64) for length in lengths]


def parsed(picture: flashmla_rtc.PlanPicture) -> ET.Element:
    return ET.fromstring(picture.svg)


def work(root: ET.Element) -> list[dict[str, str]]:
    return [rect.attrib for rect in root.iter(f"{SVG}rect") if rect.get("class") == "work"]


def check(picture: flashmla_rtc.PlanPicture, lengths: Any, parts: int) -> None:
    """All that has to hold of any picture of a plan for these lengths."""
    root = parsed(picture)
    blocks = blocks_of(lengths)
    drawn: dict[int, list[tuple[int, int]]] = defaultdict(list)
    loads = [0] * parts
    for rect in work(root):
        count = int(rect["data-blocks"])
        assert count > 0
        loads[int(rect["data-part"])] += count
        if "data-request" in rect:
            begin = int(rect["data-begin"])
            drawn[int(rect["data-request"])].append((begin, begin + count))
        else:  # several short ones, each whole
            requests = [int(word) for word in rect["data-requests"].split()]
            assert len(requests) > 1
            assert sum(blocks[request] for request in requests) == count
            for request in requests:
                drawn[request].append((0, blocks[request]))
    for request, count in enumerate(blocks):
        at = 0
        for begin, end in sorted(drawn[request]):
            assert begin == at, f"request {request}: {sorted(drawn[request])}"
            at = end
        assert at == count
    facts = picture.facts
    assert (facts.parts, facts.requests, facts.blocks) == (parts, len(blocks), sum(blocks))
    assert sum(loads) == sum(blocks)
    assert (facts.least, facts.most) == (min(loads), max(loads))
    assert facts.mean == pytest.approx(np.mean(np.array(loads, np.float64)))
    assert facts.parts_used == np.count_nonzero(loads)
    if facts.most:
        assert facts.balance == pytest.approx(100 * np.mean(loads) / np.max(loads))
    inside(root)


def inside(root: ET.Element) -> None:
    """No box and no text reaches out of the picture, in a font that is wide."""
    _, _, width, height = (float(word) for word in root.attrib["viewBox"].split())
    for rect in root.iter(f"{SVG}rect"):
        if rect.get("class") == "work":
            x, y = float(rect.attrib["x"]), float(rect.attrib["y"])
            assert 0 <= x <= x + float(rect.attrib["width"]) <= width
            assert 0 <= y <= y + float(rect.attrib["height"]) <= height
    for text in root.iter(f"{SVG}text"):
        size = float(text.attrib["font-size"])
        wide = 0.62 * size * len(text.text or "")
        x = float(text.attrib["x"])
        left = {"start": x, "middle": x - wide / 2, "end": x - wide}[text.attrib["text-anchor"]]
        assert left >= 0, text.text
        assert left + wide <= width, text.text
        assert size <= float(text.attrib["y"]) <= height - 3


@settings(max_examples=150, deadline=None)
@given(lengths_of_batches, st.sampled_from([1, 16, 64, 65, 128, 256]), st.integers(1, 140))
def test_every_block_is_drawn_once(lengths: list[int], rows: int, num_sms: int) -> None:
    plan, splits = plan_for(lengths, rows, num_sms=num_sms)
    check(draw_plan(plan, splits, lengths), lengths, len(plan))


@pytest.mark.parametrize("batch", [1, 2, 7, 31, 64, 128, 200, 256])
@pytest.mark.parametrize("heads", [16, 128])
def test_batches_on_an_h100(batch: int, heads: int) -> None:
    lengths = np.random.default_rng(batch).integers(1, 40_000, batch).astype(np.int32)
    plan, splits = plan_for(lengths, heads)
    picture = draw_plan(plan, splits, lengths)
    check(picture, lengths, 132 if heads == 16 else 66)
    cut = np.diff(splits) > 1
    assert picture.facts.requests_cut == cut.sum()
    assert picture.facts.pieces == np.diff(splits)[cut].sum()


def test_four_thousand_requests_are_one_picture_of_bearable_size() -> None:
    lengths = np.random.default_rng(1).integers(0, 900, 4000).astype(np.int32)
    plan, splits = plan_for(lengths, 16)
    picture = draw_plan(plan, splits, lengths)
    check(picture, lengths, 132)
    assert len(picture.svg) < 2_000_000
    one_part = draw_plan(*plan_for(lengths, 16, num_sms=1), lengths)
    check(one_part, lengths, 1)
    assert len(one_part.svg) < 400_000  # most are too thin to be seen one by one


def test_lengths_of_heights_and_the_line_of_the_mean() -> None:
    """Boxes are as long as their blocks, to the hair between them."""
    lengths = [64 * n for n in (3, 40, 1, 17, 25, 8)]
    for num_sms in (5, 30):
        plan, splits = plan_for(lengths, 16, num_sms=num_sms)
        picture = draw_plan(plan, splits, lengths)
        root = parsed(picture)
        along = "width" if len(plan) <= plan_picture.MOST_ROWS else "height"
        full = {"width": plan_picture.WIDTH - plan_picture.LEFT - plan_picture.RIGHT}
        pixels = full.get(along, plan_picture.COLUMNS_HEIGHT)
        for rect in work(root):
            expected = int(rect["data-blocks"]) * pixels / picture.facts.most
            assert float(rect[along]) == pytest.approx(expected, abs=0.8)
        (dashed, _) = [
            line.attrib for line in root.iter(f"{SVG}line") if line.get("stroke-dasharray")
        ]
        mean = picture.facts.mean * pixels / picture.facts.most
        if along == "width":
            assert float(dashed["x1"]) == pytest.approx(plan_picture.LEFT + mean, abs=0.01)
        else:
            bottom = plan_picture.TOP + plan_picture.COLUMNS_HEIGHT
            assert float(dashed["y1"]) == pytest.approx(bottom - mean, abs=0.01)


def test_pieces_of_cut_requests_are_hatched_and_no_others() -> None:
    lengths = [6400, 100, 100]
    plan, splits = plan_for(lengths, 16, num_sms=6)
    picture = draw_plan(plan, splits, lengths)
    root = parsed(picture)
    hatched = [rect for rect in root.iter(f"{SVG}rect") if "url(#" in rect.get("fill", "")]
    titles = [rect.find(f"{SVG}title") for rect in hatched]
    texts = [title.text or "" for title in titles if title is not None]
    assert len(texts) == picture.facts.pieces == splits[1] > 1
    assert all("request 0, blocks" in text and text.endswith("of 100") for text in texts)
    (pattern,) = root.iter(f"{SVG}pattern")
    assert {rect.attrib["fill"] for rect in hatched} == {f"url(#{pattern.attrib['id']})"}
    whole = draw_plan(*plan_for([64, 64], 16, num_sms=2), [64, 64])
    assert not [rect for rect in parsed(whole).iter(f"{SVG}rect") if "url(" in rect.get("fill", "")]


def test_two_pictures_of_a_page_do_not_share_a_pattern() -> None:
    ids = set()
    for lengths in ([6400], [12800]):
        (pattern,) = parsed(draw_plan(*plan_for(lengths, 16), lengths)).iter(f"{SVG}pattern")
        ids.add(pattern.attrib["id"])
    assert len(ids) == 2


# -- what a plan says ------------------------------------------------------------------------------


def test_a_plan_made_for_other_lengths_ends_where_the_lengths_say() -> None:
    """A request's last piece runs to its end; pieces that lie behind it are empty."""
    plan, splits = plan_for([6400, 6400], 16, num_sms=8)
    for now in ([9000, 1000], [64, 64], [0, 6400], [6400, 0]):
        check(draw_plan(plan, splits, now), now, 8)


def test_requests_behind_the_plan_are_not_drawn() -> None:
    plan, splits = plan_for([500, 900], 16, num_sms=4)
    check(draw_plan(plan, splits, [500, 900, 7, 8]), [500, 900], 4)


@pytest.mark.parametrize("row", [[-5, 3, 9, -2, 0, 1, 0, 77], [7, 0, 1, 0, 0, 0, 0, -3]])
def test_rows_that_make_no_sense_are_clamped_as_the_kernel_clamps_them(row: list[int]) -> None:
    plan = np.array([row, [0, 0, -1, 0, 0, 0, 0, 0]], np.int32)
    read = ReadPlan(plan, None, [100, 200])
    for piece in read.pieces:
        assert 0 <= piece.request < 2
        assert 0 <= piece.begin <= piece.end <= read.blocks[piece.request]
    inside(parsed(draw_plan(plan, None, [100, 200])))


def test_a_lone_part_ignores_cuts() -> None:
    plan = np.array([[0, 2, 1, 1, 1, 1, 0, 0]], np.int32)
    check(draw_plan(plan, None, [300, 300]), [300, 300], 1)


def test_plan_for_is_the_planners() -> None:
    lengths = np.array([4000, 1, 0, 700, 60_000], np.int32)
    for rows, heads_k, num_sms in ((16, 1, 132), (128, 1, 114), (64, 4, 78)):
        plan, splits = plan_for(lengths, rows, heads_k, num_sms=num_sms)
        parts = schedule.num_sm_parts(num_sms, rows, heads_k)
        model = schedule.cost_model(rows, heads_k)
        expected = schedule.plan_numpy(lengths, parts, model)
        np.testing.assert_array_equal(plan, expected[0])
        np.testing.assert_array_equal(splits, expected[1])
        assert plan.shape == (parts, geometry.PLAN_COLUMNS)


# -- arrays of all libraries, and the object -------------------------------------------------------


def arrays_of(library: str) -> Any:
    if find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    if library == "torch":
        import torch

        return torch.tensor
    if library == "jax":
        import jax.numpy

        return jax.numpy.asarray
    return np.asarray


@pytest.mark.parametrize("library", ["numpy", "torch", "jax"])
def test_plans_of_every_library(library: str) -> None:
    array = arrays_of(library)
    lengths = np.array([1000, 64, 1, 777], np.int32)
    plan, splits = flashmla_rtc.get_mla_metadata(array(lengths), 16, 1)
    check(draw_plan(plan, splits, array(lengths)), lengths, 1)
    made = [array(part) for part in plan_for(array(lengths), 16)]
    assert draw_plan(*made, array(lengths)).svg == draw_plan(*made, lengths.tolist()).svg


def decode(meta: Any, lengths: np.ndarray) -> None:
    rng = np.random.default_rng(0)
    pages = 8
    q = rng.standard_normal((len(lengths), 1, 2, 576), dtype=np.float32)
    k_cache = rng.standard_normal((pages, 64, 1, 576), dtype=np.float32)
    table = np.tile(np.arange(pages, dtype=np.int32), (len(lengths), 1))
    flashmla_rtc.flash_mla_with_kvcache(q, k_cache, table, lengths, 512, meta)


def test_the_object_shows_its_plan_once_a_call_has_made_it() -> None:
    meta, _ = flashmla_rtc.get_mla_metadata()
    assert repr(meta) == "FlashMLASchedMeta(no plan yet)"
    assert "makes the plan" in meta._repr_html_()
    with pytest.raises(ValueError, match="FlashMLASchedMeta without a plan"):
        draw_plan(meta)
    lengths = np.array([500, 3, 64], np.int32)
    decode(meta, lengths)
    expected = (
        "FlashMLASchedMeta(num_sm_parts=1, requests=3, batch=3, seq_len_q=1, heads_q=2, heads_k=1, "
        "device=cpu)"
    )
    assert repr(meta) == expected
    check(draw_plan(meta), lengths, 1)
    assert draw_plan(meta).svg in meta._repr_html_()
    assert ET.fromstring(meta._repr_html_()).tag == "div"  # so that Markdown leaves it alone


def test_the_object_with_a_plan_that_no_call_has_used() -> None:
    lengths = np.array([500, 3, 64], np.int32)
    meta = FlashMLASchedMeta()
    decode(meta, lengths)
    meta.tile_scheduler_metadata, meta.num_splits = plan_for([6400], 16)
    assert repr(meta) == "FlashMLASchedMeta(num_sm_parts=132, requests=1)"
    assert "the lengths are not known" in meta._repr_html_()
    assert "<svg" not in meta._repr_html_()
    with pytest.raises(ValueError, match="cache_seqlens is missing"):
        draw_plan(meta)
    check(draw_plan(meta, cache_seqlens=[6400]), [6400], 132)


@pytest.mark.parametrize("way", ["compiled", "with a gradient"])
def test_an_object_that_torch_had_filled(way: str) -> None:
    torch = pytest.importorskip("torch")

    def step(meta: Any, q: Any, *rest: Any) -> Any:
        return flashmla_rtc.flash_mla_with_kvcache(q, *rest, 32, meta)[0]

    lengths = torch.tensor([60, 3], dtype=torch.int32)
    table = torch.tensor([[0], [1]], dtype=torch.int32)
    q, k_cache = torch.randn(2, 1, 2, 40), torch.randn(2, 64, 1, 40)
    meta = FlashMLASchedMeta()
    if way == "compiled":
        torch.compile(step, fullgraph=True, backend="eager")(meta, q, k_cache, table, lengths)
    else:
        step(meta, q.requires_grad_(), k_cache, table, lengths)
    assert meta.planned_lengths is lengths
    check(draw_plan(meta), lengths.numpy(), 1)


@pytest.mark.parametrize(
    ("plan", "splits", "shown"),
    [(5, None, "5, None"), (np.zeros((3, 8)), 7, "array([[0., 0., 0., 0., 0., 0., 0., 0.]")],
)
def test_an_object_with_what_is_no_plan_can_be_looked_at(
    plan: Any, splits: Any, shown: str
) -> None:
    meta = FlashMLASchedMeta(plan, splits)
    assert repr(meta).startswith(f"FlashMLASchedMeta({shown}")
    with pytest.raises((TypeError, ValueError), match=r"tile_scheduler_metadata|num_splits"):
        decode(meta, np.array([500, 3, 64], np.int32))


def test_an_object_that_cannot_be_drawn_says_why() -> None:
    meta = FlashMLASchedMeta()
    decode(meta, np.array([5, 6], np.int32))
    meta._lengths = np.array([5.0, 6.0])
    assert "cache_seqlens must have dtype int32, but its dtype is float64." in meta._repr_html_()


# -- the file, the words, the errors --------------------------------------------------------------


def test_saving(tmp_path: Path) -> None:
    picture = draw_plan(*plan_for([640, 64], 16), [640, 64])
    picture.save(tmp_path / "plan.svg")
    assert (tmp_path / "plan.svg").read_text(encoding="utf-8") == picture.svg
    with pytest.raises(ValueError, match=r"path must end in \.svg, but it is 'plan\.png'\."):
        picture.save("plan.png")
    assert picture.svg in picture._repr_html_()


def test_it_follows_the_colours_of_where_it_is_shown() -> None:
    root = parsed(draw_plan(*plan_for([640, 64], 16), [640, 64]))
    outside = [t for t in root.iter(f"{SVG}text") if t.attrib["fill"] == "currentColor"]
    assert len(outside) > 10
    (style,) = root.iter(f"{SVG}style")
    rules = style.text or ""
    assert "prefers-color-scheme:dark" in rules
    # What is said of the root of a file must not reach a page that the picture is part of.
    assert rules.count("{color") == rules.count("svg:root{color") == 2


def test_facts_are_said_in_words() -> None:
    picture = draw_plan(*plan_for([6400] * 2, 16, num_sms=4), [6400] * 2)
    assert repr(picture) == (
        "<PlanPicture: 2 requests with 200 blocks of 64 keys on 4 parts; 4 in use, 50 blocks a "
        "part: balance 100.0 %; 2 requests are cut into 4 pieces>"
    )
    assert parsed(picture).attrib["aria-label"] in repr(picture)
    idle = draw_plan(*plan_for([0, 0], 16, num_sms=4), [0, 0])
    assert "2 requests with 0 blocks of 64 keys" in repr(idle)
    assert "balance" not in repr(idle)


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        ((np.zeros((4, 7), np.int32), None, [1]), ValueError, r"its shape is \(4, 7\)"),
        ((np.zeros((4, 8), np.int64), None, [1]), TypeError, "its dtype is int64"),
        ((np.zeros(8, np.int32), None, [1]), ValueError, "must have 2 dimensions"),
        ((np.zeros((4, 8), np.int32), None, None), ValueError, "cache_seqlens is missing"),
        ((np.zeros((4, 8), np.int32), [0, 1, 2], [1]), ValueError, "num_splits must have between"),
        (
            (np.zeros((4, 8), np.int32), None, ["a"]),
            TypeError,
            r"cache_seqlens\[0\] must be an int",
        ),
        ((np.zeros((4, 8), np.int32), None, [2**31]), TypeError, "must hold int32 numbers"),
        (([[0] * 8, [0.5] * 8], None, [1]), TypeError, r"metadata\[1\]\[0\] must be an integer"),
        (([[0] * 8, [0] * 7], None, [1]), TypeError, "must hold int32 numbers: .*inhomogeneous"),
        ((np.zeros((4, 8), np.int32), None, 3), TypeError, "cache_seqlens must be an array"),
    ],
)
def test_what_is_no_plan(arguments: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        draw_plan(*arguments)


@pytest.mark.parametrize("library", ["numpy", "torch", "jax"])
def test_the_pair_has_to_be_unpacked(library: str) -> None:
    array = arrays_of(library)
    lengths = array(np.array([1000, 64], np.int32))
    plan, splits = (np.asarray(part) for part in plan_for([1000, 64], 16, num_sms=2))
    for pair in (
        flashmla_rtc.get_mla_metadata(lengths, 16, 1),
        flashmla_rtc.get_mla_metadata(),
        plan_for(lengths, 16),
        (plan.tolist(), splits.tolist()),
    ):
        with pytest.raises(TypeError, match=r"as in draw_plan\(\*plan, cache_seqlens\)"):
            draw_plan(pair, None, lengths)
    # A plan of two parts may be a tuple of two rows.
    rows = tuple(tuple(row) for row in plan.tolist())
    assert draw_plan(rows, splits, lengths).svg == draw_plan(plan, splits, lengths).svg


def test_lengths_as_they_are_now() -> None:
    """The object keeps the array, not what it held when the plan was made."""
    meta, lengths = FlashMLASchedMeta(), np.array([500, 3, 64], np.int32)
    decode(meta, lengths)
    lengths += 100
    check(draw_plan(meta), [600, 103, 164], 1)


@pytest.mark.parametrize("wrong", [1.5, 2.0, True, np.True_, np.float32(1), "1", None])
def test_lengths_that_are_no_integers(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"cache_seqlens\[1\] must be an integer, but it is"):
        plan_for([2, wrong], 16)


def test_integers_of_numpy_are_integers() -> None:
    plan, splits = plan_for([np.int64(900), np.uint8(7)], 16)
    expected = plan_for([900, 7], 16)
    assert np.array_equal(plan, expected[0])
    assert np.array_equal(splits, expected[1])


def test_no_plan_has_more_parts_than_the_planner_takes() -> None:
    assert len(plan_for([100_000], 16, num_sms=100_000)[0]) == geometry.MAX_PARTS == 256


def test_what_cannot_be_planned() -> None:
    with pytest.raises(ValueError, match="num_sms must be at least 1, but it is 0"):
        plan_for([1], 16, num_sms=0)
    with pytest.raises(TypeError, match="num_sms must be an integer"):
        plan_for([1], 16, num_sms=1.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_q_tokens_per_head_k must be at least 1"):
        plan_for([1], 0)
    with pytest.raises(TypeError, match="cache_seqlens must have dtype int32"):
        plan_for(np.array([1.0]), 16)
