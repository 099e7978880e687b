# The source list, by hand: a file that is not named here is not built. Kernel instances: SharedLLMInstances.cmake.
set(SHAREDLLM_CPU_SOURCES
    csrc/library.cpp
    csrc/cpu/chunk_compression.cpp
    csrc/cpu/context_tree.cpp
    csrc/cpu/decode_linear.cpp
    csrc/cpu/injected_attention.cpp
    csrc/cpu/node_vectors.cpp
    csrc/cpu/topk_nodes.cpp)

# the Python module of what is not an operator; no torch header
set(SHAREDLLM_MODULE_SOURCES
    csrc/bindings.cpp
    csrc/cpu/checksum.cpp)

# host operators (torch's stable ABI, no CUDA kernels) and kernels (CUDA, no torch header)
set(SHAREDLLM_CUDA_SOURCES
    csrc/ops/chunk_compression.cpp
    csrc/ops/context_tree.cpp
    csrc/ops/decode_append.cpp
    csrc/ops/decode_linear.cpp
    csrc/ops/fused_layer.cpp
    csrc/ops/injected_attention.cpp
    csrc/ops/memory_quantization.cpp
    csrc/ops/node_vectors.cpp
    csrc/ops/topk_nodes.cpp
    csrc/kernels/chunk_compression.cu
    csrc/kernels/context_tree.cu
    csrc/kernels/decode_append.cu
    csrc/kernels/decode_linear.cu
    csrc/kernels/fused_layer.cu
    csrc/kernels/injected_attention/backward_prepare.cu
    csrc/kernels/injected_attention/combine.cu
    csrc/kernels/injected_attention/decode/decode.cu
    csrc/kernels/injected_attention/decode/eight_bit.cu
    csrc/kernels/injected_attention/generic/backward.cu
    csrc/kernels/injected_attention/generic/forward.cu
    csrc/kernels/injected_attention/portable/backward.cu
    csrc/kernels/injected_attention/portable/forward.cu
    csrc/kernels/memory_quantization.cu
    csrc/kernels/node_vectors.cu
    csrc/kernels/node_vectors_backward.cu
    csrc/kernels/topk_nodes.cu)

# kernels with instructions that only compute capability 9.0 has (architecture 90a)
set(SHAREDLLM_SM90_SOURCES
    csrc/kernels/common/tensor_map.cu
    csrc/kernels/injected_attention/hopper/backward.cu
    csrc/kernels/injected_attention/hopper/forward.cu
    csrc/kernels/injected_attention/hopper/turn_keys.cu)
