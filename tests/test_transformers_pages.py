"""The host's half of the paged cache, against lists of tokens."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
hypothesis = pytest.importorskip("hypothesis")

from hypothesis import settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule  # noqa: E402

from flashmla_rtc.integrations.transformers.pages import (  # noqa: E402
    PAGE_SIZE,
    PageAllocator,
    PagedRequests,
    PagesExhausted,
)


@settings(max_examples=100, deadline=None)
@hypothesis.given(st.lists(st.integers(-8, 40), max_size=40), st.sampled_from([None, 1, 50]))
def test_the_allocator_never_hands_out_a_page_twice(steps: list[int], fixed: int | None) -> None:
    """Positive steps take pages, negative ones release or share them."""
    allocator = PageAllocator(fixed)
    users: Counter[int] = Counter()
    for step in steps:
        if step > 0:
            before = allocator.capacity
            room = before - allocator.in_use
            try:
                taken = allocator.take(step)
            except PagesExhausted:
                assert fixed is not None
                assert step > room
            else:
                assert len(set(taken)) == step
                assert not users.keys() & set(taken)
                assert all(0 <= page < allocator.capacity for page in taken)
                users.update(taken)
                assert allocator.capacity >= before
        for page in list(users)[: max(-step, 0)]:
            if step % 2:
                allocator.share(page)
                users[page] += 1
            else:
                allocator.release(page)
                users[page] -= 1
                users += Counter()  # drops zeros
        assert allocator.in_use == len(users)
        assert all(allocator.users(page) == count for page, count in users.items())
        if fixed is not None:
            assert allocator.capacity == fixed


class Machine(RuleBasedStateMachine):
    """Requests as lists of (column, token), beside pages of tokens that follow the plan."""

    def __init__(self) -> None:
        super().__init__()
        self.requests = PagedRequests(PageAllocator())
        self.pages = np.full((0, PAGE_SIZE), -1)
        self.expected: list[list[tuple[int, int]]] | None = None
        self.columns = 0
        self.token = 0

    def _reserve(self, data: Any, tokens: int) -> np.ndarray:
        batch = data.draw(st.integers(1, 4)) if self.expected is None else len(self.expected)
        if self.expected is None:
            self.expected = [[] for _ in range(batch)]
        bits = st.lists(st.booleans(), min_size=batch * tokens, max_size=batch * tokens)
        whole = data.draw(st.booleans())
        new = np.ones((batch, tokens), bool)
        if not whole:
            new = np.array(data.draw(bits)).reshape(batch, tokens)
        reserved = self.requests.reserve(new)
        more = self.requests.allocator.capacity - len(self.pages)
        self.pages = np.concatenate([self.pages, np.full((more, PAGE_SIZE), -1)])
        for source, target in reserved.copies:
            self.pages[target] = self.pages[source]
        np.testing.assert_array_equal(reserved.rows, np.flatnonzero(new))
        assert len(set(reserved.slots.tolist())) == len(reserved.slots)
        self.written = np.arange(self.token, self.token + new.sum())
        self.token += int(new.sum())
        self.pages.reshape(-1)[reserved.slots] = self.written
        return new

    @rule(data=st.data(), tokens=st.integers(1, 70))
    def forward(self, data: Any, tokens: int) -> None:
        new = self._reserve(data, tokens)
        self.requests.commit(new)
        written = iter(self.written.tolist())
        assert self.expected is not None
        for request, column in np.argwhere(new).tolist():
            self.expected[request].append((self.columns + column, next(written)))
        self.columns += tokens

    @rule(data=st.data(), tokens=st.integers(1, 70))
    def forward_that_fails(self, data: Any, tokens: int) -> None:
        self._reserve(data, tokens)

    @rule(part=st.floats(0, 1))
    def crop(self, part: float) -> None:
        removed = int(part * self.columns)
        self.requests.crop(removed)
        self.columns -= removed
        if self.expected is not None:
            self.expected = [[t for t in r if t[0] < self.columns] for r in self.expected]

    @precondition(lambda self: self.expected is not None)
    @rule(data=st.data())
    def take(self, data: Any) -> None:
        assert self.expected is not None
        indices = data.draw(
            st.lists(st.integers(0, len(self.expected) - 1), min_size=1, max_size=5)
        )
        self.requests.take(indices)
        self.expected = [list(self.expected[index]) for index in indices]

    @precondition(lambda self: self.expected is not None)
    @rule(data=st.data())
    def hide_the_last(self, data: Any) -> None:
        assert self.expected is not None
        seen = self.requests.kept.copy()
        for request, tokens in enumerate(self.expected):
            keep = data.draw(st.integers(0, len(tokens)))
            seen[request, [column for column, _ in tokens[keep:]]] = False
            del tokens[keep:]
        self.requests.hide(seen)

    @rule()
    def reset(self) -> None:
        self.requests.reset()
        self.expected, self.columns = None, 0

    @invariant()
    def every_request_reads_its_own_tokens(self) -> None:
        requests = self.requests
        assert requests.columns == self.columns
        if self.expected is None:
            assert requests.batch is None
            assert requests.allocator.in_use == 0
            return
        assert requests.batch == len(self.expected)
        for request, tokens in enumerate(self.expected):
            length = int(requests.lengths[request])
            assert length == len(tokens)
            read = self.pages[requests.table[request]].reshape(-1)[:length]
            assert read.tolist() == [token for _, token in tokens]
            columns = np.flatnonzero(requests.kept[request]).tolist()
            assert columns == [column for column, _ in tokens]

    @invariant()
    def pages_are_counted(self) -> None:
        requests = self.requests
        users: Counter[int] = Counter()
        for pages, count in zip(requests.table, requests._held, strict=True):
            users.update(pages[:count].tolist())
        assert requests.allocator.in_use == len(users)
        assert all(requests.allocator.users(page) == count for page, count in users.items())


Machine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestPagedRequests = Machine.TestCase


def filled(lengths: list[int], pages: int | None = None) -> PagedRequests:
    requests = PagedRequests(PageAllocator(pages))
    new = np.arange(max(lengths)) >= max(lengths) - np.array(lengths)[:, np.newaxis]
    requests.reserve(new)
    requests.commit(new)
    return requests


def test_padding_takes_no_page() -> None:
    requests = filled([1, 64, 65, 300])
    assert requests.allocator.in_use == 1 + 1 + 2 + 5


def test_full_pages_stay_shared_and_the_last_one_is_copied_at_the_next_write() -> None:
    requests = filled([130])
    requests.take([0, 0, 0])
    assert requests.allocator.in_use == 3
    reserved = requests.reserve(np.ones((3, 1), bool))
    assert len(reserved.copies) == 2  # the last user has it to itself
    assert requests.allocator.in_use == 5
    assert len({int(page) for page in requests.table[:, 2]}) == 3
    assert (requests.table[:, :2] == requests.table[0, :2]).all()


def test_a_shared_full_page_that_is_cropped_is_copied_before_it_is_written() -> None:
    requests = filled([128])
    requests.take([0, 0])
    requests.crop(10)
    reserved = requests.reserve(np.array([[True], [False]]))
    assert len(reserved.copies) == 1
    assert requests.table[0, 1] != requests.table[1, 1]


def test_nothing_changes_when_pages_run_out() -> None:
    requests = filled([64, 100], pages=3)
    before = requests.table.copy(), requests.lengths.copy(), requests.version
    with pytest.raises(PagesExhausted, match="has 3 pages of 64 tokens, 3 of them in use, and nee"):
        requests.reserve(np.ones((2, 1), bool))
    assert requests.version == before[2]
    np.testing.assert_array_equal(requests.table, before[0])
    np.testing.assert_array_equal(requests.lengths, before[1])
    requests.crop(36)
    requests.reserve(np.ones((2, 1), bool))


def test_a_growing_cache_moves_some_dozens_of_times_only() -> None:
    allocator = PageAllocator()
    capacities = set()
    for _ in range(10_000):
        allocator.take(1)
        capacities.add(allocator.capacity)
    assert len(capacities) < 80
    assert allocator.capacity < 1.125 * 10_000 + 2


@pytest.mark.parametrize("pages", [0, -1, 2.0, True, "3"])
def test_a_number_of_pages_that_is_none(pages: Any) -> None:
    with pytest.raises(ValueError, match="pages must be None or a whole number from 1 on, but it"):
        PageAllocator(pages)


def test_crop_hide_and_take_say_what_is_wrong() -> None:
    requests = filled([3, 5])
    for columns in (6, -1):
        with pytest.raises(ValueError, match=f"from 0 to 5 tokens.*but {columns} were asked for"):
            requests.crop(columns)
    with pytest.raises(IndexError, match="has 2 requests, and there is no 2"):
        requests.take([0, 2])
    with pytest.raises(ValueError, match="shows column 1 of request 0, which was padding"):
        requests.hide(np.ones((2, 5), bool) & (np.arange(5) > 0))
    seen = requests.kept.copy()
    seen[1, 2] = False
    with pytest.raises(NotImplementedError, match="hides tokens that are in the cache and lie bef"):
        requests.hide(seen)
    assert requests.lengths.tolist() == [3, 5]
