"""The questions themselves: a check that cannot fail is none."""

from pathlib import Path

import pytest

from tests.contract.repo import templates_in, words
from tools.profile_play import task_times
from tools.role_readme import BEGIN, END, readme


def test_variables_are_told_from_constants_and_attributes() -> None:
    names, others = words(
        "{{ gateway_port | default(vllm_port) }} {{ hostvars[x].redis_y ~ lookup('vars', 'kafka_z') }}"
    )
    assert names == {"gateway_port", "vllm_port", "hostvars", "x", "lookup"}
    assert {"redis_y", "vars", "kafka_z"} <= others


def test_comments_text_and_backslashes_are_not_read() -> None:
    assert words("vllm_port {# {{ vllm_port }} #} {{ a | regex_search('\\.x\\(') }}")[0] == {"a"}


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        ({"when": "vllm_x | length > 0"}, ["{{ vllm_x | length > 0 }}"]),
        ({"when": ["a", "{{ b }}"]}, ["{{ a }}", "{{ b }}"]),
        ({"ansible.builtin.assert": {"that": ["a == b"], "fail_msg": "plain"}}, ["{{ a == b }}"]),
        ({"block": [{"name": "Say {{ x }}", "when": True}]}, ["Say {{ x }}"]),
    ],
)
def test_bare_expressions_and_templates_are_found(task: dict[str, object], expected: list[str]) -> None:
    assert list(templates_in(task)) == expected


def test_a_readme_keeps_what_was_written_by_hand(tmp_path: Path) -> None:
    role = tmp_path / "redis"
    (role / "meta").mkdir(parents=True)
    (role / "meta/argument_specs.yml").write_text(
        "argument_specs: {main: {short_description: A store, options: {redis_port: "
        "{type: int, default: 6379, description: [Where it listens., A | b.]}, "
        "redis_users: {type: list, elements: dict, default: [], description: Who may, options: "
        "{name: {type: str, required: true, description: The name}}}}}}"
    )
    (role / "README.md").write_text(f"# redis\n\nBefore.\n\n{BEGIN}\nold\n{END}\n\nAfter.\n")
    text = readme(role)
    assert "old" not in text
    assert text.startswith("# redis\n\nBefore.\n")
    assert text.endswith("\n\nAfter.\n")
    assert "| `redis_port` | int | `6379` | Where it listens. A \\| b. |" in text
    assert "| `redis_users[].name` | str | required | The name |" in text
    (role / "README.md").write_text(text)
    assert readme(role) == text


def test_the_time_of_a_task_is_read_from_the_recap() -> None:
    lines = ["vllm : run | Start -------------- 12.50s", "Gathering Facts ----- 1.00s", "TASKS RECAP ****", "ok: [a]"]
    assert list(task_times(lines)) == [("vllm", "run | Start", 12.5), ("(play)", "Gathering Facts", 1.0)]
