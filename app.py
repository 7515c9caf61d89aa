"""The Gradio entry: opens the page on this machine. `make ui`, `diffopt ui` and `python app.py` are the same."""

from diffopt.ui.page import main

if __name__ == "__main__":
    raise SystemExit(main())
