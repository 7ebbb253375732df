"""The documentation is true: snippets run, commands and files exist, links lead somewhere, the API is whole."""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import re
import shlex
import sys
from collections.abc import Iterator

import documents
import pytest
import torch
from documents import FILES, ROOT
from transformers import LlamaConfig, LlamaForCausalLM

import lora_kernels as lk
from lora_kernels.cli import build_parser
from lora_kernels.cli._console import CliError

pytestmark = pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="the docs are not here: an installed package")

WITH_SNIPPETS = [file for file in FILES if documents.blocks(documents.read(file), "python")]
GENERATED = "docs/api.md"
IN_REPOSITORY = [file for file in FILES if file != GENERATED]
README_LINES = 150
PLACEHOLDERS = ("build/", "~", "/", "$", "http")  # what a command makes, or a user has
BARE_FILES = {"adapter_config.json", "adapter_model.safetensors"}  # of PEFT


# --------------------------------------------------------------------------------------------------- snippets


@pytest.fixture
def demo_directory(tmp_path, monkeypatch):
    """A working directory where a tiny random model stands for the one that ``make demo`` unpacks."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "build/demo/smollm2")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_snippets(file: str, text: str) -> dict[str, object]:
    """Runs the Python of one page as one program. An error points at its line on the page."""
    names: dict[str, object] = {}
    for block in documents.blocks(text, "python"):
        exec(compile("\n" * (block.line - 1) + block.text, file, "exec"), names)
    return names


def test_the_pages_for_users_have_snippets():
    assert {"README.md", "docs/use.md"} <= set(WITH_SNIPPETS)


@pytest.mark.parametrize("file", WITH_SNIPPETS)
def test_snippets_run(file, demo_directory):
    text = documents.read(file)
    if "BitsAndBytesConfig" in text:
        pytest.importorskip("bitsandbytes")
    run_snippets(file, text)
    assert lk.stats()["served"], "no snippet of the page reached an op"


def test_a_snippet_that_fails_says_where():
    page = "# Page\n\n```python\na = 1\n```\n\n```console\nfalse\n```\n\n```python\nb = a\nc\n```\n"
    with pytest.raises(NameError) as caught:
        run_snippets("page.md", page)
    assert caught.traceback[-1].lineno + 1 == 13


def test_what_a_reader_is_shown_is_what_he_gets(demo_directory):
    """The README's models: each has layers of ours, and what it prints is a report."""
    names = run_snippets("README.md", documents.read("README.md").partition("**You train over")[0])
    assert any(lk.is_fused(module) for module in names["model"].modules())


# --------------------------------------------------------------------------------------- commands, files, links


