"""Conversations: nothing that a row says is lost without a word, and every answer that is trained on ends where generation stops."""

import json
from pathlib import Path

import pytest
from data_files import labelled, spec_of, talk, write_lines

from dataflex.backends.datasets.conversations import to_messages
from dataflex.backends.datasets.encode import encode_sft
from dataflex.backends.datasets.find import find_datasets
from dataflex.backends.datasets.rendering import chat_format
from dataflex.backends.datasets.rows import load_rows
from dataflex.backends.templates import BUILT_IN, fit_tokenizer
from dataflex.errors import ConfigError
from dataflex.testing.tiny import CHAT_TEMPLATE, tiny_tokenizer
from dataflex.utils.logging import warn_once

CALL = {"type": "function", "function": {"name": "area", "arguments": {"r": 2}}}
TOOL = {"type": "function", "function": {"name": "area", "parameters": {"type": "object", "properties": {"r": {"type": "number"}}}}}
# As Qwen3's: calls, tools, and thoughts of the answers that follow the last question.
THINKING = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content and loop.index0 > ns.last %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<call>{{ call.function | tojson }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As DeepSeek's: arguments are joined to text.
TEXT_CALLS = CHAT_TEMPLATE.replace(
    "{{ message['content'] }}", "{{ message.content }}{% for c in message.tool_calls or [] %}{{ c.function.name + c.function.arguments }}{% endfor %}"
)
# As GLM-4's: nothing ends an answer but the mark of the next turn.
GLM = "<s>{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"


@pytest.fixture(autouse=True)
def _each_warning_anew():
    import datasets

    datasets.disable_progress_bars()
    warn_once.cache_clear()


def chat(*turns, **row):
    """A row in OpenAI's format; a turn is (role, content) or a whole message."""
    return {"messages": [turn if isinstance(turn, dict) else dict(zip(("role", "content"), turn, strict=True)) for turn in turns], **row}


def said(content="", **fields):
    return {"role": "assistant", "content": content, **fields}


def encoded(folder, rows, template=CHAT_TEMPLATE, tokenizer=None, **options):
    """(rows left out with reasons, the labelled runs of each row)."""
    tokenizer = tokenizer or tiny_tokenizer(template)
    write_lines(folder / "d.jsonl", rows)
    data = encode_sft(find_datasets(["d.jsonl"], folder, stage="sft"), tokenizer, cutoff_len=500, **options)
    return data.dropped, [labelled(data, tokenizer, row) for row in range(len(data.dataset))]


GOOD = chat(("user", "x"), ("assistant", "y"))


class TestToolCalls:
    """Inputs as in OpenAI's and LLaMA-Factory's files."""

    def row(self, content="", call=CALL, **row):
        return chat(
            ("user", "area?"),
            said(content, tool_calls=[call]),
            {"role": "tool", "content": "12.56", "tool_call_id": "1"},
            ("assistant", "12.56"),
            **row,
        )

    @pytest.mark.parametrize("content", ["", None, [{"type": "text", "text": ""}]])
    def test_a_template_that_does_not_write_them_is_named(self, tmp_path, content):
        dropped, targets = encoded(tmp_path, [self.row(content), GOOD])
        assert dropped == {"the chat template does not write tool_calls": 1} and targets == [["y<|im_end|>\n"]]

    @pytest.mark.parametrize("content", ["", None])
    @pytest.mark.parametrize("arguments", [{"r": 2}, '{"r": 2}'], ids=["object", "text"])
    @pytest.mark.parametrize("wrapped", [True, False])
    def test_they_are_written(self, tmp_path, content, arguments, wrapped):
        function = {"name": "area", "arguments": arguments}
        row = self.row(content, {"type": "function", "id": "1", "function": function} if wrapped else function)
        expected = '<call>{"name": "area", "arguments": {"r": 2}}</call><|im_end|>\n'
        assert encoded(tmp_path, [row], THINKING) == ({}, [[expected, "12.56<|im_end|>\n"]])
        assert encoded(tmp_path, [row], TEXT_CALLS) == ({}, [['area{"r": 2}<|im_end|>\n', "12.56<|im_end|>\n"]])

    def test_text_beside_a_call_stays(self, tmp_path):
        _, ((first, _),) = encoded(tmp_path, [self.row("Let me see.")], THINKING)
        assert first.startswith("Let me see.<call>")

    def test_the_older_function_call_is_not_lost(self, tmp_path):
        row = chat(("user", "area?"), said(None, function_call={"name": "area", "arguments": "{}"}))
        assert encoded(tmp_path, [row, GOOD], THINKING)[0] == {"the chat template does not write function_call": 1}

    @pytest.mark.parametrize("calls", [["area"], [{"name": ""}], [{"function": "area"}], "area"])
    def test_what_is_no_call_is_malformed(self, tmp_path, calls):
        assert encoded(tmp_path, [chat(("user", "q"), said(tool_calls=calls)), GOOD], THINKING)[0] == {"malformed": 1}

    call_turns = (("human", "area?"), ("function_call", '{"name": "area", "arguments": {"r": 2}}'), ("observation", "12.56"), ("gpt", "12.56"))

    def test_function_call_turns_are_calls_where_the_template_writes_calls(self, tmp_path):
        expected = '<call>{"name": "area", "arguments": {"r": 2}}</call><|im_end|>\n'
        assert encoded(tmp_path, [talk(self.call_turns)], THINKING) == ({}, [[expected, "12.56<|im_end|>\n"]])

    def test_and_text_elsewhere(self, tmp_path):
        text = self.call_turns[1][1]
        assert encoded(tmp_path, [talk(self.call_turns)]) == ({}, [[f"{text}<|im_end|>\n", "12.56<|im_end|>\n"]])
        broken = [("human", "q"), ("function_call", "no JSON")]
        assert encoded(tmp_path, [talk(broken)], THINKING) == ({}, [["no JSON<|im_end|>\n"]])

    def test_several_calls_and_thoughts_before_them(self, tmp_path):
        text = '<think>\nhm\n</think>\n\n[{"name": "f", "arguments": {}}, {"name": "g", "arguments": {}}]'
        _, (targets,) = encoded(tmp_path, [talk([("human", "q"), ("function_call", text)])], BUILT_IN["chatml"])
        assert targets == ["<think>\nhm\n</think>\n\nAction: f\nAction Input: {}\nAction: g\nAction Input: {}<|im_end|>\n"]

    @pytest.mark.parametrize("template", sorted(BUILT_IN))
    def test_what_a_tool_says_is_no_answer_in_a_built_in_template(self, tmp_path, template):
        tokenizer = tiny_tokenizer(BUILT_IN[template])
        write_lines(tmp_path / "d.jsonl", [talk(self.call_turns)])
        text = tokenizer.decode(encode_sft(find_datasets(["d.jsonl"], tmp_path, stage="sft"), tokenizer, cutoff_len=500).dataset[0]["input_ids"])
        written = {"chatml": "<|im_start|>tool\n12.56", "default": "Human: 12.56", "alpaca": "### Instruction:\n12.56"}[template]
        answer = {"chatml": "<|im_start|>assistant\n", "default": "Assistant:", "alpaca": "### Response:\n"}[template]
        assert text.count(f"{written}<|im_end|>" if template != "alpaca" else f"{written}\n\n") == 1 and text.count(answer) == 2

    def test_a_template_that_leaves_out_a_role_is_named(self, tmp_path):
        deaf = CHAT_TEMPLATE.replace("{% for message in messages %}", "{% for message in messages if message.role in ('user', 'assistant') %}")
        rows = [talk(self.call_turns), talk([("system", "s"), ("human", "q"), ("gpt", "a")]), GOOD_TALK]
        reasons = {"the chat template does not write turns of role tool": 1, "the chat template does not write turns of role system": 1}
        assert encoded(tmp_path, rows, deaf)[0] == reasons


GOOD_TALK = talk([("human", "x"), ("gpt", "y")])


class TestTools:
    @pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL]), [TOOL["function"]], json.dumps(TOOL["function"]), [json.dumps(TOOL)]])
    @pytest.mark.parametrize("shape", ["openai", "sharegpt", "alpaca"])
    def test_they_reach_the_template(self, tmp_path, tools, shape):
        row = {"openai": GOOD, "sharegpt": GOOD_TALK, "alpaca": {"instruction": "x", "output": "y"}}[shape] | {"tools": tools}
        tokenizer = tiny_tokenizer(THINKING)
        write_lines(tmp_path / "d.jsonl", [row])
        data = encode_sft(find_datasets(["d.jsonl"], tmp_path, stage="sft"), tokenizer, cutoff_len=500)
        assert tokenizer.decode(data.dataset[0]["input_ids"]).startswith(f"<|im_start|>system\n{json.dumps([TOOL])}<|im_end|>\n<|im_start|>user\nx")
        assert labelled(data, tokenizer) == ["y<|im_end|>\n"]
        with pytest.raises(ConfigError, match=r"1 x the chat template does not write tools \(of the row\)"):
            encoded(tmp_path, [row])

    @pytest.mark.parametrize("tools", [None, [], "", "[]"])
    def test_none(self, tmp_path, tools):
        assert encoded(tmp_path, [{**GOOD, "tools": tools}])[0] == {}

    @pytest.mark.parametrize(
        ("tools", "message"),
        [
            ("{", "is text that is not valid JSON"),
            ([3], "holds a number, not a tool with a name"),
            ([{"type": "function"}], "holds an object, not a tool"),
        ],
    )
    def test_what_is_no_tool_is_refused_with_its_line(self, tmp_path, tools, message):
        with pytest.raises(ConfigError, match=rf"d\.jsonl:2: dataset: column 'tools' {message}"):
            encoded(tmp_path, [GOOD, {**GOOD, "tools": tools}])

    def test_by_dataset_info(self, tmp_path):
        columns = {"messages": "talk", "tools": "functions"}
        spec = spec_of(tmp_path, [{"talk": GOOD["messages"], "functions": [TOOL]}], formatting="openai", columns=columns)
        assert labelled(encode_sft([spec], tiny_tokenizer(THINKING), cutoff_len=500), tiny_tokenizer()) == ["y<|im_end|>\n"]
        with pytest.raises(ConfigError, match="does not write tools"):
            encode_sft([spec], tiny_tokenizer(), cutoff_len=500)

    def test_settings_of_a_row_for_the_template(self, tmp_path):
        rude = CHAT_TEMPLATE.replace("assistant\n{%", "assistant\n{{ tone }}{%")
        row = {**GOOD, "chat_template_kwargs": {"tone": "kind"}}
        with pytest.raises(ConfigError, match="does not write 'tone' of chat_template_kwargs"):
            encoded(tmp_path, [row])
        assert encoded(tmp_path, [row], rude)[0] == {}


