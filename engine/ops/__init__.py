"""The operators of ShadowKV's decoding step and prefill summary, each in PyTorch and Triton, some in CUDA C++."""

from longshadow.engine.ops.backend import Operators, choose_backend, operators
from longshadow.engine.ops.tables import RowKind, SegmentTable

__all__ = ["Operators", "RowKind", "SegmentTable", "choose_backend", "operators"]
