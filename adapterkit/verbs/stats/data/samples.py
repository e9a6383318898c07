"""Calibration samples: records as token ids, masks of those that count, and batches."""

import contextlib
import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit.core.checkpoint.folder import Folder
from adapterkit.core.checkpoint.shards import TOKENIZER
from adapterkit.core.errors import AdapterkitError, Problems, Refused, shown
from adapterkit.core.records import Json
from adapterkit.core.weights.safe_config import LOCAL, closed, replaced, safe_config
from adapterkit.verbs.stats.data.records import IGNORED, Record
from adapterkit.verbs.stats.data.templates import TemplateProcess

if TYPE_CHECKING:
    from torch import Tensor

MOST = 100_000_000  # bytes of a tokenizer's files
OPENED = re.compile("_files?$")  # of a tokenizer's settings, the names of files
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")  # marks what an assistant says in a template


@dataclass(frozen=True, slots=True)
class Sample:
    """Token ids and labels. A label is its token's id, or `IGNORED`; an encoder-decoder's labels
    are the decoder's tokens, one each."""

    tokens: tuple[int, ...]
    labels: tuple[int, ...]
    where: str = field(default="", compare=False)  # in its file


@dataclass(frozen=True)
class Samples:
    """Samples in file order, and the id that pads a batch's rows."""

    samples: list[Sample]
    pad: int
    notes: list[str]
    has_decoder: bool = False  # its labels are tokens, too

    @property
    def tokens(self) -> int:
        """The number of tokens, including the decoder's."""
        return sum(len(s.tokens) + len(s.labels) * self.has_decoder for s in self.samples)

    @property
    def counted(self) -> int:
        """The number of tokens that count."""
        return sum(label != IGNORED for sample in self.samples for label in sample.labels)

    @property
    def digest(self) -> str:
        """sha256 of all ids, which distinguishes sets of samples."""
        text = json.dumps([[s.tokens, s.labels] for s in self.samples])
        return hashlib.sha256(text.encode()).hexdigest()

    def batches(self, size: int) -> "list[dict[str, Tensor]]":
        """Batches of `size` rows: input_ids, attention_mask and labels (rows, length) int64.

        Rows are padded on the right; samples of similar length are batched together, the longest
        first, so that memory does not grow later."""
        order = sorted(self.samples, key=lambda s: (-len(s.tokens), -len(s.labels)))
        starts = range(0, len(order), size)
        return [self.batch(order[start : start + size]) for start in starts]

    def batch(self, samples: Sequence[Sample]) -> "dict[str, Tensor]":
        """Some of the samples, a row each."""
        tokens = [sample.tokens for sample in samples]
        return {
            "input_ids": _padded(tokens, self.pad),
            "attention_mask": _padded([(1,) * len(row) for row in tokens], 0),
            "labels": _padded([sample.labels for sample in samples], IGNORED),
        }


def _padded(rows: list[tuple[int, ...]], value: int) -> "Tensor":
    import torch  # not needed in the process that only tokenizes

    length = max(map(len, rows))
    return torch.tensor([row + (value,) * (length - len(row)) for row in rows])


def tokenizer_names(folder: Folder) -> list[str]:
    """The files of a tokenizer; `Refused` if there are none, or too large ones."""
    sizes = {name: size for name, size in folder.files().items() if "/" not in name}
    names = [name for name in sizes if TOKENIZER.fullmatch(name)]
    names += ["config.json"] if names and "config.json" in sizes else []
    if not names or sum(sizes[name] for name in names) > MOST:
        raise Refused(
            f"the tokenizer has more than {MOST:,} bytes"
            if names
            else "the model has no tokenizer",
            expected="tokenizer.json next to the weights, or other files of a tokenizer",
            where=folder.label,
            hint="copy the tokenizer's files there, or give data with input_ids",
            code="AK901",
        )
    return names


def load_tokenizer(folder: Folder) -> Any:
    """The tokenizer of a model's folder by transformers, from its files alone: the model's code
    does not run, and nothing is downloaded. `Refused` if there is none."""
    names = tokenizer_names(folder)
    from transformers import AutoTokenizer

    try:
        with tempfile.TemporaryDirectory() as copy, closed():
            for name in names:
                shutil.copyfile(folder.path(name), Path(copy, name))
            for config in Path(copy).glob("*config.json"):
                settings = json.loads(config.read_bytes())
                own = {k: v for k, v in safe_config(settings).items() if not OPENED.search(k)}
                kept = {key: settings[key] for key in settings if key == "auto_map"}  # is refused
                config.write_text(json.dumps(own | kept), "utf-8")
            tokenizer: Any = AutoTokenizer.from_pretrained(copy, **LOCAL)
    except AdapterkitError:
        raise
    except Exception as error:  # whatever a tokenizer's files make its class raise
        raise Refused(
            f"transformers cannot load the tokenizer: {shown(error)}",
            expected=f"files of a tokenizer that it knows ({', '.join(map(shown, names[:4]))})",
            where=folder.label,
            hint="save the tokenizer again, or give data with input_ids",
            code="AK901",
        ) from error
    tokenizer.truncation_side = "right"
    return tokenizer


