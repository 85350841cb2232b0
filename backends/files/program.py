"""Torch turns the JSON of a .pt2 into Python source, sympy expressions and imports: each string is checked for its role.

Strings outside the known roles are refused, so a field that a later torch adds is safe by default. What is not needed to
run the program and may be evaluated or leak build paths (stack traces, source functions) is dropped rather than judged.
"""

from __future__ import annotations

import json
import keyword
import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from rewriter.backends.files.expressions import MAX_DIGITS, refuse_expression, refuse_guard

KEPT_METADATA = frozenset({"nn_module_stack", "torch_fn"})
MAX_STRING = 100_000
MAX_TREE_DEPTH = 200

_WORD = re.compile(r"[\w.+<>=\-]{0,200}")
_IDENTIFIER = re.compile(r"[^\W\d]\w{0,999}|")
_UNSAFE = re.compile(r"[\"'\\`{}\x00-\x1f\x7f\u2028\u2029\u0085]")
_OVERLOAD = re.compile(r"torch\.ops\.(aten|prims|structured|quantized_decomposed)\.([A-Za-z_]\w*)\.([A-Za-z]\w*)")
_HIGHER = re.compile(r"torch\.ops\.higher_order\.(\w+)")
_HIGHER_ORDER = frozenset(
    """cond scan while_loop map_impl map associative_scan wrap wrap_with_set_grad_enabled wrap_with_autocast invoke_subgraph
    hints_wrapper tag_activation_checkpoint wrap_activation_checkpoint flex_attention strict_mode""".split()  # noqa: SIM905
)
_FILES, _PROCESS, _GRADIENTS = "reads or writes files", "changes or prints to this process", "changes gradients or names in place"
_DENIED = {  # aten's operators that do more than compute, from its schemas with a file name, without a result, or on a global
    **dict.fromkeys(("from_file", "save"), _FILES),
    **dict.fromkeys("warn _print manual_seed seed set_grad_enabled wait record_stream".split(), _PROCESS),  # noqa: SIM905
    **dict.fromkeys(("_cufft_set_plan_cache_max_size", "_cufft_clear_plan_cache", "_propagate_xla_data"), _PROCESS),
    **dict.fromkeys("set_data rename rename_ backward _backward dist_backward grad retain_grad".split(), _GRADIENTS),  # noqa: SIM905
}
_TEST_PREFIX = "_test_"  # aten's own test doubles
_PLAIN = frozenset(
    f"{module}.{name}"
    for module, names in {
        "_operator": "add sub mul truediv floordiv mod pow neg pos abs eq ne lt le gt ge and_ or_ xor not_ lshift rshift getitem index",
        "math": "trunc floor ceil sqrt log log2 exp sin cos tan pow",
        "torch": "sym_not sym_int sym_float sym_ite sym_max sym_min sym_sqrt sym_sum sym_fresh_size _sym_sqrt _sym_log2 _sym_sin _sym_cos"
        " _sym_tan _sym_tanh _sym_sinh _sym_cosh _sym_asin _sym_acos _sym_atan",
    }.items()
    for name in names.split()
)
_TREE_TYPES = frozenset({"builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict", "collections.deque", "torch.Size"})
_TREE_TYPES |= frozenset({"torch.fx.immutable_collections.immutable_list", "torch.fx.immutable_collections.immutable_dict"})
_OUTPUT_MODULE = r"transformers\.(?:modeling_outputs|cache_utils|models\.\w+\.modeling_\w+)"
_OUTPUT_TYPE = re.compile(rf"({_OUTPUT_MODULE})\.[A-Za-z]\w*|torch\.return_types\.\w+")
_FACTORIES = frozenset(f"builtins.{name}" for name in ("list", "dict", "int", "float", "str", "set", "tuple"))


class Refused(Exception):
    """One reason why a program is not loaded."""


