"""The benchmark behind ``python -m flashmla_rtc bench``.

``shapes`` says what is measured and how operations and bytes are counted, ``problem`` makes the
inputs, ``timing`` holds the clock, ``ceilings`` measures the device's own limits, ``peers`` adapts
other kernels of the same function, and ``run`` plays the grid into a ``report``. Only ``problem``,
``timing``, ``ceilings`` and ``peers`` need torch, which they import when called.
"""

from __future__ import annotations
