// Top-k node retrieval on CUDA: checks, allocation and launch. Index values are not read here: the host never waits.
#include "kernels/topk_nodes.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "ops/common/cuda_checks.h"

namespace sharedllm {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

std::tuple<Tensor, Tensor> topk_nodes(Tensor queries, Tensor nodes, Tensor cu_groups, Tensor group_query, int64_t k,
                                      std::optional<Tensor> valid, double eps) {
  check(nodes.is_cuda(), "nodes: expected a tensor on cuda, got one on another kind of device");
  const int32_t device = nodes.get_device_index();
  TopkNodesParams p{};
  p.type = float_type("nodes", nodes);
  check_shape("nodes", nodes, {-1, -1});
  p.num_nodes = nodes.size(0);
  p.size = nodes.size(1);
  check_cuda_tensor("queries", queries, {-1, p.size}, nodes.scalar_type(), device);
  check_cuda_tensor("cu_groups", cu_groups, {-1}, ScalarType::Long, device);
  p.num_groups = cu_groups.numel() - 1;
  check(p.num_groups >= 0, "cu_groups: expected at least 1 element, got 0");
  check_cuda_tensor("group_query", group_query, {p.num_groups}, ScalarType::Long, device);
  check(k >= 0 && k <= kTopkNodesMaxK, "k: expected 0 to ", kTopkNodesMaxK, " (limit of the CUDA kernel), got ", k);
  check_lower_bound(eps);
  check(p.num_nodes <= kTopkNodesMaxRows, "nodes: expected at most ", kTopkNodesMaxRows, " rows, got ", p.num_nodes);
  check(p.size <= kTopkNodesMaxSize, "nodes: expected at most ", kTopkNodesMaxSize, " columns, got ", p.size);
  if (valid) check_cuda_tensor("valid", *valid, {p.num_nodes}, ScalarType::Bool, device);
  p.num_queries = queries.size(0);
  check(p.num_queries > 0 || p.num_groups == 0 || p.num_nodes == 0, "queries: expected at least 1 row, got 0");

  const torch::stable::accelerator::DeviceGuard guard(device);
  Tensor indices = allocate(nodes, {p.num_groups, k}, ScalarType::Long);
  Tensor similarity = allocate(nodes, {p.num_groups, k}, ScalarType::Float);
  if (p.num_groups == 0 || k == 0) return {indices, similarity};

  queries = with_dense_rows(queries);
  nodes = with_dense_rows(nodes);
  cu_groups = sharedllm::contiguous(cu_groups);
  group_query = sharedllm::contiguous(group_query);
  if (valid) valid = sharedllm::contiguous(*valid);
  p.queries = queries.const_data_ptr();
  p.nodes = nodes.const_data_ptr();
  p.query_stride = queries.stride(0);
  p.node_stride = nodes.stride(0);
  p.cu_groups = cu_groups.const_data_ptr<int64_t>();
  p.group_query = group_query.const_data_ptr<int64_t>();
  p.valid = valid ? static_cast<const uint8_t*>(valid->const_data_ptr()) : nullptr;
  p.indices = indices.mutable_data_ptr<int64_t>();
  p.similarity = similarity.mutable_data_ptr<float>();
  p.k = k;
  p.eps = static_cast<float>(eps);
  check_launch("topk_nodes", plan_topk_nodes(&p));
  // freed when this returns: torch hands it only to work queued later on the same stream
  const Tensor workspace = allocate(nodes, {p.workspace_size}, ScalarType::Long);
  p.workspace = static_cast<uint64_t*>(workspace.mutable_data_ptr());
  check_launch("topk_nodes", launch_topk_nodes(p, current_stream(device)));
  return {indices, similarity};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sharedllm, CUDA, m) { m.impl("topk_nodes", TORCH_BOX(&topk_nodes)); }

}  // namespace sharedllm
