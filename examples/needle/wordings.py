"""Word lists and wordings of the questions. Those for testing are never trained on."""

from __future__ import annotations

from typing import NamedTuple


class Needle(NamedTuple):
    """A statement of key ``k`` and value ``v``, a question about ``k``, and how its answer begins."""

    statement: str
    question: str
    lead: str = ""


class Fact(NamedTuple):
    """Ways to say something about person ``p``, and questions, each with the field that answers it.

    Fields: ``p``, ``q`` people, ``c`` city, ``y`` year, ``j`` trade, ``t`` thing, ``a`` animal, ``f`` food,
    ``m`` dollars, ``h`` time of day, ``s`` years.
    """

    statements: list[str]
    questions: list[tuple[str, str]]


def _words(text: str) -> list[str]:
    return text.split()


ADJECTIVES = _words(
    "quiet brave hidden golden ancient frozen clever gentle rusty hollow bright crimson dusty eager fancy giant "
    "humble jolly kind lucky mighty noble odd proud rapid shiny tiny vast wild young zesty bold calm deep early "
    "fierce grand happy icy keen"
)
NOUNS = _words(
    "apple river stone cloud tiger piano candle bridge garden rocket silver window forest dragon marble anchor "
    "butter copper desert engine falcon guitar hammer island jacket kettle ladder magnet needle orange pepper "
    "quartz ribbon saddle temple umbrella valley walnut yellow zipper canyon meadow harbor lantern pocket thunder "
    "velvet whistle"
)
FIRST_NAMES = _words(
    "Anna Boris Clara David Elena Frank Grace Henry Irene Jacob Karen Louis Maria Nathan Olga Peter Quentin Rosa "
    "Samuel Tanya Ursula Victor Wendy Xavier Yvonne Zoltan Amir Bianca Cedric Dora Emil Fatima Gustav Hanna Igor "
    "Julia Kofi Lena Marco Nadia"
)
LAST_NAMES = _words(
    "Abbott Bauer Castillo Dvorak Eriksen Fischer Gallo Hughes Ivanov Jensen Kovacs Larsen Moreau Novak Okafor "
    "Petrov Quinn Rossi Sanders Tanaka Ulrich Vargas Weber Xu Young Zimmer Ashford Brennan Corbin Dalton Ellery "
    "Farrow Garner Holloway Ingram Jarvis Keller Lowell Mercer Norwood"
)
CITIES = _words(
    "Lisbon Oslo Krakow Dublin Naples Geneva Bergen Toledo Ghent Riga Bilbao Cardiff Tartu Malmo Verona Leipzig "
    "Utrecht Basel Dresden Porto Salzburg Turku Bruges Seville Zagreb Split Tampere Lyon Nantes Trieste Aarhus "
    "Bremen Cork Dundee Exeter Florence Graz Halifax Izmir Kyoto"
)
TRADES = _words(
    "carpenter surgeon pilot baker violinist plumber geologist librarian tailor beekeeper translator welder florist "
    "dentist chemist fisherman journalist architect locksmith watchmaker potter farmer referee sculptor"
)
THINGS = _words(
    "telescope bicycle sailboat violin typewriter tractor chess-set microscope greenhouse motorcycle loom piano "
    "camera canoe printing-press sewing-machine"
)
ANIMALS = _words("parrot tortoise ferret goat donkey hedgehog falcon rabbit lizard pony goose hamster")
FOODS = _words(
    "pancakes lentils dumplings asparagus mushrooms herring apricots walnuts cinnamon garlic pumpkin rhubarb"
)

