"""Pairs of an adjective and a noun: keys of needles, and the words that are counted."""

from __future__ import annotations

import random

# no adjective ends with another one and no noun begins with another one, so that no pair is a part of another pair
_ADJECTIVES = """
amber ample angry arctic autumn bitter blank bold brave brief bright brisk broad bumpy busy calm careful cheap chief
civil clean clever cloudy coastal common cosmic crimson crisp curious daily damp daring dear deep dense dizzy double
dusty eager early elder empty equal exact faint fancy fast fierce final firm flat fluent foreign frank fresh frosty
gentle giant glad global golden grand grave great grim happy harsh heavy honest humble idle inner jolly keen kind
large lasting late lazy little lively local lonely loud loyal lucky lunar major mellow mild modern modest narrow
native neat nimble noble northern novel obvious odd olive open orange patient plain polite precious proud pure purple
quick quiet rapid ready rough round royal rural sacred scarlet secret serious severe sharp shiny silent silver simple
sleepy slim smooth sober solar solemn solid southern spare stable steady steep stern sticky stout strange sturdy
subtle sudden sunny sweet swift tall tame tender thick timid tiny tired tough urban useful vague valid vast violet
vivid warm weary wild windy wise witty wooden young zealous
"""
_NOUNS = """
acorn actor alley anchor apple archer arrow atlas attic badge bakery balcony banjo barrel basket beacon beetle bell
bench bicycle blanket blossom bottle bracket branch brick bridge bucket butter cabin cactus camel candle canyon carpet
castle cellar chapel cherry chimney circus clock clover coffee comet copper corner cottage cotton cousin cradle crane
crater cricket crown curtain cushion dancer desert diamond dinner doctor dolphin donkey dragon drawer drum eagle
engine falcon farmer feather fence ferry fiddle finger flute forest fossil fountain fox gallery garden garlic gate
ginger glacier glove goose grape guitar hammer harbour harvest hazel hedge helmet heron hill honey horizon hotel
island ivory jacket jaguar jewel journey jungle kettle kitchen kite ladder lagoon lake lantern lemon letter library
lizard lobster locket lumber magnet mango maple marble market meadow melon mirror monkey morning mountain museum
mushroom napkin needle nest notebook oasis ocean onion orchard otter oven owl oyster paddle palace panther parcel
parrot pasture peach pebble pelican pencil pepper piano pigeon pillow pirate planet pocket pond poppy porch potato
prairie pumpkin puppet puzzle quarry rabbit radio raven ribbon river robin rocket saddle sailor salmon sandal scarf
school shadow shelter shovel signal singer sparrow spider spoon squirrel stable station statue stove summer swan
tailor teapot temple thunder ticket tiger timber tower tractor trumpet tunnel turtle valley vessel village violin
waffle wagon walnut water whale whistle window winter wizard yogurt zebra
"""
ADJECTIVES = tuple(_ADJECTIVES.split())
NOUNS = tuple(_NOUNS.split())


def pairs(generator: random.Random, count: int) -> list[str]:
    """``count`` different pairs such as ``calm-river``, at most ``len(ADJECTIVES) * len(NOUNS)``."""
    chosen = generator.sample(range(len(ADJECTIVES) * len(NOUNS)), count)
    return [f"{ADJECTIVES[number // len(NOUNS)]}-{NOUNS[number % len(NOUNS)]}" for number in chosen]
