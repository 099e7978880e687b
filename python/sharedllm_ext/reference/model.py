"""Oracle of the whole model: the method written out node by node, nothing packed, cached or skipped.

Works on the parameters of a :class:`sharedllm_ext.SharedLLMForCausalLM` in any dtype (float64 for an oracle) and shares
none of the compressor's or decoder's code. One document, one running text, no padding.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..model.modeling import SharedLLMForCausalLM


class ReferenceMemory(NamedTuple):
    """Memory of one document.

    Attributes:
        choices: for each chunk, the child picked at each level (0 left, 1 right).
        similarity: for each chunk and level, the cosine similarity of left and right (NaN for an empty node).
        keys, values: for each of the ``M`` layers and each chunk, ``[slots, Hkv, D]``; keys rotated by position in the
            node plus chunk index.
    """

    choices: list[list[int]]
    similarity: list[list[tuple[float, float]]]
    keys: list[list[Tensor]]
    values: list[list[Tensor]]


def compress(
    model: "SharedLLMForCausalLM", context_ids: Tensor, query_ids: Tensor | None = None, *, first_chunk: int = 0
) -> ReferenceMemory:
    """Compress one document ``[C]``; ``query_ids`` ``[L]`` picks the nodes if the model is query-aware.

    Its chunks are counted from ``first_chunk`` on.
    """
    config = model.config
    source = model.model if model.compressor is None else model.compressor
    layers = [source.layers[i] for i in range(config.injection_layers)]
    query = None
    if config.query_aware and query_ids is not None and query_ids.numel():
        first = _layer(model, model.model.layers[0], _embed(model.model, query_ids))[0]
        query = model.model.norm(first)[-1]
    memory = ReferenceMemory([], [], [[] for _ in layers], [[] for _ in layers])
    for index, chunk in enumerate(context_ids.split(config.chunk_size), first_chunk):
        nodes, choices, similarities = _tree(model, source, layers[0], chunk, query)
        memory.choices.append(choices)
        memory.similarity.append(similarities)
        kept: list[list[tuple[Tensor, Tensor]]] = [[] for _ in layers]
        for node in nodes:
            hidden = _embed(source, node)
            count = min(node.numel(), config.slots_per_node)
            places = torch.tensor([j * node.numel() // count for j in range(count)], dtype=torch.int64)
            for number, layer in enumerate(layers):
                hidden, key, value = _layer(model, layer, hidden)
                rotated = _rope(key[places], places + index, _frequencies(model, layer))
                kept[number].append((rotated, value[places]))
        for number, pairs in enumerate(kept):
            memory.keys[number].append(torch.cat([key for key, _ in pairs]))
            memory.values[number].append(torch.cat([value for _, value in pairs]))
    return memory


def compress_all(model: "SharedLLMForCausalLM", documents: Sequence[Tensor]) -> ReferenceMemory:
    """Several documents that are read one after the other: one document of all their chunks.

    Each is compressed on its own, so each may end with a partial chunk; one at least has tokens.
    """
    first, *others = (document for document in documents if document.numel())
    memory = compress(model, first)
    for document in others:
        more = compress(model, document, first_chunk=len(memory.choices))
        memory.choices.extend(more.choices)
        memory.similarity.extend(more.similarity)
        for kept, new in ((memory.keys, more.keys), (memory.values, more.values)):
            for layer, chunks in zip(kept, new, strict=True):
                layer.extend(chunks)
    return memory


def logits(model: "SharedLLMForCausalLM", input_ids: Tensor, memory: ReferenceMemory | None) -> Tensor:
    """Logits ``[L, vocabulary]`` of one running text ``[L]`` that reads a memory."""
    hidden = _embed(model.model, input_ids)
    for number, layer in enumerate(model.model.layers):
        block = layer.injection if number < model.config.injection_layers and memory is not None else None
        if block is None:
            hidden = _layer(model, layer, hidden)[0]
            continue
        hidden = _add_attended(layer, hidden, _self_attention(model, layer, hidden)[0])
        chunks = len(memory.choices)  # type: ignore[union-attr]
        if chunks:
            query = block.q_proj(block.norm(hidden)).view(hidden.shape[0], -1, block.head_dim)
            query = query if block.q_norm is None else block.q_norm(query)
            position = torch.full((hidden.shape[0],), chunks + model.config.query_position_offset)
            query = _rope(query, position, _frequencies(model, layer))
            keys, values = torch.cat(memory.keys[number]), torch.cat(memory.values[number])  # type: ignore[union-attr]
            visible = torch.ones(hidden.shape[0], keys.shape[0], dtype=torch.bool)
            hidden = hidden + block.o_proj(_attention(query, keys, values, visible, block.scaling))
        hidden = _feed_forward(layer, hidden)
    scores, config = model.lm_head(model.model.norm(hidden)), model.config.text_config
    if config.model_type == "granite":
        return scores / config.logits_scaling
    cap = getattr(config, "final_logit_softcapping", None)
    return scores if cap is None else torch.tanh(scores / cap) * cap


def _tree(
    model: "SharedLLMForCausalLM", source: Any, layer: Any, chunk: Tensor, query: Tensor | None
) -> tuple[list[Tensor], list[int], list[tuple[float, float]]]:
    """Retained nodes in slot order, choices and similarities."""
    retained: list[Tensor] = []
    choices, similarities = [], []
    for _ in range(model.config.tree_depth - 1):
        children = chunk[: chunk.numel() // 2], chunk[chunk.numel() // 2 :]
        choice = 1
        if query is not None:
            scores = []
            for child in children:
                if child.numel() == 0:
                    scores.append(float("nan"))
                    continue
                vector = source.norm(_layer(model, layer, _embed(source, child))[0])[-1]
                scores.append(torch.cosine_similarity(vector, query, dim=0, eps=1e-6).item())
            similarities.append((scores[0], scores[1]))
            choice = 0 if children[1].numel() == 0 or scores[0] >= scores[1] else 1
        choices.append(choice)
        retained.insert(0, children[1 - choice])
        chunk = children[choice]
    leaves = chunk[: chunk.numel() // 2], chunk[chunk.numel() // 2 :]
    return [node for node in (*leaves, *retained) if node.numel()], choices, similarities


def _embed(source: Any, ids: Tensor) -> Tensor:
    """Embeddings ``[l, d]`` as the first layer takes them."""
    embedded = source.embed_tokens(ids)
    return embedded * source.config.embedding_multiplier if source.config.model_type == "granite" else embedded


def _layer(model: "SharedLLMForCausalLM", layer: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One whole layer on ``[l, d]``: its output, its raw keys and its values ``[l, Hkv, D]``."""
    attended, key, value = _self_attention(model, layer, hidden)
    return _feed_forward(layer, _add_attended(layer, hidden, attended)), key, value


