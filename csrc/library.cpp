// Every operator's schema on one screen. Semantics: python/sharedllm_ext/reference/<operator>.py.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(sharedllm, m) {
  m.def("context_tree_split(Tensor spans, Tensor? offset) -> Tensor");
  m.def("context_tree_select(Tensor children, Tensor? choice) -> (Tensor picked, Tensor retained)");
  m.def(
      "context_tree_layout(Tensor nodes, Tensor chunk_index, int slots_per_node, int num_tokens, int num_slots)"
      " -> (Tensor positions, Tensor cu_nodes, Tensor keep_index, Tensor keep_position, Tensor cu_slots)");
  m.def("node_vectors(Tensor q, Tensor k, Tensor v, Tensor spans, Tensor cos, Tensor sin, float scale) -> Tensor");
  m.def(
      "node_vectors_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor spans, Tensor cos, Tensor sin,"
      " float scale) -> (Tensor grad_q, Tensor grad_k, Tensor grad_v)");
  m.def(
      "tree_node_vectors(Tensor q, Tensor k, Tensor v, Tensor spans, Tensor cos, Tensor sin, int levels, float scale)"
      " -> Tensor");
  m.def(
      "topk_nodes(Tensor queries, Tensor nodes, Tensor cu_groups, Tensor group_query, int k, Tensor? valid, float eps)"
      " -> (Tensor indices, Tensor similarity)");
  m.def(
      "chunk_compression(Tensor? q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor? q_positions, Tensor? positions,"
      " Tensor keep_index, Tensor keep_position)"
      " -> (Tensor q_rotated, Tensor k_rotated, Tensor memory_k, Tensor memory_v)");
  m.def(
      "chunk_compression_backward(Tensor? grad_q_rotated, Tensor? grad_k_rotated, Tensor grad_memory_k,"
      " Tensor grad_memory_v, Tensor cos, Tensor sin, Tensor? q_positions, Tensor? positions, Tensor keep_index,"
      " Tensor keep_position, int num_tokens) -> (Tensor grad_q, Tensor grad_k, Tensor grad_v)");
  m.def(
      "injected_attention(Tensor q, Tensor k, Tensor v, Tensor cu_q, Tensor slot_range, Tensor q_position, Tensor cos,"
      " Tensor sin, float scale) -> (Tensor out, Tensor lse)");
  m.def(
      "injected_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out,"
      " Tensor lse, Tensor cu_q, Tensor slot_range, Tensor q_position, Tensor cos, Tensor sin, float scale,"
      " bool need_grad_kv) -> (Tensor grad_q, Tensor grad_k, Tensor grad_v)");
  m.def(
      "decode_linear(Tensor x, Tensor weight, Tensor? weight2, Tensor? weight3, Tensor? bias, Tensor? bias2,"
      " Tensor? bias3, Tensor? norm_weight, float eps, Tensor? residual, bool gated, bool overlap, Tensor? prefetch,"
      " int prefetch_bytes) -> Tensor");
  m.def(
      "decode_linear_fp8(Tensor x, Tensor weight, Tensor? weight2, Tensor? weight3, Tensor scale, Tensor? scale2,"
      " Tensor? scale3, Tensor? bias, Tensor? bias2, Tensor? bias3, Tensor? norm_weight, float eps, Tensor? residual,"
      " bool gated, bool overlap, Tensor? prefetch, int prefetch_bytes) -> Tensor");
  m.def(
      "decode_append(Tensor qkv, Tensor(a!) keys, Tensor(b!) values, Tensor length, Tensor first, Tensor cos,"
      " Tensor sin, Tensor? q_norm, Tensor? k_norm, float eps, int window, bool overlap, Tensor? prefetch,"
      " int prefetch_bytes) -> (Tensor q, Tensor slot_range)");
  m.def("silu_product(Tensor gate, Tensor up) -> Tensor");
  m.def("silu_product_fp8(Tensor gate, Tensor up) -> (Tensor codes, Tensor scale)");
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
  m.def("rms_norm_fp8(Tensor x, Tensor weight, float eps) -> (Tensor codes, Tensor scale)");
  m.def("add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor sum, Tensor normed)");
  m.def(
      "add_rms_norm_fp8(Tensor x, Tensor residual, Tensor weight, float eps)"
      " -> (Tensor sum, Tensor codes, Tensor scale)");
  m.def("quantize_rows_fp8(Tensor x) -> (Tensor codes, Tensor scale)");
  m.def("quantize_memory(Tensor x) -> (Tensor codes, Tensor scale)");
  m.def(
      "injected_attention_8bit(Tensor q, Tensor k, Tensor v, Tensor k_scale, Tensor v_scale, Tensor cu_q,"
      " Tensor slot_range, Tensor q_position, Tensor cos, Tensor sin, float scale) -> (Tensor out, Tensor lse)");
}
