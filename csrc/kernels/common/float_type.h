// Element types of the data tensors.
#pragma once

namespace sharedllm {

enum class FloatType { kFloat32, kBFloat16, kFloat16 };

}  // namespace sharedllm
