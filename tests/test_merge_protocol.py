"""The protocol by which parts merge a request's pieces, in every order of its steps.

A model of ``kernels/mla_decode_merge.cuh``. Every part writes its piece. Helpers claim a share of
the tasks, one for each of their warps or one for all of them (a team); a warp looks at the pieces
until they are written, or loses patience and leaves its task behind. The last warp of a part that
needs nothing of the pieces any more departs for the part, before results are written. The last part
to depart merges what was left behind and leaves everything as the next call expects it. Each step
below is one operation on memory, so walking all interleavings shows what any timing of the thread
blocks can do.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

KERNELS = Path(__file__).resolve().parents[1] / "kernels"
READS_NO_MORE = {"result", "end"}


class Memory(NamedTuple):
    """What all parts see."""

    claims: int = 0
    departures: int = 0
    left_behind: int = 0  # the departures' high half
    orphans: frozenset[int] = frozenset()  # tasks
    phases_flipped: int = 0
    results: tuple[tuple[int, int], ...] = ()  # (task, share of it), sorted


class Warp(NamedTuple):
    step: str = "wait"
    task: int = -1
    looks: int = 0
    complete: bool = False
    left_task: bool = False
    concludes: bool = False
    some_left: bool = False  # what departing said of tasks that were left behind


class Part(NamedTuple):
    """A thread block. Without warps that help it has one, which departs."""

    helps: bool
    warps: tuple[Warp, ...]
    written: bool = False
    claimed: bool = False
    done: int = 0  # warps
    left: int = 0  # tasks, by its warps


class Merge(NamedTuple):
    """pieces: one a part. helpers: the parts that end with theirs. warps: of a helper."""

    pieces: int
    helpers: frozenset[int]
    warps: int
    team: bool
    tasks: int
    patience: int
    broken: str = ""  # what is done wrongly, to see whether the model notices

    def start(self) -> tuple[Memory, tuple[Part, ...]]:
        return Memory(), tuple(
            Part(i in self.helpers, (Warp(),) * (self.warps if i in self.helpers else 1))
            for i in range(self.pieces)
        )


State = tuple[Memory, tuple[Part, ...]]


def begin_warps(merge: Merge, part: Part) -> Part:
    """Warps begin when the piece is written and tasks are known."""
    if not part.written or (part.helps and not part.claimed):
        return part
    looks_first = merge.broken != "departs before it looks"
    warps = (
        warp._replace(step="look" if warp.task >= 0 and looks_first else "done")
        for warp in part.warps
    )
    return part._replace(warps=tuple(warps))


def claim(merge: Merge, memory: Memory, part: Part) -> tuple[Memory, Part]:
    share, warps = memory.claims, range(merge.warps)
    tasks = [share if merge.team else share * merge.warps + w for w in warps]
    claimed = tuple(
        warp._replace(task=task if task < merge.tasks else -1)
        for warp, task in zip(part.warps, tasks, strict=True)
    )
    part = part._replace(claimed=True, warps=claimed)
    return memory._replace(claims=share + 1), begin_warps(merge, part)


def meet(part: Part) -> Part:
    """A team's named barrier: when all warps are there, they know whether all are complete."""
    if any(warp.step != "barrier" for warp in part.warps):
        return part
    complete = all(warp.complete for warp in part.warps)
    warps = (
        warp._replace(complete=complete, step="leave behind" if not complete and w == 0 else "done")
        for w, warp in enumerate(part.warps)
    )
    return part._replace(warps=tuple(warps))


