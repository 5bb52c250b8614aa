"""Where operators find the cached tensors of a batch: addresses and lengths, in tables on the device.

A segment that several sequences share is described in each one's rows and never copied. What is the same for the whole
cache is no part of a table, and kernels are compiled for it: the kind of packed rows (`RowKind`, an int), and the
model's dtype, which is that of the query or of the slots among an operator's arguments.

Legend: B sequences, N segments of a sequence at most, H KV heads, C chunks of c tokens, n = C c tokens, D head_dim of
keys, V of values, r rank, P rotary pairs, p exact chunks per head.
"""

import ctypes
import math
from collections.abc import Sequence
from enum import IntEnum
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from longshadow.engine.shadowkv.segment import Segment

# Loads of 16 bytes need it; torch allocates at multiples of 64 or more.
ALIGNMENT = 16


class RowKind(IntEnum):
    """How packed rows are stored: x itself in the model's dtype, or q with an fp32 scale a row, x = q * scale."""

    MODEL = 0
    INT8 = 1
    FP8 = 2  # e4m3fn; compute capability 8.9 or later

    @classmethod
    def of(cls, dtype: torch.dtype) -> "RowKind":
        """The kind of rows stored in `dtype`."""
        return {torch.int8: cls.INT8, torch.float8_e4m3fn: cls.FP8}.get(dtype, cls.MODEL)

    def dtype(self, model_dtype: torch.dtype) -> torch.dtype:
        """The dtype that rows of this kind are stored in."""
        return {RowKind.INT8: torch.int8, RowKind.FP8: torch.float8_e4m3fn}.get(self, model_dtype)


class Field(IntEnum):
    """Columns of the segment table, int64 [B, N, len(Field)]; a row whose NUM_CHUNKS is 0 describes no segment."""

    NUM_CHUNKS = 0
    FIRST_CHUNK = 1  # chunks of the sequence's earlier segments
    LANDMARKS = 2  # [H, C, D] packed rows
    LANDMARK_SCALES = 3  # fp32 [H, C]; 0 where rows are of kind MODEL, like all scales
    COEFFICIENTS = 4  # [C, c, r] packed rows
    COEFFICIENT_SCALES = 5  # fp32 [C, c]
    RANK = 6  # r
    BASIS = 7  # [H, r, D]
    MEAN = 8  # [H, D]
    COS = 9  # [n, P] in fp32 or the model's dtype; 0 without RoPE, like SIN
    SIN = 10  # [n, P]
    VALUES = 11  # [H, C, c, V] packed rows, on the device or in pinned host memory
    VALUE_SCALES = 12  # fp32 [H, C, c]
    EXACT_CHUNKS = 13  # int64 [H, p], ascending, local to the segment
    NUM_EXACT = 14  # p
    EXACT_KEYS = 15  # [H, p c, D]
    EXACT_VALUES = 16  # [H, p c, V]


class RegionField(IntEnum):
    """Columns of the region table, int64 [B, N + 1, len(RegionField)]: exact tokens that are always attended.

    Row n holds the exact chunks of segment n, the last row the tail. Token t of head h begins at
    KEYS + (h * KEY_HEAD_STRIDE + t * D) * element size. A region of LENGTH 0 is empty.
    """

    KEYS = 0
    VALUES = 1
    KEY_HEAD_STRIDE = 2  # in elements, like VALUE_HEAD_STRIDE
    VALUE_HEAD_STRIDE = 3
    LENGTH = 4  # in tokens


