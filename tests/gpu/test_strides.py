"""Arrays with strides are read and written where they are: right results, and no copies."""

from __future__ import annotations

import pytest
import torch
from problem import DEVICE, HEAD_DIM, HEAD_DIM_V, PAGE, Problem, assert_same_bits, check, make

LENGTHS = [700, 64, 0, 65, 2000, 1]
KEPT = 7.0  # in memory between the elements of a result; nothing may write there


def problem(**changes: int) -> Problem:
    return make(LENGTHS, **{"seq_len_q": 3, "heads_q": 20, "heads_k": 2, **changes}, causal=True)


def wide(array: torch.Tensor, before: int, after: int) -> torch.Tensor:
    """The same numbers as a slice of a tensor with a longer last dimension, NaN around them."""
    shape = (*array.shape[:-1], before + array.shape[-1] + after)
    whole = array.new_full(shape, torch.nan)
    part = whole[..., before : before + array.shape[-1]]
    return part.copy_(array)


@pytest.mark.parametrize("heads_q", [20, 60], ids=["few rows", "full tiles"])
@pytest.mark.parametrize("before, after", [(0, 8), (8, 56), (0, 1), (1, 0), (3, 2), (4, 4)])
def test_q_is_a_slice_of_a_wider_tensor(before: int, after: int, heads_q: int) -> None:
    """Rows at multiples of 16 bytes, and rows at odd places."""
    call = problem(heads_q=heads_q)
    strided = call.but(q=wide(call.q, before, after))
    assert strided.q.stride(2) == HEAD_DIM + before + after
    assert_same_bits(strided.run(), check(call))


def test_q_has_its_heads_before_its_queries() -> None:
    call = problem()
    strided = call.but(q=call.q.transpose(1, 2).contiguous().transpose(1, 2))
    assert not strided.q.is_contiguous()
    assert_same_bits(strided.run(), call.run())


def test_q_is_one_row_for_all_requests() -> None:
    call = problem()
    call.q = call.q[:1].expand(len(LENGTHS), -1, -1, -1)
    assert call.q.stride(0) == 0
    assert_same_bits(call.run(), call.but(q=call.q.contiguous()).run())


def cache_layouts(k_cache: torch.Tensor) -> dict[str, torch.Tensor]:
    blocks, _, heads_k, _ = k_cache.shape

    def within(shape: tuple[int, ...], *index: slice) -> torch.Tensor:
        return k_cache.new_full(shape, torch.nan)[index]

    every = slice(None)
    layouts = {
        "every-second-page": within((2 * blocks, PAGE, heads_k, HEAD_DIM), slice(1, None, 2)),
        "wider-rows": within(
            (blocks, PAGE, heads_k, HEAD_DIM + 72), every, every, every, slice(64, 64 + HEAD_DIM)
        ),
        "some-heads": within(
            (blocks, PAGE, heads_k + 3, HEAD_DIM), every, every, slice(2, 2 + heads_k)
        ),
        "larger-pages": within((blocks, PAGE + 5, heads_k, HEAD_DIM), every, slice(3, 3 + PAGE)),
        "heads-first": within((blocks, heads_k, PAGE, HEAD_DIM)).transpose(1, 2),
        "pages-innermost": within((heads_k, PAGE, blocks, HEAD_DIM)).permute(2, 1, 0, 3),
    }
    return {name: array.copy_(k_cache) for name, array in layouts.items()}


@pytest.mark.parametrize("heads_k", [1, 4])
@pytest.mark.parametrize(
    "layout",
    [
        "every-second-page",
        "wider-rows",
        "some-heads",
        "larger-pages",
        "heads-first",
        "pages-innermost",
    ],
)
def test_layouts_of_the_cache(layout: str, heads_k: int) -> None:
    call = problem(heads_k=heads_k)
    k_cache = cache_layouts(call.k_cache)[layout]
    assert torch.equal(k_cache, call.k_cache)
    assert not k_cache.is_contiguous() or layout == "heads-first"
    assert_same_bits(call.but(k_cache=k_cache).run(), check(call))


def test_the_cache_of_one_layer_of_many() -> None:
    """Pages of all layers in one tensor, as some engines have it."""
    call = problem()
    layers = call.k_cache.new_full((call.k_cache.shape[0], 5, *call.k_cache.shape[1:]), torch.nan)
    layers[:, 3] = call.k_cache
    assert_same_bits(call.but(k_cache=layers[:, 3]).run(), call.run())


