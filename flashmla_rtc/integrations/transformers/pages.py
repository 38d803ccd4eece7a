"""Which slot of which page holds which token: the host's half of a paged cache.

Everything here is numbers on the host, exact at all times, so that no decode step has to ask the
device how long a request is. NumPy is all that it needs.

A *column* is a position of the padded batch, as an attention mask has it; a *slot* is a place in a
page. Columns that a mask hides are not stored, so a request of length ``n`` fills the first ``n``
slots of its own pages, however its prompt was padded.
"""

from __future__ import annotations

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
    """

    def __init__(self, pages: int | None = None) -> None:
        check_pages(pages)
        self.fixed = pages is not None
        self.capacity = 0
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

    def take(self, count: int, spare: int = 0) -> list[int]:
        """``count`` free pages, each with one user from now on.

        Where there are fewer and more can be made, so many as ``spare`` are made beside them.

        Raises:
            PagesExhausted: there are fewer. Nothing has been taken.
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
        batch: number of requests; None before the first :meth:`reserve` and after :meth:`reset`.
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

    def reserve(self, new: np.ndarray, spare: int = 0) -> Reserved:
        """Pages for the next columns. Nothing counts as stored until :meth:`commit`.

        Args:
            new: bool (batch, tokens), which of the new columns are tokens to store.
            spare: pages to make beside, if some have to be made.

        Raises:
            PagesExhausted: there are too few free pages. Nothing has changed.
        """
        if self.batch is None:
            self.batch = len(new)
            self.lengths = np.zeros(self.batch, np.int64)
            self._held = np.zeros(self.batch, np.int64)
            self.table = np.zeros((self.batch, 0), np.int32)
            self._kept = np.zeros((self.batch, 0), bool)
        after = self.lengths + new.sum(1)
        missing = np.maximum(-(-after // PAGE_SIZE) - self._held, 0)
        shared = self._shared_and_written(after)
        pages = self.allocator.take(int(missing.sum()) + len(shared), spare)
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

    def _shared_and_written(self, after: np.ndarray) -> list[tuple[int, int]]:
        """(request, index into its table) of pages that are part full, shared and to be written.

        All but one user of a page get a copy of their own; the last finds it to itself.
        """
        found: list[tuple[int, int]] = []
        leaving: dict[int, int] = {}
        for request in np.flatnonzero((after > self.lengths) & (self.lengths % PAGE_SIZE > 0)):
            index = int(self.lengths[request] // PAGE_SIZE)
            page = int(self.table[request, index])
            if self.allocator.users(page) - leaving.get(page, 0) > 1:
                leaving[page] = leaving.get(page, 0) + 1
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

    def hide(self, seen: np.ndarray) -> None:
        """Forget the stored columns that ``seen``, bool (batch, columns), no longer shows.

        Raises:
            ValueError: a column is shown that was hidden before, and so was never stored.
            NotImplementedError: what is hidden lies before columns that are shown.
        """
        if (seen & ~self.kept).any():
            request, column = (int(place[0]) for place in np.nonzero(seen & ~self.kept))
            raise ValueError(
                f"attention_mask shows column {column} of request {request}, which was padding "
                "when the cache was filled and is not stored."
            )
        hidden = self.kept & ~seen
        if not hidden.any():
            return
        if (np.logical_or.accumulate(hidden, 1) & seen).any():
            raise NotImplementedError(
                "attention_mask hides tokens that are in the cache and lie before others that it "
                "shows; only the last tokens of a request can be hidden after they were stored."
            )
        self.kept[:] &= seen
        self.lengths = self.lengths - hidden.sum(1)
        self._trim()

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
        self.lengths = self.lengths - self.kept[:, end:].sum(1)
        self.columns = end
        self._trim()

    def take(self, indices: list[int]) -> None:
        """Make request ``i`` what request ``indices[i]`` was; repeated ones share their pages.

        Raises:
            IndexError: there is no such request.
        """
        batch = self.batch or 0
        for index in indices:
            if not 0 <= index < batch:
                raise IndexError(f"The cache has {batch} requests, and there is no {index}.")
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

    def _trim(self) -> None:
        """Free the pages past each request's last token."""
        needed = -(-self.lengths // PAGE_SIZE)
        for request in np.flatnonzero(self._held > needed):
            for page in self.table[request, needed[request] : self._held[request]]:
                self.allocator.release(page)
            self.table[request, needed[request] : self._held[request]] = 0
            self.version += 1
        self._held = np.minimum(self._held, needed)
