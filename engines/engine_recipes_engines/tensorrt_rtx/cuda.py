"""What a session needs of CUDA: memory, copies and one stream, each return code checked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from engine_recipes import MachineError

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

#: Said wherever an engine could not be run on this machine.
ELSEWHERE = "run it on a machine with an NVIDIA GPU; `recipes validate` computes the same on a CPU"


class Device:
    """The first GPU that CUDA shows to this process, one stream on it, and all memory taken through this object.

    Attributes:
        name: of the GPU, `NVIDIA L40S`.
        target: its compute capability, as `--target` takes it: `sm89`.
        stream: address of the stream.

    Raises:
        MachineError: no driver, no GPU, or a driver too old. So do all methods where CUDA reports an error.
    """

    def __init__(self) -> None:
        try:
            from cuda.bindings import runtime
        except ImportError as error:
            raise MachineError(
                f"CUDA cannot be used: {error}",
                "pip install 'cuda-bindings>=13,<14', or 'engine-recipes[tensorrt-rtx]'",
            ) from error
        self._cuda: Any = runtime
        self._held: set[int] = set()
        self._call("cudaSetDevice", 0)
        properties = self._call("cudaGetDeviceProperties", 0)
        self.name: str = properties.name.decode().rstrip("\0")
        self.target = f"sm{properties.major}{properties.minor}"
        self._stream: Any = self._call("cudaStreamCreate")
        self.stream = int(self._stream)

    def allocate(self, size: int, what: str, hint: str) -> int:
        """Take `size` bytes, set to zero. Returns their address, which is a multiple of 256.

        Raises:
            MachineError: there are not so many: what they are for, how many are free, and `hint`.
        """
        code, address = self._cuda.cudaMalloc(size)
        if code == self._cuda.cudaError_t.cudaErrorMemoryAllocation:
            self._cuda.cudaGetLastError()  # else a library that asks next would take it for its own
            free, total = self._call("cudaMemGetInfo")
            has = f"{self.name} has {free / 1e9:.2f} of {total / 1e9:.2f} GB free"
            raise MachineError(f"{what} takes {size / 1e9:.2f} GB of GPU memory, {has}", hint)
        self._check("cudaMalloc", code)
        place = int(address)
        self._held.add(place)
        self._call("cudaMemsetAsync", place, 0, size, self._stream)
        return place

    def upload(self, address: int, array: Array) -> None:
        """Copy to the GPU, in the order of the stream. The array may be changed at once."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", address, array.ctypes.data, array.nbytes, kind, self._stream)

    def download(self, array: Array, address: int) -> None:
        """Copy from the GPU, once all that was asked of it before is done, and wait for it."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", array.ctypes.data, address, array.nbytes, kind, self._stream)
        self._call("cudaStreamSynchronize", self._stream)

    def free(self, address: int) -> None:
        """Give memory back. It may be given back already."""
        if address in self._held:
            self._held.remove(address)
            self._call("cudaFree", address)

    def close(self) -> None:
        """Give everything back. Safe to call twice."""
        for address in list(self._held):
            self.free(address)
        if self._stream is not None:
            stream, self._stream = self._stream, None
            self._call("cudaStreamDestroy", stream)

    def _call(self, name: str, *arguments: Any) -> Any:
        code, *values = getattr(self._cuda, name)(*arguments)
        self._check(name, code)
        return values[0] if len(values) == 1 else values

    def _check(self, name: str, code: Any) -> None:
        errors = self._cuda.cudaError_t
        if code == errors.cudaSuccess:
            return
        if code == errors.cudaErrorInsufficientDriver and self._cuda.cudaDriverGetVersion()[1] == 0:
            raise MachineError("this machine has no NVIDIA driver", ELSEWHERE)
        text = self._cuda.cudaGetErrorString(code)[1].decode()
        hint = {
            errors.cudaErrorInsufficientDriver: "update the NVIDIA driver",
            errors.cudaErrorNoDevice: f"see what nvidia-smi and CUDA_VISIBLE_DEVICES say, or {ELSEWHERE}",
        }.get(code, "see what nvidia-smi says, then try again")
        raise MachineError(f"CUDA failed in {name}: {text}", hint)
