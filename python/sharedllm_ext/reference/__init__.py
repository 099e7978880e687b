"""Plain PyTorch oracles of every operator: signatures as in :mod:`sharedllm_ext.ops`, any floating dtype and device."""

from .chunk_compression import chunk_compression, chunk_compression_backward
from .context_tree import context_tree_layout, context_tree_select, context_tree_split
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
from .injected_attention import injected_attention, injected_attention_backward
from .node_vectors import node_vectors, tree_node_vectors, tree_nodes
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
    "injected_attention",
    "injected_attention_backward",
    "node_vectors",
    "quantize_rows_fp8",
    "rms_norm",
    "rms_norm_fp8",
    "silu_product",
    "silu_product_fp8",
    "topk_nodes",
    "tree_node_vectors",
    "tree_nodes",
]