def subparser(parser: argparse.ArgumentParser, words: list[str]) -> tuple[argparse.ArgumentParser, list[str]]:
    """The parser of the innermost subcommand that ``words`` begin with, and the other words."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction) and words:
            if words[0] not in action.choices:
                raise AssertionError(f"no subcommand {words[0]!r} of {parser.prog}")
            return subparser(action.choices[words[0]], words[1:])
    return parser, words


def check_command(command: str, *, whole: bool) -> None:
    """``AssertionError`` unless a command of the docs can be typed: its program, its flags, and its files exist.

    Args:
        whole: every argument that is needed is there; prose may say less.
    """
    words = shlex.split(command)
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words.pop(0)
    program, arguments = words[0], words[1:]
    if program == "lora-kernels":
        if not arguments:
            return
        parser, rest = subparser(build_parser(), arguments)
        flags = {flag for action in parser._actions for flag in action.option_strings}
        unknown = [word for word in rest if word.startswith("--") and word not in flags]
        assert not unknown, f"{command}: {parser.prog} has no {unknown}"
        if whole:
            build_parser().parse_args(arguments)
    elif program == "make":
        targets = set(re.findall(r"^([\w-]+):", documents.read("Makefile"), re.MULTILINE))
        asked = [word for word in arguments if "=" not in word]
        assert set(asked) <= targets, f"{command}: make knows no {set(asked) - targets}"
    elif program in ("python", "torchrun", "accelerate", "pytest"):
        files = [word for word in arguments if re.search(r"\.(py|yaml)$", word)]
        assert files, f"{command}: runs no file"
        assert all((ROOT / file).is_file() for file in files), f"{command}: no {files}"
        script = next(file for file in files if file.endswith(".py"))
        for flag in (word for word in arguments[arguments.index(script) :] if word.startswith("--")):
            assert f'"{flag}"' in documents.read(script), f"{command}: {script} has no {flag}"
    elif program == "pip":
        optional = documents.read("pyproject.toml").partition("optional-dependencies]")[2].partition("\n[")[0]
        declared = re.findall(r"^(\w+) = ", optional, re.MULTILINE)
        asked = [word for extras in re.findall(r"\[([\w,]+)\]", command) for word in extras.split(",")]
        assert set(asked) <= set(declared), f"{command}: no extra {set(asked) - set(declared)}"
    else:
        assert program in ("git", "pre-commit"), f"{command}: nothing here knows {program!r}"


@pytest.mark.parametrize("file", IN_REPOSITORY)
def test_commands_exist(file):
    text = documents.read(file)
    for command in documents.commands(text):
        check_command(command, whole=True)
    for code in documents.inline_code(text):
        if re.match(r"(lora-kernels|make|python|torchrun|accelerate|pytest) [\w./-]", code):
            check_command(code, whole=False)


@pytest.mark.parametrize(
    "command",
    [
        "lora-kernels frobnicate", "lora-kernels verify --model DIR --adaptor DIR", "lora-kernels merge --model DIR",
        "lora-kernels plan lora_liner", "make tets", "python examples/nowhere.py", "pip install -e '.[cly]'", "curl x",
        "python examples/moe.py --frobnicate",
    ],
)  # fmt: skip
def test_a_command_that_cannot_be_typed_is_found(command):
    with pytest.raises((AssertionError, CliError)):
        check_command(command, whole=True)


def braces(path: str) -> Iterator[str]:
    """``a/{b,c}.d`` as a/b.d and a/c.d."""
    found = re.search(r"\{([\w,.]+)\}", path)
    if found is None:
        yield path
        return
    for word in found[1].split(","):
        yield from braces(path.replace(found[0], word, 1))


def missing_files(text: str) -> list[str]:
    """Of the files and folders that prose names, those that are not in the repository. A name may leave folders out
    in front, and has ``*`` or ``<op>`` for what differs.
    """
    files = [path.relative_to(ROOT) for top in _TOP for path in (ROOT / top).rglob("*")]
    files += [path.relative_to(ROOT) for path in ROOT.iterdir()]
    missing = []
    for code in documents.inline_code(text):
        if not re.fullmatch(r"[\w.<>{},*/-]+", code) or code.startswith(PLACEHOLDERS) or code in BARE_FILES:
            continue
        if not ((re.search(r"\w/", code) and "." in code) or re.search(r"\.(py|h|cuh|cpp|cu|inl|md|toml|yaml)$", code)):
            continue
        for path in braces(re.sub(r"<\w+>", "*", code)):
            if not any(file.match(path.rstrip("/")) for file in files):
                missing.append(code)
    return missing


_TOP = ("bench", "csrc", "docs", "examples", "lora_kernels", "packaging", "tests", "triton_kernels")


@pytest.mark.parametrize("file", IN_REPOSITORY)
def test_files_exist(file):
    assert missing_files(documents.read(file)) == []


def test_a_file_that_is_not_there_is_found():
    text = "`csrc/emu/machine.h`, `spec.py`, `csrc/{params,config}/lora_linear.h`, `tests/test_gpu_*.py`, `ops/<op>.py`"
    assert missing_files(text) == []
    text = "`csrc/emu/machina.h`, `spek.py`, `csrc/{params,cfg}/lora_linear.h`, `tests/test_tpu_*.py`, `opps/<op>.py`"
    assert len(missing_files(text)) == 5


def leads_somewhere(file: str, text: str, link: str) -> bool:
    """Whether a link of a page leads to a file, and to a heading of it if it names one. Other sites are not asked."""
    if re.match(r"[a-z]+://|mailto:", link):
        return True
    path, _, anchor = link.partition("#")
    target = (ROOT / file).parent / path
    if path and not target.exists():
        return False
    return not anchor or anchor in documents.anchors(target.read_text() if path else text)


def broken_links(file: str, text: str) -> list[str]:
    return [link for link in documents.links(text) if not leads_somewhere(file, text, link)]


@pytest.mark.parametrize("file", FILES)
def test_links_resolve(file):
    assert broken_links(file, documents.read(file)) == []


def test_a_link_that_leads_nowhere_is_found():
    text = "# A `b` (c)\n\n[x](#a-b-c) [x](use.md#install) [x](../Makefile) ![p](demo.png) [`x`](https://x.org)\n"
    assert broken_links("docs/page.md", text) == []
    text = "# A\n\n[x](#b) [x](use.md#instal) [x](Makefile) ![p](demo.jpg) [[x]](nowhere.md)\n"
    assert len(broken_links("docs/page.md", text)) == 5


def test_names_of_the_package_exist():
    """`lk.name`, in prose and snippets."""
    for file in FILES:
        named = set(re.findall(r"\blk\.(\w+)", documents.read(file)))
        assert {name for name in named if not hasattr(lk, name)} == set(), file


def test_every_switch_is_documented_and_exists():
    sources = [*ROOT.glob("lora_kernels/**/*.py"), *ROOT.glob("triton_kernels/*.py"), *ROOT.glob("csrc/**/*.*")]
    sources.append(ROOT / "setup.py")
    in_code = {name for file in sources for name in re.findall(r"\bLORA_KERNELS_[A-Z_]+\b", file.read_text())}
    in_docs = set(re.findall(r"\bLORA_KERNELS_[A-Z_]+\b", documents.read("docs/use.md").partition("## Switches")[2]))
    assert in_docs == in_code


def test_every_page_is_in_the_index():
    listed = {f"docs/{link}" for link in documents.links(documents.read("docs/README.md"))}
    pages = {file for file in FILES if re.fullmatch(r"docs/[\w-]+\.md", file)}
    assert pages - listed == {"docs/README.md"}


def test_the_readme_is_short_and_its_figures_have_commands():
    text = documents.read("README.md")
    assert text.count("\n") < README_LINES
    gains = text.partition("## What it gains")[2].partition("\n## ")[0]
    rows = [row.strip("|").split("|") for row in gains.splitlines() if row.startswith("|")][2:]
    assert len(rows) >= 6
    for case, result, command, machine in rows:
        assert re.search(r"\d", result), case
        assert machine.strip(), case
        check_command(command.strip().strip("`"), whole=False)


def test_the_version_is_the_same_everywhere():
    assert re.search(r"^## (\S+)$", documents.read("CHANGELOG.md"), re.MULTILINE)[1] == lk.__version__
    assert re.search(r"^version: (\S+)$", documents.read("CITATION.cff"), re.MULTILINE)[1] == lk.__version__


def test_a_python_that_is_claimed_has_run_a_wheel():
    """The classifiers of pyproject.toml are the rows of a table."""
    claimed = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', documents.read("pyproject.toml"))
    table = documents.read("docs/testing.md").partition("### Wheels")[2]
    assert claimed == list(dict.fromkeys(re.findall(r"^\| (3\.\d+)\.\d+ \|", table, re.MULTILINE)))
    assert len(claimed) > 1


def test_every_place_is_in_the_table():
    """CONTRIBUTING.md's table of places: the package's files and folders, and those of csrc."""
    table = documents.read("CONTRIBUTING.md").partition("| place | holds |")[2].partition("\n\n")[0]
    places = {path.name for path in (ROOT / "lora_kernels").iterdir() if path.suffix in ("", ".py")}
    places |= {path.name for path in (ROOT / "csrc").iterdir()}
    places -= {"__init__.py", "__main__.py", "__pycache__", "_version.py", "py.typed"}
    assert {place for place in places if place not in table} == set()


# ---------------------------------------------------------------------------------------------------------- API


def test_every_public_name_is_in_the_api():
    headings = set(re.findall(r"^### `?(\w+)`?$", documents.read(GENERATED), re.MULTILINE))
    assert headings == set(lk.__all__)


def test_the_api_is_that_of_the_docstrings():
    pytest.importorskip("griffe", reason="pip install -e '.[docs]'")
    script = ROOT / "docs/generate_api.py"
    specification = importlib.util.spec_from_file_location("generate_api", script)
    module = importlib.util.module_from_spec(specification)
    sys.modules["generate_api"] = module
    specification.loader.exec_module(module)
    assert module.page() == documents.read(GENERATED), "docs/api.md is older than the docstrings: make docs"


def lacks(thing) -> list[str]:
    """What the house's rule asks of a public docstring, and this one does not say."""
    text = inspect.getdoc(thing) or ""
    parameters = [p for p in inspect.signature(thing).parameters.values() if p.name != "self"]
    is_function, is_result = inspect.isfunction(thing), issubclass_(thing, tuple)  # whose fields say it themselves
    takes_tensors = not is_result and any("Tensor" in str(parameter.annotation) for parameter in parameters)
    may_refuse = parameters and (is_function or issubclass_(thing, torch.nn.Module))
    asked = {
        "a docstring": bool(text),
        "errors": not may_refuse or re.search(r"Error\b|[Rr]aises\b", text),
        "shapes": not takes_tensors or re.search(r"\[[\w., *]+\]|shape", text),
        "dtypes": not takes_tensors or re.search(r"float32|floating|int64|dtype", text),
        "what it is in torch": not (takes_tensors and is_function) or re.search(r"[Ee]quivalent", text),
    }
    return [name for name, is_there in asked.items() if not is_there]


