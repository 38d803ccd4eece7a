"""The protocol by which parts merge a request's pieces, in every order of its steps.

A model of ``kernels/mla_decode_merge.cuh``: every part writes its piece; helpers among them look at
all pieces until they are written, and merge their task, or lose patience and leave it behind; every
part departs; the last to depart merges what was left behind and leaves everything as the next call
expects it. Each step below is one operation on memory, so walking all interleavings shows what any
timing of the thread blocks can do.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest


class Memory(NamedTuple):
    written: frozenset[int] = frozenset()  # pieces
    orphans: frozenset[int] = frozenset()  # tasks
    departures: int = 0
    left_behind: int = 0  # the departures' high half
    merged: tuple[int, ...] = ()  # tasks, in order
    phases_flipped: int = 0


class Process(NamedTuple):
    """One part, perhaps a helper: what it does next, and what it knows."""

    step: str = "write"
    looks: int = 0
    left_task: bool = False
    before: tuple[int, int] = (0, 0)


def advance(
    memory: Memory,
    process: Process,
    number: int,
    pieces: int,
    helpers: frozenset[int],
    patience: int,
) -> tuple[Memory, Process]:
    """The next operation of one part."""
    go = process._replace
    match process.step:
        case "write":
            after = memory._replace(written=memory.written | {number})
            return after, go(step="look" if number in helpers else "depart")
        case "look":
            if len(memory.written) == pieces:
                return memory, go(step="merge")
            give_up = process.looks >= patience
            return memory, go(step="leave behind" if give_up else "look", looks=process.looks + 1)
        case "merge":
            return memory._replace(merged=(*memory.merged, number)), go(step="depart")
        case "leave behind":
            after = memory._replace(orphans=memory.orphans | {number})
            return after, go(step="depart", left_task=True)
        case "depart":
            before = (memory.departures, memory.left_behind)
            after = memory._replace(
                departures=memory.departures + 1,
                left_behind=memory.left_behind + process.left_task,
            )
            last = before[0] + 1 == pieces
            return after, go(step="take over" if last else "end", before=before)
        case "take over":
            if not process.left_task and process.before[1] == 0:
                return memory, go(step="clear")
            assert len(memory.written) == pieces, "waits for a piece that nobody has promised"
            merged = (*memory.merged, *sorted(memory.orphans))
            return memory._replace(merged=merged, orphans=frozenset()), go(step="clear")
        case "clear":
            flipped = memory.phases_flipped + 1
            return memory._replace(departures=0, left_behind=0, phases_flipped=flipped), go(
                step="end"
            )
    raise AssertionError(process.step)


@pytest.mark.parametrize("patience", [0, 1, 2])
@pytest.mark.parametrize(
    "pieces, helpers", [(2, {0, 1}), (2, {0}), (3, {0, 1, 2}), (3, {0, 1}), (4, {0}), (4, {1, 3})]
)
def test_every_task_is_merged_once_and_the_state_is_clear(
    pieces: int, helpers: set[int], patience: int
) -> None:
    tasks = frozenset(helpers)
    start = (Memory(), (Process(),) * pieces)
    seen, to_do, left_behind, ends = {start}, [start], False, 0
    while to_do:
        memory, processes = to_do.pop()
        running = [i for i, process in enumerate(processes) if process.step != "end"]
        left_behind |= bool(memory.orphans)
        if not running:
            ends += 1
            assert sorted(memory.merged) == sorted(tasks)
            assert memory == Memory(memory.written, merged=memory.merged, phases_flipped=1)
        for i in running:
            cleared = memory.phases_flipped and processes[i].step != "end"
            assert not cleared, "works on what the next call may use"
            after, process = advance(memory, processes[i], i, pieces, tasks, patience)
            state = (after, (*processes[:i], process, *processes[i + 1 :]))
            if state not in seen:
                seen.add(state)
                to_do.append(state)
    assert ends
    assert left_behind  # or the model has not shown what it is for


def test_a_last_part_that_does_not_take_over_would_lose_a_task() -> None:
    """The model tells a protocol that works from one that does not."""
    memory, processes = Memory(), [Process(), Process()]
    order = [0, 0, 0, 0, 1, 1, 1]  # part 0 writes, looks, leaves its task behind and departs
    for i in order:
        memory, processes[i] = advance(memory, processes[i], i, 2, frozenset({0}), 0)
        if processes[i].step == "take over":
            processes[i] = processes[i]._replace(step="clear")
    assert processes[0].step == processes[1].step == "end"
    assert memory.merged == ()
    assert memory.orphans == {0}
