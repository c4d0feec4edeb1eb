"""English words for generated texts: common ones, written down for this project."""

from __future__ import annotations

from functools import cache
from itertools import product

ADJECTIVES = tuple(
    """
    able ample amber ancient arid autumn awkward bare basic bitter blank bleak blunt bold bored brave brief bright brisk
    broad broken bronze busy calm candid careful casual cheap chilly civil clean clear clever cloudy coarse cold common
    copper coral cosy crimson crisp curious damp dapper daring dark deep dense dim distant dizzy double dreary dry dull
    dusty eager early easy elder empty equal exact faded faint fair famous fancy feeble fertile final fine firm flat
    fluent fond formal frail free fresh frosty frozen gentle giant glad gloomy golden good grand grave gray green handy
    happy hardy harsh hasty hazy heavy hidden hollow honest humble hungry icy idle inner ivory jolly keen kind large last
    late lavish lazy lean level light little lively lonely long loose loud lovely loyal lucky lunar marble mellow merry
    mild misty modest mossy muddy narrow neat nervous new noble noisy northern novel oaken odd olive open orderly outer
    pale patient peaceful plain pleasant polite poor proper proud pure purple quaint quick quiet rapid rare ready rich
    ripe rough round royal rural rusty salty sandy scarce secret serene sharp shiny short shy silent silver simple sleek
    sleepy slim slow small smooth snowy sober soft solar solid sour southern spare steady steep stern still stormy
    strange strict strong sturdy subtle sudden sunny sweet swift tall tame tender thick thin tidy tight tiny tired tough
    tranquil urban vague vast velvet violet vivid warm wary weak wealthy wide wild windy wise wooden worthy young
    """.split()
)
NOUNS = tuple(
    """
    acorn alley almond anchor anvil apple apron arch armchair arrow attic axle badge bakery balcony ballad bamboo banjo
    banner barge barley barn barrel basin basket beacon bell bench berry bicycle blanket blossom bonfire bonnet bottle
    boulder bracelet branch brass bread breeze brick bridge broom brush bucket buckle bundle butter button cabin cable
    cactus camel candle canoe canvas canyon captain caravan carpet carriage carrot castle cathedral cattle cavern cedar
    cellar chair chalk channel chapel cherry chest chimney chisel church cider circus clarinet cliff clock closet cloud
    clover coach coast cobbler coffee collar comet compass cotton cottage counter courtyard cradle crane crater creek
    cricket crown crystal cupboard curtain cushion daisy dale dancer deacon desert desk diamond dolphin donkey door
    dragon drawer dresser drum duke eagle easel elbow engine envelope estate falcon farmer feather fence fern ferry
    fiddle field finger fisher flag flame flask fleet flute forest forge fountain fox friend frost funnel furnace galaxy
    gallery garden garland gate ginger glacier glove goblet granary grape gravel grocer guitar gutter hammer hammock
    harbor harp harvest hatchet hawk hazel hedge helmet hermit heron hill hinge honey hood horizon hostel hotel island
    ivy jacket jar jasmine jewel judge jug jungle kennel kettle kitchen kite ladder ladle lagoon lake lamp lantern lark
    lather latch lattice laurel lawn leaf ledger lemon lens letter lever library lily lizard locket loft loom lumber
    mansion mantle map maple market marsh mason meadow melody melon merchant meteor mill miner mirror mitten monk moor
    mortar mountain mug mule mural mushroom napkin needle nephew nest notebook nutmeg oak oar oasis ocean onion orchard
    orchid organ otter oven owl oyster paddle painter palace palm panther paper parade parcel parlor parrot pasture path
    pavement pearl pebble pelican pencil pepper piano picnic pigeon pillar pillow pilot pine pitcher planet plaster
    plateau plow plum pocket poem pond poplar poppy porch potter prairie prince printer pulley pumpkin puppet quarry
    quilt rabbit radish raft railway rain rainbow raisin ranch raven reed reef ribbon rider ridge river robin rocket roof
    rope rose rudder saddle sailor satchel saucer scarf scholar school scissors sculptor seal shelf shepherd ship shore
    shovel shrub sickle singer sister sketch sled slipper smith snail sofa sparrow spice spider spoon spring squirrel
    stable stage stair star statue steam steeple stone stool storm stove straw stream street sugar summit sundial sunset
    swallow swan table tailor tapestry tavern teacher temple tent thicket thimble thistle thread throne thunder ticket
    timber tinker toast torch tower trail trader train tray treasure trellis trout trumpet tulip tunnel turnip turtle
    umbrella uncle valley vase vessel village vine violin voyage wagon walnut warden waterfall weaver well wharf wheat
    wheel whistle willow window winter wizard wolf workshop wreath yard yarn zebra
    """.split()
)
VERBS = tuple(
    """
    admire adopt advise allow amuse answer argue arrange arrive assist attend bake balance bathe begin behave bloom
    boil borrow bounce bring build bury carve catch charge chase choose climb collect compose copy cough count cover
    crawl create cross cure dance decide defend deliver describe dig dine divide draw dream drift drive earn enjoy enter
    examine expand explain explore fasten fetch fill float follow forgive freeze gather glow greet grind guess guide
    hang heal hesitate hire hold hurry imagine improve inspect invent invite join judge juggle kneel knit laugh learn
    lend lift linger listen manage march measure melt mention mix notice obey observe offer order paint pardon pause
    polish ponder pour practice praise prefer prepare preserve pretend promise protect prove provide publish punish
    pursue reach receive recite record refuse repair repeat reply rescue return revise row scatter search settle shiver
    signal smile sneeze solve spread squeeze stir stretch stumble suggest supply surprise swim teach tempt thank trade
    travel tumble unfold unite visit wander watch weave welcome whisper wonder write yawn yield
    """.split()
)
WORDS = tuple(sorted({*ADJECTIVES, *NOUNS, *VERBS}))


@cache
def compounds() -> tuple[str, ...]:
    """Every adjective with every noun, as in `silent-harbor`: names of needles, as in RULER."""
    return tuple(sorted(f"{adjective}-{noun}" for adjective, noun in product(ADJECTIVES, NOUNS)))


def pool(count: int) -> tuple[str, ...]:
    """At least `count` words of one kind: single words, compounds where those are too few.

    Raises:
        ValueError: there are not so many.
    """
    found = WORDS if count <= len(WORDS) else compounds()
    if count > len(found):
        raise ValueError(f"{count} different words are wanted, there are {len(found)}")
    return found
