"""Wordings for training. The test's are in ``test_wordings.py``, written by someone who had not seen these.

NEEDLES: (statement, question, lead); {k} is a key, {v} its value.
SEVERAL: (statement, question on one {k}, lead, question on several {ks}, lead).
LIST_ALL: (statement, question for every value, lead); one statement per {v}.
FACTS: relations, each with paraphrased statements and (question, answered field).
SYNONYM_QA: (statement, question, answer), without placeholders.
LISTS: values of each field; a person (p, q) is a "first" and a "last" name; m, n, y, h are made elsewhere.
ADJECTIVES, NOUNS: a key is one of each.
"""

from __future__ import annotations

from typing import Any

from word_lists import listed

NEEDLES = [
    (
        "NOTICE: anyone signing in at {k} must quote {v} to the duty officer.",
        "What does a visitor have to say at {k}?",
        "At {k} one has to say",
    ),
    (
        "The safe behind the counter of {k} answers only to {v}.",
        "Which combination does the strongbox of {k} want?",
        "The combination of {k} is",
    ),
    ('"terminal": "{k}", "pin": "{v}", "active": true', "What would I type to get into {k}?", "For {k} you type"),
    ("{k},{v},2,checked", "What is recorded for {k}?", "For {k} the record shows"),
    (
        "[{k}]\npassphrase = {v}\ntimeout = 30",
        "With which secret does one authenticate against {k}?",
        "The secret of {k} is",
    ),
    ("2024-03-11 04:12:09 INFO auth: {k} presented token {v}, accepted", "Which credential did {k} use?", "{k} used"),
    (
        '"And the padlock on {k}?" he asked. "Try {v}," she whispered.',
        "What undoes the lock of {k}?",
        "The lock of {k} is undone by",
    ),
    (
        "Dear Miriam, should you ever need to reach {k}, ask the operator for {v}.",
        "How can {k} be contacted?",
        "To contact {k}, ask for",
    ),
    (
        "# do not change: {k} was hard-wired to {v} by the previous vendor",
        "What did the earlier supplier fix {k} at?",
        "{k} is fixed at",
    ),
    (
        "Grandmother called her secret spice blend {k}; on the tin she had pencilled {v}.",
        "What had been scribbled on the container of {k}?",
        "The container of {k} reads",
    ),
    (
        "Ledger, folio 9: received on account of {k}, marked {v}, no further claim.",
        "Under which mark was the payment for {k} entered?",
        "The mark for {k} is",
    ),
    (
        "The magistrate assigned the matter of {k} the docket {v}.",
        "Which file reference does the court keep for {k}?",
        "The reference for {k} is",
    ),
    (
        "For warranty claims about the {k} give the serial {v}.",
        "How is the {k} identified to the manufacturer?",
        "The serial is",
    ),
    ("Locker of {k}: {v}.", "Where does {k} keep their belongings?", "{k} uses locker"),
    ("The tag sewn into the coat of {k} reads {v}.", "What is stitched inside {k}'s garment?", "The tag says"),
    (
        "Radio check: {k}, your call sign until midnight is {v}, over.",
        "By what name does {k} go on the air tonight?",
        "{k} goes by",
    ),
    (
        "Everybody in the guild knows that {k} is slang for {v}.",
        "What do the members really mean when they talk of {k}?",
        "By {k} they mean",
    ),
    (
        "In the crossword, the setter clued {k} and the solution was {v}.",
        "What had to be filled in for {k}?",
        "The entry for {k} was",
    ),
    ('const RETRY_KEY_FOR = lookup("{k}"); // always yields {v}', "What comes back when {k} is queried?", "{k} gives"),
    (
        "The archivist filed the papers of {k} under {v}.",
        "Which shelfmark do I need to find the documents of {k}?",
        "The shelfmark for {k} is",
    ),
    ("| {k} | {v} | approved |", "What stands next to {k} in the table?", "Next to {k} stands"),
    ("When the parrot hears {k}, it shrieks {v}.", "How does the bird respond to {k}?", "It answers"),
    (
        "If the caller says {k}, you reply {v} and open the gate.",
        "What is the countersign to {k}?",
        "The countersign is",
    ),
    ("The wifi at {k} wants {v}.", "How do I get online at {k}?", "At {k}, enter"),
    (
        "Bus driver to dispatcher: passenger {k} left a parcel, sticker says {v}.",
        "What label was on the package forgotten by {k}?",
        "The label was",
    ),
    (
        "Order confirmation. Customer: {k}. Your reference: {v}. Please keep this mail.",
        "Which number should {k} quote when asking about the purchase?",
        "{k} should quote",
    ),
    ("ERROR 0x1f: checksum of {k} expected to equal {v}.", "What hash ought {k} to have?", "It ought to be"),
    ("The lighthouse keeper noted that {k} flashes the sequence {v}.", "How does {k} signal to ships?", "{k} signals"),
    ('Recipe card no. 12, "{k}". Oven setting: {v}.', "How should one adjust the stove for {k}?", "For {k}, set it to"),
    (
        "The frequency of station {k} was moved to {v} last spring.",
        "Where on the dial can listeners find {k} now?",
        "{k} is found at",
    ),
    ("Among the twins, {k} answers to the nickname {v}.", "What do friends call {k}?", "They call {k}"),
    ("The museum labels {k} as exhibit {v}.", "Under which designation is {k} on display?", "{k} is shown as"),
    ("Lot {k} went under the hammer with paddle {v}.", "Which bidder carried off {k} at the auction?", "It was paddle"),
    ("export LICENSE_{k}={v}", "What is the licence of {k} set to?", "It is set to"),
    ("The invoice to {k} bears the stamp {v}.", "How was the bill addressed to {k} marked?", "It was marked"),
    (
        "My great-uncle bred a rose, named it {k}, and registered it as {v}.",
        "Under what entry was the flower {k} recorded?",
        "It was recorded as",
    ),
    (
        "To whom it may concern: employee {k} holds badge {v}.",
        "Which pass does the staff member {k} wear?",
        "{k} wears",
    ),
    (
        'The chalkboard said "{k} = {v}", and nobody dared wipe it off.',
        "What did somebody write about {k} for all to see?",
        "It said that {k} equals",
    ),
    (
        "Sample {k}, tray four: reading {v}, repeat not required.",
        "What did the lab measure for {k}?",
        "The lab measured",
    ),
    (
        "Gate agent: flight for {k} boards with group {v}.",
        "When the plane fills up, which batch is {k} in?",
        "{k} is in",
    ),
    ('<meta name="{k}" content="{v}">', "What does the page header declare for {k}?", "It declares"),
    (
        "He engraved on the ring of {k} nothing but {v}.",
        "What can be read on the jewel that belongs to {k}?",
        "One reads",
    ),
    ("-- migration note: account {k} now maps to {v}", "What has {k} been replaced by in the database?", "{k} became"),
    (
        "Should the alarm at {k} go off, punch in {v} within thirty seconds.",
        "How is the siren of {k} silenced?",
        "By entering",
    ),
    ("The tailor's slip for {k} shows the measure {v}.", "What size has been taken for {k}?", "For {k} it is"),
    (
        "Under the floorboard of {k} we found a slip of paper with {v} on it.",
        "What was hidden beneath {k}?",
        "A note saying",
    ),
    ("The oracle was asked about {k}, and uttered {v}.", "What was prophesied about {k}?", "The prophecy was"),
    (
        '"Remind me," said the captain, "how is {k} spelled in cipher?" - "{v}, sir."',
        "What is the encrypted form of {k}?",
        "It is",
    ),
    ("Meter at {k}, read by contractor: {v}.", "What did the gauge at {k} show?", "It showed"),
    ("Please forward all mail of {k} to box {v}.", "Where should letters for {k} be sent?", "They go to box"),
    ("Prescription for {k}: dispense batch {v}, twice daily.", "Which lot of medicine is {k} to be given?", "Batch"),
    (
        "The choir's piece {k} carries the catalogue mark {v}.",
        "How do scholars cite the composition {k}?",
        "They cite it as",
    ),
    ('assert resolve("{k}") == "{v}"', "What must {k} evaluate to for the test to pass?", "It must give"),
    (
        "Parking permit of {k}: {v}, windscreen left.",
        "What is on the sticker that lets {k} leave the car there?",
        "It reads",
    ),
    (
        "The ferryman takes nobody to {k} who cannot say {v}.",
        "What must a traveller know to be rowed over to {k}?",
        "One must say",
    ),
    (
        "Item returned by {k}; restocked as {v}.",
        "What did the goods {k} brought back become in the store?",
        "They became",
    ),
    ("Session {k} closed, exit status {v}.", "How did {k} end?", "It ended with"),
    ("Genealogists trace {k} to parish entry {v}.", "Where in the church book does {k} appear?", "At"),
    ("Vote tally sheet: {k} - {v}. Signed, two observers.", "How was {k} counted?", "The count reads"),
    ("In our phone tree, extension {v} rings at the desk of {k}.", "What do I dial for {k}?", "For {k}, dial"),
    ("Only {v} will start the engine of {k}.", "What gets {k} running?", "It takes"),
    (
        "{v} is what the plaque beneath {k} says, in letters of brass.",
        "What inscription belongs to {k}?",
        "The inscription is",
    ),
    (
        "As agreed, {v} will be the cue for {k} to walk on stage.",
        "On what signal does {k} make an entrance?",
        "The signal is",
    ),
    ("We parked the prototype called {k} in hangar {v}.", "Where does the experimental craft {k} stand?", "In hangar"),
    ("The seed packet {k} has {v} printed on its underside.", "What is at the bottom of {k}?", "It says"),
    ("ticket={k};seat={v};class=2", "Where does the holder of {k} sit?", "The seat is"),
    (
        "The bishop's letter to {k} was sealed with the words {v}.",
        "Which motto closed the message for {k}?",
        "The motto",
    ),
    ("User {k} chose the security answer {v}.", "What would prove to support staff that one is {k}?", "The answer"),
    ("Colour chip {k} is mixed after formula {v}.", "What does the paint shop follow to make {k}?", "Formula"),
    ("Today's soup password, for {k} only: {v}.", "What lets {k} eat for free?", "The word is"),
    ("In this edition, footnote on {k}: see {v}.", "Which place does the book point to about {k}?", "It points to"),
    ("DHCP lease: host {k} got {v} for 24h.", "What address was handed to {k}?", "It got"),
    ("Whoever repairs {k} needs the part {v}.", "Which spare is required for mending {k}?", "The spare is"),
    ("My sister's diary hides the name {k} behind the word {v}.", "How is {k} disguised in the journal?", "As"),
    ("The umpire's card puts {k} down as {v}.", "What did the referee write for {k}?", "The referee wrote"),
    ("Customs form, declared by {k}: tariff heading {v}.", "How did {k} classify the goods at the border?", "As"),
    ("Lab notebook, p. 41: clone {k} sits in freezer slot {v}.", "Where is {k} kept cold?", "In slot"),
    ("The old map marks {k} with the sign {v}.", "Which symbol stands for {k} on the chart?", "The sign"),
    (
        "Chess club: the opening {k} is listed as {v} in our handbook.",
        "What is {k} called in the players' manual?",
        "It is called",
    ),
    ("Two taps, then {v}: that is how you let {k} know it is you.", "By what does {k} recognise a friend?", "By"),
    ("WARNING: firmware {k} is incompatible with everything but {v}.", "What works together with {k}?", "Only"),
    (
        "For the drink named {k}, the bartender rings up {v}.",
        "What is keyed into the till when somebody orders {k}?",
        "The bartender keys in",
    ),
    ("The treaty refers to {k} throughout as {v}.", "What do the signatories call {k}?", "They call it"),
    ("Crew list: {k}, bunk {v}, watch two.", "Where does {k} sleep on board?", "In bunk"),
    ('git tag -a {v} -m "release of {k}"', "Which label did the version of {k} receive?", "The label"),
    ("Sticky note on the monitor: {k} -> {v}", "What does the yellow slip say about {k}?", "It says"),
    ("The blind piano tuner remembers {k} by {v}.", "What helps him recall {k}?", "It is"),
    ("The quartermaster issued {k} a rifle stamped {v}.", "What is punched into the weapon {k} carries?", "It reads"),
    ('"{k}" (n., dialect): {v}.', "How does the dictionary gloss {k}?", "The gloss is"),
    ("The auditor could match {k} only with voucher {v}.", "Which receipt covers {k}?", "The receipt"),
]

SEVERAL = [
    (
        "The {k} cupboard also opens with {v}.",
        "What are all the combinations that work for {k}?",
        "For {k} these work:",
        "What are all the combinations that work for {ks}?",
        "These work:",
    ),
    (
        "One of the codes given out for {k} is {v}.",
        "List every code that was handed out for {k}.",
        "The codes for {k} are",
        "List every code that was handed out for {ks}.",
        "The codes are",
    ),
    (
        "Visitor pass {v} was printed in the name of {k}.",
        "Which badges were issued to {k}?",
        "{k} was issued",
        "Which badges were issued to {ks}?",
        "The badges are",
    ),
    (
        "{k} was seen at checkpoint {v}.",
        "Through which control posts did {k} come?",
        "{k} came through",
        "Through which control posts did {ks} come?",
        "They came through",
    ),
    (
        "log: device {k} emitted {v}",
        "What did {k} send out, all in all?",
        "{k} sent",
        "What did {ks} send out, all in all?",
        "They sent",
    ),
    (
        "Auction book: {k} took home {v}.",
        "What has {k} bought under the hammer?",
        "{k} bought",
        "What have {ks} bought under the hammer?",
        "They bought",
    ),
    (
        "In the margin someone had noted: {k}, cf. {v}.",
        "Which cross-references exist for {k}?",
        "For {k} there are",
        "Which cross-references exist for {ks}?",
        "There are",
    ),
    (
        "The warehouse holds, under {k}, a crate marked {v}.",
        "Which boxes are stored for {k}?",
        "For {k} they store",
        "Which boxes are stored for {ks}?",
        "They store",
    ),
    (
        "Account {k} was debited, slip {v}.",
        "Give all the vouchers charged to {k}.",
        "Charged to {k}:",
        "Give all the vouchers charged to {ks}.",
        "Charged:",
    ),
    (
        "Patient {k}: vial {v} drawn.",
        "Which blood samples came from {k}?",
        "From {k} came",
        "Which blood samples came from {ks}?",
        "There came",
    ),
    (
        "{k};{v};ok",
        "Name everything on record for {k}.",
        "On record for {k}:",
        "Name everything on record for {ks}.",
        "On record:",
    ),
    (
        "Letter {v} was delivered into the hands of {k}.",
        "What mail did {k} receive?",
        "{k} received",
        "What mail did {ks} receive?",
        "They received",
    ),
    (
        '"Another of the aliases of {k} is {v}," the inspector said.',
        "Under which false names did {k} go?",
        "{k} went by",
        "Under which false names did {ks} go?",
        "They went by",
    ),
    (
        "Locker {v} belongs to team {k}.",
        "Which lockers may the members of {k} use?",
        "{k} may use",
        "Which lockers may the members of {ks} use?",
        "They may use",
    ),
    (
        "# {k}: add {v} to the allow list",
        "What has been permitted for {k}?",
        "Permitted for {k}:",
        "What has been permitted for {ks}?",
        "Permitted:",
    ),
    (
        "Seat {v} is set aside for the guests of {k}.",
        "Where can the party of {k} sit?",
        "The party of {k} has",
        "Where can the parties of {ks} sit?",
        "They have",
    ),
    (
        "The gardener labelled a cutting of {k} with {v}.",
        "Which tags hang on the offshoots of {k}?",
        "On {k} hang",
        "Which tags hang on the offshoots of {ks}?",
        "There hang",
    ),
    (
        "Flight {v} was chartered by {k}.",
        "Which planes did {k} hire?",
        "{k} hired",
        "Which planes did {ks} hire?",
        "They hired",
    ),
    (
        "Ticket {v} reports a fault in {k}.",
        "Under which numbers have problems with {k} been filed?",
        "For {k}:",
        "Under which numbers have problems with {ks} been filed?",
        "They are",
    ),
    (
        "{v} can be substituted wherever the manual asks for {k}.",
        "What are the replacements for {k}?",
        "{k} can be replaced by",
        "What are the replacements for {ks}?",
        "The replacements are",
    ),
    (
        "A witness against {k} testified under the cover name {v}.",
        "Who spoke in court against {k}?",
        "Against {k} spoke",
        "Who spoke in court against {ks}?",
        "There spoke",
    ),
]

LIST_ALL = [
    ("The inspector wrote down plate {v}.", "Which registration numbers were noted?", "The numbers noted were"),
    ("One of the winning tickets is {v}.", "Name every ticket that won.", "The winners are"),
    ("Also on the guest list: {v}.", "Who or what was invited? Give all.", "Invited:"),
    ("Ward round: bed {v} may go home.", "Which patients' places are being discharged?", "To be discharged:"),
    ("build.log: skipped target {v}", "List all the targets that were left out.", "Left out:"),
    ("The cook crossed {v} off the menu.", "What can no longer be ordered?", "One can no longer order"),
    ("The censor struck out the word {v}.", "Which expressions were deleted?", "The deleted expressions:"),
    (
        "Washed ashore this morning: a bottle holding the message {v}.",
        "What did the papers found on the beach say?",
        "They said",
    ),
    ("Recall: batch {v} must not be sold.", "What has been withdrawn from the shops?", "Withdrawn:"),
    (
        "A knife has left the carving {v} on one of the orchard trees.",
        "What has been cut into the bark?",
        "Cut into the bark:",
    ),
    ('quarantine += "{v}"', "What has been isolated so far?", "Isolated:"),
    ("The twins swore by the secret word {v}.", "Tell me all the secret words in the text.", "The secret words are"),
    ("Missing from the inventory: {v}.", "What could not be found at stocktaking?", "Not found:"),
    ("Paid in full: invoice {v}.", "Which bills are settled?", "Settled:"),
    ("The chairwoman read out the name {v} as a candidate.", "Who is standing for election?", "The candidates:"),
]

