"""`diffopt ui`: open the page on this machine."""

import argparse
import importlib.util

from diffopt.errors import DiffoptError


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `ui`."""
    parser = commands.add_parser("ui", help="open the page", description="Serve the page on 127.0.0.1 until Ctrl-C.")
    parser.add_argument("-m", "--model", default="emoji", help="as in `diffopt generate` (default: %(default)s)")
    parser.add_argument("--attention", default="auto", metavar="BACKEND", help="default: %(default)s")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: the first GPU, or the CPU without one)")
    parser.add_argument("-o", "--output", default="out", metavar="FOLDER", help="default: %(default)s")
    parser.add_argument("--port", default="7860", help="default: %(default)s")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Load the model, then serve until Ctrl-C; exit code 0."""
    from diffopt.commands.quiet import quiet_libraries

    missing = [name for name in ("gradio", "fastapi", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        raise DiffoptError(f"the page needs {', '.join(missing)}: pip install 'diffopt[ui]'")
    quiet_libraries()
    from diffopt.ui.page import serve

    return serve(
        model=arguments.model,
        attention=arguments.attention,
        device=arguments.device,
        output=arguments.output,
        port=arguments.port,
    )
