"""`diffopt info PICTURE ...`: how pictures were made."""

import argparse
import json
from typing import Any


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `info`."""
    parser = commands.add_parser(
        "info",
        help="how a picture was made",
        description="Print what a picture of diffopt's says about how it was made.",
    )
    parser.add_argument("pictures", metavar="PICTURE", nargs="+", help="a PNG file that diffopt wrote")
    parser.add_argument("--json", action="store_true", help="the whole block, as JSON; of several pictures a list")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print it, once all pictures were read; exit code 0."""
    from diffopt.engine.png import read_metadata

    read = [read_metadata(path) for path in arguments.pictures]
    if arguments.json:
        blocks = [one.to_dict() for one in read]
        print(json.dumps(blocks if len(blocks) > 1 else blocks[0], indent=2, ensure_ascii=False))
        return 0
    for number, (path, one) in enumerate(zip(arguments.pictures, read, strict=True)):
        if len(read) > 1:
            print(f"{path}" if number == 0 else f"\n{path}")
        rows = _rows(one.to_dict())
        if one.certificate is not None:
            rows.append(("certificate", f"{one.certificate} (plan {one.certificate.plan})"))
        width = max(len(name) for name, _ in rows)
        for name, text in rows:
            print(f"{name:<{width}}  {text}")
    return 0


def _rows(metadata: dict[str, Any]) -> "list[tuple[str, str]]":
    device, attention = metadata["device"], metadata["attention"]
    ran = ", ".join(f"{backend} in {layers} layers" for backend, layers in attention["ran"].items()) or "not recorded"
    kept = f"; {attention['kept']} layers kept their own" if attention["kept"] else ""
    threads = "" if device["threads"] is None else f", {device['threads']} threads"
    return [
        ("prompt", metadata["prompt"]),
        ("negative prompt", metadata["negative_prompt"]),
        ("seed", str(metadata["seed"])),
        ("steps", str(metadata["steps"])),
        ("guidance", f"{metadata['guidance']:g}"),
        ("scheduler", f"{metadata['scheduler'] or 'the model’s own'} ({metadata['scheduler_class']})"),
        ("size", f"{metadata['width']}x{metadata['height']}"),
        ("model", f"{metadata['model']} ({metadata['model_hash'][:10]})"),
        ("made on", f"{device['name']} ({device['kind']}{threads}), {metadata['dtype']}"),
        ("attention", f"{attention['requested']}: {ran}{kept}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in metadata["versions"].items())),
    ]
