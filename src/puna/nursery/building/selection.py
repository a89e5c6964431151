"""Which emoji become concepts, and which of those make the naming test: rules fixed before any model was trained.

A concept must be picturable (no flags, clock faces, keycaps, arrows, zodiac, skin-tone and gender variants), not a
near-duplicate of another, named in all 12 languages by CLDR and drawn by every style that draws emoji of its age.
The naming set is narrower: concrete animals, food, plants, vehicles and objects with a plain short English name.
"""


def listed(names: str) -> set[str]:
    """The names in a string that separates them by bars."""
    return set(names.split("|"))


# Subgroups of which only the listed members are kept (the rest are near-duplicates or not picturable).
ONLY = {
    "face-smiling": "grinning face|smiling face with halo|upside-down face|winking face",
    "face-affection": "smiling face with heart-eyes|star-struck|face blowing a kiss",
    "face-tongue": "face with tongue|money-mouth face",
    "face-hand": "shushing face|thinking face",
    "face-neutral-skeptical": "zipper-mouth face|neutral face|face with rolling eyes|lying face",
    "face-sleepy": "sleeping face|drooling face",
    "face-unwell": "face with medical mask|face with thermometer|nauseated face|exploding head|cold face",
    "face-hat": "cowboy hat face|partying face",
    "face-glasses": "smiling face with sunglasses|nerd face",
    "face-concerned": "confused face|frowning face|crying face|loudly crying face|face screaming in fear",
    "face-negative": "angry face|face with steam from nose|smiling face with horns|skull|skull and crossbones",
    "cat-face": "grinning cat|crying cat|kissing cat",
    "heart": "love letter|heart with arrow|heart with ribbon|two hearts|broken heart|heart on fire|mending heart"
    "|red heart|yellow heart|green heart|blue heart|purple heart|black heart",
    "emotion": "kiss mark|collision|hole|speech balloon|thought balloon|sweat droplets|dizzy",
    "hand-fingers-open": "waving hand|raised hand|vulcan salute",
    "hand-fingers-partial": "OK hand|pinched fingers|victory hand|crossed fingers|call me hand",
    "hand-single-finger": "index pointing up|backhand index pointing left",
    "hand-fingers-closed": "thumbs up|thumbs down|raised fist",
    "hands": "clapping hands|handshake|folded hands|raising hands",
    "hand-prop": "writing hand|nail polish|selfie",
    "person": "baby|boy|girl|man|woman|old man|old woman|person: beard",
    "person-gesture": "person shrugging|person raising hand|person bowing|person facepalming",
    "person-role": "student|teacher|judge|farmer|cook|mechanic|factory worker|scientist|technologist|singer|artist"
    "|pilot|astronaut|firefighter|police officer|detective|guard|ninja|construction worker|princess|prince"
    "|person wearing turban|person in tuxedo|person with veil|pregnant woman|breast-feeding|health worker",
    "person-fantasy": "baby angel|Santa Claus|Mrs. Claus|superhero|supervillain|mage|fairy|vampire|merperson|elf"
    "|troll|man genie|man zombie",
    "person-activity": "person getting massage|person getting haircut|person walking|person kneeling|person running"
    "|woman dancing|person in steamy room|person climbing",
    "person-sport": "person fencing|horse racing|skier|snowboarder|person golfing|person surfing|person rowing boat"
    "|person swimming|person bouncing ball|person lifting weights|person biking|person cartwheeling"
    "|person playing water polo|person juggling",
    "person-resting": "person in lotus position|person taking bath|person in bed",
    "family": "",
    "person-symbol": "footprints|speaking head|bust in silhouette|people hugging",
    "place-map": "world map|map of Japan|compass|globe with meridians",
    "time": "hourglass done|watch|alarm clock|stopwatch|timer clock|mantelpiece clock",
    "sky-weather": "full moon|crescent moon|new moon face|thermometer|sun|sun with face|ringed planet|star"
    "|shooting star|milky way|cloud|sun behind cloud|cloud with lightning and rain|cloud with rain|cloud with snow"
    "|tornado|wind face|cyclone|rainbow|closed umbrella|umbrella|umbrella with rain drops|umbrella on ground"
    "|high voltage|snowflake|snowman|comet|fire|droplet|water wave|sun behind rain cloud|cloud with lightning",
    "game": "bullseye|yo-yo|kite|water pistol|pool 8 ball|crystal ball|magic wand|video game|joystick|slot machine"
    "|game die|puzzle piece|teddy bear|piñata|mirror ball|nesting dolls|chess pawn|joker",
    "sound": "loudspeaker|megaphone|postal horn|bell|speaker high volume",
    "phone": "mobile phone|telephone|telephone receiver|pager|fax machine",
    "mail": "envelope|love letter|package|closed mailbox with raised flag|postbox|ballot box with ballot",
    "lock": "locked|unlocked|key|old key",
}  # fmt: skip