def check_program(program: Any, known_tree_type: Callable[[str], bool] = lambda name: False) -> tuple[set[str], set[str]]:
    """Check a model.json and strip it in place; return the operators that it calls and the output classes that it names."""
    if not isinstance(program, dict) or not isinstance(program.get("graph_module"), dict):
        raise Refused("its model.json describes no program")
    checker = _Checker(known_tree_type)
    checker.walk(program)
    return checker.targets, checker.classes


class _Checker:
    def __init__(self, known_tree_type: Callable[[str], bool]) -> None:
        self.targets: set[str] = set()
        self.classes: set[str] = set()
        self._known = known_tree_type
        self._roles: dict[str, Callable[[str], None]] = {
            "expr_str": _expression, "guards_code": _guard,
            "target": self._target, "as_operator": self._target,
            "name": _identifier, "as_name": _identifier, "forward_arg_names": _argument,
            "parameter_name": _text, "buffer_name": _text, "tensor_constant_name": _text, "user_input_name": _text, "fqn": _text,
            "field_names": _identifier,
            "in_spec": self._tree, "out_spec": self._tree,
            "nn_module_stack": _module_stack, "torch_fn": _module_stack,
        }  # fmt: skip

    def walk(self, program: dict[str, Any]) -> None:
        """Every value with the key under which it stands; `loose` marks arguments of nodes, whose strings are only ever repr'd."""
        stack: list[tuple[str, Any, bool]] = [("", program, False)]
        while stack:
            key, value, loose = stack.pop()
            if isinstance(value, dict):
                self._object(key, value)
                for child, item in value.items():
                    stack.append((child, item, child == "nodes" or (loose and child not in ("graph", "metadata"))))
            elif isinstance(value, list):
                stack.extend((key, item, loose) for item in value)
            elif isinstance(value, str):
                self._string(key, value, loose)
            elif isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**MAX_DIGITS:
                raise Refused(f"a number of more than {MAX_DIGITS} digits at {key!r}")

    def _object(self, key: str, value: dict[str, Any]) -> None:
        if value.keys() & {"as_custom_obj", "custom_obj"} or value.get("custom_obj_values"):
            raise Refused("it holds a custom object, which is a pickle")
        names = value.get("forward_arg_names")
        if isinstance(names, list) and len({str(name) for name in names}) < len(names):
            raise Refused("two arguments of one name")
        if key == "metadata":
            for name in value.keys() - KEPT_METADATA:
                del value[name]
        elif key == "range_constraints":
            for name in value:
                _expression(name)
        elif key in ("tensor_values", "sym_int_values", "sym_bool_values", "sym_float_values"):
            for name in value:
                _identifier(name)
        else:
            for name in value:
                _text(name)

    def _string(self, key: str, text: str, loose: bool) -> None:
        if len(text) > MAX_STRING:
            raise Refused(f"a string of {len(text)} characters at {key!r} (at most {MAX_STRING})")
        if role := self._roles.get(key):
            role(text)
        elif key in ("as_string", "as_strings"):
            if not loose:
                _text(text)
        elif key in ("as_float", "as_floats") and text in ("Infinity", "-Infinity", "NaN"):
            pass  # what JSON has no number for
        elif key.startswith("as_") or not _WORD.fullmatch(text):
            raise Refused(f"the text {text[:60]!r} at {key!r}")

    def _target(self, text: str) -> None:
        if text not in self.targets:
            _operator(text)
            self.targets.add(text)

    def _tree(self, text: str) -> None:
        self.classes |= _tree_classes(text, self._known)


def _expression(text: str) -> None:
    if reason := refuse_expression(text):
        raise Refused(f"a symbolic expression ({text[:60]!r}) with {reason}")


def _guard(text: str) -> None:
    if reason := refuse_guard(text):
        raise Refused(f"a guard ({text[:60]!r}) with {reason}")


