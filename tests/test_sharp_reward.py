"""What the base of all rewards adds: names, problems, hashes, and a check of every score."""

import hashlib
from pathlib import Path
from typing import ClassVar, Literal

import pytest
import torch

from posttrain.errors import NotFinite, RewardError
from posttrain.reward import Reward, Scores, checked
from posttrain.rewards.jpeg import JpegIncompressibility
from posttrain.rewards.ocr import OCR
from posttrain.scoring.catalogue import missing
from posttrain.support.wording import described
from posttrain.weights.files import sha256
from posttrain.weights.published import Weights

CPU = torch.device("cpu")


class Plain(Reward):
    type: Literal["sharp_plain"] = "sharp_plain"
    range: ClassVar = (0.0, 1.0)
    weights: ClassVar = {
        "path": Weights(("a.bin", "b*.json"), 1, "MIT"),
        "head": Weights(("h.bin",), 1, "MIT"),
    }

    path: str = "./nowhere"
    head: str = "some/repository"
    colour: str = "red"
    words: Path = Path("w.txt")

    def load(self, device):
        raise NotImplementedError


Reward.variants.pop("sharp_plain")  # a test's own; recipes must not list it


@pytest.fixture
def folder(tmp_path):
    for name in ("a.bin", "b1.json", "b2.json", "h.bin", "other"):
        (tmp_path / name).write_text(name)
    return tmp_path


def test_the_facts_of_a_reward_that_says_nothing_of_them():
    assert Reward.higher_is_better is True
    assert (Reward.requires, dict(Reward.weights)) == ((), {})
    assert Plain().weight == 1.0
    assert Plain().label == "sharp_plain"
    assert Plain().prompt_problem({"prompt": "p"}) is None
    for field in ("weight", "limit_minutes"):
        for number in (0.0, -1.0):
            with pytest.raises(ValueError, match="greater than 0"):
                Plain(**{field: number})
    assert Plain(weight=1e9).weight == 1e9
    with pytest.raises(ValueError, match="less than or equal to 1000000000"):
        Plain(weight=1e9 + 1)
    assert (Plain().limit_minutes, Plain(limit_minutes=0.5).limit_minutes) == (20.0, 0.5)


def test_what_a_score_measures_is_never_the_description_of_the_base_class():
    class Shared(Reward):
        """Words as :class:`OCR`
        reads them, in ``prompt``.

        More."""

    class Own(Shared):
        """Fewer words."""

    words = "Words as OCR reads them, in prompt."
    assert described(Plain, Reward) == Plain().about() == "", "it has no docstring"
    assert described(type("Heir", (Shared,), {}), Reward) == described(Shared, Reward) == words
    assert described(Own, Reward) == "Fewer words."


def test_scores_are_named_with_their_details():
    scores = Scores(torch.tensor([0.25, 0.5]), {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3, 4])})
    assert scores.named("r", 0) == {"r": 0.25, "r/a": 1.0, "r/b": 3.0}
    assert scores.named("r", 1) == {"r": 0.5, "r/a": 2.0, "r/b": 4.0}
    assert list(scores.named("r", 1)) == ["r", "r/a", "r/b"]
    assert all(type(v) is float for v in scores.named("r", 1).values())
    assert Scores(torch.zeros(1)).details == {}


def test_packages_that_are_not_installed_are_named(monkeypatch):
    monkeypatch.setattr(Plain, "requires", ("no_such_one", "torch", "nor_this"))
    words = "sharp_plain needs 'no_such_one', 'nor_this', which this install lacks: install them"
    assert Plain().problem() == words
    assert missing(Plain)[0] == "no_such_one, nor_this (install them)", "our extra has no plug-in's packages"
    monkeypatch.setattr(OCR, "requires", ("no_such_one",))
    assert (
        OCR().problem().endswith("'no_such_one', which this install lacks: pip install 'posttrain[rewards]'")
    )
    assert missing(OCR) == ["no_such_one (pip install 'posttrain[rewards]')"]


def test_a_path_without_its_weights_is_a_problem_and_a_repository_is_none(folder):
    assert Plain().problem() == "path: no a.bin and b*.json at './nowhere'"
    assert Plain(path=str(folder)).problem() is None
    assert Plain(path="another/repository").problem() is None
    assert Plain(path=str(folder), head="./h").problem() == "head: no h.bin at './h'"


def test_weights_are_located_and_hashed_file_by_file(folder):
    reward = Plain(path=str(folder), head=str(folder / "h.bin"))
    assert reward.located("path") == folder
    assert reward.located("head") == Path(folder / "h.bin")
    digests = {
        name: hashlib.sha256(name.encode()).hexdigest() for name in ("a.bin", "b1.json", "b2.json", "h.bin")
    }
    head = {"h.bin": digests.pop("h.bin")}
    source = {"test_sharp_reward": sha256(Path(__file__))}
    assert reward.hashes() == {"path": digests, "head": head, "source": source}
    assert JpegIncompressibility().hashes() == {}, "it has no weights, and its source is this package's"


def test_weights_that_cannot_be_had_are_an_error_that_says_what_to_do():
    with pytest.raises(RewardError) as caught:
        Plain().located("path")
    assert str(caught.value) == (
        "sharp_plain: './nowhere' is no folder with a.bin, b*.json. Run 'posttrain rewards fetch sharp_plain' "
        "on a machine that reaches the hub, or give a local copy as 'path'"
    )
    assert isinstance(caught.value.__cause__, RewardError)


