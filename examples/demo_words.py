"""Word lists and sentence templates of the demo stories.

A template holds slots and verb forms: `{name}` is filled from the scene or a list of words,
and `[finds|found]` becomes its first form in a story of the present, its second in the past.
"""

from typing import NamedTuple


class MoodLine(NamedTuple):
    """A sentence whose beginning says nothing about the mood of the story.

    Attributes:
        stem: The shared beginning.
        happy: How the sentence goes on in a happy story; starts with a space.
        sad: How it goes on in a sad story; starts with a space.
    """

    stem: str
    happy: str
    sad: str


GIRLS = (
    "Mia", "Lily", "Anna", "Sara", "Zoe", "Emma", "Rosie", "Nora", "Ella", "Ruby", "Lucy",
    "Amy", "Kate", "Jane", "Molly", "Ivy",
)  # fmt: skip
BOYS = (
    "Tom", "Ben", "Max", "Sam", "Leo", "Jack", "Tim", "Finn", "Noah", "Adam", "Luke", "Dan",
    "Oscar", "Pete", "Bob", "Joe",
)  # fmt: skip
PARENTS = ("Mom", "Dad", "Grandma", "Grandpa")
ANIMALS = (
    "dog", "cat", "rabbit", "pony", "goat", "duck", "bird", "puppy", "kitten", "squirrel",
)  # fmt: skip
COLOURS = (
    "red", "blue", "green", "yellow", "little", "big", "shiny", "round", "soft", "wooden",
    "white", "brown",
)  # fmt: skip
NOUNS = (
    "kite", "ball", "drum", "boat", "doll", "car", "book", "box", "hat", "cup", "lamp",
    "bell", "shell", "stone", "ring", "coat", "basket", "bag", "flute", "puppet", "train",
    "wagon", "bucket", "clock",
)  # fmt: skip
INDOORS = (
    "in the kitchen", "in the hall", "under the bed", "on the stairs", "by the window",
    "in the attic", "behind the door", "near the fire",
)  # fmt: skip
OUTDOORS = (
    "in the garden", "by the river", "at the park", "on the beach", "under a tree",
    "near the road", "on the hill", "behind the barn",
)  # fmt: skip

# Earlier words are drawn more often, as in real text.
MOOD_WORDS = {
    "happy": {
        "adj": (
            "happy", "glad", "cheerful", "proud", "joyful", "delighted", "excited", "merry",
            "pleased", "jolly",
        ),
        "act": (
            "[smiles|smiled]", "[laughs|laughed]", "[dances|danced]", "[claps|clapped]",
            "[grins|grinned]", "[sings|sang]", "[cheers|cheered]", "[giggles|giggled]",
        ),
        "noun_of": ("joy", "happiness", "delight", "fun"),
        "adv": ("happily", "cheerfully", "gladly", "proudly"),
    },
    "sad": {
        "adj": (
            "sad", "unhappy", "gloomy", "upset", "lonely", "sorry", "miserable", "tearful",
            "worried", "scared",
        ),
        "act": (
            "[cries|cried]", "[frowns|frowned]", "[sobs|sobbed]", "[weeps|wept]",
            "[sighs|sighed]", "[pouts|pouted]", "[sniffs|sniffed]", "[groans|groaned]",
        ),
        "noun_of": ("sorrow", "sadness", "grief", "fear"),
        "adv": ("sadly", "gloomily", "unhappily", "bitterly"),
    },
}  # fmt: skip

