"""A memory that knows its source: names, token ids, characters, digests; passages found without the context."""

import copy
import dataclasses
import hashlib
import itertools
import pickle
import random
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sharedllm_ext import ContextMemory, Conversation, MemoryTiers, TieredMemory
from sharedllm_ext.model.file_description import describe_file
from sharedllm_ext.model.sources import Place, Source, SourceText, tokenizer_digest

from .test_pick import build

WORDS = [f"word{i}" for i in range(80)]


def make_tokenizer(words: list[str] = WORDS) -> PreTrainedTokenizerFast:
    vocabulary = {"[UNK]": 0, **{word: i + 4 for i, word in enumerate(words)}}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]")


@pytest.fixture(scope="module")
def model() -> Any:
    return build()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


def text_of(words: int, seed: int = 0) -> str:
    generator = random.Random(seed)
    return "".join(generator.choice(WORDS) + generator.choice((" ", "  ", "\n")) for _ in range(words))


def compressed(model: Any, *sources: Source) -> ContextMemory:
    longest = max(source.tokens for source in sources)
    ids, mask = (torch.zeros((len(sources), longest), dtype=torch.int64) for _ in range(2))
    for row, source in enumerate(sources):
        ids[row, : source.tokens], mask[row, : source.tokens] = source.token_ids, 1
    return model.compress(ids, mask).with_sources(sources)


def test_a_source_tells_what_its_text_is(tokenizer: Any) -> None:
    text = text_of(50)
    source = Source.of(text, tokenizer, "a.txt")
    assert source.sha256 == [hashlib.sha256(text.encode()).hexdigest()]
    assert source.token_ids.tolist() == tokenizer(text, add_special_tokens=False).input_ids
    assert (source.name, source.tokens, source.tokenizer) == ("a.txt", 50, tokenizer_digest(tokenizer))
    for start, end in ((0, 1), (7, 19), (49, 50), (0, 50)):
        name, first, last = source.place(start, end)
        assert name == "a.txt" and text[first:last].split() == text.split()[start:end]
        assert not text[first:last][0].isspace() and not text[first:last][-1].isspace()
    for start, end in ((0, 0), (3, 2), (-1, 2), (49, 51)):
        assert source.place(start, end) is None


def test_tokenizers_are_told_apart() -> None:
    one, other = make_tokenizer(), make_tokenizer(WORDS[::-1])
    before = tokenizer_digest(one)
    one("word1 word2", truncation=True, max_length=1, padding="max_length") if one.pad_token else one(
        "word1 word2", truncation=True, max_length=1
    )
    assert tokenizer_digest(one) == before == tokenizer_digest(make_tokenizer()) != tokenizer_digest(other)

    class Slow:
        def get_vocab(self) -> dict[str, int]:
            return {"a": 0}

    assert len({tokenizer_digest(Slow()), before}) == 2


@torch.no_grad()
def test_passages_are_found_without_the_context(model: Any, tokenizer: Any) -> None:
    texts = [text_of(300), text_of(170, seed=1)]
    sources = [Source.of(text, tokenizer, f"{i}.txt") for i, text in enumerate(texts)]
    memory, question = compressed(model, *sources), torch.tensor([[5, 9, 20], [7, 8, 30]])
    found = model.find_passages(question, memory=memory, count=3)
    for row, (passages, source) in enumerate(zip(found, sources, strict=True)):
        alone = memory.select([row])
        ids = source.token_ids.long().unsqueeze(0)
        given = model.find_passages(question[row : row + 1], ids, memory=alone, count=3)[0]
        assert passages == given
        bare = model.find_passages(
            question[row : row + 1], ids, memory=dataclasses.replace(alone, sources=None), count=3
        )
        assert bare[0] == [dataclasses.replace(passage, place=None) for passage in given]
        for passage in passages:
            name, first, end = passage.place
            assert name == f"{row}.txt"
            assert texts[row][first:end].split() == texts[row].split()[passage.start : passage.end]


@torch.no_grad()
def test_sources_survive_copies(model: Any, tokenizer: Any) -> None:
    memory = compressed(model, Source.of(text_of(70), tokenizer, "a"))
    for one in (
        memory.select([0, 0]).select([1]),
        memory.expand(2).select([0]),
        memory.to(torch.float64).to("cpu"),
        copy.deepcopy(memory),
        pickle.loads(pickle.dumps(memory)),
        pytree.tree_map(lambda leaf: leaf, memory),
    ):
        assert one.sources[0].name == "a"
        assert torch.equal(one.sources[0].token_ids, memory.sources[0].token_ids)