def advance(merge: Merge, state: State, p: int, w: int) -> State | None:
    """The next operation of a warp; None if it waits or has come to its end."""
    memory, parts = state
    part = parts[p]
    warp = part.warps[w]

    def go(**changes: object) -> Part:
        changed = warp._replace(**changes)  # type: ignore[arg-type]
        return part._replace(warps=(*part.warps[:w], changed, *part.warps[w + 1 :]))

    after = "result" if warp.complete else "end"
    if merge.broken == "departs before it looks" and warp.task >= 0:
        after = "look"
    match warp.step:
        case "look":
            assert not memory.phases_flipped, "reads words whose phase is another call's"
            mine = parts[w :: merge.warps] if merge.team else parts
            complete = all(one.written for one in mine)
            if merge.broken == "departs before it looks":
                part = go(step="result" if complete else "look")
            elif not complete and warp.looks < merge.patience:
                part = go(looks=warp.looks + 1)
            elif merge.team:
                part = meet(go(step="barrier", complete=complete))
            else:
                part = go(step="done" if complete else "leave behind", complete=complete)
        case "leave behind":
            memory = memory._replace(orphans=memory.orphans | {warp.task})
            part = go(step="done", left_task=True)
        case "done":
            done, left = part.done + 1, part.left + warp.left_task
            if merge.broken == "forgets what other warps left":
                left = int(warp.left_task)
            departs = done == len(part.warps) or merge.broken == "every warp departs"
            part = go(step="depart" if departs else after)._replace(done=done, left=left)
        case "depart":
            before = memory.departures
            left_behind = memory.left_behind + (part.left > 0)
            memory = memory._replace(departures=before + 1, left_behind=left_behind)
            last = before + 1 == merge.pieces
            next_step = "take over" if after == "end" and last else after
            part = go(step=next_step, concludes=last, some_left=left_behind > 0)
        case "result":
            shares = (warp.task, w if merge.team else 0)
            memory = memory._replace(results=tuple(sorted((*memory.results, shares))))
            part = go(step="take over" if warp.concludes else "end")
        case "take over":
            if warp.some_left and merge.broken != "orphans are nobody's":
                assert all(one.written for one in parts), "waits for a piece that nobody promised"
                rest = [
                    (task, share)
                    for task in memory.orphans
                    for share in range(merge.warps if merge.team else 1)
                ]
                results = tuple(sorted((*memory.results, *rest)))
                memory = memory._replace(results=results, orphans=frozenset())
            part = go(step="clear")
        case "clear":
            claims = memory.claims if merge.broken == "claims stay" else 0
            flipped = memory.phases_flipped + 1
            memory = memory._replace(
                departures=0, left_behind=0, claims=claims, phases_flipped=flipped
            )
            part = go(step="end")
        case _:
            return None
    return memory, (*parts[:p], part, *parts[p + 1 :])


def successors(merge: Merge, state: State) -> Iterator[State]:
    memory, parts = state
    for p, part in enumerate(parts):
        if not part.written:
            written = begin_warps(merge, part._replace(written=True))
            yield memory, (*parts[:p], written, *parts[p + 1 :])
        if part.helps and not part.claimed:
            claimed_memory, claimed = claim(merge, memory, part)
            yield claimed_memory, (*parts[:p], claimed, *parts[p + 1 :])
        for w in range(len(part.warps)):
            following = advance(merge, state, p, w)
            if following is not None:
                yield following


def is_over(state: State) -> bool:
    return all(warp.step == "end" for part in state[1] for warp in part.warps)


def check_state(merge: Merge, state: State) -> None:
    memory, parts = state
    assert memory.phases_flipped <= 1, "the phases are flipped twice"
    for task in memory.results:
        assert memory.results.count(task) == 1, "a task is done twice"
    if memory.phases_flipped:
        for part in parts:
            assert part.written
            assert part.claimed or not part.helps, "claims what the next call may use"
            for warp in part.warps:
                assert warp.step in READS_NO_MORE, "works on what the next call may use"
    if is_over(state):
        shares = range(merge.warps if merge.team else 1)
        every = tuple((task, share) for task in range(merge.tasks) for share in shares)
        assert memory.results == every, "a task is nobody's"
        assert memory == Memory(results=every, phases_flipped=1), "the next call finds other state"


def normal(merge: Merge, state: State) -> State:
    """One of all states that are alike but for the names of parts and warps."""
    memory, parts = state
    if merge.team:  # its warps differ in the pieces that they look at
        return state
    alike = (part._replace(warps=tuple(sorted(part.warps))) for part in parts)
    return memory, tuple(sorted(alike))


def walk(merge: Merge) -> tuple[int, set[str]]:
    """Every state that can be reached is right: how many there are, and what was seen."""
    start = normal(merge, merge.start())
    seen, to_do, events = {start}, [start], set()
    while to_do:
        state = to_do.pop()
        check_state(merge, state)
        memory, _ = state
        if memory.orphans:
            events.add("a task was left behind")
        if memory.phases_flipped and not is_over(state):
            events.add("results came last")
        following = list(successors(merge, state))
        assert following or is_over(state), "all wait for each other"
        for one in following:
            one = normal(merge, one)
            if one not in seen:
                seen.add(one)
                to_do.append(one)
    return len(seen), events


def merge_of(
    pieces: int, helpers: set[int], warps: int, tasks: int, patience: int, *, team: bool = False
) -> Merge:
    return Merge(pieces, frozenset(helpers), warps, team, tasks, patience)


