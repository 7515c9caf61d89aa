"""The page: gradio's tabs mounted on a FastAPI application, served on this machine only."""

import socket
from pathlib import Path

import gradio as gr
import uvicorn
from fastapi import FastAPI
from fastapi.middleware.trustedhost import TrustedHostMiddleware
from gradio.themes import Default

import diffopt
from diffopt.engine.png import check_folder
from diffopt.engine.worker import STOCK, Engine, device_used
from diffopt.errors import InputError
from diffopt.handle import optimize
from diffopt.models import load, model_config_for
from diffopt.ui.generate import GenerateTab

HOST = "127.0.0.1"
QUEUE = 16
"""Jobs that may wait; more are answered 503."""

CSS = """
.gradio-container { max-width: 1080px !important; width: 100% !important; margin: 0 auto; }
#generate { gap: 24px; }
#status .status { display: flex; flex-direction: column; gap: 8px; font-size: 15px; overflow-wrap: anywhere; }
#status .bar { height: 8px; border-radius: 4px; background: var(--border-color-primary); overflow: hidden; }
#status .bar div { height: 100%; background: var(--primary-500); }
#status .failed span { color: #b91c1c !important; font-weight: 600; }
.dark #status .failed span { color: #fca5a5 !important; }
#picture img { object-fit: contain; }
"""
_FONTS = ["system-ui", "sans-serif"]  # none from the network
THEME = Default(font=_FONTS, font_mono=["ui-monospace", "monospace"])


def create_app(engine: Engine, folder: Path) -> FastAPI:
    """The page as an ASGI application. Pictures are written to `folder` and served from there."""
    app = FastAPI(title="diffopt", version=diffopt.__version__, docs_url=None, redoc_url=None)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])

    @app.get("/healthz")
    def healthz() -> dict[str, str]:
        return {"status": "ok"}

    with gr.Blocks(title="diffopt", analytics_enabled=False, delete_cache=(3600, 3600)) as blocks:
        gr.Markdown(f"# diffopt\n{_about(engine)}")
        GenerateTab(engine, folder).build()
    blocks.queue(max_size=QUEUE, default_concurrency_limit=1)
    return gr.mount_gradio_app(
        app,
        blocks,
        path="/",
        server_name=HOST,
        show_error=False,
        allowed_paths=[str(folder.resolve())],
        max_file_size="1mb",
        theme=THEME,
        css=CSS,
        footer_links=["api"],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
    )


def _about(engine: Engine) -> str:
    about = f" ({engine.model.about})" if engine.model.about else ""
    device = "CPU" if engine.device.type == "cpu" else device_used(engine.device).name
    return f"Model: {engine.model.name}{about}. Device: {device}."


def serve(*, model: str, attention: str, device: str | None, output: str, port: str) -> int:
    """Load the model, then serve the page until Ctrl-C; exit code 0. Arguments as the command line gives them."""
    number = _free_port(port)
    config = model_config_for(model)
    folder = check_folder(output)
    pipe = load(model, device=device)
    handle = None if attention == STOCK else optimize(pipe, attention=attention)
    app = create_app(Engine(pipe, config, handle), folder)
    print(f"diffopt: http://{HOST}:{number} (Ctrl-C ends it)", flush=True)
    uvicorn.run(app, host=HOST, port=number, log_level="warning")
    return 0


def _free_port(text: str) -> int:
    """The port asked for, if it is one and nothing listens there."""
    allowed = "a free port from 1 to 65535 is needed"
    try:
        port = int(text)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((HOST, port))
    except (ValueError, OverflowError):
        raise InputError("port", text, allowed) from None
    except OSError as error:
        raise InputError("port", text, f"{allowed}: {error.strerror}") from error
    return port
