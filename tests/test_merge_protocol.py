"""The protocol by which parts merge a request's pieces, in every order of its steps.

A model of ``kernels/mla_decode_merge.cuh``. Every part writes its piece, and departs, before or
after that, with one operation that also claims a share of the tasks if the part helps. The last to
depart leaves the state as the next call expects it. Helpers have a task for each of their warps or
one for all of them (a team); a warp looks at the pieces until they are written, or loses patience
and leaves its task to the last to depart, unless that one departed already. Each step below is one
operation on memory, so walking all interleavings shows what any timing of the thread blocks can do.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

KERNELS = Path(__file__).resolve().parents[1] / "kernels"


class Memory(NamedTuple):
    """What all parts see."""

    departed: int = 0
    claimed: int = 0
    tasks_left: bool = False
    orphans: tuple[int, ...] = ()  # tasks, sorted
    phases_flipped: int = 0
    results: tuple[tuple[int, int], ...] = ()  # (task, share of it), sorted


class Warp(NamedTuple):
    step: str = "wait"
    task: int = -1
    looks: int = 0
    complete: bool = False
    taken: tuple[int, ...] = ()  # tasks that others left behind


class Part(NamedTuple):
    """A thread block. Without warps that help it has one, which may have to take over."""

    helps: bool
    warps: tuple[Warp, ...]
    written: bool = False
    departing: str = "depart"  # what it does next; "" when it has departed
    has_orphans: bool = False


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

    def shares(self, task: int) -> list[tuple[int, int]]:
        return [(task, share) for share in range(self.warps if self.team else 1)]


State = tuple[Memory, tuple[Part, ...]]


def begin_warps(part: Part) -> Part:
    """Warps begin when the piece is written and the part has departed."""
    if not part.written or part.departing:
        return part
    warps = (w._replace(step="look" if w.task >= 0 else "finish") for w in part.warps)
    return part._replace(warps=tuple(warps))


def depart(merge: Merge, memory: Memory, part: Part) -> tuple[Memory, Part]:
    """One of the operations of a part's departure."""
    if part.departing == "depart":
        if part.helps:
            share, warps = memory.claimed, range(merge.warps)
            tasks = [share if merge.team else share * merge.warps + w for w in warps]
            warps_now = tuple(
                warp._replace(task=task if task < merge.tasks else -1)
                for warp, task in zip(part.warps, tasks, strict=True)
            )
            part = part._replace(warps=warps_now)
        is_last = memory.departed + 1 == merge.pieces
        part = part._replace(
            departing="clear" if is_last else "", has_orphans=is_last and memory.tasks_left
        )
        claimed = memory.claimed + part.helps
        memory = memory._replace(departed=memory.departed + 1, claimed=claimed)
    elif part.departing == "clear":
        claimed = memory.claimed if merge.broken == "claims stay" else 0
        memory = memory._replace(departed=0, claimed=claimed, tasks_left=False)
        part = part._replace(departing="flip")
    else:
        memory = memory._replace(phases_flipped=memory.phases_flipped + 1)
        part = part._replace(departing="")
    return memory, begin_warps(part)


def meet(part: Part) -> Part:
    """A team's named barrier: when all warps are there, they know whether all are complete."""
    if any(warp.step != "barrier" for warp in part.warps):
        return part
    if all(warp.complete for warp in part.warps):
        steps = ["result"] * len(part.warps)
    else:
        steps = ["leave", *["finish"] * (len(part.warps) - 1)]
    warps = (warp._replace(step=step) for warp, step in zip(part.warps, steps, strict=True))
    return part._replace(warps=tuple(warps))


