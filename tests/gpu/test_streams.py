"""Work goes to the caller's current stream and waits for nothing; streams don't meet."""

from __future__ import annotations

import threading

import pytest
import torch
from problem import HEAD_DIM_V, assert_same_bits, check, make

CYCLES = 100_000_000  # about 60 ms


@pytest.mark.parametrize("heads_q", [16, 128])
def test_two_streams_at_once(heads_q: int) -> None:
    """Many calls race, each cut over many parts and so with partial results in a workspace."""
    calls = [make([5000, 300, 2000], heads_q=heads_q, seed=seed) for seed in range(2)]
    plans = [call.plan() for call in calls]
    serial = [check(call, plan) for call, plan in zip(calls, plans, strict=True)]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    results = [[call.poisoned() for _ in range(60)] for call in calls]
    torch.cuda.synchronize()
    for turn in range(60):
        for i in (0, 1):
            with torch.cuda.stream(streams[i]):
                calls[i].run(plans[i], *results[i][turn])
    torch.cuda.synchronize()
    for i in (0, 1):
        for result in results[i]:
            assert_same_bits(result, serial[i])


def test_two_threads_at_once() -> None:
    calls = [make([4000, 70, 1000], seed=seed) for seed in range(4)]
    serial = [check(call) for call in calls]
    results = [[call.poisoned() for _ in range(40)] for call in calls]
    torch.cuda.synchronize()
    errors: list[BaseException] = []

    def work(i: int) -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for result in results[i]:
                    calls[i].run(None, *result)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.cuda.synchronize()
    assert errors == []
    for i in range(4):
        for result in results[i]:
            assert_same_bits(result, serial[i])


def test_a_call_follows_what_its_stream_still_has_to_do() -> None:
    """Every input is written late on that stream: planner and kernels must see the new contents."""
    late = make([3000, 64, 100, 1], seed=1)
    expected_plan, expected = late.plan(), check(late)
    early = late.but(
        q=late.q.roll(1, 0),
        k_cache=late.k_cache.roll(1, 0),
        block_table=late.block_table.roll(1, 0),
        cache_seqlens=late.cache_seqlens.roll(1, 0),
    )
    stream = torch.cuda.Stream()
    result = late.poisoned()
    with torch.cuda.stream(stream):
        early.run(early.plan(), *result)  # what has to be allocated is there after this
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(CYCLES)
        early.q.copy_(late.q)
        early.k_cache.copy_(late.k_cache)
        early.block_table.copy_(late.block_table)
        early.cache_seqlens.copy_(late.cache_seqlens)
        plan = early.plan()
        early.run(plan, *result)
    assert not stream.query()  # nothing so far has waited
    stream.synchronize()
    assert torch.equal(plan[0], expected_plan[0])
    assert torch.equal(plan[1], expected_plan[1])
    assert_same_bits(result, expected)


def test_calls_wait_for_no_device_work() -> None:
    call = make([3000, 64], heads_q=128)
    plan, result = call.plan(), call.poisoned()

    def everything() -> None:
        call.plan()
        call.run(plan, *result)
        call.run(None)
        call.run((None, None))

    everything()
    torch.cuda.synchronize()
    end = torch.cuda.Event()
    torch.cuda._sleep(CYCLES)
    end.record()
    everything()
    assert not end.query()
    torch.cuda.synchronize()


def test_calls_make_no_synchronising_call_of_torch() -> None:
    call = make([3000, 64], heads_q=128)
    plan, result = call.plan(), call.poisoned()
    call.run(plan, *result)
    torch.cuda.set_sync_debug_mode("error")
    try:
        call.run(plan, *result)
        call.run(call.plan())
        call.run((None, None))
        with pytest.raises(RuntimeError, match="synchroniz"):  # the mode does catch one
            call.cache_seqlens.tolist()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_no_kernel_overtakes_the_one_before_it() -> None:
    """Kernels start while their predecessor ends: queries here are made of the results before.

    Once with the device idle before each call, and then without.
    """
    call = make([2000, 64, 1, 700])
    plan = call.plan()

    def chain(wait: bool) -> torch.Tensor:
        q = call.q.clone()
        out, lse = call.poisoned()
        for _ in range(30):
            call.but(q=q).run(plan, out, lse)
            if wait:
                torch.cuda.synchronize()
            torch.mul(out, 10, out=q[..., :HEAD_DIM_V])
            if wait:
                torch.cuda.synchronize()
        return q

    slow = chain(wait=True)
    assert not torch.equal(slow, call.q)
    for _ in range(5):
        assert torch.equal(chain(wait=False), slow)


def test_back_to_back_calls_use_a_stream_s_workspace_in_order() -> None:
    """Different calls in turn, each cut over parts, with nothing between them."""
    calls = [make([4000, 64], seed=1), make([64, 9000, 3], seed=2, heads_q=128)]
    plans = [call.plan() for call in calls]
    expected = [check(call, plan) for call, plan in zip(calls, plans, strict=True)]
    results = [[call.poisoned() for call in calls] for _ in range(40)]
    torch.cuda.synchronize()
    for result in results:
        for call, plan, pair in zip(calls, plans, result, strict=True):
            call.run(plan, *pair)
    torch.cuda.synchronize()
    for result in results:
        for pair, true in zip(result, expected, strict=True):
            assert_same_bits(pair, true)
