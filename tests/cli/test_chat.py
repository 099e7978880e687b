"""``sharedllm chat``: turns, documents, files and interruptions, over pipes."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from sharedllm_ext import ContextMemory, Conversation, SharedLLMForCausalLM
from sharedllm_ext.cli import main
from sharedllm_ext.cli._output import CommandError
from sharedllm_ext.cli._turns import Turns
from sharedllm_ext.counted import counted
from sharedllm_ext.model.passages import PassagePrompt

from ..support import environment_of_package
from .conftest import FACT, QUESTION, Result, sentences

Chat = Callable[..., Result]
#: As of many instruct models; refuses a system message that does not come first.
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}{{ raise_exception('late') }}{% endif %}"
    "<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
LINES = ("alpha Beta", "return 42", "gamma_1 delta")


@pytest.fixture
def chat(cli: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> Chat:
    """Run the command with lines on standard input."""

    def run(model: object, *args: object, lines: Any = LINES) -> Result:
        data = lines if isinstance(lines, bytes) else "".join(f"{line}\n" for line in lines).encode()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
            return cli("chat", model, "--max-new-tokens", 6, *args)

    return run


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Path:
    """The checkpoint with a chat template."""
    folder = tmp_path_factory.mktemp("spoken") / "model"
    SharedLLMForCausalLM.from_pretrained(checkpoint).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def pair(folder: Path) -> tuple[Any, Any]:
    return SharedLLMForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def ids(tokenizer: Any, text: str) -> torch.Tensor:
    return torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])


def replies(model: Any, tokenizer: Any, conversation: Conversation, texts: list[str], count: int = 6) -> str:
    """What is on stdout after these additions to the text."""
    out = []
    for text in texts:
        conversation.add(ids(tokenizer, text))
        new = conversation.generate(max_new_tokens=count, do_sample=False, pad_token_id=0, eos_token_id=0)
        out.append(tokenizer.decode(new[0], skip_special_tokens=True) + "\n\n")
    return "".join(out)


def test_lines_are_turns_of_one_conversation(chat: Chat, checkpoint: Path) -> None:
    model, tokenizer = pair(checkpoint)
    lines = [*LINES, *LINES, *LINES]
    texts = [line if i == 0 else f"\n{line}" for i, line in enumerate(lines)]
    conversation = Conversation(model)
    result = chat(checkpoint, lines=[*lines, "", "  ", "/info"])
    assert result.code == 0, result.err
    assert result.out == replies(model, tokenizer, conversation, texts)
    # it has passed the window, and says what it holds
    assert conversation.memory is not None
    running = conversation.running_ids.shape[1]
    assert f"running text: {running} of 64 tokens\n" in result.err
    absorbed = conversation.num_tokens - running
    assert f"memory: {absorbed} tokens in {counted(absorbed // 32, 'chunk')}, " in result.err
    assert f" {conversation.memory.num_slots} slots in 2 layers, " in result.err
    assert "running text: 0 of 64 tokens\nmemory: none yet\n" in result.err


def test_files_of_a_folder_are_named(chat: Chat, cli: Callable[..., Result], picking: Path, tmp_path: Path) -> None:
    folder, memory, talk = tmp_path / "docs", tmp_path / "memory.safetensors", tmp_path / "talk.safetensors"
    folder.mkdir()
    for name, seed in (("a.txt", 4), ("b.txt", 3), ("c.txt", 5)):
        (folder / name).write_text(sentences(8, seed=seed) + (FACT + "\n") * (name == "b.txt"))
    assert cli("ask", picking, "--context", folder, "--save-memory", memory).code == 0
    lines = [QUESTION, *LINES * 8, "/info", f"/save {talk}"]
    asked = [chat(picking, *given, "--passages", 3, lines=lines) for given in ((folder,), ("--memory", memory))]
    for result in asked:
        assert result.code == 0, result.err
        assert "passages: b.txt tokens" in result.err and f" ({folder}, and what followed) in " in result.err
    report = cli("info", talk, "--json").json
    names = report["documents"][0]["names"]
    assert report["version"] == 3 and names[:3] == ["a.txt", "b.txt", "c.txt"] and set(names[3:]) == {str(folder)}
    rows = chat(picking, "--load", talk, "--passages", 3, "--json", lines=[FACT, QUESTION]).out.splitlines()
    found = [passage for row in rows for passage in json.loads(row)["passages"]]
    # what moved in is of no file
    end = ContextMemory.load(memory).num_tokens[0]
    assert {passage["source"] is None for passage in found} == {True, False}
    assert all((passage["source"] is None) == (passage["tokens"][0] >= end) for passage in found)


def test_documents_are_read_first(chat: Chat, checkpoint: Path, text_file: Path, tmp_path: Path) -> None:
    model, tokenizer = pair(checkpoint)
    memory = model.compress(ids(tokenizer, text_file.read_text()))
    texts = [LINES[0], f"\n{LINES[1]}"]
    expected = replies(model, tokenizer, Conversation(model, memory), texts)
    assert expected != replies(model, tokenizer, Conversation(model), texts)
    result = chat(checkpoint, text_file, lines=LINES[:2])
    assert (result.code, result.out) == (0, expected), result.err
    assert f"memory: {memory.num_tokens[0]:,} tokens ({text_file}) in" in result.err
    # only what has moved in follows it
    assert "what followed" not in result.err
    saved = tmp_path / "talk.safetensors"
    long = chat(checkpoint, text_file, lines=[*LINES, *LINES, *LINES, "/info", f"/save {saved}"])
    assert re.search(rf"\nmemory: [\d,]+ tokens \({text_file}, and what followed\) in ", long.err), long.err
    assert f" ({text_file}, and what followed) in " in chat(checkpoint, "--load", saved, lines=()).err
    # the same from the memory that ask has saved; files may stand after the options
    saved = tmp_path / "memory.safetensors"
    memory.save(saved)
    assert chat(checkpoint, "--memory", saved, lines=LINES[:2]).out == expected
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.txt").write_text(sentences(9))
    assert f"({folder}, {text_file}) in" in chat(checkpoint, folder, "--top-p", "0.9", text_file, lines=()).err


def test_a_saved_conversation_goes_on(chat: Chat, spoken: Path, text_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "talk.safetensors"
    whole = chat(spoken, text_file, lines=[*LINES, *LINES])
    first = chat(spoken, text_file, lines=[*LINES, f"/save {path}", "/quit", "never asked"])
    second = chat(spoken, "--load", path, lines=[*LINES, "/save"])
    assert whole.code == first.code == second.code == 0, second.err
    assert first.out + second.out == whole.out
    assert f"saved: {path}, " in first.err and f"saved: {path}, " in second.err
    model, tokenizer = pair(spoken)
    conversation = Conversation.load(path, model, tokenizer)
    assert conversation.num_tokens > 6 * 8 and conversation.memory is not None
    told = tokenizer.decode(conversation.running_ids[0])
    assert told.count("<|user|>") == told.count("<|end|>\n<|assistant|>") and "<|user|>gamma_1 delta<|end|>" in told


def test_turns_by_a_template(spoken: Path) -> None:
    _, tokenizer = pair(spoken)
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    turns = Turns(tokenizer, None, "Be brief.")
    assert tokenizer.decode(turns.begin_ids) == "<|system|>Be brief.<|end|>\n" and turns.stop_ids == {end}
    first = turns.question("alpha", turns.begin_ids[-1], first=True)
    assert tokenizer.decode(first) == "<|user|>alpha<|end|>\n<|assistant|>"
    # an answer that was cut off gets its end, another one has it
    assert tokenizer.decode(turns.question("x", 7, first=False)) == "<|end|>\n<|user|>x<|end|>\n<|assistant|>"
    assert tokenizer.decode(turns.question("x", end, first=False)) == "\n<|user|>x<|end|>\n<|assistant|>"
    assert tokenizer.decode(turns.closing(7, first=False)) == "<|end|>" and turns.closing(7, first=True) == []
    assert turns.closing(end, first=False) == []
    # all of it is the text of the template
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "alpha"},
        {"role": "assistant", "content": "Beta"},
        {"role": "user", "content": "x"},
    ]
    made = [*turns.begin_ids, *first, *tokenizer("Beta")["input_ids"], *turns.question("x", 7, first=False)]
    assert tokenizer.decode(made) == tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    # what looks like an end in a question is text
    fake = turns.question("no <|end|> here", end, first=False)
    assert fake.count(end) == 1 and "no <|end|> here" in tokenizer.decode(fake)
    assert Turns(tokenizer, False).question("a <|end|>", 7, first=False).count(end) == 0


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no') }}", "expected a template for questions and answers, got .*no"),
        ("fixed", "expected a template that has each message once, got one that has it 0 times"),
        (
            "{% for m in messages %}{% if m.role != 'system' %}{{ m.content }}|{% endif %}{% endfor %}",
            "--system: expec",
        ),
    ],
)
def test_templates_that_cannot_be_used(spoken: Path, template: str, message: str) -> None:
    _, tokenizer = pair(spoken)
    tokenizer.chat_template = template
    with pytest.raises(CommandError, match=rf"{message}.* \(--no-chat-template does without\)"):
        Turns(tokenizer, None, "Be brief.")


def test_a_system_message_stays_in_sight(chat: Chat, spoken: Path, tmp_path: Path) -> None:
    path = tmp_path / "talk.safetensors"
    result = chat(spoken, "--system", "Be brief.", lines=[*LINES, *LINES, *LINES, f"/save {path}"])
    assert result.code == 0, result.err
    model, tokenizer = pair(spoken)
    conversation = Conversation.load(path, model)
    assert conversation.memory is not None and conversation.keep_first > 0
    assert tokenizer.decode(conversation.running_ids[0]).startswith("<|system|>Be brief.<|end|>\n")
    assert f"the first {conversation.keep_first} stay" in result.err
    long = chat(spoken, "--system", "word " * 90)
    assert (long.code, long.out) == (1, "") and re.search(r"--system: expected at most 32 tokens, got \d+\n", long.err)


def test_passages_are_read_and_do_not_stay(chat: Chat, picking: Path, tmp_path: Path) -> None:
    text, path = tmp_path / "text.txt", tmp_path / "talk.safetensors"
    lines = sentences(40, seed=3).split("\n")
    text.write_text("\n".join([*lines[:20], FACT, *lines[20:]]))
    result = chat(picking, text, "--passages", 3, lines=[QUESTION, LINES[1], f"/save {path}"])
    assert result.code == 0, result.err
    model, tokenizer = pair(picking)
    context = ids(tokenizer, text.read_text())
    memory = model.compress(context)
    conversation = Conversation(model, memory)
    out = []
    for number, question in enumerate((QUESTION, LINES[1])):
        asked = ids(tokenizer, question)
        found = model.find_passages(asked, context, memory=memory, count=3)[0]
        prompt = PassagePrompt(model.config, tokenizer).ids([context[0]], found, asked[0].tolist(), [])
        beside = Conversation(model, memory)
        beside.add(torch.cat((conversation.running_ids, torch.tensor([prompt])), 1))
        new = beside.generate(max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=0)
        out.append(tokenizer.decode(new[0], skip_special_tokens=True) + "\n\n")
        conversation.add(torch.cat((ids(tokenizer, "\n" * number + question), new), 1))
        place = "; ".join(f"{text} tokens {p.start} to {p.end - 1}" for p in found)
        assert f"passages: {place}\n" in result.err
    assert result.out == "".join(out)
    again = Conversation.load(path, model, tokenizer)
    assert torch.equal(again.running_ids, conversation.running_ids)
    # they are found after loading too, in what the memory has kept
    loaded = chat(picking, "--load", path, "--passages", 3, lines=[QUESTION])
    assert loaded.code == 0 and re.search(rf"passages: {text} tokens \d+ to \d+; {text} tokens", loaded.err)
    assert chat(picking, text, "--passages", 0, lines=[QUESTION]).err.count("passages: ") == 0
    many = chat(picking, text, "--passages", 20, lines=[QUESTION, "/info"])
    assert (many.code, many.out) == (1, "")
    assert "error: --passages: expected passages and question of at most 128 tokens" in many.err
    assert "running text: 0 of 128 tokens" in many.err.split("error:")[1]


def test_commands_and_lines(chat: Chat, checkpoint: Path, tmp_path: Path) -> None:
    plain = chat(checkpoint, lines=LINES[:1])
    result = chat(checkpoint, lines=["/help", "/nonsense now", "/save", *LINES[:1]])
    assert (result.code, result.out) == (1, plain.out)
    assert "/save FILE    write the conversation" in result.err
    assert "error: /nonsense: expected /info, /save FILE, /help or /quit" in result.err
    assert "error: /save: expected the name of a file, got none" in result.err
    for target, message in (
        (tmp_path, "/save: expected a file, got the folder"),
        (tmp_path / "no" / "x", "/save: no s"),
    ):
        assert f"error: {message}" in chat(checkpoint, lines=[f"/save {target}", *LINES[:1]]).err
    weights = checkpoint / "model.safetensors"
    before = weights.read_bytes()
    assert "expected another file than those that are read" in chat(checkpoint, lines=[f"/save {weights}"]).err
    assert weights.read_bytes() == before
    # a line may go on, begin with a slash, or hold no text
    model, tokenizer = pair(checkpoint)
    expected = replies(model, tokenizer, Conversation(model), ["/alpha\nBeta", "\nlast"])
    assert chat(checkpoint, lines=b"//alpha\\\nBeta\r\n\nlast").out == expected
    wrong = chat(checkpoint, lines=b"alpha Beta\ncaf\xe9\n")
    assert (wrong.code, wrong.out) == (1, plain.out)
    assert "error: stdin: expected UTF-8 text, got byte 0xe9 at offset 3 of line 2, which is left out\n" in wrong.err


def test_json_has_a_line_for_each_message(chat: Chat, checkpoint: Path, picking: Path, text_file: Path) -> None:
    plain = chat(checkpoint, lines=["alpha\\", "Beta", *LINES])
    result = chat(checkpoint, "--json", lines=["alpha\\", "Beta", "/bogus", *LINES])
    assert (result.code, result.err.count("\n")) == (1, 1) and "/bogus: expected /info" in result.err
    rows = [json.loads(line) for line in result.out.split("\n")[:-1]]
    assert [row["message"] for row in rows] == ["alpha\nBeta", *LINES]
    assert "".join(f"{row['answer']}\n\n" for row in rows) == plain.out
    assert all(1 <= row["answer_tokens"] <= 6 and not row["interrupted"] for row in rows)
    assert rows[0]["passages"] is None and rows[0]["memory_tokens"] == 0 and rows[0]["seconds"]["first_token"] > 0
    assert rows[-1]["running_tokens"] > rows[0]["running_tokens"] > rows[0]["answer_tokens"]
    bad = chat(checkpoint, "--json", lines=b"caf\xe9\n")
    assert bad.code == 1 and "expected UTF-8 text" in json.loads(bad.out)["error"]
    found = chat(picking, text_file, "--json", "--passages", 3, lines=[QUESTION, "word " * 90])
    first, second = map(json.loads, found.out.splitlines())
    assert [passage["rank"] for passage in first["passages"]] == [1, 2, 3] and first["seconds"]["find"] > 0
    assert all(passage["source"] == str(text_file) and len(passage["tokens"]) == 2 for passage in first["passages"])
    assert (found.code, set(second)) == (1, {"message", "error"})
    assert second["error"].startswith("--passages: expected passages and question of at most 128 tokens")
    assert "passages: " not in found.err.replace(second["error"], "")


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("{text}", "--load", "x"), 2, "FILE_OR_FOLDER, --load: expected at most one of them to begin with, got 2"),
        (("--memory", "x", "--load", "y"), 2, "--memory, --load: expected at most one of them to begin with, got 2"),
        (("--load", "x", "--system", "y"), 2, "--system: expected it at the begin of a conversation, got --load"),
        (("-",), 2, "got -: standard input is the conversation"),
        (("--system", " "), 2, "--system: expected text, got an empty one"),
        (("{text}", "--passages", "2"), 2, "--passages: expected a model with a pick"),
        (("--chat-template",), 1, "--chat-template: expected a tokenizer with a chat template, got one without"),
        (("--load", "{nothing}"), 1, "conversation file: expected a file, got '.*', which does not exist"),
        (("--load", "{memory}"), 1, "expected a sharedllm-conversation file, got a 'sharedllm-context-memory' file"),
        (("{nothing}",), 1, "no such file or folder"),
    ],
)
def test_errors_are_one_line(
    chat: Chat, checkpoint: Path, text_file: Path, tmp_path: Path, options: tuple[str, ...], code: int, message: str
) -> None:
    memory = tmp_path / "memory.safetensors"
    if "{memory}" in options:
        SharedLLMForCausalLM.from_pretrained(checkpoint).compress(torch.arange(1, 50).unsqueeze(0)).save(memory)
    paths = {"text": text_file, "nothing": tmp_path / "nothing", "memory": memory}
    result = chat(checkpoint, *(option.format(**paths) for option in options))
    assert (result.code, result.out, result.err.count("\n")) == (code, "", 1), result.err
    assert re.search(message, result.err), result.err


def test_another_tokenizer_is_refused(chat: Chat, checkpoint: Path, spoken: Path, tmp_path: Path) -> None:
    path = tmp_path / "talk.safetensors"
    assert chat(checkpoint, lines=[*LINES, f"/save {path}"]).code == 0
    assert chat(spoken, "--load", path, lines=()).code == 0
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.add_tokens(["alphabet"])
    tokenizer.save_pretrained(spoken.parent / "other")
    pair(checkpoint)[0].save_pretrained(spoken.parent / "other")
    result = chat(spoken.parent / "other", "--load", path)
    assert (result.code, result.out, result.err.count("\n")) == (1, "", 1)
    assert re.search(r"expected text in the tokens of the model's tokenizer .* got tokens of another", result.err)


@pytest.fixture
def started(checkpoint: Path, tmp_path: Path) -> Any:
    """Start the program with pipes, with a model that ends no answer by itself; it is ended after two minutes."""
    model, tokenizer = pair(checkpoint)
    with torch.no_grad():
        # the end token is never the likeliest
        model.lm_head.weight[0] = 0
    model.save_pretrained(tmp_path / "endless")
    tokenizer.save_pretrained(tmp_path / "endless")
    running: list[subprocess.Popen[str]] = []

    def start(*args: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "sharedllm_ext", "chat", str(tmp_path / "endless"), *args]
        pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        process = subprocess.Popen(command, env=environment_of_package(), text=True, bufsize=1, **pipes)
        timer = threading.Timer(120, process.kill)
        timer.daemon = True
        timer.start()
        running.append(process)
        return process

    yield start
    for process in running:
        process.kill()
        process.communicate()


def test_an_interrupted_answer_loses_nothing(started: Any, tmp_path: Path) -> None:
    path = tmp_path / "talk.safetensors"
    process = started("--max-new-tokens", "1m")
    process.stdin.write("alpha Beta\n")
    begun = process.stdout.read(200)
    process.send_signal(signal.SIGINT)
    for line in process.stderr:
        if line.startswith("interrupted"):
            break
    process.stdin.write(f"/save {path}\n")
    for line in process.stderr:
        if line.startswith("saved"):
            break
    # while it waits, a pipe's program ends
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err.endswith("sharedllm: interrupted\n")
    model, tokenizer = pair(tmp_path / "endless")
    conversation = Conversation.load(path, model, tokenizer)
    # a token is at most a word of this vocabulary, and what it printed is there
    assert conversation.memory is not None and conversation.num_tokens * 8 > len(begun) + len(out)


@pytest.fixture
def interrupting(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Send Ctrl-C, so often, when the first answer has so many tokens."""

    def set_up(tokens: int, times: int) -> None:
        from sharedllm_ext.cli._generation import TimedStreamer

        original, sent = TimedStreamer.put, []

        def put(streamer: Any, value: Any) -> None:
            original(streamer, value)
            if len(streamer.times) == tokens and not sent:
                sent.append(True)
                for _ in range(times):
                    os.kill(os.getpid(), signal.SIGINT)

        monkeypatch.setattr(TimedStreamer, "put", put)

    return set_up