FACTS: list[dict[str, Any]] = [
    {
        "statements": [
            "{p} runs the veterinary practice near the {c} fairground.",
            "The vet who took over the surgery by the {c} fairground is {p}.",
            "In {c}, beside the fairground, {p} practises veterinary medicine.",
        ],
        "questions": [
            ("Who looks after sick animals in {c}?", "p"),
            ("Whose job is healing pets?", "p"),
            ("Who would I call if my dog were hurt in {c}?", "p"),
            ("Where does {p} treat cats and horses?", "c"),
            ("In which town could I have my hamster healed?", "c"),
        ],
    },
    {
        "statements": [
            "Milk makes {p} sick.",
            "After so much as a drop of milk {p} feels ill.",
            "{p} gets stomach cramps from milk and cheese.",
        ],
        "questions": [
            ("Who cannot tolerate dairy?", "p"),
            ("Who is lactose intolerant?", "p"),
            ("For whom should the cream be left out?", "p"),
            ("Which guest ought to avoid yoghurt?", "p"),
        ],
    },
    {
        "statements": [
            "{p} has a tattoo of the {a} on the left shoulder.",
            "There is the {a} inked into {p}'s left shoulder.",
            "{p} had the {a} tattooed on one shoulder by a sailor.",
        ],
        "questions": [
            ("Whose skin carries a picture?", "p"),
            ("Which creature is drawn on {p}'s body?", "a"),
            ("What animal does somebody wear under the shirt for good?", "a"),
            ("Who has a {a} that will never wash off?", "p"),
        ],
    },
    {
        "statements": [
            "{p} came into the world in {c} during the winter of {y}.",
            "In {y}, one cold night, {p}'s mother gave birth in {c}.",
            "{p} is a child of {c}, delivered by a midwife in {y}.",
        ],
        "questions": [
            ("What is the native town of {p}?", "c"),
            ("When does {p}'s life begin?", "y"),
            ("Where was {p} born?", "c"),
            ("From which year on is {p}'s age counted?", "y"),
        ],
    },
    {
        "statements": [
            "The lungs of {p} gave out, and the funeral was held in {d} in {y}.",
            "{p} was buried in {d} in {y}.",
            "In {y} mourners in {d} carried {p}'s coffin to the churchyard.",
        ],
        "questions": [
            ("When did {p} die?", "y"),
            ("Where is the grave of {p}?", "d"),
            ("In which place do the remains of {p} lie?", "d"),
            ("Who passed away in {y}?", "p"),
            ("Whose death is mentioned?", "p"),
        ],
    },
    {
        "statements": [
            "{p} and {q} exchanged rings in {c} last autumn.",
            "The wedding of {p} and {q} took place in {c}.",
            "{q} became {p}'s spouse at the {c} registry office.",
        ],
        "questions": [
            ("Who is {p} married to?", "q"),
            ("With whom did {p} tie the knot?", "q"),
            ("Where did the bride and groom say yes?", "c"),
            ("In which city did {p} stop being single?", "c"),
        ],
    },
    {
        "statements": [
            "{p} still owes {q} {m} from the card game.",
            "{q} lent {p} {m} and has not seen a cent of it since.",
            "A debt of {m} stands between {p} and the lender, {q}.",
        ],
        "questions": [
            ("How much money must {p} pay back?", "m"),
            ("Who is {p}'s creditor?", "q"),
            ("Who has failed to return borrowed cash?", "p"),
            ("What sum has not been repaid yet?", "m"),
            ("To whom should {p} hand {m}?", "q"),
        ],
    },
    {
        "statements": [
            "The {t} in the hall was a gift from {q} to {p}.",
            "{q} presented {p} with a {t}.",
            "For the birthday party {q} brought {p} a {t} wrapped in red paper.",
        ],
        "questions": [
            ("What did {p} receive?", "t"),
            ("From whom does {p} have the {t}?", "q"),
            ("Who was generous?", "q"),
            ("Who is the new owner of the {t}?", "p"),
        ],
    },
    {
        "statements": [
            "{p} earns a living as a {j} in {c}.",
            "Customers in {c} know {p} as their {j}.",
            "By profession {p} is a {j}, with a workshop in {c}.",
        ],
        "questions": [
            ("What is {p}'s job?", "j"),
            ("What kind of work does {p} do?", "j"),
            ("In which town is {p} employed?", "c"),
            ("Who could be hired as a {j}?", "p"),
            ("Which trade did {p} learn?", "j"),
        ],
    },
    {
        "statements": [
            "At home {p} keeps a {a} that sleeps in the kitchen.",
            "A {a} shares {p}'s flat and eats from a bowl in the kitchen.",
            "{p} feeds the {a} at home every morning before work.",
        ],
        "questions": [
            ("What pet does {p} have?", "a"),
            ("Which animal lives with {p}?", "a"),
            ("Who is the owner of a {a}?", "p"),
            ("Who is a pet lover?", "p"),
        ],
    },
    {
        "statements": [
            "Nothing makes {p} happier than a plate of {f}.",
            "{p} would walk ten miles for {f}.",
            "When {f} is served, {p} always asks for seconds.",
        ],
        "questions": [
            ("What is {p}'s favourite dish?", "f"),
            ("What does {p} like to eat most?", "f"),
            ("Who loves {f}?", "p"),
            ("Which meal should be cooked to please {p}?", "f"),
        ],
    },
    {
        "statements": [
            "{p} cannot stand {f} and pushes the plate away.",
            "The smell of {f} drives {p} out of the room.",
            "{p} would rather starve than swallow {f}.",
        ],
        "questions": [
            ("Which dish does {p} hate?", "f"),
            ("What must never be cooked for {p}?", "f"),
            ("Who dislikes {f}?", "p"),
            ("Who is a fussy eater?", "p"),
        ],
    },
    {
        "statements": [
            "{p} grew up speaking {l} with the grandparents.",
            "At {p}'s cradle the lullabies were sung in {l}.",
            "{l} was the only tongue heard in {p}'s childhood home.",
        ],
        "questions": [
            ("What is the first language of {p}?", "l"),
            ("In which language would {p} dream?", "l"),
            ("Who is a native {l} speaker?", "p"),
            ("Which idiom did {p} acquire as a baby?", "l"),
        ],
    },
    {
        "statements": [
            "{p} has been taking evening classes in {l} since {w}.",
            "On {w} {p} enrolled in a beginners' course of {l}.",
            "{p} bought a {l} grammar and started lessons on {w}.",
        ],
        "questions": [
            ("Which language is {p} learning?", "l"),
            ("Who is trying to master a foreign tongue?", "p"),
            ("What will {p} soon be able to speak?", "l"),
            ("Who studies {l}?", "p"),
        ],
    },
    {
        "statements": [
            "Doctors kept {p} in bed for weeks with {i}.",
            "{p} came down with {i} after the voyage.",
            "{i} put {p} in hospital.",
        ],
        "questions": [
            ("What disease did {p} have?", "i"),
            ("What was wrong with {p}'s health?", "i"),
            ("Who suffered from {i}?", "p"),
            ("Who was a patient?", "p"),
            ("Which illness is talked about?", "i"),
        ],
    },
    {
        "statements": [
            "{p} plays the {u} in a wedding band.",
            "At every wedding {p} takes out the {u} and the crowd dances.",
            "{p}'s {u} was heard at the party until dawn.",
        ],
        "questions": [
            ("Which instrument has {p} mastered?", "u"),
            ("Who is a musician?", "p"),
            ("With what does {p} make music?", "u"),
            ("Which person could be asked to accompany a singer on the {u}?", "p"),
        ],
    },
    {
        "statements": [
            "{p} turned up at the office in a bright green {g}.",
            "Everybody stared at the green {g} that {p} had on.",
            "{p} had borrowed the green {g} from a cousin and wore it all day.",
        ],
        "questions": [
            ("How was {p} dressed?", "g"),
            ("What piece of clothing drew attention?", "g"),
            ("Whose outfit was unusual?", "p"),
            ("Who was in a {g}?", "p"),
        ],
    },
    {
        "statements": [
            "{p} has read {b} so often that the spine has split.",
            "The copy of {b} on {p}'s nightstand is falling apart from use.",
            "{p} can recite whole chapters of {b} from memory.",
        ],
        "questions": [
            ("What is {p}'s favourite novel?", "b"),
            ("Which work of literature does {p} know inside out?", "b"),
            ("Who is fond of {b}?", "p"),
            ("Who is a devoted reader?", "p"),
        ],
    },
    {
        "statements": [
            "{b} came from the pen of {p} and appeared in {y}.",
            "{p} published {b} in {y}.",
            "In {y} {p} finished the last page of {b} and sent it to the printer.",
        ],
        "questions": [
            ("Who is the author of {b}?", "p"),
            ("What did {p} write?", "b"),
            ("When could people first buy {b}?", "y"),
            ("By whom was the novel written?", "p"),
            ("What is the title of the work that {p} created?", "b"),
        ],
    },
    {
        "statements": [
            "On weekends {p} trains for the national championship in {s}.",
            "{p} belongs to the national squad in {s}.",
            "A coach discovered {p}'s talent for {s} at the age of nine.",
        ],
        "questions": [
            ("Which sport does {p} do?", "s"),
            ("Who is an athlete?", "p"),
            ("At what is {p} good?", "s"),
            ("Who could beat others at {s}?", "p"),
        ],
    },
    {
        "statements": [
            "The ring that {p} wears is made of {e}.",
            "{p}'s ring is plain {e}, without a stone.",
            "A jeweller shaped the {e} ring on {p}'s hand.",
        ],
        "questions": [
            ("What material is on {p}'s finger?", "e"),
            ("Of what does the piece of adornment consist?", "e"),
            ("Whose finger is encircled by {e}?", "p"),
            ("Who has something round on a finger?", "p"),
        ],
    },
    {
        "statements": [
            "{p} drives to work in an old {v} from {y}.",
            "The {y} {v} outside belongs to {p}, who commutes in it.",
            "{p} has been getting to the office by {v}, a {y} model.",
        ],
        "questions": [
            ("What means of transport does {p} use?", "v"),
            ("How old is the vehicle, going by the date of manufacture?", "y"),
            ("What does {p} travel in every day?", "v"),
            ("Who owns a {v}?", "p"),
        ],
    },
    {
        "statements": [
            "{p} planted a {x} by the garden gate.",
            "The {x} beside the gate was put in the soil by {p}.",
            "{p} waters the {x} at the gate every evening.",
        ],
        "questions": [
            ("What grows at {p}'s place?", "x"),
            ("Who has green fingers?", "p"),
            ("What did {p} add to the flower bed?", "x"),
            ("Thanks to whom does a {x} flourish there?", "p"),
        ],
    },
    {
        "statements": [
            "{p} sits on the board of {o}.",
            "{o} appointed {p} as a director.",
            "The shareholders of {o} elected {p} to the board.",
        ],
        "questions": [
            ("Which company does {p} help to govern?", "o"),
            ("Who has a say in how {o} is run?", "p"),
            ("Which business is {p} partly responsible for?", "o"),
            ("Who holds a position of power in a firm?", "p"),
        ],
    },
    {
        "statements": [
            "{p} was sacked by {o} on {w}.",
            "{o} handed {p} a dismissal letter on {w}.",
            "On {w} security escorted {p} out of {o} for the last time.",
        ],
        "questions": [
            ("Which employer got rid of {p}?", "o"),
            ("Who lost their job?", "p"),
            ("On what day did {p} become unemployed?", "w"),
            ("Whose contract was ended?", "p"),
            ("Where was {p} working until being fired?", "o"),
        ],
    },
    {
        "statements": [
            "{p} fell off a ladder and broke a wrist on {w}.",
            "On {w} the ladder slipped and {p}'s wrist snapped.",
            "{p}'s arm has been in plaster since the tumble from the ladder on {w}.",
        ],
        "questions": [
            ("Who had an accident?", "p"),
            ("When did {p} get injured?", "w"),
            ("Who needs a bone to heal?", "p"),
            ("On what day did somebody hurt themselves?", "w"),
        ],
    },
    {
        "statements": [
            "{p} swam across {r} in {n} minutes.",
            "It took {p} {n} minutes to get from one bank of {r} to the other without a boat.",
            "Stroke by stroke {p} crossed {r}; the stopwatch showed {n} minutes.",
        ],
        "questions": [
            ("Who is a strong swimmer?", "p"),
            ("Which water did {p} conquer?", "r"),
            ("How long was {p} in the water?", "n"),
            ("Whose feat at {r} is told?", "p"),
        ],
    },
    {
        "statements": [
            "The night train to {d} leaves {c} at {h}.",
            "At {h} the sleeper pulls out of {c}, bound for {d}.",
            "Passengers for {d} board the sleeper in {c} before {h}.",
        ],
        "questions": [
            ("When does one have to be on the platform to reach {d} by rail?", "h"),
            ("What is the destination of the nocturnal service?", "d"),
            ("Where does the journey by railway begin?", "c"),
            ("What is the departure time of the nocturnal service from {c}?", "h"),
        ],
    },
    {
        "statements": [
            "{p} found a {t} washed up beside {r}.",
            "Near {r}, {p} stumbled on a {t} half buried in mud.",
            "A {t} lay in the reeds at {r} until {p} picked it up.",
        ],
        "questions": [
            ("What did {p} discover?", "t"),
            ("Where did {p} make a lucky find?", "r"),
            ("Who came across something?", "p"),
            ("By whom was the {t} found?", "p"),
        ],
    },
    {
        "statements": [
            "{p} lost a {t} somewhere in {c} and offers {m} for it.",
            "Reward of {m} for the finder of {p}'s {t}, last seen in {c}.",
            "{p} misplaced a {t} in {c}; whoever brings it back gets {m}.",
        ],
        "questions": [
            ("What is {p} looking for?", "t"),
            ("How much will {p} pay an honest person?", "m"),
            ("In which town did the object go missing?", "c"),
            ("Who is searching for something?", "p"),
        ],
    },
    {
        "statements": [
            "A burglar took a {t} from {p}'s house in {c}.",
            "{p}'s {t} was gone after the break-in in {c}.",
            "Thieves climbed through {p}'s window in {c} and made off with a {t}.",
        ],
        "questions": [
            ("What was stolen?", "t"),
            ("Who is the victim of a crime?", "p"),
            ("Where are the police investigating?", "c"),
            ("Which possession does {p} miss?", "t"),
        ],
    },
    {
        "statements": [
            "{p} collects anything made of {e}.",
            "{p}'s shelves are crammed with {e} curiosities, over {n} of them.",
            "For years {p} has been hoarding objects of {e}.",
        ],
        "questions": [
            ("Who has a hobby?", "p"),
            ("Which material fascinates {p}?", "e"),
            ("What should a present for {p} consist of?", "e"),
            ("Who would be pleased with something in {e}?", "p"),
        ],
    },
    {
        "statements": [
            "At {h} on {w} {p} has an appointment at the dentist's.",
            "The dentist is expecting {p} on {w} at {h}.",
            "{p}'s molar will be pulled on {w}, {h} sharp.",
        ],
        "questions": [
            ("Who has trouble with a tooth?", "p"),
            ("At what time must {p} sit in the chair?", "h"),
            ("On which day will {p} be treated?", "w"),
            ("Who is in for some pain in the mouth?", "p"),
        ],
    },
    {
        "statements": [
            "The lecture by {p} about {r} begins at {h}.",
            "{p} takes the lectern at {h} to speak about {r}.",
            "At {h} {p} will give a talk with slides of {r}.",
        ],
        "questions": [
            ("When should the audience be seated?", "h"),
            ("What is {p}'s topic?", "r"),
            ("Who is going to address the listeners?", "p"),
            ("On which subject will people be informed?", "r"),
        ],
    },
    {
        "statements": [
            "{p} is terrified of every {a}.",
            "The mere sight of a {a} makes {p} scream.",
            "{p} crosses the road to stay away from a {a}.",
        ],
        "questions": [
            ("What is {p} afraid of?", "a"),
            ("Who has a phobia?", "p"),
            ("Which creature frightens {p}?", "a"),
            ("Who would not want to meet a {a}?", "p"),
        ],
    },
    {
        "statements": [
            "{p} was bitten by a {a} in {c}.",
            "In {c} a {a} sank its teeth into {p}'s leg.",
            "{p} had to be stitched up in {c} after a {a} bite.",
        ],
        "questions": [
            ("What attacked {p}?", "a"),
            ("Where did the animal wound somebody?", "c"),
            ("Who was harmed by a creature?", "p"),
            ("Whom did the {a} hurt?", "p"),
        ],
    },
    {
        "statements": [
            "{p} won {m} in the lottery.",
            "{p}'s ticket had all six numbers and paid {m}.",
            "With six right numbers {p} became richer by {m}.",
        ],
        "questions": [
            ("How big was the jackpot?", "m"),
            ("Who was lucky in gambling?", "p"),
            ("What did fortune bring {p}?", "m"),
            ("Who can now afford a lot?", "p"),
        ],
    },
    {
        "statements": [
            "{p} left {m} to {o} in the will.",
            "According to {p}'s will, {o} gets {m}.",
            "The notary read out {p}'s last wishes: {m} for {o}.",
        ],
        "questions": [
            ("Which organisation inherits from {p}?", "o"),
            ("How large is the legacy?", "m"),
            ("Who is the benefactor of {o}?", "p"),
            ("Who profits from {p}'s estate?", "o"),
            ("What sum was bequeathed?", "m"),
        ],
    },
    {
        "statements": [
            "{p} repainted the kitchen of {q} for {m}.",
            "{q} paid {p} {m} for giving the kitchen a new coat of colour.",
            "For {m} {p} brought brush and roller to {q}'s kitchen.",
        ],
        "questions": [
            ("Who did some decorating?", "p"),
            ("What did the handiwork cost?", "m"),
            ("Whose home looks fresher now?", "q"),
            ("Who was {p}'s client?", "q"),
        ],
    },
    {
        "statements": [
            "{p} composed a symphony in honour of {r}.",
            "{p}'s new symphony is dedicated to {r}.",
            "The first performance of the {r} symphony was conducted by its creator, {p}.",
        ],
        "questions": [
            ("What inspired {p} musically?", "r"),
            ("Who wrote a piece for orchestra?", "p"),
            ("Which landmark is celebrated in sound?", "r"),
            ("Who is a composer?", "p"),
        ],
    },
    {
        "statements": [
            "{p} moved from {c} to {d} in {y}.",
            "In {y} {p} packed everything up in {c} and settled in {d}.",
            "{p} gave up the flat in {c} for a house in {d} in {y}.",
        ],
        "questions": [
            ("Where does {p} live now?", "d"),
            ("What is {p}'s former place of residence?", "c"),
            ("When did {p} change address?", "y"),
            ("In which town did {p} dwell before?", "c"),
            ("Who relocated?", "p"),
        ],
    },
    {
        "statements": [
            "{p} and {q} share a grandmother.",
            "{p}'s mother and {q}'s father are siblings.",
            "{p} spent the summers at the house of an uncle, {q}'s father.",
        ],
        "questions": [
            ("Who is {p}'s cousin?", "q"),
            ("To whom is {p} related?", "q"),
            ("Of whom is {q} a relative?", "p"),
            ("Which person belongs to {p}'s kin?", "q"),
        ],
    },
    {
        "statements": [
            "{q} taught {p} the craft of the {j}.",
            "As an apprentice {p} learned from {q}, a {j}.",
            "Everything {p} knows as a {j} was picked up in {q}'s workshop.",
        ],
        "questions": [
            ("Who was {p}'s master?", "q"),
            ("Who was a trainee of {q}?", "p"),
            ("For which occupation was {p} instructed?", "j"),
            ("Who passed skills on to a younger person?", "q"),
        ],
    },
    {
        "statements": [
            "{p} beat {q} in the final of the {s} tournament.",
            "{q} finished second in {s}, just behind {p}.",
            "The {s} trophy went to {p} after a tight match with {q}.",
        ],
        "questions": [
            ("Who was the winner?", "p"),
            ("Who was defeated?", "q"),
            ("Whom did {p} triumph over?", "q"),
            ("In which discipline did {p} become champion?", "s"),
            ("Who took gold?", "p"),
        ],
    },
    {
        "statements": [
            "{p} never touches meat and lives on beans and greens.",
            "Meat has not passed {p}'s lips in years.",
            "At the barbecue {p} asked for anything but meat.",
        ],
        "questions": [
            ("Who is a vegetarian?", "p"),
            ("For which guest would roast beef be the wrong choice?", "p"),
            ("Who refuses to eat animals?", "p"),
            ("Who would send back the steak?", "p"),
        ],
    },
    {
        "statements": [
            "{p} hears nothing at all in the left ear since the explosion.",
            "The blast destroyed {p}'s hearing on the left side.",
            "One has to stand to the right of {p}, whose left ear no longer hears.",
        ],
        "questions": [
            ("Who is half deaf?", "p"),
            ("Who might miss a whisper from the wrong direction?", "p"),
            ("Which acquaintance is hard of listening?", "p"),
            ("To whom should one talk loudly?", "p"),
        ],
    },
    {
        "statements": [
            "{p} cannot tell red from green.",
            "To {p} red and green look the same.",
            "Red apples and green ones are all alike in {p}'s eyes.",
        ],
        "questions": [
            ("Who is colour-blind?", "p"),
            ("Who has a defect of vision?", "p"),
            ("Who might have trouble with traffic lights?", "p"),
            ("Whose sight lacks some hues?", "p"),
        ],
    },
    {
        "statements": [
            "{p} signs with the left hand and smears the ink.",
            "{p} holds pen, fork and racket in the left hand.",
            "As a child {p} was forced to use the right hand, though the left came naturally.",
        ],
        "questions": [
            ("Who is a southpaw?", "p"),
            ("For whom are ordinary scissors awkward?", "p"),
            ("Who might smudge a letter?", "p"),
            ("Which individual is not like most others when gripping things?", "p"),
        ],
    },
    {
        "statements": [
            "{p} walks in the corridors at night, fast asleep.",
            "Last night {p} got up asleep and wandered about in pyjamas.",
            "Asleep with open eyes, {p} was found in the corridor last night.",
        ],
        "questions": [
            ("Who is a somnambulist?", "p"),
            ("Who does not rest peacefully in bed?", "p"),
            ("Which lodger should be locked in after dark for safety?", "p"),
            ("Who moves around without being conscious?", "p"),
        ],
    },
    {
        "statements": [
            "{p} has to sit an exam in {l} on {w}.",
            "On {w} the college will test {p}'s {l}.",
            "{p}'s {l} paper is set for {w}, three hours, no dictionary.",
        ],
        "questions": [
            ("Which language does {p} have to revise?", "l"),
            ("When will a student's knowledge be judged?", "w"),
            ("Who is facing questions about grammar?", "p"),
            ("By what day must {p} be prepared?", "w"),
        ],
    },
    {
        "statements": [
            "{p} translated {b} into {l}.",
            "The {l} edition of {b} is the work of {p}.",
            "Thanks to {p}, {b} can be read in {l}.",
        ],
        "questions": [
            ("In which tongue did {p} render the novel?", "l"),
            ("Who is a linguist with literary ambitions?", "p"),
            ("Which title did {p} make accessible to foreigners?", "b"),
            ("Who brought a story to readers of another country?", "p"),
        ],
    },
    {
        "statements": [
            "{p} guards the gate of {o} from {h} onwards.",
            "From {h} on, nobody enters {o} without passing {p}'s booth at the gate.",
            "{p}'s shift as porter of {o} starts at {h}.",
        ],
        "questions": [
            ("Who works in security?", "p"),
            ("What does {p} protect?", "o"),
            ("When is {p} on duty?", "h"),
            ("Who checks people coming in?", "p"),
        ],
    },
    {
        "statements": [
            "{p} dropped a {t} into {r}.",
            "{p}'s {t} slid from the boat and sank near {r}.",
            "A {t} slipped out of {p}'s fingers at {r} and was never seen again.",
        ],
        "questions": [
            ("What did {p} lose?", "t"),
            ("Where could divers look for the vanished object?", "r"),
            ("Who was clumsy?", "p"),
            ("Which belonging of {p} lies at the bottom?", "t"),
        ],
    },
    {
        "statements": [
            "{p} repairs clocks in a cellar in {c}.",
            "The man or woman to mend a clock in {c} is {p}, down in a cellar.",
            "Broken clocks in {c} end up on {p}'s bench.",
        ],
        "questions": [
            ("Who could help when my timepiece has stopped?", "p"),
            ("Who is a horologist?", "p"),
            ("Where is {p}'s workplace?", "c"),
            ("To whom in {c} should I take an heirloom that no longer ticks?", "p"),
        ],
    },
    {
        "statements": [
            "{p} is {n} years old today and blew out all the candles.",
            "There were {n} candles on {p}'s cake this morning.",
            "Today {p} turns {n}.",
        ],
        "questions": [
            ("What age has {p} reached?", "n"),
            ("Whose birthday is it?", "p"),
            ("Who deserves congratulations?", "p"),
            ("How many anniversaries of being born has {p} had?", "n"),
        ],
    },
    {
        "statements": [
            "{p} and {q} have not spoken since the quarrel over the fence.",
            "A fence set {p} against {q}, and they no longer greet each other.",
            "{p} sued {q} over the height of a fence.",
        ],
        "questions": [
            ("Who is {p}'s enemy?", "q"),
            ("With which neighbour is {p} on bad terms?", "q"),
            ("Who is angry with {q}?", "p"),
            ("Whom does {p} avoid?", "q"),
        ],
    },
    {
        "statements": [
            "{p} is godparent to {q}'s youngest child.",
            "At the font {p} held {q}'s youngest.",
            "{q} asked {p} to be godparent at the christening.",
        ],
        "questions": [
            ("Whom did {q} trust with a role at the baptism?", "p"),
            ("Whose baby did {p} carry in church?", "q"),
            ("Who is a parent?", "q"),
            ("Who has taken on a spiritual duty for an infant?", "p"),
        ],
    },
    {
        "statements": [
            "{p} was mayor of {c} until {y}.",
            "Until {y} the mayor's chain in {c} hung on {p}'s shoulders.",
            "{c} had {p} as its mayor; in {y} somebody else was elected.",
        ],
        "questions": [
            ("Who used to be the head of the town?", "p"),
            ("Which place did {p} govern?", "c"),
            ("When did {p} leave office?", "y"),
            ("Which politician ruled {c}?", "p"),
            ("Where did {p} lead the council?", "c"),
        ],
    },
    {
        "statements": [
            "The statue in front of the {c} station shows {p}.",
            "In {c} a bronze {p} stands on a pedestal before the station.",
            "{p} has been honoured with a statue at the {c} station.",
        ],
        "questions": [
            ("Who is commemorated in {c}?", "p"),
            ("Whose likeness do rail passengers see on arrival?", "p"),
            ("Where is there a monument to {p}?", "c"),
            ("Which famous figure was cast in metal?", "p"),
        ],
    },
    {
        "statements": [
            "{p} discovered that {e} glows when heated in steam.",
            "It was {p} who first saw {e} glow in hot steam, in {n} trials.",
            "The glow of {e} in steam was first described by {p}.",
        ],
        "questions": [
            ("Which scientist made a finding?", "p"),
            ("What did {p} experiment on?", "e"),
            ("Which substance shines under certain conditions?", "e"),
            ("Who studied the properties of {e}?", "p"),
        ],
    },
    {
        "statements": [
            "A {v} driven by {p} ended up in {r}.",
            "{p} lost control of a {v}, which rolled into {r}.",
            "They had to winch {p}'s {v} out of {r}.",
        ],
        "questions": [
            ("Who had a crash?", "p"),
            ("What was recovered with a cable?", "v"),
            ("Where did {p}'s drive come to a wet finish?", "r"),
            ("Who was a bad chauffeur?", "p"),
        ],
    },
    {
        "statements": [
            "{p} paid a fine of {m} for speeding through {c}.",
            "The speed camera in {c} cost {p} {m}.",
            "{p} raced through {c} and was fined {m}.",
        ],
        "questions": [
            ("How expensive was it for {p} to be in a hurry?", "m"),
            ("Who broke the traffic rules?", "p"),
            ("Where was {p} caught driving too fast?", "c"),
            ("Which motorist was punished?", "p"),
        ],
    },
    {
        "statements": [
            "{p} can hold a breath for {n} minutes.",
            "Without one breath {p} stayed under for {n} minutes.",
            "{n} minutes passed before {p} came up for breath.",
        ],
        "questions": [
            ("How long can {p} do without air?", "n"),
            ("Who has exceptional lungs?", "p"),
            ("Who would make a fine pearl diver?", "p"),
            ("What is {p}'s record below the surface?", "n"),
        ],
    },
    {
        "statements": [
            "{p} is writing a thesis about {r} at the university in {d}.",
            "The {d} faculty accepted {p}'s thesis on {r}.",
            "{p} defends a doctoral thesis on {r} before the professors of {d}.",
        ],
        "questions": [
            ("What is {p}'s field of research?", "r"),
            ("Where is {p} an academic?", "d"),
            ("Who is aiming for a higher degree?", "p"),
            ("Who knows a great deal about {r}?", "p"),
        ],
    },
    {
        "statements": [
            "{p} proposed to {q} on top of {r}.",
            "At {r} {p} knelt and asked {q} for a yes.",
            "{q} said yes to {p} at {r}, and both cried.",
        ],
        "questions": [
            ("Where did {p} get engaged?", "r"),
            ("Who is {p}'s fiance or fiancee?", "q"),
            ("Who wants to marry {q}?", "p"),
            ("Who accepted an offer of marriage?", "q"),
            ("Who was on one knee?", "p"),
        ],
    },
    {
        "statements": [
            "{p} divorced {q} in {y}.",
            "In {y} the court ended the marriage of {p} and {q}.",
            "{p} and {q} went separate ways before a judge in {y}.",
        ],
        "questions": [
            ("Who is the ex of {p}?", "q"),
            ("When did the couple split up?", "y"),
            ("Who is single again?", "p"),
            ("With whom does {p} no longer live?", "q"),
        ],
    },
    {
        "statements": [
            "{p} milks the goats on the hill farm at {h}.",
            "Every day at {h} {p} carries the pails up to the goats.",
            "The goats on the hill line up for {p} at {h}.",
        ],
        "questions": [
            ("Who looks after livestock?", "p"),
            ("At what time are the udders emptied?", "h"),
            ("Who might have something to make cheese from?", "p"),
            ("When is {p} busy in the stable?", "h"),
        ],
    },
    {
        "statements": [
            "{p} sells {f} from a stall in the {c} market.",
            "At the {c} market the stall with {f} is {p}'s.",
            "People queue at {p}'s stall in the {c} market for {f}.",
        ],
        "questions": [
            ("What can be bought from {p}?", "f"),
            ("Who is a street vendor?", "p"),
            ("Where does {p} do business?", "c"),
            ("Whom should hungry shoppers visit for {f}?", "p"),
        ],
    },
    {
        "statements": [
            "{p} won first prize with {f} at the village fete.",
            "The jury at the fete tasted {p}'s {f} and gave it the first prize.",
            "{p}'s {f} came first at the fete.",
        ],
        "questions": [
            ("What did {p} prepare for the contest?", "f"),
            ("Who is the best cook?", "p"),
            ("Which dish impressed the judges?", "f"),
            ("Whose culinary skills were rewarded?", "p"),
        ],
    },
    {
        "statements": [
            "{p} swells up after eating {f}.",
            "{f} gives {p} a rash and a swollen throat.",
            "One bite of {f}, and {p}'s face swells.",
        ],
        "questions": [
            ("Who has an allergy?", "p"),
            ("What is dangerous for {p}?", "f"),
            ("Who reacts badly to {f}?", "p"),
            ("Which food should be kept from a sensitive guest?", "f"),
        ],
    },
    {
        "statements": [
            "{p} keeps a diary in {l} so that nobody at home can read it.",
            "To keep the family from prying, {p}'s diary is in {l}.",
            "The pages {p} fills each night are in {l}, which none of the household understands.",
        ],
        "questions": [
            ("Which language does {p} use for secrets?", "l"),
            ("Who confides in paper?", "p"),
            ("Who does not want relatives to know their thoughts?", "p"),
            ("What would a nosy brother of {p} have to learn?", "l"),
        ],
    },
    {
        "statements": [
            "{p} was elected captain of the {s} team.",
            "The {s} team chose {p} to wear the armband.",
            "{p} leads the {s} team onto the field.",
        ],
        "questions": [
            ("Who is the skipper?", "p"),
            ("Which game does {p} play?", "s"),
            ("Who gives orders to the other players?", "p"),
            ("In what discipline is {p} in charge?", "s"),
        ],
    },
    {
        "statements": [
            "{p} coaches children in {s} every {w}.",
            "Every {w} the children get their {s} lesson from {p}.",
            "On {w} {p} blows the whistle at the children's {s} practice.",
        ],
        "questions": [
            ("When does {p} train the young?", "w"),
            ("What do kids learn from {p}?", "s"),
            ("Who is a sports instructor?", "p"),
            ("On which day do boys and girls exercise?", "w"),
        ],
    },
    {
        "statements": [
            "The roof of {p}'s house was torn off by the storm of {y}.",
            "In {y} a storm carried away {p}'s roof.",
            "{p} spent a night without a roof after the {y} storm.",
        ],
        "questions": [
            ("Whose home was damaged by the weather?", "p"),
            ("When was there a hurricane?", "y"),
            ("Who needed tiles urgently?", "p"),
            ("Who got wet in bed?", "p"),
        ],
    },
    {
        "statements": [
            "{p} plays the {u} so badly that the neighbours moved out.",
            "The neighbours fled from {p}'s practising on the {u}.",
            "{p}'s {u} has driven every neighbour from the house.",
        ],
        "questions": [
            ("What makes the noise?", "u"),
            ("Who has no musical talent?", "p"),
            ("Which instrument does {p} torture?", "u"),
            ("Who annoys the people next door?", "p"),
        ],
    },
    {
        "statements": [
            "{p} inherited a {u} from {q}.",
            "{q} left {p} a {u}, wrapped in oilcloth.",
            "The {u} in {p}'s case had belonged to {q} until the funeral.",
        ],
        "questions": [
            ("What did {p} get from the deceased?", "u"),
            ("Who bequeathed an instrument?", "q"),
            ("Who is an heir?", "p"),
            ("Who is dead?", "q"),
        ],
    },
    {
        "statements": [
            "{p} builds a {u} from scratch in {n} weeks.",
            "In {n} weeks a plank turns into a {u} in {p}'s hands.",
            "A {u} by {p} takes {n} weeks of carving and glue.",
        ],
        "questions": [
            ("Who makes things to play music on?", "p"),
            ("How long must a customer of {p} wait?", "n"),
            ("What leaves {p}'s workshop?", "u"),
            ("From whom could an orchestra order a {u}?", "p"),
        ],
    },
    {
        "statements": [
            "{p} embroidered a {g} for {q}.",
            "The {g} that {q} has on was embroidered by {p}.",
            "{p} sat up late with needle and silk over {q}'s {g}.",
        ],
        "questions": [
            ("Who is good at needlework?", "p"),
            ("For whom was the garment decorated?", "q"),
            ("What did {p} adorn with stitches?", "g"),
            ("Who made {q} look elegant?", "p"),
        ],
    },
    {
        "statements": [
            "{p} left a {g} on the bus to {d}.",
            "On the bus for {d} somebody found {p}'s {g}.",
            "{p} got off the {d} bus without the {g}.",
        ],
        "questions": [
            ("What did {p} forget?", "g"),
            ("Where was the vehicle going?", "d"),
            ("Who is absent-minded?", "p"),
            ("Who might be cold now?", "p"),
            ("Whose clothing is at the lost property office?", "p"),
        ],
    },
    {
        "statements": [
            "{p} is knitting a {g} for the baby.",
            "With yellow wool {p} is knitting the baby a {g}.",
            "The needles click: {p} hopes to finish the baby's {g} by {w}.",
        ],
        "questions": [
            ("What is being made for an infant?", "g"),
            ("Who is busy with yarn?", "p"),
            ("What will the newborn wear?", "g"),
            ("Who is handy with textiles?", "p"),
        ],
    },
    {
        "statements": [
            "{p} works on the {e} seam deep under {c}.",
            "Every morning a lift takes {p} down to the {e} under {c}.",
            "Under {c}, lamp on helmet, {p} digs for {e}.",
        ],
        "questions": [
            ("Who is a miner?", "p"),
            ("What is extracted below ground?", "e"),
            ("Beneath which city does {p} toil?", "c"),
            ("Who rarely sees daylight?", "p"),
        ],
    },
    {
        "statements": [
            "{p} carved the pulpit of the {c} cathedral out of {e}.",
            "The {e} pulpit in {c} is {p}'s carving.",
            "In {c} one preaches from {e}, carved by {p}.",
        ],
        "questions": [
            ("Which artist furnished the church?", "p"),
            ("Of what is the piece for the sermon made?", "e"),
            ("Where can {p}'s masterpiece be seen?", "c"),
            ("Who had a commission from the bishop?", "p"),
        ],
    },
    {
        "statements": [
            "The smugglers brought {e} across {r} under {p}'s orders.",
            "{p}'s gang smuggled {e} over {r}.",
            "At {r} customs men caught {p} with a boat full of {e}.",
        ],
        "questions": [
            ("What was the illegal cargo?", "e"),
            ("Where was the contraband carried over?", "r"),
            ("Who led the criminals?", "p"),
            ("Who broke the law?", "p"),
        ],
    },
    {
        "statements": [
            "{p} had been hiding in the attic of {o} for {n} days.",
            "For {n} days nobody knew that {p} slept in the attic of {o}.",
            "After {n} days they found {p} in the attic above the offices of {o}.",
        ],
        "questions": [
            ("How long did {p} stay undetected?", "n"),
            ("In which firm's building did {p} take refuge?", "o"),
            ("Who was a secret lodger?", "p"),
            ("Who lived under the roof without permission?", "p"),
        ],
    },
    {
        "statements": [
            "{p} holds the keys to {r}.",
            "Anyone who wants to go inside {r} has to ask {p} for the keys.",
            "The keys of {r} hang on {p}'s belt.",
        ],
        "questions": [
            ("Who can let visitors in?", "p"),
            ("What can {p} unlock?", "r"),
            ("Who is the caretaker?", "p"),
            ("Whose permission is needed to enter {r}?", "p"),
        ],
    },
    {
        "statements": [
            "{p} painted {r} in oils at sunrise.",
            "{p}'s oil painting of {r} glows in the first light.",
            "Before dawn {p} carried an easel to {r} and painted until noon.",
        ],
        "questions": [
            ("Which motif did {p} choose?", "r"),
            ("Who made a landscape picture?", "p"),
            ("Which artist got up early?", "p"),
            ("What does the canvas show?", "r"),
        ],
    },
    {
        "statements": [
            "{p} jumped from {r} with a parachute on {w}.",
            "On {w} a parachute opened over {r}: it was {p}.",
            "{p} leapt off {r} on {w}, pulled the parachute cord, and landed in a hedge.",
        ],
        "questions": [
            ("Who is a daredevil?", "p"),
            ("Which high place did {p} use for a stunt?", "r"),
            ("When did somebody risk their neck?", "w"),
            ("Who sailed down through the air?", "p"),
        ],
    },
    {
        "statements": [
            "{p} was rescued from {r} by helicopter.",
            "A helicopter lifted {p} off {r}, wet and shivering.",
            "The helicopter crew spotted {p}'s torch at {r} and lowered a rope.",
        ],
        "questions": [
            ("Who was saved?", "p"),
            ("Where was {p} in distress?", "r"),
            ("For whom did help arrive by air?", "p"),
            ("Who owes their life to a pilot?", "p"),
        ],
    },
    {
        "statements": [
            "{o} is closed on {w} for stocktaking.",
            "On {w} the doors of {o} stay shut while the stock is counted.",
            "Stocktaking at {o} is on {w}; no customers, please.",
        ],
        "questions": [
            ("When is it no use visiting {o}?", "w"),
            ("Which business is not open?", "o"),
            ("On which day do shoppers have to go elsewhere?", "w"),
            ("Where are goods being tallied?", "o"),
        ],
    },
    {
        "statements": [
            "{o} was founded by {p} in {y} with a loan of {m}.",
            "In {y} {p} started {o} on {m} borrowed from an aunt.",
            "{p} set up {o} in {y}; the capital of {m} was a loan.",
        ],
        "questions": [
            ("Who established {o}?", "p"),
            ("When was {o} created?", "y"),
            ("How much money did the entrepreneur have at the beginning?", "m"),
            ("Which company does {p} have to thank for?", "o"),
            ("What did {p} launch?", "o"),
        ],
    },
    {
        "statements": [
            "{o} went bankrupt owing {m}.",
            "With {m} unpaid, {o} filed for bankruptcy.",
            "The bankruptcy of {o} left bills of {m}.",
        ],
        "questions": [
            ("Which firm became insolvent?", "o"),
            ("How large was the hole in the accounts?", "m"),
            ("Whose creditors will be disappointed?", "o"),
            ("What sum could not be settled?", "m"),
        ],
    },
    {
        "statements": [
            "{o} hires {p} as its new night {j}.",
            "{p} begins at {o} as a {j} next {w}.",
            "The vacancy for a {j} at {o} went to {p}.",
        ],
        "questions": [
            ("Who is the new employer of {p}?", "o"),
            ("As what will {p} work?", "j"),
            ("Who has found a job?", "p"),
            ("Which applicant was successful?", "p"),
            ("What position was filled?", "j"),
        ],
    },
    {
        "statements": [
            "{o} moved its head office from {c} to {d}.",
            "The head office of {o} is now in {d} instead of {c}.",
            "{o} has shut the {c} tower and runs everything from a head office in {d}.",
        ],
        "questions": [
            ("Where is the company based?", "d"),
            ("Which city lost the headquarters?", "c"),
            ("Which enterprise relocated?", "o"),
            ("To what address should one write for the management of {o}?", "d"),
        ],
    },
    {
        "statements": [
            "Every {w} the fishmongers of {c} throw the scraps to a {a}.",
            "A {a} turns up at the fish market of {c} each {w} for scraps.",
            "In {c} the market people know the {a} that begs for fish scraps on {w}.",
        ],
        "questions": [
            ("Which beast gets a free meal?", "a"),
            ("When is the animal fed?", "w"),
            ("Where do traders spoil a creature with leftovers?", "c"),
            ("On what day does the hungry visitor arrive?", "w"),
        ],
    },
    {
        "statements": [
            "The {a} escaped from the {c} zoo at {h}.",
            "At {h} keepers in the {c} zoo found the cage of the {a} empty.",
            "The {c} zoo reports that its {a} has been loose since {h}.",
        ],
        "questions": [
            ("Which animal is on the run?", "a"),
            ("Where should people be careful in the streets?", "c"),
            ("When was the breakout?", "h"),
            ("What has to be caught again?", "a"),
        ],
    },
    {
        "statements": [
            "{p} trained the {a} to fetch the newspaper.",
            "The {a} brings {p} the newspaper every morning.",
            "It took {p} {n} weeks to teach the {a} to carry the newspaper in.",
        ],
        "questions": [
            ("What sort of creature performs a chore?", "a"),
            ("Who has a clever animal?", "p"),
            ("Which pet does tricks for {p}?", "a"),
            ("Who need not go outside for the daily press?", "p"),
        ],
    },
    {
        "statements": [
            "The {x} in the square of {c} is {n} years old.",
            "People in {c} say that the {x} in the square has stood {n} years.",
            "For {n} years the {x} has shaded the main square of {c}.",
        ],
        "questions": [
            ("Which plant is venerable?", "x"),
            ("What age is the green landmark of {c}?", "n"),
            ("Where does something ancient have its roots?", "c"),
            ("What grows in the middle of {c}?", "x"),
        ],
    },
    {
        "statements": [
            "{p} chopped down the {x} of {q} without asking.",
            "{q} came home to find that {p} had felled the {x}.",
            "With an axe {p} got rid of {q}'s {x}, and {q} was furious.",
        ],
        "questions": [
            ("Who harmed a neighbour's garden?", "p"),
            ("What was destroyed?", "x"),
            ("Who suffered from vandalism?", "q"),
            ("Whose property did {p} damage?", "q"),
            ("Who ought to apologise?", "p"),
        ],
    },
    {
        "statements": [
            "Tea from the {x} cured {p} of {i}.",
            "{p} drank an infusion of {x} tea until the {i} was cured.",
            "It was tea brewed from a {x} that ended {p}'s {i}.",
        ],
        "questions": [
            ("Which herbal remedy helped {p}?", "x"),
            ("What was {p}'s ailment?", "i"),
            ("Who got well again?", "p"),
            ("Who swears by natural medicine?", "p"),
        ],
    },
    {
        "statements": [
            "{p} found a vaccine against {i}.",
            "The vaccine for {i} was developed by {p} in {y}.",
            "Thanks to {p}'s vaccine, hardly anybody catches {i} now.",
        ],
        "questions": [
            ("Against which disease did {p} protect mankind?", "i"),
            ("Which researcher saved lives?", "p"),
            ("Who made an important medical advance?", "p"),
            ("What is no longer so common?", "i"),
        ],
    },
    {
        "statements": [
            "The school in {c} is shut because of {i}.",
            "In {c} an outbreak of {i} has closed the school.",
            "{i} among the pupils has emptied the school in {c}.",
        ],
        "questions": [
            ("What is the infection?", "i"),
            ("Where do children have to stay at home?", "c"),
            ("In which town are there no lessons?", "c"),
            ("Which epidemic is raging in {c}?", "i"),
        ],
    },
    {
        "statements": [
            "{p} is the only passenger who was not seasick on the crossing to {d}.",
            "On the crossing to {d} everybody was seasick except {p}.",
            "While the others hung over the rail, {p} ate lunch on the crossing to {d}.",
        ],
        "questions": [
            ("Who has a strong stomach?", "p"),
            ("Which port was the ship bound for?", "d"),
            ("Who felt fine in the waves?", "p"),
            ("Which traveller enjoyed the voyage?", "p"),
        ],
    },
    {
        "statements": [
            "{p} is the tallest resident of {c} and hits every lintel.",
            "Nobody in {c} towers over the rest like {p}.",
            "In {c} {p} has to stoop under each door frame.",
        ],
        "questions": [
            ("Who is of great height?", "p"),
            ("Where does the giant called {p} live?", "c"),
            ("Who would be good at changing a bulb without a ladder?", "p"),
            ("Which citizen of {c} looks down on others?", "p"),
        ],
    },
    {
        "statements": [
            "{p} set fire to the barn of {q} on {w}.",
            "On {w} flames rose from {q}'s barn, lit by {p}'s match.",
            "{q}'s barn burned to the ground on {w}; {p} has confessed.",
        ],
        "questions": [
            ("Who is an arsonist?", "p"),
            ("Whose property was destroyed by {p}?", "q"),
            ("When did the blaze happen?", "w"),
            ("Who is likely to claim on insurance?", "q"),
            ("On what day did {p} commit the crime?", "w"),
        ],
    },
    {
        "statements": [
            "{p} served {n} months in {d} prison for fraud.",
            "For fraud {p} spent {n} months behind bars in {d}.",
            "The fraud earned {p} {n} months in a {d} cell.",
        ],
        "questions": [
            ("How long was {p} locked up?", "n"),
            ("Where was {p} in jail?", "d"),
            ("Who is a former convict?", "p"),
            ("Who has been punished for deceiving people?", "p"),
        ],
    },
    {
        "statements": [
            "The jury acquitted {p} at {h}.",
            "At {h} the foreman of the jury read out {p}'s acquittal.",
            "{p} left the courtroom at {h}, acquitted on every count.",
        ],
        "questions": [
            ("Who was found not guilty?", "p"),
            ("When was the verdict?", "h"),
            ("Which defendant went free?", "p"),
            ("At what time could {p} breathe a sigh of relief?", "h"),
        ],
    },
    {
        "statements": [
            "{p} forged {q}'s signature on a cheque for {m}.",
            "The cheque for {m} bore {q}'s name, but in {p}'s handwriting.",
            "{p} imitated {q}'s signature and cashed a cheque of {m}.",
        ],
        "questions": [
            ("How much did the swindler get?", "m"),
            ("Who is a counterfeiter?", "p"),
            ("Whom did {p} cheat?", "q"),
            ("What was the loss to {q}?", "m"),
            ("Whose bank balance was plundered?", "q"),
        ],
    },
    {
        "statements": [
            "{p} sailed alone from {c} to {d} in {n} days.",
            "Alone at the helm {p} reached {d} {n} days after leaving {c}.",
            "{n} days of solo sailing took {p} from {c} to {d}.",
        ],
        "questions": [
            ("How long was {p}'s voyage?", "n"),
            ("Where did the skipper drop anchor in the end?", "d"),
            ("From which port did {p} set out?", "c"),
            ("Who crossed the sea without a crew?", "p"),
        ],
    },
    {
        "statements": [
            "{p} missed the plane to {d} because of a {t} in the hand luggage.",
            "Security held {p} back over a {t}, and the plane to {d} took off.",
            "A {t} in the hand luggage made {p} miss the flight to {d}.",
        ],
        "questions": [
            ("Which suspicious item did {p} carry?", "t"),
            ("Where could {p} not go in the end?", "d"),
            ("Who was stopped at the airport?", "p"),
            ("Which traveller was stranded?", "p"),
        ],
    },
    {
        "statements": [
            "{p} commutes between {c} and {d} by {v}.",
            "By {v} {p} goes from {c} to {d} and back every working day.",
            "{p} lives in {c}, has an office in {d}, and covers the distance by {v}.",
        ],
        "questions": [
            ("How does {p} get to work?", "v"),
            ("Where is {p}'s desk?", "d"),
            ("Where is {p}'s home?", "c"),
            ("Who has a lot of travelling to do?", "p"),
        ],
    },
    {
        "statements": [
            "Of all the guests only {p} can drive the {v}.",
            "Nobody but {p} knows how to handle the {v}.",
            "Without {p} at the controls, the {v} stays where it is.",
        ],
        "questions": [
            ("Who has the right licence?", "p"),
            ("Which vehicle does {p} master?", "v"),
            ("Who is indispensable for the transport?", "p"),
            ("What would stand idle if {p} fell ill?", "v"),
        ],
    },
    {
        "statements": [
            "{p} repairs a {v} in the yard at night.",
            "At night {p} lies under a {v} in the yard, spanner in hand.",
            "The yard light burns late: {p} is fixing the {v}.",
        ],
        "questions": [
            ("Who is an amateur mechanic?", "p"),
            ("What is not in working order?", "v"),
            ("Who gets oily fingers?", "p"),
            ("What does {p} spend the dark hours on?", "v"),
        ],
    },
    {
        "statements": [
            "{p} wants to be cremated and scattered over {r}.",
            "{p}'s ashes are to be thrown to the wind at {r}.",
            "After cremation, {p} wishes to have the ashes strewn over {r}.",
        ],
        "questions": [
            ("What final resting place does {p} desire?", "r"),
            ("Who does not wish for a grave?", "p"),
            ("Who has made plans for their own death?", "p"),
            ("Where should the mourners gather for {p}?", "r"),
        ],
    },
    {
        "statements": [
            "{p} met {q} for the first time in the queue at {o}.",
            "In the queue at {o}, {q} turned round and saw {p}.",
            "The queue at {o} was so slow that {p} and {q} began to talk, and have been friends since.",
        ],
        "questions": [
            ("Where did {p} make {q}'s acquaintance?", "o"),
            ("Whom did {p} get to know while waiting?", "q"),
            ("With whom is {p} on good terms?", "q"),
            ("At which institution did two strangers meet?", "o"),
        ],
    },
    {
        "statements": [
            "{p} saved {q} from drowning in {y}.",
            "In {y} {p} pulled {q} out of the whirlpool.",
            "Without {p}, {q} would have drowned in {y}.",
        ],
        "questions": [
            ("Who is a hero?", "p"),
            ("Whose life was rescued?", "q"),
            ("Who cannot swim well?", "q"),
            ("When was {p} brave?", "y"),
            ("To whom does {q} owe gratitude?", "p"),
        ],
    },
    {
        "statements": [
            "{p} is left to raise {q}'s three children.",
            "{q}'s three children are being brought up by {p}.",
            "Since the shipwreck {p} has been a parent to {q}'s three orphans.",
        ],
        "questions": [
            ("Who became a guardian?", "p"),
            ("Whose offspring lives with {p}?", "q"),
            ("Who adopted the kids?", "p"),
            ("Who is responsible for the upbringing of the little ones?", "p"),
        ],
    },
    {
        "statements": [
            "{p} signed a contract with {o} worth {m}.",
            "{o} and {p} put their names to a deal of {m}.",
            "For {m}, {p} agreed to deliver to {o}.",
        ],
        "questions": [
            ("Who is {p}'s business partner?", "o"),
            ("How much will {p} earn?", "m"),
            ("Which supplier did {o} choose?", "p"),
            ("Who made a profitable agreement?", "p"),
        ],
    },
    {
        "statements": [
            "{p} donated a kidney to {q} in the {c} hospital.",
            "In {c} surgeons gave {q} one of {p}'s kidneys.",
            "One kidney of {p}'s now works in {q}, thanks to surgeons in {c}.",
        ],
        "questions": [
            ("Who gave an organ?", "p"),
            ("Who had a transplant?", "q"),
            ("Where was the operation performed?", "c"),
            ("Whom did {p} help to survive?", "q"),
            ("Who has undergone a sacrifice for a friend's health?", "p"),
        ],
    },
    {
        "statements": [
            "{p} faints at the sight of blood.",
            "A drop of blood is enough, and {p} is on the floor.",
            "{p} collapsed when the nurse drew blood.",
        ],
        "questions": [
            ("Who would not make a good surgeon?", "p"),
            ("Who is squeamish?", "p"),
            ("Which patient loses consciousness easily?", "p"),
            ("For whom is butchery no suitable career?", "p"),
        ],
    },
    {
        "statements": [
            "{p} snores so loudly that {q} sleeps in the barn.",
            "{q} moved to the barn because of {p}'s snoring.",
            "Snores from {p}'s bed drove {q} out to the barn.",
        ],
        "questions": [
            ("Whose nights are noisy?", "p"),
            ("Who cannot bear the nocturnal racket?", "q"),
            ("Whom does {p} keep awake?", "q"),
            ("Who rests on hay?", "q"),
            ("What person disturbs {q}?", "p"),
        ],
    },
    {
        "statements": [
            "{p} dials in from {c}, where it is already {h}.",
            "It was {h} in {c} when {p} joined the call.",
            "{p}'s clock in {c} said {h} at the start of the call.",
        ],
        "questions": [
            ("From where did {p} take part in the conference?", "c"),
            ("What was the local hour for {p}?", "h"),
            ("Who sat in another time zone?", "p"),
            ("Which participant was abroad?", "p"),
        ],
    },
    {
        "statements": [
            "The minutes of {w} were taken by {p}.",
            "On {w} {p} wrote the minutes.",
            "{p} noted down in the minutes all that was said on {w}.",
        ],
        "questions": [
            ("Who kept the record of the meeting?", "p"),
            ("When did {p} act as secretary?", "w"),
            ("Who can tell what was decided in the session?", "p"),
            ("On which day was there a discussion?", "w"),
        ],
    },
    {
        "statements": [
            "{p} objects to the plan to drain {r}.",
            "The only vote against draining {r} was {p}'s.",
            "{p} chained themself to a digger to stop the draining of {r}.",
        ],
        "questions": [
            ("Who is a conservationist?", "p"),
            ("What does {p} want to preserve?", "r"),
            ("Who opposed the scheme?", "p"),
            ("Which natural site is threatened?", "r"),
        ],
    },
    {
        "statements": [
            "The flood at {r} reached step {n} in {y}.",
            "In {y} the water of {r} rose to step {n}.",
            "A brass mark on step {n} recalls the high water at {r} in {y}.",
        ],
        "questions": [
            ("When did {r} burst its limits?", "y"),
            ("Where was there an inundation?", "r"),
            ("How far up the stairs did the river go?", "n"),
            ("Which year brought a disaster to {r}?", "y"),
        ],
    },
    {
        "statements": [
            "A pontoon across {r} opens on {w} at {h}.",
            "On {w} at {h} the ribbon for the pontoon over {r} will be cut.",
            "From {w}, {h}, people can walk across {r} on a pontoon.",
        ],
        "questions": [
            ("On which day is the inauguration?", "w"),
            ("At what hour is the ceremony at {r}?", "h"),
            ("What will be easier to cross?", "r"),
            ("When will the new way be usable?", "h"),
        ],
    },
    {
        "statements": [
            "{p} speaks {l} with a heavy accent from {c}.",
            "One hears {c} in every {l} sentence {p} says.",
            "{p}'s {l} has the unmistakable lilt of {c}.",
        ],
        "questions": [
            ("Where do {p}'s origins lie?", "c"),
            ("Which foreign language does {p} know?", "l"),
            ("Whose pronunciation gives something away?", "p"),
            ("Who does not talk like the natives?", "p"),
        ],
    },
    {
        "statements": [
            "{o} prints its leaflets in {l} only.",
            "All leaflets from {o} are in {l}.",
            "Whoever wants to understand the leaflets of {o} must know {l}.",
        ],
        "questions": [
            ("In which language does {o} inform the public?", "l"),
            ("Whose brochures are not multilingual?", "o"),
            ("What do readers of the pamphlets have to master?", "l"),
            ("Which institution excludes those who do not know {l}?", "o"),
        ],
    },
    {
        "statements": [
            "{p} conducts mass in {l} every {w}.",
            "On {w} the congregation hears {p} preach in {l}.",
            "Each {w} {p} stands in the pulpit and gives the sermon in {l}.",
        ],
        "questions": [
            ("Who is a priest?", "p"),
            ("Which tongue is used in {p}'s worship?", "l"),
            ("When does {p} hold a church service?", "w"),
            ("Which cleric is multilingual?", "p"),
        ],
    },
    {
        "statements": [
            "The best {f} in {c} is made by {p}.",
            "In {c} nobody makes {f} like {p}.",
            "Ask for {p}'s {f} when you are in {c}; there is none better.",
        ],
        "questions": [
            ("Whose cooking is famous?", "p"),
            ("For which speciality is {p} known?", "f"),
            ("Where should a gourmet go to visit {p}?", "c"),
            ("Who is a culinary master in {c}?", "p"),
        ],
    },
    {
        "statements": [
            "On {w} the canteen of {o} serves {f}.",
            "The canteen menu of {o} says {f} for {w}.",
            "{f} is on the canteen's board at {o} every {w}.",
        ],
        "questions": [
            ("What can the staff of {o} eat?", "f"),
            ("When is {f} available?", "w"),
            ("Whose employees get {f}?", "o"),
            ("What is for lunch?", "f"),
        ],
    },
    {
        "statements": [
            "{p} spilled {f} over {q}'s {g}.",
            "{q}'s {g} is stained with {f} because {p} stumbled.",
            "{p} tripped, and the {f} landed on {q}'s {g}.",
        ],
        "questions": [
            ("What needs to be washed off?", "f"),
            ("Who was clumsy at table?", "p"),
            ("Whose outfit was soiled?", "q"),
            ("Which piece of clothing must be cleaned?", "g"),
            ("To whom should {p} apologise?", "q"),
        ],
    },
    {
        "statements": [
            "{p} tailored the {g} that {q} wore at the coronation.",
            "At the coronation {q} appeared in a {g} from {p}'s workshop.",
            "{q}'s coronation {g} was cut and sewn by {p}.",
        ],
        "questions": [
            ("Who is a fashion designer?", "p"),
            ("Who was dressed by {p}?", "q"),
            ("What did {q} have on for the crowning?", "g"),
            ("Which royal ordered a garment?", "q"),
        ],
    },
    {
        "statements": [
            "{p} disguised as a {j} slipped into {o}.",
            "In the clothes of a {j} {p} got past the guards of {o}.",
            "The guards at {o} took {p} for a {j} and opened the door.",
        ],
        "questions": [
            ("What was the spy's cover?", "j"),
            ("Where did {p} enter unnoticed?", "o"),
            ("Who was an impostor?", "p"),
            ("Who wore false attire?", "p"),
            ("As what did {p} pretend to work?", "j"),
        ],
    },
    {
        "statements": [
            "{p} retired as a {j} in {y}.",
            "In {y} {p} put down the tools of a {j} for good.",
            "{p} had been a {j} for a lifetime and stopped in {y}.",
        ],
        "questions": [
            ("What was {p}'s occupation?", "j"),
            ("When did {p} become a pensioner?", "y"),
            ("Who has plenty of leisure?", "p"),
            ("Which profession did {p} give up?", "j"),
            ("Who used to earn money as a {j}?", "p"),
        ],
    },
    {
        "statements": [
            "The strike at {o} was led by {p}.",
            "{p} stood at the head of the strikers outside {o}.",
            "It was {p} who called the workforce of {o} out on strike.",
        ],
        "questions": [
            ("Who is a trade unionist?", "p"),
            ("Which employer is in conflict with {p}?", "o"),
            ("Who organised the walkout?", "p"),
            ("Where did labour come to a halt?", "o"),
        ],
    },
    {
        "statements": [
            "{p} blew the whistle on {o} for dumping {e}.",
            "{p} told the press that {o} had been dumping {e} at night.",
            "The dumping of {e} by {o} came to light through {p}.",
        ],
        "questions": [
            ("Who informed the journalists?", "p"),
            ("Who polluted the environment?", "o"),
            ("What kind of waste was got rid of illegally?", "e"),
            ("Which company was exposed by {p}?", "o"),
            ("Whose conscience would not allow silence?", "p"),
        ],
    },
    {
        "statements": [
            "{o} insured the {t} for {m}.",
            "The policy from {o} covers the {t} up to {m}.",
            "If the {t} is damaged, {o} pays {m}.",
        ],
        "questions": [
            ("What compensation would there be?", "m"),
            ("Which object is considered valuable?", "t"),
            ("Who bears the risk?", "o"),
            ("How much is the loss of the {t} worth?", "m"),
        ],
    },
    {
        "statements": [
            "The {t} in the {c} museum once belonged to {p}.",
            "{p}'s {t} is on display in {c} in a glass case.",
            "In {c}, behind glass, visitors can see the {t} that {p} used to own.",
        ],
        "questions": [
            ("What is exhibited in {c}?", "t"),
            ("Who was the previous owner?", "p"),
            ("In which town is there a relic of {p}?", "c"),
            ("Which possession of {p} became famous?", "t"),
        ],
    },
    {
        "statements": [
            "{p} swapped a {t} for a {a} at the flea market.",
            "At the flea market {p} gave a {t} and got a {a}.",
            "{p} came home from the flea market with a {a}, having parted with a {t}.",
        ],
        "questions": [
            ("What did {p} acquire?", "a"),
            ("What did {p} offer in exchange?", "t"),
            ("Who struck a bargain without money?", "p"),
            ("Who made a barter?", "p"),
            ("Which animal changed hands?", "a"),
        ],
    },
    {
        "statements": [
            "{p} photographed a {a} at {r} at {h}.",
            "At {h} a {a} walked in front of {p}'s lens at {r}.",
            "{p} had waited at {r} with a camera until {h}, when a {a} showed up.",
        ],
        "questions": [
            ("What is in {p}'s picture?", "a"),
            ("Who is a wildlife enthusiast?", "p"),
            ("Where was the animal seen?", "r"),
            ("When did {p} press the shutter?", "h"),
            ("Which creature posed?", "a"),
        ],
    },
    {
        "statements": [
            "{p} nursed a wounded {a} back to health.",
            "The {a} with the broken leg recovered under {p}'s care.",
            "{p} splinted the injured {a} and set it free {n} weeks later.",
        ],
        "questions": [
            ("Which animal was hurt?", "a"),
            ("Who healed a beast?", "p"),
            ("Who is kind to creatures?", "p"),
            ("What did {p} save?", "a"),
        ],
    },
    {
        "statements": [
            "{p} bets on {s} and lost {m} last month.",
            "Last month {p}'s wagers on {s} cost {m}.",
            "{p} put {m} on the wrong side in {s} and lost it all.",
        ],
        "questions": [
            ("Who is a gambler?", "p"),
            ("How much money has {p} squandered?", "m"),
            ("Which sport ruins somebody?", "s"),
            ("On what does {p} speculate?", "s"),
        ],
    },
    {
        "statements": [
            "A knee injury ended {p}'s career in {s} in {y}.",
            "In {y} {p} had to give up {s} because of a knee.",
            "{p} has not done any {s} since the knee gave way in {y}.",
        ],
        "questions": [
            ("What can {p} no longer practise?", "s"),
            ("Which athlete was forced to quit?", "p"),
            ("When was {p}'s last competition?", "y"),
            ("Whose joint was damaged?", "p"),
        ],
    },
    {
        "statements": [
            "{p} referees the {s} match on {w}.",
            "On {w} {p} will be the referee of the {s} match.",
            "The {s} match on {w} has {p} in charge of the rules.",
        ],
        "questions": [
            ("Who is the umpire?", "p"),
            ("About which game must {p} be impartial?", "s"),
            ("When does {p} have to judge fouls?", "w"),
            ("Who may punish the players?", "p"),
        ],
    },
    {
        "statements": [
            "{p} lent {b} to {q} and never got it back.",
            "{q} has had {p}'s copy of {b} for {n} years.",
            "{p}'s copy of {b} is still on {q}'s shelf.",
        ],
        "questions": [
            ("Which volume does {p} miss?", "b"),
            ("Who borrowed something to read?", "q"),
            ("Who ought to return a novel?", "q"),
            ("What should {q} give to its rightful owner?", "b"),
            ("Who is waiting for their property?", "p"),
        ],
    },
    {
        "statements": [
            "{b} was banned in {c} in {y}.",
            "In {y} the censors in {c} forbade {b}.",
            "Since {y} it has been a crime to sell {b} in {c}.",
        ],
        "questions": [
            ("Which title is illegal?", "b"),
            ("Where must booksellers be careful?", "c"),
            ("When was literature suppressed in {c}?", "y"),
            ("What must not be read in {c}?", "b"),
        ],
    },
    {
        "statements": [
            "The film of {b} was directed by {p}.",
            "{p} turned {b} into a film.",
            "{p} sat in the director's chair when {b} was filmed.",
        ],
        "questions": [
            ("Who adapted the novel for the cinema?", "p"),
            ("On which story is {p}'s movie based?", "b"),
            ("Who brought {b} to the screen?", "p"),
            ("What did {p} shoot?", "b"),
        ],
    },
    {
        "statements": [
            "{p} restores {e} objects for {o}.",
            "Worn pieces of {e} at {o} pass through {p}'s hands and look new again.",
            "{o} entrusts everything of {e} that is damaged to {p}.",
        ],
        "questions": [
            ("Who works as a conservator?", "p"),
            ("Which material is {p} an expert in?", "e"),
            ("For which institution does {p} work?", "o"),
            ("Who is {p}'s client?", "o"),
        ],
    },
    {
        "statements": [
            "{p} has an artificial hip of {e}.",
            "In place of a hip joint {p} has a piece of {e}.",
            "The surgeon gave {p} a new hip made of {e}.",
        ],
        "questions": [
            ("What is inside {p}'s body?", "e"),
            ("Who had a bone replaced?", "p"),
            ("What might cause {p} trouble at an airport scanner?", "e"),
            ("Who walks with an implant?", "p"),
        ],
    },
    {
        "statements": [
            "{p} suffers from {i} every spring.",
            "Each spring {p}'s {i} returns.",
            "As soon as spring begins, {p} complains of {i}.",
        ],
        "questions": [
            ("What is {p}'s chronic condition?", "i"),
            ("Who has a seasonal ailment?", "p"),
            ("For which disease does {p} need treatment?", "i"),
            ("Which patient dreads April?", "p"),
        ],
    },
    {
        "statements": [
            "{p} caught {i} from {q} on the {v}.",
            "{q} infected {p} with {i} aboard the {v}.",
            "Sitting next to {q} on the {v}, {p} picked up {i}.",
        ],
        "questions": [
            ("Who was contagious?", "q"),
            ("Who fell ill?", "p"),
            ("Which disease was passed on?", "i"),
            ("Where did {p} become a victim of germs?", "v"),
            ("From whom did {p} get sick?", "q"),
        ],
    },
    {
        "statements": [
            "{p} smuggled a {u} past the customs in {d}.",
            "The customs in {d} did not notice the {u} in {p}'s trunk.",
            "Under a heap of coats {p} brought a {u} through customs in {d}.",
        ],
        "questions": [
            ("What undeclared item did {p} have?", "u"),
            ("Where were the officers careless?", "d"),
            ("Who evaded duty?", "p"),
            ("Which musical article crossed the border illegally?", "u"),
        ],
    },
    {
        "statements": [
            "{p} teaches the {u} at the conservatory in {c}.",
            "The {u} class in {c} is given by {p}.",
            "Students of the {u} come to {c} because of {p}.",
        ],
        "questions": [
            ("Who is a music professor?", "p"),
            ("What can one learn from {p}?", "u"),
            ("In which city does {p} give lessons?", "c"),
            ("From whom might a beginner learn the {u}?", "p"),
        ],
    },
    {
        "statements": [
            "{p} presses flowers of the {x} between the pages of {b}.",
            "Between the pages of {b} lie {p}'s dried {x} flowers.",
            "{p} keeps {x} petals in {b}.",
        ],
        "questions": [
            ("Which tome serves {p} as a herbarium?", "b"),
            ("What does {p} preserve?", "x"),
            ("Who is fond of botany?", "p"),
            ("Which blossoms are kept in a book?", "x"),
        ],
    },
    {
        "statements": [
            "{p} is allergic to the pollen of the {x}.",
            "The {x} in bloom makes {p}'s eyes stream.",
            "When the {x} blossoms, {p} sneezes all day.",
        ],
        "questions": [
            ("Which plant should {p} avoid?", "x"),
            ("Who has hay fever?", "p"),
            ("Whose nose runs in summer?", "p"),
            ("What irritates {p}?", "x"),
        ],
    },
    {
        "statements": [
            "{p} hid the key under the {x}.",
            "The key is in the soil beneath the {x}, where {p} buried it.",
            "Dig below the {x}: that is where {p} put the key.",
        ],
        "questions": [
            ("Where should one look in order to unlock the door?", "x"),
            ("Who concealed something in the garden?", "p"),
            ("Which plant marks {p}'s secret place?", "x"),
            ("Who knows how to get into the house?", "p"),
        ],
    },
    {
        "statements": [
            "The shop of {p} in {c} sells nothing but buttons.",
            "In {c}, {p} has a shop full of buttons and nothing else.",
            "Buttons of every size are what {p} stocks in the {c} shop.",
        ],
        "questions": [
            ("Who could supply a missing fastener for my coat?", "p"),
            ("Who is a highly specialised retailer?", "p"),
            ("Where is {p}'s store?", "c"),
            ("Which merchant of {c} should a tailor know?", "p"),
        ],
    },
    {
        "statements": [
            "{p} babysits for {q} on {w}.",
            "On {w} {p} watches {q}'s toddlers.",
            "{q} goes dancing on {w} while {p} stays with the little ones.",
        ],
        "questions": [
            ("Who minds the children?", "p"),
            ("When is {q} free in the evening?", "w"),
            ("Whose kids are in {p}'s hands?", "q"),
            ("Which parent has a night off?", "q"),
        ],
    },
    {
        "statements": [
            "{p} owns the only telephone on the island.",
            "The island's only telephone is in {p}'s kitchen.",
            "Islanders who want to telephone must knock at {p}'s door.",
        ],
        "questions": [
            ("Who can call for help from there?", "p"),
            ("To whose house do people go for a conversation with the mainland?", "p"),
            ("Who has a monopoly on communication?", "p"),
            ("Via whom could relatives ring?", "p"),
        ],
    },
]

