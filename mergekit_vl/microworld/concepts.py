"""What exists in the microworld: emoji by group, shapes, colours, textures and letters, each with its class name.

Names are the Unicode names, shortened to what a person would say. Order matters: the sprite sheet stores one sprite per
glyph in this order (see `scripts/make_sprites.py`), so append, never reorder.
"""

from __future__ import annotations

_GLYPHS = {
    "animals": """
        🐕 dog|🐈 cat|🐎 horse|🐄 cow|🐖 pig|🐑 sheep|🐐 goat|🐓 rooster|🐁 mouse|🐇 rabbit|🐅 tiger|🐆 leopard|🐘 elephant|
        🦏 rhinoceros|🦛 hippopotamus|🐪 camel|🦒 giraffe|🦘 kangaroo|🐊 crocodile|🐢 turtle|🦎 lizard|🐍 snake|🦌 deer|🦙 llama|
        🐒 monkey|🦍 gorilla|🦔 hedgehog|🦇 bat|🐿 chipmunk|🦥 sloth|🦦 otter|🦨 skunk|🦝 raccoon|🦬 bison|🦫 beaver|🐃 buffalo""",
    "sea_and_sky": """
        🐟 fish|🐬 dolphin|🐋 whale|🦈 shark|🐙 octopus|🦑 squid|🦐 shrimp|🦞 lobster|🦀 crab|🐡 blowfish|🐚 shell|🦭 seal|
        🦅 eagle|🦆 duck|🦉 owl|🦚 peacock|🦜 parrot|🦢 swan|🦩 flamingo|🐧 penguin|🐦 bird|🦃 turkey|🕊 dove|🦤 dodo|
        🐝 honeybee|🐛 caterpillar|🐜 ant|🐞 ladybug|🦋 butterfly|🕷 spider|🦂 scorpion|🦗 cricket|🦟 mosquito|🐌 snail|🪲 beetle|🪰 fly""",
    "fruit": """
        🍎 apple|🍐 pear|🍊 tangerine|🍋 lemon|🍌 banana|🍉 watermelon|🍇 grapes|🍓 strawberry|🍈 melon|🍒 cherries|🍑 peach|🥭 mango|
        🍍 pineapple|🥥 coconut|🥝 kiwi|🍅 tomato|🍆 eggplant|🥑 avocado|🥦 broccoli|🥬 lettuce|🥒 cucumber|🌶 pepper|🌽 corn|🥕 carrot|
        🧄 garlic|🧅 onion|🥔 potato|🍄 mushroom|🥜 peanuts|🌰 chestnut|🫐 blueberries|🫒 olive""",
    "food": """
        🍞 bread|🥐 croissant|🥖 baguette|🥨 pretzel|🥞 pancakes|🧀 cheese|🍖 meat|🍗 chicken leg|🥓 bacon|🍔 hamburger|🍟 fries|🍕 pizza|
        🌭 hot dog|🥪 sandwich|🌮 taco|🌯 burrito|🥚 egg|🥗 salad|🍿 popcorn|🧈 butter|🍙 rice ball|🍜 noodles|🍝 spaghetti|🍣 sushi|
        🍤 fried shrimp|🍡 dango|🥟 dumpling|🍦 ice cream|🍩 doughnut|🍪 cookie|🎂 cake|🧁 cupcake|🥧 pie|🍫 chocolate|🍬 candy|🍭 lollipop|
        🍯 honey|☕ coffee|🍷 wine|🍺 beer""",
    "vehicles": """
        🚗 car|🚕 taxi|🚙 jeep|🚌 bus|🚎 trolleybus|🏎 racing car|🚓 police car|🚑 ambulance|🚒 fire engine|🚐 minibus|🚚 truck|🚜 tractor|
        🛴 scooter|🚲 bicycle|🛵 moped|🏍 motorcycle|🚂 locomotive|🚆 train|🚊 tram|✈ airplane|🚁 helicopter|🚀 rocket|🛸 flying saucer|⛵ sailboat|
        🚤 speedboat|🚢 ship|🛶 canoe|🚠 cableway|🛹 skateboard|🛷 sled""",
    "clothing": """
        👓 glasses|🕶 sunglasses|🥽 goggles|🥼 lab coat|🦺 vest|👔 necktie|👕 shirt|👖 jeans|🧣 scarf|🧤 gloves|🧥 coat|🧦 socks|
        👗 dress|👘 kimono|🩱 swimsuit|🩲 briefs|🩳 shorts|👙 bikini|👛 purse|👜 handbag|🎒 backpack|👞 shoe|👟 sneaker|🥾 boot|
        👠 high heel|👡 sandal|🩰 ballet shoes|👑 crown|👒 hat|🎩 top hat|🎓 graduation cap|🧢 cap|💍 ring|💄 lipstick""",
    "music_and_sport": """
        🎷 saxophone|🎸 guitar|🎹 piano|🎺 trumpet|🎻 violin|🪕 banjo|🥁 drum|🎤 microphone|🎧 headphones|📻 radio|🔔 bell|📯 horn|
        ⚽ soccer ball|⚾ baseball|🏀 basketball|🏐 volleyball|🏈 football|🎾 tennis|🥏 frisbee|🎳 bowling|🏓 ping pong|🏸 badminton|🥊 boxing glove|⛸ skate|
        🎿 ski|🥌 curling stone|🎯 dart|🪀 yo yo|🪁 kite|🎱 billiards|🏆 trophy|🏅 medal|🎲 dice|🧩 puzzle|♟ pawn|🪃 boomerang""",
    "tools": """
        🔨 hammer|🪓 axe|⛏ pick|🗡 dagger|⚔ swords|🪚 saw|🔧 wrench|🪛 screwdriver|🔩 bolt|⚙ gear|⚖ scales|🔗 chain|
        🪝 hook|🧲 magnet|🪜 ladder|⚗ alembic|🧪 test tube|🔬 microscope|🔭 telescope|📡 antenna|💉 syringe|💊 pill|🩺 stethoscope|🔑 key|
        🔒 lock|✂ scissors|📎 paperclip|📏 ruler|📌 pushpin|🖊 pen|🖌 paintbrush|🖍 crayon|✏ pencil|🔦 torch|🧯 fire extinguisher|🛡 shield|
        🏹 bow|🪤 mouse trap|⚓ anchor|🧭 compass""",
    "household": """
        🚪 door|🛏 bed|🛋 couch|🪑 chair|🚽 toilet|🚿 shower|🛁 bathtub|🪒 razor|🧴 lotion|🧷 safety pin|🧹 broom|🧺 basket|
        🧻 paper roll|🪣 bucket|🧼 soap|🪥 toothbrush|🧽 sponge|🛒 cart|🕯 candle|💡 light bulb|📱 phone|💻 laptop|🖨 printer|🖱 computer mouse|
        📷 camera|📺 television|⏰ alarm clock|⌛ hourglass|📕 book|📜 scroll|📰 newspaper|✉ envelope|📦 package|🗑 trash can|🔋 battery|🧸 teddy bear|
        🎁 gift|🎈 balloon|🪞 mirror|🪟 window|🫖 teapot|🏺 amphora|🧶 yarn|🧵 thread|☎ telephone|💰 money bag""",
    "nature": """
        🌵 cactus|🎄 christmas tree|🌲 evergreen|🌳 oak tree|🌴 palm tree|🌱 seedling|🌿 herb|☘ shamrock|🍁 maple leaf|🌾 rice plant|🌷 tulip|🌹 rose|
        🌺 hibiscus|🌸 cherry blossom|🌼 daisy|🌻 sunflower|🪷 lotus|🌞 sun|🌙 moon|⭐ star|🪐 planet|☁ cloud|🌈 rainbow|⚡ lightning|
        ❄ snowflake|🔥 fire|💧 droplet|🌊 wave|🌋 volcano|🏔 mountain|☄ comet|🌪 tornado|☂ umbrella|⛄ snowman|🪨 rock|🪵 wood""",
    "places": """
        🏠 house|🏢 office|🏥 hospital|🏦 bank|🏪 shop|🏫 school|🏭 factory|🏯 japanese castle|🏰 castle|🗼 tower|🗽 statue|⛪ church|
        🕌 mosque|⛩ shrine|⛲ fountain|⛺ tent|🎡 ferris wheel|🎢 roller coaster|🎪 circus|🏟 stadium|🏛 temple|🛖 hut|🏝 island|🎠 carousel""",
    "fantasy": """
        🤖 robot|👻 ghost|💀 skull|👽 alien|🎃 pumpkin|🤡 clown|👹 ogre|👺 goblin|🐉 dragon|🦖 dinosaur|🧚 fairy|🧜 mermaid|
        🧛 vampire|🧟 zombie|👁 eye|👂 ear|👃 nose|👄 mouth|🦷 tooth|🦴 bone|🧠 brain|🫀 heart organ|👣 footprints|🦶 foot|
        👍 thumb|✊ fist|🤝 handshake|🐼 panda|🦊 fox|🐻 bear|🐺 wolf|🐨 koala|🦁 lion|🐸 frog|🦄 unicorn|🐵 ape""",
}