# Said before the first verb: they leave the tense open.
PRELUDES = (
    "A story about {name}.",
    "Look, a {thing}!",
    "What a day!",
    "{name} and the {thing}.",
    "Knock, knock, knock!",
    "One {noun}, one {animal} and one {child}.",
    '"Hello, {name}!" "Hello, {friend}!"',
    "A tale of a {noun} and a {animal}.",
    "Up and down, up and down!",
    "A {child}, a {animal} and a {thing}.",
    "Oh, a {noun}!",
    '"Good morning, {name}!"',
)
MOOD_PRELUDES = (
    "A {adj} story about {name}.",
    "A {adj} tale of a {noun}.",
    "A {adj} {child} and a {thing}.",
    "A story full of {noun_of}.",
)
OPENING_STEMS = (
    "One day, {name}",
    "In the morning, {name}",
    "A {child} named {name}",
    "On Monday, little {name}",
    "{name}",
    "After lunch, {name}",
    "Once, a {child} named {name}",
    "On a quiet day, {name}",
    "Early in the day, {name}",
    "Far from home, {name}",
    "A small {child} called {name}",
    "On Sunday, {name}",
)
OPENING_ACTIONS = (
    " [finds|found] a {thing} {place}.",
    " [sees|saw] a {thing} {place}.",
    " [plays|played] with a {thing} {place}.",
    " [picks|picked] up a {thing} {place}.",
    " [sits|sat] {place} with a {thing}.",
    " [holds|held] a {thing} {place}.",
    " [has|had] a {thing} and [stands|stood] {place}.",
    " [makes|made] a {thing} {place}.",
    " [lifts|lifted] a {thing} {place}.",
    " [keeps|kept] a {thing} {place}.",
    " [waits|waited] {place} with a {thing}.",
    " [hides|hid] a {thing} {place}.",
    " [brings|brought] a {thing} and [rests|rested] {place}.",
    " [paints|painted] a {thing} {place}.",
    " [cleans|cleaned] a {thing} {place}.",
    " [drops|dropped] a {thing} {place}.",
)
FIRST_QUOTES = (
    ('"What is this?"', " [asks|asked] {name}."),
    ('"Where is the {noun}?"', " [says|said] {name}."),
    ('"Come here, {name}!"', " [calls|called] {parent}."),
    ('"Look at that!"', " [shouts|shouted] {name}."),
    ('"Can you see the {noun}?"', " [asks|asked] {friend}."),
    ('"Time to go out, {name},"', " [says|said] {parent}."),
    ('"A {noun}, a {noun}!"', " [yells|yelled] {friend}."),
    ('"Wait for me!"', " [calls|called] {name}."),
)
AFTER_QUOTE = (
    "{name} [has|had] a {thing} {place}.",
    "{he} [stands|stood] {place} with a {thing}.",
    "There [is|was] a {thing} {place}.",
    "{he} [sees|saw] a {thing} {place}.",
)
WEATHER = {
    "sun": (
        ("The sun", " [is|was] out and the sky [is|was] blue."),
        ("Outside, the air", " [feels|felt] warm."),
        ("The day", " [is|was] bright and dry."),
    ),
    "rain": (
        ("Outside, the rain", " [falls|fell] on the roof."),
        ("The sky", " [is|was] grey and it [rains|rained]."),
        ("Drops of rain", " [run|ran] down the wall."),
    ),
    "wind": (
        ("The wind", " [blows|blew] over the hills."),
        ("Outside, the trees", " [move|moved] in the wind."),
        ("A strong wind", " [comes|came] from the north."),
    ),
    "snow": (
        ("The snow", " [lies|lay] deep on the ground."),
        ("Outside, the world", " [is|was] white with snow."),
        ("A little snow", " [falls|fell] from the sky."),
    ),
}
MIDDLES = (
    "{he} [looks|looked] at it for a long time.",
    "{he} [shows|showed] it to {friend}.",
    "{name} [turns|turned] the {noun} around and around.",
    "It [is|was] a very {colour} {noun}.",
    "{he} [takes|took] it to {parent}.",
    "{friend} [asks|asked] about the {noun}.",
    "A {animal} [comes|came] near and [looks|looked] at the {noun}.",
    "{he} [puts|put] the {noun} down and [waits|waited].",
    "{name} [thinks|thought] about the {noun}.",
    "{friend} and {parent} [come|came] to see it.",
    "{he} [touches|touched] it with one hand.",
    "The {noun} [has|had] a {colour} spot on it.",
    "{parent} [reads|read] a letter to {him}.",
    "{he} [counts|counted] to ten and [opens|opened] {his} eyes.",
    "The {animal} [sits|sat] next to {him}.",
    "{he} [washes|washed] the {noun} with water.",
    "{friend} [stands|stood] next to {him} and [looks|looked] at the {noun}.",
    "{name} [carries|carried] it home in a bag.",
)
INDOOR_MIDDLES = (
    "{he} [closes|closed] the door and [sits|sat] on a chair.",
    "The room [is|was] quiet.",
    "{name} [puts|put] the {noun} on the table.",
    "{he} [hears|heard] steps on the stairs.",
)
OUTDOOR_MIDDLES = (
    "{he} [walks|walked] along the path.",
    "The grass [is|was] tall and green.",
    "{name} [puts|put] the {noun} on a log.",
    "{he} [hears|heard] a bell far away.",
)
QUOTES = (
    '"What can it do?" [asks|asked] {friend}.',
    '"May I hold it?" [says|said] {friend}.',
    '"It is a {noun}," [says|said] {parent}.',
    '{friend} [says|said], "Show me the {noun}."',
    '"I will keep it," [says|said] {name}.',
    '{parent} [asks|asked], "Where are you, {name}?"',
)
LATER = (
    "The clock [strikes|struck] six.",
    "{parent} [looks|looked] at {him}.",
    "{he} [walks|walked] to the gate.",
    "Everyone [turns|turned] to look at {name}.",
    "A bird [sits|sat] on the fence.",
)
FEELINGS = (
    MoodLine("{he} [feels|felt]", " {adj}.", " {adj}."),
    MoodLine("{name} [is|was]", " {adj}.", " {adj}."),
    MoodLine("{he} [feels|felt]", " {adj} and {act}.", " {adj} and {act}."),
    MoodLine("{name} [is|was]", " {adj} and {adj}.", " {adj} and {adj}."),
    MoodLine("{he} [feels|felt]", " very {adj}.", " very {adj}."),
    MoodLine("{he} [looks|looked]", " {adj} and {act}.", " {adj} and {act}."),
    MoodLine("And then {name}", " {act} and {act}.", " {act} and {act}."),
    MoodLine("That [makes|made] {him}", " {adj}.", " {adj}."),
    MoodLine("Now {he} [is|was]", " a {adj} {child}.", " a {adj} {child}."),
    MoodLine("{his} heart [is|was]", " full of {noun_of}.", " full of {noun_of}."),
    MoodLine("All day long, {he}", " {act}.", " {act}."),
    MoodLine("{name} [becomes|became]", " {adj} and {act}.", " {adj} and {act}."),
    MoodLine("{his} eyes [are|were]", " bright with {noun_of}.", " wet with tears."),
    MoodLine("{his} face [is|was]", " full of smiles.", " pale with {noun_of}."),
    MoodLine("{name} [looks|looked] up and", " {act}.", " {act}."),
    MoodLine("At this, {he}", " [jumps|jumped] for joy.", " [hides|hid] {his} face."),
)
# One event a subject, so that a story does not say two things of one friend.
EVENTS = {
    "noun": (
        MoodLine("Then the {noun}", " [shines|shone] like gold.", " [breaks|broke] in two."),
        MoodLine("Soon the {noun}", " [is|was] as good as new.", " [is|was] lost for ever."),
        MoodLine("The {noun}", " [works|worked] very well.", " [does|did] not work any more."),
        MoodLine("Inside the {noun} [is|was]", " a gift.", " a nasty spider."),
    ),
    "friend": (
        MoodLine("Then {friend}", " [gives|gave] {him} a hug.", " [steals|stole] the {noun}."),
        MoodLine("Soon {friend}", " [plays|played] with {him}.", " [leaves|left] {him} alone."),
        MoodLine("Just then, {friend}", " [tells|told] a joke.", " [pushes|pushed] {him}."),
        MoodLine(
            "After that, {friend}",
            " [shares|shared] a cake.",
            " [calls|called] {him} names.",
        ),
    ),
    "parent": (
        MoodLine("Then {parent}", " [bakes|baked] a sweet cake.", " [gets|got] very ill."),
        MoodLine("Later, {parent}", " [thanks|thanked] {him}.", " [shouts|shouted] at {him}."),
        MoodLine("At noon, {parent}", " [hugs|hugged] {him}.", " [scolds|scolded] {him}."),
        MoodLine(
            "Soon {parent}", " [gives|gave] {him} a treat.", " [breaks|broke] the {noun}."
        ),
    ),
    "self": (
        MoodLine("In the end, {he}", " [wins|won] a prize.", " [loses|lost] the {noun}."),
        MoodLine(
            "Suddenly, {he}", " [finds|found] a lot of sweets.", " [falls|fell] in the mud."
        ),
        MoodLine("At last, {he} [has|had]", " a new friend.", " no friends at all."),
        MoodLine("This time, {he}", " [gets|got] a nice present.", " [hurts|hurt] {his} knee."),
    ),
    "animal": (
        MoodLine(
            "Then the {animal}", " [licks|licked] {his} hand.", " [bites|bit] {his} hand."
        ),
        MoodLine("The {animal}", " [plays|played] with {him}.", " [runs|ran] away from {him}."),
    ),
}
MOOD_QUOTES = (
    MoodLine('"I am', ' so {adj}," [says|said] {name}.', ' so {adj}," [says|said] {name}.'),
    MoodLine('"This is', ' lovely!" [says|said] {name}.', ' awful!" [says|said] {name}.'),
    MoodLine('"What a', ' nice day!" {he} [says|said].', ' bad day!" {he} [says|said].'),
    MoodLine('"Today I feel', ' {adj}!" {he} [says|said].', ' {adj}!" {he} [says|said].'),
    MoodLine('{name} [says|said], "I', ' feel {adj}."', ' feel {adj}."'),
    MoodLine('{friend} [says|said], "You look', ' {adj}."', ' {adj}."'),
    MoodLine(
        '"Why are you so', ' {adj}?" [asks|asked] {friend}.', ' {adj}?" [asks|asked] {friend}.'
    ),
    MoodLine('"Oh,', ' how wonderful!" {he} [says|said].', ' how terrible!" {he} [says|said].'),
)
CLOSINGS = (
    MoodLine("It [is|was] the", " best day of {his} life.", " worst day of {his} life."),
    MoodLine("That night, {he}", " [dreams|dreamed] of good things.", " [has|had] bad dreams."),
    MoodLine("{name} [goes|went] home", " {adv}.", " {adv}."),
    MoodLine("In the evening, {he}", " {act} in bed.", " {act} in bed."),
    MoodLine("So the day [ends|ended]", " with laughter.", " with tears."),
    MoodLine("At bedtime, {name} [is|was]", " still {adj}.", " still {adj}."),
    MoodLine("{he} [walks|walked] home with", " a big smile.", " a heavy heart."),
    MoodLine("And so {name}", " [lives|lived] in {noun_of}.", " [stays|stayed] all alone."),
)
