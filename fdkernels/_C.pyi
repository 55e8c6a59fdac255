# The types of csrc/bindings.cpp.

from collections.abc import Callable
from typing import ClassVar

__version__: str
with_cuda: bool
cuda_version: str
cuda_archs: str
cpu_instruction_set: str
layer_words: int
layer_fields: dict[str, int]
region_layer_words: int
region_layer_fields: dict[str, int]
mask_size_words: int
mask_size_fields: dict[str, int]

class DType:
    __members__: ClassVar[dict[str, DType]]
    float32: ClassVar[DType]
    float64: ClassVar[DType]
    bfloat16: ClassVar[DType]
    float16: ClassVar[DType]
    uint8: ClassVar[DType]
    int8: ClassVar[DType]
    int16: ClassVar[DType]
    int32: ClassVar[DType]
    int64: ClassVar[DType]
    def __int__(self) -> int: ...

class RegionWeight:
    __members__: ClassVar[dict[str, RegionWeight]]
    valid: ClassVar[RegionWeight]
    none: ClassVar[RegionWeight]
    region: ClassVar[RegionWeight]
    pixels: ClassVar[RegionWeight]

class Norm:
    __members__: ClassVar[dict[str, Norm]]
    vector: ClassVar[Norm]
    channel_sum: ClassVar[Norm]
    relative: ClassVar[Norm]
    batch: ClassVar[Norm]

class Exchange:
    __members__: ClassVar[dict[str, Exchange]]
    none: ClassVar[Exchange]
    shuffle: ClassVar[Exchange]
    pooled: ClassVar[Exchange]

class Reduction:
    __members__: ClassVar[dict[str, Reduction]]
    mean: ClassVar[Reduction]
    sum: ClassVar[Reduction]

class Activation:
    __members__: ClassVar[dict[str, Activation]]
    none: ClassVar[Activation]
    relu: ClassVar[Activation]
    leaky_relu: ClassVar[Activation]

class NormFormula:
    def __init__(
        self, *, activation: Activation, slope: float, activation_first: bool, instance: bool, eps: float
    ) -> None: ...

class MaskResize:
    __members__: ClassVar[dict[str, MaskResize]]
    area: ClassVar[MaskResize]
    max: ClassVar[MaskResize]
    nearest: ClassVar[MaskResize]

class Options:
    def __init__(
        self,
        *,
        region_weight: RegionWeight,
        masked_background: bool,
        norm: Norm,
        log_scale: float,
        eps: float,
        exchange: Exchange,
        reduction: Reduction,
    ) -> None: ...