GLYPHS: dict[str, tuple[tuple[str, str], ...]] = {
    group: tuple((emoji, name) for emoji, _, name in (entry.strip().partition(" ") for entry in text.split("|")))
    for group, text in _GLYPHS.items()
}
"""Group -> ((emoji, class name), ...)."""

SHAPES = (
    "circle", "square", "triangle", "diamond", "pentagon", "hexagon", "star shape", "cross", "ellipse", "rectangle",
    "ring shape", "crescent", "heart", "arrow", "half disc", "trapezoid", "drop", "flower shape", "wedge", "bar",
)  # fmt: skip

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 39, 40), "orange": (255, 140, 20), "yellow": (245, 215, 40), "green": (44, 160, 60), "blue": (40, 90, 220),
    "purple": (135, 60, 180), "pink": (245, 130, 185), "brown": (125, 75, 40), "cyan": (50, 200, 220), "white": (245, 245, 245),
    "black": (25, 25, 25), "gray": (130, 130, 130),
}  # fmt: skip

TEXTURES = ("plain", "striped", "dotted", "checkered", "zigzag", "gradient", "grid", "noisy")

LETTERS = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
LETTER_FACES = ("sans", "serif", "mono", "bold")
"""Faces seen in pretraining; italic faces are kept for tasks."""
TASK_FACES = ("italic",)


def letter_name(letter: str) -> str:
    return f"letter {letter.lower()}"


GROUP_OF: dict[str, str] = {name: group for group, entries in GLYPHS.items() for _, name in entries}
GLYPH_NAMES: tuple[str, ...] = tuple(GROUP_OF)
