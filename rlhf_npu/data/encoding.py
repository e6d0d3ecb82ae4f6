"""Drafts as token ids: each token is trained, or not, as the text it stands for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
from transformers import PreTrainedTokenizerBase

from rlhf_npu.data.drafts import Draft
from rlhf_npu.data.packing import Completion, Example
from rlhf_npu.edges import errors_as, one_line
from rlhf_npu.errors import DataError

Ids = list[int]


@dataclass(frozen=True)
class Limits:
    """How long an example may be, and what happens to longer ones; see `OfflineDataConfig`."""

    max_length: int
    filter_overlong: bool
    truncation: str


@dataclass(frozen=True)
class Encoded:
    """An example of a draft.

    Attributes:
        example: None where it is skipped for its length.
        truncated: whether it was cut.
    """

    example: Example | None
    truncated: bool = False


def encode_each(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], special: bool) -> list[Ids | str]:
    """Ids of each text, or what the tokenizer says against it.

    Args:
        special: whether with the tokens that the tokenizer begins and ends a text with.
    """
    if not texts:
        return []
    try:
        rows: list[Ids | str] = tokenizer(list(texts), add_special_tokens=special, verbose=False)["input_ids"]
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001  # Rust's panics are no Exception; below the text is found
        if len(texts) == 1:
            return [f"the tokenizer fails on {texts[0][:80]!r}: {one_line(error)}"]
        middle = len(texts) // 2
        halves = texts[:middle], texts[middle:]
        return [row for half in halves for row in encode_each(tokenizer, half, special)]
    return rows


class TokenizerCalls:
    """A tokenizer that says for which of many texts it fails, and never ends a text by itself."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self.eos: int | None = tokenizer.eos_token_id
        with errors_as(DataError, f"the tokenizer of {tokenizer.name_or_path!r} fails on 'a'"):
            self._appended = len(_after(tokenizer))

    def many(self, texts: Sequence[str], special: bool) -> dict[str, Ids | str]:
        """Ids of each text, or what the tokenizer says against it.

        Args:
            special: whether the tokens go before it with which the tokenizer begins a text.
        """
        distinct = list(dict.fromkeys(texts))
        rows = encode_each(self._tokenizer, distinct, special)
        if special and self._appended:
            rows = [row if isinstance(row, str) else row[: len(row) - self._appended] for row in rows]
        return dict(zip(distinct, rows, strict=True))

    def places(self, text: str, special: bool) -> tuple[Ids, list[tuple[int, int]]] | None:
        """Ids, and the characters (from, to) of each; None where the tokenizer cannot tell."""
        if not self._tokenizer.is_fast:
            return None
        encoded = self._tokenizer(text, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
        end = len(encoded["input_ids"]) - (self._appended if special else 0)
        return encoded["input_ids"][:end], encoded["offset_mapping"][:end]

    def text(self, ids: Ids) -> str:
        """The text of ids, special tokens included."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


class Encoder:
    """Makes examples of drafts.

    A prompt is tokenized alone, as it is where the model answers it, and so is each piece after it. Where the tokens of
    the whole text are others, those are taken if each piece begins with a token of its own; otherwise the pieces' are,
    if they are the same text. A completion that is text ends with the tokenizer's EOS; a chat as its template ends it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, limits: Limits) -> None:
        self._calls = TokenizerCalls(tokenizer)
        self._limits = limits

    def encode(self, drafts: Sequence[Draft]) -> list[Encoded | DataError]:
        """Each draft's example, or what is wrong with it, which names file and row."""
        known = {special: self._calls.many(_texts(drafts, special), special) for special in (False, True)}
        return [self._encoded(draft, known) for draft in drafts]

    def _encoded(self, draft: Draft, known: dict[bool, dict[str, Ids | str]]) -> Encoded | DataError:
        try:
            return self._fitted(self._example(draft, known))
        except DataError as error:
            return DataError(f"{draft.location}: {error}")

    def _example(self, draft: Draft, known: dict[bool, dict[str, Ids | str]]) -> Example:
        if draft.prompt is None:
            return self._of_whole_texts(draft, known)
        special = not draft.is_chat
        prompt = _ids(known[special], draft.prompt)
        completions = []
        for pieces in draft.completions:
            parts = [prompt, *(_ids(known[False], piece.text) for piece in pieces)]
            whole = _ids(known[special], draft.prompt + "".join(piece.text for piece in pieces))
            if [token for part in parts for token in part] != whole:
                texts = [draft.prompt, *(piece.text for piece in pieces)]
                parts = self._at_their_places(texts, special, parts) or self._if_the_same(texts, parts, whole)
            trained = [piece.trained for piece in pieces]
            completions.append(self._completion(parts[1:], trained, ends=special))
        return Example(_prompt(prompt), tuple(completions))

    def _of_whole_texts(self, draft: Draft, known: dict[bool, dict[str, Ids | str]]) -> Example:
        """What two texts begin with is their prompt; of one it is the first token."""
        texts = [self._ended(_ids(known[True], pieces[0].text)) for pieces in draft.completions]
        shared = 1
        if len(texts) > 1:
            ends = min(map(len, texts)) - 1
            shared = next((i for i in range(ends) if len({text[i] for text in texts}) > 1), ends)
        prompt = _prompt(texts[0][:shared])
        if min(map(len, texts)) == shared:
            raise DataError("the text has a single token, so there is nothing to learn")
        rest = [Completion(_array(text[shared:]), np.ones(len(text) - shared, bool)) for text in texts]
        return Example(prompt, tuple(rest))

    def _completion(self, parts: list[Ids], trained: list[bool], ends: bool) -> Completion:
        ids = [token for part in parts for token in part]
        mask = [flag for part, flag in zip(parts, trained, strict=True) for _ in part]
        if ends:
            ids = self._ended(ids)
            mask += [True] * (len(ids) - len(mask))
        return Completion(_array(ids), np.array(mask, bool))

    def _ended(self, ids: Ids) -> Ids:
        if self._calls.eos is None:
            raise DataError("a completion that is text ends with the tokenizer's eos_token, but it has none")
        return ids if ids[-1:] == [self._calls.eos] else [*ids, self._calls.eos]

    def _at_their_places(self, texts: list[str], special: bool, parts: list[Ids]) -> list[Ids] | None:
        """The whole text's tokens, cut where the parts begin; None where that is inside of a token."""
        found = self._calls.places("".join(texts), special)
        if found is None:
            return None
        ids, places = found
        cuts = [_cut(places, border) for border in accumulate(map(len, texts[:-1]))]
        if None in cuts or ids[: cuts[0]] != parts[0]:
            return None
        borders = [0, *cuts, len(ids)]
        return [ids[begin:end] for begin, end in pairwise(borders)]

    def _if_the_same(self, texts: list[str], parts: list[Ids], whole: Ids) -> list[Ids]:
        if self._calls.text([token for part in parts for token in part]) == self._calls.text(whole):
            return parts
        border = len(texts[0])
        near = "".join(texts)[max(0, border - 20) : border + 20]
        raise DataError(
            f"the tokenizer joins the prompt's end and the completion's beginning, or those of turns, into one token "
            f"(near {near!r}); move the white space between them from one to the other"
        )

    def _fitted(self, example: Example) -> Encoded:
        _check(example)
        longest = max(len(completion.input_ids) for completion in example.completions)
        limit = self._limits.max_length
        if len(example.prompt) + longest <= limit:
            return Encoded(example)
        if self._limits.filter_overlong:
            return Encoded(None)
        if self._limits.truncation == "error":
            raise DataError(
                f"{len(example.prompt) + longest} tokens, more than data.max_length={limit}; raise it, set "
                "data.filter_overlong=true to skip such examples, or data.truncation=left|right to cut"
            )
        cut = _without_beginning if self._limits.truncation == "left" else _without_ends
        shorter = cut(example, limit)
        _check(shorter)
        return Encoded(shorter, truncated=True)


def _texts(drafts: Sequence[Draft], special: bool) -> list[str]:
    """What must be tokenized with the special tokens that begin a text, or without.

    A prompt and the whole begin a text, except that a chat template writes such tokens itself; pieces begin none.
    """
    texts = []
    for draft in drafts:
        if draft.is_chat != special:
            texts += [] if draft.prompt is None else [draft.prompt]
            texts += [(draft.prompt or "") + "".join(piece.text for piece in pieces) for pieces in draft.completions]
        if draft.prompt is not None and not special:
            texts += [piece.text for pieces in draft.completions for piece in pieces]
    return texts


def _ids(known: dict[str, Ids | str], text: str) -> Ids:
    ids = known[text]
    if isinstance(ids, str):
        raise DataError(ids)
    return ids


def _after(tokenizer: PreTrainedTokenizerBase) -> Ids:
    """The tokens that the tokenizer puts after each text."""
    alone, special = (tokenizer("a", add_special_tokens=flag)["input_ids"] for flag in (False, True))
    for end in range(len(special), -1, -1):
        if special[max(0, end - len(alone)) : end] == alone:
            return list(special[end:])
    return []


def _cut(places: list[tuple[int, int]], border: int) -> int | None:
    """How many tokens are before character `border`; None where one reaches over it, or may."""
    count = next((index for index, (_, end) in enumerate(places) if end > border), len(places))
    reached = max((end for _, end in places[:count]), default=0)
    return count if reached == border and all(begin >= border for begin, _ in places[count:]) else None


def _without_beginning(example: Example, limit: int) -> Example:
    longest = max(len(completion.input_ids) for completion in example.completions)
    if longest >= limit:
        raise DataError(
            f"a completion of {longest} tokens leaves nothing of its prompt within data.max_length={limit}; raise it, "
            "or set data.truncation=right"
        )
    return Example(example.prompt[longest - limit :], example.completions)


def _without_ends(example: Example, limit: int) -> Example:
    room = limit - len(example.prompt)
    if room < 1:
        raise DataError(
            f"a prompt of {len(example.prompt)} tokens leaves nothing of its completion within "
            f"data.max_length={limit}; raise it, or set data.truncation=left"
        )
    cut = tuple(Completion(each.input_ids[:room], each.mask[:room]) for each in example.completions)
    return Example(example.prompt, cut)


def _prompt(ids: Ids) -> np.ndarray:
    if not ids:
        raise DataError("the prompt has no tokens, so there is nothing to predict the completion's first token from")
    return _array(ids)


def _check(example: Example) -> None:
    if not all(completion.mask.any() for completion in example.completions):
        raise DataError("a completion has no token that is trained; it must say something within data.max_length")
    first = example.completions[0].input_ids
    if len(example.completions) > 1 and np.array_equal(first, example.completions[1].input_ids):
        raise DataError("chosen and rejected have the same tokens; a pair needs two answers that differ")


def _array(ids: Ids) -> np.ndarray:
    return np.array(ids, np.int32)
