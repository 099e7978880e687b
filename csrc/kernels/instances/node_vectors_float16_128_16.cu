#include "kernels/node_vectors.cuh"
template cudaError_t sharedllm::node_vectors::launch_tensor<__half, 128, 2>(const NodeVectorsParams&, cudaStream_t);