TRAIN_NEEDLES = [
    Needle("The secret code of {k} is {v}.", "What is the secret code of {k}?", "The secret code of {k} is"),
    Needle(
        "Please note that {k} has been given the number {v}.",
        "Which number has been given to {k}?",
        "The number given to {k} is",
    ),
    Needle("{k}: {v}.", "What stands behind {k} in the text?", "{k}:"),
    Needle('"{k}": "{v}",', 'Extract the value of the key "{k}" in the data above.', '"{k}":'),
    Needle(
        "The registration of {k} is {v}, as the office confirmed.",
        "Under what registration is {k} listed?",
        "It is listed as",
    ),
    Needle("Remember this: the password for {k} is {v}.", "What is the password for {k}?", "The password for {k} is"),
    Needle("For {k}, use the combination {v}.", "Which combination has to be used for {k}?", "Use"),
    Needle("The locker of {k} opens with {v}.", "How does the locker of {k} open?", "It opens with"),
    Needle("In the ledger {k} was entered as {v}.", "How was {k} entered in the ledger?", "{k} was entered as"),
    Needle("{k} = {v}", "What is the value of {k}?", "{k} ="),
    Needle("The account {k} holds reference {v}.", "Tell me the reference of the account {k}.", "Reference:"),
    Needle("A label on {k} reads {v}.", "What does the label on {k} read?", "The label reads"),
    Needle("Ticket {v} was issued to {k}.", "Which ticket was issued to {k}?", "The ticket issued to {k} is"),
    Needle("{v} is the serial number of {k}.", "Give the serial number of {k}."),
    Needle(
        "The answer to the riddle of {k} happens to be {v}.",
        "What is the answer to the riddle of {k}?",
        "The answer is",
    ),
    Needle("Dial {v} to reach {k}.", "What has to be dialled to reach {k}?", "Dial"),
    Needle("{k} was last seen with the tag {v}.", "With which tag was {k} last seen?", "With the tag"),
    Needle("Our contact {k} can be identified by {v}.", "By what can {k} be identified?"),
]
# the first one is RULER's
TEST_NEEDLES = [
    Needle(
        "One of the special magic numbers for {k} is: {v}.",
        "What is the special magic number for {k} mentioned in the provided text?",
        "The special magic number for {k} mentioned in the provided text is",
    ),
    Needle(
        "The vault belonging to {k} is unlocked by entering {v}.",
        "What must be entered to unlock the vault belonging to {k}?",
        "Enter",
    ),
    Needle("Shipment {v} is reserved for {k}.", "Which shipment is reserved for {k}?", "The shipment is"),
]
TRAIN_FACTS = [
    Fact(
        ["{p} was born in {c} in {y}.", "{p} came into the world in {y}, in the old quarter of {c}."],
        [("In which city did the life of {p} begin?", "c"), ("What is the birth year of {p}?", "y")],
    ),
    Fact(
        ["{p} earns a living as a {j}.", "By trade {p} is a {j}.", "{p} has been working as a {j} for years."],
        [("What is {p}'s profession?", "j"), ("What does {p} do for work?", "j")],
    ),
    Fact(
        ["{p} moved to {c} last spring.", "{p} has settled in {c}."],
        [("Where is the home of {p} now?", "c"), ("Which town does {p} live in?", "c")],
    ),
    Fact(
        ["{p} bought a {t} at an auction for {m} dollars.", "At a sale {p} paid {m} dollars for a {t}."],
        [("How much money did the purchase cost {p}?", "m"), ("What object does {p} own since the auction?", "t")],
    ),
    Fact(
        ["{p} keeps a {a} in the kitchen.", "A {a} lives in {p}'s house."],
        [("What kind of animal is the pet of {p}?", "a")],
    ),
    Fact(
        ["{p} married {q} in {y}.", "In {y} {q} and {p} exchanged rings."],
        [("Who is the spouse of {p}?", "q"), ("In what year did the wedding of {p} take place?", "y")],
    ),
    Fact(
        ["{p} cannot eat {f} without getting ill.", "Doctors told {p} to stay away from {f}."],
        [("What is {p} allergic to?", "f"), ("Which food is bad for {p}?", "f")],
    ),
    Fact(
        ["{p} studied in {c} under {q}.", "{q} taught {p} for years in {c}."],
        [("Who was the teacher of {p}?", "q"), ("Where did {p} go to school?", "c")],
    ),
    Fact(
        ["The train with {p} on board leaves from {c} at {h}.", "{p} departs from {c} at {h}."],
        [("When does {p} set off?", "h"), ("From which station does {p} start the journey?", "c")],
    ),
    Fact(
        ["{p} repaired the old {t} in {y}.", "In {y} the {t} was put back into service by {p}."],
        [("What did {p} fix?", "t"), ("When was the work of {p} finished?", "y")],
    ),
    Fact(
        ["{p} is older than {q} by {s} years.", "There are {s} years between {p} and the younger {q}."],
        [("By how many years do {p} and {q} differ in age?", "s")],
    ),
    Fact(
        ["{p} lost the keys somewhere in {c}.", "It was in {c} that {p} could no longer find the keys."],
        [("In which place did the keys of {p} go missing?", "c")],
    ),
    Fact(
        ["{p} donated {m} dollars to a hospital in {c}.", "A clinic in {c} received {m} dollars from {p}."],
        [("How large was the gift of {p}?", "m"), ("In what city is the institution that {p} supported?", "c")],
    ),
    Fact(
        ["{p} won the race ahead of {q}.", "{q} came second, just behind {p}."],
        [("Who was the runner-up to {p}?", "q")],
    ),
]
TEST_FACTS = [
    Fact(["{p} plays the {t} every Sunday in {c}."], [("On the day of rest, in which town can {p} be heard?", "c")]),
    Fact(
        ["{p} inherited {m} dollars from {q}."],
        [("Whose will made {p} richer?", "q"), ("What sum was left to {p}?", "m")],
    ),
    Fact(
        ["The firm of {p} was founded in {y} in {c}."],
        [
            ("When did the business of {p} start?", "y"),
            ("Where are the headquarters of the company that {p} runs?", "c"),
        ],
    ),
    Fact(["{p} trained as a {j} but never practised."], [("For which occupation did {p} learn?", "j")]),
    Fact(["{p} crossed the ocean together with {q}."], [("Who accompanied {p} on the voyage?", "q")]),
    Fact(["{p}'s favourite dish contains {f}."], [("Which ingredient does {p} love?", "f")]),
]
