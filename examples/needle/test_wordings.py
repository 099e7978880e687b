"""Wordings for testing only, all facts invented, by someone who had not seen ``train_wordings.py``.

NEEDLES: (statement, question, lead); {k} is a key, {v} its value; an empty lead is none.
DIFFERENT_WORDS, NAME_ONLY: (statement, question, answer).
LISTS: parts of keys.
"""

from __future__ import annotations

from word_lists import listed

NEEDLES = [
    (
        "One of the special magic numbers for {k} is: {v}.",
        "What is the special magic number for {k} mentioned in the provided text?",
        "The special magic number for {k} mentioned in the provided text is",
    ),
    (
        "Make a note: the password belonging to {k} is {v}.",
        "Which secret phrase gives access to the account of {k}?",
        "The secret phrase for the account of {k} is",
    ),
    ("[audit] assigned {v} to {k} without errors", "What did {k} get, going by the log?", "Going by the log, {k} got"),
    (
        "When the clerk looked up {k} in the ledger, the only entry beside it was {v}.",
        "What had been written next to {k} in the book of accounts?",
        "Next to {k} had been written",
    ),
    ("config.put('{k}', '{v}')", "What value does the program give {k}?", "The program gives {k} the value"),
    (
        "Dear all, please be aware that from today {k} will be filed under {v}.",
        "Which reference now leads to {k} in the records?",
        "The reference that now leads to {k} is",
    ),
    (
        '"If they ask about {k}," she whispered, "just tell them {v}."',
        "What reply did the woman want people to hear concerning {k}?",
        "",
    ),
    (
        "The label on the crate marked {k} read {v}, and nothing more.",
        "What was printed on the box for {k}?",
        "On the box for {k} was printed",
    ),
    (
        "Customs officers noted that shipment {k} had been sealed with {v}.",
        "What did the fastening on the goods known as {k} bear?",
        "",
    ),
    ("| {k} | {v} |", "In the table, what stands in the column beside {k}?", ""),
    (
        "Grandpa carved two things into the bench: {k} and, just below, {v}.",
        "What did the old man engrave beneath {k}?",
        "Beneath {k} he engraved",
    ),
    (
        "Per section 14(b), the identifier allotted to {k} shall be {v}.",
        "Which designation does the contract give {k}?",
        "The designation the contract gives {k} is",
    ),
    (
        "So yeah, I finally cracked {k}, turns out it was {v} all along lol",
        "What was the solution to {k}?",
        "The solution to {k} was",
    ),
    (
        "Over the radio came the call sign {k}, and the tower answered with {v}.",
        "How did air traffic control respond to {k}?",
        "",
    ),
    (
        "Remember this for later, since you will be tested on it: {k} goes with {v}.",
        "What should be paired with {k}?",
        "{k} should be paired with",
    ),
    (
        "In the margin, in a different hand, somebody had scribbled that {k} equals {v}.",
        "If the handwritten annotation is right, what is {k} the same as?",
        "",
    ),
    ("ERROR 0x51: lookup of {k} returned {v}, aborting", "What came back from the failed query for {k}?", ""),
    (
        "The combination of the locker rented by {k} was changed to {v} last week.",
        "How does one now open the storage compartment of {k}?",
        "One now opens it with",
    ),
    (
        "The oracle was consulted on {k} and uttered but one thing: {v}.",
        "What did the prophetess say about {k}?",
        "About {k} she said",
    ),
    (
        "Lot 212, catalogued as {k}, went to the bidder holding paddle {v}.",
        "Which participant in the auction bought {k}?",
        "The winning paddle for {k} was",
    ),
    ('name: "{k}", token: "{v}", scope: read-only', "Which token is listed for {k}?", "The token listed for {k} is"),
    ("Our spies report that the enemy refers to {k} only as {v}.", "What cover name do our opponents use for {k}?", ""),
    (
        "A visitor to the archive who requests {k} must quote {v} at the desk.",
        "What does one have to mention to the librarian so as to see {k}?",
        "To see {k}, one has to mention",
    ),
    (
        "The tattoo on his forearm said {k}; the one on his ankle said {v}.",
        "What did the sailor with {k} inked near his wrist have on his leg?",
        "",
    ),
    (
        "Ticket for {k} issued; confirmation {v}; no refunds.",
        "What is the booking reference for {k}?",
        "The booking reference for {k} is",
    ),
    (
        "Mum's recipe box holds a card titled {k}, and on the back of it she wrote {v}.",
        "What did my mother put on the reverse of the one called {k}?",
        "",
    ),
    (
        "The examiners anonymised candidate {k} as {v}.",
        "Under what disguise did {k} appear to those marking the papers?",
        "{k} appeared as",
    ),
    (
        "Underneath the portrait of {k}, one can still make out {v}.",
        "What inscription accompanies the picture of {k}?",
        "The inscription is",
    ),
    (
        "Whatever else you forget, don't forget that {v} is what unlocks {k}.",
        "What do I need in order to open {k}?",
        "To open {k} you need",
    ),
    (
        "According to the signpost, travellers bound for {k} must follow the arrows reading {v}.",
        "Which markers lead the way to {k}?",
        "The way to {k} is marked",
    ),
]