def tokenize_all(records: Iterable[list[Record]], tokenizer: Any, options: Json) -> list[Samples]:
    """`tokenize` of several files, with the errors of all."""
    errors, found = Problems(), []
    for its in records:
        with errors.collected():
            found.append(tokenize(its, tokenizer, **options))
    errors.raise_all()
    return found


def tokenize(
    records: list[Record],
    tokenizer: Any,
    length: int,
    vocabulary: int,
    *,
    pad: int | None = None,
    is_encoder_decoder: bool = False,
) -> Samples:
    """Samples of at most `length` tokens.

    Only the tokenizer's own tokens are added. For a prompt and its completion, the completion's
    tokens count; for messages, those that the template marks as an assistant's, if it marks any;
    else all. An encoder-decoder reads the prompt and learns the completion. `pad`: the padding that
    the model's config names. `vocabulary`: the number of ids that the model knows; `Refused` with
    all samples that have others, and if no token of any sample counts."""
    reader = _Tokenization(tokenizer, length, is_encoder_decoder)
    samples: list[Sample] = []
    errors = Problems(code="AK901")
    uncounted = 0
    with contextlib.closing(reader.templates):
        for record in records:
            try:
                sample = reader.sample(record)
            except AdapterkitError as error:
                errors.append(error)
                continue
            used = [*sample.tokens, *(label for label in sample.labels if label != IGNORED)]
            beyond = next((token for token in used if not 0 <= token < vocabulary), None)
            if beyond is not None:
                errors.add(
                    f"the data have token id {beyond}",
                    f"ids from 0 to {vocabulary - 1}, the model's vocabulary",
                    "use the tokenizer of this model",
                    where=record.where,
                )
            elif all(label == IGNORED for label in sample.labels) or not sample.tokens:
                uncounted += 1
            else:
                samples.append(replace(sample, where=record.where))
    errors.raise_all()
    if not samples:
        raise Refused(
            f"no token of {len(records)} samples counts",
            expected=f"tokens of text or of completions within the first {length}",
            where="--data",
            hint="raise --length, or shorten the prompts",
            code="AK901",
        )
    notes = list(reader.notes)
    if uncounted:
        notes.append(f"{uncounted} samples left out: none of their first {length} tokens counts")
    if reader.cut:
        notes.append(f"{len(reader.cut)} of {len(records)} samples are cut to {length} tokens")
    return Samples(samples, _pad_id(tokenizer, pad, vocabulary), notes, is_encoder_decoder)


def _pad_id(tokenizer: Any, pad: int | None, vocabulary: int) -> int:
    """The tokenizer's padding, else the model's, else the tokenizer's end token; it is always
    masked."""
    ids = (getattr(tokenizer, "pad_token_id", None), pad, getattr(tokenizer, "eos_token_id", None))
    return next((one for one in ids if isinstance(one, int) and 0 <= one < vocabulary), 0)