def cpu_thread_runtime() -> str: ...
def cpu_masks(
    mask: int,
    dtype: DType,
    batch: int,
    size: list[int],
    stride_n: int,
    stride: list[int],
    has_ignore: bool,
    ignore_value: float,
    ignore_number: int,
    tolerance: float,
    resize: MaskResize,
    accumulate: DType,
    sizes: list[int],
    num_threads: int,
) -> None: ...
def cpu_mask_is_valid(
    mask: int,
    dtype: DType,
    batch: int,
    size: list[int],
    stride_n: int,
    stride: list[int],
    has_ignore: bool,
    ignore_value: float,
    ignore_number: int,
    tolerance: float,
    num_threads: int,
) -> bool: ...
def cpu_sums(
    layers: list[int],
    batch: int,
    accumulate: DType,
    sums: int,
    masses: int,
    options: Options | None,
    pairing: int,
    num_pairs: int,
    losses: int,
    total: int,
    slopes: int,
    num_threads: int,
) -> None: ...
def cpu_losses(
    layers: list[int],
    batch: int,
    accumulate: DType,
    sums: int,
    masses: int,
    options: Options,
    pairing: int,
    num_pairs: int,
    losses: int,
    slopes: int,
) -> None: ...
def cpu_gradient(
    layers: list[int],
    batch: int,
    accumulate: DType,
    grad_sums: int,
    factor: int,
    factor_stride: int,
    num_threads: int,
) -> None: ...
def cpu_mask_gradient(
    layers: list[int], batch: int, accumulate: DType, grad_sums: int, num_threads: int
) -> None: ...
def cpu_region_sums(
    layers: list[int],
    batch: int,
    num_regions: int,
    selects: bool,
    pivots: int,
    accumulate: DType,
    sums: int,
    masses: int,
    num_threads: int,
) -> None: ...
def cpu_region_gradient(
    layers: list[int],
    batch: int,
    num_regions: int,
    selects: bool,
    pivots: int,
    accumulate: DType,
    grad_sums: int,
    num_threads: int,
) -> None: ...
def cpu_region_weight_gradient(
    layers: list[int],
    batch: int,
    num_regions: int,
    selects: bool,
    pivots: int,
    accumulate: DType,
    grad_sums: int,
    num_threads: int,
) -> None: ...
def cuda_masks(
    mask: int,
    dtype: DType,
    batch: int,
    size: list[int],
    stride_n: int,
    stride: list[int],
    has_ignore: bool,
    ignore_value: float,
    ignore_number: int,
    tolerance: float,
    resize: MaskResize,
    accumulate: DType,
    sizes: list[int],
    device: int,
    stream: int,
) -> None: ...
def cuda_sums(
    layers: list[int],
    batch: int,
    accumulate: DType,
    sums: int,
    masses: int,
    options: Options | None,
    pairing: int,
    num_pairs: int,
    losses: int,
    slopes: int,
    allocate: Callable[[int], int],
    device: int,
    stream: int,
) -> None: ...
def cuda_losses(
    layers: list[int],
    batch: int,
    accumulate: DType,
    sums: int,
    masses: int,
    options: Options,
    pairing: int,
    num_pairs: int,
    losses: int,
    slopes: int,
    allocate: Callable[[int], int],
    device: int,
    stream: int,
) -> None: ...
def cuda_gradient(
    layers: list[int],
    batch: int,
    accumulate: DType,
    grad_sums: int,
    factor: int,
    factor_stride: int,
    device: int,
    stream: int,
) -> None: ...
def cuda_mask_gradient(
    layers: list[int], batch: int, accumulate: DType, grad_sums: int, device: int, stream: int
) -> None: ...
def cuda_region_sums(
    layers: list[int],
    batch: int,
    num_regions: int,
    selects: bool,
    pivots: int,
    accumulate: DType,
    sums: int,
    masses: int,
    allocate: Callable[[int], int],
    device: int,
    stream: int,
) -> None: ...
def cuda_region_gradient(
    layers: list[int],
    batch: int,
    num_regions: int,
    selects: bool,
    pivots: int,
    accumulate: DType,
    grad_sums: int,
    device: int,
    stream: int,
) -> None: ...
def cuda_region_weight_gradient(
    layers: list[int],
    batch: int,
    num_regions: int,
    selects: bool,
    pivots: int,
    accumulate: DType,
    grad_sums: int,
    device: int,
    stream: int,
) -> None: ...
def cpu_norm_forward(
    layer: list[int],
    batch: int,
    accumulate: DType,
    formula: NormFormula,
    given: bool,
    gamma: int,
    beta: int,
    parameters: DType,
    statistics: int,
    running_mean: int,
    running_variance: int,
    momentum: float,
    out: int,
    sums: int,
    num_threads: int,
) -> None: ...
def cpu_norm_backward(
    layer: list[int],
    batch: int,
    accumulate: DType,
    formula: NormFormula,
    given: bool,
    gamma: int,
    beta: int,
    parameters: DType,
    statistics: int,
    out: int,
    slopes: int,
    grad_gamma: int,
    grad_beta: int,
    num_threads: int,
) -> None: ...
def cuda_norm_forward(
    layer: list[int],
    batch: int,
    accumulate: DType,
    formula: NormFormula,
    given: bool,
    gamma: int,
    beta: int,
    parameters: DType,
    statistics: int,
    running_mean: int,
    running_variance: int,
    momentum: float,
    out: int,
    sums: int,
    allocate: Callable[[int], int],
    device: int,
    stream: int,
) -> None: ...
def cuda_norm_backward(
    layer: list[int],
    batch: int,
    accumulate: DType,
    formula: NormFormula,
    given: bool,
    gamma: int,
    beta: int,
    parameters: DType,
    statistics: int,
    out: int,
    slopes: int,
    grad_gamma: int,
    grad_beta: int,
    allocate: Callable[[int], int],
    device: int,
    stream: int,
) -> None: ...
