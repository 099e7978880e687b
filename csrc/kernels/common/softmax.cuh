// Constants of the softmax, which is computed in base 2.
#pragma once

namespace sharedllm {

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr float kInfinity = __builtin_inff();
// Online softmax: the maximum is only raised when the weights grow by more than 2^8. Until then float32 sums lose
// nothing, and lanes need neither exchange maxima nor rescale accumulators.
constexpr float kGrowth = 8.0f;

}  // namespace sharedllm