def test_the_table_and_the_lengths_are_slices() -> None:
    call = problem()
    batch, columns = call.block_table.shape
    table = torch.full((batch + 4, columns + 9), -1, dtype=torch.int32, device=DEVICE)
    table[3 : 3 + batch, 2 : 2 + columns] = call.block_table
    lengths = torch.full((batch + 9,), 10**6, dtype=torch.int32, device=DEVICE)
    lengths[5 : 5 + batch] = call.cache_seqlens
    strided = call.but(
        block_table=table[3 : 3 + batch, 2 : 2 + columns], cache_seqlens=lengths[5 : 5 + batch]
    )
    assert_same_bits(strided.run(), call.run())


def test_one_row_of_the_table_serves_all_requests() -> None:
    call = problem()
    table = call.block_table[4:5].expand(len(LENGTHS), -1)
    assert_same_bits(
        call.but(block_table=table).run(), call.but(block_table=table.contiguous()).run()
    )


def places(name: str, call: Problem) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The whole memory, and out and lse within it."""
    batch, seq, heads, _ = call.q.shape
    width = HEAD_DIM_V
    memory = call.q.new_full((4 * batch * seq * heads * width,), KEPT)
    lse_memory = torch.full((batch, 2, heads, 3, seq, 2), KEPT, device=DEVICE)
    lse = lse_memory[:, 1, :, 1, :, 0]

    def view(start: int, *strides: int) -> torch.Tensor:
        return memory.as_strided((batch, seq, heads, width), (*strides, 1), start)

    if name == "wider-rows":
        out = view(16, seq * heads * 528, heads * 528, 528)
    elif name == "odd-rows":
        out = view(0, seq * heads * 513, heads * 513, 513)
    elif name == "odd-start":
        out = view(1, seq * heads * width, heads * width, width)
    elif name == "start-of-8-bytes":
        out = view(4, seq * heads * width, heads * width, width)
    elif name == "heads-first":
        out = view(0, seq * heads * width, width, seq * width)
        lse = lse_memory[:, 0, :, 0].permute(0, 2, 1, 3)[..., 1].transpose(1, 2)
    elif name == "batch-innermost":
        out = view(8, width, heads * batch * width, batch * width)
        lse = torch.full((seq, heads, batch), KEPT, device=DEVICE).permute(2, 1, 0)
    elif name == "odd-batches":
        out = view(0, seq * heads * width + 3, heads * width, width)
    else:
        raise ValueError(name)
    return memory, out, lse


@pytest.mark.parametrize("heads_q", [20, 60], ids=["few rows", "full tiles"])
@pytest.mark.parametrize("cut", [True, False], ids=["merged", "direct"])
@pytest.mark.parametrize(
    "place",
    [
        "wider-rows",
        "odd-rows",
        "odd-start",
        "start-of-8-bytes",
        "heads-first",
        "batch-innermost",
        "odd-batches",
    ],
)
def test_places_of_the_results(place: str, cut: bool, heads_q: int) -> None:
    """With requests cut over parts (and merged) and whole."""
    whole = make([70, 0, 64] * 60, seq_len_q=2, heads_q=heads_q, causal=True)
    call = problem(heads_q=heads_q) if cut else whole
    pieces = call.plan()[1].diff()
    assert bool((pieces > 1).any()) == cut
    memory, out, lse = places(place, call)
    untouched = memory.clone()
    start = out.storage_offset()
    untouched.as_strided(out.shape, out.stride(), start).copy_(out.new_zeros(()))
    returned = call.run(None, out, lse)
    assert returned[0] is out
    assert returned[1] is lse
    assert_same_bits((out, lse), check(call))
    memory.as_strided(out.shape, out.stride(), start).zero_()
    assert torch.equal(memory, untouched)


def test_strided_calls_allocate_nothing() -> None:
    call = problem()
    call = call.but(q=wide(call.q, 1, 0), k_cache=cache_layouts(call.k_cache)["wider-rows"])
    _, out, lse = places("odd-rows", call)
    plan = call.plan()
    call.run(plan, out, lse)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call.run(plan, out, lse)
    assert torch.cuda.max_memory_allocated() == before
