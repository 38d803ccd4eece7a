"""Which slot of which page holds which token: the host's half of a paged cache.

Everything here is numbers on the host, exact at all times, so that no decode step has to ask the
device how long a request is. NumPy is all that it needs.

A *column* is a position of the padded batch, as an attention mask has it; a *slot* is a place in a
page. Columns that a mask hides are not stored, so a request of length ``n`` fills the first ``n``
slots of its own pages, however its prompt was padded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

PAGE_SIZE = 64


class PagesExhausted(RuntimeError):
    """A cache of a fixed number of pages has too few that are free."""


def check_pages(pages: int | None) -> None:
    """Raises ValueError unless ``pages`` is None or a whole number from 1 on."""
    if pages is not None and (type(pages) is not int or pages < 1):
        raise ValueError(f"pages must be None or a whole number from 1 on, but it is {pages!r}.")


class PageAllocator:
    """Hands out page numbers from 0 on, counts who uses each, and takes them back.

    Args:
        pages: the fixed number of pages, or None for one that grows: by an eighth at least, so
            that a cache is moved some dozens of times only on its way to any size.

    Attributes:
        capacity: pages there are, in use or free.
        growths: how often it has grown, whether or not it was taken back.
    """

    def __init__(self, pages: int | None = None) -> None:
        check_pages(pages)
        self.fixed = pages is not None
        self.capacity = 0
        self.growths = 0
        self._free: list[int] = []
        self._users: list[int] = []
        self._grow(pages or 0)

    @property
    def in_use(self) -> int:
        """Pages that have a user."""
        return self.capacity - len(self._free)

    def users(self, page: int) -> int:
        """How many requests hold ``page``."""
        return self._users[page]

    def ensure(self, count: int, spare: int = 0) -> None:
        """See to it that ``count`` pages are free.

        Where there are fewer and more can be made, so many as ``spare`` are made beside them.

        Raises:
            PagesExhausted: there are fewer.
        """
        missing = count - len(self._free)
        if missing > 0:
            if self.fixed:
                raise PagesExhausted(
                    f"The cache has {self.capacity} pages of {PAGE_SIZE} tokens, {self.in_use} of "
                    f"them in use, and needs {count} more. Make it with more pages, or with "
                    "pages=None so that it grows."
                )
            self._grow(max(missing + spare, self.capacity // 8))

    def shrink(self, capacity: int) -> None:
        """Undo the last growth, back to ``capacity``. None of its pages has been taken."""
        added = self.capacity - capacity
        if added:
            del self._free[:added], self._users[capacity:]
            self.capacity = capacity

    def take(self, count: int) -> list[int]:
        """``count`` free pages, each with one user from now on.

        Raises:
            PagesExhausted: there are fewer, and it can't grow. Nothing has been taken.
        """
        self.ensure(count)
        taken = [self._free.pop() for _ in range(count)]
        for page in taken:
            self._users[page] = 1
        return taken

    def share(self, page: int) -> None:
        """One more user of a page that is in use."""
        self._users[page] += 1

    def release(self, page: int) -> None:
        """One user fewer; the page is free when it was the last."""
        self._users[page] -= 1
        if self._users[page] == 0:
            self._free.append(page)

    def _grow(self, count: int) -> None:
        self._free[:0] = range(self.capacity + count - 1, self.capacity - 1, -1)  # lowest first
        self._users += [0] * count
        self.capacity += count
        self.growths += count > 0


@dataclass(frozen=True)
class Reserved:
    """Where the new tokens of a forward go.

    Attributes:
        rows: int64 (stored,), which of the batch * tokens new tokens are stored, in order.
        slots: int64 (stored,), the slot of each: page * PAGE_SIZE + place in the page.
        copies: (from, to) pages that have to be copied before anything is written.
    """

    rows: np.ndarray
    slots: np.ndarray
    copies: list[tuple[int, int]]


class PagedRequests:
    """The requests of a batch: their lengths, their pages, and which columns they hold.

    Requests may share pages (:meth:`take`). A page that is shared is copied when one of its users
    is about to write into it, and not before.

    Attributes:
        batch: number of requests; None before the first :meth:`reserve`. Without columns, as after
            a first forward that failed, the next :meth:`reserve` may bring another number.
        columns: columns seen so far, padding included; the same for all requests.
        lengths: int64 (batch,), tokens stored of each request.
        table: int32 (batch, width), pages of each request; what lies past the used ones is 0.
        version: changes whenever ``table`` does.
    """

    def __init__(self, allocator: PageAllocator) -> None:
        self.allocator = allocator
        self.version = 0
        self._clear()

    def _clear(self) -> None:
        self.batch: int | None = None
        self.columns = 0
        self.lengths = np.zeros(0, np.int64)
        self.table = np.zeros((0, 0), np.int32)
        self._held = np.zeros(0, np.int64)  # pages of each request
        self._kept = np.zeros((0, 0), bool)  # (batch, columns or more)

    @property
    def kept(self) -> np.ndarray:
        """bool (batch, columns): which columns are stored."""
        return self._kept[:, : self.columns]

    def reserve(
        self,
        new: np.ndarray,
        spare: int = 0,
        *,
        seen: np.ndarray | None = None,
        make_pages: Callable[[], None] = lambda: None,
    ) -> Reserved:
        """Pages for the next columns. Nothing counts as stored until :meth:`commit`.

        Args:
            new: bool (batch, tokens), which of the new columns are tokens to store.
            spare: pages to make beside, if some have to be made.
            seen: bool (batch, columns); the stored columns that it does not show are forgotten.
            make_pages: called when the allocator has numbers for all pages that it takes, to make
                the pages themselves.

        Whatever is raised, by ``make_pages`` too, requests are as they were.

        Raises:
            ValueError: ``seen`` shows a column that was hidden before, and so was never stored.
            NotImplementedError: what ``seen`` hides lies before columns that it shows.
            PagesExhausted: there are too few free pages.
        """
        fresh = self.columns == 0
        hidden = None if fresh or seen is None else self._hidden(seen)
        lengths = np.zeros(len(new), np.int64) if fresh else self.lengths
        if hidden is not None:
            lengths = lengths - hidden.sum(1)
        after = lengths + new.sum(1)
        missing = _pages_of(after) - _pages_of(lengths)
        # What a forward that failed has left, and what is hidden now, is let go first.
        leaving = Counter(self._past(np.zeros_like(self._held) if fresh else _pages_of(lengths)))
        shared = self._shared_and_written(lengths, after, leaving)
        count = int(missing.sum()) + len(shared)
        freed = sum(self.allocator.users(page) == users for page, users in leaving.items())
        capacity = self.allocator.capacity
        self.allocator.ensure(count - freed, spare)
        try:
            make_pages()
        except BaseException:
            self.allocator.shrink(capacity)
            raise

        # Nothing can fail from here on.
        if fresh:
            self.reset()
            self.batch, self.lengths = len(new), lengths
            self._held = np.zeros_like(lengths)
            self.table = np.zeros((len(new), 0), np.int32)
            self._kept = np.zeros((len(new), 0), bool)
        elif hidden is not None:
            self.kept[:] &= ~hidden
            self.lengths = lengths
        self._trim()
        pages = self.allocator.take(count)
        if pages:
            self.version += 1
        copies = []
        for place in shared:
            source, target = int(self.table[place]), pages.pop()
            copies.append((source, target))
            self.table[place] = target
            self.allocator.release(source)
        self._widen(int((self._held + missing).max(initial=0)))
        for request in np.flatnonzero(missing):
            begin, count = self._held[request], missing[request]
            self.table[request, begin : begin + count] = [pages.pop() for _ in range(count)]
        self._held += missing

        requests, columns = np.nonzero(new)
        positions = (self.lengths[:, np.newaxis] + np.cumsum(new, 1) - 1)[requests, columns]
        used = self.table[requests, positions // PAGE_SIZE].astype(np.int64)
        slots = used * PAGE_SIZE + positions % PAGE_SIZE
        return Reserved(requests * new.shape[1] + columns, slots, copies)

    def _shared_and_written(
        self, lengths: np.ndarray, after: np.ndarray, leaving: Counter[int]
    ) -> list[tuple[int, int]]:
        """(request, index into its table) of pages that are part full, shared and to be written.

        All but one user of a page get a copy of their own; the last finds it to itself. Those that
        are ``leaving`` a page anyway do not count.
        """
        found: list[tuple[int, int]] = []
        leaving = leaving.copy()
        for request in np.flatnonzero((after > lengths) & (lengths % PAGE_SIZE > 0)):
            index = int(lengths[request] // PAGE_SIZE)
            page = int(self.table[request, index])
            if self.allocator.users(page) - leaving[page] > 1:
                leaving[page] += 1
                found.append((int(request), index))
        return found

    def _widen(self, width: int) -> None:
        if width > self.table.shape[1]:
            more = np.zeros((len(self.table), width - self.table.shape[1]), np.int32)
            self.table = np.concatenate([self.table, more], 1)

    def commit(self, new: np.ndarray) -> None:
        """The columns that were last reserved are stored now."""
        end = self.columns + new.shape[1]
        if end > self._kept.shape[1]:
            more = np.zeros((len(new), max(end, 2 * self._kept.shape[1])), bool)
            more[:, : self.columns] = self.kept
            self._kept = more
        self._kept[:, self.columns : end] = new
        self.columns = end
        self.lengths = self.lengths + new.sum(1)

    def _hidden(self, seen: np.ndarray) -> np.ndarray | None:
        """The stored columns that ``seen`` no longer shows; None if there are none."""
        if (seen & ~self.kept).any():
            request, column = (int(place[0]) for place in np.nonzero(seen & ~self.kept))
            raise ValueError(
                f"attention_mask shows column {column} of request {request}, which was padding "
                "when the cache was filled and is not stored."
            )
        hidden: np.ndarray = self.kept & ~seen
        if not hidden.any():
            return None
        if (np.logical_or.accumulate(hidden, 1) & seen).any():
            raise NotImplementedError(
                "attention_mask hides tokens that are in the cache and lie before others that it "
                "shows; only the last tokens of a request can be hidden after they were stored."
            )
        return hidden

    def crop(self, columns: int) -> None:
        """Forget the last ``columns`` columns, and free pages that hold nothing more.

        Raises:
            ValueError: there are fewer.
        """
        if not 0 <= columns <= self.columns:
            raise ValueError(
                f"crop can take away from 0 to {self.columns} tokens, as many as the cache has "
                f"seen, but {columns} were asked for."
            )
        end = self.columns - columns
        if end == 0:
            self.reset()
            return
        self.lengths = self.lengths - self.kept[:, end:].sum(1)
        self.columns = end
        self._trim()

    def take(self, indices: list[int]) -> None:
        """Make request ``i`` what request ``indices[i]`` was; repeated ones share their pages.

        Without columns there is nothing to choose from, and nothing happens.

        Raises:
            IndexError: there is no such request.
        """
        if self.columns == 0:
            return
        batch = self.batch or 0
        for index in indices:
            if not 0 <= index < batch:
                raise IndexError(f"The cache has {batch} requests, and there is no {index}.")
        if not indices:
            self.reset()
            return
        self._trim()
        before, held = self.table, self._held
        for index in indices:
            for page in before[index, : held[index]]:
                self.allocator.share(page)
        for pages, count in zip(before, held, strict=True):
            for page in pages[:count]:
                self.allocator.release(page)
        self.batch = len(indices)
        self.table, self._held = before[indices], held[indices]
        self.lengths, self._kept = self.lengths[indices], self._kept[indices]
        self.version += 1

    def reset(self) -> None:
        """Forget everything and free all pages."""
        for pages, count in zip(self.table, self._held, strict=True):
            for page in pages[:count]:
                self.allocator.release(page)
        self._clear()
        self.version += 1

    def _past(self, needed: np.ndarray) -> list[int]:
        """Pages that requests hold beyond the first ``needed``, int64 (batch,), of their own."""
        return [
            int(page)
            for request in np.flatnonzero(self._held > needed)
            for page in self.table[request, needed[request] : self._held[request]]
        ]

    def _trim(self) -> None:
        """Free the pages past each request's last token."""
        needed = _pages_of(self.lengths)
        for page in self._past(needed):
            self.allocator.release(page)
        for request in np.flatnonzero(self._held > needed):
            self.table[request, needed[request] : self._held[request]] = 0
            self.version += 1
        self._held = np.minimum(self._held, needed)


def _pages_of(tokens: np.ndarray) -> np.ndarray:
    return -(-tokens // PAGE_SIZE)