@torch.no_grad()
def test_a_document_that_grows_keeps_its_source(model: Any, tokenizer: Any) -> None:
    texts = [text_of(100, seed) for seed in range(3)]
    sources = [Source.of(text, tokenizer, "log") for text in texts]
    memory = compressed(model, sources[0])
    for source in sources[1:]:
        memory = model.append(memory, source.token_ids.long().unsqueeze(0), sources=[source])
    whole = Source.of("".join(texts), tokenizer, "log")
    grown = memory.sources[0]
    assert torch.equal(grown.token_ids, whole.token_ids) and grown.name == "log"
    assert grown.sha256 == [hashlib.sha256(text.encode()).hexdigest() for text in texts]
    assert all(grown.place(a, b) == whole.place(a, b) for a, b in ((0, 5), (90, 130), (250, 300), (99, 201)))
    question = torch.tensor([[5, 9, 20]])
    assert model.find_passages(question, memory=memory) == model.find_passages(
        question, memory=compressed(model, whole)
    )
    # tokens alone: passages are found, their characters are not known
    more = model.append(memory, whole.token_ids[:60].long().unsqueeze(0))
    assert more.sources[0].tokens == 360 and more.sources[0].token_ids[300:].tolist() == whole.token_ids[:60].tolist()
    assert more.sources[0].place(0, 300) and more.sources[0].place(0, 301) is None
    assert len(model.find_passages(question, memory=more)[0]) == 8
    # and characters after them neither
    last = model.append(more, sources[1].token_ids.long().unsqueeze(0), sources=[sources[1]])
    assert last.sources[0].place(400, 401) is None and last.sources[0].place(0, 9)


@torch.no_grad()
def test_sources_of_what_is_appended_alone(model: Any, tokenizer: Any) -> None:
    source = Source.of(text_of(40), tokenizer, "second")
    ids = source.token_ids.long().unsqueeze(0)
    bare = model.compress(torch.cat((ids, ids)))
    grown = model.append(bare, ids, rows=[1], sources=[source])
    assert grown.sources[0] is None
    assert (grown.sources[1].name, grown.sources[1].tokens, grown.sources[1].token_ids) == ("second", 80, None)
    empty = model.append(model.compress(ids[:, :0]), ids, sources=[source])
    assert torch.equal(empty.sources[0].token_ids, source.token_ids)


@pytest.mark.parametrize("seed", range(20))
def test_a_place_is_in_one_text(tokenizer: Any, seed: int) -> None:
    generator = random.Random(seed)
    texts, names = [], []
    source = Source((), "g")
    for number in range(8):
        texts.append(text_of(generator.randrange(0, 9), seed=100 * seed + number))
        names.append(generator.choice(("g", "a", "b", None)))
        more = Source.of(texts[-1], tokenizer, names[-1])
        source = source.extended(more, more.token_ids)
    names = ["g" if name is None else name for name in names]
    assert source.names == names and source.name == "g"
    # all of a name, and of each token the name and the word
    whole = {name: "".join(text for text, own in zip(texts, names, strict=True) if own == name) for name in names}
    words = [(name, word) for text, name in zip(texts, names, strict=True) for word in text.split()]
    assert source.tokens == len(words)
    for _ in range(50):
        start = generator.randrange(-1, len(words) + 1)
        end = generator.randrange(-1, len(words) + 2)
        place = source.place(start, end)
        if not 0 <= start < end <= len(words):
            assert place is None and source.text_of(start, end) is None
            continue
        runs = [list(run) for _, run in itertools.groupby(words[start:end], key=lambda word: word[0])]
        most = next(run for run in runs if len(run) == max(map(len, runs)))
        assert place.name == most[0][0] and place.end <= len(whole[place.name])
        assert whole[place.name][place.first : place.end].split() == [word for _, word in most]
        assert source.text_of(start, end)[0] == place.name