def public() -> dict[str, object]:
    things = {name: getattr(lk, name) for name in lk.__all__}
    callables = {name: thing for name, thing in things.items() if callable(thing)}
    return {name: thing for name, thing in callables.items() if not issubclass_(thing, (torch.autograd.Function, str))}


def issubclass_(thing, kinds) -> bool:
    return inspect.isclass(thing) and issubclass(thing, kinds)


@pytest.mark.parametrize("name", public())
def test_docstrings_say_what_the_rule_asks(name):
    assert lacks(public()[name]) == []


OF_A_PAPER = {
    "LoRAEmbedding", "LoRALinear", "PrefixEncoder", "PromptEmbedding", "PromptEncoder", "dora_linear", "dropout_mask",
    "gated_activation", "grouped_lora_linear", "linear_cross_entropy", "lora_embedding", "lora_linear", "lora_mlp",
    "lora_pack", "merge_", "multi_lora_linear", "prefix_kv", "prompt_embedding", "quantize_", "unmerge_",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(OF_A_PAPER))
def test_docstrings_name_their_source(name):
    assert re.search(r"\b(et al\.|and \w+|\w+),? .*\b(19|20)\d\d\b", inspect.getdoc(getattr(lk, name)))


def test_a_docstring_that_says_too_little_is_found():
    def op(x: torch.Tensor) -> torch.Tensor:
        """Does it."""

    assert lacks(op) == ["errors", "shapes", "dtypes", "what it is in torch"]
