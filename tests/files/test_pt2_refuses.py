"""Every way into torch.export.load that runs code, reads past its bytes or grows without bound is refused in one line."""

from __future__ import annotations

import io
import json
import logging
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

from rewriter.backends.files import archive as archive_module
from rewriter.backends.files import pt2
from rewriter.backends.files.pt2 import load_pt2
from rewriter.errors import RewriteError
from tests.files.payloads import Payload, config, first, rebuild

Edit = Callable[[Any, str], None]


def refused(path: Path, match: str) -> None:
    with pytest.raises(RewriteError, match=match) as caught:
        load_pt2(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_pickle_in_the_sample_inputs_never_runs(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    buffer = io.BytesIO()
    torch.save(Payload(marker), buffer)
    path = rebuild(tmp_path / "m.pt2", replace={"data/sample_inputs/model.pt": buffer.getvalue()})
    assert load_pt2(path).example_inputs is None
    assert not marker.exists()


def test_the_payload_would_run_without_the_guard(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    path = rebuild(tmp_path / "m.pt2", model=lambda m: first(m, "expr_str").update(expr_str=_python(marker)))
    with pytest.raises(Exception, match=r".+"):
        torch.export.load(path)
    assert marker.exists()  # the reason for this whole module


def _python(marker: Path | str) -> str:
    return f"__import__('os').mkdir({str(marker)!r})"


def _set(key: str, value: Callable[[str], Any]) -> Edit:
    def edit(document: Any, marker: str) -> None:
        first(document, key)[key] = value(marker)

    return edit


def _node_name(document: Any, marker: str) -> None:
    text = json.dumps(document).replace('"input"', json.dumps(f"x={_python(marker)}"))
    document.clear()
    document.update(json.loads(text))


def _tree(document: Any, spec: dict[str, Any]) -> None:
    signature = first(document, "in_spec")
    signature["in_spec"] = json.dumps([1, spec])


def _defaultdict(document: Any, marker: str) -> None:
    context = {"default_factory_module": "antigravity_planted", "default_factory_name": "x", "dict_context": []}
    _tree(document, {"type": "collections.defaultdict", "context": context, "children_spec": []})


def _enum(document: Any, marker: str) -> None:
    context = json.dumps({"__enum__": True, "fqn": "antigravity_planted:x", "name": "y"})
    _tree(document, {"type": "builtins.dict", "context": context, "children_spec": []})


def _closing_key(document: Any, marker: str) -> None:
    leaf = {"type": None, "context": None, "children_spec": []}
    _tree(document, {"type": "builtins.dict", "context": json.dumps(["'\"+evil()+\"'"]), "children_spec": [leaf]})


def _nested(depth: int) -> dict[str, Any]:
    spec: dict[str, Any] = {"type": None, "context": None, "children_spec": []}
    for _ in range(depth):
        spec = {"type": "builtins.list", "context": "null", "children_spec": [spec]}
    return spec


EDITS: dict[str, tuple[Edit, str]] = {
    "expr_str": (_set("expr_str", _python), "symbolic expression"),
    "expr_str lambda": (_set("expr_str", lambda marker: f"(lambda: {_python(marker)})()"), "symbolic expression"),
    "expr_str attribute": (_set("expr_str", lambda marker: "Symbol('s0').func.__class__"), "symbolic expression"),
    "expr_str string": (_set("expr_str", lambda marker: "Integer('1')"), "symbolic expression"),
    "expr_str symbol": (_set("expr_str", lambda marker: "Symbol('os')"), "symbolic expression"),
    "expr_str sympify": (_set("expr_str", lambda marker: "sympify(s0)"), "symbolic expression"),
    "expr_str tower": (_set("expr_str", lambda marker: "Pow(Pow(Integer(9), Integer(9)), Integer(9))"), "powers above"),
    "expr_str power": (_set("expr_str", lambda marker: "9**9**9"), "exponent"),
    "expr_str digits": (_set("expr_str", lambda marker: f"Integer({'9' * 30})"), "digits"),
    "expr_str long": (_set("expr_str", lambda marker: "+".join(["s0"] * 9000)), "characters"),
    "expr_str deep": (_set("expr_str", lambda marker: "Add(" * 120 + "s0" + ")" * 120), "nesting|no expression"),
    "expr_str letters": (_set("expr_str", lambda marker: "s\u0660"), "ASCII"),
    "expr_str keyword": (_set("expr_str", lambda marker: "Symbol('s0', evil=True)"), "assumption"),
    "guards_code": (lambda m, marker: m.update(guards_code=[_python(marker)]), "guard"),
    "guards_code call": (lambda m, marker: m.update(guards_code=["L['x'].numpy() == 1"]), "guard"),
    "guards_code name": (lambda m, marker: m.update(guards_code=["torch.load('x') == 1"]), "guard"),
    "guards_code key": (lambda m, marker: m.update(guards_code=['L["it\'s"].size()[0] == 1']), "guard"),
    "node name": (_node_name, "no identifier"),
    "forward_arg_names": (_set("forward_arg_names", lambda marker: [f"x={_python(marker)}"]), "no identifier"),
    "forward_arg_names keyword": (_set("forward_arg_names", lambda marker: ["def"]), "a word of Python"),
    "forward_arg_names empty": (_set("forward_arg_names", lambda marker: [""]), "without a name"),
    "forward_arg_names twice": (_set("forward_arg_names", lambda marker: ["x", "x"]), "of one name"),
    "forward_arg_names letter": (_set("forward_arg_names", lambda marker: ["x\u00b2"]), "no identifier"),
    "parameter_name": (_set("parameter_name", lambda marker: 'a"+evil()+"'), "quotes"),
    "defaultdict": (_defaultdict, "defaultdict"),
    "enum": (_enum, "enum"),
    "tree key": (_closing_key, "quotes"),
    "tree class": (lambda m, marker: _tree(m, {"type": "os.path", "context": "null", "children_spec": []}), "the class"),
    "target": (_set("target", lambda marker: "torch.hub.load"), "operator"),
    "target builtin": (_set("target", lambda marker: "_operator.methodcaller"), "operator"),
    "target attribute": (_set("target", lambda marker: "torch.ops.aten.__class__.__call__"), "operator"),
    "target file": (_set("target", lambda marker: "torch.ops.aten.from_file.default"), "operator"),
    "target namespace": (_set("target", lambda marker: "torch.ops.rngprims.philox_rand.default"), "the operator"),
    "target profiler": (_set("target", lambda marker: "torch.ops.profiler._record_function_enter_new.default"), "the operator"),
    "target save": (_set("target", lambda marker: "torch.ops.aten.save.default"), "reads or writes files"),
    "target process": (_set("target", lambda marker: "torch.ops.aten.manual_seed.default"), "to this process"),
    "target data": (_set("target", lambda marker: "torch.ops.aten.set_data.default"), "gradients"),
    "target test": (_set("target", lambda marker: "torch.ops.aten._test_string_default.default"), "torch's tests"),
    "target higher": (_set("target", lambda marker: "torch.ops.higher_order.call_torchbind"), "operator"),
    "target extension": (_set("target", lambda marker: "#os:system"), "operator"),
    "target unknown": (_set("target", lambda marker: "torch.ops.aten.no_such_thing.default"), "not known"),
    "custom object": (lambda m, marker: m["graph_module"]["graph"].update(custom_obj_values={"a": {}}), "custom object"),
    "value name": (lambda m, marker: m["graph_module"]["graph"]["sym_int_values"].update({"x=evil()": {"as_int": 1}}), "no identifier"),
    "output class": (lambda m, marker: m["graph_module"].update(treespec_namedtuple_fields={'a"+evil()+"': {"field_names": []}}), "quotes"),
    "constant text": (lambda m, marker: m["graph_module"]["graph"]["inputs"].append({"as_string": "'+evil()+'"}), "quotes"),
    "long text": (lambda m, marker: m["graph_module"]["graph"]["inputs"].append({"as_string": "a" * 200_000}), "characters"),
    "huge number": (lambda m, marker: m.update(opset_version={"aten": 10**30}), "digits"),
    "module path": (_set("nn_module_stack", lambda marker: "a,b\nevil(),c"), "control"),
    "deep tree": (lambda m, marker: _tree(m, _nested(300)), "no pytree"),
    "text as number": (_set("as_int", lambda marker: "evil()"), "as_int"),
    "symbol counter": (lambda m, marker: m.update(range_constraints={"u9999999999": {"min_val": 0, "max_val": 1}}), "expression"),
    "unknown field": (lambda m, marker: m.update(new_field="evil()"), "new_field"),
    "not a program": (lambda m, marker: m.clear(), "no program"),
}


@pytest.mark.parametrize("name", EDITS)
def test_edited_programs_are_refused(name: str, tmp_path: Path) -> None:
    edit, match = EDITS[name]
    marker = tmp_path / "ran"
    path = rebuild(tmp_path / "m.pt2", model=lambda document: edit(document, str(marker)))
    refused(path, match)
    assert not marker.exists()


def _weights(edit: Callable[[Any], None]) -> dict[str, bytes]:
    table = config("dynamic", "weights_config.json")
    edit(table["config"])
    return {"data/weights/model_weights_config.json": json.dumps(table).encode()}


def _first_weight(**change: Any) -> Callable[[Any], None]:
    return lambda table: next(iter(table.values())).update(change)


def _meta(**change: Any) -> Callable[[Any], None]:
    return lambda table: next(iter(table.values()))["tensor_meta"].update(change)


TABLES: dict[str, tuple[Callable[[Any], None], str]] = {
    "pickled": (_first_weight(use_pickle=True), "pickle"),
    "pickled, nearly": (_first_weight(use_pickle=1), "pickle"),
    "custom object": (_first_weight(path_name="custom_obj_0"), "no plain tensor"),
    "opaque object": (_first_weight(path_name="opaque_obj_0"), "no plain tensor"),
    "path": (_first_weight(path_name="../../weight_0"), "no plain tensor"),
    "missing": (_first_weight(path_name="weight_77"), "no bytes"),
    "too large": (_meta(sizes=[{"as_int": 1 << 40}], strides=[{"as_int": 1}]), "too few"),
    "negative": (_meta(sizes=[{"as_int": -1}], strides=[{"as_int": 1}]), "impossible"),
    "offset": (_meta(storage_offset={"as_int": 10_000}), "too few"),
    "symbolic": (_meta(sizes=[{"as_expr": {"expr_str": "evil()"}}], strides=[{"as_int": 1}]), "shape and dtype"),
    "expanded": (_meta(sizes=[{"as_int": 1 << 50}], strides=[{"as_int": 0}]), "too few"),
    "sparse": (_meta(layout=1), "sparse"),
    "device": (_meta(device={"type": "meta", "index": None}), "lies on 'meta'"),
    "strides": (_meta(sizes=[{"as_int": 1}] * 2, strides=[{"as_int": 1}]), "impossible"),
    "rank": (_meta(sizes=[{"as_int": 1}] * 65, strides=[{"as_int": 1}] * 65), "impossible"),
    "fraction": (_meta(sizes=[{"as_int": 1.5}], strides=[{"as_int": 1}]), "impossible"),
    "entry": (lambda table: table.update({next(iter(table)): 1}), "a table of weights that is not one"),
}


@pytest.mark.parametrize("name", TABLES)
def test_edited_tables_of_weights_are_refused(name: str, tmp_path: Path) -> None:
    edit, match = TABLES[name]
    refused(rebuild(tmp_path / "m.pt2", replace=_weights(edit)), match)


def test_weights_that_say_pickle_never_run(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    buffer = io.BytesIO()
    torch.save(Payload(marker), buffer)
    edits = _weights(_first_weight(use_pickle=True)) | {"data/weights/weight_0": buffer.getvalue()}
    refused(rebuild(tmp_path / "m.pt2", replace=edits), "pickle")
    legacy = {"data/weights/model.pt": buffer.getvalue()}
    refused(rebuild(tmp_path / "legacy.pt2", replace=legacy), "no plain export")
    opaque = {"data/constants/opaque_obj_0": pickle.dumps(Payload(marker))}
    refused(rebuild(tmp_path / "opaque.pt2", replace=opaque), "no plain export")
    assert not marker.exists()


@pytest.mark.parametrize(
    ("member", "match"),
    [
        ("data/aotinductor/model/model.so", "compiled code"),
        ("data/aotinductor/model/model.json", "compiled code"),
        ("../evil", r"'\.\.'"),
        ("data/weights/evil.so", "compiled code"),
        ("data/executorch/model.pte", "no plain export"),
        ("models/second.json", "no plain export"),
        ("extra/../../evil", r"'\.\.'"),
        ("extra/a b", "extra file"),
    ],
)
def test_strange_members_are_refused(member: str, match: str, tmp_path: Path) -> None:
    refused(rebuild(tmp_path / "m.pt2", replace={member: b"1"}), match)


NEEDED = ["models/model.json", "data/weights/model_weights_config.json", "archive_version", "data/weights/weight_0"]


@pytest.mark.parametrize("member", NEEDED)
def test_missing_members_are_refused(member: str, tmp_path: Path) -> None:
    refused(rebuild(tmp_path / "m.pt2", drop=(member,)), "has no")


def test_a_compression_bomb_is_refused(tmp_path: Path) -> None:
    bomb = {"models/model.json": b" " * 10_000_000}
    refused(rebuild(tmp_path / "m.pt2", replace=bomb, compression=zipfile.ZIP_DEFLATED), "declare")


def test_doubled_encrypted_and_control_names_are_refused(tmp_path: Path) -> None:
    path = rebuild(tmp_path / "m.pt2")
    clean = path.read_bytes()
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(path, "a") as archive:
        archive.writestr(archive.namelist()[0], b"")
    refused(path, "twice")
    central = int.from_bytes(clean[-6:-2], "little")  # where the directory of the outer zip begins
    path.write_bytes(clean[: central + 8] + b"\x01" + clean[central + 9 :])
    refused(path, "encrypted")
    refused(rebuild(tmp_path / "n.pt2", replace={"extra/a\\b": b""}), "relative names")


def test_members_and_what_is_held_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = rebuild(tmp_path / "m.pt2", replace={"archive_version": b"0" * 65})
    refused(path, "64 are allowed")
    monkeypatch.setattr(archive_module, "MAX_MEMBERS", 3)
    refused(path, "3 are allowed")


def test_what_is_no_operator_is_refused(tmp_path: Path) -> None:
    path = rebuild(tmp_path / "m.pt2", model=lambda m: _set("target", lambda marker: "torch.ops.aten.add.overloads")(m, ""))
    refused(path, "no operator")


def test_a_zip_inside_a_truncated_one_is_not_taken_for_it(tmp_path: Path) -> None:
    path = rebuild(tmp_path / "m.pt2")
    path.write_bytes(b"PK\x03\x04" + b"\0" * 60 + path.read_bytes())
    refused(path, "first member")


def test_deep_json_is_refused(tmp_path: Path) -> None:
    refused(rebuild(tmp_path / "m.pt2", replace={"models/model.json": b"[" * 100_000}), "JSON")


def test_big_endian_and_other_versions_are_refused(tmp_path: Path) -> None:
    refused(rebuild(tmp_path / "a.pt2", replace={"byteorder": b"big"}), "byteorder")
    refused(rebuild(tmp_path / "b.pt2", replace={"archive_version": b"9"}), "archive_version")


@pytest.mark.parametrize("keep", [0.2, 0.6, 0.95])
def test_truncated_files_are_refused(keep: float, tmp_path: Path) -> None:
    path = rebuild(tmp_path / "m.pt2")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    refused(path, "truncated or damaged")


def test_damaged_weights_are_refused(tmp_path: Path) -> None:
    path = rebuild(tmp_path / "m.pt2")
    with zipfile.ZipFile(path) as archive:
        info = next(info for info in archive.infolist() if info.filename.endswith("weight_0"))
        start = info.header_offset + 30 + len(info.filename) + 2
    content = bytearray(path.read_bytes())
    content[start + 8] ^= 255
    path.write_bytes(bytes(content))
    refused(path, "damaged")


def test_a_program_that_torch_cannot_rebuild_is_one_line(tmp_path: Path) -> None:
    path = rebuild(tmp_path / "m.pt2", model=lambda m: m["graph_module"]["graph"]["nodes"].pop(0))
    refused(path, "cannot rebuild")


@pytest.mark.parametrize("table", [b"[]", b'{"config": []}', b'{"config": {"a": 1}}', b"{}"])
def test_tables_that_are_none_are_refused(table: bytes, tmp_path: Path) -> None:
    path = rebuild(tmp_path / "m.pt2", replace={"data/constants/model_constants_config.json": table})
    refused(path, "a table of weights that is not one")


def test_classes_with_their_own_reader_are_refused(tmp_path: Path) -> None:
    class Plain:
        pass

    class Read:
        pass

    name = f"{__name__}."
    reader: dict[str, Any] = {"to_dumpable_context": lambda context: context, "from_dumpable_context": lambda context: context}
    for kind, given in ((Plain, {}), (Read, reader)):
        pytree.register_pytree_node(kind, lambda x: ([], None), lambda x, c: None, serialized_type_name=name + kind.__name__, **given)
    try:
        assert pt2._registered_plainly(name + "Plain")
        assert not pt2._registered_plainly(name + "Read")
        assert not pt2._registered_plainly(name + "Unknown")
        spec = {"type": name + "Read", "context": "null", "children_spec": []}
        refused(rebuild(tmp_path / "m.pt2", model=lambda m: _tree(m, spec)), "the class")
    finally:
        for kind in (Plain, Read):
            pytree._deregister_pytree_node(kind)


def test_outputs_of_a_module_that_is_missing_are_refused(tmp_path: Path) -> None:
    spec = {"type": "transformers.models.none.modeling_none.Output", "context": "null", "children_spec": []}
    refused(rebuild(tmp_path / "m.pt2", model=lambda m: _tree(m, spec)), "cannot be imported here")


def test_the_fallback_of_torch_is_never_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.export, "load", lambda *args, **kwargs: pytest.fail("it reads other members of the zip"))
    assert load_pt2(rebuild(tmp_path / "m.pt2")) is not None
    refused(rebuild(tmp_path / "n.pt2", model=lambda m: m["graph_module"]["graph"]["nodes"].pop(0)), "cannot rebuild")


def test_a_copy_that_fails_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pt2, "_copy_checked", full)
    refused(rebuild(tmp_path / "m.pt2"), "cannot be copied for loading .*No space left on device.*TMPDIR")


def test_extra_texts_are_bounded_and_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = rebuild(tmp_path / "m.pt2", replace={"extra/note": b"\xff\xff"})
    with pytest.raises(RewriteError, match="'note' is no UTF-8 text"):
        pt2.read_extra(path)
    monkeypatch.setattr(pt2, "_MAX_EXTRA_NBYTES", 1)
    with pytest.raises(RewriteError, match="holds 2 bytes and 1 are allowed"):
        pt2.read_extra(path)


def test_refusals_are_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def noisy(*args: object) -> None:
        logging.getLogger("torch.export").critical("a page of stack traces")
        raise RewriteError(f"{path}: refused")

    path = rebuild(tmp_path / "m.pt2")
    before = logging.root.manager.disable
    monkeypatch.setattr(pt2, "_load_trusted", noisy)
    caplog.clear()
    refused(path, "refused")
    assert caplog.records == []
    assert logging.root.manager.disable == before