DIFFERENT_WORDS = [
    # people
    (
        "After her divorce, Ottoline rented a flat above a chip shop in Grimsby.",
        "I forget, what sort of business lay directly beneath the newly single woman's lodgings?",
        "chip shop",
    ),
    (
        "Wendeline weds her childhood sweetheart next spring inside a disused lighthouse.",
        "Which unusual building will host the marriage of the pair who fell in love as kids?",
        "disused lighthouse",
    ),
    (
        "The triplets were told apart by their grandmother only because she tied coloured wool around their wrists.",
        "What helped the old lady distinguish three identical siblings?",
        "coloured wool",
    ),
    (
        "Uncle Barnaby never spoke again after the quarrel over who should inherit the silver teapot.",
        "A relative fell mute for good because of which heirloom?",
        "silver teapot",
    ),
    (
        "Nobody in the family knew that Great-aunt Perpetua had been a codebreaker during the war.",
        "What clandestine occupation did an elderly relation hold in the years of conflict?",
        "codebreaker",
    ),
    (
        "My neighbour Tancredi shaves his head every solstice and buries the hair under a fig tree.",
        "Beneath what plant do the locks of the man next door go into the ground?",
        "fig tree",
    ),
    # shops
    (
        "We've stopped doing rye, love; the miller at Hoskin's put his prices up twice in a month.",
        "Which type of bread was dropped when flour got too expensive?",
        "rye",
    ),
    (
        "The ironmonger on Tallow Street gives a free padlock to any customer who spends more than sixty pounds.",
        "Name the present that the hardware dealer hands out to big purchasers.",
        "padlock",
    ),
    (
        "Thieves emptied the jeweller's window on Tuesday night, yet they left behind a tray of opals.",
        "Name the gems that the burglars did not bother taking.",
        "opals",
    ),
    (
        "Madame Quillon shut her hat boutique for good, and now the premises house a launderette.",
        "What replaced the defunct milliner?",
        "launderette",
    ),
    (
        "NOTICE: returns of unworn footwear accepted within forty-five days. Pellingford Cobblers Ltd.",
        "How much time does a buyer have to bring shoes back?",
        "forty-five days",
    ),
    (
        "On market mornings the cheesemonger sells out of smoked curd before eight o'clock.",
        "By when is a certain dairy product no longer available on the stall?",
        "eight o'clock",
    ),
    # journeys
    (
        "Ysolde crossed the Karakum on a borrowed motorcycle, sleeping in culverts along the way.",
        "How did a lone adventurer get over the desert?",
        "motorcycle",
    ),
    (
        "Thick fog kept the ferry to Inishvane tied up at the pier until the following afternoon.",
        "Why couldn't the boat sail out to the island on time?",
        "fog",
    ),
    (
        "The sleeper train broke down outside Vologda, and everyone finished the trip by tractor.",
        "On what did the stranded rail passengers complete their voyage?",
        "tractor",
    ),
    (
        "Because his passport had been chewed by the dog, Fennimore missed his flight to Lima.",
        "How did a tourist's travel document become unusable at the airport?",
        "chewed by the dog",
    ),
    (
        "We hiked eleven miles along the ridge before anyone noticed the map was of a different valley.",
        "How far had the walkers gone when they realised they were following the wrong chart?",
        "eleven miles",
    ),
    (
        "Cabin four on the river steamer had a bunk so short that the bishop slept in the bathtub.",
        "Where did the tall clergyman spend the night aboard?",
        "bathtub",
    ),
    # health
    (
        '"No grapefruit, Ludo, not while you\'re on the blue tablets," Dr Amankwah warned.',
        "What food must the patient avoid because of medication?",
        "grapefruit",
    ),
    (
        "Ingeborg fractured her collarbone falling off a stepladder while hanging curtains.",
        "Doing household decoration, a woman broke which part of her skeleton?",
        "collarbone",
    ),
    (
        "The rash on the baby's knees turned out to be a reaction to lanolin.",
        "The infant was allergic to something; do you recall what?",
        "lanolin",
    ),
    (
        "Since the operation on his ears, old Mr Crabtree can hear the kettle from the garden.",
        "Which domestic noise does the pensioner catch outdoors, thanks to surgery?",
        "kettle",
    ),
    (
        "The vaccination clinic moved to the old fire station once the gymnasium roof began leaking.",
        "At what site are people receiving their jabs these days?",
        "old fire station",
    ),
    (
        "Nurse Pilbeam cured her own hiccups by sipping vinegar through a straw.",
        "Which sour liquid stopped a hospital worker's spasms of the diaphragm?",
        "vinegar",
    ),
    # work
    (
        "Gulnara was promoted to head archivist three weeks after joining as a temp.",
        "What position did the short-term employee rise to so quickly?",
        "head archivist",
    ),
    (
        "The foreman docked Silvester an hour's wages for whistling beside the furnace.",
        "Why did a labourer forfeit part of his pay?",
        "whistling",
    ),
    (
        "Everyone in the accounts department resigned on the same day to open a trampoline park.",
        "What venture did the bookkeepers all leave to launch?",
        "trampoline park",
    ),
    (
        "At the interview, the panel asked Delphine to fold a fitted sheet.",
        "What odd task did recruiters set a job applicant?",
        "fold a fitted sheet",
    ),
    (
        "The night porter at the Hotel Mirador writes crime novels between two and five in the morning.",
        "What does an employee of the inn compose in the quiet small hours?",
        "crime novels",
    ),
    (
        "Staff at the call centre walked out over the removal of the biscuit tin.",
        "The disappearance of what item triggered a strike by phone operators?",
        "biscuit tin",
    ),
    # weather
    (
        "Szentlaka, Sunday: hailstones the size of walnuts have flattened the barley.",
        "Lumps of ice from the sky ruined a crop. Name it.",
        "barley",
    ),
    (
        "It has not rained in Quebrada Honda since the eleventh of February.",
        "When did the parched town's drought begin?",
        "eleventh of February",
    ),
    (
        "A gust tore the weathercock from the chapel and dropped it in the duck pond.",
        "Where did strong wind deposit the rooftop ornament?",
        "duck pond",
    ),
    (
        "Lightning struck the scoreboard during the cup tie and froze it at nine-nil.",
        "What did the electronic display read once the thunderbolt had hit?",
        "nine-nil",
    ),
    (
        "By Thursday the drifts had reached the sills of the upstairs bedrooms at Castle Durrow.",
        "To what height did snow pile up against the fortress in the blizzard?",
        "upstairs bedrooms",
    ),
    (
        "Forecasters expect the heatwave to end on the feast of Saint Swithun.",
        "When do meteorologists think cooler temperatures will come back?",
        "feast of Saint Swithun",
    ),
    # repairs
    (
        "The plumber found a wedding ring blocking the U-bend under our sink.",
        "What valuable was clogging the kitchen drain?",
        "wedding ring",
    ),
    (
        "Jarmila patched the hole in her canoe with a lump of beeswax.",
        "With what did the paddler seal the leaky craft?",
        "beeswax",
    ),
    (
        "The church clock ran backwards for a week after the apprentice fitted the escapement upside down.",
        "Which component did the trainee install incorrectly, reversing the hands?",
        "escapement",
    ),
    (
        "Replacing the cracked windscreen on the hearse set the undertaker back nine hundred euros.",
        "How much did the funeral director pay to fix the glass of his car?",
        "nine hundred euros",
    ),
    (
        "The lift at Brannock House only goes down, so residents of the sixth floor climb.",
        "In which direction does the faulty elevator still travel?",
        "down",
    ),
    (
        "Gustaw silenced the squeaking hinge by rubbing it with bacon fat.",
        "With what kind of grease was the noisy door cured?",
        "bacon fat",
    ),
    # meals
    (
        "For his last supper on board, the captain requested pickled herring and nothing else.",
        "What fish did the skipper want to eat at his farewell dinner?",
        "pickled herring",
    ),
    (
        "Ghislaine thickens her lentil soup with a spoonful of peanut butter.",
        "What secret ingredient gives the broth its body?",
        "peanut butter",
    ),
    (
        "My soufflé would have been perfect, but the twins slammed the pantry door and it collapsed.",
        "How did two children ruin the fluffy egg dish?",
        "slammed the pantry door",
    ),
    (
        "Guests at the banquet were poisoned by mushrooms picked behind the tennis courts.",
        "Where had the toxic fungi for the feast been gathered?",
        "behind the tennis courts",
    ),
    (
        "My third morning at the monastery, and breakfast is once more cold porridge eaten standing up.",
        "In what posture do the brothers take their first food of the day?",
        "standing up",
    ),
    (
        "Nobody could finish the wedding cake, for the icing had been made with salt.",
        "Instead of sugar, the nuptial confection contained which seasoning?",
        "salt",
    ),
    # money
    (
        "Leopold lost his entire pension betting on a horse called Thursday's Child.",
        "On which runner did the retired gambler squander his savings?",
        "Thursday's Child",
    ),
    (
        "The treasurer kept the club's cash inside a hollowed-out dictionary.",
        "Where were the funds of the society concealed?",
        "dictionary",
    ),
    (
        "Clause 9: rent on the allotment is payable in jars of honey, due every Michaelmas.",
        "With what goods do tenants of the vegetable plot settle up?",
        "jars of honey",
    ),
    (
        "A raffle of antique snuffboxes covered the orphanage's heating bills this winter.",
        "What collectibles were given away by lottery so parentless children could stay warm?",
        "antique snuffboxes",
    ),
    (
        "The bank turned down Florentyna's loan because she listed her occupation as mermaid.",
        "What profession on the form got a would-be borrower refused credit?",
        "mermaid",
    ),
    (
        "Coins found beneath the hearth at Wyke Farm fetched seventy thousand at auction.",
        "How much did the hoard dug up under the fireplace make when the hammer fell?",
        "seventy thousand",
    ),
    # school
    (
        "Miss Abernethy confiscated a live hedgehog from a boy in the third row.",
        "Which creature did the teacher take away from a pupil?",
        "live hedgehog",
    ),
    (
        "Halfway through the geography exam the ceiling fan fell on the invigilator.",
        "Something injured the person supervising the test; what was it?",
        "ceiling fan",
    ),
    (
        "Rosendo failed chemistry twice before winning a scholarship to study it at Uppsala.",
        "Name the subject that had earned the eventual grant-holder such bad marks.",
        "chemistry",
    ),
    (
        "Lessons on the island are cancelled whenever the seals come ashore to pup.",
        "What natural event gives the little ones a day off class?",
        "seals come ashore",
    ),
    (
        "The headmistress banned yo-yos after one cracked the aquarium in the library.",
        "Owing to a smashed fish tank, the principal outlawed which toy?",
        "yo-yos",
    ),
    (
        "Prunella taught her whole kindergarten to count in Basque.",
        "In what language can the toddlers recite numbers?",
        "Basque",
    ),
    # animals
    (
        "The vet pulled a teaspoon out of Hector the labrador.",
        "Which piece of cutlery did a surgeon extract from the dog's belly?",
        "teaspoon",
    ),
    (
        "A pair of storks has nested on the mobile phone mast outside Olszanka.",
        "On top of what structure are large birds raising their young?",
        "mobile phone mast",
    ),
    (
        "Our goat will not give milk unless somebody plays the accordion nearby.",
        "Which musical instrument puts the horned farm beast in a productive mood?",
        "accordion",
    ),
    (
        "The zoo's oldest tortoise got out through a gap in the fence and was recovered at a bus stop.",
        "Where was the slow runaway reptile caught?",
        "bus stop",
    ),
    (
        "Beekeepers at Llanfedw lost half their hives to hornets last autumn.",
        "Who or what destroyed so many honey producers' colonies?",
        "hornets",
    ),
    (
        '"It\'s that cat from number nineteen again," said Moira. '
        '"It sneaks into the cinema to sleep on the projector."',
        "On what warm device does the feline intruder nap at the movie theatre?",
        "projector",
    ),
    # music
    (
        "The cellist snapped two strings in the overture and carried on with a borrowed viola.",
        "To what did the orchestra player switch when the instrument was damaged?",
        "borrowed viola",
    ),
    (
        "Bartholomew composed his third symphony entirely in prison.",
        "Where was the orchestral work written from start to finish?",
        "prison",
    ),
    (
        "The choir goes flat whenever the organist wears his red gloves.",
        "What article of clothing on the keyboard player puts the vocalists out of tune?",
        "red gloves",
    ),
    (
        "Vinyl copies of the band's debut were melted down to make buttons.",
        "Into what were the first records of the group turned?",
        "buttons",
    ),
    (
        "A lullaby from the Faroes topped the charts for nineteen weeks.",
        "How long did the bedtime song remain the best-selling single?",
        "nineteen weeks",
    ),
    (
        "Eulalia refuses to perform the aria unless the whole front row is empty.",
        "Which part of the auditorium must be unoccupied for the opera star to go on?",
        "front row",
    ),
    # sport
    (
        "Tadeusz scored the winning goal with his left kneecap in the dying seconds.",
        "Which body part put the ball in the net to settle the match?",
        "left kneecap",
    ),
    (
        "The marathon was halted at mile twenty by a stampede of sheep.",
        "Why did the long-distance race have to be interrupted?",
        "stampede of sheep",
    ),
    (
        "Fencing coach Albrecht makes his pupils practise blindfolded in a cellar.",
        "Where do the swordsmen train unable to see?",
        "cellar",
    ),
    (
        "The umpire was struck off for falling asleep behind the wicket.",
        "How come the cricket official's career ended in disgrace?",
        "falling asleep",
    ),
    (
        "Mireille swam the strait in a mohair cardigan to settle a bet.",
        "What garment did a bather wear to win a wager in open water?",
        "mohair cardigan",
    ),
    (
        "The judo final was decided by the toss of a coin since both fighters had the flu.",
        "How was the champion of the martial arts contest chosen when the rivals were sick?",
        "toss of a coin",
    ),
    # law
    (
        "The magistrate sentenced the poacher to plant four hundred oaks.",
        "What number of trees must the convicted hunter put in the soil?",
        "four hundred",
    ),
    (
        "A will scratched on a tractor mudguard was ruled valid by the court in Saskatoon.",
        "Where had the last testament been carved that judges held to be binding?",
        "tractor mudguard",
    ),
    (
        "Counsel for the defence fainted midway through cross-examining the beekeeper.",
        "Which witness was being questioned as the barrister passed out?",
        "beekeeper",
    ),
    (
        "Under the bylaw, no resident of Monkswold may own more than two parrots.",
        "How many talking birds does local legislation permit each inhabitant?",
        "two",
    ),
    (
        "The jury acquitted Cornelius because the fingerprints on the safe belonged to a gibbon.",
        "Whose marks proved the accused man innocent?",
        "gibbon",
    ),
    (
        "Divorce proceedings stalled over who should keep the espresso machine.",
        "About which appliance were the separating spouses fighting?",
        "espresso machine",
    ),
    # farming
    (
        "Anselmo irrigates his melons with water pumped from an abandoned coal mine.",
        "Where does the moisture for the fruit grower's fields come from?",
        "abandoned coal mine",
    ),
    (
        "Blight wiped out the potatoes, so the Kettlewells planted sunflowers instead.",
        "What did the smallholders switch to when disease killed their spuds?",
        "sunflowers",
    ),
    (
        "The combine harvester at Rookhope is shared among seven families.",
        "How many households use the reaping equipment jointly?",
        "seven",
    ),
    (
        "Shearing starts on the hill farms once the elder is in bloom.",
        "The blossom of which bush signals it is time to clip the fleeces?",
        "elder",
    ),
    (
        "Foxes stopped raiding Zdenka's henhouse when she hung a radio in it.",
        "How were predators scared away from the poultry?",
        "radio",
    ),
    (
        "The co-operative pays growers an extra premium for crooked carrots.",
        "Which misshapen vegetables earn suppliers a bonus?",
        "crooked carrots",
    ),
    # software
    (
        "The nightly backup has been failing ever since the certificate expired on the storage gateway.",
        "Copies of the data are not being saved, owing to which lapsed credential?",
        "certificate",
    ),
    (
        "Changelog: rolling back to release 4.2 fixed the memory leak in the billing daemon.",
        "Which earlier version cured the growing RAM consumption of the invoicing process?",
        "4.2",
    ),
    (
        "Priyanka traced the checkout crash to a leap-year bug in the coupon parser.",
        "What sort of calendar mistake was bringing down the online purchase page?",
        "leap-year bug",
    ),
    (
        "Customers' passwords are hashed with Argon2 before being written to disk.",
        "Which algorithm protects users' login secrets at rest?",
        "Argon2",
    ),
    (
        "All the thermostats in the office obey a spreadsheet maintained by the receptionist.",
        "Which document controls the temperature at the workplace?",
        "spreadsheet",
    ),
    (
        "Reminder from ops: deploys stay frozen on Fridays, ever since the intern wiped the production database.",
        "On what weekday may nobody ship code?",
        "Fridays",
    ),
    # town and building
    (
        "For anyone wondering about the scaffolding, the town hall is being painted lilac to honour the late mayoress.",
        "What colour is a municipal building getting in memory of a dead politician?",
        "lilac",
    ),
    (
        "Planning permission for the windmill was denied on account of a rare orchid.",
        "Why couldn't the turbine be built?",
        "rare orchid",
    ),
    (
        "Squatters in the old customs house have turned the vault into a sauna.",
        "What did illegal occupants make of the strongroom?",
        "sauna",
    ),
    (
        "The bridge at Ostrava Dolna was closed to lorries when engineers spotted rust in the cables.",
        "What defect made inspectors forbid heavy trucks from using the river crossing?",
        "rust in the cables",
    ),
    # arts
    (
        "Critics discovered that the celebrated landscape had been hanging upside down since 1931.",
        "From which year on was the famous painting displayed the wrong way up?",
        "1931",
    ),
    (
        "The leading man forgot his lines and recited a recipe for goulash.",
        "What did the actor say in place of his script?",
        "recipe for goulash",
    ),
    (
        "Evaristo's second novel was rejected by fifty-three publishers.",
        "How many firms did not want the author's manuscript?",
        "fifty-three",
    ),
    (
        "The sculptor carves only from driftwood collected after equinox storms.",
        "What raw material does the artist use for statues?",
        "driftwood",
    ),
    (
        "The museum's prize mummy proved to be stuffed with newspapers from Lyon.",
        "The fake Egyptian corpse was packed with what?",
        "newspapers",
    ),
    # science and nature
    (
        "Geologists at Mount Terevka measure tremors with instruments cooled by liquid nitrogen.",
        "What chills the sensors that pick up earthquakes?",
        "liquid nitrogen",
    ),
    (
        "The comet will next be visible from the southern hemisphere in 2087.",
        "When can sky-watchers below the equator see the icy wanderer again?",
        "2087",
    ),
    (
        "Divers exploring the wreck of the Halcyon brought up a crate of porcelain dolls.",
        "What cargo did the underwater team salvage from the sunken ship?",
        "porcelain dolls",
    ),
    (
        "The botanist named the new moss after her parole officer.",
        "Whom did the plant scientist honour with a species?",
        "her parole officer",
    ),
    (
        "Sewage tests in Harlow Vale revealed surprising amounts of caffeine.",
        "Name the stimulant detected in the wastewater.",
        "caffeine",
    ),
    # daily life and oddities
    (
        "Constable Ibekwe chased the pickpocket through the aquarium and caught him beside the manta rays.",
        "Next to which creatures did the police arrest a fleeing thief?",
        "manta rays",
    ),
    (
        "Someone has been leaving tulips on the bonnet of the postman's van each Monday.",
        "What does a secret admirer put on the mail carrier's vehicle weekly?",
        "tulips",
    ),
    (
        "Parking beside the cathedral costs nothing for anyone driving an electric car.",
        "What kind of automobile may be left free of charge next to the big church?",
        "electric",
    ),
    (
        "The lifeboat crew practise knots in the pub because the boathouse has no heating.",
        "Why do sea rescuers rehearse tying ropes over a pint?",
        "boathouse has no heating",
    ),
    (
        "Little Ottokar swallowed a domino on his fourth birthday.",
        "What game piece went down the throat of a preschooler?",
        "domino",
    ),
    (
        "The hermit of Skarvoy comes down from his cave once a year to buy batteries.",
        "Why does the recluse leave his mountain home annually?",
        "to buy batteries",
    ),
    (
        "You know Grandfather: he insisted on being buried with his fishing rod.",
        "The old man wanted something put into his coffin. Tell me what.",
        "fishing rod",
    ),
    (
        "The knitting circle unravelled after a dispute about whether crochet counts.",
        "Which craft split the needlework group?",
        "crochet",
    ),
    (
        "Laundry at the barracks comes back pink since a recruit left his beret in the drum.",
        "Which headgear dyed the soldiers' washing?",
        "beret",
    ),
    (
        "The translator mistook the ambassador's toast for a declaration of war.",
        "As what did the interpreter misunderstand the diplomat's speech at table?",
        "declaration of war",
    ),
]