class SegmentTable:
    """The tables of a batch in one layer. It keeps alive the segments and tails that it points to.

    Attributes:
        segments: int64 [B, N, len(Field)].
        regions: int64 [B, N + 1, len(RegionField)].
        factors, values: kinds of the landmarks' and coefficients' rows, and of the values'.
        rotation_fp32: whether cos and sin are stored in fp32; else they are in the model's dtype, as it computes them.
    """

    def __init__(
        self,
        *,
        batch_size: int,
        max_segments: int,
        factors: RowKind,
        values: RowKind,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Tables of empty sequences; `dtype` is the model's."""
        self.factors, self.values, self._dtype = factors, values, dtype
        self.rotation_fp32 = True
        self.segments = torch.zeros(batch_size, max_segments, len(Field), dtype=torch.int64, device=device)
        self.regions = torch.zeros(batch_size, max_segments + 1, len(RegionField), dtype=torch.int64, device=device)
        self._held: list[tuple[Sequence[Segment], tuple[torch.Tensor, torch.Tensor] | None]]
        self._held = [((), None) for _ in range(batch_size)]

    def assign(
        self, index: int, segments: Sequence["Segment"], tail: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> None:
        """Makes sequence `index` consist of these segments and tail (keys [H, n, D], values [H, n, V]).

        Raises ValueError where operators could not read them: too many segments, another kind or dtype, keys that
        are not low-rank, tensors that are not contiguous, misaligned, or in host memory that is not pinned.
        """
        room = self.segments.shape[1]
        if len(segments) > room:
            raise ValueError(f"a sequence has {len(segments)} segments, and the table has room for {room}")
        rows, regions, first_chunk = [], [], 0
        for segment in segments:
            rows.append(self._describe(segment, first_chunk))
            regions.append(self._describe_region(segment.exact_keys, segment.exact_values))
            first_chunk += segment.num_chunks
        rows += [[0] * len(Field)] * (room - len(segments))
        regions += [[0] * len(RegionField)] * (room - len(segments))
        regions.append([0] * len(RegionField) if tail is None else self._describe_region(*tail))
        self._held[index] = (tuple(segments), tail)
        # Nobody waits for the copies: the driver reads pageable memory before it returns.
        self.segments[index].copy_(torch.tensor(rows, dtype=torch.int64).view(room, len(Field)), non_blocking=True)
        self.regions[index].copy_(torch.tensor(regions, dtype=torch.int64), non_blocking=True)

    def assign_tail(self, index: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Gives sequence `index` another tail, keys [H, n, D] and values [H, n, V]; their heads may lie apart."""
        row = self._describe_region(keys, values)
        self._held[index] = (self._held[index][0], (keys, values))
        self.regions[index, -1] = torch.tensor(row, dtype=torch.int64)

    def _describe(self, segment: "Segment", first_chunk: int) -> list[int]:
        keys, values = segment.keys.tensors(), segment.values.tensors()["values"]
        if "factors" not in keys:
            raise ValueError("operators rebuild keys from low-rank factors; use key_store='low_rank'")
        landmarks, factors, (basis, mean) = segment.landmarks.tensors, keys["factors"], keys["basis"]
        cos, sin = keys.get("rotation", (None, None))
        row = [0] * len(Field)
        row[Field.NUM_CHUNKS], row[Field.FIRST_CHUNK] = segment.num_chunks, first_chunk
        row[Field.LANDMARKS], row[Field.LANDMARK_SCALES] = self._packed("landmarks", landmarks, self.factors)
        row[Field.COEFFICIENTS], row[Field.COEFFICIENT_SCALES] = self._packed("coefficients", factors, self.factors)
        row[Field.VALUES], row[Field.VALUE_SCALES] = self._packed("values", values, self.values)
        row[Field.RANK], row[Field.NUM_EXACT] = basis.shape[1], segment.exact_chunks.shape[1]
        row[Field.BASIS] = self._address("basis", basis, self._dtype)
        row[Field.MEAN] = self._address("mean", mean, self._dtype)
        if cos is not None and sin is not None:
            # It depends on the model alone, so that the segments of a cache agree.
            self.rotation_fp32 = cos.dtype == torch.float32
            rotation_dtype = torch.float32 if self.rotation_fp32 else self._dtype
            row[Field.COS] = self._address("cos", cos, rotation_dtype)
            row[Field.SIN] = self._address("sin", sin, rotation_dtype)
        row[Field.EXACT_CHUNKS] = self._address("exact chunks", segment.exact_chunks, torch.int64)
        row[Field.EXACT_KEYS] = self._address("exact keys", segment.exact_keys, self._dtype)
        row[Field.EXACT_VALUES] = self._address("exact values", segment.exact_values, self._dtype)
        return row

    def _describe_region(self, keys_HnD: torch.Tensor, values_HnV: torch.Tensor) -> list[int]:
        row = [0] * len(RegionField)
        row[RegionField.KEYS] = self._address("exact keys", keys_HnD[:1], self._dtype)
        row[RegionField.VALUES] = self._address("exact values", values_HnV[:1], self._dtype)
        row[RegionField.KEY_HEAD_STRIDE] = self._head_stride("exact keys", keys_HnD)
        row[RegionField.VALUE_HEAD_STRIDE] = self._head_stride("exact values", values_HnV)
        row[RegionField.LENGTH] = keys_HnD.shape[1]
        return row

    def _packed(self, name: str, tensors: Sequence[torch.Tensor], kind: RowKind) -> tuple[int, int]:
        rows, *scales = tensors
        address = self._address(name, rows, kind.dtype(self._dtype))
        if (kind == RowKind.MODEL) == bool(scales):
            raise ValueError(f"{name} of kind {kind.name} must come {'with' if kind else 'without'} scales")
        return address, self._address(f"scales of the {name}", scales[0], torch.float32) if scales else 0

    def _head_stride(self, name: str, tokens_HnD: torch.Tensor) -> int:
        stride = tokens_HnD.stride(0)
        if stride * tokens_HnD.element_size() % ALIGNMENT:
            raise ValueError(f"heads of the {name} lie {stride} elements apart, not at multiples of {ALIGNMENT} bytes")
        return stride

    def _address(self, name: str, tensor: torch.Tensor, dtype: torch.dtype) -> int:
        address = tensor.data_ptr()
        if tensor.dtype != dtype:
            raise ValueError(f"{name} must be {dtype}, got {tensor.dtype}")
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()} for {tuple(tensor.shape)}")
        if address % ALIGNMENT:
            raise ValueError(f"{name} must begin at a multiple of {ALIGNMENT} bytes, got {address:#x}")
        if tensor.device != self.segments.device and not tensor.is_pinned():
            raise ValueError(f"{name} must be on {self.segments.device} or pinned, got pageable host memory")
        return address


def read_rows(table: torch.Tensor) -> list[list[list[int]]]:
    """The rows of each sequence that describe something, as ints to be indexed by `Field` or `RegionField`."""
    length = Field.NUM_CHUNKS if table.shape[2] == len(Field) else RegionField.LENGTH
    return [[row for row in rows if row[length]] for rows in table.tolist()]


def read_packed(
    address: int, scales: int, shape: tuple[int, ...], kind: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Packed rows at an address as numbers: a view in the model's `dtype`, or a dequantised fp32 copy."""
    rows = tensor_at(address, shape, RowKind(kind).dtype(dtype), device)
    if kind == RowKind.MODEL:
        return rows
    return rows.float() * tensor_at(scales, shape[:-1], torch.float32, device).unsqueeze(-1)


def read_region(
    row: list[int], part: RegionField, num_heads: int, width: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """KEYS [H, n, D] or VALUES [H, n, V] of a row of the region table, whose head_dim is `width`, as a view."""
    strides = {RegionField.KEYS: RegionField.KEY_HEAD_STRIDE, RegionField.VALUES: RegionField.VALUE_HEAD_STRIDE}
    shape, head_stride = (num_heads, row[RegionField.LENGTH], width), row[strides[part]]
    span = (num_heads - 1) * head_stride + shape[1] * width
    return tensor_at(row[part], (span,), dtype, device).as_strided(shape, (head_stride, width, 1))


def tensor_at(address: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor over memory that something else owns and keeps alive, contiguous.

    On a CUDA device the memory may be pinned host memory, which the device then reads over the link.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    if num_bytes == 0:
        return torch.empty(shape, dtype=dtype, device=device)
    if device.type == "cuda":
        memory = torch.as_tensor(_CudaMemory(address, num_bytes), device=device)
    else:
        memory = torch.frombuffer((ctypes.c_uint8 * num_bytes).from_address(address), dtype=torch.uint8)
    return memory.view(dtype).view(shape)


class _CudaMemory:
    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__: dict[str, Any] = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }
