// Columns of the segment table, int64 [B, N, kNumFields], that CUDA C++ reads; `Field` in
// engine/ops/tables.py has all.
#pragma once

namespace longshadow {

constexpr int kNumFields = 17;
constexpr int kNumChunks = 0;
constexpr int kFirstChunk = 1;
constexpr int kValues = 11;
constexpr int kValueScales = 12;

// `RowKind` in engine/ops/tables.py.
constexpr int kRowModel = 0;
constexpr int kRowInt8 = 1;

}  // namespace longshadow