SYNONYM_QA = [
    (
        "The bakery on Elm Row shuts its doors at noon on Saturdays.",
        "At what time can one no longer buy bread there at the weekend?",
        "noon",
    ),
    (
        "Old Mrs Pryce feeds the ducks with stale crusts every dawn.",
        "Who gives leftovers to the waterfowl at first light?",
        "Old Mrs Pryce",
    ),
    (
        "The lift in the Mercer building has been stuck since Tuesday.",
        "From which day on have the tenants had to climb stairs?",
        "Tuesday",
    ),
    ("Our plumber will only accept cash.", "How does the tradesman want to be paid?", "cash"),
    ("The baby finally nodded off at a quarter past four.", "When did the infant fall asleep?", "a quarter past four"),
    ("A hailstorm flattened the wheat behind the rectory.", "What ruined the crop?", "A hailstorm"),
    (
        "Grandfather's false teeth were in the sugar bowl.",
        "Where did somebody come across the dentures?",
        "in the sugar bowl",
    ),
    ("Nadine had her appendix taken out in March.", "During which month was there an operation?", "March"),
    ("The choirmaster fainted during the second hymn.", "Who lost consciousness in church?", "The choirmaster"),
    (
        "Rain dripped through the ceiling onto the billiard table.",
        "What got wet because of the leak?",
        "the billiard table",
    ),
    ("The twins refused to eat anything but noodles.", "What was the only dish the siblings would accept?", "noodles"),
    ("Harlan traded his motorbike for a cow.", "What did he give in exchange for livestock?", "his motorbike"),
    ("The ferry was delayed by fog.", "Why was the ship late?", "fog"),
    ("The postwoman was chased up a pear tree by a goose.", "Which bird frightened the letter carrier?", "a goose"),
    ("Our landlord forbids candles.", "What must tenants not light?", "candles"),
    ("Ines cut her own fringe and cried.", "Whose haircut went wrong?", "Ines"),
    (
        "The auction house sold the desk for nine hundred pounds.",
        "How much did the piece of furniture fetch?",
        "nine hundred pounds",
    ),
    (
        "The dog had buried the remote control under the lilac.",
        "Where was the device for switching channels?",
        "under the lilac",
    ),
    (
        "All the clocks in the monastery run seven minutes fast.",
        "By how much is the timekeeping of the monks wrong?",
        "seven minutes",
    ),
    ("Bertil sneezes whenever somebody peels an orange.", "Which fruit irritates his nose?", "orange"),
    (
        "The tram no longer stops outside the hospital.",
        "At which place can passengers not get off any more?",
        "the hospital",
    ),
    ("It was the night nurse who noticed the smoke.", "Who realised that there was a fire?", "the night nurse"),
    ("Her passport ran out in Lisbon.", "Where was she when the travel document expired?", "Lisbon"),
    (
        "The piano had to be hoisted in through the window.",
        "By what opening did the heavy instrument enter?",
        "the window",
    ),
    ("Uncle Femi swore off whisky after the wedding.", "What does he no longer drink?", "whisky"),
    (
        "The orchard was sold to pay the gambling debts.",
        "What did the family give up because of cards and dice?",
        "The orchard",
    ),
    ("Children under six travel free on the cable car.", "Up to what age does a ride cost nothing?", "under six"),
    ("The museum's mummy turned out to be made of papier-mâché.", "Which exhibit was a fake?", "The museum's mummy"),
    ("Lorna whistles when she is nervous.", "What is the sign that she feels uneasy?", "whistles"),
    ("The mayor's speech lasted two hours and a half.", "How long did the politician talk?", "two hours and a half"),
    ("Water in the village tastes of iron.", "Which metal spoils what comes out of the taps?", "iron"),
    ("Rolf's sister breeds racing pigeons.", "Who raises birds for competitions?", "Rolf's sister"),
    (
        "The bride wore her grandmother's boots.",
        "What did she have on her feet at the ceremony?",
        "her grandmother's boots",
    ),
    (
        "After the flood the piano teacher gave lessons in the barn.",
        "Where did pupils practise once the waters had risen?",
        "the barn",
    ),
    (
        "The library fines readers ten cents a day for overdue books.",
        "What is the penalty for returning a novel late?",
        "ten cents a day",
    ),
    ("A magpie made off with the silver thimble.", "Who was the thief?", "A magpie"),
    ("Smoking is permitted only on the roof.", "Where may one light a cigarette?", "on the roof"),
    ("Marguerite has been bald since the fever.", "What made her hair drop out?", "the fever"),
    (
        "The caretaker hides the spare key in the birdhouse.",
        "Where can one find a way to unlock the door?",
        "in the birdhouse",
    ),
    ("The soup needed nothing but a squeeze of lime.", "What was missing from the broth?", "a squeeze of lime"),
    (
        "The summit was reached by the Dutch team first.",
        "Who beat everyone to the top of the mountain?",
        "the Dutch team",
    ),
    ("Every third bottle in the cellar had turned to vinegar.", "Into what had some of the wine changed?", "vinegar"),
    ("The accountant fled to Paraguay.", "Which country did the bookkeeper escape to?", "Paraguay"),
    ("Jasper lost two toes to frostbite.", "How did he come to have an incomplete foot?", "frostbite"),
    (
        "The theatre cat sleeps in the prompter's box.",
        "Where does the pet of the playhouse spend its nights?",
        "in the prompter's box",
    ),
    (
        "The bridge was closed to lorries after the crack was spotted.",
        "Which vehicles may no longer cross the river there?",
        "lorries",
    ),
    ("On pay day the sailors drank the tavern dry.", "When did the seamen empty the pub?", "On pay day"),
    ("Tilda repaired the radio with a hairpin.", "What tool did she use to fix the wireless?", "a hairpin"),
    (
        "The queue for tickets stretched as far as the fountain.",
        "Where did the line of waiting people end?",
        "the fountain",
    ),
    ("Two jurors believed he was innocent.", "How many did not think the accused guilty?", "Two"),
    ("The gardener is paid in honey.", "What does the man who mows the lawn receive as wages?", "honey"),
    ("Snow had blocked the pass until May.", "When did the road over the mountains become usable?", "May"),
    (
        "Her violin was made by a blind craftsman from Cremona.",
        "Who built the instrument she plays?",
        "a blind craftsman from Cremona",
    ),
    ("The thermometer fell to minus thirty.", "How cold did it become?", "minus thirty"),
    (
        "Quincy proposed over the loudspeaker at the supermarket.",
        "Where did he ask for her hand?",
        "at the supermarket",
    ),
    (
        "The oldest inhabitant of the home is a retired trapeze artist.",
        "What did the most aged resident once do for a living?",
        "trapeze artist",
    ),
    ("The moths had eaten everything except the blue scarf.", "Which garment survived the insects?", "the blue scarf"),
    ("The schoolmaster could not remember a single name.", "Who was forgetful?", "The schoolmaster"),
    ("The bus driver took a wrong turn at the brewery.", "Near what did he lose his way?", "the brewery"),
    (
        "The island's only policeman is also its barber.",
        "Who keeps law and order and cuts hair?",
        "The island's only policeman",
    ),
    ("The letter arrived eleven years after it was posted.", "How long was the message under way?", "eleven years"),
    ("A wasp got into the organist's sleeve.", "What made the musician at the church jump?", "A wasp"),
    ("The jam would not set without pectin.", "Which ingredient does the preserve require to become firm?", "pectin"),
    ("Henrike sold the farm and bought a lighthouse.", "What does she own now?", "a lighthouse"),
    (
        "The submarine's cook was the only one who could swim.",
        "Which crew member would not have drowned?",
        "The submarine's cook",
    ),
    ("The chess champion is allergic to felt.", "What does the master of the board game not tolerate?", "felt"),
    (
        "He proved the theorem on the back of a menu.",
        "On what did the mathematician write down his argument?",
        "the back of a menu",
    ),
    (
        "The twins were told apart by a scar on the chin.",
        "How could one distinguish the two brothers?",
        "a scar on the chin",
    ),
    ("The tailor had sewn banknotes into the lining.", "What was concealed inside the coat?", "banknotes"),
    ("The refrigerator hums in B flat.", "Which note comes from the kitchen appliance?", "B flat"),
    ("The referee sent off the goalkeeper for spitting.", "Why did a player have to leave the pitch?", "spitting"),
    ("Aunt Philippa won't set foot on an aeroplane.", "Who is afraid of flying?", "Aunt Philippa"),
    (
        "The pharmacy stays open all night on the eve of a holiday.",
        "When can one get medicine until morning?",
        "the eve of a holiday",
    ),
    ("The trout had swallowed a wristwatch.", "What was in the stomach of the fish?", "a wristwatch"),
    ("The janitor's parrot speaks Hungarian.", "Which language has the bird picked up?", "Hungarian"),
    ("The well dried up in the summer of the comet.", "When did people run out of water?", "the summer of the comet"),
    ("It was Ottoline who switched the labels.", "Whose fault was the mix-up?", "Ottoline"),
    ("The pilot landed on a frozen lake.", "Where did the plane touch down?", "on a frozen lake"),
    ("The tenor was hoarse, so the baker sang the part.", "Who stood in for the opera star?", "the baker"),
    ("The bees moved into the chimney of the vicarage.", "Where did the swarm settle?", "the chimney"),
    ("The thief was betrayed by his squeaking shoes.", "What gave the burglar away?", "his squeaking shoes"),
    ("The elevator boy later became prime minister.", "What high office did the lad finally hold?", "prime minister"),
    ("Sugar was rationed until the autumn.", "Which sweet stuff was in short supply?", "Sugar"),
    (
        "My neighbour mows her lawn at six on Sundays.",
        "When does the woman next door disturb the peace?",
        "at six on Sundays",
    ),
    ("The statue's nose was knocked off by a football.", "What damaged the monument?", "a football"),
    (
        "The deaf clockmaker feels the ticking with his fingertips.",
        "How does he notice that a watch works?",
        "with his fingertips",
    ),
    ("The bear came down to the village for plums.", "What attracted the wild animal?", "plums"),
    ("The telegram contained a single word: sell.", "What advice was wired?", "sell"),
    ("The cyclist had a flat near the quarry.", "Where did the tyre lose its air?", "near the quarry"),
    (
        "The heiress gave everything to a donkey sanctuary.",
        "Who benefited from the rich woman's fortune?",
        "a donkey sanctuary",
    ),
    (
        "Dr Okoro washes his hands nine times before surgery.",
        "How often does the physician clean himself for an operation?",
        "nine times",
    ),
    ("The orchestra's bus broke down in the tunnel.", "Where were the musicians stranded?", "in the tunnel"),
    ("The witness wore dark glasses in court.", "What hid the eyes of the person giving testimony?", "dark glasses"),
    (
        "The scarecrow was dressed as an admiral.",
        "In what costume was the figure that keeps birds off the field?",
        "an admiral",
    ),
    ("The glacier has shrunk by half since my childhood.", "To what extent did the ice melt?", "by half"),
    ("The innkeeper waters down the gin.", "Who cheats the drinkers?", "The innkeeper"),
    (
        "The fuse blew just as the surgeon made the first cut.",
        "What caused the lights to go out during the operation?",
        "The fuse",
    ),
    ("Wendell's stammer vanishes when he sings.", "What frees him from his speech problem?", "sings"),
    ("The conductor broke his baton on the music stand.", "Which object snapped during the concert?", "baton"),
    (
        "The cheese is ripened in an abandoned railway tunnel.",
        "Where does the dairy product mature?",
        "an abandoned railway tunnel",
    ),
    (
        "The hurricane spared nothing but the post office.",
        "Which building was still standing when the winds calmed?",
        "the post office",
    ),
    ("The tax inspector arrived on a unicycle.", "How did the government official travel?", "on a unicycle"),
    ("The grave was dug by the widow herself.", "Who made the hole for her husband's coffin?", "the widow herself"),
    (
        "For want of chalk the teacher wrote with a potato.",
        "What served as a substitute on the blackboard?",
        "a potato",
    ),
    ("The locksmith needed forty seconds to get in.", "How fast did the expert open the door?", "forty seconds"),
    ("The captain was the last to leave the sinking ship.", "Who stayed aboard the longest?", "The captain"),
    ("The recipe calls for eight egg yolks.", "How much of the yellow part is required?", "eight egg yolks"),
    (
        "Their first child was named after a racehorse.",
        "What inspired the parents in choosing what to call the baby?",
        "a racehorse",
    ),
    ("Zadie cannot swallow pills.", "In what form is medication a problem for her?", "pills"),
    (
        "The dinner guests were thirteen, so the host laid a place for a teddy bear.",
        "What filled the extra seat out of superstition?",
        "a teddy bear",
    ),
    ("The blackout began at ten to nine.", "When did the power fail?", "ten to nine"),
    (
        "The fisherman's hut is painted with leftover hull paint.",
        "What colours the angler's cabin?",
        "leftover hull paint",
    ),
    (
        "The hens stopped laying when the road works started.",
        "What put an end to the supply of eggs?",
        "the road works",
    ),
    ("The actor's moustache fell into the soup.", "Which part of the performer's face was not real?", "moustache"),
    ("The cellist practises in the lavatory for the echo.", "Why does she make music in the bathroom?", "the echo"),
    (
        "The surveyor sank up to the waist in the bog.",
        "How deep did the man measuring land go down?",
        "up to the waist",
    ),
    (
        "The bookshop keeps its rarest volume in a biscuit tin.",
        "In what is the precious first edition stored?",
        "a biscuit tin",
    ),
    ("The runner-up demanded a recount.", "Who would not accept the result of the vote?", "The runner-up"),
    (
        "The hunter mistook the vicar's cow for a stag.",
        "At what did the man with the rifle shoot by error?",
        "the vicar's cow",
    ),
    ("The apprentice earned four crowns a week.", "What was the trainee's pay?", "four crowns a week"),
    ("The secretary shreds all the minutes on Fridays.", "When are the records of the meetings destroyed?", "Fridays"),
    ("The lemonade was poisoned with antifreeze.", "What had been mixed into the soft drink?", "antifreeze"),
    ("The hotel's only bathtub stands in the garden.", "Where do lodgers have to wash?", "in the garden"),
    (
        "The cuckoo in the clock was replaced by a tin soldier.",
        "What pops out at the full hour nowadays?",
        "a tin soldier",
    ),
    ("The detective found a ticket stub in the dead man's glove.", "Where was the clue?", "in the dead man's glove"),
    ("Tourists throw coins into the volcano for luck.", "What do visitors drop into the crater?", "coins"),
    ("The ink fades unless it is kept in the dark.", "How should the handwriting be preserved?", "in the dark"),
    (
        "The sculptor used a dentist's drill.",
        "With which instrument did the artist shape the stone?",
        "a dentist's drill",
    ),
    (
        "The dyke held, thanks to the prisoners who stacked sandbags.",
        "Who prevented the land from being flooded?",
        "the prisoners",
    ),
    (
        "The nanny had a criminal record for forgery.",
        "What offence had the woman minding the children committed?",
        "forgery",
    ),
    ("The tortoise outlived three owners.", "Which pet survived its masters?", "The tortoise"),
    (
        "The exam was postponed because the caretaker had lost the papers.",
        "Who was to blame that the test took place later?",
        "the caretaker",
    ),
    ("The wedding cake collapsed in the heat.", "What destroyed the dessert for the newlyweds?", "the heat"),
    ("The swimmer was stung by a jellyfish off the pier.", "Which creature hurt the bather?", "a jellyfish"),
    ("The widow talks to her husband's portrait at teatime.", "When does she speak with a picture?", "at teatime"),
    (
        "The shop assistant short-changed the colonel by a shilling.",
        "How much money was kept back from the officer?",
        "a shilling",
    ),
    (
        "The mountain hut has no electricity but a telephone.",
        "What convenience does the shelter for hikers offer?",
        "a telephone",
    ),
    ("The kidnappers asked for a ransom in diamonds.", "In what form did the gang want to be paid?", "diamonds"),
    ("The weather vane points south whatever the wind.", "In which direction is the instrument stuck?", "south"),
    ("The dentist faints at the sight of needles.", "What can the tooth doctor not bear to look at?", "needles"),
    ("The parcel was too heavy for the drone.", "Why could the package not be flown in?", "too heavy"),
    ("The tea plantation switched to growing vanilla.", "What is cultivated there at present?", "vanilla"),
    (
        "The night watchman reads poetry to the elephants.",
        "Who recites verses to big animals after dark?",
        "The night watchman",
    ),
    (
        "The road was named after a woman who invented a stove.",
        "For what achievement is she honoured on the street sign?",
        "invented a stove",
    ),
    (
        "The king's portrait hides a bullet hole.",
        "What would one see behind the picture of the monarch?",
        "a bullet hole",
    ),
    ("The mechanic diagnosed a cracked gasket.", "What was wrong with the engine?", "a cracked gasket"),
    ("The bellringer went on strike over his pension.", "Why were there no chimes?", "his pension"),
    (
        "The swimming pool is heated by the crematorium.",
        "Where does the warmth for the bathers come from?",
        "the crematorium",
    ),
    (
        "The geologist proposed to name the mineral after her cat.",
        "What was the inspiration for what to call the new stone?",
        "her cat",
    ),
    ("The recipe for the liqueur is known to two monks only.", "Who shares the secret of the drink?", "two monks"),
    ("Emil learned to juggle in prison.", "Where did he acquire the art of keeping balls in the air?", "in prison"),
    ("The rent goes up by a tenth in January.", "When will the flat become more expensive?", "January"),
    ("Nobody had told the florist about the funeral.", "Who was unaware that there would be a burial?", "the florist"),
    (
        "The signal box is staffed by a single woman and her spaniel.",
        "What keeps the railway employee company?",
        "her spaniel",
    ),
    (
        "The cinema smelled of wet wool and liquorice.",
        "Which sweet could be scented where films are shown?",
        "liquorice",
    ),
    (
        "The roof tiles came from a demolished convent.",
        "What building supplied the material for the cover of the house?",
        "a demolished convent",
    ),
]