DROPPED = listed(
    "guide dog|service dog|oncoming bus|oncoming police car|oncoming taxi|oncoming automobile|light rail|tram car"
    "|horizontal traffic light|high-speed train|metro|airplane departure|airplane arrival|suspension railway"
    "|love hotel|Japanese post office|musical notes|low battery|magnifying glass tilted right|green book"
    "|blue book|orange book|page facing up|bookmark tabs|notebook with decorative cover|open file folder"
    "|tear-off calendar|spiral calendar|round pushpin|linked paperclips|2nd place medal|3rd place medal"
    "|front-facing baby chick|dvd|clinking beer mugs|chart increasing with yen|derelict house|foggy|Tokyo tower"
    "|mahjong red dragon|flower playing cards|wedding|hourglass not done|field hockey|camera with flash|black cat"
    "|memo|placard|love-you gesture|leaf fluttering in wind|snow-capped mountain|sunrise over mountains"
    "|running shirt|level slider|control knobs|film frames|card index dividers|spiral notepad|card index"
    "|hammer and pick|hammer and wrench|chains|bust in silhouette|station|railway car"
)
GROUPS = ("smileys-emotion", "people-body", "animals-nature", "food-drink", "travel-places", "activities", "objects")

NAMING_SUBGROUPS = listed(
    "animal-mammal|animal-bird|animal-amphibian|animal-reptile|animal-marine|animal-bug|plant-flower|plant-other"
    "|food-fruit|food-vegetable|food-prepared|food-asian|food-sweet|drink|dishware|transport-ground"
    "|transport-water|transport-air|clothing|musical-instrument|tool|household|computer|light-video|phone|writing"
    "|office|medical|science|sport|game|event|place-building|place-geographic|place-other|sky-weather|time|lock"
    "|book-paper|sound|award-medal|arts-crafts|face-costume|money|body-parts"
)
# Plain names that a fair viewer could not give from the picture alone: another concept looks the same or goes by the
# same word, the artists draw different things, or the name is not the thing.
NAMING_DROPPED = listed(
    "ox|cow|water buffalo|ram|ewe|monkey|chipmunk|boar|dragon|bug|blossom|white flower|rosette|herb|bouquet"
    "|rice cracker|oden|curry rice|cooked rice|rice ball|green salad|custard|honey pot|beverage box|cooking|train"
    "|tram|monorail|trolleybus|minibus|mountain railway|locomotive|bullet train|bus stop|motorway|seat|ship|ferry"
    "|motor boat|passenger ship|mountain cableway|aerial tramway|small airplane|oil drum|construction|flat shoe"
    "|clutch bag|handbag|purse|woman’s clothes|folding hand|shopping bags|billed cap|postal horn|trackball"
    "|computer disk|optical disk|videocassette|video camera|movie camera|film projector|clapper board|black nib"
    "|pen|fountain pen|file folder|bar chart|alembic|satellite antenna|cricket game|lacrosse|rugby football"
    "|tennis|ping pong|badminton|bowling|ice hockey|bullseye|video game|confetti ball|wind chime|carp streamer"
    "|pine decoration|tanabata tree|ribbon|reminder ribbon|ticket|admission tickets|sparkler|sparkles"
    "|party popper|hotel|bank|hospital|school|post office|office building|convenience store|department store"
    "|classical building|building construction|house|houses|desert|national park|beach|sunset|sunrise|cityscape"
    "|night with stars|bridge at night|hot springs|barber pole|mount fuji|comet|cyclone|wind face|sun"
    "|high voltage|fire engine|delivery truck|articulated lorry|automobile|racing car|horse racing|speedboat"
    "|canoe|coin|ledger|notebook|page with curl|label|closed book|newspaper|scroll|bookmark|books|loudspeaker"
    "|pager|telephone receiver|fax machine|military medal|sports medal|1st place medal|performing arts"
    "|framed picture|ogre|goblin|alien monster|money bag|yen banknote|euro banknote|pound banknote|clamp|link"
    "|nut and bolt|pick|balance scale|pushpin|straight ruler|triangular ruler|wastebasket|file cabinet"
    "|card file box|door|couch and lamp|shower|teddy|fog|full moon|thermometer|mantelpiece clock|timer clock"
    "|locked|unlocked|old key|sake|cocktail glass|tropical drink|hot beverage|tumbler glass|clinking glasses"
    "|teacup without handle|tea|wine glass|baby bottle|pot of food|shallow pan of food|meat on bone|poultry leg"
    "|moon cake|dango|fish cake with swirl|fried shrimp|bento box|steaming bowl|shaved ice|soft ice cream"
    "|shortcake|birthday cake|spoon|amphora|tangerine|melon|red apple|green apple|sheaf of rice|maple leaf"
    "|fallen leaf|seedling|shamrock|evergreen tree|deciduous tree|tropical fish|blowfish|spiral shell|whale"
    "|turkey|baby chick|hatching chick|bird|dove|rat|mouse|hamster|cut of meat|leopard|eye|eyes|tongue|mouth"
    "|game die|joystick|crystal ball|water pistol|pool 8 ball|goal net|flag in hole|softball|martial arts uniform"
    "|ice skate|skis|musical keyboard|dagger|identification card|bellhop bell|police car light"
    "|vertical traffic light|stop sign|railway track|fuel pump|water wave|umbrella on ground|closed umbrella"
    "|sun with face|new moon face|shooting star|glowing star|star|cloud|ballot box with ballot|stadium|factory"
    "|red paper lantern|studio microphone|puzzle piece|kiwi fruit|droplet|sun behind cloud|cloud with rain"
    "|cloud with snow|circus tent|carousel horse|ear of corn|hot pepper|pig nose|two-hump camel|camping"
    "|desert island|Japanese castle|spouting whale|wilted flower|hourglass done|stopwatch|hibiscus|cheese wedge"
    "|poodle|motor scooter|kick scooter"
)
NAMING_MAX = 200


def is_concept(name: str, group: str, subgroup: str) -> bool:
    """Whether the emoji with this English CLDR name is one of the nursery's concepts."""
    if group not in GROUPS or name in DROPPED or ("hair" in subgroup) or ":" in name and "beard" not in name:
        return False
    return name in listed(ONLY[subgroup]) if subgroup in ONLY else True


def may_be_named(name: str, subgroup: str) -> bool:
    """Whether the concept may be in the naming test: one or two plain words for a concrete thing."""
    words = name.split()
    plain = all(word.replace("-", "").isalpha() and word.isascii() for word in words)
    face = "face" in words or "and" in words or "with" in words
    return subgroup in NAMING_SUBGROUPS and len(words) <= 2 and plain and not face and name not in NAMING_DROPPED
