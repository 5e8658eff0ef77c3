"""Archives in the "newc" format: what Linux's unpacker expects of each byte."""

import gzip

from aiovm.loaders.cpio import Archive


def entries(archive):
    """The entries of an unpacked archive, by the format's description: 13 fields of 8 hexadecimal digits."""
    at, found = 0, []
    while True:
        assert archive[at : at + 6] == b"070701"
        fields = [int(archive[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        name_at = at + 110
        data_at = -(-(name_at + fields[11]) // 4) * 4
        name = archive[name_at : name_at + fields[11]]
        assert name.endswith(b"\0")
        at = -(-(data_at + fields[6]) // 4) * 4
        if name == b"TRAILER!!!\0":
            return found, archive[at:]
        found.append((name[:-1].decode(), fields, archive[data_at : data_at + fields[6]]))


def test_every_entry_has_its_fields():
    archive = Archive()
    archive.add("bin/sh", 0o100755, b"12345")
    archive.add("dev/console", 0o20600, device=(5, 1))
    archive.add("init", 0o120777, b"bin/sh")
    found, rest = entries(gzip.decompress(archive.packed()))
    assert rest == b""
    assert [(name, f[1], data) for name, f, data in found] == [
        ("bin", 0o40755, b""),
        ("bin/sh", 0o100755, b"12345"),
        ("dev", 0o40755, b""),
        ("dev/console", 0o20600, b""),
        ("init", 0o120777, b"bin/sh"),
    ]
    assert [f[0] for _, f, _ in found] == [1, 2, 3, 4, 5]  # inode numbers: equal ones would be hard links
    assert all(f[2] == f[3] == f[5] == 0 for _, f, _ in found)  # root's, of no time
    assert found[3][1][9:11] == [5, 1]


def test_the_first_of_a_name_stays_and_packing_ends_nothing():
    archive = Archive()
    archive.add("a", 0o100644, b"first")
    archive.add("a", 0o100644, b"second")
    assert archive.packed() == archive.packed()
    archive.add("b", 0o100644, b"later")
    found, _ = entries(gzip.decompress(archive.packed()))
    assert [(name, data) for name, _, data in found] == [("a", b"first"), ("b", b"later")]


def test_a_tree_in_order_of_names(tmp_path):
    for name in ("z", "a/b", "a/skipped/c"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "z").chmod(0o4711)
    (tmp_path / "link").symlink_to("z")
    archive = Archive()
    archive.add_tree(tmp_path, without=("a/skipped",))
    found, _ = entries(gzip.decompress(archive.packed()))
    assert [(name, f[1], data) for name, f, data in found] == [
        ("a", 0o40755, b""),
        ("a/b", 0o100000 | (tmp_path / "a/b").stat().st_mode & 0o777, b"a/b"),
        ("link", 0o120777, b"z"),
        ("z", 0o100711, b"z"),
    ]
