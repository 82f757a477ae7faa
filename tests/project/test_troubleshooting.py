"""docs/troubleshooting.md against the program: every message has an entry, every entry a message.

Messages are read from the source with ``ast``: what every error of the package is raised with. An
expression in a message is a hole, written ``…``, unless it can only be a few texts. The page's
entries are list items that begin with messages in code; their ``…`` stands for anything.
"""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import flowgrpo_ray

PACKAGE = Path(flowgrpo_ray.__file__).parent
PAGE = PACKAGE.parent / "docs" / "troubleshooting.md"
HOLE = "…"
LETTERS, WORDS = 7, 2  # with fewer outside of holes it wraps another message, or says too little
MOST = 40  # texts that one expression is taken apart into

BUILTIN_ERRORS = {"ValueError", "TypeError", "HTTPException"}
# Who raises those only at programmers: no input of a user leads there.
NOT_FOR_USERS = {
    "view.monitor.build_app",  # its own page asks for nothing else
    "algorithm.advantages._normalised",
    "rewards.weighted_total",
    "run.state._refuse",
    "run.state.read_json",  # what is wrong is shown on the page
    "rewards.signs.make_prompts",
    "rewards.signs.parse_prompt",
    "run.tracking.RunRecorder._append",
    "run.tracking.save_grid",
    "run.tracking.save_samples",
    "run.tracking._plain",
    "common.types.Schedule",
}
# Functions whose texts become a part of a message, or of a note on the console.
PARTS = {
    "serving.client.RewardClient._ask",
    "serving.http.RequireToken.__call__",
    "serving.http._answer_errors_as_json",
    "rewards.environments._faults",
    "rewards.environments._misfits",
    "algorithm.gate.OnPolicyGate._mismatches",
    "spec.file._explain",
    "common.strict.mistake",
    "spec.file._explain_kind",
}


@dataclass(frozen=True)
class Message:
    place: str  # file:line
    text: str  # with holes


# --- from the source


class Source:
    """All modules of the package, and what their names and functions stand for."""

    def __init__(self, modules: dict[str, ast.Module]) -> None:
        self.modules = modules
        self.calls: dict[str, list[tuple[str, list[ast.AST], ast.Call]]] = {}
        self.functions: dict[tuple[str, str], ast.FunctionDef] = {}
        errors = {"FlowGrpoError"}
        for name, module in modules.items():
            for node, above in walk(module):
                if isinstance(node, ast.Call) and (called := last_name(node.func)):
                    self.calls.setdefault(called, []).append((name, above, node))
                elif isinstance(node, ast.FunctionDef):
                    self.functions[name, node.name] = node
        for _ in range(3):  # subclasses of subclasses
            errors |= {
                node.name
                for module in modules.values()
                for node in ast.walk(module)
                if isinstance(node, ast.ClassDef)
                and (errors | {"ValueError"}) & set(map(last_name, node.bases))
            }
        self.errors = errors

    def messages(self) -> Iterator[Message]:
        """Of every error that is made anywhere, and of ``PARTS``."""
        for error in sorted(self.errors | BUILTIN_ERRORS):
            for module, above, call in self.calls.get(error, []):
                if error in BUILTIN_ERRORS and NOT_FOR_USERS & set(scopes(module, above)):
                    continue
                if text := message_argument(call):
                    yield from self._found(module, text, above)
        for module, tree in self.modules.items():
            for node, above in walk(tree):
                text = isinstance(node, ast.JoinedStr | ast.Constant) and handed_on(above[-1])
                if text and PARTS & set(scopes(module, above)):
                    yield from self._found(module, node, above)

    def _found(self, module: str, node: ast.AST, above: list[ast.AST]) -> Iterator[Message]:
        for found in self.texts(node, module, above):
            text = re.sub(f"{HOLE}+", HOLE, " ".join(found.split()))
            if says_something(text):
                yield Message(f"{module}:{getattr(node, 'lineno', 0)}", text)

    def texts(
        self, node: ast.AST | None, module: str, above: list[ast.AST], depth: int = 0
    ) -> list[str]:
        """What an expression can be, with holes for what is not known before it runs."""

        def inner(part: ast.AST | None) -> list[str]:
            return self.texts(part, module, above, depth)

        found: Iterable[str] = [HOLE]
        match node:
            case ast.Constant(value=str(value)):
                found = [value]
            case ast.JoinedStr(values=parts):
                found = map("".join, itertools.product(*map(inner, parts)))
            case ast.FormattedValue(value=value, conversion=-1):
                found = inner(value)
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                found = map("".join, itertools.product(inner(left), inner(right)))
            case ast.IfExp(body=body, orelse=orelse):
                found = [*inner(body), *inner(orelse)]
            case ast.BoolOp(values=values):
                found = [text for value in values for text in inner(value)]
            case ast.Name(id=name) if depth < 3:
                found = self._name(name, module, above, depth + 1)
            case ast.Call(func=ast.Name(id=name)) if (module, name) in self.functions:
                function = self.functions[module, name]
                returned = [n.value for n in ast.walk(function) if isinstance(n, ast.Return)]
                if depth < 3:
                    inside = [*above[:1], function]
                    texts = [self.texts(v, module, inside, depth + 1) for v in returned]
                    found = [text for some in texts for text in some]
            case _:
                pass
        unique = list(dict.fromkeys(found))
        return unique if len(unique) <= MOST else [HOLE]

    def _name(self, name: str, module: str, above: list[ast.AST], depth: int) -> list[str]:
        """A variable of the function or the module, or an argument of the function's calls."""
        for scope in reversed([node for node in above if isinstance(node, ast.FunctionDef)]):
            assigned = [
                node.value
                for node in ast.walk(scope)
                if isinstance(node, ast.Assign) and name in map(last_name, node.targets)
            ]
            assigned = [value for value in assigned if getattr(value, "value", None) != ""]
            if assigned:
                texts = [self.texts(value, module, above, depth) for value in assigned]
                return [text for some in texts for text in some]
            names = [arg.arg for arg in [*scope.args.args, *scope.args.kwonlyargs]]
            if name in names:
                given = [
                    self.texts(argument(call, names, name), where, around, depth)
                    for where, around, call in self.calls.get(scope.name, [])
                    if isinstance(call.func, ast.Name)
                ]
                return [text for some in given for text in some] or [HOLE]
        for node in self.modules[module].body:
            if isinstance(node, ast.Assign) and name in map(last_name, node.targets):
                return self.texts(node.value, module, [], depth)
        return [HOLE]