def _identifier(text: str) -> None:
    """Names are pasted into generated source as they stand."""
    if not _IDENTIFIER.fullmatch(text) or (text and not text.isidentifier()):
        raise Refused(f"the name {text[:60]!r}, which is no identifier")
    if keyword.iskeyword(text):
        raise Refused(f"the name {text!r}, which is no identifier but a word of Python")


def _argument(text: str) -> None:
    """The parameters of the generated `forward`."""
    if not text:
        raise Refused("an argument without a name")
    _identifier(text)


def _text(text: str) -> None:
    """Pasted between quotes: nothing that could close them."""
    if _UNSAFE.search(text):
        raise Refused(f"the name {text[:60]!r} with quotes, braces or control characters")


def _module_stack(text: str) -> None:
    """Split and kept as text, never evaluated; control characters would break comments in generated source."""
    if re.search(r"[\x00-\x1f\x7f\u2028\u2029\u0085]", text):
        raise Refused(f"the module path {text[:60]!r} with control characters")


@lru_cache(maxsize=4096)
def _operator(text: str) -> None:
    if text in _PLAIN:
        return
    if (match := _HIGHER.fullmatch(text)) and match[1] in _HIGHER_ORDER:
        return
    if match := _OVERLOAD.fullmatch(text):
        if reason := _DENIED.get(match[2]) or (match[2].startswith(_TEST_PREFIX) and "only serves torch's tests"):
            raise Refused(f"the operator {text[:80]!r}, which {reason}")
        return
    raise Refused(f"the operator {text[:80]!r}")


def _tree_classes(text: str, known: Callable[[str], bool]) -> set[str]:
    """The classes that a pytree names; loading one may import a module (enum, defaultdict), so contexts are checked too."""
    try:
        protocol, root = json.loads(text)
    except (ValueError, TypeError, RecursionError) as problem:
        raise Refused("an input or output structure that is no pytree") from problem
    classes: set[str] = set()
    stack = [(root, 0)]
    while stack:
        node, depth = stack.pop()
        if not isinstance(node, dict) or not isinstance(node.get("children_spec"), list) or depth > MAX_TREE_DEPTH or protocol != 1:
            raise Refused("an input or output structure that is no pytree")
        kind = node.get("type")
        if kind is not None:
            _tree_type(kind, known)
            classes.add(kind)
            _tree_context(kind, node.get("context"))
        stack.extend((child, depth + 1) for child in node["children_spec"])
    return classes


def _tree_type(kind: Any, known: Callable[[str], bool]) -> None:
    listed = kind in _TREE_TYPES or kind in ("collections.defaultdict", "collections.namedtuple") if isinstance(kind, str) else False
    if not listed and not (isinstance(kind, str) and (_OUTPUT_TYPE.fullmatch(kind) or known(kind))):
        raise Refused(f"inputs or outputs of the class {str(kind)[:80]!r}")


def _tree_context(kind: str, context: Any) -> None:
    if kind == "collections.defaultdict":
        factory = f"{context.get('default_factory_module')}.{context.get('default_factory_name')}" if isinstance(context, dict) else ""
        if factory not in _FACTORIES:
            raise Refused(f"a defaultdict made by {factory[:80]!r}")
    if isinstance(context, str) and kind != "collections.namedtuple":
        try:
            context = json.loads(context)
        except (ValueError, RecursionError) as problem:
            raise Refused("a pytree context that is no JSON") from problem
    stack = [context]
    while stack:
        value = stack.pop()
        if isinstance(value, str):
            _text(value)
        elif isinstance(value, list):
            stack.extend(value)
        elif isinstance(value, dict):
            if "__enum__" in value:
                raise Refused("an enum in a pytree context, which names a module to import")
            stack.extend([*value.keys(), *value.values()])


def output_module(name: str) -> str | None:
    """The transformers module that must be imported before a pytree of class `name` can be read."""
    match = _OUTPUT_TYPE.fullmatch(name)
    return match[1] if match else None
