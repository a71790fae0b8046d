"""The texts of the retrieval tasks: facts, questions and correct responses.

The demo model's training data, `eval` and `calibrate` share these texts. The texts do not depend on a model's
vocabulary.

    code_fact("amber", "47")                         # " The code of amber is 47."
    question = ask_codes({"amber": "47"}, "spoken")  # text, a correct response, reference answers
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Literal

#: The form of answer that a question requests.
#: direct: the answer begins with the first generated token, so prefill decides the answer.
#: spoken: the response first repeats the question, so decode decides the answer.
Style = Literal["direct", "spoken"]
STYLES: tuple[Style, ...] = ("direct", "spoken")


@dataclasses.dataclass(frozen=True)
class Question:
    """A question with an ideal response.

    answers: the texts that a correct response contains, in this order.
    """

    text: str
    response: str
    answers: tuple[str, ...]


def code_fact(name: str, value: str) -> str:
    """Return the sentence that states the code of `name`.

    value: a number, or the next name in a chain.
    """
    return f" The code of {name} is {value}."


def ask_codes(codes: Mapping[str, str], style: Style) -> Question:
    """Ask for the code of each name, in the order of `codes`."""
    names, values = list(codes), tuple(codes.values())
    plural = "s" if len(names) > 1 else ""
    text = f"what {'are' if plural else 'is'} the code{plural} of {' and '.join(names)}?"
    if style == "direct":
        return Question(f"Answer with the code{plural} only: {text}", f" {' and '.join(values)}.", values)
    sentence = " and".join(f" the code of {name} is {value}" for name, value in codes.items())
    return Question(f"Answer in a sentence: {text}", f" T{sentence[2:]}.", values)


def number_fact(name: str, number: str) -> str:
    """Return the sentence that states the final number of a chain.

    name: the first name of the chain.
    """
    return f" The number behind the code of {name} is {number}."


def ask_chain(links: Sequence[str], style: Style) -> Question:
    """Ask for the number at the end of a chain.

    links: the names of the chain in order, then a number. The code of each name is the next link.

    A direct answer requires that the model resolves all links before the first token. A spoken response names the links
    one by one.
    """
    text = f"a code that is a word names another code; what is the number behind the code of {links[0]}?"
    if style == "direct":
        return Question(f"Answer with the number only, {text}", f" {links[-1]}.", (links[-1],))
    sentence = " and".join(f" the code of {name} is {value}" for name, value in itertools.pairwise(links))
    return Question(f"Answer in a sentence, {text}", f" T{sentence[2:]}.", (links[-1],))


def json_pairs(pairs: Mapping[str, str]) -> list[str]:
    """Return the text of a JSON object, one piece per pair."""
    pieces = [f' "{key}": {value},' for key, value in pairs.items()]
    pieces[0] = "\n{" + pieces[0][1:]
    pieces[-1] = pieces[-1][:-1] + "}\n"
    return pieces


def ask_value(key: str, value: str, style: Style) -> Question:
    """Ask for the value of `key` in the JSON object."""
    if style == "direct":
        return Question(f'Answer with the value only: what is the value of "{key}"?', f" {value}", (value,))
    return Question(f'Answer with key and value: what is the value of "{key}"?', f' "{key}": {value}', (value,))


#: Short common nouns, for names and keys.
WORDS: tuple[str, ...] = tuple(
    """
    acorn actor album alley amber anchor angel ankle apple apron arrow atlas attic autumn bacon badge bagel banana
    banjo barrel basin basket beach beacon beard beaver berry bishop blanket blossom border bottle boulder bracelet
    branch bread breeze brick bridge bronze brook broom bucket buckle bull bundle butter button cabin cable cactus
    camel camera candle canoe canvas canyon captain carbon carpet carrot castle cattle cave cedar cello chain chair
    chalk cheese cherry chest chicken chimney cider cinema circus cliff cloud clover coal coast cobra coconut coffee
    comet copper coral cotton cousin cowboy coyote crab cradle crane crater cricket crown crystal curtain daisy
    dancer desert diamond dinner doctor dolphin donkey dragon drawer drum duck eagle elbow elephant ember emerald
    engine falcon farmer feather fence ferry fiddle finger flame flower flute forest fossil fountain fox garden garlic
    giant ginger giraffe glacier glove goat goose grape gravel guitar hammer harbor harvest hawk hazel helmet hermit
    heron hockey honey horse hotel iceberg insect iron island ivory jacket jaguar jasmine jelly jewel jungle kettle
    kitchen kitten knight ladder lagoon lantern laundry lawyer leather lemon leopard lettuce lily linen lion lizard
    lobster locket lumber magnet mammal mango maple marble meadow melon mirror monkey moose mountain muffin museum
    mushroom napkin nectar needle nephew nickel oasis ocean olive onion opera orange orchard otter oven owl oyster
    paddle painter palace panda panther parrot peach peanut pearl pebble pelican pencil pepper piano pickle pigeon
    pillow pilot pine pirate planet plum poet pony potato powder prairie puppet rabbit raccoon radish raven ribbon
    river rocket rooster ruby saddle sailor salmon sandal sapphire scarf
    """.split()
)
