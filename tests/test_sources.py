"""Where images lie: visible files, splits, and tables."""

import pytest

from models.errors import UserError
from tests.helpers import write_image, write_images
from utils.sources import SPLIT_OF, read_table, split_folders, table_source, visible_files


def test_only_visible_files_and_links_once(tmp_path):
    paths = [write_image(tmp_path / name) for name in ("b/1.png", "a/2.JPG", "3.png")]
    write_image(tmp_path / ".cache" / "1.png")
    (tmp_path / "._3.png").write_bytes(b"hidden")
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "b" / "back").symlink_to(tmp_path)
    (tmp_path / "lost.png").symlink_to("/gone/lost.png")
    others = [tmp_path / "lost.png", tmp_path / "notes.txt"]
    assert visible_files(tmp_path) == sorted([*paths, *others])


def test_a_split_is_a_folder_with_folders(tmp_path):
    for name in ("Testing", "TRAIN"):
        write_images(tmp_path / name)
    write_image(tmp_path / "val" / "1.png")
    (tmp_path / ".valid" / "cat").mkdir(parents=True)
    found = split_folders(tmp_path)
    assert list(found.items()) == [("train", tmp_path / "TRAIN"), ("test", tmp_path / "Testing")]
    assert split_folders(tmp_path / "none") == {}
    write_images(tmp_path / "test")
    with pytest.raises(UserError, match=r"Testing and .*test are both the test split"):
        split_folders(tmp_path)


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_tables_with_every_delimiter(delimiter, tmp_path):
    lines = ["\ufeffSplit,PATH,label", "dev,a.png,cat", 'Testing,b/c.png,"d""g"', ""]
    lines += ["training,/x.png,e f", "training,y.png,cat", 'training,z.png,"d""g"']
    file = tmp_path / "t.csv"
    file.write_text("\n".join(lines).replace(",", delimiter), encoding="utf-8")
    source = table_source(file, True, str)
    assert {name: split[:2] for name, split in source.splits.items()} == {
        "train": (
            [tmp_path.joinpath(x) for x in ("/x.png", "y.png", "z.png")],
            ["e f", "cat", 'd"g'],
        ),
        "val": ([tmp_path / "a.png"], ["cat"]),
        "test": ([tmp_path / "b/c.png"], ['d"g']),
    }
    assert source.classes == ("cat", 'd"g', "e f")
    assert table_source(file, False, str).splits.keys() == {"test"}
    file.write_text("path\na b.png\n")
    assert read_table(file, {"path"}) == [{"path": "a b.png"}]
    file.write_bytes(b"path\n\xff.png\n")
    with pytest.raises(UserError, match=r"t.csv: not a table in UTF-8"):
        read_table(file, {"path"})
    assert len(SPLIT_OF) == 8
