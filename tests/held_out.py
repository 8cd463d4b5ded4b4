"""A text on which no model here was trained, and how well an engine predicts it."""

import math

from gemcut.engine import Engine

# of the held-out text: A. C. Doyle, The Adventure of the Veiled Lodger (1927)
HELD_OUT = (
    "It is not reasonable to suppose that every one of these cases gave Holmes the opportunity of "
    "showing those curious gifts of instinct and observation which I have endeavoured to set forth "
    "in these memoirs. Sometimes he had with much effort to pick the fruit, sometimes it fell "
    "easily into his lap. But the most terrible human tragedies were often involved in those cases "
    "which brought him the fewest personal opportunities, and it is one of these which I now "
    "desire to record. In telling it, I have made a slight change of name and place, but otherwise "
    "the facts are as stated."
)


def bits_per_byte(engine: Engine) -> float:
    """Bits that an engine needs for a byte of the text."""
    return -engine.score(HELD_OUT).total / math.log(2) / len(HELD_OUT.encode())
