# The types of csrc/bindings.cpp.

from collections.abc import Callable
from typing import TypeAlias

_LogNorm: TypeAlias = tuple[int, list[int], list[int], int, int, int, bool, int, int, int, float, float, int]
_LayerMasks: TypeAlias = tuple[int, int, int, list[int], int, list[int], bool, float, int, int, int]

__version__: str
with_cuda: bool
cuda_version: str
cuda_archs: str
cpu_instruction_set: str

def cpu_thread_runtime() -> str: ...
def cpu_layer_masks(args: _LayerMasks, sizes: list[int], num_threads: int) -> None: ...
def cpu_layer_masks_is_valid(args: _LayerMasks, num_threads: int) -> bool: ...
def cpu_layer_losses_forward(
    words: list[int],
    args: _LogNorm,
    share: float,
    sums: int,
    masses: int,
    loss: int,
    slopes: int,
    num_threads: int,
) -> None: ...
def cpu_layer_losses_backward(
    words: list[int],
    batch: int,
    accumulate: int,
    grad_loss: int,
    grad_loss_stride: int,
    slopes: int,
    num_threads: int,
) -> None: ...
def cpu_region_sums_forward(
    words: list[int], batch: int, accumulate: int, sums: int, masses: int, num_threads: int
) -> None: ...
def cpu_region_sums_backward(
    words: list[int], batch: int, accumulate: int, grad_sums: int, num_threads: int
) -> None: ...
def cpu_region_sums_mask_backward(
    words: list[int], batch: int, accumulate: int, grad_sums: int, num_threads: int
) -> None: ...
def cpu_log_norm_forward(args: _LogNorm, sums: int, masses: int, loss: int) -> None: ...
def cpu_log_norm_backward(
    args: _LogNorm, grad_loss: int, sums: int, masses: int, grad_sums: int, grad_masses: int
) -> None: ...
def cuda_region_sums_workspace(words: list[int], batch: int, accumulate: int) -> int: ...
def cuda_region_sums_forward(
    words: list[int],
    batch: int,
    accumulate: int,
    sums: int,
    masses: int,
    workspace: int,
    device: int,
    stream: int,
) -> None: ...
def cuda_region_sums_backward(
    words: list[int], batch: int, accumulate: int, grad_sums: int, device: int, stream: int
) -> None: ...
def cuda_region_sums_mask_backward(
    words: list[int], batch: int, accumulate: int, grad_sums: int, device: int, stream: int
) -> None: ...
def cuda_layer_losses_forward(
    words: list[int],
    batch: int,
    accumulate: int,
    options: _LogNorm,
    sums: int,
    masses: int,
    loss: int,
    slopes: int,
    allocate: Callable[[int], int],
    device: int,
    stream: int,
) -> None: ...
def cuda_layer_losses_backward(
    words: list[int],
    batch: int,
    accumulate: int,
    grad_loss: int,
    grad_loss_stride: int,
    slopes: int,
    device: int,
    stream: int,
) -> None: ...
def cuda_layer_masks(args: _LayerMasks, sizes: list[int], device: int, stream: int) -> None: ...
def cuda_log_norm_forward(
    args: _LogNorm, sums: int, masses: int, loss: int, device: int, stream: int
) -> None: ...
def cuda_log_norm_backward(
    args: _LogNorm,
    grad_loss: int,
    sums: int,
    masses: int,
    grad_sums: int,
    grad_masses: int,
    device: int,
    stream: int,
) -> None: ...