def _add_attended(layer: Any, hidden: Tensor, attended: Tensor) -> Tensor:
    if hasattr(layer, "post_feedforward_layernorm"):
        attended = layer.post_attention_layernorm(attended)
    return hidden + attended * getattr(layer, "residual_multiplier", 1.0)


def _feed_forward(layer: Any, hidden: Tensor) -> Tensor:
    between = hasattr(layer, "post_feedforward_layernorm")
    norm = layer.pre_feedforward_layernorm if between else layer.post_attention_layernorm
    # an MLP of experts takes rows of texts only
    out = layer.mlp(norm(hidden).unsqueeze(0)).squeeze(0)
    out = layer.post_feedforward_layernorm(out) if between else out
    return hidden + out * getattr(layer, "residual_multiplier", 1.0)


def _self_attention(model: "SharedLLMForCausalLM", layer: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    attention, length, config = layer.self_attn, hidden.shape[0], layer.self_attn.config
    normed = layer.input_layernorm(hidden)
    if hasattr(attention, "qkv_proj"):
        counts = [config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads]
        whole = attention.qkv_proj(normed).view(length, -1, attention.head_dim)
        query, key, value = whole.split(counts, 1)
    else:
        query, key, value = (
            getattr(attention, f"{name}_proj")(normed).view(length, -1, attention.head_dim) for name in "qkv"
        )
    if hasattr(attention, "q_norm"):
        query, key = attention.q_norm(query), attention.k_norm(key)
    positions = torch.arange(length)
    back = positions.unsqueeze(1) - positions
    visible = back >= 0
    window = getattr(attention, "sliding_window", None)
    if config.model_type in ("mistral", "phi3"):
        window = config.sliding_window
    if window is not None:
        visible &= back < window
    frequencies = _frequencies(model, layer)
    rotated_query, rotated_key = _rope(query, positions, frequencies), _rope(key, positions, frequencies)
    return attention.o_proj(_attention(rotated_query, rotated_key, value, visible, attention.scaling)), key, value


def _attention(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, scale: float) -> Tensor:
    """Softmax attention ``[L, Hq*D]``, each query head with its group's key/value head."""
    groups = query.shape[1] // key.shape[1]
    heads = []
    for head in range(query.shape[1]):
        scores = (query[:, head] @ key[:, head // groups].T) * scale
        weights = torch.softmax(scores.masked_fill(~visible, -torch.inf), -1)
        heads.append(weights @ value[:, head // groups])
    return torch.cat(heads, -1)


def _frequencies(model: "SharedLLMForCausalLM", layer: Any) -> tuple[Tensor, float]:
    """Rotary frequencies ``[R/2]`` of a layer, and the factor of cos and sin."""
    rotary, attention = model.model.rotary_emb, layer.self_attn
    if not getattr(attention, "use_rope", True):
        return torch.empty(0), 1.0
    kind = f"{attention.layer_type}_" if hasattr(rotary, "layer_types") else ""
    return getattr(rotary, f"{kind}original_inv_freq"), float(getattr(rotary, f"{kind}attention_scaling"))


def _rope(x: Tensor, positions: Tensor, frequencies: tuple[Tensor, float]) -> Tensor:
    """Rotate the first ``R`` elements of ``[l, heads, D]`` as complex numbers, real parts first; the rest passes."""
    inverse, scaling = frequencies
    angle = torch.outer(positions.to(torch.float32), inverse.to(torch.float32)).unsqueeze(1)
    # the tables are float32 by contract of the operators, whatever the model's dtype
    cos, sin = (angle.cos() * scaling).to(x.dtype), (angle.sin() * scaling).to(x.dtype)
    half = inverse.numel()
    real, imaginary, rest = x.split((half, half, x.shape[-1] - 2 * half), -1)
    return torch.cat((real * cos - imaginary * sin, real * sin + imaginary * cos, rest), -1)