def advance(merge: Merge, state: State, p: int, w: int) -> State | None:
    """The next operation of a warp; None if it waits or has come to its end."""
    memory, parts = state
    part = parts[p]
    warp = part.warps[w]
    all_written = all(one.written for one in parts)

    def go(**changes: object) -> Part:
        changed = warp._replace(**changes)  # type: ignore[arg-type]
        return part._replace(warps=(*part.warps[:w], changed, *part.warps[w + 1 :]))

    def add(*done: tuple[int, int]) -> Memory:
        return memory._replace(results=tuple(sorted((*memory.results, *done))))

    match warp.step:
        case "look":
            mine = parts[w :: merge.warps] if merge.team else parts
            complete = all(one.written for one in mine)
            if not complete and warp.looks < merge.patience:
                part = go(looks=warp.looks + 1)
            elif merge.team:
                part = meet(go(step="barrier", complete=complete))
            elif merge.broken == "has patience for ever":
                part = go(step="result" if complete else "alone")
            else:
                part = go(step="result" if complete else "leave")
        case "leave":
            memory = memory._replace(orphans=tuple(sorted((*memory.orphans, warp.task))))
            part = go(step="mark")
        case "mark":
            before = memory.departed
            memory = memory._replace(tasks_left=True)
            part = go(step="unmark" if before == 0 else "take back")
            if 0 < before < merge.pieces or merge.broken == "does not ask who departed":
                part = go(step="finish")
            elif merge.broken == "mark stays":
                part = go(step="take back")
        case "unmark":
            memory = memory._replace(tasks_left=False)
            part = go(step="take back")
        case "take back":
            is_mine = warp.task in memory.orphans or merge.broken == "keeps what another took"
            orphans = tuple(task for task in memory.orphans if task != warp.task)
            memory = memory._replace(orphans=orphans)
            part = go(step="alone" if is_mine else "finish")
        case "alone":
            assert all(one.departing != "depart" for one in parts), "waits for who may never start"
            if not all_written:
                return None
            memory = add(*merge.shares(warp.task))
            part = go(step="finish")
        case "result":
            memory = add((warp.task, w if merge.team else 0))
            part = go(step="finish")
        case "finish":
            takes_over = w == 0 and part.has_orphans
            if takes_over and merge.broken != "orphans are nobody's":
                part = go(step="take over", taken=memory.orphans)
                memory = memory._replace(orphans=())
            else:
                part = go(step="end")
        case "take over":
            assert all(one.departing != "depart" for one in parts), "waits for who may never start"
            if not all_written:
                return None
            memory = add(*(share for task in warp.taken for share in merge.shares(task)))
            part = go(step="end")
        case _:
            return None
    return memory, (*parts[:p], part, *parts[p + 1 :])


def successors(merge: Merge, state: State) -> Iterator[State]:
    memory, parts = state
    for p, part in enumerate(parts):
        if not part.written:
            written = begin_warps(part._replace(written=True))
            yield memory, (*parts[:p], written, *parts[p + 1 :])
        if part.departing:
            departed_memory, departed = depart(merge, memory, part)
            yield departed_memory, (*parts[:p], departed, *parts[p + 1 :])
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
        assert all(part.departing != "depart" for part in parts), "reads another call's phases"
    if is_over(state):
        every = tuple(share for task in range(merge.tasks) for share in merge.shares(task))
        assert memory.results == every, "a task is nobody's"
        assert memory == Memory(results=every, phases_flipped=1), "the next call finds other state"


def normal(merge: Merge, state: State) -> State:
    """One of all states that are alike but for the names of parts and warps."""
    memory, parts = state
    if merge.team:  # its warps differ in the pieces that they look at
        return state
    alike = (  # but the first, which takes over
        part._replace(warps=(part.warps[0], *sorted(part.warps[1:]))) for part in parts
    )
    return memory, tuple(sorted(alike))


def walk(merge: Merge) -> tuple[int, set[str]]:
    """Every state that can be reached is right: how many there are, and what was seen."""
    start = normal(merge, merge.start())
    seen, to_do, events = {start}, [start], set()
    while to_do:
        state = to_do.pop()
        check_state(merge, state)
        for warp in (warp for part in state[1] for warp in part.warps):
            if warp.taken:
                events.add("the last to depart took over")
            if warp.step == "alone":
                events.add("all had departed, and a task was kept")
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
    (3, {0, 1}, 2, 3),
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
    assert events == {"the last to depart took over", "all had departed, and a task was kept"}


@pytest.mark.parametrize("patience", [0, 1])
@pytest.mark.parametrize(
    "pieces, helpers, warps, tasks",
    [(2, {0, 1}, 2, 2), (2, {0, 1}, 2, 1), (2, {0}, 2, 1), (3, {0, 1}, 2, 2), (2, {0}, 3, 1)],
)
def test_teams(pieces: int, helpers: set[int], warps: int, tasks: int, patience: int) -> None:
    _, events = walk(merge_of(pieces, helpers, warps, tasks, patience, team=True))
    assert events == {"the last to depart took over", "all had departed, and a task was kept"}


@pytest.mark.parametrize(
    "broken, complaint",
    [
        ("orphans are nobody's", "a task is nobody's"),
        ("does not ask who departed", "a task is nobody's|finds other state"),
        ("keeps what another took", "done twice"),
        ("mark stays", "finds other state"),
        ("claims stay", "finds other state"),
        ("has patience for ever", "may never start"),
    ],
)
def test_the_model_tells_a_protocol_that_works_from_one_that_does_not(
    broken: str, complaint: str
) -> None:
    with pytest.raises(AssertionError, match=complaint):
        walk(merge_of(3, {0, 1, 2}, 1, 3, 0)._replace(broken=broken))


def test_no_helper_is_too_late_for_its_share() -> None:
    """With fewer tasks than shares the last to claim get none, whoever they are."""
    start = merge_of(3, {0, 1, 2}, 1, 1, 0)
    for first in range(3):
        state = start.start()
        order = [first, *({0, 1, 2} - {first})]
        for p in order:
            memory, parts = state
            memory, part = depart(start, memory, parts[p])
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