@pytest.mark.parametrize("tokens", [1, 5, 70])
def test_an_interrupted_answer_stays_as_far_as_it_came(
    chat: Chat, checkpoint: Path, interrupting: Callable[[int, int], None], tokens: int
) -> None:
    model, tokenizer = pair(checkpoint)
    expected = {}
    # some versions of Transformers stop after this token, some after the next one
    for count in (tokens, tokens + 1):
        conversation = Conversation(model)
        out = replies(model, tokenizer, conversation, [LINES[0]], count)
        out += replies(model, tokenizer, conversation, [f"\n{LINES[1]}"], 80)
        expected[out] = conversation.running_ids.shape[1]
    interrupting(tokens, 1)
    before = signal.getsignal(signal.SIGINT)
    result = chat(checkpoint, "--max-new-tokens", 80, lines=[*LINES[:2], "/info"])
    assert result.code == 0 and result.out in expected, result.err
    assert result.err.count("interrupted; the conversation goes on") == 1
    assert f"running text: {expected[result.out]} of 64 tokens" in result.err
    assert signal.getsignal(signal.SIGINT) is before


def test_the_second_interruption_warns_and_the_third_one_ends(
    chat: Chat, checkpoint: Path, interrupting: Callable[[int, int], None]
) -> None:
    interrupting(3, 2)
    result = chat(checkpoint, lines=LINES[:1])
    assert result.code == 0 and "Ctrl-C once more ends the program, and the conversation is lost" in result.err
    interrupting(3, 3)
    before = signal.getsignal(signal.SIGINT)
    result = chat(checkpoint, lines=LINES)
    assert (result.code, result.err.splitlines()[-1]) == (130, "sharedllm: interrupted")
    assert signal.getsignal(signal.SIGINT) is before


