"""Zips by hand: names that escape, lies about sizes and damaged members are each one line."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from rewriter.backends.files import archive
from rewriter.backends.files.archive import Archive, one_line, open_archive, read_object
from rewriter.errors import RewriteError


def written(path: Path, *names: str, content: bytes = b"content", compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as target:
        for name in names:
            info = zipfile.ZipInfo("x" * len(name))
            info.filename = name  # ZipInfo cuts a name at a NUL, and writing does not look again
            target.writestr(info, content, compression)
    return path


def patched(path: Path, before: bytes, after: bytes, offset: int) -> None:
    """Overwrite bytes at `offset` from the first `before`."""
    content = bytearray(path.read_bytes())
    start = content.index(before) + offset
    content[start : start + len(after)] = after
    path.write_bytes(content)


def _read_all(path: Path, max_ratio: int) -> None:
    with open_archive(path, max_ratio) as opened:
        for name in opened.names():
            opened.read(name)


def refused(path: Path, match: str, max_ratio: int = 1) -> None:
    with pytest.raises(RewriteError, match=match) as caught:
        _read_all(path, max_ratio)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_members_come_back_without_their_root(tmp_path: Path) -> None:
    with open_archive(written(tmp_path / "a.zip", "m/a", "m/b/c")) as opened:
        assert opened.names() == ["a", "b/c"]
        assert opened.root == "m/"
        assert opened.read("b/c") == b"content"
        assert "a" in opened and "m/a" not in opened


@pytest.mark.parametrize("name", ["/etc/passwd", "/a", "C:a", "C:/a", "../a", "a/../../b", "a\\b", "a\nb", "a\x1fb", "a\x01"])
def test_names_that_escape_are_refused(name: str, tmp_path: Path) -> None:
    refused(written(tmp_path / "a.zip", "m/ok", name), "only relative names without")


def test_colons_deeper_down_are_names(tmp_path: Path) -> None:
    with open_archive(written(tmp_path / "a.zip", "m/a:b", "m/..c", "m/ü")) as opened:
        assert opened.names() == ["a:b", "..c", "ü"]


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_name_comes_once(tmp_path: Path) -> None:
    refused(written(tmp_path / "a.zip", "m/a", "m/a"), "twice")


def test_encrypted_members_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "a.zip", "m/a")
    patched(path, b"PK\x01\x02", b"\x01", 8)
    refused(path, "only plain archives are allowed")


def test_damaged_deflate_and_checksums_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "a.zip", "a", content=bytes(range(256)) * 9, compression=zipfile.ZIP_DEFLATED)
    patched(path, b"PK\x03\x04", b"\xff" * 20, 31)
    refused(path, "a is damaged .*(invalid|Error)", max_ratio=1100)
    path = written(tmp_path / "b.zip", "a")
    patched(path, b"content", b"C", 0)
    refused(path, "a is damaged .*CRC")


def test_an_unknown_compression_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "a.zip", "a")
    patched(path, b"PK\x03\x04", b"\x63", 8)
    patched(path, b"PK\x01\x02", b"\x63", 10)
    refused(path, "a is damaged .*compression")


def test_sizes_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "a.zip", "a", content=bytes(100_000), compression=zipfile.ZIP_DEFLATED)
    refused(path, "at most 1 times", max_ratio=1)
    with open_archive(path, 1100) as opened, pytest.raises(RewriteError, match="10 are allowed"):
        opened.read("a", limit=10)
    monkeypatch.setattr(archive, "MAX_MEMBERS", 1)
    refused(written(tmp_path / "b.zip", "a", "b"), "2 members in the archive and 1 are allowed")


def test_a_zip_inside_another_file_is_no_zip(tmp_path: Path) -> None:
    path = written(tmp_path / "a.zip", "a")
    path.write_bytes(b"before" + path.read_bytes())
    refused(path, "does not begin with its first member")
    path.write_bytes(b"PK\x03\x04 and nothing")
    refused(path, "truncated or damaged zip")


def test_json_members_are_readable_or_one_line(tmp_path: Path) -> None:
    def opened(content: bytes) -> tuple[Path, Archive]:
        path = written(tmp_path / "a.zip", "a", content=content)
        return path, Archive(path, zipfile.ZipFile(path), 1)

    assert opened(b'{"b": 1}')[1].json("a") == {"b": 1}
    for content in (b"{", b"\xff", b"[" * 200_000):
        with pytest.raises(RewriteError, match="not readable JSON"):
            opened(content)[1].json("a")
    with pytest.raises(RewriteError, match="has no b"):
        opened(b"{}")[1].json("b")


def test_objects_beside_a_model(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    file.write_text('{"a": 1}')
    assert read_object(file, "a thing") == {"a": 1}
    for content, match in (
        (b"[]", "but list; expected a thing"),
        (b"{", "is no JSON"),
        (b"\xff", "is no JSON"),
        (b"[" * 200_000, "too deeply"),
    ):
        file.write_bytes(content)
        with pytest.raises(RewriteError, match=match):
            read_object(file, "a thing")
    with pytest.raises(RewriteError, match="is no JSON"):
        read_object(tmp_path / "none", "a thing")


def test_messages_are_cut_to_a_line() -> None:
    assert one_line("\n  first \nsecond") == "first"
    assert one_line(KeyError()) == "KeyError"
    assert len(one_line("x" * 1000)) == 300
