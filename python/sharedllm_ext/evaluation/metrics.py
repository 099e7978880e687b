"""Scores of predictions, from 0 to 1, as RULER, LongBench and InfiniteBench compute them."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

from sharedllm_ext.evaluation.records import Record

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_NUMBER = re.compile(r"\d+")
_DECIMAL = re.compile(r"\d+\.\d+|\d+")
_SIGNED = re.compile(r"-?\d+")
_ROUGE_WORD = re.compile(r"[a-z0-9]+")
_V2_CHOICE = re.compile(r"The correct answer is \(?([A-D])")
_CHOICE_PREFIXES = ("answer is:", "answer:", "answer is", "option is")
_CODE_PREFIXES = ("correct option is:", "answer is:", "answer:", "is:")


def normal_words(text: str) -> list[str]:
    """Words in lower case, without ASCII punctuation and the articles a, an, the (SQuAD's normalisation)."""
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def _same_number(first: str, second: str) -> bool:
    """Whether two runs of digits, however long, are the same number."""
    return first.lstrip("0") == second.lstrip("0")


def f1_of_words(prediction: Sequence[str], answer: Sequence[str]) -> float:
    """``2 P R / (P + R)`` over words as often as they come; 0 where no word is shared."""
    shared = sum((Counter(prediction) & Counter(answer)).values())
    return 2 * shared / (len(prediction) + len(answer)) if shared else 0.0


def token_f1(prediction: str, answer: str) -> float:
    """F1 of the normalised words (SQuAD)."""
    return f1_of_words(normal_words(prediction), normal_words(answer))


def common_length(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence of two sequences; a string is one of characters."""
    places: dict[str, int] = {}
    for i, item in enumerate(first):
        places[item] = places.get(item, 0) | 1 << i
    everything = (1 << len(first)) - 1
    # bit i is 0 where the row of the dynamic programme grows from i to i + 1 (Hyyrö 2004)
    row = everything
    for item in second:
        matches = row & places.get(item, 0)
        row = ((row + matches) | (row - matches)) & everything
    return len(first) - row.bit_count()


def text_ratio(prediction: str, answer: str) -> float:
    """``2 LCS / (len + len)`` over characters, in whole per cent: the "ratio" of fuzzy string packages, over 100."""
    total = len(prediction) + len(answer)
    return round(100 * 2 * common_length(prediction, answer) / total) / 100 if total else 0.0


def _common_places(reference: Sequence[str], candidate: Sequence[str], *, up_on_ties: bool) -> set[int]:
    """Places in ``reference`` of one longest common subsequence; ties between two of them go up or left."""
    rows, columns = len(reference), len(candidate)
    table = [[0] * (columns + 1) for _ in range(rows + 1)]
    for i in range(rows):
        above, row = table[i], table[i + 1]
        for j in range(columns):
            row[j + 1] = above[j] + 1 if reference[i] == candidate[j] else max(above[j + 1], row[j])
    places: set[int] = set()
    i, j = rows, columns
    while i and j:
        up, left = table[i - 1][j], table[i][j - 1]
        if reference[i - 1] == candidate[j - 1]:
            places.add(i - 1)
            i, j = i - 1, j - 1
        elif up > left or (up_on_ties and up == left):
            i -= 1
        else:
            j -= 1
    return places


def rouge_l(prediction: str, answer: str) -> float:
    """ROUGE-L over different words, as the package ``rouge`` counts for LongBench.

    Sentences end with a full stop and words with a space; each word counts once. Recall and precision are the words of
    the longest common subsequences of all pairs of sentences, over those of the answer and of the prediction.
    """

    def sentences(text: str) -> list[list[str]]:
        # a part of white space alone counts as one empty word there
        return [" ".join(part.split()).split(" ") for part in text.split(".") if part]

    candidates, references = sentences(prediction), sentences(answer)
    said = {word for sentence in candidates for word in sentence}
    wanted = {word for sentence in references for word in sentence}
    shared = {
        reference[place]
        for reference in references
        for candidate in candidates
        for place in _common_places(reference, candidate, up_on_ties=False)
    }
    return 2 * len(shared) / (len(said) + len(wanted)) if shared else 0.0


def rouge_lsum(prediction: str, answer: str) -> float:
    """ROUGE-Lsum F1 over runs of a-z and 0-9 in lower case, lines being sentences, without a stemmer.

    Of each line of the answer the words count that are in the longest common subsequence with any line of the
    prediction, no word more often than either text holds it.
    """

    def lines(text: str) -> list[list[str]]:
        return [_ROUGE_WORD.findall(line.lower()) for line in text.split("\n") if line]

    candidates, references = lines(prediction), lines(answer)
    left = Counter(word for line in candidates for word in line)
    also = Counter(word for line in references for word in line)
    total = left.total() + also.total()
    hits = 0
    for reference in references:
        places: set[int] = set()
        for candidate in candidates:
            places |= _common_places(reference, candidate, up_on_ties=True)
        for place in sorted(places):
            word = reference[place]
            if left[word] > 0 and also[word] > 0:
                hits += 1
                left[word] -= 1
                also[word] -= 1
    return 2 * hits / total if total else 0.0


def _best(one: Callable[[str, str], float]) -> Callable[[Record, str], float]:
    """The best over the answers."""

    def score(record: Record, prediction: str) -> float:
        return max((one(prediction, answer) for answer in record.answers), default=0.0)

    return score


def part_of_answers(record: Record, prediction: str) -> float:
    """Share of the answers contained in the prediction, ignoring case (RULER)."""
    found = sum(answer.lower() in prediction.lower() for answer in record.answers)
    return found / len(record.answers)


def any_answer(record: Record, prediction: str) -> float:
    """Whether the prediction contains one of the answers, ignoring case (RULER's question answering)."""
    return float(any(answer.lower() in prediction.lower() for answer in record.answers))


def classification(prediction: str, answer: str, classes: Sequence[str]) -> float:
    """1 over the number of classes that the prediction names, if the right one is among them (LongBench).

    A class whose name is a part of the right one's is not counted against it.
    """
    named = [name for name in classes if name in prediction and (name == answer or name not in answer)]
    return 1 / len(named) if answer in named else 0.0


def _class_of_all(record: Record, prediction: str) -> float:
    classes = record.all_classes or []
    return max((classification(prediction, answer, classes) for answer in record.answers), default=0.0)


def count(prediction: str, answer: str) -> float:
    """Share of the prediction's numbers that are the answer (LongBench)."""
    numbers = _NUMBER.findall(prediction)
    return numbers.count(answer) / len(numbers) if numbers else 0.0


def paragraph(prediction: str, answer: str) -> float:
    """Share of the prediction's numbers that are the one in the answer ``Paragraph 7`` (LongBench)."""
    number = re.search(r"(?:Paragraph |段落)(\d+)", answer)
    return count(prediction, number[1]) if number else 0.0


def code_similarity(prediction: str, answer: str) -> float:
    """:func:`text_ratio` of the first line that has neither a back-tick nor the mark of a comment (LongBench)."""
    for line in prediction.lstrip("\n").split("\n"):
        if not any(mark in line for mark in ("`", "#", "//")):
            return text_ratio(line, answer)
    return 0.0


def choice_v2(prediction: str, answer: str) -> float:
    """Whether the prediction says ``The correct answer is (B)``, with or without brackets or asterisks."""
    found = _V2_CHOICE.search(prediction.replace("*", ""))
    return float(found is not None and found[1] == answer)


def first_number(prediction: str, answer: str) -> float:
    """Whether the first run of digits is the answer (InfiniteBench: number and pass-key)."""
    found = _NUMBER.search(prediction)
    return float(found is not None and found[0] == answer)


def among_words(prediction: str, answer: str) -> float:
    """Whether the answer is a word of the prediction, once newline and ``: " ' . , ? ! { }`` are spaces."""
    return float(answer in re.sub(r"""[\n:"'.,?!{}]""", " ", prediction).split())


def name_among_words(prediction: str, answer: str) -> float:
    """:func:`among_words`, all in capitals (InfiniteBench: dialogue)."""
    return among_words(prediction.upper(), answer.upper())


def multiple_choice(record: Record, prediction: str) -> float:
    """Answers ``[text, letter]``: the first character, the exact text, what follows "answer is", a lone letter.

    The first of these that the prediction has decides (InfiniteBench: En.MC).
    """
    text, letter = record.answers
    prediction = prediction.strip()
    if not prediction:
        return 0.0
    if prediction[0] in "ABCD":
        return float(prediction[0] == letter)
    if prediction == text:
        return 1.0
    plain = " ".join(re.sub(r"""["'.,?!{}\n]""", " ", prediction).split())
    for prefix in _CHOICE_PREFIXES:
        place = plain.find(prefix)
        if place >= 0:
            rest = plain[place + len(prefix) :].strip()
            if rest:
                return float(rest.startswith((letter, text)))
    lone = re.search(r"\b[A-D]\b", plain)
    return float(lone is not None and lone[0] == letter)


def math_find(prediction: str, answer: str) -> float:
    """The first number of the prediction, without its sign, against the label: as whole ones if the label is one."""
    found = _DECIMAL.search(prediction)
    if found is None:
        return 0.0
    if _SIGNED.fullmatch(answer.strip()):
        return float(_same_number(found[0].partition(".")[0], answer.strip().lstrip("-")))
    return float(float(found[0]) == abs(float(answer)))


def code_debug(record: Record, prediction: str) -> float:
    """Answers ``[name, letter]``: the last lone A-J, else a begin, or what follows "answer is:" (Code.Debug)."""
    name, letter = record.answers
    lone = re.findall(r"\b[A-J]\b", prediction)
    if lone and lone[-1] == letter:
        return 1.0
    plain = " ".join(re.sub(r"[\n`'\"*-]|[Oo]ption", " ", prediction).split())
    if plain.startswith((letter, name)):
        return 1.0
    for prefix in _CODE_PREFIXES:
        place = plain.find(prefix)
        if place >= 0:
            return float(plain[place + len(prefix) :].strip().startswith((letter, name)))
    return 0.0


def last_whole_number(prediction: str, answer: str) -> float:
    """Whether the last word is the answer, a whole number (InfiniteBench: Code.Run)."""
    words = re.sub(r"""[\n.`'":]""", " ", prediction).split()
    if not words or not _SIGNED.fullmatch(words[-1]):
        return 0.0
    same = _same_number(words[-1].lstrip("-"), answer.lstrip("-"))
    return float(same and words[-1].startswith("-") == answer.startswith("-"))


def right_begin(record: Record, prediction: str) -> float:
    """Share of the list of numbers that the prediction's numbers give before the first wrong one (Math.Calc)."""
    said = _NUMBER.findall(prediction)
    right = 0
    for number, answer in zip(said, record.answers, strict=False):
        if not _same_number(number, answer.lstrip("-")):
            break
        right += 1
    return right / len(record.answers)


#: Metrics by name: each takes a record and a prediction and gives 0 to 1.
METRICS: dict[str, Callable[[Record, str], float]] = {
    "part": part_of_answers,
    "any": any_answer,
    "f1": _best(token_f1),
    "rouge_l": _best(rouge_l),
    "rouge_lsum": _best(rouge_lsum),
    "classification": _class_of_all,
    "paragraph": _best(paragraph),
    "count": _best(count),
    "code_similarity": _best(code_similarity),
    "choice_v2": _best(choice_v2),
    "first_number": _best(first_number),
    "among_words": _best(among_words),
    "name_among_words": _best(name_among_words),
    "multiple_choice": multiple_choice,
    "math_find": _best(math_find),
    "code_debug": code_debug,
    "last_whole_number": _best(last_whole_number),
    "right_begin": right_begin,
}


def score(record: Record, prediction: str) -> float:
    """The record's metric for one prediction, from 0 to 1.

    Where the record says so, only the first line counts that is not empty.
    """
    if record.first_line:
        prediction = prediction.lstrip("\n").split("\n")[0]
    return METRICS[record.metric](record, prediction)