NAME_ONLY = [
    (
        "Bexley Thornquist keeps her spare key inside a plaster frog by the gate.",
        "Where would a locked-out Bexley Thornquist look?",
        "plaster frog",
    ),
    (
        "Zephyrine teaches fire-eating at the community centre in the evenings.",
        "What dangerous circus skill can students learn from Zephyrine?",
        "fire-eating",
    ),
    ("Marrakesh Lane was resurfaced with cobbles dredged from the harbour.", "What paves Marrakesh Lane?", "cobbles"),
    ("Dragomir gave up boxing to breed canaries.", "Which birds is the ex-fighter Dragomir raising?", "canaries"),
    (
        "Port Elvery imports its drinking water by tanker from the mainland.",
        "How does the supply for taps arrive at Port Elvery?",
        "by tanker",
    ),
    (
        "Thistlewood & Sons made their fortune from corsets.",
        "Which undergarments got Thistlewood & Sons rich?",
        "corsets",
    ),
    (
        "Kasimira has been blind in one eye since a champagne cork hit her.",
        "What cost Kasimira half her sight?",
        "champagne cork",
    ),
    (
        "Professor Marchetti delivers his lectures barefoot, even in January.",
        "What is odd about how Marchetti appears in front of undergraduates?",
        "barefoot",
    ),
    (
        "Lake Ombrey turns violet every July thanks to a harmless alga.",
        "What hue is Lake Ombrey at the height of summer?",
        "violet",
    ),
    ("Oduya repaid the debt in saffron.", "With which spice did Oduya settle what was owed?", "saffron"),
    (
        "The Gallant Heron serves nothing but turnip stew on Mondays.",
        "What will diners get at the Gallant Heron when the week begins?",
        "turnip stew",
    ),
    (
        "Fiorella mailed her bridal gown to a stranger in Alaska.",
        "What did Fiorella send far north to someone she had never met?",
        "bridal gown",
    ),
    ("Halvard's beard caught fire during the candlelit vigil.", "What part of Halvard burned?", "beard"),
    (
        "Quentin Okafor proofreads train timetables for a living.",
        "What does Quentin Okafor check for errors in his job?",
        "train timetables",
    ),
    (
        "Vasilisa's parrot can imitate the dentist's drill.",
        "Which tool does the pet of Vasilisa sound like?",
        "dentist's drill",
    ),
    (
        "Mount Corriveau was climbed first by a pair of runaway nuns.",
        "Who conquered the summit of Mount Corriveau before anybody else?",
        "runaway nuns",
    ),
    ("Selwyn's greenhouse is warmed by an old pizza oven.", "What heats the tomatoes of Selwyn?", "pizza oven"),
    ("Nkechi negotiated a raise of eleven per cent.", "By how much did the salary of Nkechi go up?", "eleven per cent"),
    (
        "The Pemberley Prize comes with a lifetime supply of marmalade.",
        "What spread does a winner of the Pemberley Prize never need to buy?",
        "marmalade",
    ),
    ("Ambrose sleeps in a hammock slung between two bookcases.", "What does Ambrose have for a bed?", "hammock"),
    (
        "Nightjar was cancelled after its budget had been spent on balloons.",
        "What swallowed all the money for Nightjar?",
        "balloons",
    ),
    (
        "Theodosia lost the election by a single ballot.",
        "What was the margin when voters rejected Theodosia?",
        "single ballot",
    ),
    (
        "Hollis repairs typewriters in a shed behind the dairy.",
        "Which outdated office machines does Hollis fix?",
        "typewriters",
    ),
    (
        "The Corvina Orchestra rehearses in a decommissioned submarine.",
        "Inside what vessel do the musicians of the Corvina practise?",
        "decommissioned submarine",
    ),
    ("Yaroslav proposed to his girlfriend on an escalator.", "Where did Yaroslav get engaged?", "escalator"),
    (
        "Cape Ventosa's lighthouse flashes green rather than white.",
        "What shade is the beacon at Cape Ventosa?",
        "green",
    ),
    (
        "Imelda's doctor prescribed an hour of silence every afternoon.",
        "What treatment was Imelda ordered to follow?",
        "hour of silence",
    ),
    (
        "Rutger's sourdough starter was a gift from a Trappist monk.",
        "Who gave Rutger the live culture for bread?",
        "Trappist monk",
    ),
    (
        "The Balthazar Inquiry concluded that the dam burst because of muskrats.",
        "Which rodents were blamed for the flood by the Balthazar?",
        "muskrats",
    ),
    (
        "Signe embroiders maps of underground stations onto cushions.",
        "What does Signe decorate with needle and thread?",
        "cushions",
    ),
    (
        "Old Fenwick swore he'd seen a panther on the golf course.",
        "What beast did Fenwick claim to have spotted?",
        "panther",
    ),
    (
        "Araminta's first car ran on used cooking oil.",
        "What fuelled the earliest automobile of Araminta?",
        "used cooking oil",
    ),
    (
        "The village of Upper Snodding elects its mayor by a pancake race.",
        "How does Upper Snodding pick a leader?",
        "pancake race",
    ),
    ("Casimir broke his nose on a revolving door.", "What injured the face of Casimir?", "revolving door"),
    (
        "Bluewater Ferries has banned bagpipes on all crossings.",
        "Which instrument can't be played aboard the boats of Bluewater?",
        "bagpipes",
    ),
    (
        "Ekaterina keeps bees on the roof of the law faculty.",
        "On top of which building does Ekaterina produce honey?",
        "law faculty",
    ),
    (
        "Mortimer was expelled from the seminary for card tricks.",
        "What got Mortimer thrown out by the priests?",
        "card tricks",
    ),
    (
        "Juniper reboots itself each time the microwave is switched on.",
        "Use of which kitchen appliance knocks the server called Juniper offline?",
        "microwave",
    ),
    (
        "Philippa's grandmother smuggled seeds across the border in a walking stick.",
        "In what object did an ancestor of Philippa conceal contraband?",
        "walking stick",
    ),
    (
        "Rosalba auctioned her violin to pay for a kidney transplant.",
        "What surgery did Rosalba finance?",
        "kidney transplant",
    ),
    ("Camp Wachusett wakes the children with a foghorn.", "What rouses kids at dawn in Camp Wachusett?", "foghorn"),
    ("Leontes the tomcat was appointed stationmaster.", "Which post does the feline Leontes hold?", "stationmaster"),
    (
        "Hyacinth Bell inherited a salt mine from a man she once gave directions to.",
        "What property came to Hyacinth Bell through the will of a near stranger?",
        "salt mine",
    ),
    ("Torvald runs every morning in wooden clogs.", "What shoes does Torvald jog in?", "wooden clogs"),
    (
        "Baron Esterly paid his servants in theatre tickets.",
        "What wages did the staff of Baron Esterly receive?",
        "theatre tickets",
    ),
    (
        "Nimue's thesis examines the grammar of auctioneers.",
        "Whose speech is analysed in the dissertation of Nimue?",
        "auctioneers",
    ),
    (
        "The Larkspur has no thirteenth floor, only a corridor of mirrors.",
        "What lies between levels twelve and fourteen of the Larkspur?",
        "corridor of mirrors",
    ),
    (
        "Giacomo's knee swells up whenever thunder is on the way.",
        "Which joint warns Giacomo of an approaching storm?",
        "knee",
    ),
    (
        "Captain Ruske navigated by smell alone after the compass went overboard.",
        "Which sense guided Ruske at sea?",
        "smell",
    ),
    (
        "Wilhelmina's allergy forced her out of the perfume trade.",
        "Which industry did Wilhelmina have to quit for medical reasons?",
        "perfume",
    ),
    ("Dunmarrow Castle was sold to a manufacturer of zips.", "What does the buyer of Dunmarrow produce?", "zips"),
    ("Jocasta coaches chess in the women's prison.", "Which game do inmates learn from Jocasta?", "chess"),
    (
        "Benedikt's invention peels eggs with a jet of steam.",
        "What does the device of Benedikt use to remove shells?",
        "jet of steam",
    ),
    ("Ashgrove closes early on account of bats.", "Which flying mammals make Ashgrove shut before time?", "bats"),
    (
        "Sunniva learned Portuguese from football commentaries.",
        "How did Sunniva pick up a foreign language?",
        "football commentaries",
    ),
    ("Eleazar wore odd socks to his own trial.", "What mismatched items did Eleazar have on in court?", "socks"),
    ("Tobias Finch demolished the orangery with a rented bulldozer.", "What did Tobias Finch knock down?", "orangery"),
    (
        "Radio Kestrel broadcasts nothing but birdsong between midnight and dawn.",
        "What can late listeners hear on Radio Kestrel?",
        "birdsong",
    ),
    (
        "Clementine's fever broke on the ninth day.",
        "When did the temperature of Clementine return to normal?",
        "ninth day",
    ),
    (
        "Ptolemy Grange is haunted, they say, by a weeping piano tuner.",
        "Whose ghost roams Ptolemy Grange?",
        "piano tuner",
    ),
]

