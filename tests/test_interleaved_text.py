"""Words and ids, whatever the images are."""

import pytest
import torch

from interleaved_text import (
    END_OF_CHUNK,
    IMAGE,
    PAD,
    UNASKED,
    ExampleWriter,
    WordTokenizer,
    answer_of,
    join_examples,
    prompt_of,
    tokenize,
)

TOKENIZER = WordTokenizer((PAD, IMAGE, END_OF_CHUNK, "a", "red", "blue", "cat", "?"))
CAT = ExampleWriter().add(f"{IMAGE} a", f"red cat {END_OF_CHUNK}").example("a picture")
TWO_CATS = (
    ExampleWriter()
    .add(f"{IMAGE} a cat ?", f"red {END_OF_CHUNK}")
    .add(f"{IMAGE} a cat ?", f"blue {END_OF_CHUNK}")
    .example("one", "two")
)


def test_words_and_ids_are_each_other_s_inverse():
    text = f"{IMAGE} a red cat {END_OF_CHUNK}"
    assert TOKENIZER.encode(text) == [1, 3, 4, 6, 2]
    assert TOKENIZER.encode("  a\nred ") == [3, 4]
    assert TOKENIZER.decode([1, 3, 4, 6, 2]) == text
    assert (TOKENIZER.pad_id, TOKENIZER.image_id, TOKENIZER.eoc_id, len(TOKENIZER)) == (0, 1, 2, 8)


def test_padding_is_not_spoken():
    assert TOKENIZER.decode(torch.tensor([0, 0, 3, 4, 0])) == "a red"


def test_an_unknown_word_is_named():
    with pytest.raises(ValueError, match="the word 'dog' is not in the vocabulary of 8 words"):
        TOKENIZER.encode("a red dog")


def test_prompts_are_padded_on_the_left():
    ids = TOKENIZER.pad_left(["a red cat ?", "cat"])
    assert ids.dtype == torch.int64
    assert ids.tolist() == [[3, 4, 6, 7], [0, 0, 0, 6]]


def test_a_writer_marks_answers():
    assert CAT.text == f"{IMAGE} a red cat {END_OF_CHUNK}"
    assert CAT.answers == (False, False, True, True, True)
    assert CAT.scenes == ("a picture",)
    assert TWO_CATS.answers == (False,) * 4 + (True,) * 2 + (False,) * 4 + (True,) * 2


def test_labels_are_the_answers_ids_and_padding_is_on_the_right():
    ids, labels = tokenize([CAT, TWO_CATS], TOKENIZER)
    assert ids.tolist() == [[1, 3, 4, 6, 2] + [0] * 7, [1, 3, 6, 7, 4, 2, 1, 3, 6, 7, 5, 2]]
    none = UNASKED
    assert labels.tolist() == [[none, none, 4, 6, 2] + [none] * 7, [*[none] * 4, 4, 2, *[none] * 4, 5, 2]]
    assert ids.dtype == labels.dtype == torch.int64


def test_a_text_longer_than_the_batch_is_an_error():
    assert tokenize([CAT], TOKENIZER, 9)[0].shape == (1, 9)
    assert tokenize([CAT], TOKENIZER, 5)[0].shape == (1, 5)
    with pytest.raises(ValueError, match="a text has 5 words, more than length=4"):
        tokenize([CAT], TOKENIZER, 4)


def test_the_last_answer_is_what_a_model_is_asked_for():
    assert (prompt_of(CAT), answer_of(CAT)) == (f"{IMAGE} a", "red cat")
    assert prompt_of(TWO_CATS) == f"{IMAGE} a cat ? red {END_OF_CHUNK} {IMAGE} a cat ?"
    assert answer_of(TWO_CATS) == "blue"


def test_joined_examples_keep_scenes_words_and_answers():
    joined = join_examples([CAT, TWO_CATS])
    assert joined.scenes == ("a picture", "one", "two")
    assert joined.text == f"{CAT.text} {TWO_CATS.text}"
    assert joined.answers == CAT.answers + TWO_CATS.answers
