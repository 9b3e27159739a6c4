"""The closed vocabulary of the tasks: small, plain and disjoint, so that a tiny model can learn all of it.

Nouns, adjectives and verbs share no word: a key ("amber-fox") can then never equal a word-pair value ("plum-anchor").
"""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NOUNS: tuple[str, ...] = _words("""
anchor apple arrow badger barrel basket beacon bell bench bird blanket boat bottle bowl branch brick bridge
broom bucket button cabin candle canoe carpet castle cedar chain chair cherry chest circle clock cloud coat
coin comet copper cottage cradle crane creek crown cup curtain desk dish dolphin door dragon drum eagle
engine falcon feather fence field finch flag flute forest fork fountain fox garden gate ginger glove goat
grape guitar hammer harbor hat hawk hedge helmet heron hill honey horn horse island jacket jar jewel kettle
key kite ladder lake lamp lantern leaf lemon letter lion lizard locket maple marble market meadow melon
mill mirror mitten moon mountain needle nest oak oar ocean olive onion orchard otter owl paddle pan parrot
path peach pebble pencil pepper piano pillow pine plum pocket pond pony pumpkin quilt rabbit raft ribbon
ring river robin rope sail salmon scarf shell ship shovel spoon star stone table temple tiger tower train
tulip tunnel turtle valley vase violin wagon wall whale wheel willow window wolf
""")

ADJECTIVES: tuple[str, ...] = _words("""
amber ancient bitter blue bold brave brief bright broad brown busy calm careful clean clear clever cold
cool crisp curious damp dark deep dry dull dusty eager early empty faint fair famous fancy fast fine firm
flat fresh gentle glad golden grand gray green happy hard heavy hidden hollow honest huge humble icy
jolly keen kind large lazy light little lively lonely long loud lucky mellow mild modern narrow neat new
noble odd old orange pale patient plain polite proud purple quick quiet rapid rare red rough round royal
rusty sharp short shy silent silver simple slim slow small smooth soft solid steady steep strong sturdy
sunny sweet tall tender thick thin tidy tiny violet warm weak white wide wild wise wooden yellow young
""")

VERBS: tuple[str, ...] = _words("""
admired asked blocked borrowed bought brought built called carried caught chased cleaned covered crossed
described dropped entered fixed followed forgot found guarded held helped hid ignored joined kept kicked
lifted liked lost made marked met missed moved needed noticed opened painted passed praised pulled pushed
reached remembered repaired saved showed sold stopped studied took touched traded turned visited warned
washed watched
""")

PEOPLE: tuple[str, ...] = _words("""
Adel Alva Arno Basia Bera Boris Carla Celso Dana Darek Delia Edda Elio Emil Enid Fabio Fenna Fritz Galen
Greta Hale Hanno Hedda Ilse Imre Ines Ivo Jana Joris Juna Kalle Karin Kira Kolya Lars Lena Linus Lotte
Maren Marta Milo Mirek Nadia Nell Nils Nora Odile Olaf Oren Otto Paula Petra Pia Quinn Rafa Rhea Rolf
Runa Sanna Selma Silas Sofie Sven Tamar Tessa Theo Tilda Ulla Uwe Vera Viggo Wanda Willa Xenia Yara Yuri
Zelda Zita Zora Zuri
""")

TOWNS: tuple[str, ...] = _words("""
Abrin Adlow Arvel Balmar Benlow Birsk Brenna Calder Cormin Dalby Darrow Drevin Eldan Elstow Farlin Felsk
Fornby Garsk Gilden Grell Halden Harrow Helvin Ivaro Jorsk Kalden Kelby Kirrin Lanby Larsk Lorvin Maldon
Marrow Melsk Norby Nulden Olvar Orrin Ostrel Palby Pelden Quorin Ralden Rissow Rovin Salby Selden Sorrin
Talden Tarsk Tolby Ulvin Urden Valby Velsk Vorrin Walden Wenlow Yarrin Yorsk Zelby Zorvin
Aldersk Bordal Cresby Dunlow Emberth Fennow Gorlin Hulby Istrel Jandow Kolvar Lindow Mirsk Novarn Pardow
Quelby Randal Sturvin
""")

REGIONS: tuple[str, ...] = _words("""
Avaria Belmora Corvia Dovan Eloria Fendra Galdia Hestra Ilvora Jundia Kelmora Lundra Morvia Nestra Orlandra
Pelvia Rondra Sendora Tervia Valdora
""")

JOBS: tuple[str, ...] = _words("""
baker barber builder carpenter clerk cook dancer doctor driver farmer fisher gardener hunter jeweler judge
lawyer miner nurse painter pilot poet potter sailor singer smith tailor teacher trader weaver writer
""")
