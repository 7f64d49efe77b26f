"""Our items in somebody else's file: what is theirs stays byte for byte, what is odd is refused with the remedy."""

from typing import Any

import pytest
import yaml
from filter.citadel_merge import BEGIN, END, RefusalError, citadel_merge
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

JOB = {"job_name": "citadel-gateway", "scrape_interval": "15s", "file_sd_configs": [{"files": ["/etc/x/*.json"]}]}
JOBS = [{"path": "scrape_configs", "items": [JOB], "identity": "job_name"}]
RULES = [{"path": "rule_files", "items": ["/etc/prometheus/citadel/rules/*.yml"]}]
ROUTES = [{"path": "route.routes", "items": [{"receiver": "citadel-feed", "matchers": ['suite="citadel"']}]}]

DEBIAN = """\
# Sample config for Prometheus.
global:
  scrape_interval:     15s # odd spaces stay
rule_files:
  # - "first_rules.yml"

# What is scraped:
scrape_configs:
  # The job name is added as a label
  - job_name: 'prometheus'

    scrape_interval: 5s
    static_configs:
      - targets: ['localhost:9090']

  - job_name: node
    static_configs:
      - targets: ["localhost:9100"]
# the end
"""


def test_blocks_go_below_the_key_at_the_indentation_of_the_list() -> None:
    merged = citadel_merge(DEBIAN, [*JOBS, *RULES])
    lines = merged.splitlines()
    at = lines.index("scrape_configs:")
    assert lines[at + 1].startswith(f"  {BEGIN} scrape_configs")
    assert lines[at + 2] == "  - job_name: citadel-gateway"
    assert lines[at + 6].strip().startswith("-")
    assert lines[lines.index("rule_files:") + 2] == "  - /etc/prometheus/citadel/rules/*.yml"
    ours = [line for line in lines if line not in DEBIAN.splitlines()]
    assert [line for line in lines if line not in ours] == DEBIAN.splitlines()
    assert citadel_merge(merged) == DEBIAN


def test_a_list_without_indentation_and_our_route_first() -> None:
    text = "route:\n  receiver: a\n  routes:\n  # first\n  - receiver: b\n    continue: true\nreceivers:\n- name: a\n"
    merged = citadel_merge(text, [*ROUTES, {"path": "receivers", "items": [{"name": "x"}], "identity": "name"}])
    routes = yaml.safe_load(merged)["route"]["routes"]
    assert [route["receiver"] for route in routes] == ["citadel-feed", "b"]
    assert f"receivers:\n{BEGIN} receivers" in merged
    assert citadel_merge(merged) == text


def test_a_missing_key_is_made() -> None:
    merged = citadel_merge("global: {}\n", [*JOBS, *RULES])
    assert yaml.safe_load(merged) == {"global": {}, "scrape_configs": [JOB], "rule_files": RULES[0]["items"]}
    assert citadel_merge(merged) == "global: {}\n"
    below = citadel_merge("route:\n    receiver: a\n", ROUTES)
    assert yaml.safe_load(below)["route"]["routes"][0]["receiver"] == "citadel-feed"
    assert "\n    routes:\n" in below
    assert citadel_merge(below) == "route:\n    receiver: a\n"


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n", "a: 1", "scrape_configs:", "scrape_configs: # mine\n"])
def test_short_files_come_back_as_they_were(text: str) -> None:
    merged = citadel_merge(text, JOBS)
    assert yaml.safe_load(merged)["scrape_configs"] == [JOB]
    assert citadel_merge(merged) == text
    assert merged.endswith("\n") == (text.endswith("\n") or text == "")


def test_line_ends_of_windows_stay() -> None:
    text = "scrape_configs:\r\n- job_name: a\r\n"
    merged = citadel_merge(text, JOBS)
    assert "\n" not in merged.replace("\r\n", "")
    assert citadel_merge(merged) == text


def test_a_block_is_replaced_and_one_that_is_no_longer_wanted_goes() -> None:
    first = citadel_merge(DEBIAN, [*JOBS, *RULES])
    other = [{"path": "scrape_configs", "items": [{"job_name": "citadel-node"}], "identity": "job_name"}]
    assert citadel_merge(first, other) == citadel_merge(DEBIAN, other)
    assert citadel_merge(first, [{"path": "scrape_configs", "items": []}]) == DEBIAN


