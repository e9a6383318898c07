"""Samples from files: what one is, which are drawn, their tokens, which tokens count, batches."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from adapterkit.core.checkpoint.folder import LocalFolder
from adapterkit.core.errors import Damaged, Refused
from adapterkit.verbs.stats.data.masks import IGNORED
from adapterkit.verbs.stats.data.records import draw_records
from adapterkit.verbs.stats.data.samples import Sample, Samples, load_tokenizer, tokenize
from tests.support.texts import MARKED, WORDS, ids, save_tokenizer, write_rows

USER, REPLY = {"role": "user", "content": "who"}, {"role": "assistant", "content": "me"}
ALL = 1000


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(LocalFolder(save_tokenizer(tmp_path_factory.mktemp("tokenizer"))))


@pytest.fixture(scope="module")
def marking(tmp_path_factory):
    folder = save_tokenizer(tmp_path_factory.mktemp("marking"), MARKED)
    return load_tokenizer(LocalFolder(folder))


def samples_of(tokenizer: Any, path: Path, length: int = 100, **options: Any) -> list[Sample]:
    records = draw_records([path], ALL, 0).records
    return tokenize(records, tokenizer, length, len(WORDS), **options).samples


def texts_of(path: Path, count: int = ALL, seed: int = 0) -> list[str]:
    return [record.fields["text"] for record in draw_records([path], count, seed).records]


# -- what one sample is ----------------------------------------------------------------------------


@pytest.mark.parametrize("text, expected", [
    ("one\ntwo\n", ["one", "two"]),
    ("one\n  two", ["one", "  two"]),
    ("\none\ntwo\n\n \n", ["one", "two"]),  # blank lines around are between nothing
    ("one\ntwo\n\nthree\n", ["one\ntwo", "three"]),
    ("one\r\n\r\ntwo\r\n", ["one", "two"]),
    ("\ufeffone\ntwo", ["one", "two"]),
])  # fmt: skip
def test_lines_of_text_or_paragraphs(text: str, expected: list[str], tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode())
    assert texts_of(path) == expected


def test_a_line_of_jsonl_is_a_sample(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one\\n\\ntwo", "id": 3}\n\n{"text": "three"}')
    assert texts_of(path) == ["one\n\ntwo", "three"]


def test_samples_of_tables_are_read(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.table({"number": [1, 2, 3], "text": ["one", None, "two"]})
    parquet.write_table(table.filter(table["text"].is_valid()), tmp_path / "a.parquet")
    assert texts_of(tmp_path / "a.parquet") == ["one", "two"]
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict({"text": ["one", "two"]}).save_to_disk(str(tmp_path / "folder"))
    assert texts_of(tmp_path / "folder") == ["one", "two"]


def test_empty_samples_are_left_out_and_counted(tmp_path: Path) -> None:
    rows = [{"text": "one"}, {"text": " \n"}, {"text": ""}, {"input_ids": []}]
    drawn = draw_records([write_rows(tmp_path / "a.jsonl", *rows)], ALL, 0)
    assert len(drawn.records) == 1 and "3 empty samples left out" in drawn.notes


# -- which are drawn -------------------------------------------------------------------------------


def test_all_are_used_where_there_are_fewer(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", *({"text": str(n)} for n in range(5)))
    drawn = draw_records([path], 6, 0)
    assert [record.fields["text"] for record in drawn.records] == ["0", "1", "2", "3", "4"]
    assert drawn.notes == ["5 samples, fewer than --samples 6: all are used"]
    assert not draw_records([path], 5, 0).notes
    assert drawn.files == {"0 a.jsonl": {"samples": 5, "unit": "line"}}


def test_draws_are_without_replacement_by_the_seed_and_over_all_files(tmp_path: Path) -> None:
    paths = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for start, path in zip((0, 10), paths, strict=True):
        path.write_text("\n".join(str(start + n) for n in range(10)))
    draw = lambda seed: [int(r.fields["text"]) for r in draw_records(paths, 7, seed).records]
    assert draw(1) == draw(1) != draw(2)
    counts = Counter[int]()
    for seed in range(2000):
        drawn = draw(seed)
        assert drawn == sorted(set(drawn)) and len(drawn) == 7
        counts.update(drawn)
    # 2000 draws of 7 in 20: 700 each, standard deviation 21
    assert len(counts) == 20 and all(abs(count - 700) < 100 for count in counts.values())


# -- tokens, and which count -----------------------------------------------------------------------


def test_all_tokens_of_a_text_count_and_none_is_added(tokenizer, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", {"text": "who me?"})
    assert samples_of(tokenizer, path) == [Sample(ids("who me?"), ids("who me?"))]
    assert samples_of(tokenizer, path, length=3) == [Sample(ids("who"), ids("who"))]


def test_tokens_of_the_completion_count(tokenizer, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", {"prompt": "who?", "completion": " me"})
    (sample,) = samples_of(tokenizer, path)
    assert sample.tokens == ids("who? me")
    assert sample.labels == (IGNORED,) * 4 + ids(" me")
    (cut,) = samples_of(tokenizer, path, length=5)
    assert cut.labels == (IGNORED,) * 4 + ids(" ")


def test_a_token_of_both_is_the_completion_s(tokenizer, tmp_path: Path) -> None:
    """`t` ends the prompt, `h` begins the completion: the tokenizer makes them one."""
    path = write_rows(tmp_path / "a.jsonl", {"prompt": "a t", "completion": "he"})
    (sample,) = samples_of(tokenizer, path)
    assert sample.tokens == (*ids("a "), WORDS.index("th"), *ids("e"))
    assert sample.labels == (IGNORED, IGNORED, *sample.tokens[2:])


def test_messages_go_through_the_template(tokenizer, marking, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", {"messages": [USER, REPLY]})
    assert samples_of(tokenizer, path) == [Sample(ids("AwhoBme"), ids("AwhoBme"))]
    (sample,) = samples_of(marking, path)
    assert sample == Sample(ids("AwhoBme"), (IGNORED,) * 5 + ids("me"))
    (sample,) = samples_of(marking, path, length=6)
    assert sample == Sample(ids("AwhoBm"), (IGNORED,) * 5 + ids("m"))
    records = draw_records([path], ALL, 0).records
    assert "all tokens count" in tokenize(records, tokenizer, 9, len(WORDS)).notes[0]
    assert not tokenize(records, marking, 9, len(WORDS)).notes


def test_a_prompt_of_messages(tokenizer, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", {"prompt": [USER], "completion": [REPLY]})
    assert samples_of(tokenizer, path) == [Sample(ids("AwhoBme"), (IGNORED,) * 5 + ids("me"))]


def test_given_token_ids_are_not_changed(tmp_path: Path) -> None:
    """Without a tokenizer too."""
    rows = [
        {"input_ids": [5, 6, 7]},
        {"input_ids": [5, 6, 7], "labels": [-100, 6, 9]},
        {"input_ids": [5, 6, 1, 1], "attention_mask": [1, 1, 0, 0]},
    ]
    assert samples_of(None, write_rows(tmp_path / "a.jsonl", *rows), length=3) == [
        Sample((5, 6, 7), (5, 6, 7)),
        Sample((5, 6, 7), (IGNORED, 6, 9)),
        Sample((5, 6), (5, 6)),
    ]


def test_an_encoder_decoder_reads_the_prompt_and_learns_the_completion(tokenizer, tmp_path) -> None:
    path = write_rows(tmp_path / "a.jsonl", {"prompt": "who?", "completion": "me"})
    assert samples_of(tokenizer, path, is_encoder_decoder=True) == [Sample(ids("who?"), ids("me"))]
    path = write_rows(tmp_path / "b.jsonl", {"input_ids": [4, 5, 6], "labels": [7, 8, IGNORED]})
    assert samples_of(None, path, is_encoder_decoder=True) == [Sample((4, 5, 6), (7, 8))]
    rows = [{"input_ids": [4, 5, 6], "labels": labels} for labels in ([7], [7, 8, 9], [7] * 5)]
    path = write_rows(tmp_path / "d.jsonl", *rows)
    drawn = draw_records([path], ALL, 0).records
    samples = tokenize(drawn, None, 16, len(WORDS), is_encoder_decoder=True)
    assert [len(sample.labels) for sample in samples.samples] == [1, 3, 5]
    assert samples.tokens == 3 * 3 + 1 + 3 + 5 and samples.counted == 1 + 3 + 5
    with pytest.raises(Refused, match="3 input_ids and 1 labels"):
        samples_of(None, path)
    for row in ({"text": "who"}, {"messages": [USER]}, {"input_ids": [4]}):
        with pytest.raises(Refused, match="an encoder-decoder takes no"):
            samples_of(tokenizer, write_rows(tmp_path / "c.jsonl", row), is_encoder_decoder=True)


def test_samples_of_which_nothing_counts_are_left_out(tokenizer, tmp_path: Path) -> None:
    rows = [{"prompt": "long prompt", "completion": "me"}, {"text": "who"}]
    records = draw_records([write_rows(tmp_path / "a.jsonl", *rows)], ALL, 0).records
    samples = tokenize(records, tokenizer, 5, len(WORDS))
    assert [s.tokens for s in samples.samples] == [ids("who")] and "1 samples" in samples.notes[0]
    with pytest.raises(Refused, match="no token of 1 samples counts"):
        tokenize(records[:1], tokenizer, 5, len(WORDS))


@pytest.mark.parametrize("row", [
    {"text": "who me?"},
    {"prompt": "who", "completion": " me?"},
    {"messages": [USER, REPLY]},
    {"input_ids": [3] * 7},
])  # fmt: skip
def test_samples_of_more_tokens_than_the_length_are_counted_in_a_note(row, marking, tmp_path):
    records = draw_records([write_rows(tmp_path / "a.jsonl", row, row)], ALL, 0).records
    assert tokenize(records, marking, 7, len(WORDS)).notes == []
    assert tokenize(records, marking, 6, len(WORDS)).notes == ["2 of 2 samples are cut to 6 tokens"]


def test_tokens_added_by_the_tokenizer_stay(tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    fast = load_tokenizer(LocalFolder(save_tokenizer(tmp_path)))
    fast.backend_tokenizer.post_processor = TemplateProcessing(
        single="A $A B", special_tokens=[("A", WORDS.index("A")), ("B", WORDS.index("B"))]
    )
    fast.save_pretrained(tmp_path)
    fast = load_tokenizer(LocalFolder(tmp_path))
    path = write_rows(tmp_path / "a.jsonl", {"text": "who"}, {"prompt": "who", "completion": "me"})
    text, pair = samples_of(fast, path)
    assert text.tokens == ids("AwhoB") and pair.tokens == ids("AwhomeB")
    assert pair.labels == (IGNORED,) * 4 + ids("meB")
    assert samples_of(fast, path, length=4)[0].tokens == ids("AwhB")  # as the tokenizer cuts


# -- batches ---------------------------------------------------------------------------------------


def rows_of(samples: Samples, size: int) -> list[Sample]:
    """The samples of the batches, in their order, without the padding."""
    rows = []
    for batch in samples.batches(size):
        assert all(value.dtype == torch.int64 for value in batch.values())
        for tokens, mask, labels in zip(*batch.values(), strict=True):
            count = int(mask.sum())
            assert mask.tolist() == [1] * count + [0] * (len(mask) - count)
            assert set(tokens[count:].tolist()) <= {samples.pad}
            assert set(labels[count:].tolist()) <= {IGNORED}
            rows.append(Sample(tuple(tokens[:count].tolist()), tuple(labels[:count].tolist())))
    return rows


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_batches_hold_each_sample_once_in_the_same_order(size: int) -> None:
    lengths = [3, 1, 4, 1, 5, 2, 3]
    tokens = [tuple(range(10 * i, 10 * i + n)) for i, n in enumerate(lengths)]
    samples = Samples([Sample(t, (IGNORED, *t[1:])) for t in tokens], 1, [])
    rows = rows_of(samples, size)
    assert rows == sorted(samples.samples, key=lambda s: -len(s.tokens))
    assert [len(b["input_ids"]) for b in samples.batches(size)] == [
        min(size, 7 - at) for at in range(0, 7, size)
    ]


def test_padding_is_small() -> None:
    lengths = [1, 100] * 8
    samples = Samples([Sample((3,) * n, (3,) * n) for n in lengths], 1, [])
    assert sum(b["input_ids"].numel() for b in samples.batches(4)) == sum(lengths)
    assert samples.tokens == samples.counted == sum(lengths)


@pytest.mark.parametrize("own, config, expected", [
    ("<pad>", 5, WORDS.index("<pad>")), (None, 5, 5), (None, None, WORDS.index("<eos>")),
    (None, 10**6, WORDS.index("<eos>")),
])  # fmt: skip
def test_the_padding(own, config, expected, tmp_path: Path) -> None:
    fast = load_tokenizer(LocalFolder(save_tokenizer(tmp_path, pad=own)))
    records = draw_records([write_rows(tmp_path / "a.jsonl", {"text": "who"})], 1, 0).records
    assert tokenize(records, fast, 9, len(WORDS), pad=config).pad == expected


def test_the_digest_distinguishes_samples() -> None:
    one, other = Sample((1, 2), (1, 2)), Sample((1, 2), (IGNORED, 2))
    digests = {Samples(each, 0, []).digest for each in ([one], [other], [one, other])}
    assert len(digests) == 3 and Samples([one], 5, ["note"]).digest in digests


# -- files that are none ---------------------------------------------------------------------------

ROWS: dict[str, tuple[Any, str]] = {
    "unknown field": ({"txt": "who"}, "did you mean 'text'"),
    "no field": ({}, "fields none"),
    "a list": (["who"], "a JSON list"),
    "half a pair": ({"prompt": "who"}, "give completion too"),
    "two kinds": ({"text": "who", "input_ids": [1]}, "leave all but one out"),
    "a number": ({"text": 3}, "text is a int"),
    "mixed pair": ({"prompt": "who", "completion": [USER]}, "prompt is a str, completion a list"),
    "messages": ({"messages": [{"content": "who"}]}, "messages without roles"),
    "ids": ({"input_ids": [1, "2"]}, "input_ids is no list"),
    "short mask": ({"input_ids": [1, 2], "attention_mask": [1]}, "attention_mask is no list of 2"),
    "true ids": ({"input_ids": [True]}, "input_ids is no list"),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_row_that_is_no_sample_is_refused_by_its_number(name: str, tmp_path: Path) -> None:
    row, words = ROWS[name]
    path = write_rows(tmp_path / "a.jsonl", {"text": "fine"}, row, {"text": "fine"})
    with pytest.raises(Refused) as caught:
        draw_records([path], 1, 0)
    assert words in str(caught.value) and "a.jsonl, line 2" in caught.value.where
    assert caught.value.expected and caught.value.hint


@pytest.mark.parametrize("line, words", [
    ('{"text": "who"', "not JSON"), ("who", "not JSON"), ('{"text": "a", "text": "b"}', "twice"),
    ("[" * 100_000, "nested too deeply"), ('{"text": "\\ud800"}', "surrogate"),
])  # fmt: skip
def test_broken_json_is_damage_with_its_line(line: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n\n' + line + "\n")
    with pytest.raises(Damaged, match=words) as caught:
        draw_records([path], 1, 0)
    assert "a.jsonl, line 3" in caught.value.where and caught.value.hint


def test_every_file_s_problem_is_named(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a.txt", "b.jsonl", "c.csv", "d.txt", "e.jsonl", "f")]
    paths[0].write_bytes(b"fine\ngr\xfc\xdf\n")
    paths[1].write_text("\n \n")
    paths[2].write_text("text\nwho\n")
    paths[3].write_bytes(b"")
    paths[5].mkdir()
    with pytest.raises(Refused) as caught:
        draw_records(paths, 1, 0)
    text = str(caught.value)
    for words in ("a.txt, line 2: not UTF-8: byte 3 is 0xfc", "b.jsonl: there is no usable line",
                  "c.csv: files of type .csv", "d.txt: there is no usable line",
                  "e.jsonl: no such file", "f: the folder has no dataset_info.json"):  # fmt: skip
        assert words in text, text
    assert all(error.hint for error in caught.value.errors)


def test_damaged_tables(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and no more")
    (tmp_path / "f").mkdir()
    (tmp_path / "f/dataset_info.json").write_text("{}")
    for path in (tmp_path / "a.parquet", tmp_path / "f"):
        with pytest.raises(Damaged, match="cannot be read"):
            draw_records([path], 1, 0)
    (tmp_path / "g").mkdir()
    (tmp_path / "g/dataset_dict.json").write_text('{"splits": ["train"]}')
    (tmp_path / "g/train").mkdir()
    with pytest.raises(Refused, match="several splits: train"):
        draw_records([tmp_path / "g"], 1, 0)


def test_a_line_without_an_end_is_not_read_completely(tmp_path: Path, monkeypatch) -> None:
    from adapterkit.verbs.stats.data import records

    monkeypatch.setattr(records, "LONGEST", 10)
    for text in ("x" * 11, "fine\n\n" + "word\n" * 4):
        (tmp_path / "a.txt").write_text(text)
        with pytest.raises(Refused, match="more than 10 bytes"):
            draw_records([tmp_path / "a.txt"], 1, 0)


# -- tokenizers ------------------------------------------------------------------------------------


def test_a_tokenizer_that_is_missing_or_broken(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(Refused, match="no tokenizer") as caught:
        load_tokenizer(LocalFolder(tmp_path))
    assert "input_ids" in caught.value.hint
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(Refused, match="cannot load the tokenizer"):
        load_tokenizer(LocalFolder(tmp_path))


def test_no_code_of_a_tokenizer_is_run(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings |= {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')\n")
    with pytest.raises(Refused, match="cannot load the tokenizer"):
        load_tokenizer(LocalFolder(tmp_path))
    assert not (tmp_path / "run").exists()


def test_ids_beyond_the_vocabulary(tokenizer, tmp_path: Path) -> None:
    rows = [{"text": "who"}, {"input_ids": [3, 41]}, {"input_ids": [-1]},
            {"input_ids": [3], "labels": [99]}]  # fmt: skip
    records = draw_records([write_rows(tmp_path / "a.jsonl", *rows)], ALL, 0).records
    with pytest.raises(Refused) as caught:
        tokenize(records, tokenizer, 9, 41)
    problems = [error.problem.removeprefix("the data have ") for error in caught.value.errors]
    assert problems == ["token id 41", "token id -1", "token id 99"]
    with pytest.raises(Refused, match="ids from 0 to 9, the model's vocabulary"):
        tokenize(records[:1], tokenizer, 9, 10)


def test_messages_that_the_template_refuses(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", {"messages": [USER]})
    records = draw_records([path], 1, 0).records
    for template, words in (
        (None, "has no chat template"),
        ("{{ raise_exception('no roles') }}", "no roles"),
        ("{% for m in messages %}", "the chat template refuses"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
    ):
        fast = load_tokenizer(LocalFolder(save_tokenizer(tmp_path, template)))
        with pytest.raises(Refused, match=words):
            tokenize(records, fast, 9, len(WORDS))


class Remote:
    """A folder whose files lie under other names."""

    label = "org/name"

    def __init__(self, folder: Path, cache: Path):
        self.folder, self.cache = folder, cache

    def files(self) -> dict[str, int]:
        return {path.name: path.stat().st_size for path in self.folder.iterdir()}

    def path(self, name: str) -> Path:
        target = self.cache / name[::-1]
        target.write_bytes((self.folder / name).read_bytes())
        return target


def test_a_tokenizer_of_the_hub(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    save_tokenizer(tmp_path / "a")
    (tmp_path / "a" / "model.safetensors").write_bytes(b"not to be fetched")
    remote: Any = Remote(tmp_path / "a", tmp_path / "b")
    assert tuple(load_tokenizer(remote)("who")["input_ids"]) == ids("who")
    assert not (tmp_path / "b" / "model.safetensors"[::-1]).exists()