class _Tokenization:
    """Turn records of each kind into samples."""

    def __init__(self, tokenizer: Any, length: int, is_encoder_decoder: bool):
        self.tokenizer, self.length, self.pairs_only = tokenizer, length, is_encoder_decoder
        self.notes: dict[str, None] = {}  # in their order, each once
        self.cut: set[str] = set()  # samples, by their locations
        self.templates = TemplateProcess()

    def sample(self, record: Record) -> Sample:
        return getattr(self, f"_{record.kind}")(record.fields, record.where)

    def _first(self, tokens: tuple[int, ...], where: str) -> tuple[int, ...]:
        """The tokens that a sample may have."""
        if len(tokens) > self.length:
            self.cut.add(where)
        return tokens[: self.length]

    def _text(self, fields: Mapping[str, Any], where: str) -> Sample:
        if self.pairs_only:
            raise _needs_pairs("text", where)
        tokens = self._ids(fields["text"], where)
        return Sample(tokens, tokens)

    def _pair(self, fields: Mapping[str, Any], where: str) -> Sample:
        prompt, completion = fields["prompt"], fields["completion"]
        if not isinstance(prompt, str):
            if self.pairs_only:
                raise _needs_pairs("messages", where)
            return self._reply(prompt, completion, fields, where)
        if self.pairs_only:
            return Sample(self._ids(prompt, where), self._ids(completion, where, "text_target"))
        whole = self._ids(prompt + completion)
        return self._after(self._ids(prompt), whole, where)

    def _messages(self, fields: Mapping[str, Any], where: str) -> Sample:
        if self.pairs_only:
            raise _needs_pairs("messages", where)
        is_marked = GENERATION.search(self._template(where)) is not None
        rendered = self._rendered(
            fields["messages"], fields, where, return_assistant_tokens_mask=is_marked
        )
        tokens = tuple(rendered["input_ids"])
        if is_marked:
            mask = rendered["assistant_masks"]
        else:
            self.notes["the chat template does not mark who says what: all tokens count"] = None
            mask = (1,) * len(tokens)
        labels = tuple(t if m else IGNORED for t, m in zip(tokens, mask, strict=True))
        return Sample(self._first(tokens, where), labels[: self.length])

    def _tokens(self, fields: Mapping[str, Any], where: str) -> Sample:
        tokens, labels = fields["input_ids"], fields.get("labels")
        mask = fields.get("attention_mask", [1] * len(tokens))
        if self.pairs_only:
            if labels is None:
                raise _needs_pairs("input_ids without labels", where)
            tokens = [token for token, is_one in zip(tokens, mask, strict=True) if is_one]
            labels = [label for label in labels if label != IGNORED]
            return Sample(self._first(tuple(tokens), where), self._first(tuple(labels), where))
        if labels is not None and len(labels) != len(tokens):
            raise Refused(
                f"the sample has {len(tokens)} input_ids and {len(labels)} labels",
                expected="a label for each token, of a model that has no encoder",
                where=where,
                hint="fix the data",
                code="AK901",
            )
        rows = [row for *row, is_one in zip(tokens, labels or tokens, mask, strict=True) if is_one]
        tokens = self._first(tuple(token for token, _ in rows), where)
        return Sample(tokens, tuple(label for _, label in rows[: self.length]))

    def _reply(
        self, prompt: list, completion: list, fields: Mapping[str, Any], where: str
    ) -> Sample:
        before = self._rendered(prompt, fields, where, add_generation_prompt=True)
        whole = self._rendered([*prompt, *completion], fields, where)
        return self._after(tuple(before["input_ids"]), tuple(whole["input_ids"]), where)

    def _after(self, prompt: tuple[int, ...], whole: tuple[int, ...], where: str) -> Sample:
        """The sample in which the tokens after those of the prompt count. A token across the end of
        the prompt and the beginning of the completion belongs to the completion."""
        pairs = zip(prompt, whole, strict=False)
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        labels = (IGNORED,) * same + whole[same:]
        return Sample(self._first(whole, where), labels[: self.length])

    def _ids(self, text: str, where: str | None = None, kind: str = "text") -> tuple[int, ...]:
        """The tokens of a text, all of them or, for a sample, those that it may have."""
        options: Json = {kind: text, "verbose": False}
        if where is None:
            return tuple(self.tokenizer(**options)["input_ids"])
        options |= {"truncation": True}
        tokens = tuple(self.tokenizer(**options, max_length=self.length)["input_ids"])
        if len(tokens) == self.length:  # a token more tells whether it was cut
            longer = self.tokenizer(**options, max_length=self.length + 1)["input_ids"]
            self.cut |= {where} if len(longer) > self.length else set()
        return tokens

    def _template(self, where: str) -> str:
        try:
            return self.tokenizer.get_chat_template()
        except ValueError as error:
            raise Refused(
                "the data have messages, but the tokenizer has no chat template",
                expected="chat_template.jinja, or chat_template in tokenizer_config.json",
                where=where,
                hint="give prompt and completion, or text",
                code="AK901",
            ) from error

    def _rendered(
        self, messages: list, fields: Mapping[str, Any], where: str, **options: Any
    ) -> Mapping[str, Any]:
        """A conversation's tokens through the chat template."""
        from transformers import tokenization_utils_base

        self._template(where)
        render = lambda **request: self.templates.render(where, request)
        try:
            with replaced(tokenization_utils_base, "render_jinja_template", render):
                return self.tokenizer.apply_chat_template(
                    messages, tools=fields.get("tools"), tokenize=True, return_dict=True, **options
                )
        except AdapterkitError:
            raise
        except Exception as error:  # a template is a program: it may raise anything
            raise Refused(
                f"the chat template refuses the messages: {shown(error)}",
                expected="messages with the roles that it knows",
                where=where,
                hint="fix the messages, or give text",
                code="AK901",
            ) from error


def _needs_pairs(kind: str, where: str) -> Refused:
    return Refused(
        f"an encoder-decoder takes no {kind} alone",
        expected="prompt and completion, or input_ids and labels",
        where=where,
        hint="give the encoder's input as prompt, the decoder's output as completion",
        code="AK901",
    )
