"""What the JSON of an exported program may say, so that reading and running it runs no code of it.

Torch evaluates the symbolic sizes, resolves operators from `torch` by attribute, imports modules
that a tree names, and writes names into Python source. So all of these are held to what an export
writes. Not here: the members of the archive.
"""

import ast
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

_IDENTIFIER = re.compile(r"[A-Za-z_]\w*|")
_PATH = re.compile(r"[\w./:\- ]*")
"""Names of parameters and of modules; an ONNX name may have a slash in it."""
_MODULE_PATH = re.compile(r"[\w./:\- @\[\]]*")
_OPERATOR = re.compile(
    r"torch\.ops\.(?!higher_order\.)[A-Za-z]\w*"
    r"\.((?!__)\w+|__i?(and|or|xor|lshift|rshift)__)\.(?!__)\w+"
    r"|_operator\.(eq|ne|le|ge|lt|gt|neg|pos|abs|add|sub|mul|truediv|floordiv|mod|pow|and_|or_|xor|not_"
    r"|lshift|rshift|getitem)"
    r"|math\.(?!__)\w+"
    r"|torch\.sym_\w+|torch\._sym_\w+"
)
_HIGHER_ORDER = {
    f"torch.ops.higher_order.{name}"
    for name in (
        "cond",
        "map_impl",
        "scan",
        "while_loop",
        "wrap_with_autocast",
        "wrap_with_set_grad_enabled",
    )
}
_FILE_OPERATORS = ("torch.ops.aten.save", "torch.ops.aten.from_file", "torch.ops.aten.load")
_SYM_FUNCTIONS = re.compile(
    r"FloorDiv|ModularIndexing|Where|PythonMod|Mod|CleanDiv|CeilToInt|FloorToInt|CeilDiv|LShift"
    r"|RShift|PowByNatural|FloatPow|FloatTrueDiv|IntTrueDiv|IsNonOverlappingAndDenseIndicator"
    r"|TruncToFloat|TruncToInt|RoundToInt|RoundDecimal|ToFloat|Identity|Max|Min|Eq|Ne|Lt|Le|Gt|Ge"
    r"|And|Or|Not|Integer|Rational|floor|ceiling|Abs|Mul|Add|Pow"
)
_SYMBOL = re.compile(r"z?[a-z]{1,2}\d+|True|False|true|false")
_SYM_SYNTAX = (
    ast.Expression,
    ast.BinOp,
    ast.UnaryOp,
    ast.BoolOp,
    ast.Compare,
    ast.operator,
    ast.unaryop,
    ast.boolop,
    ast.cmpop,
    ast.Load,
)
_KEPT_METADATA = ("nn_module_stack", "torch_fn")
_TREE_TYPES = (
    None,
    "builtins.tuple",
    "builtins.list",
    "builtins.dict",
    "collections.OrderedDict",
    "collections.namedtuple",
)


class RuleError(ValueError):
    """Something that no export writes."""


def check_program(program: Any) -> None:
    """Refuse what could run code, and drop what is for people who debug an export.

    Args:
        program: the parsed models/*.json; changed in place: guards, which are Python source, and
            all metadata of nodes but where they come from are removed.

    Raises:
        RuleError: names what is not allowed.
    """
    if not isinstance(program, dict):
        raise RuleError("it is no object")
    program["guards_code"] = []
    for bounds in program.get("range_constraints", {}).values():
        if not all(value is None or type(value) is int for value in bounds.values()):
            raise RuleError(f"range {bounds} is not of whole numbers")
    _check(program)


def check_names(config: Any) -> None:
    """The same for the JSON that says where the tensors lie."""
    if not isinstance(config, dict):
        raise RuleError("it is no object")
    _check(config)


def _check(value: Any) -> None:
    if isinstance(value, list):
        for item in value:
            _check(item)
    elif isinstance(value, dict):
        if isinstance(value.get("metadata"), dict):
            kept = value["metadata"]
            value["metadata"] = {k: kept[k] for k in _KEPT_METADATA if k in kept}
        for key, item in value.items():
            if key in _CHECKS:
                for text in _texts(key, item):
                    _CHECKS[key](key, text)
            if key in _KEYED_BY_NAME:
                for name in _texts(key, list(item)):
                    _match(_IDENTIFIER, key, name)
            _check(item)


