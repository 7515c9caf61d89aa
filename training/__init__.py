"""How the bundled model "emoji" was made, end to end: `python -m training.run` does every step in order."""
