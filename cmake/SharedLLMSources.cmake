# The source list, by hand: a file that is not named here is not built.
set(SHAREDLLM_CPU_SOURCES
    csrc/library.cpp
    csrc/cpu/chunk_compression.cpp
    csrc/cpu/context_tree.cpp
    csrc/cpu/injected_attention.cpp
    csrc/cpu/node_vectors.cpp
    csrc/cpu/topk_nodes.cpp)

# host operators (torch's stable ABI, no CUDA kernels) and kernels (CUDA, no torch header)
set(SHAREDLLM_CUDA_SOURCES
    csrc/ops/node_vectors.cpp
    csrc/ops/topk_nodes.cpp
    csrc/kernels/node_vectors.cu
    csrc/kernels/node_vectors_backward.cu
    csrc/kernels/instances/node_vectors_bfloat16_128_16.cu
    csrc/kernels/instances/node_vectors_bfloat16_128_8.cu
    csrc/kernels/instances/node_vectors_bfloat16_256_8.cu
    csrc/kernels/instances/node_vectors_bfloat16_64_16.cu
    csrc/kernels/instances/node_vectors_bfloat16_64_8.cu
    csrc/kernels/instances/node_vectors_bfloat16_96_16.cu
    csrc/kernels/instances/node_vectors_bfloat16_96_8.cu
    csrc/kernels/instances/node_vectors_float16_128_16.cu
    csrc/kernels/instances/node_vectors_float16_128_8.cu
    csrc/kernels/instances/node_vectors_float16_256_8.cu
    csrc/kernels/instances/node_vectors_float16_64_16.cu
    csrc/kernels/instances/node_vectors_float16_64_8.cu
    csrc/kernels/instances/node_vectors_float16_96_16.cu
    csrc/kernels/instances/node_vectors_float16_96_8.cu
    csrc/kernels/topk_nodes.cu)
