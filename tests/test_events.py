"""Events and their JSON form."""

import json

import pytest

from cnnlab import events
from cnnlab.events import Checkpointed, Evaluated, Failed, Finished, Progress, Restarted, Started
from cnnlab.recipe import CnnlabError, Recipe

ONE_OF_EACH = [
    Started(
        rank=0,
        world=2,
        recipe=Recipe(threads=1),
        pid=1,
        parameters=10,
        train_images=20,
        test_images=5,
        steps=3,
        first_step=0,
        threads=1,
        cores=[0, 1],
    ),
    Progress(
        rank=1,
        epoch=1,
        step=2,
        images=128,
        seconds=0.5,
        losses=[2.3, 2.1],
        accuracy=0.25,
        images_per_s=256.0,
        warming_up=True,
        spans=[["forward", 1.5, 2.0], ["communication", 1.75, 2.5]],
    ),
    Evaluated(rank=0, epoch=1, step=2, seconds=0.5, accuracy=0.5, loss=1.5, images=5),
    Finished(
        rank=0,
        steps=3,
        images=192,
        seconds=1.0,
        warmup_s=0.25,
        images_per_s=256.0,
        step_s=0.25,
        waiting_s=0.125,
        communication_s=None,
        compute_s=0.125,
        peak_memory_mib=300.0,
        accuracy=None,
        staleness=1.5,
    ),
    Checkpointed(rank=0, step=2, path="/tmp/step-00000002", took_s=0.1),
    Restarted(rank=1, error="the process was killed", attempt=1),
    Failed(rank=1, error="ValueError: no", traceback="Traceback ..."),
]


def test_there_is_an_example_of_each_kind():
    assert {type(event) for event in ONE_OF_EACH} == set(events.EVENT_TYPES.values())


@pytest.mark.parametrize("event", ONE_OF_EACH, ids=lambda event: type(event).__name__)
def test_an_event_survives_json(event):
    assert events.from_dict(json.loads(json.dumps(events.to_dict(event)))) == event


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"event": "Exploded"},
        {"rank": 0},
        {"event": "Failed", "rank": 0},
        {**events.to_dict(ONE_OF_EACH[-1]), "more": 1},
    ],
    ids=repr,
)
def test_values_that_are_not_an_event_are_rejected(values):
    with pytest.raises(CnnlabError, match="not an event of this version"):
        events.from_dict(values)


def test_reading_an_event_leaves_the_given_values_alone():
    values = events.to_dict(ONE_OF_EACH[0])
    events.from_dict(values)
    assert values == events.to_dict(ONE_OF_EACH[0])


def test_a_record_from_before_a_field_existed_gives_it_its_default():
    [finished] = [event for event in ONE_OF_EACH if isinstance(event, Finished)]
    values = events.to_dict(finished)
    del values["skipped_steps"]
    assert events.from_dict(values) == finished and finished.skipped_steps == 0
