"""Find all names, enum members, methods and properties of TensorRT that the source uses.

A small abstract interpreter follows the TensorRT module and its objects through a source file: through assignments,
calls of functions in the file, attributes of its objects, and the return types in TensorRT's signatures. Branches that
a version never takes (`if not typed`, `options.target == "tensorrt-rtx"`, `hasattr(...)`) are skipped for that version.
So a new use is checked against the real bindings without a list.
"""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.export.bindings import WATCHED

# Parameters and fields with TensorRT objects, by their name in the source; "" is the module.
ROOTS = {
    "trt": "",
    "library": "",
    "builder": "Builder",
    "config": "IBuilderConfig",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "engine": "ICudaEngine",
    "context": "IExecutionContext",
    "inspector": "EngineInspector",
}
# Names of the source and of Python that TensorRT's classes also have.
OURS_TOO = {"__init__", "name", "shape", "dtype", "itemsize", "nbytes", "log", "type", "value", "precision"}.union(
    *map(dir, (str, bytes, list, dict, set))
)
MODULES = ("tensorrt", "tensorrt_rtx")

Function = ast.FunctionDef
Scope = dict[str, "Kind | None"]


@dataclasses.dataclass(frozen=True)
class Kind:
    """The inferred kind of an expression.

    Attributes:
        what: module, class, object or call of TensorRT; function, type or instance of the source; truth; text; list.
        name: of the class, function or type.
        owner: class of a call, or of a method of the source.
        value: of a boolean or a text.
    """

    what: str
    name: str = ""
    owner: str = ""
    value: Any = None


@dataclasses.dataclass(frozen=True)
class Use:
    """One use of TensorRT in the source: `owner` is the class or "", `problem` the reason if it is invalid."""

    line: int
    owner: str
    name: str
    problem: str | None = None

    def __str__(self) -> str:
        return f"line {self.line}: {self.owner or 'module'}.{self.name}: {self.problem or 'exists'}"