class TestReasoning:
    thoughtful = said("4", reasoning_content="easy")

    def test_thoughts_are_targets(self, tmp_path):
        assert encoded(tmp_path, [chat(("user", "2+2"), self.thoughtful)], THINKING) == ({}, [["<think>easy</think>4<|im_end|>\n"]])

    @pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
    def test_a_template_that_does_not_write_them_is_named(self, tmp_path, name):
        row = chat(("user", "2+2"), said("4", **{name: "easy"}))
        assert encoded(tmp_path, [row, GOOD])[0] == {f"the chat template does not write {name}": 1}

    def test_thoughts_of_earlier_answers(self, tmp_path):
        """Qwen3's template leaves them out of the history, as generation will see it: then they must not be missing from a target."""
        row = chat(("user", "1+1"), said("2", reasoning_content="hm"), ("user", "2+2"), self.thoughtful)
        reason = "the chat template does not write reasoning_content of earlier answers; mask_history true trains on the last one only"
        assert encoded(tmp_path, [row, GOOD], THINKING)[0] == {reason: 1}
        assert encoded(tmp_path, [row], THINKING, mask_history=True) == ({}, [["<think>easy</think>4<|im_end|>\n"]])
        unweighted = chat(("user", "1+1"), said("2", reasoning_content="hm", weight=0), ("user", "2+2"), self.thoughtful)
        assert encoded(tmp_path, [unweighted], THINKING) == ({}, [["<think>easy</think>4<|im_end|>\n"]])

    def test_other_fields_are_reported_once(self, tmp_path, caplog):
        row = chat({"role": "user", "content": "q", "name": "bob"}, said("a", refusal=None, annotations=[], date="today"))
        assert encoded(tmp_path, [row, row]) == ({}, [["a<|im_end|>\n"]] * 2)
        assert sorted(record.getMessage() for record in caplog.records) == [
            "'date' of messages of role assistant is not read: the chat template does not write it",
            "'name' of messages of role user is not read: the chat template does not write it",
        ]

    def test_a_field_that_the_template_writes_is_handed_over(self, tmp_path):
        template = CHAT_TEMPLATE.replace("{{ message['role'] }}", "{{ message['role'] }}{{ message.name or '' }}")
        write_lines(tmp_path / "d.jsonl", [chat({"role": "user", "content": "q", "name": "bob"}, ("assistant", "a"))])
        data = encode_sft(find_datasets(["d.jsonl"], tmp_path, stage="sft"), tiny_tokenizer(template), cutoff_len=500)
        assert "userbob\nq" in tiny_tokenizer().decode(data.dataset[0]["input_ids"])


