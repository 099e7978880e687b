#include "kernels/node_vectors.cuh"
template cudaError_t sharedllm::node_vectors::launch_tensor<__nv_bfloat16, 96, 1>(const NodeVectorsParams&,
                                                                                  cudaStream_t);
