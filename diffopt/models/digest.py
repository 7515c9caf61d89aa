"""What a model's weights are, as a hash: two pictures with the same one came from the same weights."""

import dataclasses
import hashlib
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffopt.models.catalogue import PICKLED, components, read_json

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

SHORT = 10
"""Characters of a hash that pictures show; AUTOMATIC1111 and its successors show as many."""

_sources: "weakref.WeakKeyDictionary[Any, tuple[Stamp, ...]]" = weakref.WeakKeyDictionary()
_hashes: "dict[Stamp, str]" = {}
_lock = threading.Lock()


@dataclasses.dataclass(frozen=True)
class Stamp:
    """A file as it was at one moment: if size and modification time are the same later, so is the content."""

    path: Path
    size: int
    modified_ns: int

    @classmethod
    def of(cls, path: Path) -> "Stamp":
        """The file now."""
        status = path.stat()
        return cls(path.absolute(), status.st_size, status.st_mtime_ns)

    def still_true(self) -> bool:
        """Whether the file is as it was."""
        try:
            return Stamp.of(self.path) == self
        except OSError:
            return False


def remember_source(pipe: "DiffusionPipeline", files: Sequence[Stamp]) -> None:
    """Note which weight files a pipeline was loaded from, stamped before they were read, for `model_hash`."""
    _sources[pipe] = tuple(files)


def model_hash(model: "DiffusionPipeline | Path | str") -> str:
    """SHA-256 over a model's weights, in hexadecimal.

    A single file's is that of its bytes, as other tools compute it. A folder's is taken over the name and hash of each
    weight file that would be loaded. A pipeline that `diffopt.load` made counts as the files it came from, while they
    are as they were; any other is hashed by the names, dtypes, shapes and values of its tensors. Hashes of files are
    remembered for the process.
    """
    if isinstance(model, str | Path):
        path = Path(model)
        return (
            _file_hash(Stamp.of(path))
            if path.is_file()
            else _files_hash([Stamp.of(file) for file in weight_files(path)])
        )
    stamps = _sources.get(model)
    if stamps is None or any(stamp not in _hashes and not stamp.still_true() for stamp in stamps):
        return _tensors_hash(model)
    return _file_hash(stamps[0]) if len(stamps) == 1 else _files_hash(stamps)


def weight_files(folder: Path) -> list[Path]:
    """The weight files in a folder that `load` would read, in its order."""
    from diffopt.models.weights import find_weights

    files: list[Path] = []
    for component in (folder / name for name in components(read_json(folder / "model_index.json"))):
        if any(path.suffix in (".safetensors", *PICKLED) for path in component.glob("*")):
            files += find_weights(component, allow_pickle=True).files
    return files


def _files_hash(stamps: Sequence[Stamp]) -> str:
    """Over each file's component, name and hash: unet/diffusion_pytorch_model.safetensors and so on."""
    digest = hashlib.sha256()
    for stamp in sorted(stamps, key=lambda stamp: stamp.path.parts[-2:]):
        digest.update(f"{'/'.join(stamp.path.parts[-2:])}\0{_file_hash(stamp)}\n".encode())
    return digest.hexdigest()


def _file_hash(stamp: Stamp) -> str:
    with _lock:  # two threads that want the same hash: the second one waits for it
        if stamp not in _hashes:
            with stamp.path.open("rb") as file:
                _hashes[stamp] = hashlib.file_digest(file, "sha256").hexdigest()
        return _hashes[stamp]


def _tensors_hash(pipe: "DiffusionPipeline") -> str:
    import torch

    digest = hashlib.sha256()
    for name, module in sorted(pipe.components.items()):
        if not isinstance(module, torch.nn.Module):
            continue
        for key, tensor in sorted(module.state_dict().items()):
            digest.update(f"{name}.{key}\0{tensor.dtype}\0{tuple(tensor.shape)}\n".encode())
            values = tensor.detach().cpu().contiguous()
            digest.update(values.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
