"""A ratio of decisions must not flatter us: neither by a peer's longer output nor by one that answers otherwise."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from edge_agent.contract.task import parse_task
from tests.bench.decision_model import check_answers
from tests.bench.decision_ratios import (
    backlog_ms,
    corrected_ratio,
    equal_output_ms,
    processor_ratio,
    raw_ratio,
    token_ms,
    without_grammar_ratio,
)
from tests.bench.decision_rows import (
    LLAMA,
    LLAMA_REMEMBERING,
    LLAMA_SLOTS,
    OGENAI,
    OURS,
    backlog_figures,
    engine_figures,
    own_figures,
    plant_figures,
    ratio_figures,
    same_answers,
)
from tests.bench.decision_runs import (
    Answered,
    Backlog,
    EngineRun,
    Job,
    Turns,
    fault_line,
    parse_run,
    run_program,
    take_turns,
)
from tests.bench.decision_task import INSTRUCTION, Prompt, plant_events, with_long_prefix
from tests.bench.decisions_page import FIGURES, PAGE, as_json, committed_decisions, machine, write_page
from tests.bench.figures import Figure, Target, fallen_back
from tests.bench.made import REFERENCE
from tests.bench.measured_run import CommandFailedError

TASK = (REFERENCE / "task" / "task.yaml").read_text("utf-8")
ANSWER = '{"category":"thermal","severity":"low","action":"log","escalate":false,"component":"fan"}'
GOAL = Target(6.0, "higher")


def answered(latency_ms: float, tokens: int, *, generate_ms: float = 0.0, text: str = ANSWER) -> Answered:
    prompt_ms, prompt_tokens = (latency_ms - generate_ms, 80) if generate_ms else (0.0, 0)
    return Answered(latency_ms, prompt_ms, generate_ms, prompt_tokens, tokens, text)


def run(*answers: Answered, **parts: Any) -> EngineRun:
    return EngineRun(**{"first_decision_s": 0.5, "peak_rss_bytes": 200, "answers": answers, **parts})


def turns(**runs: EngineRun) -> Turns:
    names = {"ours": OURS, "llama": LLAMA, "slots": LLAMA_SLOTS, "ogenai": OGENAI}
    return Turns({names[name]: [found] for name, found in runs.items()}, {})


def by_key(figures: Any) -> dict[str, Figure]:
    return {figure.key.removeprefix("135m."): figure for figure in figures}


OUR_RUN = run(answered(40.0, 30), answered(60.0, 30))
# 59 further tokens at 5 ms, after 105 ms that the prompt took.
THEIR_RUN = run(answered(400.0, 60, generate_ms=295.0), answered(400.0, 60, generate_ms=295.0), plain_token_ms=3.0)


# --- equal output


def test_the_first_token_comes_with_the_prompt_and_takes_no_time_of_its_own() -> None:
    assert token_ms(THEIR_RUN.answers) == pytest.approx(5.0)


def test_a_peer_that_writes_more_tokens_does_not_pay_for_them() -> None:
    assert raw_ratio(THEIR_RUN, OUR_RUN) == pytest.approx(8.0)
    assert equal_output_ms(THEIR_RUN.answers, OUR_RUN.answers) == pytest.approx(250.0)
    assert corrected_ratio(THEIR_RUN, OUR_RUN) == pytest.approx(5.0)


def test_a_peer_that_writes_fewer_tokens_pays_for_those_that_are_missing() -> None:
    short = run(answered(200.0, 20, generate_ms=95.0), answered(200.0, 20, generate_ms=95.0))
    assert corrected_ratio(short, OUR_RUN) == pytest.approx((200 + 10 * 5) / 50)


def test_an_engine_that_tells_no_times_is_taken_as_measured() -> None:
    silent = run(answered(100.0, 60), answered(100.0, 60))
    assert corrected_ratio(silent, OUR_RUN) == raw_ratio(silent, OUR_RUN) == pytest.approx(2.0)


def test_a_free_grammar_is_cheaper_than_the_correction() -> None:
    assert without_grammar_ratio(THEIR_RUN, OUR_RUN) == pytest.approx((105 + 29 * 3) / 50)
    assert without_grammar_ratio(OUR_RUN, OUR_RUN) is None


def test_processor_time_is_compared_where_both_told_it() -> None:
    ours, theirs = run(*OUR_RUN.answers, processor_s=0.1), run(*THEIR_RUN.answers, processor_s=0.4)
    assert processor_ratio(theirs, ours) == pytest.approx(4.0)
    assert processor_ratio(THEIR_RUN, ours) is None


def test_runs_of_different_events_are_never_compared() -> None:
    with pytest.raises(ValueError, match="zip"):
        corrected_ratio(run(answered(100.0, 60)), OUR_RUN)


# --- backlog


def test_slots_that_answer_together_share_the_time_of_a_token() -> None:
    ours = run(backlog=Backlog(0.1, (30, 30)), answers=OUR_RUN.answers)
    slots = run(backlog=Backlog(0.5, (60, 60), token_ms=2.0), answers=THEIR_RUN.answers)
    assert backlog_ms(slots) == pytest.approx(250.0)
    assert backlog_ms(slots, equal_to=ours) == pytest.approx(250 - 30 * 2)
    assert backlog_ms(THEIR_RUN, equal_to=ours) == pytest.approx(250.0)


def test_the_better_of_the_peers_two_ways_counts() -> None:
    ours = run(backlog=Backlog(0.1, (30, 30)), answers=OUR_RUN.answers)
    slow = run(backlog=Backlog(2.0, (60, 60), token_ms=2.0), answers=THEIR_RUN.answers)
    found = by_key(backlog_figures("135m", turns(ours=ours, llama=THEIR_RUN, slots=slow).runs))
    assert found["backlog_vs_llamacpp_raw"].value == pytest.approx(400 / 50)
    assert found["backlog_vs_llamacpp_corrected"].value == pytest.approx(250 / 50)


def test_without_slots_there_is_no_figure_of_a_backlog() -> None:
    assert not list(backlog_figures("135m", turns(ours=OUR_RUN, llama=THEIR_RUN).runs))


# --- a plant's events


def test_at_a_plant_the_better_of_the_peers_memories_counts() -> None:
    remembering = run(*(answered(300.0, 60, generate_ms=295.0) for _ in range(2)))
    both = {OURS: [OUR_RUN, OUR_RUN], LLAMA: [THEIR_RUN, THEIR_RUN], LLAMA_REMEMBERING: [remembering, THEIR_RUN]}
    found = by_key(plant_figures("135m", Turns(both, {})))
    assert found["plant_vs_llamacpp_raw"].spread == (300 / 50, 400 / 50)
    assert found["plant_vs_llamacpp_corrected"].target == GOAL
    assert found["plant_llamacpp_ms"].value == pytest.approx(400.0)  # each of its ways is shown as it was


def test_a_plant_has_few_machines_and_the_same_events_for_everyone() -> None:
    events = plant_events(60)
    assert len({event["machine"] for event in events}) < 10
    assert plant_events(60) == events


# --- figures


def test_the_target_is_met_at_equal_output_or_not_at_all() -> None:
    figures = by_key(ratio_figures("135m", turns(ours=OUR_RUN, llama=THEIR_RUN)))
    assert figures["decisions_vs_llamacpp_raw"].met is None
    assert figures["decisions_vs_llamacpp_corrected"].met is False
    assert figures["rss_vs_llamacpp"].value == 1.0


def test_a_peer_that_is_not_there_is_no_victory() -> None:
    figures = by_key(ratio_figures("135m", turns(ours=OUR_RUN)))
    assert figures["decisions_vs_ogenai"].value is None
    assert figures["decisions_vs_ogenai"].met is False


def test_a_peer_that_failed_says_why() -> None:
    figures = by_key(ratio_figures("135m", Turns({OURS: [OUR_RUN]}, {OGENAI: "no such model"})))
    assert figures["decisions_vs_ogenai"].note == "no such model"


def test_the_trained_model_has_no_targets() -> None:
    figures = ratio_figures("reference", turns(ours=OUR_RUN, llama=THEIR_RUN))
    assert all(figure.target is None for figure in figures)


def test_an_engine_that_keeps_no_answers_has_no_speedup() -> None:
    assert by_key(own_figures("135m", {OURS: [OUR_RUN]}))["cache_speedup"].value is None
    keeping = run(*OUR_RUN.answers, repeats_per_s=2000.0)
    assert by_key(own_figures("135m", {OURS: [keeping]}))["cache_speedup"].value == pytest.approx(100.0)


def test_prompts_that_another_tokenizer_spells_otherwise_are_told() -> None:
    odd = run(*THEIR_RUN.answers, prompts_differ=3)
    figures = by_key(engine_figures("135m", turns(ours=OUR_RUN, llama=odd).runs))
    assert figures["llamacpp_per_s"].note.startswith("3 prompts are other tokens")
    assert not figures["ours_per_s"].note
    assert "ours_prompt_ms" not in figures  # what an engine does not tell is not shown as nothing


def test_equal_weights_answer_alike() -> None:
    other = run(answered(1.0, 30), answered(1.0, 30, text="{}"))
    assert same_answers(other, OUR_RUN) == 50.0


# --- answers


@pytest.mark.parametrize(
    "text", [ANSWER + " ", ANSWER.replace(",", ", "), ANSWER.replace("thermal", "warm"), ANSWER[:-1], "{}"]
)
def test_an_engine_that_answers_something_else_is_not_compared(text: str) -> None:
    task = parse_task(TASK)
    check_answers(task, OUR_RUN)
    with pytest.raises(CommandFailedError, match="answered"):
        check_answers(task, run(answered(1.0, 30, text=text)))


def test_an_engine_that_fails_leaves_the_others_their_turns() -> None:
    order = []

    def works() -> EngineRun:
        order.append("works")
        return OUR_RUN

    def fails() -> EngineRun:
        order.append("fails")
        raise CommandFailedError("loading\nout of memory")

    found = take_turns({"fails": fails, "works": works}, 2, lambda found: None)
    assert order == ["fails", "works", "works"]
    assert found.failed == {"fails": "out of memory"}
    assert found.runs == {"works": [OUR_RUN, OUR_RUN]}


def test_a_fault_is_named_by_its_own_line_and_not_by_what_is_dumped_after_it() -> None:
    assert fault_line("Traceback\nRuntimeError: no token\n<state>\n</state>") == "RuntimeError: no token"
    assert fault_line("loading\nout of memory\n") == "out of memory"


def test_a_run_that_fails_its_check_is_no_run() -> None:
    def refuse(found: EngineRun) -> None:
        raise CommandFailedError("answered '{}'")

    assert take_turns({"ours": lambda: OUR_RUN}, 3, refuse).runs == {}


# --- processes


def test_the_start_of_the_interpreter_counts_for_the_first_decision() -> None:
    program = (
        "import json, sys, time\n"
        "print('a warning')\n"
        "print(json.dumps({'first_decision_s': time.monotonic() - float(sys.argv[2]), 'peak_rss_bytes': 7,"
        " 'answers': [], 'backlog': {'seconds': 2.0, 'tokens': [3, 4]}}))"
    )
    started_s = time.monotonic()
    found = run_program([sys.executable, "-c", program], os.environ)
    assert 0 < found.first_decision_s <= time.monotonic() - started_s
    assert found.backlog == Backlog(2.0, (3, 4))


def test_a_program_that_ends_badly_is_told_with_its_own_words() -> None:
    with pytest.raises(CommandFailedError, match="no such model"):
        run_program([sys.executable, "-c", "import sys; sys.exit('no such model')"], os.environ)


def test_answers_survive_the_way_between_processes() -> None:
    printed = json.dumps({"first_decision_s": 0.5, "peak_rss_bytes": 200, "answers": [vars(answered(40.0, 30))]})
    assert parse_run(f"talk\n{printed}\n") == run(answered(40.0, 30))


def test_the_job_leaves_room_for_the_longest_prompt_and_answer() -> None:
    short, long = Prompt({"text": "a"}, "a", [1]), Prompt({"text": "b"}, "b", [1] * 9)
    job = Job("triage", [short], [short], [long], [], 1, 100, "root", "re", 2)
    assert json.loads(job.as_json())["context_tokens"] == 109
    assert json.loads(job.as_json())["backlog"][0]["event"] == {"text": "b"}


# --- task and page


def test_the_long_prefix_changes_nothing_but_the_prefix() -> None:
    task, reference = parse_task(with_long_prefix(TASK)), parse_task(TASK)
    assert task.prompt.prefix == INSTRUCTION
    assert task.limits == reference.limits
    assert task.output_fields == reference.output_fields
    assert task.prompt.event == reference.prompt.event
    assert list(task.output["properties"]) == [field.name for field in reference.output_fields]


def figure(value: float | None) -> Figure:
    return Figure("135m.decisions_vs_llamacpp_corrected", "decisions", value, "x", GOAL, note="" if value else "none")


def test_the_file_has_a_section_a_model_with_plain_numbers() -> None:
    found = json.loads(as_json([figure(6.5)], {"cores": 2, "libraries": {"numpy": "2"}}))
    assert found["135m"]["decisions_vs_llamacpp_corrected"] == 6.5
    assert found["135m"]["met"] == {"decisions_vs_llamacpp_corrected": True}
    assert found["versions"] == {"numpy": "2"}
    assert found["machine"] == {"cores": 2}
    assert "0.5b" not in found


@pytest.mark.parametrize(("now", "fell"), [(5.6, False), (5.4, True), (None, True)])
def test_a_ratio_of_the_committed_page_may_fall_by_fifteen_percent(
    tmp_path: Path, now: float | None, *, fell: bool
) -> None:
    write_page([figure(6.5)], machine(), ["--model", "all"], tmp_path)
    assert bool(fallen_back(committed_decisions(tmp_path / FIGURES), [figure(now)])) is fell


def test_a_figure_that_is_absent_on_the_committed_page_cannot_fall_back(tmp_path: Path) -> None:
    write_page([figure(None)], machine(), ["--model", "all"], tmp_path)
    assert not fallen_back(committed_decisions(tmp_path / FIGURES), [figure(0.1)])
    assert committed_decisions(tmp_path / "absent.json") == {}


def test_the_page_names_the_peers_versions(tmp_path: Path) -> None:
    write_page([figure(6.5)], machine(), ["--model", "all"], tmp_path)
    page = (tmp_path / PAGE).read_text()
    assert "| decisions | 6.50 x | >= 6 x | yes |" in page
    assert "onnxruntime-genai 0." in page
    assert "llama-cpp-python 0." in page
    assert "make bench DECISIONS_ARGS='--model all'" in page
    assert "$targets" not in page
