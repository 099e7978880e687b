"""Questions about documents, from data sets in the form of SQuAD or HotpotQA."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path

from sharedllm_ext.evaluation.json_rows import as_list, as_object, read_json, text_of
from sharedllm_ext.evaluation.needles import hide, place_of
from sharedllm_ext.evaluation.tasks import Ask, Documents, Made, Question, Task
from sharedllm_ext.evaluation.texts import TextError, shown


def read_squad(path: Path) -> Documents:
    """Questions that have an answer, and all paragraphs, of a file in SQuAD's form.

    ``{"data": [{"paragraphs": [{"context": …, "qas": [{"question": …, "answers": [{"text": …}]}]}]}]}``, with
    ``is_impossible`` as in version 2.0.

    Raises:
        TextError: another form; the message names the place.
    """
    source = shown(path)
    table = as_object(read_json(path, "a JSON object with SQuAD's data"), source)
    places: dict[str, int] = {}
    questions = []
    for i, article in enumerate(as_list(table.get("data"), f'{source} "data"')):
        name = f"{source} article {i}"
        paragraphs = as_list(as_object(article, name).get("paragraphs"), f'{name} "paragraphs"')
        for j, paragraph in enumerate(paragraphs):
            name = f"{source} article {i} paragraph {j}"
            row = as_object(paragraph, name)
            place = places.setdefault(text_of(row, "context", name), len(places))
            for entry in as_list(row.get("qas"), f'{name} "qas"'):
                asked = as_object(entry, f"{name} question")
                answers = [
                    text_of(as_object(answer, f"{name} answer"), "text", f"{name} answer")
                    for answer in as_list(asked.get("answers"), f'{name} "answers"')
                ]
                if answers and not asked.get("is_impossible"):
                    text = text_of(asked, "question", f"{name} question")
                    questions.append(Question(text, list(dict.fromkeys(answers)), [place]))
    return _documents(source, questions, list(places))


def read_hotpotqa(path: Path) -> Documents:
    """Questions and paragraphs of a file in HotpotQA's form: a list of ``question``, ``answer`` and ``context``.

    ``context`` is a list of ``[title, [sentence, …]]``. The paragraphs of a question are those with its answer.

    Raises:
        TextError: another form; the message names the place.
    """
    source = shown(path)
    places: dict[str, int] = {}
    questions = []
    for number, entry in enumerate(as_list(read_json(path, "a JSON array of HotpotQA's questions"), source)):
        name = f"{source} item {number}"
        row = as_object(entry, name)
        own = []
        for paragraph in as_list(row.get("context"), f'{name} "context"'):
            match paragraph:
                case [str() as title, [*sentences]] if all(isinstance(text, str) for text in sentences):
                    own.append(places.setdefault(f"{title}\n{''.join(sentences)}", len(places)))
                case _:
                    raise TextError(f'{name}: expected "context", a list of [title, [sentence, …]], got another list')
        answer = text_of(row, "answer", name)
        if answer and own:
            questions.append(Question(text_of(row, "question", name), [answer], list(dict.fromkeys(own))))
    return _documents(source, questions, list(places))


def _documents(source: str, questions: list[Question], documents: list[str]) -> Documents:
    if not questions:
        raise TextError(f"{source}: expected at least one question with an answer, got none")
    return Documents(questions, documents)


def _about_documents(task: str, generator: random.Random, units: int, ask: Ask) -> Made:
    data = ask.sources.documents[task]
    # another question for each record, until all were asked
    order = list(range(len(data.questions)))
    random.Random(f"{ask.seed} {task}").shuffle(order)
    question = data.questions[order[ask.index % len(order)]]
    own = set(question.documents)
    others = [number for number in range(len(data.documents)) if number not in own]
    chosen = generator.sample(others, len(others))[:units]
    texts = [data.documents[number] for number in chosen]
    if len(question.documents) == 1:
        texts.insert(place_of(ask.depth, texts), data.documents[question.documents[0]])
    else:
        texts = hide(texts, [(generator.uniform(0, 100), data.documents[number]) for number in question.documents])
    context = "\n\n".join(f"Document {number}:\n{text}" for number, text in enumerate(texts, 1))
    return Made(
        f"Answer the question from these documents. Give the answer alone.\n\n{context}",
        f"\n\nAnswer the question from the documents above. Give the answer alone.\n\nQuestion: {question.text}",
        " Answer:",
        question.answers,
    )


def _other_documents(task: str, ask: Ask) -> int:
    data = ask.sources.documents[task]
    return len(data.documents) - max(len(question.documents) for question in data.questions)


def document_task(task: str, has_depth: bool) -> Task:
    return Task(
        partial(_about_documents, task),
        "any",
        32,
        has_depth=has_depth,
        least=0,
        most=partial(_other_documents, task),
        needs=task,
    )