class TestShippedTemplates:
    """What is found out about templates as they are shipped with models."""

    @pytest.mark.parametrize(
        ("name", "calls", "tools", "tool_turns", "system", "thoughts", "earlier_thoughts"),
        [
            ("qwen3", "object", True, True, True, True, False),
            ("qwen2_5", "object", True, True, True, False, False),
            ("deepseekv3", "text", False, True, True, False, False),
            ("llama3", None, False, True, True, False, False),
            ("llama3_1", "object", True, True, True, False, False),
            ("phi3", None, False, False, True, False, False),
            ("glm4moe", "object", True, True, True, True, False),
            ("nemotron_3_nano", "object", True, True, True, True, True),
        ],
    )
    def test_what_is_written(self, name, calls, tools, tool_turns, system, thoughts, earlier_thoughts):
        import trl

        style = chat_format(tiny_tokenizer((Path(trl.__file__).parent / f"chat_templates/{name}.jinja").read_text(encoding="utf-8")))
        found = (style.call_arguments, style.writes_tools(), style.writes_role("tool"), style.writes_role("system"))
        assert found == (calls, tools, tool_turns, system)
        assert style.writes_field("assistant", "reasoning_content", followed=False) is thoughts
        assert style.writes_field("assistant", "reasoning_content", followed=True) is earlier_thoughts

    def test_thoughts_that_are_written_beside_calls_only(self):
        import trl

        style = chat_format(tiny_tokenizer((Path(trl.__file__).parent / "chat_templates/gemma4.jinja").read_text(encoding="utf-8")))
        assert not style.writes_field("assistant", "reasoning_content", followed=False)
        assert style.writes_field("assistant", "reasoning_content", followed=False, calls=True)

    def test_a_template_is_asked_once(self, tmp_path, monkeypatch):
        tokenizer = tiny_tokenizer(THINKING)
        rendered = []
        render = type(tokenizer).apply_chat_template

        def counting(self, messages, **settings):
            rendered.append(settings.get("tokenize"))
            return render(self, messages, **settings)

        monkeypatch.setattr(type(tokenizer), "apply_chat_template", counting)
        row = chat(("user", "q"), said("a", reasoning_content="hm"), tools=[TOOL])
        encoded(tmp_path, [row], tokenizer=tokenizer)
        probes = rendered.count(False)
        encoded(tmp_path, [row] * 5, tokenizer=tokenizer)
        assert probes > 0 and rendered.count(False) == probes and rendered.count(True) == 2 * 6


