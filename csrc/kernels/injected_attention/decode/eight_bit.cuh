// The decode kernels with int8 keys and values: codes become halves in registers; the keys' scales are applied to the
// scores, the values' scales to the weights.
#pragma once

#include "kernels/injected_attention/decode/eight_bit.h"
#include "kernels/injected_attention/decode/launch.cuh"

namespace sharedllm {

inline decode::Scales scales_of(const InjectedAttention8BitParams& p) {
  return {p.k_scale, p.v_scale, {p.k_scale_stride[0], p.k_scale_stride[1]}, {p.v_scale_stride[0], p.v_scale_stride[1]}};
}

template <class T, int kHeadSize>
cudaError_t launch_injected_attention_decode_8bit_bulk(const InjectedAttention8BitParams& p, cudaStream_t stream) {
  const decode::Scales scales = scales_of(p);
  return decode::launch_bulk<T, int8_t, kHeadSize>(p.attention, &scales, stream);
}
template <class T, int kHeadSize>
cudaError_t launch_injected_attention_decode_8bit_portable(const InjectedAttention8BitParams& p, cudaStream_t stream) {
  const decode::Scales scales = scales_of(p);
  return decode::launch_portable<T, int8_t, kHeadSize>(p.attention, &scales, stream);
}

}  // namespace sharedllm