def walk(node: ast.AST, above: Iterable[ast.AST] = ()) -> Iterator[tuple[ast.AST, list[ast.AST]]]:
    """Every node with those that it lies in, outermost first; docstrings are left out."""
    above = [*above, node]
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)):
            yield child, above
            yield from walk(child, above)


def handed_on(node: ast.AST) -> bool:
    """Whether the texts right below this node become a part of something."""
    appended = isinstance(node, ast.Call) and last_name(node.func) == "append"
    return appended or isinstance(node, ast.Return | ast.Yield | ast.Assign)


def last_name(node: ast.AST) -> str:
    """``b`` of ``a.b``."""
    return getattr(node, "attr", getattr(node, "id", ""))


def scopes(module: str, above: list[ast.AST]) -> Iterator[str]:
    """``module.Class``, ``module.Class.method`` and so on of a node."""
    name = module
    for node in above:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            name += f".{node.name}"
            yield name


def message_argument(call: ast.Call) -> ast.AST | None:
    """The text that an error is made with: the status of an HTTPException comes before it."""
    texts = [a for a in call.args if not isinstance(getattr(a, "value", ""), int)]
    return call.args[-1] if last_name(call.func) == "HTTPException" else next(iter(texts), None)


def argument(call: ast.Call, names: list[str], name: str) -> ast.AST | None:
    for keyword in call.keywords:
        if keyword.arg == name:
            return keyword.value
    names = [n for n in names if n not in ("self", "cls")]
    place = names.index(name)
    return call.args[place] if place < len(call.args) else None


def says_something(text: str) -> bool:
    words = re.findall(r"[^\W\d]+", text)
    return len(words) >= WORDS and sum(map(len, words)) >= LETTERS


def read_package() -> Source:
    modules: dict[str, ast.Module] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(part for part in parts if part != "__init__")
        modules[name] = ast.parse(path.read_text("utf-8"))
    return Source(modules)


@pytest.fixture(scope="module")
def messages() -> list[Message]:
    return list(dict.fromkeys(read_package().messages()))


# --- from the page


def entries(page: str) -> list[str]:
    """The messages that list items begin with, one or several in code, before any words."""
    items = re.findall(r"^- (`.*?)(?=\n\n|\n- |\Z)", page, re.M | re.S)
    found: list[str] = []
    for item in items:
        spans = re.match(r"(?:(`+) ?(?:(?!\1).)+ ?\1\\?\s*)+", item, re.S)
        assert spans, item
        for _, text in re.findall(r"(`+) ?(.+?) ?\1(?!`)", spans[0], re.S):
            found.append(" ".join(text.split()))
    return found


def pattern(entry: str) -> re.Pattern[str]:
    return re.compile(".*".join(map(re.escape, entry.split(HOLE))))


ENTRIES = entries(PAGE.read_text("utf-8"))


def test_every_message_of_the_program_has_an_entry(messages: list[Message]):
    patterns = [pattern(entry) for entry in ENTRIES]
    missing = [m for m in messages if not any(p.fullmatch(m.text) for p in patterns)]
    told = "\n".join(f"  {m.place}: {m.text}" for m in missing)
    assert not missing, f"{len(missing)} messages are not in docs/troubleshooting.md:\n{told}"


def test_every_entry_is_a_message_of_the_program(messages: list[Message]):
    vague = [entry for entry in ENTRIES if not says_something(entry)]
    assert not vague, "too short to say which message is meant"
    gone = [e for e in ENTRIES if not any(pattern(e).fullmatch(m.text) for m in messages)]
    assert not gone, "no message of the program is like these"


# --- the test of the test


CODE = """
class OwnError(FlowGrpoError): ...
REMEDY = "mend the file"
def check(name, value):
    'OwnError("of a docstring")'
    what = f"{name!r} is wrong" if value else "there is no value"
    raise OwnError(f"{name}: {what}, at most {LIMIT}; {REMEDY}")
def shape(count):
    return f"for {count} images" + (" or more" if count else "")
def both(path):
    check("first key", path)
    check(path, 1)
    return OwnError(shape(2)), OwnError(shape(path)), OwnError(f"{path}: {value}")
"""


def test_messages_are_read_from_code():
    found = {message.text for message in Source({"module": ast.parse(CODE)}).messages()}
    end = ", at most …; mend the file"
    assert found == {
        *(f"{key}: … is wrong{end}" for key in ("first key", "…")),
        *(f"{key}: there is no value{end}" for key in ("first key", "…")),
        *("for … images", "for … images or more"),
    }


def test_entries_are_read_from_a_page():
    page = "- `one … message`\\\n  ``a `b` c``\n\n  Text with `code`.\n\n- text `no`\n\n`no`\n"
    assert entries(page) == ["one … message", "a `b` c"]