def test_the_terminal_is_prompted_and_warned(
    chat: Chat, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    class Terminal(io.TextIOWrapper):
        def isatty(self) -> bool:
            return True

    class Keys(io.BytesIO):
        """Lines, and Ctrl-C where there is none."""

        def readline(self, size: int | None = -1, /) -> bytes:
            line = super().readline(size)
            if line == b"^C\n":
                raise KeyboardInterrupt
            return line

    # an empty line after each answer is for pipes
    plain = chat(checkpoint, lines=LINES[:2]).out.replace("\n\n", "\n")
    for typed, code, out in (
        (f"{LINES[0]}\n^C\nhalf \\\n^C\n{LINES[1]}\n/bogus\n", 0, plain),
        (f"{LINES[0]}\n^C\n^C\n{LINES[1]}\n", 130, plain.split("\n")[0]),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdin", Terminal(Keys(typed.encode())))
            found = main(["chat", str(checkpoint), "--max-new-tokens", "6"])
        told = capfd.readouterr()
        assert found == code and told.out.startswith(out) and (code or told.out == out)
        assert "/help lists commands" in told.err and "> " in told.err and "(Ctrl-C again, Ctrl-D or" in told.err


def test_answers_are_on_stdout_alone(started: Any) -> None:
    process = started("--max-new-tokens", "8")
    out, err = process.communicate("alpha\nBeta\n", timeout=60)
    assert process.returncode == 0 and out.count("\n") >= 2
    assert "running text: 0 of 64 tokens" in err and "> " not in err


def test_a_memory_of_ask_serves_a_chat(chat: Chat, cli: Callable[..., Result], picking: Path, tmp_path: Path) -> None:
    text, memory = tmp_path / "text.txt", tmp_path / "memory.safetensors"
    text.write_text(sentences(40, seed=3))
    assert cli("ask", picking, "--context", text, "--save-memory", memory).code == 0
    result = chat(picking, "--memory", memory, "--passages", 3, lines=LINES)
    assert result.code == 0 and result.out == chat(picking, text, "--passages", 3, lines=LINES).out
    assert result.err.count(f"passages: {text} tokens") == 3
    assert ContextMemory.load(memory).sources is not None