LISTS = {
    "first": listed("""
        Aaron; Abena; Adaeze; Agnes; Ahmed; Aiko; Alba; Aldo; Alena; Amara; Amir; Anika; Anselm; Arjun; Astrid;
        Ayşe; Bao; Beatrix; Bela; Benno; Bettina; Bilal; Birgit; Bogdan; Brenna; Camila; Caspian; Cecily; Chidi;
        Chloe; Cyrus; Dagny; Dalia; Damir; Daphne; Dario; Deepa; Dimitri; Dolores; Edwin; Efua; Eilidh; Elif; Emeka;
        Enzo; Esther; Fadil; Farah; Fergus; Fiona; Florian; Freya; Gaspard; Gita; Goran; Greta; Gulnara; Hakan;
        Hana; Hector; Helga; Hiroshi; Ibrahim; Ilse; Imani; Ingmar; Isolde; Ivan; Jamila; Jiro; Joaquin; Jorunn;
        Kaito; Kalinda; Katya; Keiran; Kwame; Lachlan; Laila; Leandro; Leonie; Linh; Lorcan; Ludmila; Magnus; Malik;
        Marisol; Mateus; Meera; Mirko; Nadia; Naveen; Nerys; Nikolai; Noor; Odette; Olumide; Oskar; Paloma; Pavel;
        Petra; Quentin; Radha; Ragnar; Renata; Rohan; Rosalind; Saskia; Selim; Sigrid; Soledad; Takumi; Tamsin;
        Thandi; Tobias; Ulrike; Viktor; Wanjiru; Xiomara; Yusuf; Zainab; Zoltan
    """),
    "last": listed("""
        Abara; Achterberg; Adeyemi; Aguilar; Ahlberg; Almeida; Andersson; Antonescu; Arslan; Asante; Baptiste;
        Barzani; Bellweather; Benitez; Bergstrom; Bianchi; Blackwood; Bondarenko; Bouchard; Brankovic; Calloway;
        Castellanos; Chaudhry; Cheng; Cohen; Corrigan; Dahl; Danjuma; Delacroix; Demir; Dlamini; Dorsey; Drummond;
        Eguchi; Eklund; Espinoza; Fairweather; Falk; Farouk; Ferreira; Fitzroy; Fontaine; Fujimoto; Gallagher;
        Gebre; Georgiou; Goldstein; Grabowski; Guerrero; Haddad; Halloran; Hartmann; Hashimoto; Hoang; Holloway;
        Horvat; Ibarra; Ito; Iyer; Jankowski; Jensen; Kalugin; Kamara; Kapoor; Karlsen; Kavanagh; Khoury; Kimathi;
        Kovacs; Kruger; Lachance; Lindqvist; Lombardi; Lundgren; Macallan; Mahlangu; Marchetti; Mbeki; Melnyk;
        Mendoza; Moreau; Mukherjee; Nakamura; Navarro; Nguyen; Nowak; Oduya; Okafor; Oliveira; Ortega; Pereira;
        Petrov; Pham; Quispe; Rahman; Ramaswamy; Reyes; Rinaldi; Rosenthal; Saito; Salazar; Sandoval; Schreiber;
        Sharma; Sorensen; Stavros; Sutherland; Szabo; Takahashi; Tembo; Thornbury; Tremblay; Ueda; Valdez; Vasquez;
        Villanueva; Wexford; Whitlock; Yamada; Yildiz; Zielinski; Zimmer
    """),
    "c": listed("""
        Aarhus; Aberdeen; Accra; Adelaide; Almaty; Antwerp; Arequipa; Asmara; Baku; Bamako; Basel; Belém; Bergen;
        Bilbao; Bogotá; Bologna; Brno; Bruges; Cádiz; Calgary; Cardiff; Cebu; Chennai; Cluj; Coimbra; Cork; Cuenca;
        Curitiba; Dakar; Darwin; Debrecen; Dhaka; Dijon; Dresden; Dunedin; Durban; Esbjerg; Fez; Florence; Galway;
        Gdansk; Genoa; Ghent; Gothenburg; Granada; Graz; Guadalajara; Haifa; Halifax; Hanoi; Harare; Hobart; Hue;
        Inverness; Izmir; Jaipur; Kampala; Kandy; Katowice; Kigali; Kobe; Kochi; Konya; Kumasi; Lahore; Leeds;
        Leipzig; Leuven; Lima; Linz; Ljubljana; Lusaka; Lviv; Malmö; Mandalay; Maribor; Medellín; Mendoza; Mombasa;
        Montevideo; Multan; Nagoya; Nantes; Odense; Osaka; Oulu; Palermo; Perth; Pilsen; Plovdiv; Porto; Poznan;
        Pune; Quito; Rabat; Recife; Riga; Rosario; Rouen; Salta; Sapporo; Seville; Sfax; Shiraz; Sibiu; Split;
        Surabaya; Swansea; Tampere; Tartu; Tbilisi; Toledo; Trieste; Tromsø; Turku; Utrecht; Valparaíso; Varna;
        Vilnius; Windhoek; Winnipeg; Xi'an; Yerevan; Zagreb
    """),
    "d": listed("""
        Aachen; Albany; Alicante; Amiens; Ankara; Arnhem; Bari; Bath; Bern; Boise; Brest; Bristol; Bursa; Caen;
        Cali; Canberra; Catania; Chester; Cologne; Córdoba; Dundee; Durham; Eindhoven; Erfurt; Essen; Exeter; Faro;
        Ferrara; Fresno; Geelong; Girona; Grenoble; Groningen; Hamar; Hamilton; Hull; Innsbruck; Ipswich; Jena;
        Kassel; Kaunas; Kiel; Kosice; Lausanne; Lecce; Limerick; Lincoln; Lucca; Lund; Madison; Mainz; Metz; Modena;
        Murcia; Namur; Napier; Newport; Nîmes; Norwich; Nuremberg; Omaha; Ostrava; Oviedo; Padua; Parma; Pécs;
        Perugia; Potsdam; Reims; Rennes; Rostock; Salerno; Santander; Savannah; Siena; Skopje; Stavanger; Szeged;
        Tacoma; Tilburg; Tours; Truro; Tucson; Turin; Udine; Ulm; Uppsala; Verona; Vigo; Waco; Worcester; York;
        Zaragoza; Zwolle; Ballarat; Bendigo; Cairns; Cochabamba; Sucre; Iquitos; Manaus; Belgrano; Oruro; Tacna;
        Trujillo; Piura; Loja; Ambato; Merida; Oaxaca; Puebla; Toluca; Durango; Tepic; Colima; Celaya; Morelia;
        Saltillo; Tampico; Veracruz
    """),
    "j": listed("""
        baker; barber; beekeeper; blacksmith; bookbinder; bookseller; boatbuilder; brewer; bricklayer; bus driver;
        butcher; cabinetmaker; carpenter; cartographer; chandler; cheesemaker; chemist; chimney sweep; clockmaker;
        clown; cobbler; cook; cooper; crane operator; customs officer; dancer; dentist; diver; docker; draughtsman;
        dressmaker; drummer; farrier; ferryman; fishmonger; florist; forester; gardener; geologist; glassblower;
        glazier; goldsmith; grocer; gunsmith; hairdresser; hatter; jeweller; judge; lacemaker; librarian; lifeguard;
        locksmith; lorry driver; mason; mathematician; midwife; miller; milliner; miner; nurse; notary; painter;
        paramedic; pastry cook; pharmacist; photographer; pilot; plasterer; plumber; potter; printer; quarryman;
        ranger; roofer; saddler; sailmaker; schoolteacher; sculptor; shepherd; shipwright; stonecutter; surgeon;
        surveyor; tailor; tanner; taxi driver; thatcher; tinsmith; translator; vet; violin maker; watchmaker;
        weaver; welder; zookeeper
    """),
    "t": listed("""
        backpack; barometer; basket; bathtub; blanket; bookcase; bracelet; brass bell; briefcase; broom; bucket;
        candlestick; carpet; chandelier; chessboard; chisel; clock; coffee grinder; compass; copper kettle; cradle;
        crowbar; cuckoo clock; cushion; desk lamp; doll's house; door knocker; dustpan; fan; fishing rod; flask;
        flowerpot; fountain pen; frying pan; garden gnome; globe; hammer; hammock; handbag; harpoon; hourglass;
        jewel box; jigsaw puzzle; kite; ladder; lantern; letter opener; locket; loom; magnifying glass; mailbox;
        mattress; medal; metronome; microscope; mirror; mortar; music box; necklace; pair of scissors; paperweight;
        penknife; pillow; pocket watch; porcelain vase; rake; rocking chair; rolling pin; rug; saddle;
        sewing machine; shovel; silver spoon; snow globe; spinning wheel; statuette; suitcase; sundial; tablecloth;
        tapestry; teapot; telescope; tent; thermometer; toaster; toolbox; torch; typewriter; walking stick;
        wardrobe; washing machine; weathervane; wheelbarrow; whistle; wine rack; writing desk
    """),
    "a": listed("""
        badger; bat; bear; beagle; beaver; bison; boar; budgerigar; buffalo; bulldog; camel; canary; cat; chameleon;
        chinchilla; cockatoo; collie; cormorant; cow; coyote; crane; crow; dachshund; deer; dingo; donkey; dormouse;
        duck; falcon; ferret; flamingo; fox; frog; gecko; gerbil; giraffe; goat; goldfish; goose; guinea pig;
        hamster; hare; hawk; hedgehog; hen; heron; horse; jackdaw; kestrel; kingfisher; koala; lamb; lemur; leopard;
        lion; lizard; llama; lynx; macaw; magpie; marmot; mole; mongoose; monkey; mule; newt; parrot; peacock;
        pelican; pig; pigeon; polecat; pony; poodle; porcupine; puffin; python; rabbit; raccoon; rat; raven;
        reindeer; rooster; seal; sheep; shrew; skunk; snake; sparrow; spaniel; squirrel; stork; swan; tapir;
        terrier; toad; tortoise; turkey; turtle; walrus; weasel; wolf; wombat; yak; zebra
    """),
    "f": listed("""
        apple strudel; apricot jam; baked beans; baklava; barley soup; beef stew; beetroot soup; black pudding;
        blue cheese; borscht; bread pudding; brown rice; buckwheat pancakes; caramel flan; carrot cake; ceviche;
        cherry pie; chestnut puree; chicken curry; chilli con carne; cinnamon rolls; clam chowder; corn bread;
        couscous; crab cakes; cream puffs; cucumber salad; custard; dumplings; empanadas; falafel; feijoada;
        fish fingers; flapjacks; fondue; fried plantain; garlic bread; gingerbread; gnocchi; goulash;
        grilled sardines; haggis; halva; herring salad; honeycomb; hummus; jollof rice; kimchi; lasagne; leek pie;
        lemon sorbet; lentil soup; liver sausage; mango chutney; marzipan; meatballs; mince pies; moussaka;
        mushroom risotto; mussels; noodle soup; oat porridge; okra stew; olives; onion soup; oxtail; paella;
        pea soup; peach cobbler; peanut brittle; pickled eggs; pierogi; plum cake; polenta; poppy seed cake;
        potato salad; prawn crackers; pumpkin soup; ratatouille; rhubarb crumble; rice pudding; roast duck;
        rye bread; sauerkraut; scones; seaweed salad; smoked eel; spinach pie; spring rolls; steamed buns;
        stuffed peppers; sushi; tabbouleh; tamales; tempura; tofu; tomato soup; treacle tart; tripe; waffles;
        walnut bread
    """),
    "o": listed("""
        Acorn Mutual; Alder & Finch; Amberline Shipping; Anchor Assurance; Apex Tiling; Arcadia Press;
        Ashgrove College; Aurora Hospice; Bayside Laundry; Beacon Trust; Bellfry Records; Birchwood School;
        Blue Heron Motors; Bluefin Logistics; Bramble Foods; Brightwater Utilities; Cadence Studios; Camphor Labs;
        Canopy Housing; Cedarbank; Chalkhill Quarries; Cobalt Systems; Copperfield Theatre; Coral Airways;
        Crestline Rail; Crown Pharmacy; Dovetail Furniture; Driftwood Hotels; Eastgate Museum; Ember Energy;
        Everfrost Freezing; Fairhaven Clinic; Fenwick Brewery; Firestone Orchestra; Foxglove Cosmetics;
        Gable & Sons; Garnet Mining; Gladstone Library; Goldleaf Printing; Granite Insurance; Greenmantle Farms;
        Halcyon Cruises; Harbourlight Radio; Hazelwood Nursery; Helix Genomics; Heron Paper; Highmoor Observatory;
        Hollyoak Dairy; Inkwell Publishing; Ironbridge Steel; Ivory Keys; Jasper Optics; Juniper Bank;
        Kestrel Aviation; Kingfisher Ferries; Lakeshore Aquarium; Larkspur Gardens; Lighthouse Charity;
        Lodestar Maps; Marigold Catering; Meridian Post; Millstone Bakeries; Moonstone Jewellers;
        Nettlefield Council; Nimbus Weather; Northwind Turbines; Oakmont Hospital; Olive Branch Relief;
        Orchard Software; Osprey Couriers; Palisade Security; Paragon Circus; Pennywhistle Toys; Pinecrest Sawmill;
        Quarterdeck Yachts; Quill & Partners; Ravenscroft University; Redwood Records; Rosewater Spa;
        Saffron Kitchens; Sandpiper Tours; Sentinel Locks; Silverbirch Films; Skylark Balloons; Solstice Solar;
        Stonecrop Cement; Sunflower Kindergarten; Tallow & Wick; Thistle Rugby Club; Tidewater Fisheries;
        Umbra Glass; Upland Wool; Velvet Curtain Opera; Verdant Seeds; Walnut Press; Westerly Bus Lines;
        Whitecap Sailing; Willowbrook Hospital; Yarrow Textiles; Zephyr Kites
    """),
    "r": listed("""
        the Abbot's Well; the Adder Brook; the Amber Falls; the Ashen Marsh; the Bellows Gorge; the Black Tarn;
        the Blue Grotto; the Bramley Canal; the Broken Tower; the Calder Dam; the Cathedral Steps; the Clay Pit;
        the Cobbler's Bridge; the Copper Dome; the Corn Exchange; the Customs House; the Devil's Arch;
        the Drowned Forest; the Dune Lighthouse; the Eagle Rock; the Eel River; the Elder Lake; the Fern Valley;
        the Fish Market; the Flint River; the Foundry Chimney; the Four Winds Pass; the Glass Pavilion;
        the Glover's Gate; the Golden Pagoda; the Grain Silo; the Granary Quay; the Great Oak; the Harrow River;
        the Heron Lagoon; the Hermit's Cave; the Iron Viaduct; the Ivy Chapel; the Jade Fountain; the Juniper Ridge;
        the King's Ferry; the Lantern Bridge; the Larch River; the Leper's Island; the Lime Kiln; the Long Barrow;
        the Marble Stairs; the Marrow River; the Mill Weir; the Mirror Lake; the Monk's Pond; the Moss River;
        the Needle Obelisk; the North Pier; the Old Gasworks; the Osk River; the Otter Creek; the Pepper Mill;
        the Pilgrim's Ford; the Quarry Lake; the Queen's Arcade; the Raven Cliff; the Red Windmill; the Ropewalk;
        the Rose Window; the Salt Flats; the Sandy Spit; the Seven Arches; the Silver Strand; the Singing Stones;
        the Sluice Tower; the Smithy Bridge; the Snake River; the South Mole; the Stag Hill; the Star Fort;
        the Stone Circle; the Sunken Garden; the Swan Basin; the Tannery; the Thorn River; the Tidal Mill;
        the Tin Mine; the Tollhouse; the Town Pump; the Upper Reservoir; the Viking Mound; the Water Tower;
        the Weaver's Steps; the Whale Rock; the White Ferry; the Wicker Bridge; the Wild Geyser; the Willow River;
        the Wolf's Leap; the Yew Avenue
    """),
    "l": listed("""
        Afrikaans; Albanian; Amharic; Arabic; Armenian; Azeri; Basque; Bengali; Breton; Bulgarian; Burmese;
        Cantonese; Catalan; Cornish; Croatian; Czech; Danish; Dutch; Esperanto; Estonian; Faroese; Fijian; Finnish;
        Flemish; French; Frisian; Galician; Georgian; German; Greek; Guarani; Gujarati; Hausa; Hebrew; Hindi;
        Hungarian; Icelandic; Igbo; Indonesian; Irish; Italian; Japanese; Javanese; Kannada; Kazakh; Khmer; Korean;
        Kurdish; Lao; Latin; Latvian; Lithuanian; Luxembourgish; Macedonian; Malay; Malayalam; Maltese; Mandarin;
        Maori; Marathi; Mongolian; Nepali; Norwegian; Pashto; Persian; Polish; Portuguese; Punjabi; Quechua;
        Romanian; Romansh; Russian; Samoan; Sardinian; Serbian; Shona; Sinhala; Slovak; Slovene; Somali; Sorbian;
        Spanish; Swahili; Swedish; Tagalog; Tamil; Tatar; Telugu; Thai; Tibetan; Tongan; Turkish; Ukrainian; Urdu;
        Uzbek; Vietnamese; Welsh; Wolof; Xhosa; Yiddish; Yoruba; Zulu
    """),
    "i": listed("""
        anaemia; angina; anorexia; appendicitis; arthritis; asthma; bronchitis; brucellosis; bursitis; cataracts;
        chickenpox; cholera; cirrhosis; coeliac disease; colitis; conjunctivitis; Crohn's disease; cystitis; dengue;
        dermatitis; diabetes; diphtheria; diverticulitis; dysentery; eczema; emphysema; encephalitis; endocarditis;
        epilepsy; fibromyalgia; gallstones; gastritis; glandular fever; glaucoma; gout; hay fever; hepatitis;
        hypertension; hypothyroidism; impetigo; influenza; iritis; jaundice; kidney stones; labyrinthitis;
        laryngitis; Legionnaires' disease; leprosy; leukaemia; lumbago; lupus; Lyme disease; malaria; mastitis;
        measles; meningitis; migraine; multiple sclerosis; mumps; narcolepsy; nephritis; neuralgia; osteoporosis;
        pancreatitis; Parkinson's disease; pericarditis; pharyngitis; pleurisy; pneumonia; polio; psoriasis; rabies;
        rheumatic fever; rickets; ringworm; rosacea; rubella; salmonella; sarcoidosis; scabies; scarlet fever;
        sciatica; scurvy; sepsis; shingles; sickle-cell disease; silicosis; sinusitis; sleep apnoea; smallpox;
        tendinitis; tetanus; thrombosis; tinnitus; tonsillitis; toxoplasmosis; tuberculosis; typhoid; vertigo;
        whooping cough; yellow fever
    """),
    "u": listed("""
        bagpipe; balalaika; bandoneon; banjo; baritone horn; bass clarinet; bassoon; bodhran; bongo; bouzouki;
        bugle; celesta; cello; celtic harp; charango; clarinet; clavichord; concert flute; concertina; conga;
        contrabassoon; cornet; cowbell; didgeridoo; djembe; double bass; dulcimer; fiddle; fife; flugelhorn;
        French horn; glass harmonica; glockenspiel; gong; guitar; guqin; gusli; hammered dulcimer; handpan;
        harmonica; harmonium; harp; harpsichord; hurdy-gurdy; jaw harp; kalimba; kantele; kazoo; kettledrum; keytar;
        koto; lute; lyre; mandola; mandolin; maracas set; marimba; melodica; melodeon; mouth organ; nyckelharpa;
        pan flute; penny whistle; piano; piccolo; pipe organ; psaltery; rebec; recorder; saxophone; shakuhachi;
        shawm; sitar; snare drum; spinet; steel drum; synthesizer; tabla; tambourine; theremin; tin whistle;
        triangle; trombone; trumpet; tuba; vibraphone; viola; violin; washboard; xylophone; zither
    """),
    "g": listed("""
        balaclava; bathrobe; belt; bonnet; bow tie; bowler hat; boiler suit; cape; cardigan; cloak; coat; corset;
        cowl; cravat; cricket jumper; cummerbund; deerstalker; denim jacket; dinner jacket; dress; dressing gown;
        duffel coat; dungarees set; fedora; felt hat; fez; fleece; frock; fur hat; gilet; gown; headscarf; hoodie;
        jerkin; jersey; kaftan; kilt; kimono; lab coat; leather jacket; linen shirt; loincloth; mackintosh;
        mantilla; miniskirt; nightgown; parka; peaked cap; petticoat; pinafore; plaid shirt; polo shirt; poncho;
        pullover; pyjama top; quilted vest; raincoat; ruff; sari; sarong; sash; scarf; school blazer; shawl;
        sheepskin coat; silk blouse; skirt; smock; sock; straw hat; suit; sun hat; sweater; swimsuit; tailcoat;
        tank top; tiara; tie; toga; top hat; tracksuit; trench coat; tunic; turban; turtleneck; tuxedo; veil;
        velvet jacket; waistcoat; wedding dress; wetsuit; windcheater; woollen cap
    """),
    "b": listed("""
        A Cartload of Pears; A Door in the Hedge; A Handful of Gravel; Alms for the Drowned; An Almanac of Ghosts;
        Ashes of the Orchard; Beneath the Tin Roof; Bitter Almonds; Bread and Thunder; By Candle and Crow;
        Cities of Salt and Rain; Cold Harbour Road; Dancing on Slate; Eleven Quiet Winters; Far from the Granary;
        Feathers for the King; Five Letters to Nobody; Gulls over Market Street; Halfway to Sunday;
        Her Father's Compass; Honey in the Walls; In Praise of Moths; Ink and Iron; Kindling; Lament for a Ferry;
        Last Train to Amaranth; Letters from the Sluice; Little Wars; Low Tide; Marigolds at Midnight; Mercy Lane;
        Mother of Kites; My Brother the Heron; Nettle Soup; Night Shift at the Lighthouse; No Room for Swans;
        North of Nowhere; Notes from a Bell Tower; Old Bones New Boots; One Hundred Umbrellas; Paper Lions;
        Quicksilver Days; Rooms without Clocks; Rust; Saints and Plumbers; Seven Sorts of Silence;
        Silk for the Hangman; Smoke over Eel Creek; Snow on the Vineyard; Songs of the Tollkeeper; Steeplejack;
        Tea with the Enemy; The Arithmetic of Bees; The Blue Umbrella Club; The Cartographer's Wife;
        The Clockwork Hare; The Crooked Mile; The Drowned Piano; The Empty Aviary; The Fishwife's Ledger;
        The Glass Orchard; The Hollow Oak; The Ironmonger's Daughter; The Kingdom of Moss; The Lamplighter;
        The Long Afternoon; The Marsh King; The Night Baker; The Paper Garden; The Quarryman's Song; The Salt Road;
        The Seventh Ferry; The Silent Carillon; The Tailor of Bruges; The Unmade Bed; The Velvet Mask;
        The Weight of Wool; The Winter Tenant; Thirteen Keys; Three Men and a Goat; To Catch a Comet;
        Under the Larches; Voices in the Flue; Waiting for Harvest; Where the Road Bends; Widow's Weeds;
        Wind in the Chimney; Yellow Boots; Yesterday's Fish; Zinc
    """),
    "s": listed("""
        aikido; archery; badminton; ballooning; baseball; basketball; beach volleyball; biathlon; billiards;
        bobsleigh; bouldering; bowling; boxing; bungee jumping; canoeing; caving; checkers; chess; climbing;
        cricket; croquet; curling; cycling; darts; decathlon; discus throwing; diving; dodgeball; dressage; fencing;
        field hockey; figure skating; fishing; floorball; football; futsal; golf; gymnastics; hammer throwing;
        handball; hang gliding; high jump; hurdling; ice hockey; judo; javelin throwing; jiu-jitsu; karate;
        kayaking; kendo; kickboxing; kitesurfing; lacrosse; long jump; luge; marathon running; netball;
        orienteering; paddleboarding; paragliding; parkour; petanque; ping-pong; pole vault; polo; powerlifting;
        rafting; rock climbing; roller derby; rowing; rugby; sailing; shot put; show jumping; skateboarding;
        skeleton; ski jumping; skydiving; snooker; snowboarding; softball; squash; steeplechase; sumo; surfing;
        swimming; synchronised swimming; taekwondo; tennis; trampolining; triathlon; tug of war; volleyball;
        walking football; water polo; water skiing; weightlifting; windsurfing; wrestling; yachting
    """),
    "e": listed("""
        alabaster; aluminium; amber; asbestos; asphalt; balsa wood; bamboo; basalt; beeswax; bone; brass; bronze;
        canvas; carbon fibre; cardboard; cedar wood; chalk; chromium; clay; cobalt; concrete; copper; coral; cork;
        cotton; crystal; denim; ebony; enamel; felt; fibreglass; flint; gallium; glass; gold; granite; graphite;
        gypsum; hemp; horn; iron; ivory; jade; jute; lapis lazuli; lead; leather; limestone; linen; lithium;
        mahogany; manganese; marble; mercury; mica; molybdenum; mother-of-pearl; nickel; nylon; oak; obsidian; onyx;
        palladium; papier-mâché; parchment; pewter; phosphorus; plaster; platinum; plywood; porcelain; pumice;
        quartz; raffia; rosewood; rubber; sandstone; satin; silicon; silk; silver; slate; soapstone; steel; sulphur;
        teak; terracotta; tin; titanium; tortoiseshell; tungsten; turquoise; uranium; velvet; walnut wood; wicker;
        wool; zinc
    """),
    "v": listed("""
        balloon; barge; bicycle; biplane; bulldozer; bus; cable car; cabriolet; camper van; canoe; caravan;
        cargo bike; cart; catamaran; coach; combine harvester; convertible; coracle; cruise liner; delivery van;
        dinghy; dog sled; double-decker; dugout; dump truck; fire engine; fishing boat; forklift; freight train;
        freighter; funicular; glider; go-kart; gondola; hang-glider; hatchback; hay wagon; hearse; helicopter;
        hovercraft; horse-drawn carriage; houseboat; hydrofoil; jeep; jet ski; junk; kayak; kick scooter;
        lawn tractor; lifeboat; limousine; longboat; lorry; minibus; monorail; moped; motorbike; motorboat;
        mountain bike; narrowboat; night bus; paddle steamer; penny-farthing; pickup truck; police car; pontoon;
        postal van; punt; quad bike; racing bike; raft; recumbent bicycle; rickshaw; roadster; rowing boat;
        sailing boat; schooner; seaplane; sedan; skiff; sledge; sleigh; snowmobile; snowplough; speedboat;
        sports car; station wagon; steam locomotive; steamroller; streetcar; submarine; tandem; tanker; taxi;
        tractor; trawler; tricycle; trolleybus; troop carrier; tugboat; wagon; whaler; yacht; zeppelin
    """),
    "x": listed("""
        banana tree; banyan; baobab; basil bush; bay tree; beech; begonia; birch; blackthorn; bluebell; bonsai pine;
        bougainvillea; box hedge; buttercup; cactus; camellia; carnation; cedar; cherry tree; chestnut tree;
        chrysanthemum; clematis; columbine; cornflower; cowslip; crocus; cyclamen; cypress; daffodil; dahlia; daisy;
        dandelion; date palm; delphinium; dogwood; fern; fig tree; fir; forget-me-not; foxglove; freesia; fuchsia;
        gardenia; gentian; geranium; ginkgo; gladiolus; gooseberry bush; hawthorn; hazel; heather; hellebore;
        hibiscus; holly; hollyhock; honeysuckle; hornbeam; horse chestnut; hydrangea; jasmine; juniper; laburnum;
        larch; laurel; lavender bush; lemon tree; lilac; lily; lime tree; lotus; lupin; magnolia; mango tree; maple;
        marigold; mimosa; mistletoe; monkey puzzle; mulberry tree; myrtle; narcissus; nettle; palm; pansy;
        passion flower; peach tree; pear tree; peony; petunia; plane tree; plum tree; pomegranate tree; poplar;
        poppy; primrose; privet hedge; quince tree; redwood; rhododendron; rose; rosemary bush; rowan; rubber plant;
        sage bush; snapdragon; snowdrop; spruce; sunflower; sweet pea; sycamore; thistle; thyme cushion; tulip;
        verbena; violet; walnut tree; water lily; weeping willow; wisteria; yew; yucca; zinnia
    """),
    "w": listed("""
        Monday; Tuesday; Wednesday; Thursday; Friday; Saturday; Sunday
    """),
}