@torch.no_grad()
def test_what_is_appended_keeps_its_name(model: Any, tokenizer: Any) -> None:
    texts = [text_of(100, seed) for seed in range(3)]
    sources = [Source.of(text, tokenizer, name) for text, name in zip(texts, ("g.txt", "new.txt", None), strict=True)]
    memory = compressed(model, sources[0])
    for source in sources[1:]:
        memory = model.append(memory, source.token_ids.long().unsqueeze(0), sources=[source])
    grown = memory.sources[0]
    assert (grown.name, grown.names) == ("g.txt", ["g.txt", "new.txt", "g.txt"])
    assert grown.place(100, 200) == ("new.txt", *sources[1].place(0, 100)[1:])
    # what has no name is more of the document's own text
    _, first, last = sources[2].place(0, 5)
    assert grown.place(200, 205) == ("g.txt", len(texts[0]) + first, len(texts[0]) + last)
    # over two texts: the one that has more
    assert grown.place(90, 120) == ("new.txt", *sources[1].place(0, 20)[1:])
    assert grown.place(80, 110) == ("g.txt", *sources[0].place(80, 100)[1:])
    assert grown.place(95, 105) == ("g.txt", *sources[0].place(95, 100)[1:])
    for passage in model.find_passages(torch.tensor([[5, 9, 20]]), memory=memory, count=8)[0]:
        length = len(texts[1]) if passage.place.name == "new.txt" else len(texts[0]) + len(texts[2])
        assert 0 <= passage.place.first < passage.place.end <= length
    # a source that has grown itself, where tokens alone hide the characters of its own text only
    ids = torch.arange(5, 12)
    other = Source.of(texts[1], tokenizer, "a").extended(None, ids).extended(sources[0], ids)
    both = sources[2].extended(other, ids)
    assert (both.name, both.names) == (None, [None, "a", "a", "g.txt"]) and both.tokens == 307
    assert both.place(150, 160).name == "a" and both.place(200, 207) is None
    assert both.place(207, 307) == sources[0].place(0, 100)
    # a document that begins with it
    assert Source(()).extended(sources[0], ids).names == ["g.txt"]
    assert Source(()).extended(sources[0], ids).tokenizer == sources[0].tokenizer


@torch.no_grad()
def test_names_survive_copies_and_files(model: Any, tokenizer: Any, tmp_path: Any) -> None:
    first, second = Source.of(text_of(70), tokenizer, "g.txt"), Source.of(text_of(50, 1), tokenizer, "new ☂.txt")
    memory = model.append(compressed(model, first), second.token_ids.long().unsqueeze(0), sources=[second], keep=True)
    texts = list(memory.sources[0].texts)
    texts[0] = dataclasses.replace(texts[0], line_ends=7, heading=1)
    memory = memory.with_sources([dataclasses.replace(memory.sources[0], texts=tuple(texts))])
    expected = [(None, 7, 1), ("new ☂.txt", None, 0)]
    tiers = MemoryTiers("cpu")
    files = {name: tmp_path / f"{name}.safetensors" for name in ("own", "shards", "tiered", "talk", "rows")}
    memory.save(files["own"])
    memory.save(files["shards"], max_shard_size="4KB")
    tiered = TieredMemory.load(files["own"], model, tiers)
    tiered.save(files["tiered"])
    Conversation(model, memory).save(files["talk"])
    memory.with_rows([0]).concat([memory, memory]).with_rows([[0, 1]]).save(files["rows"])
    loaded = [ContextMemory.load(files[name], model) for name in ("own", "shards", "tiered")]
    rows = ContextMemory.load(files["rows"], model)
    for one in (
        *loaded,
        tiered,
        rows,
        Conversation.load(files["talk"], model).memory,
        memory.select([0, 0]).select([1]),
        memory.select_documents([0]),
        memory.expand(2),
        ContextMemory.concat([compressed(model, first), memory]).select_documents([1]),
        memory.to(torch.float64),
        copy.deepcopy(memory),
        pickle.loads(pickle.dumps(memory)),
        pytree.tree_map(lambda leaf: leaf, memory),
    ):
        source = one.sources[0]
        assert [(text.name, text.line_ends, text.heading) for text in source.texts] == expected
        assert source.place(70, 80) == ("new ☂.txt", *second.place(0, 10)[1:])
    # in tiers too, also of a document that begins there
    ids = second.token_ids.long().unsqueeze(0)
    assert model.append(tiered, ids, sources=[second]).sources[0].names == ["g.txt", *["new ☂.txt"] * 2]
    nothing = model.offload(model.compress(ids[:, :0]), tiers)
    begun = model.append(nothing, ids, sources=[second]).sources[0]
    assert (begun.name, begun.names, begun.tokenizer) == ("new ☂.txt", ["new ☂.txt"], second.tokenizer)
    assert rows.memory_index == [(0, 1)] and rows.sources[1].names == ["g.txt", "new ☂.txt"]
    versions = {name: describe_file(path)["version"] for name, path in files.items()}
    assert versions == {"own": 5, "shards": 5, "tiered": 5, "rows": 5, "talk": 3}
    assert describe_file(files["own"])["documents"][0]["names"] == ["g.txt", "new ☂.txt"]
    # nothing but one name: older versions read it
    compressed(model, first).save(files["own"])
    assert describe_file(files["own"])["version"] == 3
    # an object that an older version has pickled
    bare = SourceText(3)
    for field in ("name", "line_ends", "heading"):
        del vars(bare)[field]
    again = pickle.loads(pickle.dumps(bare))
    assert (again.name, again.line_ends, again.heading) == (None, None, 0)


