// Context tree on CUDA: checks, allocation and launch. Index values are not read here: the host never waits.
#include "kernels/context_tree.h"

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

Tensor empty_int64(const Tensor& like, std::initializer_list<int64_t> sizes) {
  return allocate(like, sizes, ScalarType::Long);
}

OffsetType offset_type(const Tensor& offset) {
  switch (offset.scalar_type()) {
    case ScalarType::Float:
      return OffsetType::kFloat32;
    case ScalarType::BFloat16:
      return OffsetType::kBFloat16;
    case ScalarType::Half:
      return OffsetType::kFloat16;
    case ScalarType::Double:
      return OffsetType::kFloat64;
    default:
      fail("offset: expected dtype Float, BFloat16, Half or Double, got ", dtype_text(offset.scalar_type()));
  }
}

Tensor split(Tensor spans, std::optional<Tensor> offset) {
  check(spans.is_cuda(), "spans: expected a tensor on cuda, got one on another kind of device");
  const int32_t device = spans.get_device_index();
  check_cuda_tensor("spans", spans, {-1, 2}, ScalarType::Long, device);
  ContextTreeSplitParams p{};
  p.count = spans.size(0);
  if (offset) {
    p.offset_type = offset_type(*offset);
    check_cuda_tensor("offset", *offset, {p.count}, offset->scalar_type(), device);
    p.offset = offset->const_data_ptr();
    p.offset_stride = offset->stride(0);
  }
  const torch::stable::accelerator::DeviceGuard guard(device);
  Tensor children = empty_int64(spans, {p.count, 2, 2});
  p.spans = spans.const_data_ptr<int64_t>();
  for (int i = 0; i < 2; ++i) p.span_stride[i] = spans.stride(i);
  p.children = children.mutable_data_ptr<int64_t>();
  check_launch("context_tree_split", launch_context_tree_split(p, current_stream(device)));
  return children;
}

std::tuple<Tensor, Tensor> select(Tensor children, std::optional<Tensor> choice) {
  check(children.is_cuda(), "children: expected a tensor on cuda, got one on another kind of device");
  const int32_t device = children.get_device_index();
  check_cuda_tensor("children", children, {-1, 2, 2}, ScalarType::Long, device);
  ContextTreeSelectParams p{};
  p.count = children.size(0);
  if (choice) {
    check_cuda_tensor("choice", *choice, {p.count}, ScalarType::Long, device);
    p.choice = choice->const_data_ptr<int64_t>();
    p.choice_stride = choice->stride(0);
  }
  const torch::stable::accelerator::DeviceGuard guard(device);
  Tensor picked = empty_int64(children, {p.count, 2}), retained = empty_int64(children, {p.count, 2});
  p.children = children.const_data_ptr<int64_t>();
  for (int i = 0; i < 3; ++i) p.child_stride[i] = children.stride(i);
  p.picked = picked.mutable_data_ptr<int64_t>();
  p.retained = retained.mutable_data_ptr<int64_t>();
  check_launch("context_tree_select", launch_context_tree_select(p, current_stream(device)));
  return {picked, retained};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> layout(Tensor nodes, Tensor chunk_index, int64_t slots_per_node,
                                                          int64_t num_tokens, int64_t num_slots) {
  check(nodes.is_cuda(), "nodes: expected a tensor on cuda, got one on another kind of device");
  const int32_t device = nodes.get_device_index();
  check_cuda_tensor("nodes", nodes, {-1, -1, 2}, ScalarType::Long, device);
  ContextTreeLayoutParams p{};
  p.num_chunks = nodes.size(0);
  p.nodes_per_chunk = nodes.size(1);
  check(p.nodes_per_chunk >= 1, "nodes: expected at least 1 node for each chunk, got shape ",
        shape_text(nodes.sizes()));
  check(p.num_chunks <= kContextTreeMaxNodes / p.nodes_per_chunk, "nodes: expected at most ", kContextTreeMaxNodes,
        " nodes, got shape ", shape_text(nodes.sizes()));
  check_cuda_tensor("chunk_index", chunk_index, {p.num_chunks}, ScalarType::Long, device);
  check(slots_per_node >= 1, "slots_per_node: expected at least 1, got ", slots_per_node);
  check(num_tokens >= 0, "num_tokens: expected at least 0, got ", num_tokens);
  check(num_slots >= 0, "num_slots: expected at least 0, got ", num_slots);
  // their sum is taken
  check(num_slots <= INT64_MAX - num_tokens, "num_slots: expected at most ", INT64_MAX - num_tokens,
        " beside num_tokens = ", num_tokens, ", got ", num_slots);
  p.slots_per_node = slots_per_node;
  p.num_tokens = num_tokens;
  p.num_slots = num_slots;

  const torch::stable::accelerator::DeviceGuard guard(device);
  const int64_t count = p.num_chunks * p.nodes_per_chunk;
  Tensor positions = empty_int64(nodes, {num_tokens}), cu_nodes = empty_int64(nodes, {count + 1});
  Tensor keep_index = empty_int64(nodes, {num_slots}), keep_position = empty_int64(nodes, {num_slots});
  Tensor cu_slots = empty_int64(nodes, {p.num_chunks + 1});
  p.nodes = nodes.const_data_ptr<int64_t>();
  for (int i = 0; i < 3; ++i) p.node_stride[i] = nodes.stride(i);
  p.chunk_index = chunk_index.const_data_ptr<int64_t>();
  p.chunk_index_stride = chunk_index.stride(0);
  p.positions = positions.mutable_data_ptr<int64_t>();
  p.cu_nodes = cu_nodes.mutable_data_ptr<int64_t>();
  p.keep_index = keep_index.mutable_data_ptr<int64_t>();
  p.keep_position = keep_position.mutable_data_ptr<int64_t>();
  p.cu_slots = cu_slots.mutable_data_ptr<int64_t>();
  plan_context_tree_layout(&p);
  // freed when this returns: torch hands it only to work queued later on the same stream
  const Tensor workspace = empty_int64(nodes, {p.workspace_size});
  p.workspace = workspace.mutable_data_ptr<int64_t>();
  check_launch("context_tree_layout", launch_context_tree_layout(p, current_stream(device)));
  return {positions, cu_nodes, keep_index, keep_position, cu_slots};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sharedllm, CUDA, m) {
  m.impl("context_tree_split", TORCH_BOX(&split));
  m.impl("context_tree_select", TORCH_BOX(&select));
  m.impl("context_tree_layout", TORCH_BOX(&layout));
}

}  // namespace sharedllm
