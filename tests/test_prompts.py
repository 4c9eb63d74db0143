"Prompts from files that others wrote."
import csv
import gzip
import json

import pytest
from archives import tar
from hypothesis import given, settings
from hypothesis import strategies as st

from draft_nb import prompts as page
from draft_nb.models import asset
from draft_nb.prompts import pick_column, read_and_count, read_prompts

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
    with pytest.raises(ValueError, match="prompt_column must name a column of .* it has n, words"):
        read_prompts(write(tmp_path, ".jsonl", TEXTS, column="words"))
    with pytest.raises(ValueError, match="must be texts; .* holds 0"):
        read_prompts(write(tmp_path, ".jsonl", TEXTS, column="words"), "n")


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


# as published: the heads of evaluation files

COUNTING = [
    dict(tag="counting", include=[{"class": "cat", "count": 3}], exclude=[{"class": "cat"}], t2i_prompt="a photo of three cats"),
    dict(tag="counting", include=[{"class": "skis", "count": 3}], exclude=[{"class": "skis"}], t2i_prompt="a photo of three skises"),
]
GIGGLE = '"G I G G L E" painted in thick colorful lettering as graffiti on a faded red brick wall with a splotch of exploding white paint.'
PARTI = f"""Prompt\tCategory\tChallenge\tNote
bond\tAbstract\tBasic\tBiology-inspired concepts with multiple meanings
bias\tAbstract\tBasic\t
{GIGGLE}\tIllustrations\tWriting & Symbols\t
"""
RANKED = [{"id": "000000-0001", "prompt": "a portal in a forest, warm light", "generations": ["part-000000/0.webp"], "ranking": [1]}]


def test_published_files(tmp_path):
    def at(name, text):
        (tmp_path / name).write_text(text)
        return tmp_path / name
    assert read_prompts(at("counting.jsonl", "\n".join(map(json.dumps, COUNTING)))) == ["a photo of three cats", "a photo of three skises"]
    assert read_prompts(at("parti.tsv", PARTI)) == ["bond", "bias", GIGGLE]
    geneval = at("geneval.jsonl", '{"tag": "single_object", "include": [], "prompt": "a photo of a bench"}')
    assert read_prompts(geneval) == ["a photo of a bench"]
    assert read_prompts(at("ranked.json", json.dumps(RANKED))) == ["a portal in a forest, warm light"]
    draw = at("draw.txt", "Artophagous.\nA red colored car.\n\nArtophagous.\n")
    assert read_and_count(draw) == (["Artophagous.", "A red colored car.", "Artophagous."], "prompts: 3 read, 1 alike")


@pytest.mark.parametrize("names, best", [
    ("tag include exclude t2i_prompt", "t2i_prompt"), ("id caption_en", "caption_en"), ("id prompt_text", "prompt_text"),
    ("text_prompt id", "text_prompt"),
    ("prompt_id caption", "caption"), ("negative_prompt prompt", "prompt"), ("negative_prompt text", "text"),
    ("system_prompt caption", "caption"),
    ("PROMPT text", "PROMPT"), ("promptText id", "promptText"), ("image_caption caption_length", "image_caption"), ("URL TEXT", "TEXT"),
    ("prompts prompt", "prompt"),
    ("t2i_prompt caption", "t2i_prompt"), ("has_text text_color alt_text", "alt_text"),
])
def test_the_column_is_found_by_its_words(names, best):
    assert pick_column(names.split(), None, "f") == best


@pytest.mark.parametrize("names, why", [
    ("id words", "it has id, words"), ("caption_en caption_zh", "caption_en and caption_zh are equally good"),
    ("prompt Prompt", "prompt and Prompt are equally good"),
    ("prompt_id text_length", "it has prompt_id, text_length"), ("negative_prompt", "it has negative_prompt"),
    ("context pretext", "it has context, pretext"),
])
def test_a_column_is_never_guessed(names, why):
    with pytest.raises(ValueError, match=f"prompt_column must name a column of f, .*{why}"):
        pick_column(names.split(), None, "f")


