"""VQA's measures by hand, and its files."""

import json
import math

import pytest
import torch

from multilora.integrations import vqa


@pytest.mark.parametrize(
    "answer, normal",
    [
        # The examples in the evaluation's description.
        ("dont", "don't"),
        ("girl's", "girl's"),
        ("2:50 PM", "2:50 pm"),
        ("100,978", "100978"),
        # Its rules, one by one.
        ("Yes", "yes"),
        ("yes.", "yes"),
        ("U.S.A.", "usa"),
        ("3.5", "3.5"),
        ("Two", "2"),
        ("none", "0"),
        ("ten.", "10"),
        ("the red car", "red car"),
        ("A cat and an owl", "cat and owl"),
        ("theatre", "theatre"),
        ("black/white", "black white"),
        ("black, white", "black white"),
        ("snow-board_ramp!", "snow board ramp"),
        ("Whats that", "what's that"),
        ("theyve", "they've"),
        ("10 oclock", "10 o'clock"),
        ("$50 (50%)", "$50 50%"),
        ("well", "well"),
        ("its", "its"),
        ("  much \n space ", "much space"),
        ("", ""),
    ],
)
def test_answers_are_normalised(answer, normal):
    assert vqa.normalize(answer) == normal
    assert vqa.normalize(normal) == normal


@pytest.mark.parametrize(
    "said, expected",
    [
        (0, 0.0),
        # One set in ten lacks the human who said it: nine thirds.
        (1, 0.9 / 3),
        (2, (2 * 1 / 3 + 8 * 2 / 3) / 10),
        (3, (3 * 2 / 3 + 7) / 10),
        (4, 1.0),
        (10, 1.0),
    ],
)
def test_accuracy_leaves_each_human_out(said, expected):
    humans = ["Yes."] * said + ["no"] * (10 - said)
    assert vqa.accuracy("yes", humans) == pytest.approx(expected, abs=1e-15)
    assert vqa.exact_match("yes", humans) == (said >= 4)


def test_the_humans_answers_are_normalised_too():
    humans = ["Two", "2", "the 2", "2."] + ["3"] * 6
    assert vqa.accuracy("two", humans) == 1
    assert vqa.human_confidence(humans) == 0.6
    assert vqa.human_confidence(humans[:4] + ["3"] * 2) == 4 / 6


def test_confidence_by_hand():
    """Three raters of four texts: the curve needs no VQA."""
    ratings = [["good"] * 3, ["good", "good", "bad"], ["bad"] * 3, ["good", "bad", "so so"]]
    confidence = torch.tensor([vqa.human_confidence(r) for r in ratings])
    entropy = torch.tensor([0.05, 0.1, 0.5, 0.9])
    low, high = vqa.confidence_curve(entropy, confidence, [0.01, 0.1, 0.5, 1.0])
    expected_low = [math.nan, (1 + 2 / 3) / 2, (1 + 2 / 3 + 1) / 3, 3 / 4]
    expected_high = [3 / 4, (1 + 1 / 3) / 2, 1 / 3, math.nan]
    for measured, expected in ((low, expected_low), (high, expected_high)):
        torch.testing.assert_close(
            measured, torch.tensor(expected).double(), equal_nan=True, atol=1e-7, rtol=0
        )
    assert vqa.THRESHOLDS == (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
    assert len(vqa.confidence_curve(entropy, confidence)[0]) == 8


def test_what_the_measures_refuse():
    with pytest.raises(ValueError, match=r"at least 2 answers; got \['yes'\]"):
        vqa.accuracy("yes", ["yes"])
    with pytest.raises(ValueError, match=r"at least 1 answers; got \[\]"):
        vqa.human_confidence([])
    with pytest.raises(ValueError, match="needs a list of at least 2 answers; got 'yes'"):
        vqa.accuracy("yes", "yes")
    with pytest.raises(ValueError, match=r"got \(3,\), \(2,\)"):
        vqa.confidence_curve(torch.zeros(3), torch.zeros(2))
    with pytest.raises(ValueError, match="1 of 2 entropies are NaN"):
        vqa.confidence_curve(torch.tensor([0.1, math.nan]), torch.ones(2))


# --- the release's files -------------------------------------------------------------------------


def release():
    questions = [
        {"image_id": 42, "question": "Is it a cat?", "question_id": 42001},
        {"image_id": 7, "question": "How many?", "question_id": 7000},
    ]
    annotations = [
        {
            "question_type": "how many",
            "multiple_choice_answer": "2",
            "answers": [
                {"answer": answer, "answer_confidence": "yes", "answer_id": i + 1}
                for i, answer in enumerate(["2", "two", "3"])
            ],
            "image_id": 7,
            "answer_type": "number",
            "question_id": 7000,
        },
        {
            "question_type": "is it",
            "multiple_choice_answer": "yes",
            "answers": [{"answer": "yes", "answer_confidence": "maybe", "answer_id": 1}],
            "image_id": 42,
            "answer_type": "yes/no",
            "question_id": 42001,
        },
    ]
    return questions, annotations


def written(folder, questions, annotations):
    files = folder / "questions.json", folder / "annotations.json"
    files[0].write_text(json.dumps({"info": {}, "questions": questions}))
    files[1].write_text(json.dumps({"info": {}, "annotations": annotations}))
    return files


def test_the_release_is_read(tmp_path):
    files = written(tmp_path, *release())
    number = vqa.Question(7000, 7, "How many?", "number", ("2", "two", "3"))
    yes_no = vqa.Question(42001, 42, "Is it a cat?", "yes/no", ("yes",))
    assert vqa.read(*files) == [number, yes_no]
    assert vqa.read(*files, answer_type="number") == [number]
    with pytest.raises(ValueError, match=r"annotations.json has no question of the type 'other'"):
        vqa.read(*files, answer_type="other")
    with pytest.raises(ValueError, match=r"must be one of .*; got 'colour'"):
        vqa.read(*files, answer_type="colour")


@pytest.mark.parametrize(
    "which, field, value, message",
    [
        (0, "question", None, r"questions\.json, questions\[0\]: 'question' must be of type str"),
        (0, "question_id", 5, r"annotations\.json, annotations\[1\]: question 42001 is not in"),
        (1, "answers", "2", r"annotations\[0\]: 'answers' must be of type list; got '2'"),
        (1, "answers", [{"answer": 2}], r"annotations\[0\]: 'answer' must be of type str; got 2"),
        (1, "answer_type", "colour", r"annotations\[0\]: answer_type must be .*; got 'colour'"),
        (1, "image_id", "7", r"annotations\[0\]: 'image_id' must be of type int; got '7'"),
    ],
)
def test_a_record_that_is_wrong(tmp_path, which, field, value, message):
    parts = release()
    parts[which][0][field] = value
    with pytest.raises(ValueError, match=message):
        vqa.read(*written(tmp_path, *parts))


def test_files_that_are_wrong(tmp_path):
    questions, annotations = written(tmp_path, *release())
    with pytest.raises(FileNotFoundError, match=r"file of the questions, .*nowhere"):
        vqa.read(tmp_path / "nowhere", annotations)
    with pytest.raises(ValueError, match=r"annotations.json needs a list 'questions'"):
        vqa.read(annotations, questions)
    questions.write_text("{")
    with pytest.raises(ValueError, match=r"questions.json is not JSON: Expecting property"):
        vqa.read(questions, annotations)