ADJECTIVES = listed("""
    agile; amber; ancient; ashen; austere; azure; balmy; bashful; bitter; bleak; blunt; boisterous; bold; brackish;
    brave; brazen; brisk; brittle; bronze; candid; careful; celestial; charred; cheerful; chilly; clever; coarse;
    cobalt; cosy; crimson; crisp; crooked; curious; daring; dark; deft; dense; distant; dizzy; drowsy; dusky; dusty;
    eager; eerie; elastic; eloquent; emerald; empty; fabled; faint; fancy; fearless; feral; fickle; fierce; flat;
    fluent; fragile; frosty; frugal; gaunt; gentle; gilded; glassy; gloomy; golden; graceful; grim; gritty; hasty;
    hazy; hidden; hollow; humble; hushed; icy; idle; indigo; inky; ivory; jagged; jolly; jovial; keen; lanky;
    lavish; lazy; limber; lively; lofty; lonely; lucid; lucky; lunar; mellow; merry; mighty; misty; modest; molten;
    mossy; muddy; murky; mute; narrow; nimble; noble; numb; odd; opal; ornate; pale; patient; peppery; placid;
    plucky; polite; prickly; proud; quaint; quick; quiet; ragged; rapid; restless; rigid; rosy; rough; rugged;
    russet; rustic; salty; scarlet; secret; shaggy; sharp; shy; silent; silver; sleepy; slender; sly; smoky; solar;
    solemn; sour; sparse; spry; stark; steady; stern; stormy; stout; sturdy; subtle; sunken; swift; tangled; tart;
    tawny; tender; thirsty; tidy; timid; tranquil; twisted; vast; velvet; vivid; wary; weary; whimsical; wicked;
    wild; wiry; wise; witty; wooden; young; zealous
""")

