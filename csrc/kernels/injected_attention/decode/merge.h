// The second kernel of the decode path: merges rows of which several workers wrote parts.
#pragma once

#include "kernels/injected_attention/params.h"

namespace sharedllm {
namespace decode {

// What the kernel that wrote the parts was.
struct Merge {
  int32_t tile_rows, block_slots;  // powers of two
  bool may_await, awaits;          // whether it can mark what is absent, and does
  bool overlaps;                   // PDL: its code lets this one start
};

// Once per device, before the kernel that writes the parts: with another split of L1 cache and shared memory the blocks
// of this one could not be resident beside that one's.
cudaError_t prepare_merge();

cudaError_t launch_merge(const InjectedAttentionParams& params, const Merge& merge, cudaStream_t stream);

}  // namespace decode
}  // namespace sharedllm