def test_bad_sources(model: Any, tokenizer: Any) -> None:
    source = Source.of(text_of(70), tokenizer)
    ids = source.token_ids.long().unsqueeze(0)
    memory, question = model.compress(ids), torch.tensor([[5, 9]])
    wrong = source.token_ids.clone()
    wrong[-1] = 4 if wrong[-1] != 4 else 5
    far = source.token_ids.clone()
    far[3] = 4000
    for message, call in (
        ("sources: expected 1, one for each document, got 2", lambda: memory.with_sources([source, None])),
        (
            r"sources\[0\]: expected the source of 70 tokens, got one of 40",
            lambda: memory.with_sources([Source.of(text_of(40), tokenizer)]),
        ),
        (
            r"sources\[0\]: expected the tokens that the memory was made of, got others",
            lambda: memory.with_sources([Source.of_ids(wrong)]),
        ),
        (
            r"sources\[0\]: expected token_ids of shape \(70,\), int32, on the CPU, got \(70,\), torch.int64",
            lambda: memory.with_sources([Source((SourceText(70, wrong.long()),))]),
        ),
        (
            r"sources\[0\]: expected offsets of shape \(70, 2\)",
            lambda: memory.with_sources([Source((SourceText(70, offsets=wrong),))]),
        ),
        (
            r"sources\[0\]: expected the name of a text to be a str or None, got 5",
            lambda: memory.with_sources([Source((SourceText(70, name=5),))]),
        ),
        (
            r"sources\[0\]: expected line_ends of a text to be an int of at least 0, got -1",
            lambda: memory.with_sources([Source((SourceText(70, line_ends=-1),))]),
        ),
        (
            r"sources\[0\]: expected heading of a text to be an int of at least 0, got None",
            lambda: memory.with_sources([Source((SourceText(70, heading=None),))]),
        ),
        ("sources: expected 1, one for each row of context_ids, got 0", lambda: model.append(memory, ids, sources=[])),
        (
            r"sources\[0\]: expected the source of 70 tokens, got one of 40",
            lambda: model.append(memory, ids, sources=[Source.of(text_of(40), tokenizer)]),
        ),
        (
            "context_ids: expected the tokens of the memory's document 0, or a memory that knows them",
            lambda: model.find_passages(question, memory=memory),
        ),
        ("context_ids, memory: expected at least one of them, got none", lambda: model.find_passages(question)),
        (
            "context_attention_mask: expected context_ids with it",
            lambda: model.find_passages(question, None, question, memory=memory),
        ),
        (
            r"sources\[0\].token_ids: expected token ids from 0 to 127, got 4000",
            lambda: model.find_passages(question, memory=memory.with_sources([Source.of_ids(far)])),
        ),
        (
            "context_ids: expected the text that the memory was made of, got another",
            lambda: model.find_passages(
                question,
                memory=memory.with_sources(
                    [Source.of_ids(torch.cat((source.token_ids[:64].flip(0), source.token_ids[64:])))]
                ),
            ),
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert Place("a", 1, 2) == ("a", 1, 2)