def test_what_scores_depend_on_is_neither_weights_nor_the_weight():
    assert Plain(weight=3.0).measures() == {"type": "sharp_plain", "colour": "red", "words": "w.txt"}


def answer(scores):
    return checked("r", lambda images, prompts, metadata: scores)(
        torch.zeros(2, 3, 1, 1), ["a", "b"], [{}, {}]
    )


def test_a_checked_score_is_passed_on_without_gradients():
    parameter = torch.ones(2, requires_grad=True)
    given = []

    def score(*arguments):
        given.append(arguments)
        return Scores(parameter * 2)

    images, prompts, rows = torch.zeros(2, 3, 1, 1), ["a", "b"], [{"x": 1}, {}]
    found = checked("r", score)(images, prompts, rows)
    assert found.value.tolist() == [2, 2]
    assert not found.value.requires_grad
    ((copied, *others),) = given
    assert torch.equal(copied, images)
    assert others == [prompts, rows]


def test_a_reward_that_changes_its_arguments_changes_them_for_no_one_else():
    def spoiling(images, prompts, metadata):
        images.mul_(0)
        metadata[0]["include"].clear()
        metadata.clear()
        prompts[0] = "spoilt"
        return Scores(torch.zeros(1))

    images, prompts, rows = torch.ones(1, 3, 1, 1), ["a"], [{"include": [1]}]
    checked("r", spoiling)(images, prompts, rows)
    assert images.tolist() == [[[[1.0]]] * 3]
    assert (prompts, rows) == (["a"], [{"include": [1]}])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_an_image_that_is_not_finite_is_never_scored(value):
    images, calls = torch.zeros(3, 3, 2, 2), []
    images[1, 2, 0, 1] = images[2, 0, 0, 0] = value
    words = r"^the image for prompt 'b' is not finite, so it is not used \(2 of 3 images\): .*autoencoder"
    with pytest.raises(NotFinite, match=words) as caught:
        checked("r", lambda *_: calls.append(1))(images, ["a", "b", "c"], [{}] * 3)
    assert (caught.value.positions, calls) == ([1, 2], [])


def test_no_prompts_are_no_error():
    assert checked("r", lambda *_: Scores(torch.zeros(0)))(torch.zeros(0, 3, 1, 1), [], []).value.shape == (
        0,
    )


@pytest.mark.parametrize(
    ("scores", "words"),
    [
        (torch.zeros(2), "^reward 'r' returned Tensor, where Scores are expected$"),
        (Scores(torch.zeros(2), []), "^reward 'r' returned details as list, no dict$"),
        (Scores(torch.zeros(2), {"d": [0.0, 1.0]}), "^reward 'r' returned d as list, not as a tensor$"),
        (Scores(torch.zeros(3)), r"^reward 'r' returned value of shape \(3,\) for 2 images$"),
        (Scores(torch.zeros(2, 1)), r"^reward 'r' returned value of shape \(2, 1\) for 2 images$"),
        (
            Scores(torch.zeros(2), {"d": torch.zeros(1)}),
            r"^reward 'r' returned d of shape \(1,\) for 2 images$",
        ),
        (Scores(torch.tensor([0.0, torch.nan])), "^reward 'r' returned nan for prompt 'b'$"),
        (Scores(torch.tensor([-torch.inf, torch.inf])), "^reward 'r' returned -inf for prompt 'a'$"),
        (
            Scores(torch.tensor([0, 1e39], dtype=torch.float64)),
            r"^reward 'r' returned 1e\+39 for prompt 'b'$",
        ),
        (
            Scores(torch.zeros(2), {"d": torch.tensor([0, torch.inf])}),
            "^reward 'r' returned inf for prompt 'b'$",
        ),
    ],
)
def test_what_is_no_score_is_refused(scores, words):
    with pytest.raises(RewardError, match=words):
        answer(scores)


def test_the_positions_of_scores_that_are_not_finite_are_told():
    with pytest.raises(NotFinite) as caught:
        answer(Scores(torch.tensor([0.0, torch.nan])))
    assert caught.value.positions == [1]


def raises(error):
    def score(images, prompts, metadata):
        raise error

    return checked("r", score)


def test_an_image_that_the_reward_cannot_score_keeps_its_position():
    with pytest.raises(NotFinite, match=r"^reward 'r' has no score: too dark$") as caught:
        raises(NotFinite("too dark", [1]))(torch.zeros(2, 3, 1, 1), ["a", "b"], [{}, {}])
    assert caught.value.positions == [1]


def test_an_error_of_this_package_is_told_without_lines_of_code():
    with pytest.raises(RewardError, match=r"^reward 'r' failed on prompts such as 'a': no server$"):
        raises(RewardError("no server"))(torch.zeros(1, 3, 1, 1), ["a"], [{}])


@pytest.mark.parametrize(("prompts", "shown"), [(["a", "b"], "'a'"), ([], "''")])
def test_an_exception_is_named_and_kept_as_the_cause(prompts, shown):
    with pytest.raises(
        RewardError,
        match=f"^reward 'r' failed on prompts such as {shown}: ZeroDivisionError: division by zero\n",
    ) as caught:
        checked("r", lambda *_: 1 / 0)(torch.zeros(2, 3, 1, 1), prompts, [])
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
