"""Names in files of labels, and which class of a model a class of the data is."""

import pytest

from models.errors import UserError
from models.labels import label_names
from utils.class_names import match_classes, read_labels


def match(found, classes, named=False):
    """(labels, the model's class names, the lines of the log)"""
    lines = []
    labels, names = match_classes("d", tuple(found), tuple(classes), named, lines.append)
    return labels.tolist(), names, lines


def refused(found, classes, message, named=False):
    with pytest.raises(UserError) as caught:
        match(found, classes, named)
    assert message in str(caught.value)


def test_by_name():
    classes = ("dog", "eel", "cat")
    assert match(("cat", "dog"), classes, named=True) == ([2, 0], classes, [])
    assert match(("cat", "dog"), classes) == ([2, 0], classes, [])
    text = "the model's 3 classes (dog, eel, cat) lack"
    refused(("ant",), classes, f"d has the class 'ant', which {text}", named=True)
    refused(("ant",), (*classes, "bee"), "(dog, eel, cat, ...) lack", named=True)
    numbers = ("0", "1", "10", "2")  # names of folders, whatever their order
    assert match(("10", "2"), numbers, named=True)[0] == [2, 3]


def test_files_without_names_take_the_sorted_order_and_say_so():
    labels, names, lines = match(("cat", "dog"), ("0", "1"))
    assert labels == [0, 1] and names == ("cat", "dog")
    assert lines == [
        "note: the model's classes are taken to be the data's, in their order: 0 = cat, 1 = dog"
    ]
    assert match(("cat", "dog"), ("n01", "n02"))[1:] == (
        ("n01", "n02"),
        [lines[0].replace("0 = ", "n01 = ").replace(" 1 = ", " n02 = ")],
    )
    refused(("cat", "doggy"), ("dog", "cat"), "has the class 'doggy', which the model's 2 classes")
    # A model of 200 unnamed classes knows nothing of ten digits, though it has a class "7".
    refused("0123456789", map(str, range(200)), "has 10 classes, the model 200")


@pytest.mark.parametrize("form", ["{}", "class {}", "{}_x"])
def test_numbers_whose_order_as_text_differs_are_refused(form):
    found = sorted(form.format(i) for i in range(12))
    for order in (found, [form.format(i) for i in range(12)]):  # of folders, and of tables
        refused(order, map(str, range(12)), "give --labels FILE")
    padded = sorted(f"{i:02d}" for i in range(12))
    assert match(padded, map(str, range(12)))[0] == list(range(12))
    assert match(found, found, named=True)[0] == list(range(12))


@pytest.mark.parametrize("count", [1000, 21843])
def test_numbers_wordnet_ids_and_words_in_a_head_of_imagenet(count):
    names = label_names(count)
    numbers = [str(i) for i in range(count)]
    numbered = [str(i) for i in sorted(range(count), key=str)]
    assert match(numbered, names)[0] == sorted(range(count), key=str)
    assert match(["10", "9"], names)[0] == [10, 9]
    shark = names.index("tiger shark, Galeocerdo cuvieri")
    for word in ("n01491361", "tiger shark", "Tiger_Shark", "Galeocerdo cuvieri"):
        assert match([word], names) == ([shark], names, [])
    assert match(["n01491361"], numbers) == ([shark], tuple(numbers), [])  # whatever it is named
    refused(["crane"], names, "which the model's") if count == 1000 else None
    refused(["n99999999"], names, "'n99999999'")


# ----------------------------------------------------------------------- files of names

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