class TestWeights:
    def test_an_answer_of_weight_0_is_no_target(self, tmp_path):
        row = chat(("user", "q1"), said("bad", weight=0), ("user", "q2"), said("good", weight=1))
        assert encoded(tmp_path, [row]) == ({}, [["good<|im_end|>\n"]])
        _, ((before, after),) = encoded(tmp_path, [row], train_on_prompt=True)
        assert before.endswith("<|im_start|>assistant\n") and after.startswith("<|im_start|>user\nq2")

    def test_in_sharegpt_format(self, tmp_path):
        row = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "bad", "weight": 0.0}, *GOOD_TALK["conversations"]]}
        assert encoded(tmp_path, [row]) == ({}, [["y<|im_end|>\n"]])

    def test_no_target_left(self, tmp_path):
        row = chat(("user", "q1"), said("bad", weight=1), ("user", "q2"), said("worse", weight=0))
        assert encoded(tmp_path, [row, GOOD], mask_history=True)[0] == {"every answer has weight 0": 1}

    @pytest.mark.parametrize("weight", [0.5, 2, -1, "0", True])
    def test_other_weights_are_refused_with_their_line(self, tmp_path, weight):
        with pytest.raises(
            ConfigError, match=r"d\.jsonl:2: dataset: column 'messages': 'weight' of a message is .*; only 0 \(no target\) and 1 are known"
        ):
            encoded(tmp_path, [GOOD, chat(("user", "q"), said("a", weight=weight))])