@pytest.mark.parametrize(
    ("text", "sections", "words"),
    [
        ("scrape_configs: []\n", JOBS, "scrape_configs is a list in brackets; write one item a line"),
        ("scrape_configs: [{job_name: a}]\n", JOBS, "a list in brackets"),
        ("scrape_configs:\n  [{job_name: a}]\n", JOBS, "a list in brackets"),
        ("{scrape_configs: []}\n", JOBS, "the file is written in braces"),
        ("route: {receiver: a}\n", ROUTES, "route is written in braces; write one key a line"),
        ("a: 1\na: 2\nscrape_configs:\nscrape_configs:\n", JOBS, "scrape_configs 2 times: keep one"),
        ("scrape_configs: text\n", JOBS, "scrape_configs is no list"),
        ("- a\n", JOBS, "the file is no mapping"),
        ("scrape_configs: &jobs\n- job_name: a\n", JOBS, "goes on with ': &jobs'; put what belongs to it on lines"),
        ("scrape_configs: !!seq\n- job_name: a\n", JOBS, "do without anchors and tags"),
        ("a: 1\n---\nb: 1\n", JOBS, "can be extended"),
        ("a: 1\n...\n", JOBS, "'...': delete that line"),
        ("scrape_configs:\n\t- job_name: a\n", JOBS, "is no YAML that can be extended"),
        ("a: '\x85'\n", JOBS, "U+0085"),
        ("receivers: []\n", ROUTES, "has no route: route.routes has nowhere to go"),
        ("", ROUTES, "has no route"),
        ("a: 1\r# b\n", JOBS, "carriage return"),
        ("scrape_configs:\n- job_name: citadel-gateway\n", JOBS, "job_name citadel-gateway, which is not ours: "),
        ("rule_files:\n- /etc/prometheus/citadel/rules/*.yml\n", RULES, "already, not put there by us: delete it"),
        (f"a: 1\n{BEGIN} scrape_configs\nb: 2\n", JOBS, "without its counterpart: delete what is left"),
        (f"a: 1\n  {END} scrape_configs\n", JOBS, "without its counterpart"),
        ("a: |\n  text", JOBS, "end the file with one"),
    ],
)
def test_what_cannot_be_extended_is_refused_with_the_remedy(
    text: str, sections: list[dict[str, Any]], words: str
) -> None:
    with pytest.raises(RefusalError) as refused:
        citadel_merge(text, sections, "/etc/prometheus/prometheus.yml")
    assert "/etc/prometheus/prometheus.yml" in str(refused.value)
    assert words in str(refused.value)


def test_strings_come_out_as_strings() -> None:
    items = [{"job_name": "on", "labels": {"a": "1", "b": "1.0", "c": "yes", "d": "0x1", "e": "", "f": "a: b # c"}}]
    merged = citadel_merge("a: 1\n", [{"path": "scrape_configs", "items": items, "identity": "job_name"}])
    assert yaml.safe_load(merged)["scrape_configs"] == items


# Files as operators write them: comments, blank lines, both ways to indent a list, quotes, block text, any order.
WORDS = st.text("abcxyz0123 :#'\"{}[]&*!|>%@`,é-", max_size=12)
SCALARS = st.one_of(
    st.sampled_from(["1", "15s", "true", "~", "'it''s'", '"a # b"', "http://x:1/y", "a#b", "[]", "{a: 1}", "[1, 'b']"]),
    WORDS.map(lambda text: yaml.safe_dump(text, default_style='"', width=1000).strip()),
)
NOISE = st.lists(st.sampled_from(["", "# comment", "  # indented: [", "    # - job_name: off", "#"]), max_size=2)


@st.composite
def lists(draw: st.DrawFn, key: str) -> list[str]:
    margin = draw(st.sampled_from(["", "  ", "    "]))
    lines = [draw(st.sampled_from([f"{key}:", f"'{key}':", f"{key}:   # mine", f'"{key}" :']))]
    for number in range(draw(st.integers(0, 3))):
        lines += draw(NOISE)
        lines.append(f"{margin}- job_name: other-{number}")
        lines += [f"{margin}  key_{index}: {value}" for index, value in enumerate(draw(st.lists(SCALARS, max_size=2)))]
        if draw(st.booleans()):
            lines += [
                f"{margin}  text: |{draw(st.sampled_from(['', '-', '+']))}",
                f"{margin}    one",
                "",
                f"{margin}    two",
            ]
        lines += draw(NOISE)
    return lines


@st.composite
def files(draw: st.DrawFn) -> str:
    parts = [[f"other_{number}: {draw(SCALARS)}"] for number in range(draw(st.integers(0, 3)))]
    parts += [draw(lists(key)) for key in draw(st.sets(st.sampled_from(["scrape_configs", "rule_files", "third"])))]
    lines = draw(st.sampled_from([[], ["---"], ["# head"], ["%YAML 1.1", "---"]]))
    for part in draw(st.permutations(parts)):
        lines = [*lines, *part, *draw(NOISE)]
    end = draw(st.sampled_from(["\n", "\n", "\r\n"]))
    return end.join(lines) + draw(st.sampled_from([end, end, "", end * 2]))


VALUES = st.recursive(
    st.one_of(st.text(max_size=8), st.integers(), st.booleans(), st.none()),
    lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(st.text(max_size=5), inner, max_size=2)),
    max_leaves=5,
)
ITEMS = st.lists(st.dictionaries(st.text(max_size=6), VALUES, max_size=3), max_size=3).map(
    lambda items: [{"job_name": f"citadel-{number}", **item} for number, item in enumerate(items)]
)


@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(files(), ITEMS, ITEMS)
def test_merged_it_says_theirs_and_ours_and_taken_out_it_is_what_it_was(
    text: str, jobs: list[dict[str, Any]], rules: list[dict[str, Any]]
) -> None:
    sections = [{"path": "scrape_configs", "items": jobs}, {"path": "rule_files", "items": rules}]
    try:
        merged = citadel_merge(text, sections)
    except RefusalError as refused:
        # Of what the generator makes this alone is refused, and rightly.
        if "end the file with one" not in str(refused):
            raise
        return
    wanted = yaml.safe_load(text) or {}
    for key, items in (("scrape_configs", jobs), ("rule_files", rules)):
        if items:
            wanted[key] = items + (wanted.get(key) or [])
    assert (yaml.safe_load(merged) or {}) == wanted
    assert citadel_merge(merged, sections) == merged
    assert citadel_merge(merged) == text


def test_a_fault_is_named_by_its_place_and_nobody_s_line_is_quoted() -> None:
    with pytest.raises(RefusalError, match=r"line \d+, column \d+") as refused:
        citadel_merge("global:\n  smtp_auth_password: s3cr3t: x\n", JOBS)
    assert "s3cr3t" not in str(refused.value)