def _texts(key: str, item: Any) -> Iterator[str]:
    """The strings of a field; `name` of a node may be null, argument names are a list."""
    for text in item if isinstance(item, list) else [item]:
        if text is None:
            continue
        if not isinstance(text, str):
            raise RuleError(f"{key} is a {type(text).__name__}, not text")
        yield text


def _match(pattern: re.Pattern[str], key: str, text: str) -> None:
    if not pattern.fullmatch(text):
        raise RuleError(f"{key} {text[:80]!r} is no name that an export writes")


def _check_identifier(key: str, text: str) -> None:
    _match(_IDENTIFIER, key, text)


def _check_path(key: str, text: str) -> None:
    _match(_PATH, key, text)


def _check_module_path(key: str, text: str) -> None:
    _match(_MODULE_PATH, key, text)


def _check_operator(key: str, text: str) -> None:
    plain = bool(_OPERATOR.fullmatch(text)) and not text.startswith(_FILE_OPERATORS)
    if not plain and text not in _HIGHER_ORDER:
        raise RuleError(f"{key} {text[:80]!r} is no operator that may be run")


def _check_expression(key: str, text: str) -> None:
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise RuleError(f"{key} {text[:80]!r} is no expression") from None
    tree = _NamedSymbols().visit(tree)
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if not _may_stand(node, is_called=id(node) in called):
            raise RuleError(f"{key} {text[:80]!r} is more than arithmetic on sizes")


class _NamedSymbols(ast.NodeTransformer):
    """Makes s0 of Symbol('s0', positive=True, integer=True), as sympy writes a symbol."""

    def visit_Call(self, node: ast.Call) -> ast.AST:  # the name that ast looks for
        self.generic_visit(node)
        is_symbol = (
            isinstance(node.func, ast.Name)
            and node.func.id == "Symbol"
            and len(node.args) == 1
            and isinstance(node.args[0], ast.Constant)
            and isinstance(node.args[0].value, str)
            and all(
                isinstance(keyword.value, ast.Constant) and type(keyword.value.value) is bool
                for keyword in node.keywords
            )
        )
        return ast.Name(ast.literal_eval(node.args[0]), ast.Load()) if is_symbol else node


def _may_stand(node: ast.AST, *, is_called: bool) -> bool:
    if isinstance(node, ast.Name):
        pattern = _SYM_FUNCTIONS if is_called else _SYMBOL
        return bool(pattern.fullmatch(node.id))
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and not node.keywords
    if isinstance(node, ast.Constant):
        return isinstance(node.value, int | float)
    return isinstance(node, _SYM_SYNTAX)


def _check_tree(key: str, text: str) -> None:
    try:
        _, tree = json.loads(text)
        _check_subtree(tree)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise RuleError(f"{key} is no tree of lists, tuples and dicts") from None


def _check_subtree(tree: Any) -> None:
    if tree["type"] not in _TREE_TYPES or "__enum__" in (tree["context"] or ""):
        raise ValueError(tree["type"])
    for child in tree["children_spec"]:
        _check_subtree(child)


_CHECKS: dict[str, Callable[[str, str], None]] = {
    "name": _check_identifier,
    "as_name": _check_identifier,
    "forward_arg_names": _check_identifier,
    "user_input_name": _check_identifier,
    "parameter_name": _check_path,
    "buffer_name": _check_path,
    "tensor_constant_name": _check_path,
    "custom_obj_name": _check_path,
    "path_name": _check_path,
    "fqn": _check_module_path,
    "target": _check_operator,
    "as_operator": _check_operator,
    "expr_str": _check_expression,
    "in_spec": _check_tree,
    "out_spec": _check_tree,
}
_KEYED_BY_NAME = ("tensor_values", "sym_int_values", "sym_bool_values", "sym_float_values")
