"""Public operators."""

from .chunk_compression import chunk_compression, chunk_compression_backward
from .context_tree import context_tree_layout, context_tree_select, context_tree_split, split_offsets
from .decode_step import decode_append, decode_linear, decode_linear_fp8
from .fused_layer import (
    add_rms_norm,
    add_rms_norm_fp8,
    quantize_rows_fp8,
    rms_norm,
    rms_norm_fp8,
    silu_product,
    silu_product_fp8,
)
from .injected_attention import injected_attention, injected_attention_path
from .memory_quantization import dequantize_memory, injected_attention_8bit, quantize_memory
from .node_vectors import node_vectors, tree_node_vectors
from .topk_nodes import topk_nodes

__all__ = [
    "add_rms_norm",
    "add_rms_norm_fp8",
    "chunk_compression",
    "chunk_compression_backward",
    "context_tree_layout",
    "context_tree_select",
    "context_tree_split",
    "decode_append",
    "decode_linear",
    "decode_linear_fp8",
    "dequantize_memory",
    "injected_attention",
    "injected_attention_8bit",
    "injected_attention_path",
    "node_vectors",
    "quantize_memory",
    "quantize_rows_fp8",
    "rms_norm",
    "rms_norm_fp8",
    "silu_product",
    "silu_product_fp8",
    "split_offsets",
    "topk_nodes",
    "tree_node_vectors",
]
