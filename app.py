"""The page's entry: `python app.py` is `diffopt ui` under the name that hosts of gradio pages look for."""

import sys

from diffopt.cli import main

if __name__ == "__main__":
    sys.exit(main(["ui", *sys.argv[1:]]))
