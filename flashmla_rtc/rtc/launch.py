"""A launch: packed parameters, a grid, a stream, programmatic dependent launch."""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable
from typing import Any

from .kernel import DriverError, LoadedKernel, _reason, driver
from .params import ParamStruct

Grid = tuple[int, int, int]


class Launcher:
    """Launches one loaded kernel.

    threads: of a thread block. cluster: how many neighbours along a grid's first dimension form a
    thread block cluster, where that divides it; elsewhere there are no clusters.

    Parameters are packed into a buffer of each launch; the driver copies them before ``launch``
    returns. Every launch carries the attribute of programmatic dependent launch, so the kernel may
    start while its predecessor ends: it must execute ``griddepcontrol.wait`` before it writes
    to memory or relies on what it reads.
    """

    def __init__(
        self, kernel: LoadedKernel, params: ParamStruct, threads: int, cluster: int = 1
    ) -> None:
        self.kernel = kernel
        self.params = params
        self.threads = threads
        self.cluster = cluster
        self._local = threading.local()
        self._driver = driver()
        self._launch = self._driver.cuLaunchKernelEx
        self._success = self._driver.CUresult.CUDA_SUCCESS

    def launch(self, grid: Grid, stream: int, values: dict[str, Any]) -> None:
        """Launch ``grid`` blocks on ``stream`` with ``values``, one for each parameter by name.

        The kernel's device must be current. Raises DriverError.
        """
        # In a buffer of its own: a signal handler may launch between packing and launching.
        status = self.again(grid, stream, self.pack(values))()[0]
        if status != self._success:
            raise DriverError(
                f"Launching {self.kernel.name} with grid {grid} failed: "
                f"{_reason(self._driver, status)}."
            )

    def pack(self, values: dict[str, Any]) -> Any:
        """``values`` in a buffer of their own, for :meth:`again`."""
        buffer = ctypes.create_string_buffer(self.params.size)
        self.params.pack_into(buffer, values)
        return buffer

    def again(self, grid: Grid, stream: int, buffer: Any) -> Callable[[], tuple[Any, ...]]:
        """What launches with the parameters that are in ``buffer`` then, for the calling thread.

        It returns the driver's answer, which begins with 0 if the kernel was launched.
        """
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(buffer))
        address = ctypes.addressof(pointers)
        config = self.config(grid, stream)
        launch = functools.partial(self._launch, config, self.kernel.handle, address, 0)
        launch.kept = buffer, pointers  # type: ignore[attr-defined]  # addresses keep nothing alive
        return launch

    def config(self, grid: Grid, stream: int) -> Any:
        """How the driver names a launch of ``grid`` on ``stream``, kept for this thread."""
        if not hasattr(self._local, "configs"):
            self._local.configs = {}
        configs: dict[tuple[Grid, int], Any] = self._local.configs
        found = configs.get((grid, stream))
        if found is None:
            if len(configs) > 256:
                configs.clear()
            found = configs[grid, stream] = self._config(grid, stream)
        return found

    def _config(self, grid: Grid, stream: int) -> Any:
        cuda = self._driver
        value = cuda.CUlaunchAttributeValue()
        value.programmaticStreamSerializationAllowed = 1
        attribute = cuda.CUlaunchAttribute()
        attribute.id = (
            cuda.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        )
        attribute.value = value
        config = cuda.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = grid
        config.blockDimX, config.blockDimY, config.blockDimZ = self.threads, 1, 1
        config.sharedMemBytes = self.kernel.dynamic_smem_bytes
        config.hStream = cuda.CUstream(stream)
        config.attrs = [attribute]
        if self.cluster > 1 and grid[0] % self.cluster == 0:
            config.attrs = [attribute, self._cluster_attribute()]
        config.numAttrs = len(config.attrs)
        return config

    def _cluster_attribute(self) -> Any:
        cuda = self._driver
        value = cuda.CUlaunchAttributeValue()
        value.clusterDim.x, value.clusterDim.y, value.clusterDim.z = self.cluster, 1, 1
        attribute = cuda.CUlaunchAttribute()
        attribute.id = cuda.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        attribute.value = value
        return attribute
