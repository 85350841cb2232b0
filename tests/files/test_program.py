"""Every string of a program is held to its role before torch evaluates, pastes or imports it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from rewriter.backends.files.program import Refused, check_program
from tests.files.payloads import model

LEAF: dict[str, Any] = {"type": None, "context": None, "children_spec": []}


def _node(kind: str, context: Any) -> str:
    return json.dumps([1, {"type": kind, "context": context, "children_spec": []}])


ROLES = [
    ("expr_str", "os", "symbolic expression"),
    ("guards_code", "evil", "a guard"),
    ("target", "os.system", "the operator"),
    ("as_operator", "os.system", "the operator"),
    ("name", "x=1", "no identifier"),
    ("as_name", "x=1", "no identifier"),
    ("forward_arg_names", "x=1", "no identifier"),
    ("field_names", "x=1", "no identifier"),
    *[(key, "a'b", "with quotes") for key in ("parameter_name", "buffer_name", "tensor_constant_name", "user_input_name", "fqn")],
    *[("fqn", f"a{sign}b", "with quotes") for sign in "\"'\\`{}\x00\x1f\x7f\u2028\u2029\u0085"],
    ("in_spec", "evil", "structure that is no pytree"),
    ("out_spec", "evil", "structure that is no pytree"),
    ("out_spec", json.dumps([2, LEAF]), "structure that is no pytree"),  # another protocol
    ("out_spec", json.dumps([1, {"type": None, "context": None}]), "structure that is no pytree"),
    ("out_spec", json.dumps([1, LEAF | {"children_spec": "ab"}]), "structure that is no pytree"),
    ("out_spec", json.dumps([1, "ab"]), "structure that is no pytree"),
    ("out_spec", _node("builtins.dict", "{"), "context that is no JSON"),
    ("out_spec", _node("builtins.dict", {"a'b": 1}), "with quotes"),
    ("out_spec", _node("builtins.dict", [{"a": "a'b"}]), "with quotes"),
    ("nn_module_stack", "a\nb", "the module path"),
    ("torch_fn", "a\nb", "the module path"),
    ("as_float", "evil", "as_float"),
    ("anything", "e'vil", "anything"),
]


@pytest.mark.parametrize(("key", "text", "match"), ROLES)
def test_each_string_is_held_to_its_role(key: str, text: str, match: str) -> None:
    for value in (text, [text]):
        document = model("dynamic")
        document["graph_module"]["graph"]["inputs"].append({key: value})
        with pytest.raises(Refused, match=match):
            check_program(document)


@pytest.mark.parametrize("key", ["as_custom_obj", "custom_obj", "custom_obj_values"])
def test_custom_objects_are_refused(key: str) -> None:
    with pytest.raises(Refused, match="custom object"):
        check_program({"graph_module": {key: {"a": 1}}})


@pytest.mark.parametrize("key", ["tensor_values", "sym_int_values", "sym_bool_values", "sym_float_values"])
def test_names_of_values_are_identifiers(key: str) -> None:
    with pytest.raises(Refused, match="no identifier"):
        check_program({"graph_module": {"graph": {key: {"x=1": {}}}}})


@pytest.mark.parametrize("between", ["graph", "metadata"])
def test_only_arguments_of_nodes_are_loose(between: str) -> None:
    text = {"as_string": "it's"}
    check_program({"graph_module": {"graph": {"nodes": [{"inputs": [{"arg": text}]}]}}})
    inner = {"torch_fn": text} if between == "metadata" else {"inputs": [text]}
    with pytest.raises(Refused, match="with quotes"):
        check_program({"graph_module": {"graph": {"nodes": [{"inputs": [{"arg": {between: inner}}]}]}}})