class TestEnds:
    def test_eos_is_added_where_the_template_ends_answers_with_nothing(self, tmp_path, caplog):
        assert encoded(tmp_path, [GOOD], GLM) == ({}, [["y<|im_end|>"]])
        assert not caplog.records
        assert encoded(tmp_path, [GOOD], GLM + "{{ ' \n' }}") == ({}, [["y \n<|im_end|>"]])

    def test_the_mark_of_the_next_turn_ends_an_answer_if_it_is_one_token(self, tmp_path, caplog):
        row = chat(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
        tokenizer = tiny_tokenizer(GLM)
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>"]})
        assert encoded(tmp_path, [row], tokenizer=tokenizer) == ({}, [["b<|user|>", "d<|im_end|>"]])
        assert chat_format(tokenizer).stop_ids == [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|user|>")]
        assert not caplog.records

    def test_a_warning_where_it_is_not(self, tmp_path, caplog):
        row = chat(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
        assert encoded(tmp_path, [row] * 3, GLM) == ({}, [["b", "d<|im_end|>"]] * 3)
        (record,) = caplog.records
        assert "with no token of its own: the model will not learn to stop there" in record.getMessage()

    def test_a_warning_where_the_end_is_ordinary_text(self, tmp_path, caplog):
        template = CHAT_TEMPLATE.replace("<|im_end|>", "</turn>")
        assert encoded(tmp_path, [GOOD] * 3, template) == ({}, [["y</turn>\n"]] * 3)
        (record,) = caplog.records
        assert "ends answers with '</turn>', which is no special token of the tokenizer: the model will not learn to stop" in record.getMessage()

    def test_an_end_of_text_and_a_token(self, tmp_path, caplog):
        template = CHAT_TEMPLATE.replace("<|im_end|>", "</turn><|im_end|>")
        assert encoded(tmp_path, [GOOD], template) == ({}, [["y</turn><|im_end|>\n"]])
        assert chat_format(tiny_tokenizer(template)).end_problem == "" and not caplog.records

    def test_a_call_that_the_template_does_not_end(self, tmp_path):
        template = CHAT_TEMPLATE.replace(
            "<|im_end|>", "{% if message.tool_calls %}<call>{{ message.tool_calls[0].function | tojson }}{% else %}<|im_end|>{% endif %}"
        )
        _, ((call,),) = encoded(tmp_path, [chat(("user", "q"), said(tool_calls=[CALL]))], template)
        assert call.endswith("}<|im_end|>")

    def test_a_warning_without_an_eos_token(self, tmp_path, caplog):
        tokenizer = tiny_tokenizer(GLM)
        tokenizer.eos_token = None
        assert encoded(tmp_path, [GOOD], tokenizer=tokenizer) == ({}, [["y"]])
        assert "there is no eos token: the model will not learn to stop" in caplog.text

    def test_a_token_that_begins_and_ends_texts(self, tmp_path):
        tokenizer = tiny_tokenizer(
            "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
        )
        tokenizer.bos_token = tokenizer.eos_token  # as GPT-2's
        assert encoded(tmp_path, [GOOD], tokenizer=tokenizer) == ({}, [["y<|im_end|>"]])

    def test_chatml_needs_its_tokens(self, tmp_path):
        base = tiny_tokenizer(BUILT_IN["chatml"])
        base.eos_token = "<|endoftext|>"
        assert fit_tokenizer("default", base) == [] and fit_tokenizer(None, base) == [] and base.eos_token == "<|endoftext|>"
        assert fit_tokenizer("chatml", base) == [] and base.eos_token == "<|im_end|>"
        assert encoded(tmp_path, [GOOD], tokenizer=base) == ({}, [["y<|im_end|>\n"]])


class TestFirstTurns:
    greeting = (("gpt", "hello"), ("human", "hi"), ("gpt", "yo"))

    @pytest.mark.parametrize("mask_history", [False, True])
    def test_a_conversation_that_the_assistant_begins(self, tmp_path, mask_history):
        expected = ["yo<|im_end|>\n"] if mask_history else ["hello<|im_end|>\n", "yo<|im_end|>\n"]
        assert encoded(tmp_path, [talk(self.greeting)], mask_history=mask_history) == ({}, [expected])

    def test_without_a_header_to_look_for(self, tmp_path):
        template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}"
        assert encoded(tmp_path, [talk(self.greeting)], template)[1][0][0] == "hello<|im_end|>"

    @pytest.mark.parametrize("template", sorted(BUILT_IN))
    def test_in_built_in_templates(self, tmp_path, template):
        _, (targets,) = encoded(tmp_path, [talk(self.greeting)], BUILT_IN[template])
        assert [target.strip() for target in targets] == ["hello<|im_end|>", "yo<|im_end|>"]


class TestEmptyAnswers:
    @pytest.mark.parametrize("answer", ["", " \n", None])
    def test_nothing_is_never_trained_as_an_answer(self, tmp_path, answer):
        alpaca = {"instruction": "x", "output": "y"}
        assert encoded(tmp_path, [alpaca, {**alpaca, "output": answer}])[0] == {"malformed": 1}
        inner = [("human", "a"), ("gpt", answer), ("human", "c"), ("gpt", "d")]
        assert encoded(tmp_path, [GOOD_TALK, talk(inner), talk(inner[:2])])[0] == {"malformed": 2}
        assert encoded(tmp_path, [GOOD, chat(("user", "q"), said(answer))], train_on_prompt=True)[0] == {"malformed": 1}

    def test_an_empty_turn_that_is_no_target_may_stay(self, tmp_path):
        row = talk([("human", "a"), ("gpt", ""), ("human", "c"), ("gpt", "d")])
        assert encoded(tmp_path, [row], mask_history=True) == ({}, [["d<|im_end|>\n"]])

    def test_an_empty_cell_of_a_csv_file(self, tmp_path):
        (tmp_path / "d.csv").write_text("instruction,output\na,b\nc,\n")
        data = encode_sft(find_datasets(["d.csv"], tmp_path, stage="sft"), tiny_tokenizer(), cutoff_len=100)
        assert len(data.dataset) == 1 and data.dropped == {"malformed": 1}


class TestContent:
    def test_parts_of_text_are_joined(self, tmp_path):
        parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
        assert encoded(tmp_path, [chat(("user", parts), ("assistant", parts))]) == ({}, [["ab<|im_end|>\n"]])

    @pytest.mark.parametrize(
        ("part", "kind"), [({"type": "image_url", "image_url": {"url": "x"}}, "of type 'image_url'"), ("text", "text"), (None, "null")]
    )
    def test_other_parts_are_refused_with_their_line(self, tmp_path, part, kind):
        with pytest.raises(
            ConfigError, match=rf"d\.jsonl:2: .*'content' of a message is a list, not text: only parts of type 'text' are read, and one is {kind}"
        ):
            encoded(tmp_path, [GOOD, chat(("user", [{"type": "text", "text": "a"}, part]), ("assistant", "b"))])

    @pytest.mark.parametrize("column", ["conversations", "messages"])
    @pytest.mark.parametrize(("role", "content"), [("from", "value"), ("role", "content")])
    @pytest.mark.parametrize("names", [("human", "gpt"), ("user", "assistant")])
    def test_keys_and_roles_of_either_format(self, tmp_path, column, role, content, names):
        row = {column: [{role: names[0], content: "q"}, {role: names[1], content: "a"}]}
        assert encoded(tmp_path, [row]) == ({}, [["a<|im_end|>\n"]])

    @pytest.mark.parametrize("empty", [[], None])
    def test_a_first_row_that_shows_nothing(self, tmp_path, empty):
        assert encoded(tmp_path, [{"messages": empty}, GOOD]) == ({"malformed": 1}, [["y<|im_end|>\n"]])
        as_sharegpt = {"messages": GOOD_TALK["conversations"]}
        assert encoded(tmp_path, [{"messages": empty}, as_sharegpt]) == ({"malformed": 1}, [["y<|im_end|>\n"]])
        assert encoded(tmp_path, [{"prompt": empty, "completion": empty}, {"prompt": GOOD["messages"][:1], "completion": GOOD["messages"][1:]}])[
            1
        ] == [["y<|im_end|>\n"]]

    def test_mixed_keys_within_a_row(self, tmp_path):
        row = {"conversations": [{"from": "human", "value": "q"}, {"role": "assistant", "content": "a"}]}
        assert encoded(tmp_path, [GOOD_TALK, row])[0] == {"malformed": 1}


class TestColumnsOfFilesNamedDirectly:
    def test_system_and_history(self, tmp_path):
        row = {"instruction": "and then?", "output": "end", "system": "be kind", "history": [["a", "b"], ["c", "d"]]}
        assert encoded(tmp_path, [{"instruction": "x", "output": "y"}, row])[1][1] == ["b<|im_end|>\n", "d<|im_end|>\n", "end<|im_end|>\n"]
        (spec,) = find_datasets(["d.jsonl"], tmp_path, stage="sft")
        assert to_messages(load_rows(spec)[1], spec)[0] == {"role": "system", "content": "be kind"}

    def test_system_of_conversations(self, tmp_path):
        for row in (GOOD, GOOD_TALK):
            write_lines(tmp_path / "d.jsonl", [{**row, "system": "be kind"}])
            (spec,) = find_datasets(["d.jsonl"], tmp_path, stage="sft")
            assert to_messages(load_rows(spec)[0], spec)[0] == {"role": "system", "content": "be kind"}

    def test_csv_holds_lists_as_json(self, tmp_path):
        (tmp_path / "d.csv").write_text('instruction,output,history\nx,y,"[[""a"", ""b""]]"\nx,y,\n')
        (spec,) = find_datasets(["d.csv"], tmp_path, stage="sft")
        assert load_rows(spec)["history"][:] == [[["a", "b"]], []]

    @pytest.mark.parametrize("column", ["images", "chosen", "kto_tag", "label", "reasoning_content", "messages"])
    def test_what_is_not_read_is_reported(self, tmp_path, caplog, column):
        encoded(tmp_path, [{**GOOD_TALK, "id": 1, column: None}, {**GOOD_TALK, column: ["x"]}])
        (record,) = caplog.records
        assert f"dataset: '{column}' is not read" in record.getMessage()

    def test_what_is_read_or_empty_is_not(self, tmp_path, caplog):
        encoded(tmp_path, [{**GOOD_TALK, "id": 1, "images": [], "chosen": None, "label": ""}])
        assert not caplog.records

    def test_an_entry_that_leaves_a_column_out(self, tmp_path, caplog):
        spec_of(tmp_path, [{"instruction": "x", "input": "", "output": "y", "system": "be kind"}])
        assert "d.jsonl: dataset: 'system' is not read. What is to be read can be named in `columns` of 'd' in dataset_info.json" in caplog.text
