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
from hypothesis.stateful import (  # noqa: E402
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

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
        self.pages = np.full((0, PAGE_SIZE), -1)
        self.expected: list[list[tuple[int, int]]] | None = None  # None without columns
        self.columns = 0
        self.token = 0

    @initialize(pages=st.sampled_from([None, 7]))
    def start(self, pages: int | None) -> None:
        self.requests = PagedRequests(PageAllocator(pages))

    def _draw(self, data: Any, tokens: int) -> tuple[np.ndarray, list[int] | None]:
        """New columns, and how many tokens of each request stay, None for all."""
        batch = data.draw(st.integers(1, 4)) if self.expected is None else len(self.expected)
        bits = st.lists(st.booleans(), min_size=batch * tokens, max_size=batch * tokens)
        new = np.ones((batch, tokens), bool)
        if not data.draw(st.booleans()):
            new = np.array(data.draw(bits), bool).reshape(batch, tokens)
        if self.expected is None or not data.draw(st.booleans()):
            return new, None
        return new, [data.draw(st.integers(0, len(request))) for request in self.expected]

    def _seen(self, stay: list[int] | None) -> np.ndarray | None:
        if stay is None or self.expected is None:
            return None
        seen = self.requests.kept.copy()
        for request, tokens in enumerate(self.expected):
            seen[request, [column for column, _ in tokens[stay[request] :]]] = False
        return seen

    def _make_pages(self) -> None:
        more = self.requests.allocator.capacity - len(self.pages)
        self.pages = np.concatenate([self.pages, np.full((max(more, 0), PAGE_SIZE), -1)])

    def _reserve(self, data: Any, tokens: int) -> np.ndarray | None:
        """The new columns that are written; None where pages do not suffice."""
        new, stay = self._draw(data, tokens)
        try:
            reserved = self.requests.reserve(
                new, seen=self._seen(stay), make_pages=self._make_pages
            )
        except PagesExhausted:
            assert self.requests.allocator.fixed
            return None
        if stay is not None and self.expected is not None:
            for request, count in zip(self.expected, stay, strict=True):
                del request[count:]
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
        if new is None:
            return
        self.requests.commit(new)
        written = iter(self.written.tolist())
        if self.expected is None:
            self.expected = [[] for _ in new]
        for request, column in np.argwhere(new).tolist():
            self.expected[request].append((self.columns + column, next(written)))
        self.columns += tokens

    @rule(data=st.data(), tokens=st.integers(1, 70))
    def forward_that_fails(self, data: Any, tokens: int) -> None:
        self._reserve(data, tokens)

    @rule(data=st.data(), tokens=st.integers(1, 70))
    def pages_that_can_not_be_made(self, data: Any, tokens: int) -> None:
        requests = self.requests
        allocator = requests.allocator

        def state() -> Any:
            arrays = requests.table, requests.lengths, requests.kept
            numbers = requests.batch, requests.version, allocator.capacity, allocator.in_use
            return [array.tolist() for array in arrays], numbers

        def fail() -> None:
            raise MemoryError

        before = state()
        new, stay = self._draw(data, tokens)
        with pytest.raises((MemoryError, PagesExhausted)):
            requests.reserve(new, 3, seen=self._seen(stay), make_pages=fail)
        assert state() == before

    @rule(part=st.floats(0, 1))
    def crop(self, part: float) -> None:
        removed = int(part * self.columns)
        self.requests.crop(removed)
        self.columns -= removed
        if self.expected is not None:
            self.expected = [[t for t in r if t[0] < self.columns] for r in self.expected]
        if self.columns == 0:
            self.expected = None

    @precondition(lambda self: self.expected is not None)
    @rule(data=st.data())
    def take(self, data: Any) -> None:
        assert self.expected is not None
        indices = data.draw(
            st.lists(st.integers(0, len(self.expected) - 1), min_size=1, max_size=5)
        )
        self.requests.take(indices)
        self.expected = [list(self.expected[index]) for index in indices]

    @precondition(lambda self: self.expected is None)
    @rule(indices=st.lists(st.integers(0, 3), max_size=5))
    def take_without_columns(self, indices: list[int]) -> None:
        self.requests.take(indices)

    @rule()
    def reset(self) -> None:
        self.requests.reset()
        self.expected, self.columns = None, 0
        assert self.requests.batch is None
        assert self.requests.allocator.in_use == 0

    @invariant()
    def every_request_reads_its_own_tokens(self) -> None:
        requests = self.requests
        assert requests.columns == self.columns
        if self.expected is None:
            assert self.columns == 0
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


def test_what_a_mask_hides_makes_room_only_if_that_suffices() -> None:
    requests = filled([65, 100], pages=4)
    seen = requests.kept.copy()
    seen[0, -1] = False  # frees a page
    with pytest.raises(PagesExhausted, match="4 of them in use, and needs 1 more"):
        requests.reserve(np.ones((2, 29), bool), seen=seen)
    assert requests.lengths.tolist() == [65, 100]
    assert requests.allocator.in_use == 4
    requests.reserve(np.ones((2, 28), bool), seen=seen)
    assert requests.lengths.tolist() == [64, 100]


@pytest.mark.parametrize("fails", [True, False])
def test_without_columns_any_number_of_requests_may_come(fails: bool) -> None:
    requests = PagedRequests(PageAllocator(2))
    requests.take([])
    requests.take([0, 0])
    with pytest.raises(PagesExhausted):
        requests.reserve(np.ones((3, 5), bool))
    assert requests.batch is None
    requests.reserve(np.ones((2, 5), bool))
    if not fails:
        requests.commit(np.ones((2, 5), bool))
        requests.crop(5)
        assert requests.batch is None
    reserved = requests.reserve(np.ones((1, 128), bool))
    assert sorted(reserved.slots.tolist()) == list(range(128))
    assert requests.lengths.tolist() == [0]


def test_without_requests_nothing_is_left() -> None:
    requests = filled([3, 5])
    requests.take([])
    assert (requests.batch, requests.columns, requests.allocator.in_use) == (None, 0, 0)


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


NOTHING = np.zeros((2, 0), bool)


def test_crop_mask_and_take_say_what_is_wrong() -> None:
    requests = filled([3, 5])
    for columns in (6, -1):
        with pytest.raises(ValueError, match=f"from 0 to 5 tokens.*but {columns} were asked for"):
            requests.crop(columns)
    with pytest.raises(IndexError, match="has 2 requests, and there is no 2"):
        requests.take([0, 2])
    with pytest.raises(ValueError, match="shows column 1 of request 0, which was padding"):
        requests.reserve(NOTHING, seen=np.ones((2, 5), bool) & (np.arange(5) > 0))
    seen = requests.kept.copy()
    seen[1, 2] = False
    with pytest.raises(NotImplementedError, match="hides tokens that are in the cache and lie bef"):
        requests.reserve(NOTHING, seen=seen)
    assert requests.lengths.tolist() == [3, 5]
