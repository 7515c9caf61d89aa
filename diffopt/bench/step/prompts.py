"""A hundred prompts for pictures that are compared: plain things that the bundled model knows, in its styles."""

_THINGS = (
    "a red apple", "a blue heart", "a cat face", "a yellow star", "a green tree", "a red car", "a house", "a dog face",
    "a slice of pizza", "a birthday cake", "a red rose", "a sailboat", "an airplane", "a guitar", "an umbrella",
    "a snowman", "a crescent moon", "the sun", "a hot beverage", "a strawberry", "a penguin", "a soccer ball",
    "a wrapped gift", "a light bulb", "a key",
)  # fmt: skip
_STYLES = ("noto style", "fluent style", "twemoji style", "on a white background")

PROMPTS = tuple(f"{thing}, {_STYLES[(number + turn) % 4]}" for turn in range(4) for number, thing in enumerate(_THINGS))
"""All different; any number of them from the start has all styles evenly."""
