"Prompts from files that others wrote."
import csv
import json

import pytest
from archives import tar
from hypothesis import given, settings
from hypothesis import strategies as st

from draft_nb import prompts as page
from draft_nb.models import asset
from draft_nb.prompts import read_prompts

TEXTS = ["a fox, running", "ein Fuchs im Grünen", 'the "red" fox', "狐"]


def write(folder, ending, texts, column="prompt"):
    path = folder / f"p{ending}"
    if ending == ".txt":
        path.write_text("\n".join(texts))
    elif ending in (".csv", ".tsv"):
        with open(path, "w", newline="") as f:
            out = csv.writer(f, delimiter="\t" if ending == ".tsv" else ",")
            out.writerows([("n", column), *enumerate(texts)])
    elif ending == ".jsonl":
        path.write_text("".join(json.dumps({"n": n, column: t}) + "\n" for n, t in enumerate(texts)))
    elif ending == ".json":
        path.write_text(json.dumps(texts))
    elif ending == ".parquet":
        pa = pytest.importorskip("pyarrow")
        from pyarrow import parquet
        parquet.write_table(pa.table({"n": range(len(texts)), column: texts}), path)
    elif ending == ".tar":
        tar(path, [(f"{n:04d}.{e}", c) for n, t in enumerate(texts) for e, c in (("jpg", b"\xff\xd8"), ("txt", t.encode()))])
    return path


@pytest.mark.parametrize("ending", [".txt", ".csv", ".tsv", ".json", ".jsonl", ".parquet", ".tar"])
def test_every_kind_of_file_gives_the_same_list(tmp_path, ending):
    assert read_prompts(write(tmp_path, ending, TEXTS)) == TEXTS


@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".parquet"])
def test_a_column_is_named_or_found_or_refused_with_those_there_are(tmp_path, ending):
    path = write(tmp_path, ending, TEXTS, column="words")
    assert read_prompts(path, "words") == TEXTS
    with pytest.raises(ValueError, match=r"prompt_column must be a column of .*: n, words; got 'prompt'"):
        read_prompts(path, "prompt")
    path = write(tmp_path, ending, TEXTS, column="Caption")
    assert read_prompts(path) == TEXTS


def test_a_number_column_is_not_taken_for_prompts(tmp_path):
    with pytest.raises(ValueError, match="must be texts; .* holds 0"):
        read_prompts(write(tmp_path, ".jsonl", TEXTS, column="words"))


def test_byte_order_marks_windows_line_ends_and_line_breaks_inside_a_cell(tmp_path):
    (tmp_path / "p.csv").write_bytes('\ufeffprompt,n\r\n"a fox\nat night",1\r\na rose,2\r\n'.encode())
    assert read_prompts(tmp_path / "p.csv") == ["a fox\nat night", "a rose"]
    (tmp_path / "p.txt").write_bytes("\ufeffa fox\r\na rose\r\n".encode())
    assert read_prompts(tmp_path / "p.txt") == ["a fox", "a rose"]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1).map(str.strip).filter(bool), min_size=1))
def test_any_text_survives_csv_and_jsonl(tmp_path_factory, texts):
    folder = tmp_path_factory.mktemp("p")
    for ending in (".csv", ".jsonl", ".txt", ".tar"):
        assert read_prompts(write(folder, ending, texts)) == [t.removeprefix("\ufeff") if ending in (".tar",) or (ending == ".txt" and k == 0) else t for k, t in enumerate(texts)]


def test_archives(tmp_path):
    both = tar(tmp_path / "a.tar", [("d/1.json", b'{"caption": "fox"}'), ("d/1.txt", b"a fox"), ("d/1.seg.png", b"\x89")])
    assert read_prompts(both) == ["a fox"] and read_prompts(both, "caption") == read_prompts(both, "json") == ["fox"]
    with pytest.raises(ValueError, match="json, txt, seg.png; got 'title'|json, caption; got 'title'|caption; got 'title'"):
        read_prompts(both, "title")
    with pytest.raises(ValueError, match="not UTF-8"):
        read_prompts(tar(tmp_path / "b.tar", [("1.txt", b"\xff\xfe\xfa")]))
    with pytest.raises(ValueError, match="holds nothing"):
        read_prompts(tar(tmp_path / "c.tar", []))


@pytest.mark.parametrize("name, content, message", [
    ("p.txt", b"", "is empty"), ("p.txt", b" \n\n", "is empty"), ("p.csv", b"", "is empty"), ("p.csv", b"prompt\n\n", "is empty"),
    ("p.json", b"", "is empty"), ("p.json", b"{}", "list of texts"), ("p.json", b"[", "must be JSON"), ("p.jsonl", b'"a"\n{', "line 2"),
    ("p.tar", b"text", "tar archive"), ("p.txt", bytes(range(256)), "not UTF-8"), ("p.csv", b"\0\0", "binary"), ("p.jsonl", b"[1, 2]", "must be texts"),
])
def test_refusals(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as e:
        read_prompts(tmp_path / name)
    assert name in str(e.value)


def test_parquet_says_what_it_needs(tmp_path, monkeypatch):
    (tmp_path / "p.parquet").write_bytes(b"text")
    monkeypatch.setattr(page, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="need the package pyarrow"):
        read_prompts(tmp_path / "p.parquet")


def test_parquet_that_is_none(tmp_path):
    pytest.importorskip("pyarrow")
    (tmp_path / "p.parquet").write_bytes(b"text")
    with pytest.raises(ValueError, match="must be a parquet file"):
        read_prompts(tmp_path / "p.parquet")


def test_the_embedded_ones():
    train, test = (read_prompts(asset(n)) for n in ("prompts.txt", "test_prompts.txt"))
    assert len(train) == 64 and len(test) == 8 and not set(train) & set(test)