class Reading:
    """All uses of TensorRT in one source file, checked against the API of one version.

    Attributes:
        uses: every use of a name.
        chosen: `(owner, line)` of names that are only known at run time.
        untracked: `(line, name)` of attributes that TensorRT's classes also have, on an unknown object.
    """

    def __init__(self, path: Path, surface: Mapping[str, Any], target: str) -> None:
        """Analyze `path` for a target (tensorrt or tensorrt-rtx) and the API of a version."""
        self.names: Mapping[str, Any] = surface["names"]
        self.target = target
        self.uses: dict[tuple[int, str, str], Use] = {}
        self.chosen: set[tuple[str, int]] = set()
        self.untracked: set[tuple[int, str]] = set()
        self._fields: dict[tuple[str, str], Kind] = {}
        self._types: dict[str, tuple[ast.ClassDef, Scope]] = {}
        self._functions: dict[tuple[str, str], tuple[Function, Scope]] = {}
        self._entered: dict[tuple[str, str, tuple[Any, ...]], Kind | None] = {}
        self._returned: list[Kind | None] = []
        watched = [self.names[name]["members"] for name in WATCHED if name in self.names]
        self._watched = {member for members in watched for member in members} - OURS_TOO
        tree = ast.parse(path.read_text(encoding="utf-8"))
        called = {
            part.attr if isinstance(part, ast.Attribute) else getattr(part, "id", "")
            for node in ast.walk(tree)
            if isinstance(node, ast.Call)
            for part in [node.func]
        }
        for _ in range(2):  # In the second pass all attributes of the source's objects are known.
            self._entered.clear()
            self.untracked.clear()
            scope: Scope = {}
            self._run(tree.body, scope)
            # What nobody calls first; then methods that are called on something unknown. A plain function that is
            # called, but not entered by then, is called in branches only that this version does not take.
            for first in (True, False):
                for (owner, name), (function, closure) in list(self._functions.items()):
                    entered = any(key[:2] == (owner, name) for key in self._entered)
                    if not entered and (name not in called if first else owner):
                        self._enter(owner, name, function, closure, [], {})

    def problems(self) -> list[Use]:
        """Return the invalid uses, by line."""
        return sorted((use for use in self.uses.values() if use.problem), key=lambda use: use.line)

    def _use(self, node: ast.AST, owner: str, name: str, problem: str | None = None) -> None:
        key = (getattr(node, "lineno", 0), owner, name)
        if key not in self.uses or problem:
            self.uses[key] = Use(*key, problem)

    def _run(self, body: Sequence[ast.stmt], scope: Scope, owner: str = "") -> bool:
        """Follow statements, and return whether their end is unreachable."""
        return any(self._step(statement, scope, owner) for statement in body)

    def _step(self, node: ast.stmt, scope: Scope, owner: str) -> bool:
        if isinstance(node, ast.FunctionDef):
            self._functions[owner, node.name] = (node, scope)
            if not owner:
                scope[node.name] = Kind("function", node.name)
        elif isinstance(node, ast.ClassDef):
            self._class(node, scope)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            self._import(node, scope)
        elif isinstance(node, ast.Return):
            self._returned.append(self.kind(node.value, scope) if node.value else None)
            return True
        elif isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
            self._assign(node, scope)
        elif isinstance(node, ast.If):
            return self._if(node, scope, owner)
        elif isinstance(node, (ast.For, ast.While)):
            if isinstance(node, ast.For):
                self._bind(node.target, self._item(node.iter, scope), scope)
            else:
                self.kind(node.test, scope)
            self._run([*node.body, *node.orelse], scope, owner)
        elif isinstance(node, ast.With):
            for item in node.items:
                made = self.kind(item.context_expr, scope)
                if item.optional_vars is not None:
                    self._bind(item.optional_vars, made, scope)
            return self._run(node.body, scope, owner)
        elif isinstance(node, ast.Try):
            self._run([*node.body, *node.orelse, *node.finalbody], scope, owner)
            for handler in node.handlers:
                self._run(handler.body, dict(scope), owner)
        else:
            for part in ast.iter_child_nodes(node):
                if isinstance(part, ast.expr):
                    self.kind(part, scope)
            return isinstance(node, ast.Raise)
        return False

    def _if(self, node: ast.If, scope: Scope, owner: str) -> bool:
        truth = self._truth(node.test, scope)
        ends = [
            self._run(branch, scope, owner)
            for branch, taken in ((node.body, True), (node.orelse, False))
            if truth in (taken, None)
        ]
        return all(ends) if truth is None else ends[0]

    def _class(self, node: ast.ClassDef, scope: Scope) -> None:
        bases = [self.kind(base, scope) for base in node.bases]
        theirs = next((base.name for base in bases if base and base.what == "class"), "")
        self._types[node.name] = (node, scope)
        scope[node.name] = Kind("type", node.name, theirs)
        for statement in node.body:
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                self._field(node.name, statement.target.id, self._root(statement.target.id, statement.annotation))
            elif isinstance(statement, ast.FunctionDef):
                self._functions[node.name, statement.name] = (statement, scope)

    def _import(self, node: ast.Import | ast.ImportFrom, scope: Scope) -> None:
        for alias in node.names:
            name = alias.asname or alias.name
            if isinstance(node, ast.Import) and alias.name in MODULES:
                scope[name] = Kind("module")
            elif isinstance(node, ast.ImportFrom) and alias.name == "load_library":
                scope[name] = Kind("loader")

    def _assign(self, node: ast.Assign | ast.AnnAssign | ast.AugAssign, scope: Scope) -> None:
        for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                for part, value in zip(target.elts, node.value.elts, strict=False):
                    self._bind(part, self.kind(value, scope), scope)
            else:
                self._bind(target, self.kind(node.value, scope) if node.value is not None else None, scope)

    def _bind(self, target: ast.expr, made: Kind | None, scope: Scope) -> None:
        if isinstance(target, ast.Name):
            # A variable that is converted (`plan = bytes(plan)`) is no TensorRT object any more.
            scope[target.id] = made
        elif isinstance(target, ast.Attribute):
            holder = self.kind(target.value, scope)
            if holder and holder.what == "instance":
                self._field(holder.name, target.attr, made)
            elif holder and holder.what in ("object", "module", "class"):
                self._written(target, holder)
        elif isinstance(target, (ast.Tuple, ast.List)):
            for part in target.elts:
                self._bind(part, None, scope)
        elif isinstance(target, (ast.Subscript, ast.Starred)):
            self.kind(target.value, scope)

    def _field(self, owner: str, name: str, made: Kind | None) -> None:
        if made is not None:
            self._fields[owner, name] = made

    def _written(self, target: ast.Attribute, holder: Kind) -> None:
        self._attribute(target, holder, target.attr)
        member = self._member(holder.name, target.attr)
        if member is not None and not member.get("writable"):
            self._use(target, holder.name, target.attr, "cannot be written to")

    def kind(self, node: ast.expr, scope: Scope) -> Kind | None:
        """Follow an expression, and return its kind; None if it has no TensorRT object."""
        if isinstance(node, ast.Name):
            return scope.get(node.id)
        if isinstance(node, ast.Constant):
            return Kind("text", value=node.value) if isinstance(node.value, str) else None
        if isinstance(node, ast.Attribute):
            return self._attribute(node, self.kind(node.value, scope), node.attr)
        if isinstance(node, ast.Call):
            return self._call(node, scope)
        if isinstance(node, ast.IfExp):
            truth = self._truth(node.test, scope)
            found = [
                self.kind(branch, scope)
                for branch, taken in ((node.body, True), (node.orelse, False))
                if truth in (taken, None)
            ]
            return next((each for each in found if each), None)
        if isinstance(node, ast.BoolOp):
            found = [self.kind(value, scope) for value in node.values]
            return next((each for each in found if each and each.what != "text"), None)
        if isinstance(node, ast.Compare) or (isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not)):
            truth = self._truth(node, scope)
            return None if truth is None else Kind("truth", value=truth)
        if isinstance(node, ast.NamedExpr):
            made = self.kind(node.value, scope)
            self._bind(node.target, made, scope)
            return made
        if isinstance(node, (ast.List, ast.Tuple)):
            found = [self.kind(part, scope) for part in node.elts]
            return Kind("list", value=found[0]) if found and found[0] and len(set(found)) == 1 else None
        if isinstance(node, ast.Subscript):
            held = self.kind(node.value, scope)
            self.kind(node.slice, scope)
            return held.value if held and held.what == "list" else None
        if isinstance(node, (ast.ListComp, ast.SetComp, ast.GeneratorExp, ast.DictComp)):
            return self._comprehension(node, scope)
        if isinstance(node, ast.Lambda):
            return self.kind(node.body, dict(scope))
        for part in ast.iter_child_nodes(node):
            if isinstance(part, ast.expr):
                self.kind(part, scope)
        return None

    def _comprehension(self, node: Any, scope: Scope) -> Kind | None:
        inner = dict(scope)
        for loop in node.generators:
            self._bind(loop.target, self._item(loop.iter, inner), inner)
            for test in loop.ifs:
                self.kind(test, inner)
        if isinstance(node, ast.DictComp):
            self.kind(node.key, inner)
            item = self.kind(node.value, inner)
        else:
            item = self.kind(node.elt, inner)
        return Kind("list", value=item) if item else None

    def _item(self, node: ast.expr, scope: Scope) -> Kind | None:
        held = self.kind(node, scope)
        return held.value if held and held.what == "list" else None

    def _truth(self, node: ast.expr, scope: Scope) -> bool | None:
        """Return the value of a condition for this version; None if it is unknown."""
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            truth = self._truth(node.operand, scope)
            return None if truth is None else not truth
        if isinstance(node, ast.BoolOp):
            truths = [self._truth(value, scope) for value in node.values]
            decides = isinstance(node.op, ast.Or)
            if decides in truths:
                return decides
            return None if None in truths else not decides
        if isinstance(node, ast.Compare):
            left, right = node.left, node.comparators[0]
            self.kind(left, scope)
            self.kind(right, scope)
            named = left.attr if isinstance(left, ast.Attribute) else getattr(left, "id", "")
            if named == "target" and isinstance(right, ast.Constant) and right.value in ("tensorrt", "tensorrt-rtx"):
                same = right.value == self.target
                return (
                    same
                    if isinstance(node.ops[0], ast.Eq)
                    else not same
                    if isinstance(node.ops[0], ast.NotEq)
                    else None
                )
            return None
        made = self.kind(node, scope)
        return made.value if made and made.what == "truth" else None

    def _attribute(self, node: ast.AST, holder: Kind | None, name: str) -> Kind | None:
        if holder is None or holder.what in ("text", "truth", "list", "call", "function", "loader"):
            if name in self._watched and (holder is None or holder.what == "call"):
                self.untracked.add((getattr(node, "lineno", 0), name))
            return None
        if holder.what == "instance":
            if (holder.name, name) in self._functions:
                return Kind("function", name, holder.name)
            return self._fields.get((holder.name, name))
        if holder.what == "type":
            return Kind("function", name, holder.name) if (holder.name, name) in self._functions else None
        return self._theirs(node, holder, name)

    def _theirs(self, node: ast.AST, holder: Kind, name: str) -> Kind | None:
        if holder.what == "module":
            known = self.names.get(name)
            if known is None and name not in ("__name__", "__version__", "__file__"):
                self._use(node, "", name, "does not exist")
                return None
            self._use(node, "", name)
            if known is None:
                return None
            if "members" in known:
                return Kind("class", name)
            return Kind("call", name) if "signatures" in known else self._named(known["type"])
        member = self._member(holder.name, name)
        self._use(node, holder.name, name, None if member is not None else "does not exist")
        if member is None:
            return None
        if "signatures" in member:
            return Kind("call", name, holder.name)
        if "value" in member:
            return Kind("object", holder.name)
        return self._named(member.get("type"))

    def _member(self, owner: str, name: str) -> Mapping[str, Any] | None:
        return self.names.get(owner, {}).get("members", {}).get(name)

    def _named(self, told: str | None) -> Kind | None:
        """Return the class in a signature, which may have its C++ name with a leading I."""
        plain = (told or "").split("::")[-1].replace(" | None", "")
        for name in (plain, plain[1:]):
            if "members" in self.names.get(name, {}):
                return Kind("object", name)
        return None

    def _call(self, node: ast.Call, scope: Scope) -> Kind | None:
        plain = node.func.id if isinstance(node.func, ast.Name) else ""
        given = [self.kind(value, scope) for value in node.args]
        keywords = {keyword.arg or "**": self.kind(keyword.value, scope) for keyword in node.keywords}
        if plain in ("getattr", "hasattr") and len(node.args) > 1 and plain not in scope:
            return self._by_name(node, plain, given)
        called = self.kind(node.func, scope)
        if isinstance(node.func, ast.Attribute) and node.func.attr == "import_module" and node.args:
            named = given[0].value if given[0] else ""
            return Kind("module") if not named or named in MODULES else None
        if called is None:
            return None
        if called.what == "loader":
            return Kind("module")
        if called.what == "function":
            function, closure = self._functions[called.owner, called.name]
            return self._enter(called.owner, called.name, function, closure, given, keywords)
        if called.what == "type":
            return self._made(called, given, keywords)
        if called.what == "class":
            self._signature(node, called.name, "__init__", given)
            return Kind("object", called.name)
        if called.what == "call":
            through = node.func.value if isinstance(node.func, ast.Attribute) else None
            if through is not None and (holder := self.kind(through, scope)) and holder.what == "class":
                # `Base.__init__(self)`: the first argument is the object itself.
                node, given = ast.Call(node.func, node.args[1:], node.keywords, lineno=node.lineno), given[1:]
            return self._signature(node, called.owner, called.name, given)
        return None

    def _by_name(self, node: ast.Call, function: str, given: Sequence[Kind | None]) -> Kind | None:
        """Follow `getattr` or `hasattr` with a name as text."""
        holder, name = given[0], given[1]
        if holder is None or holder.what not in ("module", "class", "object"):
            return None
        if name is None or name.what != "text":
            if function == "getattr":
                self.chosen.add((holder.name, node.lineno))
            return Kind("object", holder.name) if holder.what == "class" and function == "getattr" else None
        exists = name.value in (self.names if holder.what == "module" else self.names[holder.name]["members"])
        if function == "hasattr":
            return Kind("truth", value=exists)
        return self._theirs(node, holder, name.value) if exists or len(node.args) == 2 else None

    def _made(self, called: Kind, given: Sequence[Kind | None], keywords: Mapping[str, Kind | None]) -> Kind:
        """Follow the construction of an object of the source with the kinds of its arguments."""
        declared, _ = self._types[called.name]
        if (called.name, "__init__") in self._functions:
            function, closure = self._functions[called.name, "__init__"]
            self._enter(called.name, "__init__", function, closure, given, keywords)
        else:
            fields = [
                part.target.id
                for part in declared.body
                if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name)
            ]
            for name, made in [*zip(fields, given, strict=False), *keywords.items()]:
                self._field(called.name, name, made)
        return Kind("instance", called.name, called.owner)

    def _enter(
        self,
        owner: str,
        name: str,
        function: Function,
        closure: Scope,
        given: Sequence[Kind | None],
        keywords: Mapping[str, Kind | None],
    ) -> Kind | None:
        """Follow a function of the source with the kinds of its arguments, and return the kind of its result."""
        parameters = [*function.args.posonlyargs, *function.args.args]
        scope: Scope = dict(closure)
        static = any(getattr(mark, "id", "") in ("staticmethod", "classmethod") for mark in function.decorator_list)
        if owner and not static:
            scope[parameters[0].arg] = Kind("instance", owner, self._base(owner))
        if owner and not any(getattr(mark, "id", "") == "staticmethod" for mark in function.decorator_list):
            parameters = parameters[1:]
        for position, parameter in enumerate([*parameters, *function.args.kwonlyargs]):
            made = given[position] if position < min(len(given), len(parameters)) else keywords.get(parameter.arg)
            scope[parameter.arg] = made or self._root(parameter.arg, parameter.annotation)
        key = (owner, name, tuple(sorted((known, str(kind)) for known, kind in scope.items() if kind)))
        if key not in self._entered:
            self._entered[key] = None
            before, self._returned = self._returned, []
            self._run(function.body, scope)
            self._entered[key] = next((kind for kind in self._returned if kind), None)
            self._returned = before
        if isinstance(function.returns, ast.Name) and function.returns.id == "ModuleType":
            return Kind("module")
        return self._entered[key] or (self._root(name, function.returns) if _is_property(function) else None)

    def _base(self, owner: str) -> str:
        declared, scope = self._types[owner]
        known = scope.get(declared.name)
        return known.owner if known else ""

    @staticmethod
    def _root(name: str, annotation: ast.expr | None) -> Kind | None:
        told = ast.unparse(annotation) if annotation else "Any"
        if told == "ModuleType":
            return Kind("module")
        if "Any" not in told:
            return Kind("instance", told)
        if name not in ROOTS:
            return None
        return Kind("object", ROOTS[name]) if ROOTS[name] else Kind("module")

    def _signature(self, node: ast.Call, owner: str, name: str, given: Sequence[Kind | None]) -> Kind | None:
        """Check a call against the overloads in TensorRT's docstrings, and return the kind of its result."""
        member = self._member(owner, name) if owner else self.names[name]
        overloads = (member or {}).get("signatures") or []
        complaints = []
        for parameters, returned in overloads:
            complaint = self._mismatch(node, parameters, given)
            if complaint is None:
                return self._named(returned)
            complaints.append(complaint)
        if complaints:
            self._use(node, owner, name, "; or ".join(dict.fromkeys(complaints)))
        return None

    def _mismatch(self, node: ast.Call, parameters: Sequence[Any], given: Sequence[Kind | None]) -> str | None:
        if any(isinstance(value, ast.Starred) for value in node.args) or any(not word.arg for word in node.keywords):
            return None
        names = [name for name, _, _ in parameters]
        if len(given) > len(parameters):
            return f"takes {len(parameters)} arguments, and gets {len(given)}"
        words = {str(word.arg) for word in node.keywords}
        if words - set(names):
            return f"has no argument {', '.join(sorted(words - set(names)))}"
        missing = [name for name, _, required in parameters[len(given) :] if required and name not in words]
        if missing:
            return f"needs {', '.join(missing)}"
        for (name, wanted, _), kind, value in zip(parameters, given, node.args, strict=False):
            if not self._fits(wanted, kind, value):
                return f"{name} is a {wanted}, and gets {ast.unparse(value)}"
        return None

    def _fits(self, wanted: str, kind: Kind | None, value: ast.expr) -> bool:
        if isinstance(value, ast.Constant) and value.value is not None:
            odd = {str: ("int", "SupportsInt", "SupportsFloat", "float", "bool"), int: ("str",), bytes: ("str",)}
            return wanted not in odd.get(type(value.value), ()) and "members" not in self.names.get(wanted, {})
        if kind is None or "members" not in self.names.get(wanted, {}):
            return True
        if kind.what in ("instance", "object"):
            have = kind.name if kind.what == "object" else kind.owner
            return not have or wanted in self.names[have]["bases"]
        return kind.what not in ("module", "class", "text", "truth")


def _is_property(function: Function) -> bool:
    return any(getattr(mark, "id", "") in ("property", "cached_property") for mark in function.decorator_list)


def lines_of(uses: Sequence[Use]) -> str:
    """Return uses as text, one per line."""
    return "\n".join(map(str, uses))
