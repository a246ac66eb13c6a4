"""The words of the picture book: what writers may call a thing, and what a parser may read it as."""

from __future__ import annotations

from lib.picturebook.scenes import FAMILIES

# Singular and plural of every name of a category, the commonest first.
NOUNS: dict[str, tuple[tuple[str, str], ...]] = {
    "owl": (("owl", "owls"), ("hoot owl", "hoot owls")),
    "parrot": (("parrot", "parrots"), ("macaw", "macaws")),
    "penguin": (("penguin", "penguins"),),
    "duck": (("duck", "ducks"), ("duckling", "ducklings")),
    "pine": (("pine tree", "pine trees"), ("fir tree", "fir trees"), ("pine", "pines")),
    "palm": (("palm tree", "palm trees"), ("palm", "palms")),
    "sailboat": (("sailboat", "sailboats"), ("sailing boat", "sailing boats"), ("yacht", "yachts")),
    "canoe": (("canoe", "canoes"), ("kayak", "kayaks")),
    "car": (("car", "cars"), ("automobile", "automobiles")),
    "bus": (("bus", "buses"), ("coach", "coaches")),
    "truck": (("truck", "trucks"), ("lorry", "lorries")),
    "cat": (("cat", "cats"), ("kitten", "kittens")),
    "dog": (("dog", "dogs"), ("puppy", "puppies")),
    "rabbit": (("rabbit", "rabbits"), ("bunny", "bunnies")),
    "tulip": (("tulip", "tulips"),),
    "daisy": (("daisy", "daisies"),),
    "house": (("house", "houses"), ("cottage", "cottages")),
    "tower": (("tower", "towers"), ("castle tower", "castle towers")),
    "tent": (("tent", "tents"), ("camping tent", "camping tents")),
    "ball": (("ball", "balls"), ("bouncy ball", "bouncy balls")),
    "kite": (("kite", "kites"), ("paper kite", "paper kites")),
    "balloon": (("balloon", "balloons"),),
    "fish": (("fish", "fish"),),
    "crab": (("crab", "crabs"),),
    "snowman": (("snowman", "snowmen"),),
    "butterfly": (("butterfly", "butterflies"),),
}
FAMILY_NOUNS: dict[str, tuple[tuple[str, str], ...]] = {
    "bird": (("bird", "birds"),),
    "tree": (("tree", "trees"),),
    "boat": (("boat", "boats"),),
    "vehicle": (("vehicle", "vehicles"),),
    "pet": (("animal", "animals"), ("pet", "pets")),
    "flower": (("flower", "flowers"), ("blossom", "blossoms")),
    "building": (("building", "buildings"),),
    "toy": (("toy", "toys"),),
    "sea animal": (("sea animal", "sea animals"), ("sea creature", "sea creatures")),
    "insect": (("insect", "insects"),),
    "figure": (("figure", "figures"),),
}
assert set(FAMILY_NOUNS) == set(FAMILIES)

COLOUR_WORDS: dict[str, tuple[str, ...]] = {
    "red": ("red",),
    "orange": ("orange",),
    "yellow": ("yellow",),
    "green": ("green",),
    "blue": ("blue",),
    "purple": ("purple", "violet"),
    "white": ("white",),
    "black": ("black",),
}
SIZE_WORDS: dict[str, tuple[str, ...]] = {"small": ("small", "little", "tiny"), "big": ("big", "large", "huge")}
COUNT_WORDS: dict[int, tuple[str, ...]] = {2: ("two", "a pair of"), 3: ("three",)}

SETTING_PHRASES: dict[str, tuple[str, ...]] = {
    "meadow": ("in a meadow", "on the grass", "in a green field", "on a grassy hill"),
    "beach": ("on the beach", "on the sand", "on a sandy shore", "by the seaside"),
    "sea": ("on the water", "on the sea", "in the ocean", "out at sea"),
    "snow": ("in the snow", "on a snowy field", "on snowy ground", "in a winter landscape"),
    "night": ("at night", "under the stars", "in the moonlight", "under a night sky"),
    "city": ("in the city", "on a city street", "in front of a skyline", "in town"),
}
RELATION_PHRASES: dict[str, tuple[str, ...]] = {
    "left": ("to the left of", "on the left of", "left of"),
    "right": ("to the right of", "on the right of", "right of"),
    "above": ("above", "over", "high above"),
    "below": ("below", "under", "beneath"),
    "next": ("next to", "beside", "near"),
}
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above", "next": "next"}

# What a thing is seen doing, by family; AIRBORNE things and FLYERS above others hover instead.
POSTURES: dict[str, tuple[str, ...]] = {
    "bird": ("sitting", "resting"),
    "tree": ("growing", "standing"),
    "boat": ("floating", "drifting"),
    "vehicle": ("parked", "standing"),
    "pet": ("sitting", "standing"),
    "flower": ("growing", "blooming"),
    "building": ("standing", "located"),
    "toy": ("lying", "resting"),
    "sea animal": ("resting", "waiting"),
    "insect": ("flying", "fluttering"),
    "figure": ("standing", "waiting"),
    "airborne": ("flying", "floating"),
}
