import json

from gralora.recipe.tasks import support_rows


def test_the_held_out_rows_of_the_packaged_task_are_combinations_not_trained_on():
    def key(row, *names):
        answer = json.loads(row["completion"])
        return tuple(answer[name] for name in names)

    train, held_out = support_rows("train"), support_rows("eval")
    for names in (("product", "issue", "urgency"), ("order",)):
        assert not {key(row, *names) for row in train} & {key(row, *names) for row in held_out}
    for name in ("product", "issue", "urgency"):
        assert {key(row, name) for row in held_out} <= {key(row, name) for row in train}
    for row in (*train, *held_out):
        answer = json.loads(row["completion"])
        assert answer["product"] in row["prompt"]
        assert answer["order"] in row["prompt"]
    assert support_rows("train") == train
