"""Class names from files. tests/test_predict.py tests the predictions."""

import pytest

from models.errors import UserError
from models.labels import label_names
from utils.classifier import read_labels

PETS = ("cat", "dog", "horse")


@pytest.mark.parametrize(
    "text, names",
    [
        ("cat\n\n dog \nhorse", PETS),
        ("0,cat\n1,dog\n2,horse\n", PETS),
        ("2;horse\n0;cat\n1;dog", PETS),
        ("dog\t1\r\nhorse\t2\r\ncat\t0\r\n", PETS),
        ("index,name\n1, dog\n2, horse\n0, cat", PETS),
        (",0\ncat,0\ndog,1\nhorse,2", PETS),  # the header of pandas
        ("\ufeffname;id\ncat;0\ndog;1\nhorse;2", PETS),
        ('0,"tench, Tinca tinca"\n1,dog\n2,a, b', ("tench, Tinca tinca", "dog", "a, b")),
        ("tench, Tinca tinca\ndog\nhorse", ("tench, Tinca tinca", "dog", "horse")),
        ("cat,dog,horse\n", PETS),
        ('"cat";"dog";"horse"', PETS),
        ("cat\tdog\thorse", PETS),
        ("0,1,2", ("0", "1", "2")),
        ("0,0\n1,1\n2,2", ("0", "1", "2")),
        ("7,0\n5,1\n6,2", ("7", "5", "6")),
        ("T, 1908\nA, 1927\nB, 1932", ("T, 1908", "A, 1927", "B, 1932")),
    ],
)
def test_class_names(text, names, tmp_path):
    (tmp_path / "names.txt").write_text(text, encoding="utf-8")
    assert read_labels(tmp_path / "names.txt", 3) == names


def test_one_class_has_one_name(tmp_path):
    for text, name in (("tench, Tinca tinca", "tench, Tinca tinca"), ("0,cat", "cat")):
        (tmp_path / "names.txt").write_text(text)
        assert read_labels(tmp_path / "names.txt", 1) == (name,)


def test_names_of_imagenet_stay_whole(tmp_path):
    names = label_names(1000)
    (tmp_path / "names.txt").write_text("\n".join(names))
    assert read_labels(tmp_path / "names.txt", 1000) == names
    assert sum("," in name for name in names) > 100


@pytest.mark.parametrize(
    "text, message",
    [
        ("1,cat\n2,dog\n3,horse", "the indices must be 0 to 2, each of them once"),
        ("0,cat\n1,dog\n1,horse", "the indices must be 0 to 2, each of them once"),
        ("0,cat\n1,dog\n2,horse\n2,cow", "the indices must be 0 to 2, each of them once"),
        ("id,name\n0,cat\n1,dog", "the indices must be 0 to 2, each of them once"),
        ("cat,dog", "has 1 class name, the model 3 classes: write one name a line, or lines"),
        ("", "has 0 class names, the model 3 classes"),
        (b"\xff\n", "not UTF-8"),
    ],
)
def test_wrong_files(text, message, tmp_path):
    content = text if isinstance(text, bytes) else text.encode()
    (tmp_path / "names.txt").write_bytes(content)
    with pytest.raises(UserError, match="names") as caught:
        read_labels(tmp_path / "names.txt", 3)
    assert message in str(caught.value)
