// Injected attention for a few queries per row (split-KV decoding): bound by reading keys and values once. plan,
// workspace, launch.
#pragma once

#include "kernels/injected_attention/params.h"

namespace sharedllm {

// Sets params->splits for the current device: how many workers share the slots of all rows. Reads only shapes (T, S, B,
// heads, D, type), never values on the device. `portable` plans for the cp.async kernel on every device.
cudaError_t plan_injected_attention_decode(InjectedAttentionParams* params, bool portable = false);

// Rows of the workspace after planning: partial_out is float32 [rows, D], 16-byte aligned, partial_lse float32 [rows].
// Contents do not matter before or after the launch. 0: no workspace needed.
// Layout: for a tile of packed rows that other workers share, worker w of key/value head h keeps its result in [2 w +
// i, h, packed row of the tile]. i is 1 for the tile's first part and 0 for a later one; partial_lse is base 2.
int64_t injected_attention_decode_workspace_rows(const InjectedAttentionParams& params);

// Writes out and lse of every query. Needs a plan made for the same device and shapes, the workspace, bfloat16 or
// float16, columns of 64, 96, 128 or 256, pointers aligned to 16 bytes and strides to 8 elements, S < 2^31;
// cudaErrorNotSupported for others. Any number of queries per row is right; reads each row's memory
// once per 64 packed rows (queries times Hq / Hkv). The same bits in every run. Can be captured into a CUDA graph;
// launches in several streams need a workspace each.
cudaError_t launch_injected_attention_decode(const InjectedAttentionParams& params, cudaStream_t stream,
                                             bool portable = false);

// Packed rows of a tile: 8, 16, 32 or 64.
int32_t decode_tile_rows(const InjectedAttentionParams& params);

// One element type and head size, with TMA (9.0 and later; cudaErrorNotSupported where the code was compiled for less)
// or with cp.async (8.0 and later); kernel instances.
template <class T, int kHeadSize>
cudaError_t launch_injected_attention_decode_bulk(const InjectedAttentionParams& params, cudaStream_t stream);
template <class T, int kHeadSize>
cudaError_t launch_injected_attention_decode_portable(const InjectedAttentionParams& params, cudaStream_t stream);

}  // namespace sharedllm
