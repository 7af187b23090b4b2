"""Questions and answers about the Python library on this very machine, cut from its own documentation.

Modules written in Python are read, never imported; only modules of the interpreter itself that are known to do
nothing on import are looked at alive. Each pair belongs to the group of its top-level module or topic, so that whole
modules can be held out. The answers are the library's own words, shortened only at the end of a sentence or paragraph.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import re
import sys
import sysconfig
import textwrap
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from danlu.data.example import Origin, Row

# Modules of C code, or that hand on names of C code: their documentation is only found in the living objects.
ALIVE = (
    "array", "atexit", "binascii", "builtins", "cmath", "collections", "contextvars", "datetime", "decimal", "fcntl",
    "gc", "grp", "io", "itertools", "marshal", "math", "mmap", "os", "pwd", "resource", "select", "signal", "socket",
    "sqlite3", "struct", "sys", "syslog", "termios", "time", "unicodedata", "zlib",
)  # fmt: skip
HOMES = {"os": ("posix", "nt"), "io": ("_io", "abc"), "collections": ("_collections",)}  # where their names are made
LEFT_OUT = {
    "antigravity", "distutils", "encodings", "ensurepip", "idlelib", "lib2to3", "ntpath", "pydoc_data", "test", "this",
    "tkinter", "turtle", "turtledemo",
}  # fmt: skip
ANSWER = 420  # characters an answer aims at
LOOKUP = 160  # characters of a description that is asked back for its name
SIGNATURE = 160  # characters of the longest signature asked for
MEMBERS = 12  # the most methods an answer lists


@dataclass(frozen=True)
class Entry:
    """Something documented.

    Attributes:
        kind: "function", "class", "method" or "property".
        module, name: `json` and `JSONEncoder.encode`.
        signature: `JSONEncoder.encode(o)` without the module, "" where there is none to show.
        doc: its documentation, cleaned of indentation.
        bases, members: of a class, the names of its bases and of its public methods.
        line: where it stands.
    """

    kind: str
    module: str
    name: str
    signature: str
    doc: str
    line: int
    bases: tuple[str, ...] = ()
    members: tuple[str, ...] = ()

    @property
    def path(self) -> str:
        return self.name if self.module == "builtins" else f"{self.module}.{self.name}"

    @property
    def call(self) -> str:
        return self.signature if self.module == "builtins" else f"{self.module}.{self.signature}"


@dataclass
class Module:
    """A module's documentation: its own text, and what is in it."""

    name: str
    file: str
    doc: str
    entries: list[Entry] = field(default_factory=list)


def rows() -> Iterator[Row]:
    """The pairs as rows of OpenAI messages; the same for the same interpreter."""
    for module in modules():
        group = module.name.partition(".")[0]
        for line, question, answer in _module_pairs(module):
            yield _row(Origin(f"python-docs/{module.file}", line, group), question, answer)
    for number, (topic, question, answer) in enumerate(_topic_pairs(), 1):
        yield _row(Origin("python-docs/topics", number, f"topic {topic}"), question, answer)


