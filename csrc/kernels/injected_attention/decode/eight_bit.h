// Injected attention for a few queries per row, from a memory of int8 codes (memory_quantization.h): half the bytes.
#pragma once

#include "kernels/injected_attention/params.h"

namespace sharedllm {

struct InjectedAttention8BitParams {
  // k and v are int8 codes [S, Hkv, D]; `type` is that of q and out.
  InjectedAttentionParams attention;
  const float* k_scale;       // [S, Hkv]; key = code * scale
  const float* v_scale;       // [S, Hkv]
  int64_t k_scale_stride[2];  // elements between slots, between heads
  int64_t v_scale_stride[2];
};

// As launch_injected_attention_decode, with the same plan and workspace (made for `attention`). k and v aligned to 16
// bytes, their strides multiples of 16 elements. Scales are 0 or positive.
cudaError_t launch_injected_attention_decode_8bit(const InjectedAttention8BitParams& params, cudaStream_t stream);

// One element type and head size, a kernel instance.
template <class T, int kHeadSize>
cudaError_t launch_injected_attention_decode_8bit_bulk(const InjectedAttention8BitParams& params, cudaStream_t stream);
template <class T, int kHeadSize>
cudaError_t launch_injected_attention_decode_8bit_portable(const InjectedAttention8BitParams& params,
                                                           cudaStream_t stream);

}  // namespace sharedllm
