"""VOC 2007's devkit: the classes of a picture, and damaged files. See also test_demo_devkit.py."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from pipeline import open_voc
from tests.helpers.images import encoded, picture

# As in VOC2007: an object with parts, which have names too, and a difficult one.
ANNOTATION_WITH_PARTS = """<annotation>
\t<folder>VOC2007</folder>
\t<filename>000003.jpg</filename>
\t<source><database>The VOC2007 Database</database><annotation>PASCAL VOC2007</annotation></source>
\t<owner><flickrid>Fried Camels</flickrid><name>Jinky the Fruit Bat</name></owner>
\t<size><width>41</width><height>30</height><depth>3</depth></size>
\t<segmented>0</segmented>
\t<object>
\t\t<name>person</name><pose>Left</pose><truncated>0</truncated><difficult>0</difficult>
\t\t<bndbox><xmin>1</xmin><ymin>2</ymin><xmax>30</xmax><ymax>30</ymax></bndbox>
\t\t<part><name>head</name><bndbox><xmin>4</xmin><ymin>4</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></part>
\t</object>
\t<object>
\t\t<name>bottle</name><pose>Unspecified</pose><truncated>1</truncated><difficult>1</difficult>
\t\t<bndbox><xmin>5</xmin><ymin>6</ymin><xmax>7</xmax><ymax>8</ymax></bndbox>
\t</object>
</annotation>
"""


def annotation(*objects: tuple[str, int]) -> str:
    items = "".join(
        f"<object><name>{n}</name><difficult>{d}</difficult></object>" for n, d in objects
    )
    return f"<annotation>{items}</annotation>"


@pytest.fixture
def devkit(tmp_path: Path) -> Path:
    """Five pictures: 1, 3 and 4 in the trainval split, 2 and 5 in the test split."""
    root = tmp_path / "VOCdevkit" / "VOC2007"
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / name).mkdir(parents=True)
    texts = {
        1: annotation(("dog", 0), ("dog", 1), ("bus", 1)),
        2: annotation(("dog", 1), ("dog", 0)),
        3: ANNOTATION_WITH_PARTS,
        4: annotation(),
        5: annotation(("cat", 1), ("person", 0)),
    }
    for number, text in texts.items():
        (root / "Annotations" / f"{number:06d}.xml").write_text(text)
        (root / "JPEGImages" / f"{number:06d}.jpg").write_bytes(
            encoded(picture(40 + number, 30, number))
        )
    (root / "ImageSets" / "Main" / "trainval.txt").write_text("000004\n000001\r\n000003 \n")
    (root / "ImageSets" / "Main" / "test.txt").write_text("000002\n000005")
    return root


@pytest.mark.parametrize("above", [0, 1, 2])
def test_a_class_is_present_difficult_or_absent_in_the_order_of_the_list(
    devkit: Path, above: int
) -> None:
    root = (devkit, *devkit.parents)[above]
    store, targets, classes = open_voc(root, "trainval")
    # The classes of both splits; parts of objects are not classes.
    assert classes == ["bottle", "bus", "cat", "dog", "person"]
    assert targets.dtype == np.int8
    assert targets.tolist() == [[-1, -1, -1, -1, -1], [-1, 0, -1, 1, -1], [0, -1, -1, -1, 1]]
    assert store.index["width"].tolist() == [44, 41, 43]
    assert Path(store.name(2)) == devkit / "JPEGImages" / "000003.jpg"
    store, targets, same = open_voc(root, "test")
    assert same == classes
    assert targets.tolist() == [[-1, -1, -1, 1, -1], [-1, -1, 0, -1, 1]]
    assert store.index["width"].tolist() == [42, 45]


def entity_bomb(depth: int = 9) -> str:
    """A short document that expands to 10^depth words."""
    entities = "".join(f'<!ENTITY a{i + 1} "{f"&a{i};" * 10}">' for i in range(depth))
    return (
        f'<?xml version="1.0"?><!DOCTYPE annotation [<!ENTITY a0 "ha">{entities}]>'
        f"<annotation>&a{depth};</annotation>"
    )


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("ImageSets/Main/test.txt", None, r"test\.txt: .*No such file.*Unpack"),
        ("ImageSets/Main/test.txt", b"\n", r"test\.txt names no picture"),
        ("ImageSets/Main/test.txt", b"\xff\xfe\0", r"test\.txt: .*decode"),
        ("Annotations/000002.xml", None, r"000002\.xml: No such file.*Unpack"),
        (
            "Annotations/000005.xml",
            b"<annotation><object>",
            r"000005\.xml: no element found.*Unpack",
        ),
        ("Annotations/000005.xml", b"", r"000005\.xml: "),
        (
            "Annotations/000005.xml",
            entity_bomb().encode(),
            r"000005\.xml: it has a DOCTYPE, which is refused",
        ),
        (
            "Annotations/000005.xml",
            entity_bomb().encode("utf-16"),
            r"000005\.xml: it has a DOCTYPE, which is refused",
        ),
        (
            "Annotations/000005.xml",
            b"<html><object><name>x</name></object></html>",
            r"000005\.xml: it is not an annotation",
        ),
        (
            "Annotations/000005.xml",
            b"<annotation><object/></annotation>",
            r"000005\.xml: .* without a name",
        ),
        ("Annotations/000005.xml", annotation(("x", "?")).encode(), r"000005\.xml: .*'\?'"),  # type: ignore[arg-type]
        (
            "Annotations/000005.xml",
            b'<?xml version="1.0" encoding="klingon"?><a/>',
            r"000005\.xml: ",
        ),
        (
            "JPEGImages/000004.jpg",
            None,
            r"000004\.jpg, of the trainval list: it is not there.*Unpack",
        ),
        ("JPEGImages/000004.jpg", b"text", r"000004\.jpg, of the trainval list: it is not a JPEG"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_missing_or_malformed_file_is_named(
    devkit: Path, file: str, content: bytes | None, message: str
) -> None:
    if content is None:
        (devkit / file).unlink()
    else:
        (devkit / file).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        open_voc(devkit, "trainval")
    assert "\n" not in str(error.value)


def test_a_folder_without_a_devkit_is_refused_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=re.escape(str(tmp_path)) + " holds no VOCdevkit/VOC2007.*unpack VOC2007"
    ):
        open_voc(tmp_path, "test")