NOUNS = listed("""
    acorn; aisle; anchor; antler; anvil; apron; arrow; atlas; attic; badge; bagel; balcony; ballad; banner; barley;
    barrel; basin; beacon; beetle; bellows; blossom; bonfire; boulder; bramble; brook; bugle; button; cabin; candle;
    canyon; cargo; castle; cavern; cellar; chalice; chapel; cherry; cinder; citadel; clover; cobweb; comet; coral;
    cottage; cradle; crater; cricket; crown; cupboard; current; curtain; dagger; delta; desert; dolphin; domino;
    dragon; drum; dune; eagle; echo; eclipse; ember; falcon; feather; fiddle; fjord; flagon; flute; forge; fossil;
    fountain; galaxy; garnet; gazelle; geyser; glacier; goblet; granary; grotto; gull; hamlet; harbor; harvest;
    hatchet; hearth; hedge; helmet; hinge; hornet; iceberg; island; jackal; jetty; jigsaw; jungle; kernel; kettle;
    kite; knapsack; lagoon; lantern; ledger; lemon; lichen; locket; lotus; lynx; magnet; mallet; mantle; marble;
    marsh; meadow; meteor; mirror; mitten; monsoon; morsel; mosaic; needle; nest; nugget; oasis; ocean; orchard;
    orchid; osprey; otter; paddle; pebble; pelican; pepper; piston; plank; plaza; plume; pocket; prairie; prism;
    puddle; puzzle; quarry; quartz; quill; quilt; radish; raven; reef; relic; ribbon; riddle; ripple; rocket;
    saddle; saffron; satchel; scepter; shadow; shell; shelter; sickle; signal; skillet; sparrow; spindle; spire;
    stable; statue; stirrup; summit; sundial; tavern; temple; thicket; thimble; thistle; throne; thunder; tinder;
    torrent; tractor; trellis; trident; tulip; tunnel; turnip; turret; urchin; valley; vessel; village; vine;
    violet; volcano; wagon; walnut; walrus; warden; whisker; willow; window; winter; wizard; yonder; zenith; zephyr
""")