CASES = [
    # pieces, helpers, warps, tasks: as many as there are workers, or fewer
    (2, {0, 1}, 1, 2),
    (2, {0}, 1, 1),
    (2, {0}, 2, 2),
    (2, {0, 1}, 2, 4),
    (2, {0, 1}, 2, 3),
    (2, {0, 1}, 2, 1),
    (3, {0, 1, 2}, 1, 3),
    (3, {0, 1, 2}, 1, 2),
    (3, {0, 1}, 2, 4),
    (3, {0, 1}, 2, 2),
    (4, {0, 1, 2}, 1, 3),
    (4, {0, 1, 2, 3}, 1, 2),
]


@pytest.mark.parametrize("patience", [0, 1])
@pytest.mark.parametrize("pieces, helpers, warps, tasks", CASES)
def test_every_task_is_done_once_and_the_state_is_clear(
    pieces: int, helpers: set[int], warps: int, tasks: int, patience: int
) -> None:
    _, events = walk(merge_of(pieces, helpers, warps, tasks, patience))
    assert events == {"a task was left behind", "results came last"}


@pytest.mark.parametrize("patience", [0, 1])
@pytest.mark.parametrize(
    "pieces, helpers, warps, tasks",
    [(2, {0, 1}, 2, 2), (2, {0, 1}, 2, 1), (2, {0}, 2, 1), (3, {0, 1}, 2, 2), (2, {0}, 3, 1)],
)
def test_teams(pieces: int, helpers: set[int], warps: int, tasks: int, patience: int) -> None:
    _, events = walk(merge_of(pieces, helpers, warps, tasks, patience, team=True))
    assert events == {"a task was left behind", "results came last"}


@pytest.mark.parametrize(
    "broken, complaint",
    [
        ("orphans are nobody's", "a task is nobody's"),
        ("forgets what other warps left", "a task is nobody's"),
        ("claims stay", "finds other state"),
        ("every warp departs", "may use"),
        ("departs before it looks", "may use|another call's"),
    ],
)
def test_the_model_tells_a_protocol_that_works_from_one_that_does_not(
    broken: str, complaint: str
) -> None:
    with pytest.raises(AssertionError, match=complaint):
        walk(merge_of(2, {0, 1}, 2, 4, 0)._replace(broken=broken))


def test_no_helper_is_too_late_for_its_share() -> None:
    """With fewer tasks than shares the last to claim get none, whoever they are."""
    start = merge_of(3, {0, 1, 2}, 1, 1, 0)
    for first in range(3):
        state = start.start()
        order = [first, *({0, 1, 2} - {first})]
        for p in order:
            memory, parts = state
            memory, part = claim(start, memory, parts[p])
            state = memory, (*parts[:p], part, *parts[p + 1 :])
        assert [state[1][p].warps[0].task for p in order] == [0, -1, -1]


# -- how a merge is divided -----------------------------------------------------------------------


def constant(file: str, name: str) -> int:
    found = re.search(rf"\b{name} = (\d+)[,;]", (KERNELS / file).read_text(encoding="utf-8"))
    assert found, name
    return int(found[1])


TEAM_PIECES = constant("mla_decode_merge.cuh", "TEAM_PIECES")
STRIP_GROUPS = constant("mla_decode_partial.cuh", "STRIP_GROUPS")
CONSUMER_WARPS = 8


@pytest.mark.parametrize("in_halves", [True, False])
@pytest.mark.parametrize("goes_on", [True, False])
def test_every_task_has_a_worker(in_halves: bool, goes_on: bool) -> None:
    """find_merge's division, said once more: of any pieces and any rows."""
    lines_a_strip = STRIP_GROUPS // 2 if in_halves else STRIP_GROUPS
    for pieces in range(2, 257):
        for strips in (2, 4, 6, 8):
            team = pieces >= TEAM_PIECES
            workers = (pieces - goes_on) * (1 if team else CONSUMER_WARPS)
            lines = 1 if strips <= 4 else 2
            while strips * (lines_a_strip // lines) > workers:
                lines *= 2
            tasks = strips * (lines_a_strip // lines)
            assert lines <= lines_a_strip, "less than a strip is left of a task"
            assert tasks <= 128, "no bit is left for an orphan"
            claims = range(pieces - goes_on)
            shares = claims if team else (c * 8 + warp for c in claims for warp in range(8))
            assert [task for task in shares if task < tasks] == list(range(tasks))