@pytest.mark.parametrize("name, text, expected", [
    ("a.csv", "id, Prompt \n1,a fox\n2,a rose\n", ["a fox", "a rose"]),
    ("a.csv", 'id, prompt\n1, "a fox, running"\n', ["a fox, running"]),
    ("a.csv", "prompt\na fox, running\na rose\n", ["a fox, running", "a rose"]),
    ("a.csv", "id;prompt\n1;a fox, running\n2;a rose\n", ["a fox, running", "a rose"]),
    ("a.csv", '"id";"prompt"\n1;"a fox; running"\n', ["a fox; running"]),
    ("a.csv", "id\tprompt\n1\ta fox, running\n", ["a fox, running"]),
    ("a.tsv", "id,prompt\n1,a fox\n", ["a fox"]),
    ("a.csv", 'prompt,kind\n"GO" in red,sign\na "b",sign\n', ['"GO" in red', 'a "b"']),
    ("a.csv", 'kind,prompt\nx,"a fox,\nat night"\n', ["a fox,\nat night"]),
    ("a.tsv", 'prompt\tkind\n"a fox says\tx\na rose\ty\nhello"\tz\n', ['"a fox says', "a rose", 'hello"']),
    ("a.csv", "prompt,n\na fox,1\na rose\n", ["a fox", "a rose"]),
    ("a.csv", "1,a fox\n2,a rose\n", ["a fox", "a rose"]),
    ("a.csv", "1;a sign with the text hello;7\n2;a rose;8\n", ["a sign with the text hello", "a rose"]),
    ("a.csv", "a red fox in the snow\na text\n", ["a red fox in the snow", "a text"]),
    ("a.csv", "prompt,0,1\na fox,.1,.2\n", ["a fox"]),
    ("a.csv", ",prompt\n0,a fox\n1,a rose\n", ["a fox", "a rose"]),
    ("a.jsonl", '{"id": 1}\n{"prompt": "a fox"}\n{"prompt": "a rose", "id": 2}\n', ["a fox", "a rose"]),
    ("a.jsonl", '{"prompt": "a fox"}\n{"caption": "a rose"}\n{"negative_prompt": "blurry"}\n', ["a fox", "a rose"]),
    ("a.json", '[{" Prompt": "a fox"}]', ["a fox"]),
])
@pytest.mark.parametrize("packed", [False, True])
def test_tables_as_people_write_them(tmp_path, name, text, expected, packed):
    path = tmp_path / (name + ".gz" * packed)
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    assert read_prompts(path) == expected


@pytest.mark.parametrize("text, message", [
    ("id,words\n1,a fox\n", "none is called prompt, caption or text; it has id, words"),
    ("animal,a fox\nflower,a rose\n", "it has animal, a fox. Where these are no header, give a number, 1 to 2"),
    ("a fox\na rose\n", "it has a fox"), ("neon text\na rose\n", "it has neon text"),
    ("animal,neon text\nplant,a rose\n", "it has animal, neon text"),
    ("a red fox runs through snow, watercolor\na blue rose in a vase, oil\n", "it has a red fox runs through snow, watercolor"),
    ("id,prompt\n1,a fox, running\n", "row 2 of .* has 3 cells, the first has 2"),
    ("prompt,prompt\na fox,a rose\n", "prompt and prompt are equally good"),
    ('prompt\n"GO" in red\n"a fox,\nat night"\n', "must be a table"),
])
def test_tables_that_are_not_understood(tmp_path, text, message):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_prompts(tmp_path / "a.csv")


def test_a_table_without_header_is_read_by_number(tmp_path):
    (tmp_path / "a.csv").write_text("animal,a fox\nflower,a rose\n")
    assert read_and_count(tmp_path / "a.csv", "2") == (["a fox", "a rose"], "prompts: 2 read, 0 alike (column 2, no header)")
    with pytest.raises(ValueError, match=r"a number in 1..2 where .* got 3"):
        read_prompts(tmp_path / "a.csv", "3")


