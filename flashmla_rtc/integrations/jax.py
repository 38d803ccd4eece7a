"""JAX arrays that are given away: ``donate_argnums`` after a call."""

from __future__ import annotations

from .. import arrays


def release() -> None:
    """Wait for the calls that were made on JAX arrays on a GPU, and let go of their inputs.

    JAX does not know of the stream on which a call reads its inputs, so the package holds them
    until it sees, at a later call, that they are done with. While it does, JAX refuses to donate
    them (``donate_argnums``) with a ValueError that speaks of an external reference. Call this
    before a function that a cache is donated to. On a CPU there is nothing to wait for.
    """
    arrays.wait_and_let_go()
