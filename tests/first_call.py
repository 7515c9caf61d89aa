"""`python first_call.py`: two pictures of the bundled model on a GPU, and what was compiled for each, as JSON."""

import json
import threading
from typing import Any

import torch
from pipelines import make_pipeline
from triton import knobs

import diffopt


def main() -> None:
    compiled: list[tuple[str, str]] = []

    def listen(*, metadata: dict[str, Any], cache_hit: bool, **_: Any) -> None:
        if not cache_hit:
            compiled.append((metadata["hash"], threading.current_thread().name))

    knobs.compilation.listener = listen
    pipe = make_pipeline("bundled")
    handle = diffopt.optimize(pipe)
    compiled.clear()  # what optimizing compiled is none of a call's

    def picture() -> torch.Tensor:
        options: dict[str, Any] = {"num_inference_steps": 4, "width": 64, "height": 64, "output_type": "pt"}
        out: Any = pipe("a red apple", generator=torch.Generator().manual_seed(0), **options)
        return out.images

    first = picture()
    found = {
        "compiled": len(compiled),
        "kernels": len({kernel for kernel, _ in compiled}),
        "beside": sum(thread.startswith("diffopt-compiler") for _, thread in compiled),
    }
    compiled.clear()
    second = picture()
    found |= {"compiled again": len(compiled), "same bits": torch.equal(first, second)}
    found |= {"uncaptured": handle.summary()["step"]["uncaptured"], "finite": bool(first.isfinite().all())}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
