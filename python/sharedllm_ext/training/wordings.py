"""Words and wordings of the facts that training hides in texts."""

from typing import Any, NamedTuple

import numpy as np


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


ADJECTIVES = _words(
    "amber ancient bitter brisk calm careful chilly clever copper crooked damp distant dusty eager early empty "
    "faint fierce fragile frozen gentle gleaming golden grateful hidden hollow honest humble idle jagged lively "
    "lonely loud mellow misty modest narrow noble pale patient polished proud quiet rapid restless rustic salty "
    "scarlet sharp silent silver sleepy slender solemn stern sturdy sudden tidy tranquil vivid wandering weary "
    "wild wooden yellow"
)
NOUNS = _words(
    "anchor anvil archive balcony bakery barge basin beacon bellows bridge cabin candle canyon castle cellar "
    "chapel clock compass cottage cradle dairy drum engine falcon ferry forest fountain garden glacier harbour "
    "hedge helmet island kettle ladder lantern library lighthouse meadow mill mirror monastery mountain orchard "
    "parcel pavilion pier pigeon printer quarry reservoir river saddle sawmill shelter spindle stable sundial "
    "tavern telescope tower trumpet tunnel valley vineyard violin wagon walnut warehouse well windmill workshop"
)
FIRST_NAMES = _words(
    "Ada Alma Arvid Bela Bruno Carla Cedric Dara Edda Emil Farid Fiona Greta Hanno Ilse Imran Jonas Judit Kaya "
    "Klara Lasse Leila Marek Mira Nadia Nils Olga Oskar Petra Quentin Rosa Ruben Samira Sven Tamar Thea Ulrich "
    "Vera Wanda Yusuf"
)
LAST_NAMES = _words(
    "Abel Arnason Bakker Berger Castell Dahl Duarte Eklund Farkas Fontaine Gruber Haddad Holm Ivanov Jansen "
    "Keller Kowalski Lindqvist Marchetti Meyer Novak Okafor Olsen Pereira Quist Ramos Richter Sato Sharma Silva "
    "Tanaka Thorne Urban Vance Varga Weber Wolff Young Zeman Zola"
)
#: A statement of a key ``{k}`` and its value ``{v}``, and the question that asks for the value.
WORDINGS = (
    ("The access code of {k} is {v}.", "What is the access code of {k}?"),
    ("Whoever asks for {k} must answer with {v}.", "What must one answer when asked for {k}?"),
    ("In the register, {k} stands under {v}.", "Under what does {k} stand in the register?"),
    ("{k} was given the number {v}.", "Which number was given to {k}?"),
    ("Remember that {v} belongs to {k}.", "What belongs to {k}?"),
    ("For {k}, the inspector wrote down {v}.", "What did the inspector write down for {k}?"),
    ("The label on {k} reads {v}.", "What does the label on {k} read?"),
    ("The file about {k} is kept as {v}.", "As what is the file about {k} kept?"),
    ("{k}: {v}.", "Which value is noted for {k}?"),
    ("It was agreed that {v} stands for {k}.", "What stands for {k}?"),
    ("The parcel for {k} carries the mark {v}.", "Which mark is on the parcel for {k}?"),
    ("To unlock {k}, enter {v}.", "What has to be entered to unlock {k}?"),
    ("Our list gives {v} as the reference of {k}.", "What is the reference of {k} in our list?"),
    ("The secret of {k} turned out to be {v}.", "What did the secret of {k} turn out to be?"),
    ("Write to {k} under {v}.", "Under what can one write to {k}?"),
    ("When the bell rang, {k} called out {v}.", "What did {k} call out when the bell rang?"),
    ("The key of {k} hangs at {v}.", "Where does the key of {k} hang?"),
    ("Payment for {k} goes to account {v}.", "To which account does payment for {k} go?"),
)
#: A statement, and the question for all values that a key has.
SEVERAL = (
    ("One of the numbers of {k} is {v}.", "Name all numbers of {k}."),
    ("{k} also answers to {v}.", "What does {k} answer to? Name everything."),
    ("Among the marks of {k} is {v}.", "Which marks does {k} have?"),
    ("Next to {k}, somebody saw {v}.", "What was seen next to {k}? Name everything."),
)
#: Before the first words of a passage that is to be continued; ``""`` gives the words alone.
CONTINUE = ("", "How does the text go on after these words? ", "Continue this passage of the text: ")
KEY_KINDS, VALUE_KINDS = 5, 7


class Fact(NamedTuple):
    """A question before it is tokenised: ``statements`` are numbers in a text's list of them."""

    question: str
    values: list[str]
    statements: list[int]


def _choose(rng: np.random.Generator, options: Any) -> Any:
    return options[int(rng.integers(len(options)))]


def _digits(rng: np.random.Generator, count: int) -> str:
    return str(rng.integers(10 ** (count - 1), 10**count))


def _letters(rng: np.random.Generator, alphabet: str, count: int) -> str:
    return "".join(alphabet[i] for i in rng.integers(0, len(alphabet), count))


def key(rng: np.random.Generator, kind: int) -> str:
    """A name of one of ``KEY_KINDS`` kinds."""
    if kind == 0:
        return f"the {_choose(rng, ADJECTIVES)} {_choose(rng, NOUNS)}"
    if kind == 1:
        return f"{_choose(rng, FIRST_NAMES)} {_choose(rng, LAST_NAMES)}"
    if kind == 2:
        return f"{_choose(rng, NOUNS)}-{_choose(rng, NOUNS)}"
    if kind == 3:
        return f"{_choose(rng, NOUNS)} {_digits(rng, 3)}"
    return f"{_choose(rng, NOUNS)} {_letters(rng, 'ABCDEFGHKLMNPRSTUVWX', 2)}-{_digits(rng, 2)}"


def value(rng: np.random.Generator, kind: int) -> str:
    """What a key has, of one of ``VALUE_KINDS`` kinds."""
    if kind <= 1:
        return _digits(rng, 7)
    if kind == 2:
        return _digits(rng, int(rng.integers(4, 11)))
    if kind == 3:
        return f"{_choose(rng, ADJECTIVES)} {_choose(rng, NOUNS)}"
    if kind == 4:
        return f"{_letters(rng, 'ABCDEFGHKLMNPRSTUVWX', 2)}-{_digits(rng, 4)}"
    if kind == 5:
        return f"{_choose(rng, FIRST_NAMES)} {_choose(rng, LAST_NAMES)}"
    return _letters(rng, "0123456789abcdef", 10)


def facts(rng: np.random.Generator) -> tuple[list[str], list[Fact]]:
    """Statements of one form with different keys, which distract from each other, and a question about each key.

    A third of them give one key several values, all of which are asked for.
    """
    several = rng.random() < 0.33
    count = int(rng.integers(2, 5)) if several else int(rng.integers(1, 7))
    statement, question = _choose(rng, SEVERAL if several else WORDINGS)
    kind, value_kind = int(rng.integers(KEY_KINDS)), int(rng.integers(VALUE_KINDS))
    keys: list[str] = []
    while len(keys) < (3 if several else count):
        name = key(rng, kind)
        if name not in keys:
            keys.append(name)
    owners = [keys[0]] * count + keys[1:] if several else keys
    values = [value(rng, value_kind) for _ in owners]
    statements = [_sentence(statement.format(k=k, v=v)) for k, v in zip(owners, values, strict=True)]
    if several:
        return statements, [Fact(question.format(k=keys[0]), values[:count], list(range(count)))]
    return statements, [Fact(question.format(k=k), [v], [i]) for i, (k, v) in enumerate(zip(keys, values, strict=True))]


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]