def fingerprint() -> str:
    """SHA-256 of the interpreter's version and of the text of the library the pairs are cut from."""
    digest = hashlib.sha256(f"{sys.version}\0{sys.platform}".encode())
    for name, path in sorted([*_sources(), *_topics_source()]):
        digest.update(name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def modules() -> Iterator[Module]:
    """Every documented public module, in order of names."""
    read = {name: path for name, path in _sources() if name not in ALIVE}
    alive = {name for name in ALIVE if name in sys.stdlib_module_names}
    for name in sorted({*read, *alive}):
        found = _from_source(name, read[name]) if name in read else _from_life(name)
        if found is not None:
            yield found


def _row(origin: Origin, question: str, answer: str) -> Row:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return Row(origin, {"messages": messages})


# --- Reading sources ----------------------------------------------------------------------------------------------


def _sources() -> Iterator[tuple[str, Path]]:
    """(module, file) of every public module of the standard library that is written in Python."""
    library = Path(sysconfig.get_path("stdlib"))
    for top in sorted(sys.stdlib_module_names):
        if top.startswith("_") or top in LEFT_OUT:
            continue
        if (library / f"{top}.py").is_file():
            yield top, library / f"{top}.py"
        for file in sorted((library / top).rglob("*.py")):
            parts = file.relative_to(library).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            if not any(part.startswith("_") or part in ("test", "tests") for part in name.split(".")):
                yield name, file


def _topics_source() -> Iterator[tuple[str, Path]]:
    file = Path(sysconfig.get_path("stdlib")) / "pydoc_data" / "topics.py"
    if file.is_file():
        yield "topics", file


def _from_source(name: str, path: Path) -> Module | None:
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return None  # a template or a file for another version
    module = Module(name, path.relative_to(sysconfig.get_path("stdlib")).as_posix(), ast.get_docstring(tree) or "")
    public = _exported(tree)
    for node in _definitions(tree.body):
        if node.name in public if public is not None else not node.name.startswith("_"):
            module.entries += _class(name, node) if isinstance(node, ast.ClassDef) else _function(name, node)
    return module


def _exported(tree: ast.Module) -> set[str] | None:
    """The names in a literal `__all__`, or None."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(isinstance(to, ast.Name) and to.id == "__all__" for to in node.targets):
            try:
                return set(ast.literal_eval(node.value))
            except ValueError:
                return None
    return None


Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def _definitions(body: Sequence[ast.stmt]) -> Iterator[Definition]:
    """Functions and classes of a body, those inside if and try included, each name once."""
    seen: set[str] = set()
    for node in body:
        inner: Iterator[Definition] | tuple[Definition, ...] = ()
        if isinstance(node, Definition):
            inner = (node,)
        elif isinstance(node, ast.If | ast.Try):
            inner = _definitions([*node.body, *node.orelse])
        for definition in inner:
            if definition.name not in seen and (isinstance(definition, ast.ClassDef) or ast.get_docstring(definition)):
                seen.add(definition.name)
                yield definition


def _function(module: str, node: ast.FunctionDef | ast.AsyncFunctionDef, owner: str = "") -> list[Entry]:
    doc = ast.get_docstring(node)
    if not doc:
        return []
    name = f"{owner}.{node.name}" if owner else node.name
    decorators = {ast.unparse(one).rpartition(".")[2] for one in node.decorator_list}
    if owner and decorators & {"property", "cached_property", "abstractproperty", "DynamicClassAttribute"}:
        return [Entry("property", module, name, "", doc, node.lineno)]
    bound = bool(owner) and "staticmethod" not in decorators
    kind = "method" if owner else "function"
    return [Entry(kind, module, name, f"{name}{_arguments(node.args, bound)}", doc, node.lineno)]


def _class(module: str, node: ast.ClassDef) -> list[Entry]:
    methods = [one for one in _definitions(node.body) if not isinstance(one, ast.ClassDef)]
    public = [one for one in methods if not one.name.startswith("_")]
    entries = [entry for one in public for entry in _function(module, one, node.name)]
    maker = next((one for one in node.body if isinstance(one, ast.FunctionDef) and one.name == "__init__"), None)
    signature = f"{node.name}{_arguments(maker.args, bound=True)}" if maker else ""
    bases = tuple(name for base in node.bases if (name := ast.unparse(base)) != "object")
    members = tuple(entry.name.rpartition(".")[2] for entry in entries if entry.kind == "method")
    doc = ast.get_docstring(node) or ""
    return [Entry("class", module, node.name, signature, doc, node.lineno, bases, members), *entries]


def _arguments(arguments: ast.arguments, bound: bool) -> str:
    """`(obj, *, indent=None)`; the first one is left out where the object itself is passed for it."""
    text = f"({ast.unparse(arguments)})"
    return re.sub(r"^\((\w+)(?:, /)?(?:, |(?=\)))", "(", text, count=1) if bound else text


# --- Looking at the living ----------------------------------------------------------------------------------------


def _from_life(name: str) -> Module | None:
    try:
        living = importlib.import_module(name)
    except ImportError:
        return None  # not built into this interpreter
    module = Module(name, name, inspect.getdoc(living) or "")
    for number, (public, thing) in enumerate(_public(living), 1):
        module.entries += _living_entries(name, public, thing, number)
    return module


def _public(living: ModuleType) -> Iterator[tuple[str, Any]]:
    """Public functions and classes that are at home in the module."""
    name = living.__name__
    homes = {None, name, f"_{name}", *HOMES.get(name, ())}
    for public in sorted(getattr(living, "__all__", None) or dir(living)):
        thing = getattr(living, public, None)
        if public.startswith("_") or public.endswith("hook"):  # hooks are there for others to replace
            continue
        if not (inspect.isroutine(thing) or inspect.isclass(thing)):
            continue
        if getattr(thing, "__module__", None) in homes and getattr(thing, "__name__", public) == public:
            yield public, thing


def _living_entries(module: str, name: str, thing: Any, number: int) -> Iterator[Entry]:
    doc = _own_doc(thing)
    if not inspect.isclass(thing):
        if doc:
            yield Entry("function", module, name, _living_signature(name, thing), doc, number)
        return
    methods = [
        Entry("method", module, f"{name}.{key}", _living_signature(f"{name}.{key}", value), _own_doc(value), number)
        for key, value in sorted(vars(thing).items())
        if not key.startswith("_") and inspect.isroutine(value) and _own_doc(value)
    ]
    bases = tuple(base.__name__ for base in thing.__bases__ if base is not object)
    members = tuple(entry.name.rpartition(".")[2] for entry in methods)
    yield Entry("class", module, name, _living_signature(name, thing), doc, number, bases, members)
    yield from methods


def _own_doc(thing: Any) -> str:
    doc = getattr(thing, "__doc__", None)
    return inspect.cleandoc(doc) if isinstance(doc, str) else ""


def _living_signature(name: str, thing: Any) -> str:
    """The signature the interpreter knows, or the one the documentation begins with."""
    try:
        parameters = list(inspect.signature(thing).parameters.values())
    except Exception:  # many have none; some of the interpreter's own cannot be evaluated, each failing in its own way
        last = name.rpartition(".")[2]
        written = re.match(rf"(?:\w+\.)*{re.escape(last)}(\([^()\n]*\))", _own_doc(thing))
        return f"{name}{written.group(1)}" if written else ""
    if parameters and parameters[0].name in ("self", "cls", "type") and "." in name:
        parameters = parameters[1:]
    text = f"{name}{inspect.Signature(parameters)}"
    return "" if "<" in text else text  # a default that has no notation, shown by where it lies in memory


# --- Cutting the text ---------------------------------------------------------------------------------------------


def summary(doc: str, name: str = "", size: int = ANSWER) -> str:
    """The beginning of a documentation: whole paragraphs up to about `size` characters, at least one sentence.

    Signatures it begins with, examples, lists of parameters and underlined headings are left out. Returns "" where
    nothing is said in words.
    """
    kept: list[str] = []
    for paragraph in re.split(r"\n\s*\n", _without_signature(doc, name)):
        text = _unwrapped(paragraph)
        if not _is_prose(paragraph, text):
            if kept:
                break
            continue
        if kept and sum(map(len, kept)) + len(text) > size:
            break
        kept.append(text)
    return _finished(_sentences("\n\n".join(kept), size))


def example(doc: str, size: int = ANSWER) -> str:
    """The first session with the interpreter in a documentation, `>>>` lines and what they print; "" without one."""
    lines = doc.splitlines()
    begin = next((number for number, line in enumerate(lines) if line.strip().startswith(">>>")), len(lines))
    end = next((number for number, line in enumerate(lines) if number > begin and not line.strip()), len(lines))
    made = textwrap.dedent("\n".join(lines[begin:end]))
    fits = len(made) <= size and "doctest" not in made and not made.endswith(":")
    return made if fits and "\n" in made else ""


def _without_signature(doc: str, name: str) -> str:
    """Without the lines `dumps(obj) -> str` that documentations of C code begin with."""
    last, rest = name.rpartition(".")[2], doc.strip()
    while last and rest.partition("(")[0].rpartition(".")[2] == last:
        lines = rest.splitlines()
        size = next((n for n in range(1, len(lines)) if _balanced(lines[:n])), len(lines))
        said = re.search(r"\)\s*--?\s+(\w.*)$", lines[size - 1])
        rest = "\n".join([*([said.group(1)] if said else []), *lines[size:]]).strip()
    return rest


def _balanced(lines: Sequence[str]) -> bool:
    text = "".join(lines)
    return text.count("(") == text.count(")")


def _unwrapped(paragraph: str) -> str:
    """A paragraph on one line, its cross-references as plain code."""
    text = re.sub(r":\w+:`~?([^`]*)`", r"`\1`", " ".join(paragraph.split()))
    return text.replace("``", "`")


def _is_prose(paragraph: str, text: str) -> bool:
    lines = paragraph.strip("\n").splitlines()
    if not text:
        return False
    marked = any(re.match(r"\s*(>>>|\.\. |[*-] |:\w+|[=*~^-]{3,}|@|\||#)", line) for line in lines)
    listed = any(re.match(r"\s*\w+(?:\([^)]*\))?\s(?:--|:)\s|\w+:$", line) for line in lines)
    indented = len({len(line) - len(line.lstrip()) for line in lines}) > 1 or lines[0].startswith(" ")
    words = re.findall(r"[A-Za-z]{2,}", text)
    legal = re.match(r"Copyright|Licensed|Author", text)
    return (
        not (marked or listed or indented or legal)
        and len(words) >= 3
        and text[0] not in "$<"
        and not re.search(" = <|::=", text)
    )


def _sentences(text: str, size: int) -> str:
    """The text if it fits, else the sentences that do, and the first one even if it does not."""
    if len(text) <= size:
        return text
    ends = _ends(text) or [len(text)]
    return text[: max([end for end in ends if end <= size], default=ends[0])]


def _finished(text: str) -> str:
    """Without a last sentence that only leads to what is not there: a list, a formula, an example."""
    if text.rstrip("\"'`)").endswith((".", "!", "?")):
        return text
    ends = _ends(text)
    return text[: ends[-1]] if ends else f"{text[:-1]}." if text.endswith(":") else text


def _ends(text: str) -> list[int]:
    """Where its sentences end."""
    end = r"(?<!\be\.g)(?<!\bi\.e)([.!?])(?:\s+(?=[A-Z`'\"])|$)"
    return [found.end(1) for found in re.finditer(end, text)]


# --- Questions ----------------------------------------------------------------------------------------------------

ASK_PURPOSE = {
    "function": ("What does {} do?", "What is the function {} for?", "Explain what {} does."),
    "method": ("What does {} do?", "What is the method {} for?", "Explain what the method {} does."),
    "class": ("What is the class {} for?", "What does the class {} do?", "Describe the class {}."),
    "property": ("What does the property {} tell?", "What is {}?", "Describe the property {}."),
}
ASK_SIGNATURE = ("What is the signature of {}?", "How is {} called?", "Which parameters does {} take?")
ASK_EXAMPLE = ("Show an example of {}.", "Give me an example that uses {}.", "How would I use {}?")
ASK_NAME = ("Which {kind} of the module {module} does this: {what}", "Name the {kind} in {module} for this: {what}")
ASK_MODULE = ("What is the module {} for?", "What does the module {} offer?", "Describe the module {}.")
ASK_MEMBERS = ("Which methods does the class {} have?", "List the public methods of {}.")
ASK_BASE = ("Which class does {} inherit from?", "What is the base class of {}?")
ASK_TOPIC = ("Explain this about Python: {}.", "Tell me about {} in Python.", "What should I know about {} in Python?")


def _module_pairs(module: Module) -> Iterator[tuple[int, str, str]]:
    """(line, question, answer) of everything in a module; an answer two things share is no name to ask for."""
    about = summary(module.doc, module.name)
    if 0 < len(about) <= 2 * ANSWER and module.name != "builtins":
        yield 1, _ask(ASK_MODULE, module.name), about
    first = [_sentences(summary(entry.doc, entry.name, size=1), size=1) for entry in module.entries]
    for entry, what in zip(module.entries, first, strict=True):
        yield from ((entry.line, question, answer) for question, answer in _entry_pairs(entry))
        named = entry.name.rpartition(".")[2].casefold() in what.casefold()
        if entry.kind != "property" and 20 <= len(what) <= LOOKUP and first.count(what) == 1 and not named:
            question = _choice(ASK_NAME, entry.path).format(kind=entry.kind, module=_code(module.name), what=what)
            yield entry.line, question, _code(entry.path)


def _entry_pairs(entry: Entry) -> Iterator[tuple[str, str]]:
    said = summary(entry.doc, entry.name)
    if 0 < len(said) <= 2 * ANSWER:
        yield _ask(ASK_PURPOSE[entry.kind], entry.path), said
    if "()" not in entry.signature and 0 < len(entry.signature) <= SIGNATURE and entry.kind != "property":
        yield _ask(ASK_SIGNATURE, entry.path), _code(entry.call)
    shown = example(entry.doc)
    if shown:
        yield _ask(ASK_EXAMPLE, entry.path), f"```python\n{shown}\n```"
    if 2 <= len(entry.members) <= MEMBERS:
        *others, last = map(_code, entry.members)
        yield _ask(ASK_MEMBERS, entry.path), f"{', '.join(others)} and {last}."
    if len(entry.bases) == 1:
        yield _ask(ASK_BASE, entry.path), f"{_code(entry.path)} inherits from {_code(entry.bases[0])}."


def _topic_pairs() -> Iterator[tuple[str, str, str]]:
    """(topic, question, answer) of the language reference: each topic's sections that begin with prose."""
    from pydoc_data.topics import topics

    for topic, text in sorted(topics.items()):
        for title, body in _sections(text):
            answer = summary(body)
            if 0 < len(answer) <= 2 * ANSWER:
                yield topic, _choice(ASK_TOPIC, f"{topic} {title}").format(_lowered(title)), answer


def _sections(text: str) -> Iterator[tuple[str, str]]:
    """(title, body) of a text whose titles are underlined."""
    pieces = re.split(r"^(\S.*)\n([*=-]{3,}|~{3,}|\^{3,})$", text, flags=re.MULTILINE)
    for title, body in zip(pieces[1::3], pieces[3::3], strict=True):
        yield title.replace('"', "`").strip(), body.strip()


def _lowered(title: str) -> str:
    """A title inside a sentence: `The assert statement` -> `the assert statement`, but `PEP 8` stays."""
    return title[0].lower() + title[1:] if title[:2].istitle() or title[1:2] == " " else title


def _ask(questions: Sequence[str], path: str) -> str:
    return _choice(questions, path).format(_code(path))


def _choice(questions: Sequence[str], path: str) -> str:
    """One wording of a question, always the same for the same thing."""
    return questions[zlib.crc32(path.encode()) % len(questions)]


def _code(text: str) -> str:
    return f"`{text}`"
