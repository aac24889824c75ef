import json

import pytest
import torch

from siftmasks.headline_digits import digits, permuted, rotated


@pytest.fixture(scope="module")
def found():
    return digits(100, counts=(1, 8), fractions=(0.0, 0.5), densities=(0.3,))


def test_merging_collapses_and_masks_recover(found):
    accuracy = {method: scores[1] for method, scores in found["accuracy"].items()}
    assert found["accuracy"]["ft_merge"][0] == 1.0
    assert accuracy["local_fine_tuning"] > 0.98
    assert accuracy["local_sift"] > 0.98 * accuracy["local_fine_tuning"]
    assert accuracy["ft_merge"] < 0.5
    assert accuracy["sift_masks"] > accuracy["ft_merge"] + 0.2
    assert accuracy["sift_masks_count"] > accuracy["sift_masks"] + 0.05


def test_sign_alignment_alone_does_not_help(found):
    accuracy = {method: scores[1] for method, scores in found["accuracy"].items()}
    assert accuracy["sift_merge"] < accuracy["ft_merge"] + 0.1
    assert accuracy["ties"] < accuracy["ft_merge"] + 0.15


def test_deleted_tasks_are_forgotten_and_the_others_kept(found):
    deletion = found["deletion"]
    before, after = deletion["held_in"]["sift_masks_count"]
    assert after > before - 0.05
    assert deletion["held_out"]["sift_masks_count"][1] < before - 0.2
    assert deletion["differing"] == 0
    assert found["float_sum"]["share_different"] > 0.05
    assert found["saturated"] == 0


def test_result_is_json(found):
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_seed_decides_tasks_and_base_model():
    first, again, other = permuted(5, 2, hidden=16), permuted(5, 2, hidden=16), permuted(6, 2, hidden=16)
    for name, weight in first.model.state_dict().items():
        assert torch.equal(weight, again.model.state_dict()[name])
    labels = [[example.fields["label"] for example in setting.train["task001"]] for setting in (first, again, other)]
    assert labels[0] == labels[1] != labels[2]


def test_a_task_does_not_change_when_there_are_more():
    few, many = permuted(5, 2, hidden=16), permuted(5, 4, hidden=16)
    for task in few.train:
        for one, same in zip(few.train[task], many.train[task], strict=True):
            assert torch.equal(one.fields["image"], same.fields["image"])
            assert one.fields["label"] == same.fields["label"]


def test_rotated_tasks_have_two_labels_and_test_images_that_nobody_trained_on():
    setting = rotated(5, 6, hidden=16)
    assert {len({example.fields["label"] for example in examples}) for examples in setting.train.values()} == {2}

    def images(examples):
        return {example.fields["image"].numpy().tobytes() for task in examples.values() for example in task}

    assert not images(setting.train) & images(setting.test)
    assert {len(examples) for examples in setting.test.values()} == {32}
