"""Tiered memories made and grown: sections of a text are compressed one after the other, and cut into pages."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .inputs import padded_rows
from .memory import ContextMemory
from .memory_fields import Tail
from .memory_tiers import MemoryTiers
from .pages import Page, PageForm
from .pick import slot_places
from .pick_index import unrotated_keys
from .sources import Source
from .tiered_document import TieredDocument, chunk_slots, document_of
from .tiered_memory import TieredMemory

#: Tokens that are compressed before their pages go to the tiers; what they take is all that is held beside the tiers.
SECTION_TOKENS = 32768


class PageWriter:
    """Cuts slots that come one after the other into pages.

    Args:
        tiers: where the pages go.
        form: their sizes.
        page_slots: slots of a full page.
    """

    def __init__(self, tiers: MemoryTiers, form: PageForm, page_slots: int) -> None:
        self.pages: list[Page] = []
        self._tiers, self._form, self._page_slots = tiers, form, page_slots
        self._rest: Tensor | None = None

    def add(self, keys: Sequence[Tensor], values: Sequence[Tensor], first: int, end: int) -> None:
        """Slots ``first`` to ``end`` of keys and values ``[S, Hkv, D]`` by layer."""
        while first < end:
            held = 0 if self._rest is None else self._rest.shape[2]
            last = min(end, first + self._page_slots - held)
            pairs = zip(keys, values, strict=True)
            new = torch.stack([torch.stack((key[first:last], value[first:last])) for key, value in pairs])
            self._rest = new if self._rest is None else torch.cat((self._rest, new), 2)
            if self._rest.shape[2] == self._page_slots:
                self.finish()
            first = last

    def finish(self) -> list[Page]:
        """All pages; the last one may have fewer slots."""
        if self._rest is not None:
            self.pages.append(self._tiers.insert(self._rest, self._form))
            self._rest = None
        return self.pages


@torch.no_grad()
def offload(model: Any, memory: ContextMemory, tiers: MemoryTiers) -> TieredMemory:
    """See :meth:`ContextAppending.offload`."""
    _, heads, size = memory.keys[0].shape
    form = PageForm(len(memory.keys), heads, size, memory.dtype)
    slots = chunk_slots(model.config)
    made = TieredMemory([], list(memory.memory_index), memory.signature, form, slots, tiers)
    names = {f"{kind}.{i}": t for kind in ("keys", "values") for i, t in enumerate(getattr(memory, kind))}

    def rows(begin: int, name: str, first: int, end: int) -> Tensor:
        return names[name][begin + first : begin + end]

    for document, (begin, end) in enumerate(itertools.pairwise(memory.cu_slots)):
        writer = PageWriter(tiers, form, made.page_slots)
        for first in range(begin, end, made.page_slots):
            last = min(first + made.page_slots, end)
            keys, values = (
                [tensor[first:last].to(tiers.device) for tensor in part] for part in (memory.keys, memory.values)
            )
            writer.add(keys, values, 0, last - first)
        tail = None if memory.tails is None else memory.tails[document]
        own = None if tail is None else tail._replace(token_ids=tail.token_ids.cpu())
        source = None if memory.sources is None else memory.sources[document]
        held = memory.num_tokens[document], own, source
        read = functools.partial(rows, begin)
        made.documents.append(document_of(model, tiers.device, slots, writer.finish(), *held, read))
    return made


@torch.no_grad()
def append_to_tiers(
    model: Any,
    memory: TieredMemory,
    texts: dict[int, Tensor],
    queries: Sequence[Tensor | None],
    sources: Sequence[Source | None] | None,
    *,
    keep: bool,
    progress: Callable[[int], None] | None,
) -> TieredMemory:
    """The memory of documents that go on.

    Args:
        model: the memory's.
        memory: stays as it is.
        texts: what to compress of each document that goes on: its partial last chunk, and what comes after it.
        queries: ids, mask and embeddings, one row for each text.
        sources: of all documents, as they are afterwards.
        keep: whether what the pick asks of the given memory must stay readable.
        progress: called with the tokens compressed so far.
    """
    size, config = model.config.chunk_size, model.config
    # whole chunks, so that none is compressed twice
    step = max(size, SECTION_TOKENS // len(texts) // size * size)
    writers: dict[int, PageWriter] = {}
    kept: dict[int, int] = {}
    picked: dict[int, list[list[Tensor]]] = {}
    ends: dict[int, Tail | None] = {}
    for document in texts:
        own = memory.documents[document]
        kept[document] = own.num_tokens // size * memory.chunk_slots
        writers[document] = PageWriter(memory.tiers, memory.form, memory.page_slots)
        full, rest = divmod(kept[document], memory.page_slots)
        writers[document].pages += own.pages[:full]
        if rest:
            writers[document].add(*memory.tiers.gather([(own.pages[full], 0, rest)], memory.form), 0, rest)
        picked[document] = [[] for _ in ([] if own.pick is None else own.pick.keys)]
    done = 0
    for begin in range(0, max(text.numel() for text in texts.values()), step):
        rows = [row for row, text in enumerate(texts.values()) if text.numel() > begin]
        chosen = [list(texts)[row] for row in rows]
        parts = [texts[document][begin : begin + step] for document in chosen]
        firsts = [(memory.documents[document].num_tokens // size) + begin // size for document in chosen]
        ids, mask = padded_rows(parts)

        def told(count: int, so_far: int = done) -> None:
            if progress is not None:
                progress(so_far + count)

        part = model._compress_part(
            ids,
            mask,
            *(None if given is None else given[rows] for given in queries),
            first_chunks=firsts,
            name="append",
            progress=told,
            training=False,
        )
        done += sum(part.num_tokens)
        for place, document in enumerate(chosen):
            first, end = part.cu_slots[place : place + 2]
            writers[document].add(part.keys, part.values, first, end)
            tail = part.tails[place]
            ends[document] = tail._replace(token_ids=tail.token_ids.cpu())
            if picked[document]:
                positions = slot_places(part.num_tokens[place], config).position + firsts[place]
                for layer, keys in zip(model.pick.layers, picked[document], strict=True):
                    keys.append(unrotated_keys(model, layer, part.keys[layer][first:end], positions))
    documents = list(memory.documents)
    made = {document: writer.finish() for document, writer in writers.items()}
    # nothing fails from here on but for lack of memory: what was given has lost nothing before
    for document, pages in made.items():
        own = memory.documents[document]
        tokens = own.num_tokens // size * size + texts[document].numel()
        pick = own.pick
        if pick is not None:
            # a document may stand in the memory twice
            shared = sum(other.pick is pick for other in memory.documents) > 1
            new = [torch.cat(keys) for keys in picked[document]]
            pick = pick.extended(kept[document], new, keep=keep or shared)
        source = None if sources is None else sources[document]
        slots = sum(page.slots for page in pages)
        documents[document] = TieredDocument(tuple(pages), tokens, slots, ends[document], source, pick)
    return TieredMemory(
        documents, list(memory.memory_index), memory.signature, memory.form, memory.chunk_slots, memory.tiers
    )