def test_what_was_read_is_counted(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "a fox"}\n{"prompt": " a fox"}\n{"prompt": null}\n{"id": 1}\n{"caption": "a rose"}\n')
    assert read_and_count(tmp_path / "a.jsonl")[1] == "prompts: 3 read, 1 alike, 2 without a text (column prompt and caption)"


def test_a_folder_of_texts(tmp_path):
    for number in (0, 1, 10, 2):
        (tmp_path / f"{number}.txt").write_text(f"An expansive field, {number}.\n")
    (tmp_path / "3.txt.gz").write_bytes(gzip.compress(b"packed"))
    (tmp_path / ".4.txt").write_bytes(b"\xff")
    (tmp_path / "0.png").write_bytes(b"\x89")
    assert read_prompts(tmp_path) == [*(f"An expansive field, {number}." for number in (0, 1, 2)), "packed", "An expansive field, 10."]
    with pytest.raises(ValueError, match="prompt_column is for tables"):
        read_prompts(tmp_path, "prompt")
    (tmp_path / "5.txt").write_text("a fox\na rose\n")
    with pytest.raises(ValueError, match="5.txt has 2 lines"):
        read_prompts(tmp_path)
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "a.png").write_bytes(b"\x89")
    with pytest.raises(ValueError, match="folder without any"):
        read_prompts(tmp_path / "none")


@pytest.mark.parametrize("ending", [".txt", ".csv", ".jsonl", ".json", ".tar"])
@pytest.mark.parametrize("keep", [3, 12, .5, .99])
def test_a_packed_file_that_was_cut_short_is_refused(tmp_path, ending, keep):
    packed = gzip.compress(write(tmp_path, ending, [f"a fox, {k*7919 % 1000}" for k in range(500)]).read_bytes(), mtime=0)
    path = tmp_path / f"cut{ending}.gz"
    path.write_bytes(packed[:keep if isinstance(keep, int) else int(len(packed)*keep)])
    with pytest.raises(ValueError, match="must be a whole"):
        read_prompts(path)
    path.write_bytes(packed)
    assert len(read_prompts(path)) == 500


def test_an_archive_that_is_cut_or_broken_in_the_middle_is_refused(tmp_path):
    whole = tar(tmp_path / "a.tar", [(f"{k}.txt", b"a fox") for k in range(4)]).read_bytes()  # 1024 bytes a member
    for data in (whole[:1024], whole[:1100], whole[:1600], whole[:1024] + b"x"*512 + whole[1536:]):
        (tmp_path / "b.tar").write_bytes(data)
        with pytest.raises(ValueError, match="whole tar archive"):
            read_prompts(tmp_path / "b.tar")


@pytest.mark.parametrize("name, data, message", [
    ("a.txt", "a fox".encode("utf-16"), "UTF-16"), ("a.csv", "prompt\na fox".encode("utf-16-be"), "binary"),
    ("a.jsonl", '{"prompt": "a fox"}'.encode("utf-16"), "UTF-16"),
    ("a.txt", "a fox\nGrün".encode("latin-1"), "line 2 holds the byte 0xfc"),
    ("a.csv", "prompt\nGrün".encode("latin-1"), "line 2 holds the byte 0xfc"),
    ("a.txt.gz", b"a fox", "whole file"), ("a.csv.gz", gzip.compress(b"prompt\na fox")[:-4], "whole file"),
    ("a.txt.gz", gzip.compress(b"a fox")[:-8] + b"\0"*8, "whole file"),
    ("a.txt", b"prompt\tn\na fox\t1\n", "one of a .tsv file"), ("a.txt", b'{"prompt": "a fox"}\n', "one of a .jsonl file"),
    ("a.json", b"["*100000, "JSON|lists in lists"), ("a.csv", b"prompt,n\n" + b"x"*200000 + b",1", "must be a table"),
])
def test_what_is_no_text_is_refused(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message) as e:
        read_prompts(tmp_path / name)
    assert name in str(e.value) and "\n" not in str(e.value)