LISTS = {
    "adjectives": listed("""
        amber; brittle; candid; dapper; earnest; feral; gaunt; husky; icy; jaunty; keen; lanky; mellow; nimble;
        ornate; pallid; quaint; rugged; sullen; tepid; uncanny; verdant; wistful; zesty; aloof; brisk; crimson;
        dusky; elastic; frosty; gilded; humble; idle; jagged; kooky; lavish; murky; noble; oblong; placid; quirky;
        rustic; sleek; tangled; upright; velvet; wobbly; yeasty; abrupt; blunt; cosy; drowsy; eerie; fabled; glossy;
        hasty; inky; limber; mossy; nifty
    """),
    "nouns": listed("""
        anvil; badger; cactus; dagger; easel; falcon; gazebo; hatchet; igloo; jigsaw; kayak; lantern; magnet;
        nectar; otter; pebble; quiver; rudder; saddle; tripod; urchin; velcro; walrus; yogurt; zither; acorn;
        bucket; candle; dynamo; ember; fiddle; garnet; hammer; inkwell; jacket; kernel; ladder; mallet; needle;
        oyster; pulley; quarry; ribbon; sickle; thimble; umbrella; vessel; whisker; xylophone; yardstick; almanac;
        bramble; cutlass; dumpling; envelope; funnel; goblet; harness; icicle; javelin; kiosk; lobster; mitten;
        nugget; obelisk; pendant; quilt; raft; spindle; turret; unicycle; vineyard; waffle; axle; buckle; chisel;
        drawbridge; eggcup; feather; gargoyle
    """),
    "first_names": listed("""
        Adaora; Bjorn; Carmela; Desmond; Elspeth; Farid; Greta; Hamish; Ines; Jolanta; Kwame; Lucinda; Matthias;
        Noor; Olivier; Petra; Rashid; Saoirse; Tomasz; Ulrike; Vikram; Winifred; Xiomara; Yusuf; Zelda; Aoife;
        Bruno; Chidi; Dorota; Emeka; Freya; Gideon; Hiroko; Ignacio; Jasmin; Karel; Leila; Mirko; Nadia; Oskar;
        Paloma; Reuben; Sakura; Thandiwe; Umberto; Veronika; Wojciech; Yvette; Zoltan; Anouk; Bertrand; Cosima;
        Dmitri; Esperanza; Florian; Ginevra; Hassan; Ilse; Joaquin; Keiko
    """),
    "last_names": listed("""
        Applegate; Bianchi; Castellano; Drummond; Eriksen; Fairweather; Goldberg; Hashimoto; Ivanova; Jankowski;
        Kowalczyk; Lindqvist; Mbeki; Nakamura; Oyelaran; Papadakis; Quigley; Rasmussen; Szabo; Tremblay; Underhill;
        Vasquez; Whitlock; Xanthos; Yamamoto; Zielinski; Ashcroft; Baptiste; Cholmondeley; Dubois; Ekwueme;
        Fitzgerald; Grabowski; Halloran; Ingram; Jovanovic; Kirkpatrick; Lefebvre; Montague; Novotny; Osborne;
        Petrosyan; Quispe; Rutherford; Sorensen; Takahashi; Ustinov; Venkataraman; Wainwright; Youssef; Zamora;
        Achterberg; Bloomfield; Carvalho; Delacroix; Espinoza; Featherstone; Guerrero; Hutchinson; Iwasaki
    """),
}
