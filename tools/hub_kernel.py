"""The package as a source tree for Hugging Face's kernel-builder.

    python tools/hub_kernel.py FOLDER

FOLDER gets build.toml, flake.nix, CARD.md, LICENSE and torch-ext/longrope_kernels: the functions,
their reference and Triton backends, without the extension in C++, the command line and what
changes models of transformers. A kernel may be loaded from any place, under any name and more than
once, so in the copy ops go to the namespace of the ``_ops`` module that kernel-builder makes for
each build, and nothing is imported by an absolute name.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "longrope_kernels"
NAME = "longrope-kernels"

FOLDERS = ("backends", "data", "kernels")
FILES = ("integrations/__init__.py", "integrations/flash_attn.py")
LEFT_OUT = re.compile(r"cli\.py|tuning\w*\.py")

# (file, what it says, what the copy says); each stands there exactly once.
_OPS = "from ._ops import add_op_namespace_prefix\nfrom ._ops import ops as registered\n"
_NAMESPACE = (
    '_NAMESPACE = "longrope_kernels"\n',
    '_NAMESPACE = add_op_namespace_prefix("").removesuffix("::")\n',
)
CHANGES = (
    *((f"{name}.py", *_NAMESPACE) for name in ("ops", "attention_ops", "decode_ops")),
    ("ops.py", "from . import backends, phase\n", "from . import backends, phase\n" + _OPS),
    ("attention_ops.py", "from . import backends\n", "from . import backends\n" + _OPS),
    ("decode_ops.py", "from . import backends\n", "from . import backends\n" + _OPS),
    ("published.py", 'files("longrope_kernels")', "files(__package__)"),
    (
        "backends/native.py",
        'importlib.import_module("longrope_kernels._native")',
        'importlib.import_module(".._native", __package__)',
    ),
)
EXPORTS = """
from . import scaling
from .integrations import flash_attn
from .published import published_configs

__all__ += ["flash_attn", "published_configs", "scaling"]
"""

BUILD = f"""\
[general]
name = "{NAME}"
version = 0
edition = 6
license = "Apache-2.0"
backends = ["cpu", "cuda"]

[torch-noarch]
pyext = ["json", "py"]
"""
FLAKE = """\
{
  description = "Flake for longrope-kernels";
  inputs.kernel-builder.url = "github:huggingface/kernels";
  outputs =
    { self, kernel-builder }:
    kernel-builder.lib.genKernelFlakeOutputs {
      inherit self;
      path = ./.;
    };
}
"""
CARD = """\
# longrope-kernels

LongRoPE's rotary position embedding, exact at any position, and attention, prefill and decode, that
rotates as it goes: `apply_rotary`, `attention`, `decode`, `KVCache`, `PagedKVCache`, `Rope`, and
flash-attn's functions with a `Rope` in `flash_attn`. In Triton for CUDA (not measured on a GPU
yet), in PyTorch for everything else.
"""


def write(out: Path) -> Path:
    """Write the tree into ``out``, which must be empty or not there. Gives the package's folder.

    Raises:
        FileExistsError: there is something in ``out``.
        ValueError: a file of the package does not say what the copy has to change.
    """
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out}: expected an empty folder")
    package = out / "torch-ext" / NAME.replace("-", "_")
    package.mkdir(parents=True)
    for source in _sources():
        target = package / source.relative_to(PACKAGE)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    for name, old, new in CHANGES:
        _change(package / name, old, new)
    for name in ("ops", "attention_ops", "decode_ops"):
        file = package / f"{name}.py"
        text = file.read_text("utf-8")
        file.write_text(text.replace("torch.ops.longrope_kernels.", "registered."), "utf-8")
    with (package / "__init__.py").open("a", encoding="utf-8") as file:
        file.write(EXPORTS)
    for name, text in (("build.toml", BUILD), ("flake.nix", FLAKE), ("CARD.md", CARD)):
        (out / name).write_text(text, "utf-8")
    shutil.copyfile(ROOT / "LICENSE", out / "LICENSE")
    return package


def _sources() -> list[Path]:
    found = [path for path in PACKAGE.glob("*.py") if not LEFT_OUT.fullmatch(path.name)]
    for folder in FOLDERS:
        found += [path for path in (PACKAGE / folder).iterdir() if path.suffix in (".py", ".json")]
    return sorted([*found, *(PACKAGE / name for name in FILES)])


def _change(file: Path, old: str, new: str) -> None:
    text = file.read_text("utf-8")
    if text.count(old) != 1:
        raise ValueError(f"{file.name}: expected {old!r} once, got it {text.count(old)} times")
    file.write_text(text.replace(old, new), "utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    print(write(Path(sys.argv[1])))
